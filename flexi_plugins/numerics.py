"""Small numeric helpers that several methods share; float32 throughout."""

from __future__ import annotations

import torch
from torch import Tensor


def one_minus_cosine(hh: Tensor, hv: Tensor, vv: Tensor) -> Tensor:
    """Return 1 - cos(h, h - v) from |h|^2, h.v and |v|^2 (any broadcastable shapes), without cancellation.

    1 - cos = s / (1 + cos) with s = sin^2 = (|v|^2 - (h.v)^2 / |h|^2) / |h - v|^2; where cos < 0, 1 - cos directly. A
    vanished h or h - v has no direction: the distance is then 1.
    """
    remaining = hh - 2 * hv + vv
    cosine = (hh - hv) * torch.rsqrt(hh * remaining)
    sine_squared = (vv - hv * hv / hh).clamp_min(0) / remaining
    distance = torch.where(cosine > 0, sine_squared / (1 + cosine), 1 - cosine)
    return torch.where((hh > 0) & (remaining > 0), distance, torch.ones_like(distance))


def row_distance(before: Tensor, after: Tensor) -> Tensor:
    """Return 1 - cos of matching rows of two (tokens, hidden) tensors: (tokens,), float32."""
    h, v = after.float(), after.float() - before.float()
    return one_minus_cosine((h * h).sum(-1), (h * v).sum(-1), (v * v).sum(-1))


def standardise(values: Tensor) -> Tensor:
    """Return (values - mean) / std over all entries; zeros where they do not differ (or there is one)."""
    if values.numel() < 2:
        return torch.zeros_like(values)
    deviation = values.std(correction=0)
    return (values - values.mean()) / deviation if float(deviation) > 0 else torch.zeros_like(values)
