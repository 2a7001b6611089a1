"""How alike the blocks of a model are by MKA (arXiv 2406.16330, and its released pipeline.py): embeddings and NPIB."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

AXES = 2  # of an embedding


def embedded(states: Tensor, sigma: float, alpha: float) -> Tensor:
    """Return the diffusion embedding of states (rows, hidden): (rows, AXES), float64.

    K = exp(-sqrt(|x - y| / sigma)); K_1 = K / (p p')^alpha, p the column sums of K; A = K_1 / (v v'), v the roots of the
    column sums of K_1; the singular vectors of A behind the first, each divided by the first.
    """
    import torch

    kernel = torch.exp(-(_distances(states.double()) / sigma).sqrt())
    density = kernel.sum(0)
    kernel = kernel / torch.outer(density, density) ** alpha
    degree = kernel.sum(0).sqrt()
    vectors = torch.linalg.svd((kernel / torch.outer(degree, degree)).clamp_min(1e-12)).U[:, : AXES + 1]
    first = vectors[:, :1]
    return vectors[:, 1:] / torch.where(first == 0, 1e-8, first)


def ranked(points: Tensor) -> Tensor:
    """Return each coordinate's rank along its axis, from 0, over the number of points."""
    return points.argsort(dim=0, stable=True).argsort(0).double() / len(points)


def entropy(points: Tensor, k: int) -> float:
    """Return -mean log(k / (n r^axes)) over n points (n, axes), r a point's distance to its k-th neighbour."""
    radius = _distances(points).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
    return float(-(k / (len(points) * radius ** points.shape[1])).log().mean())


def npib(points: Sequence[Tensor], n_neighbors: int, k_entropy: int, seed: int) -> Tensor:
    """Return the similarity of every two blocks from their embeddings (rows, AXES): (blocks, blocks), symmetric.

    The mean mutual information of an axis of one and an axis of the other (the estimator of Kraskov and others 2004, as
    in scikit-learn; seed: of the noise that it adds against ties) / sqrt(|H_i H_j|), H the entropies; where these differ
    in sign, the released code, without the bars, has no number.
    """
    import torch
    from sklearn.feature_selection import mutual_info_regression

    entropies = [entropy(p, k_entropy) for p in points]
    found = torch.empty(len(points), len(points), dtype=torch.float64)
    for i, own in enumerate(points):
        for j, other in enumerate(points[i:], i):
            shared = [
                mutual_info_regression(own.numpy(), axis.numpy(), n_neighbors=n_neighbors, random_state=seed).mean()
                for axis in other.T
            ]
            found[i, j] = found[j, i] = sum(shared) / len(shared) / abs(entropies[i] * entropies[j]) ** 0.5
    return found


def _distances(points: Tensor) -> Tensor:
    import torch

    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
