"""Prints every kernel that the registry's cases may launch on a GPU but that the registry does not compile.

Run as a script, for one target of the compile check. Nothing is computed: inputs have no data, a launch is
noted instead of made, and what Triton would compile for it is asked of Triton.
"""

import contextlib
import sys
from unittest import mock

import torch
from minidiff_kernels import compile_check
from minidiff_kernels.cases import CASES
from minidiff_kernels.launch import OPTIONS
from triton.compiler.compiler import make_backend
from triton.runtime import jit

PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}  # A100, H100, B200, MI300


def compiled(task):
    """A compilation of the registry: kernel, constants, types, what 16 divides, options."""
    config = task.config
    constants = task.case.constexprs | {k: v for k, v in config.items() if k not in compile_check.OPTIONS}
    options = OPTIONS | {k: v for k, v in config.items() if k in compile_check.OPTIONS}
    return described(task.case.kernel, constants, task.case.signature, task.case.aligned, options)


def launched(kernel, args, kwargs, backend):
    """The same of a launch."""
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    values, kinds, options = bind(*args, **kwargs)
    kinds = dict(zip(values, kinds, strict=True))
    constants = {name: values[name] for name, kind in kinds.items() if kind[0] == "constexpr"}
    signature = {name: kind[0] for name, kind in kinds.items() if kind[0] != "constexpr"}
    aligned = [name for name in signature if kinds[name][1] and "D" in kinds[name][1]]
    return described(kernel, constants, signature, aligned, options)


def described(kernel, constants, signature, aligned, options):
    parts = sorted(f"{name}={value}" for name, value in (constants | options).items())
    parts += sorted(f"{name}: {kind}{' / 16' if name in aligned else ''}" for name, kind in signature.items())
    return f"{kernel.__name__}: {', '.join(parts)}"


class AnyGenerator(torch.Generator):
    """A generator of numbers on a device that has none."""

    def __new__(cls, device):
        return super().__new__(cls, "cpu")


@contextlib.contextmanager
def without_gpu(target, launches):
    """Launchers believe to be on target; launches, a list, gets (kernel, arguments, options)."""
    stand_ins = {
        "check_tensors": lambda *args, **kwargs: None,
        "on_device": lambda tensor: contextlib.nullcontext(),
        "target": lambda device: target,
        "multiprocessors": lambda device: PROCESSORS[target],
    }
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(torch, "Generator", AnyGenerator))
        enter(
            mock.patch.object(torch, "randn", lambda size, generator, **options: torch.empty(size, **options))
        )
        enter(mock.patch.object(jit.JITFunction, "run", lambda kernel, *args, grid, warmup, **kwargs:
                                launches.append((kernel, args, kwargs))))  # fmt: skip
        modules = [module for name, module in sys.modules.items() if name.startswith("minidiff_kernels.")]
        for module in modules:
            for name in stand_ins.keys() & vars(module).keys():
                enter(mock.patch.object(module, name, stand_ins[name]))
        yield


def main(target):
    known = {compiled(task) for task in compile_check.tasks(CASES, [target])[0]}
    backend, launches = make_backend(compile_check.LIMITS[target].target), []
    unknown = {}
    for case in (case for case in CASES if case.run is not None):
        launches.clear()
        with without_gpu(target, launches):
            inputs = case.make_inputs("meta")
            case.run(**inputs)
            for config in case.choices_for(target) if case.launch else []:
                case.launch(config, **inputs)
        assert launches, f"{case.name} launches nothing"
        for launch in launches:
            unknown.setdefault(launched(*launch, backend), case.name)
    missing = [f"{name} {text}" for text, name in unknown.items() if text not in known]
    print(f"{len(unknown)} launched, {len(known)} compiled, {len(missing)} launched but not compiled")
    print("\n".join(missing))


if __name__ == "__main__":
    main(*sys.argv[1:])
