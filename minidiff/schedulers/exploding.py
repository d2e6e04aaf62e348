"""What the samplers share whose sample is x0 + sigma eps: the data keeps its size, noise only comes on top.

In that form the way from noise to data is the plainest (Karras et al. 2022, arXiv:2206.00364, eq. 1 and 3):

    dx/dsigma = (x - x0) / sigma

where x0 is what the model predicts at x and sigma. A sampler follows this `derivative` from sigma to sigma
in steps (`move`). The models were trained on sqrt(a_t) x0 + sqrt(1 - a_t) eps: that is x / sqrt(sigma^2 + 1),
what `scale_model_input` shows them.
"""

import numpy as np

from minidiff.arguments import one_for_each, refuse_timesteps_beside
from minidiff.boundary import floats, like, number_list
from minidiff.schedulers.schedule import linspace, predicted_x0, space_timesteps
from minidiff.schedulers.sigmas import SPREADS, SigmaScheduler, sigma_to_t


def derivative(sample, x0, sigma) -> np.ndarray:
    """dx/dsigma at sample (B, C, …), where the model predicts x0."""
    slope = sample - x0
    slope /= sigma
    return slope


def move(sample, slope, by) -> np.ndarray:
    """sample (B, C, …) after a straight way along slope: a new array."""
    moved = slope * by
    moved += sample
    return moved


def ancestral_levels(sigma, target):
    """(down, up): the noise to step down to, and the fresh noise that fills it up to target.

    With DDPM's share of noise, eta 1: up^2 + down^2 = target^2 (Song et al. 2020, arXiv:2010.02502, eq. 16).
    """
    up = np.sqrt(target * target * (sigma * sigma - target * target) / (sigma * sigma))
    rest = target * target - up * up
    # Where rounding leaves nothing of it, the exact form; diffusers has NaN or 0 there.
    return np.where(rest > 0, np.sqrt(np.abs(rest)), target * target / sigma), up


class ExplodingScheduler(SigmaScheduler):
    """Base of the schedulers with sample = x0 + sigma eps; their timesteps are float32 and may be fractions.

    Before set_timesteps all N training timesteps are laid out.
    """

    needs_timesteps = False
    data_variance = 1.0  # of x0, as the model believes: what it sees is scaled to variance 1

    def _make_tables(self):
        super()._make_tables()
        self.timesteps = self.timesteps.astype(np.float32)
        self.sigmas = np.append(self.sigmas[::-1], np.float32(0))

    @property
    def init_noise_sigma(self) -> float:
        """What to multiply standard normal noise with: it becomes the sample that sampling starts from."""
        largest = self.sigmas.max()
        if self.config.timestep_spacing not in ("linspace", "trailing"):
            largest = np.sqrt(largest * largest + 1)
        return float(largest)

    def _lay_out(self, n, timesteps=None, n_train=None, interpolation="linear", end_at_table=False):
        """Chooses n timesteps and sigmas, or those of a caller's own timesteps.

        n_train: to be used in place of the config's num_train_timesteps. interpolation "log_linear": sigmas
        spread evenly in their logarithm. end_at_table: whether final_sigmas_type chooses where to end.
        """
        c, table = self.config, self._table_sigmas()
        if timesteps is None:
            n, n_train = self._check_steps(n), n_train or c.num_train_timesteps
            timesteps = space_timesteps(c.timestep_spacing, n_train, n, c.steps_offset, whole=False)
        else:
            refuse_timesteps_beside(c, SPREADS)
            timesteps = number_list(timesteps, "timesteps")
            n = len(timesteps)
        timesteps = timesteps.astype(np.float32)
        if interpolation == "linear":
            sigmas = np.interp(timesteps, np.arange(len(table)), table)
        else:  # one more than timesteps, as in diffusers: sampling ends early
            sigmas = np.exp(linspace(np.log(table[-1]), np.log(table[0]), n + 1), dtype=np.float64)
        spread = self._spread(sigmas[-1], sigmas[0], n)
        if spread is not None:
            sigmas, timesteps = spread, sigma_to_t(spread, np.log(table))
        self._set_sigmas(sigmas, self._final_sigma(table[0]) if end_at_table else 0)
        self.num_inference_steps, self.timesteps = n, timesteps.astype(np.float32)

    def _lay_out_all(self):
        """The state before set_timesteps of those whose schedule is more than timesteps and sigmas."""
        self.set_timesteps(self.config.num_train_timesteps)
        self.num_inference_steps = None

    # -- between samples, noise and the model

    def _predicted_x0(self, model_output, sample, sigma):
        error = NotImplementedError if self.config.prediction_type == "sample" else ValueError
        kind = self._one_of("prediction_type", self.predictions, error)
        if kind == "v_prediction":  # v's alpha x0 + sigma_t eps is x / scale, with alpha = 1 / scale
            scale = sigma * sigma + 1
            return predicted_x0(model_output, sample, 1 / scale, sigma / np.sqrt(scale), kind)
        return predicted_x0(model_output, sample, 1, sigma, kind.removeprefix("original_"))

    def _sigma_seen(self, i):
        """The noise in the sample that the model sees at the i-th call."""
        return self.sigmas[i]

    def scale_model_input(self, sample, timestep):
        """What the model gets to see of sample (B, C, …) at timestep: scaled as in its training."""
        sigma = self._sigma_seen(self._position(timestep))
        return like(floats(sample, "sample") / np.sqrt(sigma * sigma + self.data_variance), sample)

    def _alpha_sigma(self, sigma):
        return 1, sigma

    def get_velocity(self, sample, noise, timesteps):
        """v = sqrt(a_t) eps - sqrt(1 - a_t) x0, x0 = sample (B, …): the target of v_prediction models.

        timesteps are of the schedule. diffusers takes a_t from the wrong end of its table here.
        """
        rows = [self.index_for_timestep(t) for t in one_for_each(timesteps, sample, "timesteps")]
        sigma = self._sigmas_of(rows, sample)
        noise, x0, width = floats(noise, "noise"), floats(sample, "sample"), self.data_variance**0.5
        return like((width * noise - sigma / width * x0) / np.sqrt(sigma * sigma + width * width), sample)
