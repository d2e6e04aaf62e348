"""CASES: what every kernel is tested, compiled and timed on.

The shapes come from shapes.py; each kernel NAME.py has its list, CASES, in NAME_cases.py beside it.
"""

from minidiff_kernels.case import KernelCase

CASES: list[KernelCase] = []
