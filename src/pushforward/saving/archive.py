"""Files of plain arrays with a header in JSON: what is none, damaged or too new is refused."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pushforward.errors import LoadError

FORMAT, VERSION = "pushforward plan", 1

Arrays = dict[str, np.ndarray]
Header = dict[str, Any]

_UNREADABLE = (ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error)


def write(path: str | os.PathLike[str], header: Header, arrays: Arrays) -> None:
    """Write arrays and a header as one file."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **header}, default=_plain)
    with open(path, "wb") as file:
        parts: dict[str, Any] = {"header": np.frombuffer(text.encode(), np.uint8), **arrays}
        np.savez_compressed(file, **parts)


def _plain(value: Any) -> Any:
    """A number of numpy as one of Python."""
    return value.item()


def arrays_of(path: str | os.PathLike[str]) -> Arrays:
    """All arrays of a file."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        if not Path(path).exists():
            raise LoadError(
                f"expected a plan at {path}, but there is no such file; write one with plan.save"
            ) from error
        raise _foreign(path, error) from error
    except _UNREADABLE as error:
        raise _foreign(path, error) from error


def checked_header(arrays: Arrays, path: str | os.PathLike[str]) -> Header:
    """The header of a file, of this version or an earlier one."""
    try:
        header = json.loads(arrays["header"].tobytes().decode())
        kind, version = header["format"], header["version"]
    except (KeyError, ValueError, TypeError) as error:
        raise _foreign(path, error) from error
    if kind != FORMAT:
        raise _foreign(path, ValueError(f"it is a {kind!r}"))
    if not isinstance(version, int) or version > VERSION:
        raise LoadError(
            f"expected a plan of version {VERSION} at {path}, got version {version}; upgrade "
            "pushforward, or make the plan again with pf.plan"
        )
    return header


def _foreign(path: str | os.PathLike[str], error: Exception) -> LoadError:
    why = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
    return LoadError(
        f"expected a file written by plan.save at {path}, got something else, or a part of one "
        f"({why}); make the plan again with pf.plan"
    )


def damaged(path: str | os.PathLike[str], why: str) -> LoadError:
    """The error for a file whose parts do not fit together."""
    return LoadError(
        f"expected a whole plan at {path}, got one that does not fit together ({why}); make the "
        "plan again with pf.plan"
    )
