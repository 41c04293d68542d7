"""Norms of several steps at once, as many as a budget allows, and the best way to combine them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.path.dense import Norms, exact_norms, fits, width
from pushforward.path.pull import Passes
from pushforward.path.steps import Step

# In a network of more steps than that, longer groups are left out.
LONGEST = 200

Groups = dict[tuple[int, int], Norms]


@dataclass(frozen=True)
class _Group:
    """Steps ``first`` up to ``last``, and the passes through single steps that they take."""

    first: int
    last: int
    cost: int


def exact_groups(passes: Passes, steps: Sequence[Step], samples: int, budget: float) -> Groups:
    """Take norms of groups of steps in a fixed order until the passes are spent.

    The order does not depend on the budget, so that a larger one has all groups of a smaller.
    """
    groups: Groups = {}
    spent = 0
    for group in sorted(_all_groups(steps, samples, budget), key=_turn):
        spent += group.cost
        if spent > budget:
            break
        chosen = steps[group.first : group.last]
        groups[group.first, group.last] = exact_norms(passes, chosen, samples)
    return groups


def without_underflow(groups: Groups, singles: Sequence[Norms]) -> Groups:
    """Leave out groups of norm zero whose steps are not zero: the product may have been too small
    for its dtype."""

    def trusted(first: int, last: int, found: Norms) -> bool:
        zeros = [norms.log_spectral == -torch.inf for norms in singles[first:last]]
        explained = torch.stack(zeros).any(dim=0)
        return bool((explained | (found.log_fro > -torch.inf)).all())

    return {span: found for span, found in groups.items() if trusted(*span, found)}


def _turn(group: _Group) -> tuple[int, int, int]:
    """Cheap groups first, then short ones, then those near the input."""
    return group.cost, group.last - group.first, group.first


def _all_groups(steps: Sequence[Step], samples: int, most: float) -> Iterator[_Group]:
    """All groups of two steps or more; none that costs more than ``most`` alone."""
    places = [steps[0].start, *(step.stop for step in steps)]
    widths = [width(place, samples) for place in places]
    for last in range(2, len(steps) + 1):
        longest = int(min(last, LONGEST, most / max(1, widths[last])))
        for length in range(2, longest + 1):
            if fits(widths[last - length], widths[last], samples):
                yield _Group(last - length, last, widths[last] * length)


def log_best_chain(singles: Sequence[Norms], groups: Groups) -> Tensor:
    """The least product of one Frobenius norm and spectral norms over all ways to group the steps.

    Dynamic programming from the input on, with a flag for whether the Frobenius norm has been
    taken: O(number of groups) for each sample.
    """
    table: Groups = {(place, place + 1): norms for place, norms in enumerate(singles)} | groups
    ending: dict[int, list[tuple[int, Norms]]] = {}
    for (first, last), norms in table.items():
        ending.setdefault(last, []).append((first, norms))
    zero = torch.zeros_like(singles[0].log_fro)
    before: dict[int, tuple[Tensor, Tensor]] = {0: (zero, torch.full_like(zero, torch.inf))}
    for last in range(1, len(singles) + 1):
        plain = [before[first][0] + norms.log_spectral for first, norms in ending[last]]
        taken = [
            torch.minimum(_after(before[first][1], norms.log_spectral), before[first][0] + fro)
            for first, norms in ending[last]
            for fro in (norms.log_fro,)
        ]
        before[last] = _least(plain), _least(taken)
    return before[len(singles)][1]


def _after(total: Tensor, log: Tensor) -> Tensor:
    """A sum in which inf stands for what is not there, so that inf - inf is inf."""
    return torch.where(total == torch.inf, torch.inf, total + log)


def _least(logs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(logs)).amin(dim=0)
