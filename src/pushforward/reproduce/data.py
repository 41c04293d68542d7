"""Real images, split into those that networks are trained on and those that they are tested on."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushforward.errors import LoadError
from pushforward.report.data import HELD_OUT, digits, load_data

FORMS = (
    "digits, mnist5k, or 'mnist PATH' with an .npz (x_train, y_train, x_test, y_test) or a folder "
    "with the four idx files of MNIST"
)
CLASSES = 10


@dataclass(frozen=True)
class Images:
    """Pixels (N, 1, H, W) in [0, 1], float32, and classes (N,) from 0 to 9."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def pixels(self) -> int:
        """How many numbers one image has."""
        return self.train_x[0].numel()

    def first(self, train: int, test: int | None = None) -> Images:
        """The first ``train`` and ``test`` images, all of them where there are fewer."""
        return Images(
            self.name,
            self.train_x[:train],
            self.train_y[:train],
            self.test_x[:test],
            self.test_y[:test],
        )


def load_images(spec: str) -> Images:
    """The images that ``spec`` names: ``digits``, ``mnist5k``, or a path to the whole of MNIST.

    Raises:
        LoadError: where there are no such images, or they cannot be read.
        MissingDependencyError: where the package that brings them is not installed.
    """
    if spec in _BUILT_IN:
        return _BUILT_IN[spec]()
    path = Path(spec)
    if path.is_dir():
        return _split_of(spec, _read(_idx_arrays, path))
    if not path.is_file():
        raise LoadError(f"there is no file {spec}; --data must be {FORMS}")
    if path.suffix.lower() == ".npz":
        return _split_of(spec, _read(_npz_arrays, path))
    if "idx" in path.name:
        return _split_of(spec, _read(_idx_arrays, path.parent))
    raise LoadError(f"--data must be {FORMS}; got {spec}")


# --- built in -----------------------------------------------------------------------------------


def _digits() -> Images:
    x, y = digits()
    return held_out("digits", x, y)


def _mnist5k() -> Images:
    data = load_data("mnist5k")
    assert data.y is not None
    return held_out("mnist5k", data.x, data.y)


_BUILT_IN: Mapping[str, Callable[[], Images]] = {"digits": _digits, "mnist5k": _mnist5k}


def held_out(name: str, x: Tensor, y: Tensor) -> Images:
    """Every fifth image for tests; all in an order that mixes the classes and never changes."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test = torch.arange(len(x)) % HELD_OUT == HELD_OUT - 1
    rest, kept = order[~test[order]], order[test[order]]
    return Images(name, x[rest], y[rest], x[kept], y[kept])


# --- files --------------------------------------------------------------------------------------

_PARTS = ("x_train", "y_train", "x_test", "y_test")
_IDX_NAMES = {
    "x_train": "train-images",
    "y_train": "train-labels",
    "x_test": "t10k-images",
    "y_test": "t10k-labels",
}
Arrays = Mapping[str, Any]


def _read(reader: Callable[[Path], Arrays], path: Path) -> Arrays:
    try:
        return reader(path)
    except LoadError:
        raise
    except Exception as error:  # damaged files raise errors of many kinds
        raise LoadError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _npz_arrays(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as archive:
        missing = [name for name in _PARTS if name not in archive.files]
        if missing:
            raise LoadError(
                f"{path} must hold {', '.join(_PARTS)}; it holds "
                f"{', '.join(sorted(archive.files)) or 'nothing'}"
            )
        return {name: archive[name] for name in _PARTS}


def _idx_arrays(folder: Path) -> Arrays:
    return {part: _idx(_idx_file(folder, stem)) for part, stem in _IDX_NAMES.items()}


def _idx_file(folder: Path, stem: str) -> Path:
    """The file whose name begins with ``stem``, with ``-idx`` or ``.idx``, packed or not."""
    found = sorted(path for path in folder.glob(f"{stem}*idx*") if path.is_file())
    if not found:
        raise LoadError(
            f"{folder} must hold the four files of MNIST ({', '.join(_IDX_NAMES.values())}, each "
            f"with -idx?-ubyte and perhaps .gz); {stem} is missing"
        )
    return found[0]


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in the idx format: two zeros, type 8, rank, sizes, then the bytes."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    zeros, kind, rank = struct.unpack(">HBB", content[:4])
    if zeros != 0 or kind != 8:
        raise LoadError(f"{path} must be an idx file of unsigned bytes; it begins otherwise")
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _split_of(name: str, arrays: Arrays) -> Images:
    return Images(
        name,
        _pixels(name, arrays["x_train"]),
        _classes(name, arrays["y_train"], len(arrays["x_train"])),
        _pixels(name, arrays["x_test"]),
        _classes(name, arrays["y_test"], len(arrays["x_test"])),
    )


def _pixels(name: str, array: np.ndarray) -> Tensor:
    """Bytes become fractions of 255; floats must be such fractions already."""
    x = torch.from_numpy(np.array(array))
    if x.dim() == 4 and x.shape[-1] == 1:
        x = x.movedim(-1, 1)
    x = x.unsqueeze(1) if x.dim() == 3 else x
    if x.dim() != 4 or x.shape[1] != 1 or len(x) == 0:
        raise LoadError(
            f"the images in {name} must be (samples, height, width), got {tuple(array.shape)}"
        )
    x = x.float() / 255 if not x.is_floating_point() else x.float()
    if not (x.amin() >= 0 and x.amax() <= 1):  # in this form NaN fails too
        raise LoadError(f"the images in {name} must be bytes, or floats from 0 to 1")
    return x


def _classes(name: str, array: np.ndarray, samples: int) -> Tensor:
    y = torch.from_numpy(np.array(array))
    whole = not y.is_floating_point() and y.shape == (samples,)
    if not whole or y.min() < 0 or y.max() >= CLASSES:
        raise LoadError(
            f"the classes in {name} must be {samples} whole numbers from 0 to {CLASSES - 1}, got "
            f"{y.dtype} of shape {tuple(y.shape)}"
        )
    return y.long()
