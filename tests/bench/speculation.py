"""Bench ``speculation``: FlexiGPT's self-speculative decoding against plain decoding of the same pruned model.

The draft is the model without its replaced blocks, on the same weights. float32, so that greedy decoding has one answer:
both sides have to write the same tokens. Both are transformers' own ``generate``; each round decodes every prompt both
ways, one after the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

from common import finish, table
from swept import MODEL

from flexi_plugins.pruner import Pruner
from flexi_plugins.strategies.share_lora import ShareLora

BLOCKS, PROMPTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = (3, 6, 9), 4, 64, 64, 3


def decode(model: Any, prompt: Any, **options: Any) -> tuple[list[int], float]:
    """Return the tokens that are written behind a prompt (1, tokens), greedily, and the seconds that it took."""
    import torch

    begun = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    return output[0, prompt.shape[1] :].tolist(), time.perf_counter() - begun


def measure(pruner: Pruner, blocks: int) -> dict[str, Any]:
    """Return tokens a second of both ways, medians over rounds, for a model with so many blocks replaced."""
    planned = pruner.make("flexigpt", ShareLora(blocks=blocks, output_gain="calibrated"), 0.0)
    model: Any = pruner.model(planned, dtype="float32")
    draft = model.draft()
    prompts = pruner.texts[0][:PROMPTS, :PROMPT_TOKENS]
    seconds: dict[str, list[float]] = {"plain": [], "speculative": []}
    different = 0
    for round_ in range(ROUNDS + 1):
        took = dict.fromkeys(seconds, 0.0)
        for row in prompts:
            alone, took_alone = decode(model, row[None])
            together, took_together = decode(model, row[None], assistant_model=draft)
            different += alone != together
            took["plain"] += took_alone
            took["speculative"] += took_together
        if round_:  # the first one warms up
            for name, value in took.items():
                seconds[name].append(value)
    tokens = PROMPTS * NEW_TOKENS
    speed = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    ratios = [p / s for p, s in zip(seconds["plain"], seconds["speculative"], strict=True)]
    return {
        "replaced blocks": blocks,
        "plain tokens/s": speed["plain"],
        "speculative tokens/s": speed["speculative"],
        "ratio": statistics.median(ratios),
        "outputs that differ": different,
    }


def main() -> None:
    """Measure models with more and more replaced blocks, print them and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("FLEXI_DATA"), help="folder with text/*.txt")
    pruner = Pruner(MODEL, dtype="float32", device="cpu", data=parser.parse_args().data)
    rows = [measure(pruner, blocks) for blocks in BLOCKS]
    print(f"Greedy decoding of {NEW_TOKENS} tokens behind {PROMPTS} prompts, {MODEL} with replaced blocks.\n")
    print(table(rows))
    print()
    protocol = {"prompts": PROMPTS, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "rounds": ROUNDS}
    finish("speculation", {"ratio": rows[-1]["ratio"], "model": MODEL, "dtype": "float32", **protocol, "rows": rows})


if __name__ == "__main__":
    main()
