"""Whether what callers pass to schedulers can be meant: one clear sentence for each way in which it can't."""

import numpy as np

from minidiff.boundary import number_list, to_numpy


def exactly_one(**arguments):
    """ValueError unless one of these arguments is given, not None, and the others are not."""
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"pass exactly one of {', '.join(arguments)}; got {' and '.join(given) or 'none'}")


def one_for_each(values, rows, name: str) -> np.ndarray:
    """values in any form as an array of one, (1,), or of one for each of rows, (B,); else ValueError."""
    values = np.atleast_1d(to_numpy(values))
    if values.shape not in ((1,), (len(rows),)):
        raise ValueError(f"{name} is {values.shape}; pass one, or one for each of the {len(rows)} rows")
    return values


def refuse_integer(timestep):
    """ValueError for an integer: most likely an index, where a timestep, maybe a fraction, is meant."""
    if to_numpy(timestep).dtype.kind in "iub":
        raise ValueError(f"timestep is the integer {timestep}; it must be one of .timesteps, no index")


def falling_timesteps(timesteps, n_train: int) -> np.ndarray:
    """A caller's own timesteps, int64 (n,), each below the one before; else ValueError.

    All of them lie within n_train - 1 to 0.
    """
    chosen = number_list(timesteps, "timesteps", whole=True)
    if not (n_train > chosen[0] and chosen[-1] >= 0 and (np.diff(chosen) < 0).all()):
        wanted = f"must fall from each to the next, within {n_train - 1} to 0"
        raise ValueError(f"timesteps is {timesteps!r}; it {wanted}")
    return chosen


def at_most_one(config, options):
    """ValueError if a config turns on more than one of these options."""
    chosen = [option for option in options if config.get(option)]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} exclude each other: choose one")


def refuse_timesteps_beside(config, options):
    """ValueError if a config turns on one of these options, which choose the timesteps by themselves."""
    for option in options:
        if config.get(option):
            raise ValueError(f"timesteps can't be given with {option}=True, which chooses them")


def share(value, name: str):
    """ValueError if value, a share of something, is no number within 0 and 1."""
    if isinstance(value, str) or value is None or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}; it must be in [0, 1]")


def positive(value, name: str):
    """ValueError if value is no number above 0."""
    if not isinstance(value, int | float | np.number) or not 0 < value < np.inf:
        raise ValueError(f"{name} is {value!r}; it must be a number above 0")
