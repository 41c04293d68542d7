"""Plan models of torchvision, timm and transformers, verify them, and write a page about it.

    python benchmarks/zoo.py [--only NAME] [--write]

Models are small, in double precision and evaluation mode, and have random weights. For each, the
entries that its plan gives are multiplied by a random vector at the point of planning and at
another one, and compared with a backward pass by ``torch.autograd.grad``. ``--write`` puts the
table into ``docs/reference/models.md``; without it, it is printed. What is to be installed:
``pip install torchvision timm transformers``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import libraries
import numpy as np
import torch
from libraries import Model
from torch import Tensor, nn

import pushforward as pf

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "models.md"
LIBRARIES = ("torch", "torchvision", "timm", "transformers")
HEADER = (
    *("model", "m x n", "plan", "passes", "density", "nonzero", "program"),
    *("taken as dense", "planned in", "agrees to"),
)
# Everything from this line of the page on is written by this script.
MARK = "Written by "
SOURCE = MARK + "`python benchmarks/zoo.py --write` with {versions}.\n"
# Products agree to one of these, relative to the largest entry, or the model has failed.
AGREEMENTS = (1e-12, 1e-9, 1e-6)

Function = Callable[[Tensor], Tensor]


class Disagreement(Exception):
    """A plan and torch say different things."""


@dataclass(frozen=True)
class Finding:
    """What the plan of a model says, and how well it agrees; or why there is none.

    ``nonzero`` is the share of the pattern that is not zero at both points, and ``reach`` what was
    found of a causal model.
    """

    model: Model
    plan: pf.Plan | None = None
    seconds: float = 0.0
    nonzero: float = 0.0
    error: float = 0.0
    reach: str = ""
    failure: str = ""


def study(model: Model) -> Finding:
    """Plan a model and verify the plan."""
    torch.manual_seed(0)
    try:
        return _studied(model)
    except Exception as failure:  # whatever a model raises is what the page says of it
        reason = str(failure).strip().splitlines() or [""]
        return Finding(model, failure=f"{type(failure).__name__}: {reason[0][:150]}")


def _studied(model: Model) -> Finding:
    made, point = model.make()
    f = libraries.randomised(made).eval().double() if isinstance(made, nn.Module) else made
    points = [point.double(), torch.randn_like(point, dtype=torch.float64)]
    start = time.perf_counter()
    plan = pf.plan(f, points[0])
    seconds = time.perf_counter() - start
    matrices = [plan(x).matrix().detach() for x in points]
    error = max(distance(f, x, matrix) for x, matrix in zip(points, matrices, strict=True))
    if error > AGREEMENTS[-1]:
        raise Disagreement(f"products differ by {error:.0e} from a backward pass")
    met = np.logical_or.reduce([(matrix != 0).numpy() for matrix in matrices])
    nonzero = covered(plan, met)
    reach = causality(plan, f(points[0]), points[0]) if model.causal else ""
    return Finding(model, plan, seconds, nonzero, error, reach)


def distance(f: Function, x: Tensor, matrix: Tensor) -> float:
    """How far u^T J is from what a backward pass gives, relative to its largest entry."""
    x = x.clone().requires_grad_()
    out = f(x)
    u = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, x, u)
    found = u.flatten() @ matrix
    return float((found - expected.flatten()).abs().max() / expected.abs().max())


def covered(plan: pf.Plan, met: np.ndarray) -> float:
    """The share of the pattern that was met; nothing else may be."""
    if plan.pattern is None:
        return 1.0
    allowed = plan.pattern.todense()
    if (met & ~allowed).any():
        raise Disagreement(f"the pattern misses {(met & ~allowed).sum()} entries")
    return float(met.sum() / max(1, allowed.sum()))


def causality(plan: pf.Plan, out: Tensor, x: Tensor) -> str:
    """Whether each position sees itself and earlier ones only, as the pattern has it."""
    if plan.pattern is None:
        return ""
    blocks = plan.pattern.todense().reshape(out.shape[1], -1, x.shape[1], x.shape[2])
    seen = blocks.any(axis=(1, 3))
    if np.triu(seen, 1).any():
        raise Disagreement("the pattern has positions that see later ones")
    window = int(seen.sum(1).max())
    return "causal" if window == len(seen) else f"causal, {window} positions"


def size(finding: Finding) -> str:
    assert finding.plan is not None
    return f"{finding.plan.codomain.size} x {finding.plan.domain.size}"


def density(finding: Finding) -> str:
    """The density of the pattern, or why there is none."""
    assert finding.plan is not None
    structure = finding.plan.recipe.structure
    if structure.pattern is None:
        return f"none: {structure.note}"
    reach = f", {finding.reach}" if finding.reach else ""
    return f"{100 * structure.pattern.density:.3g}%{reach}"


def nonzero(finding: Finding) -> str:
    assert finding.plan is not None
    share = 1000 * finding.nonzero
    return "–" if finding.plan.pattern is None else f"{int(share) / 10:.4g}%"


def program(finding: Finding) -> str:
    assert finding.plan is not None
    return "–" if finding.plan.length is None else f"{finding.plan.length} ops"


def dense_ops(finding: Finding) -> str:
    assert finding.plan is not None
    return ", ".join(f"`{op}`" for op, _ in finding.plan.recipe.structure.dense_ops)


def seconds(finding: Finding) -> str:
    return f"{finding.seconds:.0f} s" if finding.seconds >= 1 else "< 1 s"


def agreement(finding: Finding) -> str:
    return f"{next(bound for bound in AGREEMENTS if finding.error <= bound):.0e}"


def cells(finding: Finding) -> tuple[str, ...]:
    """One line of the table."""
    assert finding.plan is not None
    plan, name = finding.plan, f"`{finding.model.name}`"
    said = (size(finding), plan.strategy, str(plan.passes), density(finding), nonzero(finding))
    made = (program(finding), dense_ops(finding), seconds(finding), agreement(finding))
    return (name, *said, *made)


def line(parts: Iterable[str]) -> str:
    return f"| {' | '.join(parts)} |"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(map(line, [header, ["---"] * len(header), *rows]))


def sections(findings: Sequence[Finding]) -> Iterator[str]:
    """A heading and a table for each library, then what failed."""
    for library in LIBRARIES[1:]:
        found = [each for each in findings if each.model.library == library and each.plan]
        if found:
            yield f"## {library}\n\n{table(HEADER, map(cells, found))}\n"
    failed = [
        (each.model.library, f"`{each.model.name}`", each.failure)
        for each in findings
        if each.failure
    ]
    if failed:
        yield f"## What fails\n\n{table(('library', 'model', 'why'), failed)}\n"


def source() -> str:
    versions = [f"{each} {version(each).split('+')[0]}" for each in LIBRARIES]
    return SOURCE.format(versions=", ".join(versions))


def write(findings: Sequence[Finding]) -> None:
    """Put the tables below what is written by hand."""
    old = PAGE.read_text(encoding="utf-8")
    parts = [source(), *sections(findings)]
    PAGE.write_text(old[: old.index(MARK)] + "\n".join(parts), encoding="utf-8")


def chosen(only: str | None) -> list[Model]:
    everything = libraries.everything()
    return [m for m in everything if not only or only.lower() in f"{m.library} {m.name}".lower()]


def studied(models: Iterable[Model]) -> Iterator[Finding]:
    """Each in turn, said as soon as it is found."""
    for model in models:
        finding = study(model)
        said = f"{model.name}: {finding.failure}" if finding.failure else line(cells(finding))
        print(said, flush=True)
        yield finding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="models with this in their names")
    parser.add_argument("--write", action="store_true", help="write the page")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write expects all models, so that the page is whole; leave out --only")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what the libraries say of their own options
    libraries.library("transformers").logging.set_verbosity_error()
    pf.plan(nn.Linear(2, 2), torch.zeros(2))  # what is loaded once is not counted
    findings = list(studied(chosen(options.only)))
    if options.write:
        write(findings)


if __name__ == "__main__":
    main()
