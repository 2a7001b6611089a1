"""Small numeric helpers that several methods share; float32 throughout."""

from __future__ import annotations

import torch
from torch import Tensor


def one_minus_cosine(hh: Tensor, hv: Tensor, vv: Tensor) -> Tensor:
    """Return 1 - cos(h, h - v) from |h|^2, h.v and |v|^2 (any broadcastable shapes), without cancellation.

    h - v is along h by (|h|^2 - h.v) / |h| and across by |v|^2 - (h.v)^2 / |h|^2 (squared): the result stays in 0..2
    even where h - v almost vanishes. A vanished h or h - v has no direction: the distance is then 1. NaN stays NaN.
    """
    along = (hh - hv) * torch.rsqrt(hh)
    across = (vv - hv * hv / hh).clamp_min(0)  # squared
    return _distance(along, across, hh)


def row_distance(before: Tensor, after: Tensor) -> Tensor:
    """Return 1 - cos of matching rows of two (tokens, hidden) tensors: (tokens,), float32.

    What is across is taken from the shorter of ``before`` and the difference, since one of them may be tiny.
    """
    h, b = after.float(), before.float()
    v = h - b
    hh, bb, vv = ((x * x).sum(-1, keepdim=True) for x in (h, b, v))
    shorter = torch.where(vv < bb, v, b)
    across = shorter - (h * shorter).sum(-1, keepdim=True) / hh * h
    along = (h * b).sum(-1, keepdim=True) * torch.rsqrt(hh)
    return _distance(along, (across * across).sum(-1, keepdim=True), hh)[..., 0]


def _distance(along: Tensor, across: Tensor, hh: Tensor) -> Tensor:
    """1 - cos = sin^2 / (1 + cos); where cos < 0, 1 - cos directly."""
    total = along * along + across
    cosine = along * torch.rsqrt(total)
    distance = torch.where(cosine > 0, across / total / (1 + cosine), 1 - cosine)
    return torch.where((hh == 0) | (total == 0), torch.ones_like(distance), distance)


def standardise(values: Tensor) -> Tensor:
    """Return (values - mean) / std over all entries; zeros where they do not differ (or there is one)."""
    if values.numel() < 2:
        return torch.zeros_like(values)
    deviation = values.std(correction=0)
    return (values - values.mean()) / deviation if float(deviation) > 0 else torch.zeros_like(values)
