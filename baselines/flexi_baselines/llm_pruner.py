"""LLM-Pruner's importance (arXiv 2305.11627, and the authors' hf_llama_pruner.py): Taylor scores of coupled structures.

With g the gradient of the mean loss of all calibration samples, and F the mean of the samples' squared gradients, row c
of a map (column c of an output map) scores, under the names of the authors' code (in brackets the paper's):

- vectorize (Vector): |sum_k w_ck g_ck|
- param_first (Element^1), the default: sum_k |w_ck g_ck|
- param_second (Element^2): sum_k |w_ck^2 F_ck|
- param_mix: sum_k |w_ck g_ck - w_ck^2 F_ck / 2|

``grouping_strategy`` joins the maps of a structure channel by channel; a head is the sum of its channels. The uniform
removal of the paper is strategy remove-units with mode = "uniform" and its ``fraction``. The authors' global removal
ranks raw scores, as mode = "global" does with these, but counts its budget in units, heads and channels alike, which no
strategy here does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_plugins.data import BlockShape, Scores
from flexi_plugins.hookspecs import GradientTrace, ImportanceMetric, LinearTrace, PruningRequest, Statistic, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["vectorize", "param_first", "param_second", "param_mix"]
FORMS: tuple[Form, ...] = ("vectorize", "param_first", "param_second", "param_mix")
ATTENTION = ("query", "attention_output", "value", "key")
MLP = ("gate", "up", "down")
"""The maps of a structure in the order in which the authors' dependency graph comes to them (as we read its traversal)."""
OUTPUT_MAPS = ("attention_output", "down")


@dataclass(frozen=True)
class GroupTaylor:
    """Taylor score of every row of a block's maps, and of every column of its output maps, over all samples together."""

    taylor: Form = "param_first"

    span: ClassVar[int] = 1
    backward: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Its name says its form."""
        return f"llm-pruner-{self.taylor}"

    def observe(self, trace: GradientTrace) -> dict[str, Tensor]:
        """Return for each role the scores of its map, (rows,) or (columns,); empty where the map is absent."""
        import torch

        return {
            role: row_scores(trace.maps[role], role in OUTPUT_MAPS, self.taylor)
            if role in trace.maps
            else torch.zeros(0)
            for role in (*ATTENTION, *MLP)
        }

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return the scores as they are."""
        return dict(totals)


def row_scores(trace: LinearTrace, columns: bool, taylor: Form) -> Tensor:
    """Return the score of each row of a matrix, or of each of its columns: (rows,) or (columns,), float32.

    Gradients are formed some rows at a time: nothing of the matrix's size is held.
    """
    from flexi_plugins.numerics import PRODUCT, pieces

    left, right, weight = trace.output_gradient.float(), trace.input.float(), trace.weight
    if columns:  # they are the rows of the transposed map
        left, right = right, left
    scores = left.new_empty(left.shape[2])
    for part in pieces(left.shape[2], right.shape[2], PRODUCT):
        w = (weight[:, part].T if columns else weight[part]).contiguous().float()
        dy = left[:, :, part]
        if taylor == "param_second":
            terms = _second(dy, right, w)
        else:
            terms = _first(dy, right, w)
            if taylor == "param_mix":
                terms = terms.sub_(_second(dy, right, w), alpha=0.5)
        scores[part] = terms.sum(1).abs() if taylor == "vectorize" else terms.abs().sum(1)
    return scores


def _first(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Return w g; dy: (samples, tokens, rows), x: (samples, tokens, columns), w: (rows, columns)."""
    return (dy.flatten(0, 1).T @ x.flatten(0, 1)).mul_(w).div_(len(dy))


def _second(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Return w^2 F of the same; one sample's gradient is held at a time."""
    import torch

    total = torch.zeros_like(w)
    for one_dy, one_x in zip(dy, x, strict=True):
        gradient = one_dy.T @ one_x
        total.addcmul_(gradient, gradient)
    return total.mul_(w).mul_(w).div_(len(dy))


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
