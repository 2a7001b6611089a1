"""What models do on the calibration text: statistics, losses, single blocks. One forward and backward pass for all metrics.

A later step of a progressive strategy starts at the first block that changed: states and statistics before it are kept,
those of the models that a search tries too, where there is room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from flexi_plugins.data import PruningPlan, Statistics
from flexi_plugins.errors import FlexiError
from flexi_plugins.execution.backward import backward_sweep
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.packing import BATCH_TOKENS
from flexi_plugins.execution.readout import Batch
from flexi_plugins.execution.sweep import Planned, Sweeper
from flexi_plugins.hookspecs import BlockTrace, GradientTrace, Statistic, no_progress
from flexi_plugins.numerics import row_distance
from flexi_plugins.trials import Trials

Sums = dict[str, Tensor]


class Calibrator:
    """Takes statistics of plans' models on fixed calibration tokens, and remembers what equal models gave.

    windows: (windows, tokens) for activation statistics and losses; samples: (samples, tokens) for gradients.
    trials: where losses and turns are remembered.
    """

    def __init__(
        self,
        blocks: Blocks,
        windows: Tensor,
        samples: Tensor,
        known: Mapping[str, Statistic],
        rows: int | None = None,
        say: Callable[[str], None] = lambda text: None,
        trials: Trials | None = None,
    ) -> None:
        self.blocks = blocks
        self.trials = trials or Trials()
        self.sweeper = Sweeper(blocks, say)
        self.samples = samples
        self.known = known
        self.batches = [Batch(ids) for ids in windows.split(rows or max(1, BATCH_TOKENS // windows.shape[1]))]
        self.tokens = windows.numel()
        shared = torch.equal(windows[: len(samples), : samples.shape[1]], samples)
        self.gradient_sweeper = self.sweeper if shared else Sweeper(blocks, say)
        self.gradient_batches = (
            self.batches[: -(-len(samples) // len(self.batches[0].ids))] if shared else [Batch(samples)]
        )
        self._forward: dict[
            tuple[str, int], Mapping[str, Tensor]
        ] = {}  # (statistic, prefix) -> quantities of one block
        self._backward: dict[tuple[str, str], list[Mapping[str, Tensor]]] = {}  # (statistic, plan hash) -> per block
        self._of_trials: set[int] = set()  # prefixes of the kept states that are of tried models alone

    def statistics(
        self, planned: Planned, needs: Iterable[str], advance: Callable[[int], None] = lambda tokens: None
    ) -> Statistics:
        """Return the named statistics of a plan's model; only what is not known yet is measured."""
        names = sorted(set(needs))
        unknown = [n for n in names if n not in self.known]
        if unknown:
            raise FlexiError(f"no plugin offers the statistic {unknown[0]!r}; there is {', '.join(sorted(self.known))}")
        self._take_forward(planned, [self.known[n] for n in names if not self.known[n].backward], advance)
        self._take_backward(planned, [self.known[n] for n in names if self.known[n].backward], advance)
        return Statistics({name: self._collect(planned.plan, self.known[name]) for name in names})

    def passes(self, needs: Iterable[str]) -> int:
        """Return the tokens that pass each block, forward or backward, to take these statistics of a model not seen yet."""
        backward = {self.known[n].backward for n in needs if n in self.known}
        forward = self.tokens if False in backward else 0
        if True in backward and not (forward and self.gradient_sweeper is self.sweeper):
            forward += sum(b.ids.numel() for b in self.gradient_batches)
        return forward + (self.samples.numel() if True in backward else 0)

    def forget(self, plans: Sequence[PruningPlan], searching: bool = False) -> None:
        """Drop kept states and blocks that none of these plans passes. searching: states of tried models stay."""
        prefixes = {n for p in plans for n in self.sweeper.prefixes.of(p)}
        self._of_trials = self._of_trials - prefixes if searching else set()
        prefixes |= self._of_trials
        self.sweeper.forget(lambda prefix: prefix not in prefixes)
        if self.gradient_sweeper is not self.sweeper:
            prefixes = {n for p in plans for n in self.gradient_sweeper.prefixes.of(p)}
            self.gradient_sweeper.forget(lambda prefix: prefix not in prefixes)
        self.blocks.keep_only(list(plans))

    def losses(
        self, planned: Sequence[Planned], progress: Callable[..., Any] = no_progress, searching: bool = False
    ) -> list[float]:
        """Return the mean negative log-likelihood of plans on the calibration windows, nats per token; one sweep.

        What they have in common with a model whose statistics were taken last is not run again, nor is a plan that was
        asked for before: the search for a higher ratio begins with that for a lower one. progress(title, total): a
        context manager that yields ``advance(n)``. searching: more models like these will be tried, so their states are
        kept if there is room; the next step of a search takes them up to the block that the last one changed.
        """
        return self._tried("loss", planned, partial(self._measured_losses, searching), progress)

    def turns(self, planned: Sequence[Planned], progress: Callable[..., Any] = no_progress) -> list[float]:
        """Return 1 - cosine between what leaves the last block of plans and of the original, mean over tokens.

        As with losses, what is known is not run again.
        """
        original = Planned(PruningPlan.identity(planned[0].plan.shape))
        return self._tried("turn", planned, partial(self._measured_turns, original), progress, beside=[original])

    def _tried(
        self,
        measure: str,
        planned: Sequence[Planned],
        measured: Callable[[Sequence[Planned], Callable[[int], None]], list[float]],
        progress: Callable[..., Any],
        beside: Sequence[Planned] = (),
    ) -> list[float]:
        """Return a number of each plan, of those that were not tried before by one sweep. beside: plans run with them."""

        def sweep(missing: list[Planned]) -> list[float]:
            tokens = self.sweeper.work([*beside, *missing], self.batches, lambda *_: True)
            with progress(f"trying {len(missing)} model(s)", tokens) as advance:
                return measured(missing, advance)

        return self.trials.of(measure, planned, sweep)

    def _measured_losses(
        self, searching: bool, planned: Sequence[Planned], advance: Callable[[int], None]
    ) -> list[float]:
        batches = [
            Batch(b.ids, [(r, range(len(row) - 1), row[1:]) for r, row in enumerate(b.ids.tolist())])
            for b in self.batches
        ]
        totals = [0.0] * len(planned)
        if searching:
            self._forget_tried_but(planned)
        keep = searching and self.sweeper.can_keep(planned, self.batches)
        known = {prefix for _, prefix in self.sweeper.kept_states}
        for _, answers in self.sweeper.sweep(planned, batches, keep=keep, advance=advance):
            for index, answer in answers.items():
                totals[index] -= sum(logprob for logprob, _ in answer)
        self._of_trials |= {prefix for _, prefix in self.sweeper.kept_states} - known
        targets = sum(b.ids.numel() - len(b.ids) for b in batches)
        return [total / targets for total in totals]

    def _forget_tried_but(self, planned: Sequence[Planned]) -> None:
        """Drop the states of models tried before that these do not pass."""
        gone = self._of_trials - {n for p in planned for n in self.sweeper.prefixes.of(p.plan)}
        self.sweeper.forget(lambda prefix: prefix in gone)
        self._of_trials -= gone

    def _measured_turns(
        self, original: Planned, planned: Sequence[Planned], advance: Callable[[int], None]
    ) -> list[float]:
        together = [original, *planned]
        wanted = {prefix for _, prefix in self.sweeper.kept_states} | {*self.sweeper.prefixes.of(original.plan)}
        for _ in self.sweeper.sweep(together, [Batch(b.ids) for b in self.batches], keep=True, advance=advance):
            pass
        ends = [self.sweeper.prefixes.of(p.plan)[-1] for p in together]
        self.sweeper.check_finite(original.plan)
        totals = [math.nan if index in self.sweeper.broken else 0.0 for index in range(1, len(together))]
        for batch in range(len(self.batches)):
            expected = self._behind(batch, ends[0])
            for index, end in enumerate(ends[1:]):
                if math.isnan(totals[index]):
                    continue  # there are no states to compare
                totals[index] += float(row_distance(self._behind(batch, end), expected).sum())
        self.sweeper.forget(lambda prefix: prefix not in wanted)
        return [total / self.tokens for total in totals]

    def traces(self, planned: Planned, position: int, target: Planned, end: int) -> Iterator[tuple[BlockTrace, Tensor]]:
        """Yield for each batch what a block of a plan's model does, and the states behind block ``end`` of another plan's.

        The states are (tokens, hidden). Both models are run up to these blocks once.
        """
        asked = [_until(planned, position), _until(target, end)]
        for _ in self.sweeper.sweep(asked, [Batch(b.ids) for b in self.batches], keep=True):
            pass
        for index, part in enumerate(asked):
            self.sweeper.check_finite(part.plan, index)
        observer = _ForwardObserver(self.sweeper, planned, [], {position}, self.batches)
        behind = self.sweeper.prefixes.of(target.plan)[end + 1]
        assert self.sweeper.laid is not None
        reading = self.blocks.stream([self.blocks.needs(planned.plan, position)], self.sweeper.laid.weight_bytes)
        with torch.no_grad(), closing(reading):
            next(reading)
            for batch in range(len(self.batches)):
                hidden = observer.entering(batch, position)
                _, trace = observer.traced(batch, position, hidden, self.blocks.arguments(hidden))
                yield trace, self._behind(batch, behind)

    def _behind(self, batch: int, prefix: int) -> Tensor:
        return self.sweeper.stored(batch, prefix).flatten(0, 1)

    def _collect(self, plan: PruningPlan, statistic: Statistic) -> Mapping[str, tuple[Tensor, ...]]:
        if statistic.backward:
            blocks: Sequence[Mapping[str, Tensor]] = self._backward[statistic.name, plan.hash]
        else:
            blocks = [self._forward[statistic.name, n] for n in self.sweeper.prefixes.of(plan)[1:]]
        return {quantity: tuple(b[quantity] for b in blocks) for quantity in blocks[0]}

    def _take_forward(self, planned: Planned, wanted: Sequence[Statistic], advance: Callable[[int], None]) -> None:
        numbers = self.sweeper.prefixes.of(planned.plan)
        missing = [s for s in wanted if any((s.name, n) not in self._forward for n in numbers[1:])]
        if not missing:
            return
        unseen = {p for s in missing for p, n in enumerate(numbers[1:]) if (s.name, n) not in self._forward}
        observer = _ForwardObserver(self.sweeper, planned, missing, unseen, self.batches)
        rerun = {numbers[p + 1] for p in unseen}
        self.sweeper.forget(lambda prefix: prefix in rerun)
        for _ in self.sweeper.sweep([planned], self.batches, observer.run, keep=True, advance=advance):
            pass
        self.sweeper.check_finite(planned.plan)
        for (name, position), sums in observer.totals.items():
            finished = self.known[name].finish(sums, self.tokens)
            self._forward[name, numbers[position + 1]] = {k: v.float().cpu() for k, v in finished.items()}

    def _take_backward(self, planned: Planned, wanted: Sequence[Statistic], advance: Callable[[int], None]) -> None:
        key = planned.plan.hash
        missing = [s for s in wanted if (s.name, key) not in self._backward]
        if not missing:
            return
        found: dict[tuple[str, int], Mapping[str, Tensor]] = {}

        def observe(trace: GradientTrace) -> None:
            for statistic in missing:
                sums = statistic.observe(trace)
                finished = statistic.finish(sums, self.samples.numel())
                found[statistic.name, trace.index] = {k: v.float().cpu() for k, v in finished.items()}

        backward_sweep(self.gradient_sweeper, planned, self.samples, observe, self.gradient_batches, advance)
        for statistic in missing:
            blocks = [found[statistic.name, p] for p in range(len(planned.plan.blocks))]
            self._backward[statistic.name, key] = blocks


class _ForwardObserver:
    """Runs blocks of one plan with hooks and adds up what statistics make of each batch."""

    def __init__(
        self,
        sweeper: Sweeper,
        planned: Planned,
        statistics: Sequence[Statistic],
        positions: set[int],
        batches: Sequence[Batch],
    ) -> None:
        self.sweeper, self.blocks = sweeper, sweeper.blocks
        self.planned, self.statistics, self.positions = planned, statistics, positions
        self.numbers = sweeper.prefixes.of(planned.plan)
        self.totals: dict[tuple[str, int], Sums] = {}
        self.span = max((s.span for s in statistics), default=1)
        self._batches = batches

    def entering(self, batch: int, position: int) -> Tensor:
        """Return the states (sequences, tokens, hidden) that entered a block, or enter it now."""
        if position:
            return self.sweeper.stored(batch, self.numbers[position])
        return self.blocks.embed(self._batches[batch].ids, self.planned.plan, self.planned.attached)

    def run(self, batch: int, position: int, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Run one block; where its statistics are wanted, observe it."""
        if position not in self.positions:
            return self.blocks.run(self.planned.plan, position, self.planned.attached, hidden, arguments)
        output, trace = self.traced(batch, position, hidden, arguments)
        for statistic in self.statistics:
            total = self.totals.setdefault((statistic.name, position), {})
            own = replace(trace, before=trace.before[max(0, len(trace.before) + 1 - statistic.span) :])
            for name, value in statistic.observe(own).items():
                total[name] = total[name] + value if name in total else value
        return output

    def traced(
        self, batch: int, position: int, hidden: Tensor, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, BlockTrace]:
        """Run one block; return what leaves it, and what it did."""
        plan, attached = self.planned.plan, self.planned.attached
        seen: dict[str, Tensor] = {}
        block = self.blocks.block(plan, position, attached)
        handles = list(self._hooks(block, position, seen))
        try:
            output = self.blocks.run(plan, position, attached, hidden, arguments)
        finally:
            for handle in handles:
                handle.remove()
        return output, self._trace(block, batch, position, seen, hidden, output)

    def _hooks(self, block: nn.Module, position: int, seen: dict[str, Tensor]) -> Iterable[Any]:
        family = self.blocks.checkpoint.family
        watched = {"middle": family.mlp_norm}
        shape = self.planned.plan.block_shape(self.planned.plan.blocks[position])
        watched |= {"attention_inner": family.ROLES["attention_output"]} if shape.kv_heads else {}
        watched |= {"mlp_inner": family.ROLES["down"]} if shape.channels else {}
        for name, path in watched.items():

            def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                seen[name] = inputs[0].flatten(0, 1)

            yield block.get_submodule(path).register_forward_pre_hook(note)

    def _trace(
        self, block: nn.Module, batch: int, position: int, seen: dict[str, Tensor], hidden: Tensor, output: Tensor
    ) -> BlockTrace:
        plan, family = self.planned.plan, self.blocks.checkpoint.family
        shape = plan.block_shape(plan.blocks[position])
        earlier = range(max(0, position - self.span + 1), position)
        last = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        last[:, -1] = True

        def weight(role: str, present: int) -> Tensor | None:
            return cast(Tensor, block.get_submodule(family.ROLES[role]).weight) if present else None

        first = sum(len(b.ids) for b in self._batches[:batch])
        return BlockTrace(
            index=position,
            kv_heads=shape.kv_heads,
            group=shape.group,
            input=hidden.flatten(0, 1),
            middle=seen["middle"],
            output=output.flatten(0, 1),
            before=tuple(self.entering(batch, p).flatten(0, 1) for p in earlier),
            attention_inner=seen.get("attention_inner"),
            mlp_inner=seen.get("mlp_inner"),
            attention_weight=weight("attention_output", shape.kv_heads),
            mlp_weight=weight("down", shape.channels),
            last=last.flatten(),
            sequences=range(first, first + len(hidden)),
            total=sum(len(b.ids) for b in self._batches),
        )


def _until(planned: Planned, position: int) -> Planned:
    """Return the model of a plan up to a block, with the donors of the blocks that are left."""
    plan = planned.plan
    last, reached = position, -1
    while reached < last:  # blocks in front of a donor have donors too
        reached = last
        last = max([last, *(d for p in range(last + 1) if (d := plan.donor(p)) is not None)])
    names = [f"blocks.{p}." for p in range(last + 1)]
    tensors = tuple((n, d) for n, d in plan.tensors if n.startswith(("outer.", *names)))
    shorter = replace(plan, blocks=plan.blocks[: last + 1], tensors=tensors)
    return Planned(shorter, {n: planned.attached[n] for n, _ in tensors})
