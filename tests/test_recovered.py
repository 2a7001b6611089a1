"""Recovered models as plans: what was trained is the plan's own, what was not is still known to be equal."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from tiny import attached_for, change, close, logits, opened, sharing, tiny, tokens
from torch import nn

from flexi_plugins import hookimpl, recovered
from flexi_plugins.cli import recover
from flexi_plugins.corpora.python_docs import PythonDocs
from flexi_plugins.corpora.training import training_text
from flexi_plugins.corpora.windows import overlapping, token_windows
from flexi_plugins.data import BlockRecipe, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution import blocks
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.schedule import count_blocks
from flexi_plugins.execution.sweep import Planned
from flexi_plugins.hookspecs import IGNORED, Recovered, RecoveryMethod, RecoveryRequest
from flexi_plugins.plugins import Plugins
from flexi_plugins.pruner import Pruner, Training
from flexi_plugins.recovered import planned_of
from flexi_plugins.rewrite import build_model, write_checkpoint
from flexi_plugins.studyfile import TrainingTable
from flexi_plugins.testing.bench import TinyPruner
from flexi_plugins.testing.models import tiny_checkpoint, tiny_tokenizer

IDS = tokens(3, 10)
KINDS = ("llama", "llama-tied", "llama-biases", "qwen2", "qwen3", "qwen3-biases")


def nudged(model: nn.Module, chosen: Callable[[str], bool]) -> nn.Module:
    """Replace the chosen parameters by others, as training does."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        if chosen(name):
            parent, _, last = name.rpartition(".")
            new = parameter + 0.05 * torch.randn(parameter.shape, generator=generator)
            setattr(model.get_submodule(parent), last, nn.Parameter(new, requires_grad=False))
    model.tie_weights()
    return model


def cut(shape: Any) -> PruningPlan:
    blocks = (
        BlockRecipe(parts=(Part(0),)),
        BlockRecipe(parts=(Part(2, (0, 1), tuple(range(8))),)),
        BlockRecipe(parts=(Part(4),)),
    )
    return PruningPlan(shape, blocks)


def trained(
    model: nn.Module, plan: PruningPlan, attached: Any, chosen: Callable[[str], bool]
) -> tuple[nn.Module, Planned]:
    checkpoint = opened(model)
    pruned = build_model(plan, checkpoint, attached)
    before = pruned.state_dict()
    after = nudged(pruned, chosen)
    return after, planned_of(after, Planned(plan, attached), before, checkpoint)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["all", "maps", "norms", "last", "outer"])
def test_the_plan_of_a_trained_model_is_that_model(kind, which, tmp_path):
    """Built in memory, written and loaded by transformers, and run by the engine."""
    from transformers import AutoModelForCausalLM

    chosen = {
        "all": lambda name: True,
        "maps": lambda name: "proj" in name,
        "norms": lambda name: "norm" in name,
        "last": lambda name: ".layers.2." in name,
        "outer": lambda name: ".layers." not in name,
    }[which]
    model = tiny(kind)
    checkpoint = opened(model)
    after, planned = trained(model, cut(checkpoint.shape), {}, chosen)
    assert torch.equal(logits(build_model(planned.plan, checkpoint, planned.attached), IDS), logits(after, IDS))
    write_checkpoint(planned.plan, checkpoint, planned.attached, tmp_path / "x")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval(), IDS), logits(after, IDS))
    assert PruningPlan.from_json(planned.plan.to_json()) == planned.plan
    own = TinyPruner(checkpoint, Plugins.load())
    own.__dict__["texts"] = (IDS, IDS, "ids")
    expected = float(after(input_ids=IDS, labels=IDS).loss)
    assert own.calibrator.losses([planned])[0] == pytest.approx(expected, rel=1e-5)


def test_blocks_that_were_not_trained_are_still_shared_with_other_plans():
    model = tiny()
    plan = cut(opened(model).shape)
    _, planned = trained(model, plan, {}, lambda name: ".layers.2." in name)
    assert planned.plan.blocks[:2] == plan.blocks[:2]
    assert count_blocks([plan, planned.plan]) == (4, 6)
    _, other = trained(model, plan, {}, lambda name: "embed" in name)
    assert count_blocks([plan, other.plan]) == (6, 6)


def test_a_trained_donor_changes_the_blocks_that_run_with_its_weights():
    """Adapters, output norms and own norms are trained too; the sharing block is another block for the engine."""
    model = tiny()
    checkpoint = opened(model)
    plan, attached = attached_for(sharing(checkpoint.shape, {3: 1}))
    after, planned = trained(model, plan, attached, lambda name: ".layers.1." in name or ".layers.3." in name)
    assert planned.plan.blocks[3].shares == 1
    assert planned.plan.donor(3) == 1
    assert planned.plan.stored_parameters == plan.stored_parameters
    built = build_model(planned.plan, checkpoint, planned.attached)
    assert torch.equal(logits(built, IDS), logits(after, IDS))
    _, donor_alone = trained(model, plan, attached, lambda name: ".layers.1." in name)
    assert donor_alone.plan.key(3) != plan.key(3)


def test_a_model_with_other_modules_is_no_recovered_model():
    model = tiny()
    checkpoint = opened(model)
    pruned = build_model(cut(checkpoint.shape), checkpoint)
    before = pruned.state_dict()
    pruned.model.layers[0].mlp.extra = nn.Linear(2, 2)
    with pytest.raises(FlexiError, match=r"extra.bias' is in the recovered model alone; .*merge adapters"):
        planned_of(pruned, Planned(cut(checkpoint.shape)), before, checkpoint)


def test_trained_tensors_must_be_finite():
    model = tiny()
    checkpoint = opened(model)
    pruned = build_model(cut(checkpoint.shape), checkpoint)
    before = pruned.state_dict()
    pruned.model.layers[0].input_layernorm.weight = nn.Parameter(torch.full((32,), torch.nan), requires_grad=False)
    with pytest.raises(FlexiError, match=r"trained tensor 'blocks.0.attention_norm' is not finite"):
        planned_of(pruned, Planned(cut(checkpoint.shape)), before, checkpoint)


def test_own_outer_tensors_compose_and_name_the_head_only_where_there_is_one():
    tied, untied = opened(tiny("llama-tied")).shape, opened(tiny()).shape
    with pytest.raises(FlexiError, match="expected some of"):
        replace(PruningPlan.identity(tied), own=("head",))
    plan = replace(PruningPlan.identity(untied), own=("head",), tensors=(("outer.head", "a" * 64),))
    removed = plan.compose(PruningPlan.keep(untied, (0, 2)))
    assert (removed.own, removed.tensors) == (("head",), (("outer.head", "a" * 64),))
    assert not plan.is_identity
    narrower = change(PruningPlan.identity(untied), {1: BlockRecipe(parts=(Part(1, (0,)),))})
    assert plan.compose(narrower).own == ("head",)


def test_a_change_that_a_plan_has_no_place_for_is_no_silent_loss(monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    places = recovered._places
    monkeypatch.setattr(recovered, "_places", lambda *a: {n: p for n, p in places(*a).items() if "norm" not in n})
    with pytest.raises(FlexiError, match=r"tensor 'model.norm.weight' was changed, and a plan has no place for it"):
        trained(model, cut(opened(model).shape), {}, lambda name: name == "model.norm.weight")


@pytest.mark.parametrize("held", [1, 4])
def test_plans_with_heads_of_their_own_have_theirs_however_few_are_held(held: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "OUTERS", held)
    model = tiny()
    checkpoint = opened(model)
    made = Blocks(checkpoint)
    models = []
    for factor in (0.5, 1.5, 2.0):
        pruned = build_model(PruningPlan.identity(checkpoint.shape), checkpoint)
        before = pruned.state_dict()
        pruned.lm_head.weight = nn.Parameter(pruned.lm_head.weight * factor, requires_grad=False)
        models.append(planned_of(pruned, Planned(PruningPlan.identity(checkpoint.shape)), before, checkpoint))
    states = torch.randn(2, 32)
    expected = made.logits(states)
    for planned, factor in [*zip(models, (0.5, 1.5, 2.0), strict=True)] * 2:
        assert close(made.logits(states, planned.plan, planned.attached), expected * factor)
    assert len(made._outers) == min(held, 3)


# ---------------------------------------------------------------------------------------- the pruner


@dataclass(frozen=True)
class Nudge:
    """Adds a little to the last norm, and asks the teacher."""

    name: ClassVar[str] = "nudge"
    paper: ClassVar[str] = ""
    interleaved: ClassVar[bool] = False

    def check(self) -> None:
        pass

    def refuses(self, plan: PruningPlan) -> str | None:
        return None

    def recover(self, request: RecoveryRequest) -> Recovered:
        states = request.teacher(request.text.ids[:2], [-1, 3])
        assert states[3].shape == (*request.text.ids[:2].shape, 72)
        nudged(request.model, lambda name: name == "model.norm.weight")
        return Recovered(request.model, ({"tokens": 0.0, "loss": 1.0},), {"bits": 4.0}, ("a note",))


class Nudging:
    """A plugin with the method."""

    @hookimpl
    def recovery_methods(self) -> list[RecoveryMethod]:
        return [Nudge()]


@pytest.fixture
def own(tmp_path: Path) -> TinyPruner:
    plugins = Plugins.load()
    plugins.add(Nudging(), "nudging")
    made = TinyPruner(tiny_checkpoint(), plugins)
    made.__dict__["tokenizer"] = tiny_tokenizer()
    return made


def test_what_was_done_stands_in_the_origin_of_the_plan(own: TinyPruner, tmp_path: Path) -> None:
    plan = PruningPlan.keep(own.checkpoint.shape, (0, 1, 3))
    setting = Training(length=16, tokens=64, held_out=2)
    found = own.recover(plan, "nudge", setting, tmp_path / "training")
    assert found.plan.own == ("final_norm",)
    said = found.plan.origin["recovery"]
    assert (said["method"], said["facts"], said["notes"]) == ("nudge", {"bits": 4.0}, ["a note"])
    assert said["training"]["tokens"] == 64
    assert PruningPlan.from_json(found.plan.to_json()).origin == found.plan.origin


def test_a_second_training_keeps_what_is_said_of_the_first(own: TinyPruner, tmp_path: Path) -> None:
    setting = Training(length=16, tokens=64, held_out=2)
    once = own.recover(PruningPlan.keep(own.checkpoint.shape, (0, 1, 3)), "nudge", setting, tmp_path / "a")
    twice = own.recover(once, "nudge", replace(setting, tokens=32), tmp_path / "b").plan.origin["recovery"]
    assert twice["training"]["tokens"] == 32
    assert twice["earlier"] == once.plan.origin["recovery"]


def test_a_trained_plan_without_its_tensors_is_not_made_anew_without_training(own: TinyPruner, tmp_path: Path) -> None:
    setting = Training(length=16, tokens=64, held_out=2)
    found = own.recover(PruningPlan.keep(own.checkpoint.shape, (0, 1, 3)), "nudge", setting, tmp_path)
    with pytest.raises(
        FlexiError, match=r"it was trained, and its 1 tensors .* are missing; they lie in the file beside"
    ):
        own.attach(found.plan)


def test_text_to_train_on_and_text_to_choose_by_share_no_window_and_are_not_what_is_measured(own: TinyPruner) -> None:
    setting = Training(length=16, tokens=160, held_out=5)
    text, held_out, _ = own.training_texts(setting)
    assert (len(text.ids), len(held_out.ids)) == (10, 5)
    measured, _ = token_windows(PythonDocs(), "held-out", None, own.tokenizer, 16, 200)
    found = [{tuple(w) for w in part.tolist()} for part in (text.ids, held_out.ids, torch.tensor(measured))]
    assert len(found[0] | found[1] | found[2]) == sum(map(len, found))
    fitted, _ = token_windows(PythonDocs(), "calibration", None, own.tokenizer, 16, 5, own.seed)
    assert {tuple(w) for w in fitted}.isdisjoint(found[1]), "calibration of the same seed and length"
    longer, same, _ = own.training_texts(replace(setting, tokens=320))
    assert torch.equal(same.ids, held_out.ids)
    assert torch.equal(longer.ids[:10], text.ids)


def test_windows_of_calibration_are_trained_on_before_they_choose_a_state(own: TinyPruner) -> None:
    setting = Training(length=16, tokens=160, held_out=5)
    text, held_out, found = own.training_texts(setting)
    windows = torch.cat([held_out.ids[1:3], text.ids[:1]])
    for length in (8, 16):  # of such short pieces nobody can say where they stand
        own._texts.clear()
        own.texts = windows[:, :length], held_out.ids, ""
        again, chosen, other = own.training_texts(setting)
        assert (other == found) == torch.equal(chosen.ids, held_out.ids) == (length == 8)
    assert torch.equal(chosen.ids, torch.cat([held_out.ids[[0, 3, 4]], text.ids[1:3]]))
    assert torch.equal(again.ids, torch.cat([text.ids[3:], held_out.ids[1:3], text.ids[:1]]))


def test_it_is_said_where_only_windows_of_calibration_are_left_to_choose_by(
    own: TinyPruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, said = Training(length=16, tokens=0, held_out=5), []
    windows = own.training_texts(setting)[1].ids[:2]
    monkeypatch.setattr(own.progress, "say", said.append)
    for length, begin in (
        (16, "training: 2 of 5 windows that decide which state is kept are windows of calibration"),
        (8, "training: which windows of 16 tokens share some with those of calibration"),
    ):
        own.texts = windows[:, :length], torch.zeros(1, 1), ""
        own._texts.clear()
        said.clear()
        own.training_texts(setting)
        assert len(said) == 1
        assert said[0].startswith(begin)


@pytest.mark.parametrize(("length", "other"), [(16, 48), (48, 16), (32, 48), (32, 32)])
def test_windows_of_one_text_that_share_tokens_are_known(length: int, other: int) -> None:
    text = torch.arange(960)
    windows, others = text.view(-1, length), text.view(-1, other)[[2, 7]]
    shared = {i for i, row in enumerate(windows) if set(row.tolist()) & set(others.flatten().tolist())}
    assert overlapping(windows, others) == shared
    assert overlapping(windows, text.view(-1, 40)) is None


def test_it_is_said_where_a_plan_was_calibrated_on_other_windows_of_the_text(
    own: TinyPruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether these windows choose a state is not known: the plan says which text, not which windows."""
    setting, said = Training(length=16, tokens=64, held_out=2), []
    plan = own.plan("flexigpt", "remove-blocks", 0.2)
    assert plan.origin["calibration"].items() >= {"corpus": "python-docs", "seed": 0, "windows": 16}.items()
    own.texts = torch.zeros(1, 16, dtype=torch.long), *own.texts[1:]
    monkeypatch.setattr(own.progress, "say", said.append)
    own.recover(plan, "nudge", setting, tmp_path / "a")
    assert said == []
    own.seed = 1
    own.recover(plan, "nudge", setting, tmp_path / "b")
    assert said[0].startswith("training: the plan was calibrated on 16 windows of 256 tokens of python-docs (seed 0)")
    said.clear()
    elsewhere = replace(plan, origin={**plan.origin, "calibration": {**plan.origin["calibration"], "corpus": "c4"}})
    own.recover(elsewhere, "nudge", setting, tmp_path / "c")
    own.recover(replace(plan, origin={}), "nudge", setting, tmp_path / "d")
    assert said == []


@pytest.mark.parametrize(("name", "least"), [("length", 2), ("tokens", 0), ("held_out", 1)])
def test_numbers_that_no_text_has_are_refused(name: str, least: int) -> None:
    with pytest.raises(FlexiError, match=rf"training: {name} = {least - 1}, expected {least} or more"):
        Training(**{name: least - 1})


def test_a_budget_of_less_than_a_window_is_refused() -> None:
    """Before a search that may take hours."""
    with pytest.raises(FlexiError, match="training: tokens = 20, expected 32 or more"):
        Training(length=32, tokens=20)
    with pytest.raises(ValidationError, match="tokens = 20, expected a window of 32 at least"):
        TrainingTable(length=32, tokens=20)
    assert Training(length=32, tokens=0).tokens == 0


def test_the_teachers_states_are_those_of_the_original(own: TinyPruner) -> None:
    model, seen = own.model(PruningPlan.identity(own.checkpoint.shape)), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: seen.append(out))
    ids = own.texts[0][:2]
    logits(model, ids)
    assert close(own.teacher(ids, [-1])[-1], model.model.embed_tokens(ids))
    found = own.teacher(ids, [-1, 0, 4])
    assert close(found[-1], model.model.embed_tokens(ids))
    assert close(found[0], seen[0])
    assert close(found[4], seen[4])


# ---------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Instructions:
    """Documents with a prompt and a response."""

    given: tuple[str, ...] = ("ask:a>yes", "ask:bb>no", "ask:c>maybe")

    name: ClassVar[str] = "instructions"
    licence: ClassVar[str] = ""
    provenance: ClassVar[str] = ""
    join: ClassVar[str] = "\n"
    response: ClassVar[str] = ">"

    def texts(self, split: str, data: Path | None) -> tuple[str, ...]:
        return self.given


def test_of_instructions_only_the_response_has_a_loss() -> None:
    tokenizer = tiny_tokenizer()
    seed = 4  # which leaves three windows in their order
    text, _ = training_text(Instructions(), "calibration", None, tokenizer, 10, 3, seed)
    ids, labels = text.ids.flatten().tolist(), text.labels.flatten().tolist()
    stream = "ask:a>yes|ask:bb>no|ask:c>maybe|"
    expected = [tokenizer.eos_token_id if c == "|" else tokenizer(c)["input_ids"][0] for c in stream][:30]
    assert ids == expected
    kept = "".join("_" if label == IGNORED else c for c, label in zip(stream, labels, strict=False))
    assert kept == "______yes|_______no|______mayb"[:30]


def test_which_windows_of_instructions_were_for_calibration_cannot_be_told(
    own: TinyPruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are packed in another way to train on, so that finding none shared would say nothing."""
    setting, said = Training(length=16, tokens=160, held_out=5), list[str]()
    text, _, _ = own.training_texts(setting)
    monkeypatch.setattr(own.progress, "say", said.append)
    assert own._calibrated(setting, text, plain=False) == set()
    assert "cannot be told" in said[0]


def test_a_document_is_tokenised_as_a_whole_with_what_begins_a_text() -> None:
    """As LLaMA's tokenizer does: a mark in front of the first word alone, so that no response begins with one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<s>", "</s>", *"\u2581abcesyno:>"]
    made = Tokenizer(models.BPE(vocab={mark: i for i, mark in enumerate(marks)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    text, _ = training_text(Instructions(("a:b>yes", "c:>", "c:>no")), "calibration", None, tokenizer, 18, 1, 0)
    said = [
        "".join(marks[i] if i >= 0 else "_" for i in row) for row in (text.ids[0].tolist(), text.labels[0].tolist())
    ]
    assert said[0] == "<s>\u2581a:b>yes</s><s>\u2581c:>no</s>"[: len(said[0])]
    assert said[1].strip("_").replace("_", "") == "yes</s>no</s>"
    assert said[1].startswith("______yes</s>_____no</s>")


def test_plain_text_has_a_loss_everywhere_and_an_order_of_its_seed() -> None:
    from flexi_plugins.corpora.python_docs import PythonDocs

    texts = [training_text(PythonDocs(), "calibration", None, tiny_tokenizer(), 16, 4, seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(texts[0].ids, texts[0].labels)
    assert torch.equal(texts[0].ids, texts[1].ids)
    assert not torch.equal(texts[0].ids, texts[2].ids)


def test_what_is_wrong_with_a_text_is_said() -> None:
    with pytest.raises(FlexiError, match="expected at least 9 windows of 10 tokens, found 32 tokens"):
        training_text(Instructions(), "calibration", None, tiny_tokenizer(), 10, 9, 0)
    with pytest.raises(FlexiError, match="no document has a response behind '>'"):
        training_text(Instructions(("ask",)), "calibration", None, tiny_tokenizer(), 2, 1, 0)
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(FlexiError, match="the tokenizer has no end-of-text token"):
        training_text(Instructions(), "calibration", None, endless, 10, 3, 0)


@pytest.mark.real
def test_the_default_text_is_enough_for_the_default_training() -> None:
    """Whether asked for by the command line, a study file or in Python."""
    setting = Training()
    text, held_out, _ = Pruner("smollm2-135m").training_texts(setting)
    assert text.ids.numel() == setting.tokens
    assert held_out.ids.shape == (setting.held_out, setting.length)
    assert TrainingTable().model_dump() == asdict(setting)
    options = inspect.signature(recover).parameters
    assert (options["tokens"].default, options["length"].default) == (setting.tokens, setting.length)
    assert (options["training_corpus"].default, options["held_out"].default) == (setting.corpus, setting.held_out)
