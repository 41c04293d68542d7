"""The command ``pushforward``."""

from pushforward.cli.main import main

__all__ = ["main"]
