"""Hands candidates to evaluators: likelihoods by one journalled sweep, models in memory, exported folders."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexi_plugins.data import Measurement, digest
from flexi_plugins.execution.likelihoods import AnswerJournal, likelihoods
from flexi_plugins.execution.sweep import Planned, Sweeper
from flexi_plugins.hookspecs import Candidate, EvaluationRequest, Outcome
from flexi_plugins.pruner import Pruner
from flexi_plugins.studyfile import Measure


class Measurer:
    """Measures planned models of one pruner's checkpoint."""

    def __init__(self, pruner: Pruner, journal: AnswerJournal, folder: Path, planned: Sequence[Any]) -> None:
        self.pruner, self.journal, self.folder = pruner, journal, folder
        self.planned: dict[str, Planned] = {p.plan.hash: p for p in planned}
        self.sweeper = Sweeper(pruner.blocks)

    def together(self, measure: Measure) -> bool:
        """Whether an evaluator measures all candidates at once (in one sweep)."""
        return getattr(self._evaluator(measure), "together", True)

    def run(self, measure: Measure, candidates: Sequence[Candidate]) -> list[Outcome]:
        """Measure candidates together; an evaluator that raises fails them all, with its reason."""
        scratch = Path(tempfile.mkdtemp(prefix="exports-", dir=self._made(self.folder)))
        try:
            return self._evaluator(measure).evaluate(self._request(candidates, scratch))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def run_alone(self, measure: Measure, candidate: Candidate) -> Outcome:
        """Measure one candidate; what was measured before a kill is taken from the journal."""
        key = digest([measure.model_dump(), self.pruner.checkpoint.fingerprint(), str(self.pruner.dtype)])
        kept = self.journal.get(candidate.plan.hash, key)
        if kept is not None:
            return Outcome(tuple(Measurement(**m) for m in kept))
        outcome = self.run(measure, [candidate])[0]
        if outcome.failure is None and not outcome.documents:
            self.journal.put(candidate.plan.hash, key, [asdict(m) for m in outcome.measurements])
        return outcome

    def _evaluator(self, measure: Measure) -> Any:
        return self.pruner.plugins.get("evaluator", measure.evaluator, measure.options)

    def _made(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _request(self, candidates: Sequence[Candidate], scratch: Path) -> EvaluationRequest:
        chosen = [self.planned[c.plan.hash] for c in candidates]
        pruner = self.pruner
        setting = [pruner.checkpoint.fingerprint(), str(pruner.dtype)]

        def answer(requests: Sequence[Any], title: str) -> list[list[tuple[float, bool]]]:
            return likelihoods(self.sweeper, chosen, requests, self.journal, setting, pruner.progress.stage, title)

        return EvaluationRequest(
            candidates=tuple(candidates),
            tokenizer=pruner.tokenizer,
            likelihoods=answer,
            model=lambda index: pruner.model(chosen[index]).to(pruner.dtype),
            folder=_exporter(pruner, chosen, scratch),
            progress=pruner.progress.stage,
            corpora={n: e.object for n, e in pruner.plugins.entries("corpus").items()},
            data=pruner.data,
            seed=pruner.seed,
            dtype=str(pruner.dtype).removeprefix("torch."),
        )


def _exporter(pruner: Pruner, planned: Sequence[Planned], scratch: Path) -> Callable[[int], Path]:
    def export(index: int) -> Path:
        folder = scratch / str(index)
        if not folder.exists():
            pruner.write(planned[index], folder)
        return folder

    return export
