"""Builds the blocks of plans over one checkpoint, reads their tensors ahead, and drives them as transformers would."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import MODEL_MAPPING

from flexi_plugins.checkpoint import Checkpoint
from flexi_plugins.data import OUTER, PruningPlan
from flexi_plugins.execution.branches import branching, chunks_of
from flexi_plugins.execution.schedule import Step, plan_reads
from flexi_plugins.execution.states import States
from flexi_plugins.modeling import BlockSpec, build_block, unfilled
from flexi_plugins.precision import products
from flexi_plugins.rewrite import Tensors, block_tensors, check_attached

NOTHING: Tensors = {}
OUTERS = 4  # embeddings and heads that are plans' own, held at once


class _Recorder(nn.Module):
    """Stands where a block was and notes what the model hands it, by its attention type in some releases."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs = kwargs
        return hidden_states


class Blocks:
    """The pieces of all plans of one checkpoint: embedding, blocks by recipe, final norm, head, and states between them.

    memory: bytes that weights, states and working space may take together; None: no limit, and what was read stays.
    taken, share: for messages, bytes that the process had taken before, and how much of a limit can be used.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory: int | None = None,
        taken: int = 0,
        share: float = 1.0,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # which one that is holds for this thread alone
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.memory, self.taken, self.share = memory, taken, share
        self.states = States()
        self.seconds: defaultdict[str, float] = defaultdict(float)  # where the time of sweeps went
        family, config = checkpoint.family, checkpoint.config
        with unfilled():
            self._shell = MODEL_MAPPING[type(config)](config).eval()
        blocks = getattr(self._shell, family.blocks)
        self._block_class = type(blocks[0])
        self._block_config = branching(config, self._block_class)
        norm = getattr(self._shell, family.final_norm)
        setattr(self._shell, family.blocks, nn.ModuleList(_Recorder(block) for block in blocks))
        setattr(self._shell, family.final_norm, nn.Identity())
        self._shell.to_empty(device="meta", recurse=False)
        self.sizes = {n: checkpoint.bytes_of([n]) for n in checkpoint.tensor_names()}  # as they are stored
        self._like = {n: torch.empty(s, device="meta") for n, s in checkpoint.tensor_names().items()}
        outer = [checkpoint.read(n) for n in checkpoint.outer_names()]
        self._converted = outer[0].dtype != dtype  # blocks are then copies of what was read
        self._norm = norm.requires_grad_(False)
        self._kept_outer: dict[str, Tensor] | None = self._placed(outer)
        self._outers: dict[Any, dict[str, Tensor]] = {}  # of plans that have their own, as they are computed with
        self.held: dict[str, Tensor] = {}  # the checkpoint's tensors that are in memory
        self._names: dict[Any, tuple[str, ...]] = {}
        self._built: dict[Any, nn.Module] = {}
        self._copied: set[Any] = set()  # which of these take memory beside the checkpoint's tensors
        self._pool = ThreadPoolExecutor(1, "reading ahead")
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds that this takes to a part of ``seconds``."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    @property
    def outer_bytes(self) -> int:
        """Bytes of the embedding, the final norm and the head."""
        return sum(t.nbytes for t in self._outer.values())

    @property
    def _outer(self) -> dict[str, Tensor]:
        if self._kept_outer is None:
            self._kept_outer = self._placed([self.checkpoint.read(n) for n in self.checkpoint.outer_names()])
        return self._kept_outer

    def _placed(self, outer: Iterable[Tensor]) -> dict[str, Tensor]:
        return dict(zip(OUTER, (t.to(self.device, self.dtype) for t in outer), strict=False))

    # -- reading

    def needs(self, plan: PruningPlan, position: int) -> tuple[str, ...]:
        """Return the names of the checkpoint's tensors that the block at a position is made of, a donor's included."""
        key = plan.key(position)
        if key not in self._names:
            donor = plan.donor(position)
            asked = {} if donor is None else {name: name for name in self.needs(plan, donor)}
            own = {f"blocks.{position}.{name}": torch.empty(0) for name in plan.blocks[position].own}  # not read
            block_tensors(plan, position, self._reading(lambda name: self._like[asked.setdefault(name, name)]), own)
            self._names[key] = tuple(asked)
        return self._names[key]

    def stream(self, needs: Sequence[Sequence[str]], capacity: float) -> Generator[int]:
        """Yield 0, 1, ... with the tensors of each visit in memory, reading those of the next visit meanwhile."""
        steps = plan_reads(needs, self.held, self.sizes, capacity)
        coming: Future[dict[str, Tensor]] | None = None
        for index, step in enumerate(steps):
            coming = coming or self._fetch(step)
            with self.timed("reading"):
                self.held |= coming.result()
            following = steps[index + 1] if index + 1 < len(steps) else None
            coming = self._fetch(following) if following and following.ahead else None
            yield index

    def _fetch(self, step: Step) -> Future[dict[str, Tensor]]:
        self._drop(step.drop)
        return self._pool.submit(self._load, step.load)

    def _load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors; on a GPU they are copied in a stream of their own while blocks run."""
        if self._stream is None:
            return {n: self.checkpoint.read(n).to(self.device) for n in names}
        with torch.cuda.stream(self._stream):
            tensors = {n: self.checkpoint.read(n).pin_memory().to(self.device, non_blocking=True) for n in names}
            self._stream.synchronize()
        for tensor in tensors.values():
            tensor.record_stream(torch.cuda.default_stream(self.device))  # where blocks run
        return tensors

    def _drop(self, names: Iterable[str]) -> None:
        gone = set(names)
        self.held = {n: t for n, t in self.held.items() if n not in gone}
        if gone:
            self._built = {k: m for k, m in self._built.items() if gone.isdisjoint(self._names[k])}

    def _source(self, name: str) -> Tensor:
        if name not in self.held:
            self.held[name] = self.checkpoint.read(name).to(self.device)
        return self.held[name]

    def _reading(self, read: Callable[[str], Tensor]) -> Checkpoint:
        known = self.checkpoint
        return Checkpoint(known.name, known.config, known.family, read, known.folder)

    # -- building

    def block(self, plan: PruningPlan, position: int, attached: Tensors) -> nn.Module:
        """Return the block at a position of a plan, built at its first use; equal recipes are one module."""
        key = plan.key(position)
        if key not in self._built:
            self.needs(plan, position)
            with self.timed("building"):
                self._built[key] = self._build(plan, position, attached)
            if self.copied_bytes(plan, position):
                self._copied.add(key)
        return self._built[key]

    def _build(self, plan: PruningPlan, position: int, attached: Tensors) -> nn.Module:
        check_attached(plan, attached)
        spec = BlockSpec.of_plan(plan)[position]
        donor = None if spec.shares is None else self.block(plan, spec.shares, attached)
        with unfilled():
            block = build_block(self._block_class, self._block_config, self.checkpoint.family, spec, 0, donor)
        tensors = block_tensors(plan, position, self._reading(self._source), attached)
        state = {n: t.to(self.device, self.dtype) for n, t in tensors.items()}
        block.load_state_dict(state, strict=True, assign=True)
        return block.eval().requires_grad_(False)

    def release(self, plan: PruningPlan, position: int) -> None:
        """Forget a built block, and its donor, whose tensors are copies; what they were made of stays."""
        for made in (position, plan.donor(position)):
            if made is not None and self.copied_bytes(plan, made):
                self._built.pop(plan.key(made), None)

    def forget(self) -> None:
        """Forget all that was read and built; it is read again when it is needed."""
        self.held, self._built, self._outers, self._kept_outer = {}, {}, {}, None

    def keep_only(self, plans: Sequence[PruningPlan]) -> None:
        """Forget the built blocks that none of these plans uses."""
        wanted = {p.key(i) for p in plans for i in range(len(p.blocks))}
        self._built = {k: v for k, v in self._built.items() if k in wanted}

    def forget_copies(self) -> None:
        """Forget the built blocks that take memory beside the checkpoint's tensors."""
        self._built = {k: v for k, v in self._built.items() if k not in self._copied}

    def copied_bytes(self, plan: PruningPlan, position: int) -> int:
        """Return the bytes that a built block takes beside the checkpoint's tensors it was made of."""
        recipe = plan.blocks[position]
        return (recipe.whole is None or self._converted) * plan.stored_in(recipe) * self.dtype.itemsize

    # -- running

    def outer(self, plan: PruningPlan | None, attached: Tensors) -> Mapping[str, Tensor]:
        """Return the embedding, the final norm and (unless tied) the head of a plan's model; None: the original's."""
        if plan is None or not plan.own:
            return self._outer
        key = tuple((n, d) for n, d in plan.tensors if n.startswith("outer."))
        if key not in self._outers:
            while len(self._outers) >= OUTERS:
                del self._outers[next(iter(self._outers))]
            own = {name: attached[f"outer.{name}"].to(self.device, self.dtype) for name in plan.own}
            self._outers[key] = {**self._outer, **own}
        return self._outers[key]

    def own_outer_bytes(self, plans: Sequence[PruningPlan]) -> int:
        """Return the most bytes that embeddings, norms and heads which plans have of their own take at once."""
        shape = self.checkpoint.shape
        table = shape.vocabulary * shape.hidden
        counts = {
            tuple((n, d) for n, d in p.tensors if n.startswith("outer.")): sum(
                shape.hidden if name == "final_norm" else table for name in p.own
            )
            for p in plans
        }
        return sum(sorted(counts.values())[-OUTERS:]) * self.dtype.itemsize

    def embed(self, ids: Tensor, plan: PruningPlan | None = None, attached: Tensors = NOTHING) -> Tensor:
        """Return the residual stream (sequences, tokens, hidden) that enters the first block of a plan's model."""
        hidden = nn.functional.embedding(ids.to(self.device), self.outer(plan, attached)["embedding"])
        return hidden if plan is None or plan.embedding_gain == 1.0 else hidden * plan.embedding_gain

    def arguments(
        self, hidden: Tensor, positions: Tensor | None = None, sequences: Sequence[Sequence[int]] = ()
    ) -> dict[str, dict[str, Any]]:
        """Return what the model hands its blocks for states of this shape (mask, positions, rotary): by attention type.

        sequences: of a trie of tokens in one row, the indices of the tokens of each; the blocks then also take what the
        model would hand them for the sequences. positions: (1, tokens), of the tokens of a trie; default 0, 1, ...
        """
        if positions is None:
            return self._handed(hidden)
        unused = hidden.new_zeros(1, 1, 1, 1)  # the model makes no mask of its own beside a given one
        arguments = self._handed(hidden, position_ids=positions.to(self.device), attention_mask=unused)
        for given in arguments.values():
            given |= {"attention_mask": None, "branches": []}
        for chunk in chunks_of(sequences, hidden.shape[1], self.device):
            of_chunk = self._handed(hidden.new_zeros(1, 1, 1).expand(*chunk.tokens.shape, hidden.shape[-1]))
            for kind, given in arguments.items():
                given["branches"].append(replace(chunk, mask=of_chunk[kind]["attention_mask"]))
        return arguments

    def _handed(self, hidden: Tensor, **given: Any) -> dict[str, dict[str, Any]]:
        self._shell(inputs_embeds=hidden, use_cache=False, **given)
        recorders = getattr(self._shell, self.checkpoint.family.blocks)
        shapes = self.checkpoint.shape.blocks
        return {s.attention_type: dict(r.kwargs) for s, r in zip(shapes, recorders, strict=True)}

    def run(
        self, plan: PruningPlan, position: int, attached: Tensors, hidden: Tensor, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Return what the block at a position makes of the residual stream that enters it."""
        kind = plan.block_shape(plan.blocks[position]).attention_type
        block = self.block(plan, position, attached)
        with products(self.dtype, self.device):
            return block(hidden, **arguments[kind])

    def logits(self, hidden: Tensor, plan: PruningPlan | None = None, attached: Tensors = NOTHING) -> Tensor:
        """Return logits (..., vocabulary) of a plan's final residual states (..., hidden), in the compute dtype."""
        outer = self.outer(plan, attached)
        normed = functional_call(self._norm, {"weight": outer["final_norm"]}, (hidden,))
        if plan is not None and plan.final_norm_gain != 1.0:
            normed = normed * plan.final_norm_gain
        with products(self.dtype, self.device):
            return nn.functional.linear(normed, outer.get("head", outer["embedding"]))
