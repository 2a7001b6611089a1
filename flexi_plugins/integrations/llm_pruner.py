"""Turns what LLM-Pruner saves (arXiv 2305.11627, ``--save_model``) into a folder that loads.

    python -m flexi_plugins.integrations.llm_pruner pytorch_model.bin pruned --allow-pickle

It follows LLM-Pruner's code as we read it, and was not driven with LLM-Pruner's own scripts. From that code:
``torch.save({"model": module, "tokenizer": tokenizer})``, the module whole, its maps sliced and its configuration as
before. That is a pickle, and opening one runs whatever code its maker put into it: it is refused unless asked for in so
many words. The model itself is not run: its tensors are read, and what LLM-Pruner prunes (heads, channels, hidden
dimensions, last layers) is told from their shapes. So classes of LLM-Pruner's, and of transformers' that later releases
have no more, are stood in for by plain modules; what else the pickle names has to be importable.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.errors import FlexiError
from flexi_plugins.integrations.sliced import opened, write
from flexi_plugins.plugins import Plugins, told


def read(file: Path | str, *, allow_pickle: bool = False) -> tuple[Checkpoint, Any]:
    """Return the model of a file that LLM-Pruner saved, as a checkpoint in memory, and its tokenizer (None without one).

    Raise a FlexiError unless ``allow_pickle``; a file that is not LLM-Pruner's is named.
    """
    file = Path(file)
    if not file.is_file():
        raise FlexiError(f"LLM-Pruner's checkpoint: there is no file {str(file)!r}")
    if not allow_pickle:
        raise FlexiError(
            f"LLM-Pruner's checkpoint {str(file)!r} is a pickle: opening it runs whatever code its maker put into it. If "
            "you trust where it comes from, say allow_pickle=True (--allow-pickle); the folder made of it is none"
        )
    saved = _unpickled(file)
    model = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(model, nn.Module):
        found = f"a mapping of {', '.join(map(str, saved))}" if isinstance(saved, dict) else type(saved).__name__
        raise FlexiError(f"{file}: expected LLM-Pruner's model and tokenizer, found {found}")
    return opened(model, Plugins.load().family, str(file)), saved.get("tokenizer")


def convert(
    file: Path | str, folder: Path | str, *, allow_pickle: bool = False, tokenizer: str | None = None
) -> Checkpoint:
    """Write the model of a file that LLM-Pruner saved as a checkpoint folder; return what was written.

    It is a plain transformers folder where all blocks have one width, else a FlexiForCausalLM. tokenizer: a folder or
    hub name to take the tokenizer from, where the saved one does not survive a newer transformers.
    """
    if Path(folder).exists():
        raise FlexiError(f"output {str(folder)!r} exists already; name another folder or remove it")
    checkpoint, saved = read(file, allow_pickle=allow_pickle)
    if tokenizer is not None:
        saved = _tokenizer(tokenizer)
    write(checkpoint, folder, saved)
    return checkpoint


STOOD_IN_FOR = ("LLMPruner.", "transformers.models.")


class _Unpickler(pickle.Unpickler):
    """Takes a plain module for a class of a model that is not here."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            if module.startswith(STOOD_IN_FOR):
                return type(name, (nn.Module,), {"__module__": module})
            raise


def _unpickled(file: Path) -> Any:
    opener = SimpleNamespace(__name__="pickle", Unpickler=_Unpickler, load=pickle.load)
    try:
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=opener)
    except (ImportError, AttributeError) as error:
        raise FlexiError(
            f"{file}: the code of its classes is not here ({told(error)}); put the folder that has it on PYTHONPATH"
        ) from None
    except Exception as error:  # a pickle may fail in any way
        raise FlexiError(f"{file}: it cannot be read: {told(error)}; is it whole, and LLM-Pruner's?") from None


def _tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FlexiError(f"tokenizer {name!r}: {told(error)}; name a folder or a model of the hub") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert a file on the command line; an error is one message and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m flexi_plugins.integrations.llm_pruner",
        description="Turn a checkpoint that LLM-Pruner saved into a folder that loads.",
    )
    parser.add_argument("file", type=Path, help="What LLM-Pruner saved: pytorch_model.bin.")
    parser.add_argument("folder", type=Path, help="Checkpoint folder to write.")
    parser.add_argument("--allow-pickle", action="store_true", help="Open the file, which runs the code in it.")
    parser.add_argument("--tokenizer", help="Folder or hub name to take the tokenizer from, instead of the saved one.")
    given = parser.parse_args(arguments)
    try:
        made = convert(given.file, given.folder, allow_pickle=given.allow_pickle, tokenizer=given.tokenizer)
    except FlexiError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{made.shape.parameters:,} parameters in {len(made.shape.blocks)} blocks, written to {given.folder}")


if __name__ == "__main__":
    main()
