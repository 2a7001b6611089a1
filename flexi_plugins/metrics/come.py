"""CoMe's channel sensitivity (arXiv 2510.15304, and the authors' code: L1_Correlation).

Sensitivity of channel c = mean over tokens of |a_c| x L1 norm of its outgoing weight column: the L1 norm of what the
channel adds to the residual stream. Query head h belongs to KV head h // group. To rank units of all blocks together, a
KV head scores the sum over its channels and every unit is taken relative to the residual stream's mean L1 norm; CoMe
itself ranks within a block only, where this changes nothing.
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
class Sensitivity:
    """Mean |activation| x L1 norm of the outgoing column, and the mean L1 norm of the residual stream it adds to."""

    name: ClassVar[str] = "sensitivity"
    span: ClassVar[int] = 1
    backward: ClassVar[bool] = False

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        """Return sums over tokens: attention (query heads x head dim,), mlp (channels,), and both residual norms ()."""
        import torch

        from flexi_plugins.numerics import absolute_sum

        empty = torch.zeros(0)
        sums = {"attention": empty, "mlp": empty}
        if trace.attention_inner is not None and trace.attention_weight is not None:
            sums["attention"] = contribution(trace.attention_inner, trace.attention_weight)
        if trace.mlp_inner is not None and trace.mlp_weight is not None:
            sums["mlp"] = contribution(trace.mlp_inner, trace.mlp_weight)
        sums["attention_residual"] = absolute_sum(trace.middle).sum()
        sums["mlp_residual"] = absolute_sum(trace.output).sum()
        return sums

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return means over tokens."""
        return {name: total / tokens for name, total in totals.items()}


def contribution(inner: Tensor, weight: Tensor) -> Tensor:
    """Sum over tokens of |a_c| x ||w_c||_1; inner: (tokens, columns), weight: (hidden, columns) -> (columns,)."""
    from flexi_plugins.numerics import absolute_sum

    return absolute_sum(inner) * absolute_sum(weight)


@dataclass(frozen=True)
class PairAngle:
    """arccos(cos(h_in of the block before, h_out of this block)) / pi: how much two successive blocks turn the stream.

    Entry i belongs to the pair (i - 1, i); entry 0 is 0 and means nothing. "last": only the last token of each window
    (as released for CoMe); "all": every token (as released for CoMe-P). The last block's output is taken in front of the
    final norm, where the released code has it behind.
    """

    name: ClassVar[str] = "pair-angle"
    span: ClassVar[int] = 2
    backward: ClassVar[bool] = False

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        """Return sums over tokens, and the number of last tokens; all ()."""
        import torch

        from flexi_plugins.numerics import row_distance

        count = trace.last.sum().float()
        if trace.index == 0:
            return {"all": torch.zeros(()), "last": torch.zeros(()), "count": count}
        distance = row_distance(trace.before[-1], trace.output).clamp(0, 1)
        angle = 2 * torch.arcsin((distance / 2).sqrt()) / torch.pi  # arccos(1 - distance), exact for small ones
        return {"all": angle.sum(), "last": angle[trace.last].sum(), "count": count}

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return means over all tokens, and over last tokens."""
        return {"all": totals["all"] / tokens, "last": totals["last"] / totals["count"]}


@dataclass(frozen=True)
class CoMe:
    """Channel sensitivity, relative to the residual stream; a KV head is the sum of its channels, a block of its units."""

    name: ClassVar[str] = "come"
    paper: ClassVar[str] = "CoMe, arXiv 2510.15304"
    gives: ClassVar[frozenset[str]] = frozenset({"block", "attention", "mlp"})
    needs: ClassVar[frozenset[str]] = frozenset({"sensitivity"})

    def score(self, request: PruningRequest) -> Scores:
        """Return relative sensitivities; comparable."""
        import torch

        found = request.statistics["sensitivity"]
        attention, mlp = [], []
        for index, block in enumerate(request.shape.blocks):
            channels = found["attention"][index]
            heads = channels.view(block.kv_heads, -1).sum(1) if block.kv_heads else channels
            attention.append(heads / found["attention_residual"][index])
            mlp.append(found["mlp"][index] / found["mlp_residual"][index])
        total = torch.stack([a.sum() + m.sum() for a, m in zip(attention, mlp, strict=True)])
        return Scores(block=total, attention=tuple(attention), mlp=tuple(mlp), comparable=True)


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the come metric."""
    return [CoMe()]


@hookimpl
def statistics() -> list[Statistic]:
    """Return channel sensitivity and pair angles."""
    return [Sensitivity(), PairAngle()]
