"""Studies with recovery: one plan for all recoveries, trained once, and evaluated as any other plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from studies import make_model, make_study, make_text, plugins_with, run_study, values
from torch import nn

from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Recovered, RecoveryRequest
from flexi_plugins.pruner import Pruner


@dataclass(frozen=True)
class Quieter:
    """Trains nothing: halves the output map of the last block, and counts its calls."""

    factor: float = 0.5

    calls: ClassVar[list[str]] = []
    name: ClassVar[str] = "quieter"
    paper: ClassVar[str] = ""

    def recover(self, request: RecoveryRequest) -> Recovered:
        self.calls.append(str(request.folder))
        assert request.text.ids.shape == (2, 32)
        assert request.held_out.ids.shape == (1, 32)
        linear: Any = request.model.get_submodule("model.layers")[-1]
        linear.mlp.down_proj.weight = nn.Parameter(linear.mlp.down_proj.weight * self.factor, requires_grad=False)
        return Recovered(request.model, ({"tokens": 64.0, "loss": 2.0, "held_out_loss": 3.0},), {"halved": 1.0})


@dataclass(frozen=True)
class Unable(Quieter):
    """Finds nothing to train."""

    name: ClassVar[str] = "unable"

    def recover(self, request: RecoveryRequest) -> Recovered:
        raise FlexiError("unable: there is nothing to train")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.txt")


def study(folder: Path, model: Path, text: Path, recovery: str) -> Path:
    training = f'\n[training]\ncorpus = "file:{text}"\nlength = 32\ntokens = 64\nheld_out = 1\n'
    return make_study(folder / "s.toml", model, text, ["come"], ["remove-blocks"], more=recovery, end=training)


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
    assert len({next(iter(v.values())) for v in values([none, half]).values()} | {quarter.measurements[0].value}) == 3
    assert (tmp_path / "run" / "curves.svg").read_text().startswith("<?xml")
    assert not (tmp_path / "run" / "training").exists() or not list((tmp_path / "run" / "training").iterdir())


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


def test_a_method_that_finds_nothing_to_train_fails_its_cell_alone(model: Path, text: Path, tmp_path: Path) -> None:
    file = study(tmp_path, model, text, 'recovery = ["unable", "quieter"]\ndense = false')
    unable, quieter = run_study(file, tmp_path / "run", plugins_with(recovery_methods=[Quieter(), Unable()]))
    assert (unable.status, unable.reason) == ("failed", "unable: there is nothing to train")
    assert quieter.status == "complete"


def test_records_without_recovery_are_what_they_were_before_there_was_any(
    model: Path, text: Path, tmp_path: Path
) -> None:
    file = make_study(tmp_path / "a.toml", model, text, ["come"], ["remove-blocks"])
    (_, plain) = run_study(file, tmp_path / "run")
    assert "training" not in plain.cell.options
    assert "recovery" not in plain.cell.options
    assert not (tmp_path / "run" / "curves.svg").exists()
