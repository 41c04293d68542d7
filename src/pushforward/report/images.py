"""Folders of images as tensors, and tensors as pictures in a page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushforward.errors import LoadError
from pushforward.report.optional import require

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
COMMON_SIDE = 224  # what most image models expect, and what unequal images are brought to
SHOWN_SIDE = 160  # the largest side of a picture in a page, in pixels


@dataclass(frozen=True)
class Listing:
    """The images of a folder; ``labels`` are places in ``classes``, its sub-folders' names."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...] | None


def list_folder(folder: Path) -> Listing:
    """The images in ``folder``, or those in its sub-folders, which are classes then.

    Raises:
        LoadError: where there is no image.
    """
    flat = _images_in(folder)
    if flat:
        return Listing(tuple(flat), (0,) * len(flat), None)
    groups = {path.name: _images_in(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    classes = tuple(name for name, files in groups.items() if files)
    if not classes:
        raise LoadError(
            f"{folder} must hold images ({', '.join(SUFFIXES)}) or one sub-folder of them for each "
            "class; it holds none"
        )
    pairs = [(file, label) for label, name in enumerate(classes) for file in groups[name]]
    return Listing(tuple(file for file, _ in pairs), tuple(label for _, label in pairs), classes)


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def read(files: Sequence[Path]) -> tuple[Tensor, str]:
    """The images as (B, C, H, W) in [0, 1], and a sentence on what was done to them."""
    pictures = [_open(file) for file in files]
    for file, picture in zip(files, pictures, strict=True):
        _expect_eight_bits(file, picture.mode)
    mode = "L" if all(picture.mode in {"1", "L"} for picture in pictures) else "RGB"
    note = f"images were read as {'grey' if mode == 'L' else 'RGB'} in [0, 1], not normalised"
    if len({picture.size for picture in pictures}) > 1:
        pictures = [_square(picture) for picture in pictures]
        note += f", and cut to {COMMON_SIDE} x {COMMON_SIDE} since their sizes differ"
    return torch.stack([_pixels(picture.convert(mode)) for picture in pictures]), note


def _open(file: Path) -> Any:
    image = require("PIL.Image")
    try:
        with image.open(file) as picture:
            picture.load()
            return picture
    except Exception as error:  # every image format has errors of its own
        raise LoadError(f"{file} cannot be read as an image: {error}") from error


def _expect_eight_bits(file: Path, mode: str) -> None:
    if mode.startswith(("I", "F")):
        raise LoadError(
            f"{file} must be an image of 8 bits a channel, got mode {mode}; convert it, or give "
            "the pixels as floats in an .npz"
        )


def _square(picture: Any) -> Any:
    """The middle square, scaled to the common side."""
    return require("PIL.ImageOps").fit(picture.convert("RGB"), (COMMON_SIDE, COMMON_SIDE))


def _pixels(picture: Any) -> Tensor:
    array = np.array(picture, dtype=np.float32) / 255
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous()


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(C, H, W) where ``shape`` looks like a grey or colour picture, else None."""
    if len(shape) == 3 and shape[0] in {1, 3} and min(shape[1:]) >= 4:
        return shape[0], shape[1], shape[2]
    return None


def picture_uri(image: Tensor) -> str:
    """A (C, H, W) tensor as a PNG in a ``data:`` address, stretched to its own range."""
    image = image.double()
    low, high = image.amin(), image.amax()
    scaled = (image - low) / (high - low) if high > low else torch.zeros_like(image)
    return _uri((scaled.permute(1, 2, 0) * 255).round().byte().cpu().numpy())


def heat_uri(heat: Tensor) -> str:
    """An (H, W) tensor of nonnegative numbers as a PNG in a ``data:`` address, dark is low."""
    scaled = heat / heat.amax().clamp_min(torch.finfo(heat.dtype).tiny)
    colours = require("matplotlib").colormaps["inferno"](scaled.cpu().numpy())
    return _uri((colours[..., :3] * 255).round().astype(np.uint8))


def _uri(array: np.ndarray) -> str:
    image = require("PIL.Image").fromarray(array.squeeze())
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
