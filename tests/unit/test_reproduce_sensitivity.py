"""The experiment on sensitivity and generalisation: its parts against their definitions."""

import math

import pytest
import torch
from torch import Tensor

from pushforward.reproduce import sensitivity as paper
from pushforward.reproduce.data import Images, held_out
from pushforward.reproduce.sensitivity import PAPER, Measured, Recipe, Settings
from pushforward.reproduce.sensitivity_figures import KINDS, PATHS
from pushforward.reproduce.study import study

TINY = Settings(
    train=60,
    measured=30,
    nets=3,
    steps=120,
    full_batch_steps=40,
    paths=2,
    path_steps=12,
)


def images(side: int = 8, count: int = 150) -> Images:
    """Ten classes of noisy blobs, each at its own place."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count)[torch.randperm(count, generator=generator)] % 10
    x = 0.3 * torch.rand(count, 1, side, side, generator=generator)
    for row, each in enumerate(y.tolist()):
        x[row, 0, each // 5 * (side // 2) : each // 5 * (side // 2) + 2, each % 5] += 0.7
    return held_out("blobs", x, y)


def dense(model, x: Tensor) -> Tensor:
    """Norms of the softmax's Jacobian by a loop of plain autograd."""
    norms = []
    for sample in x:
        point = sample[None].clone().requires_grad_()
        rows = [
            torch.autograd.grad(p, point, retain_graph=True)[0] for p in model(point).softmax(1)[0]
        ]
        norms.append(torch.stack(rows).norm())
    return torch.stack(norms)


def test_what_is_not_trained_on_is_tested_on():
    whole = images()
    found = paper.prepared(whole, TINY)
    assert torch.equal(found.train_x, whole.train_x[:60])
    assert len(found.test_x) == len(found.test_y) == 150 - 60
    assert torch.equal(found.test_x[: len(whole.test_x)], whole.test_x)


def test_large_images_are_taken_at_half_their_resolution():
    whole = images(side=16)
    found = paper.prepared(whole, TINY)
    assert found.train_x.shape[1:] == (1, 8, 8)
    torch.testing.assert_close(found.train_x[0, 0, 0, 0], whole.train_x[0, 0, :2, :2].mean())


def test_recipes_stay_in_their_ranges():
    torch.manual_seed(0)
    recipes = [paper.drawn_recipe(TINY) for _ in range(300)]
    assert {recipe.kind for recipe in recipes} == set(KINDS)
    assert {recipe.optimiser for recipe in recipes} == set(paper.OPTIMISERS)
    assert {recipe.batch for recipe in recipes} == {*paper.SMALL_BATCHES, 0}
    assert all(paper.RATES[0] <= recipe.rate <= paper.RATES[1] for recipe in recipes)
    assert all(recipe.wrong_labels <= TINY.wrong_labels for recipe in recipes)
    assert not any(recipe.moved and recipe.wrong_labels for recipe in recipes)


def test_labels_drawn_at_random():
    torch.manual_seed(0)
    y = torch.zeros(4000, dtype=torch.int64)
    assert torch.equal(paper.labelled(y, 0.0), y)
    assert (paper.labelled(y, 0.5) != 0).double().mean().item() == pytest.approx(0.45, abs=0.04)


def test_moved_images_are_moved_by_a_pixel_at_most():
    torch.manual_seed(0)
    x = torch.rand(2, 1, 4, 4)
    near = [torch.roll(x, (i, j), (2, 3)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    seen = [paper.moved(x) for _ in range(60)]
    assert all(any(torch.equal(one, other) for other in near) for one in seen)
    assert sum(torch.equal(one, x) for one in seen) > 20


@pytest.mark.parametrize("optimiser", paper.OPTIMISERS)
def test_training_ends_where_all_is_fitted(optimiser):
    torch.manual_seed(0)
    found = paper.prepared(images(), TINY)
    recipe = Recipe(width=32, depth=1, optimiser=optimiser, batch=32, loss=0.1)
    model = paper.trained(recipe, found.train_x, found.train_y, Settings(steps=2000))
    logits = model(found.train_x)
    assert torch.equal(logits.argmax(1), found.train_y)
    assert torch.nn.functional.cross_entropy(logits, found.train_y) < 0.1


def test_one_network_measured():
    torch.manual_seed(0)
    found = paper.prepared(images(), TINY)
    path = paper.ellipses(found, TINY)["different classes"]
    model, net = paper.measured(Recipe(width=16), found, path, TINY)
    assert net.norm == pytest.approx(dense(model, found.test_x[:30]).mean().item(), rel=1e-4)
    right = (model(found.test_x).argmax(1) == found.test_y).double().mean().item()
    fitted = (model(found.train_x).argmax(1) == found.train_y).double().mean().item()
    assert net.train_accuracy == pytest.approx(100 * fitted)
    assert net.gap == pytest.approx(100 * (fitted - right))
    codes = torch.cat([model[1](path.flatten(0, 1).flatten(1)), model[:4](path.flatten(0, 1))], 1)
    codes = (codes > 0).unflatten(0, path.shape[:2])
    changes = (codes[:, 1:] != codes[:, :-1]).double().mean().item()
    assert net.transitions == pytest.approx(100 * changes)


def test_paths_pass_through_training_images():
    torch.manual_seed(0)
    found = paper.prepared(images(), TINY)
    paths = paper.ellipses(found, TINY)
    for name, (classes_apart, known) in {
        "different classes": (3, True),
        "one class": (1, True),
        "pixels at random": (0, False),
    }.items():
        assert paths[name].shape == (2, 12, 1, 8, 8)
        for path in paths[name]:
            same = (path[[0, 4, 8], None] == found.train_x).flatten(2).all(2)
            assert same.any(1).all() == known
            if known:
                assert len({int(found.train_y[row.nonzero()[0]]) for row in same}) == classes_apart


def net(kind: str = "right labels", fitted: float = 100.0, **named: float) -> Measured:
    return Measured(
        kind,
        fitted,
        **{"gap": 1.0, "norm": 1.0, "norm_of_logits": 1.0, "transitions": 1.0, "area": 0.9} | named,
    )


def test_only_fitted_networks_count():
    nets = [
        net(gap=1, norm=1, norm_of_logits=3, transitions=1, area=0.8),
        net(gap=2, norm=2, norm_of_logits=2, transitions=2, area=math.nan),
        net(gap=3, norm=3, norm_of_logits=1, transitions=3, area=0.9),
        net("wrong labels", gap=4, norm=4, norm_of_logits=2.5, transitions=9, area=0.1),
        net(fitted=99.0, gap=0, norm=99, area=0.0),
    ]
    found = paper.in_population(nets)
    assert found["fitted networks"] == 4
    assert found["rank correlation, probabilities"] == pytest.approx(1)
    assert found["rank correlation, logits"] == pytest.approx(-0.4)
    assert found["rank correlation, transitions"] == pytest.approx(1)
    assert found["rank correlation with right labels, logits"] == pytest.approx(-1)
    assert found["area under the curve"] == pytest.approx(0.85)


def test_comparisons_of_factors():
    nets = {
        "base": net(gap=2, norm=2, transitions=4),
        "moved images": net(gap=1, norm=3, transitions=5),
        "all images at once": net(gap=3, norm=3, transitions=2),
        "random labels": net(gap=9, norm=9, transitions=6),
    }
    numbers = paper.of_factors(nets)
    assert paper.worse(numbers, "gap") == 3
    assert paper.worse(numbers, "norm") == 2
    assert paper.transitions_of_the_worse(numbers) == 0.5
    assert math.isnan(paper.transitions_of_the_worse(numbers | {"gap, base": 7.0}))


def test_places_on_paths():
    norms = torch.tensor([1.0, 5.0, 7.0, 2.0, 5.0, 8.0, 3.0, 5.0, 9.0, 0.0, 0.0, 0.0])
    norms = norms[:9]  # images at 0, 3 and 6, midway the step after each
    flat = {"norms": norms, "transitions": torch.ones(8)}
    numbers = paper.along_paths(dict.fromkeys(PATHS, flat))
    assert numbers["norm at images"] == 2
    assert numbers["norm midway"] == 5
    assert numbers["norm on path, one class"] == pytest.approx(5)


def test_the_whole_experiment_on_a_small_scale():
    heard: list[float] = []
    found = study(PAPER, images(), 2, TINY, lambda done, total: heard.append(done / total))
    assert heard[-1] == pytest.approx(1)
    assert len(found.findings) == len(PAPER.claims)
    assert all(math.isfinite(found.numbers[f"gap, {name}"].mean) for name in ("base",))
    scatter, paths = PAPER.figures(found.outcomes)
    assert scatter.svg.startswith("<svg")
    assert "probabilities" in scatter.alt
    assert "between classes" in paths.alt


@pytest.mark.slow
def test_the_headline_holds_on_digits():
    """On the smaller set of images too, at a few networks less."""
    from pushforward.reproduce.data import load_images

    settings = Settings(
        train=300, nets=14, steps=1500, full_batch_steps=400, paths=4, path_steps=60
    )
    found = study(PAPER, load_images("digits"), 1, settings)
    assert found.numbers["rank correlation, probabilities"].mean > 0.6
    assert found.numbers["area under the curve"].mean > 0.8
    assert found.numbers["norm midway"].mean > 3 * found.numbers["norm at images"].mean
