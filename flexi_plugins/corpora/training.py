"""Text to train on: a corpus packed into windows of tokens, with a loss on responses alone where it has instructions.

Plain text is one stream, as for calibration. Of a corpus that says where a document's response begins (an attribute
``response``, the text in front of it) documents are packed one behind the other, each ended by the end-of-text token, and
prompts have no loss; documents without a response are left out. A window's first token has nothing in front of it and no
loss in any case. LLM-Pruner cuts every document at 256 tokens and trains on it alone; here windows are full, whatever the
documents' lengths, and tokens attend to what of the document before is in their window.
"""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexi_plugins.corpora.windows import token_windows
from flexi_plugins.data import digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import IGNORED, Corpus, TrainingText

if TYPE_CHECKING:
    from torch import Tensor


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
    cut = pairs[: len(pairs) // length * length].view(-1, length, 2)
    if len(cut) < count:
        raise FlexiError(
            f"corpus {corpus.name!r}, {split} part: expected at least {count} windows of {length} tokens, found "
            f"{len(pairs)} tokens; ask for fewer or shorter ones"
        )
    order = random.Random(seed).sample(range(len(cut)), len(cut))
    table = cut[order[:count]].long()  # (windows, tokens, 2)
    return TrainingText(table[..., 0].contiguous(), table[..., 1].contiguous()), digest(table.tolist())


def _packed(corpus: Corpus, split: str, data: Path | None, tokenizer: Any, marker: str) -> Tensor:
    """Return token ids and labels of all documents with a response, one behind the other, (tokens, 2) int32.

    Raise where no document has one.
    """
    import torch

    if tokenizer.eos_token_id is None:
        raise FlexiError(f"corpus {corpus.name!r}: the tokenizer has no end-of-text token to put behind a document")
    pairs = array("i")  # a list of tuples would take a gigabyte for ten million tokens
    for text in corpus.texts(split, data):
        for pair in _labelled(text, tokenizer, marker):
            pairs.extend(pair)
    if not pairs:
        raise FlexiError(f"corpus {corpus.name!r}, {split} part: no document has a response behind {marker!r}")
    return torch.frombuffer(pairs, dtype=torch.int32).view(-1, 2)


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
