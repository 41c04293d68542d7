"""Train with Lightning's DDP on two processes while gains are logged; print the log as JSON.

torchrun --nproc-per-node 2 watched_lightning.py
"""

import json
import os
import warnings

import lightning.pytorch as lightning
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

import pushforward as pf


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        self.samples = torch.randn(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Recorder(DummyLogger):
    """Keeps what it is given, on whatever process that is."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, dict(metrics)))


def goal(module: Module, x: Tensor) -> dict[str, float]:
    """Gains by path_bound, before training."""
    path = pf.path_bound(module.eval(), x, rungs=())
    module.train()
    return {f"pushforward/gain/{r.name}": r.log_gain.mean().exp().item() for r in path.layers}


def main() -> None:
    torch.set_num_threads(1)
    module, logger = Module(), Recorder()
    data = torch.utils.data.TensorDataset(module.samples)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    expected = goal(module, module.samples[:4])
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=4,
        max_epochs=1,
        use_distributed_sampler=False,
        logger=[logger],
        callbacks=[pf.callbacks.LightningGainLogger(every=2, top=None, samples=4)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    counts: list[int] = [0, 0]
    torch.distributed.all_gather_object(counts, len(logger.rows))
    if trainer.global_rank == 0:
        print(json.dumps({"log": logger.rows, "goal": expected, "logged": counts}), flush=True)
    # The one that is done first must not take its connections away from the other.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.simplefilter("ignore")
    main()
