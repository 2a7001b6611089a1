"""CoMe's hierarchical distillation (arXiv 2510.15304, step 3): a merged block learns what the blocks did that it replaced.

From the paper's overview figure, since the released code trains nothing and the text behind the abstract was not at hand:
the original's state in front of the group enters the merged block, a KL loss compares what comes out with the original's
state behind the group, and the merged block alone is optimised. Our reading: KL(original || block) over softmaxed hidden
channels, times T^2 as in Hinton and others (arXiv 1503.02531), mean over the tokens that predict a target; all weights of a
block at full rank, with AdamW; rate and schedule, steps and the kept state are those of all methods (``TrainingOptions``),
since none was found. What "single-process" and "multi-process" post-training are is not explained: one reading is one
training after all merges or one after each (``when``); another, since blocks that the original feeds are independent, how
many are trained at once. Blocks of one such group are stopped, and the state that is kept is chosen, by the sum of their
losses. ``input = "student"`` has them feed each other. Where Prune&Comp's gains scale the stream, the state behind a block
is compared as the next block receives it.

The budget: each token of text passes each trained block once, forward and backward, whether blocks are trained together
or one after another. The original's own forward passes are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flexi_plugins.data import PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import IGNORED, Recovered, RecoveryMethod, RecoveryRequest, hookimpl
from flexi_plugins.recovery.blockwise import Frame, blocks_of, groups, summed, train_apart
from flexi_plugins.recovery.copies import replaced, trainable, working_copy
from flexi_plugins.recovery.correspondence import Run, correspondences
from flexi_plugins.recovery.monitor import Loss
from flexi_plugins.recovery.options import TrainingOptions
from flexi_plugins.recovery.training import train

if TYPE_CHECKING:
    from torch import Tensor, nn

STATES = 2**29  # bytes of the original's states that are made ahead of the batches that need them
Kind = Literal["kl", "mse"]
Teacher = Callable[["Tensor", Sequence[int]], Mapping[int, "Tensor"]]
Batch = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Distill(TrainingOptions):
    """Train blocks on the original's states in front of and behind the blocks that they stand for.

    loss: on the residual stream behind a block. temperature: of the softmax. input: what enters a block, the original's
    state or what the pruned model gives it; with "student" gradients pass the whole model, so that early blocks learn for
    late ones too. when: once at the end, or behind each merge of a progressive strategy on an equal share of the text, so
    that the next merge is chosen by the scores of the trained model; early merges are then trained with each later one
    again, on less text than at the end. blocks: which are trained: those that stand for more than one original block, these
    and all that are not what they were, or all; blocks that lend their weights to others stay as they are, and so do blocks
    that are what they were where the original feeds them, since they give its states already. logit_weight: of the KL
    between both models' next-token distributions (at the same temperature, times T^2), where the whole model runs.
    memory: GiB that weights, gradients and moments of the blocks trained at once may take (one block may take more); the
    original passes the text once for each such group. The gradient is not clipped unless asked for: one norm would tie
    independent blocks together.
    """

    loss: Kind = "kl"
    temperature: float = 1.0
    input: Literal["teacher", "student"] = "teacher"
    when: Literal["end", "each"] = "end"
    blocks: Literal["merged", "changed", "all"] = "merged"
    logit_weight: float = 0.0
    memory: float = 4.0
    gradient_clip: float = 0.0

    name: ClassVar[str] = "distill"
    paper: ClassVar[str] = "CoMe, arXiv 2510.15304"

    @property
    def interleaved(self) -> bool:
        """Whether it trains behind every merge."""
        return self.when == "each"

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with each option."""
        yield from super().problems()
        if not self.temperature > 0:
            yield f"temperature = {self.temperature}, expected more than 0"
        if not self.logit_weight >= 0:
            yield f"logit_weight = {self.logit_weight}, expected 0 or more"
        if self.when == "each" and self.blocks != "merged":
            yield f"blocks = {self.blocks!r} with when = 'each', but a block that was trained cannot be merged; set 'merged'"
        if self.logit_weight and self.input == "teacher":
            yield f"logit_weight = {self.logit_weight}, but single blocks give no logits; set input = 'student' for them"

    def refuses(self, plan: PruningPlan) -> str | None:
        """Return why there is nothing to train, or no state to compare with, in a plan's model; None where there is."""
        if self.logit_weight and plan.own:
            return (
                f"{self.name}: logit_weight = {self.logit_weight}, but the original's logits cannot be had with this plan's own "
                f"{', '.join(plan.own)}; set logit_weight = 0"
            )
        try:
            self.runs(plan)
        except FlexiError as error:
            return str(error)
        return None

    def recover(self, request: RecoveryRequest) -> Recovered:
        """Return the model with its blocks distilled; losses in the curve are sums over the trained blocks.

        The held-out loss is the next-token loss where the whole model runs, and else that of the blocks
        (``held_out_block_loss``).
        """
        runs = self.runs(request.plan)
        found = (self._apart if self.input == "teacher" else self._inside)(request, runs)
        return replace(found, facts={**found.facts, "trained_blocks": len(runs)})

    def runs(self, plan: PruningPlan) -> list[Run]:
        """Return which blocks of a plan are trained, and what each stands for; raise a FlexiError if there are none."""
        lenders = {plan.donor(position) for position in range(len(plan.blocks))}

        def wanted(run: Run) -> bool:
            unchanged = self.blocks == "all" and self.input == "student"
            changed = self.blocks != "merged" and plan.blocks[run.position].whole is None
            return (run.merged or changed or unchanged) and run.position not in lenders

        chosen = [run for run in correspondences(plan) if wanted(run)]
        if not chosen:
            raise FlexiError(
                f"{self.name}: expected blocks that stand for more than one original block and lend no weights, found none "
                "in this plan; set blocks = 'changed' or 'all', or recover it by another method"
            )
        return chosen

    # -- fed by the original

    def _apart(self, request: RecoveryRequest, runs: Sequence[Run]) -> Recovered:
        """Train the blocks on the original's states, group by group."""
        model, trainings = request.model, []
        frame, by_position = Frame(model, request.plan, request.device), {run.position: run for run in runs}
        for positions in groups(request, by_position, self.memory):
            chosen = [by_position[p] for p in positions]
            teachers = self._coming(request), remembered(request.teacher)
            loss, measure = (partial(self._forced, request.plan, chosen, frame, teacher) for teacher in teachers)
            who = f"{self.name}-{positions[0]}" + (f"-to-{positions[-1]}" if len(positions) > 1 else "")
            trained, tensors = train_apart(request, positions, self, who, loss, measure)
            trainings.append(trained)
            model = replaced(model, tensors, request.seed)
            del tensors
        return Recovered(model, *summed(trainings), tuple(note for t in trainings for note in t.notes))

    def _coming(self, request: RecoveryRequest) -> Teacher:
        return ahead(request.teacher, request.text.ids, request.plan.shape.hidden)

    def _forced(
        self, plan: PruningPlan, runs: Sequence[Run], frame: Frame, teacher: Teacher, blocks: Any, batch: Batch
    ) -> Tensor:
        """Return the loss of blocks that the original's states enter."""
        states = asked(teacher, batch, [block for run in runs for block in (run.before, run.last)])
        handed, _ = frame.run(states[runs[0].before])
        entering = [states[run.before] * entering_scale(plan, run.position) for run in runs]
        outputs = blocks(entering, [handed[run.position] for run in runs])
        return self._compared(plan, runs, outputs, states, batch)

    # -- fed by each other

    def _inside(self, request: RecoveryRequest, runs: Sequence[Run]) -> Recovered:
        """Train the blocks inside the pruned model, on what it hands them itself."""
        prefix, _ = blocks_of(request.model, request.plan)
        own = tuple(f"{prefix}.{run.position}." for run in runs)
        names = [name for name, _ in request.model.named_parameters() if name.startswith(own)]
        model = working_copy(request.model, names, request.dtype)
        trained = train(request, model, self, self.name, self._running(request, runs, model))
        return trained.recovered(request, trainable(model))

    def _running(self, request: RecoveryRequest, runs: Sequence[Run], model: Any) -> Loss:
        """Return the loss of a model of which all blocks run."""
        plan, last = request.plan, len(request.plan.shape.blocks) - 1
        wanted = [*(run.last for run in runs), *([last] if self.logit_weight else [])]
        frame, head = Frame(model, plan, request.device), model.get_output_embeddings()
        outputs: dict[int, Tensor] = {}
        teacher = self._coming(request)
        for run in runs:
            block = blocks_of(model, plan)[1][run.position]
            block.register_forward_hook(partial(_noted, outputs, run.position))

        def loss(student: nn.Module, batch: Batch) -> Tensor:
            keep = 0 if self.logit_weight else 1  # tokens whose logits are made; 0: all
            found = student(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=keep)
            states = asked(teacher, batch, wanted)
            total = self._compared(plan, runs, [outputs.pop(run.position) for run in runs], states, batch)
            if not self.logit_weight:
                return total
            taught = head(frame.run(states[last])[1].to(head.weight.dtype))
            return total + self.logit_weight * self._mean("kl", found.logits, taught, batch)

        return loss

    # -- losses

    def _compared(
        self,
        plan: PruningPlan,
        runs: Sequence[Run],
        outputs: Sequence[Tensor],
        states: Mapping[int, Tensor],
        batch: Batch,
    ) -> Tensor:
        """Return the sum over blocks of the loss between what the next block receives, and the original's state."""
        pairs = [(o * leaving_scale(plan, r.position), states[r.last]) for o, r in zip(outputs, runs, strict=True)]
        first, *others = (self._mean(self.loss, *pair, batch) for pair in pairs)
        return sum(others, first)

    def _mean(self, kind: Kind, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss over the tokens that predict a target; 0 without any."""
        chosen = batch["labels"][:, 1:].ne(IGNORED)
        losses = token_losses(kind, student[:, :-1][chosen], teacher[:, :-1][chosen], self.temperature)
        return losses.sum() / max(1, len(losses))


def token_losses(kind: Kind, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the loss of each token, (tokens,), from two (tokens, channels) tensors, in float32.

    kl: T^2 KL(p || q), nats, p and q the softmax over channels of teacher / T and student / T. mse: the mean over channels
    of the squared difference.
    """
    from torch.nn import functional as F

    if kind == "mse":
        return (student.float() - teacher.float()).square().mean(-1)
    q, p = (F.log_softmax(x.float() / temperature, -1) for x in (student, teacher))
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def entering_scale(plan: PruningPlan, position: int) -> float:
    """Return by what the original's state is multiplied before it enters a block, which applies its own gain to it."""
    return plan.embedding_gain if position == 0 else 1 / plan.blocks[position].gain


def leaving_scale(plan: PruningPlan, position: int) -> float:
    """Return by what the next block multiplies what it receives from the block at a position."""
    return plan.blocks[position + 1].gain if position + 1 < len(plan.blocks) else 1.0


def asked(teacher: Teacher, batch: Batch, blocks: Sequence[int]) -> dict[int, Tensor]:
    """Return the original's states of a batch behind some of its blocks, (rows, tokens, hidden) in float32."""
    ids = batch["input_ids"]
    return {block: states.to(ids.device).float() for block, states in teacher(ids, sorted(set(blocks))).items()}


def ahead(teacher: Teacher, text: Tensor, hidden: int) -> Teacher:
    """Return a teacher that is asked about as many of the coming windows of a text as fit into ``STATES`` bytes.

    text: (windows, tokens), whose rows are asked about in their order; hidden: channels of a state. An original that is
    streamed from its files is then read once for many batches.
    """
    places = {row.numpy().tobytes(): place for place, row in enumerate(text.cpu().long())}
    known: Mapping[int, Tensor] = {}
    held = range(0)

    def ask(ids: Tensor, blocks: Sequence[int]) -> Mapping[int, Tensor]:
        nonlocal known, held
        rows = [places[row.numpy().tobytes()] for row in ids.cpu().long()]
        if known.keys() != set(blocks) or not set(rows) <= set(held):
            first, needed = min(rows), max(rows) + 1 - min(rows)
            if needed > len(rows):  # not one behind the other: padding of the last batch, or windows that repeat
                return teacher(ids, blocks)
            known = {}
            batches = max(1, int(STATES / (4 * text.shape[1] * hidden * len(blocks))) // needed)
            held = range(first, min(first + batches * needed, len(text)))
            known = teacher(text[held.start : held.stop], blocks)
        return {block: states[[row - held.start for row in rows]] for block, states in known.items()}

    return ask


def remembered(teacher: Teacher) -> Teacher:
    """Return a teacher that keeps its answers: for the held-out windows, about which it is asked again and again."""
    known: dict[tuple[bytes, tuple[int, ...]], Mapping[int, Tensor]] = {}

    def ask(ids: Tensor, blocks: Sequence[int]) -> Mapping[int, Tensor]:
        key = ids.cpu().numpy().tobytes(), tuple(blocks)
        if key not in known:
            known[key] = teacher(ids, blocks)
        return known[key]

    return ask


def _noted(outputs: dict[int, Tensor], position: int, module: nn.Module, arguments: Any, output: Tensor) -> None:
    outputs[position] = output


@hookimpl
def recovery_methods() -> list[RecoveryMethod]:
    """Return the distill method."""
    return [Distill()]
