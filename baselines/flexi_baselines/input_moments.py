"""Statistics of what enters the two output maps of a block: what Wanda-sp and FLAP score by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flexi_plugins.hookspecs import BlockTrace

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("attention", "mlp")


@dataclass(frozen=True)
class InputMoments:
    """Mean and variance of every input channel of the output maps over all tokens, and the size of its weights.

    For both kinds: mean, variance; squares: sum over the rows of w^2; magnitude: mean over the rows of |w|; (columns,).
    """

    name: ClassVar[str] = "input-moments"
    span: ClassVar[int] = 1
    backward: ClassVar[bool] = False

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        """Return sums over tokens: of values, of squared deviations within and of squared means of windows, of weights."""
        from flexi_plugins.numerics import absolute_sum, squared_norms

        sums = {}
        for kind, inner, weight in _inputs(trace):
            means, deviations = window_moments(inner, int(trace.last.sum()))
            length = len(inner) / len(means)
            sums[f"{kind}_mean"] = length * means.sum(0)
            sums[f"{kind}_within"] = deviations.sum(0)
            sums[f"{kind}_between"] = length * means.square().sum(0)
            sums[f"{kind}_squares"] = len(inner) * squared_norms(weight.T)
            sums[f"{kind}_magnitude"] = len(inner) / len(weight) * absolute_sum(weight)
        return sums

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return the quantities; the variance is what windows vary within, and by how much their means differ."""
        names = ("mean", "squares", "magnitude")
        found = {f"{kind}_{name}": totals[f"{kind}_{name}"] / tokens for kind in KINDS for name in names}
        for kind in KINDS:
            between = totals[f"{kind}_between"] / tokens - found[f"{kind}_mean"].square()
            found[f"{kind}_variance"] = totals[f"{kind}_within"] / tokens + between.clamp_min(0)
        return found


@dataclass(frozen=True)
class RunningFluctuation:
    """What FLAP's released code computes in the place of a variance (``BiasGPT.add_batch``): attention, mlp, (columns,).

    A running variance is updated with the mean before and the mean after a window, but the former has become an alias of
    the latter. With m_k the mean over the first k of N windows it is the sum over k = 2..N of (k - 1) / k / (N - 1) x the
    sum over the tokens of window k of (x - m_k)^2: it depends on the order of the windows, and leaves the first one out.
    Two numbers a window and channel are kept until all windows are there.
    """

    name: ClassVar[str] = "running-fluctuation"
    span: ClassVar[int] = 1
    backward: ClassVar[bool] = False

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        """Return means and squared deviations of each window: (windows, columns), zero for windows of other batches."""
        sums = {}
        for kind, inner, _ in _inputs(trace):
            for name, values in zip(("mean", "deviation"), window_moments(inner, len(trace.sequences)), strict=True):
                sums[f"{kind}_{name}"] = trace.among_all(values)
        return sums

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return the weighted sums over windows, in their order."""
        return {k: running_fluctuation(totals[f"{k}_mean"], totals[f"{k}_deviation"], tokens) for k in KINDS}


def running_fluctuation(means: Tensor, deviations: Tensor, tokens: int) -> Tensor:
    """Return the released fluctuation (columns,) from each window's means and squared deviations, (windows, columns)."""
    import torch

    windows = len(means)
    order = torch.arange(1, windows + 1, dtype=means.dtype, device=means.device)[:, None]
    running = means.cumsum(0) / order
    around = deviations + tokens / windows * (means - running).square()
    return ((order - 1) / order * around).sum(0) / max(1, windows - 1)


def _inputs(trace: BlockTrace) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (kind, input of the output map (tokens, columns), its weight (hidden, columns)); no columns if it is absent."""
    none = trace.input[:, :0]
    for kind in KINDS:
        inner, weight = getattr(trace, f"{kind}_inner"), getattr(trace, f"{kind}_weight")
        yield (kind, none, none[:1]) if inner is None or weight is None else (kind, inner, weight)


def window_moments(inner: Tensor, windows: int) -> tuple[Tensor, Tensor]:
    """Return the mean and the sum of squared deviations from it of every channel in every window, (windows, columns).

    inner: (tokens, columns), windows of equal length one after the other. float32; some channels at a time.
    """
    import torch

    from flexi_plugins.numerics import pieces

    length = len(inner) // windows
    means = torch.empty(windows, inner.shape[1], dtype=torch.float32, device=inner.device)
    deviations = torch.empty_like(means)
    for number, window in enumerate(inner.unflatten(0, (windows, length))):
        for part in pieces(inner.shape[1], length, 64):
            values = window[:, part].float()
            means[number, part] = values.mean(0)
            deviations[number, part] = (values - means[number, part]).square().sum(0)
    return means, deviations
