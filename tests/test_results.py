"""The measurements under bench/results: whose kernels they are of, and who quotes them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from processes import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import bench_all
import environment
import tables

FILES = sorted((ROOT / "bench" / "results").glob("c*.jsonl"))
KERNELS = ("csrc/core", "csrc/cpu")


def git(*command: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_measured_on_a_commit_of_these_kernels(file: Path) -> None:
    """A file that is older than a kernel is named by pytest's list of what was skipped; `make bench-all` renews it."""
    commits = {json.loads(line)["commit"] for line in file.read_text().splitlines()}
    assert len(commits) == 1, f"{file.name} mixes the commits {commits}"
    (commit,) = commits
    if not git("rev-parse", "HEAD") or git("rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("not in a git checkout with its history")
    assert git("cat-file", "-t", commit.removesuffix("-dirty")) == "commit", f"{commit} is nowhere in the history"
    since = git("log", "--oneline", f"{commit.removesuffix('-dirty')}..HEAD", "--", *KERNELS).splitlines()
    if since or commit.endswith("-dirty"):
        pytest.skip(f"{file.name} is of {commit}, {len(since)} changes of kernels ago: make bench-all")


def test_every_quoted_file_is_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = page.read_text()
        for name in re.findall(r"bench/results/([\w.-]+\.(?:jsonl|png))", text):
            assert (ROOT / "bench" / "results" / name).is_file(), f"{page.name} quotes {name}"


def test_every_quoted_file_is_measured_by_bench_all() -> None:
    quoted = tables.Results(tables.NAME)
    made = {quoted.path(part.name).stem for part in bench_all.PARTS}
    assert {file.stem for file in FILES} <= made


def test_a_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_all, "busy_share", lambda: 0.4)
    monkeypatch.setattr(bench_all, "measure", lambda part, target, of: pytest.fail("measured all the same"))
    assert bench_all.main([]) == 2
    assert "other processes keep 40% of the processors busy" in capsys.readouterr().out
    monkeypatch.setattr(bench_all, "busy_share", lambda: 0.0)
    monkeypatch.setattr(bench_all, "commit", lambda: "abc-dirty")
    assert bench_all.main([]) == 2
    assert "tracked files are changed" in capsys.readouterr().out


def test_a_part_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_all, "RESULTS", tmp_path)
    broken = bench_all.Part("-broken", (("pairing.py", "--no-such-option"),))
    writes = "import os, sys; open(sys.argv[-1], 'w').write(os.environ['BENCH_COMMIT'] + '\\n')"
    (tmp_path / "writer.py").write_text(writes)
    whole = bench_all.Part("-whole", ((str(tmp_path / "writer.py"),), (str(tmp_path / "writer.py"),)))
    monkeypatch.setattr(bench_all, "PARTS", (broken, whole, bench_all.Part("-later", whole.commands)))
    commits = iter(["abc", "abc-dirty"])  # as git says once the first file is written
    monkeypatch.setattr(bench_all, "commit", lambda: next(commits))
    (tmp_path / "local-broken.jsonl").write_text("old\n")
    assert bench_all.main(["--anyway"]) == 1
    assert (tmp_path / "local-broken.jsonl").read_text() == "old\n"
    for name in ("local-whole.jsonl", "local-later.jsonl"):
        assert (tmp_path / name).read_text() == "abc\nabc\n"
    assert "not measured: local-broken.jsonl" in capsys.readouterr().out


def test_the_figure_follows_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_all, "RESULTS", tmp_path)
    monkeypatch.setattr(
        bench_all, "measure", lambda part, target, of: shutil.copy(measured[part.name], target) and None
    )
    measured = {part: next(file for file in FILES if file.stem == f"{tables.NAME}{part}") for part in bench_all.FIGURE}
    assert bench_all.main(["--anyway", "--name", "mine", "--only", "accuracy"]) == 0
    alone = (tmp_path / "mine-2t.png").read_bytes()
    assert bench_all.main(["--anyway", "--name", "mine", "--only", "2t"]) == 0
    assert (tmp_path / "mine-2t.png").read_bytes() != alone, "of both files"
    monkeypatch.setattr(bench_all, "measure", lambda part, target, of: target.write_text("") and None)
    assert bench_all.main(["--anyway", "--name", "empty", "--only", "accuracy"]) == 1
    assert "not measured: empty-2t.png: plot.py ended with status 1" in capsys.readouterr().out


def test_a_process_beside_counts_as_busy() -> None:
    if environment.busy_share(0.1) is None:
        pytest.skip("the system does not tell")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            share = environment.busy_share(1.0)
        finally:
            other.kill()
    assert share is not None and share > 0.25 / (os.cpu_count() or 1)


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_knows_it() -> None:
    done = subprocess.run(["make", "-n", "bench-all", "NAME=x"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "bench/bench_all.py --name x" in done.stdout
