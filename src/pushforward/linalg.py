"""Determinants, volumes, ranks and norms of matrices (..., m, n).

Every function takes a batch of real matrices of any shape, empty ones too. float16, bfloat16 and
float32 are worked in float64, because a determinant multiplies what rounding did to every singular
value; the result has the dtype of the input.

Nothing here squares the matrix: sqrt(det(A^T A)) computed from A^T A loses half of the digits, 10
nats at condition 1e6 in float32. Values come from LU, QR or singular values. What torch gets wrong
in second derivatives (`torch.linalg.det`, `slogdet` and `solve` under forward mode) is not used:
the differentiable part of each function is made of products and QR alone, and holds at every order,
in every mode of `torch.func`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import DimensionError, InputError, ShapeError

__all__ = [
    "cond",
    "fro_norm",
    "log_pdet",
    "logvol",
    "pdet",
    "rank",
    "slogdet",
    "spectral_norm",
    "stable_rank",
    "svdvals",
]


def slogdet(A: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and logarithm of the absolute value of the determinant.

    ``det A = sign * exp(logabsdet)``, from an LU factorisation with partial pivoting.

    A matrix is called singular where a pivot is no larger than what rounding may have left of a
    zero, and the smallest singular value is at most 4 eps of the largest. Both are asked, so that
    ``diag(1e10, 1e-10)``, whose determinant is known to every digit, stays regular.

    Args:
        A: (..., n, n).

    Returns:
        sign (...), which is 0 for a singular matrix, and log|det A| (...), which is then -inf.
        d log|det A| / dA is A^-T, and zero for a singular matrix. An empty matrix has det 1.

    Raises:
        ShapeError: A has fewer than two dimensions.
        DimensionError: the matrices are not square.
        InputError: A is not real floating point, or has a NaN or an infinity.

    Cost: one LU for the values and one QR for the derivatives, O(n^3).

    >>> slogdet(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    (tensor(-1.), tensor(0.6931))
    """
    work = _checked(A, "slogdet")
    if work.shape[-2] != work.shape[-1]:
        raise DimensionError(
            f"slogdet expects square matrices (..., n, n), got {tuple(A.shape)}; "
            "for m != n the volume is logvol(A)"
        )
    find = partial(_sign_and_logabs, rtol=_default_rtol(A))
    sign, logabs, singular = _untracked(find, work)
    logabs = _attach(logabs, _qr_logvol(_scale_rows(_with_identity(work, singular))))
    return sign.to(A.dtype), logabs.to(A.dtype)


def logvol(A: Tensor, rtol: float | None = None) -> Tensor:
    """Logarithm of the volume by which a linear map stretches.

    ``1/2 log det(A^T A)`` for m >= n and ``1/2 log det(A A^T)`` for m < n: the sum of the
    logarithms of the singular values, by QR. A rank-deficient matrix has volume 0, log -inf.

    Args:
        A: (..., m, n).
        rtol: a matrix is deficient where its smallest singular value is at most `rtol` times the
            largest. Default: 4 eps of the dtype of A.

    Returns:
        (...). Its derivative is (A^+)^T, and zero for a deficient matrix. An empty matrix has 0.

    Raises:
        ShapeError: A has fewer than two dimensions.
        InputError: A is not real floating point, or has a NaN or an infinity; `rtol` is negative.

    Cost: one QR and one set of singular values, O(m n min(m, n)).

    >>> logvol(torch.tensor([[3.0], [4.0]])).exp()
    tensor(5.)
    """
    work = _checked(A, "logvol")
    tall = work if work.shape[-2] >= work.shape[-1] else work.mT
    deficient = _is_deficient(tall.detach(), _tolerance(rtol, _default_rtol(A)))
    volume = _qr_logvol(_with_identity(tall, deficient))
    return volume.masked_fill(deficient, -math.inf).to(A.dtype)


def log_pdet(A: Tensor, rtol: float | None = None) -> Tensor:
    """Logarithm of the pseudo-determinant, the product of the nonzero singular values.

    Singular values, not eigenvalues: ``[[1, 1], [0, 0]]`` gives log sqrt(2). It is the factor by
    which A stretches volume between the complement of its kernel and its range.

    Args:
        A: (..., m, n).
        rtol: singular values at most `rtol` times the largest count as zero.
            Default: max(m, n) eps of the dtype of A, as in `rank`.

    Returns:
        (...). Its derivative at fixed rank is (A^+)^T. The zero matrix has the empty product: 0.

    Raises:
        ShapeError: A has fewer than two dimensions.
        InputError: A is not real floating point, or has a NaN or an infinity; `rtol` is negative.

    Cost: one singular value decomposition and three QR, O(m n min(m, n)).

    The derivative comes from the factorisation A = C W^-1 R with C = A V, R = U^T A, W = U^T A V,
    exact for every matrix of rank r near A, so that pdet A = vol(C) vol(R) / |det W| may be
    differentiated with the singular vectors U and V held fixed. Singular values that coincide
    need no care then.

    >>> log_pdet(torch.tensor([[1.0, 1.0], [0.0, 0.0]])).exp()
    tensor(1.4142)
    """
    return _log_pdet(_checked(A, "log_pdet"), _tolerance(rtol, _rank_rtol(A))).to(A.dtype)


def pdet(A: Tensor, rtol: float | None = None) -> Tensor:
    """Pseudo-determinant: the product of the singular values over `rtol` times the largest.

    ``exp(log_pdet(A, rtol))``: (..., m, n) -> (...). The zero matrix has the empty product, 1.

    Raises:
        As in `log_pdet`.

    >>> pdet(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    tensor(2.)
    """
    return _log_pdet(_checked(A, "pdet"), _tolerance(rtol, _rank_rtol(A))).exp().to(A.dtype)


def _log_pdet(A: Tensor, rtol: float) -> Tensor:
    """`log_pdet` in the dtype of the work."""
    U, S, Vh = torch.linalg.svd(A.detach(), full_matrices=False)
    kept = _is_kept(S, rtol)
    left, right = _unit_columns(U, kept), _unit_columns(Vh.mT, kept)
    inverse = S.masked_fill(~kept, 1.0).reciprocal()
    columns = (A @ right) * inverse[..., None, :]
    rows = (A.mT @ left) * inverse[..., None, :]
    core = left.mT @ columns
    volume = _padded_logvol(columns, kept) + _padded_logvol(rows, kept) - _padded_logvol(core, kept)
    return _attach(-inverse.log().sum(-1), volume)


def svdvals(A: Tensor) -> Tensor:
    """Singular values, largest first: (..., m, n) -> (..., min(m, n)).

    First derivatives are right also where values coincide; second derivatives are NaN there.

    Raises:
        ShapeError: A has fewer than two dimensions.
        InputError: A is not real floating point, or has a NaN or an infinity.
    """
    return torch.linalg.svdvals(_checked(A, "svdvals")).to(A.dtype)


def rank(A: Tensor, rtol: float | None = None) -> Tensor:
    """Number of singular values over `rtol` times the largest: (..., m, n) -> (...), int64.

    `rtol` defaults to max(m, n) eps of the dtype of A. The zero matrix has rank 0.

    Raises:
        ShapeError: A has fewer than two dimensions.
        InputError: A is not real floating point, or has a NaN or an infinity; `rtol` is negative.

    >>> rank(torch.ones(3, 4))
    tensor(1)
    """
    values = torch.linalg.svdvals(_checked(A, "rank").detach())
    return _is_kept(values, _tolerance(rtol, _rank_rtol(A))).sum(-1)


def fro_norm(A: Tensor) -> Tensor:
    """Frobenius norm sqrt(sum A_ij^2): (..., m, n) -> (...), without overflow or underflow.

    The zero matrix has the derivative zero.
    """
    return _fro_norm(_checked(A, "fro_norm")).to(A.dtype)


def spectral_norm(A: Tensor) -> Tensor:
    """Largest singular value: (..., m, n) -> (...); 0 for an empty matrix.

    First derivatives are u v^T. Second derivatives exist, and are right, where the largest value
    is simple, whatever the others do.

    Cost: one singular value decomposition.
    """
    return _singular_value(_checked(A, "spectral_norm"), 0).to(A.dtype)


def stable_rank(A: Tensor) -> Tensor:
    """||A||_F^2 / ||A||_2^2: (..., m, n) -> (...), between 1 and the rank; 0 for a zero matrix."""
    work = _checked(A, "stable_rank")
    spectral = _singular_value(work, 0)
    zero = spectral == 0
    ratio = _fro_norm(work) / spectral.masked_fill(zero, 1.0)
    return ratio.masked_fill(zero, 0.0).square().to(A.dtype)


def cond(A: Tensor) -> Tensor:
    """Largest over smallest singular value: (..., m, n) -> (...); inf where the smallest is 0.

    An empty matrix has 0, as in `torch.linalg.cond`.
    """
    work = _checked(A, "cond")
    largest, smallest = _singular_value(work, 0), _singular_value(work, -1)
    if 0 in work.shape[-2:]:
        return largest.to(A.dtype)
    zero = smallest == 0
    ratio = largest / smallest.masked_fill(zero, 1.0)
    return ratio.masked_fill(zero, math.inf).to(A.dtype)


def _checked(A: Tensor, name: str) -> Tensor:
    """A in the dtype of the work, or an error that says what is wrong with it."""
    if not isinstance(A, Tensor) or A.dim() < 2:
        got = tuple(A.shape) if isinstance(A, Tensor) else type(A).__name__
        raise ShapeError(f"{name} expects a tensor of matrices (..., m, n), got {got}")
    if not A.dtype.is_floating_point:
        raise InputError(
            f"{name} expects real floating point matrices, got {A.dtype}; cast integers with "
            ".double(), write a complex matrix as its real 2x2 blocks"
        )
    _untracked(partial(_refuse_nonfinite, name=name), A.detach())
    return upcast(A)


def _refuse_nonfinite(A: Tensor, name: str) -> Tensor:
    """Raise InputError at the first entry that is NaN or infinite."""
    finite = A.isfinite()
    if not finite.all():
        index = tuple((~finite).nonzero()[0].tolist())
        raise InputError(
            f"{name} expects finite entries, got {A[index].item()} at index {index} of a tensor "
            f"of shape {tuple(A.shape)}; look for what made it upstream"
        )
    return finite.flatten(-2).all(-1)


def upcast(A: Tensor) -> Tensor:
    """A in float64, or in float32 on devices that have no longer dtype."""
    return A.to(torch.float32 if A.device.type == "mps" else torch.float64)


def _default_rtol(A: Tensor) -> float:
    """4 eps: small enough that float32 at condition 1e6 counts as regular."""
    return 4 * torch.finfo(A.dtype).eps


def _rank_rtol(A: Tensor) -> float:
    """max(m, n) eps: what rounding leaves of a zero singular value."""
    return max(A.shape[-2:]) * torch.finfo(A.dtype).eps


def _tolerance(rtol: float | None, default: float) -> float:
    if rtol is None:
        return default
    if not 0 <= rtol < math.inf:
        raise InputError(f"rtol expects a finite number >= 0, got {rtol}")
    return float(rtol)


def _is_kept(values: Tensor, rtol: float) -> Tensor:
    """Which singular values count as nonzero, where they are sorted from the largest."""
    return values > rtol * values[..., :1]


def _is_deficient(A: Tensor, rtol: float) -> Tensor:
    """Whether any singular value counts as zero: (..., m, n) -> (...)."""
    return ~_is_kept(torch.linalg.svdvals(A), rtol).all(-1)


def _with_identity(A: Tensor, mask: Tensor) -> Tensor:
    """A with identity matrices where the mask is set, so that these have harmless derivatives."""
    identity = torch.eye(*A.shape[-2:], dtype=A.dtype, device=A.device)
    return torch.where(mask[..., None, None], identity, A)


def _scale_rows(A: Tensor) -> Tensor:
    """Rows of largest entry 1: QR keeps the digits of small columns, not those of small rows."""
    if A.shape[-1] == 0:
        return A
    return A / A.detach().abs().amax(-1, keepdim=True)


def _attach(value: Tensor, differentiable: Tensor) -> Tensor:
    """The first one's value with the second one's derivatives."""
    return value + (differentiable - differentiable.detach())


def _qr_logvol(A: Tensor) -> Tensor:
    """1/2 log det(A^T A) of matrices of full column rank, differentiable at every order."""
    R = torch.linalg.qr(A).R
    return R.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def _unit_columns(vectors: Tensor, kept: Tensor) -> Tensor:
    return vectors * kept[..., None, :]


def _padded_logvol(columns: Tensor, kept: Tensor) -> Tensor:
    """Log-volume of the kept columns; each other one is moved to an axis of its own."""
    axes = torch.diag_embed((~kept).to(columns.dtype))
    return _qr_logvol(torch.cat([columns * kept[..., None, :], axes], dim=-2))


def _sign_and_logabs(A: Tensor, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sign, log|det|, and whether the matrix is singular, from the pivots of LU."""
    LU, swaps, _ = torch.linalg.lu_factor_ex(A)
    pivots = LU.diagonal(dim1=-2, dim2=-1)
    positions = torch.arange(1, A.shape[-1] + 1, device=A.device)
    parity = 1 - 2 * ((swaps != positions).sum(-1) % 2)
    singular = (pivots == 0).any(-1)
    suspects = _pivot_is_rounding(LU, rtol) & ~singular
    singular = singular.masked_scatter(suspects, _is_deficient(A[suspects], rtol))
    sign = (pivots.sign().prod(-1) * parity).masked_fill(singular, 0.0)
    return sign, pivots.abs().log().sum(-1).masked_fill(singular, -math.inf), singular


def _pivot_is_rounding(LU: Tensor, rtol: float) -> Tensor:
    """Whether some pivot is as small as the rounding of the sum that it was computed by.

    u_kk = a_kk - sum_i l_ki u_ik, so its error is of the order of eps (|L| |U|)_kk, however the
    columns of the matrix are scaled.
    """
    sizes = LU.abs()
    pivots = sizes.diagonal(dim1=-2, dim2=-1)
    scale = (sizes * sizes.mT).tril(-1).sum(-1) + pivots
    return (pivots <= LU.shape[-1] * rtol * scale).any(-1)


def _fro_norm(A: Tensor) -> Tensor:
    """The norm of A divided by its largest entry, times that entry."""
    if 0 in A.shape[-2:]:
        return A.sum((-2, -1))
    largest = A.detach().abs().amax((-2, -1), keepdim=True)
    scale = largest.masked_fill(largest == 0, 1.0)
    return torch.linalg.vector_norm(A / scale, dim=(-2, -1)) * scale[..., 0, 0]


def _singular_value(A: Tensor, index: int) -> Tensor:
    """One singular value, right in its second derivative whichever of the others coincide.

    The singular vectors u, v get their first derivatives from perturbation theory, as linear
    functions of A - A.detach(); u^T A v / (|u| |v|) is stationary there, so that errors of the
    second order in u and v do not reach the second derivative.
    """
    if 0 in A.shape[-2:]:
        return A.sum((-2, -1))
    U, S, Vh = torch.linalg.svd(A.detach(), full_matrices=False)
    V = Vh.mT
    u, v, change = U[..., index], V[..., index], A - A.detach()
    left, right = _times(change, v), _times(change.mT, u)
    a, b = _times(U.mT, left), _times(Vh, right)
    s = S[..., index, None]
    inverse_gap = _inverse_gap(S, s)
    u = u + _times(U, inverse_gap * (s * a + S * b)) + (left - _times(U, a)) * _inverse(s)
    v = v + _times(V, inverse_gap * (s * b + S * a)) + (right - _times(V, b)) * _inverse(s)
    lengths = torch.linalg.vector_norm(u, dim=-1) * torch.linalg.vector_norm(v, dim=-1)
    return (u * _times(A, v)).sum(-1) / lengths


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _inverse_gap(values: Tensor, chosen: Tensor) -> Tensor:
    """1 / (chosen^2 - values^2), and 0 for those that rounding can't tell from the chosen one."""
    tied = (chosen - values).abs() <= 4 * torch.finfo(values.dtype).eps * values[..., :1]
    gap = ((chosen - values) * (chosen + values)).masked_fill(tied, 1.0)
    return gap.reciprocal().masked_fill(tied, 0.0)


def _inverse(values: Tensor) -> Tensor:
    zero = values == 0
    return values.masked_fill(zero, 1.0).reciprocal().masked_fill(zero, 0.0)


class _Untracked(torch.autograd.Function):
    """A function of a batch of matrices that is decided on values, without derivatives.

    Under `torch.func.vmap` it sees plain tensors with one more batch dimension, and so may branch
    on them.
    """

    @staticmethod
    def forward(function: Callable[[Tensor], Any], A: Tensor) -> Any:
        return function(A)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*outputs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        function, A = args
        output = _Untracked.apply(function, A.movedim(in_dims[1], 0))
        return output, tuple(0 for _ in output) if isinstance(output, tuple) else 0


def _untracked(function: Callable[[Tensor], Any], A: Tensor) -> Any:
    return _Untracked.apply(function, A.detach())
