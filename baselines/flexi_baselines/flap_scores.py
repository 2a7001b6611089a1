"""FLAP's scores (arXiv 2312.11983, and the authors' lib/prune.py): how much the input of an output map fluctuates.

The variance of each input channel of an output map, times the squared norm of its weights (WIFV; for attention squared
once more); z-scores within each block and kind; a head is the mean over its channels. The paper has the variance; the
released code, which its numbers are from, has something else (``RunningFluctuation``): both by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_plugins.data import Scores
from flexi_plugins.hookspecs import PruningRequest

if TYPE_CHECKING:
    from torch import Tensor

PAPER = "FLAP, arXiv 2312.11983"


@dataclass(frozen=True)
class Fluctuation:
    """Standardised fluctuation of KV heads and channels."""

    # WIFV: weighted input feature variance. IFV: without the weights. WIFN: the norm of the input x the mean |weight|.
    metrics: Literal["WIFV", "IFV", "WIFN"] = "WIFV"
    variance: Literal["paper", "released"] = "paper"

    name: ClassVar[str] = "flap"
    paper: ClassVar[str] = PAPER
    gives: ClassVar[frozenset[str]] = frozenset({"attention", "mlp"})

    @property
    def needs(self) -> frozenset[str]:
        """Input moments, and the released code's fluctuation where it is asked for."""
        released = self.variance == "released" and self.metrics != "WIFN"
        return frozenset({"input-moments"} | ({"running-fluctuation"} if released else set()))

    def score(self, request: PruningRequest) -> Scores:
        """Return z-scores: ranked as they are, and not comparable otherwise."""
        attention, mlp = [], []
        for index, block in enumerate(request.shape.blocks):
            channels = standardised(self.channels(request, "attention", index).square())
            attention.append(channels.view(block.kv_heads, -1).mean(1) if block.kv_heads else channels)
            mlp.append(standardised(self.channels(request, "mlp", index)))
        return Scores(attention=tuple(attention), mlp=tuple(mlp), rule="undivided")

    def channels(self, request: PruningRequest, kind: str, index: int) -> Tensor:
        """Return the raw metric of a block's input channels: (columns,)."""
        moments = {name: values[index] for name, values in request.statistics["input-moments"].items()}
        variance = moments[f"{kind}_variance"]
        if self.metrics == "WIFN":
            return (variance + moments[f"{kind}_mean"].square()).sqrt() * moments[f"{kind}_magnitude"]
        if self.variance == "released":
            variance = request.statistics["running-fluctuation"][kind][index]
        return variance if self.metrics == "IFV" else variance * moments[f"{kind}_squares"]


def standardised(values: Tensor) -> Tensor:
    """Return (x - mean) / std with the unbiased std, as the authors do; zeros where the values do not differ."""
    if values.numel() < 2 or not bool(values.std() > 0):
        return values.new_zeros(values.shape)
    return (values - values.mean()) / values.std()
