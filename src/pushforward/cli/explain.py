"""``pushforward explain``: the plan, without running it."""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pushforward.derivatives import plan
from pushforward.errors import InputError, PushforwardError
from pushforward.explaining import facts
from pushforward.plans import Plan
from pushforward.report.fitting import evaluating
from pushforward.report.models import load_model

# Beyond this many rows or columns a dot of the picture stands for too much.
_SHOWN = 2000
_DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
    "c64": torch.complex64,
    "c128": torch.complex128,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
    "bool": torch.bool,
}


def run_explain(options: argparse.Namespace) -> int:
    """Print the plan for MODEL at inputs like ``--input``, as text or as one object of JSON."""
    if options.save is not None:
        _check_writable(Path(options.save))
    examples = [example(spec, options.seed + place) for place, spec in enumerate(options.input)]
    # What the user's code prints must not end up between the lines of the plan.
    with contextlib.redirect_stdout(sys.stderr):
        model = load_model(
            options.model,
            weights=options.weights,
            trust_code=options.trust_code,
            seed=options.seed,
        ).module
        with evaluating(model):
            found = _planned(model, examples, options)
            told = json.dumps(facts(found), indent=2) if options.json else _told(found)
            if options.save is not None:
                found.save(options.save)
    encoding = sys.stdout.encoding or "utf-8"
    print(told.encode(encoding, "replace").decode(encoding))
    return 0


def _planned(model: nn.Module, examples: Sequence[Tensor], options: argparse.Namespace) -> Plan:
    """The plan; with respect to the first input that can be differentiated."""
    real = [x.is_floating_point() or x.is_complex() for x in examples]
    if not any(real):
        raise InputError(
            f"--input expects an input of floating-point or complex numbers among others, got "
            f"{', '.join(options.input)}; there is nothing to differentiate with respect to"
        )
    try:
        return plan(
            model,
            *examples,
            argnums=real.index(True),
            batch_dim=0 if options.batch else None,
            quantity=options.quantity,
        )
    except PushforwardError:
        raise
    except Exception as error:  # the user's forward may raise anything
        raise InputError(
            f"the model does not take --input {', '.join(options.input)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_writable(path: Path) -> None:
    """Say before the work, and not after it, that a file has no folder to lie in."""
    if not path.parent.is_dir():
        raise InputError(f"--save expects a file in a folder that is there, got {path}")


def _told(found: Plan) -> str:
    """The plan, and a picture of its pattern where that shows anything."""
    pattern = found.pattern
    if pattern is None or pattern.density in (0, 1) or max(pattern.shape) > _SHOWN:
        return str(found)
    return f"{found}\n\n{pattern}"


def example(spec: str, seed: int = 0) -> Tensor:
    """A tensor of the dtype and shape that ``spec`` names: normal numbers, or zeros if not real.

    Raises:
        InputError: where ``spec`` is not like ``f32[1,3,32,32]``.
    """
    match = re.fullmatch(r"(\w+)\[\s*((?:\d+\s*,\s*)*(?:\d+)?)\s*\]", spec.strip())
    if match is None or match[1] not in _DTYPES:
        raise InputError(
            "--input must be a dtype and a shape such as f32[1,3,32,32], with a dtype of "
            f"{', '.join(_DTYPES)}; got {spec!r}"
        )
    dtype = _DTYPES[match[1]]
    shape = [int(size) for size in match[2].split(",") if size.strip()]
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
