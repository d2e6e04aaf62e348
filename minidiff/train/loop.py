"""One training loop for every stage: AdamW, warm-up and cosine, clipping, a running average of the weights.

The length of a stage is a number of minutes or of steps; the learning rate follows the share of it that is
over. Every minute the whole state goes to a file, through a temporary one, and a run that finds that file
goes on from it. Data are drawn from a generator seeded by the step, so that a resumed run sees what an
uninterrupted one would.

On a CPU with bfloat16 instructions, and on a GPU, a bfloat16 copy of each module computes, while AdamW
updates the float32 original: several times faster, at no loss that we could measure.
"""

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minidiff.config import replacing

SAVE_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a stage trains. With steps, minutes is not looked at."""

    minutes: float
    learning_rate: float
    steps: int | None = None
    warm_up: float = 0.02  # share of the stage
    floor: float = 0.01  # the last learning rate, as a share of the highest
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.998  # decay of the running average of the weights, per step
    dtype: torch.dtype | None = None  # of the working copy; None: what is fast here


def train_device() -> torch.device:
    """A GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_dtype(device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    cpu = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32


class Trainer:
    """The state of one stage: the module, its working copy, the average of its weights, the optimizer, the
    clock.

    name labels the progress bar; folder gets state.pt. module may hold several models in an nn.ModuleDict.
    """

    def __init__(self, name, module, folder, recipe: Recipe, device=None):
        self.name, self.recipe = name, recipe
        self.device = device or train_device()
        self.file = Path(folder) / "state.pt"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.module = module.to(self.device).train()
        self.dtype = recipe.dtype or fast_dtype(self.device)
        self.working = (
            self.module if self.dtype == torch.float32 else copy.deepcopy(self.module).to(self.dtype)
        )
        self.average = copy.deepcopy(self.module).requires_grad_(False).eval()
        self.weights = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights,
            lr=recipe.learning_rate,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.step, self.seconds, self.loss = 0, 0.0, None
        if self.file.exists():
            self._load()

    @property
    def share(self) -> float:
        """How much of the stage is over, 0 to 1."""
        if self.recipe.steps is not None:
            return min(self.step / self.recipe.steps, 1.0)
        return min(self.seconds / (60 * self.recipe.minutes), 1.0)

    def run(self, loss_of, every=None, look=None) -> torch.nn.Module:
        """Trains to the end and returns the averaged module.

        loss_of(working, generator, step) -> scalar loss; generator is a torch.Generator on the CPU, seeded by
        the step. look(average, step), if given, is called every `every` seconds, to write sample pictures.
        Ctrl-C saves the state and propagates.
        """
        bar = tqdm(
            total=100.0,
            desc=self.name,
            unit="%",
            mininterval=5.0,
            bar_format="{l_bar}{bar}| {elapsed}{postfix}",
        )
        bar.update(100 * self.share)
        saved = looked = time.monotonic()
        try:
            while self.share < 1:
                before = time.monotonic()
                self._update(loss_of)
                now = time.monotonic()
                self.seconds += now - before
                bar.update(100 * self.share - bar.n)
                bar.set_postfix_str(f"step {self.step}, loss {self.loss:.4f}", refresh=False)
                if now - saved > SAVE_EVERY:
                    self.save()
                    saved = now
                if look and now - looked > every:
                    look(self.average, self.step)
                    looked = now
        finally:
            bar.close()
            self.save()
        return self.average

    def _update(self, loss_of):
        generator = torch.Generator().manual_seed(1_000_003 * self.step + 17)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        loss = loss_of(self.working, generator, self.step)
        loss.backward()
        if self.working is not self.module:
            for original, working in zip(self.weights, self._working_weights(), strict=True):
                original.grad = None if working.grad is None else working.grad.float()
                working.grad = None
        torch.nn.utils.clip_grad_norm_(self.weights, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(
            self.recipe.average, self.step / (self.step + 10)
        )  # short at first: forget the random start
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.module.parameters()), 1 - decay)
            if self.working is not self.module:
                torch._foreach_copy_(list(self.working.parameters()), list(self.module.parameters()))
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"{self.name}: the loss became {value} at step {self.step}; "
                                     f"delete {self.file} and train with a lower learning rate")  # fmt: skip
        self.loss = value if self.loss is None else self.loss + 0.02 * (value - self.loss)

    def _working_weights(self):
        return [p for p in self.working.parameters() if p.requires_grad]

    def _learning_rate(self):
        recipe, share = self.recipe, self.share
        rise = min(1.0, (share + 1e-4) / recipe.warm_up)
        fall = recipe.floor + (1 - recipe.floor) * 0.5 * (1 + math.cos(math.pi * share))
        return recipe.learning_rate * rise * fall

    def save(self):
        """Writes the state, complete or not at all."""
        state = {
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "clock": {"step": self.step, "seconds": self.seconds, "loss": self.loss},
        }
        with replacing(self.file) as temporary:
            torch.save(state, temporary)

    def _load(self):
        state = torch.load(self.file, map_location=self.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.working is not self.module:
            self.working.load_state_dict(state["module"])
        self.step, self.seconds, self.loss = (state["clock"][k] for k in ("step", "seconds", "loss"))
