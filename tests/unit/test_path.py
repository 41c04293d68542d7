"""`path_bound` against dense Jacobians of the whole map and of every step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from oracles import loop_jacobian
from pushforward.errors import (
    CouplingError,
    DifferentiationError,
    InputError,
    ShapeError,
)
from pushforward.path import path_bound
from pushforward.path.bound import RUNGS

F = nn.functional


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Gated(nn.Module):
    def __init__(self, entering: int, leaving: int) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(entering, leaving), nn.Linear(entering, leaving)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * self.sigmoid(self.gate(x))


class Concatenating(nn.Module):
    def __init__(self, width: int, more: int) -> None:
        super().__init__()
        self.a, self.act = nn.Linear(width, more), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.act(self.a(x))], dim=-1)


class Tied(nn.Module):
    """One layer and one activation, called again and again."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.layer, self.act, self.times = nn.Linear(width, width), nn.Tanh(), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.act(self.layer(x))
        return x


class Functional(nn.Module):
    """Functions before, between and after the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.b(F.softplus(self.a(x**2 + x))), dim=-1)


class Recurrent(nn.Module):
    """An LSTM, which returns a tuple of tuples, and its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        return self.head(states[:, -1])


class Attending(nn.Module):
    """Attention takes one tensor three times, and calls none of its own submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(x)
        return self.head(self.attention(h, h, h)[0]).mean(dim=1)


class FromInput(nn.Module):
    """A path that leads around everything."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


class InPlaceSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        out = self.b(h)
        out += h
        out *= 2
        return self.act(out)


class Everything(nn.Module):
    """No submodules at all."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x).cumsum(-1)


@dataclass(frozen=True)
class Net:
    """A model, its input, and the names and maps of its steps."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    names: list[str]
    maps: Callable[[nn.Module], list[Callable[[Tensor], Tensor]]]


def chain(*factories: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*[factory() for factory in factories])


NETS = {
    "mlp": Net(
        chain(lambda: nn.Linear(4, 6), nn.ReLU, lambda: nn.Linear(6, 3)),
        (4,),
        ["0", "1", "2"],
        list,
    ),
    "in place": Net(
        chain(
            lambda: nn.Linear(4, 6), lambda: nn.ReLU(inplace=True), lambda: nn.Linear(6, 5), nn.ELU
        ),
        (4,),
        ["0", "1", "2", "3"],
        list,
    ),
    "nested": Net(
        chain(
            lambda: nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Tanh(), nn.Identity())),
            lambda: nn.Linear(5, 3),
        ),
        (4,),
        ["0.0", "0.1.0", "0.1.1", "1"],
        lambda net: [net[0][0], net[0][1][0], net[0][1][1], net[1]],
    ),
    "residual": Net(
        chain(lambda: nn.Linear(3, 4), lambda: Residual(4), nn.Tanh, lambda: nn.Linear(4, 2)),
        (3,),
        ["0", "1", "2", "3"],
        list,
    ),
    "gated": Net(chain(lambda: Gated(3, 5), lambda: nn.Linear(5, 2)), (3,), ["0", "1"], list),
    "concatenating": Net(
        chain(lambda: Concatenating(3, 2), lambda: Concatenating(5, 2), lambda: nn.Linear(7, 2)),
        (3,),
        ["0", "1", "2"],
        list,
    ),
    "tied": Net(
        lambda: Tied(3, 3),
        (3,),
        ["layer", "act", "layer:2", "act:2", "layer:3", "act:3"],
        lambda net: [net.layer, net.act] * 3,
    ),
    "functional": Net(
        Functional,
        (5,),
        ["a", "b"],
        lambda net: [
            lambda x: net.a(x**2 + x),
            lambda h: F.log_softmax(net.b(F.softplus(h)), dim=-1),
        ],
    ),
    "recurrent": Net(
        Recurrent,
        (5, 3),
        ["lstm", "head"],
        lambda net: [lambda x: net.lstm(x)[0], lambda h: net.head(h[:, -1])],
    ),
    "attending": Net(
        Attending,
        (5, 3),
        ["inside", "attention", "head"],
        lambda net: [
            net.inside,
            lambda h: net.attention(h, h, h)[0],
            lambda h: net.head(h).mean(dim=1),
        ],
    ),
    "from input": Net(FromInput, (4,), ["FromInput"], lambda net: [net]),
    "in-place sum": Net(
        InPlaceSum,
        (4,),
        ["a", "act", "b … act:2"],
        lambda net: [net.a, net.act, lambda h: net.act(2 * (h + net.b(h)))],
    ),
    "everything": Net(Everything, (4,), ["Everything"], lambda net: [net]),
    "transformer": Net(
        lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True).eval(),
        (3, 4),
        ["self_attn … norm1", "linear1 … norm2"],
        lambda net: [
            lambda x: net.norm1(x + net._sa_block(x, None, None)),
            lambda h: net.norm2(h + net._ff_block(h)),
        ],
    ),
    "convolutions": Net(
        chain(
            lambda: nn.Conv2d(2, 3, 3, padding=1),
            lambda: nn.BatchNorm2d(3).eval(),
            lambda: nn.ReLU(inplace=True),
            lambda: nn.MaxPool2d(2),
            nn.Flatten,
            lambda: nn.Linear(12, 3),
        ),
        (2, 4, 4),
        ["0", "1", "2", "3", "4", "5"],
        list,
    ),
}


def norm_of(f: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """log ||J||_F sample by sample, from rows of plain gradients."""
    jacobians = [loop_jacobian(lambda v: f(v[None])[0], sample) for sample in batch]
    return torch.stack([jacobian.norm().log() for jacobian in jacobians])


def built(name: str) -> tuple[nn.Module, Tensor, Net]:
    torch.manual_seed(0)
    net = NETS[name]
    model = net.model().double()
    return model, torch.randn(3, *net.shape, dtype=torch.float64), net


@pytest.mark.parametrize("name", NETS)
def test_gains_and_norms_are_those_of_dense_jacobians(name):
    model, x, net = built(name)
    path = path_bound(model, x)
    assert [row.name for row in path.layers] == net.names
    maps, places = net.maps(model), [x]
    for part in maps:
        places.append(part(places[-1].clone()).detach())

    def rest_from(first):
        def rest(h):
            for part in maps[first:]:
                h = part(h.clone())
            return h

        return rest

    behind = [norm_of(rest_from(i), places[i]) for i in range(len(maps))]
    behind_next = [*behind[1:], torch.zeros(3, dtype=torch.float64)]
    torch.testing.assert_close(path.log_norm, norm_of(model, x))
    for row, part, place, here, after in zip(
        path.layers, maps, places, behind, behind_next, strict=False
    ):
        torch.testing.assert_close(row.log_gain, here - after)
        torch.testing.assert_close(row.log_fro, norm_of(lambda h, f=part: f(h.clone()), place))


@pytest.mark.parametrize("name", NETS)
def test_gains_add_up_and_norms_bound(name):
    model, x, _ = built(name)
    path = path_bound(model, x)
    total = torch.stack([row.log_gain for row in path.layers]).sum(0)
    torch.testing.assert_close(total, path.log_norm, atol=1e-10, rtol=0)
    norms = torch.stack([row.log_fro for row in path.layers])
    torch.testing.assert_close(norms.sum(0), path.rungs["frobenius"], atol=1e-10, rtol=0)
    for place, row in enumerate(path.layers):
        torch.testing.assert_close(row.log_bound_so_far, norms[place:].sum(0))
    assert list(path.rungs) == ["frobenius", "mixed", "spectral", "segments"]
    assert all((bound >= path.log_norm).all() for bound in path.rungs.values())
    assert path.certified == dict.fromkeys(path.rungs, True)
    assert path.labels == dict.fromkeys(path.rungs, "certified")
    assert path.seed is None
    assert all(row.exact and row.spectral_label == "certified" for row in path.layers)
    assert all((row.log_spectral <= row.log_fro).all() for row in path.layers)


@pytest.mark.parametrize("name", NETS)
def test_one_map_is_a_batch_of_one(name):
    model, x, _ = built(name)
    whole, batch = path_bound(model, x[:1], batch_dim=None), path_bound(model, x[:1])
    assert whole.log_norm.shape == ()
    torch.testing.assert_close(whole.log_norm, batch.log_norm[0])
    torch.testing.assert_close(whole.rungs["frobenius"], batch.rungs["frobenius"][0])
    assert [row.log_gain.shape for row in whole.layers] == [()] * len(batch.layers)


def test_one_row_per_call_of_a_leaf_module():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(5)])
    path = path_bound(model, torch.randn(2, 3))
    assert len(path.layers) == 10
    assert [row.name for row in path.layers][:3] == ["0.0", "0.1", "1.0"]


def test_float32_is_measured_in_float64():
    model, x, _ = built("mlp")
    path = path_bound(model.float(), x.float())
    assert path.log_norm.dtype == torch.float64
    torch.testing.assert_close(path.log_norm, norm_of(model.double(), x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("scale", "depth"), [(1e-3, 1000), (1.0, 300), (1e3, 100)])
def test_no_depth_underflows_or_overflows(scale, depth):
    layers = [nn.Linear(4, 4, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
        with torch.no_grad():
            layer.weight *= scale
    path = path_bound(nn.Sequential(*layers), torch.zeros(2, 4), rungs="frobenius")
    expected = depth * math.log(scale) + math.log(2)
    assert torch.allclose(path.log_norm, torch.tensor(expected).double(), atol=1e-2)
    total = torch.stack([row.log_gain for row in path.layers]).sum(0)
    torch.testing.assert_close(total, path.log_norm, atol=1e-10, rtol=1e-14)


@pytest.mark.parametrize("name", ["residual", "convolutions", "recurrent"])
@pytest.mark.parametrize("limit", ["BLOCK_BYTES", "CACHE_BYTES", "ELSEWHERE_BYTES"])
@pytest.mark.parametrize("scale", [1.0, 1e-160])
def test_blocks_of_any_size_agree(name, limit, scale, monkeypatch):
    """Also step by step, which norms near underflow ask for."""
    model, x, _ = built(name)
    with torch.no_grad():
        list(model.parameters())[-2].mul_(scale)
    whole = path_bound(model, x)
    monkeypatch.setattr(f"pushforward.path.pull.{limit}", {} if limit == "CACHE_BYTES" else 1)
    parts = path_bound(model, x)
    torch.testing.assert_close(parts.log_norm, whole.log_norm)
    torch.testing.assert_close(parts.rungs, whole.rungs)


def test_ops_that_vmap_cannot_take_go_one_by_one():
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            assert float(gradient.abs().sum()) >= 0  # reads a value, which vmap refuses
            return 2 * x * gradient

    class Module(nn.Module):
        def forward(self, x):
            return Reading.apply(x)

    model = nn.Sequential(nn.Linear(3, 4), Module(), nn.Linear(4, 9)).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(path_bound(model, x).log_norm, norm_of(model, x))


def test_a_model_that_is_recorded_twice_has_its_steps_once():
    """Ops whose derivatives in torch are lacking are recorded again as composites."""

    class LogDet(nn.Module):
        def forward(self, x):
            return torch.linalg.slogdet(x.unflatten(-1, (3, 3)))[1]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), LogDet()).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    path = path_bound(model, x)
    assert [row.name for row in path.layers] == ["0", "1"]
    torch.testing.assert_close(path.log_norm, norm_of(model, x))


def test_float32_norms_that_nearly_underflow():
    layers = [nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.fill_(1e-16)
    path = path_bound(nn.Sequential(*layers), torch.zeros(1, 3))
    expected = torch.tensor([math.log(9 * 3 * 1e-48) - math.log(3) + math.log(3)]).double()
    torch.testing.assert_close(path.log_norm, expected, atol=1e-5, rtol=0)


def test_output_trees_count_whole():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

        def forward(self, x):
            h = self.body(x)
            return {"left": self.left(h), "right": (self.right(h), 7)}

    model, x = Two().double(), torch.randn(3, 3, dtype=torch.float64)
    path = path_bound(model, x)
    assert [row.name for row in path.layers] == ["body", "left … right"]
    expected = norm_of(lambda v: torch.cat([model(v)["left"], model(v)["right"][0]], dim=-1), x)
    torch.testing.assert_close(path.log_norm, expected)


def test_numbers_and_complex_leaves_count_whole():
    class Two(nn.Module):
        def forward(self, x):
            return x.sum(1), torch.complex(x, x**2)

    x = torch.randn(4, 3, dtype=torch.float64)
    for batch_dim in (0, None):
        path = path_bound(Two(), x, batch_dim=batch_dim)
        squares = (4 * x**2 + 2).sum(-1) if batch_dim == 0 else (4 * x**2 + 2).sum()
        torch.testing.assert_close(path.log_norm, squares.log() / 2)
        torch.testing.assert_close(path.layers[0].log_fro, path.log_norm)


def test_complex_tensors_on_the_way():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.outer(torch.fft.ifft(torch.fft.fft(self.inner(x)) ** 2).real)

    model, x = Fourier().double(), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(path_bound(model, x).log_norm, norm_of(model, x))


def test_time_first_layout_is_merged_even_where_it_looks_like_a_batch():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.RNN(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.body(x.transpose(0, 1))[0].transpose(0, 1))

    torch.manual_seed(0)
    model, x = TimeFirst().double(), torch.randn(5, 5, 3, dtype=torch.float64)
    path = path_bound(model, x)
    assert [row.name for row in path.layers] == ["TimeFirst"]
    torch.testing.assert_close(path.log_norm, norm_of(model, x))


# Zero Jacobians


def dead_network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[2].bias.fill_(-100)
    return model


def test_a_zero_jacobian_is_minus_infinity_and_blames_one_step():
    path = path_bound(dead_network(), torch.randn(2, 3))
    assert (path.log_norm == -torch.inf).all()
    gains = torch.stack([row.log_gain for row in path.layers])
    assert not gains.isnan().any()
    assert (gains[3] == -torch.inf).all()
    assert (gains[:3] == 0).all()
    assert gains[4].isfinite().all()
    assert (path.rungs["frobenius"] == -torch.inf).all()
    assert "the Jacobian is zero" in path.table()
    assert path.to_dict()["log_norm"]["mean"] == "-inf"
    path.plot()


def test_dead_samples_do_not_touch_live_ones():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.fill_(2.0), model[0].bias.zero_(), model[2].weight.fill_(3.0)
    path = path_bound(model, torch.tensor([[-1.0], [1.0]]))
    assert path.log_norm.tolist() == [-math.inf, pytest.approx(math.log(6))]


@pytest.mark.parametrize("frozen", [True, False])
def test_an_output_that_ignores_the_input(frozen):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.weight.expand(len(x), 2) * 2

    model = Constant().requires_grad_(not frozen)
    path = path_bound(model, torch.randn(3, 4))
    assert [row.name for row in path.layers] == ["Constant"]
    assert (path.log_norm == -torch.inf).all()
    assert (path.rungs["frobenius"] == -torch.inf).all()


def test_detached_parts_have_derivative_zero():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x) + self.b(x.detach())

    model, x = Half().double(), torch.randn(2, 3, dtype=torch.float64)
    expected = model.a.weight.norm().log().detach().expand(2)
    torch.testing.assert_close(path_bound(model, x).log_norm, expected)


# Modules that are wrapped


def wrapped(kind: str) -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    match kind:
        case "plain":
            return nn.Sequential(inner, nn.Linear(4, 2))
        case "compiled":
            return nn.Sequential(torch.compile(inner, backend="eager"), nn.Linear(4, 2))
        case "compiled whole":
            return torch.compile(nn.Sequential(inner, nn.Linear(4, 2)), backend="eager")
        case "compiled in place":
            inner.compile(backend="eager")
            return nn.Sequential(inner, nn.Linear(4, 2))
        case "data parallel":
            return nn.Sequential(inner, nn.DataParallel(nn.Linear(4, 2)))
        case "checkpointed":
            return nn.Sequential(Checkpointed(inner), nn.Linear(4, 2))
        case "traced":
            return nn.Sequential(torch.jit.trace(inner, torch.ones(1, 3)), nn.Linear(4, 2))
        case "scripted":
            return nn.Sequential(torch.jit.script(inner), nn.Linear(4, 2))
    return torch.jit.script(nn.Sequential(inner, nn.Linear(4, 2)))


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore:TorchScript")
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("compiled", ["0.0", "0.1", "1"]),
        ("compiled whole", ["0.0", "0.1", "1"]),
        ("compiled in place", ["0.0", "0.1", "1"]),
        ("data parallel", ["0.0", "0.1", "1.module"]),
        ("checkpointed", ["0.inner.0", "0.inner.1", "1"]),
        ("traced", ["0", "1"]),
        ("scripted", ["1"]),
        ("scripted whole", ["(scripted)"]),
    ],
)
def test_wrapped_modules(kind, names):
    model, x = wrapped(kind), torch.randn(2, 3)
    path = path_bound(model, x)
    assert [row.name for row in path.layers] == names
    expected = norm_of(wrapped("plain"), x).double()
    torch.testing.assert_close(path.log_norm, expected, atol=1e-5, rtol=0)
    if kind.startswith("compiled"):
        assert len(path_bound(model, x, layers=["0"]).layers) == 2


# layers=


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("1", ["0 … 1", "2 … 3"]),
        (["0", "2"], ["0", "1 … 2", "3"]),
        ("[02]", ["0", "1 … 2", "3"]),
        ("*", ["0", "1", "2", "3"]),
        ("3", ["Sequential"]),
    ],
)
def test_layers_coarsen(layers, names):
    model, x, _ = built("residual")
    path, fine = path_bound(model, x, layers=layers), path_bound(model, x)
    assert [row.name for row in path.layers] == names
    torch.testing.assert_close(path.log_norm, fine.log_norm)
    assert (path.rungs["frobenius"] <= fine.rungs["frobenius"] + 1e-12).all()
    assert (path.rungs["frobenius"] >= path.log_norm).all()


def test_containers_coarsen():
    model, x, _ = built("nested")
    path = path_bound(model, x, layers=["0"])
    assert [row.name for row in path.layers] == ["0", "1"]


def test_functions_at_the_end_of_a_container():
    class Closing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return torch.tanh(self.inner(x))

    path = path_bound(nn.Sequential(Closing(), nn.Linear(3, 2)), torch.ones(2, 3), layers="*")
    assert [row.name for row in path.layers] == ["0.inner", "0", "1"]


def test_what_cannot_be_separated_is_merged_and_said():
    model, x, _ = built("residual")
    path = path_bound(model, x, layers=["1.a", "2"])
    assert [row.name for row in path.layers] == ["0 … 2", "3"]
    assert path.notes == ("merged, since other paths lead around them: 1.a",)
    assert "other paths lead around them: 1.a" in path.table()


def test_layers_that_match_nothing():
    model, x, _ = built("residual")
    with pytest.raises(InputError, match=r"got '1\.c', which matches none; near it are 1\.[ab]"):
        path_bound(model, x, layers=["0", "1.c"])
    with pytest.raises(InputError, match="the model has no submodules"):
        path_bound(Everything(), torch.randn(2, 3), layers="conv*")
    for nothing in ([], [3]):
        with pytest.raises(InputError, match="layers expects names of modules or globs, got"):
            path_bound(model, x, layers=nothing)


# rungs=


def test_rungs_by_name():
    model, x, _ = built("mlp")
    everything = path_bound(model, x, rungs=(*RUNGS, "sampled"), seed=0)
    for name in everything.rungs:
        path = path_bound(model, x, rungs=name, seed=0)
        assert set(path.rungs) == set(path.certified) == set(path.labels) == {name}
        torch.testing.assert_close(path.rungs[name], everything.rungs[name])
    twice = path_bound(model, x, rungs=["spectral", "frobenius", "spectral"])
    assert list(twice.rungs) == ["spectral", "frobenius"]
    with pytest.raises(InputError, match=r"names among frobenius, mixed, .* got 'nuclear'"):
        path_bound(model, x, rungs=["nuclear"])


def test_the_frobenius_rung_alone_needs_no_spectral_norms():
    model, x, _ = built("mlp")
    path = path_bound(model, x, rungs="frobenius")
    assert all(row.log_spectral is None and row.spectral_label is None for row in path.layers)
    assert path.passes < path_bound(model, x).passes


def test_gains_alone():
    model, x, _ = built("residual")
    path, full = path_bound(model, x, rungs=()), path_bound(model, x)
    assert path.rungs == {}
    assert path.certified == {}
    assert path.passes < full.passes
    torch.testing.assert_close(path.log_norm, full.log_norm)
    assert all(row.log_fro is None and row.log_bound_so_far is None for row in path.layers)
    assert path.to_dict()["layers"][0]["log_fro"] is None
    assert len(path.plot().axes) == 1
    assert "frobenius" not in path.table()


# Estimates


def test_steps_beyond_the_budget_are_estimated_and_say_so():
    model, x, _ = built("residual")
    exact = path_bound(model, x)
    path = path_bound(model, x, exact_passes=2, seed=3)
    assert path.certified == {name: name != "frobenius" for name in path.rungs}
    assert path.labels["frobenius"] == "estimate"
    assert all((path.rungs[name] >= path.log_norm).all() for name in ("mixed", "spectral"))
    assert path.seed == 3
    assert [row.exact for row in path.layers] == [True, False, True, True]
    assert "estimate from 64 random cotangents in 1; raise exact_passes=" in path.notes[0]
    assert "estimate of a bound, not certified" in path.table()
    assert "(estimate)" in repr(path)
    difference = path.layers[1].log_fro - exact.layers[1].log_fro
    assert (difference.abs() < 0.3).all()
    again = path_bound(model, x, exact_passes=2, seed=3)
    assert torch.equal(again.rungs["frobenius"], path.rungs["frobenius"])
    fresh = path_bound(model, x, exact_passes=2)
    assert isinstance(fresh.seed, int)
    replay = path_bound(model, x, exact_passes=2, seed=fresh.seed)
    assert torch.equal(replay.rungs["frobenius"], fresh.rungs["frobenius"])


def test_the_estimate_is_unbiased():
    model, x, _ = built("gated")
    exact = path_bound(model, x).layers[0].log_fro
    runs = [
        path_bound(model, x, exact_passes=0, seed=s).layers[0].log_fro.mul(2).exp()
        for s in range(60)
    ]
    mean, spread = torch.stack(runs).mean(0), torch.stack(runs).std(0) / math.sqrt(60)
    assert ((mean - (2 * exact).exp()).abs() < 4 * spread).all()


# What is refused


def test_what_couples_samples_is_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(CouplingError, match=r"through native_batch_norm; call .eval\(\)"):
        path_bound(model, torch.randn(5, 3))
    assert len(path_bound(model.eval(), torch.randn(5, 3)).layers) == 3
    assert len(path_bound(model.train(), torch.randn(5, 3), batch_dim=None).layers) == 3


@pytest.mark.parametrize("samples", [2, 5, 83, 200])
@pytest.mark.parametrize("distance", [1, 7, 82])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_any_coupling_is_seen(samples, distance, dtype):
    class Neighbour(nn.Module):
        def forward(self, x):
            other = x.roll(distance, 0) * (torch.arange(len(x)) == len(x) - 1)[:, None]
            return torch.sin(x) + other.to(x.dtype)

    model, x = nn.Sequential(nn.Identity(), Neighbour()), torch.randn(samples, 3, dtype=dtype)
    if distance % samples:
        with pytest.raises(CouplingError, match="they influence each other through"):
            path_bound(model, x, rungs=())
    else:
        path_bound(model, x, rungs=())


def test_coupling_behind_a_dead_layer_does_not_matter():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    nn.init.zeros_(model[2].weight)
    path = path_bound(model, torch.randn(5, 3))
    assert (path.log_norm == -torch.inf).all()
    assert len(path.layers) == 1


def test_refused_arguments():
    with pytest.raises(InputError, match=r"path_bound expects an nn\.Module, got builtin_function"):
        path_bound(torch.sin, torch.randn(2, 3))
    with pytest.raises(InputError, match="path_bound expects one input tensor, got list"):
        path_bound(nn.Linear(2, 2), [1.0])
    with pytest.raises(ShapeError, match=r"holds something, got shape \(0, 2\).*one sample"):
        path_bound(nn.Linear(2, 2), torch.zeros(0, 2))
    with pytest.raises(ShapeError, match=r"holds something, got shape \(0,\)$"):
        path_bound(nn.Identity(), torch.zeros(0), batch_dim=None)
    with pytest.raises(InputError, match="batch_dim expects None or 0, got 1"):
        path_bound(nn.Linear(2, 2), torch.zeros(2, 2), batch_dim=1)


def test_infinite_derivatives_are_refused_by_name():
    class Root(nn.Module):
        def forward(self, x):
            return x.clamp(min=0).sqrt() * x.sqrt().clamp(max=0)

    model = nn.Sequential(nn.Identity(), Root(), nn.Identity())
    with pytest.raises(DifferentiationError, match=r"become (NaN|inf) in step '1'"):
        path_bound(model, torch.zeros(2, 3))


def test_infinite_weights_are_refused_by_name():
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.inf
    with pytest.raises(DifferentiationError, match=r"become (NaN|inf) in step '1'"):
        path_bound(model, torch.ones(2, 2))


def test_an_infinite_norm_that_the_output_does_not_see_is_refused_by_name():
    class Root(nn.Module):
        def forward(self, x):
            return torch.cat([x, x.sqrt()], dim=-1)

    class First(nn.Module):
        def forward(self, x):
            return torch.where(torch.tensor([True, False]), x, x.detach())

    model = nn.Sequential(nn.Identity(), Root(), First())
    with pytest.raises(DifferentiationError, match=r"become (NaN|inf) in step '1'"):
        path_bound(model, torch.tensor([[0.0]]))


# Nothing stays behind


def test_nothing_stays_behind():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    x = torch.randn(4, 3, requires_grad=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, values = torch.get_rng_state(), x.detach().clone()
    path_bound(model, x, batch_dim=None)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, values)
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_hooks_go_when_the_model_fails():
    class Failing(nn.Module):
        def forward(self, x):
            raise ArithmeticError("no")

    model = nn.Sequential(nn.Linear(2, 2), Failing())
    with pytest.raises(ArithmeticError):
        path_bound(model, torch.zeros(1, 2))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_may_catch_the_failure_of_a_part():
    class Failing(nn.Module):
        def forward(self, x):
            raise ArithmeticError("no")

    class Trying(nn.Module):
        def __init__(self):
            super().__init__()
            self.broken, self.spare = nn.Sequential(Failing()), nn.Linear(2, 2)

        def forward(self, x):
            try:
                return self.broken(x)
            except ArithmeticError:
                return self.spare(x)

    path = path_bound(nn.Sequential(Trying(), nn.Tanh()), torch.zeros(1, 2))
    assert [row.name for row in path.layers] == ["0.spare", "1"]


def test_gradients_may_be_off_and_inference_mode_on():
    model, x, _ = built("residual")
    expected = path_bound(model, x).log_norm
    assert not expected.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(path_bound(model, x).log_norm, expected)
    with torch.inference_mode():
        torch.testing.assert_close(path_bound(model, x).log_norm, expected)
    model.requires_grad_(False)
    torch.testing.assert_close(path_bound(model, x).log_norm, expected)


def test_dropout_in_training_draws_one_mask():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Dropout(0.5), nn.Identity()).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    path = path_bound(model, x)
    torch.testing.assert_close(
        path.log_norm, torch.stack([row.log_gain for row in path.layers]).sum(0)
    )
    kept = model(x) != 0  # the same mask: the global state was put back
    expected = torch.stack([(2 * model[0].weight[mask]).norm().log() for mask in kept])
    torch.testing.assert_close(path.log_norm, expected.detach())
