"""Files that appear whole or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path


def write_together(contents: Mapping[Path, str | bytes]) -> None:
    """Write all files beside their places, then move them in: an interrupt leaves the old ones.

    Raises:
        OSError: where a place cannot be written to; nothing is changed then.
    """
    drafts = {path: _draft_of(path) for path in contents}
    try:
        for path, content in contents.items():
            drafts[path].write_bytes(content.encode() if isinstance(content, str) else content)
        for path, draft in drafts.items():
            os.replace(draft, path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def _draft_of(path: Path) -> Path:
    """A name in the same folder, so that the move is atomic, and of this process alone."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
