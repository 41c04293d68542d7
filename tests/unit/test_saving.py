"""Plans on disk: written, read, joined to functions again, and refused where they do not fit."""

import json
import pickle
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pushforward as pf
from oracles import loop_jacobian
from pushforward import derivatives, recalling, strategies
from pushforward.errors import InputError, LoadError, PlanError

F64 = {"dtype": torch.float64}


def burgers(u: Tensor) -> Tensor:
    rate = torch.zeros_like(u)
    rate[1:-1] = u[2:] - 2 * u[1:-1] + u[:-2] - u[1:-1] * (u[2:] - u[:-2])
    return rate


def arrowhead(x: Tensor) -> Tensor:
    return torch.cat(((x * x).sum()[None], x[1:].sin() * x[0]))


def chain(x: Tensor) -> Tensor:
    return ((x[1:] - x[:-1] ** 2) ** 2).sum()


def tree(arguments: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    return {"out": arguments["a"][index] * arguments["b"]}


def net(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 37.0, **F64).reshape(6, 6))
        self.register_buffer("mask", torch.ones(6, 6, **F64).tril(-1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * self.mask) @ x


def point(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), **F64)


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "sparse": (burgers, (point(40),), {}),
    "both": (arrowhead, (point(200),), {}),
    "batch": (net(8, 9, 7), (point(64, 8),), {}),
    "samples": (net(8, 9, 7), (point(5, 8),), {"batch_dim": 0}),
    "split": (net(150, 40, 6, 50, 140), (point(150),), {}),
    "dense": (net(20, 30, 10), (point(20),), {}),
    "constant": (lambda x: 2 * x.flip(0), (point(30),), {}),
    "hessian": (chain, (point(40),), {"quantity": "hessian"}),
    "diagonal": (burgers, (point(40),), {"quantity": "diagonal"}),
    "mask": (Masked(), (point(6),), {}),
    "sorted": (lambda x: x.sort().values ** 2, (point(20),), {}),
    "tree": (tree, ({"a": point(9), "b": point(3)}, torch.tensor([0, 2, 7])), {}),
    "second": (torch.mul, (point(9), point(9)), {"argnums": 1}),
    "budget": (net(60, 40, 50), (point(60),), {"memory": 10**7}),
    "complex": (lambda z: z * z.conj(), (torch.complex(point(4), point(4)),), {}),
}


def saved(path: Path, name: str) -> tuple[pf.Plan, Callable[..., Any], tuple[Any, ...]]:
    f, args, how = CASES[name]
    plan = pf.plan(f, *args, **how)
    plan.save(path)
    return plan, f, args


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.plan"


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a structure is looked for or coloured."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("worked out again")

    monkeypatch.setattr(derivatives, "Detector", refuse)
    for name in ("by_rows", "by_columns", "by_both", "star", "acyclic", "diagonal"):
        monkeypatch.setattr(strategies, name, refuse)


class TestBackAgain:
    @pytest.mark.parametrize("name", CASES)
    def test_the_same_decision(self, name: str, path: Path, request: pytest.FixtureRequest):
        plan, f, args = saved(path, name)
        request.getfixturevalue("no_search")
        again = pf.load_plan(path, f)
        assert str(again) == str(plan)
        assert repr(again) == repr(plan)
        assert again._repr_html_() == plan._repr_html_()
        assert (again.passes, again.jvps, again.vjps) == (plan.passes, plan.jvps, plan.vjps)
        assert (again.nnz, again.chunk, again.cost) == (plan.nnz, plan.chunk, plan.cost)
        J, expected = again(*args), plan(*args)
        ask = "diagonal" if name == "diagonal" else "matrix"
        torch.testing.assert_close(getattr(J, ask)(), getattr(expected, ask)())
        assert str(J.plan) == str(plan)

    @pytest.mark.usefixtures("no_search")
    def test_at_another_point_and_again(self, path: Path):
        path.write_bytes(_WRITTEN)
        plan = pf.load_plan(path, burgers)
        for k in range(3):
            x = (k + 1) * point(40)
            torch.testing.assert_close(plan(x).matrix(), loop_jacobian(burgers, x))

    def test_is_settled_once(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        path.write_bytes(_WRITTEN)
        plan = pf.load_plan(path, burgers)
        plan(point(40)), plan(point(40))
        monkeypatch.setattr(pf.Plan, "linearise", lambda *_: pytest.fail("a tape was made"))
        monkeypatch.setattr(recalling, "_recognised", lambda *_: pytest.fail("settled again"))
        torch.testing.assert_close(plan(-point(40)).matrix(), loop_jacobian(burgers, -point(40)))

    def test_saved_again(self, path: Path):
        plan, f, _ = saved(path, "both")
        pf.load_plan(path).save(path)
        assert str(pf.load_plan(path, f)) == str(plan)

    def test_for_jacobian_and_hessian(self, path: Path):
        _, f, (x,) = saved(path, "hessian")
        loaded = pf.load_plan(path)
        H = pf.hessian(f, x, plan=loaded)
        assert H.plan.passes == loaded.passes
        torch.testing.assert_close(H.matrix(), pf.hessian(f, x, plan="loop").matrix())
        assert H.plan(x).shape == (40, 40)
        with pytest.raises(PlanError, match="the quantity hessian, got jacobian"):
            pf.jacobian(f, x, plan=loaded)

    def test_gradients(self, path: Path):
        plan, f, args = saved(path, "batch")
        parameters = list(f.parameters())  # type: ignore[attr-defined]
        found, expected = (
            torch.autograd.grad(p(*args).fro_norm(), parameters, allow_unused=True)
            for p in (pf.load_plan(path, f), plan)
        )
        for one, other in zip(found, expected, strict=True):
            if other is not None:
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)

    def test_no_function(self, path: Path):
        plan, _, (x,) = saved(path, "sparse")
        bare = pf.load_plan(path)
        assert str(bare) == str(plan)
        assert bare.pattern.same_as(plan.pattern)
        with pytest.raises(PlanError, match=r"the function burgers.*load_plan\(path, burgers\)"):
            bare(x)
        torch.testing.assert_close(
            pf.jacobian(burgers, x, plan=bare).matrix(), loop_jacobian(burgers, x)
        )

    def test_no_pickle(self, path: Path):
        saved(path, "both")
        with np.load(path, allow_pickle=False) as archive:
            assert all(archive[name].dtype != object for name in archive.files)
            json.loads(archive["header"].tobytes())


def _written(f: Callable[..., Any], *args: Any) -> bytes:
    """A plan from before the tests, when structure could be looked for."""
    with tempfile.TemporaryDirectory() as folder:
        pf.plan(f, *args).save(f"{folder}/p")
        return Path(f"{folder}/p").read_bytes()


_WRITTEN = _written(burgers, point(40))


class TestMadeAnew:
    """Where the function is not the one that was planned for, numbers are right all the same."""

    @pytest.mark.parametrize(
        "other",
        [
            lambda u: u.flip(0) * u,
            lambda u: burgers(u) + u.roll(7),
            lambda u: burgers(u) * u.sum(),
            lambda u: burgers(u.flip(0)),
            net(40, 40),
        ],
    )
    def test_another_function(self, other: Callable[[Tensor], Tensor], path: Path):
        saved(path, "sparse")
        plan, x = pf.load_plan(path, other), point(40)
        for k in range(2):
            expected = loop_jacobian(other, (k + 1) * x)
            torch.testing.assert_close(plan((k + 1) * x).matrix(), expected)

    def test_the_same_ops_elsewhere(self, path: Path):
        """Slices like those that were planned for, but of other places: verification tells."""

        def near(x: Tensor) -> Tensor:
            return x[1:21] * x[:20]

        def far(x: Tensor) -> Tensor:
            return x[20:] * x[5:25]

        pf.plan(near, point(40)).save(path)
        x = point(40)
        J = pf.load_plan(path, far)(x)
        torch.testing.assert_close(J.matrix(), loop_jacobian(far, x))
        assert not J.plan.pattern.same_as(pf.load_plan(path).pattern)

    def test_another_waist(self, path: Path):
        saved(path, "split")
        other, x = net(150, 40, 9, 50, 140), point(150)
        J = pf.load_plan(path, other)(x)
        torch.testing.assert_close(J.matrix(), loop_jacobian(other, x))

    def test_another_mask(self, path: Path):
        _, _, (x,) = saved(path, "mask")
        other = Masked()
        other.mask.fill_(1.0)
        J = pf.load_plan(path, other)(x)
        assert J.plan.nnz == 36
        torch.testing.assert_close(J.matrix(), other.weight.detach())

    def test_a_mask_that_changes_after_the_first_use(self, path: Path):
        _, f, (x,) = saved(path, "mask")
        plan = pf.load_plan(path, f)
        assert plan(x).plan.nnz == 15
        kept = f.mask.clone()  # type: ignore[attr-defined]
        try:
            f.mask.fill_(1.0)  # type: ignore[attr-defined]
            torch.testing.assert_close(plan(x).matrix(), f.weight.detach())  # type: ignore[attr-defined]
        finally:
            f.mask.copy_(kept)  # type: ignore[attr-defined]

    def test_other_indices(self, path: Path):
        _, f, (arguments, _) = saved(path, "tree")
        index = torch.tensor([1, 1, 8])
        found = pf.load_plan(path, f)(arguments, index).dense()["out"]["a"]
        expected = torch.func.jacrev(lambda a: f({**arguments, "a": a}, index)["out"])(
            arguments["a"]
        )
        torch.testing.assert_close(found, expected)

    def test_another_order(self, path: Path):
        _, f, (x,) = saved(path, "sorted")
        plan = pf.load_plan(path, f)
        for y in (x, -x, x):
            torch.testing.assert_close(plan(y).matrix(), loop_jacobian(f, y))

    def test_another_mode(self, path: Path):
        model, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double(), point(3)
        pf.plan(model.eval(), x).save(path)
        model.train()
        J = pf.load_plan(path, model)(x)
        assert J.plan.mode != pf.load_plan(path).mode

    def test_a_transform_of_torch_func(self, path: Path):
        _, f, (x,) = saved(path, "sparse")
        plan = pf.load_plan(path, f)
        found = torch.func.grad(lambda x: plan(x).fro_norm())(x)
        expected = torch.func.grad(lambda x: torch.func.jacrev(f)(x).norm())(x)
        torch.testing.assert_close(found, expected)


class TestRefusals:
    def test_other_shapes_and_dtypes(self, path: Path):
        saved(path, "sparse")
        plan = pf.load_plan(path, burgers)
        with pytest.raises(PlanError, match=r"the input float64\[40\], got float64\[41\]"):
            plan(point(41))
        with pytest.raises(PlanError, match=r"the input float64\[40\], got float32\[40\]"):
            plan(point(40).float())

    def test_another_output(self, path: Path):
        saved(path, "sparse")
        with pytest.raises(PlanError, match=r"the output float64\[40\], got float64\[39\]"):
            pf.load_plan(path, lambda x: x[1:])(point(40))

    def test_coupled_samples(self, path: Path):
        saved(path, "samples")
        with pytest.raises(pf.errors.CouplingError):
            pf.load_plan(path, lambda x: (x - x.mean(0))[:, :7])(point(5, 8))

    def test_what_is_no_function(self, path: Path):
        saved(path, "sparse")
        with pytest.raises(InputError, match="expects a function or module f, got int"):
            pf.load_plan(path, 3)  # type: ignore[arg-type]

    def test_no_file(self, tmp_path: Path):
        with pytest.raises(LoadError, match=r"no such file; write one with plan\.save"):
            pf.load_plan(tmp_path / "nothing")

    @pytest.mark.parametrize(
        "content",
        [b"", b"hello", pickle.dumps({"header": 1}), b"PK\x03\x04 and no more", b"\x93NUMPY"],
    )
    def test_foreign_files(self, content: bytes, path: Path):
        path.write_bytes(content)
        with pytest.raises(LoadError, match=r"a file written by plan\.save.*got something else"):
            pf.load_plan(path)

    def test_other_archives(self, path: Path):
        with path.open("wb") as file:
            np.savez(file, x=np.ones(3))
        with pytest.raises(LoadError, match="got something else"):
            pf.load_plan(path)
        with path.open("wb") as file:
            np.savez(file, header=np.array({"format": "pushforward plan"}, dtype=object))
        with pytest.raises(LoadError, match="got something else"):
            pf.load_plan(path)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
    def test_truncated_files(self, share: float, path: Path):
        saved(path, "both")
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(LoadError, match="or a part of one"):
            pf.load_plan(path)

    def test_a_folder(self, tmp_path: Path):
        with pytest.raises(LoadError, match="got something else"):
            pf.load_plan(tmp_path)

    def test_later_versions(self, path: Path):
        saved(path, "both")
        edit(path, lambda header: header.update(version=99))
        with pytest.raises(LoadError, match=r"version 1 at .* got version 99; upgrade"):
            pf.load_plan(path)

    def test_other_formats(self, path: Path):
        saved(path, "both")
        edit(path, lambda header: header.update(format="recipe for soup"))
        with pytest.raises(LoadError, match="it is a 'recipe for soup'"):
            pf.load_plan(path)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda header: header.pop("domain"),
            lambda header: header["domain"].update(leaves=[]),
            lambda header: header["domain"].update(leaves=[[[3], "float64", "cpu"]]),
            lambda header: header["domain"]["leaves"][0].__setitem__(1, "Tensor"),
            lambda header: header["domain"]["leaves"][0].__setitem__(2, "toaster"),
            lambda header: header["recipe"].update(strategy="magic"),
            lambda header: header["recipe"].update(jvps="many"),
            lambda header: header["recipe"]["scheme"].update(steps=2),
            lambda header: header.update(terms=None),
            lambda header: header.update(conditions={}),
        ],
    )
    def test_damaged_headers(self, spoil: Callable[[Any], Any], path: Path):
        saved(path, "both")
        edit(path, spoil)
        with pytest.raises(LoadError, match=r"a whole plan at .* does not fit together"):
            pf.load_plan(path)

    @pytest.mark.parametrize(
        ("name", "spoil"),
        [
            ("pattern.indices", lambda a: a + 10**6),
            ("pattern.indices", lambda a: a[::-1]),
            ("pattern.indptr", lambda a: a[:-1]),
            ("coloring.source", lambda a: a + 10**6),
            ("coloring.source", lambda a: a[:-1]),
            ("coloring.source", lambda a: a - 10**6),
            ("coloring.row_colors", lambda a: a[:-1]),
            ("coloring.column_colors", lambda a: a[:-1]),
            ("ops", lambda a: a[:, :-1]),
        ],
    )
    def test_damaged_arrays(self, name: str, spoil: Callable[[Any], Any], path: Path):
        saved(path, "both")
        edit(path, arrays={name: spoil})
        with pytest.raises(LoadError, match="does not fit together"):
            pf.load_plan(path)

    def test_wrong_colours_are_found_out(self, path: Path):
        """A file that fits together and lies: products do not agree, and the plan is made anew."""
        _, f, (x,) = saved(path, "both")
        edit(path, arrays={"coloring.source": lambda a: np.zeros_like(a)})
        torch.testing.assert_close(pf.load_plan(path, f)(x).matrix(), loop_jacobian(f, x))

    def test_a_pattern_with_gaps_is_found_out(self, path: Path):
        _, f, (x,) = saved(path, "sparse")
        good = pf.load_plan(path).pattern
        with np.load(path) as archive:
            kept = {name: archive[name] for name in archive.files}
        last = good.nnz - 1
        kept["pattern.indices"], kept["coloring.source"] = (
            kept[name][:last] for name in ("pattern.indices", "coloring.source")
        )
        kept["pattern.indptr"] = kept["pattern.indptr"].clip(max=last)
        with path.open("wb") as file:
            np.savez(file, **kept)
        assert pf.load_plan(path).nnz == last
        torch.testing.assert_close(pf.load_plan(path, f)(x).matrix(), loop_jacobian(f, x))


def edit(path: Path, header: Callable[[Any], Any] = lambda _: None, arrays: Any = None) -> None:
    """Write a file again with another header or other arrays."""
    with np.load(path) as archive:
        kept = {name: archive[name] for name in archive.files}
    words = json.loads(kept["header"].tobytes())
    header(words)
    kept["header"] = np.frombuffer(json.dumps(words).encode(), np.uint8)
    for name, change in (arrays or {}).items():
        kept[name] = change(kept[name])
    with path.open("wb") as file:
        np.savez(file, **kept)
