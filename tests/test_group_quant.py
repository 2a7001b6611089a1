"""Quantised groups of columns: the arithmetic by hand and by numpy, packed files, and adapters that zero factors absorb."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import attached_for, built, close, config_of, logits, opened, sharing, tiny, tokens
from torch import Tensor, nn
from transformers import MODEL_MAPPING

from flexi_plugins.data import PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import RecoveryRequest, TrainingText
from flexi_plugins.recovery.copies import replaced
from flexi_plugins.recovery.group_quant import PACKED_FILE, GroupQuant, LoraQuantise, dequantised
from flexi_plugins.recovery.lora import Lora, linear_maps
from flexi_plugins.recovery.quantised import group_sums, load_packed, pack, quantise, save_packed, unpack

BITS = (2, 3, 4, 8)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def nearest(weight: np.ndarray, bits: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Round every group of every row by itself, in float32: integers and values."""
    integers, values = np.zeros_like(weight), np.zeros_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], size):
            group = weight[row, start : start + size]
            alpha = (group.max() - group.min()) / np.float32(2**bits - 1)
            q = np.round((group - group.min()) / alpha) if alpha > 0 else np.zeros_like(group)
            integers[row, start : start + size] = q
            values[row, start : start + size] = alpha * q + group.min()
    return integers, values


# --------------------------------------------------------------------------------------------- arithmetic


def test_two_bits_by_hand():
    packed = quantise(torch.tensor([[0.0, 0.4, 0.6, 3.0, 5.0, 5.0]]), bits=2, group_size=4)
    assert packed.weight().tolist() == [[0.0, 0.0, 1.0, 3.0, 5.0, 5.0]]
    assert packed.scales.tolist() == [[1.0, 0.0]]
    assert packed.zeros.tolist() == [[0.0, 5.0]]
    assert packed.integers.tolist() == [0b11_01_00_00, 0]
    assert packed.nbytes == 2 + 4 * 4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 7, 32, 50, 64])
def test_weights_are_those_that_numpy_rounds_to(bits, size):
    """50 columns: groups of 7 leave one of 1, of 32 one of 18, and of 64 there is a short one alone."""
    weight = normal(13, 50)
    packed = quantise(weight, bits, size)
    integers, values = nearest(weight.numpy(), bits, size)
    assert np.array_equal(unpack(packed.integers, bits, 13 * 50).view(13, 50).numpy(), integers)
    assert np.allclose(packed.weight().numpy(), values, rtol=1e-6, atol=1e-6)
    assert packed.scales.shape == packed.zeros.shape == (13, -(-50 // size))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("factors", ["float32", "float16"])
def test_no_weight_is_off_by_more_than_half_a_step(bits, factors):
    """float16 holds a factor to 2^-11 of itself, and no zero factor is beyond 5 here."""
    weight = normal(40, 96, seed=1)
    packed = quantise(weight, bits, 32, factors)
    step = packed.scales.float().repeat_interleave(32, 1)
    rounding = 1e-5 if factors == "float32" else 5 * 2.0**-11 + 2**bits * step * 2.0**-11
    assert bool(((packed.weight() - weight).abs() <= step / 2 + rounding).all())
    assert str(packed.zeros.dtype) == f"torch.{factors}"


def test_a_group_of_equal_weights_is_exact():
    weight = torch.full((3, 8), -0.1)
    weight[1] = 0
    assert torch.equal(quantise(weight, 4, 4).weight(), weight)


def test_bfloat16_weights_come_back_in_bfloat16():
    weight = normal(16, 64).bfloat16()
    packed = quantise(weight, 4, 32)
    found = packed.weight()
    step = packed.scales.repeat_interleave(32, 1)
    assert found.dtype == torch.bfloat16
    assert bool(((found.float() - weight.float()).abs() <= step / 2 + found.float().abs() * 2.0**-8).all())


@pytest.mark.parametrize("bits", BITS)
def test_rounded_weights_are_rounded_to_themselves(bits):
    """The least and the largest weight of a group keep the first and the last integer."""
    packed = quantise(normal(8, 70), bits, 32)
    again = quantise(packed.weight(), bits, 32)
    assert torch.equal(again.integers, packed.integers)
    assert close(again.weight(), packed.weight(), 1e-6)


def test_sums_over_groups_leave_no_input_out():
    x = normal(2, 3, 10)
    expected = torch.stack([x[..., :4].sum(-1), x[..., 4:8].sum(-1), x[..., 8:].sum(-1)], -1)
    assert close(group_sums(x, 4), expected, 1e-6)
    assert group_sums(x.bfloat16(), 4).dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    weight = normal(4, 8)
    weight[2, 5] = value
    with pytest.raises(FlexiError, match=r"down_proj: expected scales and zero factors that are finite in float32"):
        quantise(weight, 4, 4).checked("down_proj")


def test_weights_beyond_float16_say_what_holds_them():
    with pytest.raises(FlexiError, match=r"finite in float16, .*factors = float32"):
        quantise(1e6 * normal(4, 8), 4, 4, "float16").checked("up_proj")


# ------------------------------------------------------------------------------------------- bits and files


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000, 300_001])
def test_integers_are_packed_without_a_gap(bits, count):
    values = np.random.default_rng(0).integers(0, 2**bits, count, dtype=np.uint8)
    planes = np.unpackbits(values[:, None], axis=1, bitorder="little")[:, :bits]
    expected = np.packbits(planes.flatten(), bitorder="little")
    packed = pack(torch.from_numpy(values), bits)
    assert np.array_equal(packed.numpy(), expected)
    assert np.array_equal(unpack(packed, bits, count).numpy(), values)


@pytest.mark.parametrize("bits", BITS)
def test_a_file_gives_the_same_weights_bit_by_bit(bits, tmp_path):
    """The bytes that are counted are those of the tensors in the file."""
    weights = {
        "a": quantise(normal(5, 13), bits, 4),
        "b": quantise(normal(3, 64, seed=1).bfloat16(), bits, 32, "float16"),
    }
    save_packed(weights, tmp_path / "deeper" / "x.safetensors")
    found = load_packed(tmp_path / "deeper" / "x.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[n].weight(), weights[n].weight()) for n in weights)
    assert found["b"].weight().dtype == torch.bfloat16
    tensors = load_file(tmp_path / "deeper" / "x.safetensors").values()
    assert sum(t.numel() * t.element_size() for t in tensors) == sum(p.nbytes for p in weights.values())


def test_other_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_text("no tensors")
    with pytest.raises(FlexiError, match="expected packed weights that group-quant wrote"):
        load_packed(tmp_path / "x.safetensors")
    for name in ("y", "missing"):
        with pytest.raises(FlexiError, match=rf"{name}.safetensors: cannot read packed weights"):
            load_packed(tmp_path / f"{name}.safetensors")


# ------------------------------------------------------------------------------------------------ adapters


def adapted(model: nn.Module, method: GroupQuant) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with rounded weights and adapters that are not zero, and the rounded weights."""
    maps = linear_maps(model)
    packed = {n: quantise(model.get_submodule(n).weight, method.bits, method.group_size) for n in maps}
    model = replaced(model, dequantised(packed))
    method.adapt(model, seed=0)
    for number, linear in enumerate(map(model.get_submodule, maps)):
        linear.group_b.data = 0.05 * normal(*linear.group_b.shape, seed=number)
    return model, packed


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_an_adapter_reads_what_a_group_of_inputs_adds_up_to(pooling):
    """The down map has 24 columns: groups of 10, 10 and 4."""
    model, _ = adapted(tiny(), GroupQuant(group_size=10, rank=3, pooling=pooling))
    linear, x = model.model.layers[1].mlp.down_proj, normal(5, 24)
    groups = [x[:, :10], x[:, 10:20], x[:, 20:]]
    pooled = torch.stack([g.sum(1) if pooling == "sum" else g.mean(1) for g in groups], 1)
    with torch.no_grad():
        expected = x @ linear.weight.T + 16 / 3 * pooled @ linear.group_a.T @ linear.group_b.T
        assert close(linear(x), expected)
    assert tuple(linear.group_a.shape) == (3, 3)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["llama", "llama-biases", "qwen3", "qwen2"])
def test_zero_factors_absorb_the_adapters_exactly(kind, pooling):
    """Neither an integer nor a scale changes, and the outputs are those of weights and adapters side by side."""
    model, method = tiny(kind), GroupQuant(group_size=10, rank=4, pooling=pooling)
    beside, packed = adapted(model, method)
    merged = method.merged(beside, packed)
    ids = tokens(3, 12)
    assert close(logits(replaced(model, dequantised(merged)), ids), logits(beside, ids), 1e-4)
    assert not close(logits(replaced(model, dequantised(packed)), ids), logits(beside, ids), 1e-2)
    for name, before in packed.items():
        assert torch.equal(merged[name].integers, before.integers)
        assert torch.equal(merged[name].scales, before.scales)


def test_zero_factors_of_float16_keep_a_shift_below_their_step_on_average():
    """To the nearest, a hundredth of a step would be lost in every one of them."""
    packed = quantise(normal(64, 64), 4, 8, "float16")
    shift = torch.full(packed.zeros.shape, 1e-5)
    moved = [packed.shifted(shift, seed).zeros.float() - packed.zeros.float() for seed in range(40)]
    assert float(torch.stack(moved).mean()) == pytest.approx(1e-5, rel=0.3)
    assert torch.equal(packed.shifted(shift, 3).zeros, packed.shifted(shift, 3).zeros)


def test_a_block_that_shares_weights_runs_with_its_donors_adapter():
    model, method = tiny("llama-mha"), GroupQuant(group_size=10, rank=4)
    plan, attached = attached_for(sharing(opened(model).shape, {3: 1}))
    pruned = built(plan, model, attached)
    beside, packed = adapted(pruned, method)
    assert len(packed) == 4 * 7
    merged = replaced(pruned, dequantised(method.merged(beside, packed)))
    assert close(logits(merged, tokens()), logits(beside, tokens()), 1e-4)


def test_the_seed_makes_the_adapters():
    first, second, other = (tiny() for _ in range(3))
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        GroupQuant().adapt(model, seed)
    a, b, c = (model.model.layers[0].mlp.up_proj.group_a for model in (first, second, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("hidden", "channels", "heads", "blocks", "millions"),
    [(4096, 11008, 32, 32, 89), (5120, 13824, 40, 40, 140), (6656, 17920, 52, 60, 272), (8192, 22016, 64, 80, 447)],
)
def test_the_defaults_train_as_many_parameters_as_qa_lora_says(hidden, channels, heads, blocks, millions):
    """Table 2 of QA-LoRA, arXiv 2309.14717: LLaMA of 7, 13, 33 and 65 billion parameters."""
    sizes = {"hidden_size": hidden, "intermediate_size": channels, "num_hidden_layers": 1}
    config = config_of("llama", **sizes, num_attention_heads=heads, num_key_value_heads=heads)
    with torch.device("meta"):
        model = MODEL_MAPPING[type(config)](config)
    GroupQuant().adapt(model, seed=0)
    count = blocks * sum(p.numel() for n, p in model.named_parameters() if "group_" in n)
    assert round(count / 1e6) == millions


# ---------------------------------------------------------------------------------------------- the method


@contextmanager
def stage(title: str, total: int | None = None) -> Iterator[Any]:
    yield lambda n, note="": None


def asked(model: nn.Module, folder: Path, ids: Tensor | None = None, **changes: Any) -> RecoveryRequest:
    """Return a request to recover a model on some windows, the first two of them held out."""
    ids = tokens(8, 16, seed=1) if ids is None else ids
    values: dict[str, Any] = {
        "model": model,
        "plan": PruningPlan.identity(opened(tiny()).shape),
        "text": TrainingText(ids, ids.clone()),
        "held_out": TrainingText(ids[:2], ids[:2].clone()),
        "tokens": ids.numel(),
        "seed": 0,
        "folder": folder,
        "teacher": lambda ids, blocks: {},
        "progress": stage,
        "say": lambda text: None,
    }
    return RecoveryRequest(**{**values, **changes})


def loss(model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


@pytest.mark.parametrize("untrained", ["rank", "tokens"])
def test_without_training_every_map_is_rounded_to_nearest_and_all_else_is_the_same_tensor(untrained, tmp_path):
    model = tiny("llama-biases")
    before = {name: p.clone() for name, p in model.named_parameters()}
    method, request = GroupQuant(group_size=16), asked(model, tmp_path)
    found = (
        replace(method, rank=0).recover(request) if untrained == "rank" else method.recover(replace(request, tokens=0))
    )
    after = found.model.state_dict()
    assert after.keys() == model.state_dict().keys()
    for name, old in model.named_parameters():
        assert torch.equal(old, before[name])
        if name.endswith("proj.weight"):
            assert np.allclose(after[name].numpy(), nearest(old.numpy(), 4, 16)[1], rtol=1e-6, atol=1e-6)
        else:
            assert after[name].data_ptr() == old.data_ptr()
    assert found.curve == ()
    assert found.facts["trained_parameters"] == 0


def test_the_facts_count_the_bytes_of_the_file_and_of_the_rest(tmp_path):
    """Each group of 8 weights has 8 times 3 bits, and 4 + 4 bytes of factors."""
    model = tiny()
    found = GroupQuant(bits=3, group_size=8, rank=0).recover(asked(model, tmp_path))
    packed = load_packed(tmp_path / PACKED_FILE)
    maps = {n: p for n, p in model.named_parameters() if n.endswith("proj.weight")}
    assert {f"{n}.weight" for n in packed} == maps.keys()
    assert all(torch.equal(found.model.get_parameter(f"{n}.weight"), p.weight()) for n, p in packed.items())
    count = sum(p.numel() for p in maps.values())
    others = sum(p.numel() for p in model.parameters()) - count
    size = count * 3 // 8 + count // 8 * 8
    assert (found.facts["bits"], found.facts["group_size"]) == (3, 8)
    assert found.facts["quantised_parameters"] == count
    assert found.facts["packed_bytes"] == size
    assert found.facts["bits_per_weight"] == 3 + 8
    assert found.facts["stored_bytes"] == size + 4 * others


def test_training_lowers_the_loss_and_the_merged_model_is_what_was_measured(tmp_path):
    """One window again and again; the curve's lowest loss is taken with adapters beside, the model's own without any."""
    model, ids = tiny(), tokens(1, 16, seed=3).repeat(128, 1)
    method = GroupQuant(bits=2, group_size=8, rank=8, learning_rate=3e-3, batch_tokens=64, micro_batch_tokens=64)
    rounded = loss(replace(method, rank=0).recover(asked(model, tmp_path / "rounded", ids)).model, ids[:1])
    found = method.recover(asked(model, tmp_path / "trained", ids))
    assert found.curve[0]["held_out_loss"] == pytest.approx(rounded, rel=1e-4)
    assert loss(found.model, ids[:1]) < 0.9 * rounded
    assert loss(found.model, ids[:1]) == pytest.approx(min(p["held_out_loss"] for p in found.curve), rel=1e-4)
    shapes = [p.shape for n, p in model.named_parameters() if n.endswith("proj.weight")]
    ranks = [min(8, rows, columns // 8) for rows, columns in shapes]
    expected = sum(rank * (rows + columns // 8) for rank, (rows, columns) in zip(ranks, shapes, strict=True))
    assert found.facts["trained_parameters"] == expected
    assert found.model.state_dict().keys() == model.state_dict().keys()
    assert [len(m._forward_hooks) for m in found.model.modules()] == [len(m._forward_hooks) for m in model.modules()]
    assert not any(p.requires_grad for p in found.model.parameters())
    packed = load_packed(tmp_path / "trained" / PACKED_FILE)
    assert all(torch.equal(found.model.get_parameter(f"{n}.weight"), p.weight()) for n, p in packed.items())


def test_a_bfloat16_model_is_trained_and_stays_one(tmp_path):
    model = tiny().bfloat16()
    found = GroupQuant(group_size=8, rank=4).recover(asked(model, tmp_path, dtype="bfloat16"))
    packed = load_packed(tmp_path / PACKED_FILE)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    for name, weight in packed.items():  # rounded at random to one of the two nearest values
        values, exact = (
            w.float() for w in (found.model.get_parameter(f"{name}.weight"), replace(weight, dtype="float32").weight())
        )
        assert bool(((values - exact).abs() <= exact.abs() * 2**-7 + 1e-7).all())
    assert bool(logits(found.model, tokens()).isfinite().all())


def test_a_shared_weight_is_quantised_once_and_its_users_keep_their_adapters(tmp_path):
    model = tiny()
    plan, attached = attached_for(sharing(opened(model).shape, {3: 1}))
    pruned = built(plan, model, attached)
    found = GroupQuant(rank=0, group_size=8).recover(asked(pruned, tmp_path, plan=plan))
    assert not [n for n in load_packed(tmp_path / PACKED_FILE) if ".layers.3." in n]
    before, after = pruned.state_dict(), found.model.state_dict()
    assert all(after[n].data_ptr() == before[n].data_ptr() for n in after if ".layers.3." in n)
    user, donor = (found.model.model.layers[block].self_attn.q_proj for block in (3, 1))
    values = nearest(model.model.layers[1].self_attn.q_proj.weight.numpy(), 4, 8)[1]
    assert np.allclose(donor.weight.numpy(), values, rtol=1e-6, atol=1e-6)
    assert close(user.weight, donor.weight + user.lora_a @ user.lora_b)
    assert any("7 maps run with another's weight" in note for note in found.notes)


def test_all_wrong_options_are_named_at_once(tmp_path):
    with pytest.raises(FlexiError, match=r"group-quant: learning_rate = 0, .*; group_size = 0, .*; rank = -1, "):
        GroupQuant(learning_rate=0, group_size=0, rank=-1).check()


def test_a_model_without_the_maps_of_a_block_is_refused(tmp_path):
    with pytest.raises(FlexiError, match=r"expected linear maps self_attn.q_proj, .*; Linear has none"):
        GroupQuant().recover(asked(nn.Linear(4, 4), tmp_path))


def test_a_map_that_is_not_finite_is_named(tmp_path):
    model = tiny()
    model.model.layers[2].mlp.gate_proj.weight.data[1, 2] = torch.nan
    with pytest.raises(FlexiError, match=r"group-quant: model.layers.2.mlp.gate_proj: expected scales"):
        GroupQuant().recover(asked(model, tmp_path))


def test_lora_then_quantise_rounds_what_lora_trained(tmp_path):
    options: dict[str, Any] = {"rank": 2, "learning_rate": 1e-2, "batch_tokens": 32, "keep": "last"}
    model = tiny()
    lora = Lora(**options).recover(asked(model, tmp_path / "lora"))
    found = LoraQuantise(**options, group_size=8).recover(asked(model, tmp_path / "both"))
    packed = load_packed(tmp_path / "both" / PACKED_FILE)
    for name, weight in packed.items():
        step = weight.scales.repeat_interleave(8, 1)
        exact = lora.model.get_parameter(f"{name}.weight")
        assert torch.equal(found.model.get_parameter(f"{name}.weight"), weight.weight())
        assert bool(((weight.weight() - exact).abs() <= step / 2 + 1e-5).all())
        assert not torch.equal(exact, model.get_parameter(f"{name}.weight"))
    assert found.facts["trained_parameters"] == lora.facts["trained_parameters"] > 0
    assert [p["tokens"] for p in found.curve] == [p["tokens"] for p in lora.curve]
    assert found.facts["bits"] == 4
