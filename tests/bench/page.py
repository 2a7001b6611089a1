"""Writes results/bench/README.md from the figures of the benches: what was measured, on what, with which command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import distill_7b
import seven_b
from common import RESULTS, table

from flexi_plugins.files import write_text

Figures = Mapping[str, Any]


def grid(found: Figures) -> str:
    """Return the comparison with stock lm-eval."""
    sizes = [found[name] for name in ("grid_12", "grid_36") if name in found]
    rows = [
        {
            "models": f["models"],
            "stock lm-eval, s": f["stock_seconds"],
            "one sweep, s": max(f["sweep_seconds"]),
            "times less": f["ratio"],
            "to reach": f["target"],
            "changed answers (acc)": f["changed_answers"]["acc"],
        }
        for f in sizes
    ]
    parts = "\n\n".join(f"{f['models']} models, by part:\n\n{table(f['parts'])}" for f in sizes)
    return f"{table(rows)}\n\n{parts}"


def scoring(found: Figures) -> str:
    """Return what all metrics together cost."""
    rows = [
        {
            "protocol": name,
            "tokens forward + backward": f"{f['forward_tokens']} + {f['backward_tokens']}",
            **{f"{label}, s": seconds for label, seconds in f["seconds"].items()},
            "together / slowest": f["ratio"],
        }
        for name, f in (("same tokens", found), ("default", found["default_protocol"]))
    ]
    return f"{table(rows)}\n\nTo reach on the same tokens: {found['target']}."


def large(found: Figures) -> str:
    """Return the passes over a LLaMA-7B of random weights."""
    rows = [seven_b.row(name, values) for name, values in found["passes"].items()]
    missed = "\n".join(f"- missed: {text}" for text in found["missed"]) or "All targets are met."
    return f"{table(rows)}\n\n{seven_b.EXPLANATION}\n\n{missed}"


def speculation(found: Figures) -> str:
    """Return what self-speculative decoding gains."""
    return (
        f"{table(found['rows'])}\n\nGreedy decoding in {found['dtype']} of {found['new_tokens']} tokens behind "
        f"{found['prompts']} prompts of {found['prompt_tokens']}."
    )


def training(found: Figures) -> str:
    """Return the lora recovery beside transformers and peft alone."""
    rows = [row for row in found["rows"] if row["round"]]
    return (
        f"{table(rows)}\n\nMedian ratio: {found['ratio']:.3f}, to reach 1. {found['tokens']} tokens in windows of "
        f"{found['length']}, {found['tokens_a_step']} a step, rank {found['rank']}, {found['dtype']}. The loss of ours is the "
        "mean over the training, as transformers' is."
    )


def rounding(found: Figures) -> str:
    """Return what of a training arrives in bfloat16."""
    return (
        f"{table(found['rows'])}\n\nLoss in nats a token on {found['measured_tokens']} tokens of {found['corpus']}'s test text, "
        f"of {found['model']} with 20 % removed and trained on {found['tokens']} tokens of its validation text. At random: "
        "up or down, each as likely as it is near, the mean of three seeds; so models that are stored in less than float32 "
        "get what was trained."
    )


def bfloat16(found: Figures) -> str:
    """Return what bfloat16 costs on this processor."""
    return (
        f"{table(found['rows'])}\n\nA sweep of {found['model']} over {found['tokens']} tokens, the head on each; median of "
        f"{found['rounds']} rounds, ratios round by round. Where a processor multiplies bfloat16 itself, the engine takes "
        "torch's products, else wide ones."
    )


def search(found: Figures) -> str:
    """Return what a search gains by keeping the states of its candidates."""
    return (
        f"{table(found['rows'])}\n\n{found['steps']} steps of greedy importance on {found['model']}, {found['tokens']} tokens; "
        f"kept states take {found['share of the seconds']:.2f} of the seconds ({found['lowest']:.2f} to "
        f"{found['highest']:.2f} in {found['rounds']} rounds), and both ways find the same plan."
    )


def distillation(found: Figures) -> str:
    """Return what it takes to distil one merged block of a LLaMA-7B of random weights."""
    peak, most = found["peak_gib"], found["most_gib"]
    verdict = "met" if peak <= most else "missed"
    return (
        f"{table([distill_7b.row(found)])}\n\n{distill_7b.EXPLANATION}\n\nTo reach: {most:g} GiB resident; {verdict}."
    )


SECTIONS: dict[str, tuple[str, str, Callable[[Figures], str]]] = {
    "grid": ("A grid in one sweep, against stock lm-eval once a model", "bench-grid", grid),
    "scoring": ("All metrics together, against the slowest alone", "bench-scoring", scoring),
    "seven_b": ("LLaMA-7B's shapes with random weights, in 4 GiB", "bench-7b", large),
    "scaling": (
        "The cost of a sweep, against its plans and blocks",
        "bench-scaling",
        lambda found: "See [scaling.md](scaling.md).\n\n![Sweep time](scaling.svg)",
    ),
    "speculation": ("Self-speculative decoding of a FlexiGPT model", "bench-speculation", speculation),
    "training": ("The lora recovery, beside transformers and peft alone", "bench-training", training),
    "rounding": ("What of a training arrives in bfloat16", "bench-rounding", rounding),
    "bfloat16": ("bfloat16 with and without products of it", "bench-bfloat16", bfloat16),
    "search": ("A search that takes its candidates up where they changed", "bench-search", search),
    "distill_7b": ("One merged block of LLaMA-7B's shapes, distilled", "bench-distill-7b", distillation),
    "verify-engine": (
        "The same answers as stock lm-eval",
        "verify-engine",
        lambda found: "See [verify-engine.md](verify-engine.md).",
    ),
}


def where(found: Figures) -> str:
    """Say when, on what and with what a bench ran."""
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "lm_eval"))
    bfloat16 = "native" if found["native_bfloat16"] else "no native"
    return (
        f"{found['date'][:10]}, {found['machine']}, {found['threads']} threads, {found['instruction_set']}, {bfloat16} "
        f"bfloat16; {versions}; commit {found['commit'][:10]}{' with changes' if found['uncommitted_changes'] else ''}."
    )


def main() -> None:
    """Write the page from every bench that has figures."""
    parts = ["# What was measured\n\nGenerated by `make bench-page` from the JSON files beside it."]
    for name, (title, target, text) in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            parts.append(f"## {title}\n\n`make {target}`: {where(found)}\n\n{text(found)}")
    write_text(RESULTS / "README.md", "\n\n".join(parts) + "\n")
    print(RESULTS.name, "README.md written")


if __name__ == "__main__":
    main()
