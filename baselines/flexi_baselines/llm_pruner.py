"""LLM-Pruner's importance (arXiv 2305.11627, and the authors' hf_llama_pruner.py): Taylor scores of coupled structures.

The scores of the rows and columns of a map, in four forms, are in ``group_taylor``. ``grouping_strategy`` joins the maps of
a structure channel by channel; a head is the sum of its channels. The uniform removal of the paper is strategy remove-units
with mode = "uniform" and its ``fraction``. The authors' global removal ranks raw scores, as mode = "global" does with
these, but counts its budget in units, heads and channels alike, which no strategy here does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_baselines.group_taylor import ATTENTION, FORMS, MLP, Form, GroupTaylor
from flexi_plugins.data import BlockShape, Scores
from flexi_plugins.hookspecs import ImportanceMetric, PruningRequest, Statistic, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LlmPruner:
    """Taylor scores of KV heads with their query heads, and of channels."""

    taylor: Form = "param_first"
    # How the maps of a structure are joined; first and second: one map alone, query and attention output, or gate and up
    # (the authors' script for Llama 3 starts its graph at the key map instead, which changes these two only).
    grouping_strategy: Literal["sum", "mean", "max", "prod", "first", "second"] = "sum"
    # Which query heads count for a KV head: its own, or, to explain deviations, every kv_heads-th one as released.
    pairing: Literal["grouped", "released"] = "grouped"

    name: ClassVar[str] = "llm-pruner"
    paper: ClassVar[str] = "LLM-Pruner, arXiv 2305.11627"
    gives: ClassVar[frozenset[str]] = frozenset({"attention", "mlp"})

    @property
    def needs(self) -> frozenset[str]:
        """Taylor scores of its form."""
        return frozenset({GroupTaylor(self.taylor).name})

    def score(self, request: PruningRequest) -> Scores:
        """Return the joined scores. Sums over all maps are in one scale; the authors' global mode ranks them as they are."""
        found = request.statistics[GroupTaylor(self.taylor).name]
        attention, mlp = [], []
        for index, block in enumerate(request.shape.blocks):
            channels = self.joined([self.aligned(found[role][index], block) for role in ATTENTION])
            attention.append(channels.view(block.kv_heads, block.head_dim).sum(1))
            mlp.append(self.joined([found[role][index] for role in MLP]))
        comparable = self.grouping_strategy == "sum"
        return Scores(attention=tuple(attention), mlp=tuple(mlp), comparable=comparable, rule="undivided")

    def aligned(self, scores: Tensor, block: BlockShape) -> Tensor:
        """Return scores of an attention map per channel of the KV heads: (KV heads x head dim,).

        Channels of query heads are added to those of a KV head: query head h belongs to KV head h // group. The released
        code views them as (group, KV heads x head dim), which gives it to KV head h % kv_heads.
        """
        if not block.kv_heads:
            return scores
        if self.pairing == "released":
            return scores.view(-1, block.kv_heads * block.head_dim).sum(0)
        return scores.view(block.kv_heads, -1, block.head_dim).sum(1).flatten()

    def joined(self, maps: Sequence[Tensor]) -> Tensor:
        """Return one score a channel from those of the maps, each (channels,)."""
        import torch

        if self.grouping_strategy in ("first", "second"):
            return maps[("first", "second").index(self.grouping_strategy)]
        stacked = torch.stack(list(maps))
        if self.grouping_strategy == "max":
            return stacked.amax(0)
        if self.grouping_strategy == "prod":
            return stacked.prod(0)
        return stacked.sum(0) if self.grouping_strategy == "sum" else stacked.mean(0)


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the llm-pruner metric."""
    return [LlmPruner()]


@hookimpl
def statistics() -> list[Statistic]:
    """Return Taylor scores in all forms."""
    return [GroupTaylor(form) for form in FORMS]
