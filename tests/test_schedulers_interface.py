"""What people and pipelines rely on beside the numbers: signatures, kinds in and out, forms of arguments."""

import inspect
from time import perf_counter

import diffusers
import numpy as np
import pytest
import torch
from parity import assert_close, assert_relative
from scheduler_lists import (
    ADDING_NOISE,
    BETAS,
    COUNTING,
    DRAWING,
    EXPLODING,
    NAMES,
    NO_INTEGERS,
    SECOND_FIELD,
    normal,
    parameters,
    ready,
    theirs_ready,
    with_option,
)

import minidiff

REQUIRED = inspect.Parameter.empty


def drawing(name, seed=0):
    """The generator that a step needs if it draws, so that nothing depends on torch's global one."""
    return {"generator": torch.Generator().manual_seed(seed)} if name in DRAWING else {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["__init__", "step", "set_timesteps"])
def test_signatures_are_diffusers(name, method):
    def listed(library):
        found = parameters(name, method, library).values()
        # a tuple takes the place of a list as a default
        return [(p.name, p.kind, [] if p.default == () else p.default) for p in found]

    ours, theirs = listed(minidiff), listed(diffusers)
    if method == "set_timesteps":  # ours says None where diffusers' annotation or default does
        ours, theirs = ([(n, k, None if d is REQUIRED else d) for n, k, d in p] for p in (ours, theirs))
    if name == "DDIMInverseScheduler" and method == "__init__":  # the one name that **kwargs stands for
        ours, theirs = (
            [p for p in each if p[0] not in ("kwargs", "set_alpha_to_zero")] for each in (ours, theirs)
        )
    assert ours == theirs


def test_pipelines_see_which_schedulers_take_eta_and_a_generator():
    takes = {name: set(inspect.signature(ready(name).step).parameters) for name in NAMES}
    assert {n for n in NAMES if "generator" in takes[n]} == set(DRAWING)
    assert {n for n in NAMES if "eta" in takes[n]} == set(with_option("eta", "step"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 5), (1, 3, 2, 4, 5)], ids=len)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_kind_and_dtype_are_those_of_diffusers(name, shape, dtype):
    tensors = [torch.from_numpy(normal(*shape, seed=i)).to(getattr(torch, dtype)) for i in (0, 1)]
    theirs = theirs_ready(name)
    expected = theirs.step(tensors[0], theirs.timesteps[0], tensors[1], **drawing(name))
    scheduler = ready(name)
    result = scheduler.step(tensors[0], scheduler.timesteps[0], tensors[1], **drawing(name))
    assert result.prev_sample.dtype == tensors[1].dtype
    assert list(result) == list(expected.keys())
    for key, value in result.items():
        assert torch.is_tensor(value) and value.dtype == expected[key].dtype and value.shape == shape, key
    if dtype != "bfloat16":  # NumPy has none
        scheduler = ready(name)
        arrays = [x.numpy() for x in tensors]
        again = scheduler.step(arrays[0], scheduler.timesteps[0], arrays[1], **drawing(name))
        for key, value in again.items():
            assert type(value) is np.ndarray and (value == result[key].numpy()).all(), key
            assert value.dtype == str(result[key].dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_alone_and_may_be_part_of_a_graph(name):
    scheduler = ready(name)
    sample = torch.from_numpy(normal(2, 3, 4, 4)).requires_grad_()
    for t in scheduler.timesteps:
        model_output = sample * 0.5
        kept = sample.detach().clone(), model_output.detach().clone()
        after = scheduler.step(model_output, t, sample, **drawing(name)).prev_sample
        assert torch.equal(sample, kept[0]) and torch.equal(model_output, kept[1])
        assert not after.requires_grad
        sample = after.requires_grad_()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_step_gave_is_not_changed_by_the_next(name):
    scheduler, x = ready(name), normal(1, 2, 3, 4)
    given, kept = [], []
    for t in scheduler.timesteps:
        result = scheduler.step(0.3 * x, t, x, **drawing(name))
        given.append(result)
        kept.append({key: value.copy() for key, value in result.items()})
        x = result.prev_sample
    assert all((one[key] == other[key]).all() for one, other in zip(given, kept, strict=True) for key in one)


FORMS = {
    "int": int, "float": float, "np.int64": np.int64, "np.float32": np.float32, "np.array": np.array,
    "torch.tensor": torch.tensor, "tensor of one": lambda t: torch.tensor([t]),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_timestep_may_come_in_any_form(name, form):
    integer = form in ("int", "np.int64")
    first = ready(name).timesteps[0]
    value = first.item()
    results = []
    for given in (first, FORMS[form](int(value) if integer else value)):
        scheduler, x = ready(name), normal(1, 3, 4)
        if integer and name in NO_INTEGERS:
            with pytest.raises(ValueError, match="timestep"):
                scheduler.step(x, int(value), x)
            return
        if integer and value != int(value):
            return  # iPNDM and EDM: their first timestep is a fraction
        results.append(scheduler.step(x, given, x, **drawing(name)).prev_sample)
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize("kind", [int, torch.tensor, np.int64])
@pytest.mark.parametrize("name", NO_INTEGERS)
def test_an_integer_that_may_be_an_index_is_refused(name, kind):
    scheduler, x = ready(name), normal(1, 2, 3)
    with pytest.raises(ValueError, match=r"timestep"):
        scheduler.step(x, kind(0), x)


@pytest.mark.parametrize("name", NAMES)
def test_a_result_has_attributes_keys_and_a_tuple(name):
    scheduler = ready(name)
    arguments = (normal(2, 3, 4, seed=1), scheduler.timesteps[0], normal(2, 3, 4))
    result = scheduler.step(*arguments, **drawing(name))
    plain = ready(name).step(*arguments, **drawing(name), return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == len(result) == (2 if name in SECOND_FIELD else 1)
    assert (result.prev_sample == plain[0]).all() and result["prev_sample"] is result[0] is result.prev_sample
    if name in SECOND_FIELD:
        second = getattr(result, SECOND_FIELD[name])
        assert second is result[1] and (second == plain[1]).all()
    with pytest.raises(AttributeError, match="no 'x0'; it has prev_sample"):
        result.x0  # noqa: B018


@pytest.mark.parametrize("name", SECOND_FIELD)
def test_what_a_step_gives_beside_the_sample_equals_diffusers(name):
    config = {"clip_sample": False} if "clip_sample" in parameters(name) else {}
    ours, theirs = ready(name, **config), theirs_ready(name, **config)
    for t, expected_t in zip(ours.timesteps, theirs.timesteps, strict=True):
        x = [torch.from_numpy(normal(2, 3, 4, 4, seed=i)) for i in (1, 2)]
        expected = theirs.step(x[0], expected_t, x[1], **drawing(name))[SECOND_FIELD[name]]
        assert_relative(ours.step(x[0], t, x[1], **drawing(name))[SECOND_FIELD[name]], expected, 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_fast(name):
    """30 to 80 µs on a free core, where diffusers needs 70 to 380; the limit catches what is far off."""
    scheduler, x = ready(name, 50), normal(1, 4, 64, 64)
    generator = {"generator": np.random.default_rng(0)} if name in DRAWING else {}
    durations = []
    for t in scheduler.timesteps:
        start = perf_counter()
        scheduler.step(x, t, x, **generator)
        durations.append(perf_counter() - start)
    assert min(durations) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_model_sees_what_it_sees_in_diffusers(name):
    ours, theirs = ready(name, 4), theirs_ready(name, 4)
    for t, expected_t in zip(ours.timesteps, theirs.timesteps, strict=True):
        x = torch.from_numpy(normal(2, 3, 4, 4))
        if name in EXPLODING:
            expected = theirs.scale_model_input(x, expected_t)
            assert_relative(ours.scale_model_input(x, t), expected, 1e-6)
            scaled = ours.scale_model_input(x.numpy().astype(np.float16), t)
            assert type(scaled) is np.ndarray and scaled.dtype == np.float16
        else:
            assert ours.scale_model_input(x, t) is x and ours.scale_model_input(x) is x
        theirs.step(x, expected_t, x, **drawing(name))
        ours.step(x, t, x, **drawing(name))


@pytest.mark.parametrize("name", COUNTING)
def test_the_place_in_the_schedule_is_that_of_diffusers(name):
    ours, theirs = ready(name, 10), theirs_ready(name, 10)
    x = torch.from_numpy(normal(1, 2, 3))
    for begin in (None, 4):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(10)
            if begin is not None:
                scheduler.set_begin_index(begin)
        for i in range(begin or 0, 8):
            assert (ours.begin_index, ours.step_index) == (theirs.begin_index, theirs.step_index)
            theirs.step(x, theirs.timesteps[i], x, **drawing(name))
            ours.step(x, ours.timesteps[i], x, **drawing(name))
        assert ours.step_index == theirs.step_index == 8
    ours.set_timesteps(10)
    assert (ours.begin_index, ours.step_index) == (None, None)
    ours.step(x, ours.timesteps[0], x, **drawing(name))
    assert ours.step_index == 1


@pytest.mark.parametrize("name", COUNTING)
def test_a_timestep_is_found_where_diffusers_finds_it(name):
    ours, theirs = ready(name, 10), theirs_ready(name, 10)
    calls = getattr(diffusers, name).order  # KDPM2's middles equal timesteps up to a last bit
    for mine, other in zip(ours.timesteps[::calls], theirs.timesteps[::calls], strict=True):
        assert ours.index_for_timestep(mine) == theirs.index_for_timestep(other)
    for timestep in (5, 3):
        expected = theirs.index_for_timestep(timestep, torch.tensor([5, 5, 3]))
        for kind in (np.array, torch.tensor):
            assert ours.index_for_timestep(timestep, kind([5, 5, 3])) == expected
    try:
        expected = theirs.index_for_timestep(12345)
    except IndexError:
        with pytest.raises(ValueError, match="timestep 12345 is not in the schedule"):
            ours.index_for_timestep(12345)
    else:
        assert ours.index_for_timestep(12345) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_device_and_a_numpy_count_are_taken(name):
    ours = ready(name)
    ours.set_timesteps(np.int64(6), device="cpu")
    assert_close(ours.timesteps, ready(name, 6).timesteps)


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_arrays_and_lengths_those_of_the_training(name):
    for scheduler in (getattr(minidiff, name)(), ready(name)):
        tables = ["timesteps", *(["betas", "alphas", "alphas_cumprod"] if name in BETAS else [])]
        tables += ["sigmas"] if hasattr(scheduler, "sigmas") else []
        for table in tables:
            value = getattr(scheduler, table)
            assert type(value) is np.ndarray or (name == "PNDMScheduler" and value is None)
        assert len(scheduler) == scheduler.config.num_train_timesteps


@pytest.mark.parametrize("name", NAMES)
def test_before_timesteps_are_set_their_number_is_unknown(name):
    assert getattr(minidiff, name)().num_inference_steps is None or name == "IPNDMScheduler"


@pytest.mark.parametrize("name", [n for n in ADDING_NOISE if n in EXPLODING])
def test_the_first_sample_is_scaled_by_a_plain_number(name):
    assert isinstance(ready(name).init_noise_sigma, float | np.floating)
