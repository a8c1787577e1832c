"""Which kernels' regimes ran, on which machine: one line a call, for the table of `python -m ptx.table`."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .backend import backend
from .calls import Inputs, Pass, exchange_of, walk_of

FOLDER = "BN_EXT_TALLY"  # where each process writes what it ran, if it is set
Key = tuple[str, ...]
FIELDS = ("machine", "pass", "exchange", "walk", "dtype", "batch", "follows")
_ran: Counter[Key] = Counter()


def _batch(inputs: Inputs) -> str:
    """What is asked for beside the plain batch."""
    asked = {
        "padded": inputs.valid is not None,
        "virtual": inputs.batches[0] > 1,
        "renormalised": inputs.renorm is not None,
        "in stages": inputs.ends or inputs.given is not None,
    }
    return ", ".join(name for name, is_so in asked.items() if is_so) or "plain"


def note(pass_: Pass, inputs: Inputs, plan: dict[str, int]) -> None:
    """Count a call that ended well."""
    on = backend()
    machine = f"sm_{on.architecture}{' contracted' * on.contract}" if on.architecture else "g++"
    follows = "activation" if inputs.activation else "residual" if inputs.residual is not None else ""
    exchange = "padded" if inputs.valid is not None else exchange_of(plan)  # kernels of its own, without a plan
    regime = exchange, walk_of(plan), str(inputs.x.dtype).removeprefix("torch.")
    _ran[(machine, pass_.name.lower(), *regime, _batch(inputs), follows)] += 1


def write() -> None:
    """Write this process' counts, where somebody asked for them."""
    folder = os.environ.get(FOLDER)
    if folder and _ran:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
            json.dump([[*key, count] for key, count in _ran.items()], file)


def read(folder: Path) -> Iterator[tuple[dict[str, str], int]]:
    """What the processes of a run wrote."""
    for path in sorted(folder.glob("*.json")):
        for *key, count in json.loads(path.read_text()):
            yield dict(zip(FIELDS, key, strict=True)), count
