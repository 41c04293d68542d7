"""From MODEL to a module: code by name, libraries, pickles, weights."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pushforward.errors import LoadError, MissingDependencyError
from pushforward.report.models import load_model

CODE = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

class Holder:
    net = staticmethod(net)

ready = net()
number = 7

def gives_number():
    return 7

def fails():
    raise ZeroDivisionError("no")

def leaves():
    raise SystemExit(5)

def neighbour():
    import nearby
    return nearby.net()
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "nearby.py").write_text(CODE)
    path = tmp_path / "nets.py"
    path.write_text(CODE)
    return path


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class TestCode:
    @pytest.mark.parametrize("name", ["net", "ready", "Holder.net", "neighbour"])
    def test_file_gives_the_module_of_the_factory(self, code: Path, name: str) -> None:
        before = list(sys.path)
        loaded = load_model(f"{code}:{name}")
        assert isinstance(loaded.module, nn.Sequential)
        assert f"{code}:{name}" in loaded.source
        assert sys.path == before

    def test_package_module_is_found_beside_the_caller(
        self, code: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(code.parent)
        assert isinstance(load_model("nets:net").module, nn.Sequential)

    def test_seed_repeats_the_weights_and_leaves_the_generator(self, code: Path) -> None:
        state = torch.get_rng_state()
        first, second, third = (load_model(f"{code}:net", seed=s).module for s in (1, 1, 2))
        assert torch.equal(first.state_dict()["0.weight"], second.state_dict()["0.weight"])
        assert not torch.equal(first.state_dict()["0.weight"], third.state_dict()["0.weight"])
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("nett", "there is no 'nett' in it; did you mean net"),
            ("xyzzy", "there is no 'xyzzy' in it$"),
            ("number", "must be a function without arguments .* got int"),
            ("gives_number", "must give a torch.nn.Module, got int"),
            ("fails", "cannot be called without arguments: ZeroDivisionError: no"),
            ("leaves", "cannot be called without arguments: SystemExit: 5"),
        ],
    )
    def test_wrong_factory_is_named(self, code: Path, name: str, message: str) -> None:
        with pytest.raises(LoadError, match=message):
            load_model(f"{code}:{name}")

    def test_file_that_fails_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "broken.py"
        path.write_text("def f(:")
        with pytest.raises(LoadError, match="cannot be run: SyntaxError"):
            load_model(f"{path}:f")

    def test_missing_file(self) -> None:
        with pytest.raises(LoadError, match=r"there is no file nowhere\.py"):
            load_model("nowhere.py:net")

    def test_missing_package(self) -> None:
        with pytest.raises(LoadError, match=r"nowhere\.at_all cannot be imported: ModuleNotFound"):
            load_model("nowhere.at_all:net")

    @pytest.mark.parametrize("spec", ["resnet", "nets.py", "nets.py:", ":net", ""])
    def test_words_that_are_no_model(self, spec: str) -> None:
        with pytest.raises(LoadError, match=r"MODEL must be package\.module:factory"):
            load_model(spec)


class TestLibraries:
    @pytest.mark.parametrize("package", ["torchvision", "timm"])
    def test_missing_library(self, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingDependencyError, match=f"pip install {package}"):
            load_model(f"{package}:resnet18")

    @pytest.mark.parametrize("package", ["torchvision", "timm"])
    def test_architecture_by_name(self, package: str) -> None:
        pytest.importorskip(package)
        assert isinstance(load_model(f"{package}:resnet18").module, nn.Module)
        with pytest.raises(LoadError, match="has no model called 'resnet81'; did you mean"):
            load_model(f"{package}:resnet81")


class TestPickles:
    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".ckpt", ".bin", ".PT"])
    def test_pickle_is_refused_with_the_reason(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"m{suffix}"
        torch.save(net(), path)
        with pytest.raises(LoadError, match=r"runs whatever code it holds.*--trust-code"):
            load_model(str(path))

    def test_exported_program_is_refused_with_the_reason(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match="even where weights_only is asked for"):
            load_model(str(tmp_path / "m.pt2"))

    def test_refused_pickle_is_not_opened(self, tmp_path: Path) -> None:
        trace = tmp_path / "trace"
        path = tmp_path / "m.pt"
        torch.save(_Trap(str(trace)), path)
        with pytest.raises(LoadError, match="is refused"):
            load_model(str(path))
        assert not trace.exists()

    def test_trusted_pickle(self, tmp_path: Path) -> None:
        path = tmp_path / "m.pt"
        torch.save(net(), path)
        assert isinstance(load_model(str(path), trust_code=True).module, nn.Sequential)

    @pytest.mark.slow
    def test_trusted_exported_program(self, tmp_path: Path) -> None:
        path = tmp_path / "m.pt2"
        torch.export.save(torch.export.export(net(), (torch.zeros(2, 3),)), path)
        module = load_model(str(path), trust_code=True).module
        assert module(torch.zeros(2, 3)).shape == (2, 2)

    def test_trusted_file_that_is_missing_or_broken(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match="there is no file"):
            load_model(str(tmp_path / "m.pt"), trust_code=True)
        (tmp_path / "m.pt").write_bytes(b"nonsense")
        with pytest.raises(LoadError, match=r"m\.pt cannot be loaded"):
            load_model(str(tmp_path / "m.pt"), trust_code=True)


class _Trap:
    """An object whose pickle leaves a file behind when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


class TestWeights:
    def test_safetensors_are_put_in(self, code: Path, tmp_path: Path) -> None:
        state = net().state_dict()
        path = tmp_path / "w.safetensors"
        save_file(state, path)
        loaded = load_model(f"{code}:net", weights=str(path))
        assert torch.equal(loaded.module.state_dict()["0.weight"], state["0.weight"])
        assert "weights from" in loaded.source

    @pytest.mark.parametrize("whole", [True, False])
    def test_pickled_weights_need_trust(self, code: Path, tmp_path: Path, whole: bool) -> None:
        path = tmp_path / "w.pt"
        model = net()
        torch.save(model if whole else model.state_dict(), path)
        with pytest.raises(LoadError, match="is refused"):
            load_model(f"{code}:net", weights=str(path))
        loaded = load_model(f"{code}:net", weights=str(path), trust_code=True)
        expected = model.state_dict()["2.bias"]
        assert torch.equal(loaded.module.state_dict()["2.bias"], expected)

    def test_weights_that_are_no_state_dict(self, code: Path, tmp_path: Path) -> None:
        path = tmp_path / "w.pt"
        torch.save([1, 2], path)
        with pytest.raises(LoadError, match="must hold a state dict, got list"):
            load_model(f"{code}:net", weights=str(path), trust_code=True)

    def test_weights_alone_are_no_model(self, tmp_path: Path) -> None:
        path = tmp_path / "w.safetensors"
        save_file(net().state_dict(), path)
        with pytest.raises(LoadError, match="holds weights and no architecture"):
            load_model(str(path))
        torch.save(net().state_dict(), tmp_path / "w.pt")
        with pytest.raises(LoadError, match="holds weights and no architecture"):
            load_model(str(tmp_path / "w.pt"), trust_code=True)

    def test_weights_that_do_not_fit(self, code: Path, tmp_path: Path) -> None:
        path = tmp_path / "w.safetensors"
        save_file(nn.Linear(2, 2).state_dict(), path)
        with pytest.raises(LoadError, match="do not fit the model"):
            load_model(f"{code}:net", weights=str(path))

    def test_weights_that_cannot_be_read(self, code: Path, tmp_path: Path) -> None:
        path = tmp_path / "w.safetensors"
        with pytest.raises(LoadError, match="there is no file"):
            load_model(f"{code}:net", weights=str(path))
        path.write_bytes(b"nonsense")
        with pytest.raises(LoadError, match=r"cannot be read as \.safetensors"):
            load_model(f"{code}:net", weights=str(path))
