"""Language models for lm-eval that run no model: one notes what it is asked, one repeats what was answered.

Only imported where lm-eval is used, for it loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length

from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Tokens

Pair = tuple[Tokens, Tokens]
Request = tuple[str, tuple[Any, ...]]  # request type and arguments
LIKELIHOODS = ("loglikelihood", "loglikelihood_rolling")


class Tokeniser(HFLM):
    """HFLM without a model: its own code makes token pairs of requests, which are noted instead of answered."""

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        """Set what HFLM's tokenising code reads; its own constructor would want a model."""
        TemplateLM.__init__(self)
        self.tokenizer = tokenizer
        self._max_length = max_length or resolve_max_length(None, tokenizer)
        self.backend = "causal"
        self.add_bos_token = self.custom_prefix_token_id = self.enable_thinking = None
        self.batch_size_per_gpu = 1
        self.pairs: list[Pair] = []

    def pairs_of(self, instance: Any) -> list[Pair]:
        """Return the (context, continuation) token pairs whose log-probabilities add up to the instance's answer."""
        self.pairs = []
        getattr(self, instance.request_type)([instance], disable_tqdm=True)
        return self.pairs

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Note the pairs, cut from the left to the model's length as HFLM cuts them."""
        for _text, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise FlexiError(
                    f"evaluator 'lm-eval': expected continuations of 1 to {self.max_length} tokens, found one of "
                    f"{len(continuation)}; leave out its task or take a model with a longer context"
                )
            kept = [*context, *continuation][-(self.max_length + 1) :]
            self.pairs.append((tuple(kept[: -len(continuation)]), tuple(continuation)))
        return [(0.0, False)] * len(requests)


@dataclass(frozen=True)
class Questions:
    """The different token pairs of all requests, and which of them each request is made of."""

    pairs: tuple[Pair, ...]
    parts: Mapping[Request, tuple[int, ...]]


def collect(
    instances: Iterable[Any], tokenizer: Any, max_length: int | None, advance: Callable[[int], Any]
) -> Questions:
    """Tokenise the requests for likelihoods among lm-eval's instances; ``advance(1)`` is called for each instance."""
    tokeniser = Tokeniser(tokenizer, max_length)
    index: dict[Pair, int] = {}
    parts: dict[Request, tuple[int, ...]] = {}
    for instance in instances:
        request = (instance.request_type, instance.args)
        if instance.request_type in LIKELIHOODS and request not in parts:
            parts[request] = tuple(index.setdefault(pair, len(index)) for pair in tokeniser.pairs_of(instance))
        advance(1)
    return Questions(tuple(index), parts)


class Replay(LM):
    """Answers lm-eval's requests for likelihoods with what is known, and leaves generation to a model."""

    def __init__(self, questions: Questions, answers: Sequence[tuple[float, bool]], model: Callable[[], HFLM]) -> None:
        """Keep the answers to the questions; the model is made only if something is to be generated."""
        super().__init__()
        self.questions = questions
        self.answers = answers
        self.model = model

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is the greedy one."""
        return [self.answers[self._parts(request)[0]] for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text: the sum over its windows."""
        return [sum(self.answers[part][0] for part in self._parts(request)) for request in requests]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model itself generates."""
        return self.model().generate_until(requests, disable_tqdm=True)

    def _parts(self, request: Any) -> tuple[int, ...]:
        return self.questions.parts[request.request_type, request.args]
