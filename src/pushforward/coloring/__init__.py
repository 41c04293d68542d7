"""From a pattern to a few passes that hold all of its entries."""

from pushforward.coloring.both import by_both
from pushforward.coloring.direct import by_columns, by_rows, diagonal
from pushforward.coloring.scheme import Coloring, Step, recover, seeds
from pushforward.coloring.symmetric import acyclic, star

__all__ = [
    "Coloring",
    "Step",
    "acyclic",
    "by_both",
    "by_columns",
    "by_rows",
    "diagonal",
    "recover",
    "seeds",
    "star",
]
