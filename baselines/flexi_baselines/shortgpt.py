"""ShortGPT's block scores (arXiv 2403.03853): block influence, or the angle over a run of blocks.

bi: BI_i = 1 - mean cos(x_i, x_i+1) over all tokens, x_i the stream that enters block i; the blocks with the lowest go, all
at once (the paper, and the authors' shortgpt.py). The last block's output is taken before the final norm, where the
authors' code, through transformers' hidden_states, has it behind.
angular: d_n(i) = arccos(cos(x_i, x_i+n)) / pi over a run of n blocks, at the last token of each window; the run with the
smallest goes. That is the measure of arXiv 2403.17887; the authors' repository has it as an unused option of its formula,
and what it does with the run is from the reimplementation that CoMe's code names as its source (short_hf.py).
As a score, a block has the distance of the closest run that it is in: the n lowest are that run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from flexi_plugins.data import Scores
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import ALL_BLOCKS, BlockTrace, ImportanceMetric, PruningRequest, Statistic, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RunAngle:
    """arccos(cos) / pi between the input of every block up to this one and this one's output, mean over last tokens."""

    name: ClassVar[str] = "run-angle"
    span: ClassVar[int] = ALL_BLOCKS
    backward: ClassVar[bool] = False

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        """Return sums over last tokens: angle (index + 1,), entry i for the run that begins at block i; and their count."""
        import torch

        from flexi_plugins.numerics import row_distance

        starts = (*trace.before, trace.input)
        distance = torch.stack([row_distance(s[trace.last], trace.output[trace.last]) for s in starts])
        angle = 2 * torch.arcsin((distance / 2).sqrt()) / torch.pi  # arccos(1 - distance), exact for small ones
        return {"angle": angle.sum(1), "count": trace.last.sum().float()}

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return means over last tokens."""
        return {"angle": totals["angle"] / totals["count"]}


@dataclass(frozen=True)
class ShortGPT:
    """Block influence, or the angle over the closest run of blocks that a block is in."""

    measure: Literal["bi", "angular"] = "bi"
    n_prune_layers: int | None = None  # angular: length of the run; None: as many blocks as the ratio asks for

    name: ClassVar[str] = "shortgpt"
    paper: ClassVar[str] = "ShortGPT, arXiv 2403.03853"
    gives: ClassVar[frozenset[str]] = frozenset({"block"})

    @property
    def needs(self) -> frozenset[str]:
        """What the measure is made of."""
        return frozenset({"block-influence" if self.measure == "bi" else "run-angle"})

    def score(self, request: PruningRequest) -> Scores:
        """Return block influence, or distances of runs in 0..1: (blocks,)."""
        import torch

        if self.measure == "bi":
            return Scores(block=torch.stack(request.statistics["block-influence"]["influence"]))
        angles = request.statistics["run-angle"]["angle"]
        return Scores(block=closest(angles, min(self._length(request), len(angles))))

    def _length(self, request: PruningRequest) -> int:
        """Return how many blocks a run has."""
        if self.n_prune_layers is not None:
            if self.n_prune_layers < 1:
                raise FlexiError(f"{self.name}: n_prune_layers = {self.n_prune_layers}, expected 1 or more")
            return self.n_prune_layers
        if not 0 < request.budget.ratio < 1:
            raise FlexiError(
                f"{self.name}: measure angular compares runs of as many blocks as go, and there is no ratio that says how "
                "many; set n_prune_layers to the strategy's own number of blocks"
            )
        block = min(request.shape.block_parameters(b) for b in request.shape.blocks)
        return max(1, -((request.budget.target - request.plan.stored_parameters) // block))


def closest(angles: Sequence[Tensor], length: int) -> Tensor:
    """Return for each block the smallest angle of the runs of this length that it is in: (blocks,).

    angles: per block, the last of a run, (index + 1,), an entry for each block that a run can begin at.
    """
    import torch

    runs = torch.stack([angles[first + length - 1][first] for first in range(len(angles) - length + 1)])
    spans = (slice(max(0, block - length + 1), block + 1) for block in range(len(angles)))
    return torch.stack([runs[span].min() for span in spans])


@hookimpl
def importance_metrics() -> list[ImportanceMetric]:
    """Return the shortgpt metric."""
    return [ShortGPT()]


@hookimpl
def statistics() -> list[Statistic]:
    """Return angles of runs."""
    return [RunAngle()]
