"""Triton kernels of minidiff."""

from minidiff_kernels.attention import attention

__all__ = ["attention"]
