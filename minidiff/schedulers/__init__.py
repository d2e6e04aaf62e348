"""The samplers: each turns what a model predicts into a step from noise towards data. NumPy only.

Reading order: `schedule.py` (tables and the interface), `ddim.py` (the simplest update), `ddpm.py`,
`pndm.py`, `sigmas.py` (schedules by noise level), `unipc.py`; then any other.
"""

from minidiff.schedulers.ddim import DDIMScheduler
from minidiff.schedulers.ddim_inverse import DDIMInverseScheduler
from minidiff.schedulers.ddpm import DDPMScheduler
from minidiff.schedulers.deis import DEISMultistepScheduler
from minidiff.schedulers.dpmsolver import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler
from minidiff.schedulers.edm import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from minidiff.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from minidiff.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from minidiff.schedulers.heun import HeunDiscreteScheduler
from minidiff.schedulers.ipndm import IPNDMScheduler
from minidiff.schedulers.kdpm2 import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
from minidiff.schedulers.lcm import LCMScheduler, TCDScheduler
from minidiff.schedulers.lms import LMSDiscreteScheduler
from minidiff.schedulers.pndm import PNDMScheduler
from minidiff.schedulers.unipc import UniPCMultistepScheduler

__all__ = [
    "DDIMInverseScheduler", "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "HeunDiscreteScheduler", "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "TCDScheduler", "UniPCMultistepScheduler",
]  # fmt: skip
