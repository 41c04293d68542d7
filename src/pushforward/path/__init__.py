"""The Jacobian along a network: exact gains that add up, and the bounds beside them.

record.py       one evaluation, every call of a module written down
cuts.py         where the autograd graph is one node wide
steps.py        the network cut into steps there, and their names
samples.py      where samples of a batch stay apart
pull.py         backward passes between two places of the graph
gains.py        log ||d out / d h|| at every place
spectra.py      singular values of d out / d h
sampling.py     the same gains from a few random cotangents, with intervals
leaves.py       Frobenius norms of single modules in closed form
places.py       which elements inside a step belong to which sample
local.py        spectral norms of single ops, a table of rules
convolution.py  those of convolutions
spectrum.py     largest singular values of matrices, from above
follow.py       a bound on the spectral norm of a step, op by op through its branches
dense.py        exact norms of steps from all entries
lanczos.py      bounds that hold with a probability
norms.py        the norms of any step, by the best of these ways
groups.py       norms of several steps at once under a budget, and the best division
rungs.py        the ladder: bounds from the norms of steps
assembling.py   rows, rungs and labels
bound.py        path_bound and what it returns
show.py         tables, pictures, JSON
"""

from pushforward.path.bound import PathBound, path_bound
from pushforward.path.findings import Layer

__all__ = ["Layer", "PathBound", "path_bound"]
