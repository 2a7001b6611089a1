"""SAAP's importance (arXiv 2412.15127): vector- and element-wise Taylor scores, fused by homoscedastic uncertainty.

From the abstract: importance of coupled structures is estimated two ways, fused adaptively by uncertainty, and all
modules are ranked to decide what goes. From summaries of the paper: the fusion is a Gaussian likelihood with a learned
observation noise per kind of score; structures whose importance fluctuates are unstable and go first. Our reading, since
no formula of the paper could be had: first-order Taylor scores as LLM-Pruner computes them, summed over the matrices of
a unit; J = mean[V / (2 s_v) + E / (2 s_e)] + log(s_v s_e) / 2, whose minimum is s_v = mean V, s_e = mean E; fluctuation
= relative standard deviation of a unit's fused score over calibration samples; keep = z(mean) - lambda z(fluctuation),
both standardised within a (block, kind).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_plugins.data import Scores
from flexi_plugins.hookspecs import GradientTrace, ImportanceMetric, LinearTrace, PruningRequest, Statistic, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION, MLP = ("query", "key", "value", "attention_output"), ("gate", "up", "down")


@dataclass(frozen=True)
class Taylor:
    """First-order Taylor scores of every unit for every calibration sample (LLM-Pruner's vectorize and param_first).

    Per matrix and row (column of output maps) c: vector |sum_k w_ck g_ck|, element sum_k |w_ck g_ck|, with g the
    gradient of the sample's own loss; summed over the rows of a unit and over its matrices.
    """

    name: ClassVar[str] = "taylor"
    span: ClassVar[int] = 1
    backward: ClassVar[bool] = True

    def observe(self, trace: GradientTrace) -> dict[str, Tensor]:
        """Return vector_ and element_ scores: attention (samples, KV heads), mlp (samples, channels)."""
        import torch

        samples = len(next(iter(trace.maps.values())).input)
        found = {}
        for kind, roles, units in (("attention", ATTENTION, trace.kv_heads), ("mlp", MLP, None)):
            pairs = [row_scores(trace.maps[r], r in ("attention_output", "down")) for r in roles if r in trace.maps]
            for index, form in enumerate(("vector", "element")):
                scores = [p[index] if units is None else p[index].view(samples, units, -1).sum(2) for p in pairs]
                found[f"{form}_{kind}"] = torch.stack(scores).sum(0) if scores else torch.zeros(samples, 0)
        return found

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return the scores as they are."""
        return dict(totals)


def row_scores(trace: LinearTrace, columns: bool) -> tuple[Tensor, Tensor]:
    """Return (vector, element) scores (samples, rows) of a matrix's rows, or of its columns.

    The weight gradients of the samples are formed some rows at a time, so that nothing of the matrix's size is held and
    every step finds them in the cache.
    """
    import torch

    from flexi_plugins.numerics import PRODUCT, pieces

    left, right, weight = trace.output_gradient.float(), trace.input.float(), trace.weight
    if columns:  # they are the rows of the transposed map
        left, right = right, left
    vector, element = (left.new_empty(left.shape[0], left.shape[2]) for _ in range(2))
    for part in pieces(left.shape[2], right.shape[2], PRODUCT):
        w = weight[:, part].contiguous().T.contiguous() if columns else weight[part]  # first gathered: twice as fast
        w = w.float()
        terms = torch.empty_like(w)
        for sample, (dy, x) in enumerate(zip(left, right, strict=True)):
            torch.mm(dy[:, part].T, x, out=terms).mul_(w)
            torch.sum(terms, 1, out=vector[sample, part])
            torch.sum(terms.abs_(), 1, out=element[sample, part])
    return vector.abs_(), element


@dataclass(frozen=True)
class Saap:
    """Uncertainty-fused Taylor scores with a stability indicator; lambda 0 is fusion alone."""

    stability: float = 0.1  # lambda: weight of the fluctuation in the keep score
    scope: Literal["module", "block"] = (
        "module"  # which units share sigma_v, sigma_e: one kind in all blocks, or in each
    )
    sigma: Literal["closed", "learned"] = "closed"

    name: ClassVar[str] = "saap"
    paper: ClassVar[str] = "SAAP, arXiv 2412.15127"
    gives: ClassVar[frozenset[str]] = frozenset({"block", "attention", "mlp"})
    needs: ClassVar[frozenset[str]] = frozenset({"taylor"})

    def score(self, request: PruningRequest) -> Scores:
        """Return keep scores; standardised, so not comparable across blocks."""
        import torch

        taylor = request.statistics["taylor"]
        attention = self.fused(taylor["vector_attention"], taylor["element_attention"])
        mlp = self.fused(taylor["vector_mlp"], taylor["element_mlp"])
        totals = [a[0].sum(1) + m[0].sum(1) for a, m in zip(attention, mlp, strict=True)]  # per block: (samples,)
        offsets = [a[1] * a[0].shape[1] + m[1] * m[0].shape[1] for a, m in zip(attention, mlp, strict=True)]
        return Scores(
            block=self.keep(torch.stack(totals, 1), torch.tensor(offsets)),
            attention=tuple(self.keep(f, torch.tensor(o)) for f, o in attention),
            mlp=tuple(self.keep(f, torch.tensor(o)) for f, o in mlp),
        )

    def fused(self, vector: Sequence[Tensor], element: Sequence[Tensor]) -> list[tuple[Tensor, float]]:
        """Return per block the weighted scores V / (2 s_v) + E / (2 s_e), (samples, units), and the offset log(s_v s_e) / 2."""
        import math

        import torch

        scopes = [list(range(len(vector)))] if self.scope == "module" else [[b] for b in range(len(vector))]
        result: dict[int, tuple[Tensor, float]] = {}
        for scope in scopes:
            v, e = torch.cat([vector[b].flatten() for b in scope]), torch.cat([element[b].flatten() for b in scope])
            s_v, s_e = noise(v, e, self.sigma) if v.numel() else (1.0, 1.0)
            for b in scope:
                result[b] = (vector[b] / (2 * s_v) + element[b] / (2 * s_e), 0.5 * math.log(s_v * s_e))
        return [result[b] for b in range(len(vector))]

    def keep(self, weighted: Tensor, offset: Tensor) -> Tensor:
        """Return z(mean + offset) - lambda z(std / mean) over units, from (samples, units); mean and std over samples.

        The fluctuation is relative to the weighted scores, which are positive; the log offset has no natural zero. A
        unit without any effect has no fluctuation either: it counts as the least stable, so that nothing else protects it.
        """
        import torch

        from flexi_plugins.numerics import standardise

        if not weighted.shape[1]:
            return torch.zeros(0)
        mean, deviation = weighted.mean(0), weighted.std(0, correction=0)
        fluctuation = deviation / mean.clamp_min(1e-30)
        fluctuation = torch.where(mean > 0, fluctuation, fluctuation.max())
        return standardise(mean + offset) - self.stability * standardise(fluctuation)


def noise(vector: Tensor, element: Tensor, how: Literal["closed", "learned"] = "closed") -> tuple[float, float]:
    """Return (sigma_v^2, sigma_e^2) that minimise mean[V/(2 s_v) + E/(2 s_e)] + log(s_v s_e)/2 over flat score tensors.

    The closed form is the mean of each; "learned" runs gradient descent on log sigma^2, as the paper is said to do.
    """
    import torch

    means = torch.stack([vector.double().mean(), element.double().mean()]).clamp_min(1e-30)
    if how == "closed":
        return float(means[0]), float(means[1])
    with torch.inference_mode(False), torch.enable_grad():
        logs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([logs], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = (means.clone() * torch.exp(-logs) / 2 + logs / 2).sum()
            value.backward()
            return value

        optimiser.step(loss)
    learned = logs.detach().exp()
    return float(learned[0]), float(learned[1])


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the saap metric."""
    return [Saap()]


@hookimpl
def statistics() -> list[Statistic]:
    """Return per-sample Taylor scores."""
    return [Taylor()]
