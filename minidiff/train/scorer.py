"""A small classifier that looks at a picture and names what is in it, to measure how well pictures follow
prompts.

Trained on rendered pictures, blurred, shifted in colour and with noise, so that it judges what is drawn, not
how finely.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minidiff.checkpoints.load import PretrainedModel
from minidiff.scenes import Scene
from minidiff.train.data import training_scene
from minidiff.train.facts import facts_of, scene_of
from minidiff.train.text import FactHeads

BATCH = 32


class Scorer(PretrainedModel):
    """Pictures (B, 3, 128, 128) in [-1, 1] -> scores of every fact's classes, as FactHeads gives them."""

    def __init__(self, *, channels=(32, 48, 64, 96, 128)):
        super().__init__()
        sizes = (3, *channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(sizes, channels, strict=False)
        )
        self.refine = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)
        self.norms = nn.ModuleList(nn.GroupNorm(8, c) for c in channels)
        self.look = nn.Linear(channels[-1] * 4 * 4, 256)  # 128 pixels, halved five times
        self.heads = FactHeads(256)

    def forward(self, pictures):
        """-> (B, 256) what the heads look at."""
        x = pictures
        for conv, refine, norm in zip(self.convs, self.refine, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
            x = x + F.silu(refine(x))
        return F.silu(self.look(x.flatten(1)))

    @torch.inference_mode()
    def scenes(self, pictures: np.ndarray) -> list[Scene]:
        """What is in pictures (N, 128, 128, 3) uint8, told canonically."""
        found = []
        for rows in torch.from_numpy(pictures).split(64):
            x = rows.permute(0, 3, 1, 2).to(self.device, self.dtype) / 127.5 - 1
            found += [scene_of(row) for row in self.heads.best(self(x)).tolist()]
        return found


def scoring_loss(pictures):
    """The loss of one step as Trainer wants it. pictures: training pictures 0 to N - 1, (N, 128, 128, 3)
    uint8.
    """
    facts = torch.from_numpy(np.stack([facts_of(training_scene(n)) for n in range(len(pictures))]))

    def loss_of(scorer, generator, step):
        numbers = torch.randint(len(pictures), (BATCH,), generator=generator)
        x = torch.from_numpy(pictures[numbers.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = blemished(x, generator).to(scorer.device, scorer.dtype, memory_format=torch.channels_last)
        return scorer.heads.loss(scorer(x), facts[numbers].to(x.device))

    return loss_of


def blemished(x, generator):
    """Pictures (B, 3, H, W) blurred and moved by a few pixels, with a colour cast and noise, each picture
    differently.
    """
    strength = torch.rand(3, len(x), 1, 1, 1, generator=generator)
    x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), strength[0])
    x = x + 0.08 * (torch.rand(len(x), 3, 1, 1, generator=generator) - 0.5) * strength[1]
    x = x + 0.06 * strength[2] * torch.randn(x.shape, generator=generator)
    dy, dx = torch.randint(-4, 5, (2,), generator=generator).tolist()
    return torch.roll(x, (dy, dx), dims=(2, 3))


def compare(asked: Scene, seen: Scene) -> dict[str, tuple[int, int]]:
    """{what: (right, asked for)} for count, colour, shape, size, relation and floor.

    Solids are matched so that most is right; the relation is right if both solids are there, stand as asked,
    and are not exchanged.
    """
    asked, seen = asked.canonical(), seen.canonical()
    straight, crossed = (_matches(asked.solids, order) for order in (seen.solids, seen.solids[::-1]))
    best = max(straight, crossed, key=lambda m: sum(map(sum, m)))
    result = {"count": (int(len(seen.solids) == len(asked.solids)), 1)}
    for i, what in enumerate(("shape", "colour", "size")):
        result[what] = (sum(match[i] for match in best), len(asked.solids))
    stands = (
        len(seen.solids) == 2
        and seen.relation == asked.relation
        and sum(map(sum, straight)) >= sum(map(sum, crossed))
    )
    result["relation"] = (int(stands), 1) if asked.relation else (0, 0)
    result["floor"] = (int(seen.floor == asked.floor), 1)
    result["everything"] = (int(all(right == of for right, of in result.values())), 1)
    return result


def _matches(asked, seen):
    """Per asked solid: whether shape, colour and size are those of the solid at the same place in seen."""
    seen = [*seen, None, None]
    return [tuple(a == b for a, b in zip(solid.kind, seen[i].kind, strict=True)) if seen[i] else (False,) * 3
            for i, solid in enumerate(asked)]  # fmt: skip


def tally(pairs) -> dict[str, float]:
    """Shares right over (asked, seen) pairs of scenes."""
    totals = {}
    for asked, seen in pairs:
        for what, (right, of) in compare(asked, seen).items():
            before = totals.get(what, (0, 0))
            totals[what] = (before[0] + right, before[1] + of)
    return {what: right / max(of, 1) for what, (right, of) in totals.items()}
