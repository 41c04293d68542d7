"""Gains logged in training: the numbers of path_bound, at a small price, without a trace."""

import copy
import csv
import logging
import math
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pushforward as pf
from pushforward.callbacks import GainLogger, LightningGainLogger
from pushforward.callbacks.gauge import directions, effort, gains
from pushforward.callbacks.sinks import sink_of
from pushforward.callbacks.wrapped import is_sharded

WHOLE = "pushforward/log_norm"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(module: nn.Module) -> nn.Module:
    """The module in float64 with parameters that depend on nothing else."""
    generator = torch.Generator().manual_seed(0)
    module = module.double()
    for tensor in module.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator).double() / 2
    return module


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.inner(x))


class Twice(nn.Module):
    """One layer called twice, outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.step(torch.tanh(self.step(x)))
        return {"logits": self.head(h), "hidden": h.sum(1)}


class Pair(nn.Module):
    """Two outputs of a module: no single tensor separates what follows."""

    class Split(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, :2], x[:, 2:]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.split, self.last = nn.Linear(5, 5), self.Split(), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.split(self.first(x))
        return self.last(a) * b


class TimeFirst(nn.Module):
    """Samples in the second dimension on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(3, 4), nn.GRU(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.mix(self.embed(x).transpose(0, 1))
        return self.head(h[-1])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Conv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(12, 4),
        )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (5,)),
    "one layer": (lambda: nn.Linear(5, 2), (5,)),
    "residual": (lambda: nn.Sequential(nn.Linear(5, 5), Residual(), nn.Linear(5, 2)), (5,)),
    "called twice": (Twice, (5,)),
    "two outputs": (Pair, (5,)),
    "time first": (TimeFirst, (7, 3)),
    "convolution": (Conv, (1, 6, 6)),
    "checkpointed": (Checkpointed, (5,)),
    "attention": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(12, 3)
        ),
        (3, 4),
    ),
}


def expected(model: nn.Module, x: Tensor, **options: Any) -> dict[str, float]:
    """Geometric means of the gains that path_bound finds."""
    model = copy.deepcopy(model).eval()
    path = pf.path_bound(model, x, rungs=(), **options)
    logs = {row.name: row.log_gain[path.log_norm > -math.inf].mean() for row in path.layers}
    whole = path.log_norm[path.log_norm > -math.inf].mean().item()
    found = {f"pushforward/gain/{name}": log.exp().item() for name, log in logs.items()}
    return found | {WHOLE: whole}


class TestValues:
    @pytest.mark.parametrize("name", MODELS)
    def test_gains_are_those_of_path_bound(self, name: str) -> None:
        build, shape = MODELS[name]
        model, x = seeded(build()), normal(9, *shape)
        watch = GainLogger(model, every=1, top=None, samples=7)
        for _ in range(3):  # found at first, and found again by hooks
            assert watch(x) == pytest.approx(expected(model, x[:7]), rel=1e-9)

    def test_hooks_find_the_steps_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, (build, shape) in MODELS.items():
            model, x = seeded(build()), normal(9, *shape)
            watch = GainLogger(model, every=1, top=None, samples=7)
            first = watch(x)
            with monkeypatch.context() as patch:
                for module in ("route.recorded_calls", "gauge.path_bound", "gauge.survey"):
                    patch.delattr(f"pushforward.callbacks.{module}")
                assert watch(x) == pytest.approx(first, rel=1e-12), name

    def test_parameters_that_change(self) -> None:
        model, x = seeded(mlp()), normal(8, 5)
        watch = GainLogger(model, every=1, top=None, samples=8)
        watch(x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        assert watch(x + 1) == pytest.approx(expected(model, x + 1), rel=1e-9)

    def test_layers_are_taken_together(self) -> None:
        model, x = seeded(nn.Sequential(mlp(), mlp()[2:], nn.Linear(3, 3))), normal(4, 5)
        model[1] = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
        found = GainLogger(model, top=None, samples=4, layers=["0", "1"])(x)
        assert found == pytest.approx(expected(model, x, layers=["0", "1"]), rel=1e-9)
        assert len(found) == 4

    def test_single_precision(self) -> None:
        model, x = seeded(Conv()).float(), normal(8, 1, 6, 6).float()
        watch = GainLogger(model, every=1, top=None, samples=8)
        for _ in range(2):
            assert watch(x) == pytest.approx(expected(model, x), rel=1e-4)

    def test_few_rows_at_a_time(self) -> None:
        """Many samples of a small batch with many outputs go in several passes."""
        model, x = seeded(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 40))), normal(3, 5)
        found = GainLogger(model, top=None, samples=3, directions=40)(x)
        assert found == pytest.approx(expected(model, x), rel=1e-9)

    def test_zero_jacobians_are_left_out(self) -> None:
        model = seeded(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
        model[0].weight.data, model[0].bias.data = torch.eye(2).double(), torch.zeros(2).double()
        x = torch.tensor([[1.0, 2.0], [-1.0, -1.0], [3.0, -1.0]]).double()
        watch = GainLogger(model, every=1, top=None, samples=3)
        for _ in range(2):
            assert watch(x) == pytest.approx(expected(model, x), rel=1e-9)
        dead = watch(-x.abs())
        assert dead is not None
        assert dead[WHOLE] == -math.inf
        assert not any(map(math.isnan, dead.values()))

    def test_networks_in_which_gradients_underflow(self) -> None:
        layers = [nn.Linear(3, 3, bias=False) for _ in range(60)]
        model = seeded(nn.Sequential(*layers)).float()
        for layer in layers:
            layer.weight.data *= 0.05
        x = normal(4, 3).float()
        watch = GainLogger(model, every=1, top=None, samples=4)
        for _ in range(2):
            assert watch(x) == pytest.approx(expected(model, x), rel=1e-4)

    def test_bfloat16(self) -> None:
        """By autocast, and in parameters: as good as such numbers are."""
        model, x = seeded(Conv()).float(), normal(8, 1, 6, 6).float()
        goal = expected(model, x)
        watch = GainLogger(model, every=1, top=None, samples=8)
        with torch.autocast("cpu", torch.bfloat16):
            found = [watch(x), watch(x)]
        short = GainLogger(copy.deepcopy(model).bfloat16(), every=1, top=None, samples=8)
        for each in (*found, short(x.bfloat16()), short(x.bfloat16())):
            assert each == pytest.approx(goal, rel=0.1)

    def test_jacobian_that_is_not_finite(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        model[0].weight.data[0, 0] = math.nan
        with pytest.raises(pf.errors.DifferentiationError, match="NaN in step '0'"):
            GainLogger(model)(torch.ones(3, 2))

    def test_output_that_depends_on_nothing(self) -> None:
        class Constant(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.ones(len(x), 2)

        assert GainLogger(Constant())(normal(3, 2)) == {
            "pushforward/gain/Constant": 0.0,
            WHOLE: -math.inf,
        }


class TestDirections:
    def test_orthonormal_and_scaled(self) -> None:
        found = directions(10, 4, seed=3)
        gram = found @ found.T
        assert torch.allclose(gram, torch.eye(4, dtype=torch.float64) * 10 / 4)
        assert torch.equal(found, directions(10, 4, seed=3))
        assert not torch.equal(found, directions(10, 4, seed=4))
        assert torch.equal(directions(3, 5, seed=0), torch.eye(3, dtype=torch.float64))

    def test_right_on_average(self) -> None:
        matrix = normal(12, 7) * torch.arange(12)[:, None]
        squares = torch.stack([(directions(12, 3, s) @ matrix).square().sum() for s in range(4000)])
        error = squares.mean() - matrix.square().sum()
        assert error.abs() < 4 * squares.std() / 4000**0.5

    def test_many_outputs(self) -> None:
        model, x = (
            seeded(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 60))),
            normal(64, 5),
        )
        watch = GainLogger(model, every=1, top=None)
        found = [watch(x, step) for step in range(150)]
        assert watch.exact is False
        exact = expected(model, x[:4])
        assert watch._gauge is not None
        for name in exact:
            values = torch.tensor([each[name] for each in found])
            assert len(set(values.tolist())) == 150
            # Logarithms of estimates are a little below the truth.
            assert values.mean() == pytest.approx(exact[name], rel=0.1, abs=0.1)

    @pytest.mark.parametrize(
        ("batch", "outputs", "samples", "rows"),
        [
            (64, 10, None, (3, 10)),
            (256, 10, None, (8, 10)),
            (64, 1000, None, (4, 8)),
            (1, 10, None, (1, 1)),
            (8, 10, None, (1, 10)),
            (64, 10, 20, (20, 10)),
            (4, 2, 9, (4, 2)),
            (64, 1, None, (8, 1)),
        ],
    )
    def test_effort(self, batch: int, outputs: int, samples: Any, rows: tuple[int, int]) -> None:
        """By default at most half the batch is passed, and all of few outputs."""
        found = effort(batch, outputs, samples, None)
        assert (found.samples, found.directions) == rows
        if samples is None and batch > 8:
            assert found.samples * found.directions <= batch / 2

    def test_gains_behind_a_step_that_kills_everything(self) -> None:
        logs = torch.tensor([[-math.inf], [-math.inf], [2.0]])
        assert gains(logs).flatten().tolist() == [0.0, -math.inf, 2.0]


def flops(run: Callable[[], Any]) -> int:
    """Operations of products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class TestCost:
    @pytest.mark.parametrize("batch", [16, 64, 256])
    @pytest.mark.parametrize(
        ("build", "shape"),
        [
            (lambda: nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 10)), (50,)),
            (lambda: nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 300)), (50,)),
            (
                lambda: nn.Sequential(
                    nn.Conv2d(3, 8, 3),
                    nn.ReLU(),
                    nn.Conv2d(8, 8, 3),
                    nn.Flatten(),
                    nn.Linear(512, 10),
                ),
                (3, 12, 12),
            ),
        ],
        ids=["mlp", "many outputs", "convolution"],
    )
    def test_below_a_training_step(
        self, build: Callable[[], nn.Module], shape: tuple[int, ...], batch: int
    ) -> None:
        """So that it is below 1 % where every hundredth step is measured."""
        model, x = build(), torch.randn(batch, *shape)
        watch = GainLogger(model, every=1)
        watch(x)
        step = flops(lambda: model(x).square().sum().backward())
        measurement = flops(lambda: watch(x))
        assert 0 < measurement < 0.75 * step


class TestWhen:
    def test_every_so_many_calls(self) -> None:
        steps: list[int] = []
        watch = GainLogger(mlp(), every=3, log=lambda values, step: steps.append(step))
        found = [watch(torch.randn(4, 5)) is not None for _ in range(8)]
        assert steps == [0, 3, 6]
        assert found == [True, False, False] * 2 + [True, False]
        assert watch.measurements == 3
        assert watch.seconds > 0
        assert watch.exact

    def test_steps_that_are_given(self) -> None:
        """Several batches of one step count once."""
        steps: list[int] = []
        watch = GainLogger(mlp(), every=10, log=lambda values, step: steps.append(step))
        for step in (5, 10, 10, 19, 20, 30):
            watch(torch.randn(4, 5), step)
        assert steps == [10, 20, 30]

    def test_top_and_bottom(self) -> None:
        model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
        for factor, layer in zip((3.0, 0.5, 2.0, 0.1), model, strict=True):
            layer.weight.data = factor * torch.eye(2)
        x = torch.randn(4, 2)
        names = [f"pushforward/gain/{n}" for n in (0, 2, 1, 3)]  # 3, 2, 0.5, 0.1 root 2
        found = GainLogger(model, top=2)(x)
        assert list(found) == [*names[:2], WHOLE]
        assert found[names[0]] == pytest.approx(3.0)
        assert list(GainLogger(model, top=1, bottom=1)(x)) == [names[0], names[3], WHOLE]
        assert "p/gain/0" in GainLogger(model, top=9, bottom=9, prefix="p")(x)
        assert len(GainLogger(model, top=3, bottom=3)(x)) == 5


class TestTrace:
    def test_training_goes_on_as_if_nothing_had_looked(self) -> None:
        def trained(watched: bool) -> tuple[list[Tensor], Tensor]:
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)
            )
            watch = GainLogger(model, every=2)
            optimizer = torch.optim.Adam(model.parameters())
            for _ in range(6):
                x = torch.randn(16, 5)
                if watched:
                    watch(x)
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
            return [*model.parameters(), *model.buffers()], torch.get_rng_state()

        plain, watched = trained(False), trained(True)
        assert all(torch.equal(a, b) for a, b in zip(plain[0], watched[0], strict=True))
        assert torch.equal(plain[1], watched[1])

    def test_modes_gradients_and_hooks(self) -> None:
        model = seeded(Conv())
        model.train()
        model[1].eval()
        modes = [module.training for module in model.modules()]
        model[0].weight.grad = torch.ones_like(model[0].weight)
        buffer = model[1].running_mean
        watch = GainLogger(model, every=1)
        for _ in range(2):
            watch(normal(4, 1, 6, 6))
        assert [module.training for module in model.modules()] == modes
        assert model[1].running_mean is buffer
        assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
        assert all(p.grad is None for p in model[6].parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_modes_come_back_after_an_error(self) -> None:
        class Refuses(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                raise KeyError("no")

        model = nn.Sequential(nn.Linear(2, 2), Refuses())
        with pytest.raises(KeyError, match="no"):
            GainLogger(model)(torch.randn(2, 2))
        assert all(module.training for module in model.modules())

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_any_gradient_mode(self, mode: Callable[[], Any]) -> None:
        model, x = seeded(mlp()), normal(4, 5)
        watch = GainLogger(model, every=1, top=None, samples=4)
        with mode():
            found = [watch(x + 0), watch(x + 0)]
        assert found[0] == pytest.approx(expected(model, x), rel=1e-9)
        assert found[1] == pytest.approx(found[0], rel=1e-12)


class TestWhatMayChange:
    def test_a_model_that_takes_another_way(self) -> None:
        class Grows(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stages = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
                self.depth = 1

            def forward(self, x: Tensor) -> Tensor:
                for stage in self.stages[: self.depth]:
                    x = torch.tanh(stage(x))
                return x

        model, x = seeded(Grows()), normal(4, 3)
        watch = GainLogger(model, every=1, top=None, samples=4)
        for depth in (1, 3, 2, 3, 1):
            model.depth = depth
            assert watch(x) == pytest.approx(expected(model, x), rel=1e-9)

    def test_more_outputs(self) -> None:
        model, x = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), normal(4, 3)
        watch = GainLogger(model, every=1, top=None, samples=4)
        watch(x)
        model[2] = seeded(nn.Linear(4, 5))
        assert watch(x) == pytest.approx(expected(model, x), rel=1e-9)

    def test_a_way_past_a_step(self) -> None:
        """The same calls, but the steps are other ones."""

        class Skips(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.skip = nn.Linear(3, 3), nn.Linear(3, 3), False

            def forward(self, x: Tensor) -> Tensor:
                h = self.a(x)
                return self.b(h) + x if self.skip else self.b(h)

        model, x = seeded(Skips()), normal(4, 3)
        watch = GainLogger(model, every=1, top=None, samples=4)
        assert len(watch(x)) == 3
        model.skip = True
        assert watch(x) == pytest.approx(expected(model, x), rel=1e-9)
        assert len(watch(x)) == 2

    def test_views_that_are_written_to(self) -> None:
        """Hooks would miss them, so that path_bound goes on measuring."""

        class Writes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.flat, self.b = nn.Linear(4, 4), nn.Flatten(), nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                h = self.a(x)
                view = self.flat(h.view(-1, 2, 2))
                h.mul_(3).tanh_()
                return self.b(view)

        model, x = seeded(Writes()), normal(4, 4)
        watch = GainLogger(model, every=1, top=None, samples=4)
        for _ in range(2):
            assert watch(x) == pytest.approx(expected(model, x), rel=1e-9)

    def test_trouble_later_is_a_warning(self) -> None:
        model = seeded(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)))
        watch = GainLogger(model, every=1)
        watch(normal(3, 2))
        model[0].weight.data[0, 0] = math.nan
        with pytest.warns(UserWarning, match="gains were not measured at step 1: .* NaN"):
            assert watch(normal(3, 2)) is None
        assert watch.measurements == 1
        model[0].weight.data[0, 0] = 1.0
        assert watch(normal(3, 2)) is not None


class TestWrapped:
    def test_compiled(self) -> None:
        model, x = seeded(nn.Sequential(mlp(), nn.Linear(3, 2))), normal(4, 5)
        goal = expected(model, x)
        assert GainLogger(torch.compile(model, backend="eager"), top=None, samples=4)(x) == (
            pytest.approx(goal, rel=1e-9)
        )
        model[0].compile(backend="eager")
        watch = GainLogger(model, every=1, top=None, samples=4)
        for _ in range(2):
            assert watch(x) == pytest.approx(goal, rel=1e-9)

    def test_a_compiled_part(self) -> None:
        model, x = seeded(nn.Sequential(mlp(), nn.Linear(3, 2))), normal(4, 5)
        goal = expected(model, x)
        model[0] = torch.compile(model[0], backend="eager")
        assert GainLogger(model, top=None, samples=4)(x) == pytest.approx(goal, rel=1e-9)

    def test_parts_that_are_checkpointed_by_a_wrapper(self) -> None:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        model, x = seeded(nn.Sequential(mlp(), nn.Linear(3, 2))), normal(4, 5)
        goal = expected(model, x)
        model[0] = checkpoint_wrapper(model[0])
        watch = GainLogger(model, every=1, top=None, samples=4)
        for _ in range(2):
            assert watch(x) == pytest.approx(goal, rel=1e-9)

    def test_data_parallel(self) -> None:
        model, x = seeded(mlp()), normal(4, 5)
        watch = GainLogger(nn.DataParallel(model), top=None, samples=4)
        assert watch(x) == pytest.approx(expected(model, x), rel=1e-9)


@pytest.fixture
def group(tmp_path: Any) -> Iterator[None]:
    """This process as a group of its own; two are tried in tests/distributed."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
class TestGroup:
    def test_sharded(self) -> None:
        model, x = seeded(nn.Sequential(mlp(), nn.Linear(3, 2))), normal(9, 5)
        goal = expected(model, x[:7])
        mesh = init_device_mesh("cpu", (1,))
        for part in (model[0], model):
            fully_shard(part, mesh=mesh)
        watch = GainLogger(model, every=1, top=None, samples=7)
        for _ in range(2):
            assert watch(x) == pytest.approx(goal, rel=1e-9)
        assert watch._gauge is not None
        assert not watch._gauge.alone

    def test_sharded_and_out_of_range(self) -> None:
        """There is no way around it, since single steps would need what other processes hold."""
        model = seeded(nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(60)))).float()
        for layer in model:
            layer.weight.data *= 0.05
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(pf.errors.DifferentiationError, match="that their dtype can hold"):
            GainLogger(model)(normal(4, 3).float())

    def test_fully_sharded_of_the_first_kind(self) -> None:
        model = mlp()
        assert not is_sharded(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        assert is_sharded(whole)

    def test_data_parallel_parts(self) -> None:
        """Names of steps go without the wrapper, whatever it wraps."""
        model, x = seeded(nn.Sequential(mlp(), nn.Linear(3, 2))), normal(4, 5)
        goal = expected(model, x)
        whole = GainLogger(DistributedDataParallel(model), top=None, samples=4)
        assert whole(x) == pytest.approx(goal, rel=1e-9)
        model[0] = DistributedDataParallel(model[0])
        assert GainLogger(model, top=None, samples=4)(x) == pytest.approx(goal, rel=1e-9)

    def test_other_processes_do_not_log(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        seen: list[int] = []
        watch = GainLogger(mlp(), log=lambda values, step: seen.append(step))
        assert watch(torch.randn(4, 5)) is None
        assert watch.measurements == 0  # only the first one measures
        monkeypatch.setattr("pushforward.callbacks.logger.is_sharded", lambda model: True)
        monkeypatch.setattr("pushforward.callbacks.logger.of_first", lambda x, size: (x, size))
        watch = GainLogger(mlp(), log=lambda values, step: seen.append(step))
        assert watch(torch.randn(4, 5)) is None
        assert watch.measurements == 1  # all of them measure
        assert not seen


class TestSinks:
    VALUES = types.MappingProxyType({"a": 1.5, "b": 2.0})

    def logged(self, log: Any) -> None:
        sink_of(log)(dict(self.VALUES), 7)

    def test_function(self) -> None:
        seen: list[Any] = []
        self.logged(lambda values, step: seen.append((values, step)))
        assert seen == [(dict(self.VALUES), 7)]

    def test_summary_writer(self) -> None:
        class Writer:
            seen: list[Any] = []  # noqa: RUF012

            def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
                self.seen.append((tag, scalar_value, global_step))

        self.logged(Writer())
        assert Writer.seen == [("a", 1.5, 7), ("b", 2.0, 7)]

    def test_run_and_module_of_weights_and_biases(self) -> None:
        class Run:
            def __init__(self) -> None:
                self.seen: list[Any] = []

            def log(self, data: dict[str, Any], step: int | None = None) -> None:
                self.seen.append((data, step))

        run = Run()
        module = types.ModuleType("wandb")
        module.log = run.log  # type: ignore
        for log in (run, module, run.log):
            self.logged(log)
        assert run.seen == [(dict(self.VALUES), 7)] * 3

    def test_logger_of_lightning(self) -> None:
        class Logger:
            def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
                self.seen = metrics, step

        logger = Logger()
        self.logged(logger)
        assert logger.seen == (dict(self.VALUES), 7)

    def test_logger_of_the_standard_library(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            self.logged(logging.getLogger("gains"))
        assert caplog.messages == ["step 7: a 1.5, b 2"]

    def test_object_that_can_be_called(self) -> None:
        class Log:
            def __call__(self, values: dict[str, float], step: int) -> None:
                self.seen = values, step

        log = Log()
        self.logged(log)
        assert log.seen == (dict(self.VALUES), 7)

    def test_nothing_that_takes_numbers(self) -> None:
        with pytest.raises(pf.errors.InputError, match=r"log expects a function .* got int"):
            GainLogger(mlp(), log=3)


class TestInputs:
    def test_batches_of_a_loader(self) -> None:
        model, x = seeded(mlp()), normal(4, 5)
        watch = GainLogger(model, every=1)
        for batch in ((x, torch.zeros(4)), [x, 1], ((x, x), 1)):
            assert watch(batch) == watch(x, step=100)
        named = GainLogger(model, inputs=lambda batch: batch["x"])
        assert named({"x": x}) == pytest.approx(watch(x), rel=1e-12)

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            ({"image": 1, "label": 2}, "got the keys image, label; .* inputs=lambda batch"),
            ("text", "begins with one, got str"),
            ((), "begins with one, got tuple"),
            (torch.zeros(3, dtype=torch.long), "a real input tensor, got a tensor of torch.int64"),
            (torch.tensor(1.0), r"something, got shape \(\)"),
            (torch.zeros(0, 5), r"something, got shape \(0, 5\)"),
        ],
    )
    def test_batches_without_an_input(self, batch: Any, message: str) -> None:
        with pytest.raises(pf.errors.InputError, match=message):
            GainLogger(mlp())(batch)

    def test_inputs_that_give_no_tensor(self) -> None:
        with pytest.raises(pf.errors.InputError, match="a real input tensor, got int"):
            GainLogger(mlp(), inputs=lambda batch: 3)(torch.zeros(2, 5))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"every": 0}, "every expects a whole number from 1 on, got 0"),
            ({"every": None}, "every expects a whole number from 1 on, got None"),
            ({"top": 0}, "top expects a whole number from 1 on, got 0"),
            ({"bottom": -1}, "bottom expects a whole number from 0 on, got -1"),
            ({"samples": 1.5}, "samples expects a whole number from 1 on, got 1.5"),
            ({"directions": True}, "directions expects a whole number from 1 on, got True"),
            ({"layers": "x*"}, "'x\\*', which matches none"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(pf.errors.InputError, match=message):
            GainLogger(mlp(), **options)

    def test_no_module(self) -> None:
        with pytest.raises(pf.errors.InputError, match=r"expects an nn\.Module, got function"):
            GainLogger(lambda x: x)  # type: ignore

    @pytest.mark.parametrize("samples", [1, 4])
    def test_samples_that_meet(self, samples: int) -> None:
        class Centred(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x - 0.2 * x.mean(0)

        model = seeded(nn.Sequential(nn.Linear(5, 5), Centred(), nn.Linear(5, 3)))
        with pytest.raises(pf.errors.CouplingError, match="do not influence each other"):
            GainLogger(model, samples=samples)(normal(4, 5))

    def test_samples_that_meet_and_part_again(self) -> None:
        """Steps do not end where they are mixed."""

        class Mixed(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.flip(0)

        model, x = seeded(nn.Sequential(nn.Linear(5, 5), Mixed(), Mixed(), nn.Tanh())), normal(4, 5)
        found = GainLogger(model, top=None, samples=4)(x)
        assert found == pytest.approx(expected(model, x), rel=1e-9)
        assert "pushforward/gain/1" not in found


class Callback:
    """What a callback of Lightning is, as far as this one goes."""


class FakeTrainer:
    """Calls the hooks that a Trainer calls, in its order."""

    def __init__(self, callback: Any, accumulate: int = 1) -> None:
        self.callback, self.accumulate, self.global_step = callback, accumulate, 0
        self.seen: list[tuple[dict[str, float], int]] = []
        self.loggers = [types.SimpleNamespace(log_metrics=self.log), self.Silent()]

    class Silent:
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            pass

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append((metrics, step))

    def fit(self, module: nn.Module, batches: list[Any]) -> None:
        self.callback.on_fit_start(self, module)
        for index, batch in enumerate(batches):
            self.callback.on_train_batch_start(self, module, batch, index)
            self.global_step += (index + 1) % self.accumulate == 0


@pytest.fixture
def fake_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the name of Lightning that has nothing but the base class."""
    package = types.ModuleType("lightning.pytorch")
    package.Callback = Callback  # type: ignore
    monkeypatch.setitem(sys.modules, "lightning.pytorch", package)
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)


@pytest.mark.usefixtures("fake_lightning")
class TestCallback:
    def test_is_one(self) -> None:
        callback = LightningGainLogger(every=3)
        assert isinstance(callback, Callback)
        assert isinstance(callback, LightningGainLogger)
        assert type(callback).__name__ == "LightningGainLogger"
        assert type(callback) is type(LightningGainLogger())

    def test_logs_to_the_loggers_of_the_trainer(self) -> None:
        model, x = seeded(mlp()), normal(4, 5)
        trainer = FakeTrainer(LightningGainLogger(every=2, top=None, samples=4))
        trainer.fit(model, [(x, 0)] * 5)
        assert [step for _, step in trainer.seen] == [0, 2, 4]
        assert trainer.seen[0][0] == pytest.approx(expected(model, x), rel=1e-9)
        trainer.fit(model, [x])
        assert len(trainer.seen) == 3  # at step 5

    def test_batches_that_are_accumulated_count_once(self) -> None:
        trainer = FakeTrainer(LightningGainLogger(every=1), accumulate=3)
        trainer.fit(seeded(mlp()), [normal(4, 5)] * 7)
        assert [step for _, step in trainer.seen] == [0, 1, 2]

    def test_a_part_of_the_module(self) -> None:
        class Module(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.parts = nn.ModuleDict({"net": mlp()})

        module, x, seen = seeded(Module()), normal(4, 5), []
        callback = LightningGainLogger(
            log=lambda values, step: seen.append(values),
            model="parts.net",
            inputs=lambda batch: batch["x"],
            top=None,
            samples=4,
        )
        FakeTrainer(callback).fit(module, [{"x": x}])
        assert seen == [pytest.approx(expected(module.parts["net"], x), rel=1e-9)]
        with pytest.raises(pf.errors.InputError, match="got 'net'; it has parts"):
            FakeTrainer(LightningGainLogger(model="net")).fit(module, [])

    def test_survives_pickling(self) -> None:
        callback = LightningGainLogger(every=7, top=2, model="net")
        again = pickle.loads(pickle.dumps(callback))
        assert type(again) is type(callback)
        assert again.options == callback.options
        assert again.options["every"] == 7

    def test_both_names_of_lightning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Other:
            pass

        package = types.ModuleType("pytorch_lightning")
        package.Callback = Other  # type: ignore
        monkeypatch.setitem(sys.modules, "pytorch_lightning", package)
        callback = LightningGainLogger()
        assert isinstance(callback, Callback)
        assert isinstance(callback, Other)

    def test_nothing_is_imported_yet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        package = sys.modules["lightning.pytorch"]
        monkeypatch.delitem(sys.modules, "lightning.pytorch")

        def load(name: str) -> Any:
            if name != "pytorch_lightning":
                raise ImportError(name)
            return package

        monkeypatch.setattr("importlib.import_module", load)
        assert isinstance(LightningGainLogger(), Callback)

    def test_neither_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "lightning", None)
        monkeypatch.delitem(sys.modules, "lightning.pytorch")
        monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
        with pytest.raises(pf.errors.MissingDependencyError, match=r"pushforward\[lightning\]"):
            LightningGainLogger()


@pytest.mark.slow
def test_a_real_trainer(tmp_path: Any) -> None:
    """Lightning itself, with accumulation, two loggers and batch norm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning.pytorch")
        from lightning.pytorch.loggers import CSVLogger

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = mlp()

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x)

            def training_step(self, batch: list[Tensor], _: int) -> Tensor:
                return self(batch[0]).square().sum()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.0)

        module = Module()
        x = torch.randn(48, 5)
        goal = expected(module, x[:4])
        callback = LightningGainLogger(every=2, top=None, samples=4)
        assert isinstance(callback, lightning.Callback)
        logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=2,
            logger=[logger],
            callbacks=[callback],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
        trainer.fit(module, loader)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    found = {name: float(value) for name, value in rows[0].items() if name != "step"}
    assert found == pytest.approx(goal, rel=1e-4)
    assert callback.watch is not None
    assert callback.watch.measurements == 3
