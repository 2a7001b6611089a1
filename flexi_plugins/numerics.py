"""Small numeric helpers that several methods share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from flexi_plugins.precision import widens

PIECE = 2**18  # elements of a temporary: 1 MiB of float32, so that what follows on it finds it in the cache
PRODUCT = 256  # rows from which on a matrix product runs at full speed
ROUNDING = 2.0**-46  # a float32's relative rounding error, squared


def pieces(length: int, width: int, least: int = 1) -> Iterator[slice]:
    """Cut ``length`` rows (or columns) of ``width`` elements into slices of about ``PIECE`` elements, ``least`` rows or more.

    Large tensors are worked on piece by piece: temporaries stay small whatever their size, and element-wise steps fast.
    """
    step = max(least, PIECE // max(1, width))
    return (slice(start, start + step) for start in range(0, max(1, length), step))


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite: by the ends of their range, many times as fast as one by one."""
    return not values.numel() or all(bool(end.isfinite()) for end in values.detach().aminmax())


def cross_entropy(logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """Return the summed cross-entropy of (rows, vocabulary) logits and (rows,) labels, nats: (), float32.

    It is ``torch.nn.functional.cross_entropy`` piece by piece: a float32 copy of all logits, their log-probabilities and
    their gradient, which that one writes, take longer than what they are for, and gigabytes where the vocabulary is large.
    Here only the gradient is written, in the dtype of the logits. It has no derivative of its own.
    """
    return _CrossEntropy.apply(logits, labels, ignored)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.ignored = ignored
        losses = torch.empty(len(logits), device=logits.device)
        for part in _pieces_of_logits(logits):
            losses[part] = functional.cross_entropy(
                logits[part].float(), labels[part], ignore_index=ignored, reduction="none"
            )
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the probabilities, less one at the label, times the gradient of the sum."""
        logits, labels = ctx.saved_tensors
        weights, found = labels.ne(ctx.ignored)[:, None] * gradient, torch.empty_like(logits)
        labels = labels.where(labels != ctx.ignored, 0)[:, None]
        for part in _pieces_of_logits(logits):
            piece = logits[part].softmax(-1, dtype=torch.float32).mul_(weights[part])
            found[part] = piece.scatter_add_(1, labels[part], -weights[part])
        return found, None, None


def _pieces_of_logits(logits: Tensor) -> Iterator[slice]:
    """Cut the rows of (rows, vocabulary) logits; few and large on a GPU, where every step costs a start."""
    rows, width = logits.shape
    return pieces(rows, width if logits.device.type == "cpu" else width // 256)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product a @ b of (rows, inner) and (inner, columns) in float32.

    bfloat16 factors are multiplied as they are, twice as fast: the sums are float32 inside, and each is rounded once to
    bfloat16, like everything that a model of that dtype computes. float16 could overflow.
    """
    if not a.dtype == b.dtype == torch.bfloat16:
        return a.float() @ b.float()
    if not widens(a.dtype, a.device):
        return (a @ b).float()
    found, wide = torch.empty(len(a), b.shape[1], device=a.device), b.float()
    rows, inner = a.shape
    for part in pieces(rows, inner, PRODUCT):
        found[part] = (a[part].float() @ wide).bfloat16()
    return found


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Return a - b of two (rows, columns) tensors in float32, piece by piece: of bfloat16 that is several times as fast."""
    result = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    for part in pieces(*a.shape):
        result[part].copy_(a[part]).sub_(b[part].float())
    return result


def absolute_sum(values: Tensor) -> Tensor:
    """Return the sum over the rows of the absolute values of a (rows, columns) tensor: (columns,), float32."""
    parts = list(pieces(*values.shape))
    sums = torch.empty(len(parts), values.shape[1], dtype=torch.float32, device=values.device)
    for part, row in zip(parts, sums, strict=True):
        torch.sum(values[part].abs(), 0, dtype=torch.float32, out=row)
    return sums.sum(0)


def squared_norms(values: Tensor) -> Tensor:
    """Return the squared norms of the rows of a (rows, columns) tensor: (rows,), float32."""
    return torch.cat([values[part].float().square().sum(1) for part in pieces(*values.shape)])


def one_minus_cosine(hh: Tensor, hv: Tensor, vv: Tensor) -> Tensor:
    """Return 1 - cos(h, h - v) from |h|^2, h.v and |v|^2 (any broadcastable shapes), without cancellation.

    In units of |h|, h - v is along h by 1 - h.v / |h|^2 and across by the root of |v|^2 / |h|^2 - (h.v / |h|^2)^2: the
    result stays in 0..2 even where h - v almost vanishes. A vanished h or h - v has no direction: the distance is then
    1. NaN stays NaN.
    """
    share, size = hv / hh, vv / hh
    across = torch.addcmul(size, share, share, value=-1)
    torch.maximum(across, size.mul_(ROUNDING), out=across)  # never negative, and no rest without a length
    return _distance(share.neg_().add_(1), across).masked_fill_(hh == 0, 1)


def row_distance(before: Tensor, after: Tensor) -> Tensor:
    """Return 1 - cos of matching rows of two (tokens, hidden) tensors: (tokens,), float32.

    What is across is taken from the shorter of ``before`` and the difference, since one of them may be tiny.
    """
    return torch.cat([_row_distance(before[part], after[part]) for part in pieces(*after.shape)])


def _row_distance(before: Tensor, after: Tensor) -> Tensor:
    h, b = after.float(), before.float()
    v = h - b
    hh, bb, vv = ((x * x).sum(1) for x in (h, b, v))
    shorter = torch.where((vv < bb)[:, None], v, b)
    across = torch.addcmul(shorter, ((h * shorter).sum(1) / hh)[:, None], h, value=-1).square_().sum(1)
    along = (h * b).sum(1) * torch.rsqrt(hh)
    return torch.where((hh == 0) | (bb == 0), 1.0, _distance(along, across))


def _distance(along: Tensor, across: Tensor) -> Tensor:
    """1 - cos of the angle to h of what lies along h by ``along`` and across by the root of ``across``, in any unit.

    1 - cos = sin^2 / (1 + cos); where cos < 0, sin^2 + cos^2 + |cos|. Without branches, which cost more than all else.
    """
    total = torch.addcmul(across, along, along)
    cosine = along * total.rsqrt()
    distance = across / torch.addcmul(total, total, cosine.clamp_min(0))
    backward = cosine.clamp_max_(0)
    return distance.addcmul_(backward, backward).sub_(backward).clamp_max_(2)


def enlargement(before: Tensor, after: Tensor) -> float:
    """Return Prune&Comp's alpha: the mean over channels of the mean over windows of after / before, both (windows, hidden).

    before, after: mean magnitudes of the residual stream. A channel that is silent in a window says nothing there, and
    counts as unchanged.
    """
    ratio = (after / before).where(before > 0, after.new_ones(()))
    return float(ratio.double().mean(0).mean())


def standardise(values: Tensor) -> Tensor:
    """Return (values - mean) / std over all entries; zeros where they do not differ (or there is one)."""
    if values.numel() < 2:
        return torch.zeros_like(values)
    deviation = values.std(correction=0)
    return (values - values.mean()) / deviation if float(deviation) > 0 else torch.zeros_like(values)


SMALL = 1024
"""Matrices whose shorter side is at most so long are factorised exactly: that takes about a second."""
STEPS = 12
"""Blocks of the Krylov space, which has three times as many dimensions as singular values are wanted.

Measured on all pairs of SmolLM2's blocks, rank 36: FlexiGPT's donor distance is off by 0.7 % (at most 1.1 %), always to the
same side; with 10 blocks 1.7 % (2.5 %), with 14 blocks 0.2 % (0.5 %).
"""


def truncated_svd(
    matrix: Tensor, rank: int, method: Literal["auto", "exact", "randomised"] = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the r largest singular values of a (rows, columns) matrix: U (rows, r), S (r,), V (columns, r), float32.

    r = min(rank, rows, columns); U and V have orthonormal columns. ``auto`` is exact up to a shorter side of ``SMALL``
    and randomised beyond. Where the randomised space would be the whole space, the exact factorisation is taken. The
    result depends on the arguments alone: torch's random state is neither read nor changed.
    """
    matrix = matrix.float()
    side = min(matrix.shape)
    width = max(8, -(-rank // 4))  # columns of a Krylov block
    if method == "exact" or (method == "auto" and side <= SMALL) or width * STEPS >= side:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank].contiguous(), s[:rank], vh[:rank].T.contiguous()
    if matrix.shape[0] <= matrix.shape[1]:
        return _krylov_svd(matrix, rank, width)
    v, s, u = _krylov_svd(matrix.T, rank, width)
    return u, s, v


def _krylov_svd(matrix: Tensor, rank: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Randomised block Krylov SVD (Musco and Musco 2015, arXiv 1504.05477, algorithm 2) of a wide matrix A.

    Q is an orthonormal basis of A G, (A A') A G, ..., (A A')^(STEPS - 1) A G for a random G with ``width`` columns; the
    singular values of Q' A are taken for A's. Weights of language models have flat spectra, on which the usual subspace
    iteration (``torch.svd_lowrank``) converges slowly: on SmolLM2's maps, rank 36, it needs more than twice the products
    for the same error.
    """
    rows, columns = matrix.shape
    generator = torch.Generator().manual_seed(0)
    basis = matrix.new_empty(rows, width * STEPS)
    images = matrix.new_empty(columns, width * STEPS)  # A' Q
    last = torch.randn(columns, width, generator=generator)
    for start in range(0, width * STEPS, width):
        before, here = basis[:, :start], slice(start, start + width)
        noise = 1e-6 * torch.randn(rows, width, generator=generator)  # an exhausted space goes on at random
        block = _orthonormal(matrix @ last) + noise
        for _ in range(2):  # once leaves rounding errors of the size of what was taken away
            block = _orthonormal(block - before @ (before.T @ block))
        basis[:, here] = block
        images[:, here] = last = matrix.T @ block
    wide = images.double()
    squares = (wide.T @ wide).numpy()  # Q' A A' Q
    mixing = torch.from_numpy(np.linalg.eigh(squares).eigenvectors).flip(1)[:, :rank].float()
    v, triangle = torch.linalg.qr(images @ mixing)  # the columns are orthogonal already: V times the singular values
    s = triangle.diagonal()
    return basis @ (mixing * torch.where(s < 0, -1, 1)), s.abs(), v


def _orthonormal(block: Tensor) -> Tensor:
    """Return orthonormal columns that span those of a tall block, by Cholesky QR: matrix products, fast on any threads.

    The shift (Fukaya and others 2020, arXiv 1809.11085) lets it work on columns that depend on each other: what of them
    is below 1e-5 of the block comes out short, and a second time does better.
    """
    wide = block.double()
    gram = wide.T @ wide
    gram.diagonal().add_(1e-10 * gram.trace() + torch.finfo(gram.dtype).tiny)
    return (wide @ torch.linalg.inv(torch.linalg.cholesky(gram)).T).float()
