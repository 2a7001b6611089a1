"""FlexiForCausalLM: a transformers model whose blocks may differ in width, share weights, and carry adapters.

The blocks are transformers' own modules, built from a copy of the configuration with that block's widths; the body that
makes masks, positions and caches for them is transformers' own as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast

from flexi_plugins.data import BlockShape, Family, PruningPlan
from flexi_plugins.errors import FlexiError

NORM_EPSILON = 1e-6


@contextmanager
def unfilled() -> Iterator[None]:
    """Build modules whose parameters have neither memory (device meta) nor initial values; their weights are put in later.

    Buffers are real. Weights are not tied.
    """
    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


class BlockConfig:
    """A model's configuration seen with one block's widths.

    Unlike a copy it is not validated (Llama's refuses 24 heads at a hidden size of 4096, which computes perfectly well)
    and it follows later changes of the model's configuration, such as another attention implementation.
    """

    def __init__(self, config: PreTrainedConfig, shape: BlockShape, layer_index: int) -> None:
        self.model_config = config
        self.num_attention_heads = shape.query_heads or 1  # an absent sub-layer is built tiny and then replaced
        self.num_key_value_heads = shape.kv_heads or 1
        self.head_dim = shape.head_dim
        self.intermediate_size = shape.channels or 1
        self.layer_types = [shape.attention_type] * (layer_index + 1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "model_config":
            raise AttributeError(name)
        return getattr(self.model_config, name)


@dataclass(frozen=True)
class BlockSpec:
    """What a block needs beside weights: its widths, its donor's position, adapter rank, output norm, gain, new biases."""

    shape: BlockShape
    shares: int | None = None
    rank: int = 0
    output_norm: bool = False
    gain: float = 1.0
    biases: tuple[str, ...] = ()

    @classmethod
    def of_plan(cls, plan: PruningPlan) -> list[BlockSpec]:
        """Return the specification of every block of a plan's model."""
        return [
            cls(
                plan.block_shape(r),
                plan.donor(p),
                r.rank,
                r.output_norm,
                r.gain,
                plan.added_biases(r),
            )
            for p, r in enumerate(plan.blocks)
        ]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BlockSpec:
        """Read what ``dataclasses.asdict`` wrote."""
        return cls(**{**value, "shape": BlockShape(**value["shape"]), "biases": tuple(value.get("biases", ()))})


class AdaptedLinear(nn.Module):
    """A linear map that runs with another's weight plus an adapter: y = (W + A B) x + own bias.

    A is ``lora_a`` (rows, rank), B is ``lora_b`` (rank, columns). The donor is referred to, not registered: its
    parameters belong to the donor's block, and are stored and counted there alone.
    """

    def __init__(self, donor: nn.Linear, rank: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._donor = (donor,)
        rows, columns = donor.weight.shape
        rank = min(rank, rows, columns)
        kind: dict[str, Any] = {"dtype": dtype or donor.weight.dtype, "device": donor.weight.device}
        if rank:
            self.lora_a = nn.Parameter(torch.zeros(rows, rank, **kind))
            self.lora_b = nn.Parameter(torch.zeros(rank, columns, **kind))
        self.rank = rank
        self.bias = nn.Parameter(torch.zeros(rows, **kind)) if donor.bias is not None else None

    @property
    def donor(self) -> nn.Linear:
        """The linear map whose weight is used."""
        return self._donor[0]

    @property
    def weight(self) -> Tensor:
        """The effective weight W + A B, (rows, columns)."""
        return self.donor.weight + self.lora_a @ self.lora_b if self.rank else self.donor.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., columns) to (..., rows)."""
        weight = self.donor.weight
        if weight.is_meta and not x.is_meta:  # accelerate brings it for the donor's own forward alone
            raise FlexiError(
                "FlexiForCausalLM: a block runs with the weights of another one that is offloaded to CPU or disk, where they "
                "are not at hand; load the model without offloading (device_map)"
            )
        y = F.linear(x, weight.to(x.device), self.bias)
        return y + F.linear(F.linear(x, self.lora_b), self.lora_a) if self.rank else y


class OutputNorm(nn.Module):
    """FlexiGPT's output normalisation (eq. 6): (h - mean) / std * gamma per token, gamma learnable, no bias."""

    def __init__(self, hidden: int, **kind: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden, **kind))

    def forward(self, h: Tensor) -> Tensor:
        """Normalise (..., hidden) over its last dimension."""
        return F.layer_norm(h, self.weight.shape, self.weight, None, NORM_EPSILON)


class AbsentAttention(nn.Module):
    """Stands where a block has no attention: adds nothing, caches nothing."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Return zeros like the input."""
        return torch.zeros_like(hidden_states), None


class AbsentMlp(nn.Module):
    """Stands where a block has no MLP: adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return zeros like the input."""
        return torch.zeros_like(hidden_states)


def _normalise_attention(module: nn.Module, _: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (cast(Any, module).output_norm(output[0]), *output[1:])


def _normalise_mlp(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    return cast(Any, module).output_norm(output)


def _scale_input(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (arguments[0] * float(cast(Any, module).input_gain), *arguments[1:])


def _linear(block: nn.Module, path: str) -> nn.Linear:
    return cast(nn.Linear, block.get_submodule(path))


def layer_class(config: PreTrainedConfig, family: Family) -> type[nn.Module]:
    """Return transformers' class of one block of this architecture."""
    with unfilled():
        body = MODEL_MAPPING[type(config)](resized_config(config))
    return type(getattr(body, family.blocks)[0])


def resized_config(config: PreTrainedConfig, blocks: int = 1) -> PreTrainedConfig:
    """Return a copy of a configuration with another number of blocks."""
    values = config.to_dict()
    if values.get("layer_types"):
        kinds = list(values["layer_types"])
        values["layer_types"] = (kinds + kinds[-1:] * blocks)[:blocks]
    copy = type(config).from_dict({**values, "num_hidden_layers": blocks})
    copy._attn_implementation = config._attn_implementation
    return copy


def build_block(
    block_class: type[nn.Module],
    config: PreTrainedConfig,
    family: Family,
    spec: BlockSpec,
    layer_index: int,
    donor: nn.Module | None = None,
) -> nn.Module:
    """Build one block with the widths, adapters, norms and gain of ``spec``; parameters are on the default device.

    ``donor`` is the built block whose linear maps a sharing block runs with.
    """
    shape = spec.shape
    block = block_class(BlockConfig(config, shape, layer_index), layer_index)
    if not shape.kv_heads:
        setattr(block, family.attention, AbsentAttention())
        setattr(block, family.attention_norm, nn.Identity())
    if not shape.channels:
        setattr(block, family.mlp, AbsentMlp())
        setattr(block, family.mlp_norm, nn.Identity())
    if spec.shares is not None:
        assert donor is not None, "a sharing block is built after its donor"
        _share(block, family, spec, donor)
    for role in spec.biases:
        linear = _linear(block, family.ROLES[role])
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.weight.shape[0]))
    if spec.gain != 1.0:
        block.__dict__["input_gain"] = spec.gain  # a plain number, not a buffer: it is in the configuration
        block.register_forward_pre_hook(_scale_input)
    return block


def _share(block: nn.Module, family: Family, spec: BlockSpec, donor: nn.Module) -> None:
    for path in family.ROLES.values():
        if path.startswith(family.attention + ".") and not spec.shape.kv_heads:
            continue
        if path.startswith(family.mlp + ".") and not spec.shape.channels:
            continue
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, AdaptedLinear(_linear(donor, path), spec.rank))
    if not spec.output_norm:
        return
    for name, hook, there in (
        (family.attention, _normalise_attention, spec.shape.kv_heads),
        (family.mlp, _normalise_mlp, spec.shape.channels),
    ):
        if not there:
            continue
        layer = getattr(block, name)
        weight = _linear(donor, family.ROLES["down" if name == family.mlp else "attention_output"]).weight
        layer.output_norm = OutputNorm(weight.shape[0], dtype=weight.dtype, device=weight.device)
        layer.register_forward_hook(hook)


class FlexiConfig(PreTrainedConfig):
    """Configuration of a pruned model that has no plain form: the original's, its family, and one entry a block."""

    model_type = "flexi"

    base: dict | None = None
    family: dict | None = None
    blocks: list | None = None
    embedding_gain: float = 1.0
    final_norm_gain: float = 1.0
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    @classmethod
    def of_plan(cls, plan: PruningPlan, base: PreTrainedConfig, family: Family) -> FlexiConfig:
        """Return the configuration of a plan's model."""
        values = {k: v for k, v in base.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
        same = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
        return cls(
            base=values,
            family=asdict(family),
            blocks=[asdict(s) for s in BlockSpec.of_plan(plan)],
            embedding_gain=plan.embedding_gain,
            final_norm_gain=plan.final_norm_gain,
            num_hidden_layers=len(plan.blocks),
            head_dim=plan.shape.blocks[0].head_dim,
            dtype=base.dtype,
            use_cache=getattr(base, "use_cache", True),
            architectures=["FlexiForCausalLM"],
            **{k: getattr(base, k) for k in (*same, *tokens)},
        )

    def base_config(self) -> PreTrainedConfig:
        """Return the original architecture's configuration with this model's number of blocks and of tokens."""
        values = {**(self.base or {}), "vocab_size": self.vocab_size}
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        config = resized_config(config, self.num_hidden_layers)
        if getattr(config, "layer_types", None):
            config.layer_types = [b["shape"]["attention_type"] for b in self.blocks or ()]
        config._attn_implementation = self._attn_implementation
        return config


class FlexiForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model with per-block widths, shared weights, adapters, output norms and gains."""

    config_class = FlexiConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FlexiConfig) -> None:
        super().__init__(config)
        family_values = dict(config.family or {})
        family_values["head_norms"] = tuple(family_values["head_norms"])
        family = Family(**family_values)
        base = config.base_config()
        block_class = layer_class(base, family)
        self.model = MODEL_MAPPING[type(base)](_body_config(base))
        self.model.config = base
        setattr(self.model, family.blocks, nn.ModuleList(self._blocks(config, base, family, block_class)))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _blocks(
        self, config: FlexiConfig, base: PreTrainedConfig, family: Family, block_class: type[nn.Module]
    ) -> list[nn.Module]:
        specs = [BlockSpec.from_json(b) for b in config.blocks or ()]
        blocks: list[nn.Module | None] = [None] * len(specs)
        indices = cache_indices([s.shape for s in specs])
        for sharing in (False, True):
            for position, spec in enumerate(specs):
                if (spec.shares is not None) == sharing:
                    donor = None if spec.shares is None else blocks[spec.shares]
                    blocks[position] = build_block(block_class, base, family, spec, indices[position], donor)
        return [b for b in blocks if b is not None]

    def draft(self) -> FlexiForCausalLM:
        """Return the model without its blocks that share weights, on the same storage: FlexiGPT's draft.

        ``model.generate(..., assistant_model=model.draft())`` is self-speculative decoding: the draft proposes tokens, the
        whole model verifies them, and what comes out is what it writes alone (greedily; sampled from its distribution).
        """
        entries = list(self.config.blocks or ())
        kept = [p for p, entry in enumerate(entries) if entry["shares"] is None]
        config = type(self.config).from_dict(self.config.to_dict())
        config.blocks, config.num_hidden_layers = [entries[p] for p in kept], len(kept)
        config.dtype = self.dtype
        blocks = f"model.{(config.family or {})['blocks']}."
        places = {f"{blocks}{old}.": f"{blocks}{new}." for new, old in enumerate(kept)}
        state = {}
        for name, tensor in self.state_dict().items():
            own = next((place for place in places if name.startswith(place)), None)
            if own is not None or not name.startswith(blocks):
                state[places[own] + name.removeprefix(own) if own else name] = tensor
        with unfilled():
            draft = FlexiForCausalLM(config)
        draft.load_state_dict(state, strict=True, assign=True)
        draft.tie_weights()
        draft.generation_config = self.generation_config
        return draft.eval().requires_grad_(False).to(self.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (batch, tokens, vocabulary), with the loss where labels are given, as transformers' models do."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if self.config.embedding_gain != 1.0:
            inputs_embeds = inputs_embeds * self.config.embedding_gain
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()  # one made from the configuration would go by position (cache_indices)
        outputs = self.model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if self.config.final_norm_gain != 1.0:
            hidden = hidden * self.config.final_norm_gain
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _body_config(base: PreTrainedConfig) -> PreTrainedConfig:
    """Return a configuration with one block of every attention type: bodies look for the types when they are made."""
    kinds = sorted(set(getattr(base, "layer_types", None) or ()))
    config = resized_config(base, len(kinds))
    if kinds:
        config.layer_types = kinds
    return config


def cache_indices(shapes: Sequence[BlockShape]) -> list[int]:
    """Number the blocks for the key-value cache: those with attention first and in order, so that entry 0 exists."""
    with_attention = [p for p, s in enumerate(shapes) if s.kv_heads]
    without = [p for p, s in enumerate(shapes) if not s.kv_heads]
    order = {p: i for i, p in enumerate(with_attention + without)}
    return [order[p] for p in range(len(shapes))]


def register() -> None:
    """Make transformers' Auto classes know FlexiForCausalLM."""
    AutoConfig.register(FlexiConfig.model_type, FlexiConfig, exist_ok=True)
    AutoModelForCausalLM.register(FlexiConfig, FlexiForCausalLM, exist_ok=True)


register()  # here and not at the caller, since this module may be in the middle of its import when it is asked for
