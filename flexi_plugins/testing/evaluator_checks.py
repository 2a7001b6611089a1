"""Checks of evaluators: one outcome a candidate, finite numbers, and a candidate that broke down fails alone."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flexi_plugins.data import PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Candidate, EvaluationRequest, Evaluator, Outcome, Tokens
from flexi_plugins.testing.bench import Bench, expect
from flexi_plugins.testing.corpus_checks import no_network
from flexi_plugins.testing.models import tiny_tokenizer

BROKEN = 1  # the candidate whose log-probabilities are NaN


class StubRequest:
    """Makes a request whose answers are made up: candidates of a tiny model, one of them broken."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench, self.folder = bench, folder
        self.pruner = bench.pruner()
        shape = self.pruner.checkpoint.shape
        self.plans = [PruningPlan.identity(shape), *(PruningPlan.keep(shape, range(n)) for n in (5, 4))]
        self.asked = False  # whether log-probabilities were

    def request(self) -> EvaluationRequest:
        """Return the request."""
        return EvaluationRequest(
            candidates=tuple(Candidate(f"candidate {i}", p) for i, p in enumerate(self.plans)),
            tokenizer=tiny_tokenizer(),
            likelihoods=self._likelihoods,
            model=lambda index: self.pruner.model(self.plans[index]),
            folder=self._folder,
            progress=_no_progress,
            corpora={n: e.object for n, e in self.bench.plugins.entries("corpus").items()},
            max_length=self.pruner.checkpoint.config.max_position_embeddings,
        )

    def _likelihoods(
        self, requests: Sequence[tuple[Tokens, Tokens]], title: str, softmax_dtype: str = "float32"
    ) -> list[list[tuple[float, bool]]]:
        self.asked = True
        bad = next((r for r in requests if not r[0] or not r[1]), None)
        expect(
            bad is None, f"asked for the likelihood of {bad}; expected a token of context and of continuation at least"
        )
        return [[(self._answer(i, *r), False) for r in requests] for i in range(len(self.plans))]

    def _answer(self, index: int, context: Tokens, continuation: Tokens) -> float:
        return math.nan if index == BROKEN else -(2.0 + index) * len(continuation) - 0.01 * (sum(continuation) % 7)

    def _folder(self, index: int) -> Path:
        folder = self.folder / str(index)
        if not folder.exists():
            self.pruner.write(self.plans[index], folder)
        return folder


@contextmanager
def _no_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda count: None


def accepts_its_own_options(bench: Bench, evaluator: Evaluator) -> None:
    """``check`` has no complaint about the options it comes with."""
    evaluator.check()


def digests_its_inputs(bench: Bench, evaluator: Evaluator) -> None:
    """``inputs`` gives the same text for the same data, or says in a FlexiError what is missing."""
    corpora = {n: e.object for n, e in bench.plugins.entries("corpus").items()}
    try:
        with no_network():
            found = [evaluator.inputs(None, corpora) for _ in range(2)]
    except FlexiError:
        return
    expect(isinstance(found[0], str), f"expected inputs to return text, found {found[0]!r}")
    expect(found[0] == found[1], f"expected the same digest twice, found {found[0]!r} and {found[1]!r}")


def judges_every_candidate(bench: Bench, evaluator: Evaluator) -> None:
    """Every candidate has an outcome, in order: finite numbers with names of their own, or a failure.

    A candidate whose log-probabilities are NaN fails with its reason, and alone. Data that is not there is a FlexiError,
    before anything is asked for: behind it that would end a whole study.
    """
    with tempfile.TemporaryDirectory(prefix="flexi-check-") as folder, no_network():
        stub = StubRequest(bench, Path(folder))
        try:
            outcomes = list(evaluator.evaluate(stub.request()))
        except FlexiError as error:
            expect(
                not stub.asked, f"expected outcomes, one a candidate, found a FlexiError, which ends a study: {error}"
            )
            return
    expect(len(outcomes) == len(stub.plans), f"expected {len(stub.plans)} outcomes, found {len(outcomes)}")
    for index, outcome in enumerate(outcomes):
        expect(isinstance(outcome, Outcome), f"expected an Outcome, found {outcome!r}")
        if stub.asked and index == BROKEN:
            expect(
                outcome.failure, f"the log-probabilities of candidate {index} are NaN; expected a failure, found none"
            )
        else:
            _expect_numbers(outcome, index)


def _expect_numbers(outcome: Outcome, index: int) -> None:
    names = [m.name for m in outcome.measurements]
    expect(not outcome.failure, f"candidate {index}: expected numbers, found the failure {outcome.failure!r}")
    expect(names and len(set(names)) == len(names), f"candidate {index}: expected measurements by name, found {names}")
    bad = [m.name for m in outcome.measurements if not math.isfinite(m.value)]
    expect(not bad, f"candidate {index}: {', '.join(bad)} is not finite; say failure instead")


CHECKS = (accepts_its_own_options, digests_its_inputs, judges_every_candidate)
