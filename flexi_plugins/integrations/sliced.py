"""Models whose maps another tool has cut: their widths are those of their tensors, whatever the configuration says.

torch-pruning and LLM-Pruner slice the maps of a transformers model in place and leave its configuration as it was, so
that ``save_pretrained`` writes a folder that does not load. Here such a model becomes a checkpoint, which ``Pruner``
takes, and a folder that loads.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig

from flexi_plugins.checkpoint import Checkpoint, FamilyOf
from flexi_plugins.data import BlockShape, Family, ModelShape, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.modeling import BlockSpec, FlexiConfig
from flexi_plugins.plugins import told
from flexi_plugins.rewrite import PLAN_FILE, write_checkpoint


class SlicedModel(Checkpoint):
    """A model in memory whose blocks may differ in width; its parameters are shared, and copied from a GPU when read."""

    def __init__(
        self, name: str, config: PreTrainedConfig, family: Family, tensors: Mapping[str, Tensor], shape: ModelShape
    ) -> None:
        super().__init__(name, config, family, tensors.__getitem__, None)
        self.on_cpu()
        self.shape = shape
        for tensor, expected in self.tensor_names().items():
            found = tuple(tensors[tensor].shape) if tensor in tensors else "nothing"
            if found != expected:
                raise FlexiError(
                    f"model {name!r}: tensor {tensor!r}: expected {expected} to fit the others, found {found}"
                )

    def resident(self) -> SlicedModel:
        """Return itself: it is in memory already."""
        return self


def opened(model: nn.Module, family_of: FamilyOf, name: str = "in memory") -> SlicedModel:
    """Return the checkpoint over a model as it is now.

    model: a Llama-shaped transformers model, whole or with heads, channels, hidden dimensions or last blocks cut away;
    or a FlexiForCausalLM whose blocks do no more than differ in width. Raise a FlexiError that names what does not fit.
    """
    config = cast(Any, model).config
    tensors = model.state_dict()
    if isinstance(config, FlexiConfig):
        base, blocks = config.base_config(), _flexi_blocks(config, name)
        family = family_of(base)
    else:
        family = family_of(config)
        head_dims = [_head_dim(block, family) for block in getattr(model.get_submodule(family.body), family.blocks)]
        base = _configuration(config, family, tensors, head_dims, name)
        kinds = [b.attention_type for b in family.shape(base).blocks]
        blocks = tuple(_block(tensors, family, i, d, k) for i, (d, k) in enumerate(zip(head_dims, kinds, strict=True)))
    return SlicedModel(name, base, family, tensors, replace(family.shape(base), blocks=blocks))


def write(checkpoint: Checkpoint, folder: Path | str, tokenizer: Any = None) -> None:
    """Write a checkpoint as it is: a plain transformers folder where its blocks are alike, else a FlexiForCausalLM.

    No plan lies beside the weights, since what the model was made from is not known.
    """
    with tempfile.TemporaryDirectory(prefix="flexi-tokenizer-") as beside:
        whole = copy.copy(checkpoint)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, beside)
            whole.folder = Path(beside)  # whose files go with the weights
        write_checkpoint(PruningPlan.identity(whole.shape), whole, None, Path(folder))
    (Path(folder) / PLAN_FILE).unlink()


def _save_tokenizer(tokenizer: Any, folder: str) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # one that an older release pickled may fail in any way
        raise FlexiError(
            f"the tokenizer cannot be saved ({told(error)}); give the original model's: AutoTokenizer.from_pretrained, or "
            "--tokenizer NAME"
        ) from None


def _flexi_blocks(config: FlexiConfig, name: str) -> tuple[BlockShape, ...]:
    specs = [BlockSpec.from_json(block) for block in config.blocks or ()]
    gains = (config.embedding_gain, config.final_norm_gain)
    if gains != (1.0, 1.0) or any(spec != BlockSpec(spec.shape) for spec in specs):
        raise FlexiError(
            f"model {name!r}: expected blocks that differ in width alone, found shared weights, gains or new biases; "
            "start from the model that it was made from, with its plan"
        )
    return tuple(spec.shape for spec in specs)


def _head_dim(block: nn.Module, family: Family) -> int:
    return cast(Any, block.get_submodule(family.attention)).head_dim


def _configuration(
    config: Any, family: Family, tensors: Mapping[str, Tensor], head_dims: Sequence[int], name: str
) -> PreTrainedConfig:
    """Return the configuration with what the tensors say of hidden size, head size, number of blocks and dtype.

    It is read attribute by attribute, since a pickle of an older transformers is no whole object in a newer one.
    """
    if len(set(head_dims)) != 1:
        raise FlexiError(
            f"model {name!r}: expected blocks with heads of one size, found sizes {sorted(set(head_dims))}"
        )
    embedding = tensors[f"{family.body}.{family.embedding}.weight"]
    values = {k: v for k, v in vars(config).items() if not k.startswith("_") and k != "torch_dtype"}
    values |= {"num_hidden_layers": len(head_dims), "head_dim": head_dims[0], "dtype": embedding.dtype}
    values |= {"vocab_size": embedding.shape[0], "hidden_size": embedding.shape[1]}
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][: len(head_dims)]
    try:
        return type(config).from_dict(values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise FlexiError(f"model {name!r}: its configuration cannot be used: {reason}") from None


def _block(tensors: Mapping[str, Tensor], family: Family, index: int, head_dim: int, kind: str) -> BlockShape:
    """Return the widths of a block by the rows of its maps."""

    def rows(role: str) -> int:
        return tensors[f"{family.block_prefix(index)}{family.ROLES[role]}.weight"].shape[0]

    queries, keys = rows("query"), rows("key")
    if queries % head_dim or keys % head_dim:
        raise FlexiError(
            f"block {index}: expected whole heads of {head_dim} rows, found {queries} rows of queries and {keys} of keys; "
            "cut heads whole (torch-pruning: prune_num_heads=True, prune_head_dims=False)"
        )
    if not keys or queries % keys:
        raise FlexiError(
            f"block {index}: expected every KV head to have as many query heads, found {queries // head_dim} query heads "
            f"and {keys // head_dim} KV heads; cut a KV head with its query heads"
        )
    return BlockShape(queries // head_dim, keys // head_dim, head_dim, rows("gate"), kind)
