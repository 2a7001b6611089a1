"""The task ``docs_cloze``: choose the true continuation of a passage of the held-out part of ``python-docs``."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flexi_plugins.corpora.python_docs import PythonDocs

NAME = "docs_cloze"
VERSION = 1.0
CONTEXT = (60, 80)  # words
CONTINUATION = 22  # words
STRIDE = 40  # words between two continuations at least, so that they do not overlap; their contexts may
SIMILAR = 0.15  # by how much a distractor may be shorter or longer, in characters
SEED = 0
SENTENCE_END = re.compile(r'(?<=[.!?])["”)]*\s+(?=[A-Z"“])')


def configuration() -> dict[str, Any]:
    """Return the configuration of the lm-eval task."""
    return {
        "task": NAME,
        "custom_dataset": load,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "passage",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": VERSION},
    }


def load(**_: Any) -> Any:
    """Return the data set as lm-eval wants it; it passes the task's metadata, which is not needed."""
    import datasets

    return datasets.DatasetDict(test=datasets.Dataset.from_list(documents(PythonDocs().topics("held-out"))))


def documents(topics: Mapping[str, str], seed: int = SEED) -> list[dict[str, Any]]:
    """Return the documents: passage, four choices of about equal length, and which of them is the answer."""
    passages = [(topic, *pair) for topic, text in topics.items() for pair in passages_of(text)]
    generator = random.Random(seed)
    found = (_document(passage, passages, generator) for passage in passages)
    return [document for document in found if document is not None]


def passages_of(text: str) -> Iterator[tuple[str, str]]:
    """Yield pairs of a passage that ends with a sentence and the words that follow it."""
    sentences = _sentences(text)
    starts = [0]
    for sentence in sentences:
        starts.append(starts[-1] + len(sentence))
    words = [word for sentence in sentences for word in sentence]
    last = -STRIDE
    for end in starts:
        begin = _context_start(starts, end)
        if begin is not None and end - last >= STRIDE and end + CONTINUATION <= len(words):
            yield " ".join(words[begin:end]), " ".join(words[end : end + CONTINUATION])
            last = end


def _sentences(text: str) -> list[list[str]]:
    """Return the sentences of the prose paragraphs as words; what has line breaks is code, a table or a list."""
    prose = [p for p in text.split("\n\n") if "\n" not in p and p.endswith((".", ":")) and len(p.split()) >= 8]
    return [sentence.split() for paragraph in prose for sentence in SENTENCE_END.split(paragraph)]


def _context_start(starts: Sequence[int], end: int) -> int | None:
    """Return where the shortest context of whole sentences before ``end`` begins that is long enough, if any."""
    lengths = {end - start: start for start in starts if CONTEXT[0] <= end - start <= CONTEXT[1]}
    return lengths[min(lengths)] if lengths else None


def _document(
    passage: tuple[str, str, str], passages: Sequence[tuple[str, str, str]], generator: random.Random
) -> dict[str, Any] | None:
    """Return the document of a passage, with distractors from other topics, or None if too few are similar."""
    topic, context, truth = passage
    similar = [p[2] for p in passages if p[0] != topic and abs(len(p[2]) - len(truth)) <= SIMILAR * len(truth)]
    if len(similar) < 3:
        return None
    choices = [truth, *generator.sample(similar, 3)]
    generator.shuffle(choices)
    return {"passage": context, "choices": choices, "answer": choices.index(truth), "topic": topic}
