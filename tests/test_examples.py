"""The example: its data readers on files made here, and short trainings of its three networks."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bn_ext

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from rich.console import Console

import accuracy
import data
import networks
import train_fused
import train_mlp
from grid import Point
from pictures import assert_nothing_overlaps
from timing import Plan, Times

QUIET = Console(quiet=True)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time few steps, measure the errors of small tensors."""
    monkeypatch.setattr(train_mlp, "STEP_PLAN", Plan(block=1e-5, budget=0.0, min_rounds=2))
    points = (Point((64, 4)), Point((8, 4, 8)))
    monkeypatch.setattr(accuracy, "POINTS", points)
    monkeypatch.setattr(accuracy.measure, "__defaults__", (points,))


def idx(array: np.ndarray, code: int = 0x08) -> bytes:
    """The bytes of an IDX file."""
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(root: Path, train: int = 96, test: int = 40) -> dict[str, np.ndarray]:
    """Four files of random pictures, two of them gzipped; returns the arrays by file name."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, count, pack in (("train", train, gzip.compress), ("t10k", test, bytes)):
        arrays[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 4, 4), dtype=np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
        for name in (f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"):
            suffix = ".gz" if pack is gzip.compress else ""
            (root / (name + suffix)).write_bytes(pack(idx(arrays[name])))
    return arrays


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_read_idx(tmp_path: Path, pack: Any) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(pack(idx(array)))
    result = data.read_idx(tmp_path / "a")
    assert result.dtype == np.uint8 and np.array_equal(result, array)


def test_read_idx_is_big_endian(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(idx(np.array([1, -2, 70000], dtype=">i4"), code=0x0C))
    result = data.read_idx(tmp_path / "a")
    assert result.tolist() == [1, -2, 70000] and result.dtype == np.int32


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "starts with nothing"),
        (b"PK\x03\x04 an archive", "starts with 50 4b 03 04"),
        (b"\x00\x00\x77\x01\x00\x00\x00\x00", "not an IDX file"),
        (b"\x00\x00\x08\x03\x00\x00", "ends inside its header"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x03ab", "should hold 3 bytes"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x01ab", "holds 2"),
    ],
)
def test_read_idx_refuses_damaged_files(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        data.read_idx(tmp_path / "a")


def test_load_fashion_mnist(tmp_path: Path) -> None:
    arrays = write_fashion(tmp_path)
    dataset = data.load("fashion-mnist", tmp_path)
    assert dataset.train_x.shape == (96, 16) and dataset.test_x.shape == (40, 16)
    assert dataset.train_x.dtype == torch.float32 and dataset.train_y.dtype == torch.int64
    assert dataset.features == 16 and dataset.classes == 10
    expected = arrays["t10k-images-idx3-ubyte"][7].reshape(-1) / np.float32(255)
    assert np.array_equal(dataset.test_x[7].numpy(), expected.astype(np.float32))
    assert dataset.test_y[:11].tolist() == [*range(10), 0]


def test_load_fashion_mnist_says_what_is_missing(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, dtype=np.uint8)))
    with pytest.raises(ValueError, match="do not belong together"):
        data.load_fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"no t10k-labels-idx1-ubyte .*apt-get install dataset-fashion-mnist"):
        data.load_fashion_mnist(tmp_path)


def test_load_digits() -> None:
    dataset = data.load("digits")
    assert dataset.train_x.shape == (1437, 64) and dataset.test_x.shape == (360, 64) and dataset.classes == 10
    assert float(dataset.train_x.min()) == 0 and float(dataset.train_x.max()) == 1
    assert torch.equal(dataset.train_x, data.load("digits").train_x), "the split is fixed"
    with pytest.raises(ValueError, match="choose one of digits, fashion-mnist"):
        data.load("cifar")


@pytest.mark.parametrize("ours", train_mlp.OURS)
def test_the_networks_start_equal(ours: str) -> None:
    runs = train_mlp.build_runs(64, 10, seed=3, lr=0.01)
    native, fused, plain = (runs[name].model for name in ("nn", ours, "none"))
    assert [type(m) for m in fused if isinstance(m, nn.BatchNorm1d)] == [bn_ext.FusedBatchNorm1d] * 2
    computed = [entry.computes for entry in bn_ext.fusion_report(fused)]
    assert computed == ["relu(batch norm)"] * 2 if ours == "fused" else "relu(batch norm)" not in computed
    assert [type(m) for m in native if isinstance(m, nn.BatchNorm1d)] == [nn.BatchNorm1d] * 2
    assert not any(isinstance(m, nn.BatchNorm1d) for m in plain)
    pairs = list(zip(native.state_dict().items(), fused.state_dict().items(), strict=True))
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) and a[1] is not b[1] for a, b in pairs)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(native.parameters(), fused.parameters(), strict=True))
    linear = [[m.weight for m in model if isinstance(m, nn.Linear)] for model in (native, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*linear, strict=True))


def test_batch_norms_agree_and_beat_no_normalisation() -> None:
    dataset = data.load("digits")
    outcome = train_mlp.train(dataset, epochs=3, batch_size=64, lr=0.01, seed=0, console=QUIET)
    runs = outcome.runs
    assert outcome.agreed
    assert outcome.logit_gap[0] <= outcome.rounding_bound < 1e-4
    assert len(outcome.logit_gap) == 3 * (1437 // 64)
    assert all(len(run.accuracy) == len(run.epoch_loss) == 3 for run in runs.values())
    # The plain network is still near the loss of guessing, ln 10, where the others have all but finished.
    assert runs["none"].epoch_loss[-1] > 1 > 0.5 > runs["nn"].epoch_loss[-1]
    assert runs["none"].accuracy[-1] < min(runs[name].accuracy[-1] for name in train_mlp.OURS)


@pytest.mark.parametrize("spoilt", [False, True], ids=["converted", "fused"])
def test_a_wrong_batch_norm_is_noticed(
    spoilt: bool, short: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(module: nn.Module, fuse: bool = False) -> nn.Module:
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d) and fuse == spoilt:
                layer.eps = 1e-4
        return module

    monkeypatch.setattr(bn_ext, "convert", convert)
    assert train_mlp.main(["--epochs", "1", "--plot", str(tmp_path / "curves.png")]) == 1
    said = capsys.readouterr().out
    assert "first step: the batch norms DIFFER" in said and "DIFFERENT results" in said.splitlines()[-1]


def test_main_on_idx_files(short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fashion(tmp_path)
    picture = tmp_path / "sub" / "curves.png"
    arguments = ["--data", "fashion-mnist", "--root", str(tmp_path), "--epochs", "2", "--batch-size", "16"]
    assert train_mlp.main([*arguments, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    for words in ("96 training and 40 test images", "16 features", *train_mlp.TITLES.values(), "same final accuracy"):
        assert words in output
    assert "agree to float32 rounding" in output and "training step, median of interleaved runs" in output
    assert output.splitlines()[-1].startswith("bn_ext with convert(fuse=True) beside nn.BatchNorm1d: the same test")


def made_up(accuracies: dict[str, float], gap: float = 0.0) -> train_mlp.Outcome:
    """The outcome of a training of two epochs that never was."""
    dataset = data.Dataset("made up", *(torch.zeros(1000, 4), torch.zeros(1000)) * 2)
    runs = {}
    for name, value in accuracies.items():
        model = nn.Linear(4, 2)
        runs[name] = train_mlp.Run(model, torch.optim.SGD(model.parameters()), epoch_loss=[2, 1], accuracy=[0, value])
    return train_mlp.Outcome(dataset, runs, [gap], 1.0)


TIMES = {name: Times(median, median - 1e-6, median + 1e-6, 9) for name, median in
         (("nn", 3e-4), ("converted", 2e-4), ("fused", 1e-4), ("none", 5e-5))}  # fmt: skip
ERRORS = [
    {"mode": "accuracy", "dtype": "float32", "layout": "contiguous", "shape": list(accuracy.POINTS[0].shape),
     "contender": contender, "mean_over_std": ratio, "error": error}
    for contender, error in (("bn_ext", 5e-7), ("nn", 1e-2)) for ratio in accuracy.RATIOS
]  # fmt: skip


def test_the_closing_sentence_has_the_three_figures() -> None:
    outcome = made_up({"nn": 0.975, "converted": 0.975, "fused": 0.976, "none": 0.9})
    said = train_mlp.closing(outcome, TIMES, ERRORS)
    assert "the same test accuracy (97.60% and 97.50%)" in said and "3.00 times as fast, and" in said
    assert "20,000 times smaller (5e-07 and 0.01 standard deviations)" in said
    slow = {**TIMES, "nn": Times(1e-4, 9e-5, 2e-4, 9)}
    assert "1.00 times as fast (within noise)" in train_mlp.closing(outcome, slow, ERRORS)


@pytest.mark.parametrize("wrong", train_mlp.OURS)
def test_each_of_ours_has_to_agree(wrong: str) -> None:
    accuracies = dict.fromkeys(("nn", *train_mlp.OURS, "none"), 0.975)
    assert made_up(accuracies).agreed and not made_up(accuracies, gap=1e-3).agreed
    assert not made_up({**accuracies, wrong: 0.9}).agreed
    outcome = made_up(accuracies)
    logits = {name: torch.zeros(3, 2) for name in accuracies}
    outcome.compare({**logits, wrong: torch.full((3, 2), 0.25)})
    assert outcome.logit_gap[-1] == 0.25


def test_the_figure_has_curves_steps_and_errors() -> None:
    outcome = made_up({"nn": 0.975, "converted": 0.975, "fused": 0.976, "none": 0.9})
    drawn = train_mlp.figure(outcome, TIMES, ERRORS, "busy")
    loss, correct, steps, error = drawn.axes
    assert "busy" in drawn.get_suptitle()
    assert [line.get_label() for line in loss.lines] == list(train_mlp.TITLES.values())
    assert [line.get_ydata()[-1] for line in correct.lines] == pytest.approx([97.5, 97.5, 97.6, 90])
    assert [bar.get_width() for bar in steps.patches] == pytest.approx([0.3, 0.2, 0.1, 0.05])
    assert [text.get_text() for text in steps.texts] == [
        "0.30 ms, 1.00x",
        "0.20 ms, 1.50x",
        "0.10 ms, 3.00x",
        "0.05 ms, 6.00x",
    ]
    assert [(line.get_ydata()[0], line.get_xdata()[-1]) for line in error.lines] == [(5e-7, 1e6), (1e-2, 1e6)]


@pytest.mark.parametrize("scale", [1, 37, 1e4])
def test_nothing_overlaps_in_the_figure(scale: float) -> None:
    outcome = made_up({"nn": 0.975, "converted": 0.975, "fused": 0.976, "none": 0.9})
    times = {name: Times(scale * t.median, scale * t.p20, 9 * scale * t.p80, 9) for name, t in TIMES.items()}
    assert_nothing_overlaps(train_mlp.figure(outcome, times, ERRORS, "busy"))


def test_timing_a_step_leaves_the_record_of_the_training(short: None) -> None:
    dataset = data.load("digits")
    outcome = train_mlp.train(dataset, epochs=1, batch_size=256, lr=0.01, seed=0, console=QUIET)
    seen = [list(run.losses) for run in outcome.runs.values()]
    times = train_mlp.step_times(outcome, 256)
    assert times.keys() == outcome.runs.keys() and len({found.rounds for found in times.values()}) == 1
    assert [run.losses for run in outcome.runs.values()] == seen


def test_main_reports_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_mlp.main(["--data", "fashion-mnist", "--root", str(tmp_path)]) == 2
    assert train_mlp.main(["--batch-size", "5000"]) == 2
    output = capsys.readouterr().out
    assert "dataset-fashion-mnist" in output and "between 2 and 1437, not 5000" in output
    with pytest.raises(SystemExit):
        train_mlp.parse(["--epochs", "0"])


def test_defaults_depend_on_the_data() -> None:
    digits, fashion = train_mlp.parse([]), train_mlp.parse(["--data", "fashion-mnist", "--lr", "0.5"])
    assert (digits.epochs, digits.batch_size, digits.lr) == train_mlp.DEFAULTS["digits"]
    assert (fashion.epochs, fashion.batch_size) == train_mlp.DEFAULTS["fashion-mnist"][:2] and fashion.lr == 0.5
    assert digits.plot != fashion.plot and digits.plot.suffix == ".png"


FUSED = {  # what convert(fuse=True) should find in each network, and how often
    "mlp": {"relu(batch norm)": 2, "relu(batch norm + residual)": 0},
    "residual": {"relu(batch norm)": 1 + networks.BLOCKS, "relu(batch norm + residual)": networks.BLOCKS},
    "resnet": {"relu(batch norm)": 1 + 4, "relu(batch norm + residual)": 4},
}


@pytest.mark.parametrize("network", train_fused.NETWORKS)
def test_the_fused_network_agrees_with_the_native_one(
    network: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = tmp_path / "r.jsonl"
    assert train_fused.main(["--network", network, "--epochs", "2", "--no-compile", "--json", str(result)]) == 0
    found = [json.loads(line) for line in result.read_text().splitlines()]
    assert [(r["network"], r["kind"]) for r in found] == [(network, "nn"), (network, "fused")]
    assert all(r["median_us"] > 0 and 0 < r["accuracy"] <= 1 for r in found)
    said = capsys.readouterr().out
    assert {what: said.count(what) for what in FUSED[network]} == FUSED[network] and "agrees" in said


def test_a_fused_network_that_differs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original = bn_ext.convert

    def wrong(model: nn.Module, fuse: bool) -> nn.Module:
        model = original(model, fuse=fuse)
        model[2] = nn.GELU()
        return model

    monkeypatch.setattr(bn_ext, "convert", wrong)
    assert train_fused.main(["--epochs", "1", "--no-compile"]) == 1


def test_resnet1d_has_ten_layers_of_weights() -> None:
    model = networks.resnet1d(3, 7)
    assert sum(isinstance(m, nn.Conv1d | nn.Linear) for m in model.modules()) == 10
    assert model(torch.randn(2, 3, 50)).shape == (2, 7)
