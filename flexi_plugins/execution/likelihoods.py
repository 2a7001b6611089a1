"""Log-likelihoods of (context, continuation) requests for many plans: one sweep, journalled batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from flexi_plugins.data import digest
from flexi_plugins.execution.packing import BATCH_TOKENS, Request, pack
from flexi_plugins.execution.readout import Answer
from flexi_plugins.execution.sweep import Planned, Sweeper


class AnswerJournal(Protocol):
    """Where answers of finished batches are kept: plan hash, batch hash -> one (log-probability, greedy) a request."""

    def get(self, plan_hash: str, group_hash: str) -> list[Any] | None:
        """Return the answers of a batch, or None."""

    def put(self, plan_hash: str, group_hash: str, answers: Sequence[Any]) -> None:
        """Store the answers of a batch."""


def likelihoods(
    sweeper: Sweeper,
    planned: Sequence[Planned],
    requests: Sequence[Request],
    journal: AnswerJournal | None,
    setting: Any,
    progress: Callable[..., Any],
    title: str,
    rounding: torch.dtype = torch.float32,
) -> list[list[Answer]]:
    """Return for every plan, for every request, the summed log-probability of its continuation and whether it is greedy.

    ``setting`` is whatever else an answer depends on (model fingerprint, dtype), as JSON. Batches that the journal knows
    are not run again; what is not finite is not kept. rounding: of the log-probability of each token, see ``Batch``.
    """
    if any(not context or not continuation for context, continuation in requests):
        raise ValueError("likelihoods: a request needs at least one token of context and one of continuation")
    packs = pack(requests, BATCH_TOKENS)
    keys = [digest([setting, str(rounding), p.requests]) for p in packs]
    hashes = [p.plan.hash for p in planned]
    known: dict[tuple[int, int], Sequence[Any] | None] = {
        (g, p): None if journal is None else journal.get(hashes[p], keys[g])
        for g in range(len(packs))
        for p in range(len(planned))
    }
    answers: list[dict[Request, Answer]] = [{} for _ in planned]
    batches = [replace(p.batch, rounding=rounding) for p in packs]

    def wanted(g: int, p: int) -> bool:
        return known[g, p] is None

    with progress(title, sweeper.work(planned, batches, wanted)) as advance:
        for g, found in sweeper.sweep(planned, batches, wanted=wanted, advance=advance):
            for p, answer in found.items():
                if journal is not None and all(math.isfinite(logprob) for logprob, _ in answer):
                    journal.put(hashes[p], keys[g], answer)
                known[g, p] = answer
    for (g, p), kept in known.items():
        assert kept is not None
        answers[p].update(zip(packs[g].requests, ((float(a), bool(b)) for a, b in kept), strict=True))
    return [[per_plan[r] for r in requests] for per_plan in answers]
