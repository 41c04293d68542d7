"""``pushforward explain``: the plan, without running it."""

import argparse
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pushforward.derivatives import plan
from pushforward.errors import InputError, PushforwardError
from pushforward.report.fitting import evaluating
from pushforward.report.models import load_model

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
    """Print the plan for MODEL at inputs like ``--input``."""
    examples = [example(spec, options.seed) for spec in options.input]
    model = load_model(
        options.model,
        weights=options.weights,
        trust_code=options.trust_code,
        seed=options.seed,
    ).module
    with evaluating(model):
        print(_planned(model, examples, options.input))
    return 0


def _planned(model: nn.Module, examples: Sequence[Tensor], specs: Sequence[str]) -> str:
    try:
        return str(plan(model, *examples))
    except PushforwardError:
        raise
    except Exception as error:  # the user's forward may raise anything
        raise InputError(
            f"the model does not take --input {', '.join(specs)}: {type(error).__name__}: {error}"
        ) from error


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
