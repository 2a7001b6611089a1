"""flexi recover and flexi extend, whole: from a command line to a folder, in one process and in two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from studies import make_study, run_study, values
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from flexi_plugins.cli import app
from flexi_plugins.data import PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.pruner import Pruner
from flexi_plugins.show import show_recovery
from flexi_plugins.store import Store

Recover = Callable[..., Result]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flexi_plugins.cli")
MERGED = ("--metric", "come", "--strategy", "concat-merge", "--ratio", "0.2")


@pytest.fixture
def recover(model: Path, text: Path) -> Recover:
    def call(output: Path, *words: str, method: str = "lora", tokens: int = 256) -> Result:
        return CliRunner().invoke(app, arguments(model, text, output, method, tokens, *words))

    return call


def arguments(model: Path, text: Path, output: Path, method: str, tokens: int, *words: str) -> list[str]:
    """Return the words of a short training."""
    corpora = ["--corpus", f"file:{text}", "--training-corpus", f"file:{text}"]
    short = ["--length", "32", "--tokens", str(tokens), "--held-out", "2", "--dtype", "float32"]
    quick = [f"--recovery-option={o}" for o in ("learning_rate=0.01", "batch_tokens=64", "keep=last")]
    where = ["--model", str(model), "--method", method, "-o", str(output)]
    return ["recover", *where, *corpora, *short, *quick, *words]


def extended(model: Path, text: Path, output: Path) -> Path:
    """Write the model with two of its six blocks running twice; return the folder."""
    words = ["extend", "--model", str(model), "--blocks", "8", "-o", str(output), "--dtype", "float32"]
    done = CliRunner().invoke(app, [*words, "--corpus", f"file:{text}", "--output-gain", "0.1"])
    assert done.exit_code == 0, done.output
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_pruned_model_is_trained_and_written_as_a_plain_folder(recover: Recover, tmp_path: Path) -> None:
    done = recover(tmp_path / "out", *MERGED)
    assert done.exit_code == 0, done.output
    assert "trained by lora on 256 tokens: held-out loss " in done.output
    assert "a plain transformers folder" in done.output
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.config.num_hidden_layers < 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_stopped_training_is_taken_up_with_the_plan_that_was_made(
    recover: Recover, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pruner, "recover", stopped)
        recover(tmp_path / "out", *MERGED)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.training" / "plan" / "plans").glob("*.json"))
    monkeypatch.setattr(Pruner, "make", lambda *_: pytest.fail("the plan is there"))
    assert recover(tmp_path / "out", *MERGED).exit_code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_training_that_was_killed_is_taken_up_by_the_same_command(
    recover: Recover, model: Path, text: Path, tmp_path: Path
) -> None:
    """SIGKILL as soon as there is a checkpoint; model and curve are those of a command that nobody killed."""
    words = (*MERGED, "--device", "cpu", "--recovery-option=evaluate_every=128")
    call = [sys.executable, "-m", "flexi_plugins.cli"]
    command = subprocess.Popen(
        [*call, *arguments(model, text, tmp_path / "killed", "lora", 2048, *words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while command.poll() is None and not list(tmp_path.glob("killed.training/**/checkpoint-*/trainer_state.json")):
        time.sleep(0.002)
    command.kill()
    _, said = command.communicate()
    assert command.returncode == -signal.SIGKILL, said.decode()[-3000:]
    assert not (tmp_path / "killed").exists()
    resumed, whole = (recover(tmp_path / name, *words, tokens=2048) for name in ("killed", "whole"))
    assert (resumed.exit_code, whole.exit_code) == (0, 0), resumed.output + whole.output
    assert "lora: 0 of 2,048 tokens" in whole.output
    assert "lora: 0 of 2,048 tokens" not in resumed.output, "it was begun again"
    found, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    said_of = [
        json.loads((tmp_path / name / "plan.json").read_text())["origin"]["recovery"] for name in ("killed", "whole")
    ]
    assert said_of[0] == said_of[1]
    assert [point["tokens"] for point in said_of[0]["curve"]] == list(range(0, 2049, 128))


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_two_processes_that_were_killed_go_on_as_if_nothing_had_happened(
    model: Path, text: Path, tmp_path: Path
) -> None:
    """With the dropout of each: the curve and the model are to the bit those of two that nobody killed."""
    words = (*MERGED, "--device", "cpu", "--recovery-option=evaluate_every=128")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def started(name: str) -> subprocess.Popen[bytes]:
        call = [sys.executable, *TORCHRUN, *arguments(model, text, tmp_path / name, "lora", 2048, *words)]
        return subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    command = started("killed")
    while command.poll() is None and not list(tmp_path.glob("killed.training/**/checkpoint-*/trainer_state.json")):
        time.sleep(0.002)
    for process in [*psutil.Process(command.pid).children(recursive=True), command]:
        process.kill()
    _, said = command.communicate()
    assert not (tmp_path / "killed").exists(), said.decode()[-3000:]
    for name in ("killed", "whole"):
        command = started(name)
        _, said = command.communicate()
        assert command.returncode == 0, said.decode()[-3000:]
        assert ("lora: 0 of 2,048 tokens" in said.decode()) == (name == "whole"), "it was begun again"
    found, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    said_of = [
        json.loads((tmp_path / name / "plan.json").read_text())["origin"]["recovery"] for name in ("killed", "whole")
    ]
    assert said_of[0] == said_of[1]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_study_that_was_killed_in_a_training_goes_on_from_its_checkpoint(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = f'\n[training]\ncorpus = "file:{text}"\nlength = 32\ntokens = 2048\nheld_out = 2\n'
    options = '{ name = "lora", learning_rate = 0.01, batch_tokens = 64, evaluate_every = 128, keep = "last" }'
    file = make_study(
        tmp_path / "s.toml", model, text, ["come"], ["concat-merge"], more=f"recovery = [{options}]", end=training
    )
    quiet = {**os.environ, "FLEXI_PLUGINS": ""}
    words = [sys.executable, "-m", "flexi_plugins.cli", "run", str(file), "--out", str(tmp_path / "killed")]
    command = subprocess.Popen(words, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while command.poll() is None and not list(tmp_path.glob("killed/training/**/checkpoint-*/trainer_state.json")):
        time.sleep(0.002)
    command.kill()
    _, begun = command.communicate()
    assert command.returncode == -signal.SIGKILL, begun.decode()[-3000:]
    assert "lora: 0 of 2,048 tokens" in begun.decode()
    resumed = subprocess.run(words, env=quiet, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert " of 2,048 tokens" in resumed.stderr
    assert "lora: 0 of 2,048 tokens" not in resumed.stderr, "it was begun again"
    whole = run_study(file, tmp_path / "whole")[-1]
    monkeypatch.setattr(Pruner, "recover", lambda *_: pytest.fail("what the command trained is there"))
    found = run_study(file, tmp_path / "killed")[-1]
    assert found.plan.tensors == whole.plan.tensors
    curves = [record.plan.origin["recovery"]["curve"] for record in (found, whole)]
    assert curves[0] == curves[1]
    assert [point["tokens"] for point in curves[0]] == list(range(0, 2049, 128))
    assert values([found]) == values([whole])


def test_the_command_and_a_study_train_the_same_model(
    recover: Recover, model: Path, text: Path, tmp_path: Path
) -> None:
    training = f'\n[training]\ncorpus = "file:{text}"\nlength = 32\ntokens = 256\nheld_out = 2\n'
    options = '{ name = "lora", learning_rate = 0.01, batch_tokens = 64, keep = "last" }'
    file = make_study(
        tmp_path / "s.toml", model, text, ["come"], ["concat-merge"], more=f"recovery = [{options}]", end=training
    )
    # the command's calibration is the default one
    file.write_text(
        file.read_text().replace("windows = 4\nlength = 64\ngradient_samples = 3\ngradient_length = 16", "")
    )
    record = run_study(file, tmp_path / "run")[-1]
    assert record.status == "complete", record.reason
    assert recover(tmp_path / "out", *MERGED).exit_code == 0
    written = PruningPlan.from_json(json.loads((tmp_path / "out" / "plan.json").read_text()))
    assert written.blocks == record.plan.blocks
    assert written.tensors == record.plan.tensors
    assert written.origin["recovery"] == record.plan.origin["recovery"]


def test_what_quantisation_leaves_lies_in_the_folder_and_is_no_weight_file(recover: Recover, tmp_path: Path) -> None:
    done = recover(tmp_path / "out", *MERGED, "--recovery-option=group_size=8", method="group-quant")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "weights.packed").is_file()
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_what_another_training_left_beside_its_checkpoints_is_not_taken(
    recover: Recover, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pruner, "write", stopped)
        recover(tmp_path / "out", *MERGED, "--recovery-option=group_size=8", method="group-quant")
    assert list((tmp_path / "out.training").glob("training/group-quant/weights.packed"))
    done = recover(tmp_path / "out", *MERGED)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out" / "weights.packed").exists()
    assert not (tmp_path / "out.training").exists()


def test_an_extended_folder_is_trained_by_its_plan(recover: Recover, model: Path, text: Path, tmp_path: Path) -> None:
    """By any method but distill: repetitions run with the weights of the first run, whatever becomes of these."""
    start = weights(extended(model, text, tmp_path / "longer"))
    adapters = {name for name in start if "lora_" in name}
    shared = "model.layers.2.mlp.down_proj.weight"
    trained = {"adapters": set(adapters), "lora": {*adapters, shared}, "full": set(start), "group-quant": {shared}}
    for method, names in trained.items():
        done = recover(tmp_path / method, "--plan", str(tmp_path / "longer" / "plan.json"), method=method)
        assert done.exit_code == 0, done.output
        plan = PruningPlan.from_json(json.loads((tmp_path / method / "plan.json").read_text()))
        assert len(plan.blocks) == 8
        found = weights(tmp_path / method)
        assert found.keys() == start.keys()
        changed = {name for name in found if not torch.equal(found[name], start[name])}
        assert names <= changed, (method, names - changed)
        assert method in ("lora", "full", "adapters") or not adapters & changed


def test_distill_says_why_it_cannot_train_an_extended_folder_and_what_can(
    recover: Recover, model: Path, text: Path, tmp_path: Path
) -> None:
    """Behind a block that runs again there is no state of the original's to compare with: nothing is trained or written."""
    extended(model, text, tmp_path / "longer")
    done = recover(tmp_path / "out", "--plan", str(tmp_path / "longer" / "plan.json"), method="distill")
    assert isinstance(done.exception, FlexiError)
    assert str(done.exception) == (
        "distill: expected blocks in the original's order, found that block 3 begins with original block 2 behind one that "
        "begins with 2; recover repeated or reordered blocks by another method, such as lora"
    )
    assert not (tmp_path / "out").exists()


def test_the_model_itself_is_trained_where_no_plan_is_named(recover: Recover, tmp_path: Path, model: Path) -> None:
    done = recover(tmp_path / "out", method="full")
    assert done.exit_code == 0, done.output
    before, after = weights(model), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--recovery-option=rank=0",), "lora: rank = 0, expected 1 or more"),
        (("--length=0",), "training: length = 0, expected 2 or more"),
        (("--held-out=0",), "training: held_out = 0, expected 1 or more"),
        (("--plan=x.json", "--ratio=0.2"), "give either --plan, or --metric, --strategy, --ratio and their options"),
        (
            ("--plan=x.json", "--metric-option=a=1"),
            "give either --plan, or --metric, --strategy, --ratio and their options",
        ),
        (("--ratio=0.2",), "give --metric: there is"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_opened(
    words: tuple[str, ...], message: str, recover: Recover, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pruner, "__init__", lambda *_, **__: pytest.fail("opened"))
    done = recover(tmp_path / "out", *words)
    assert message in str(done.exception)


def test_a_dtype_that_nothing_can_be_trained_in_is_refused_before_a_plan_is_made(
    recover: Recover, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pruner, "make", lambda *_: pytest.fail("planned"))
    words = ("--dtype", "float16", "--device", "cpu")
    with pytest.raises(FlexiError, match="lora: float16 can be trained in on a GPU alone"):
        raise recover(tmp_path / "out", *MERGED, *words).exception or AssertionError
    training = f'\n[training]\ncorpus = "file:{text}"\nlength = 32\ntokens = 256\nheld_out = 2\n'
    more = 'recovery = ["none", "lora"]'
    file = make_study(tmp_path / "s.toml", model, text, ["come"], ["concat-merge"], more=more, end=training)
    file.write_text(file.read_text().replace('dtype = "float32"', 'dtype = "float16"'))
    with pytest.raises(FlexiError, match="lora: float16 can be trained in on a GPU alone"):
        run_study(file, tmp_path / "run")


def test_a_method_with_nothing_to_train_in_a_plan_says_so(recover: Recover, tmp_path: Path) -> None:
    done = recover(tmp_path / "out", *MERGED, method="adapters")
    assert "this plan has no such blocks; take a plan of share-lora or extend" in str(done.exception)


@pytest.mark.parametrize(
    ("method", "windows", "options"),
    [
        ("full", 8, ()),
        ("full", 7, ()),
        ("lora", 7, ("--recovery-option=dropout=0",)),
        ("distill", 7, ()),
        ("group-quant", 7, ("--recovery-option=group_size=8", "--recovery-option=learning_rate=0.001")),
    ],
)
def test_two_processes_train_what_one_does(
    method: str, windows: int, options: tuple[str, ...], model: Path, text: Path, tmp_path: Path
) -> None:
    """On batches that each has half of; where they do not come out even nothing is seen twice."""
    store = Store(tmp_path / "plans")
    store.write_plan("k" * 64, PruningPlan.keep(Pruner(str(model)).checkpoint.shape, (0, 1, 2, 4)), {})
    (plan,) = (tmp_path / "plans" / "plans").glob("*.json")
    given = (method, 32 * windows, *options, "--plan", str(plan), "--device", "cpu")
    one, two = (arguments(model, text, tmp_path / name, *given) for name in ("one", "two"))
    alone = CliRunner().invoke(app, one)
    assert alone.exit_code == 0, alone.output
    assert alone.stdout.count("written to") == 1
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *TORCHRUN, *two], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written to") == 1
    trained, together = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(trained[name], together[name], rtol=1e-3, atol=1e-4) for name in trained)
    curves = [
        json.loads((tmp_path / name / "plan.json").read_text())["origin"]["recovery"]["curve"]
        for name in ("one", "two")
    ]
    for point, other in zip(*curves, strict=True):
        assert point == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, "trained by theirs on 90 tokens: held-out loss 3.0000 -> 1.0000 nats a token"),
        (
            {"trained_tokens": 64, "kept_tokens": 32},
            "on 64 tokens: held-out loss 3.0000 -> 2.0000 nats a token, of the",
        ),
        ({"trained_tokens": 64, "kept_tokens": 0}, "held-out loss 3.0000 -> 3.0000 nats a token, of the state after 0"),
        ({"trained_tokens": 0, "kept_tokens": 0}, "recovered by theirs without training"),
        (
            {"trained_tokens": 64, "kept_tokens": 48, "trainings": 2, "tokens_before_last": 32},
            "on 64 tokens, 2 times one behind the other; the last time: held-out loss 2.0000 -> 2.0000 nats a token, of the "
            "state after 16",
        ),
    ],
)
def test_what_is_said_of_a_training_is_of_the_state_that_was_kept(
    facts: dict[str, float], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the method names none, it is the last one."""
    curve = [{"tokens": 16 * i, "held_out_loss": 3.0 - i / 2} for i in (0, 2, 4)]
    show_recovery({"method": "theirs", "facts": facts, "training": {"tokens": 90}, "curve": curve, "notes": []})
    assert said in capsys.readouterr().out
