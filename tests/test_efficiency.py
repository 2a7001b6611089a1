"""The efficiency evaluator: a process of its own for every model, and one that dies takes nobody along."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexi_plugins.data import BlockRecipe, BlockShape, Family, ModelShape, Part, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.evaluators import efficiency
from flexi_plugins.evaluators.efficiency import Efficiency, MeasuringServer
from flexi_plugins.hookspecs import Candidate, EvaluationRequest
from flexi_plugins.machine import peak_memory
from flexi_plugins.modeling import FlexiConfig, FlexiForCausalLM
from flexi_plugins.plugins import Plugins, with_options

WIDTHS = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PLAN = PruningPlan.identity(ModelShape((BlockShape(4, 2, 4, 32),) * 2, hidden=16, vocabulary=64, tied=False))
QUICK = Efficiency(prefill=8, decode=3, batches=(1, 2), repeats=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(LlamaConfig(**WIDTHS, **HEADS)).save_pretrained(path)
    return path


def request_for(folders, dtype="float32"):
    advanced = []

    @contextlib.contextmanager
    def progress(title, total):
        assert title
        yield lambda n: advanced.append((n, total))

    def unused(*_):
        raise AssertionError("efficiency needs neither likelihoods nor models in memory")

    candidates = tuple(Candidate(f"model {i}", PLAN) for i in range(len(folders)))
    request = EvaluationRequest(candidates, None, unused, unused, lambda i: folders[i], progress, {}, dtype=dtype)
    return request, advanced


@pytest.fixture(scope="module")
def outcomes(folder):
    """Measure a plain model, one with damaged weights, one that is not there, and one that is not plain."""
    damaged = folder.with_name("damaged")
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: 900 if file.suffix == ".safetensors" else None])
    uneven = folder.with_name("uneven")
    plan = replace(PLAN, blocks=(PLAN.blocks[0], BlockRecipe(parts=(Part(1, (0,), ()),))))
    FlexiForCausalLM(FlexiConfig.of_plan(plan, LlamaConfig(**WIDTHS, **HEADS), Family("llama"))).save_pretrained(uneven)
    request, advanced = request_for([folder, damaged, folder.with_name("absent"), uneven])
    return list(QUICK.evaluate(request)), advanced


def test_every_number_is_there(outcomes, folder):
    found = {m.name: m for m in outcomes[0][0].measurements}
    speeds = [f"{what}_tokens_per_second@b{b}" for b in (1, 2) for what in ("prefill", "decode")]
    sizes = ["stored_parameters", "runtime_parameters", "macs_per_token", "checkpoint_mib", "peak_memory_mib"]
    assert list(found) == [*sizes, *speeds]
    assert found["stored_parameters"].value == PLAN.stored_parameters
    assert found["checkpoint_mib"].value == (folder / "model.safetensors").stat().st_size / 2**20
    assert 50 < found["peak_memory_mib"].value < 5000
    assert all(found[name].value > 0 and found[name].higher_is_better for name in speeds)
    assert not any(found[name].higher_is_better for name in sizes)


def test_a_model_that_cannot_be_measured_does_not_stop_the_others(outcomes):
    found, advanced = outcomes
    assert [o.failure is None for o in found] == [True, False, False, True]
    assert found[1].failure.startswith("evaluator 'efficiency': SafetensorError: ")
    assert found[2].failure.startswith("evaluator 'efficiency': OSError: ")
    assert advanced == [(1, 4)] * 4


def test_no_process_is_left(outcomes):
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [c for c in commands if "serve()" in c]


# ------------------------------------------------------------------------------------------ processes


FAKE_SERVER = """
import os, pathlib, signal, sys, time
from flexi_plugins.evaluators import efficiency

def measure(job):
    print("noise on standard output")
    if job["do"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job["do"] == "raise":
        raise MemoryError("no more")
    if job["do"] == "take the server along":
        os.kill(os.getppid(), signal.SIGKILL)
    if job["do"] == "sleep":
        pathlib.Path(job["folder"]).write_text(str(os.getpid()))
        time.sleep(600)
    main = hasattr(sys.modules["__main__"], "__file__")
    return {"process": os.getpid(), "server": os.getppid(), "main": main}

def serve():
    efficiency._import_all = lambda: None
    efficiency.measure = measure
    efficiency.serve()
"""


@pytest.fixture
def fake_server(tmp_path, monkeypatch):
    """Let servers do what a job says instead of measuring, and import nothing."""
    (tmp_path / "fake_measuring.py").write_text(FAKE_SERVER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(efficiency, "__name__", "fake_measuring")


@pytest.mark.usefixtures("fake_server")
def test_each_model_has_a_process_of_its_own_that_may_die():
    with MeasuringServer() as server:

        def run(do):
            return server.run({"folder": "x", "do": do})

        first, second = run("work"), run("work")
        assert len({first["process"], second["process"], first["server"], os.getpid()}) == 4
        assert first["server"] == second["server"]
        with pytest.raises(FlexiError, match="killed by SIGKILL, perhaps for lack of memory"):
            run("die")
        with pytest.raises(FlexiError, match="MemoryError: no more"):
            run("raise")
        assert run("work")["server"] == first["server"]
        with pytest.raises(FlexiError, match="its server was killed by SIGKILL"):
            run("take the server along")
        assert run("work")["server"] != first["server"], "another server took over"


@pytest.mark.usefixtures("fake_server")
def test_leaving_ends_the_server_and_its_child(tmp_path):
    told = tmp_path / "child"
    interrupt = threading.Thread(target=lambda: (wait_for(told), os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt), MeasuringServer() as server:  # noqa: PT012 (the exit is what is tested)
        interrupt.start()
        server.run({"folder": str(told), "do": "sleep"})
    interrupt.join()
    child = Path(f"/proc/{told.read_text()}/stat")
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child still runs")


def wait_for(path):
    while not path.exists() or not path.read_text():
        time.sleep(0.02)


@pytest.mark.usefixtures("fake_server")
def test_a_script_without_main_guard_runs_once(tmp_path):
    (tmp_path / "script.py").write_text(
        "from flexi_plugins.evaluators import efficiency\n"
        "print('once')\n"
        "efficiency.__name__ = 'fake_measuring'\n"
        "with efficiency.MeasuringServer() as server:\n"
        "    print(server.run({'folder': 'x', 'do': 'work'})['main'])\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "script.py"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["once", "False"]), done.stderr


# ----------------------------------------------------------------------------------------- measuring


def job_for(folder, **changes):
    options = {"prefill": 8, "decode": 3, "batches": [2], "repeats": 2}
    return {"folder": str(folder), "vocabulary": 64, "seed": 0, "threads": 1, "dtype": "float32", **options, **changes}


def test_the_dtype_and_the_threads_are_those_asked_for(folder, monkeypatch):
    threads, seen = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    assert efficiency._load(str(folder), "bfloat16").dtype == torch.bfloat16
    efficiency.measure(job_for(folder, threads=3))
    assert seen == [3]
    request, _ = request_for([folder], "bfloat16")
    job = QUICK._job(request, 0)
    assert (job["dtype"], job["threads"], job["seed"]) == ("bfloat16", threads, 0)


def test_exactly_the_asked_tokens_are_decoded_with_cache(folder):
    model, lengths = efficiency._load(str(folder), "float32"), []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(tuple(inputs[0].shape)))
    efficiency._speeds(model, job_for(folder), 2)
    warm_up = [(2, 8)] + [(2, 1)] * efficiency.WARM_UP
    assert lengths == warm_up + 2 * ([(2, 8)] + [(2, 1)] * 3)


def test_greedy_steps_are_those_of_generate(folder):
    model, tokens = efficiency._load(str(folder), "float32"), []
    hook = model.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    prompt = torch.arange(1, 9)[None]
    with torch.inference_mode():
        efficiency._run(model, prompt, 5)
        hook.remove()
        generated = model.generate(prompt, do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    assert torch.equal(torch.cat(tokens[:6], 1), generated)


def test_the_peak_forgets_what_was_before(folder):
    torch.ones(64 * 2**20, dtype=torch.uint8)
    before = peak_memory()
    efficiency._forget_peak()
    assert peak_memory() <= before - 32 * 2**20 or not Path("/proc/self/clear_refs").exists()


# ----------------------------------------------------------------------------------------- the plugin


@pytest.mark.parametrize(
    "options", [{"prefill": 0}, {"decode": -1}, {"repeats": 0}, {"batches": []}, {"batches": [1, 0]}]
)
def test_options_that_measure_nothing_are_refused(options):
    with pytest.raises(FlexiError, match=f"option '{next(iter(options))}': expected at least 1"):
        with_options("evaluator", Efficiency(), options)


def test_it_is_a_plugin_with_options():
    plugins = Plugins.load(("flexi_plugins.evaluators.efficiency",))
    assert plugins.get("evaluator", "efficiency", {"batches": "1,4", "decode": 8}).batches == (1, 4)


def test_importing_it_loads_no_torch():
    script = "import sys, flexi_plugins.evaluators.efficiency; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
