"""Others' code made repeatable, without a trace in the global state."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

SMALL = 2**20  # parameters and inputs up to which a second thread costs more than it brings


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the block with torch's generators seeded; afterwards they stand where they stood."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, so that the order of sums, and with it every bit, is always the same.

    Small tensors lose nothing by it, and gain much where other programs want the cores too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fitting_threads(model: nn.Module, x: Tensor) -> AbstractContextManager[None]:
    """`one_thread` for a small model on small inputs (B, *in), else what the user has set."""
    size = sum(p.numel() for p in model.parameters()) + x.numel()
    return one_thread() if size <= SMALL else nullcontext()
