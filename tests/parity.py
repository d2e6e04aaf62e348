"""What the parity tests share."""

import numpy as np
import torch


def assert_close(ours, theirs, rtol=0.0, atol=0.0):
    """Compares elementwise, |ours - theirs| <= atol + rtol * |theirs|; a failure names the worst element."""
    ours, theirs = _float64(ours), _float64(theirs)
    assert ours.shape == theirs.shape, f"shape {ours.shape} instead of {theirs.shape}"
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))  # infinities too
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(ours - theirs))
    excess = difference - (atol + rtol * np.abs(theirs))
    excess = np.where(same, -1.0, np.where(np.isnan(excess), np.inf, excess))
    if excess.size and excess.max() > 0:
        at = tuple(int(i) for i in np.unravel_index(excess.argmax(), excess.shape))
        count = f"{(excess > 0).sum()} of {excess.size} differ by more than rtol={rtol:g}, atol={atol:g}"
        worst = f"worst difference {difference[at]:.3g} at {at}: {ours[at]!r} instead of {theirs[at]!r}"
        raise AssertionError(f"{worst}; {count}")


def _float64(array):
    if torch.is_tensor(array):
        array = array.detach().cpu().double().numpy()
    return np.asarray(array, dtype=np.float64)


def share_weights(ours, theirs, dtype=torch.float64):
    """Both modules in eval mode with the same random weights, which travel strictly in both directions."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():  # norms start as 1 and 0, where a mix-up would not show
            weight.add_(0.1 * torch.randn_like(weight))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def twins(name, dtype=torch.float64, **config):
    """The model called name twice, (minidiff's, diffusers'), with the same random weights, in eval mode."""
    import diffusers

    import minidiff

    torch.manual_seed(0)
    return share_weights(getattr(minidiff, name)(**config), getattr(diffusers, name)(**config), dtype)


def both(name, steps=None, **config):
    """The scheduler called name twice, (minidiff's, diffusers'), with `steps` timesteps if given."""
    import diffusers

    import minidiff

    pair = getattr(minidiff, name)(**config), getattr(diffusers, name)(**config)
    for scheduler in pair if steps is not None else ():
        scheduler.set_timesteps(steps)
    return pair


def relative(ours, theirs):
    """The largest difference over the largest of theirs that is finite; infinite where only one is finite."""
    ours, theirs = _float64(ours), _float64(theirs)
    assert ours.shape == theirs.shape, f"shape {ours.shape} instead of {theirs.shape}"
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))  # infinities too
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.nan_to_num(np.abs(ours - theirs), nan=np.inf))
    scale = np.abs(theirs[np.isfinite(theirs)]).max(initial=0)
    return float(difference.max(initial=0) / max(scale, 1e-30))


def assert_relative(ours, theirs, tolerance, what=""):
    """Asserts that no element differs by more than tolerance times the largest element of theirs."""
    difference = relative(ours, theirs)
    assert difference <= tolerance, f"{difference:.2e} of the largest value, not {tolerance:g}. {what}"
    record(difference, tolerance, tolerance)


def record(difference, tolerance, allowed):
    """Notes a relative difference for `pytest --worst`; allowed > tolerance: ill-conditioned."""
