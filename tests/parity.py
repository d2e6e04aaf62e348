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


def twins(name, dtype=torch.float64, **config):
    """The model called name twice, (minidiff's, diffusers'), with the same random weights, in eval mode.

    The weights travel strictly in both directions: every name and shape is equal.
    """
    import diffusers

    import minidiff

    torch.manual_seed(0)
    theirs = getattr(diffusers, name)(**config).to(dtype).eval()
    with torch.no_grad():
        for weight in theirs.parameters():  # norms start as 1 and 0, where a mix-up would not show
            weight.add_(0.1 * torch.randn_like(weight))
    ours = getattr(minidiff, name)(**config).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs
