"""The Llama-shaped architectures of transformers: Llama (Vicuna, SmolLM), Mistral, Qwen2, Qwen3."""

from typing import Any

from flexi_plugins.data import Family
from flexi_plugins.hookspecs import hookimpl

FAMILIES = {
    "llama": Family("llama", qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family("mistral"),
    "qwen2": Family("qwen2", qkv_bias=True),
    "qwen3": Family("qwen3", head_norms=("q_norm", "k_norm"), qkv_bias="attention_bias", output_bias="attention_bias"),
}


@hookimpl
def model_family(config: Any) -> Family | None:
    """Return the family of a Llama, Mistral, Qwen2 or Qwen3 configuration."""
    return FAMILIES.get(config.model_type)
