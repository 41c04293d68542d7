"""From DATA to samples: arrays, images, built-in sets, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pushforward.errors import DifferentiationError, LoadError
from pushforward.report import images
from pushforward.report.data import choose, held_out_digits, load_data

X = np.arange(24, dtype=np.float32).reshape(6, 4)
Y = np.array([0, 1, 2, 0, 1, 2])


def write(path: Path, x: np.ndarray, y: np.ndarray | None = None) -> str:
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".npz":
        np.savez(path, **({"x": x} if y is None else {"x": x, "y": y}))
    else:
        tensors = {"x": torch.from_numpy(x)}
        save_file(tensors if y is None else {**tensors, "y": torch.from_numpy(y)}, path)
    return str(path)


class TestArrays:
    @pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors"])
    def test_all_samples_in_order(self, tmp_path: Path, suffix: str) -> None:
        data = load_data(write(tmp_path / f"d{suffix}", X))
        assert torch.equal(data.x, torch.from_numpy(X))
        assert (data.y, data.size, data.indices) == (None, 6, (0, 1, 2, 3, 4, 5))
        assert data.image_shape is None

    @pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
    def test_classes_follow_their_samples(self, tmp_path: Path, suffix: str) -> None:
        data = load_data(write(tmp_path / f"d{suffix}", X, Y), samples=3, seed=5)
        rows = list(data.indices)
        assert torch.equal(data.x, torch.from_numpy(X[rows]))
        assert data.y is not None
        assert data.y.tolist() == Y[rows].tolist()
        assert data.size == 6

    def test_targets_that_are_no_classes_are_left_out(self, tmp_path: Path) -> None:
        assert load_data(write(tmp_path / "d.npz", X, Y / 2)).y is None
        assert load_data(write(tmp_path / "e.npz", X, Y.reshape(6, 1))).y is None

    def test_byte_order_and_precision(self, tmp_path: Path) -> None:
        assert load_data(write(tmp_path / "d.npy", X.astype(">f8"))).x.dtype == torch.float64

    def test_images_are_recognised(self, tmp_path: Path) -> None:
        path = write(tmp_path / "d.npy", np.zeros((2, 3, 8, 9), dtype=np.float32))
        assert load_data(path).image_shape == (3, 8, 9)

    def test_flattening_is_noted(self, tmp_path: Path) -> None:
        data = load_data(write(tmp_path / "d.npy", X.reshape(6, 2, 2))).flattened()
        assert data.x.shape == (6, 4)
        assert data.notes == ("each sample of shape (2, 2) was flattened for this model",)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (np.zeros(5, np.float32), r"must be \(samples, \.\.\.\).*got shape \(5,\)"),
            (np.zeros((0, 3), np.float32), "at least one sample"),
            (np.zeros((3, 0), np.float32), "at least one sample and one feature"),
            (np.full((2, 2), np.nan), "must be finite; 2 of 2 chosen samples"),
            (np.zeros((2, 2), np.complex64), "store real and imaginary parts as two channels"),
            (np.array([["a", "b"]]), "must hold numbers, got dtype <U1"),
        ],
    )
    def test_what_cannot_be_measured(self, tmp_path: Path, x: np.ndarray, message: str) -> None:
        with pytest.raises(LoadError, match=message):
            load_data(write(tmp_path / "d.npy", x))

    @pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
    def test_integers_have_no_jacobian(self, tmp_path: Path, dtype: type) -> None:
        with pytest.raises(DifferentiationError, match=r"Token ids: give the embeddings"):
            load_data(write(tmp_path / "d.npy", X.astype(dtype)))

    def test_pickles_inside_are_not_run(self, tmp_path: Path) -> None:
        path = write(tmp_path / "d.npz", np.array([[object()]], dtype=object))
        with pytest.raises(LoadError, match="allow_pickle=False"):
            load_data(path)

    @pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors"])
    def test_broken_file(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"d{suffix}"
        path.write_bytes(b"nonsense")
        with pytest.raises(LoadError, match=f"d{suffix} cannot be read"):
            load_data(str(path))

    def test_archive_without_x(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "d.npz", inputs=X, labels=Y)
        with pytest.raises(LoadError, match="called x, and perhaps y; it holds inputs, labels"):
            load_data(str(tmp_path / "d.npz"))

    def test_lengths_that_differ(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match="as many y as x, got 4 and 6"):
            load_data(write(tmp_path / "d.npz", X, Y[:4]))

    def test_missing_file(self) -> None:
        with pytest.raises(LoadError, match=r"there is no file nowhere\.npz; DATA must be"):
            load_data("nowhere.npz")

    def test_unknown_words(self) -> None:
        with pytest.raises(LoadError, match=r"DATA must be .* got 'imagenet'$"):
            load_data("imagenet")
        with pytest.raises(LoadError, match="pickles are code and are not read as data"):
            load_data("data.pkl")


class TestChoice:
    def test_same_seed_same_samples(self) -> None:
        assert torch.equal(choose(100, 10, seed=3), choose(100, 10, seed=3))
        assert not torch.equal(choose(100, 10, seed=3), choose(100, 10, seed=4))

    def test_each_sample_once_and_in_order(self) -> None:
        chosen = choose(20, 19, seed=0).tolist()
        assert chosen == sorted(set(chosen))
        assert choose(5, 9, seed=0).tolist() == [0, 1, 2, 3, 4]
        assert choose(5, None, seed=0).tolist() == [0, 1, 2, 3, 4]

    def test_global_generator_is_left(self) -> None:
        state = torch.get_rng_state()
        choose(100, 10, seed=3)
        assert torch.equal(torch.get_rng_state(), state)


class TestBuiltIn:
    def test_digits(self) -> None:
        data = load_data("digits", samples=7, seed=1)
        assert data.x.shape == (7, 1, 8, 8)
        assert (data.size, data.image_shape, len(data.classes or ())) == (1797, (1, 8, 8), 10)
        assert data.x.min() >= 0
        assert data.x.max() <= 1

    def test_held_out_digits_are_a_fifth(self) -> None:
        data = held_out_digits()
        assert data.size == len(data.x) == 359
        assert data.y is not None
        assert torch.equal(data.y, load_data("digits").y[4::5])  # type: ignore

    @pytest.mark.slow
    def test_mnist(self) -> None:
        data = load_data("mnist5k", samples=3)
        assert data.x.shape == (3, 1, 28, 28)
        assert data.x.max() <= 1
        assert data.size == 5000


class TestImages:
    def save(self, path: Path, size: tuple[int, int] = (5, 4), mode: str = "L") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, 255 if mode == "L" else (255, 0, 0)).save(path)

    def test_flat_folder(self, tmp_path: Path) -> None:
        self.save(tmp_path / "b.png")
        self.save(tmp_path / "a.PNG")
        (tmp_path / "notes.txt").write_text("no image")
        data = load_data(str(tmp_path))
        assert data.x.shape == (2, 1, 4, 5)
        assert torch.equal(data.x, torch.ones(2, 1, 4, 5))
        assert (data.y, data.classes) == (None, None)
        assert "read as grey" in data.notes[0]

    def test_sub_folders_are_classes(self, tmp_path: Path) -> None:
        for name in ("dog/1.png", "cat/1.png", "cat/2.png"):
            self.save(tmp_path / name, mode="RGB")
        (tmp_path / "empty").mkdir()
        data = load_data(str(tmp_path))
        assert data.classes == ("cat", "dog")
        assert data.y is not None
        assert data.y.tolist() == [0, 0, 1]
        assert torch.equal(data.x[0], torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 4, 5))

    def test_unequal_images_are_cut_and_this_is_noted(self, tmp_path: Path) -> None:
        self.save(tmp_path / "a.png", (30, 40))
        self.save(tmp_path / "b.png", (50, 20))
        data = load_data(str(tmp_path))
        assert data.x.shape == (2, 1, 224, 224)
        assert "cut to 224 x 224 since their sizes differ" in data.notes[0]

    def test_only_the_chosen_files_are_opened(self, tmp_path: Path) -> None:
        for place in range(4):
            self.save(tmp_path / f"{place}.png")
        kept = choose(4, 2, seed=0).tolist()
        for place in {0, 1, 2, 3} - set(kept):
            (tmp_path / f"{place}.png").write_bytes(b"broken")
        assert load_data(str(tmp_path), samples=2).indices == tuple(kept)

    def test_no_images(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match="must hold images"):
            load_data(str(tmp_path))

    def test_broken_image(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"broken")
        with pytest.raises(LoadError, match=r"a\.png cannot be read as an image"):
            load_data(str(tmp_path))

    def test_deep_image(self, tmp_path: Path) -> None:
        Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "a.png")
        with pytest.raises(LoadError, match="8 bits a channel, got mode I"):
            load_data(str(tmp_path))

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((1, 8, 8), (1, 8, 8)),
            ((3, 4, 9), (3, 4, 9)),
            ((2, 8, 8), None),
            ((3, 3, 8), None),
            ((8, 8), None),
            ((64,), None),
        ],
    )
    def test_what_looks_like_a_picture(self, shape: tuple[int, ...], expected: object) -> None:
        assert images.image_shape(shape) == expected

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_pictures_for_a_page(self, dtype: torch.dtype) -> None:
        constant, ramp = torch.ones(3, 4, 4, dtype=dtype), torch.rand(1, 300, 200).to(dtype)
        for picture in (constant, ramp):
            assert images.picture_uri(picture).startswith("data:image/png;base64,")
        assert images.heat_uri(torch.zeros(4, 4)).startswith("data:image/png;base64,")
