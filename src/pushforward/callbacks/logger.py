"""The hook for any training loop."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pushforward.callbacks.gauge import SAMPLES, Gauge, Reading
from pushforward.callbacks.sinks import sink_of
from pushforward.callbacks.wrapped import is_first, is_sharded, of_first, unwrapped
from pushforward.errors import InputError, PushforwardError, ShapeError
from pushforward.path.steps import checked_layers


class GainLogger:
    r"""Logs where a network makes its Jacobian large or small, while it trains.

    Every ``every`` calls the gains of the steps of the network are measured on a few samples of the
    batch (see `pushforward.path_bound`), and the largest are logged as factors,

    .. math::
        \log g_l = \frac{1}{S} \sum_s \log \frac{\|\partial out/\partial h_{l-1}\|_F}
        {\|\partial out/\partial h_l\|_F},

    geometric means over the samples whose Jacobian is not zero; the last step has the norm of its
    own Jacobian. Their product is the norm of the whole map.

    Args:
        model: the network; wrapped by ``torch.compile``, ``DistributedDataParallel`` or
            ``fully_shard`` as it is trained. Its output is ``(B, ...)``, or a pytree of such.
        every: how many calls from one measurement to the next; the first call measures.
        top: how many of the largest gains are logged; None logs all steps.
        bottom: how many of the smallest gains are logged beside them.
        log: a ``SummaryWriter``, a run of Weights & Biases or the module ``wandb``, a
            ``logging.Logger``, anything else with ``log_metrics(values, step)`` or
            ``log(values, step=step)``, or a function of ``(values, step)``. None logs nothing: the
            values are returned.
        layers: names of modules or globs ("layer*"): steps end at their outputs only. None takes
            every leaf.
        samples: how many samples of the batch are measured, the first ones. None takes up to 8: as
            many as keep a measurement below half a training step in operations.
        directions: how many directions at the output are taken. With as many as there are outputs
            gains are exact; with fewer, which are random, squared norms are right on average. None
            takes all of up to 16 outputs, otherwise 8.
        prefix: what names begin with.
        inputs: a function from what the hook is called with to the input tensor of the model. None
            takes a tensor as it is, and the first element of a tuple or list.

    Attributes:
        exact: whether the gains that were measured last are exact; None before the first.
        measurements: how many were made.
        seconds: the time that they took.

    Raises:
        InputError: an argument cannot be worked with.

    Cost: one forward pass over samples times directions, and a backward pass without the gradients
    of parameters. With the defaults and ``every=100`` that is below 1 % of the training time, but
    for networks whose training step takes less than a millisecond.

    Nothing else changes: buffers, gradients, train and eval mode and random state stay as they
    were. The network is measured in evaluation mode, so that batch norm keeps samples apart. Call
    the hook between training steps, not between a forward pass and its backward pass. Under
    ``fully_shard`` all processes must call it, since each holds a part of the parameters; all
    measure the batch of the first one. Under data parallelism the first one alone measures. Only
    the first one logs.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> for layer in (net[0], net[2]):
    ...     _ = nn.init.ones_(layer.weight)
    >>> watch = GainLogger(net, every=100, top=2, log=lambda values, step: print(step, values))
    >>> _ = watch(torch.ones(8, 2))
    0 {'pushforward/gain/0': 2.0, 'pushforward/gain/2': 1.414..., 'pushforward/log_norm': 1.039...}
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        top: int | None = 5,
        log: Any = None,
        *,
        bottom: int = 0,
        layers: str | Sequence[str] | None = None,
        samples: int | None = None,
        directions: int | None = None,
        prefix: str = "pushforward",
        inputs: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(
                f"GainLogger expects an nn.Module, got {type(model).__name__}; its steps are the "
                "calls of its submodules"
            )
        _expect_count("every", every)
        _expect_count("bottom", bottom, least=0)
        for name, count in (("top", top), ("samples", samples), ("directions", directions)):
            if count is not None:
                _expect_count(name, count)
        self.every, self.top, self.bottom, self.prefix = every, top, bottom, prefix
        self._model, self._inputs = unwrapped(model), inputs
        self._layers = checked_layers(self._model, layers)
        self._sink = None if log is None else sink_of(log)
        self._samples, self._directions = samples, directions
        self._gauge: Gauge | None = None
        self._calls = 0
        self._last_step: int | None = None
        self.exact: bool | None = None
        self.measurements = 0
        self.seconds = 0.0

    def __call__(self, batch: Any, step: int | None = None) -> dict[str, float] | None:
        """Measure and log where it is time to.

        Args:
            batch: the input of the model, ``(B, ...)``, or what ``inputs`` takes it from.
            step: the number of the step; None counts the calls, from 0. Several batches of one step
                count once.

        Returns:
            What was logged, by name. None where it was not time to, and on all processes but the
            first.

        Raises:
            InputError: the batch holds no real input tensor.
            CouplingError, DifferentiationError: as `pushforward.path_bound`, at the first
                measurement. Later ones are warnings: training goes on.
        """
        step = self._calls if step is None else step
        self._calls += 1
        due = step % self.every == 0 and step != self._last_step
        return self.measure(batch, step) if due else None

    def measure(self, batch: Any, step: int) -> dict[str, float] | None:
        """Measure and log now, whatever the number of the step."""
        self._last_step = step
        gauge = self._ready()
        if gauge.alone and not is_first():
            return None
        started = time.perf_counter()
        try:
            reading = self._read(gauge, batch, step)
        except PushforwardError as error:
            if self.measurements == 0:
                raise
            warnings.warn(f"gains were not measured at step {step}: {error}", stacklevel=2)
            return None
        finally:
            self.seconds += time.perf_counter() - started
        self.measurements += 1
        self.exact = reading.exact
        return self._logged(reading, step) if is_first() else None

    def _logged(self, reading: Reading, step: int) -> dict[str, float]:
        values = self._values(reading)
        if self._sink is not None:
            self._sink(values, step)
        return values

    def _ready(self) -> Gauge:
        """Made at the first measurement: by then the model is wrapped, and processes are there."""
        if self._gauge is None:
            alone = not is_sharded(self._model)
            limits = self._samples, self._directions
            self._gauge = Gauge(self._model, self._layers, *limits, alone)
        return self._gauge

    def _read(self, gauge: Gauge, batch: Any, step: int) -> Reading:
        x = _checked(input_of(batch) if self._inputs is None else self._inputs(batch))
        size, x = len(x), _like_model(x[: self._samples or SAMPLES].detach(), self._model)
        if not gauge.alone:
            x, size = of_first(x, size)
        return gauge.read(x, size, step)

    def _values(self, reading: Reading) -> dict[str, float]:
        """Means over the samples whose Jacobian is not zero; where all are, over all."""
        columns = list(zip(*reading.log_gains.tolist(), strict=True))
        alive = [each for each in columns if -math.inf not in each] or columns
        means = [math.fsum(row) / len(row) for row in zip(*alive, strict=True)]
        order = sorted(range(len(means)), key=lambda place: -means[place])
        chosen = order if self.top is None else [*order[: self.top], *_last(order, self.bottom)]
        values = {
            f"{self.prefix}/gain/{reading.names[place]}": _exp(means[place]) for place in chosen
        }
        return values | {f"{self.prefix}/log_norm": math.fsum(means)}


def _exp(log: float) -> float:
    return math.exp(log) if log < 709 else math.inf


def _last(order: Sequence[int], count: int) -> Sequence[int]:
    return order[len(order) - count :] if count else ()


def input_of(batch: Any) -> Any:
    """The input in a batch of a data loader: a tensor as it is, the first of several."""
    while isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 0:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return batch
    kind = f"the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
    raise InputError(
        "expected a batch that is a tensor, or a tuple or list that begins with one, got "
        f"{kind or type(batch).__name__}; say how to find the input with inputs=lambda batch: ..."
    )


def _checked(x: Any) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(
            f"GainLogger expects a real input tensor, got {got}; integers have no derivative: "
            "watch the part of the model behind its embedding"
        )
    if x.dim() == 0 or x.numel() == 0:
        raise ShapeError(
            f"GainLogger expects a batch (B, ...) that holds something, got shape {tuple(x.shape)}"
        )
    return x


def _like_model(x: Tensor, model: nn.Module) -> Tensor:
    """On the device of the model, where a loop may move the batch to only later."""
    parameter = next(model.parameters(), None)
    return x if parameter is None else x.to(parameter.device)


def _expect_count(name: str, count: Any, least: int = 1) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise InputError(f"{name} expects a whole number from {least} on, got {count!r}")
