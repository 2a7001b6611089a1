"""Evaluator ``efficiency``: parameters, memory and speed of exported models, each run in a process of its own.

One server process imports torch and transformers and forks a child for every model, so that a child starts clean,
imports nothing again, cannot take the others along, and never runs the caller's main module.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

from flexi_plugins import hookimpl
from flexi_plugins.data import Measurement, PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Corpus, EvaluationRequest, Evaluator, Outcome
from flexi_plugins.machine import peak_memory

if TYPE_CHECKING:
    from torch import Tensor, nn

WARM_UP = 2  # decoded tokens of the run before those that count
MIB = 2**20
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin while they wait are several times slower on a busy machine


@hookimpl
def evaluators() -> list[Evaluator]:
    """Return the evaluator of this file."""
    return [Efficiency()]


@dataclass(frozen=True)
class Efficiency:
    """Prompts of ``prefill`` random tokens, then ``decode`` greedy ones with cache; the median of ``repeats`` runs."""

    name: ClassVar[str] = "efficiency"

    prefill: int = 128
    decode: int = 32
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 3

    def __post_init__(self) -> None:
        self.check()

    def inputs(self, data: Path | None, corpora: Mapping[str, Corpus]) -> str:
        """Return nothing: it reads no text."""
        return ""

    def check(self) -> None:
        """Raise for sizes and repeats below 1."""
        for option in ("prefill", "decode", "batches", "repeats"):
            value = getattr(self, option)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise FlexiError(f"evaluator 'efficiency': option {option!r}: expected at least 1, found {value!r}")

    def evaluate(self, request: EvaluationRequest) -> Iterator[Outcome]:
        """Measure one candidate after the other; one that cannot be measured has its reason, the others go on."""
        total = len(request.candidates)
        with request.progress("measuring memory and speed", total) as advance, MeasuringServer() as server:
            for index in range(total):
                yield self._outcome(server, request, index)
                advance(1)

    def _outcome(self, server: MeasuringServer, request: EvaluationRequest, index: int) -> Outcome:
        try:
            found = server.run(self._job(request, index))
        except FlexiError as error:
            return Outcome(failure=str(error))
        return Outcome((*_sizes(request.candidates[index].plan), *(_measurement(n, v) for n, v in found.items())))

    def _job(self, request: EvaluationRequest, index: int) -> dict[str, Any]:
        import torch

        options = {name: getattr(self, name) for name in ("prefill", "decode", "batches", "repeats")}
        vocabulary = request.candidates[index].plan.shape.vocabulary
        machine = {"threads": torch.get_num_threads(), "dtype": request.dtype}
        folder = str(request.folder(index))
        return {"folder": folder, "vocabulary": vocabulary, "seed": request.seed, **options, **machine}


def _sizes(plan: PruningPlan) -> list[Measurement]:
    names = ("stored_parameters", "runtime_parameters", "macs_per_token")
    return [Measurement(name, float(getattr(plan, name)), higher_is_better=False) for name in names]


def _measurement(name: str, value: float) -> Measurement:
    return Measurement(name, value, higher_is_better="per_second" in name)


# ------------------------------------------------------------------------------------- the caller's side


class MeasuringServer:
    """A process that has imported what models need and forks a child per job; started when needed, ended on exit."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None

    def __enter__(self) -> MeasuringServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, job: dict[str, Any]) -> dict[str, float]:
        """Return what the child measured; an error of the child, or its death, is a FlexiError that says so."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise FlexiError(f"evaluator 'efficiency': its server {_death(process.wait())}: {self._end()}")
        answer = json.loads(line)
        if "failure" in answer:
            raise FlexiError(f"evaluator 'efficiency': {answer['failure']}")
        return answer

    def _start(self) -> subprocess.Popen[str]:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see _end)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
            env={**WAITING, **os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # so that it can be ended together with its child
        )
        return self._process

    def _end(self) -> str:
        """End the server and its child, and return the last line that it had to say."""
        process, errors, self._process, self._errors = self._process, self._errors, None, None
        if process is None or errors is None:
            return ""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for stream in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                stream and stream.close()
        process.wait()
        with errors:
            errors.seek(0)
            return (errors.read().strip().splitlines() or ["it said nothing"])[-1]


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        hint = ", perhaps for lack of memory" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"
    return f"ended with exit code {code}"


# ------------------------------------------------------------------------------------- the server's side


def serve() -> None:
    """Answer one JSON job a line until standard input ends; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_all()
    for line in sys.stdin:
        answers.write(json.dumps(_in_child(json.loads(line))) + "\n")
        answers.flush()


def _import_all() -> None:
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.utils import logging

    from flexi_plugins import modeling

    logging.disable_progress_bar()
    modeling.register()


def _in_child(job: dict[str, Any]) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, job))
    child.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = None
    child.join()
    return answer or {"failure": f"its process {_death(child.exitcode)}"}


def _answer(sender: Any, job: dict[str, Any]) -> None:
    try:
        sender.send(measure(job))
    except Exception as error:  # whatever a model does wrong is its result
        sender.send({"failure": f"{type(error).__name__}: {error}"})


# -------------------------------------------------------------------------------------- the child's side


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Load the model of a job in this process and return its measurements by name."""
    import torch

    torch.set_num_threads(job["threads"])
    model = _load(job["folder"], job["dtype"])
    _forget_peak()
    speeds: dict[str, float] = {}
    with torch.inference_mode():
        for batch in job["batches"]:
            speeds |= _speeds(model, job, batch)
    files = Path(job["folder"]).glob("model*.safetensors")  # not the tensors that lie beside the plan
    sizes = {"checkpoint_mib": sum(f.stat().st_size for f in files) / MIB, "peak_memory_mib": peak_memory() / MIB}
    return sizes | speeds


def _load(folder: str, dtype: str) -> nn.Module:
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=kind, use_safetensors=True, local_files_only=True).eval()


def _speeds(model: nn.Module, job: dict[str, Any], batch: int) -> dict[str, float]:
    """Return prefill and decode tokens per second at one batch size."""
    import torch

    generator = torch.Generator().manual_seed(job["seed"])
    prompt = torch.randint(job["vocabulary"], (batch, job["prefill"]), generator=generator)
    _run(model, prompt, WARM_UP)
    runs = [_run(model, prompt, job["decode"]) for _ in range(job["repeats"])]
    prefill, decode = (statistics.median(seconds) for seconds in zip(*runs, strict=True))
    return {
        f"prefill_tokens_per_second@b{batch}": batch * job["prefill"] / prefill,
        f"decode_tokens_per_second@b{batch}": batch * job["decode"] / decode,
    }


def _run(model: nn.Module, prompt: Tensor, steps: int) -> tuple[float, float]:
    """Return the seconds that the prompt and that ``steps`` greedy tokens after it took."""
    start = time.perf_counter()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    middle = time.perf_counter()
    for _ in range(steps):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    return middle - start, time.perf_counter() - middle


def _forget_peak() -> None:
    """Let the peak begin with the loaded model, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
