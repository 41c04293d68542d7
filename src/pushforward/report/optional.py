"""Packages that only the report needs, asked for where they are used."""

import importlib
from types import ModuleType

from pushforward.errors import MissingDependencyError

_DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}


def require(name: str) -> ModuleType:
    """The module ``name``, or an error that says how to install it.

    Raises:
        MissingDependencyError: where the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingDependencyError(
            f"this needs the package {_DISTRIBUTIONS.get(package, package)!r}, which cannot be "
            f"imported ({error}); install it with: pip install 'pushforward[cli]'"
        ) from error
