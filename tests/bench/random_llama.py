"""A random checkpoint of LLaMA-7B's exact shapes, every block with weights of its own, for what needs size and no sense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flexi_plugins.checkpoint import Checkpoint, new_folder, write_tensors
from flexi_plugins.families.llama import FAMILIES
from flexi_plugins.models import known_config

MODEL = "huggyllama/llama-7b"
SHARD_BYTES = 2 * 10**9
DEVIATION = 0.02


def random_llama(folder: Path, blocks: int = 32, seed: int = 0) -> Checkpoint:
    """Write the checkpoint in bfloat16 (13.5 GB with 32 blocks) as config.json, shards and index, or open what is there.

    Matrices are normal with standard deviation 0.02, norms are one. The folder appears when it is whole.
    """
    if not folder.exists():
        config = known_config(MODEL)
        config.num_hidden_layers = blocks
        config.dtype = torch.bfloat16
        config.architectures = ["LlamaForCausalLM"]
        shapes = Checkpoint(MODEL, config, FAMILIES["llama"], _unread, None).tensor_names()
        with new_folder(folder) as temporary:
            write_tensors(temporary, _tensors(shapes, seed), SHARD_BYTES)
            config.save_pretrained(temporary)
    return Checkpoint.from_folder(folder, lambda config: FAMILIES["llama"])


def _tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        tensor = torch.ones(shape, dtype=torch.bfloat16)
        yield name, tensor.normal_(0, DEVIATION, generator=generator) if len(shape) > 1 else tensor


def _unread(name: str) -> Tensor:
    raise AssertionError(f"{name} is not written yet")
