"""Tiny random models of every known architecture: small enough for a test, alive enough to tell methods apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.data import PruningPlan
from flexi_plugins.errors import FlexiError, unknown
from flexi_plugins.families.llama import model_family
from flexi_plugins.rewrite import write_checkpoint

VOCABULARY = 256  # a token a byte
LOUDNESS = 0.6  # of the maps that write to the residual stream, half to twice that: every block matters, some more

COMMON = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 6,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama-gqa-tied": {  # as SmolLM2: three query heads a KV head
        "model_type": "llama",
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama": {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4},
    "llama-bias": {
        "model_type": "llama",
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {  # shorter than a calibration window, so that the window of the attention shows
        "model_type": "mistral",
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "sliding_window": 8,
    },
    "qwen2": {"model_type": "qwen2", "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2},
    "qwen2-mixed": {  # blocks that differ in their attention cannot share weights or be merged
        "model_type": "qwen2",
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": [*["full_attention"] * 2, *["sliding_attention"] * 2, *["full_attention"] * 2],
    },
    "qwen3": {  # heads that together are wider than the residual stream
        "model_type": "qwen3",
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "indivisible": {  # as LLaMA-7B: 7, 6 or 5 of its 8 heads do not divide the hidden size, which Llama's config refuses
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
}


def tiny_config(kind: str = "llama-gqa-tied", **changes: Any) -> PreTrainedConfig:
    """Return the configuration of a tiny model of this kind (see ``KINDS``), with changes."""
    if kind not in KINDS:
        raise FlexiError(unknown("tiny model", kind, KINDS))
    values = {**COMMON, **KINDS[kind], **changes}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    """Return a float32 model with random weights; norms and biases are not at their trivial values either."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    loudness = LOUDNESS * 2 ** (2 * torch.rand(config.num_hidden_layers, generator=generator) - 1)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = _scaled(name, noise, loudness)
    return model.eval().requires_grad_(False)


def _scaled(name: str, noise: Tensor, loudness: Tensor) -> Tensor:
    if name.endswith("bias"):
        return 0.2 * noise
    if noise.dim() == 1:
        return 1 + 0.2 * noise
    if "embed" in name:
        return 0.5 * noise
    scaled = noise / math.sqrt(noise.shape[1])
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return scaled * loudness[int(name.split(".layers.")[1].split(".")[0])]
    return scaled


def tiny_checkpoint(kind: str = "llama-gqa-tied", seed: int = 0, **changes: Any) -> Checkpoint:
    """Return a tiny model in memory as a checkpoint."""
    return Checkpoint.from_model(tiny_model(tiny_config(kind, **changes), seed), known_family, f"tiny {kind}")


def known_family(config: Any) -> Any:
    """Return the built-in family of a configuration."""
    return model_family(config)


def tiny_tokens(rows: int = 8, length: int = 24, seed: int = 0) -> Tensor:
    """Return random token ids, (rows, length), for calibration."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer() -> Any:
    """Return a tokenizer with one token a byte, and an end of text in the place of a byte that UTF-8 never uses."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"\xff"})
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def write_tiny_folder(folder: Path | str, kind: str = "llama-gqa-tied", seed: int = 0, **changes: Any) -> Path:
    """Write a tiny model with its tokenizer as a checkpoint folder, for whatever takes a model's name; return it."""
    checkpoint = tiny_checkpoint(kind, seed, **changes)
    write_checkpoint(PruningPlan.identity(checkpoint.shape), checkpoint, None, Path(folder))
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
