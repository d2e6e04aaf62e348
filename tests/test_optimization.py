"""optimization/: layers with less work, the text's keys kept, the U-Net's step as a recording.

Rewrites for a GPU run in Triton's interpreter here. Recordings are made by a stand-in that runs the step
again on the buffers; all else is as on a GPU. What only a GPU shows, that CUDA's graph replays it, is in
tests marked for one.
"""

import pytest
import torch
from parity import assert_close
from test_structure import tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

import minidiff
from minidiff import optimization
from minidiff.optimization import graphs
from minidiff.optimization.graphs import GraphedStep
from minidiff.optimization.steps import Step


@pytest.fixture
def unet():
    return tiny_pipeline().unet.double()


def arguments(batch=2, side=8, seed=0, **conditions):
    torch.manual_seed(seed)
    sample = torch.randn(batch, 4, side, side + 2, dtype=torch.float64)
    text = torch.randn(batch, 77, 12, dtype=torch.float64)
    return {"sample": sample, "timestep": 7 + seed, "encoder_hidden_states": text} | conditions


class Recorder:
    """record for a CPU: replaying is running the function again, into the same tensor."""

    def __init__(self):
        self.recordings = self.replays = 0

    def __call__(self, function, device):
        result = function().clone()
        self.recordings += 1

        def replay():
            self.replays += 1
            return result.copy_(function())

        return replay


@pytest.fixture
def recorded(unet):
    """The U-Net, its step recorded by a stand-in, and the stand-in."""
    recorder = Recorder()
    unet.to(memory_format=torch.channels_last)
    GraphedStep(unet, recorder).install()
    return unet, recorder


class Products(TorchDispatchMode):
    """Counts the products with each of these weights, by their addresses."""

    def __init__(self, weights):
        super().__init__()
        self.addresses, self.count = {weight.data_ptr() for weight in weights}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(torch.is_tensor(x) and x.data_ptr() in self.addresses for x in args) and (
            function in (torch.ops.aten.t.default, torch.ops.aten.linear.default)
        )
        return function(*args, **(kwargs or {}))


def kept(unet):
    """The keys of a U-Net that keeps them."""
    step = Step(unet)
    step.install()
    return step.keys


@torch.no_grad()
def test_keys_of_a_text_are_computed_once_and_change_nothing(unet):
    given = [arguments(seed=seed) for seed in range(3)]
    for step in given[1:]:
        step["encoder_hidden_states"] = given[0]["encoder_hidden_states"]
    expected = [unet(**step).sample for step in given]
    with Products(layer.to_k.weight for layer in kept(unet).layers) as products:
        for step, sample in zip(given, expected, strict=True):
            assert_close(unet(**step).sample, sample, atol=1e-14)
    assert products.count == 4


@torch.no_grad()
@pytest.mark.parametrize("change", ["another text", "in place", "another shape", "weights"])
def test_keys_follow_what_they_are_made_of(unet, change):
    step = arguments()
    keys = kept(unet)
    before = unet(**step).sample
    if change == "another text":
        step["encoder_hidden_states"] = step["encoder_hidden_states"] + 1
    elif change == "in place":
        step["encoder_hidden_states"].mul_(2)
    elif change == "another shape":
        step = arguments(batch=3)
    else:
        keys.layers[1].to_k.weight.mul_(3)
    after = unet(**step).sample
    assert after.shape != before.shape or not torch.allclose(after, before)
    assert_close(after, optimization.restore(unet)(**step).sample, atol=1e-14)


def test_keys_of_inference_tensors_are_computed_each_time(unet):
    with torch.inference_mode():
        step = arguments()
        kept(unet)
        unet(**step)
        step["encoder_hidden_states"].mul_(2)
        sample = unet(**step).sample
        assert_close(sample, optimization.restore(unet)(**step).sample, atol=1e-14)


@torch.no_grad()
def test_a_recorded_step_gives_what_the_plain_one_does(recorded):
    unet, recorder = recorded
    steps = [arguments(), arguments(seed=1), arguments(batch=3, seed=2), arguments(seed=3)]
    steps[1]["timestep"] = torch.tensor([3.0, 5.0])
    steps[3]["encoder_attention_mask"] = (torch.rand(2, 77) > 0.3).double()
    results = [unet(**step).sample for step in steps]
    assert (recorder.recordings, recorder.replays) == (3, 4)  # a number and a tensor are one kind
    optimization.restore(unet)
    for step, sample in zip(steps, results, strict=True):
        assert_close(sample, unet(**step).sample, atol=1e-13)


@torch.no_grad()
def test_shapes_are_recorded_once_and_the_oldest_forgotten(recorded):
    unet, recorder = recorded
    for seed in range(5):
        unet(**arguments(seed=seed))
    assert (recorder.recordings, recorder.replays) == (1, 5)
    for batch in range(3, 3 + graphs.MOST_GRAPHS):
        unet(**arguments(batch=batch))
    unet(**arguments(batch=3))
    assert recorder.recordings == 1 + graphs.MOST_GRAPHS
    unet(**arguments())
    assert recorder.recordings == 2 + graphs.MOST_GRAPHS


@torch.no_grad()
def test_a_model_that_was_moved_is_recorded_again(recorded):
    unet, recorder = recorded
    step = arguments()
    unet(**step)
    unet.float().double()
    sample = unet(**step).sample
    assert recorder.recordings == 2
    assert_close(sample, optimization.restore(unet)(**step).sample, atol=1e-13)


@torch.no_grad()
def test_a_result_is_not_overwritten_by_the_next_step(recorded):
    first = recorded[0](**arguments()).sample
    kept = first.clone()
    recorded[0](**arguments(seed=1))
    assert torch.equal(first, kept)


def test_a_recorded_step_refuses_to_lose_gradients(recorded):
    with pytest.raises(RuntimeError, match=r"makes no gradients: call it under torch\.no_grad\(\)"):
        recorded[0](**arguments())


def test_a_pipeline_with_recordings_draws_the_same_picture():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "generator": generator, "output_type": "np"}
        return pipe("a red cube", negative_prompt="blue", **options).images

    expected = draw()
    recorder, names = Recorder(), list(pipe.unet.state_dict())
    GraphedStep(pipe.unet, recorder).install()
    assert_close(draw(), expected, atol=1e-6)
    assert (recorder.recordings, recorder.replays) == (1, 5)
    assert list(pipe.unet.state_dict()) == names


def test_without_a_gpu_compile_says_what_it_needs(unet):
    with pytest.raises(
        minidiff.ops.BackendUnavailable, match="needs a GPU, and the U-Net is on cpu; move it"
    ):
        tiny_pipeline().compile()
    with pytest.raises(TypeError, match="takes a UNet2DConditionModel, not a Linear"):
        optimization.compile_unet(torch.nn.Linear(1, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_cuda_graph_gives_what_the_plain_step_does(backend):
    pipe = tiny_pipeline().to("cuda", torch.float16)
    minidiff.ops.use_backend(pipe.unet, attention=backend, group_norm=backend)
    given = [{k: v.cuda().half() if torch.is_tensor(v) else v for k, v in arguments(seed=seed).items()}
             for seed in range(3)]  # fmt: skip
    with torch.no_grad():
        expected = [pipe.unet(**step).sample for step in given]
        pipe.compile()
        for step, sample in zip(given, expected, strict=True):
            assert_close(pipe.unet(**step).sample, sample, atol=5e-3)
