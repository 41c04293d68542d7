"""The numbers of a report, against closed forms and torch.func."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from pushforward.errors import DifferentiationError, LoadError, MemoryBudgetError
from pushforward.report import measure as measuring
from pushforward.report.data import DataSet
from pushforward.report.fitting import evaluating, fitted
from pushforward.report.margins import margins
from pushforward.report.measure import Measurement, chunk_size, joined_paths, measure
from pushforward.report.randomness import fitting_threads
from pushforward.report.spectra import effective_rank, spectra
from pushforward.report.summary import (
    alive,
    gap,
    mean_log,
    noise_means,
    spread_over_samples,
    steps,
)


def dataset(x: Tensor, **more: object) -> DataSet:
    return DataSet("test", x, None, tuple(range(len(x))), len(x), **more)  # type: ignore


def net(outputs: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)]
    return nn.Sequential(*layers).double()


def points(count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64)


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(model))(x).detach()


@pytest.fixture(scope="module")
def measured() -> Measurement:
    return measure(net(), dataset(points()), seed=2)


class TestSpectra:
    def test_norms_and_rank_of_known_matrices(self) -> None:
        matrix = torch.zeros(3, 2, 3, dtype=torch.float64)
        matrix[0, 0, 0], matrix[0, 1, 2] = 3, 4
        matrix[1, 0, 0], matrix[1, 1, 1] = 2, 2
        found = spectra(matrix)
        assert found.fro_norm.tolist() == pytest.approx([5, math.sqrt(8), 0])
        assert found.spectral_norm.tolist() == pytest.approx([4, 2, 0])
        assert found.singular_values[0].tolist() == pytest.approx([4, 3])
        assert found.effective_rank.tolist() == pytest.approx([25**2 / (4**4 + 3**4), 2, 0])

    def test_effective_rank_of_tiny_numbers(self) -> None:
        values = torch.tensor([[1e-200, 1e-200, 1e-200]], dtype=torch.float64)
        assert effective_rank(values).item() == pytest.approx(3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_low_precision(self, dtype: torch.dtype) -> None:
        found = spectra(torch.eye(3, dtype=dtype).unsqueeze(0))
        assert found.spectral_norm.dtype == torch.float64
        assert found.effective_rank.item() == pytest.approx(3)

    def test_only_the_largest_are_kept(self) -> None:
        found = spectra(torch.eye(40).unsqueeze(0))
        assert found.singular_values.shape == (1, 32)
        assert found.effective_rank.item() == pytest.approx(40)


class TestMargins:
    def test_linear_classifier_has_known_distances(self) -> None:
        weight = torch.tensor([[1.0, 0], [0, 1], [-3, 0]], dtype=torch.float64)
        x = torch.tensor([[2.0, 1], [1, 2]], dtype=torch.float64)
        found = margins(x @ weight.T, weight.expand(2, 3, 2))
        assert found.prediction.tolist() == [0, 1]
        assert found.rival.tolist() == [1, 0]
        assert found.margin.tolist() == pytest.approx([1, 1])
        assert found.radius.tolist() == pytest.approx([1 / math.sqrt(2)] * 2)

    def test_nearest_class_need_not_be_the_second(self) -> None:
        matrix = torch.tensor([[[0.0, 0], [0.1, 0], [10, 0]]], dtype=torch.float64)
        found = margins(torch.tensor([[3.0, 2, 1]]), matrix)
        assert found.margin.item() == 1
        assert (found.rival.item(), found.radius.item()) == (2, pytest.approx(0.2))

    def test_flat_logits_and_ties(self) -> None:
        found = margins(torch.tensor([[1.0, 0], [1, 1]]), torch.zeros(2, 2, 3))
        assert found.radius.tolist() == [math.inf, 0]

    def test_tiny_slopes_do_not_vanish(self) -> None:
        matrix = torch.tensor([[[1e-30, 0], [0, 1e-30]]])
        radius = margins(torch.tensor([[1.0, 0]]), matrix).radius
        assert radius.item() == pytest.approx(1e30 / math.sqrt(2))


class TestMeasure:
    def test_numbers_of_the_jacobian(self, measured: Measurement) -> None:
        matrix = jacobians(net(), points())
        found = measured.jacobians.spectra
        assert measured.shape == (4, 6)
        assert torch.allclose(found.fro_norm, matrix.norm(dim=(1, 2)))
        assert torch.allclose(found.singular_values, torch.linalg.svdvals(matrix))
        assert torch.allclose(measured.input_norm, points().norm(dim=1))
        expected = margins(net()(points()).detach(), matrix)
        assert measured.jacobians.margins is not None
        assert torch.allclose(measured.jacobians.margins.radius, expected.radius)

    def test_gains_add_up_and_the_bound_holds(self, measured: Measurement) -> None:
        path = measured.path
        total = torch.stack([layer.log_gain for layer in path.layers]).sum(0)
        assert torch.allclose(total, path.log_norm)
        assert torch.allclose(path.log_norm.exp(), measured.jacobians.spectra.fro_norm)
        assert (path.rungs["frobenius"] >= path.log_norm - 1e-12).all()
        assert list(path.rungs) == ["frobenius", "mixed", "spectral", "segments"]
        assert path.certified == dict.fromkeys(path.rungs, True)
        assert path.labels == dict.fromkeys(path.rungs, "certified")
        assert all((rung >= path.log_norm - 1e-12).all() for rung in path.rungs.values())
        assert [layer.name for layer in path.layers] == ["0", "1", "2"]

    def test_noise_tends_to_the_linear_prediction(self, measured: Measurement) -> None:
        smallest = measured.noise[0]
        assert torch.allclose(smallest.linear, measured.jacobians.spectra.fro_norm.square() / 6)
        assert torch.allclose(smallest.ratio, smallest.linear, rtol=0.01)
        assert [level.sigma for level in measured.noise] == pytest.approx(
            [factor * points().std(correction=0).item() for factor in measuring.SIGMAS]
        )

    def test_tiles_and_chunks_change_no_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = dataset(points(20))
        whole = measure(net(), data, seed=2)
        small = measure(net(), data, seed=2, memory=4 * 4 * 6 * 8)
        for one, other in zip(whole.noise, small.noise, strict=True):
            assert torch.equal(one.ratio, other.ratio)
        assert torch.allclose(whole.path.log_norm, small.path.log_norm)
        assert torch.allclose(whole.jacobians.spectra.fro_norm, small.jacobians.spectra.fro_norm)

    def test_seed_repeats_the_draws(self, measured: Measurement) -> None:
        again = measure(net(), dataset(points()), seed=2)
        other = measure(net(), dataset(points()), seed=3)
        assert torch.equal(again.noise[-1].ratio, measured.noise[-1].ratio)
        assert not torch.equal(other.noise[-1].ratio, measured.noise[-1].ratio)

    def test_nothing_is_left_behind(self) -> None:
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 2))
        model.double().train()
        model[2].eval()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        draws = torch.get_rng_state()
        measure(model, dataset(points()))
        assert [module.training for module in model] == [True, True, False, True]
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), draws)

    def test_evaluation_mode_is_measured(self) -> None:
        model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)).double().train()
        found = measure(model, dataset(points())).jacobians.spectra.fro_norm
        assert torch.allclose(found, model[0].weight.norm().expand(5))

    def test_progress_never_falls_and_ends_at_the_total(self) -> None:
        seen: list[tuple[float, float]] = []
        measure(net(), dataset(points(20)), progress=lambda *step: seen.append(step))
        done = [now for now, _ in seen]
        assert done == sorted(done)
        assert done[-1] == pytest.approx(20)
        assert {total for _, total in seen} == {20.0}

    def test_one_output_has_no_margins(self) -> None:
        assert measure(net(1), dataset(points())).jacobians.margins is None

    def test_pytree_output(self) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"a": x[:, :2] * 3, "b": x[:, 2:]}

        found = measure(Two(), dataset(points()))
        assert found.shape == (6, 6)
        assert found.jacobians.margins is None
        assert found.jacobians.spectra.spectral_norm.tolist() == pytest.approx([3.0] * 5)

    def test_heat_gathers_outputs_and_channels(self) -> None:
        x = torch.rand(2, 3, 4, 4)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
        found = measure(model, dataset(x, image_shape=(3, 4, 4)))
        expected = model[1].weight.norm(dim=0).view(3, 4, 4).norm(dim=0)
        assert found.jacobians.heat is not None
        assert torch.allclose(found.jacobians.heat, expected.double().expand(2, 4, 4))

    def test_layers_coarsen_the_path(self) -> None:
        found = measure(net(), dataset(points()), layers=["1"])
        assert len(found.path.layers) == 2

    def test_constant_model(self) -> None:
        class Constant(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x[:, :2] * 0

        found = measure(Constant(), dataset(points()))
        assert not alive(found).any()
        assert found.jacobians.spectra.effective_rank.tolist() == [0.0] * 5
        assert math.isnan(gap(found))
        assert mean_log(found, found.path.log_norm) == -math.inf
        assert all(level.curvature == 0 for level in noise_means(found))


class TestRefusals:
    def test_output_that_is_not_finite(self) -> None:
        class Logarithm(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.log()

        x = torch.ones(20, 3)
        x[17, 1] = -1
        with pytest.raises(DifferentiationError, match="the output of sample 17 must be finite"):
            measure(Logarithm(), dataset(x))

    def test_noise_that_leads_out_of_the_domain_is_left_out(self) -> None:
        class Logarithm(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.log()

        x = torch.linspace(1, 3, 12).view(4, 3)
        found = measure(Logarithm(), dataset(x))
        sigmas = [level.sigma for level in found.noise] + list(found.unbearable)
        assert sigmas == pytest.approx([f * found.spread for f in measuring.SIGMAS])
        assert found.unbearable

    def test_derivative_that_is_not_finite(self) -> None:
        class Root(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.sqrt()

        with pytest.raises(DifferentiationError, match="Jacobian of sample 0 must be finite"):
            measure(Root(), dataset(torch.zeros(2, 3)))

    def test_output_of_integers(self) -> None:
        class Choice(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.argmax(1, keepdim=True)

        with pytest.raises(DifferentiationError, match="the model's output has no derivative"):
            measure(Choice(), dataset(points()))

    def test_error_of_torch_under_way(self) -> None:
        class Fussy(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if len(x) != 3:
                    raise RuntimeError("three or nothing")
                return x

        with pytest.raises(DifferentiationError, match=r"cannot be differentiated here: .*three"):
            measure(Fussy(), dataset(points()))

    def test_budget_that_holds_no_sample(self) -> None:
        with pytest.raises(MemoryBudgetError, match=r"4 x 6 and takes about 768 bytes.*--memory 7"):
            measure(net(), dataset(points()), memory=7)

    def test_chunks_fill_the_budget(self) -> None:
        x = torch.zeros(1, 10)
        assert chunk_size((10, 10), x, 4 * 100 * 4 * 3) == 3
        assert chunk_size((10, 10), x, None) == measuring.TILE
        assert chunk_size((10**6, 10**6), x, None) == 1
        assert chunk_size((0, 3), x, None) == measuring.TILE

    def test_samples_on_different_paths(self, measured: Measurement) -> None:
        shorter = replace(measured.path, layers=measured.path.layers[1:])
        with pytest.raises(DifferentiationError, match="must pass the same layers"):
            joined_paths([measured.path, shorter])


class TestFitting:
    def test_dtype_and_shape_follow_the_model(self) -> None:
        data = fitted(net(), dataset(torch.zeros(3, 1, 2, 3)))
        assert (data.x.shape, data.x.dtype) == ((3, 6), torch.float64)
        assert "flattened" in data.notes[0]

    def test_fitting_samples_stay_as_they_are(self) -> None:
        data = dataset(torch.zeros(3, 1, 4, 4))
        assert fitted(nn.Conv2d(1, 2, 3), data).x.shape == (3, 1, 4, 4)
        assert fitted(nn.Identity(), data).notes == ()

    def test_samples_that_do_not_fit(self) -> None:
        with pytest.raises(LoadError, match=r"shape \(2, 4\) each, nor as vectors of 8: Runtime"):
            fitted(net(), dataset(torch.zeros(3, 2, 4)))
        with pytest.raises(LoadError, match=r"shape \(7,\) each: RuntimeError"):
            fitted(net(), dataset(torch.zeros(3, 7)))

    def test_mode_of_a_module_that_has_one_only(self) -> None:
        class Exported(nn.Module):
            def eval(self) -> nn.Module:
                raise NotImplementedError("one mode only")

        model = Exported()
        with evaluating(model):
            pass
        assert model.training


class TestThreads:
    def test_small_models_take_one_thread_and_give_the_others_back(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            with fitting_threads(net(), points()):
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 2
            with fitting_threads(net(), torch.zeros(2**20, 1)):
                assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)


class TestSummary:
    def test_quantiles(self) -> None:
        span = spread_over_samples(torch.arange(11.0).flip(0))
        assert (span.low, span.middle, span.high) == (1, 5, 9)
        assert spread_over_samples(torch.tensor([2.5])).high == 2.5

    def test_infinities_stay_at_their_end(self) -> None:
        span = spread_over_samples(torch.tensor([1.0, 2.0, math.inf, math.inf]))
        assert span.low == pytest.approx(1.3)
        assert (span.middle, span.high) == (math.inf, math.inf)

    def test_steps_are_cumulated_from_the_output(self, measured: Measurement) -> None:
        path = steps(measured)
        assert path[0].level == pytest.approx(measured.path.log_norm.mean().item() / math.log(10))
        assert path[-1].level == pytest.approx(path[-1].gain)
        assert path[0].bound - path[0].level == pytest.approx(gap(measured))

    def test_mean_noise_covers_its_samples(self, measured: Measurement) -> None:
        for mean, level in zip(noise_means(measured), measured.noise, strict=True):
            assert mean.low <= mean.ratio <= mean.high
            assert mean.ratio == pytest.approx(level.ratio.mean().item())
            widest = (level.high - level.ratio).max().item()
            assert mean.high - mean.ratio <= widest + 1e-12

    def test_joining_keeps_every_field(self, measured: Measurement) -> None:
        twice = measuring.joined([measured.jacobians, measured.jacobians])
        assert [field.name for field in fields(twice)] == ["spectra", "margins", "heat"]
        assert len(twice.spectra.fro_norm) == 10
        assert twice.heat is None
