"""Bench ``training``: tokens a second of the lora recovery beside plain transformers and peft, on the same model and text.

Both train the same LoRA (rank, maps, dropout) of the same pruned model on the same windows, with as many tokens a step and
a micro-batch, from the loaded model to the merged one. The plain side is what a user writes: ``get_peft_model``, ``Trainer``,
``merge_and_unload``. The held-out loss, which ours also measures before and after, is timed apart, since the plain side has
none. The two take turns in one process, and in who begins; the first round warms up. Both compute in bfloat16 where the
processor multiplies it, else in float32: torch's own bfloat16 is several times slower there, which ours goes round (see
the bench of bfloat16).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from common import finish, table
from swept import MODEL

from flexi_plugins.execution.sweep import Planned
from flexi_plugins.precision import native_bfloat16
from flexi_plugins.pruner import Pruner, Training
from flexi_plugins.recovery.lora import Lora

LENGTH, TOKENS, STEP, ROUNDS = 256, 8192, 2048, 8
METHOD = Lora(batch_tokens=STEP, micro_batch_tokens=STEP, evaluate_every=10 * TOKENS, keep="last")


class Side(NamedTuple):
    """What one training took without the held-out loss, that one apart, seconds; and its mean loss, nats a token."""

    seconds: float
    loss: float
    held_out: float = 0.0


def plain(pruner: Pruner, planned: Planned, setting: Training, folder: str) -> Side:
    """Train by transformers and peft alone, from the loaded model on."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import StackDataset
    from transformers import Trainer, TrainingArguments

    model, ids = pruner.model(planned, dtype=pruner.dtype_name), pruner.training_texts(setting)[0].ids.long()
    begun = time.perf_counter()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        r=METHOD.rank,
        lora_alpha=METHOD.alpha,
        lora_dropout=METHOD.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=STEP // LENGTH,
        learning_rate=METHOD.learning_rate,
        lr_scheduler_type=METHOD.schedule,
        bf16=pruner.dtype_name == "bfloat16",
        use_cpu=True,
        save_strategy="no",
        logging_steps=TOKENS // STEP,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(adapted, arguments, train_dataset=StackDataset(input_ids=ids, labels=ids.clone()))
    loss = trainer.train().training_loss
    adapted.merge_and_unload()
    return Side(time.perf_counter() - begun, loss)


class Timed:
    """Notes how long the held-out loss takes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, model: Any, batch: Any) -> Any:
        from flexi_plugins.recovery.training import next_token_loss

        begun = time.perf_counter()
        loss = next_token_loss(model, batch)
        self.seconds += time.perf_counter() - begun
        return loss


def ours(pruner: Pruner, planned: Planned, setting: Training, folder: str) -> Side:
    """Train by the lora recovery, from the plan on."""
    from unittest.mock import patch

    from flexi_plugins.recovery import lora

    timed, train = Timed(), lora.train
    with patch.object(lora, "train", lambda *arguments: train(*arguments, measure=timed)):
        begun = time.perf_counter()
        found = pruner.recover(planned, METHOD, setting, folder)
        seconds = time.perf_counter() - begun
    return Side(seconds - timed.seconds, found.plan.origin["recovery"]["curve"][-1]["loss"], timed.seconds)


def main() -> None:
    """Take turns, print both sides and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("FLEXI_DATA"), help="folder with text/*.txt")
    data = parser.parse_args().data
    pruner = Pruner(MODEL, dtype="bfloat16" if native_bfloat16() else "float32", device="cpu", data=data)
    planned = pruner.make("flexigpt", "remove-blocks", 0.2)
    setting = Training(length=LENGTH, tokens=TOKENS, held_out=1)
    rows: list[dict[str, Any]] = []
    for round_ in range(ROUNDS + 1):
        sides = {}
        with tempfile.TemporaryDirectory() as folder:
            for side in (ours, plain) if round_ % 2 else (plain, ours):
                sides[side.__name__] = side(pruner, planned, setting, str(Path(folder) / side.__name__))
        rows.append(
            {
                "round": round_,
                "ours tokens/s": TOKENS / sides["ours"].seconds,
                "plain tokens/s": TOKENS / sides["plain"].seconds,
                "ratio": sides["plain"].seconds / sides["ours"].seconds,
                "ours loss": sides["ours"].loss,
                "plain loss": sides["plain"].loss,
                "held-out s": sides["ours"].held_out,
            }
        )
        print(table(rows[-1:]), flush=True)
    counted = rows[1:]  # the first one warms up
    ratio = statistics.median(row["ratio"] for row in counted)
    print(table(rows))
    print(f"ours is {ratio:.3f} times as fast as plain transformers and peft (median of {ROUNDS} rounds)")
    protocol = {"length": LENGTH, "tokens": TOKENS, "tokens_a_step": STEP, "rank": METHOD.rank}
    finish("training", {"ratio": ratio, "model": MODEL, "dtype": pruner.dtype_name, **protocol, "rows": rows})


if __name__ == "__main__":
    main()
