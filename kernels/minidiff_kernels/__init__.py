"""Triton kernels of minidiff."""

from minidiff_kernels.attention import attention
from minidiff_kernels.geglu import geglu, geglu_linear
from minidiff_kernels.group_norm import group_norm
from minidiff_kernels.launch import target
from minidiff_kernels.upsample_conv import fold, upsample_conv

__all__ = ["attention", "fold", "geglu", "geglu_linear", "group_norm", "target", "upsample_conv"]
