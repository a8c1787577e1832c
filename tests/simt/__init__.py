"""CUDA sources run on the CPU: see README.md."""

from .bridge import HERE, ROOT, LaunchError, Library, Session, build

__all__ = ["HERE", "ROOT", "LaunchError", "Library", "Session", "build"]
