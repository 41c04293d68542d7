"""GaussianNoise, and NoisePenalty against plain autograd in float64 and against measured noise."""

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pushforward as pf
from pushforward.regularizers import GaussianNoise, NoisePenalty
from pushforward.regularizers.sites import Sites

SIZES = 4, 6, 5, 3


def mlp(activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    a, b, c, d = SIZES
    layers = nn.Linear(a, b), activation(), nn.Linear(b, c), activation(), nn.Linear(c, d)
    return nn.Sequential(*layers).double()


class Functional(nn.Module):
    """The same with functions, one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()[0::2]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layers[0](x))
        h = self.layers[1](h)
        F.relu(h, inplace=True)
        return self.layers[2](h)


class Residual(nn.Module):
    """One module that is called twice, and a branch that adds in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.act = nn.ReLU(inplace=True)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        out = self.b(h)
        out += h
        return self.head(self.act(out))


class Heads(nn.Module):
    """A dict of outputs, two of them made by activations."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor | None]:
        h = self.body(x).relu()
        y = self.head(h)
        return {"p": y.sigmoid(), "q": torch.tanh(y).unflatten(1, (2, 3)), "h": h * 1, "n": None}


def batch(count: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, 4, dtype=torch.float64), torch.randint(3, (count,))


def visited(model: nn.Module, layers: str | list[str] | None, *args: Tensor) -> list[str]:
    names: list[str] = []

    def visit(name: str, value: Tensor) -> Tensor:
        names.append(f"{name} {tuple(value.shape)}")
        return value.clone()

    with Sites(0.1, layers).visiting(model, visit):
        model(*args)
    return names


def test_noise_goes_to_the_input_and_behind_activations():
    x, _ = batch()
    expected = ["input (3, 4)", "activation (3, 6)", "activation (3, 5)"]
    assert visited(mlp(), None, x) == expected
    assert visited(mlp(nn.ReLU), None, x) == expected
    assert visited(Functional(), None, x) == expected
    assert visited(Residual(), None, x) == ["input (3, 4)", *["activation (3, 4)"] * 2]
    assert visited(mlp(), ["input", "1"], x) == ["input (3, 4)", "1 (3, 6)"]
    assert visited(mlp(), "?", x) == [f"{i} (3, {n})" for i, n in enumerate((6, 6, 5, 5, 3))]
    assert visited(nn.Linear(4, 3).double(), None, x) == ["input (3, 4)"]


@pytest.mark.parametrize(
    "module", [nn.ReLU6, nn.GELU, nn.SiLU, nn.LogSigmoid, nn.PReLU, nn.Softplus]
)
def test_activations_of_torch_are_found(module: Callable[[], nn.Module]):
    model = nn.Sequential(nn.Linear(4, 6), module(), nn.Linear(6, 3))
    assert visited(model, None, torch.randn(2, 4)) == ["input (2, 4)", "activation (2, 6)"]


class Swish(nn.Module):
    """An activation of the user's own, made of one of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_an_activation_of_ones_own_is_one_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Swish(), Shift(), nn.Linear(6, 3))
    x = torch.randn(2, 4)
    seen: list[Tensor] = []
    with Sites(0.1, None).visiting(model, lambda _, value: seen.append(value) or value.clone()):
        model(x)
    torch.testing.assert_close(seen[1], F.silu(model[0](x)))
    assert len(seen) == 2


class Given(nn.Module):
    """Layers whose weights come from elsewhere; no parameters of its own."""

    def forward(self, x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights[:-1]:
            x = F.relu(F.linear(x, weight))
        return x @ weights[-1]


class Pieces(nn.Module):
    """An activation that returns several tensors, one of them computed by none."""

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        a, b, c = x.chunk(3, 1)
        return a.relu(), {"b": b.tanh(), "c": c * 2}


class Reused(nn.Module):
    """A hidden activation that is used by a layer, and after it."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        h = torch.tanh(x)
        y = h @ weight
        h[:, 0] = 1.0
        return F.silu(y) + h


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.relu()
        raise ValueError("not today")


class Outer(nn.Module):
    """A module of one's own that calls another, which is not its child."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = [inner]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x) * 2


class Owner(nn.Module):
    """A network with a module without parameters in it, or the same without."""

    def __init__(self, body: nn.Module, inline: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.weights = nn.ParameterList([torch.randn(6, 6) for _ in range(3)])
        self.body = [body] if inline else body
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        body = self.body[0] if isinstance(self.body, list) else self.body
        x = self.first(x)
        if isinstance(body, Given):
            return self.head(body(x, *self.weights))
        if isinstance(body, Reused):
            return self.head(body(x, self.weights[0]))
        if isinstance(body, Pieces):
            a, rest = body(x)
            return self.head(torch.cat([a, rest["b"], rest["c"]], 1))
        try:
            return self.head(body(x))
        except ValueError:
            return self.head(F.gelu(x))


@pytest.mark.parametrize("kind", [Given, Pieces])
def test_modules_without_parameters_that_are_more_than_one_function(kind: type[nn.Module]):
    model, inline, (x, _) = Owner(kind()), Owner(kind(), inline=True), batch()
    assert len(visited(model, None, x)) == 3
    assert visited(model, None, x) == visited(inline, None, x)
    with GaussianNoise(model, 0.3, seed=0), GaussianNoise(inline, 0.3, seed=0):
        torch.testing.assert_close(model(x), inline(x))
    inline.load_state_dict(model.state_dict())
    inline.first, inline.head, inline.weights = model.first, model.head, model.weights
    penalty = NoisePenalty(0.3, projections="exact")
    assert_same(penalty(model, x), penalty(inline, x), model)


def test_what_a_layer_used_has_noise_ever_after():
    model, (x, _) = Owner(Reused()), batch()
    assert visited(model, None, x) == ["input (3, 4)", *["activation (3, 6)"] * 2]
    seen: list[Tensor] = []
    with Sites(0.1, None).visiting(model, lambda _, value: seen.append(value + 1) or seen[-1]):
        y = model(x)
    h = model.first(x + 1).tanh() + 1
    result = F.silu(h @ model.weights[0]) + torch.cat([torch.ones_like(h[:, :1]), h[:, 1:]], 1)
    torch.testing.assert_close(y, model.head(result + 1))


def test_an_error_inside_that_the_model_catches():
    model, (x, _) = Owner(Failing()), batch()
    assert visited(model, None, x) == ["input (3, 4)", "activation (3, 6)"]
    assert visited(model, None, x) == ["input (3, 4)", "activation (3, 6)"]


def test_modules_of_ones_own_in_each_other():
    swish = Swish()
    model = nn.Sequential(swish, nn.Linear(4, 6), Outer(swish), nn.Linear(6, 3))
    expected = ["input (2, 4)", "activation (2, 4)", "activation (2, 6)"]
    assert visited(model, None, torch.randn(2, 4)) == expected


ZERO = torch.zeros(())
RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda x: x.clamp(min=0),
    "clamp, by position": lambda x: torch.clamp(x, 0),
    "clamp_min": lambda x: torch.clamp_min(x, 0.0),
    "clamp to six": lambda x: x.clip(0, 6),
    "clamp, in place": lambda x: x.clamp_(min=ZERO),
    "maximum": lambda x: torch.maximum(x, ZERO),
    "maximum, the other way": lambda x: torch.max(torch.zeros_like(x), x),
    "fmax": lambda x: x.fmax(ZERO),
    "expit": torch.special.expit,
    "by keyword": lambda x: F.relu(input=x),
}
NO_RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp to an interval": lambda x: x.clamp(-1, 1),
    "clamp away from zero": lambda x: x.clamp(min=1e-6),
    "clamp from above": lambda x: x.clamp(max=0),
    "integers": lambda x: x + x.long().clamp(min=0),
    "maximum of two": lambda x: torch.maximum(x, -x),
    "largest": lambda x: x.max(1, keepdim=True)[0] + x,
    "largest of all": lambda x: torch.max(x) + x,
    "under vmap": lambda x: torch.vmap(lambda v: torch.maximum(v, v.detach()))(x),
}


class Calling(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.ones(())), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.scale * x)


@pytest.mark.parametrize("name", [*RELUS, *NO_RELUS])
def test_relus_by_other_names(name: str):
    functions = RELUS | NO_RELUS
    model = nn.Sequential(nn.Linear(4, 6), Calling(functions[name]), nn.Linear(6, 4), nn.Tanh())
    count = len(visited(model, None, torch.randn(2, 4)))
    assert count == (3 if name in RELUS else 2)


def test_a_module_that_is_registered_twice_has_two_names():
    (x, _), act = batch(), nn.Tanh()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 5), act, nn.Linear(5, 3)).double()
    assert visited(model, "3", x) == ["3 (3, 5)"] * 2
    assert visited(model, ["1", "3"], x) == ["1 (3, 5)"] * 2
    assert visited(model, "[34]", x) == ["3 (3, 5)", "3 (3, 5)", "4 (3, 3)"]
    one, other = (NoisePenalty({n: 0.3}, loss="mse", projections="exact") for n in ("1", "3"))
    assert_same(one(model, x), other(model, x), model)
    with pytest.raises(pf.errors.InputError, match="'5', which matches none"):
        GaussianNoise(model, 0.1, ["3", "5"])


def test_slopes_are_no_sign_of_working_in_place():
    model = nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.ELU(1.0), nn.Linear(6, 3))
    assert len(visited(model, None, torch.randn(2, 4))) == 3
    h = torch.randn(2, 6)
    model = nn.Sequential(Elu(), nn.Tanh(), nn.Linear(6, 3))
    kept = h.clone()
    visited(model, None, h)
    assert torch.equal(h, kept)


class Elu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.elu(x, 1.0)


def test_one_context_inside_of_another():
    model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).double()
    x, _ = batch()
    quiet = {"input": 0.0, "1*": 1.0}
    with GaussianNoise(model, quiet), GaussianNoise(model, quiet):
        assert torch.equal(model(x), model(x))


def test_noise_has_its_size_and_place():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.zeros(40000)
    with GaussianNoise(model, 0.3, ["0"], seed=0):
        noise = model(x)
    assert noise.std() == pytest.approx(0.3, rel=0.02)
    assert abs(noise.mean()) < 0.01
    with GaussianNoise(model, {"input": 0.3, "0": 0.4}, seed=0) as noisy:
        assert noisy(x).std() == pytest.approx(0.5, rel=0.02)
    with GaussianNoise(model, {"in*": 0.0, "*": 0.4}, ["input", "0"], seed=0):
        assert model(x).std() == pytest.approx(0.4, rel=0.02)


def test_nothing_that_a_model_returns_gets_noise_unless_it_is_named():
    model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).double()
    x, _ = batch()
    with GaussianNoise(model, {"*": 1.0}):
        hidden = model(x)
    assert not torch.equal(hidden, model(x))  # the linear layer is hidden
    with GaussianNoise(model, 1.0, "1*"):
        assert torch.equal(model(x), model(x))
    with GaussianNoise(model, 1.0, "1"):
        assert not torch.equal(model(x), model(x))
    in_place = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)).double()
    with GaussianNoise(in_place, {"input": 0.0, "1*": 1.0}):
        assert torch.equal(in_place(x), in_place(x))


def set_first(y: Tensor) -> Tensor:
    y[:, 0] = 7
    return y


def written_through_a_view(y: Tensor) -> Tensor:
    view = y.view(-1, 2, 2)
    view *= 2
    view[:, 0] += 1
    return y


def doubled_by_itself(y: Tensor) -> Tensor:
    y += y
    return y


def viewed_before(y: Tensor) -> Tensor:
    view = y.view(-1)
    F.relu_(y)
    return view


def part_in_place(y: Tensor) -> Tensor:
    y[:, :3].relu_()
    return y


def out_of_sight(y: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        y += 1
    return y


# What follows a last layer, (B, 4): in place, moved, copied.
ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda z: F.gelu(z).add_(1.5),
    "scale": lambda z: torch.tanh(z).mul_(2.5),
    "set": lambda z: set_first(z.sigmoid()),
    "through a view": lambda z: written_through_a_view(z.sigmoid()),
    "by itself": lambda z: doubled_by_itself(z.sigmoid()),
    "view, then in place": lambda z: F.softplus(z).view(-1, 4, 1).mul_(2).squeeze(-1),
    "in place on a view": lambda z: F.relu(z.unsqueeze(-1), inplace=True).squeeze(-1),
    "in place on a view, whole returned": lambda z: part_in_place(z),
    "permuted": lambda z: z.view(-1, 2, 2).sigmoid().permute(0, 2, 1).reshape(-1, 4),
    "clone": lambda z: z.sigmoid().clone(),
    "transposed": lambda z: z.t().sigmoid().t().contiguous(),
    "property": lambda z: z.sigmoid().mT.mT,
    "flip": lambda z: z.tanh().flip(1),
    "cast": lambda z: z.tanh().float(),
    "columns": lambda z: z.tanh()[:, [0, 2, 1]],
    "cat": lambda z: torch.cat([z.tanh(), torch.stack([z[:, 0].sigmoid(), z[:, 1]], 1)], 1),
    "chunk": lambda z: z.tanh().chunk(2, 1)[1],
    "twice in place": lambda z: F.relu_(z.tanh().add_(0.1)),
    "view kept, then in place": lambda z: viewed_before(z.tanh()),
}


class Ending(nn.Module):
    """One hidden layer, and what comes behind the last one."""

    def __init__(self, end: Callable[[Tensor], Tensor], act: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.b = nn.Linear(4, 6), act(), nn.Linear(6, 4)
        self.end = end
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.act(self.a(x))
        return self.end(self.b(self.hidden))


@pytest.mark.parametrize("how", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("end", ENDS)
def test_a_last_activation_may_be_moved_copied_and_written_to(
    end: str, how: Callable[[], AbstractContextManager]
):
    model, (x, _) = Ending(ENDS[end]), batch()
    with how(), GaussianNoise(model, 0.0):
        torch.testing.assert_close(model(x), model.end(model.b(model.act(model.a(x)))))
    with how(), GaussianNoise(model, 0.5, seed=0):
        noisy = model(x)
    hidden = model.hidden
    assert not torch.allclose(hidden, model.act(model.a(x)))
    if end not in ("twice in place", "view kept, then in place"):  # a hidden one comes before
        torch.testing.assert_close(noisy, model.end(model.b(hidden)))


WITHOUT_WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda z: z.tanh() * 2.5,
    "set": lambda z: z.sigmoid()[:, 1:],
    "flip": lambda z: z.tanh().flip(1),
    "in place on a view": lambda z: z.relu(),
}


@pytest.mark.parametrize("end", WITHOUT_WRITES)
def test_penalties_of_models_that_end_in_place(end: str):
    model, (x, _) = Ending(ENDS[end]), batch()
    value = NoisePenalty(0.3, loss="mse", projections="exact")(model, x)
    total = torch.zeros((), dtype=x.dtype)
    for b in range(len(x)):
        point = x[b : b + 1].clone().requires_grad_()
        hidden = model.act(model.a(point))
        for place in (point, hidden):
            # Without writes, because tanh and sigmoid save what would be overwritten.
            for scalar in WITHOUT_WRITES[end](model.b(hidden)).flatten():
                (row,) = torch.autograd.grad(scalar, place, create_graph=True)
                total = total + row.square().sum()
    assert_same(value, 0.045 * total / 3, model)


class Block(nn.Module):
    """A pre-activation block, which adds its input in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.c2, self.in_place = nn.Linear(4, 4), nn.Linear(4, 4), in_place
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out = self.c2(F.relu(self.c1(F.relu(x))))
        if self.in_place:
            out += x
            return out
        return out + x


def test_a_skip_that_is_added_in_place():
    x, _ = batch()
    one, other = Block(True), Block(False)
    for layers in ("c*", None, "*", "c2"):
        with GaussianNoise(one, 0.0, layers):
            torch.testing.assert_close(one(x), other(x))
    with (
        GaussianNoise(one, {"c1": 0.3, "c*": 0.4}, seed=0),
        GaussianNoise(other, 0.3, ["c1"], seed=0),
    ):
        torch.testing.assert_close(one(x), other(x))  # what is returned gets noise from no glob
    other.c1, other.c2 = one.c1, one.c2
    penalty = NoisePenalty({"c1": 0.3, "c*": 0.4}, loss="mse", projections="exact")
    hidden = NoisePenalty(0.3, ["c1"], loss="mse", projections="exact")
    assert_same(penalty(one, x), hidden(other, x), one)


def test_a_write_that_nobody_saw_keeps_the_noise():
    model, (x, _) = Ending(lambda z: out_of_sight(z.sigmoid())), batch()
    with GaussianNoise(model, 0.0):
        noisy = model(x)
    torch.testing.assert_close(noisy, model(x))


@pytest.mark.parametrize("how", [torch.inference_mode, torch.enable_grad])
def test_random_writes_are_not_repeated(how: Callable[[], AbstractContextManager]):
    model, (x, _) = Ending(lambda z: F.dropout(z.sigmoid(), 0.5, inplace=True)), batch()
    torch.manual_seed(0)
    expected, state = model(x), torch.get_rng_state()
    torch.manual_seed(0)
    with how(), GaussianNoise(model, 0.0, seed=0):
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(torch.get_rng_state(), state)


class Slicing(nn.Module):
    """Returns a view with gaps."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, ::2]


def test_a_view_with_gaps_that_is_written_to():
    model = nn.Sequential(nn.Linear(4, 6), Slicing()).double()
    holder, (x, _) = Holding(model), batch()
    expected = holder(x)
    with GaussianNoise(holder, {"net.0": 0.0, "net*": 1.0}):
        torch.testing.assert_close(holder(x), expected)


class Holding(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        y += 1
        return y.contiguous().view(-1, 3, 1)


def test_several_are_written_to_at_once():
    def end(z: Tensor) -> Tensor:
        one, other = z.sigmoid(), z.tanh()
        torch._foreach_add_([one, other], 1.0)
        return torch.cat([one, other], 1)

    def beside(z: Tensor) -> Tensor:
        one, other = z.sigmoid(), torch.zeros_like(z)
        torch._foreach_add_([one, other], 1.0)
        return torch.cat([one, other], 1)

    x, _ = batch()
    model = Ending(end)
    with GaussianNoise(model, 0.3, seed=0):
        noisy = model(x)
    torch.testing.assert_close(noisy, model.end(model.b(model.hidden)))
    model = Ending(beside)
    expected = model(x)
    with GaussianNoise(model, 0.0):
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("end", ["permuted", "add", "set", "through a view", "in place on a view"])
def test_inside_inference_mode(end: str):
    model, (x, _) = Ending(ENDS[end]), batch()
    with torch.inference_mode(), GaussianNoise(model, 0.3, seed=0):
        noisy = model(x)
        torch.testing.assert_close(noisy, model.end(model.b(model.hidden)))


def test_globs_of_modules_inside_each_other():
    model, (x, _) = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))).double(), batch()
    quiet = {"0.0": 0.0, "*": 1.0}
    with GaussianNoise(model, quiet):
        assert torch.equal(model(x), model(x))


def test_outputs_in_a_dict_stay_clean():
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(3, 4)
    clean = model(x)
    with torch.no_grad(), GaussianNoise(model, 0.5, seed=0):
        noisy = model(x)
    expected = model.head(noisy["h"])
    torch.testing.assert_close(noisy["p"], expected.sigmoid())
    torch.testing.assert_close(noisy["q"], expected.tanh().unflatten(1, (2, 3)))
    assert not torch.allclose(noisy["h"], clean["h"])
    assert noisy["n"] is None


def test_in_place_activations_get_noise_too():
    x, _ = batch()
    model = Functional()
    with GaussianNoise(model, 0.1):
        y = model(x)
        assert not torch.equal(y, model(x))
    y.sum().backward()  # no saved value was overwritten
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_it_leaves_no_trace_even_after_an_error():
    model, (x, _) = mlp(), batch()
    clean, state = model(x), torch.get_rng_state()
    hooks = copy.deepcopy(
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    )
    noise = GaussianNoise(model, 0.1, seed=1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), noise:
        model(torch.zeros(2, 9, dtype=torch.float64))
    with noise, noise:
        model(x)
    assert torch.equal(model(x), clean)
    assert torch.equal(F.relu(x), x.clamp_min(0))
    assert torch.equal(torch.get_rng_state(), state)
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert after == hooks


@pytest.mark.parametrize("layers", ["typo", ["input", "typo"], ["0", "input", "typo"]])
def test_a_misspelt_name_leaves_no_trace(layers: str | list[str]):
    model, (x, _) = mlp(), batch()
    with pytest.raises(pf.errors.InputError, match="'typo'"):
        GaussianNoise(model, 0.1, layers)
    with pytest.raises(pf.errors.InputError, match="'typo'"):
        NoisePenalty(0.1, layers)(model, x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(x), model(x))


class Unhookable(nn.Module):
    """An activation of one's own that takes no hook after its evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()

    def register_forward_hook(self, *_: object, **__: object) -> object:
        raise RuntimeError("no hooks here")


def test_hooks_go_where_one_of_them_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), Unhookable(), nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="no hooks here"):
        GaussianNoise(model, 0.1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_same_in_training_and_evaluation():
    model, (x, _) = mlp(), batch()
    with GaussianNoise(model.train(), 0.1, seed=2):
        training = model(x)
    with GaussianNoise(model.eval(), 0.1, seed=2):
        assert torch.equal(model(x), training)
    assert not model.training


def test_seeds():
    model, (x, _) = mlp(), batch()
    torch.manual_seed(3)
    with GaussianNoise(model, 0.1):
        drawn = [model(x), model(x)]
    torch.manual_seed(3)
    with GaussianNoise(model, 0.1):
        again = [model(x), model(x)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not torch.equal(*drawn)
    generator = torch.Generator().manual_seed(5)
    with GaussianNoise(model, 0.1, generator=generator), GaussianNoise(model, 0.0, seed=5):
        one = model(x)
    with GaussianNoise(model, 0.1, seed=5):
        assert torch.equal(model(x), one)


def test_the_input_may_be_a_keyword():
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(3, 4)
    with GaussianNoise(model, 0.5, "input"):
        assert not torch.equal(model(x=x)["h"], model(x=x)["h"])


@pytest.mark.parametrize("layers", [None, ["linear1"]])
def test_transformers_in_evaluation_mode(layers: list[str] | None):
    """Torch has a way around the modules of a layer, which noise must not miss."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad(), GaussianNoise(layer, 0.5, layers):
        assert not torch.allclose(layer(x), layer(x))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_under_inference_mode(loss: str):
    model, (x, _) = mlp(), batch()
    penalty = NoisePenalty(0.3, loss=loss, projections="exact")
    with torch.inference_mode():
        value = penalty(model, x.clone())
    torch.testing.assert_close(value, penalty(model, x).detach())


def places(model: nn.Sequential, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and what noise would be added to, with a graph between them."""
    point = x.clone().requires_grad_()
    a = model[1](model[0](point))
    b = model[3](model[2](a))
    return model[4](b), [point, a, b]


def oracle(model: nn.Sequential, x: Tensor, sigmas: list[float], loss: str) -> Tensor:
    """1/2 sum_k sigma_k^2 tr(J_k^T H J_k), sample by sample and row by row."""
    total = torch.zeros((), dtype=x.dtype)
    for b in range(len(x)):
        z, hidden = places(model, x[b : b + 1])
        p = z[0].softmax(0)
        H = torch.diag(p) - torch.outer(p, p) if loss == "cross_entropy" else torch.eye(3).double()
        for sigma, h in zip(sigmas, hidden, strict=True):
            J = torch.stack(
                [torch.autograd.grad(out, h, create_graph=True)[0].flatten() for out in z[0]]
            )
            total = total + sigma**2 / 2 * (J.t() @ H @ J).trace()
    return total / len(x)


def full_oracle(model: nn.Sequential, x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """1/2 sigma^2 times the trace of the Hessian by noise added at each place."""
    total = torch.zeros((), dtype=x.dtype)
    shapes = [(len(x), n) for n in SIZES[:3]]
    for k, shape in enumerate(shapes):

        def loss(noise: Tensor, k: int = k) -> Tensor:
            h = x + noise if k == 0 else x
            a = model[1](model[0](h))
            a = a + noise if k == 1 else a
            b = model[3](model[2](a))
            return F.cross_entropy(model[4](b + noise if k == 2 else b), y)

        zero = torch.zeros(shape, dtype=x.dtype, requires_grad=True)
        (first,) = torch.autograd.grad(loss(zero), zero, create_graph=True)
        for i in range(first.numel()):
            (row,) = torch.autograd.grad(first.reshape(-1)[i], zero, create_graph=True)
            total = total + row.reshape(-1)[i]
    return sigma**2 / 2 * total


def assert_same(value: Tensor, expected: Tensor, model: nn.Module) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-13)
    how = {"allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad(value, [*model.parameters()], **how)
    theirs = torch.autograd.grad(expected, [*model.parameters()], **how)
    for came, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(came, wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_exact_values_and_gradients(loss: str, activation: Callable[[], nn.Module]):
    model, (x, _) = mlp(activation), batch()
    penalty = NoisePenalty(0.3, loss=loss, projections="exact")
    assert_same(penalty(model, x), oracle(model, x, [0.3] * 3, loss), model)
    named = NoisePenalty({"input": 0.1, "1": 0.0, "3": 0.5}, loss=loss, projections="exact")
    assert_same(named(model, x), oracle(model, x, [0.1, 0.0, 0.5], loss), model)


def test_full_values_and_gradients():
    model, (x, y) = mlp(), batch()
    penalty = NoisePenalty(0.3, full=True, projections="exact")
    assert_same(penalty(model, x, y), full_oracle(model, x, y, 0.3), model)


@pytest.mark.parametrize("full", [False, True])
def test_random_vectors_are_unbiased(full: bool):
    model, (x, y) = mlp(), batch()
    exact = NoisePenalty(0.3, full=full, projections="exact")(model, x, y).item()
    penalty = NoisePenalty(0.3, full=full, projections=2, seed=0)
    draws = torch.stack([penalty(model, x, y).detach() for _ in range(150)])
    assert abs(draws.mean() - exact) < 4 * draws.std() / math.sqrt(150)


def test_gradients_of_an_estimate_are_those_of_its_value():
    model, (x, y) = mlp(), batch()
    for full in (False, True):
        penalty = NoisePenalty(0.3, full=full)

        def value(weight: Tensor, full: bool = full, penalty: NoisePenalty = penalty) -> Tensor:
            names = dict(model.named_parameters()) | {"2.weight": weight}
            return penalty(_Bound(model, names), x, y, seed=1)

        assert torch.autograd.gradcheck(value, (model[2].weight,), atol=1e-7)


class _Bound(nn.Module):
    """A model with other parameters."""

    def __init__(self, model: nn.Module, names: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, self.names, (x,))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_the_penalty_is_what_noise_adds_on_average(loss: str):
    model, (x, labels) = mlp(), batch(6)
    y = labels if loss == "cross_entropy" else F.one_hot(labels, 3).double()

    def measured(sigma: float, draws: int = 60000) -> Tensor:
        def mean(z: Tensor) -> Tensor:
            if loss == "mse":
                return (z - y.repeat(draws, 1)).square().sum(1) / 2
            return F.cross_entropy(z, y.repeat(draws), reduction="none")

        many = x.repeat(draws, 1)
        with torch.no_grad(), GaussianNoise(model, sigma, seed=0):
            noisy = mean(model(many)).unflatten(0, (draws, -1)).mean(1)
        with torch.no_grad():
            return noisy - mean(model(many)).mean()

    sigma = 0.1
    gain = measured(sigma)
    error = gain.std().item() / math.sqrt(len(gain))
    full = NoisePenalty(sigma, loss=loss, full=True, projections="exact")(model, x, y).item()
    plain = NoisePenalty(sigma, loss=loss, projections="exact")(model, x).item()
    assert abs(gain.mean().item() - full) < 4 * error + 0.05 * full
    assert error < 0.05 * full
    assert plain > 0


def test_a_model_with_images_as_its_input():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    ).double()
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    penalty = NoisePenalty(0.2, "input", loss="mse", projections="exact")
    expected = 0.04 * pf.regularizers.JacobianPenalty("exact")(model, x)
    assert_same(penalty(model, x), expected, model)


def test_branches_and_modules_called_twice():
    model, (x, _) = Residual(), batch()
    value = NoisePenalty(0.2, loss="mse", projections="exact")(model, x)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(3):
        point = x[b].clone().requires_grad_()
        h = model.a(point).relu()
        later = (model.b(h) + h).relu()
        for place in (point, h, later):
            for out in model.head(later):
                (row,) = torch.autograd.grad(out, place, create_graph=True)
                total = total + row.square().sum()
    assert_same(value, 0.02 * total / 3, model)


def test_class_scores_for_many_positions():
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 1).double()
    x = torch.randn(2, 2, 4, dtype=torch.float64)
    value = NoisePenalty(0.2, "input", projections="exact")(model, x)
    flat = x.transpose(1, 2).reshape(8, 2)
    line = nn.Linear(2, 3).double()
    line.load_state_dict({"weight": model.weight[..., 0], "bias": model.bias})
    expected = NoisePenalty(0.2, "input", projections="exact")(line, flat)
    torch.testing.assert_close(value, expected)


def test_frozen_and_constant_places():
    model, (x, _) = mlp().requires_grad_(False), batch()
    frozen = NoisePenalty(0.3, ["1", "3"], projections="exact")(model, x)
    assert frozen > 0
    assert not frozen.requires_grad
    nowhere = nn.Sequential(nn.Embedding(3, 4), nn.ReLU(), nn.Linear(4, 3))
    assert NoisePenalty(0.0)(mlp(), x) == 0
    assert visited(nowhere, None, torch.tensor([1])) == ["activation (1, 4)"]


class Constant(nn.Module):
    """A place that depends on nothing, and an output that depends on no place."""

    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.act, self.uses = nn.Tanh(), uses

    def forward(self, x: Tensor) -> Tensor:
        gate = self.act(torch.ones(3, dtype=x.dtype))
        return gate.expand(len(x), 3) * 1 if self.uses else x[:, :3] * 1


def test_places_beside_the_input():
    x, _ = batch()
    beside = NoisePenalty(1.0, "act", loss="mse", projections="exact")
    assert beside(Constant(False), x) == 0
    used = beside(Constant(True), x)
    torch.testing.assert_close(used, torch.tensor(1.5).double())  # J = I, shared by all samples


def test_a_linear_loss_has_no_curvature():
    x, _ = batch()
    model = nn.Linear(4, 3).double()
    full = NoisePenalty(0.3, "input", loss="mse", full=True, projections="exact")
    expected = NoisePenalty(0.3, "input", loss="mse", projections="exact")(model, x)
    torch.testing.assert_close(full(model, x, torch.zeros(3, 3).double()), expected)


def test_batch_norm_in_training_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, _ = batch()
    before = copy.deepcopy(model.state_dict())
    point = x.clone().requires_grad_()
    rows = [torch.autograd.grad(out, point, retain_graph=True)[0] for out in model(point).flatten()]
    model.load_state_dict(before)
    expected = 0.09 / 2 * torch.stack(rows).square().sum().item() / 3
    exact = NoisePenalty(0.3, "input", loss="mse", projections="exact")
    assert exact(model, x).item() == pytest.approx(expected, rel=1e-9)
    penalty = NoisePenalty(0.3, "input", loss="mse", seed=0)
    draws = torch.stack([penalty(model, x).detach() for _ in range(300)])
    assert abs(draws.mean() - expected) < 4 * draws.std() / math.sqrt(300)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_penalties_repeat():
    model, (x, _) = mlp(), batch()
    torch.manual_seed(2)
    first = NoisePenalty(0.1)(model, x)
    torch.manual_seed(2)
    assert NoisePenalty(0.1)(model, x) == first
    assert NoisePenalty(0.1)(model, x) != first
    state = torch.get_rng_state()
    assert NoisePenalty(0.1, seed=1)(model, x) == NoisePenalty(0.1)(model, x, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def _run(sigma: object, layers: object, *args: Tensor) -> object:
    with GaussianNoise(mlp(), sigma, layers) as model:
        return model(*args)


def scripted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(model)


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "sigma": (lambda: NoisePenalty(-0.1), pf.errors.InputError, "sigma expects a finite number"),
    "sigma, no number": (lambda: NoisePenalty({"a": "b"}), pf.errors.InputError, "got 'b'"),
    "loss": (lambda: NoisePenalty(0.1, loss="hinge"), pf.errors.InputError, "got 'hinge'"),
    "no such layer": (
        lambda: GaussianNoise(mlp(), 0.1, ["1", "relu"]),
        *(pf.errors.InputError, "'relu'"),
    ),
    "no sigma for a layer": (
        lambda: GaussianNoise(mlp(), {"0": 0.1}, ["1"]),
        *(pf.errors.InputError, "none for '1'; it has 0"),
    ),
    "no module": (lambda: GaussianNoise(torch.sin, 0.1), pf.errors.InputError, "an nn.Module"),
    "scripted": (
        lambda: GaussianNoise(scripted(mlp()), 0.1),
        *(pf.errors.InputError, "got a scripted one"),
    ),
    "a layer without a tensor": (
        lambda: visited(nn.Sequential(nn.LSTM(4, 3)), "0*", torch.zeros(2, 4)),
        *(pf.errors.InputError, "got tuple from '0'; name a module inside"),
    ),
    "a layer of integers": (
        lambda: visited(nn.Sequential(nn.Flatten()), ["0"], torch.zeros(2, 4).long()),
        *(pf.errors.InputError, "got torch.int64 from '0'"),
    ),
    "an input of integers": (
        lambda: visited(nn.Embedding(3, 2), "input", torch.zeros(2).long()),
        *(pf.errors.InputError, "called with a real floating-point tensor"),
    ),
    "no activation": (
        lambda: visited(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), None, torch.zeros(2, 4)),
        *(pf.errors.InputError, "and Sequential has none; name the modules"),
    ),
    "no targets": (
        lambda: NoisePenalty(0.1, full=True)(mlp(), batch()[0]),
        *(pf.errors.InputError, r"expects targets, penalty\(model, x, y\)"),
    ),
    "targets of another shape": (
        lambda: NoisePenalty(0.1, full=True, loss="mse")(mlp(), *batch()),
        *(pf.errors.ShapeError, r"shaped like the output, \(3, 3\), got \(3,\)"),
    ),
    "no target tensor": (
        lambda: NoisePenalty(0.1, full=True, loss="mse")(mlp(), batch()[0], 3),
        *(pf.errors.ShapeError, "got int"),
    ),
    "one logit": (
        lambda: NoisePenalty(0.1)(nn.Linear(4, 1).double(), batch()[0]),
        *(pf.errors.ShapeError, "at least two classes"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_it_says_what_it_is():
    assert repr(NoisePenalty(0.1)) == "NoisePenalty(sigma=0.1, layers=None, loss='cross_entropy')"
