"""The samplers: each turns what a model predicts into a step from noise towards data. NumPy only.

Reading order: `schedule.py` (tables and the interface), `ddim.py` (the simplest update), `ddpm.py`,
`pndm.py`, `sigmas.py` (schedules by noise level), `unipc.py`.
"""

from minidiff.schedulers.ddim import DDIMScheduler
from minidiff.schedulers.ddpm import DDPMScheduler
from minidiff.schedulers.pndm import PNDMScheduler
from minidiff.schedulers.unipc import UniPCMultistepScheduler

__all__ = ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler"]
