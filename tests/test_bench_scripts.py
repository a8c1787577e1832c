"""What all scripts of bench/ and examples/ share: a sentence for a missing package, a quiet end for a closed pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from processes import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import scripting

# Script, arguments, package that is not there, what to type.
MISSING = [
    ("bench/accuracy.py", "", "bn_ext", f"bn_ext: pip install {ROOT}"),
    ("bench/bench_all.py", "", "torch", "torch: pip install torch"),
    ("bench/bench_batchnorm.py", "--quick", "rich", 'rich: pip install "bn_ext[bench]", or pip install rich'),
    ("bench/bench_batchnorm.py", "--quick --plot x.png", "matplotlib", 'matplotlib: pip install "bn_ext[bench]", or'),
    ("bench/compare.py", "a b", "rich", 'rich: pip install "bn_ext[bench]", or pip install rich'),
    ("bench/gpu_table.py", "folder", "rich", 'rich: pip install "bn_ext[bench]", or pip install rich'),
    ("bench/memory.py", "", "torch", "torch: pip install torch"),
    ("bench/pairing.py", "", "bn_ext", f"bn_ext: pip install {ROOT}"),
    ("bench/plot.py", "a b", "matplotlib", 'matplotlib: pip install "bn_ext[bench]", or pip install matplotlib'),
    ("bench/tables.py", "", "rich", 'rich: pip install "bn_ext[bench]", or pip install rich'),
    ("bench/roofline.py", "", "bn_ext", f"bn_ext: pip install {ROOT}"),
    ("bench/traffic.py", "run", "torch", "torch: pip install torch"),
    ("examples/sequences.py", "--quick", "aeon", 'aeon: pip install "bn_ext[bench]", or pip install aeon'),
    ("examples/small_batches.py", "--quick", "sklearn", 'scikit-learn: pip install "bn_ext[bench]", or pip install'),
    ("examples/train_fused.py", "", "numpy", 'numpy: pip install "bn_ext[bench]", or pip install numpy'),
    ("examples/train_mlp.py", "", "sklearn", 'scikit-learn: pip install "bn_ext[bench]", or pip install scikit-learn'),
]
WITHOUT = """
import pathlib, runpy, sys
script, missing, *arguments = sys.argv[1:]
sys.modules[missing] = None
sys.argv = [script, *arguments]
sys.path.insert(0, str(pathlib.Path(script).parent))
runpy.run_path(script, run_name="__main__")
"""


def scripts() -> set[str]:
    """Every file of the two folders that can be run."""
    files = [*(ROOT / "bench").glob("*.py"), *(ROOT / "examples").glob("*.py")]
    return {str(f.relative_to(ROOT)) for f in files if '__name__ == "__main__"' in f.read_text()}


def test_every_script_is_asked() -> None:
    assert scripts() == {script for script, *_ in MISSING}


@pytest.mark.parametrize("script", sorted(scripts()))
def test_every_script_ends_quietly(script: str) -> None:
    last = (ROOT / script).read_text().rstrip().splitlines()[-1].strip()
    assert last.startswith("end("), "a closed pipe is met in scripting.end"


@pytest.mark.parametrize(("script", "arguments", "package", "sentence"), MISSING)
def test_a_missing_package_is_named(script: str, arguments: str, package: str, sentence: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(ROOT / script), package, *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout, "told before anything is measured"
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{Path(script).name} needs {sentence}") and "Traceback" not in done.stderr


def test_other_errors_of_an_import_stay_what_they_are() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), scripting.needed():
        import no_such_module  # noqa: F401
    with pytest.raises(ImportError, match="no_such_name"), scripting.needed():
        from json import no_such_name  # noqa: F401
    with pytest.raises(SystemExit, match=r"bn_ext was built against torch 1, .* type: pip install"), scripting.needed():
        raise ImportError("bn_ext was built against torch 1, but torch 2 is running; type: pip install -e .")


def result_file(folder: Path) -> Path:
    """A small result of bench_batchnorm.py."""
    facts = {
        "device": "cpu",
        "device_name": "x",
        "threads": 1,
        "torch": "2",
        "torch_isa": "a",
        "bn_ext": "1",
        "isa": "b",
    }
    point = {"shape": [32, 64], "dtype": "float32", "layout": "contiguous", "mode": "eval", "commit": "c"}
    times = {"p20_us": 1, "median_us": 2, "p80_us": 3, "gbps": 1, "limit_fraction": 1}
    lines = [json.dumps({**facts, **point, **times, "contender": name}) + "\n" for name in ("nn", "bn_ext")]
    (folder / "r.jsonl").write_text("".join(lines))
    return folder / "r.jsonl"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("bench/bench_batchnorm.py", "--load r.jsonl"),
        ("bench/bench_batchnorm.py", "--fusion --quick --filter 32x64 --modes eval"),
        ("bench/bench_all.py", "--list"),
        ("bench/compare.py", "r.jsonl r.jsonl"),
        ("bench/traffic.py", "read r.jsonl"),
        ("examples/small_batches.py", "--quick --plot small.png"),
        ("examples/train_mlp.py", "--epochs 1"),
    ],
)
def test_a_closed_pipe_ends_a_script_quietly(script: str, arguments: str, tmp_path: Path) -> None:
    result_file(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / script), *arguments.split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with os.fdopen(writer, "w") as out:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    said = [
        line for line in done.stderr.splitlines() if not line.startswith("measured on a busy machine") and line.strip()
    ]
    assert said == []
