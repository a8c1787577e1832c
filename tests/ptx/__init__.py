"""The CUDA kernels as nvcc emits them, interpreted on the CPU: see README.md."""

from .machine import Machine, build

__all__ = ["Machine", "build"]
