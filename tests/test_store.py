"""The store: whole files or none, exact round trips, problems named."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexi_plugins import store
from flexi_plugins.data import BlockShape, Cell, Measurement, ModelShape, PluginVersion, PruningPlan, Record
from flexi_plugins.digests import tensor_digest
from flexi_plugins.errors import FlexiError
from flexi_plugins.files import alone
from flexi_plugins.precision import native_bfloat16
from flexi_plugins.store import Journal, Store

SHAPE = ModelShape((BlockShape(2, 1, 4, 16),) * 4, hidden=8, vocabulary=32, tied=True)
CELL = Cell(
    "tiny",
    "f" * 64,
    "c" * 64,
    "come",
    "remove-blocks",
    0.2,
    "none",
    0,
    "{}",
    (PluginVersion("metric", "come", "x", "1"),),
)
RECORD = Record(
    CELL,
    "complete",
    measurements=(Measurement("wikitext2_ppl@128", 31.75, False), Measurement("boolq_acc", 0.5, True, 0.01, 0.6)),
    plan=PruningPlan.keep(SHAPE, (0, 1, 3)),
    seconds={"sweep": 1.5},
    shared_with={"sweep": 12},
    versions={"torch": "2.13.0"},
    commit="abc",
    dirty=True,
    date="2025-01-02T03:04:05",
)
DOCUMENTS = {"perplexity": [{"document": 0, "loss": 1.5}], "tasks": [{"document": "a", "right": True, "task": "boolq"}]}
DENSE = replace(CELL, metric=None, strategy=None, ratio=0.0)


# ---------------------------------------------------------------------------------------------- records


def test_what_is_written_is_read(tmp_path):
    Store(tmp_path).write(RECORD, DOCUMENTS)
    opened = Store(tmp_path)
    assert opened.get(CELL) == RECORD
    assert opened.records() == [RECORD]
    assert opened.problems == []
    assert [p.name for p in (tmp_path / "records").iterdir()] == [f"come-remove-blocks-0.2-s0-{CELL.hash[:12]}.json"]


def test_documents_of_several_evaluators_share_a_file(tmp_path):
    opened = Store(tmp_path)
    opened.write(RECORD, DOCUMENTS)
    found = opened.documents(CELL)
    assert list(found["evaluator"]) == ["perplexity", "tasks"]
    assert list(found["document"]) == ["0", "a"], "kinds that do not fit together become text"
    assert found["loss"][0] == 1.5
    assert opened.documents(DENSE).empty


def test_another_cell_is_not_found(tmp_path):
    opened = Store(tmp_path)
    opened.write(RECORD)
    other = replace(CELL, plugins=(PluginVersion("metric", "come", "x", "2"),))
    assert other.label == CELL.label
    assert opened.get(other) is None
    assert opened.problems == []


def test_the_model_is_known_by_content_not_by_name(tmp_path):
    opened = Store(tmp_path)
    opened.write(RECORD)
    assert opened.get(replace(CELL, model="/elsewhere/tiny")) == RECORD


def test_a_failed_record_is_overwritten(tmp_path):
    opened = Store(tmp_path)
    opened.write(replace(RECORD, status="failed", reason="perplexity is NaN", measurements=()), DOCUMENTS)
    opened.write(RECORD)
    assert opened.records() == [RECORD]
    assert opened.documents(CELL).empty, "documents of the failed try do not stay beside the new record"


def test_numbers_that_json_has_not_survive(tmp_path):
    values = (math.nan, math.inf, -math.inf, 0.1)
    opened = Store(tmp_path)
    opened.write(replace(RECORD, measurements=tuple(Measurement(f"m{i}", v, False) for i, v in enumerate(values))))
    found = opened.get(CELL)
    assert found is not None
    assert str([m.value for m in found.measurements]) == "[nan, inf, -inf, 0.1]"
    json.loads(opened.path(CELL).read_text(), parse_constant=pytest.fail)  # strict JSON: other programs read it


# ------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"cell": 1}', "\udcff", '{"status": "complete"}'])
def test_a_corrupt_record_is_absent_reported_and_made_again(tmp_path, text):
    opened = Store(tmp_path)
    opened.write(RECORD)
    opened.path(CELL).write_bytes(text.encode(errors="surrogateescape"))
    assert opened.get(CELL) is None
    assert opened.get(CELL) is None
    assert opened.records() == []
    (problem,) = opened.problems
    assert opened.path(CELL).name in problem
    opened.write(RECORD)
    assert opened.get(CELL) == RECORD


@pytest.mark.parametrize("kept", range(0, 1600, 97))
def test_a_half_written_record_is_never_read(tmp_path, kept):
    opened = Store(tmp_path)
    opened.write(RECORD)
    text = opened.path(CELL).read_text()
    opened.path(CELL).write_text(text[:kept])
    assert kept < len(text) - 1
    assert opened.get(CELL) is None


def test_foreign_files_are_not_records(tmp_path):
    opened = Store(tmp_path)
    opened.write(RECORD)
    folder = tmp_path / "records"
    (folder / "renamed-0123456789ab.json").write_text(opened.path(CELL).read_text())
    (folder / f"{opened.path(CELL).name}.1.tmp").write_text(opened.path(CELL).read_text())
    (folder / "notes.txt").write_text("mine")
    assert opened.records() == [RECORD]
    assert "renamed-0123456789ab.json" in opened.problems[0]
    Store(tmp_path)
    assert (folder / "notes.txt").exists(), "only temporary files are removed"


def test_an_unreadable_table_of_documents_is_told_and_counts_as_none(tmp_path):
    opened = Store(tmp_path)
    opened.write(RECORD, DOCUMENTS)
    [file] = (tmp_path / "documents").iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert opened.documents(CELL).empty
    assert opened.problems[0].startswith(f"{file}: not a whole table of documents")


@pytest.mark.parametrize(("renames", "documents"), [(0, False), (1, True)])
def test_a_kill_leaves_no_record_without_its_documents(tmp_path, renames, documents):
    script = f"""
import os, signal
from flexi_plugins.store import Store
from tests_store import RECORD, DOCUMENTS
rename, left = os.replace, [{renames}]
def replace(*paths):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    rename(*paths)
os.replace = replace
Store({str(tmp_path)!r}).write(RECORD, DOCUMENTS)
"""
    (tmp_path / "tests_store.py").write_text(Path(__file__).read_text())
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert list(tmp_path.rglob("*.tmp")), "the kill came in the middle"
    opened = Store(tmp_path)
    with alone(tmp_path):
        pass
    assert not list(tmp_path.rglob("*.tmp"))
    assert opened.get(CELL) is None
    assert opened.records() == []
    assert opened.problems == []
    assert (not opened.documents(CELL).empty) == documents
    opened.write(RECORD, DOCUMENTS)
    assert opened.get(CELL) == RECORD


def test_temporary_files_of_running_processes_stay(tmp_path):
    (tmp_path / "records").mkdir()
    running = tmp_path / "records" / f"x.json.{os.getppid()}.tmp"
    running.write_text("half")
    with alone(tmp_path):
        assert running.exists()


def test_who_does_not_hold_a_folder_leaves_unfinished_files_alone(tmp_path):
    """A process that is not known here may be one on another host."""
    for name in ("records", "documents", "plans", "journal"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json.999999999.tmp").write_text("half")
    Store(tmp_path).records()
    Journal(tmp_path).get("p" * 64, "g" * 64)
    assert len(list(tmp_path.rglob("*.tmp"))) == 4
    with alone(tmp_path):
        assert not list(tmp_path.rglob("*.tmp"))


@contextlib.contextmanager
def files_limited_to(size):
    """Let writes past a size fail as on a full disk (with EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def plan_with_tensors():
    tensors = {"blocks.0.bias": torch.randn(300), "blocks.1.bias": torch.randn(7).bfloat16()}
    plan = replace(PruningPlan.identity(SHAPE), tensors=tuple((n, tensor_digest(t)) for n, t in tensors.items()))
    return plan, tensors


@pytest.mark.parametrize("what", ["record", "documents", "tensors", "journal"])
def test_a_full_disk_says_what_to_do_and_leaves_nothing_half(tmp_path, what):
    opened, journal, (plan, tensors) = Store(tmp_path), Journal(tmp_path), plan_with_tensors()
    actions = {
        "record": lambda: opened.write(RECORD),
        "documents": lambda: opened.write(RECORD, DOCUMENTS),
        "tensors": lambda: opened.write_plan("k" * 64, plan, tensors),
        "journal": lambda: journal.put("p", "g", list(range(1000))),
    }
    with files_limited_to(200), pytest.raises(FlexiError, match=r"cannot be written .* free space .* again") as caught:
        actions[what]()
    assert str(tmp_path) in str(caught.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    actions[what]()


def test_a_full_disk_keeps_the_earlier_record(tmp_path, monkeypatch):
    opened = Store(tmp_path)
    opened.write(RECORD)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FlexiError, match="No space left on device"):
        opened.write(replace(RECORD, reason="again"))
    assert opened.get(CELL) == RECORD


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(FlexiError, match=r"runs/records/.*cannot be written"):
        Store(tmp_path / "runs").write(RECORD)


# -------------------------------------------------------------------------------------------------- plans


def test_plans_and_their_tensors_come_back(tmp_path):
    plan, tensors = plan_with_tensors()
    opened = Store(tmp_path)
    opened.write_plan("k" * 64, plan, tensors)
    found = opened.read_plan("k" * 64)
    assert found is not None
    assert found[0] == plan
    assert {n: tensor_digest(t) for n, t in found[1].items()} == dict(plan.tensors)
    assert PruningPlan.from_json(json.loads(next((tmp_path / "plans").glob("*.json")).read_text())) == plan


def test_a_plan_without_tensors_has_one_file(tmp_path):
    opened = Store(tmp_path)
    opened.write_plan("a" * 64, PruningPlan.identity(SHAPE), {})
    assert opened.read_plan("a" * 64) == (PruningPlan.identity(SHAPE), {})
    assert opened.read_plan("b" * 64) is None
    assert [p.suffix for p in (tmp_path / "plans").iterdir()] == [".json"]


def spoil(tensors_file, how):
    if how == "missing":
        tensors_file.unlink()
    elif how == "truncated":
        tensors_file.write_bytes(tensors_file.read_bytes()[:-9])
    else:
        data = bytearray(tensors_file.read_bytes())
        data[-1] ^= 1
        tensors_file.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
def test_a_plan_whose_tensors_are_not_its_own_is_made_again(tmp_path, how):
    plan, tensors = plan_with_tensors()
    opened = Store(tmp_path)
    opened.write_plan("k" * 64, plan, tensors)
    spoil(next((tmp_path / "plans").glob("*.safetensors")), how)
    assert opened.read_plan("k" * 64) is None
    assert "made again" in opened.problems[0]


def test_a_plan_with_other_tensors_is_not_written(tmp_path):
    plan, tensors = plan_with_tensors()
    tensors["blocks.0.bias"] = tensors["blocks.0.bias"] + 1
    with pytest.raises(FlexiError, match=r"do not fit the attached tensors blocks\.0\.bias"):
        Store(tmp_path).write_plan("k" * 64, plan, tensors)


def test_the_digest_tells_content_shape_and_dtype_apart():
    zeros = torch.zeros(2, 3)
    others = [
        zeros.T,
        zeros.half(),
        zeros.to(torch.int32),
        torch.zeros(6),
        zeros + 1,
        torch.zeros(0, 3),
        torch.zeros(()),
    ]
    assert len({tensor_digest(t) for t in [zeros, *others]}) == 8
    assert tensor_digest(zeros) == tensor_digest(torch.zeros(3, 2).T) == tensor_digest(zeros.clone().requires_grad_())


# ------------------------------------------------------------------------------------------------ journal


def test_the_journal_keeps_nan_and_exact_numbers(tmp_path):
    answers = [(-1.1, True), (math.nan, False), (math.inf, False), (-5e-324, True), (0.1 + 0.2, False)]
    Journal(tmp_path).put("p" * 64, "g" * 64, answers)
    found = Journal(tmp_path).get("p" * 64, "g" * 64)
    assert repr(found) == repr([list(a) for a in answers])


def test_the_journal_answers_only_what_it_was_asked(tmp_path):
    journal = Journal(tmp_path)
    journal.put("p" * 64, "g" * 64, [1])
    assert journal.get("p" * 16 + "q" * 48, "g" * 64) is None
    assert journal.get("p" * 64, "h" * 64) is None
    next(tmp_path.rglob("*.json")).write_text('{"plan": ')
    assert journal.get("p" * 64, "g" * 64) is None


def test_the_journal_clears_itself_and_leftovers(tmp_path):
    journal = Journal(tmp_path)
    journal.clear()
    journal.put("p" * 64, "g" * 64, [1])
    leftover = tmp_path / "journal" / ("p" * 16) / f"x.json.{os.getpid()}.tmp"
    leftover.write_text("half")
    with alone(tmp_path):
        assert not leftover.exists()
    journal.clear()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- rows


def test_rows_say_all_of_a_record_dense_first():
    dense = Record(DENSE, "complete", plan=PruningPlan.identity(SHAPE))
    failed = Record(replace(CELL, seed=1), "failed", reason="NaN")
    rows = store.rows([failed, RECORD, dense])
    assert list(rows["label"]) == ["dense-s0", "come-remove-blocks-0.2-s0", "come-remove-blocks-0.2-s1"]
    assert list(rows.columns[-4:]) == ["wikitext2_ppl@128", "boolq_acc", "boolq_acc_stderr", "boolq_acc_chance"]
    row = rows.iloc[1]
    assert RECORD.plan is not None
    assert row["stored_parameters"] == RECORD.plan.stored_parameters
    assert row["true_ratio"] == RECORD.plan.ratio
    assert (row["boolq_acc"], row["boolq_acc_stderr"], row["boolq_acc_chance"]) == (0.5, 0.01, 0.6)
    assert rows.iloc[2]["reason"] == "NaN"
    assert rows.attrs["versions"] == {"torch": ["2.13.0"]}
    assert rows.attrs["commits"] == ["abc with changes"]


def test_no_records_give_no_rows():
    rows = store.rows([])
    assert len(rows) == 0
    assert "stored_parameters" in rows.columns


# -------------------------------------------------------------------------------------------- provenance


def test_the_environment_names_versions_and_machine():
    found = store.environment()
    assert found["torch"] == torch.__version__
    assert {"python", "transformers", "lm_eval", "flexi-plugins", "system"} <= found.keys()
    products = "bfloat16" if native_bfloat16() else "no bfloat16"
    assert f"({torch.backends.cpu.get_cpu_capability()}, {products}), " in found["machine"]
    assert "cores" in found["machine"]
    assert all(isinstance(v, str) for v in found.values())
    assert "gpu" not in found
    assert store.environment("NVIDIA H100")["gpu"] == "NVIDIA H100"


def git(folder, *arguments):
    who = ["-c", "user.name=x", "-c", "user.email=x@y.z", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_of_the_checkout_that_holds_the_package(tmp_path, monkeypatch):
    module = tmp_path / "package" / "store.py"
    module.parent.mkdir()
    module.write_text("1")
    monkeypatch.setattr(store, "__file__", str(module))
    assert store.commit() == ("", False)
    git(tmp_path, "init")
    assert store.commit() == ("", False), "installed inside somebody else's repository"
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-m", "x")
    (tmp_path / "notes.txt").write_text("not of the package")
    commit, dirty = store.commit()
    assert (len(commit), dirty) == (40, False)
    module.write_text("2")
    assert store.commit() == (commit, True)


def test_importing_the_store_loads_no_torch_and_no_pandas():
    script = "import sys, flexi_plugins.store; print({'torch', 'pandas', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_numbers_stand_on_one_line_and_text_is_left_alone():
    value = {
        "units": [1, 2, 3],
        "losses": [0.5, math.inf, None, True],
        "text": ["[\n 1,\n 2\n]", "[ 1,  2 ]"],
        "nested": [[1, 2], {"a": [4]}, []],
        "options": '{"windows": [\n  1\n]}',
    }
    text = store.to_text(value, 1)
    assert store.from_text(text) == value
    assert '"units": [1, 2, 3],' in text
    assert store.from_text(store.to_text(value)) == value
