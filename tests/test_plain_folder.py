"""A pruned real model in other people's hands: a plain folder, judged by stock lm-eval in a process without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.data]
DOCUMENTS = 12

STOCK = """
import json, logging, sys
from pathlib import Path
import lm_eval, torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

logging.disable(logging.WARNING)
folder, data, scratch, limit = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
packaged = Path(lm_eval.__file__).parent / "tasks" / "piqa" / "piqa.yaml"
task = {"include": str(packaged), "task": "piqa_local", "dataset_path": "json", "training_split": None,
        "dataset_kwargs": {"data_files": {"validation": str(data / "tasks" / "piqa.jsonl")}}}
(scratch / "piqa_local.yaml").write_text(json.dumps(task))
results = lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": folder, "dtype": "float32"}, tasks=["piqa_local"], limit=limit, batch_size=4,
    task_manager=TaskManager(include_path=str(scratch)), device="cpu")
samples = results["samples"]["piqa_local"]
logprobs = torch.tensor([[float(r[0][0]) for r in s["resps"]] for s in samples]).log_softmax(1)
right = torch.tensor([s["target"] for s in samples])

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
prompt = AutoTokenizer.from_pretrained(folder)("The house at the end of the street", return_tensors="pt")
texts = [model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=c)[0].tolist() for c in (True, False)]
assert "flexi_plugins" not in sys.modules
print("RESULT", json.dumps({
    "class": type(model).__name__, "piqa_acc": results["results"]["piqa_local"]["acc,none"],
    "piqa_choice_logprob": float(logprobs.gather(1, right[:, None]).mean()), "same_with_cache": texts[0] == texts[1]}))
"""


def flexi(*arguments: str) -> str:
    """Run the command line; return its standard output."""
    command = [sys.executable, "-m", "flexi_plugins.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


TRAINED = [
    "--method",
    "lora",
    "--training-corpus",
    "wikitext2",
    "--length",
    "128",
    "--tokens",
    "2048",
    "--held-out",
    "8",
    "--recovery-option=learning_rate=0.001",
    "--recovery-option=batch_tokens=256",
    "--recovery-option=evaluate_every=1024",
]


@pytest.mark.skipif(
    not os.environ.get("FLEXI_DATA"), reason="FLEXI_DATA is not set: it names the folder with local tasks/"
)
@pytest.mark.parametrize("trained", [False, True], ids=["merged", "merged and recovered"])
def test_stock_lm_eval_gives_a_plain_folder_the_answers_of_the_harness(trained: bool, tmp_path: Path) -> None:
    data, folder = os.environ["FLEXI_DATA"], tmp_path / "merged"
    method = ["--metric", "come", "--strategy", "concat-merge", "--ratio", "0.1"]
    command = ["recover", *method, *TRAINED, "--data", data] if trained else ["prune", *method]
    said = json.loads(flexi(*command, "-o", str(folder), "--json"))
    assert said["plain"]
    assert said["ratio"] >= 0.1
    if trained:
        first, *_, last = said["recovery"]["curve"]
        assert last["held_out_loss"] < first["held_out_loss"]
        assert said["recovery"]["facts"]["kept_tokens"] > 0  # it is not the start that is kept

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    stock_run = [sys.executable, "-c", STOCK, str(folder), data, str(scratch), str(DOCUMENTS)]
    done = subprocess.run(stock_run, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    stock = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[7:])
    assert stock["class"] == "LlamaForCausalLM"
    assert stock["same_with_cache"]

    measured = ["--tasks", "piqa", "--limit", str(DOCUMENTS), "--perplexity", "", "--dtype", "float32", "--data", data]
    ours = json.loads(flexi("eval", "--plan", str(folder / "plan.json"), *measured, "--json"))
    values = {m["name"]: m["value"] for m in ours["measurements"]}
    assert values["piqa_acc"] == stock["piqa_acc"]
    assert values["piqa_choice_logprob"] == pytest.approx(stock["piqa_choice_logprob"], abs=1e-3)
