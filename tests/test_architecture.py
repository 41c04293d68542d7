"""Imports run strictly downwards, run time needs torch and numpy alone, internals have one home."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "pushforward"

# Lowest first. A package counts as one layer: its modules import one another freely, in no cycle.
ORDER = (
    "errors",
    "state",
    "purity",
    "work",
    "boundary",
    "estimate",
    "linalg",
    "composites",
    "meter",
    "program",
    "lowrank",
    "operators",
    "tape",
    "evaluations",
    "pattern",
    "passes",
    "coloring",
    "structure",
    "compressed",
    "circumstances",
    "factors",
    "problems",
    "formats",
    "checks",
    "autograd",
    "path",
    "callbacks",
    "strategies",
    "planning",
    "building",
    "costs",
    "explaining",
    "saving",
    "plans",
    "jacobians",
    "memory",
    "recalling",
    "derivatives",
    "density",
    "differential",
    "loading",
    "noise",
    "implicit",
    "regularizers",
    "sensitivity",
    "__init__",
    "report",
    "reproduce",
    "cli",
)
RUN_TIME = {"torch", "numpy", "pushforward", *sys.stdlib_module_names}
APPLICATIONS = {"report", "reproduce", "cli"}
# composites names the ops that it replaces, whatever torch calls them.
HOMES_OF_INTERNALS = {"tape", "purity", "composites"}
# Modules of torch that carry an underscore and yet are the documented way to something.
DOCUMENTED = ("torch.utils._pytree", "torch.utils._python_dispatch")


@dataclass(frozen=True)
class Import:
    """One import: what is imported, from which module, and whether at module level."""

    importer: str
    target: str
    line: int
    at_top: bool


def module_name(path: Path, root: Path = ROOT) -> str:
    """``passes.py`` is ``pushforward.passes``; a package is its ``__init__``."""
    parts = path.relative_to(root).with_suffix("").parts
    named = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
    return ".".join(("pushforward", *named))


def imports_of(source: str, importer: str, is_package: bool = False) -> list[Import]:
    """All imports of a module, in whatever form and wherever they stand."""
    tree = ast.parse(source)
    top = _nodes_run_on_import(tree)
    found = []
    for node in ast.walk(tree):
        for target in _targets(node, importer, is_package):
            found.append(Import(importer, target, node.lineno, node in top))  # noqa: PERF401
    return found


def _nodes_run_on_import(tree: ast.Module) -> set[ast.AST]:
    """Everything outside of functions: what runs, or is type-checked, on import."""
    found: set[ast.AST] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        found.add(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))
    return found


def _targets(node: ast.AST, importer: str, is_package: bool) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute(node.module or "", node.level, importer, is_package)
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and _imports_by_name(node.func):
        constants = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        for name in constants:
            dots = len(name) - len(name.lstrip("."))
            yield _absolute(name.lstrip("."), dots, importer, is_package)


def _imports_by_name(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in {"import_module", "__import__"}


def _absolute(name: str, level: int, importer: str, is_package: bool) -> str:
    """``from ..a import b`` inside ``pushforward.report.html`` starts at ``pushforward``."""
    if level == 0:
        return name
    parts = importer.split(".")
    base = parts[: len(parts) - level + (1 if is_package else 0)]
    return ".".join([*base, *([name] if name else [])])


def layer_of(module: str) -> str:
    """The layer that a module of the library belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def modules(root: Path = ROOT) -> dict[str, list[Import]]:
    """Every module of the library with its imports."""
    return {
        module_name(path, root): imports_of(
            path.read_text(), module_name(path, root), path.name == "__init__.py"
        )
        for path in sorted(root.rglob("*.py"))
    }


def internal(target: str, known: set[str]) -> str | None:
    """The module of the library that an import reaches, or None if it reaches out of it."""
    parts = target.split(".")
    if parts[0] != "pushforward":
        return None
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in known:
            return name
    return "pushforward.__init__"


def upward(graph: dict[str, list[Import]]) -> list[str]:
    """Imports that do not run strictly downwards."""
    wrong = []
    for module, found in graph.items():
        for each in found:
            target = internal(each.target, set(graph))
            if target is not None and not _below(target, module):
                wrong.append(f"{module}:{each.line} imports {each.target}")
    return wrong


def _below(target: str, module: str) -> bool:
    low, high = layer_of(target), layer_of(module)
    return low == high if low == high else ORDER.index(low) < ORDER.index(high)


def cycles(graph: dict[str, list[Import]]) -> list[str]:
    """Modules that reach themselves."""
    known = set(graph)
    edges = {m: {internal(e.target, known) for e in found} - {None} for m, found in graph.items()}
    return [module for module in graph if module in _reachable(module, edges)]


def _reachable(start: str, edges: dict) -> set[str]:
    seen: set[str] = set()
    pending = list(edges[start])
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending.extend(edges.get(module, ()))
    return seen


def foreign(graph: dict[str, list[Import]]) -> list[str]:
    """Imports at module level of what run time may not need."""
    return [
        f"{module}:{each.line} imports {each.target}"
        for module, found in graph.items()
        for each in found
        if layer_of(module) not in APPLICATIONS
        and each.at_top
        and each.target.split(".")[0] not in RUN_TIME
    ]


def torch_internals(source: str) -> list[str]:
    """Dotted names under torch with a part that starts with an underscore."""
    names = [_dotted(node) for node in ast.walk(ast.parse(source))]
    names += [each.target for each in imports_of(source, "pushforward.somewhere")]
    return sorted({name for name in names if _is_internal(name)})


def _dotted(node: ast.AST) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _is_internal(name: str) -> bool:
    parts = name.split(".")
    private = parts[0] == "torch" and any(p.startswith("_") and p != "__version__" for p in parts)
    return private and not name.startswith(DOCUMENTED)


GRAPH = modules()
PATHS = {module_name(path): path for path in ROOT.rglob("*.py")}


def test_every_module_has_a_layer():
    unlisted = {layer_of(module) for module in GRAPH} - set(ORDER)
    assert not unlisted, f"enter {sorted(unlisted)} into ORDER, where they belong"


def test_imports_run_downwards():
    assert upward(GRAPH) == []


def test_no_module_imports_itself_in_a_circle():
    assert cycles(GRAPH) == []


def test_run_time_needs_torch_and_numpy_alone():
    assert foreign(GRAPH) == []


@pytest.mark.parametrize("module", GRAPH)
def test_internals_of_torch_have_one_home(module: str):
    if layer_of(module) in HOMES_OF_INTERNALS:
        return
    found = torch_internals(PATHS[module].read_text())
    assert not found, f"{module} uses {found}; move it to {sorted(HOMES_OF_INTERNALS)}"


def test_files_stay_short():
    long = {
        str(path.relative_to(ROOT)): count
        for path in ROOT.rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 500
    }
    assert not long, f"one subject a file: {long}"


UPWARD = {
    "import a.b": "import pushforward.jacobians",
    "import a.b as c": "import pushforward.jacobians as j",
    "from a.b import c": "from pushforward.jacobians import Jacobian",
    "from a import b": "from pushforward import jacobians",
    "from . import b": "from . import jacobians",
    "from .b import c": "from .jacobians import Jacobian",
    "star": "from .jacobians import *",
    "inside a function": "def f():\n    from pushforward.jacobians import Jacobian",
    "inside a method": "class A:\n    def f(self):\n        import pushforward.jacobians",
    "inside a try": "try:\n    import pushforward.jacobians\nexcept ImportError:\n    pass",
    "for types only": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from pushforward.jacobians import Jacobian"
    ),
    "import_module": "import importlib\nimportlib.import_module('pushforward.jacobians')",
    "import_module, relative": (
        "from importlib import import_module\nimport_module('.jacobians', __package__)"
    ),
    "__import__": "__import__('pushforward.jacobians')",
    "the whole package": "import pushforward",
    "among others": "import torch, pushforward.jacobians",
}


@pytest.mark.parametrize("source", UPWARD.values(), ids=UPWARD)
def test_the_check_sees_every_form_of_import(source: str):
    graph = {
        "pushforward.tape": imports_of(source, "pushforward.tape"),
        "pushforward.jacobians": [],
        "pushforward.__init__": [],
    }
    assert len(upward(graph)) >= 1


def test_the_check_resolves_relative_imports_in_packages():
    deep = imports_of("from ..cli import main", "pushforward.report.html")
    assert [each.target for each in deep] == ["pushforward.cli.main"]
    own = imports_of("from .html import page", "pushforward.report", is_package=True)
    assert [each.target for each in own] == ["pushforward.report.html.page"]


def test_the_check_lets_downward_imports_pass():
    source = "from pushforward.errors import ShapeError\nfrom pushforward import boundary"
    graph = {
        "pushforward.tape": imports_of(source, "pushforward.tape"),
        "pushforward.errors": [],
        "pushforward.boundary": [],
    }
    assert upward(graph) == []


def test_the_check_sees_circles():
    graph = {
        "pushforward.report.a": imports_of("from .b import x", "pushforward.report.a"),
        "pushforward.report.b": imports_of("from . import a", "pushforward.report.b"),
    }
    assert cycles(graph) == list(graph)


FOREIGN = {
    "scipy": "import scipy.sparse",
    "in a class body": "class A:\n    import matplotlib",
    "under a condition": "if True:\n    from rich import print",
}


@pytest.mark.parametrize("source", FOREIGN.values(), ids=FOREIGN)
def test_the_check_sees_foreign_packages(source: str):
    assert foreign({"pushforward.tape": imports_of(source, "pushforward.tape")})
    inside = "def f():\n" + "\n".join(f"    {line}" for line in source.splitlines())
    assert not foreign({"pushforward.tape": imports_of(inside, "pushforward.tape")})


INTERNALS = {
    "attribute": "import torch\ntorch._C._functorch.maybe_get_level()",
    "import": "from torch._functorch import vmap",
    "submodule": "import torch.testing._internal",
    "name": "from torch.autograd.functional import _as_tuple",
}


@pytest.mark.parametrize("source", INTERNALS.values(), ids=INTERNALS)
def test_the_check_sees_internals_of_torch(source: str):
    assert torch_internals(source)


def test_the_check_lets_documented_names_pass():
    assert not torch_internals("from torch.utils import _pytree\nimport torch\ntorch.__version__")
