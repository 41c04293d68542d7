"""What stands around a model: compilation, data parallelism, sharding; and the other processes."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Names that wrappers put between a module and what it holds.
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile`` and data parallelism."""
    while True:
        inside = model._modules.get("_orig_mod")
        if inside is None and isinstance(model, DataParallel | DistributedDataParallel):
            inside = model.module
        if inside is None:
            return model
        model = inside


def is_compiled(model: nn.Module) -> bool:
    """Whether parts of a model run compiled code, in which hooks do not see every call."""
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def interpreted() -> AbstractContextManager[Any]:
    """Run the Python code of compiled modules."""
    return torch.compiler.set_stance("force_eager")


def plain_name(name: str, model: nn.Module) -> str:
    """The name of a step as the user wrote the modules, without wrappers."""
    for prefix, module in model.named_modules():
        if prefix and isinstance(module, DistributedDataParallel):
            name = re.sub(rf"\b{re.escape(prefix)}\.module\b", prefix, name)
    return _WRAPPERS.sub("", name)


def is_sharded(model: nn.Module) -> bool:
    """Whether a call needs all processes: parameters lie in pieces on several of them."""
    if not is_distributed():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that logs."""
    return not is_distributed() or dist.get_rank() == 0


def of_first(x: Tensor, size: int) -> tuple[Tensor, int]:
    """Samples and the size of their batch in the first process, on all of them.

    With the same samples all do the same passes, and so the same collectives in the same order.
    """
    told: list[Any] = [(tuple(x.shape), x.dtype, size)]
    dist.broadcast_object_list(told, src=0)
    shape, dtype, size = told[0]
    here = x.contiguous() if is_first() else torch.empty(shape, dtype=dtype, device=x.device)
    dist.broadcast(here, src=0)
    return here, size
