"""What all tests share: one thread, reproducible hypothesis, no trace left behind."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch.distributions import Distribution

settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("default")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def global_state_unchanged() -> Iterator[None]:
    """Every test ends with the gradient mode and the default dtype that it began with.

    ``torch.compile`` and Lightning turn the checks of distributions off, which are restored.
    """
    checks = Distribution._validate_args
    yield
    Distribution.set_default_validate_args(checks)
    assert torch.is_grad_enabled(), "a test left gradients off"
    assert torch.get_default_dtype() == torch.float32, "a test left another default dtype"
