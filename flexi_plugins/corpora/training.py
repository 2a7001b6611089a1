"""Text to train on: a corpus packed into windows of tokens, with a loss on responses alone where it has instructions.

Plain text is one stream, as for calibration. Of a corpus that says where a document's response begins (an attribute
``response``, the text in front of it) documents are packed one behind the other, each ended by the end-of-text token, and
prompts have no loss; documents without a response are left out. A window's first token has nothing in front of it and no
loss in any case. LLM-Pruner cuts every document at 256 tokens and trains on it alone; here windows are full, whatever the
documents' lengths, and tokens attend to what of the document before is in their window.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from flexi_plugins.corpora.windows import token_windows
from flexi_plugins.data import digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import IGNORED, Corpus, TrainingText


def training_text(
    corpus: Corpus, split: str, data: Path | None, tokenizer: Any, length: int, count: int, seed: int
) -> tuple[TrainingText, str]:
    """Return ``count`` windows of ``length`` tokens of a split, in an order drawn with the seed, and their digest.

    Raise a FlexiError where the text is too short, or where no document of an instruction corpus has a response.
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
    chosen = random.Random(seed).sample(windows_of_pairs, len(windows_of_pairs))
    table = torch.tensor(chosen[:count])  # (windows, tokens, 2)
    return TrainingText(table[..., 0].contiguous(), table[..., 1].contiguous()), digest(table.tolist())


def _packed(corpus: Corpus, split: str, data: Path | None, tokenizer: Any, marker: str) -> list[tuple[int, int]]:
    """Return (token id, label) of all documents with a response, one behind the other; raise where none has one."""
    if tokenizer.eos_token_id is None:
        raise FlexiError(f"corpus {corpus.name!r}: the tokenizer has no end-of-text token to put behind a document")
    labelled = (_labelled(text, tokenizer, marker) for text in corpus.texts(split, data))
    pairs = [pair for document in labelled for pair in document]
    if not pairs:
        raise FlexiError(f"corpus {corpus.name!r}, {split} part: no document has a response behind {marker!r}")
    return pairs


def _labelled(text: str, tokenizer: Any, marker: str) -> list[tuple[int, int]]:
    """Return (token id, label) of one document, none where it has no response.

    As LLM-Pruner does (generate_and_tokenize_prompt): the whole is tokenised at once, with the tokens that the tokenizer
    puts in front of a text, and as many of its tokens are ignored as the prompt alone has.
    """
    prompt, found, response = text.partition(marker)
    if not found or not response.strip():
        return []
    whole, asked = (tokenizer(part, verbose=False)["input_ids"] for part in (text, prompt + found))
    end = tokenizer.eos_token_id
    whole = whole if whole[-1] == end else [*whole, end]
    if len(asked) > 1 and asked[-1] == end:
        asked = asked[:-1]
    return [(token, IGNORED if place < len(asked) else token) for place, token in enumerate(whole)]
