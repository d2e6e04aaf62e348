"""CASES: every shape of the models that a kernel does, at 512² and 768², for 1, 2 and 8 pictures."""

from minidiff_kernels.case import KernelCase

CASES: list[KernelCase] = []
