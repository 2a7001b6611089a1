"""Cut a corpus into windows of tokens, for calibration and for perplexity."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexi_plugins.data import digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Corpus

if TYPE_CHECKING:
    from torch import Tensor

CHARACTERS_PER_TOKEN = 6  # a first guess of how much text to read
SHORTEST_PIECE = 16  # tokens that no text has twice but where it repeats itself
MARGIN = 64  # tokens beyond the wanted ones: the last ones of a cut text may be other ones in the whole


def token_windows(
    corpus: Corpus,
    split: str,
    data: Path | None,
    tokenizer: Any,
    length: int,
    count: int | None,
    seed: int | None = None,
) -> tuple[list[list[int]], str]:
    """Return ``count`` windows of ``length`` tokens, which do not overlap, and the SHA-256 of their token ids.

    The documents are joined and tokenised as one text without special tokens. With a seed the windows are drawn from
    all there are, without replacement; else they are the first ones (count None: all; a remainder is dropped).
    """
    texts = corpus.texts(split, data)
    wanted = count * length if count is not None and seed is None else None
    ids = _tokens(texts, corpus.join, tokenizer, wanted)
    windows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    _check(corpus.name, split, len(ids), length, 1 if count is None else count)
    if seed is not None:
        windows = random.Random(seed).sample(windows, len(windows) if count is None else count)
    windows = windows[:count]
    return windows, digest(windows)


def text_digest(corpus: Corpus, split: str, data: Path | None, tokens: int | None = 0) -> str:
    """Return the SHA-256 of a split's first million characters, or of ten a token where these are more; None: of all."""
    enough = math.inf if tokens is None else max(1_000_000, 10 * tokens)
    found, characters = hashlib.sha256(), 0
    for text in corpus.texts(split, data):
        found.update(text.encode())
        characters += len(text)
        if characters > enough:
            break
    return found.hexdigest()


def _tokens(texts: Iterable[str], join: str, tokenizer: Any, wanted: int | None) -> list[int]:
    """Tokenise the joined documents; where only ``wanted`` leading tokens matter, no more text than that takes."""
    documents: list[str] = []
    enough = float("inf") if wanted is None else CHARACTERS_PER_TOKEN * wanted
    characters = 0
    for text in texts:
        documents.append(text)
        characters += len(text)
        if wanted is not None and characters >= enough:
            ids = _encode(join.join(documents), tokenizer)
            if len(ids) >= wanted + MARGIN:
                return ids
            enough = 2 * characters
    return _encode(join.join(documents), tokenizer)


def _encode(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _check(name: str, split: str, found: int, length: int, count: int) -> None:
    """Raise an error if a text of ``found`` tokens is too short."""
    if found < count * length:
        raise FlexiError(
            f"corpus {name!r}, {split} part: expected at least {count} windows of {length} tokens ({count * length} "
            f"tokens), found {found} tokens; ask for at most {found // length} windows of this length, for shorter "
            "ones, or take a longer text (file:PATH)"
        )


def overlapping(windows: Tensor, others: Tensor) -> set[int] | None:
    """Return which of some windows, (windows, tokens) ids, share tokens with others of the same text; None: nobody can say.

    Both begin at multiples of their lengths, so that they meet in whole pieces of the greatest common divisor; one that is
    shorter than ``SHORTEST_PIECE`` may stand in a text several times.
    """
    piece = math.gcd(windows.shape[1], others.shape[1])
    if piece < SHORTEST_PIECE:
        return None
    known = {tuple(row) for row in others.reshape(-1, piece).tolist()}
    cut = windows.reshape(len(windows), -1, piece).tolist()
    return {index for index, pieces in enumerate(cut) if not known.isdisjoint(map(tuple, pieces))}
