"""optimization/: layers with less work, the text's keys kept, the U-Net's step as a recording.

Rewrites for a GPU run in Triton's interpreter here. Recordings are made by a stand-in that runs the step
again on the buffers; all else is as on a GPU. What only a GPU shows, that CUDA's graph replays it, is in
tests marked for one.
"""

import copy

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
def test_an_exchanged_module_is_recorded_again(recorded):
    unet, recorder = recorded
    step = arguments()
    unet(**step)
    block = unet.mid_block.resnets[0]
    block.conv1 = torch.nn.Conv2d(16, 16, 3, padding=1, dtype=torch.float64)
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


@torch.no_grad()
def test_recordings_follow_texts_weights_and_autocast(recorded):
    unet, recorder = recorded
    first, second = arguments(), arguments(seed=1)
    second["timestep"] = first["timestep"]
    alike = arguments(seed=2) | {"encoder_hidden_states": first["encoder_hidden_states"]}
    results = [unet(**step).sample for step in (first, second, alike, second, first)]
    assert recorder.recordings == 1
    with torch.autocast("cpu", torch.bfloat16):
        unet(**first)
    assert recorder.recordings == 2
    results.append(unet(**first).sample)
    unet.up_blocks[0].resnets[0].conv1.weight = torch.nn.Parameter(
        2 * unet.up_blocks[0].resnets[0].conv1.weight
    )
    changed = unet(**first).sample
    assert recorder.recordings == 3  # the old one reads the old weight
    optimization.restore(unet)
    assert_close(changed, unet(**first).sample, atol=1e-13)
    unet.up_blocks[0].resnets[0].conv1.weight.div_(2)
    for step, sample in zip((first, second, alike, second, first, first), results, strict=True):
        assert_close(sample, unet(**step).sample, atol=1e-13)


def test_recordings_of_inference_mode_go_on_outside_and_copies_have_their_own(recorded):
    unet, recorder = recorded
    with torch.inference_mode():
        unet(**arguments())
    with torch.no_grad():
        step = arguments(seed=1)
        sample = unet(**step).sample
        other = copy.deepcopy(unet)
        unet.conv_out.weight.mul_(2)
        assert_close(other(**step).sample, sample, atol=1e-13)
        assert_close(sample, optimization.restore(other)(**step).sample, atol=1e-13)
    assert recorder.recordings == 1


def test_a_compiled_model_that_was_moved_off_its_gpu_says_so(unet):
    GraphedStep(unet).install()
    with (
        torch.no_grad(),
        pytest.raises(minidiff.ops.BackendUnavailable, match="this one is on cpu; move it back"),
    ):
        unet(**arguments())


@torch.no_grad()
def test_texts_that_are_missing_or_do_not_fit_are_named():
    unet = tiny_pipeline().unet
    given = {name: x.float() if torch.is_tensor(x) else x for name, x in arguments().items()}
    with pytest.raises(TypeError, match="encoder_hidden_states"):
        minidiff.optimize(unet)(given["sample"], 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        unet(given["sample"], 3, given["encoder_hidden_states"][..., :5])
    sample = unet(**given).sample
    assert_close(sample, optimization.restore(unet)(**given).sample, atol=2e-5)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


def compiled():
    """A compiled U-Net on a GPU in float32, an equal plain one, and arguments for them."""
    plain = tiny_pipeline().to("cuda").unet
    steps = [{k: v.cuda().float() if torch.is_tensor(v) else v for k, v in arguments(seed=seed).items()}
             for seed in range(3)]  # fmt: skip
    return optimization.compile_unet(copy.deepcopy(plain)), plain, steps


def assert_all_same(unet, plain, steps):
    for step in steps:
        assert_close(unet(**step).sample, plain(**step).sample, atol=2e-3)  # TF32 in convolutions


@on_gpu
@torch.no_grad()
@pytest.mark.parametrize("how", ["in place", "inference mode", "loading", "another tensor", "round trip"])
def test_a_cuda_graph_reads_weights_that_were_changed(how):
    unet, plain, steps = compiled()
    assert_all_same(unet, plain, steps)
    for model in (unet, plain):
        with torch.inference_mode(how == "inference mode"), torch.no_grad():
            for layer in ("mid_block.resnets.0.time_emb_proj", "up_blocks.0.upsamplers.0.conv", "conv_out"):
                weight = model.get_submodule(layer).weight
                if how == "another tensor":
                    weight.data = 1.5 * weight
                else:
                    weight.mul_(1.5)
            for block in model.modules():
                if hasattr(block, "attn1"):
                    block.attn1.to_q.weight.mul_(1.5), block.attn2.to_k.weight.mul_(1.5)
        if how == "loading":
            model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})
        elif how == "round trip":
            model.cpu().cuda()
    assert_all_same(unet, plain, steps)


@on_gpu
@torch.no_grad()
def test_a_cuda_graph_under_autocast_and_inference_mode_gives_what_the_plain_step_does():
    unet, plain, steps = compiled()
    with torch.inference_mode():
        assert_all_same(unet, plain, steps)
    for _ in range(2):  # recorded in one block, replayed in another
        with torch.autocast("cuda", torch.float16):
            for step in steps:
                assert_close(unet(**step).sample, plain(**step).sample, atol=2e-2)
        torch.cuda.empty_cache()
    assert_all_same(unet, plain, steps)


@on_gpu
@torch.no_grad()
def test_replaying_a_cuda_graph_waits_for_nothing():
    unet, _, steps = compiled()
    steps = [step | {"timestep": torch.tensor([5.0, 5.0], device="cuda")} for step in steps]
    unet(**steps[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps:
            unet(**step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
