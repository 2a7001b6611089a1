"""lora, adapters and full: what each trains, what it leaves alone, and what comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from test_training import LENGTH, STEP, ask, killed_after, silent, text
from tiny import attached_for, built, change, close, logits, opened, sharing, tiny, tokens
from torch import nn

from flexi_plugins.data import BlockRecipe, Family, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Recovered, RecoveryMethod, RecoveryRequest
from flexi_plugins.recovery.adapters import Adapters
from flexi_plugins.recovery.copies import replaced, stochastically_rounded, trainable, working_copy
from flexi_plugins.recovery.course import course_of
from flexi_plugins.recovery.full import Full
from flexi_plugins.recovery.lora import Lora, add_lora, linear_maps, merged, output_gains, own_adapters
from flexi_plugins.recovery.none import NoRecovery

IDS = tokens(3, 10)
QUICK: dict[str, Any] = {"batch_tokens": STEP, "learning_rate": 5e-3, "schedule": "constant", "warm_up": 0.0}
METHODS: list[Any] = [Lora(**QUICK), Adapters(**QUICK), Adapters(**QUICK, kept="lora"), Full(**QUICK)]
NAMES = ["lora", "adapters", "adapters-and-lora", "full"]
Made = tuple[nn.Module, PruningPlan]


def plain() -> Made:
    model = tiny()
    return model, PruningPlan.identity(opened(model).shape)


def shared() -> Made:
    """A model whose blocks 3 and 4 run with the weights of block 1."""
    model = tiny("llama-biases")
    plan, attached = attached_for(sharing(opened(model).shape, {3: 1, 4: 1}))
    return built(plan, model, attached), plan


def uneven() -> Made:
    """A model with a block without attention, one without MLP, and a narrow one."""
    model = tiny()
    plan = change(
        PruningPlan.identity(opened(model).shape),
        {
            0: BlockRecipe(parts=(Part(0, (), None),)),
            2: BlockRecipe(parts=(Part(2, None, ()),)),
            3: BlockRecipe(parts=(Part(3, (1,), (0, 5, 7)),)),
        },
    )
    return built(plan, model), plan


def changed(recovered: nn.Module, model: nn.Module) -> set[str]:
    """Return the names of the parameters that are other tensors than before."""
    before = dict(model.named_parameters())
    after = dict(recovered.named_parameters())
    assert after.keys() == before.keys()
    return {name for name in after if after[name].data_ptr() != before[name].data_ptr()}


def maps_of(model: nn.Module, blocks: tuple[int, ...]) -> set[str]:
    """Return the weights of the linear maps of some blocks, by the names that every family has."""
    ends = [f"model.layers.{block}.{path}.weight" for block in blocks for path in Family.ROLES.values()]
    return {name for name, _ in model.named_parameters() if name in ends}


# -------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("make", [plain, shared, uneven])
def test_a_merged_model_computes_what_the_layers_did(make: Callable[[], Made]) -> None:
    """Where blocks share weights, in all of them."""
    model, _ = make()
    copy = working_copy(model, [], "float32")
    layers = add_lora(copy, linear_maps(copy), rank=4, alpha=8.0, dropout=0.5)
    torch.manual_seed(0)
    for layer in layers.values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    expected = logits(copy.eval(), IDS)
    assert close(logits(replaced(model, merged(model, layers)), IDS), expected, 1e-4)
    assert not close(logits(model, IDS), expected, 1e-2)


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning"
)  # of the oracle: peft asks transformers so
def test_lora_is_peft_trained_by_adamw_and_merged(tmp_path: Path) -> None:
    """Against peft's own wrapper and merge, a loop in plain torch, and a learning rate by hand."""
    from peft import LoraConfig, get_peft_model

    model, plan = plain()
    method = Lora(
        dropout=0.0, learning_rate=1e-2, warm_up=0.25, batch_tokens=STEP, gradient_clip=0.5, keep="last", divergence=9.0
    )
    request = ask(tmp_path, model, plan=plan, tokens=4 * STEP)
    found = method.recover(request).model
    torch.manual_seed(request.seed)
    paths = [path.rpartition(".")[2] for path in Family.ROLES.values()]
    wrapped = get_peft_model(deepcopy(model), LoraConfig(r=8, lora_alpha=16, target_modules=paths))
    optimizer = torch.optim.AdamW(trainable(wrapped).values(), weight_decay=0.0)
    for step, factor in enumerate((1 / 2, 1, 2 / 3, 1 / 3)):
        optimizer.param_groups[0]["lr"] = factor * 1e-2
        ids = request.text.ids[2 * step : 2 * step + 2]
        wrapped(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trainable(wrapped).values()), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    expected = wrapped.merge_and_unload().state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert close(tensor, expected[name], 1e-4), name
    assert changed(found, model) == maps_of(model, (0, 1, 2, 3, 4))


def test_lora_on_blocks_that_share_weights_trains_the_donor_and_their_adapters(tmp_path: Path) -> None:
    model, plan = shared()
    found = Lora(**QUICK).recover(ask(tmp_path, model, plan=plan))
    own = own_adapters(model) + output_gains(model)
    assert changed(found.model, model) == maps_of(model, (0, 1, 2)) | set(own)
    assert len(own_adapters(model)) == 2 * 2 * len(Family.ROLES)


def test_lora_is_put_on_the_maps_that_are_asked_for(tmp_path: Path) -> None:
    model, plan = shared()
    found = Lora(**QUICK, maps=("query", "down")).recover(ask(tmp_path, model, plan=plan))
    ends = ("q_proj.weight", "down_proj.weight")
    expected = {name for name in maps_of(model, (0, 1, 2)) if name.endswith(ends)}
    expected |= {name for name in own_adapters(model) if ".q_proj." in name or ".down_proj." in name}
    expected |= set(output_gains(model))
    assert changed(found.model, model) == expected
    with pytest.raises(FlexiError, match=r"lora: unknown map 'q_proj': .*there is attention_output, down"):
        Lora(maps=("q_proj",)).check()


def test_a_merge_is_formed_in_float32_and_rounded_once() -> None:
    """An update of half of bfloat16's resolution and more arrives, although bfloat16 could not hold both terms' sum."""
    model = tiny().to(torch.bfloat16)
    copy = working_copy(model, [], "bfloat16")
    name = "model.layers.0.mlp.up_proj"
    layers = add_lora(copy, [name], rank=2, alpha=2.0, dropout=0.0)
    with torch.no_grad():
        layers[name].lora_A["default"].weight.fill_(0.25)
        layers[name].lora_B["default"].weight.fill_(0.001)
    old = model.get_parameter(f"{name}.weight")
    new = merged(model, layers)[f"{name}.weight"]
    assert new.dtype == torch.float32
    assert torch.allclose(new - old.float(), torch.full_like(new, 0.0005), atol=1e-6)
    stored = replaced(model, {f"{name}.weight": new}).get_parameter(f"{name}.weight")
    assert torch.equal(stored, (old.float() + 0.0005).to(torch.bfloat16))


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_updates_smaller_than_a_step_arrive_on_the_average(dtype: torch.dtype, step: float) -> None:
    """Of a tenth of a step every tenth value takes a whole one; rounding to nearest would leave nothing of it."""
    old = torch.tensor([1.0, -1.0]).repeat_interleave(20_000)
    found = stochastically_rounded(old * (1 + step / 10), dtype, 0)
    assert found.dtype == dtype
    moved = (found.float() - old).abs()
    assert set(moved.tolist()) == {0.0, step}
    assert float(moved.mean()) == pytest.approx(step / 10, rel=0.05)
    assert torch.equal(found, stochastically_rounded(old * (1 + step / 10), dtype, 0))
    assert not torch.equal(found, stochastically_rounded(old * (1 + step / 10), dtype, 1))
    held = torch.randn(1000).to(dtype)
    assert torch.equal(stochastically_rounded(held.float(), dtype, 0), held)
    assert torch.equal(stochastically_rounded(old, torch.float32, 0), old)


def test_a_method_that_trains_nothing_says_so() -> None:
    found = NoRecovery().recover(cast(RecoveryRequest, SimpleNamespace(model=nn.Linear(2, 2))))
    said = {"method": "none", "facts": found.facts, "training": {"tokens": 24_576}, "curve": (), "notes": ()}
    assert course_of(said) == "recovered by none without training"


def test_lora_without_maps_is_refused_beforehand() -> None:
    with pytest.raises(FlexiError, match="lora: maps is empty, expected some of query, key, value"):
        Lora(maps=()).check()


def test_of_the_smallest_float16_numbers_too_the_mean_is_the_value() -> None:
    step = 2.0**-24
    values = torch.tensor([3.0013e-5, -3.0013e-5, 1.4 * step, 0.1 * step]).repeat_interleave(20_000)
    found = stochastically_rounded(values, torch.float16, 0).float()
    means = found.view(4, -1).double().mean(1)
    assert (means - values.view(4, -1)[:, 0]).abs().max() < 0.02 * step
    assert (found - values).abs().max() <= step
    held = (torch.arange(-3000, 3000) * step).half()
    assert torch.equal(stochastically_rounded(held.float(), torch.float16, 0), held)


def test_a_small_update_of_a_bfloat16_model_is_not_lost(tmp_path: Path) -> None:
    """Trained at a rate at which no weight moves by half of bfloat16's step, it gains nearly what float32 weights do."""
    gains = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny().to(torch.bfloat16).to(dtype)
        quick = {**QUICK, "learning_rate": 2e-5}
        request = ask(tmp_path / str(dtype), model)
        found = Full(**quick, keep="last").recover(request).model
        with torch.no_grad():
            ids = request.text.ids
            gains[dtype] = sum(
                s * float(m.float()(input_ids=ids, labels=ids).loss) for s, m in ((1, model), (-1, found))
            )
    assert gains[torch.bfloat16] == pytest.approx(gains[torch.float32], rel=0.4)


# ---------------------------------------------------------------------------------------- adapters, full


def test_adapters_trains_what_the_replaced_blocks_have_of_their_own(tmp_path: Path) -> None:
    model, plan = shared()
    found = Adapters(**QUICK).recover(ask(tmp_path, model, plan=plan))
    gains = {name for name, _ in model.named_parameters() if "output_norm" in name}
    assert len(gains) == 4
    assert changed(found.model, model) == set(own_adapters(model)) | gains


def test_adapters_can_have_mergeable_lora_on_the_kept_blocks(tmp_path: Path) -> None:
    model, plan = shared()
    frozen = Adapters(**QUICK).recover(ask(tmp_path, model, plan=plan))
    found = Adapters(**QUICK, kept="lora").recover(ask(tmp_path, model, plan=plan))
    assert changed(found.model, model) == changed(frozen.model, model) | maps_of(model, (0, 1, 2))
    updates = sum(2 * (p.shape[0] + p.shape[1]) for n, p in model.named_parameters() if n in maps_of(model, (0, 1, 2)))
    assert found.facts["trained_parameters"] == frozen.facts["trained_parameters"] + updates  # rank 2, as the plan's


def test_adapters_without_replaced_blocks_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    reason = Adapters().refuses(ask(tmp_path).plan)
    assert reason
    assert "this plan has no such blocks; take a plan of share-lora or extend, or recover this one by lora" in reason


@pytest.mark.parametrize("make", [shared, uneven])
def test_full_trains_every_parameter(make: Callable[[], Made], tmp_path: Path) -> None:
    model, plan = make()
    found = Full(**QUICK).recover(ask(tmp_path, model, plan=plan))
    assert changed(found.model, model) == {name for name, _ in model.named_parameters()}


def test_full_keeps_a_tied_head_tied(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    found = Full(**QUICK).recover(ask(tmp_path, model)).model
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert not torch.equal(found.lm_head.weight, model.lm_head.weight)


# --------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_method_learns_on_the_same_budget_and_gives_back_the_same_modules(
    method: RecoveryMethod, dtype: str, tmp_path: Path
) -> None:
    model, plan = shared()
    model = model.to(getattr(torch, dtype))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    request = ask(tmp_path, model, plan=plan, text=text(64), tokens=64 * LENGTH, dtype=dtype)
    found = method.recover(request)
    after = found.model.state_dict()
    assert type(found.model) is type(model)
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    losses = [float(m(input_ids=request.held_out.ids, labels=request.held_out.ids).loss) for m in (model, found.model)]
    assert losses[1] < losses[0]
    best = min(point["held_out_loss"] for point in found.curve)
    assert losses[1] == pytest.approx(best, rel=1e-4 if dtype == "float32" else 0.05)
    assert found.facts["trained_tokens"] == 64 * LENGTH
    assert not found.notes


def test_defaults_are_the_papers() -> None:
    lora = Lora()
    assert (lora.rank, lora.alpha, lora.dropout, lora.learning_rate) == (8, 16, 0.05, 1e-4)
    assert (lora.schedule, lora.gradient_clip, lora.weight_decay, lora.keep) == ("linear", 1.0, 0.0, "best")
    assert lora.maps == ("query", "key", "value", "attention_output", "gate", "up", "down")
    assert (Adapters().learning_rate, Adapters().schedule, Adapters().kept) == (0.004, "cosine", "frozen")


# The same call in this process and in one that is killed: dropout, so that random numbers matter.
CALL = Lora(**{**QUICK, "warm_up": 0.25}, dropout=0.3, evaluate_every=2 * STEP, keep="last")


def call(folder: Path, progress: Any = silent) -> Recovered:
    model, plan = shared()
    return CALL.recover(ask(folder, model, plan=plan, progress=progress))


def killed(folder: str) -> None:
    call(Path(folder), killed_after(5 * STEP, lambda: os.kill(os.getpid(), signal.SIGKILL)))


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_process_that_was_killed_is_gone_on_with_in_another(tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    script = f"import test_recovery_methods as t; t.killed({str(tmp_path / 'killed')!r})"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert list(tmp_path.glob("killed/*/checkpoint-4/trainer_state.json"))
    resumed, whole = call(tmp_path / "killed"), call(tmp_path / "whole")
    assert replace(resumed, model=whole.model) == whole
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
