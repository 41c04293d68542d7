"""Interpolation, sampling and Fourier transforms, against the Jacobian of autograd."""

import pytest
import torch
import torch.nn.functional as F

from detected import detect, draw, exact, overs, sound
from oracles import loop_hessian


def _scaled(mode, **options):
    return lambda x: F.interpolate(x, mode=mode, **options)


INTERPOLATION = {
    "nearest 1d": (_scaled("nearest", size=5), (2, 1, 3)),
    "nearest 1d, fewer": (_scaled("nearest", size=2), (1, 2, 5)),
    "nearest 2d": (_scaled("nearest", scale_factor=(2, 1.5)), (1, 2, 2, 3)),
    "nearest 3d": (_scaled("nearest", size=(2, 1, 3)), (1, 1, 3, 2, 2)),
    "nearest exact": (_scaled("nearest-exact", size=(3, 5)), (1, 1, 2, 3)),
    "linear": (_scaled("linear", size=5), (2, 1, 3)),
    "linear, aligned": (_scaled("linear", size=5, align_corners=True), (1, 1, 3)),
    "linear, fewer": (_scaled("linear", size=2), (1, 1, 6)),
    "bilinear": (_scaled("bilinear", scale_factor=2), (1, 2, 2, 3)),
    "bilinear, aligned": (_scaled("bilinear", size=(3, 5), align_corners=True), (1, 1, 2, 3)),
    "bilinear, scaled": (_scaled("bilinear", scale_factor=(1.7, 0.6)), (1, 1, 3, 4)),
    "bilinear, smoothed": (_scaled("bilinear", size=(2, 2), antialias=True), (1, 1, 4, 5)),
    "bicubic": (_scaled("bicubic", scale_factor=2), (1, 1, 3, 4)),
    "bicubic, aligned": (_scaled("bicubic", size=(5, 3), align_corners=True), (1, 1, 3, 5)),
    "bicubic, smoothed": (_scaled("bicubic", size=(3, 2), antialias=True), (1, 1, 4, 5)),
    "trilinear": (_scaled("trilinear", size=(3, 2, 1)), (1, 1, 2, 3, 2)),
    "trilinear, aligned": (
        _scaled("trilinear", size=(3, 1, 4), align_corners=True),
        (1, 1, 2, 2, 2),
    ),
    "smoothed, of width one": (_scaled("bilinear", size=(2, 1), antialias=True), (1, 1, 4, 1)),
    "area": (_scaled("area", size=(2, 3)), (1, 2, 3, 4)),
    "of one": (_scaled("bilinear", size=(2, 3)), (1, 1, 1, 1)),
    "the same size": (_scaled("bilinear", size=(2, 3)), (1, 1, 2, 3)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (1, 4, 2, 3)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (1, 1, 2, 4)),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), (1, 4, 1, 2)),
}

FLOW = (draw(2, 3, 2, 2, seed=3) / 2).clamp(-1.2, 1.2)
FLOW3 = draw(1, 2, 1, 3, 3, seed=4) / 2
CORNERS = torch.tensor([[[[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]]]).double()
PICTURE = (2, 2, 3, 4)


@pytest.mark.parametrize("name", INTERPOLATION)
def test_interpolation(name):
    f, shape = INTERPOLATION[name]
    exact(f, draw(*shape))


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_hessians_follow_interpolation_back(mode):
    def energy(x):
        return F.interpolate(x.reshape(1, 1, 2, 3), scale_factor=2, mode=mode).pow(3).sum()

    x = draw(6)
    found = detect(energy, x, hessian=True)
    assert (found.pattern.todense() == (loop_hessian(energy, x) != 0).numpy()).all()
    assert found.dense_ops == ()


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("aligned", [False, True])
def test_sampling_at_constant_places(mode, padding, aligned):
    options = {"mode": mode, "padding_mode": padding, "align_corners": aligned}
    exact(lambda x: F.grid_sample(x, FLOW, **options), draw(*PICTURE))
    exact(lambda x: F.grid_sample(x, CORNERS, **options), draw(1, 1, 3, 5))


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_hessians_follow_sampling_back(padding):
    def energy(x):
        pixels = F.grid_sample(
            x.reshape(1, 2, 2, 3), FLOW[:1], padding_mode=padding, align_corners=False
        )
        return pixels.pow(3).sum()

    x = draw(12)
    found = detect(energy, x, hessian=True)
    assert (found.pattern.todense() == (loop_hessian(energy, x) != 0).numpy()).all()
    assert found.dense_ops == ()


@pytest.mark.parametrize("grid_shape", [(2, 1, 1, 2), (1, 1, 2, 1, 3)])
def test_hessians_by_places(grid_shape):
    shape = (grid_shape[0], 1, *(2,) * (len(grid_shape) - 2))
    picture = draw(*shape)

    def energy(flow):
        places = flow.reshape(grid_shape).tanh()
        return F.grid_sample(picture, places, align_corners=False).pow(3).sum()

    x = draw(int(torch.tensor(grid_shape).prod()))
    found = detect(energy, x, hessian=True).pattern.todense()
    met = (loop_hessian(energy, x) != 0).numpy()
    assert not (met & ~found).any()
    assert found.sum() == len(x) * grid_shape[-1]


def test_sampling_a_volume_at_constant_places():
    exact(lambda x: F.grid_sample(x, FLOW3, align_corners=True), draw(1, 2, 2, 3, 2))


def test_sampling_outside_of_the_picture():
    structure = exact(
        lambda x: F.grid_sample(x, 0 * FLOW + 9.0, align_corners=True), draw(*PICTURE)
    )
    assert structure.pattern.nnz == 0


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_sampling_at_places_that_vary(mode):
    """Anywhere in its own channel of its own picture."""
    picture = draw(*PICTURE)

    def warp(x, flow):
        return F.grid_sample(x, flow.tanh(), mode=mode, align_corners=False)

    sound(warp, picture, FLOW, argnums=(0, 1))
    by_flow = detect(warp, picture, FLOW, argnums=1).pattern
    assert by_flow.nnz == (0 if mode == "nearest" else 2 * 2 * 6 * 2)
    assert detect(warp, picture, FLOW).pattern.nnz == 2 * 2 * 6 * 12


@pytest.mark.parametrize("aligned", [False, True])
def test_affine_grid(aligned):
    exact(lambda m: F.affine_grid(m, (2, 1, 3, 4), align_corners=aligned), draw(2, 2, 3))
    exact(lambda m: F.affine_grid(m, (1, 1, 2, 3, 2), align_corners=aligned), draw(1, 3, 4))


def _power(transform):
    return lambda x: transform(x).abs().square()


FOURIER = {
    "fft": (_power(torch.fft.fft), (2, 5)),
    "fft along rows": (_power(lambda x: torch.fft.fft(x, dim=0)), (3, 2)),
    "fft, longer": (_power(lambda x: torch.fft.fft(x, n=5)), (2, 3)),
    "fft, shorter": (_power(lambda x: torch.fft.fft(x, n=3)), (2, 5)),
    "rfft": (_power(lambda x: torch.fft.rfft(x, dim=0)), (5, 2)),
    "fft2": (_power(torch.fft.fft2), (2, 3, 5)),
    "rfftn": (_power(lambda x: torch.fft.rfftn(x, dim=(0, 2))), (3, 2, 5)),
    "ifft": (_power(torch.fft.ifft), (2, 3)),
    "ihfft": (_power(torch.fft.ihfft), (2, 5)),
    "fftshift": (_power(lambda x: torch.fft.fftshift(torch.fft.fft(x), 0)), (3, 3)),
    "there and back": (lambda x: torch.fft.irfft(torch.fft.rfft(x).abs(), 5), (2, 5)),
    "hfft": (lambda x: torch.fft.hfft(x.exp(), 7), (2, 3)),
    "stft": (
        _power(
            lambda x: torch.stft(
                x, 5, 3, window=torch.ones(5).double(), center=False, return_complex=True
            )
        ),
        (2, 9),
    ),
    "of one": (_power(torch.fft.fft), (2, 1)),
}


@pytest.mark.parametrize("name", FOURIER)
def test_fourier(name):
    f, shape = FOURIER[name]
    exact(f, draw(*shape))


def test_a_window_of_zeros_cuts_frames_short():
    window = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]).double()

    def spectrogram(x):
        return _power(lambda x: torch.stft(x, 5, 2, window=window, return_complex=True))(x)

    exact(spectrogram, draw(9))


def test_istft_is_local():
    window = torch.hann_window(4, dtype=torch.float64) + 0.1

    def smooth(x):
        frames = torch.stft(x, 4, 2, window=window, return_complex=True)
        return torch.istft(frames * frames.abs(), 4, 2, window=window)

    structure = sound(smooth, draw(24))
    assert structure.pattern.todense().sum(1).max() <= 8
    assert structure.dense_ops == ()


def test_parts_that_cancel_are_kept():
    """Imaginary parts share the sets of real ones; the sines at zero vanish, in two ways."""
    assert overs(lambda x: torch.view_as_real(torch.fft.rfft(x)), draw(5)) == 5 + 2
