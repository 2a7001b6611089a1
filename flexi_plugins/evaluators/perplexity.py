"""The evaluator ``perplexity``: non-overlapping windows, as GPTQ's evaluation and its successors do it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from flexi_plugins.corpora.files import find_corpus
from flexi_plugins.corpora.windows import text_digest, token_windows
from flexi_plugins.data import Measurement
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Corpus, EvaluationRequest, Outcome, hookimpl

LARGEST_LOSS = 700.0  # nats a token; exp of more is no float


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss over the held-out part's first windows of ``window`` tokens, as many as fit in ``tokens``.

    tokens: "all" takes the whole text (a remainder shorter than a window is dropped). Of each window all tokens but the
    first are predicted; windows weigh the same.
    """

    name: ClassVar[str] = "perplexity"

    corpus: str = "python-docs"
    window: int = 512
    tokens: int | Literal["all"] = 16384

    def evaluate(self, request: EvaluationRequest) -> Iterable[Outcome]:
        """Return the perplexity of each candidate, and the loss of each window."""
        self.check()
        if request.max_length and self.window > request.max_length:
            raise FlexiError(
                f"evaluator 'perplexity': the model has positions for {request.max_length:,} tokens, found windows of "
                f"{self.window:,}; set window to {request.max_length} or less"
            )
        corpus = find_corpus(self.corpus, request.corpora)
        count = None if self.tokens == "all" else self.tokens // self.window
        windows, _ = token_windows(corpus, "held-out", request.data, request.tokenizer, self.window, count)
        pairs = [((window[0],), tuple(window[1:])) for window in windows]
        answers = request.likelihoods(pairs, f"perplexity on {self.corpus}")
        losses = [[-logprob / (self.window - 1) for logprob, _ in answer] for answer in answers]
        return [self._outcome(c.label, own) for c, own in zip(request.candidates, losses, strict=True)]

    def inputs(self, data: Path | None, corpora: Mapping[str, Corpus]) -> str:
        """Return a digest of the corpus' held-out text: of all, or of so much that the tokens hardly take more."""
        count = None if self.tokens == "all" else self.tokens
        return text_digest(find_corpus(self.corpus, corpora), "held-out", data, count)

    def check(self) -> None:
        """Raise unless there is at least one window of at least two tokens."""
        if self.window < 2 or (self.tokens != "all" and self.tokens < self.window):
            raise FlexiError(
                f"evaluator 'perplexity': expected a window of at least 2 tokens and at least one window, found window "
                f'{self.window} and tokens {self.tokens}; set tokens to a multiple of window, or to "all"'
            )

    def _outcome(self, label: str, losses: Sequence[float]) -> Outcome:
        """Return the outcome of a candidate from the mean loss of each window."""
        mean = statistics.fmean(losses)
        if not mean < LARGEST_LOSS:  # also true of NaN
            return Outcome(failure=f"candidate {label!r}: its loss on {self.corpus} is {mean}, the model broke down")
        perplexity = math.exp(mean)
        error = perplexity * standard_error(losses) if len(losses) > 1 else None  # delta method
        documents = tuple(
            {"corpus": self.corpus, "window": i, "tokens": self.window, "nll": loss} for i, loss in enumerate(losses)
        )
        return Outcome((Measurement(f"{self.corpus}_ppl@{self.window}", perplexity, False, error),), documents)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of at least two values."""
    return statistics.stdev(values) / math.sqrt(len(values))


@hookimpl
def evaluators() -> list[Perplexity]:
    """Return the evaluator of this file."""
    return [Perplexity()]
