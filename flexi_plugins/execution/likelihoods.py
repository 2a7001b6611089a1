"""Log-likelihoods of (context, continuation) requests for many plans: one sweep, journalled group by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from flexi_plugins.data import digest
from flexi_plugins.execution.sweep import Batch, Planned, Sweeper
from flexi_plugins.hookspecs import Tokens

TOKENS_PER_GROUP = 4096

Request = tuple[Tokens, Tokens]
Answer = tuple[float, bool]


class AnswerJournal(Protocol):
    """Where answers of finished groups are kept: plan hash, group hash -> one (log-probability, greedy) a request."""

    def get(self, plan_hash: str, group_hash: str) -> list[Any] | None:
        """Return the answers of a group, or None."""

    def put(self, plan_hash: str, group_hash: str, answers: Sequence[Any]) -> None:
        """Store the answers of a group."""


class NoJournal:
    """A journal that keeps nothing."""

    def get(self, plan_hash: str, group_hash: str) -> list[Any] | None:
        """Return None."""
        return None

    def put(self, plan_hash: str, group_hash: str, answers: Sequence[Any]) -> None:
        """Do nothing."""


def group_requests(requests: Sequence[Request], budget: int = TOKENS_PER_GROUP) -> list[list[Request]]:
    """Return the distinct requests in groups of similar length, longest first, of at most ``budget`` padded tokens."""
    ordered = sorted(set(requests), key=lambda r: (-len(r[0]) - len(r[1]), r))
    groups: list[list[Request]] = []
    for request in ordered:
        width = len(groups[-1][0][0]) + len(groups[-1][0][1]) if groups else 0
        if not groups or (len(groups[-1]) + 1) * width > budget:
            groups.append([])
        groups[-1].append(request)
    return groups


def as_batch(group: Sequence[Request]) -> Batch:
    """Return the token rows of a group, padded at the end (what follows a token does not change it), and its reads."""
    rows = [(*context, *continuation)[:-1] for context, continuation in group]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return Batch(ids, tuple((i, len(c) - 1, t) for i, (c, t) in enumerate(group)))


def likelihoods(
    sweeper: Sweeper,
    planned: Sequence[Planned],
    requests: Sequence[Request],
    journal: AnswerJournal,
    setting: Any,
    progress: Callable[..., Any],
    title: str,
) -> list[list[Answer]]:
    """Return for every plan, for every request, the summed log-probability of its continuation and whether it is greedy.

    ``setting`` is whatever else an answer depends on (model fingerprint, dtype), as JSON. Groups that the journal knows
    are not run again.
    """
    if any(not context or not continuation for context, continuation in requests):
        raise ValueError("likelihoods: a request needs at least one token of context and one of continuation")
    groups = group_requests(requests)
    keys = [digest([setting, group]) for group in groups]
    hashes = [p.plan.hash for p in planned]
    known: dict[tuple[int, int], Sequence[Any] | None] = {
        (g, p): journal.get(hashes[p], keys[g]) for g in range(len(groups)) for p in range(len(planned))
    }
    answers: list[dict[Request, Answer]] = [{} for _ in planned]
    with progress(title, sum(1 for a in known.values() if a is None)) as advance:
        batches = [as_batch(g) for g in groups]
        for g, found in sweeper.sweep(planned, batches, wanted=lambda g, p: known[g, p] is None):
            for p, answer in found.items():
                journal.put(hashes[p], keys[g], answer)
                known[g, p] = answer
            advance(len(found))
    for (g, p), kept in known.items():
        assert kept is not None
        answers[p].update(zip(groups[g], ((float(a), bool(b)) for a, b in kept), strict=True))
    return [[per_plan[r] for r in requests] for per_plan in answers]
