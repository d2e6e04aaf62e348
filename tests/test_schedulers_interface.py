"""What people and pipelines rely on beside the numbers: signatures, kinds in and out, noise, parts."""

import inspect
from time import perf_counter

import diffusers
import numpy as np
import pytest
import torch
from parity import assert_close, both

import minidiff

NAMES = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler")
WITH_X0 = ("DDPMScheduler", "DDIMScheduler")


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def named(name, steps=5, **config):
    scheduler = getattr(minidiff, name)(**config)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["__init__", "step", "set_timesteps"])
def test_signatures_are_diffusers(name, method):
    def parameters(library):
        found = inspect.signature(getattr(getattr(library, name), method)).parameters.values()
        # a tuple takes the place of a list as a default
        return [(p.name, p.kind, [] if p.default == () else p.default) for p in found]

    ours, theirs = parameters(minidiff), parameters(diffusers)
    required = inspect.Parameter.empty
    if method == "set_timesteps":  # ours says None where diffusers' annotation or default does
        ours, theirs = ([(n, k, None if d is required else d) for n, k, d in p] for p in (ours, theirs))
    assert ours == theirs


def test_pipelines_see_which_schedulers_take_eta_and_a_generator():
    takes = {name: set(inspect.signature(getattr(minidiff, name)().step).parameters) for name in NAMES}
    assert {n for n in NAMES if "generator" in takes[n]} == {"DDPMScheduler", "DDIMScheduler"}
    assert {n for n in NAMES if "eta" in takes[n]} == {"DDIMScheduler"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 5), (1, 3, 2, 4, 5)], ids=len)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_kind_and_dtype_of_the_sample_are_kept(name, shape, dtype):
    tensors = [torch.from_numpy(normal(*shape, seed=i)).to(getattr(torch, dtype)) for i in (0, 1)]
    generator = {"generator": torch.Generator()} if name in WITH_X0 else {}
    scheduler = named(name)
    result = scheduler.step(tensors[0], scheduler.timesteps[0], tensors[1], **generator)
    assert all(
        torch.is_tensor(x) and x.dtype == tensors[1].dtype and x.shape == shape for x in result.values()
    )
    if dtype != "bfloat16":  # NumPy has none
        generator = {"generator": torch.Generator()} if name in WITH_X0 else {}
        scheduler = named(name)
        arrays = [x.numpy() for x in tensors]
        again = scheduler.step(arrays[0], scheduler.timesteps[0], arrays[1], **generator)
        for key, value in again.items():
            assert type(value) is np.ndarray and value.dtype == dtype
            assert (value == result[key].numpy()).all()


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_alone_and_may_be_part_of_a_graph(name):
    scheduler = named(name)
    sample = torch.from_numpy(normal(2, 3, 4, 4)).requires_grad_()
    for t in scheduler.timesteps:
        model_output = sample * 0.5
        kept = sample.detach().clone(), model_output.detach().clone()
        after = scheduler.step(model_output, t, sample).prev_sample
        assert torch.equal(sample, kept[0]) and torch.equal(model_output, kept[1])
        assert not after.requires_grad
        sample = after.requires_grad_()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kind", [int, float, np.int64, np.float32, np.array, torch.tensor, lambda t: torch.tensor([t])]
)
def test_a_timestep_may_come_in_any_form(name, kind):
    results = []
    for form in (int, kind):
        scheduler = named(name)
        generator = {"generator": torch.Generator().manual_seed(0)} if name in WITH_X0 else {}
        t = form(int(scheduler.timesteps[0]))
        results.append(scheduler.step(normal(1, 3, 4), t, normal(1, 3, 4), **generator).prev_sample)
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_result_has_attributes_keys_and_a_tuple(name):
    scheduler = named(name)
    arguments = (normal(2, 3, 4, seed=1), scheduler.timesteps[0], normal(2, 3, 4))
    generator = {"generator": torch.Generator().manual_seed(0)} if name in WITH_X0 else {}
    result = scheduler.step(*arguments, **generator)
    scheduler = named(name)
    generator = {"generator": torch.Generator().manual_seed(0)} if name in WITH_X0 else {}
    plain = scheduler.step(*arguments, **generator, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == (2 if name in WITH_X0 else 1) == len(result)
    assert (result.prev_sample == plain[0]).all() and result["prev_sample"] is result[0] is result.prev_sample
    assert ("pred_original_sample" in result) == (name in WITH_X0)
    with pytest.raises(AttributeError, match="no 'denoised'; it has prev_sample"):
        result.denoised  # noqa: B018


@pytest.mark.parametrize("name", WITH_X0)
def test_the_predicted_clean_sample_equals_diffusers(name):
    ours, theirs = both(name, 5, clip_sample=False)
    for t in theirs.timesteps:
        model_output, sample = (torch.from_numpy(normal(2, 3, 4, 4, seed=i)) for i in (1, 2))
        expected = theirs.step(model_output, t, sample).pred_original_sample
        assert_close(ours.step(model_output, t, sample).pred_original_sample, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_fast(name):
    """30 to 80 µs on a free core, where diffusers needs 70 to 380; the limit catches what is far off."""
    scheduler, x = named(name, 50), normal(1, 4, 64, 64)
    generator = {"generator": np.random.default_rng(0)} if name in WITH_X0 else {}
    durations = []
    for t in scheduler.timesteps:
        start = perf_counter()
        scheduler.step(x, t, x, **generator)
        durations.append(perf_counter() - start)
    assert min(durations) < 1e-3


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name, options", [("DDPMScheduler", {}), ("DDIMScheduler", {"eta": 1.0})])
def test_the_noise_is_torchs_for_tensors_and_for_arrays(name, options, dtype):
    ours, theirs = both(name, 5)
    t = theirs.timesteps[1]
    arrays = normal(2, 3, 4, dtype=dtype, seed=1), normal(2, 3, 4, dtype=dtype)
    tensors = [torch.from_numpy(a) for a in arrays]
    tolerance = {"rtol": 0, "atol": 4e-3 if dtype == "float16" else 1e-6}
    for given in (7, [7], [7, 8]):  # one generator; a list of one; one for each row

        def generators(given=given):
            made = [torch.Generator().manual_seed(seed) for seed in np.atleast_1d(given).tolist()]
            return made if isinstance(given, list) else made[0]

        expected = theirs.step(tensors[0], t, tensors[1], generator=generators(), **options).prev_sample
        for inputs in (arrays, tensors):
            step = ours.step(inputs[0], t, inputs[1], generator=generators(), **options)
            assert_close(step.prev_sample, expected, **tolerance)
    torch.manual_seed(3)  # without a generator: torch's global one
    expected = theirs.step(tensors[0], t, tensors[1], **options).prev_sample
    torch.manual_seed(3)
    assert_close(ours.step(arrays[0], t, arrays[1], **options).prev_sample, expected, **tolerance)


def test_a_row_of_a_batch_equals_its_seed_alone():
    scheduler = named("DDPMScheduler")
    t, x = scheduler.timesteps[0], normal(3, 4, 5)
    batch = scheduler.step(x, t, x, generator=[np.random.default_rng(i) for i in range(3)]).prev_sample
    for i in range(3):
        alone = scheduler.step(x[i : i + 1], t, x[i : i + 1], generator=np.random.default_rng(i)).prev_sample
        assert (batch[i : i + 1] == alone).all()


def test_ddim_takes_the_noise_itself():
    ours, theirs = both("DDIMScheduler", 5)
    model_output, sample, noise = (torch.from_numpy(normal(2, 3, 4, seed=i)) for i in range(3))
    expected = theirs.step(model_output, 400, sample, eta=0.8, variance_noise=noise).prev_sample
    assert_close(
        ours.step(model_output, 400, sample, eta=0.8, variance_noise=noise).prev_sample, expected, atol=1e-6
    )


def test_nothing_is_drawn_where_nothing_is_added():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    x = normal(1, 2, 3)
    named("DDIMScheduler").step(x, 400, x, generator=generator)
    named("DDPMScheduler").step(x, 0, x, generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-6), ("float64", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2)]
)
@pytest.mark.parametrize("name", NAMES)
def test_adding_noise_equals_diffusers(name, dtype, tolerance):
    ours, theirs = both(name)
    samples, noise = (torch.from_numpy(normal(4, 3, 5, 6, seed=i)).to(getattr(torch, dtype)) for i in (1, 2))
    for steps in (None, 10):
        if steps:
            ours.set_timesteps(steps)
            theirs.set_timesteps(steps)
        timesteps = (
            torch.tensor([0, 999, 500, 3])
            if steps is None
            else torch.as_tensor(theirs.timesteps[[0, 3, 5, 9]])
        )
        expected = theirs.add_noise(samples, noise, timesteps)
        result = ours.add_noise(samples, noise, timesteps)
        assert result.dtype == samples.dtype
        assert_close(result, expected, rtol=tolerance, atol=tolerance)
        if dtype != "bfloat16":
            arrays = samples.numpy(), noise.numpy(), timesteps.numpy()
            assert_close(ours.add_noise(*arrays), expected, rtol=tolerance, atol=tolerance)
        assert_close(ours.add_noise(samples, noise, timesteps.tolist()), result)


def test_adding_noise_follows_the_step_that_sampling_has_come_to():
    ours, theirs = both("UniPCMultistepScheduler", 10)
    samples, noise = (torch.from_numpy(normal(2, 3, 4, seed=i)) for i in (1, 2))
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(4)
    timesteps = theirs.timesteps[[4, 4]]
    assert_close(
        ours.add_noise(samples, noise, timesteps), theirs.add_noise(samples, noise, timesteps), atol=1e-6
    )
    for scheduler in (ours, theirs):
        scheduler.step(noise, timesteps[0], samples)
    assert (ours.begin_index, ours.step_index) == (theirs.begin_index, theirs.step_index) == (4, 5)
    assert_close(
        ours.add_noise(samples, noise, timesteps), theirs.add_noise(samples, noise, timesteps), atol=1e-6
    )


@pytest.mark.parametrize("name", WITH_X0)
def test_the_velocity_equals_diffusers(name):
    ours, theirs = both(name, rescale_betas_zero_snr=True)
    samples, noise = (torch.from_numpy(normal(3, 4, 5, seed=i)) for i in (1, 2))
    timesteps = torch.tensor([0, 999, 123])
    expected = theirs.get_velocity(samples, noise, timesteps)
    assert_close(ours.get_velocity(samples, noise, timesteps), expected, rtol=1e-6, atol=1e-6)
    assert_close(
        ours.get_velocity(samples.numpy(), noise.numpy(), timesteps.numpy()), expected, rtol=1e-6, atol=1e-6
    )


def test_the_model_sees_the_sample_as_it_is():
    x = normal(1, 2, 3)
    for name in NAMES:
        assert named(name).scale_model_input(x, 3) is x and named(name).scale_model_input(x) is x


@pytest.mark.parametrize(
    "variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"]
)
@pytest.mark.parametrize("steps", [None, 20])
def test_ddpms_variance_equals_diffusers(variance_type, steps):
    ours, theirs = both("DDPMScheduler", steps, variance_type=variance_type)
    predicted = torch.from_numpy(normal(1, 2, 3)) if variance_type == "learned_range" else None
    for t in (0, 450, 950):
        expected = theirs._get_variance(t, predicted)
        assert_close(
            ours._get_variance(t, None if predicted is None else predicted.numpy()), expected, rtol=1e-6
        )
        assert_close(
            ours._get_variance(t, variance_type="fixed_large"), theirs._get_variance(t, None, "fixed_large")
        )
        assert ours.previous_timestep(t) == int(theirs.previous_timestep(t))


def test_ddpm_steps_one_by_one_before_timesteps_are_set():
    ours, theirs = both("DDPMScheduler")
    x = torch.from_numpy(normal(1, 2, 3))
    expected = theirs.step(x, 10, x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert_close(
        ours.step(x, 10, x, generator=torch.Generator().manual_seed(0)).prev_sample, expected, atol=1e-6
    )


def test_ddims_variance_equals_diffusers():
    for alpha_to_one in (True, False):
        ours, theirs = both("DDIMScheduler", 10, set_alpha_to_one=alpha_to_one)
        assert ours.final_alpha_cumprod == theirs.final_alpha_cumprod
        for t, prev_t in ((900, 800), (100, 0), (0, -100)):
            assert_close(ours._get_variance(t, prev_t), theirs._get_variance(t, prev_t), rtol=1e-6)


def test_pndms_methods_and_history_can_be_used_by_hand():
    ours, theirs = both("PNDMScheduler", 10)
    past = [torch.from_numpy(normal(1, 2, 3, seed=i)) for i in range(4)]
    x = torch.from_numpy(normal(1, 2, 3, seed=9))
    for scheduler in (ours, theirs):
        scheduler.ets = past[:]
    for method, t in (("step_prk", ours.prk_timesteps[0]), ("step_plms", ours.plms_timesteps[1])):
        expected = getattr(theirs, method)(past[0], int(t), x).prev_sample
        assert_close(getattr(ours, method)(past[0], t, x).prev_sample, expected, rtol=1e-6, atol=1e-6)


def test_unipcs_history_can_be_set_and_its_places_looked_up():
    ours, theirs = both("UniPCMultistepScheduler", 10)
    past = [torch.from_numpy(normal(1, 2, 3, seed=i)) for i in range(2)]
    x = torch.from_numpy(normal(1, 2, 3, seed=9))
    for scheduler in (ours, theirs):
        scheduler.model_outputs = past[:]
        scheduler.lower_order_nums = 2
    t = theirs.timesteps[5]
    assert_close(ours.step(x, t, x).prev_sample, theirs.step(x, t, x).prev_sample, rtol=1e-5, atol=1e-6)
    repeated = [5, 5, 3]
    for timestep in (*theirs.timesteps, 12345):
        assert ours.index_for_timestep(timestep) == theirs.index_for_timestep(timestep)
    expected = theirs.index_for_timestep(5, torch.tensor(repeated))
    assert ours.index_for_timestep(5, np.array(repeated)) == expected == 1


def test_set_timesteps_starts_from_the_beginning_again():
    scheduler, x = named("UniPCMultistepScheduler", 10), normal(1, 2, 3)
    assert (scheduler.begin_index, scheduler.step_index) == (None, None)
    scheduler.set_begin_index(4)
    scheduler.step(x, scheduler.timesteps[4], x)
    scheduler.set_timesteps(10)
    assert (scheduler.begin_index, scheduler.step_index) == (None, None)
    scheduler.step(x, scheduler.timesteps[0], x)
    assert scheduler.step_index == 1
