"""The values that flow through flexi_plugins, all frozen, in the order in which they are made."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flexi_plugins.errors import FlexiError

if TYPE_CHECKING:
    from torch import Tensor


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# --------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class BlockShape:
    """Widths of one block. No KV heads, or no channels: that sub-layer and its norm are absent."""

    query_heads: int
    kv_heads: int
    head_dim: int
    channels: int
    attention_type: str = "full_attention"

    @property
    def group(self) -> int:
        """Query heads per KV head; query head h belongs to KV head h // group."""
        return self.query_heads // self.kv_heads if self.kv_heads else 0


@dataclass(frozen=True)
class ModelShape:
    """Everything that parameter arithmetic needs to know of a model; no weights.

    ``qkv_bias``, ``output_bias`` and ``mlp_bias`` say which linear maps carry a bias; ``head_norms`` is the number of
    per-head norm vectors of length head_dim (2 for Qwen3's q_norm and k_norm).
    """

    blocks: tuple[BlockShape, ...]
    hidden: int
    vocabulary: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: int = 0

    def maps(self, block: BlockShape) -> dict[str, tuple[int, int]]:
        """Return the linear maps of a block: role -> (rows, columns) of the weight."""
        queries, keys = block.query_heads * block.head_dim, block.kv_heads * block.head_dim
        maps: dict[str, tuple[int, int]] = {}
        if block.kv_heads:
            maps |= {
                "query": (queries, self.hidden),
                "key": (keys, self.hidden),
                "value": (keys, self.hidden),
                "attention_output": (self.hidden, queries),
            }
        if block.channels:
            maps |= {
                "gate": (block.channels, self.hidden),
                "up": (block.channels, self.hidden),
                "down": (self.hidden, block.channels),
            }
        return maps

    def vectors(self, block: BlockShape) -> dict[str, int]:
        """Return what a block has beside its linear maps, norms and biases: name -> length."""
        vectors: dict[str, int] = {}
        if block.kv_heads:
            vectors["attention_norm"] = self.hidden
            vectors |= {f"head_norm_{i}": block.head_dim for i in range(self.head_norms)}
        if block.channels:
            vectors["mlp_norm"] = self.hidden
        for role, (rows, _) in self.maps(block).items():
            if self.has_bias(role):
                vectors[f"{role}.bias"] = rows
        return vectors

    def has_bias(self, role: str) -> bool:
        """Whether the linear map of this role carries a bias."""
        if role in ("query", "key", "value"):
            return self.qkv_bias
        return self.output_bias if role == "attention_output" else self.mlp_bias

    def block_parameters(self, block: BlockShape) -> int:
        """Parameters of one whole block: linear maps, biases, norms."""
        return sum(r * c for r, c in self.maps(block).values()) + sum(self.vectors(block).values())

    def head_cost(self, block: BlockShape) -> int:
        """Parameters that go with one KV head and its query heads."""
        one = replace(block, query_heads=block.group, kv_heads=1, channels=0)
        rows = sum(r * c for r, c in self.maps(one).values())
        return rows + (self.qkv_bias and (2 + block.group) * block.head_dim)

    def channel_cost(self) -> int:
        """Parameters that go with one intermediate channel of an MLP."""
        return 3 * self.hidden + 2 * self.mlp_bias

    @property
    def outer_parameters(self) -> int:
        """Parameters outside the blocks: embedding, head unless tied, final norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.outer_parameters + sum(self.block_parameters(b) for b in self.blocks)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelShape:
        """Read what ``dataclasses.asdict`` wrote."""
        blocks = tuple(BlockShape(**b) for b in value["blocks"])
        return cls(**{**value, "blocks": blocks})


@dataclass(frozen=True)
class Family:
    """Where the parts of a Llama-shaped architecture live: attribute paths and configuration keys, as data."""

    name: str
    body: str = "model"
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    head_norms: tuple[str, ...] = ()
    qkv_bias: str | bool = False  # a configuration key, or the answer itself
    output_bias: str | bool = False
    mlp_bias: str | bool = False

    ROLES: ClassVar[Mapping[str, str]] = {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "attention_output": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }

    def block_prefix(self, index: int) -> str:
        """Return the state-dict prefix of a block, with its final dot."""
        return f"{self.body}.{self.blocks}.{index}."

    def vector(self, name: str) -> str:
        """Return the state-dict name, inside a block, of a norm or bias named as in ``ModelShape.vectors``."""
        if name.endswith(".bias"):
            return self.ROLES[name.removesuffix(".bias")] + ".bias"
        if name.startswith("head_norm_"):
            return f"{self.attention}.{self.head_norms[int(name.removeprefix('head_norm_'))]}.weight"
        return (self.attention_norm if name == "attention_norm" else self.mlp_norm) + ".weight"

    def shape(self, config: Any) -> ModelShape:
        """Read the shape of a model from its transformers configuration."""

        def flag(key: str | bool) -> bool:
            return bool(getattr(config, key)) if isinstance(key, str) else key

        heads = config.num_attention_heads
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
            types = ["sliding_attention"] * config.num_hidden_layers
        return ModelShape(
            blocks=tuple(
                BlockShape(
                    query_heads=heads,
                    kv_heads=getattr(config, "num_key_value_heads", None) or heads,
                    head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
                    channels=config.intermediate_size,
                    attention_type=kind,
                )
                for kind in types[: config.num_hidden_layers]
            ),
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=flag(self.qkv_bias),
            output_bias=flag(self.output_bias),
            mlp_bias=flag(self.mlp_bias),
            head_norms=len(self.head_norms),
        )


# ------------------------------------------------------------------------------ statistics and scores


@dataclass(frozen=True, eq=False)
class Statistics:
    """What calibration measured: statistic name -> quantity -> one float32 tensor per block."""

    values: Mapping[str, Mapping[str, tuple[Tensor, ...]]]

    def __getitem__(self, name: str) -> Mapping[str, tuple[Tensor, ...]]:
        if name not in self.values:
            raise FlexiError(
                f"statistic {name!r} was not collected: declare it in `needs` (collected: {', '.join(self.values) or 'none'})"
            )
        return self.values[name]


Rule = Literal["auto", "divided", "undivided", "standardised", "standardised-divided"]


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance of the parts of a model, float32 on the CPU. Higher means keep.

    block: (blocks,). attention: per block (KV heads,). mlp: per block (channels,). With ``comparable`` the unit scores
    are non-negative estimates of the total harm of losing the unit, in one scale for heads, channels and all blocks.
    rule: how the method itself ranks units of all blocks (see ``budget.priorities``), where it says so.
    """

    block: Tensor | None = None
    attention: tuple[Tensor, ...] | None = None
    mlp: tuple[Tensor, ...] | None = None
    comparable: bool = False
    rule: Rule = "auto"

    def check(self, who: str, shape: ModelShape) -> Scores:
        """Return self if the scores fit the shape, are finite float32 and keep the promise of ``comparable``."""
        if self.block is not None:
            _check_scores(who, "block", -1, self.block, len(shape.blocks), False)
        for kind, values in (("attention", self.attention), ("mlp", self.mlp)):
            if values is None:
                continue
            if len(values) != len(shape.blocks):
                raise FlexiError(f"{who}: {kind} scores for {len(values)} blocks, the model has {len(shape.blocks)}")
            for index, (value, block) in enumerate(zip(values, shape.blocks, strict=True)):
                width = block.kv_heads if kind == "attention" else block.channels
                _check_scores(who, kind, index, value, width, self.comparable)
        return self


def _check_scores(who: str, kind: str, index: int, value: Tensor, width: int, non_negative: bool) -> None:
    where = f"{who}: {kind} scores" + (f" of block {index}" if index >= 0 else "")
    if tuple(value.shape) != (width,):
        raise FlexiError(f"{where}: expected shape ({width},), found {tuple(value.shape)}")
    if str(value.dtype) != "torch.float32" or value.device.type != "cpu":
        raise FlexiError(f"{where}: expected float32 on the CPU, found {value.dtype} on {value.device}")
    if not bool(value.isfinite().all()):
        raise FlexiError(f"{where}: not finite (NaN or infinity); check the calibration text and the compute dtype")
    if non_negative and width and float(value.min()) < 0:
        raise FlexiError(f"{where}: comparable scores must not be negative, found {float(value.min()):.3g}")


# ----------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Part:
    """Units taken from one old block: ascending indices of KV heads (with their query heads) and channels; None = all.

    query_heads: the query heads that go with the KV heads, where they are not those that belong to them.
    """

    source: int
    kv_heads: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    query_heads: tuple[int, ...] | None = None


Weighted = tuple[tuple[int, float], ...]  # ((source block, coefficient), ...)


@dataclass(frozen=True)
class BlockRecipe:
    """What one block of the new model is made of.

    parts: taken in order and concatenated; or mix: weighted sum of whole blocks, all biases included. norms: the weights
    of norms, q/k norms and output biases (default: the first part's block, or the mix); biases: of q/k norms and output
    biases, where they are other ones. shares: source of a whole, unshared block of the
    same plan with whose linear maps this one runs; it keeps the norms and biases of its part, has adapters of ``rank``,
    and with ``output_norm`` normalises both sub-layers' outputs. gain: factor on the residual that enters it. own: tensors
    that are new, attached to the plan instead of read (a compensating bias, a merged or trained map): ``ROLE.weight``,
    ``ROLE.bias``, or the name of a norm (see ``ModelShape.vectors``).
    """

    parts: tuple[Part, ...] = ()
    mix: Weighted = ()
    norms: Weighted = ()
    biases: Weighted = ()
    shares: int | None = None
    rank: int = 0
    output_norm: bool = False
    gain: float = 1.0
    own: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[int, ...]:
        """Old blocks this one reads its units from, in order."""
        return tuple(p.source for p in self.parts) or tuple(s for s, _ in self.mix)

    @property
    def norm_weights(self) -> Weighted:
        """Coefficients of norms, with the default written out."""
        return self.norms or self.mix or ((self.parts[0].source, 1.0),)

    @property
    def bias_weights(self) -> Weighted:
        """Coefficients of q/k norms and output biases, with the default written out."""
        return self.biases or self.norm_weights

    @property
    def whole(self) -> int | None:
        """The old block that this one is, unchanged; None if it is anything else."""
        untouched = self.norm_weights == self.bias_weights == ((self.sources[0], 1.0),)
        untouched = untouched and self.gain == 1.0 and not self.own
        if self.shares is not None or self.mix or len(self.parts) != 1 or not untouched:
            return None
        return self.parts[0].source if self.parts[0] == Part(self.parts[0].source) else None


OUTER = ("embedding", "final_norm", "head")  # the tensors outside the blocks; a tied head is the embedding


@dataclass(frozen=True)
class PruningPlan:
    """A pruned model as data: which old parts each new block is made of. JSON in and out, hashable, valid once made.

    tensors: names of attached tensors (``blocks.POSITION.ROLE.lora_a`` and so on) with the digest of their content. own:
    which of OUTER are new, attached as ``outer.NAME``. origin: which metric, strategy and options made it; not part of
    its identity.
    """

    shape: ModelShape
    blocks: tuple[BlockRecipe, ...]
    embedding_gain: float = 1.0
    final_norm_gain: float = 1.0
    tensors: tuple[tuple[str, str], ...] = ()
    own: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def __post_init__(self) -> None:
        if not self.blocks:
            raise FlexiError("plan: no block is left; a model needs at least one")
        for value, name in ((self.embedding_gain, "embedding_gain"), (self.final_norm_gain, "final_norm_gain")):
            _check_gain(f"plan: {name}", value)
        for position, recipe in enumerate(self.blocks):
            self._check_block(position, recipe)
        known = OUTER[: 2 if self.shape.tied else 3]
        if list(self.own) != sorted(set(self.own)) or not set(self.own) <= set(known):
            raise FlexiError(f"plan: tensors of its own {self.own}, expected some of {sorted(known)}, sorted")
        for name, _ in self.tensors:
            prefix, _, rest = name.partition(".")
            position_text, _, role = rest.partition(".")
            if prefix == "outer" and rest in self.own:
                continue
            if prefix != "blocks" or not role or not position_text.isdigit() or int(position_text) >= len(self.blocks):
                raise FlexiError(f"plan: attached tensor {name!r} belongs to no block; expected blocks.POSITION.NAME")

    # -- construction

    @classmethod
    def identity(cls, shape: ModelShape) -> PruningPlan:
        """Return the plan that changes nothing."""
        return cls(shape, tuple(BlockRecipe(parts=(Part(i),)) for i in range(len(shape.blocks))))

    @classmethod
    def keep(cls, shape: ModelShape, blocks: Iterable[int]) -> PruningPlan:
        """Return the plan that keeps these blocks whole and removes the others."""
        return cls(shape, tuple(BlockRecipe(parts=(Part(i),)) for i in blocks))

    def compose(self, step: PruningPlan) -> PruningPlan:
        """Return the plan of the original model that equals ``step`` applied to the model of this plan.

        Closed over parts, norms, gains, removal, mixes of whole blocks, and new tensors of whole blocks; anything else is
        an error that names the block. A removed block's gain passes to the next block that stays.
        """
        if step.shape != self.new_shape:
            raise FlexiError("compose: the step was made for a model of another shape than this plan's")
        if step.is_identity:
            return self
        if self.is_identity:
            return replace(step, shape=self.shape)
        composed, previous = [], -1
        for position, recipe in enumerate(step.blocks):
            first = min(recipe.sources)
            carried = math.prod(self.blocks[i].gain for i in range(previous + 1, first)) if first > previous else 1.0
            previous = max(recipe.sources)
            composed.append(self._compose_block(position, recipe, carried))
        kept = self._carried_tensors(step)
        return PruningPlan(
            self.shape,
            tuple(composed),
            self.embedding_gain * step.embedding_gain,
            self.final_norm_gain * step.final_norm_gain,
            tuple(sorted((*kept, *step.tensors))),
            tuple(sorted({*self.own, *step.own})),
            _merge_origins(self.origin, step.origin),
        )

    def _carried_tensors(self, step: PruningPlan) -> list[tuple[str, str]]:
        kept = [(n, d) for n, d in self.tensors if n.startswith("outer.") and n.removeprefix("outer.") not in step.own]
        for position, recipe in enumerate(step.blocks):
            for old in recipe.sources:
                prefix = f"blocks.{old}."
                names = {n.removeprefix(prefix): d for n, d in self.tensors if n.startswith(prefix)}
                kept += [(f"blocks.{position}.{n}", d) for n, d in names.items() if n not in recipe.own]
        return kept

    def _compose_block(self, position: int, recipe: BlockRecipe, carried: float) -> BlockRecipe:
        inner = [self.blocks[s] for s in recipe.sources]
        norms = _combine((c, self.blocks[s].norm_weights) for s, c in recipe.norm_weights)
        biases = _combine((c, self.blocks[s].bias_weights) for s, c in recipe.bias_weights)
        gain = recipe.gain * carried * inner[0].gain
        if replace(recipe, gain=1.0, own=()).whole is not None:
            return replace(inner[0], gain=gain, own=tuple(sorted({*inner[0].own, *recipe.own})))
        remade = next((r for r in inner if r.own), None)
        if remade is not None:
            raise FlexiError(
                f"compose: block {position} takes units of block {remade.sources[0]}, which has tensors of its own "
                f"({remade.own[0]}), made by a strategy or trained: it can stay or go, and not be merged or cut any more. Do "
                "that first, or train once at the end"
            )
        if any(r.gain != 1.0 for r in inner[1:]):
            raise FlexiError(f"compose: block {position} merges blocks with gains; apply the gains last")
        if recipe.shares is not None:
            donor = self.blocks[recipe.shares].whole
            if donor is None or inner[0].whole is None:
                raise FlexiError(f"compose: block {position} shares weights with a block that an earlier step changed")
            made = replace(recipe, parts=inner[0].parts, norms=norms, biases=biases, shares=donor, gain=gain)
            return _canonical(made)
        changed = next((r for r in inner if r.shares is not None), None)
        if changed is not None:
            raise FlexiError(
                f"compose: block {position} takes units of block {changed.sources[0]}, which shares its weights"
            )
        if recipe.mix:
            mix = self._compose_mix(position, recipe)
            return _canonical(replace(recipe, mix=mix, norms=norms, biases=biases, gain=gain))
        if any(r.mix for r in inner):
            raise FlexiError(f"compose: block {position} takes units of a mix of blocks; only whole mixes compose")
        parts = tuple(p for part in recipe.parts for p in _select(self.shape, self.blocks[part.source].parts, part))
        return _canonical(BlockRecipe(parts=parts, norms=norms, biases=biases, gain=gain, own=recipe.own))

    def _compose_mix(self, position: int, recipe: BlockRecipe) -> Weighted:
        terms = []
        for source, coefficient in recipe.mix:
            inner = self.blocks[source]
            whole = inner.mix or (((inner.parts[0].source, 1.0),) if _is_whole_part(inner) else None)
            if whole is None:
                raise FlexiError(f"compose: block {position} mixes block {source}, which is not whole any more")
            terms.append((coefficient, whole))
        return _combine(terms)

    # -- what it says

    @property
    def is_identity(self) -> bool:
        """Whether the model of this plan is the original."""
        plain = self.embedding_gain == 1.0 and self.final_norm_gain == 1.0 and not self.own
        return plain and [r.whole for r in self.blocks] == list(range(len(self.shape.blocks)))

    def block_shape(self, recipe: BlockRecipe) -> BlockShape:
        """Return the widths of the block that a recipe makes."""
        first = self.shape.blocks[recipe.sources[0]]
        if recipe.mix:
            return first
        heads = sum(_count(p.kv_heads, self.shape.blocks[p.source].kv_heads) for p in recipe.parts)
        channels = sum(_count(p.channels, self.shape.blocks[p.source].channels) for p in recipe.parts)
        return replace(first, kv_heads=heads, query_heads=heads * first.group, channels=channels)

    @property
    def new_shape(self) -> ModelShape:
        """Shape of the pruned model (shared weights look like their own; adapters are not part of a shape)."""
        return replace(self.shape, blocks=tuple(self.block_shape(r) for r in self.blocks))

    def added_biases(self, recipe: BlockRecipe) -> tuple[str, ...]:
        """Roles of the linear maps that get a bias which the original's have not."""
        biases = (name.removesuffix(".bias") for name in recipe.own if name.endswith(".bias"))
        return tuple(role for role in biases if not self.shape.has_bias(role))

    def adapter_parameters(self, recipe: BlockRecipe) -> int:
        """Parameters of a recipe's adapters, output norms and added biases."""
        block = self.block_shape(recipe)
        maps = self.shape.maps(block)
        adapters = sum(min(recipe.rank, r, c) * (r + c) for r, c in maps.values())
        outputs = bool(block.kv_heads) + bool(block.channels)
        biases = sum(maps[role][0] for role in self.added_biases(recipe))
        return (adapters if recipe.rank else 0) + recipe.output_norm * outputs * self.shape.hidden + biases

    def stored_in(self, recipe: BlockRecipe) -> int:
        """Parameters that a checkpoint of this plan holds of one block: of a sharing one those that it has alone."""
        block = self.block_shape(recipe)
        shared = recipe.shares is not None
        own = sum(self.shape.vectors(block).values()) if shared else self.shape.block_parameters(block)
        return own + self.adapter_parameters(recipe)

    @property
    def stored_parameters(self) -> int:
        """Parameters that a checkpoint of this plan holds: adapters counted, shared weights once."""
        return self.shape.outer_parameters + sum(self.stored_in(recipe) for recipe in self.blocks)

    @property
    def runtime_parameters(self) -> int:
        """Parameters that a token passes: shared weights at every use."""
        blocks = sum(self.shape.block_parameters(self.block_shape(r)) + self.adapter_parameters(r) for r in self.blocks)
        return self.shape.outer_parameters + blocks

    @property
    def macs_per_token(self) -> int:
        """Multiply-adds of one token with the weights (linear maps, adapters, head); attention scores not counted."""
        total = self.shape.vocabulary * self.shape.hidden
        for recipe in self.blocks:
            for rows, columns in self.shape.maps(self.block_shape(recipe)).values():
                total += rows * columns + min(recipe.rank, rows, columns) * (rows + columns)
        return total

    @property
    def ratio(self) -> float:
        """Share of the original's stored parameters that is gone."""
        return 1.0 - self.stored_parameters / self.shape.parameters

    @property
    def total_gain(self) -> float:
        """By what the residual stream at the last block is larger than without any gain: the product of all gains."""
        return math.prod((self.embedding_gain, *(r.gain for r in self.blocks)))

    @property
    def has_gains(self) -> bool:
        """Whether any gain is not 1."""
        return {self.embedding_gain, self.final_norm_gain, *(r.gain for r in self.blocks)} != {1.0}

    def not_plain(self) -> str | None:
        """Say why this plan has no plain checkpoint of the original architecture; None if it has one.

        Gains are no reason: a plain export folds them into weights.
        """
        shapes = {replace(b, attention_type="") for b in self.new_shape.blocks}
        for position, (recipe, block) in enumerate(zip(self.blocks, self.new_shape.blocks, strict=True)):
            if recipe.shares is not None:
                return f"block {position} shares the weights of block {recipe.shares}"
            if self.added_biases(recipe):
                return f"block {position} has a bias of its own on its {self.added_biases(recipe)[0]} map"
            if not block.kv_heads or not block.channels:
                return f"block {position} has no {'attention' if not block.kv_heads else 'MLP'}"
        if len(shapes) > 1:
            widths = sorted({(b.kv_heads, b.channels) for b in shapes})
            return f"its blocks differ in width (KV heads, channels): {widths[0]} ... {widths[-1]}"
        return None

    def donor(self, position: int) -> int | None:
        """Return the position of the block with whose linear maps the one at a position runs; None if with its own."""
        source = self.blocks[position].shares
        if source is None:
            return None
        return next(p for p, recipe in enumerate(self.blocks) if _shared(recipe) == source)

    def key(self, position: int) -> tuple[BlockRecipe, tuple[tuple[str, str], ...]]:
        """Return what makes the block at a position distinct: its recipe and the digests of its tensors, a donor's too."""
        donor = self.donor(position)
        found = self._digests(position, "") + (() if donor is None else self._digests(donor, "donor."))
        return self.blocks[position], found

    def _digests(self, position: int, owner: str) -> tuple[tuple[str, str], ...]:
        prefix = f"blocks.{position}."
        return tuple((owner + n.removeprefix(prefix), d) for n, d in self.tensors if n.startswith(prefix))

    @property
    def hash(self) -> str:
        """SHA-256 of the plan's JSON without its origin."""
        return digest({k: v for k, v in self.to_json().items() if k != "origin"})

    # -- JSON

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values; defaults are left out of recipes."""
        return {
            "shape": asdict(self.shape),
            "blocks": [_compact(r) for r in self.blocks],
            "embedding_gain": self.embedding_gain,
            "final_norm_gain": self.final_norm_gain,
            "tensors": dict(self.tensors),
            **({"own": list(self.own)} if self.own else {}),
            "origin": dict(self.origin),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PruningPlan:
        """Read a plan that ``to_json`` wrote; every rule of validity is checked again."""
        try:
            blocks = tuple(_recipe_from_json(r) for r in value["blocks"])
            return cls(
                ModelShape.from_json(value["shape"]),
                blocks,
                value.get("embedding_gain", 1.0),
                value.get("final_norm_gain", 1.0),
                tuple(sorted(value.get("tensors", {}).items())),
                tuple(value.get("own", ())),
                value.get("origin", {}),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise FlexiError(f"plan file: not a plan of this version ({type(error).__name__}: {error})") from None

    # -- validity

    def _check_block(self, position: int, recipe: BlockRecipe) -> None:
        where = f"plan: block {position}"
        if bool(recipe.parts) == bool(recipe.mix):
            raise FlexiError(f"{where}: expected parts or a mix, found {'both' if recipe.parts else 'neither'}")
        count = len(self.shape.blocks)
        weighted = (*recipe.mix, *recipe.norms, *recipe.biases)
        used = [*recipe.sources, *(s for s, _ in weighted), *([] if recipe.shares is None else [recipe.shares])]
        for source in used:
            if not 0 <= source < count:
                raise FlexiError(f"{where}: source {source} is not one of the model's blocks 0..{count - 1}")
        if any(not math.isfinite(c) for _, c in weighted):
            raise FlexiError(f"{where}: coefficients must be finite, found {weighted}")
        kinds = {replace(self.shape.blocks[s], kv_heads=0, query_heads=0, channels=0) for s in recipe.sources}
        groups = {self.shape.blocks[s].group for s in recipe.sources if self.shape.blocks[s].kv_heads}
        if len(kinds) > 1 or len(groups) > 1:
            raise FlexiError(f"{where}: blocks {recipe.sources} differ in head size, heads per group or attention type")
        if recipe.mix and len({self.shape.blocks[s] for s in recipe.sources}) > 1:
            raise FlexiError(f"{where}: a mix needs blocks of one width, found blocks {recipe.sources}")
        for part in recipe.parts:
            _check_indices(
                f"{where}: KV heads of block {part.source}", part.kv_heads, self.shape.blocks[part.source].kv_heads
            )
            _check_indices(
                f"{where}: channels of block {part.source}", part.channels, self.shape.blocks[part.source].channels
            )
            self._check_query_heads(f"{where}: query heads of block {part.source}", part)
        _check_gain(f"{where}: gain", recipe.gain)
        self._check_own(where, recipe)
        self._check_sharing(where, recipe)

    def _check_query_heads(self, where: str, part: Part) -> None:
        if part.query_heads is None:
            return
        block = self.shape.blocks[part.source]
        _check_indices(where, part.query_heads, block.query_heads)
        expected = _count(part.kv_heads, block.kv_heads) * block.group
        if len(part.query_heads) != expected:
            raise FlexiError(f"{where}: expected {expected} for these KV heads, found {len(part.query_heads)}")

    def _check_own(self, where: str, recipe: BlockRecipe) -> None:
        block = self.block_shape(recipe)
        roles, vectors = self.shape.maps(block), self.shape.vectors(block)
        for name in recipe.own:
            role, _, kind = name.partition(".")
            if name not in vectors and (role not in roles or kind not in ("weight", "bias")):
                norms = [n for n in vectors if "." not in n]
                raise FlexiError(
                    f"{where}: tensor of its own {name!r}, expected ROLE.weight or ROLE.bias, ROLE of {[*roles]}, or {norms}"
                )
        if list(recipe.own) != sorted(set(recipe.own)):
            raise FlexiError(f"{where}: tensors of its own must be sorted without repetition, found {recipe.own}")
        if recipe.shares is not None and not set(recipe.own) <= set(vectors):
            raise FlexiError(
                f"{where}: a block that shares weights has adapters, and norms and biases of its own alone"
            )

    def _check_sharing(self, where: str, recipe: BlockRecipe) -> None:
        if recipe.shares is None:
            if recipe.rank or recipe.output_norm:
                raise FlexiError(f"{where}: adapters and output norms belong to blocks that share weights")
            return
        if recipe.rank < 0:
            raise FlexiError(f"{where}: adapter rank must not be negative, found {recipe.rank}")
        if not _is_whole_part(recipe):
            raise FlexiError(f"{where}: only a whole block can run with the weights of another")
        if self.shape.blocks[recipe.shares] != self.shape.blocks[recipe.sources[0]]:
            raise FlexiError(f"{where}: its donor, block {recipe.shares}, has another width")
        if not any(_shared(r) == recipe.shares for r in self.blocks):
            raise FlexiError(f"{where}: its donor, block {recipe.shares}, is not whole and unshared in this plan")
        if any(self.added_biases(r) for r in self.blocks if _shared(r) == recipe.shares):
            raise FlexiError(f"{where}: its donor, block {recipe.shares}, has biases that no block of the original has")


def _merge_origins(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    notes = [*first.get("notes", ()), *second.get("notes", ())]
    return {**first, **second, **({"notes": notes} if notes else {})}


def _count(indices: tuple[int, ...] | None, width: int) -> int:
    return width if indices is None else len(indices)


def _canonical(recipe: BlockRecipe) -> BlockRecipe:
    """Leave out norms and biases that are the default, so that equal blocks have equal recipes."""
    if recipe.biases == recipe.norm_weights:
        recipe = replace(recipe, biases=())
    short = replace(recipe, norms=())
    return short if short.norm_weights == recipe.norms else recipe


def _shared(recipe: BlockRecipe) -> int | None:
    """Return the old block whose linear maps, as they are or trained, others may run with; None if it is no donor."""
    return replace(recipe, own=()).whole


def _is_whole_part(recipe: BlockRecipe) -> bool:
    return len(recipe.parts) == 1 and recipe.parts[0] == Part(recipe.parts[0].source)


def _check_gain(where: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise FlexiError(f"{where}: expected a positive number, found {value}")


def _check_indices(where: str, indices: tuple[int, ...] | None, width: int) -> None:
    if indices is None:
        return
    if any(a >= b for a, b in itertools.pairwise(indices)):
        raise FlexiError(f"{where}: indices must ascend without repetition")
    if indices and (indices[0] < 0 or indices[-1] >= width):
        raise FlexiError(f"{where}: expected indices in 0..{width - 1}, found {indices[0]}..{indices[-1]}")


def _combine(terms: Iterable[tuple[float, Weighted]]) -> Weighted:
    total: dict[int, float] = {}
    for coefficient, weighted in terms:
        for source, inner in weighted:
            total[source] = total.get(source, 0.0) + coefficient * inner
    return tuple(sorted(total.items()))


def _select(shape: ModelShape, parts: Sequence[Part], outer: Part) -> list[Part]:
    """Take the units that ``outer`` names from the concatenation of ``parts``."""
    if outer.query_heads is not None and list(parts) == [Part(parts[0].source)]:
        return [replace(outer, source=parts[0].source)]
    if outer.query_heads is not None or (outer.kv_heads is not None and any(p.query_heads is not None for p in parts)):
        raise FlexiError(
            f"compose: heads of block {parts[0].source} were chosen before, with query heads that do not belong to them"
        )
    result, heads_before, channels_before = [], 0, 0
    for part in parts:
        block = shape.blocks[part.source]
        heads = part.kv_heads if part.kv_heads is not None else tuple(range(block.kv_heads))
        channels = part.channels if part.channels is not None else tuple(range(block.channels))
        result.append(
            Part(
                part.source,
                part.kv_heads if outer.kv_heads is None else _window(heads, outer.kv_heads, heads_before),
                part.channels if outer.channels is None else _window(channels, outer.channels, channels_before),
                part.query_heads,
            )
        )
        heads_before, channels_before = heads_before + len(heads), channels_before + len(channels)
    kept = [p for p in result if p.kv_heads != () or p.channels != ()]
    return kept or result[:1]


def _window(units: tuple[int, ...], chosen: tuple[int, ...], offset: int) -> tuple[int, ...]:
    return tuple(units[c - offset] for c in chosen if offset <= c < offset + len(units))


def _compact(recipe: BlockRecipe) -> dict[str, Any]:
    value = {f.name: getattr(recipe, f.name) for f in fields(recipe) if getattr(recipe, f.name) != f.default}
    if "parts" in value:
        value["parts"] = [{k: v for k, v in asdict(p).items() if v is not None} for p in recipe.parts]
    return json.loads(json.dumps(value))


def _recipe_from_json(value: Mapping[str, Any]) -> BlockRecipe:
    def indices(part: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
        return tuple(part[key]) if part.get(key) is not None else None

    units = ("kv_heads", "channels", "query_heads")
    parts = tuple(Part(p["source"], *(indices(p, key) for key in units)) for p in value.get("parts", ()))
    coefficients = ("mix", "norms", "biases")
    weighted: dict[str, Any] = {k: tuple((int(s), float(c)) for s, c in value.get(k, ())) for k in coefficients}
    rest: dict[str, Any] = {k: v for k, v in value.items() if k not in ("parts", "own", *coefficients)}
    return BlockRecipe(parts=parts, own=tuple(value.get("own", ())), **weighted, **rest)


# ------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Measurement:
    """One number about a model. ``chance`` is what guessing gives, where there is such a level."""

    name: str
    value: float
    higher_is_better: bool
    standard_error: float | None = None
    chance: float | None = None

    def __post_init__(self) -> None:  # NumPy's numbers and tensors of one value are no JSON
        object.__setattr__(self, "value", float(self.value))
        object.__setattr__(self, "higher_is_better", bool(self.higher_is_better))
        for name in ("standard_error", "chance"):
            if (found := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(found))


@dataclass(frozen=True)
class PluginVersion:
    """Where a plugin in a cell came from."""

    kind: str
    name: str
    distribution: str
    version: str


@dataclass(frozen=True)
class Cell:
    """One point of a grid. Its hash names its record: with other inputs, options or plugin versions it is another record.

    A change of code alone is none: whoever changes what a plugin gives, changes its version. ``options`` holds every
    option of every plugin in the cell and of calibration and evaluation, as canonical JSON.
    """

    model: str
    fingerprint: str
    corpus_hash: str
    metric: str | None
    strategy: str | None
    ratio: float
    recovery: str
    seed: int
    options: str
    plugins: tuple[PluginVersion, ...]

    @property
    def hash(self) -> str:
        """SHA-256 of everything that the cell's result depends on (the model by content, not by name)."""
        value = asdict(self)
        del value["model"]
        return digest(value)

    @property
    def label(self) -> str:
        """A short name for people and file names; not unique."""
        trained = "" if self.recovery == "none" else f"-{self.recovery}"
        if self.strategy is None:
            return f"dense{trained}-s{self.seed}"
        return f"{self.metric}-{self.strategy}-{self.ratio:g}{trained}-s{self.seed}"


Status = Literal["complete", "failed", "incompatible"]


@dataclass(frozen=True)
class Record:
    """One result, as it is stored: the cell, what came of it, and what it took.

    seconds: of each stage, in the process that ended it (what a killed one did before is not in it). shared_with: stage
    -> number of cells that went through it together, each of which has the seconds of all. peak_memory_gib: of the process.
    dirty: whether the package's files differed from ``commit``. date: UTC, when the record was written.
    """

    cell: Cell
    status: Status
    reason: str = ""
    measurements: tuple[Measurement, ...] = ()
    plan: PruningPlan | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    shared_with: Mapping[str, int] = field(default_factory=dict)
    peak_memory_gib: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str = ""
    dirty: bool = False
    date: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        value = {f.name: getattr(self, f.name) for f in fields(self)}
        value["cell"] = asdict(self.cell)
        value["measurements"] = [asdict(m) for m in self.measurements]
        value["plan"] = self.plan.to_json() if self.plan else None
        for name in ("seconds", "shared_with", "versions"):
            value[name] = dict(value[name])
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """Read what ``to_json`` wrote."""
        cell = dict(value["cell"])
        cell["plugins"] = tuple(PluginVersion(**p) for p in cell["plugins"])
        changed = {
            "cell": Cell(**cell),
            "measurements": tuple(Measurement(**m) for m in value["measurements"]),
            "plan": PruningPlan.from_json(value["plan"]) if value["plan"] else None,
        }
        return cls(**{**value, **changed})
