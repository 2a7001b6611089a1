"""Packing: every request once, what it sees is its own prefix, contexts run once, rows within their budget."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import close, logits, opened, tiny
from torch import Tensor, nn

from flexi_plugins.data import PruningPlan
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.branches import chunks_of
from flexi_plugins.execution.packing import Pack, Request, pack
from flexi_plugins.execution.sweep import Planned, Sweeper

VOCABULARY = 61


def documents(seed: int = 0, count: int = 12) -> list[Request]:
    """Return requests as tasks make them: one context with several answers, or several contexts with one answer."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high)))

    made = []
    for _ in range(count):
        context, answer = text(4, 20), text(1, 4)
        made += [(context, text(1, 5)) for _ in range(4)]
        made += [(context + text(1, 3), answer) for _ in range(2)]  # as winogrande does
    return made


def sequences_of(one: Pack) -> list[list[int]]:
    """Return the tokens of every sequence of a packed batch."""
    return [one.batch.ids[0, list(sequence)].tolist() for sequence in one.batch.sequences]


@pytest.mark.parametrize("seed", range(4))
def test_every_read_sees_its_own_prefix_and_nothing_else(seed: int) -> None:
    requests = documents(seed)
    packs = pack(requests, 200)
    for one in packs:
        assert one.batch.positions is not None
        for (row, columns, targets), (context, continuation) in zip(one.batch.reads, one.requests, strict=True):
            assert row == 0
            assert tuple(targets) == continuation
            sequence = [*context, *continuation]
            holding = [s for s in one.batch.sequences if list(columns) == list(s[len(context) - 1 : len(sequence) - 1])]
            assert holding
            assert {tuple(one.batch.ids[0, s[: len(sequence) - 1]].tolist()) for s in holding} == {tuple(sequence[:-1])}
            assert one.batch.positions[0, columns].tolist() == list(range(len(context) - 1, len(sequence) - 1))
    assert sorted(r for p in packs for r in p.requests) == sorted(set(requests))


def test_a_context_is_run_once_for_all_its_answers() -> None:
    context = tuple(range(32))
    one = pack([(context, (33, 34, 35)), (context, (36, 37)), (context, (38,))])
    assert len(one) == 1
    assert one[0].batch.ids.numel() == 32 + 2 + 1
    assert sorted(len(columns) for _, columns, _ in one[0].batch.reads) == [1, 2, 3]
    assert len({c[0] for _, c, _ in one[0].batch.reads}) == 1, "all answers begin at the last token of the context"


def test_no_sequence_is_the_beginning_of_another() -> None:
    text = tuple(range(20))
    one = pack([(text[:9], (1,)), (text[:10], (2,)), (text[:9], (9, 10, 3)), ((*text[:9], 30), (4,))])
    assert sequences_of(one[0]) == [[*text[:11]], [*text[:9], 30]]
    assert one[0].batch.ids.tolist() == [[*text[:11], 30]]


def test_a_partial_tile_is_shared_by_what_ends_at_the_same_step_of_it() -> None:
    text = tuple(range(40))
    one = pack([(text[:length], (1,)) for length in (16, 17, 18, 20, 32, 33)])[0]
    assert sorted(sequences_of(one)) == [[*text[:n]] for n in (18, 20, 33)]
    assert one.batch.ids.numel() == 33 + 2 + 4, "whole tiles are shared, and the rest by 17 and 18 tokens"


@pytest.mark.parametrize("budget", [40, 100, 1000])
def test_batches_are_full_and_within_their_budget(budget: int) -> None:
    packs = pack(documents(count=40), budget)
    sizes = [p.batch.ids.numel() for p in packs]
    assert all(size <= budget or len(p.requests) == 1 for size, p in zip(sizes, packs, strict=True))
    assert all(size > budget - 30 for size in sizes[:-1]), "no request has 30 tokens"


def test_much_less_is_run_than_one_by_one() -> None:
    packs = pack(documents(count=300))
    alone = sum(len(c) + len(t) - 1 for c, t in set(documents(count=300)))
    assert sum(p.batch.ids.numel() for p in packs) < 0.5 * alone


@pytest.mark.parametrize("room", [12, 40, 1000])
def test_every_token_attends_in_one_place(room: int) -> None:
    batch = pack(documents())[0].batch
    chunks = chunks_of(batch.sequences, room)
    assert all(c.tokens.numel() <= room or len(c.tokens) == 1 for c in chunks)
    assert sorted(torch.cat([c.places for c in chunks]).tolist()) == list(range(batch.ids.numel()))
    for chunk in chunks:
        assert torch.equal(chunk.tokens.flatten()[chunk.own], chunk.places)
        assert batch.positions is not None
        assert torch.equal(chunk.own % chunk.tokens.shape[1], batch.positions[0, chunk.places])


def test_the_same_requests_in_any_order_make_the_same_batches() -> None:
    requests = documents()
    shuffled = random.Random(1).sample(requests, len(requests))
    assert [p.requests for p in pack(requests)] == [p.requests for p in pack(shuffled)]


def row_logprobs(model: nn.Module, request: Request) -> Tensor:
    context, continuation = request
    found = logits(model, torch.tensor([[*context, *continuation]]))[0].log_softmax(-1)
    return found[len(context) - 1 : -1].gather(1, torch.tensor(continuation)[:, None])[:, 0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama-tied", "mistral", "qwen2-mixed", "qwen3-biases"])
def test_packed_answers_are_those_of_every_request_alone(kind: str, implementation: str) -> None:
    model = tiny(kind)
    model.config._attn_implementation = implementation
    requests = documents()
    packs = pack(requests, 300)
    plan = Planned(PruningPlan.identity(opened(model).shape))
    sweeper = Sweeper(Blocks(opened(model)))
    for number, answers in sweeper.sweep([plan], [p.batch for p in packs]):
        for request, (score, _) in zip(packs[number].requests, answers[0], strict=True):
            expected = row_logprobs(model, request).sum()
            assert close(torch.tensor(score), expected, 1e-5), request
