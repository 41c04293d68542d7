"""The public contract: names, signatures, docstrings, errors, versions."""

import importlib.metadata
import inspect
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pushforward as pf

ROOT = Path(__file__).parents[1]

PUBLIC = {
    "AutoTransform",
    "Estimate",
    "Jacobian",
    "LinearOperator",
    "PathBound",
    "Pattern",
    "Plan",
    "Pushforward",
    "PushforwardError",
    "__version__",
    "aslinearoperator",
    "autograd",
    "callbacks",
    "divergence",
    "errors",
    "hessian",
    "implicit",
    "jacobian",
    "laplacian",
    "linalg",
    "load_plan",
    "logdetcheck",
    "noise_response",
    "path_bound",
    "plan",
    "regularizers",
    "sensitivity",
    "value_and_logabsdet",
}

# Positional parameters in order, then keywords; a default stands where the contract names one.
SIGNATURES: dict[str, str] = {
    "jacobian": 'f, *args, argnums=0, batch_dim=None, plan="auto", memory=None',
    "hessian": 'f, *args, argnums=0, batch_dim=None, plan="auto", memory=None',
    "plan": 'f, *example_args, argnums=0, batch_dim=None, quantity="jacobian", memory=None',
    "load_plan": "path, f=None",
    "Plan.save": "self, path",
    "aslinearoperator": "shape, push, pull",
    "divergence": "f, x, batch_dim=None",
    "laplacian": "f, x, batch_dim=None",
    "autograd.gradient": "y, x, grad_outputs=None",
    "autograd.jacobian": "y, x, batch_dim=None",
    "autograd.divergence": "y, x",
    "autograd.laplacian": "y, x",
    "autograd.laplace": "y, x",
    "linalg.logvol": "A",
    "linalg.pdet": "A, rtol=None",
    "linalg.log_pdet": "A, rtol=None",
    "value_and_logabsdet": "f, x, batch_dim=0",
    "AutoTransform": "f, inverse=None, event_dim=1",
    "Pushforward": "base, f, inverse=None",
    "logdetcheck": "transform, x",
    "noise_response": "f, x, sigma, samples=None, batch_dim=None, seed=None",
    "regularizers.JacobianPenalty": "projections=1",
    "regularizers.ContractivePenalty": "hessian_noise=None",
    "regularizers.GaussianNoise": "model, sigma, layers=None",
    "regularizers.NoisePenalty": "sigma, layers=None, loss=*",
    "sensitivity.jacobian_norm": 'model, x, of="probabilities"',
    "sensitivity.linear_regions": "model, path",
    "sensitivity.great_circle": "a, b, c, steps",
    "sensitivity.margin": "model, x, y=None",
    "sensitivity.effective_dimension": 'model, x, of="logits"',
    "sensitivity.decision_map": "model, a, b, c, resolution=100",
    "path_bound": "model, x, batch_dim=0, layers=None, rungs=*",
    "implicit.fixed_point": "f, z0",
    "implicit.spectral_radius": "f, z=None",
    "regularizers.EquilibriumPenalty": "projections=1",
    "Jacobian.dense": "self",
    "Jacobian.matrix": "self",
    "Jacobian.sparse": 'self, layout="csr"',
    "Jacobian.diagonal": "self",
    "Jacobian.trace": "self",
    "Jacobian.to_scipy": "self",
    "Jacobian.slogdet": "self",
    "Jacobian.logabsdet": "self",
    "Jacobian.logvol": "self, rtol=None",
    "Jacobian.pdet": "self, rtol=None",
    "Jacobian.log_pdet": "self, rtol=None",
    "Jacobian.fro_norm": "self",
    "Jacobian.spectral_norm": "self",
    "Jacobian.svdvals": "self, k=None",
    "Jacobian.rank": "self, rtol=None",
    "Jacobian.stable_rank": "self",
    "Jacobian.cond": "self",
    "Jacobian.explain": "self",
    "LinearOperator.push": "self, v",
    "LinearOperator.pull": "self, u",
}
ATTRIBUTES = {
    "Jacobian": ("T", "__matmul__"),
    "Plan": ("passes", "jvps", "vjps", "nnz", "pattern", "cost", "__call__", "__str__"),
    "Pattern": ("nnz", "density", "to_scipy", "plot", "blocks"),
    "PathBound": ("table", "plot", "to_dict"),
}
FIELDS = {
    "Estimate": "value stderr interval passes probes method unbiased converged seed",
    "noise.NoiseResponse": "ratio linear curvature",
    "PathBound": "log_norm rungs layers certified",
}
ERRORS = [
    error
    for _, error in inspect.getmembers(pf.errors, inspect.isclass)
    if error.__module__ == "pushforward.errors"
]


def found(path: str) -> Any:
    """``Jacobian.dense`` is ``pf.Jacobian.dense``."""
    thing: Any = pf
    for name in path.split("."):
        thing = getattr(thing, name)
    return thing


def public_callables() -> dict[str, Callable]:
    """Functions and classes of the package, of its public modules, and methods of the classes."""
    names: dict[str, Callable] = {}
    for name in pf.__all__:
        thing = getattr(pf, name)
        if isinstance(thing, ModuleType) and thing is not pf.errors:
            own = getattr(thing, "__all__", [n for n in vars(thing) if not n.startswith("_")])
            names |= {f"{name}.{n}": getattr(thing, n) for n in own if callable(vars(thing)[n])}
        elif callable(thing):
            names[name] = thing
    return {n: t for n, t in names.items() if _is_ours(t)}


def _is_ours(thing: Any) -> bool:
    return getattr(thing, "__module__", "").startswith("pushforward")


def methods() -> dict[str, Callable]:
    """Public methods that the public classes define themselves."""
    classes = {n: t for n, t in public_callables().items() if inspect.isclass(t)}
    return {
        f"{name}.{method}": function
        for name, kind in classes.items()
        for method, function in vars(kind).items()
        if inspect.isfunction(function) and not method.startswith("_")
    }


CALLABLES = public_callables()
METHODS = methods()


def test_the_public_list():
    assert set(pf.__all__) == PUBLIC
    assert all(hasattr(pf, name) for name in PUBLIC)
    assert list(pf.__all__) == sorted(pf.__all__)


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures_are_those_of_the_contract(path: str):
    """Every parameter of the contract, in its order, with its default; more may follow."""
    actual = inspect.signature(found(path)).parameters
    wanted = [part.strip() for part in SIGNATURES[path].split(",")]
    names = [part.partition("=")[0].lstrip("*") for part in wanted]
    ours = list(actual)
    assert [name for name in ours if name in names] == names
    assert ours[: len(names)] == names, "what the contract does not name comes after"
    for part in wanted:
        name, has_default, default = part.partition("=")
        if has_default and default != "*":
            assert repr(actual[name].default).replace("'", '"') == default


def test_axes_of_choice_are_keywords():
    for path in ("jacobian", "hessian", "plan"):
        parameters = inspect.signature(found(path)).parameters.values()
        chosen = [p for p in parameters if p.name not in {"f", "args", "example_args"}]
        assert all(p.kind is p.KEYWORD_ONLY for p in chosen)


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_attributes_of_the_contract(kind: str):
    assert [name for name in ATTRIBUTES[kind] if not hasattr(getattr(pf, kind), name)] == []


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_of_the_contract(kind: str):
    fields, properties = found(kind).__dataclass_fields__, vars(found(kind))
    missing = [n for n in FIELDS[kind].split() if n not in fields and n not in properties]
    assert missing == []


@pytest.mark.parametrize("name", sorted(set(CALLABLES) & set(SIGNATURES)))
def test_docstrings_say_what_when_and_how(name: str):
    """What it is, its arguments with shapes, and when it fails."""
    text = inspect.getdoc(CALLABLES[name]) or ""
    assert len(text.splitlines()) > 5, f"{name} needs a docstring"
    parameters = inspect.signature(CALLABLES[name]).parameters
    unnamed = [p for p in parameters if not re.search(rf"\b{re.escape(p)}\b", text)]
    assert not unnamed, f"the docstring of {name} does not name {unnamed}"
    assert "Raises:" in text, f"the docstring of {name} does not say when it fails"
    assert re.search(r"Args:|\(\.\.\.", text), f"the docstring of {name} gives no shapes"


@pytest.mark.parametrize("name", CALLABLES)
def test_everything_public_has_a_docstring(name: str):
    assert inspect.getdoc(CALLABLES[name]), f"{name} needs a docstring"


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_docstrings(name: str):
    assert inspect.getdoc(METHODS[name]), f"{name} needs a docstring"


@pytest.mark.parametrize("name", CALLABLES | METHODS)
def test_public_callables_are_typed(name: str):
    function = (CALLABLES | METHODS)[name]
    target = function.__init__ if inspect.isclass(function) else function
    if not inspect.isfunction(target):  # an exception, or a class without its own __init__
        return
    signature = inspect.signature(target)
    bare = [
        p.name
        for p in signature.parameters.values()
        if p.annotation is p.empty and p.name not in {"self", "cls"}
    ]
    assert not bare
    assert inspect.isclass(function) or signature.return_annotation is not signature.empty


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_errors_have_one_root(error: type[Exception]):
    assert issubclass(error, pf.PushforwardError)
    assert error.__doc__
    assert error is pf.PushforwardError or error.__name__.endswith("Error")
    tree = inspect.getdoc(pf.errors) or ""
    assert error.__name__ in tree, "the tree in the docstring of errors.py lacks it"


def test_the_whole_library_raises_its_own_errors():
    """No bare ValueError, TypeError, RuntimeError or assert on what users hand in."""
    built_in = re.compile(r"^\s*raise (ValueError|TypeError|RuntimeError|Exception)\(", re.M)
    guilty = [
        f"{path.name}: {match.group().strip()}"
        for path in (ROOT / "src" / "pushforward").rglob("*.py")
        for match in built_in.finditer(path.read_text())
    ]
    assert not guilty


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pf.__version__ == project["version"] == importlib.metadata.version("pushforward")
    citation = ROOT / "CITATION.cff"
    if citation.exists():
        assert f"version: {pf.__version__}" in citation.read_text().replace('"', "")


def test_run_time_requirements_are_torch_and_numpy():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=~!\[ ]", each)[0] for each in project["dependencies"]}
    assert names == {"torch", "numpy"}
    assert not any("<" in each for each in project["dependencies"]), "a floor, no cap"


def test_typed_marker_is_shipped():
    assert (ROOT / "src" / "pushforward" / "py.typed").exists()
