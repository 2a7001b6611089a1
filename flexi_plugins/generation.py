"""Quality of what pruned models write: chrF++ of generated text, as sacrebleu computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flexi_plugins.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 16  # windows that are continued together


def chrf(
    candidates: Sequence[Any], model: Callable[[Any], Any], windows: Tensor, tokenizer: Any, progress: Progress
) -> list[float]:
    """Return minus the corpus chrF++ (word order 2, 0..100) of each candidate's continuations, so that lower is better.

    windows: (windows, tokens) token ids. The first half of a window is the prompt, continued greedily by as many tokens
    as the second half has, which is the reference. ``model`` makes a candidate's transformers model; one is in memory at
    a time. NaN of a model that breaks down, with logits that are not finite.
    """
    from sacrebleu import corpus_chrf

    half = windows.shape[1] // 2
    references = tokenizer.batch_decode(windows[:, half:].tolist(), skip_special_tokens=True)
    found = []
    with progress.stage(f"generating with {len(candidates)} models", len(candidates)) as advance:
        for candidate in candidates:
            made = model(candidate)
            if is_finite(made, windows[:ROWS, :half]):
                written = continuations(made, windows[:, :half], windows.shape[1] - half)
                texts = tokenizer.batch_decode(written.tolist(), skip_special_tokens=True)
                found.append(-corpus_chrf(texts, [references], word_order=2).score)
            else:
                found.append(math.nan)
            advance(1)
    return found


def is_finite(model: Any, prompts: Tensor) -> bool:
    """Whether all logits behind some prompts, (prompts, tokens) ids, are finite."""
    import torch

    with torch.inference_mode():
        return bool(model(prompts.to(model.device)).logits[:, -1].isfinite().all())


def continuations(model: Any, prompts: Tensor, count: int) -> Tensor:
    """Return ``count`` greedily chosen tokens behind each prompt: (prompts, tokens) -> (prompts, count)."""
    import torch

    written = []
    for rows in prompts.split(ROWS):
        rows = rows.to(model.device)
        output = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        written.append(output[:, rows.shape[1] :].cpu())
    return torch.cat(written)
