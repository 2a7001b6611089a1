"""The Taylor scores that LLM-Pruner ranks by (arXiv 2305.11627, and the authors' hf_llama_pruner.py).

With g the gradient of the mean loss of all calibration samples, and F the mean of the samples' squared gradients, row c
of a map (column c of an output map) scores, under the names of the authors' code (in brackets the paper's):

- vectorize (Vector): |sum_k w_ck g_ck|
- param_first (Element^1), the default: sum_k |w_ck g_ck|
- param_second (Element^2): sum_k |w_ck^2 F_ck|
- param_mix: sum_k |w_ck g_ck - w_ck^2 F_ck / 2|
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_plugins.hookspecs import GradientTrace, LinearTrace

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
