"""Train a network on several processes while its gains are logged, and print what came of it.

torchrun --nproc-per-node 2 watched_training.py [WAY ...]

Prints one object of JSON: for each way of training on several processes the gains that were logged,
those of a plain copy of the network measured by the first process alone, how many numbers the other
processes logged, and whether logging changed what was trained.
"""

import copy
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import pushforward as pf

STEPS, EVERY, BATCH, SAMPLES = 5, 2, 6, 4
Log = list[tuple[int, dict[str, float]]]
Norm = Callable[[int], nn.Module]
Wrap = Callable[[nn.Module], nn.Module]


class Block(nn.Module):
    """A residual block with a norm and dropout, which evaluation mode takes out."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm, self.inner = norm(8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.drop(self.inner(self.norm(x))))


class Net(nn.Module):
    def __init__(self, outputs: int, norm: Norm) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(2))
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# --- ways of training on several processes ------------------------------------------------------


def sharded(net: nn.Module, **options: Any) -> nn.Module:
    """Each block a group of its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*net.blocks, net):
        fully_shard(part, mesh=mesh, **options)
    return net


def sharded_at_once(net: nn.Module) -> nn.Module:
    return fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")


WAYS: dict[str, Wrap] = {
    "ddp": DistributedDataParallel,
    "compiled ddp": lambda net: compiled(DistributedDataParallel(net)),
    "ddp of compiled": lambda net: DistributedDataParallel(compiled(net)),
    "fsdp2": sharded,
    "fsdp2 at once": sharded_at_once,
    "fsdp2 not resharded": lambda net: sharded(net, reshard_after_forward=False),
    "fsdp2 in bfloat16": lambda net: sharded(
        net.float(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    ),
    "compiled fsdp2": lambda net: compiled(sharded(net)),
    "fsdp": lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu")),
}

# Batch norm takes no numbers shorter than its statistics.
NORMS: dict[str, Norm] = {"fsdp2 in bfloat16": nn.LayerNorm}


# --- training -----------------------------------------------------------------------------------


def network(outputs: int, norm: Norm) -> Net:
    torch.manual_seed(0)
    return Net(outputs, norm).double()


def batch(step: int, rank: int) -> Tensor:
    """Each process has data of its own, and not the same number of samples."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(BATCH + rank, 6, generator=generator).double()


def train(wrap: Wrap, build: Callable[[], Net], watched: bool) -> dict[str, Any]:
    """The log of this process, that of a plain copy, and what was trained."""
    model = wrap(build())
    log: Log = []
    goal: Log = []
    watch = pf.callbacks.GainLogger(
        model, EVERY, None, log=lambda values, step: log.append((step, values)), samples=SAMPLES
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(dist.get_rank())
    for step in range(STEPS):
        x = batch(step, dist.get_rank())
        if watched and step % EVERY == 0:
            goal.append((step, on_one_process(plain_copy(model, build), x, step)))
        if watched:
            watch(x)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(module.training for module in model.modules())
    state = [*whole(model).values(), torch.get_rng_state()]
    return {"log": log, "goal": goal, "state": state}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, gathered from all processes, under their plain names."""
    if isinstance(model, FullyShardedDataParallel):
        return {name: value.clone() for name, value in model.state_dict().items()}
    found = model.state_dict()
    for prefix in ("module.", "_orig_mod."):
        found = {name.replace(prefix, ""): value for name, value in found.items()}
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, value in found.items()
    }


def plain_copy(model: nn.Module, build: Callable[[], Net]) -> Net:
    state = whole(model)
    with torch.random.fork_rng():
        net = build()
    net.load_state_dict(state)
    return net


def on_one_process(net: Net, x: Tensor, step: int) -> dict[str, float]:
    """Gains by path_bound; where directions are random, by the same ones."""
    if net.head[1].out_features > 3:
        found = pf.callbacks.GainLogger(net, top=None, samples=SAMPLES).measure(x, step)
        return found or {}
    path = pf.path_bound(copy.deepcopy(net).eval(), x[:SAMPLES], rungs=())
    found = {f"pushforward/gain/{r.name}": r.log_gain.mean().exp().item() for r in path.layers}
    return found | {"pushforward/log_norm": path.log_norm.mean().item()}


def outcome(name: str, outputs: int) -> dict[str, Any]:
    """What the first process logged beside the goal, and what must not have happened."""
    build = functools.partial(network, outputs, NORMS.get(name, nn.BatchNorm1d))
    found, undisturbed = (train(WAYS[name], build, watched) for watched in (True, False))
    same = all(torch.equal(a, b) for a, b in zip(found["state"], undisturbed["state"], strict=True))
    others: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(others, (len(found["log"]), same))
    return {
        "log": found["log"],
        "goal": found["goal"],
        "logged": [count for count, _ in others],
        "undisturbed": all(same for _, same in others),
    }


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name in names or WAYS:
        found[name] = outcome(name, 3)
        if name in {"ddp", "fsdp2"}:
            found[f"{name}, many outputs"] = outcome(name, 20)
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(sys.argv[1:])
