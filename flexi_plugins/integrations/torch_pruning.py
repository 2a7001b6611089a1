"""Any metric as an importance of torch-pruning (``tp.importance.Importance``), for its pruners and LLM-Pruner's scripts.

    importance = FlexiImportance.on_tokens(model, tokens, "come")
    pruner = tp.pruner.BasePruner(model, tokens[:1], importance, pruning_ratio=0.25, **importance.arguments(heads=0.25))
    pruner.step()
    sliced.write(sliced.opened(model, Plugins.load().family), "pruned", tokenizer)

What torch-pruning ranks are channels of maps. A channel of an MLP has its own score; a KV head, with its query heads, has
its score in equal shares on the channels of its map, so that their sum, LLM-Pruner's score of a head, is the head's. The
residual stream and the vocabulary have no units in our metrics: their groups are left alone. Grouped KV heads: the
dependency graph of torch-pruning 1.6.1 does not come to an end on them, so through it their MLPs only are pruned;
LLM-Pruner's own graph takes them with ``k_proj`` as root.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from flexi_plugins.corpora.windows import token_windows
from flexi_plugins.data import Family, ModelShape, Scores
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import ImportanceMetric
from flexi_plugins.integrations.sliced import opened
from flexi_plugins.numerics import standardise
from flexi_plugins.plugins import Plugins
from flexi_plugins.pruner import Calibration, Pruner

MLP = ("gate", "up", "down")
INWARD = ("attention_output", "down")  # maps whose units are columns: they write to the residual stream


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a map that torch-pruning may cut: its rows ("out") or columns ("in"), with a score each.

    what: for messages. scores: (channels,), None where the metric gives none of this kind.
    """

    what: str
    side: Literal["out", "in"]
    scores: Tensor | None

    def of(self, module: nn.Module, indices: Iterable[int]) -> Tensor:
        """Return the scores of some channels, (indices,)."""
        if self.scores is None:
            raise FlexiError(
                f"torch-pruning asks for scores of {self.what}, which the metric does not give; name these maps in "
                "ignored_layers, or take another metric"
            )
        width = module.get_parameter("weight").shape[0 if self.side == "out" else 1]
        if width != len(self.scores):
            raise FlexiError(
                f"torch-pruning asks for scores of {self.what}, of which {len(self.scores)} channels were scored and "
                f"{width} are left; make the importance again from the model as it is, and set it as pruner.importance"
            )
        return self.scores[torch.as_tensor(list(indices), dtype=torch.long)]


class FlexiImportance(tp.importance.Importance):
    """The scores that a metric gave a model, as torch-pruning asks for them: one a channel, for whole groups."""

    def __init__(self, model: nn.Module, family: Family, shape: ModelShape, scores: Scores) -> None:
        self.model, self.family, self.shape = model, family, shape
        self.channels = _channels(model, family, shape, scores)

    @classmethod
    def on_tokens(
        cls,
        model: nn.Module,
        tokens: Tensor,
        metric: str | ImportanceMetric = "come",
        *,
        seed: int = 0,
        dtype: str | None = None,
        plugins: Plugins | None = None,
    ) -> FlexiImportance:
        """Score a Llama-shaped transformers model in memory, whole or sliced before, by a metric.

        tokens: (windows, length) ids to calibrate on; gradients are taken on the first 64 of the first 10 windows, as
        LLM-Pruner does. metric: its name in the catalogue, or an object with its options. seed: of metrics that draw.
        dtype: what is computed in, by default the model's.
        """
        plugins = plugins or Plugins.load()
        chosen = plugins.get("metric", metric) if isinstance(metric, str) else metric
        if not chosen.gives & {"attention", "mlp"}:
            given = ", ".join(sorted(chosen.gives)) or "no"
            raise FlexiError(f"metric {chosen.name!r}: torch-pruning ranks heads and channels, it gives {given} scores")
        checkpoint = opened(model, plugins.family)
        ids = _checked(tokens, checkpoint.shape)
        weight = next(model.parameters())
        dtype = dtype or str(weight.dtype).removeprefix("torch.")
        pruner = Pruner(checkpoint, dtype=dtype, device=str(weight.device), seed=seed, plugins=plugins)
        usual = Calibration()
        samples = ids[: usual.gradient_samples, : usual.gradient_length]
        pruner.texts = ids, samples, ""  # given, in the place of those that it would draw from a corpus
        return cls(model, checkpoint.family, checkpoint.shape, pruner.score(chosen))

    @classmethod
    def on_texts(
        cls,
        model: nn.Module,
        tokenizer: Any,
        texts: Iterable[str],
        metric: str | ImportanceMetric = "come",
        *,
        windows: int = 16,
        length: int = 256,
        seed: int = 0,
        **options: Any,
    ) -> FlexiImportance:
        """Score a model on windows of tokens drawn from texts, which are joined and tokenised; options as above."""
        ids, _ = token_windows(_Texts(tuple(texts)), "calibration", None, tokenizer, length, windows, seed)
        return cls.on_tokens(model, torch.tensor(ids), metric, seed=seed, **options)

    def __call__(self, group: Any, ch_groups: int = 1, consecutive_groups: int = 1) -> Tensor | None:
        """Return the scores of a group's channels, those of its root in the root's order; None: leave the group alone.

        LLM-Pruner's pruner also says how it will sum channels to units, which changes nothing here.
        """
        dependency, indices = group[0]
        channels = self.channels.get(dependency.target.module)
        if channels is None or dependency.handler.__name__ != f"prune_{channels.side}_channels":
            return None
        return channels.of(dependency.target.module, indices)

    def arguments(self, heads: float = 0.0) -> dict[str, Any]:
        """Return what ``tp.pruner.BasePruner`` has to be told of this model, beside its ``pruning_ratio``.

        MLPs are pruned, and ``heads`` is the share of heads to go (of all blocks together where global_pruning is set);
        torch-pruning prunes heads only where its pruning_ratio is above 0. The dictionaries are given as they must be:
        its own defaults are shared between pruners. Raise a FlexiError for heads where KV heads are grouped.
        """
        if heads and any(block.group > 1 for block in self.shape.blocks):
            raise FlexiError(
                "torch-pruning: its dependency graph does not come to an end where several query heads share a KV head; "
                "prune the MLPs through it (heads=0), and heads with the strategy remove-units of flexi prune"
            )
        if not any(p.requires_grad for p in self.model.parameters()):
            raise FlexiError("torch-pruning follows gradients: call model.requires_grad_(True) first")
        placed = [(self._map(i, r), r, b) for i, b in enumerate(self.shape.blocks) for r in self.shape.maps(b)]
        outward = [m for m, role, _ in placed if role in INWARD] + [self.model.get_submodule(self.family.head)]
        counts = {m: block.query_heads for m, role, block in placed if role not in (*MLP, *INWARD)}
        return {
            "ignored_layers": outward if heads else [*outward, *counts],
            "num_heads": counts if heads else {},
            "prune_num_heads": heads > 0,
            "prune_head_dims": False,
            "head_pruning_ratio": heads,
            "in_channel_groups": {},
            "out_channel_groups": {},
            "forward_fn": _logits,
        }

    def _map(self, index: int, role: str) -> nn.Module:
        return self.model.get_submodule(self.family.block_prefix(index) + self.family.ROLES[role])


def _channels(model: nn.Module, family: Family, shape: ModelShape, scores: Scores) -> dict[nn.Module, Channels]:
    """Return the channels of every map of the blocks, with their shares of their unit's score.

    Where the scores are not comparable between blocks they are standardised within (block, kind), the rule that ranks
    them elsewhere, so that a global ranking of torch-pruning's means something.
    """
    found = {}
    for index, block in enumerate(shape.blocks):
        for role, (rows, columns) in shape.maps(block).items():
            kind = "mlp" if role in MLP else "attention"
            side: Literal["out", "in"] = "in" if role in INWARD else "out"
            given = getattr(scores, kind)
            values = None if given is None else _comparable(scores, given[index])
            share = (columns if side == "in" else rows) // (block.kv_heads if kind == "attention" else block.channels)
            what = f"the {role} map of block {index}"
            spread = None if values is None else (values / share).repeat_interleave(share)
            found[model.get_submodule(family.block_prefix(index) + family.ROLES[role])] = Channels(what, side, spread)
    return found


def _comparable(scores: Scores, values: Tensor) -> Tensor:
    rule = scores.rule
    if rule == "auto":
        rule = "undivided" if scores.comparable else "standardised"
    return standardise(values) if rule.startswith("standardised") else values


def _checked(tokens: Tensor, shape: ModelShape) -> Tensor:
    """Return calibration ids on the CPU; raise for what are none."""
    integral = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if tokens.dim() != 2 or not integral or tokens.shape[1] < 2 or not len(tokens):
        raise FlexiError(
            "calibration tokens: expected ids (windows, length), two or more a window, found "
            f"{tuple(tokens.shape)} of {tokens.dtype}"
        )
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= shape.vocabulary:
        raise FlexiError(
            f"calibration tokens: expected ids in 0..{shape.vocabulary - 1}, found {lowest}..{highest}; "
            "take the model's own tokenizer"
        )
    return tokens.detach().cpu().long()


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


@dataclass(frozen=True)
class _Texts:
    """Texts that were handed over, as a corpus."""

    given: tuple[str, ...]

    name: ClassVar[str] = "texts"
    licence: ClassVar[str] = ""
    provenance: ClassVar[str] = "handed over"
    join: ClassVar[str] = "\n\n"

    def texts(self, split: str, data: Path | None) -> Iterable[str]:
        """Yield them all, whatever the split."""
        return self.given
