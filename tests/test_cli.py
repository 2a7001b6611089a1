"""The command line: its frozen options, what each command gives on a tiny model, what it says when something is wrong."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer.main
from rich.console import Console
from safetensors.torch import load_file, save_file
from studies import make_model, make_study
from transformers import AutoModelForCausalLM

from flexi_plugins import cli, hookspecs
from flexi_plugins.calibration import Calibrator
from flexi_plugins.data import PruningPlan
from flexi_plugins.digests import tensor_digest
from flexi_plugins.evaluators.perplexity import Perplexity
from flexi_plugins.execution.sweep import Sweeper
from flexi_plugins.families.known import KNOWN
from flexi_plugins.files import alone
from flexi_plugins.models import known_config
from flexi_plugins.plugins import KINDS, Plugins, own_knob
from flexi_plugins.progress import Progress
from flexi_plugins.pruner import Pruner, count_only
from flexi_plugins.show import plan_rows
from flexi_plugins.store import from_text
from flexi_plugins.studyfile import read_study

GRIDS = ("demo", "llama-7b", "saap-stability", "share-lora-gain", "vicuna-7b")  # the studies of built-in methods alone
RECIPES = [Path(__file__).parents[1] / "baselines" / "recipes" / f"{name}.toml" for name in GRIDS]
PLANNED = ("--model", "--metric", "--strategy", "--ratio", "--metric-option", "--strategy-option")
CALIBRATED = ("--corpus", "--seed", "--data", "--dtype", "--device", "--memory", "--json", "--help")
OPTIONS = {  # a change here is a change of what users have written in their scripts
    "run": {"STUDY", "--out", "--data", "--device", "--memory", "--json", "--help"},
    "plan": {*PLANNED, *CALIBRATED, "-o", "--output", "--count-only"},
    "prune": {*PLANNED, *CALIBRATED, "-o", "--output", "--plan"},
    "extend": {
        *CALIBRATED,
        "-o",
        "--output",
        "--model",
        "--blocks",
        "--start",
        "--end",
        "--repetitions",
        "--order",
        "--rank",
        "--output-gain",
        "--tolerance",
    },
    "recover": {
        *PLANNED,
        *CALIBRATED,
        "-o",
        "--output",
        "--plan",
        "--method",
        "--recovery-option",
        "--training-corpus",
        "--length",
        "--tokens",
        "--held-out",
    },
    "eval": {
        "--model",
        "--plan",
        "--tasks",
        "--limit",
        "--perplexity",
        "--window",
        "--tokens",
        "--efficiency",
        "-o",
        "--output",
        "--data",
        "--dtype",
        "--device",
        "--memory",
        "--json",
        "--help",
    },
    "report": {"FOLDER", "--publish", "--into", "--published", "--published-file", "--paired-with", "--json", "--help"},
    "list": {"--json", "--help"},
    "check": {"STUDIES", "--json", "--help"},
}


@dataclass
class Said:
    """What a command said and how it ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return from_text(self.out)


Flexi = Callable[..., Said]


@pytest.fixture
def flexi(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Flexi:
    """Run the command line in this process, as the installed command does."""

    def run(*arguments: Any, data: str | None = None) -> Said:
        monkeypatch.setattr(sys, "argv", ["flexi", *map(str, arguments)])
        environment = {"FLEXI_PLUGINS": "", **({"FLEXI_DATA": data} if data else {})}
        with mock.patch.dict(os.environ, environment):
            if data is None:
                os.environ.pop("FLEXI_DATA", None)
            status = 0
            try:
                cli.main()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(bool(end.code))
        return Said(status, *capsys.readouterr())

    return run


# ------------------------------------------------------------------------------------------------- the contract


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(cli.app)
    return dict(group.commands)


def names_of(command: Any) -> set[str]:
    names = {"--help"}
    for parameter in command.params:
        argument = parameter.param_type_name == "argument"
        names |= {parameter.name.upper()} if argument else {*parameter.opts, *parameter.secondary_opts}
    return names


def test_the_commands_and_options_are_exactly_these() -> None:
    found = commands()
    assert found.keys() == OPTIONS.keys()
    assert {name: names_of(command) for name, command in found.items()} == OPTIONS


@pytest.mark.parametrize("command", OPTIONS)
def test_help_shows_examples_that_fit(command: str, flexi: Flexi) -> None:
    said = flexi(command, "--help")
    assert said.status == 0
    examples = re.findall(r"Example: flexi (.+)", said.out)
    assert examples, said.out
    for example in examples:
        name, *words = example.split()
        assert name == command
        assert {w for w in words if w.startswith("-")} <= OPTIONS[command]
        last = words[-1] if words else ""
        assert not last.startswith("-") or last in ("--json", "--efficiency", "--published"), (
            "an example is one line, to be copied"
        )


def test_help_and_import_load_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['flexi', '--help']\n"
        "import flexi_plugins\n"
        "from flexi_plugins import cli\n"
        "try:\n"
        "    cli.main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'lm_eval', 'pandas'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ------------------------------------------------------------------------------------------------ plan and prune

COUNTED = [
    ("huggyllama/llama-7b", ["remove-units", "mode=uniform", "fraction=0.25", "first=4", "last=29"], 5_422_977_024),
    ("lmsys/vicuna-7b-v1.3", ["remove-units", "mode=uniform", "fraction=0.25", "first=4", "last=29"], 5_422_977_024),
    ("meta-llama/Llama-3.1-8B", ["remove-units", "mode=uniform", "fraction=0.25", "first=4", "last=29"], 6_612_586_496),
    (
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        ["remove-units", "mode=uniform", "fraction=0.25", "first=4", "last=17"],
        945_907_712,
    ),
    ("meta-llama/Llama-2-7b-hf", ["remove-blocks", "blocks=10"], 4_714_582_016),
]


@pytest.mark.parametrize(("name", "method", "stored"), COUNTED)
def test_parameters_are_counted_without_weights(flexi: Flexi, name: str, method: list[str], stored: int) -> None:
    strategy, *options = method
    given = [x for o in options for x in ("--strategy-option", o)]
    plan = ["plan", "--count-only", "--model", name, "--strategy", strategy, *given]
    said = flexi(*plan)
    assert said.status == 0, said.err
    assert f"stored {stored:,} of " in said.out
    assert flexi(*plan, "--json").json["stored_parameters"] == stored


def test_sharing_nine_blocks_stores_more_than_removing_them(flexi: Flexi) -> None:
    def stored(*method: str) -> int:
        counted = flexi("plan", "--count-only", "--model", "huggyllama/llama-7b", "--strategy", *method, "--json")
        return counted.json["stored_parameters"]

    shared = stored("share-lora", "--strategy-option", "blocks=9", "--strategy-option", "rank=256")
    removed = stored("remove-blocks", "--strategy-option", "blocks=9")
    assert shared / removed - 1 == pytest.approx(0.0366, abs=5e-5)
    ten = ("--strategy", "remove-blocks", "--strategy-option", "blocks=10")
    assert "(30.03%)" in flexi("plan", "--count-only", "--model", "meta-llama/Llama-2-7b-hf", *ten).out


KNOWN_SIZE = 6_738_415_616  # of LLaMA-7B


@pytest.fixture
def method(model: Path, text: Path) -> list[str]:
    where = ["--model", str(model), "--corpus", f"file:{text}", "--dtype", "float32"]
    return [*where, "--metric", "come", "--strategy", "concat-merge", "--ratio", "0.2"]


def test_a_plan_is_shown_and_written_before_any_weight_is_changed(
    flexi: Flexi, method: list[str], tmp_path: Path
) -> None:
    said = flexi("plan", *method, "-o", tmp_path / "plan.json")
    assert said.status == 0, said.err
    rows = [line.split() for line in said.out.splitlines()]
    assert rows[0] == ["block", "from", "what", "kv", "heads", "channels", "parameters"]
    assert sum("unchanged" in line for line in said.out.splitlines()) == 2
    assert "merged: " in said.out
    plan = PruningPlan.from_json(json.loads((tmp_path / "plan.json").read_text()))
    assert f"stored {plan.stored_parameters:,} of {plan.shape.parameters:,} parameters" in said.out
    summary = flexi("plan", *method, "--json").json
    assert summary["stored_parameters"] == plan.stored_parameters
    assert [b["block"] for b in summary["blocks"]] == ["0", "1", "2", "3"]
    assert sum(b["parameters"] for b in summary["blocks"]) + plan.shape.outer_parameters == plan.stored_parameters


def test_what_becomes_of_a_block_is_said_in_full(flexi: Flexi, method: list[str]) -> None:
    """New maps and gains too, and each block's parameters as the plan counts them."""
    method[method.index("concat-merge")] = "least-squares-merge"
    said = flexi("plan", *method)
    assert re.search(r"\bnew down.weight\b", said.out)
    assert "gain" not in said.out
    method[method.index("least-squares-merge")] = "remove-blocks"
    compensated = flexi("plan", *method, "--strategy-option", "compensate=true", "--strategy-option", "protect_last=1")
    assert re.search(r"\bgain \d+\.\d+", compensated.out)
    config = known_config("huggyllama/llama-7b")
    shape = Plugins.load().family(config).shape(config)
    plan = PruningPlan(shape, (replace(PruningPlan.identity(shape).blocks[0], own=("down.bias",)),))
    [row, *_] = plan_rows(plan)
    assert row["what"] == "new down.bias"
    assert row["parameters"] == shape.block_parameters(shape.blocks[0]) + shape.hidden


def test_plans_with_tensors_lie_beside_each_other(flexi: Flexi, method: list[str], model: Path, tmp_path: Path) -> None:
    """Each with its tensors under its own name."""
    method[method.index("concat-merge")] = "least-squares-merge"
    for name, ratio in (("a", "0.1"), ("b", "0.3")):
        method[-1] = ratio
        assert flexi("plan", *method, "-o", tmp_path / f"{name}.json").status == 0
    for name, ratio in (("a", "0.1"), ("b", "0.3")):
        method[-1] = ratio
        planned = flexi("prune", "--model", model, "--plan", tmp_path / f"{name}.json", "-o", tmp_path / name)
        direct = flexi("prune", *method, "-o", tmp_path / f"{name}-direct")
        assert (planned.status, direct.status) == (0, 0), planned.err + direct.err
        weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in (name, f"{name}-direct")]
        assert weights[0] == weights[1]
    (tmp_path / "a.tensors").unlink()
    lost = flexi("prune", "--model", model, "--plan", tmp_path / "a.json", "-o", tmp_path / "c")
    assert "are missing that least-squares-merge made step by step; they lie beside the plan" in lost.err


@pytest.mark.parametrize(("command", "output"), [("plan", "plan.json"), ("prune", "pruned")])
def test_a_search_that_was_stopped_goes_on_where_it_was(
    flexi: Flexi,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    output: str,
) -> None:
    search = [command, "--model", model, "--metric", "greedy", "--strategy", "remove-blocks", "--ratio", "0.4"]
    search += ["--strategy-option", "progressive=true", "--corpus", f"file:{text}", "-o", tmp_path / output]
    tried: list[str] = []
    original, allowed = Calibrator._measured_losses, [6]

    def measured(self: Calibrator, searching: bool, planned: Any, advance: Any) -> list[float]:
        if len(tried) >= allowed[0]:
            raise KeyboardInterrupt
        tried.extend(p.plan.hash for p in planned)
        return original(self, searching, planned, advance)

    monkeypatch.setattr(Calibrator, "_measured_losses", measured)
    stopped = flexi(*search)
    assert stopped.status == 130
    assert "run the same command again" in stopped.err
    assert not (tmp_path / output).exists()
    assert len(list((tmp_path / f"{output}.search").rglob("*.json"))) == 6, "each of the six blocks away"
    allowed[0] = 100
    assert flexi(*search).status == 0
    assert 6 < len(tried) == len(set(tried)), "no model was tried twice"
    assert (tmp_path / output).exists()
    assert not (tmp_path / f"{output}.search").exists()


def test_a_plan_is_not_written_over_another_and_has_tensors_of_its_own(
    flexi: Flexi, method: list[str], tmp_path: Path
) -> None:
    method = ["least-squares-merge" if word == "concat-merge" else word for word in method]
    for name in ("plan-0.1", "plan-0.2", "plan.json"):
        assert flexi("plan", *method, "-o", tmp_path / name).status == 0
    assert {p.name for p in tmp_path.glob("plan*tensors")} == {"plan-0.1.tensors", "plan-0.2.tensors", "plan.tensors"}
    assert flexi("prune", *method[:2], "--plan", tmp_path / "plan-0.1", "-o", tmp_path / "pruned").status == 0
    again = flexi("plan", *method, "-o", tmp_path / "plan-0.1")
    assert again.status == 2
    assert "plan-0.1' exists already" in again.err


def test_a_ratio_beside_an_option_that_takes_its_place_is_an_error(flexi: Flexi) -> None:
    given = ["plan", "--count-only", "--model", "huggyllama/llama-7b", "--strategy", "remove-blocks"]
    said = flexi(*given, "--strategy-option", "blocks=10", "--ratio", "0.9")
    assert said.status == 2
    assert "strategy 'remove-blocks': its option blocks says how much goes; give it or --ratio" in said.err


@pytest.mark.parametrize("command", ["plan", "eval"])
def test_a_data_folder_that_is_not_there_is_an_error(
    flexi: Flexi, model: Path, method: list[str], tmp_path: Path, command: str
) -> None:
    given = method if command == "plan" else ["--model", model]
    said = flexi(command, *given, "--data", tmp_path / "typo")
    assert said.status == 2
    assert re.search(
        r"data: '.*typo' is no folder; --data, or FLEXI_DATA, names one with text/ and tasks/ in it", said.err
    )


@pytest.mark.parametrize("strategy", ["concat-merge", "share-lora", "least-squares-merge"])
def test_a_plan_file_gives_the_same_model_as_its_method(
    flexi: Flexi, method: list[str], model: Path, tmp_path: Path, strategy: str
) -> None:
    method = [strategy if word == "concat-merge" else word for word in method]
    assert flexi("plan", *method, "-o", tmp_path / "plan.json").status == 0
    planned = flexi("prune", "--model", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "planned")
    direct = flexi("prune", *method, "-o", tmp_path / "direct", "--json")
    assert (planned.status, direct.status) == (0, 0), planned.err + direct.err
    files = sorted(p.name for p in (tmp_path / "direct").iterdir())
    assert {"config.json", "model.safetensors", "plan.json", "tokenizer.json"} <= set(files)
    assert files == sorted(p.name for p in (tmp_path / "planned").iterdir())
    for name in files:
        assert (tmp_path / "planned" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes(), name
    assert direct.json["plain"] == (strategy != "share-lora")
    kind = "a plain transformers folder" if direct.json["plain"] else "FlexiForCausalLM, since block"
    assert kind in planned.out
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "direct")
    count = sum(p.numel() for p in pruned.parameters())
    assert count == direct.json["stored_parameters"]
    pruned.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)


def test_tensors_that_depend_on_text_are_made_on_the_plans_own(
    flexi: Flexi, method: list[str], model: Path, tmp_path: Path
) -> None:
    """Whatever text and seed the command that makes them would calibrate on."""
    drawn = ["--strategy-option", "output_gain=calibrated", "--strategy-option", "adapters=zero", "--seed", 3]
    given = [*("share-lora" if word == "concat-merge" else word for word in method), *drawn]
    assert flexi("plan", *given, "-o", tmp_path / "plan.json").status == 0
    assert not (tmp_path / "plan.tensors").exists()
    plain = ["--model", model, "--dtype", "float32", "--plan", tmp_path / "plan.json"]
    planned = flexi("prune", *plain, "-o", tmp_path / "planned")
    direct = flexi("prune", *given, "-o", tmp_path / "direct")
    assert (planned.status, direct.status) == (0, 0), planned.err + direct.err
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "planned" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes(), name

    written = json.loads((tmp_path / "plan.json").read_text())
    written["origin"]["calibration"]["text"] = "0" * 16  # as if the corpus had another text now
    (tmp_path / "plan.json").write_text(json.dumps(written))
    other = flexi("eval", *plain, "--tokens", 512, "--window", 128)
    assert other.status == 2
    assert "seed 3, as the plan was, and that text is another now" in other.err


def test_tensors_that_depend_on_weights_alone_need_no_text(
    flexi: Flexi, method: list[str], model: Path, text: Path, tmp_path: Path
) -> None:
    method = ["share-lora" if word == "concat-merge" else word for word in method]
    assert flexi("plan", *method, "-o", tmp_path / "plan.json").status == 0
    written = (tmp_path / "plan.json").read_text()
    assert str(text) in written
    (tmp_path / "plan.json").write_text(written.replace(str(text), str(tmp_path / "gone.txt")))
    planned = flexi("prune", "--model", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "planned")
    direct = flexi("prune", *method, "-o", tmp_path / "direct")
    assert (planned.status, direct.status) == (0, 0), planned.err + direct.err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("planned", "direct")]
    assert weights[0] == weights[1]


def test_a_model_that_is_no_plain_one_is_reached_by_its_plan(
    flexi: Flexi, method: list[str], model: Path, tmp_path: Path
) -> None:
    method = ["share-lora" if word == "concat-merge" else word for word in method]
    pruned = tmp_path / "pruned"
    assert flexi("prune", *method, "-o", pruned).status == 0
    small = ["--dtype", "float32", "--window", "64", "--tokens", "64", "--tasks", "", "--json"]
    refused = flexi("eval", "--model", pruned, *small)
    assert refused.status == 2
    assert f"give the model that it was made from, and its plan: --plan {pruned / 'plan.json'}" in refused.err

    tensors = load_file(pruned / "plan.tensors")
    plan = json.loads((pruned / "plan.json").read_text())
    fresh = flexi("eval", "--model", model, "--plan", pruned / "plan.json", *small).json["measurements"]
    changed = {n: t * 2 for n, t in tensors.items()}
    save_file(changed, pruned / "plan.tensors")
    other = flexi("eval", "--model", model, "--plan", pruned / "plan.json", *small)
    assert "holds other tensors than the plan was saved with: blocks." in other.err
    plan["tensors"] = {n: tensor_digest(t) for n, t in changed.items()}
    (pruned / "plan.json").write_text(json.dumps(plan))
    trained = flexi("eval", "--model", model, "--plan", pruned / "plan.json", *small).json["measurements"]
    assert trained != fresh, "tensors that were saved with a plan are its own, whatever its strategy would make"


def test_an_existing_folder_is_refused_before_any_work(
    flexi: Flexi, method: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(Pruner, "__init__", fails)
    said = flexi("prune", *method, "-o", tmp_path)
    assert said.status == 2
    assert said.err == f"error: output '{tmp_path}' exists already; name another one or remove it\n"


def test_a_folder_that_cannot_be_written_is_named(flexi: Flexi, method: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    said = flexi("prune", *method, "-o", tmp_path / "file" / "pruned")
    assert said.status == 2
    assert re.search(r"^error: output '.*/file/pruned': cannot be written: ", said.err, re.MULTILINE)
    said = flexi("plan", *method, "-o", tmp_path / "file" / "plan.json")
    assert said.status == 2
    assert "plan.json': cannot be written" in said.err


def test_a_full_disk_leaves_no_part_of_a_model(flexi: Flexi, method: list[str], tmp_path: Path) -> None:
    from resource import RLIMIT_FSIZE, getrlimit, setrlimit

    before = getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (20_000, before[1]))
    try:
        said = flexi("prune", *method, "-o", tmp_path / "pruned")
    finally:
        setrlimit(RLIMIT_FSIZE, before)
    assert said.status == 2
    assert "cannot be written" in said.err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- what is told of errors

NEAR = [
    (["--model", "smollm2-135"], "unknown model 'smollm2-135': did you mean 'smollm2-135m'?"),
    (["--metric", "comme"], "unknown metric 'comme': did you mean 'come'?"),
    (["--strategy", "concat"], "unknown strategy 'concat': did you mean 'concat-merge'?"),
    (["--corpus", "python"], "unknown corpus 'python': did you mean 'python-docs'?"),
    (["--corpus", "file:/no/such.txt"], "corpus 'file:/no/such.txt': expected a text file, found none"),
    (["--dtype", "float64"], "unknown dtype 'float64': did you mean 'float16' or 'bfloat16' or 'float32'?"),
    (["--strategy-option", "repeet=true"], "strategy 'concat-merge': unknown option 'repeet': did you mean 'repeat'"),
    (["--strategy-option", "repeat=perhaps"], "strategy 'concat-merge': option 'repeat': expected"),
    (["--strategy-option", "repeat"], "option 'repeat': expected KEY=VALUE"),
    (["--ratio", "1.5"], "concat-merge: ratio 1.5 is not between 0 and 1; on this model it reaches up to 0.4"),
    (["--ratio", "0"], "concat-merge: ratio 0 is not between 0 and 1; on this model it reaches up to 0.4"),
    (["--ratio", "0.7"], "concat-merge: ratio 0.7 is out of reach on this model; it reaches ratios up to 0.4"),
]


@pytest.mark.parametrize(("given", "problem"), NEAR)
def test_what_is_unknown_is_answered_with_what_there_is(
    flexi: Flexi, method: list[str], given: list[str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pruner, "calibrator", property(lambda self: pytest.fail("this was to be found first")))
    said = flexi("plan", *method, *given)
    assert said.status == 2
    assert said.err.splitlines()[-1].startswith("error: ")
    assert problem in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("without", "problem"),
    [
        ("--metric", "give --metric: there is come, flexigpt, "),
        ("--strategy", "give --strategy: there is concat-merge, "),
        ("--ratio", "strategy 'concat-merge': give --ratio, the share of the stored parameters to remove"),
    ],
)
def test_what_is_left_out_is_asked_for(flexi: Flexi, method: list[str], without: str, problem: str) -> None:
    place = method.index(without)
    said = flexi("plan", *method[:place], *method[place + 2 :])
    assert said.status == 2
    assert problem in said.err


def test_an_unknown_command_or_option_is_a_usage_error(flexi: Flexi) -> None:
    assert flexi("prun").status == 2
    assert flexi("plan", "--ratoi", "0.2").status == 2
    assert flexi("prune").status == 2


@pytest.mark.parametrize(
    "content", ["", "[]", "3", '{"shape": 3}', '{"shape": {"blocks": []}}', '{"shape": {}, "blocks": [3]}', None]
)
def test_a_file_that_is_no_plan_is_named(flexi: Flexi, model: Path, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    said = flexi("prune", "--model", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "pruned")
    assert said.status == 2
    assert f"error: plan file '{tmp_path / 'plan.json'}'" in said.err


def test_a_plan_of_another_model_is_refused(flexi: Flexi, model: Path, tmp_path: Path) -> None:
    config = known_config("smollm2-135m")
    plan = PruningPlan.identity(Plugins.load().family(config).shape(config))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    said = flexi("prune", "--model", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "pruned")
    assert said.status == 2
    assert "was made for a model of another shape" in said.err
    both = flexi("prune", "--model", model, "--plan", tmp_path / "plan.json", "--metric", "come", "-o", tmp_path / "p")
    assert "give either --plan, or --metric, --strategy, --ratio and their options" in both.err


def test_tensors_of_another_model_of_the_same_shape_are_refused(flexi: Flexi, model: Path, tmp_path: Path) -> None:
    """As LLaMA-7B and Vicuna-7B are; a plan without tensors can be taken over, and is said to be of another."""
    other = make_model(tmp_path / "other", seed=5)
    given = ["--dtype", "float32", "--metric", "flexigpt", "--ratio", "0.2"]
    made = ["--model", model, *given, "--strategy", "share-lora", "-o", tmp_path / "shared"]
    assert flexi("prune", *made).status == 0
    said = flexi("prune", "--model", other, "--plan", tmp_path / "shared" / "plan.json", "-o", tmp_path / "pruned")
    assert said.status == 2
    assert "its tensors were made for another model of this shape than" in said.err
    again = flexi("prune", "--model", model, "--plan", tmp_path / "shared" / "plan.json", "-o", tmp_path / "pruned")
    assert again.status == 0, again.err
    plan = tmp_path / "blocks.json"
    assert flexi("plan", "--model", model, *given, "--strategy", "remove-blocks", "-o", plan).status == 0
    taken = flexi("prune", "--model", other, "--plan", plan, "-o", tmp_path / "blocks")
    assert taken.status == 0, taken.err
    assert "it was made for another model than" in taken.err


def test_a_checkpoint_that_is_broken_is_named(flexi: Flexi, method: list[str], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "broken")
    place = method.index("--model") + 1
    given = [*method[:place], str(folder), *method[place + 1 :]]
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    assert re.search(r"model\.safetensors is truncated: tensor '.*' ends beyond the file", flexi("plan", *given).err)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"intermediate_size": 72}, "mlp.gate_proj.weight' has shape [64, 32], config.json promises [72, 32]"),
        ({"model_type": "gpt2"}, "model type 'gpt2' is not of the Llama shape"),
        ({"model_type": "new"}, "its config.json cannot be used: "),
        ({"num_attention_heads": 7}, "its config.json cannot be used: "),
        ({"model_type": "new", "auto_map": {"AutoConfig": "own.Config"}}, "custom code"),
    ]
    for change, problem in wrong:
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        said = flexi("plan", *given)
        assert said.status == 2
        assert problem in said.err
    (folder / "config.json").unlink()
    assert "no config.json in the folder" in flexi("plan", *given).err


# ------------------------------------------------------------------------------------------------------- eval


def test_eval_measures_a_model_and_a_plan_of_it(flexi: Flexi, model: Path, method: list[str], tmp_path: Path) -> None:
    assert flexi("plan", *method, "-o", tmp_path / "plan.json").status == 0
    small = ["--dtype", "float32", "--perplexity", "python-docs", "--window", "64", "--tokens", "256"]
    dense = flexi("eval", "--model", model, *small, "--tasks", "docs_cloze", "--limit", "3")
    assert dense.status == 0, dense.err
    assert re.search(r"^python-docs_ppl@64: [\d,.]+ ± ", dense.out, re.MULTILINE)
    assert re.search(r"^docs_cloze_acc: .* \(chance 0\.2500\)$", dense.out, re.MULTILINE)
    plan = flexi("eval", "--model", model, "--plan", tmp_path / "plan.json", *small, "--tasks", "", "--json")
    [measured] = plan.json["measurements"]
    assert flexi("prune", "--model", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "pruned").status == 0
    folder = flexi("eval", "--model", tmp_path / "pruned", *small, "--tasks", "", "--json")
    assert folder.json["measurements"][0]["value"] == pytest.approx(measured["value"], rel=1e-5)
    assert folder.json["failures"] == []


def test_an_evaluation_with_an_output_goes_on_where_it_was(
    flexi: Flexi, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "found.json"
    given = ["eval", "--model", model, "--dtype", "float32", "--window", "64", "--tokens", "256", "--limit", "3"]
    swept: list[int] = []
    original, broken = Sweeper.sweep, [True]

    def sweep(self: Sweeper, planned: Any, batches: Any, **options: Any) -> Any:
        swept.append(sum(options["wanted"](g, 0) for g in range(len(batches))))
        if len(swept) > 1 and broken[0]:
            raise KeyboardInterrupt
        return original(self, planned, batches, **options)

    monkeypatch.setattr(Sweeper, "sweep", sweep)
    stopped = flexi(*given, "-o", output)
    assert stopped.status == 130
    assert not output.exists()
    broken[0] = False
    whole = flexi(*given, "-o", output, "--json")
    assert whole.status == 0, whole.err
    assert len(swept) == 3, "perplexity once, the tasks twice"
    found = json.loads(output.read_text())
    assert found["measurements"] == whole.json["measurements"]
    assert found["fingerprint"]
    assert [e["evaluator"] for e in found["evaluation"]] == ["perplexity", "lm-eval"]
    assert (found["evaluation"][0]["tokens"], found["evaluation"][1]["limit"]) == (256, 3)
    assert all(e["inputs"] for e in found["evaluation"])
    assert found["versions"]["torch"] == torch.__version__
    assert [path.name for path in tmp_path.glob("found.json*")] == ["found.json"]
    assert flexi(*given).out == flexi(*given, "-o", tmp_path / "again.json").out
    taken = flexi(*given, "-o", output)
    assert taken.status == 2
    assert "exists already" in taken.err


def test_what_an_evaluator_that_failed_left_is_where_it_says(
    flexi: Flexi, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, request: Any) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Perplexity, "evaluate", broken)
    said = flexi("eval", "--model", model, "--tasks", "")
    assert said.status == 1
    file = re.search(r"evaluator 'perplexity' failed: RuntimeError: no such luck \(see (.*)\)", said.err)
    assert file
    assert "no such luck" in Path(file[1]).read_text()
    shutil.rmtree(Path(file[1]).parents[1])


@pytest.mark.parametrize("command", ["plan", "prune", "recover", "eval"])
def test_one_process_at_a_time_makes_an_output(
    flexi: Flexi, model: Path, method: list[str], tmp_path: Path, command: str
) -> None:
    kind = {"recover": "training", "eval": "eval"}.get(command, "search")
    given = ["--model", model] if command == "eval" else method
    given = [*given, *(["--method", "lora"] if command == "recover" else []), "-o", tmp_path / "made"]
    with alone(tmp_path / f"made.{kind}"):
        said = flexi(command, *given)
    assert said.status == 2
    assert f"made.{kind} is in use by process {os.getpid()}; wait for its end" in said.err
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--tasks", "", "--perplexity", ""], "eval: nothing to measure; give --perplexity CORPUS"),
        (["--tasks", "", "--perplexity", "wiki"], "unknown corpus 'wiki'"),
        (["--tasks", "", "--window", "1"], "expected a window of at least 2 tokens"),
        (["--limit", "0", "--perplexity", ""], "a limit of at least 1 document"),
    ],
)
def test_eval_names_what_cannot_work_before_it_opens_the_model(flexi: Flexi, given: list[str], problem: str) -> None:
    said = flexi("eval", "--model", "no/such-model", *given)
    assert said.status == 2
    assert problem in said.err
    assert "no/such-model" not in said.err


# --------------------------------------------------------------------------------------------- run and report


def test_a_study_runs_from_the_command_line(flexi: Flexi, model: Path, text: Path, tmp_path: Path) -> None:
    file = make_study(tmp_path / "s.toml", model, text, ["come"], ["remove-blocks"])
    folder = tmp_path / "run"
    first = flexi("run", file, "--out", folder)
    assert first.status == 0, first.err
    assert "study tiny: 2 cells, 0 of them done before" in first.err
    assert (folder / "LEADERBOARD.md").read_text() in first.out
    assert re.search(rf"^files: .*{folder}/LEADERBOARD\.md", first.out, re.MULTILINE)
    second = flexi("run", file, "--out", folder, "--json")
    assert "2 of them done before" in second.err
    assert [r["status"] for r in second.json] == ["complete", "complete"]

    (folder / "LEADERBOARD.md").unlink()
    report = flexi("report", folder, "--json").json
    assert [r["cell"] for r in report["records"]] == [r["cell"] for r in reversed(second.json)]
    assert (folder / "LEADERBOARD.md").is_file()
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- leaderboard -->\nold\n<!-- /leaderboard -->\nafter\n")
    assert flexi("report", folder, "--into", page).status == 0
    assert "old" not in page.read_text()
    assert "**dense**" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    page.write_text("no marks")
    refused = flexi("report", folder, "--into", page)
    assert refused.status == 2
    assert "<!-- leaderboard -->" in refused.err
    published = flexi("report", folder, "--publish", tmp_path / "published")
    assert published.out.splitlines() == [
        str(tmp_path / "published" / n)
        for n in ("LEADERBOARD.csv", "LEADERBOARD.md", "methods.svg", "pareto.svg", "PAIRED.md")
    ]
    assert len(list((tmp_path / "published" / "records").iterdir())) == 2


def test_published_numbers_stand_beside_a_studys(flexi: Flexi, model: Path, text: Path, tmp_path: Path) -> None:
    folder, numbers = tmp_path / "run", tmp_path / "numbers.csv"
    assert flexi("run", make_study(tmp_path / "s.toml", model, text), "--out", folder).status == 0
    numbers.write_text(
        "model,method,ratio,recovery,task,value,metric,source,note\n"
        f"{model.name},CoMe,0.2,none,file:{text},99.5,ppl@128,table 1,\n"
    )
    said = flexi("report", folder, "--published-file", numbers)
    assert said.status == 0, said.err
    assert said.out.splitlines()[-1] == str(folder / "PUBLISHED.md")
    assert re.search(
        r"^\| CoMe \| .* \| 99\.50 \| [\d.,]+ \| come x remove-blocks \|", (folder / "PUBLISHED.md").read_text(), re.M
    )
    [pair] = flexi("report", folder, "--published", "--published-file", numbers, "--json").json["published"]
    assert (pair["published"], pair["our_metric"], pair["our_strategy"]) == (99.5, "come", "remove-blocks")
    refused = flexi("report", folder, "--published-file", tmp_path / "none.csv")
    assert refused.status == 2
    assert "report: no published numbers in " in refused.err


def test_a_study_is_compared_on_the_same_documents(flexi: Flexi, model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert flexi("run", make_study(tmp_path / "s.toml", model, text), "--out", folder).status == 0
    assert "beside come x remove-blocks" in (folder / "PAIRED.md").read_text()
    said = flexi("report", folder, "--paired-with", "dense", "--json").json
    assert "beside the dense model" in (folder / "PAIRED.md").read_text()
    [beside] = said["paired"]
    assert (beside["method"]["strategy"], beside["reference"]["strategy"]) == ("remove-blocks", None)
    values = {r["cell"]["strategy"]: r["measurements"][0]["value"] for r in said["records"]}
    found = beside["differences"][f"file:{text}_ppl@128"]
    assert found["mean"] == pytest.approx(math.log(values["remove-blocks"] / values[None]))
    unknown = flexi("report", folder, "--paired-with", "saap")
    assert unknown.status == 2
    assert "expected 'best', 'dense' or one of come-remove-blocks" in unknown.err


def test_studies_run_into_runs_by_their_name(
    flexi: Flexi, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert flexi("run", make_study(tmp_path / "s.toml", model, text)).status == 0
    assert (tmp_path / "runs" / "tiny" / "LEADERBOARD.md").is_file()


def test_a_failed_cell_is_told_and_ends_with_1(flexi: Flexi, model: Path, text: Path, tmp_path: Path) -> None:
    strategies = ["remove-blocks", '{ name = "remove-blocks", blocks = 100 }']
    file = make_study(tmp_path / "s.toml", model, text, ["come"], strategies)
    said = flexi("run", file, "--out", tmp_path / "run")
    assert said.status == 1
    reason = "remove-blocks: blocks = 100, expected 1..5 on this model"
    assert said.err.splitlines()[-1] == f"failed: come-remove-blocks-0-s0: {reason}"
    assert reason in said.out, "the leaderboard has it as well"
    published = flexi("report", tmp_path / "run", "--publish", tmp_path / "published")
    assert published.status == 0
    assert len(list((tmp_path / "published" / "records").iterdir())) == 2, "what failed is not published"


def test_a_folder_without_records_is_no_study(flexi: Flexi, tmp_path: Path) -> None:
    said = flexi("report", tmp_path)
    assert said.status == 2
    assert "is no study's folder: it has no records/" in said.err


def test_the_data_folder_comes_from_the_option_or_the_environment(
    flexi: Flexi, model: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "ptb-valid.txt").write_text(text.read_text())
    method = ["--metric", "come", "--strategy", "remove-blocks", "--ratio", "0.2", "--dtype", "float32", "--json"]
    given = flexi("plan", "--model", model, "--corpus", "ptb", *method, "--data", tmp_path)
    told = flexi("plan", "--model", model, "--corpus", "ptb", *method, data=str(tmp_path))
    assert given.status == told.status == 0, given.err
    assert given.out == told.out


# --------------------------------------------------------------------------------------------- list and check


def test_list_shows_every_plugin(flexi: Flexi) -> None:
    said = flexi("list")
    assert said.status == 0
    for name in (
        "flexigpt",
        "saap",
        "come",
        "share-lora",
        "concat-merge",
        "remove-blocks",
        "remove-units",
        "wikitext2",
    ):
        assert re.search(rf"\b{name}\b", said.out), name
    listed = flexi("list", "--json").json
    [merge] = [p for p in listed["plugins"] if p["name"] == "concat-merge"]
    assert merge["kind"] == "strategy"
    assert merge["distribution"] == "flexi-plugins"
    assert merge["options"]["repeat"] is False
    assert merge["version"] == version("flexi-plugins")
    assert {p["paper"] for p in listed["plugins"] if p["name"] in ("come", "saap")} == {
        "CoMe, arXiv 2510.15304",
        "SAAP, arXiv 2412.15127",
    }
    assert listed["problems"] == []


def test_list_has_what_every_hook_gives(flexi: Flexi) -> None:
    listed, said = flexi("list", "--json").json["plugins"], flexi("list").out
    plugins = Plugins.load()
    known = {(kind, name) for kind in KINDS for name in plugins.entries(kind)} | {("family", "llama")}
    assert {(p["kind"], p["name"]) for p in listed} == known
    hooks = {n for n, v in vars(hookspecs).items() if hasattr(v, f"{hookspecs.PROJECT}_spec")}
    assert hooks == {*KINDS.values(), "model_family"}
    for plugin in listed:
        assert re.search(rf"(?<![\w-]){re.escape(plugin['name'])}(?![\w-])", said), plugin
        assert plugin["version"] == version("flexi-plugins")


def test_list_says_which_pairs_cannot_work_and_why(flexi: Flexi) -> None:
    refused = flexi("list", "--json").json["incompatible"]
    pairs = {(p["metric"], p["strategy"]): p["reason"] for p in refused}
    assert pairs["greedy", "remove-units"] == "remove-units wants attention, mlp scores, greedy gives block only"
    assert ("come", "remove-units") not in pairs
    lines = [line for line in flexi("list").out.splitlines() if line.startswith("incompatible: ")]
    assert (
        "incompatible: greedy x remove-units: remove-units wants attention, mlp scores, greedy gives block only"
        in lines
    )
    named = {(m, line.split(" x ")[1].split(":")[0]) for line in lines for m in line[14:].split(" x ")[0].split(", ")}
    assert named == pairs.keys(), "those that are refused for one reason share a line"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_pass_their_check(flexi: Flexi, recipe: Path) -> None:
    said = flexi("check", recipe)
    assert (said.status, said.out) == (0, "no problems\n")


def test_check_names_the_problems_of_every_file(flexi: Flexi, tmp_path: Path) -> None:
    wrong, none = tmp_path / "wrong.toml", tmp_path / "none.toml"
    wrong.write_text(RECIPES[0].read_text().replace('"flexigpt"', '"flexgpt"', 1))
    said = flexi("check", RECIPES[0], wrong, none, "--json")
    assert said.status == 1
    first, second = said.json["problems"]
    assert "unknown metric 'flexgpt': did you mean 'flexigpt'?" in first
    assert f"study file '{none}' does not exist" in second


BIG = {  # the studies of the 7B models, and what each of their grids is to hold
    name: next(r for r in RECIPES if r.stem == name) for name in ("llama-7b", "vicuna-7b")
}
SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@pytest.mark.parametrize("name", BIG)
def test_the_7b_studies_hold_the_whole_grid(name: str) -> None:
    study = read_study(BIG[name], Plugins.load())
    cells = {(s.name, r) for s in study.strategies for r in s.ratios or study.ratios}
    strategies = ("share-lora", "concat-merge", "remove-blocks", "remove-units")
    assert cells == {(s, r) for s in strategies for r in (0.2, 0.3, 0.5)}
    assert {m.name for m in study.metrics} == {"flexigpt", "saap", "come"}
    assert all(m.ratios is None for m in study.metrics)
    measured = [(m.evaluator, m.options.get("corpus") or m.options.get("tasks")) for m in study.evaluation]
    assert ("perplexity", "wikitext2") in measured
    assert ("perplexity", "ptb") in measured
    assert ("lm-eval", list(SEVEN)) in measured
    assert study.model in KNOWN


def reached(recipe: Path) -> list[tuple[str, float, PruningPlan]]:
    """Plan every strategy and ratio of a study from its model's configuration alone."""
    plugins = Plugins.load()
    study = read_study(recipe, plugins)
    config = known_config(study.model)
    shape = plugins.family(config).shape(config)
    made = []
    for method in study.strategies:
        strategy = plugins.get("strategy", method.name, method.options)
        for ratio in (0.0,) if own_knob(strategy) else method.ratios or study.ratios:
            made.append((method.name, ratio, count_only(shape, strategy, ratio)))
    return made


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem != "vicuna-7b"], ids=lambda p: p.stem)
def test_every_ratio_of_the_recipes_is_within_reach(recipe: Path) -> None:
    for strategy, ratio, plan in reached(recipe):
        assert ratio <= plan.ratio <= ratio + 0.05, f"{strategy} at {ratio:g}"


def test_the_two_7b_models_have_one_shape() -> None:
    family = Plugins.load().family
    shapes = [family(c).shape(c) for c in map(known_config, ("huggyllama/llama-7b", "lmsys/vicuna-7b-v1.3"))]
    assert shapes[0] == shapes[1]
    assert shapes[0].parameters == KNOWN_SIZE
    studies = [tomllib.loads(BIG[name].read_text()) for name in BIG]
    assert {k for k in studies[0] if studies[0][k] != studies[1][k]} == {"name", "model"}


# --------------------------------------------------------------------------------------------------- progress


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 15))
    monkeypatch.setattr("flexi_plugins.progress.time.monotonic", lambda: next(now))
    shown = Progress()
    shown.console = Console(file=io.StringIO(), width=200)
    with shown.stage("planning [all]", 4) as advance:
        for _ in range(4):
            advance(1)
    lines = shown.console.file.getvalue().splitlines()
    assert lines[0] == "planning [all] ..."
    assert any(re.fullmatch(r"planning \[all\]: 50%, about \d+ s left", line) for line in lines)
    assert re.fullmatch(r"planning \[all\]: [\d.]+ s", lines[-1])


def test_a_bar_says_what_is_done_and_how_long_is_left() -> None:
    shown = Progress()
    shown.console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with shown.stage("perplexity on file:[a].txt", 2) as advance:
        advance(1)
        shown.say("a line in between")
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.console.file.getvalue())
    assert "perplexity on file:[a].txt" in said
    assert "50%" in said
    assert "left" in said
    assert "a line in between" in said


def test_a_stage_within_another_is_shown_while_it_lasts() -> None:
    shown = Progress()
    shown.console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with shown.stage("planning", 2) as advance:
        for _ in range(2):
            with shown.stage("distances of donors", 4) as within:
                within(3)
                time.sleep(0.2)  # a bar is drawn ten times a second
            advance(1)
    with shown.stage("measuring", 1) as advance:
        advance(1)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.console.file.getvalue())
    assert all(title in said for title in ("planning", "distances of donors", "75%", "measuring"))
    assert re.findall(r"(\w+): [\d.]+ s$", said, re.MULTILINE) == ["planning", "measuring"]


def test_a_stage_within_another_has_no_lines_of_its_own_unless_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 15))
    shown = Progress()
    shown.console = Console(file=io.StringIO(), width=200)
    with shown.stage("planning", 2):
        with shown.stage("a short one", 4) as advance:
            advance(1)
        monkeypatch.setattr("flexi_plugins.progress.time.monotonic", lambda: next(now))
        with shown.stage("a long one", 4) as advance:
            for _ in range(4):
                advance(1)
    lines = shown.console.file.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["planning ...", "a long one", "planning"]


def test_an_error_within_a_stage_leaves_none_shown() -> None:
    shown = Progress()
    shown.console = Console(file=io.StringIO(), width=200)
    with pytest.raises(ValueError, match="broken"), shown.stage("planning"), shown.stage("inner"):
        raise ValueError("broken")
    with shown.stage("measuring"):
        pass
    assert shown.console.file.getvalue().startswith("planning ...\nmeasuring ...\nmeasuring: ")


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=True).stage("planning", 1) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")
