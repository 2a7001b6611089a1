"""Scores every KV head and channel by the energy that it adds to the residual stream, relative to the stream's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import flexi_plugins
from flexi_plugins.data import Scores
from flexi_plugins.hookspecs import BlockTrace, PruningRequest


@dataclass(frozen=True)
class Energy:
    """Sums over tokens of a^2 |w|^2 for every column of the outgoing maps, and of the squared residual stream."""

    name: ClassVar[str] = "energy"
    span: ClassVar[int] = 1
    backward: ClassVar[bool] = False

    def observe(self, trace: BlockTrace) -> dict:
        """Return the sums of one batch."""
        sums = {"stream": trace.output.float().square().sum()}
        for kind in ("attention", "mlp"):
            inner, weight = getattr(trace, f"{kind}_inner"), getattr(trace, f"{kind}_weight")
            if inner is None:
                sums[kind] = sums["stream"].new_zeros(0)
            else:
                sums[kind] = inner.float().square().sum(0) * weight.float().square().sum(0)
        return sums

    def finish(self, totals: Mapping, tokens: int) -> dict:
        """Return shares of the stream's energy."""
        return {kind: totals[kind] / totals["stream"] for kind in ("attention", "mlp")}


@dataclass(frozen=True)
class EnergyMetric:
    """The share of the stream's energy that a unit adds, to the power of ``exponent``."""

    exponent: float = 0.5

    name: ClassVar[str] = "example-energy"
    paper: ClassVar[str] = ""
    gives: ClassVar[frozenset[str]] = frozenset({"attention", "mlp"})
    needs: ClassVar[frozenset[str]] = frozenset({"energy"})

    def score(self, request: PruningRequest) -> Scores:
        """Return the shares; a KV head has those of its columns together."""
        energy = request.statistics["energy"]
        blocks = zip(energy["attention"], request.shape.blocks, strict=True)
        heads = tuple(e.unflatten(0, (b.kv_heads, -1)).sum(1) if b.kv_heads else e for e, b in blocks)
        attention = tuple(h.pow(self.exponent) for h in heads)
        return Scores(attention=attention, mlp=tuple(m.pow(self.exponent) for m in energy["mlp"]), comparable=True)


@flexi_plugins.hookimpl
def importance_metrics() -> list:
    """Return the metric."""
    return [EnergyMetric()]


@flexi_plugins.hookimpl
def statistics() -> list:
    """Return its statistic."""
    return [Energy()]
