"""KernelCase: one shape that a kernel must do. One list of them feeds tests, compile checks and benchmarks.

Nothing is timed that is not tested, and nothing is launched that was not compiled for the GPUs that we name:
the candidates of a launch are the configs of its case. `minidiff_kernels.cases` has the whole list.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")  # A100; H100 and H200; B200; MI300


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelCase:
    """A kernel with the arguments of one call, and what that call computes and costs.

    To compile it: signature names every run-time argument and its type ("*fp16", "i32", "fp32"), constexprs
    every tl.constexpr that no config sets, aligned the run-time arguments that 16 divides. Each of configs
    holds the block sizes, num_warps and num_stages, and may name the targets that it is for.

    To run it: make_inputs(device) -> a dict of tensors of the real shape, tiny_inputs(device) -> a smaller
    one that takes the same way through the kernel, in the interpreter in a second; run(**inputs) -> the
    result; reference(**inputs) -> the same in float64. An operation of several kernels has a case for each;
    only one of them can be run, the others have run=None. launch(config, **inputs) -> the result with one of
    choices, which are configs where that is empty; pick(device) -> the one that run takes there.

    op and shape say what it is: ("attention", (B, heads, T, S, D)), ("group_norm", (B, C, H, W)), ("geglu",
    (M, K, N)), ("upsample_conv", (B, C_in, H, W, C_out)); where says in which models it occurs. flops and
    bytes are the least that the operation needs.
    """

    name: str
    kernel: Callable
    signature: dict
    constexprs: dict = field(default_factory=dict)
    aligned: tuple = ()
    configs: list = field(default_factory=list)
    targets: tuple = TARGETS
    op: str
    shape: tuple
    dtype: str = "fp16"
    where: str = ""
    make_inputs: Callable | None = None
    tiny_inputs: Callable | None = None
    run: Callable | None = None
    reference: Callable | None = None
    launch: Callable | None = None
    pick: Callable | None = None
    choices: tuple = ()
    flops: int = 0
    bytes: int = 0
    atol: float = 0.0
    rtol: float = 0.0
    max_spill_bytes: int = 0  # above 0 only with a reason beside it

    def configs_for(self, target: str) -> list:
        """The configs that may be launched on target, one of TARGETS, without the key that says so."""
        return self._of(self.configs, target)

    def choices_for(self, target: str) -> list:
        """What launch may be given on target."""
        return self._of(self.choices or self.configs, target)

    def _of(self, configs, target):
        chosen = [config for config in configs if target in config.get("targets", self.targets)]
        return [{key: value for key, value in config.items() if key != "targets"} for config in chosen]


def specialized(pointers: dict, numbers: dict, unspecialized=()) -> dict:
    """signature, constexprs and aligned of a call, by the names of its arguments.

    pointers: {name: type, or None if it is left out}; numbers: {name: integer}. Triton compiles an argument
    that is 1 or None as a constant and knows of others whether 16 divides them, but for the unspecialized.
    """
    given = {name: kind for name, kind in pointers.items() if kind is not None}
    constants = {name: None for name in pointers if name not in given}
    constants |= {name: 1 for name, number in numbers.items() if number == 1 and name not in unspecialized}
    variable = {name: "i32" if n < 2**31 else "i64" for name, n in numbers.items() if name not in constants}
    even = [name for name in variable if numbers[name] % 16 == 0 and name not in unspecialized]
    aligned = (*given, *even)
    return {"signature": given | variable, "constexprs": constants, "aligned": aligned}
