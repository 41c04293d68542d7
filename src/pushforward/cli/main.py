"""The way from a command line to an exit status.

0    done
1    a gate failed
2    usage
3    a model or a data set that cannot be loaded
4    a map that cannot be differentiated
70   a defect of this program
130  interrupted
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from pushforward.cli.parser import parse
from pushforward.errors import (
    InputError,
    LoadError,
    MemoryBudgetError,
    MissingDependencyError,
    NotAvailableError,
    PushforwardError,
)

DONE, USAGE, NOT_LOADED, NOT_DIFFERENTIABLE, DEFECT, INTERRUPTED = 0, 2, 3, 4, 70, 130
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (LoadError, NOT_LOADED),
    (MissingDependencyError, NOT_LOADED),
    (InputError, USAGE),
    (MemoryBudgetError, USAGE),
    (NotAvailableError, USAGE),
    (OSError, USAGE),  # --out names a place that cannot be written to
    (PushforwardError, NOT_DIFFERENTIABLE),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``pushforward`` with ``arguments``, by default those of the process; the exit status."""
    try:
        options = parse(arguments)
    except SystemExit as leaving:  # argparse has said what is wrong, or printed the help
        return leaving.code if isinstance(leaving.code, int) else USAGE
    try:
        status = options.run(options)
        sys.stdout.flush()  # here, where a reader who has left is understood
        return status
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:
        return _quietly_closed()
    except Exception as error:
        return _failed(error, options)


def _failed(error: Exception, options: argparse.Namespace) -> int:
    if options.debug:
        traceback.print_exc()
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return _say(str(error), status)
    return _say(
        f"unexpected {type(error).__name__}: {error}. This is a defect of pushforward; please "
        "report it with what --debug prints",
        DEFECT,
    )


def _say(message: str, status: int) -> int:
    print(f"pushforward: {' '.join(message.split())}", file=sys.stderr)
    return status


def _quietly_closed() -> int:
    """Whoever read standard output has left; keep Python from complaining when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return DONE
