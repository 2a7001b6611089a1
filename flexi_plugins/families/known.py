"""Names of models, and configurations of published ones for arithmetic without weights and without a network."""

import re
from pathlib import Path
from typing import Any

from flexi_plugins.errors import FlexiError, unknown

DEFAULT = "smollm2-135m"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")

LLAMA_7B = {"model_type": "llama", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
LLAMA_2_7B = {**LLAMA_7B, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}

KNOWN: dict[str, dict[str, Any]] = {
    "huggyllama/llama-7b": LLAMA_7B,
    "lmsys/vicuna-7b-v1.3": LLAMA_7B,
    "meta-llama/Llama-2-7b-hf": LLAMA_2_7B,
    "meta-llama/Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
    },
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
    },
    DEFAULT: {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


def check_name(name: str) -> None:
    """Raise for a name that can be no model: no such folder, and not of the form OWNER/NAME[@REVISION]."""
    if name != DEFAULT and not Path(name).is_dir() and not HUB_NAME.fullmatch(name):
        raise FlexiError(f"{unknown('model', name, KNOWN)}, any folder with a checkpoint, and hub names OWNER/NAME")
