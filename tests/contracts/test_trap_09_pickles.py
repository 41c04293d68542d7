"""Trap 9: a ``.pt2`` archive is code.

On this build ``torch.export.load`` has no ``weights_only``; inside, it tries the archive's sample
inputs with ``weights_only=True`` and, where that refuses them, loads them with
``weights_only=False``: a pickle in an archive runs. Weights and constants may be pickles there too.
"""

import contextlib
import inspect
import io
import logging
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from pins import pinned
from torch import nn

from pushforward.errors import LoadError
from pushforward.report.models import load_model

REVISIT = "the refusal of pickles in pushforward.report.models"


class Payload:
    """Unpickling it makes a folder: a harmless stand-in for anything else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return (Path.mkdir, (self.folder,))


def archive_with(payload: object, path: Path) -> Path:
    """An exported program whose sample inputs are replaced by a pickle of ``payload``."""
    exported = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    honest = io.BytesIO()
    torch.export.save(exported, honest)
    with zipfile.ZipFile(honest) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            pickled = name.endswith("sample_inputs/model.pt")
            new.writestr(name, _saved(payload) if pickled else old.read(name))
    return path


def _saved(payload: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


@pytest.fixture
def quiet_export():
    """torch reports the failure that follows by its loggers."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet_export")
def test_loading_an_archive_runs_what_it_holds(tmp_path: Path):
    trace = tmp_path / "ran"
    archive = archive_with(Payload(trace), tmp_path / "model.pt2")
    assert not trace.exists()
    with contextlib.suppress(Exception):  # it fails later on, on inputs that are no inputs
        torch.export.load(archive)
    pinned(trace.exists(), "running pickles in torch.export.load", REVISIT)
    named = inspect.signature(torch.export.load).parameters
    pinned("weights_only" not in named, "offering no weights_only in torch.export.load", REVISIT)


def test_plain_weights_refuse_code(tmp_path: Path):
    trace, path = tmp_path / "ran", tmp_path / "model.pt"
    torch.save(Payload(trace), path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(path)
    assert not trace.exists()
    try:
        torch.load(path, weights_only=False)
    finally:
        pinned(trace.exists(), "running pickles in torch.load(weights_only=False)", REVISIT)


@pytest.mark.parametrize("name", ["model.pt2", "model.pt", "model.pth", "model.pkl", "MODEL.PT2"])
def test_the_library_refuses_pickles_unread(name: str, tmp_path: Path):
    trace = tmp_path / "ran"
    path = tmp_path / name
    if path.suffix.lower() == ".pt2":
        archive_with(Payload(trace), path)
    else:
        path.write_bytes(_saved(Payload(trace)))
    with pytest.raises(LoadError, match="is refused"):
        load_model(str(path))
    assert not trace.exists()


def test_the_library_refuses_pickled_weights(tmp_path: Path):
    factory = tmp_path / "net.py"
    factory.write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n")
    trace, weights = tmp_path / "ran", tmp_path / "weights.pt"
    weights.write_bytes(_saved(Payload(trace)))
    with pytest.raises(LoadError, match="is refused"):
        load_model(f"{factory}:make", weights=str(weights))
    assert not trace.exists()
