"""The model that is trained here: training, cache, damage."""

import sys
from pathlib import Path

import pytest
import torch

from pushforward.report import embedded
from pushforward.report.data import held_out_digits
from pushforward.report.embedded import DigitsNet, cache_directory, embedded_model, trained


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One epoch over few digits, and a cache of this test's own."""
    x, y = embedded.training_digits()
    monkeypatch.setattr(embedded, "training_digits", lambda: (x[:200], y[:200]))
    monkeypatch.setattr(embedded, "EPOCHS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def kept() -> Path:
    (path,) = cache_directory().iterdir()
    return path


def test_seed_decides_and_the_global_generator_is_left() -> None:
    state = torch.get_rng_state()
    with torch.no_grad():  # whatever the caller's mode is
        first = trained(3)
    assert same(first, trained(3))
    assert not same(first, trained(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.training


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    trained(0, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1] == (len(seen), len(seen))


def test_second_call_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = embedded_model(0)
    state = torch.get_rng_state()
    monkeypatch.setattr(embedded, "trained", lambda *_: pytest.fail("trained again"))
    second = embedded_model(0)
    assert same(first.module, second.module)
    assert torch.equal(torch.get_rng_state(), state)
    assert not second.module.training
    assert "seed 0" in second.source


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _fill_with_nan(path: Path) -> None:
    model = DigitsNet()
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    embedded._keep(model, path)


@pytest.mark.parametrize(
    "damage", [_truncate, _fill_with_nan, lambda path: path.write_bytes(b"nonsense")]
)
def test_damaged_cache_is_mended(damage) -> None:
    first = embedded_model(0)
    damage(kept())
    assert same(embedded_model(0).module, first.module)
    assert embedded.cached(kept()) is not None


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert isinstance(embedded_model(0).module, DigitsNet)


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_directory() == tmp_path / "cache" / "pushforward"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/path")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_directory() == tmp_path / ".cache" / "pushforward"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_directory() == tmp_path / "Library" / "Caches" / "pushforward"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_directory() == tmp_path / "local" / "pushforward" / "cache"


def test_training_and_measuring_share_no_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x, y = embedded.training_digits()
    assert len(x) == len(y) == 1797 - held_out_digits().size


@pytest.mark.slow
def test_trained_net_reads_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    data = held_out_digits()
    with torch.no_grad():
        logits = trained(0)(data.x)
    assert data.y is not None
    assert (logits.argmax(1) == data.y).double().mean() > 0.97
