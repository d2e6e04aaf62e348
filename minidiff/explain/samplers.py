"""The one table of all samplers: what is true of each, and the settings that it was measured with.

An order of convergence p says that twice the steps leave 2^-p of the error: for a sampler that adds no noise
the error of the path, for one that does the error of the distribution. The order is that of the formula, here
as in diffusers; where it is not what the paper promises, the note says why.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampler:
    """A row of the table: a scheduler with settings."""

    name: str  # as in `minidiff generate --scheduler`
    scheduler: str  # the class
    order: int | None  # of convergence; None for those that need a consistency model
    calls: int  # of the model for a step
    noise: bool  # whether its steps add noise
    paper: tuple[str, str]  # who and when, arXiv number if it is there
    note: str = ""
    config: dict = field(default_factory=dict)  # of the constructor, where not its defaults
    options: dict = field(default_factory=dict)  # of step
    start: int = 0  # first steps, which are of lower order for want of earlier ones
    group: int = 1  # steps that belong together: their number must be a multiple
    most: int = 10**6  # steps; with more, rounding is larger than the error

    @property
    def settings(self) -> str:
        """config and options as in a call: solver_order=3, eta=1.0."""
        return ", ".join(f"{key}={value}" for key, value in (self.config | self.options).items())


DDPM, DDIM = ("Ho et al. 2020", "2006.11239"), ("Song et al. 2020", "2010.02502")
ADAMS = "Hairer et al. 1993", ""  # a book
PNDM = "Liu et al. 2022", "2202.09778"
DEIS = "Zhang & Chen 2022", "2204.13902"
EDM = "Karras et al. 2022", "2206.00364"
DPM, DPM_PLUS = ("Lu et al. 2022", "2206.00927"), ("Lu et al. 2022", "2211.01095")
UNIPC = "Zhao et al. 2023", "2302.04867"
LCM, TCD = ("Luo et al. 2023", "2310.04378"), ("Zheng et al. 2024", "2402.19159")
FLOW = "Esser et al. 2024", "2403.03206"

EVEN = "4 where sigma / alpha falls in even steps: its weights are those of even steps, whatever the schedule"
CANCELS = "until rounding takes over: its weights are small differences of float32 numbers, as in diffusers"
CONSISTENCY = "exact in any number of steps if the model is a perfect consistency model"

SAMPLERS = (
    Sampler("ddpm", "DDPMScheduler", 1, 1, True, DDPM),
    Sampler("ddim", "DDIMScheduler", 1, 1, False, DDIM),
    Sampler("ddim", "DDIMScheduler", 1, 1, True, DDIM, options={"eta": 1.0}),
    Sampler("ddiminverse", "DDIMInverseScheduler", 1, 1, False, DDIM, "goes from the data to the noise"),
    Sampler("euler", "EulerDiscreteScheduler", 1, 1, False, EDM),
    Sampler("euler", "EulerDiscreteScheduler", 1, 1, True, EDM, options={"s_churn": 2.0}),
    Sampler("eulerancestral", "EulerAncestralDiscreteScheduler", 1, 1, True, DDPM),
    Sampler("edmeuler", "EDMEulerScheduler", 1, 1, False, EDM),
    Sampler("flowmatcheuler", "FlowMatchEulerDiscreteScheduler", 1, 1, False, FLOW),
    Sampler("heun", "HeunDiscreteScheduler", 2, 2, False, EDM),
    Sampler("kdpm2", "KDPM2DiscreteScheduler", 2, 2, False, EDM),
    Sampler("kdpm2ancestral", "KDPM2AncestralDiscreteScheduler", 2, 2, True, EDM),
    Sampler("pndm", "PNDMScheduler", 2, 1, False, PNDM, config={"skip_prk_steps": True}),
    Sampler("pndm", "PNDMScheduler", 2, 1, False, PNDM, "4 calls in each of its first 3 steps"),
    Sampler("ipndm", "IPNDMScheduler", 2, 1, False, DEIS, EVEN),
    Sampler("deis", "DEISMultistepScheduler", 2, 1, False, DEIS, CANCELS, most=64),
    Sampler(
        "deis", "DEISMultistepScheduler", 3, 1, False, DEIS, CANCELS,
        config={"solver_order": 3}, start=2, most=32,
    ),
    Sampler("lms", "LMSDiscreteScheduler", 4, 1, False, ADAMS, start=3),
    Sampler("dpmsolver", "DPMSolverMultistepScheduler", 2, 1, False, DPM_PLUS),
    Sampler(
        "dpmsolver", "DPMSolverMultistepScheduler", 2, 1, False, DPM_PLUS,
        "not 3: in diffusers' formula the second derivative counts half",
        config={"solver_order": 3}, start=2,
    ),
    Sampler(
        "dpmsolver", "DPMSolverMultistepScheduler", 2, 1, True, DPM_PLUS,
        config={"algorithm_type": "sde-dpmsolver++"},
    ),
    Sampler(
        "dpmsolver", "DPMSolverMultistepScheduler", 1, 1, True, DPM_PLUS,
        "less than with solver_order=2: in diffusers' formula the second derivative has the wrong sign",
        config={"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, start=2,
    ),
    Sampler("dpmsolversinglestep", "DPMSolverSinglestepScheduler", 2, 1, False, DPM, group=2),
    Sampler(
        "dpmsolversinglestep", "DPMSolverSinglestepScheduler", 3, 1, False, DPM,
        "if 3 divides the number of steps; else it ends with a step of order 1 or 2",
        config={"solver_order": 3}, group=3,
    ),
    Sampler(
        "dpmsolversinglestep", "DPMSolverSinglestepScheduler", 1, 1, True, DPM_PLUS,
        "not 2: the second half of a step draws its noise anew, as in diffusers",
        config={"algorithm_type": "sde-dpmsolver++"}, group=2,
    ),
    Sampler("edmdpmsolver", "EDMDPMSolverMultistepScheduler", 2, 1, False, DPM_PLUS),
    Sampler("unipc", "UniPCMultistepScheduler", 3, 1, False, UNIPC),
    Sampler("unipc", "UniPCMultistepScheduler", 4, 1, False, UNIPC, config={"solver_order": 3}, start=3),
    Sampler("lcm", "LCMScheduler", None, 1, True, LCM, CONSISTENCY),
    Sampler("tcd", "TCDScheduler", None, 1, True, TCD, CONSISTENCY, options={"eta": 1.0}),
    Sampler(
        "flowmatcheuler", "FlowMatchEulerDiscreteScheduler", None, 1, True, FLOW, CONSISTENCY,
        config={"stochastic_sampling": True},
    ),
)  # fmt: skip
