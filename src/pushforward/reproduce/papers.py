"""The papers by the names that the command line knows them by."""

import difflib
from collections.abc import Sequence

from pushforward.errors import InputError
from pushforward.reproduce.contractive_autoencoder import PAPER as CONTRACTIVE_AUTOENCODER
from pushforward.reproduce.equilibrium import PAPER as EQUILIBRIUM
from pushforward.reproduce.gaussian_noise_injection import PAPER as GAUSSIAN_NOISE_INJECTION
from pushforward.reproduce.jacobian_regularization import PAPER as JACOBIAN_REGULARIZATION
from pushforward.reproduce.paper import Paper
from pushforward.reproduce.sensitivity import PAPER as SENSITIVITY

_ALL: tuple[Paper, ...] = (
    JACOBIAN_REGULARIZATION,
    CONTRACTIVE_AUTOENCODER,
    GAUSSIAN_NOISE_INJECTION,
    SENSITIVITY,
    EQUILIBRIUM,
)
PAPERS: dict[str, Paper] = {paper.name: paper for paper in _ALL}


def papers_named(names: Sequence[str]) -> tuple[Paper, ...]:
    """The papers in the order asked for, each once; all of them where none is named.

    Raises:
        InputError: where there is no paper of a name.
    """
    for name in names:
        if name not in PAPERS:
            raise InputError(_unknown(name))
    return tuple(PAPERS[name] for name in dict.fromkeys(names or PAPERS))


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, PAPERS, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"PAPER must be one of {', '.join(PAPERS)}; got {name!r}{hint}"
