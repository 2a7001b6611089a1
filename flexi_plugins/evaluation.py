"""Hands candidates to evaluators (likelihoods by one journalled sweep, models in memory, folders); writes one's outcomes."""

from __future__ import annotations

import datetime
import itertools
import math
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from flexi_plugins.data import Measurement, PruningPlan, digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution.likelihoods import AnswerJournal, likelihoods
from flexi_plugins.execution.sweep import Planned, Sweeper
from flexi_plugins.files import remove_leftovers, write_text
from flexi_plugins.hookspecs import Candidate, EvaluationRequest, Evaluator, Outcome
from flexi_plugins.machine import float_dtype
from flexi_plugins.plugins import Plugins, named, options_json, told
from flexi_plugins.pruner import Pruner
from flexi_plugins.store import environment, to_text, write_traceback
from flexi_plugins.studyfile import Measure


class Measurer:
    """Measures planned models of one pruner's checkpoint; a context, at whose end exported folders go away."""

    def __init__(self, pruner: Pruner, journal: AnswerJournal | None, folder: Path, planned: Sequence[Any]) -> None:
        self.pruner, self.journal, self.folder = pruner, journal, folder
        self.planned: dict[str, Planned] = {p.plan.hash: p for p in planned}
        self.sweeper = Sweeper(pruner.blocks, pruner.progress.say)
        self.lost: dict[str, int] = {}  # plan hash -> first block whose states were not finite
        self.machine = [environment(pruner.machine.gpu), torch.get_num_threads()]  # what speeds depend on
        self.scratch = folder / f"exports.{os.getpid()}.tmp"

    def __enter__(self) -> Measurer:
        remove_leftovers(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)

    def run(
        self, measure: Measure, candidates: Sequence[Candidate], setting: Mapping[str, Any] | None = None
    ) -> Iterator[Outcome]:
        """Return the outcomes of the candidates, in their order: all made already, or one by one as they are taken.

        When the evaluator breaks, what it has not measured has that as its failure; a FlexiError ends the study. With a
        journal, outcomes that are whole are kept in it as they are taken, and not measured again on this machine; setting: the
        evaluator's options, with the digest of what it reads.
        """
        entry = self.pruner.plugins.entry("evaluator", measure.evaluator, measure.options)
        options = setting or described(entry.object, self.pruner.data, self.pruner.plugins)
        key = digest([asdict(entry.provenance), options, self._setting, self.pruner.seed, self.machine])
        known = {c.plan.hash: kept for c in candidates if (kept := self._kept(c.plan, key)) is not None}
        asked = [c for c in candidates if c.plan.hash not in known]
        made: Iterator[Outcome] = iter(())
        try:
            if asked:
                made = iter(entry.object.evaluate(self._request(asked)))
        except FlexiError:
            raise
        except Exception as error:  # a plugin may fail in any way, and the other evaluators go on
            made = itertools.repeat(self._broken(measure.evaluator, error))
        return self._all(candidates, known, self._taken(measure.evaluator, made, asked), key)

    @property
    def _setting(self) -> list[str]:
        return [self.pruner.checkpoint.fingerprint(), str(self.pruner.dtype)]

    def _kept(self, plan: PruningPlan, key: str) -> Outcome | None:
        found = self.journal.get(plan.hash, key) if self.journal else None
        return None if found is None else _outcome_of(*found)

    def _all(
        self, candidates: Sequence[Candidate], known: Mapping[str, Outcome], taken: Iterator[Outcome], key: str
    ) -> Iterator[Outcome]:
        for candidate in candidates:
            outcome = known.get(candidate.plan.hash)
            if outcome is None:
                outcome = next(taken)
                if self.journal and _is_whole(outcome):
                    with suppress(TypeError):  # documents that are no JSON: it is measured again then
                        self.journal.put(candidate.plan.hash, key, _parts_of(outcome))
            yield outcome

    def _taken(self, evaluator: str, made: Iterator[Outcome], candidates: Sequence[Candidate]) -> Iterator[Outcome]:
        for index, candidate in enumerate(candidates):
            try:
                outcome = _checked(next(made))
                if index + 1 == len(candidates) and isinstance(made, Generator):
                    made.close()  # what it holds and shows goes before the next evaluator comes
            except FlexiError:
                raise
            except Exception as error:  # as above; StopIteration: it gave fewer outcomes than there are candidates
                yield from [self._broken(evaluator, error)] * (len(candidates) - index)
                return
            yield self._located(outcome, candidate.plan)

    def _located(self, outcome: Outcome, plan: PruningPlan) -> Outcome:
        """Say in which block the values of a failed candidate stopped being finite, where that is the reason."""
        first = self.lost.get(plan.hash)
        if outcome.failure is None or first is None:
            return outcome
        sources = ", ".join(map(str, plan.blocks[first].sources))
        return replace(
            outcome, failure=f"{outcome.failure} (not finite first in block {first}, of old blocks {sources})"
        )

    def _broken(self, evaluator: str, error: Exception) -> Outcome:
        reason = "it gave fewer outcomes than candidates" if isinstance(error, StopIteration) else told(error)
        file = write_traceback(self.folder, evaluator)
        self.pruner.progress.say(f"evaluator {evaluator!r} failed: {reason} (see {file})")
        return Outcome(failure=reason)

    def _request(self, candidates: Sequence[Candidate]) -> EvaluationRequest:
        chosen = [self.planned[c.plan.hash] for c in candidates]
        pruner = self.pruner

        def answer(
            requests: Sequence[Any], title: str, softmax_dtype: str = "float32"
        ) -> list[list[tuple[float, bool]]]:
            stage, rounding = pruner.progress.stage, float_dtype(softmax_dtype)
            found = likelihoods(self.sweeper, chosen, requests, self.journal, self._setting, stage, title, rounding)
            self.lost |= {chosen[i].plan.hash: position for i, position in self.sweeper.broken.items()}
            return found

        return EvaluationRequest(
            candidates=tuple(candidates),
            tokenizer=pruner.tokenizer,
            likelihoods=answer,
            model=lambda index: pruner.model(
                chosen[index], pruner.dtype_name
            ),  # Module.to would round rotary frequencies too
            folder=_exporter(pruner, chosen, self.scratch),
            progress=pruner.progress.stage,
            corpora={n: e.object for n, e in pruner.plugins.entries("corpus").items()},
            data=pruner.data,
            seed=pruner.seed,
            dtype=pruner.dtype_name,
            max_length=pruner.checkpoint.config.max_position_embeddings,
        )


def described(evaluator: Evaluator, data: Path | None, plugins: Plugins) -> dict[str, Any]:
    """Return an evaluator's options as JSON values, with a digest of what it reads, where it reads anything."""
    with named("evaluator", evaluator.name):
        inputs = evaluator.inputs(data, {n: e.object for n, e in plugins.entries("corpus").items()})
    return {**options_json(evaluator), **({"inputs": inputs[:16]} if inputs else {})}


def write_outcomes(
    path: Path, pruner: Pruner, candidate: Candidate, measures: Sequence[Measure], outcomes: Sequence[Outcome]
) -> None:
    """Write what was measured of one model as JSON, with what it depends on."""
    evaluators = [pruner.plugins.get("evaluator", m.evaluator, m.options) for m in measures]
    found = {
        "model": candidate.label,
        "fingerprint": pruner.checkpoint.fingerprint(),
        "plan": candidate.plan.hash,
        "dtype": pruner.dtype_name,
        "evaluation": [{"evaluator": e.name, **described(e, pruner.data, pruner.plugins)} for e in evaluators],
        "measurements": [asdict(m) for o in outcomes for m in o.measurements],
        "versions": environment(pruner.machine.gpu) | {k: v for o in outcomes for k, v in o.versions.items()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_text(path, to_text(found, indent=1) + "\n")


def _checked(outcome: Any) -> Outcome:
    """Return what an evaluator gave, if it is an outcome whose measurements can be written."""
    if not isinstance(outcome, Outcome) or not all(isinstance(m, Measurement) for m in outcome.measurements):
        raise TypeError(f"expected an Outcome of Measurements for every candidate, found {str(outcome)[:80]!r}")
    if not all(isinstance(document, Mapping) for document in outcome.documents):
        raise TypeError(f"expected documents that are mappings, found {str(outcome.documents)[:80]!r}")
    to_text([[m.name for m in outcome.measurements], outcome.versions])  # a TypeError, where they are no JSON
    return outcome


def _is_whole(outcome: Outcome) -> bool:
    return outcome.failure is None and all(math.isfinite(m.value) for m in outcome.measurements)


def _parts_of(outcome: Outcome) -> list[Any]:
    """Return an outcome that has no failure as JSON values."""
    return [[asdict(m) for m in outcome.measurements], outcome.documents, outcome.versions]


def _outcome_of(
    measurements: Sequence[Mapping[str, Any]], documents: Sequence[Mapping[str, Any]], versions: Mapping[str, str]
) -> Outcome:
    return Outcome(tuple(Measurement(**m) for m in measurements), tuple(documents), versions=versions)


def _exporter(pruner: Pruner, planned: Sequence[Planned], scratch: Path) -> Callable[[int], Path]:
    def export(index: int) -> Path:
        """Write a candidate's folder; the one before it goes, so that the disk holds one at a time."""
        folder = scratch / planned[index].plan.hash[:16]
        if not folder.exists():
            shutil.rmtree(scratch, ignore_errors=True)
            pruner.write(planned[index], folder)
        return folder

    return export
