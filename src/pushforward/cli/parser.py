"""The words of the command line."""

import argparse
import math
import re
import sys
from collections.abc import Sequence

from pushforward import __version__
from pushforward.cli.check import complaint, run_check
from pushforward.cli.explain import run_explain
from pushforward.cli.gate import LIMITS
from pushforward.cli.report import run_report
from pushforward.cli.reproduce import run_reproduce
from pushforward.problems import QUANTITIES
from pushforward.report.data import FORMS as DATA_FORMS
from pushforward.report.models import FORMS as MODEL_FORMS
from pushforward.reproduce.data import FORMS as IMAGE_FORMS
from pushforward.reproduce.papers import PAPERS

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, among them ``run``, the function to call with them.

    Raises:
        SystemExit: with status 2 where the words make no sense, 0 after ``--help``.
    """
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(_without_mnist(words))
    if options.run is run_check and (wrong := complaint(options)) is not None:
        options.refuse(wrong)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pushforward",
        description="What the Jacobian says about a model.",
        epilog="Exit status: 0 done, 1 a gate failed, 2 usage, 3 a model or data set that cannot "
        "be loaded, 4 a map that cannot be differentiated, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"pushforward {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    _add_report(commands)
    _add_explain(commands)
    _add_check(commands)
    _add_reproduce(commands)
    return parser


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="measure a model's Jacobian over data and write report.html and report.json",
        description="Measure the Jacobian of a model sample by sample and write DIR/report.html "
        "and DIR/report.json. Without arguments a small residual net is trained on scikit-learn's "
        "digits, kept in the user's cache, and measured on digits that it has not seen.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_FORMS)
    _add_model_options(parser)
    parser.add_argument("--data", metavar="DATA", help=DATA_FORMS)
    parser.add_argument("--out", metavar="DIR", default=".", help="folder to write to (default: .)")
    _add_sampling_options(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the JSON on standard output, not the table"
    )
    parser.set_defaults(run=run_report)


def _add_explain(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "explain",
        help="print how the Jacobian of a model would be computed, without computing it",
        description="Print the plan for the Jacobian of a model at inputs of a given shape.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_FORMS)
    _add_model_options(parser)
    parser.add_argument(
        "--input",
        metavar="SPEC",
        action="append",
        required=True,
        help="dtype and shape of an input, such as 'f32[1,3,32,32]' (repeat for several; the "
        "first one of floating-point or complex numbers is differentiated)",
    )
    parser.add_argument(
        "--batch", action="store_true", help="dimension 0 is a batch of independent samples"
    )
    parser.add_argument(
        "--quantity",
        choices=QUANTITIES,
        default="jacobian",
        help="what to plan (default: jacobian)",
    )
    parser.add_argument("--save", metavar="FILE", help="write the plan, for pf.load_plan")
    parser.add_argument(
        "--json", action="store_true", help="print one object of JSON, not the table"
    )
    parser.set_defaults(run=run_explain)


def _add_reproduce(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "reproduce",
        help="measure papers' headline results beside the published ones",
        description="Train small networks on real images as a paper does, and measure what it "
        "claims. Writes DIR/PAPER.html for each paper: its figures, and a table of claims with the "
        "published figure, the measured one, and whether the claim holds.",
    )
    parser.add_argument(
        "papers",
        nargs="*",
        metavar="PAPER",
        help=f"{', '.join(PAPERS)} (default: all)",
    )
    parser.add_argument(
        "--data", metavar="DATA", help=f"{IMAGE_FORMS} (default: what suits the paper)"
    )
    parser.add_argument(
        "--seeds", metavar="N", type=positive, help="repetitions (default: the paper's, mostly 3)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few steps of training, to see that it runs; claims may fail then",
    )
    parser.add_argument("--out", metavar="DIR", default=".", help="folder to write to (default: .)")
    parser.add_argument(
        "--json", action="store_true", help="print one object of JSON, not the tables"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run_reproduce)


def _without_mnist(words: Sequence[str]) -> list[str]:
    """``--data mnist PATH`` is ``--data PATH``: the name says what the path holds."""
    kept = list(words)
    if kept[:1] == ["reproduce"]:
        for place in range(len(kept) - 2, 0, -1):
            if kept[place - 1 : place + 1] == ["--data", "mnist"] and kept[place + 1][:1] != "-":
                del kept[place]
    return kept


def _add_check(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "check",
        help="a gate: compare a model's Jacobian with limits",
        description="Measure the Jacobian of a model sample by sample and compare it with limits, "
        "each on the worst sample. At least one limit is needed.",
        epilog="Exit status: 0 all limits hold, 1 one of them does not, 2 usage, 3 a model or data "
        "set that cannot be loaded, 4 a map that cannot be differentiated.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_FORMS)
    for limit in LIMITS:
        parser.add_argument(f"--{limit.name}", metavar="X", type=bound, help=limit.meaning)
    _add_model_options(parser)
    parser.add_argument("--data", metavar="DATA", help=DATA_FORMS)
    parser.add_argument(
        "--input",
        metavar="SPEC",
        help="in place of data: dtype and shape of a batch of standard normal numbers, such as "
        "'f32[16,3,32,32]' (without either: what a first linear layer takes)",
    )
    _add_sampling_options(parser)
    parser.add_argument("--junit", metavar="FILE", help="write JUnit XML, a test case per limit")
    parser.add_argument("--json", action="store_true", help="print one object of JSON")
    parser.set_defaults(run=run_check, refuse=parser.error)


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layers",
        metavar="GLOB",
        action="append",
        help="modules to take as single steps, such as 'layer*' (default: every leaf; repeatable)",
    )
    parser.add_argument(
        "--samples", metavar="N", type=positive, default=64, help="samples to take (default: 64)"
    )
    parser.add_argument(
        "--memory", metavar="BYTES", type=byte_count, help="budget, such as 500M or 2GiB"
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", metavar="FILE", help=".safetensors to put into the model")
    parser.add_argument(
        "--trust-code", action="store_true", help="load pickles (.pt, .pt2), which can run code"
    )
    parser.add_argument(
        "--seed", metavar="S", type=natural, default=0, help="of all random draws (default: 0)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


# --- types of values ----------------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number of at least 0, small enough for a seed."""
    return _whole(text, 0)


def bound(text: str) -> float:
    """A limit: a finite number over 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number over 0, got {text!r}")
    return value


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"\d{1,18}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
    return int(text)


def byte_count(text: str) -> int:
    """Bytes: ``500000``, ``500M`` and ``2GiB`` in powers of 1024, ``2GB`` in powers of 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected bytes such as 500M or 2GiB, got {text!r}")
    number, unit, suffix = match.groups()
    scale = _UNITS[unit.upper()]
    if (suffix or "").upper() == "B":
        scale = 1000 ** list(_UNITS).index(unit.upper())
    return _at_least_one(int(float(number) * scale), text)


def _at_least_one(count: int, text: str) -> int:
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected at least one byte, got {text!r}")
    return count
