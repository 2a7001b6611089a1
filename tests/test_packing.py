"""Packing: every request once, what it sees is its own prefix, contexts run once, rows within their budget."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import close, logits, opened, tiny
from torch import Tensor, nn

from flexi_plugins.data import PruningPlan
from flexi_plugins.execution import packing
from flexi_plugins.execution.blocks import Blocks
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


def seen_by(pack_: Pack, row: int, column: int) -> list[int]:
    """Return the tokens that a token sees, in order, itself last."""
    assert pack_.batch.visible is not None
    return pack_.batch.ids[row][pack_.batch.visible[row, column]].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_every_read_sees_its_own_prefix_and_nothing_else(seed: int) -> None:
    requests = documents(seed)
    packs = pack(requests, 200)
    for one in packs:
        for (row, columns, targets), (context, continuation) in zip(one.batch.reads, one.requests, strict=True):
            assert tuple(targets) == continuation
            sequence = [*context, *continuation]
            for number, column in enumerate(columns):
                prefix = sequence[: len(context) + number]
                assert seen_by(one, row, column) == prefix
                assert one.batch.positions is not None
                assert int(one.batch.positions[row, column]) == len(prefix) - 1
    assert sorted(r for p in packs for r in p.requests) == sorted(set(requests))


def test_a_context_is_run_once_for_all_its_answers() -> None:
    context = tuple(range(30))
    one = pack([(context, (31, 32, 33)), (context, (34, 35)), (context, (36,))])
    assert len(one) == 1
    assert one[0].batch.ids.numel() == 30 + 2 + 1
    assert sorted(len(columns) for _, columns, _ in one[0].batch.reads) == [1, 2, 3]
    assert len({c[0] for _, c, _ in one[0].batch.reads}) == 1, "all answers begin at the last token of the context"


def test_documents_that_begin_alike_share_only_what_pays() -> None:
    long = tuple(range(40))
    shared = [((*long, 41, 42), (1, 2)), ((*long, 43, 44), (3, 4))]
    barely = [((1, *range(2, 42)), (5,)), ((1, *range(20, 60)), (5,))]
    assert pack(shared)[0].batch.ids.numel() == 40 + 3 + 3
    assert pack(barely)[0].batch.ids.numel() == 41 + 41, "one common token is not worth attending to all the others"


@pytest.mark.parametrize("budget", [40, 100, 1000])
def test_batches_stay_within_their_budget(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "ROW_TOKENS", 40)
    for one in pack(documents(count=40), budget):
        rows, width = one.batch.ids.shape
        assert rows * width <= budget or rows == 1
        assert width <= max(40, max(len(c) + len(t) for c, t in one.requests) * 6)


def test_rows_are_nearly_full() -> None:
    packs = pack(documents(count=300))
    cells = sum(p.batch.ids.numel() for p in packs)
    alone = sum(len(c) + len(t) - 1 for c, t in set(documents(count=300)))
    assert cells < 0.6 * alone, "less is run than one by one, padding included"


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
