"""Taylor and Taylor+ (Shortened LLaMA, arXiv 2402.02834, and the authors' anal_block_sensitivity_taylor.py).

Per matrix and output row sum_k |w_ck g_ck|^p with g the gradient of the mean loss over all calibration samples (they are
one batch), reduced as in Magnitude; the two norms count as vectors of |w g|^p. "+" keeps the first four and the last two
blocks. A norm's own gradient is had from the maps behind it: with x the norm's output, w_c g_c = sum_t x_tc dL/dx_tc, and
dL/dx_tc = sum_r dy_tr W_rc, so it is the sum over those maps' rows of their W_rc G_rc. The norms that Qwen3 has inside its
heads are left out, biases as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_baselines.magnitude import Reduction, ends_raised, reduced
from flexi_plugins.data import Scores
from flexi_plugins.hookspecs import GradientTrace, ImportanceMetric, LinearTrace, PruningRequest, Statistic, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

ROLES = ("query", "key", "value", "attention_output", "gate", "up", "down")
BEHIND = {"attention_norm": ("query", "key", "value"), "mlp_norm": ("gate", "up")}  # maps that read a norm's output


@dataclass(frozen=True)
class MeanTaylor:
    """First-order Taylor terms w g of a block's maps and norms, g the mean gradient over the samples.

    Quantities: ROLE.1 and ROLE.2, (rows,), sums over a row of |w g| and of its square; attention_norm and mlp_norm,
    (hidden,), w g itself. Those of an absent sub-layer are empty.
    """

    name: ClassVar[str] = "mean-taylor"
    span: ClassVar[int] = 1
    backward: ClassVar[bool] = True

    def observe(self, trace: GradientTrace) -> dict[str, Tensor]:
        """Return the terms' sums."""
        import torch

        found = {f"{role}.{power}": torch.zeros(0) for role in ROLES for power in (1, 2)}
        columns = {}
        for role, linear in trace.maps.items():
            found[f"{role}.1"], found[f"{role}.2"], columns[role] = term_sums(linear)
        for norm, roles in BEHIND.items():
            terms = [columns[role] for role in roles if role in columns]
            found[norm] = torch.stack(terms).sum(0) if terms else torch.zeros(0)
        return found

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return the sums as they are."""
        return dict(totals)


def term_sums(trace: LinearTrace) -> tuple[Tensor, Tensor, Tensor]:
    """Return the row sums of |w g| and of (w g)^2, (rows,), and the column sums of w g, (columns,); float32.

    The mean gradient is formed some rows at a time, so that nothing of the matrix's size is held.
    """
    import torch

    from flexi_plugins.numerics import PRODUCT, pieces

    left, right = trace.output_gradient.flatten(0, 1).float(), trace.input.flatten(0, 1).float()  # (all tokens, width)
    absolute, squared = left.new_empty(left.shape[1]), left.new_empty(left.shape[1])
    columns = right.new_zeros(right.shape[1])
    for part in pieces(left.shape[1], right.shape[1], PRODUCT):
        terms = (left[:, part].T @ right).mul_(trace.weight[part].float()).div_(len(trace.input))
        columns += terms.sum(0)
        torch.sum(terms.abs_(), 1, out=absolute[part])
        torch.sum(terms.square_(), 1, out=squared[part])
    return absolute, squared, columns


@dataclass(frozen=True)
class Taylor:
    """The first-order estimate of how the loss changes without a block's weights."""

    norm_power: Literal[1, 2] = 1  # p
    weight_reduction: Reduction = "sum"  # over the rows of a matrix
    block_reduction: Reduction = "sum"  # over the matrices and norms of a block
    plus: bool = False  # Taylor+: the first four and the last two blocks rank above all others

    name: ClassVar[str] = "taylor"
    paper: ClassVar[str] = "Shortened LLaMA, arXiv 2402.02834"
    gives: ClassVar[frozenset[str]] = frozenset({"block"})
    needs: ClassVar[frozenset[str]] = frozenset({"mean-taylor"})

    def score(self, request: PruningRequest) -> Scores:
        """Return the reduced terms: (blocks,)."""
        import torch

        found = request.statistics["mean-taylor"]
        blocks = []
        for index in range(len(request.shape.blocks)):
            matrices = [found[f"{role}.{self.norm_power}"][index] for role in ROLES]
            matrices += [found[norm][index].abs().pow(self.norm_power) for norm in BEHIND]
            blocks.append(reduced(matrices, self.weight_reduction, self.block_reduction))
        scores = torch.stack(blocks)
        return Scores(block=ends_raised(scores) if self.plus else scores)


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the taylor metric."""
    return [Taylor()]


@hookimpl
def statistics() -> list[Statistic]:
    """Return Taylor terms of the mean gradient."""
    return [MeanTaylor()]
