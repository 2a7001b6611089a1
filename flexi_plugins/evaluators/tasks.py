"""The evaluator ``lm-eval``: its tasks and its judgement, with one sweep answering for all candidates."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from flexi_plugins.corpora.windows import text_digest
from flexi_plugins.data import digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.evaluators import docs_cloze, harness
from flexi_plugins.evaluators.outcomes import documents_of, measurements
from flexi_plugins.evaluators.quiet import quiet
from flexi_plugins.hookspecs import Corpus, EvaluationRequest, Outcome, hookimpl
from flexi_plugins.machine import float_dtype

BOOTSTRAP = 1000  # resamples for the standard errors that have no formula


@dataclass(frozen=True)
class LmEval:
    """Tasks of lm-eval by name; ``limit`` takes the first documents only, ``num_fewshot`` replaces a task's default.

    softmax_dtype: HFLM's option. HFLM's own default is the model's dtype: in bfloat16 it rounds the log-probability of
    every token to 8 bits, which decides the answer to one document in a hundred. "bfloat16" rounds as it does.
    """

    name: ClassVar[str] = "lm-eval"

    tasks: tuple[str, ...] = (docs_cloze.NAME,)
    limit: int | None = None
    num_fewshot: int | None = None
    softmax_dtype: str = "float32"

    def check(self) -> None:
        """Raise for no tasks, no documents, or tasks that lm-eval does not know."""
        self._check_counts()
        float_dtype(self.softmax_dtype)
        if problems := harness.check_tasks(self.tasks):
            raise FlexiError("; ".join(problems))

    def inputs(self, data: Path | None, corpora: Mapping[str, Corpus]) -> str:
        """Return a digest of the local files of the tasks, and of the text that docs_cloze is built from."""
        harness.check_files(self.tasks, data)
        read = {t: file_digest(harness.local_file(t, data)) for t in self.tasks}
        if docs_cloze.NAME in self.tasks:
            read[docs_cloze.NAME] = text_digest(corpora["python-docs"], "held-out", data)
        return digest(read)

    def evaluate(self, request: EvaluationRequest) -> Iterable[Outcome]:
        """Return lm-eval's metrics and choice_logprob of each candidate, and what became of each document."""
        from flexi_plugins.evaluators import replay

        title = f"lm-eval: {', '.join(self.tasks)}"
        suite = self._suite(request)
        with request.progress(f"tokenising {title}", len(suite.instances)) as advance:
            questions = replay.collect(suite.instances, request.tokenizer, request.max_length, advance)
        pairs = questions.pairs
        answers = request.likelihoods(pairs, title, self.softmax_dtype) if pairs else [[] for _ in request.candidates]
        models = [replay.Replay(questions, known, _model(request, i)) for i, known in enumerate(answers)]
        return self._outcomes(request, suite, models, f"scoring {title}")

    def _outcomes(
        self, request: EvaluationRequest, suite: harness.Suite, models: Sequence[Any], title: str
    ) -> Iterator[Outcome]:
        """Yield the outcome of each candidate as soon as it is known: where text is generated, that takes long."""
        with request.progress(title, len(models)) as advance:
            for i, model in enumerate(models):
                with quiet():
                    outcome = self._outcome(request, i, suite, model)
                advance(1)
                yield outcome

    def _suite(self, request: EvaluationRequest) -> harness.Suite:
        """Load the tasks and build their requests."""
        self._check_counts()
        with quiet(), request.progress("loading tasks of lm-eval", len(self.tasks)) as advance:
            return harness.load_suite(self.tasks, request.data, self.limit, self.num_fewshot, advance)

    def _check_counts(self) -> None:
        if not self.tasks or (self.limit is not None and self.limit < 1):
            raise FlexiError(
                f"evaluator 'lm-eval': expected at least one task and a limit of at least 1 document, found tasks "
                f"{self.tasks} and limit {self.limit}; name tasks, and leave limit out for all documents"
            )

    def _outcome(self, request: EvaluationRequest, index: int, suite: harness.Suite, model: Any) -> Outcome:
        """Let lm-eval judge the answers of one candidate."""
        from lm_eval.evaluator import evaluate

        bad = sum(not math.isfinite(logprob) for logprob, _ in model.answers)
        if bad:
            return Outcome(
                failure=f"candidate {request.candidates[index].label!r}: {bad} of its {len(model.answers)} "
                "log-probabilities are not finite, the model broke down"
            )
        tasks = {"tasks": dict(suite.tasks), "groups": dict(suite.groups)}
        results: Any = evaluate(lm=model, task_dict=tasks, limit=self.limit, bootstrap_iters=BOOTSTRAP)
        documents = {name: documents_of(suite.tasks[name], rows) for name, rows in results["samples"].items()}
        rows = tuple(row for task in documents.values() for row in task)
        versions = {f"task {name}": str(version) for name, version in results["versions"].items()}
        return Outcome(tuple(measurements(results, documents)), rows, versions=versions)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content; empty if there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _model(request: EvaluationRequest, index: int) -> Any:
    """Return how to get a candidate as lm-eval's own model, for what has to be generated."""

    def make() -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=request.model(index), tokenizer=request.tokenizer, max_length=request.max_length)

    return make


@hookimpl
def evaluators() -> list[LmEval]:
    """Return the evaluator of this file."""
    return [LmEval()]
