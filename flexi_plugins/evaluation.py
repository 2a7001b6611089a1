"""Hands candidates to evaluators: likelihoods by one journalled sweep, models in memory, exported folders."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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

    def run(self, measure: Measure, candidates: Sequence[Candidate]) -> Iterator[Outcome]:
        """Yield the outcome of each candidate, in their order."""
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="exports-", dir=self.folder))
        evaluator = self.pruner.plugins.get("evaluator", measure.evaluator, measure.options)
        try:
            yield from evaluator.evaluate(self._request(candidates, scratch))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

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
            max_length=pruner.checkpoint.config.max_position_embeddings,
        )


def _exporter(pruner: Pruner, planned: Sequence[Planned], scratch: Path) -> Callable[[int], Path]:
    def export(index: int) -> Path:
        """Write a candidate's folder; the one before it goes, so that the disk holds one at a time."""
        folder = scratch / str(index)
        if not folder.exists():
            for other in scratch.iterdir():
                shutil.rmtree(other)
            pruner.write(planned[index], folder)
        return folder

    return export
