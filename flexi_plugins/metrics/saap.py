"""SAAP's importance (arXiv 2412.15127): vector- and element-wise Taylor scores, fused by homoscedastic uncertainty.

From the abstract: the importance of coupled structures is estimated in two ways, fused adaptively by uncertainty, and all
modules are ranked to decide what goes. From summaries of the paper (its text could not be had): the scores are treated
as outputs with Gaussian, input-independent noise, whose two variances are learned with a multi-task loss; structures
whose importance fluctuates are unstable and go first.

Our reading of the rest. V and E are LLM-Pruner's vector- and element-wise Taylor scores, summed over the matrices of a
unit; J = mean[V / (2 s_v) + E / (2 s_e)] + log(s_v s_e) / 2, with its minimum at s_v = mean V and s_e = mean E. What
fluctuates is not said; ``fluctuation`` has three readings:

- samples (recommended): the fused score of a unit over calibration samples, std / mean; keep = z(mean) - lambda z(std /
  mean), both standardised within a (block, kind); the lowest go, of all blocks and kinds.
- units: the fused score against the other units of its block and kind; keep = z(mean), as FLAP standardises.
- rates: the coefficient of variation of the fused scores within a (block, kind) sets the share of its units that goes;
  keep = rank within the block, 0 to 1, / coefficient of variation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_plugins.data import Scores
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import GradientTrace, ImportanceMetric, LinearTrace, PruningRequest, Statistic, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION, MLP = ("query", "key", "value", "attention_output"), ("gate", "up", "down")


Order = Literal["first", "second", "mix"]


@dataclass(frozen=True)
class Taylor:
    """Taylor scores of every unit for every calibration sample, as LLM-Pruner computes them.

    Per matrix and row (column of output maps) c, with t_k = w_ck g_ck and g the gradient of the sample's own loss, whose
    square stands for the Hessian's diagonal: first order, vector |sum t|, element sum |t| (vectorize, param_first);
    second, vector (sum t)^2, element sum t^2 (param_second); mix, with x - x^2 / 2 of both (param_mix). Summed over the
    rows of a unit and over its matrices.
    """

    order: Order = "first"

    span: ClassVar[int] = 1
    backward: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Its name says its order."""
        return "taylor" if self.order == "first" else f"taylor-{self.order}"

    def observe(self, trace: GradientTrace) -> dict[str, Tensor]:
        """Return vector_ and element_ scores: attention (samples, KV heads), mlp (samples, channels)."""
        import torch

        samples = len(next(iter(trace.maps.values())).input)
        found = {}
        for kind, roles, units in (("attention", ATTENTION, trace.kv_heads), ("mlp", MLP, None)):
            present = [r for r in roles if r in trace.maps]
            pairs = [row_scores(trace.maps[r], r in ("attention_output", "down"), self.order) for r in present]
            for index, form in enumerate(("vector", "element")):
                scores = [p[index] if units is None else p[index].view(samples, units, -1).sum(2) for p in pairs]
                found[f"{form}_{kind}"] = torch.stack(scores).sum(0) if scores else torch.zeros(samples, 0)
        return found

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return the scores as they are."""
        return dict(totals)


def row_scores(trace: LinearTrace, columns: bool, order: Order = "first") -> tuple[Tensor, Tensor]:
    """Return (vector, element) scores (samples, rows) of a matrix's rows, or of its columns; see ``Taylor``.

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
            torch.sum(_effect(terms, order), 1, out=element[sample, part])
    return _effect(vector, order), element


def _effect(terms: Tensor, order: Order) -> Tensor:
    """Return |t|, t^2 or |t - t^2 / 2|, in the place of t."""
    if order == "second":
        return terms.square_()
    return terms.abs_() if order == "first" else terms.sub_(terms.square(), alpha=0.5).abs_()


@dataclass(frozen=True)
class Saap:
    """Uncertainty-fused Taylor scores with a stability indicator; lambda 0 is fusion alone."""

    form: Literal["fused", "vector", "element"] = "fused"  # both Taylor scores, or one of them alone, for comparison
    fluctuation: Literal["samples", "units", "rates"] = "samples"  # the reading of what fluctuates, see above
    order: Order = "first"
    stability: float = 0.1  # lambda: weight of the fluctuation in the keep score
    scope: Literal["module", "block"] = (
        "module"  # which units share sigma_v, sigma_e: one kind in all blocks, or in each
    )
    sigma: Literal["closed", "learned"] = "closed"

    name: ClassVar[str] = "saap"
    paper: ClassVar[str] = "SAAP, arXiv 2412.15127"
    gives: ClassVar[frozenset[str]] = frozenset({"block", "attention", "mlp"})

    @property
    def needs(self) -> frozenset[str]:
        """Per-sample Taylor scores of its order."""
        return frozenset({Taylor(self.order).name})

    def score(self, request: PruningRequest) -> Scores:
        """Return keep scores: standardised within blocks, or shares of them, and ranked as they are."""
        import torch

        taylor = request.statistics[Taylor(self.order).name]
        if self.fluctuation == "samples" and self.stability and len(taylor["vector_mlp"][0]) < 2:
            raise FlexiError(
                f"{self.name}: expected at least 2 gradient samples for what fluctuates over them, found 1; give more "
                "(gradient_samples in [calibration]), or set stability = 0 or fluctuation = 'units'"
            )
        attention = self.fused(taylor["vector_attention"], taylor["element_attention"])
        mlp = self.fused(taylor["vector_mlp"], taylor["element_mlp"])
        totals = [a[0].sum(1) + m[0].sum(1) for a, m in zip(attention, mlp, strict=True)]  # per block: (samples,)
        offsets = [a[1] * a[0].shape[1] + m[1] * m[0].shape[1] for a, m in zip(attention, mlp, strict=True)]
        return Scores(
            block=self.keep(torch.stack(totals, 1), torch.tensor(offsets)),
            attention=tuple(self.keep(f, torch.tensor(o)) for f, o in attention),
            mlp=tuple(self.keep(f, torch.tensor(o)) for f, o in mlp),
            rule="undivided",
        )

    def fused(self, vector: Sequence[Tensor], element: Sequence[Tensor]) -> list[tuple[Tensor, float]]:
        """Return per block the weighted scores V / (2 s_v) + E / (2 s_e), (samples, units), and the offset log(s_v s_e) / 2.

        Of one form alone: its own term of both.
        """
        import math

        import torch

        scopes = [list(range(len(vector)))] if self.scope == "module" else [[b] for b in range(len(vector))]
        result: dict[int, tuple[Tensor, float]] = {}
        for scope in scopes:
            v, e = torch.cat([vector[b].flatten() for b in scope]), torch.cat([element[b].flatten() for b in scope])
            s_v, s_e = noise(v, e, self.sigma) if v.numel() else (1.0, 1.0)
            for b in scope:
                terms = {"vector": (vector[b], s_v), "element": (element[b], s_e)}
                chosen = terms.values() if self.form == "fused" else [terms[self.form]]
                weighted = torch.stack([score / (2 * s) for score, s in chosen]).sum(0)
                result[b] = weighted, sum(0.5 * math.log(s) for _, s in chosen)
        return [result[b] for b in range(len(vector))]

    def keep(self, weighted: Tensor, offset: Tensor) -> Tensor:
        """Return what to keep units by, from (samples, units): z(mean + offset) - lambda z(std / mean) over samples.

        The fluctuation is relative to the weighted scores, which are positive; the log offset has no natural zero. A
        unit without any effect has no fluctuation either: it counts as the least stable, so that nothing else protects it.
        """
        import torch

        from flexi_plugins.numerics import standardise

        if not weighted.shape[1]:
            return torch.zeros(0)
        mean, deviation = weighted.mean(0), weighted.std(0, correction=0)
        if self.fluctuation == "units":
            return standardise(mean + offset)
        if self.fluctuation == "rates":
            rank = ((mean + offset).argsort(stable=True).argsort() + 0.5) / len(mean)  # no block's lowest is at 0
            return rank * mean.mean() / mean.std(correction=0).clamp_min(1e-30)
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
        logs = (means.log() + 1).requires_grad_()  # near enough for scores of any scale
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
    """Return per-sample Taylor scores of each order."""
    return [Taylor(), Taylor("second"), Taylor("mix")]
