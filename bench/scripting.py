"""What every script here and in examples/ does: name a package that is missing, end quietly when nobody reads on."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
# What the extra "bench" brings, by the name of the import.
EXTRA = {"aeon": "aeon", "matplotlib": "matplotlib", "numpy": "numpy", "rich": "rich", "sklearn": "scikit-learn"}


def remedy(error: ImportError) -> str | None:
    """What is missing and what to type, in one sentence; None where the error has another cause."""
    script = Path(sys.argv[0]).name
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing in EXTRA:
        package = EXTRA[missing]
        return f'{script} needs {package}: pip install "bn_ext[bench]", or pip install {package}'
    if missing == "torch":
        return f"{script} needs torch: pip install torch"
    if missing == "bn_ext":
        return f"{script} needs bn_ext: pip install {shlex.quote(str(ROOT))}"
    # The package says itself why its library cannot be loaded, and what to do.
    return str(error) if str(error).startswith("bn_ext") else None


@contextlib.contextmanager
def needed() -> Iterator[None]:
    """Imports of other packages stand inside; where one is missing, the script ends with a sentence and status 1."""
    try:
        yield
    except ImportError as error:
        if (sentence := remedy(error)) is None:
            raise
        raise SystemExit(sentence) from error


def check_output(parser: argparse.ArgumentParser, option: str, path: Path | None, kinds: Iterable[str] = ()) -> None:
    """Make the folder of a file that is to be written later; end with a sentence where it cannot be written."""
    if path is None:
        return
    if kinds and path.suffix.lower().removeprefix(".") not in kinds:
        parser.error(f"{option}: a figure ends in one of {', '.join(sorted(kinds))}, not as {path.name} does")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        parser.error(f"{option}: {path} cannot be written")


def end(main: Callable[[], int]) -> NoReturn:
    """Exit with what main returns; quietly with 1 when whoever read the output has closed the pipe."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer would be tried again at exit, and complained about.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
