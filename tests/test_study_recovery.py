"""Studies with recovery: one plan for all recoveries, trained once, and evaluated as any other plan."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from studies import make_study, plugins_with, run_study, values
from torch import nn

from flexi_plugins.data import BlockShape, ModelShape, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Recovered, RecoveryRequest
from flexi_plugins.plugins import Plugins
from flexi_plugins.pruner import Pruner, count_only
from flexi_plugins.recovery.refusal import refusal
from flexi_plugins.reports import ranking
from flexi_plugins.store import rows
from flexi_plugins.studyfile import read_study

MERGES = '{ name = "concat-merge", merges = 2 }'


@dataclass(frozen=True)
class Quieter:
    """Trains nothing: halves the output map of the last block, and counts its calls."""

    factor: float = 0.5

    calls: ClassVar[list[str]] = []
    name: ClassVar[str] = "quieter"
    paper: ClassVar[str] = ""
    interleaved: ClassVar[bool] = False

    def check(self) -> None:
        if self.factor < 0:
            raise FlexiError(f"{self.name}: factor = {self.factor}, expected 0 or more")

    def refuses(self, plan: PruningPlan) -> str | None:
        return None

    def recover(self, request: RecoveryRequest) -> Recovered:
        self.calls.append(str(request.folder))
        assert request.text.ids.shape == (2, 32)
        assert request.held_out.ids.shape == (1, 32)
        linear: Any = request.model.get_submodule("model.layers")[-1]
        linear.mlp.down_proj.weight = nn.Parameter(linear.mlp.down_proj.weight * self.factor, requires_grad=False)
        return Recovered(request.model, ({"tokens": 64.0, "loss": 2.0, "held_out_loss": 3.0},), {"halved": 1.0})


@dataclass(frozen=True)
class Unable(Quieter):
    """Fails."""

    name: ClassVar[str] = "unable"

    def recover(self, request: RecoveryRequest) -> Recovered:
        raise FlexiError("unable: this went wrong")


@dataclass(frozen=True)
class Picky(Quieter):
    """Finds nothing to train."""

    name: ClassVar[str] = "picky"

    def refuses(self, plan: PruningPlan) -> str | None:
        return f"picky: {len(plan.blocks)} blocks are not enough"


@dataclass(frozen=True)
class Interleaved(Quieter):
    """Is called behind every step, and leaves a file and a checkpoint."""

    interleaved: ClassVar[bool] = True
    seen: ClassVar[list[tuple[int, RecoveryRequest]]] = []
    name: ClassVar[str] = "interleaved"

    def recover(self, request: RecoveryRequest) -> Recovered:
        self.seen.append((len(request.plan.blocks), request))
        (request.folder / "checkpoint-1").mkdir(parents=True)
        linear: Any = request.model.get_submodule("model.layers")[-1]
        linear.mlp.down_proj.weight = nn.Parameter(linear.mlp.down_proj.weight * 0.5, requires_grad=False)
        facts = {"trained_tokens": float(request.tokens), "bits": 4.0}
        (request.folder / "packed.bin").write_text(str(len(request.plan.blocks)))
        return Recovered(request.model, ({"tokens": 0.0}, {"tokens": float(request.tokens)}), facts, ("one",))


@dataclass(frozen=True)
class Hesitant(Interleaved):
    """Is called behind every step but those whose plans it refuses: five blocks are too many."""

    seen: ClassVar[list[tuple[int, RecoveryRequest]]] = []
    name: ClassVar[str] = "hesitant"

    def refuses(self, plan: PruningPlan) -> str | None:
        return "hesitant: five are too many" if len(plan.blocks) == 5 else None


@dataclass(frozen=True)
class Leaves(Quieter):
    """Leaves a file beside its checkpoints."""

    name: ClassVar[str] = "leaves"

    def recover(self, request: RecoveryRequest) -> Recovered:
        (request.folder / "checkpoint-1").mkdir(parents=True)
        (request.folder / "packed.bin").write_text("bits")
        (request.folder / f"packed.bin.{os.getpid()}.tmp").write_text("of a process that was killed")
        return super().recover(request)


def study(folder: Path, model: Path, text: Path, recovery: str, strategy: str = "remove-blocks") -> Path:
    training = f'\n[training]\ncorpus = "file:{text}"\nlength = 32\ntokens = 64\nheld_out = 1\n'
    return make_study(folder / "s.toml", model, text, ["come"], [strategy], more=recovery, end=training)


def test_recoveries_share_a_plan_and_differ_in_what_is_trained(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quieter, planned, make = Quieter(), [], Pruner.make
    monkeypatch.setattr(Pruner, "make", lambda self, *a: planned.append(a) or make(self, *a))
    file = study(tmp_path, model, text, 'recovery = ["none", "quieter", { name = "quieter", factor = 0.25 }]')
    records = run_study(file, tmp_path / "run", plugins_with(recovery_methods=[quieter]))
    _dense, none, half, quarter = records
    assert len(planned) == 1
    assert [r.cell.recovery for r in records] == ["none", "none", "quieter", "quieter"]
    assert {r.status for r in records} == {"complete"}
    assert none.plan.blocks[:-1] == half.plan.blocks[:-1]
    assert half.plan.blocks[-1].own == ("down.weight",)
    assert half.plan.origin["recovery"]["facts"] == {"halved": 1.0}
    assert quarter.plan.origin["recovery"]["options"]["factor"] == 0.25
    assert len({r.measurements[0].value for r in (none, half, quarter)}) == 3
    drawn = (tmp_path / "run" / "curves.svg").read_text()
    assert all(f"<!-- come x remove-blocks x factor={factor} x quieter -->" in drawn for factor in (0.5, 0.25))


def test_the_recovered_models_numbers_are_those_of_the_model(model: Path, text: Path, tmp_path: Path) -> None:
    file = study(tmp_path, model, text, 'recovery = ["quieter"]\ndense = false')
    plugins = plugins_with(recovery_methods=[Quieter()])
    (record,) = run_study(file, tmp_path / "run", plugins)
    pruner = Pruner(str(model), dtype="float32", plugins=plugins)
    plan = record.plan
    plain = pruner.model(type(plan).keep(plan.shape, [r.sources[0] for r in plan.blocks]))
    down = plain.model.layers[-1].mlp.down_proj
    down.weight = nn.Parameter(down.weight * 0.5)
    from flexi_plugins.corpora.files import file_corpus
    from flexi_plugins.corpora.windows import token_windows

    windows, _ = token_windows(file_corpus(text), "held-out", None, pruner.tokenizer, 128, 4)
    ids = torch.tensor(windows)
    with torch.no_grad():
        expected = float(plain(input_ids=ids, labels=ids).loss.exp())
    assert record.measurements[0].value == pytest.approx(expected, rel=1e-3)


def test_what_was_trained_is_not_trained_again(model: Path, text: Path, tmp_path: Path) -> None:
    plugins = plugins_with(recovery_methods=[Quieter()])
    file = study(tmp_path, model, text, 'recovery = ["quieter"]')
    before = len(Quieter.calls)
    first = run_study(file, tmp_path / "run", plugins)
    for record in (tmp_path / "run" / "records").glob("*.json"):
        record.unlink()
    again = run_study(file, tmp_path / "run", plugins)
    assert len(Quieter.calls) == before + 1
    assert values(first) == values(again)


@dataclass(frozen=True)
class Confused(Quieter):
    """Cannot say whether it has something to train."""

    name: ClassVar[str] = "confused"

    def refuses(self, plan: PruningPlan) -> str | None:
        raise KeyError("blocks")


def test_a_method_that_fails_or_finds_nothing_to_train_stops_no_other_cell(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = study(tmp_path, model, text, 'recovery = ["confused", "unable", "picky", "quieter"]\ndense = false')
    plugins = plugins_with(recovery_methods=[Quieter(), Unable(), Picky(), Confused()])
    confused, unable, picky, quieter = run_study(file, tmp_path / "run", plugins)
    assert (confused.status, confused.reason) == ("failed", "KeyError: 'blocks'")
    assert (unable.status, unable.reason) == ("failed", "unable: this went wrong")
    assert (picky.status, picky.reason) == ("incompatible", "picky: 4 blocks are not enough")
    assert quieter.status == "complete"
    monkeypatch.setattr(Pruner, "make", lambda self, *a: pytest.fail("the plan is there"))
    run_study(file, tmp_path / "run", plugins)


def test_options_of_a_recovery_are_checked_before_anything_is_loaded(model: Path, text: Path, tmp_path: Path) -> None:
    wrong = '{ name = "lora", rank = 0, dropout = 1.0, maps = ["x"] }, { name = "quieter", factor = -1.0 }'
    file = study(tmp_path, model, text, f"recovery = [{wrong}]")
    with pytest.raises(FlexiError) as caught:
        read_study(file, plugins_with(recovery_methods=[Quieter()]))
    assert "lora: rank = 0, expected 1 or more; dropout = 1.0, expected 0 <= dropout < 1; unknown map 'x'" in str(
        caught.value
    )
    assert "quieter: factor = -1.0, expected 0 or more" in str(caught.value)


def test_the_seconds_of_a_training_are_those_it_took_when_it_was_trained(
    model: Path, text: Path, tmp_path: Path
) -> None:
    file = study(tmp_path, model, text, 'recovery = ["quieter"]\ndense = false')
    plugins = plugins_with(recovery_methods=[Quieter()])
    (first,) = run_study(file, tmp_path / "run", plugins)
    for record in (tmp_path / "run" / "records").glob("*.json"):
        record.unlink()
    (again,) = run_study(file, tmp_path / "run", plugins)
    stages = ("statistics", "plan", "recovery")
    assert [again.seconds[s] for s in stages] == [first.seconds[s] for s in stages]


def test_the_seeds_of_a_trained_method_are_one_method(model: Path, text: Path, tmp_path: Path) -> None:
    """Each draws a text of its own, and the plans are as equal as the seeds make them."""
    file = study(tmp_path, model, text, 'recovery = ["none", "quieter"]\nseeds = [0, 1]')
    records = run_study(file, tmp_path / "run", plugins_with(recovery_methods=[Quieter()]))
    texts = [r.plan.origin["recovery"]["training"]["text"] for r in records if r.cell.recovery == "quieter"]
    assert len(set(texts)) == 2
    board = ranking.ranked(rows(records)).to_dict("records")
    found = sorted((r["recovery"], r["seeds"], r["variant"]) for r in board[1:])
    assert found == [("none", "0 1", ""), ("quieter", "0 1", "")]
    ((before, after),) = ranking.before_and_after(ranking.methods(rows(records)))
    assert (before["seeds"], after["seeds"]) == ("0 1", "0 1")


def test_models_as_they_were_pruned_are_measured_before_any_is_trained(model: Path, text: Path, tmp_path: Path) -> None:
    file = study(tmp_path, model, text, 'recovery = ["quieter", "none"]')
    seen: list[set[str]] = []

    class Looking(Quieter):
        name: ClassVar[str] = "quieter"

        def recover(self, request: RecoveryRequest) -> Recovered:
            seen.append({p.name.split("-s0")[0] for p in (tmp_path / "run" / "records").glob("*.json")})
            return super().recover(request)

    run_study(file, tmp_path / "run", plugins_with(recovery_methods=[Looking()]))
    assert [len(names) for names in seen] == [2]


def test_records_without_recovery_are_what_they_were_before_there_was_any(
    model: Path, text: Path, tmp_path: Path
) -> None:
    file = make_study(tmp_path / "a.toml", model, text, ["come"], ["remove-blocks"])
    (_, plain) = run_study(file, tmp_path / "run")
    assert "training" not in plain.cell.options
    assert "recovery" not in plain.cell.options
    assert not (tmp_path / "run" / "curves.svg").exists()


def test_an_interleaved_method_trains_behind_every_step_on_its_share_of_the_text(
    model: Path, text: Path, tmp_path: Path
) -> None:
    file = study(tmp_path, model, text, 'recovery = ["interleaved"]\ndense = false', MERGES)
    Interleaved.seen.clear()
    (record,) = run_study(file, tmp_path / "run", plugins_with(recovery_methods=[Interleaved()]))
    assert record.status == "complete", record.reason
    (first, one), (second, other) = Interleaved.seen
    assert (first, second) == (5, 4)
    assert one.tokens == other.tokens == 32
    assert not torch.equal(one.text.ids, other.text.ids)
    assert not any(r.own for r in one.plan.blocks)
    assert any(r.own for r in other.plan.blocks)  # what the first training changed is known to the second
    said = record.plan.origin["recovery"]
    assert [point["tokens"] for point in said["curve"]] == [0, 32, 32, 64]
    assert said["facts"] == {"trained_tokens": 64.0, "bits": 4.0, "trainings": 2, "tokens_before_last": 32.0}
    assert said["notes"] == ["one", "one"]
    (kept,) = (tmp_path / "run" / "plans").glob("*.packed.bin")
    assert kept.read_text() == "4"  # what the last training left


def test_a_step_whose_plan_an_interleaved_method_refuses_is_not_trained(
    model: Path, text: Path, tmp_path: Path
) -> None:
    file = study(tmp_path, model, text, 'recovery = ["hesitant"]\ndense = false', MERGES)
    Hesitant.seen.clear()
    (record,) = run_study(file, tmp_path / "run", plugins_with(recovery_methods=[Hesitant()]))
    assert record.status == "complete", record.reason
    assert [blocks for blocks, _ in Hesitant.seen] == [4]
    said = record.plan.origin["recovery"]
    assert said["notes"] == ["step 1 is not trained: hesitant: five are too many", "one"]
    assert said["facts"]["trained_tokens"] == 32


def test_what_does_not_come_out_even_goes_to_the_later_steps(model: Path, text: Path, tmp_path: Path) -> None:
    file = study(tmp_path, model, text, 'recovery = ["interleaved"]\ndense = false', MERGES)
    file.write_text(file.read_text().replace("tokens = 64", "tokens = 96"))
    Interleaved.seen.clear()
    (record,) = run_study(file, tmp_path / "run", plugins_with(recovery_methods=[Interleaved()]))
    assert record.status == "complete", record.reason
    assert [request.tokens for _, request in Interleaved.seen] == [32, 64]


def test_too_few_tokens_for_the_steps_of_an_interleaved_method_are_an_error(
    model: Path, text: Path, tmp_path: Path
) -> None:
    file = study(tmp_path, model, text, 'recovery = ["interleaved"]\ndense = false', MERGES.replace("2", "3"))
    (record,) = run_study(file, tmp_path / "run", plugins_with(recovery_methods=[Interleaved()]))
    assert "expected at least 96 tokens" in record.reason


def test_distillation_after_each_merge_goes_on_with_the_trained_model(model: Path, text: Path, tmp_path: Path) -> None:
    recovery = """recovery = [
      { name = "distill", keep = "last", batch_tokens = 32, learning_rate = 0.01, divergence = 1e9 },
      { name = "distill", when = "each", keep = "last", batch_tokens = 32, learning_rate = 0.01, divergence = 1e9 },
    ]
    dense = false"""
    file = study(tmp_path, model, text, recovery, MERGES)
    end, each = run_study(file, tmp_path / "run")
    assert (end.status, each.status) == ("complete", "complete"), (end.reason, each.reason)
    assert end.plan.origin["recovery"]["facts"]["trained_blocks"] == 2
    assert each.plan.origin["recovery"]["facts"]["trainings"] == 2
    assert [p["tokens"] for p in each.plan.origin["recovery"]["curve"]][-1] == 64
    assert sum(bool(r.own) for r in each.plan.blocks) == 2
    assert end.measurements[0].value != each.measurements[0].value


@pytest.mark.parametrize("refused", [True, False])
def test_merges_of_merged_blocks_are_refused_where_each_is_trained(refused: bool) -> None:
    plugins = Plugins.load()
    method = plugins.get("recovery", "distill", {"when": "each"})
    merges = plugins.get("strategy", "concat-merge", {"repeat": refused, "merges": 2})
    plan = count_only(ModelShape((BlockShape(2, 1, 8, 16),) * 6, hidden=16, vocabulary=32, tied=True), merges, 0.0)
    reason = refusal(method, plan, merges)
    assert (reason is not None) == refused
    assert (
        not refused
        or "concat-merge with these options merges a block again that was merged and trained before" in reason
    )
    assert refusal(plugins.get("recovery", "distill"), plan, merges) is None


def test_a_training_that_was_stopped_is_named_in_the_leaderboard(model: Path, text: Path, tmp_path: Path) -> None:
    """Whatever became of the perplexity: its row is of fewer tokens than the others."""
    wild = '{ name = "lora", learning_rate = 100.0, batch_tokens = 32, divergence = 1.01 }'
    file = study(tmp_path, model, text, f'recovery = ["none", "quieter", {wild}]\ndense = false')
    records = run_study(file, tmp_path / "run", plugins_with(recovery_methods=[Quieter()]))
    assert {r.status for r in records} == {"complete"}
    page = (tmp_path / "run" / "LEADERBOARD.md").read_text()
    said = "lora: training was stopped after 32 of 64 tokens, where the held-out loss went from "
    assert f"come x remove-blocks x lora at 0.2 was not trained as it was to be: {said}" in page
    assert page.count("was not trained as it was to be") == 1


def test_a_quantised_models_record_says_what_is_packed_and_that_nothing_runs_packed(
    model: Path, text: Path, tmp_path: Path
) -> None:
    file = study(tmp_path, model, text, 'recovery = [{ name = "group-quant", group_size = 8 }]\ndense = false')
    (record,) = run_study(file, tmp_path / "run")
    assert record.status == "complete", record.reason
    said = record.plan.origin["recovery"]
    assert any("MiB packed" in note and "Nothing runs packed" in note for note in said["notes"])
    (file,) = (tmp_path / "run" / "plans").glob("*.weights.packed")
    assert said["facts"]["packed_bytes"] <= file.stat().st_size
    table = rows([record])
    assert table["packed_mib"][0] == pytest.approx(said["facts"]["stored_bytes"] / 2**20)
    assert table["bits_per_weight"][0] == said["facts"]["bits_per_weight"]
    assert "Nothing runs packed" in table["recovery_note"][0]


def test_what_a_method_leaves_beside_its_checkpoints_is_kept_with_the_plan(
    model: Path, text: Path, tmp_path: Path
) -> None:
    file = study(tmp_path, model, text, 'recovery = ["leaves"]\ndense = false')
    run_study(file, tmp_path / "run", plugins_with(recovery_methods=[Leaves()]))
    (kept,) = (tmp_path / "run" / "plans").glob("*.packed.bin")
    assert kept.read_text() == "bits"
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert not list((tmp_path / "run" / "training").iterdir())


def test_checkpoints_that_a_killed_study_did_not_remove_go_with_the_next_run(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = study(tmp_path, model, text, 'recovery = ["leaves"]\ndense = false')
    plugins = plugins_with(recovery_methods=[Leaves()])
    remove = shutil.rmtree

    def killed(folder: Any, **options: Any) -> None:
        if Path(folder).parent.name == "training":
            raise KeyboardInterrupt
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run_study(file, tmp_path / "run", plugins)
    monkeypatch.undo()
    assert list((tmp_path / "run" / "training").iterdir())
    run_study(file, tmp_path / "run", plugins)
    assert not list((tmp_path / "run" / "training").iterdir())
