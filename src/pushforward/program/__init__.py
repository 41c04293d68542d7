"""Flat programs: a computation recorded once, run again without autograd or Python between ops."""

from pushforward.program.flat import Program, Stale, program
from pushforward.program.recorder import CannotRecord, Recorder

__all__ = ["CannotRecord", "Program", "Recorder", "Stale", "program"]
