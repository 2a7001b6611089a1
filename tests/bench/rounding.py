"""Bench ``rounding``: what of a training arrives in a model that is stored in bfloat16, by how its weights are rounded.

The same trained weights, in float32 as they were trained, rounded to the nearest value, and rounded at random; the loss of
each on text that no training saw.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import finish, table
from swept import MODEL
from torch import Tensor, nn

from flexi_plugins.corpora.files import find_corpus
from flexi_plugins.corpora.windows import token_windows
from flexi_plugins.pruner import Calibration, Pruner, Training
from flexi_plugins.recovery import monitor
from flexi_plugins.recovery.copies import replaced
from flexi_plugins.recovery.full import Full
from flexi_plugins.recovery.lora import Lora

CORPUS, LENGTH, TOKENS, WINDOW, MEASURED = "wikitext2", 256, 16_384, 512, 16
METHODS = {
    "lora, 1e-4": Lora(keep="last"),
    "lora, 1e-3": Lora(keep="last", learning_rate=1e-3),
    "full, 2e-5": Full(keep="last"),
}
SEEDS = (0, 1, 2)


def loss(model: nn.Module, ids: Tensor) -> float:
    """Return the mean next-token loss of windows, nats a token."""
    with torch.no_grad():
        return sum(float(model(input_ids=row, labels=row).loss) for row in ids.split(1)) / len(ids)


def trained(pruner: Pruner, plan: Any, method: Any, folder: Path) -> dict[str, Tensor]:
    """Train, and return the trained parameters as they are before they are rounded."""
    found: dict[str, Tensor] = {}

    def noting(model: nn.Module, tensors: Mapping[str, Tensor], seed: int | None = None) -> nn.Module:
        found.update({name: tensor.detach().clone() for name, tensor in tensors.items()})
        return replaced(model, tensors, seed)

    with patch.object(monitor, "replaced", noting):
        pruner.recover(plan, method, Training(CORPUS, LENGTH, TOKENS, 8), folder)
    return found


def main() -> None:
    """Train by each method, round in every way, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("FLEXI_DATA"), help="folder with text/*.txt")
    data = Path(parser.parse_args().data)
    pruner = Pruner(MODEL, Calibration(corpus=CORPUS), dtype="bfloat16", device="cpu", data=data)
    plan = pruner.plan("flexigpt", "remove-blocks", 0.2)
    corpus = find_corpus(CORPUS, {name: e.object for name, e in pruner.plugins.entries("corpus").items()})
    ids = torch.tensor(token_windows(corpus, "held-out", data, pruner.tokenizer, WINDOW, MEASURED)[0])
    start = loss(pruner.model(plan), ids)
    rows: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            tensors = trained(pruner, plan, method, Path(folder))
        model = pruner.model(plan)
        exact = loss(replaced(pruner.model(plan, dtype="float32"), tensors), ids)
        nearest = loss(replaced(model, tensors), ids)
        random = [loss(replaced(model, tensors, seed), ids) for seed in SEEDS]
        kept = {n: model.get_parameter(n).detach() for n in tensors}
        unchanged = sum(int((kept[n] == t.to(kept[n].dtype)).sum()) for n, t in tensors.items())
        total = sum(tensor.numel() for tensor in tensors.values())
        rows.append(
            {
                "method, rate": name,
                "start": start,
                "float32": exact,
                "nearest": nearest,
                "at random": sum(random) / len(random),
                "gain kept: nearest": (start - nearest) / (start - exact),
                "gain kept: at random": (start - sum(random) / len(random)) / (start - exact),
                "weights unchanged: nearest": unchanged / total,
            }
        )
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    protocol = {"corpus": CORPUS, "tokens": TOKENS, "measured_tokens": WINDOW * MEASURED, "seeds": SEEDS}
    finish("rounding", {"model": MODEL, "stored": "bfloat16", **protocol, "rows": rows})


if __name__ == "__main__":
    main()
