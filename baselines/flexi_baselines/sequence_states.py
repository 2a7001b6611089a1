"""The states of whole calibration sequences that MKA compares blocks by (arXiv 2406.16330, and its released pipeline.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flexi_plugins.hookspecs import BlockTrace

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 100  # sequences that the released code works on at once


@dataclass(frozen=True)
class SequenceStates:
    """What enters a block, of every calibration sequence: (sequences, hidden).

    last: at its last token. released: the released code works on c sequences at once, c the largest divisor of their
    number up to 100, and has for these the first c tokens of the first of them.
    """

    name: ClassVar[str] = "sequence-states"
    span: ClassVar[int] = 1
    backward: ClassVar[bool] = False

    def observe(self, trace: BlockTrace) -> dict[str, Tensor]:
        """Return the rows of these sequences, and zeros for the others'."""
        stream = trace.input.float()
        released = stream.new_zeros(trace.total, stream.shape[1])
        at_once = next(c for c in range(LARGEST, 0, -1) if trace.total % c == 0)
        for number, states in zip(trace.sequences, stream.chunk(len(trace.sequences)), strict=True):
            if number % at_once == 0:  # a shorter sequence leaves zeros, as the released code's padding does
                released[number : number + min(at_once, len(states))] = states[:at_once]
        return {"last": trace.among_all(stream[trace.last]), "released": released}

    def finish(self, totals: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return the states as they are."""
        return dict(totals)
