"""Change of variables: log-determinants, transforms and laws of maps written in PyTorch.

logdet      value_and_logabsdet, logdetcheck
transforms  AutoTransform, a torch.distributions transform
law         Pushforward, a torch.distributions distribution
inversion   the numerical inverse
events      maps of events as maps of flat samples
"""

from pushforward.density.law import Pushforward
from pushforward.density.logdet import logdetcheck, value_and_logabsdet
from pushforward.density.transforms import AutoTransform

__all__ = ["AutoTransform", "Pushforward", "logdetcheck", "value_and_logabsdet"]
