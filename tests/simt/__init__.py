"""CUDA sources run on the CPU: see README.md."""

from .bridge import CACHE, HERE, ROOT, LaunchError, Library, Session, build

__all__ = ["CACHE", "HERE", "ROOT", "LaunchError", "Library", "Session", "build"]
