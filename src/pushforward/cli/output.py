"""Where results are written."""

from pathlib import Path

from pushforward.errors import InputError


def output_folder(out: str) -> Path:
    """The folder to write to, made if need be, before anything is computed for it."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".pushforward-trial"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise InputError(f"--out must be a folder to write to, got {out}: {error}") from error
    return folder
