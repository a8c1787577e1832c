"""The table of what ran on which machine, of calls that are known."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from ptx import table
from simt import tally
from simt.backend import running_on
from simt.calls import Pass
from simt_support import WALKS, make, run


def test_calls_are_counted_where_they_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "_ran", Counter())
    for dtype in (torch.float32, torch.float64):
        run(Pass.FORWARD, make(WALKS["columns"](40), dtype))
    run(Pass.FORWARD, make((6, 4, 80), valid=torch.tensor([0, 80, 3, 4, 5, 6])))
    run(Pass.INFERENCE, make(WALKS["planes"](40), activation="relu"))
    with running_on(90, contract=True):  # counted by the name of the machine; nothing runs
        tally.note(Pass.FORWARD, make(WALKS["columns"](40)), _PLAN)
    tally.write()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(tally.FOLDER, str(tmp_path / "made"))
    for _ in range(2):  # of two processes
        tally.write()
    assert table.tables(tmp_path / "made") == [
        "| pass | exchange | g++ | sm_90 contracted |",
        "| --- | --- | --- | --- |",
        "| forward | cluster | - | 2 (1) |",
        "| forward | none | 4 (2) | - |",
        "| forward | padded | 2 (1) | - |",
        "| inference | none | 2 (1) | - |",
        "| all |  | 8 | 2 |",
        "",
        "| batch | with | g++ | sm_90 contracted |",
        "| --- | --- | --- | --- |",
        "| padded | - | 2 | - |",
        "| plain | - | 4 | 2 |",
        "| plain | activation | 2 | - |",
    ]


_PLAN = {"pooled": 0, "exchange": 1, "planes": 0, "span": 1, "vectors": 2, "column_step": 4, "channels": 8}


def test_a_call_that_fails_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "_ran", Counter())
    with pytest.raises(AssertionError):
        run(Pass.BACKWARD, make((4, 4)), saved=torch.zeros(0))
    assert not tally._ran
