"""CASES: what every kernel is tested, compiled and timed on.

The shapes come from shapes.py; each kernel NAME.py has its list, CASES, in NAME_cases.py beside it.
"""

from minidiff_kernels import attention_cases, geglu_cases, group_norm_cases, upsample_conv_cases
from minidiff_kernels.case import KernelCase

CASES: list[KernelCase] = [
    *attention_cases.CASES,
    *group_norm_cases.CASES,
    *geglu_cases.CASES,
    *upsample_conv_cases.CASES,
]
