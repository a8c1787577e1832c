"""Planted faults: lines of PTX changed, and copies of csrc with a changed line that nvcc compiles."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nvcc
from simt.bridge import CACHE, ROOT, digest
from simt.operators import CUDA

from .machine import Machine, link

# ---- in the PTX ----


def entry_of(ptx: Path, kernel: str) -> tuple[str, str]:
    """What stands before all kernels, and the one whose name has this part."""
    text = ptx.read_text()
    found = [m.start() for m in re.finditer(r"^\.visible \.entry (\S+)\(", text, re.M) if kernel in m[0]]
    assert len(found) == 1, f"{len(found)} kernels have {kernel} in their names"
    head = [line for line in text.splitlines() if line.startswith((".version", ".target", ".address_size", ".extern"))]
    return "\n".join(head) + "\n", text[found[0] : text.index("\n}\n", found[0]) + 3]


def changed(of: Machine, kernel: str, pattern: str, by: str, which: int | None, folder: Path) -> Machine:
    """The machine with one of a kernel's lines that the pattern matches changed (None: with all)."""
    head, body = entry_of(_ptx_of(of), kernel)
    places = list(re.finditer(pattern, body, re.M))
    assert places, f"no line of {kernel} matches {pattern}"
    for place in reversed(places if which is None else [places[which]]):
        body = body[: place.start()] + place.expand(by) + body[place.end() :]
    file = folder / f"{len(list(folder.glob('*.ptx')))}.ptx"
    file.write_text(head + body)
    return of.with_ptx(file)


def _ptx_of(machine: Machine) -> Path:
    (ptx,) = [file for file in machine.files if file.parent.name.startswith("float32")]
    return ptx


def count_of(of: Machine, kernel: str, pattern: str) -> int:
    return len(re.findall(pattern, entry_of(_ptx_of(of), kernel)[1], re.M))


# ---- in the sources ----

# The copies hold some of the float32 kernels, which compile in a fraction of the time.
_SMALL = """#include "instantiate.cuh"
namespace bn_ext {
namespace cuda {
ENTRIES
cudaError_t padded_float32(PaddedPass, const PaddedArgs&, cudaStream_t) { return cudaErrorNotSupported; }
}  // namespace cuda
}  // namespace bn_ext
"""
_ENTRIES = {
    "forward": "ForwardArgs",
    "backward": "BackwardArgs",
    "double_backward": "DoubleBackwardArgs",
    "forward_pieces": "PieceArgs<ForwardArgs>",
    "backward_pieces": "PieceArgs<BackwardArgs>",
}
_REDUCE = "[&](auto* op) { return reduce_and_apply<std::remove_pointer_t<decltype(op)>>(p, a, w, s); }"
_APPLY = "[&](auto* op) { return apply<std::remove_pointer_t<decltype(op)>>(p, a, s); }"
KINDS = {
    "forward": f"with_vector<Forward, float>(p, {_REDUCE})",
    "evaluation": f"with_vector<Evaluation, float>(p, {_APPLY})",
    "mask": f"with_residual<ActivatedForward, float>(a.epilogue, p, {_REDUCE})",
}


def _small(kind: str) -> str:
    entries = ""
    for name, args in _ENTRIES.items():
        result = KINDS[kind] if name == "forward" else "cudaErrorNotSupported"
        head = f"cudaError_t {name}_float32(const {args}& a, const Plan& p, void* w, cudaStream_t s)"
        entries += f"{head} {{ return {result}; }}\n"
    return _SMALL.replace("ENTRIES", entries)


@dataclass
class Fault:
    """A line of a file of csrc/cuda changed; kind: the kernels that the copy has."""

    file: str
    old: str
    new: str
    architecture: int
    kind: str = "forward"


def _replaced(text: str, old: str, new: str) -> str:
    if old in text:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        return text.replace(old, new)
    pattern = re.escape(old.strip()).replace(r"\ ", " *")  # spaces before the backslashes of a macro
    text, found = re.subn(pattern, lambda _: new.strip(), text)
    assert found == 1, f"{old!r} is there {found} times"
    return text


def planted(fault: Fault, host: Sequence[Path], plain: Machine) -> Machine:
    """A machine like `plain`, with these host files, and the fault in them or in its float32 kernels."""
    changes = digest(fault.file, fault.old, fault.new, fault.kind, (CUDA / fault.file).read_text())
    csrc = CACHE / f"fault_{changes}" / "csrc"
    if not csrc.exists():
        part = csrc.parent.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        for folder in ("core", "cuda"):
            shutil.copytree(ROOT / "csrc" / folder, part / "csrc" / folder)
        target = part / "csrc" / "cuda" / fault.file
        target.write_text(_replaced(target.read_text(), fault.old, fault.new))
        (part / "csrc" / "cuda" / "float32.cu").write_text(_small(fault.kind))
        shutil.rmtree(csrc.parent, ignore_errors=True)
        part.rename(csrc.parent)
    home = nvcc.toolkit_or_skip()
    small = nvcc.compile_ptx(home, csrc / "cuda" / "float32.cu", (fault.architecture,), csrc)
    others = [f for f in plain.folders if not f.name.startswith("float32")]
    host = [csrc / "cuda" / path.name if path.parent == CUDA else path for path in host]
    return link("fault", [small, *others], host, plain.backend)
