"""The data sets of the examples: scikit-learn's digits, Fashion-MNIST from IDX files on disk, and JapaneseVowels.

Nothing is fetched from a network. The digits ship inside scikit-learn, JapaneseVowels inside aeon; the Fashion-MNIST
files are those that Debian's package ``dataset-fashion-mnist`` installs, or any copy of the four original files,
compressed with gzip or not.
"""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DEBIAN_ROOT = Path("/usr/share/datasets/fashion-mnist")
NAMES = ("digits", "fashion-mnist")

# The third byte of an IDX file names its element type; values are big-endian on disk.
_IDX_TYPES = {
    0x08: np.dtype("u1"),
    0x09: np.dtype("i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}


@dataclass(frozen=True)
class Dataset:
    """A classification task: images as rows of float32 in [0, 1], labels as int64.

    ``train_x`` is (N, features), ``train_y`` (N,), ``test_x`` (M, features), ``test_y`` (M,).
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def features(self) -> int:
        return self.train_x.size(1)

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1


@dataclass(frozen=True)
class Sequences:
    """A classification task of recordings of different lengths: (channels, length) float32 each, labels as int64."""

    name: str
    train_x: list[Tensor]
    train_y: Tensor
    test_x: list[Tensor]
    test_y: Tensor

    @property
    def channels(self) -> int:
        return self.train_x[0].size(0)

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1

    @property
    def longest(self) -> int:
        return max(recording.size(1) for recording in (*self.train_x, *self.test_x))


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file, gzipped or plain, into an array of the shape and element type that its header states.

    Raises ValueError when the file is no IDX file, or holds fewer or more bytes than its header promises.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    if len(raw) < 4 or raw[0] != 0 or raw[1] != 0 or raw[2] not in _IDX_TYPES:
        raise ValueError(f"{path} is not an IDX file: it starts with {raw[:4].hex(' ') or 'nothing'}")
    dtype, ndim = _IDX_TYPES[raw[2]], raw[3]
    start = 4 + 4 * ndim
    if len(raw) < start:
        raise ValueError(f"{path} ends inside its header")
    shape = struct.unpack(f">{ndim}I", raw[4:start])
    expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(raw) - start != expected:
        raise ValueError(f"{path} should hold {expected} bytes for shape {shape}, but holds {len(raw) - start}")
    array = np.frombuffer(raw, dtype=dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def _find(root: Path, stem: str) -> Path:
    for name in (stem, stem + ".gz"):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(
        f"no {stem} or {stem}.gz in {root}. On Debian and Ubuntu `apt-get install dataset-fashion-mnist` puts the four "
        f"files into {DEBIAN_ROOT}; with them elsewhere, name the folder with --root."
    )


def load_fashion_mnist(root: Path = DEBIAN_ROOT) -> Dataset:
    """Fashion-MNIST (60,000 + 10,000 images, 784 features, 10 classes) from the four IDX files in ``root``.

    Raises FileNotFoundError when a file is missing, ValueError when one is damaged or images and labels do not match.
    """
    parts: list[Tensor] = []
    for split in ("train", "t10k"):
        images = read_idx(_find(root, f"{split}-images-idx3-ubyte"))
        labels = read_idx(_find(root, f"{split}-labels-idx1-ubyte"))
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(f"{root}: {split} images {images.shape} and labels {labels.shape} do not belong together")
        parts.append(torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255))
        parts.append(torch.from_numpy(labels.astype(np.int64)))
    return Dataset("fashion-mnist", *parts)


def load_digits() -> Dataset:
    """scikit-learn's digits: 1,797 images, 64 features, 10 classes; a fixed, stratified fifth is the test set."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    x, y = sklearn_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
    images = [torch.from_numpy(part.astype(np.float32) / 16) for part in (x_train, x_test)]
    labels = [torch.from_numpy(part.astype(np.int64)) for part in (y_train, y_test)]
    return Dataset("digits", images[0], labels[0], images[1], labels[1])


def load_japanese_vowels() -> Sequences:
    """JapaneseVowels: nine speakers say the same two vowels; 12 cepstral coefficients for each of 7 to 29 steps.

    270 recordings to train with and 370 to test, as its authors divided them (Kudo, Toyama and Shimbo 1999).
    """
    from aeon.datasets import load_japanese_vowels as aeon_japanese_vowels

    parts: list[Any] = []
    for split in ("train", "test"):
        recordings, speakers = aeon_japanese_vowels(split=split)
        parts.append([torch.from_numpy(recording.astype(np.float32)) for recording in recordings])
        parts.append(torch.from_numpy(speakers.astype(np.int64) - 1))
    return Sequences("JapaneseVowels", *parts)


def load(name: str, root: Path | None = None) -> Dataset:
    """Load a data set by name, one of ``NAMES``; ``root`` is the folder of the Fashion-MNIST files."""
    if name == "digits":
        return load_digits()
    if name == "fashion-mnist":
        return load_fashion_mnist(root or DEBIAN_ROOT)
    raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(NAMES)}")
