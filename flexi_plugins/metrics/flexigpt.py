"""FlexiGPT's importance: block influence (arXiv 2501.14713, eq. 1, from ShortGPT), and its leave-one-out form for units.

Block: 1 - cos(x_in, x_out), mean over tokens, from the block's own input and output (never after the final norm). Unit:
1 - cos(h, h - v), mean over tokens, h the sub-layer's residual output and v what the unit itself adds to it: exactly how
far the residual stream turns when the unit alone is left out. The paper has the block score only; the unit scores are
this project's extension of the same formula, and are in one scale for heads, channels and blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flexi_plugins.data import Scores
from flexi_plugins.hookspecs import BlockTrace, ImportanceMetric, PruningRequest, Statistic, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BlockInfluence:
    """Mean over tokens of 1 - cos(input, output), and the same with the cosine clamped to [0, 1] as CoMe's code does."""

    name: ClassVar[str] = "block-influence"
    span: ClassVar[int] = 1
    backward: ClassVar[bool] = False

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        """Return sums over tokens, both ()."""
        from flexi_plugins.numerics import row_distance

        distance = row_distance(trace.input, trace.output)
        return {"influence": distance.sum(), "clamped": distance.clamp(0, 1).sum()}

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return means over tokens."""
        return {name: total / tokens for name, total in totals.items()}


@dataclass(frozen=True)
class LeaveOneOut:
    """Mean over tokens of 1 - cos(h, h - v) for every KV head and every channel of a block."""

    name: ClassVar[str] = "leave-one-out"
    span: ClassVar[int] = 1
    backward: ClassVar[bool] = False

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        """Return sums over tokens: attention (KV heads,), mlp (channels,)."""
        import torch

        empty = torch.zeros(0)
        attention = mlp = empty
        if trace.attention_inner is not None and trace.attention_weight is not None:
            attention = head_distances(trace.middle, trace.attention_inner, trace.attention_weight, trace.kv_heads)
        if trace.mlp_inner is not None and trace.mlp_weight is not None:
            mlp = channel_distances(trace.output, trace.mlp_inner, trace.mlp_weight)
        return {"attention": attention, "mlp": mlp}

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return means over tokens."""
        return {name: total / tokens for name, total in totals.items()}


def channel_distances(stream: Tensor, inner: Tensor, weight: Tensor) -> Tensor:
    """Sum over tokens of 1 - cos(h, h - a_c w_c) for each channel c.

    stream: (tokens, hidden), the residual output h; inner: (tokens, channels), a; weight: (hidden, channels), w. (channels,)
    """
    import torch

    from flexi_plugins.numerics import PRODUCT, one_minus_cosine, pieces, product, squared_norms

    hh = squared_norms(stream)[:, None]
    sums = []
    for part in pieces(inner.shape[1], max(stream.shape), PRODUCT):
        a, w = inner[:, part].float(), weight[:, part]
        hv = product(stream, w).mul_(a)
        vv = a.square().mul_(w.float().square().sum(0))
        sums.append(one_minus_cosine(hh, hv, vv).sum(0))
    return torch.cat(sums)


def head_distances(stream: Tensor, inner: Tensor, weight: Tensor, kv_heads: int) -> Tensor:
    """Sum over tokens of 1 - cos(h, h - v_k) for each KV head k with its query heads; shapes as above, (KV heads,).

    |v_k|^2 = o' G o with o the head's inner activations and G the Gram matrix of its columns of W_o.
    """
    import torch

    from flexi_plugins.numerics import one_minus_cosine, product, squared_norms

    hh = squared_norms(stream)
    sums = []
    for o, w in zip(inner.chunk(kv_heads, 1), weight.chunk(kv_heads, 1), strict=True):
        hv = product(stream, w).mul_(o).sum(1)
        o, w = o.float(), w.float()  # (tokens, group x head dim), (hidden, group x head dim)
        vv = (o @ (w.T @ w)).mul_(o).sum(1)
        sums.append(one_minus_cosine(hh, hv, vv).sum())
    return torch.stack(sums)


@dataclass(frozen=True)
class FlexiGPT:
    """Block influence, and exact leave-one-out influence of KV heads and channels."""

    name: ClassVar[str] = "flexigpt"
    paper: ClassVar[str] = "FlexiGPT, arXiv 2501.14713"
    gives: ClassVar[frozenset[str]] = frozenset({"block", "attention", "mlp"})
    needs: ClassVar[frozenset[str]] = frozenset({"block-influence", "leave-one-out"})

    def score(self, request: PruningRequest) -> Scores:
        """Return the mean distances as they are; comparable."""
        import torch

        units = request.statistics["leave-one-out"]
        block = torch.stack(request.statistics["block-influence"]["influence"])
        return Scores(block=block, attention=units["attention"], mlp=units["mlp"], comparable=True)


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the flexigpt metric."""
    return [FlexiGPT()]


@hookimpl
def statistics() -> list[Statistic]:
    """Return block influence and leave-one-out distances."""
    return [BlockInfluence(), LeaveOneOut()]
