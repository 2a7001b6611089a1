"""Configurations of published models, for arithmetic without weights and without a network."""

from typing import Any

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
    "smollm2-135m": {
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
