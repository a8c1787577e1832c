"""Run every test for "cuda" on the stand-in, a process a file, and say what passed, was left out and failed.

python -m standin.run [--seconds 900] [FILE...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from standin import build, skips

TESTS = Path(__file__).resolve().parents[1]
WORDS = {"passed": "passed", "skipped": "left out", "failed": "failed"}
# Files with tests that need torch's caching allocator (skips.py).
TWICE = ("test_bench_memory.py", "test_cuda.py", "test_cuda_fusion.py")


def files() -> list[Path]:
    """Files that take the device fixture or are for a GPU alone."""
    found = sorted(TESTS.glob("test_*.py"))
    return [p for p in found if "device: str" in p.read_text() or p.name in skips.CUDA_FILES]


def run_file(path: Path, environment: dict[str, str], seconds: int, more: list[str]) -> tuple[list[list[str]], str]:
    """The outcomes of a file's tests as plugin.py writes them, and what became of its process, if not its end."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "outcomes"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "standin.plugin", "-p", "no:cacheprovider", *more, path]
        variables = {**environment, "STANDIN_OUTCOMES": str(told), "OMP_NUM_THREADS": "1"}
        with open(Path(folder) / "log", "w+") as log:
            try:
                options: dict[str, Any] = {"cwd": TESTS, "env": variables, "stdout": log, "stderr": log}
                done = subprocess.run(list(map(str, command)), timeout=seconds, check=False, **options)
                ended = "" if done.returncode in (0, 1, 5) else f"ended with status {done.returncode}"
            except subprocess.TimeoutExpired:
                ended = f"was stopped after {seconds} s"
            log.seek(0)
            text = log.read()
        outcomes = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    if ended or any(outcome == "failed" for _, outcome, *_ in outcomes):
        print(text[-20000:])
    return outcomes, ended


def summary(outcomes: list[list[str]], wrong: list[str], minutes: float) -> int:
    """Print it; return the exit status."""
    counts = Counter(outcome for _, outcome, *_ in outcomes)
    why = Counter(reason for _, outcome, reason, _ in outcomes if outcome == "skipped")
    told = ", ".join(f"{counts[key]} {word}" for key, word in WORDS.items())
    print(f"\n{told}, {minutes:.1f} minutes")
    for reason, count in why.most_common():
        print(f"  {count:5} left out: {reason}")
    for nodeid, outcome, reason, _ in outcomes:
        if outcome == "failed":
            print(f"  FAILED {nodeid}: {reason[:200]}")
    for line in wrong:
        print(f"  {line}")
    return int(counts["failed"] > 0 or bool(wrong) or counts["passed"] == 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=900, help="for each file (default %(default)s)")
    parser.add_argument("-k", dest="expression", default="", help="pytest's -k")
    parser.add_argument("files", nargs="*", type=Path)
    args = parser.parse_args()
    environment = build.environment()
    more = ["-k", args.expression] if args.expression else []
    outcomes: list[list[str]] = []
    wrong: list[str] = []
    began = time.monotonic()
    for path in [p.resolve() for p in args.files] or files():
        for caching in (False, True) if path.name in TWICE else (False,):
            variables = dict(environment) if caching else {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            start = time.monotonic()
            found, ended = run_file(path, variables, args.seconds, more)
            counts = Counter(outcome for _, outcome, *_ in found)
            told = ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "none for a GPU"
            name = path.name + " with torch's allocator" * caching
            print(f"{name}: {told}, {time.monotonic() - start:.0f} s{', ' + ended if ended else ''}", flush=True)
            outcomes += found
            if ended:
                wrong.append(f"{name} {ended}")
    return summary(outcomes, wrong, (time.monotonic() - began) / 60)


if __name__ == "__main__":
    sys.exit(main())
