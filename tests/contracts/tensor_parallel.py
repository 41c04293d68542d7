"""Differentiate a tensor-parallel network in several ways, and print what came of each as JSON.

python tensor_parallel.py PROCESSES STORE
"""

import copy
import json
import os
import sys
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import pushforward as pf


def outcome(compute: Callable[[], Tensor], expected: Tensor) -> str:
    """ "right", "wrong" or the name of the error."""
    try:
        return "right" if torch.allclose(compute(), expected) else "wrong"
    except Exception as error:
        return type(error).__name__


def outcomes(processes: int) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (processes,))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    parallel = copy.deepcopy(plain)
    net = parallelize_module(parallel, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    x = torch.randn(4, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    expected = pf.jacobian(plain, x).matrix().detach()

    def recorded(point: Tensor = x) -> tuple[Tensor, Tensor]:
        leaf = point.clone().requires_grad_()
        return net(leaf), leaf

    def loop() -> Tensor:
        y, leaf = recorded()
        return torch.stack([torch.autograd.grad(e, leaf, retain_graph=True)[0] for e in y])

    def replicated() -> Tensor:
        y, leaf = recorded(x.expand(4, 4))
        return torch.autograd.grad(y, leaf, eye)[0]

    def batched() -> Tensor:
        y, leaf = recorded()
        return torch.autograd.grad(y, leaf, eye, is_grads_batched=True)[0]

    def vmapped() -> Tensor:
        y, leaf = recorded()
        return torch.func.vmap(lambda u: torch.autograd.grad(y, leaf, u, retain_graph=True)[0])(eye)

    def second() -> Tensor:
        y, leaf = recorded()
        u = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, leaf, u, create_graph=True)
        rows = [torch.autograd.grad(e, u, retain_graph=True)[0] for e in pulled]
        return torch.stack(rows, 1)

    def training(model: nn.Module) -> Tensor:
        leaf = x.clone().requires_grad_()
        loss = pf.jacobian(model, leaf).fro_norm()
        if not loss.requires_grad:
            raise pf.errors.DifferentiationError("nothing to train")
        return torch.autograd.grad(loss, leaf)[0]

    ways: dict[str, Callable[[], Tensor]] = {
        "loop": loop,
        "replicated": replicated,
        "is_grads_batched": batched,
        "vmap": vmapped,
        "second_derivative": second,
        "jacrev": lambda: torch.func.jacrev(net)(x),
        "jacfwd": lambda: torch.func.jacfwd(net)(x),
        "jvp": lambda: torch.func.jvp(net, (x,), (x,))[1],
        "pushforward": lambda: pf.jacobian(net, x).matrix(),
        "pushforward_loop": lambda: pf.jacobian(net, x, plan="loop").matrix(),
        "pushforward_batch": lambda: pf.jacobian(net, x[None], batch_dim=0).matrix()[0],
    }
    found = {name: outcome(compute, expected) for name, compute in ways.items()}
    push = outcome(lambda: pf.jacobian(net, x) @ eye, expected)
    trained = outcome(lambda: training(net), training(plain))
    return found | {"pushforward_product": push, "pushforward_training": trained}


def work(rank: int, processes: int, store: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    found = outcomes(processes)
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    count, where = int(sys.argv[1]), sys.argv[2]
    if count == 1:
        work(0, 1, where)
    else:
        mp.spawn(work, (count, where), nprocs=count)
