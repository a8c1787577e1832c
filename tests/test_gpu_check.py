"""scripts/gpu_check.sh and what it calls, as far as that goes without a GPU: its steps, its cases, ncu's counts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import regimes
from bn_ext import launches
from processes import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import gpu_table
import traffic

SCRIPT = ROOT / "scripts" / "gpu_check.sh"
needs_bash = pytest.mark.skipif(shutil.which("bash") is None or shutil.which("timeout") is None, reason="needs bash")


def bash(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run code after the script's functions are there; its output, errors included, is in .stdout."""
    return subprocess.run(
        ["bash", "-c", f'source "{SCRIPT}"\n{code}'],
        env={**os.environ, "PYTHON": sys.executable, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def dry(*arguments: str) -> list[str]:
    done = subprocess.run(["bash", SCRIPT, "--dry", *arguments], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line]


def steps(tmp_path: Path, code: str, seconds: int = 60) -> tuple[int, dict[str, tuple[str, str]], str]:
    """(status, step -> (verdict, last line of its log), all output) of steps that are not the script's own."""
    out = tmp_path / "out"
    out.mkdir()
    done = bash(
        f"""
        DRY=false ONLY= OUT={out} WORK={tmp_path} RESULTS={tmp_path}/results PREFIX=/nowhere SECONDS=0
        STEPS=(one two three four)
        mkdir "$RESULTS"
        {code}
        summary""",
        GPU_CHECK_SECONDS=str(seconds),
    )
    rows = re.findall(r"^(one|two|three|four) +(ok|skipped|FAILED|TIMED OUT|NO TIME) +\d+s  (.*)$", done.stdout, re.M)
    return done.returncode, {name: (verdict, text) for name, verdict, text in rows}, done.stdout


@needs_bash
def test_steps_that_work(tmp_path: Path) -> None:
    status, found, said = steps(tmp_path, "step one 9 echo fine\nstep two 9 bash -c 'echo none here; exit 77'\n")
    assert status == 0 and found == {"one": ("ok", "fine"), "two": ("skipped", "none here")}
    assert (tmp_path / "out" / "one.log").read_text() == "fine\n" and "all well" in said


@needs_bash
def test_a_step_that_fails_does_not_keep_the_next_from_running(tmp_path: Path) -> None:
    status, found, said = steps(
        tmp_path, "step one 9 bash -c 'echo because >&2; exit 3'\nstep two 1 sleep 30\nstep three 9 echo still\n"
    )
    assert status == 1
    assert found["one"] == ("FAILED", "because")
    assert found["two"][0] == "TIMED OUT"
    assert found["three"] == ("ok", "still")
    assert said.rstrip().splitlines()[-1].startswith("FAILED after")


@needs_bash
def test_steps_share_the_time_of_the_whole(tmp_path: Path) -> None:
    status, found, _ = steps(tmp_path, "step one 100 sleep 30\nstep two 9 echo late\n", seconds=6)
    assert status == 1 and found["one"][0] == "TIMED OUT" and found["two"][0] == "NO TIME"


@needs_bash
def test_steps_in_the_background_are_counted_too(tmp_path: Path) -> None:
    """They are interrupted when their time is over, as the others are, so that they can still say what they have."""
    patient = tmp_path / "patient.py"
    patient.write_text("import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('so far')\n")
    code = f"beside one 9 false\nbeside three 3 {sys.executable} {patient}\nstep two 9 echo in front\nwait\n"
    status, found, _ = steps(tmp_path, code)
    assert status == 1 and found["one"][0] == "FAILED" and found["two"] == ("ok", "in front")
    assert found["three"] == ("TIMED OUT", "so far")


@needs_bash
def test_the_suite_takes_each_file_by_itself(tmp_path: Path) -> None:
    """A file that ends its process takes no other along, those that have a step of their own are left to it."""
    files = {
        "good": "def test_one(): pass\ndef test_at_every_level(): assert False",
        "bad": "def test_two(): assert False\ndef test_three(): pass",
        "dead": "import os\ndef test_four(): os._exit(9)",
        "none_left": "def test_at_every_level(): assert False",
        "cuda": "def test_five(): assert False",
    }
    (tmp_path / "root" / "tests").mkdir(parents=True)
    (tmp_path / "root" / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    for name, text in files.items():
        (tmp_path / "root" / "tests" / f"test_{name}.py").write_text(text)
    code = f"""
        export PY={sys.executable} ROOT={tmp_path}/root WORK ELSEWHERE PYTHONDONTWRITEBYTECODE=1
        export -f tests suite suite_file suite_report
        step one 250 suite
        """
    status, found, _ = steps(tmp_path, code, seconds=300)
    assert status == 1 and found["one"][0] == "FAILED"
    assert {"2 passed", "1 failed", "files: 4", "not right: 2"} == set(found["one"][1].split(", "))
    log = (tmp_path / "out" / "one.log").read_text()
    assert "exit status 9" in log and "test_five" not in log


@needs_bash
def test_logs_name_no_place(tmp_path: Path) -> None:
    _, found, said = steps(tmp_path, f"step one 9 echo in {tmp_path}/a and {ROOT}/b\n")
    assert found["one"] == ("ok", "in work/a and ./b")
    assert str(tmp_path) not in said and str(ROOT) not in said


@needs_bash
def test_what_would_run_is_there(tmp_path: Path) -> None:
    """Every file of the repository that a command or the list of other tests names, and every step once."""
    lines = dry()
    names = [line.split()[0] for line in lines]
    declared = bash('echo "${STEPS[@]}"').stdout.split()
    assert sorted(names) == sorted(declared) and names[:2] == ["environment", "build"]
    for path in re.findall(rf"{re.escape(str(ROOT))}/\S+", "\n".join(lines) + SCRIPT.read_text()):
        assert Path(path).exists(), path
    for path in re.findall(r"\$ROOT\"?/([\w/]+\.\w+)", SCRIPT.read_text()):
        assert (ROOT / path).exists(), path
    assert [line.split()[0] for line in dry("--only", "suite,build")] == ["build", "suite"]
    cpu = dry("--cpu")
    assert sum("skipped" in line for line in cpu) == 10 and any(line.startswith("suite ") for line in cpu)


@needs_bash
def test_one_real_step(tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT), "--cpu", "--only", "environment", str(tmp_path / "out")]
    environ = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {torch.__version__}" in (tmp_path / "out" / "environment.log").read_text()
    assert done.stdout.rstrip().splitlines()[-1].startswith("all well")
    assert (tmp_path / "out" / "summary.txt").read_text() in done.stdout
    environ["PYTHON"] = "false"  # a Python without torch
    assert subprocess.run(command, capture_output=True, check=False, env=environ).returncode == 1
    usage = subprocess.run(["bash", SCRIPT, "--what"], capture_output=True, text=True, check=False)
    assert usage.returncode == 2 and "--only" in usage.stdout


# ---- the table at its end ----


def measured(contender: str, us: float, **changes: object) -> dict[str, object]:
    record = {"device_name": "NVIDIA H200", "dtype": "float32", "shape": [65536, 256], "layout": "contiguous"}
    record |= {"mode": "eval", "contender": contender, "median_us": us, "gbps": 2 * 65536 * 1024 / us / 1e3}
    return {**record, "limit_fraction": 20 / us, **changes}


def test_the_table_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cuda-tests.log").write_text("...\n12 passed, 3 skipped in 4.5s\n")
    (tmp_path / "suite.log").write_text("1 failed, 5 passed in 2s\n\n120 passed, 2 failed, \nfiles: 4, not right: 1\n")
    records = [measured("bn_ext", 25.0), measured("nn", 50.0), measured("copy", 20.0)]
    small = {"shape": [32, 64], "limit_fraction": None}
    records += [measured("bn_ext", 4.0, **small), measured("nn", 2.0, **small)]
    (tmp_path / "bench-calls.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", str(tmp_path)])
    assert gpu_table.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["cuda-tests     12 passed, 3 skipped", "suite          120 passed, 2 failed"]
    # Twice and half as fast: their mean is 1. 20 of 25 us of the copy's rate, and by the model, which adds a launch.
    assert said[4].split() == ["eval", "float32", "2", "1.00", "0.50", "80%", "0.90", "32x64", "float32"]
    assert len(said) == 5 and gpu_table.planner("Some other GPU") is None


@needs_bash
def test_what_to_send_is_said(tmp_path: Path) -> None:
    _, _, said = steps(tmp_path, "step one 9 echo fine\n")
    assert "send us this file, and the bench-*.jsonl beside it: out/summary.txt" in said.splitlines()


# ---- the cases that compute-sanitizer watches ----


@pytest.mark.parametrize("name", ["H200", "A100"])
def test_the_cases_reach_every_way_to_exchange_and_to_walk(name: str) -> None:
    on = launches.PRESETS[name]
    reached = {pair for case in regimes.CASES for pair in regimes.regimes(case, on)}
    exchanges = {"none", "grid", "grid pooled"} | ({"cluster"} if on.capability >= 90 else set())
    for pass_ in ("forward", "backward"):
        here = [what.split(", ") for which, what in reached if which == pass_]
        assert {parts[0] for parts in here} == exchanges
        assert {parts[1] for parts in here} == {"columns", "joined rows", "spans", "planes"}
        assert {parts[2] for parts in here} == {"vectors", "elements"}
        assert {parts[3] for parts in here} >= {"all kept", "some kept", "none kept"}
        assert any(parts[-1] == "tail" for parts in here)


def test_the_cases_are_right_and_a_wrong_one_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert regimes.main(["--device", "cpu", "--largest", "2000"]) == 0
    assert "calls right" in capsys.readouterr().out
    monkeypatch.setattr(regimes.bn_ext.FusedBatchNorm1d, "forward", lambda self, x: x * self.weight + self.bias)
    assert regimes.main(["--device", "cpu", "--largest", "40"]) == 1
    assert "7x5 float32 contiguous: WRONG: output" in capsys.readouterr().out


# ---- what ncu counted ----


def counted_csv(on: launches.Device) -> list[str]:
    """ncu's file for the launches of the model, each of which moved half of what the model says in a microsecond."""
    header = ["ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value"]
    lines, number = ["==PROF== Connected", ",".join(f'"{name}"' for name in header)], 0
    for point in traffic.POINTS:
        for name in traffic.PASSES:
            plan = launches.plan_of(name, on, point.meta())
            for _ in range(plan["launches"]):
                for metric, unit, value in (
                    (traffic.READ, "byte", plan["read_bytes"] / 2 / plan["launches"]),
                    (traffic.WRITTEN, "byte", plan["write_bytes"] / 2 / plan["launches"]),
                    (traffic.TIME, "ns", 1000 / plan["launches"]),
                ):
                    lines.append(f'"{number}","k<float, 4>","{metric}","{unit}","{value:,.0f}"')
                number += 1
    return lines


def test_counted_bytes_are_set_beside_the_model_s() -> None:
    on = launches.PRESETS["H200"]
    lines = counted_csv(on)
    found = list(traffic.table(traffic.counted_launches(lines), on))
    assert len(found) == 1 + len(traffic.POINTS) * len(traffic.PASSES)
    inference = next(line for line in found if line.startswith("1024x1024 float32") and "inference" in line).split()
    assert inference[-6:] == ["4.19", "2.10", "4.19", "2.10", "1.0", "8389"]
    another = [line.replace(line.split(",")[0], '"9999"', 1) for line in lines[-3:]]
    for wrong, said in ((lines[:-3], "fewer launches"), ([*lines, *another], "more launches")):
        with pytest.raises(ValueError, match=said):
            list(traffic.table(traffic.counted_launches(wrong), on))


def test_no_leave_to_count_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "counted.csv").write_text("==ERROR== ERR_NVGPUCTRPERM\n")
    assert traffic.main(["read", str(tmp_path / "counted.csv")]) == traffic.NOTHING_COUNTED
    assert "counted nothing" in capsys.readouterr().out
