"""Which machine runs the kernels: the one of g++'s code (tests/simt), or that of nvcc's PTX (tests/ptx)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ARCHITECTURES = (75, 80, 90, 100)


@dataclass(frozen=True)
class Backend:
    """architecture: of the PTX, 0: g++'s code. contract: multiply and add in one, wherever ptxas may."""

    architecture: int = 0
    contract: bool = False


def _named(text: str) -> Backend:
    """As BN_EXT_PTX says it: "" for g++'s code, or 90, or 90-contract."""
    if not text:
        return Backend()
    number, _, rest = text.partition("-")
    if not number.isdigit() or int(number) not in ARCHITECTURES or rest not in ("", "contract"):
        raise ValueError(f"BN_EXT_PTX={text}: one of {ARCHITECTURES}, and -contract behind it")
    return Backend(int(number), rest == "contract")


_current = _named(os.environ.get("BN_EXT_PTX", ""))


def backend() -> Backend:
    return _current


@contextmanager
def running_on(architecture: int, *, contract: bool = False) -> Iterator[None]:
    """Have the operators of tests/simt run another machine's kernels."""
    global _current
    before, _current = _current, Backend(architecture, contract)
    try:
        yield
    finally:
        _current = before
