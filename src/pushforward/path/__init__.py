"""The Jacobian along a network: exact gains that add up, and the bounds beside them.

record.py    one evaluation, every call of a module written down
cuts.py      where the autograd graph is one node wide
steps.py     the network cut into steps there, and their names
samples.py   where samples of a batch stay apart
pull.py      backward passes between two places of the graph
gains.py     log ||d out / d h|| at every place
leaves.py    norms of single modules in closed form
norms.py     the norm of any step
bound.py     path_bound and what it returns
show.py      tables, pictures, JSON
"""

from pushforward.path.bound import PathBound, path_bound
from pushforward.path.findings import Layer

__all__ = ["Layer", "PathBound", "path_bound"]
