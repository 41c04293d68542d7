"""The planned evaluation: entries of a Jacobian as a flat program, and their graph on demand.

A program computes values and nothing else. Where somebody wants gradients of them, the values hang
on one node of autograd's graph, whose backward pass makes the tape of the same entries and goes
through that: evaluations run at full speed, and training differentiates what autograd itself knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pushforward.program import Program, Stale

Maker = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A program, and the tensors that it reads at each run.

    Attributes:
        program: from the real inputs, and the other tensors among the arguments, to the entries.
        trained: holds something once a backward pass has asked for the graph: whoever trains gets
            the tape at once from then on, and not the values first and the tape afterwards.
    """

    program: Program
    trained: list[bool] = field(default_factory=list)

    def versions(self) -> tuple[tuple[int, int], ...]:
        """How often each tensor from outside was written to, and where it lies; () if one went."""
        if not self.program.externals:
            return ()
        try:
            found = self.program.outside()
        except Stale:
            return ()
        return tuple([(0 if t.is_inference() else t._version, t.data_ptr()) for t in found])

    def values(
        self, inputs: Sequence[Tensor], others: Sequence[Tensor], make: Maker
    ) -> tuple[Tensor, ...]:
        """The entries at a point; ``make`` gives the same ones with a graph.

        Raises:
            Stale: a value that the program relies on is another one at this point.
        """
        everything = (*inputs, *others, *self.program.outside())
        if not torch.is_grad_enabled():
            return self.program.run(*everything)
        wanted = [tensor for tensor in everything if tensor.requires_grad]
        if wanted and (self.trained or any(_is_computed(tensor) for tensor in wanted)):
            self._compare(everything)
            return tuple(make())
        if wanted:
            return _OnDemand.apply(_Call(self, everything, make), *wanted)
        return self.program.run(*everything)

    def _compare(self, everything: Sequence[Tensor]) -> None:
        """Let the guards look at a point at which the program is not asked for values."""
        if self.program.guards:
            with torch.no_grad():
                self.program.run(*everything)


def _is_computed(tensor: Tensor) -> bool:
    """Whether a tensor has a graph behind it, through which others that are wanted may be reached.

    Gradients on demand would go through that graph a second time. A copy of a leaf has none.
    """
    node = tensor.grad_fn
    while node is not None and node.name() in ("CloneBackward0", "ViewBackward0"):
        node = node.next_functions[0][0]
    return node is not None and node.name() != "torch::autograd::AccumulateGrad"


@dataclass(frozen=True, eq=False)
class _Call:
    evaluation: Evaluation
    arguments: tuple[Tensor, ...]
    make: Maker


class _OnDemand(torch.autograd.Function):
    """Values now, and their graph when a backward pass asks for it."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *wanted: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*wanted)
        ctx.set_materialize_grads(False)
        found = call.evaluation.program.run(*call.arguments)
        return tuple(t.view_as(t) if any(t is w for w in wanted) else t for t in found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.call.evaluation.trained[:] = [True]
        wanted = ctx.saved_tensors  # raises where one of them was changed in place
        with torch.enable_grad():
            made = ctx.call.make()
        pairs = [
            (value, gradient)
            for value, gradient in zip(made, gradients, strict=True)
            if gradient is not None and value.requires_grad
        ]
        if not pairs:
            return (None, *(None for _ in wanted))
        found = torch.autograd.grad(
            [value for value, _ in pairs],
            wanted,
            [gradient for _, gradient in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        return (None, *found)


__all__ = ["Evaluation", "Stale"]
