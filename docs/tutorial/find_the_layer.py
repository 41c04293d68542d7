"""Find the layer that keeps a network from learning.

Run it with ``python docs/tutorial/find_the_layer.py [FOLDER]``: it prints what the tutorial shows
and writes the tutorial's pictures to FOLDER (default: beside this file). It takes a few seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pushforward as pf

DEPTH, WIDTH = 8, 64


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised 8x8 images of digits: 1437 to train on, 360 to test on."""
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    x = (x - x.mean(0)) / (x.std(0) + 0.1)
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return x[train], y[train], x[test], y[test]


def block(inputs: int, outputs: int, bias: float = 0.0) -> nn.Sequential:
    """A linear layer, initialised the usual way for tanh, and its tanh."""
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_normal_(linear.weight)
    nn.init.constant_(linear.bias, bias)
    return nn.Sequential(linear, nn.Tanh())


def network() -> nn.Sequential:
    """Eight blocks and a head. One block was written for another activation."""
    torch.manual_seed(0)
    biases = [0.0] * DEPTH
    biases[4] = 6.0  # kept every ReLU alive, when this block still had one
    blocks = [block(WIDTH, WIDTH, bias) for bias in biases]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, 10))


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int = 15) -> list[float]:
    """Plain SGD; returns the mean loss of each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    shuffle = torch.Generator().manual_seed(1)
    history = []
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(x), generator=shuffle).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        history.append(sum(losses) / len(losses))
    return history


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def usual_suspects(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """What one looks at first: the spread of the weights and the size of the gradients."""
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    print("weights     std     |gradient|")
    for name, weight in model.named_parameters():
        if name.endswith("weight"):
            print(f"{name:11s} {weight.std():.3f}   {weight.grad.norm():.1e}")


def decades(log: Tensor) -> float:
    """The mean over the samples of a natural logarithm, in powers of ten."""
    return (log.mean() / torch.log(torch.tensor(10.0))).item()


def show(path: pf.PathBound) -> None:
    for row in path.layers:
        print(f"{row.name:6s} {decades(row.log_gain):+6.2f}")
    print(f"whole  {decades(path.log_norm):+6.2f}   bound {decades(path.rungs['frobenius']):+.2f}")


def weakest(path: pf.PathBound) -> str:
    """The name of the step that loses most."""
    return min(path.layers, key=lambda row: decades(row.log_gain)).name


def waterfall(axes: plt.Axes, path: pf.PathBound, title: str) -> None:
    """Each bar starts where the one before it ended; the last end is the norm of the whole."""
    gains = [decades(row.log_gain) for row in path.layers]
    ends = torch.tensor(gains).cumsum(0).tolist()
    starts = [0.0, *ends[:-1]]
    colours = ["#b3261e" if gain < -1 else "#3d6fb4" for gain in gains]
    axes.bar(range(len(gains)), gains, bottom=starts, color=colours, width=0.8)
    axes.step(range(len(ends)), ends, where="mid", color="#888888", linewidth=0.8)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.use_sticky_edges = False
    axes.margins(y=0.08)
    axes.set_xticks(range(len(gains)), [row.name for row in path.layers], rotation=90, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", alpha=0.3)


def main(folder: Path) -> dict[str, object]:
    x, y, x_test, y_test = digits()

    print("== trained as it stands")
    model = network()
    history_bad = train(model, x, y)
    bad = accuracy(model, x_test, y_test)
    print(f"loss {history_bad[0]:.2f} -> {history_bad[-1]:.2f}, test accuracy {bad:.0%}")

    print("== the usual suspects, at initialisation")
    model = network()
    usual_suspects(model, x[:256], y[:256])

    print("== log10 of the gains along the path")
    before = pf.path_bound(model, x[:256], batch_dim=0)
    show(before)
    found = weakest(before)
    print(f"the step that loses most: {found}")

    print("== what goes into that step")
    inputs = model[: int(found.split(".")[0])](x[:256])
    before_tanh = model.get_submodule(found.split(".")[0])[0](inputs)
    print(f"mean {before_tanh.mean():+.2f}, std {before_tanh.std():.2f}")

    print("== after the repair")
    nn.init.zeros_(model.get_submodule(found.split(".")[0])[0].bias)
    after = pf.path_bound(model, x[:256], batch_dim=0)
    show(after)
    history_good = train(model, x, y)
    good = accuracy(model, x_test, y_test)
    print(f"loss {history_good[0]:.2f} -> {history_good[-1]:.2f}, test accuracy {good:.0%}")

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    waterfall(axes[0], before, "as it stands")
    waterfall(axes[1], after, "repaired")
    axes[0].set_ylabel("log10 of the gain, added up")
    figure.savefig(folder / "waterfall.png", dpi=110)

    figure, axes = plt.subplots(figsize=(5.5, 2.8), layout="constrained")
    axes.plot(range(1, len(history_bad) + 1), history_bad, color="#b3261e", label="as it stands")
    axes.plot(range(1, len(history_good) + 1), history_good, color="#3d6fb4", label="repaired")
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=110)
    plt.close("all")
    return {"found": found, "bad": bad, "good": good, "before": before, "after": after}


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
