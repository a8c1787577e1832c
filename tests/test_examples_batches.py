"""The examples of padded and of small batches: short trainings, and what their tables and figure are made of."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bn_ext

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import data
import sequences
import small_batches
import trials
from pictures import assert_nothing_overlaps


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Both scripts take one thread for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vowels() -> data.Sequences:
    return data.load_japanese_vowels()


def test_the_recordings_are_those_of_the_authors(vowels: data.Sequences) -> None:
    assert (len(vowels.train_x), len(vowels.test_x)) == (270, 370)
    assert (vowels.channels, vowels.classes, vowels.longest) == (12, 9, 29)
    assert min(recording.size(1) for recording in vowels.train_x) == 7
    assert all(recording.dtype == torch.float32 for recording in vowels.train_x)
    assert vowels.train_y.bincount().tolist() == [30] * 9
    assert vowels.test_y.bincount().tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]


def test_a_batch_is_padded_with_zeros() -> None:
    recordings = [torch.full((2, 3), 1.0), torch.full((2, 5), 2.0)]
    x, lengths = sequences.padded(recordings, 7)
    assert x.shape == (2, 2, 7) and lengths.tolist() == [3, 5] and lengths.dtype == torch.int64
    assert x.sum((1, 2)).tolist() == [6, 20] and not x[0, :, 3:].any() and not x[1, :, 5:].any()
    assert sequences.padded(recordings, 0)[0].shape == (2, 2, 5)


@pytest.fixture(scope="module")
def logits(vowels: data.Sequences) -> dict[str, dict[str, Tensor]]:
    """The answers of each network after one epoch on batches with little padding."""
    return {kind: sequences.answers(sequences.train(vowels, kind, 29, 1, 0), vowels) for kind in sequences.NORMS}


def test_masked_logits_do_not_depend_on_the_padding(logits: dict[str, dict[str, Tensor]]) -> None:
    found = logits["masked"]
    for places, first in ((trials.EVALUATED, "alone"), (trials.OF_BATCH, trials.OF_BATCH[0])):
        for place in places:
            torch.testing.assert_close(
                found[place], found[first], rtol=0, atol=sequences.bound() * found[first].abs().max()
            )


@pytest.mark.parametrize("kind", ["counted", "layer"])
def test_the_logits_of_the_others_do(kind: str, logits: dict[str, dict[str, Tensor]]) -> None:
    found = logits[kind]
    assert (found["29"] - found["alone"]).abs().max() > 1e3 * sequences.bound() * found["alone"].abs().max()


def test_asking_leaves_the_network_as_it_was(vowels: data.Sequences) -> None:
    network = sequences.train(vowels, "masked", 29, 1, 0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    sequences.answers(network, vowels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_sequences_writes_a_line_for_each_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "r.jsonl"
    assert sequences.main(["--quick", "--json", str(result)]) == 0
    found = [json.loads(line) for line in result.read_text().splitlines()]
    wanted = [(kind, steps) for kind in sequences.NORMS for steps in sequences.TRAINED_AT]
    assert [(r["kind"], r["trained_at"]) for r in found] == wanted
    assert all(r["accuracy"].keys() == {*trials.EVALUATED, *trials.OF_BATCH} and r["commit"] for r in found)
    assert capsys.readouterr().out.splitlines()[-1].startswith("masked: logits do not depend on the padding")


def test_a_mask_that_leaks_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1, where the norm is not given the lengths."""
    original = bn_ext.FusedBatchNorm1d.forward
    monkeypatch.setattr(bn_ext.FusedBatchNorm1d, "forward", lambda self, x, lengths=None: original(self, x))
    assert sequences.main(["--quick"]) == 1
    assert "masked: logits DEPEND on the padding" in capsys.readouterr().out


@pytest.mark.parametrize("script", [sequences, small_batches])
@pytest.mark.parametrize("option", ["--epochs", "--seeds"])
def test_wrong_arguments(script: object, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse([option, "0"])
    assert f"{option} must be positive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "2,x"], "takes numbers with commas between them, not 2,x"),
        (["--sizes", "1,2,48"], "may have 2, 4, 8, 16, 32, 64, 128, not 1, 48"),
        (["--lr", "0"], "--lr must be positive"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--epochs", "1"], "--epochs must be at least 2"),
        (["--plot", "curves.xyz"], "--plot: a figure ends in one of"),
    ],
)
def test_wrong_arguments_of_small_batches(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        small_batches.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", [sequences, small_batches])
def test_where_nothing_can_be_written_nothing_is_trained(
    script: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "r.jsonl"):
        with pytest.raises(SystemExit):
            script.parse(["--json", str(place)])
        assert f"--json: {place} cannot be written" in capsys.readouterr().err
    made = tmp_path / "new" / "r.jsonl"
    assert script.parse(["--json", str(made)]).json == made and made.parent.is_dir()


@pytest.mark.parametrize("script", [sequences, small_batches])
def test_quick_leaves_what_is_told(script: object) -> None:
    quick = script.parse(["--quick", "--epochs", "7"])
    assert (quick.epochs, quick.seeds) == (7, 1)
    quick = script.parse(["--quick", "--seeds", "3"])
    assert (quick.epochs, quick.seeds) == (2, 3)


def test_small_batches_has_every_norm_at_every_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, picture = tmp_path / "r.jsonl", tmp_path / "sub" / "p.png"
    assert small_batches.main(["--quick", "--json", str(result), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = {(r["kind"], r["batch"]): r["accuracy"] for r in map(json.loads, result.read_text().splitlines())}
    assert found.keys() == {(kind, size) for kind in small_batches.KINDS for size in (8, 32, 128)} - {("virtual", 8)}
    assert all(0.5 < accuracy <= 1 for accuracy in found.values())
    said = capsys.readouterr().out
    assert all(kind.title in said for kind in small_batches.KINDS.values())


def test_the_network_of_a_kind_has_its_norm() -> None:
    dataset = data.load_digits()
    norms = {name: small_batches.network(dataset, kind, 11)[1] for name, kind in small_batches.KINDS.items()}
    assert norms["virtual"].virtual_batch_size == small_batches.VIRTUAL
    assert norms["renorm"].warmup_steps == 11 and norms["group"].num_groups == small_batches.GROUPS


@pytest.mark.parametrize(("kind", "updates"), [("frozen", 11), ("warm", 11 + 44), ("batch", 88)])
def test_frozen_statistics_are_those_of_the_first_half(
    kind: str, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """11 batches of 128 an epoch, 44 of 32."""
    made: list[torch.nn.Sequential] = []
    original = small_batches.network
    monkeypatch.setattr(small_batches, "network", lambda *args: made.append(original(*args)) or made[0])
    small_batches.train(data.load_digits(), small_batches.KINDS[kind], 32, 2, 0.1, 0)
    assert int(made[0][1].num_batches_tracked) == updates


def line(title: str, batch: int, accuracy: float) -> trials.Record:
    return {"data": "made up", "title": title, "batch": batch, "accuracy": accuracy, "epochs": 3}


def test_a_cell_is_the_mean_and_the_farthest_seed() -> None:
    records = [line("a", 4, 0.9), line("a", 2, 0.5), line("a", 2, 0.6), line("a", 2, 0.76), line("b", 4, 1.0)]
    heading, rows = trials.small_batches(records)
    assert heading == ["norm", "2", "4"]
    assert rows == [["a", "62.0 ±14.0", "90.0"], ["b", "-", "100.0"]]


def test_a_row_of_the_sequences_has_the_largest_change_of_its_seeds() -> None:
    def seed(accuracy: float, change: float) -> trials.Record:
        places = dict.fromkeys((*trials.EVALUATED, *trials.OF_BATCH), accuracy)
        return {"title": "a", "trained_at": 29, "accuracy": places, "change": change, "batch_change": 1.0}

    records = [seed(0.5, 2e-7), seed(0.7, 0.125)]
    heading, rows = trials.sequences(records, trials.EVALUATED, "change")
    assert heading == ["norm", "trained at", "alone", "29", "60", "120", "change"]
    assert rows == [["a", "29", *["60.0 ±10.0"] * 4, "0.1"]]
    heading, rows = trials.sequences(records, trials.OF_BATCH, "batch_change")
    assert heading[2:] == ["29", "60", "120", "change"] and rows[0][-1] == "1"


def test_nothing_overlaps_in_the_figure() -> None:
    titles = [kind.title for kind in small_batches.KINDS.values()]
    records = [line(title, size, 0.8 + 0.02 * i) for i, title in enumerate(titles) for size in small_batches.SIZES]
    drawn = small_batches.figure(records)
    assert_nothing_overlaps(drawn)
    assert [text.get_text() for text in drawn.axes[0].get_legend().get_texts()] == titles
