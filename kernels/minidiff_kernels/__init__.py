"""Triton kernels of minidiff."""
