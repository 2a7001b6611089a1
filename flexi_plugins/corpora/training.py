"""Text to train on: a corpus packed into windows of tokens, with a loss on responses alone where it has instructions.

Plain text is one stream, as for calibration. Of a corpus that says where a document's response begins (an attribute
``response``, the text in front of it) documents are packed one behind the other, each ended by the end-of-text token, and
prompts have no loss. A window's first token has nothing in front of it and no loss in any case.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexi_plugins.corpora.windows import token_windows
from flexi_plugins.data import digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Corpus, TrainingText

IGNORED = -100  # the label of a token without a loss, as in torch's cross entropy


def training_text(
    corpus: Corpus, split: str, data: Path | None, tokenizer: Any, length: int, count: int, seed: int | None
) -> tuple[TrainingText, str]:
    """Return ``count`` windows of ``length`` tokens of a split, in an order drawn with the seed, and their digest.

    Without a seed they are the first ones. Raise a FlexiError where the text is too short, or where a document of an
    instruction corpus has no response.
    """
    import torch

    marker = getattr(corpus, "response", None)
    if marker is None:
        windows, found = token_windows(corpus, split, data, tokenizer, length, count, seed)
        ids = torch.tensor(windows)
        return TrainingText(ids, ids.clone()), found
    pairs = _packed(corpus, split, data, tokenizer, marker)
    if len(pairs) < count * length:
        raise FlexiError(
            f"corpus {corpus.name!r}, {split} part: expected at least {count} windows of {length} tokens, found "
            f"{len(pairs)} tokens; ask for fewer or shorter ones"
        )
    windows_of_pairs = [pairs[i : i + length] for i in range(0, len(pairs) - length + 1, length)]
    chosen = windows_of_pairs if seed is None else random.Random(seed).sample(windows_of_pairs, len(windows_of_pairs))
    table = torch.tensor(chosen[:count])  # (windows, tokens, 2)
    return TrainingText(table[..., 0].contiguous(), table[..., 1].contiguous()), digest(table.tolist())


def _packed(corpus: Corpus, split: str, data: Path | None, tokenizer: Any, marker: str) -> list[tuple[int, int]]:
    """Return (token id, label) of all documents, one behind the other."""
    return [pair for text in corpus.texts(split, data) for pair in _labelled(corpus.name, text, tokenizer, marker)]


def _labelled(name: str, text: str, tokenizer: Any, marker: str) -> Iterator[tuple[int, int]]:
    """Yield (token id, label) of one document: labels of the prompt are ignored. The two are tokenised apart."""
    prompt, found, response = text.partition(marker)
    if not found or not response:
        raise FlexiError(f"corpus {name!r}: a document has no response behind {marker!r}: {text[:60]!r} ...")

    def ids(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    yield from ((token, IGNORED) for token in ids(prompt + found))
    yield from ((token, token) for token in (*ids(response), tokenizer.eos_token_id))
