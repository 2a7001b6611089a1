"""Little memory: blocks read when they are needed, states spilled, batches in groups; the numbers stay the same."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_sweep import Journal, Progress, some_requests, zoo
from tiny import attached_for, change, family_of, opened, sharing, tiny, tokens

from flexi_plugins import machine
from flexi_plugins.calibration import Calibrator
from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.data import BlockRecipe, ModelShape, Part, PruningPlan, Statistics
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution import layout as layouts
from flexi_plugins.execution import likelihoods as likelihoods_
from flexi_plugins.execution import states as spilling
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.layout import Layout
from flexi_plugins.execution.likelihoods import likelihoods
from flexi_plugins.execution.readout import Answer, Batch
from flexi_plugins.execution.states import LARGE, States
from flexi_plugins.execution.sweep import Planned, Sweeper
from flexi_plugins.hookspecs import Recovered, RecoveryRequest
from flexi_plugins.machine import Machine, free_memory, parse_memory
from flexi_plugins.metrics import come, flexigpt, saap
from flexi_plugins.plugins import Plugins
from flexi_plugins.pruner import Training
from flexi_plugins.recovery.none import NoRecovery
from flexi_plugins.rewrite import with_digests, write_checkpoint
from flexi_plugins.testing.bench import TinyPruner
from flexi_plugins.testing.models import tiny_checkpoint, tiny_tokenizer

STATISTICS = {s.name: s for module in (come, flexigpt, saap) for s in module.statistics()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint on disk."""
    checkpoint = opened(tiny("qwen2-mixed"))
    write_checkpoint(PruningPlan.identity(checkpoint.shape), checkpoint, None, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "GROUP_TOKENS", 16)


def open_folder(folder: Path) -> Checkpoint:
    return Checkpoint.from_folder(folder, family_of)


def batches(count: int = 4) -> list[Batch]:
    ids = [tokens(2, 8, seed=n) for n in range(count)]
    return [Batch(i, [(0, (2, 3), (1, 2)), (1, (7,), (5,))]) for i in ids]


def least(blocks: Callable[[int], Blocks], run: Callable[[Blocks], object]) -> int:
    """Return the least memory that works, as the error says."""
    with pytest.raises(FlexiError, match="too small for one block and one batch") as caught:
        run(blocks(1000))
    found = re.search(r"at least ([\d.]+) MiB", str(caught.value))
    assert found
    return math.ceil((float(found[1]) + 0.01) * 2**20)


def swept(blocks: Blocks, planned: list[Planned], count: int = 4) -> dict[int, dict[int, list[Answer]]]:
    return dict(Sweeper(blocks).sweep(planned, batches(count)))


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("extra", [0, 20_000, 60_000, 150_000, 10_000_000])
def test_any_memory_gives_the_same_answers_and_reads_what_was_announced(folder: Path, extra: int) -> None:
    planned = zoo(open_folder(folder).shape)
    expected = swept(Blocks(open_folder(folder)), planned)
    memory = least(lambda m: Blocks(open_folder(folder), memory=m), lambda b: swept(b, planned)) + extra
    checkpoint = open_folder(folder)
    said: list[str] = []
    sweeper = Sweeper(Blocks(checkpoint, memory=memory), said.append)
    before = checkpoint.bytes_read
    assert dict(sweeper.sweep(planned, batches())) == expected
    layout = sweeper.laid
    assert layout is not None
    assert checkpoint.bytes_read - before == layout.reads
    assert said == ([str(layout)] if layout.streamed else [])
    assert sweeper.blocks.states.held == 0, "no state outlives the sweep"


def test_the_tightest_memory_runs_several_groups_and_spills(folder: Path) -> None:
    planned = zoo(open_folder(folder).shape)
    memory = least(lambda m: Blocks(open_folder(folder), memory=m), lambda b: swept(b, planned))
    blocks = Blocks(open_folder(folder), memory=memory)
    sweeper = Sweeper(blocks)
    assert len(dict(sweeper.sweep(planned, batches()))) == 4
    assert sweeper.laid is not None
    assert sweeper.laid.streamed
    assert len(sweeper.laid.groups) == 4
    assert blocks.states.spilled > 0


def test_the_head_takes_no_room_where_states_alone_are_wanted() -> None:
    checkpoint = opened(tiny("llama", vocab_size=5000))
    planned = [Planned(PruningPlan.identity(checkpoint.shape))]
    given, states = batches(1), [Batch(tokens(2, 8, seed=0))]

    def blocks(memory: int) -> Blocks:
        return Blocks(checkpoint, memory=memory)

    with_head = least(blocks, lambda b: list(Sweeper(b).sweep(planned, given)))
    without = least(blocks, lambda b: list(Sweeper(b).sweep(planned, states)))
    assert with_head - without > 0.5 * 16 * 5000 * 12, "16 positions' logits"
    assert list(Sweeper(blocks(without)).sweep(planned, states))


def ascending(checkpoint: Checkpoint) -> list[Planned]:
    shape = checkpoint.shape
    whole = PruningPlan.identity(shape)
    narrow = change(whole, {2: BlockRecipe(parts=(Part(2, (0, 1), (0, 3, 5)),))})
    both = BlockRecipe(parts=(Part(2, (0, 1)), Part(4, (2, 3))))
    merged = PruningPlan(shape, (*whole.blocks[:2], both))
    return [Planned(p) for p in (whole, narrow, merged, PruningPlan.keep(shape, [0, 2, 4]))]


def streamed(folder: Path, planned: list[Planned], room: float = 0.0) -> tuple[Checkpoint, Layout]:
    """Sweep with memory for one group of batches and for some, but not all, of the weights."""
    checkpoint = open_folder(folder)
    memory = least(lambda m: Blocks(open_folder(folder), memory=m), lambda b: swept(b, planned))
    blocks = Blocks(checkpoint, memory=memory + int(room * sum(Blocks(checkpoint).sizes.values())))
    before = checkpoint.bytes_read
    sweeper = Sweeper(blocks)
    assert len(dict(sweeper.sweep(planned, batches(1)))) == 1
    layout = sweeper.laid
    assert layout is not None
    assert layout.streamed
    assert checkpoint.bytes_read - before == layout.reads
    return checkpoint, layout


def test_plans_whose_sources_ascend_read_each_tensor_once(folder: Path) -> None:
    checkpoint = open_folder(folder)
    inner = set(checkpoint.tensor_names()) - set(checkpoint.outer_names())
    _, layout = streamed(folder, ascending(checkpoint), 0.25)
    assert layout.passes == 1
    assert layout.reads == checkpoint.bytes_of(inner)


def test_other_plans_read_again_what_no_memory_is_left_for(folder: Path) -> None:
    shape = open_folder(folder).shape
    backwards = Planned(PruningPlan.keep(shape, [4, 3, 2, 1, 0]))
    checkpoint, layout = streamed(folder, [Planned(PruningPlan.identity(shape)), backwards])
    inner = set(checkpoint.tensor_names()) - set(checkpoint.outer_names())
    assert layout.passes == 5
    assert checkpoint.bytes_of(inner) < layout.reads <= 2 * checkpoint.bytes_of(inner)


def test_a_donor_is_kept_where_there_is_room_for_it(folder: Path) -> None:
    checkpoint = open_folder(folder)
    shared = [
        Planned(*attached_for(sharing(checkpoint.shape, {4: 0}))),
        Planned(PruningPlan.identity(checkpoint.shape)),
    ]
    inner = set(checkpoint.tensor_names()) - set(checkpoint.outer_names())
    assert streamed(folder, shared)[1].reads > checkpoint.bytes_of(inner)
    assert streamed(folder, shared, 0.35)[1].reads == checkpoint.bytes_of(inner)


def test_in_bfloat16_and_from_a_model_in_memory_too(folder: Path) -> None:
    model = tiny("llama")
    planned = zoo(opened(model).shape)
    expected = swept(Blocks(opened(model), torch.bfloat16), planned)
    memory = least(lambda m: Blocks(opened(model), torch.bfloat16, memory=m), lambda b: swept(b, planned))
    assert swept(Blocks(opened(model), torch.bfloat16, memory=memory), planned) == expected


# ------------------------------------------------------------------------------------------------ statistics


def calibrated(blocks: Blocks) -> tuple[Calibrator, Statistics]:
    calibrator = Calibrator(blocks, tokens(6, 8), tokens(3, 8, seed=1), STATISTICS, rows=2)
    plan = Planned(PruningPlan.identity(blocks.checkpoint.shape))
    return calibrator, calibrator.statistics(plan, STATISTICS)


@pytest.mark.parametrize("extra", [0, 50_000])
def test_statistics_of_little_memory_are_those_of_the_whole_model_in_memory(folder: Path, extra: int) -> None:
    _, expected = calibrated(Blocks(opened(tiny("qwen2-mixed"))))
    memory = least(lambda m: Blocks(open_folder(folder), memory=m), calibrated)
    while True:  # the backward pass needs a little more than the forward pass, and says so
        try:
            calibrator, found = calibrated(Blocks(open_folder(folder), memory=memory + extra))
            break
        except FlexiError as error:
            memory = math.ceil((float(re.search(r"at least ([\d.]+) MiB", str(error))[1]) + 0.01) * 2**20)  # type: ignore[index]
    for name in STATISTICS:
        for quantity, blocks in expected[name].items():
            for ours, theirs in zip(found[name][quantity], blocks, strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-5, atol=0), (name, quantity)
    assert calibrator.blocks.states.spilled > 0


def test_candidates_take_up_the_kept_states(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drop-one probe of every block costs half of running each alone, beside the dense model's pass."""
    calibrator, _ = calibrated(Blocks(open_folder(folder)))
    shape = open_folder(folder).shape
    plans = [Planned(PruningPlan.keep(shape, [i for i in range(5) if i != gone])) for gone in range(5)]
    runs: list[int] = []
    original = Blocks.run
    monkeypatch.setattr(Blocks, "run", lambda self, *a: runs.append(a[1]) or original(self, *a))
    found = calibrator.losses(plans)
    assert len(runs) == 3 * (4 + 3 + 2 + 1), "of three batches only what follows the missing block"
    fresh = Calibrator(Blocks(open_folder(folder)), tokens(6, 8), tokens(3, 8, seed=1), STATISTICS, rows=2)
    assert fresh.losses(plans) == found


def drop_one(shape: ModelShape, kept: Sequence[int]) -> list[Planned]:
    return [Planned(PruningPlan.keep(shape, [i for i in kept if i != gone])) for gone in kept]


def searched(calibrator: Calibrator, shape: ModelShape, searching: bool) -> list[list[float]]:
    """Return the losses of the candidates of two steps of a search, of which the first takes block 3."""
    found = []
    for kept in ([0, 1, 2, 3, 4], [0, 1, 2, 4]):
        calibrator.forget([Planned(PruningPlan.keep(shape, kept)).plan], searching)
        found.append(calibrator.losses(drop_one(shape, kept), searching=searching))
    return found


def test_the_next_step_of_a_search_takes_candidates_up_where_the_last_one_changed_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh() -> Calibrator:
        return Calibrator(Blocks(open_folder(folder)), tokens(6, 8), tokens(3, 8, seed=1), STATISTICS, rows=2)

    shape = open_folder(folder).shape
    expected = searched(fresh(), shape, False)
    runs: list[int] = []
    original = Blocks.run
    monkeypatch.setattr(Blocks, "run", lambda self, *a: runs.append(a[1]) or original(self, *a))
    calibrator = fresh()
    assert searched(calibrator, shape, True) == expected
    first = 4 + 4 + 3 + 2 + 1  # what all have in common, and what follows a missing block
    assert len(runs) == 3 * (first + 3), "without 0, 1 or 2 as well as 3: of three batches only the block behind 3"
    calibrator.forget([])
    assert not calibrator.sweeper.kept_states
    assert calibrator.blocks.states.held == 0


@pytest.mark.parametrize("strategy", ["least-squares-merge", "remove-blocks"])
def test_a_plan_hangs_not_on_what_its_search_keeps(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(pruner: TinyPruner) -> Planned:
        options = {"progressive": True, "compensate": True} if strategy == "remove-blocks" else {}
        return pruner.make("greedy", pruner.plugins.get("strategy", strategy, options), 0.5)

    plugins, checkpoint = Plugins.load(), tiny_checkpoint("llama")
    pruner = TinyPruner(checkpoint, plugins)
    found = made(pruner)
    original = set(pruner.calibrator.sweeper.prefixes.of(PruningPlan.identity(checkpoint.shape)))
    assert {prefix for _, prefix in pruner.calibrator.sweeper.kept_states} <= original
    monkeypatch.setattr(Sweeper, "can_keep", lambda *_: False)
    expected = made(TinyPruner(checkpoint, plugins))
    assert (found.plan.hash, found.plan.blocks) == (expected.plan.hash, expected.plan.blocks)


def test_a_search_keeps_no_states_where_there_is_no_room(folder: Path) -> None:
    shape = open_folder(folder).shape
    plans = drop_one(shape, range(5))
    memory = least(lambda m: Blocks(open_folder(folder), memory=m), lambda b: swept(b, plans))
    found = []
    for limit in (memory, None):
        blocks = Blocks(open_folder(folder), memory=limit)
        calibrator = Calibrator(blocks, tokens(6, 8), tokens(3, 8, seed=1), STATISTICS, rows=2)
        found.append(calibrator.losses(plans, searching=True))
        assert bool(calibrator.sweeper.kept_states) == (limit is None)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_too_little_memory_says_the_least_that_works(folder: Path) -> None:
    plan = [Planned(PruningPlan.identity(open_folder(folder).shape))]
    memory = least(lambda m: Blocks(open_folder(folder), memory=m), lambda b: swept(b, plan))
    swept(Blocks(open_folder(folder), memory=memory), plan)
    with pytest.raises(FlexiError, match="too small"):
        swept(Blocks(open_folder(folder), memory=memory - 20_000), plan)


class FullDisk:
    """A file on a disk that is full."""

    def seek(self, *_: int) -> int:
        return 0

    def write(self, _: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        pass


def test_a_full_disk_is_an_error_that_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = zoo(open_folder(folder).shape)
    memory = least(lambda m: Blocks(open_folder(folder), memory=m), lambda b: swept(b, planned))
    blocks = Blocks(open_folder(folder), memory=memory)
    monkeypatch.setattr(spilling.tempfile, "TemporaryFile", lambda **_: FullDisk())
    with pytest.raises(
        FlexiError, match=r"expected room to spill .* No space left on device; free some there, point TMPDIR"
    ):
        swept(blocks, planned)
    assert blocks.states.held == 0


def test_spilled_states_leave_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    states = States(100)
    for number in range(5):
        states.put(number, torch.full((20,), float(number)))
    assert [float(states.get(n)[0]) for n in range(5)] == [0, 1, 2, 3, 4]
    states.pop(3)
    states.put(7, torch.full((20,), 7.0))
    assert [float(states.get(n)[0]) for n in (7, 0, 4, 2)] == [7, 0, 4, 2]
    assert (states.held, states.spilled) == (80, 5 * 80)
    states.limit_to(0)
    assert [float(states.get(n)[0]) for n in (7, 0, 4, 2, 1)] == [7, 0, 4, 2, 1]
    assert states.held == 0
    assert not list(tmp_path.iterdir())


class InParts(io.FileIO):
    """A file that takes and gives seven bytes at once, as a real one does 2 GiB."""

    def write(self, data: Any) -> int:
        return super().write(memoryview(data)[:7])

    def readinto(self, data: Any) -> int:
        return super().readinto(memoryview(data)[:7])


def test_the_spill_file_takes_large_states_in_parts_and_gives_its_room_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "spilled"
    monkeypatch.setattr(spilling.tempfile, "TemporaryFile", lambda **_: InParts(file, "w+"))
    states = States(0)
    for size in (20, 50, 30):  # one group after another, of other sizes
        for number in range(3):
            states.put(number, torch.arange(size) + number)
        assert file.stat().st_size == 3 * 8 * size
        assert all(torch.equal(states.get(n), torch.arange(size) + n) for n in range(3))
        states.drop(lambda key: True)
        assert file.stat().st_size == 0


def test_what_cannot_be_spilled_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    states = States()
    states.put(1, torch.ones(4))
    monkeypatch.setattr(spilling.tempfile, "TemporaryFile", lambda **_: FullDisk())
    with pytest.raises(FlexiError, match="expected room to spill"):
        states.limit_to(0)
    assert float(states.get(1).sum()) == states.held / 4 == 4


def test_the_least_that_works_is_a_limit_that_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what the process has taken already, and although a part of a limit is left to allocators."""
    machine, planned = Machine("cpu", 2**20), zoo(open_folder(folder).shape)
    used = 5 * 2**20
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=used)))
    with pytest.raises(FlexiError, match=r"^memory: 1.00 MiB is too small") as caught:
        swept(Blocks(open_folder(folder), torch.float32, "cpu", *machine.budget()), planned)
    found = re.search(r"at least ([\d.]+) MiB \(5.00 MiB are taken already", str(caught.value))
    assert found, caught.value
    enough = Machine("cpu", parse_memory(f"{found[1]}MiB"))
    swept(Blocks(open_folder(folder), torch.float32, "cpu", *enough.budget()), planned)


def test_copies_that_a_sweep_with_room_left_go_where_a_later_one_has_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another dtype than the stored one every built block is a copy."""
    shape = open_folder(folder).shape
    few = [Planned(PruningPlan.identity(shape))]
    many = [Planned(PruningPlan.keep(shape, kept)) for kept in ((0, 2, 3, 4), (0, 1, 3, 4), (1, 2, 3, 4))]
    narrowed = [
        Planned(PruningPlan(shape, tuple(BlockRecipe(parts=(Part(i, None, tuple(range(n))),)) for i in range(5))))
        for n in (8, 12, 16)
    ]

    def blocks(memory: int) -> Blocks:
        return Blocks(open_folder(folder), torch.bfloat16, memory=memory)

    both, limits = [*few, *many, *narrowed], itertools.count(least(blocks, lambda b: swept(b, few)), 20_000)
    for limit in limits:
        sweeper = Sweeper(blocks(limit))
        with contextlib.suppress(FlexiError):
            dict(sweeper.sweep(both, batches(4)))
        if sweeper.laid is not None and not sweeper.laid.streamed:
            assert not sweeper.laid.roomy, "all that is read finds room, and what is built of it does not"
            break
    made = blocks(limit)
    made.memory = 2**40
    swept(made, few)
    assert len(made._built) == 5
    made.memory = limit
    held: list[int] = []
    original = Blocks.run

    def run(self: Blocks, *given: Any) -> torch.Tensor:
        held.append(len(self._built))
        return original(self, *given)

    monkeypatch.setattr(Blocks, "run", run)
    swept(made, both)
    assert max(held) <= 2


def test_heads_of_plans_own_are_counted(folder: Path) -> None:
    shape = open_folder(folder).shape
    plans = [PruningPlan.identity(shape)]
    table = shape.vocabulary * shape.hidden
    for i in range(6):
        own = {"outer.head": torch.full((shape.vocabulary, shape.hidden), float(i))}
        plans.append(with_digests(replace(plans[0], own=("head",)), own))
    blocks = Blocks(open_folder(folder), torch.float32)
    assert blocks.own_outer_bytes(plans[:1]) == 0
    assert blocks.own_outer_bytes(plans[:3]) == 2 * table * 4
    assert blocks.own_outer_bytes(plans) == 4 * table * 4, "four are held at once"


def test_in_a_container_its_own_memory_is_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = free_memory()
    monkeypatch.setattr(machine, "GROUP", tmp_path)
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 1000\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.max").write_text("9000\n")
    assert free_memory() == 5000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > everywhere / 2


def test_a_donors_copy_is_let_go_with_the_block_that_ran_with_it(folder: Path) -> None:
    """In another dtype than the stored one built blocks are copies: one at a time, where memory is short."""
    checkpoint = open_folder(folder)
    plan, attached = attached_for(sharing(checkpoint.shape, {3: 1}))
    planned = [Planned(plan, attached)]

    def blocks(memory: int) -> Blocks:
        return Blocks(open_folder(folder), torch.bfloat16, memory=memory)

    tight = blocks(least(blocks, lambda b: swept(b, planned)))
    swept(tight, planned)
    assert not tight._built


def test_blocks_in_little_memory_are_let_go_for_what_is_trained(folder: Path, tmp_path: Path) -> None:
    """Behind the original's pass where they do not all fit, and before training what calibration has left."""
    ids, last, known = tokens(2, 8), 4, Plugins.load()
    held: dict[str, int] = {}

    class Looking(NoRecovery):
        def recover(self, request: RecoveryRequest) -> Recovered:
            held["before"] = len(pruner.blocks.held)
            states = request.teacher(ids, [last])[last]
            held["after"] = len(pruner.blocks.held)
            assert torch.equal(states, expected)
            return super().recover(request)

    expected = TinyPruner(open_folder(folder), known).teacher(ids, [last])[last]

    def asked(blocks: Blocks) -> TinyPruner:
        pruner = TinyPruner(open_folder(folder), known)
        pruner.__dict__ |= {"blocks": blocks, "tokenizer": tiny_tokenizer()}
        pruner.teacher(ids, [last])
        return pruner

    tight = least(lambda m: Blocks(open_folder(folder), memory=m), asked)
    for memory, left in ((tight, False), (tight + 10_000_000, True), (None, True)):
        pruner = asked(Blocks(open_folder(folder), memory=memory))
        assert bool(pruner.blocks.held) == left
        checkpoint = pruner.blocks.checkpoint
        before = checkpoint.bytes_read
        assert torch.equal(pruner.teacher(ids, [last])[last], expected)
        read = checkpoint.bytes_read - before
        assert read == (0 if left else checkpoint.bytes_of(checkpoint.tensor_names()))  # embedding and head too
        pruner.blocks.block(PruningPlan.identity(pruner.checkpoint.shape), 0, {})  # as calibration leaves one
        plan = PruningPlan.keep(pruner.checkpoint.shape, (0, 1, 3))
        pruner.recover(plan, Looking(), Training(length=8, tokens=16, held_out=1), tmp_path / str(memory))
        assert bool(held["before"]) == (memory is None)
        assert bool(held["after"]) == left


def test_what_is_announced_is_what_is_read_beside_kept_states(folder: Path) -> None:
    checkpoint = open_folder(folder)
    whole = PruningPlan.identity(checkpoint.shape)
    planned = [Planned(whole), Planned(PruningPlan.keep(checkpoint.shape, [0, 2, 3, 4]))]
    memory = least(lambda m: Blocks(open_folder(folder), memory=m), lambda b: swept(b, planned))
    sweeper = Sweeper(Blocks(checkpoint, memory=memory))
    for _ in sweeper.sweep(planned[:1], batches(), keep=True):
        pass
    before = checkpoint.bytes_read
    found = dict(sweeper.sweep(planned, batches()))
    assert sweeper.laid is not None
    assert checkpoint.bytes_read - before == sweeper.laid.reads > 0
    assert sweeper.laid.blocks == 3, "those behind the cut, and no other"
    assert found == swept(Blocks(open_folder(folder)), planned)


def test_states_of_float16_are_finite_though_their_sum_is_none() -> None:
    """65,504 is the most that float16 holds."""
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.ones_like(model.model.embed_tokens.weight) * 200)
    sweeper = Sweeper(Blocks(opened(model), torch.float16))
    ids = torch.zeros(4, 64, dtype=torch.long)
    for _ in sweeper.sweep([Planned(PruningPlan.identity(opened(model).shape))], [Batch(ids, [(0, (3,), (1,))])]):
        pass
    assert not sweeper.broken


def test_what_was_broken_in_an_earlier_sweep_is_not_in_one_that_runs_nothing() -> None:
    sweeper = Sweeper(Blocks(opened(tiny())))
    sweeper.broken = {0: 1}
    assert not list(sweeper.sweep([], [], wanted=lambda batch, plan: False))
    assert not sweeper.broken


@pytest.mark.parametrize("limit", [float("inf"), 3 * LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_states_are_kept_apart_from_what_they_were_computed_in(limit: float, dtype: torch.dtype) -> None:
    """In pages of their own, also of a view; what is small stays where it is."""
    states = States(limit)
    whole = torch.randn(4, LARGE // 8, 2).to(dtype)
    large, small = whole[1:3].transpose(1, 2), torch.randn(2, 3, dtype=torch.float32)
    expected = large.clone()
    states.put("large", large)
    states.put("small", small)
    whole.zero_()
    assert torch.equal(states.get("large"), expected)
    assert states.get("small").data_ptr() == small.data_ptr()
    assert states.held == expected.nbytes + small.nbytes
    states.pop("large")
    assert "large" not in states
    assert states.held == small.nbytes


def test_a_shard_that_changes_during_a_sweep_is_an_error_and_what_was_answered_stays(folder: Path) -> None:
    checkpoint = open_folder(folder)
    planned = zoo(checkpoint.shape)[:2]
    memory = least(lambda m: Blocks(open_folder(folder), memory=m), lambda b: swept(b, planned))
    found = Sweeper(Blocks(checkpoint, memory=memory)).sweep(planned, batches())
    first = next(found)
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(
        FlexiError, match=r"model\.safetensors has changed since it was opened \(while tensor 'model\.layers"
    ):
        list(found)
    assert first[1] == swept(Blocks(open_folder(folder)), planned)[0]


def test_a_kill_costs_one_group(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihoods_, "BATCH_TOKENS", 40)
    planned, requests = zoo(open_folder(folder).shape)[:3], some_requests(100)

    def answer(memory: int | None, journal: Journal) -> list[list[Answer]]:
        sweeper = Sweeper(Blocks(open_folder(folder), memory=memory))
        return likelihoods(sweeper, planned, requests, journal, "", Progress(), "answering")

    whole = answer(None, Journal())
    memory = least(lambda m: Blocks(open_folder(folder), memory=m), lambda b: answer(b.memory, Journal()))
    journal = Journal(lives=8)
    with pytest.raises(KeyboardInterrupt):
        answer(memory, journal)
    assert len(journal.kept) == 8, "two batches for three plans, and two plans of the third"
    journal.lives = math.inf
    assert answer(memory, journal) == whole


def test_the_first_block_that_is_not_finite_is_named_and_the_others_go_on(folder: Path) -> None:
    checkpoint = open_folder(folder)
    plan = sharing(checkpoint.shape, {3: 1})
    _, attached = attached_for(plan)
    attached["blocks.3.down.lora_a"][0, 0] = math.inf
    planned = [*zoo(checkpoint.shape)[:2], Planned(with_digests(plan, attached), attached)]
    sweeper = Sweeper(Blocks(checkpoint))
    found = dict(sweeper.sweep(planned, batches()))
    assert sweeper.broken == {2: 3}
    expected = swept(Blocks(open_folder(folder)), planned[:2])
    for number, answers in found.items():
        assert all(math.isnan(score) and not greedy for score, greedy in answers[2])
        assert {p: answers[p] for p in (0, 1)} == expected[number]


def test_statistics_of_a_model_that_breaks_down_name_the_block() -> None:
    model = tiny()
    model.get_submodule("model.layers.2.mlp.down_proj").weight[0, 0] = math.nan
    with pytest.raises(FlexiError, match=r"calibration: block 2 \(of old blocks 2\) gives values that are not finite"):
        calibrated(Blocks(opened(model)))
