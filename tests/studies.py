"""A tiny random model with a tokenizer in a folder, and small studies on it: what the harness is tested with."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexi_plugins import hookimpl
from flexi_plugins.data import Record
from flexi_plugins.plugins import Plugins
from flexi_plugins.study import Study
from flexi_plugins.studyfile import read_study

METRICS = ("flexigpt", "saap", "come")
STRATEGIES = ("share-lora", "concat-merge", "remove-blocks", "remove-units")

STUDY = """
name = "tiny"
model = "{model}"
metrics = {metrics}
strategies = {strategies}
ratios = {ratios}
dtype = "float32"
{more}

[calibration]
corpus = "file:{text}"
windows = 4
length = 64
gradient_samples = 3
gradient_length = 16

[[evaluation]]
evaluator = "perplexity"
corpus = "file:{text}"
window = 128
tokens = {tokens}
"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>")


def make_model(folder: Path, seed: int = 0) -> Path:
    """Write a Llama of six blocks with grouped-query attention and tied embeddings; return the folder."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_text(path: Path, words: int = 4000, seed: int = 0) -> Path:
    """Write made-up sentences of some 6 bytes a word; return the file."""
    rng = random.Random(seed)
    letters = "etaoinshrdlu"
    known = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(200)]
    sentences = [" ".join(rng.choices(known, k=8)).capitalize() + "." for _ in range(words // 8)]
    path.write_text("\n".join(sentences))
    return path


def quoted(names: Iterable[Any]) -> str:
    """Return a TOML list of strings and inline tables."""
    return "[" + ", ".join(n if n.startswith("{") else f'"{n}"' for n in names) + "]"


def make_study(
    path: Path,
    model: Path,
    text: Path,
    metrics: Iterable[str] = ("come",),
    strategies: Iterable[str] = ("remove-blocks",),
    ratios: str = "[0.2]",
    more: str = "",
    end: str = "",
    tokens: int = 512,
) -> Path:
    """Write a study file; ``more`` are further keys at its head, ``end`` further tables."""
    values = {"metrics": quoted(metrics), "strategies": quoted(strategies), "ratios": ratios, "more": more}
    path.write_text(STUDY.format(model=model, text=text, tokens=tokens, **values) + end)
    return path


def plugins_with(version: str = "1", **hooks: list[Any]) -> Plugins:
    """Return the built-in plugins and those of a third party."""
    module = ModuleType("third")
    for name, objects in hooks.items():

        def hook(objects: list[Any] = objects) -> list[Any]:
            return objects

        setattr(module, name, hookimpl(hook))
    plugins = Plugins.load()
    plugins.add(module, "third", ("third-party", version))
    return plugins


def run_study(path: Path, folder: Path, plugins: Plugins | None = None, data: Path | None = None) -> list[Record]:
    """Run a study file, with the built-in plugins or these; return its records."""
    plugins = plugins or Plugins.load()
    return Study(read_study(path, plugins), folder, data, plugins).run()


def values(records: Iterable[Record]) -> dict[str, dict[str, float]]:
    """Return label -> measurement -> value."""
    return {r.cell.label: {m.name: m.value for m in r.measurements} for r in records}
