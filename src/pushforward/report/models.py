"""From the word MODEL on the command line to a module.

A model is code, so it runs only as the user named it: a factory in a Python file or package, or the
name of an architecture. Weights come as safetensors, which are data. A pickle is code in disguise
and takes the user's word; a ``.pt2`` archive too, since loading one unpickles what it holds even
where ``weights_only`` is asked for.
"""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.errors import LoadError, MissingDependencyError
from pushforward.report.optional import require
from pushforward.report.randomness import seeded

PICKLES = (".pt", ".pth", ".pt2", ".pkl", ".pickle", ".ckpt", ".bin")
FORMS = (
    "package.module:factory, file.py:factory, torchvision:NAME or timm:NAME "
    "(with --weights FILE.safetensors for trained weights)"
)


@dataclass(frozen=True)
class LoadedModel:
    """A module and where it comes from."""

    module: nn.Module
    name: str
    source: str


def load_model(
    spec: str, *, weights: str | None = None, trust_code: bool = False, seed: int = 0
) -> LoadedModel:
    """The module that ``spec`` names, built under ``seed``, with ``weights`` put in if given.

    Raises:
        LoadError: where there is no such model, or its code fails, or it is a pickle that was not
            trusted.
        MissingDependencyError: where it comes from a package that is not installed.
    """
    build, source = _builder(spec, trust_code)
    with seeded(seed):
        module = _module_from(build(), spec)
    if weights is None:
        return LoadedModel(module, spec, source)
    _put_weights(module, Path(weights), trust_code)
    return LoadedModel(module, spec, f"{source}, weights from {weights}")


def _builder(spec: str, trust_code: bool) -> tuple[Callable[[], object], str]:
    """How to build what ``spec`` names, and a phrase that says where it comes from."""
    prefix, _, name = spec.partition(":")
    if prefix in _LIBRARIES:
        return lambda: _LIBRARIES[prefix](name), f"{prefix}'s {name}"
    path = Path(spec)
    if path.suffix.lower() in PICKLES:
        return lambda: _unpickle(path, trust_code), f"unpickled from {spec}"
    if path.suffix.lower() == ".safetensors":
        raise LoadError(_no_architecture(spec))
    return lambda: _from_code(spec), f"built by {spec}"


def _module_from(built: object, spec: str) -> nn.Module:
    if isinstance(built, dict):
        raise LoadError(_no_architecture(spec))
    if not isinstance(built, nn.Module):
        raise LoadError(
            f"{spec} must give a torch.nn.Module, got {type(built).__name__}; return the module "
            "itself from the factory, and put its weights in with --weights"
        )
    return built


def _no_architecture(spec: str) -> str:
    return (
        f"{spec} holds weights and no architecture; name the code that builds the model and give "
        f"the file to --weights: pushforward report file.py:factory --weights {spec}"
    )


# --- code ---------------------------------------------------------------------------------------


def _from_code(spec: str) -> object:
    """What the factory returns; a module that stands there ready is taken as it is."""
    place, _, attribute = spec.rpartition(":")
    if not place or not attribute:
        raise LoadError(f"MODEL must be {FORMS}; got {spec!r}")
    is_file = place.endswith(".py")
    with _importing_from(Path(place).parent if is_file else Path.cwd()):
        namespace = _import_file(Path(place)) if is_file else _import_module(place)
        factory = _attribute(namespace, attribute, spec)
        return factory if isinstance(factory, nn.Module) else _called(factory, spec)


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let the user's code import its neighbours, as ``python file.py`` and ``python -m`` do."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise LoadError(f"there is no file {path}; MODEL must be {FORMS}")
    # A name that no package has, so that a file called math.py shadows nothing.
    name = f"_pushforward_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _user_code(f"{path} cannot be run"):
        spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    with _user_code(f"{name} cannot be imported"):
        return importlib.import_module(name)


def _attribute(namespace: ModuleType, dotted: str, spec: str) -> object:
    found: object = namespace
    for part in dotted.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise LoadError(f"{spec}: there is no {part!r} in it{hint}")
        found = getattr(found, part)
    return found


def _called(factory: object, spec: str) -> object:
    if not callable(factory):
        raise LoadError(
            f"{spec} must be a function without arguments that returns a torch.nn.Module, or a "
            f"module; got {type(factory).__name__}"
        )
    with _user_code(f"{spec} cannot be called without arguments"):
        return factory()


@contextmanager
def _user_code(complaint: str) -> Iterator[None]:
    """Turn whatever the user's code raises, even an exit, into an error that names it."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise LoadError(f"{complaint}: {type(error).__name__}: {error}") from error


# --- libraries of architectures -----------------------------------------------------------------


def _from_torchvision(name: str) -> object:
    models = _library("torchvision.models", "torchvision")
    _known(name, models.list_models(), "torchvision")
    with _user_code(f"torchvision:{name} cannot be built"):
        return models.get_model(name, weights=None)


def _from_timm(name: str) -> object:
    timm = _library("timm", "timm")
    _known(name, timm.list_models(), "timm")
    with _user_code(f"timm:{name} cannot be built"):
        return timm.create_model(name, pretrained=False)


_LIBRARIES = {"torchvision": _from_torchvision, "timm": _from_timm}


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # built for another torch, it fails in ways of its own
        raise MissingDependencyError(
            f"{package}:NAME needs {package}, which cannot be imported ({error}); "
            f"install it with: pip install {package}"
        ) from error


def _known(name: str, names: list[str], package: str) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise LoadError(f"{package} has no model called {name!r}{hint}")


# --- pickles and weights ------------------------------------------------------------------------


def _unpickle(path: Path, trust_code: bool) -> object:
    if not trust_code:
        raise LoadError(_refusal(path))
    _existing(path)
    with _user_code(f"{path} cannot be loaded"):
        if path.suffix.lower() == ".pt2":
            return torch.export.load(path).module()
        return torch.load(path, map_location="cpu", weights_only=False)


def _refusal(path: Path) -> str:
    reason = "a pickle, and loading a pickle runs whatever code it holds"
    if path.suffix.lower() == ".pt2":
        reason = (
            "an exported program, and loading one unpickles what it holds, which runs code, even "
            "where weights_only is asked for"
        )
    return (
        f"{path} is refused: it is {reason}. If you trust its author, add --trust-code; otherwise "
        "keep the weights as .safetensors and name the code: file.py:factory --weights FILE"
    )


def _existing(path: Path) -> None:
    if not path.is_file():
        raise LoadError(f"there is no file {path}")


def _put_weights(module: nn.Module, path: Path, trust_code: bool) -> None:
    state = _read_weights(path, trust_code)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise LoadError(f"the weights in {path} do not fit the model: {error}") from error


def _read_weights(path: Path, trust_code: bool) -> dict[str, Tensor]:
    if path.suffix.lower() in PICKLES:
        return _state_dict_in(_unpickle(path, trust_code), path)
    _existing(path)
    load_file = require("safetensors.torch").load_file
    with _user_code(f"{path} cannot be read as .safetensors"):
        return load_file(path)


def _state_dict_in(loaded: object, path: Path) -> dict[str, Tensor]:
    if isinstance(loaded, nn.Module):
        return loaded.state_dict()
    if not isinstance(loaded, dict):
        raise LoadError(f"{path} must hold a state dict, got {type(loaded).__name__}")
    return loaded
