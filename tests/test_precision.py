"""bfloat16 where the processor has no products of it: the same numbers as by definition, in the engine and in gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import KINDS, opened, tiny, tokens
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from flexi_plugins import numerics, precision
from flexi_plugins.data import PruningPlan
from flexi_plugins.execution import layout
from flexi_plugins.execution.blocks import Blocks
from flexi_plugins.execution.readout import Batch
from flexi_plugins.execution.schedule import Prefixes, build_trie
from flexi_plugins.execution.sweep import Planned, Sweeper
from flexi_plugins.precision import WideProducts


@pytest.fixture
def narrow_processor(monkeypatch):
    """A processor without products of bfloat16, whatever this one has."""
    monkeypatch.setattr(precision, "native_bfloat16", lambda device="cpu": False)


def bfloat16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def products(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    return [
        F.linear(a, b.T),
        F.linear(a, weight=b.T),
        a @ b,
        a.matmul(b),
        torch.mm(a, b),
        torch.bmm(a[None], b[None])[0],
    ]


def test_products_are_those_of_float32_rounded_once():
    a, b = bfloat16(7, 300), bfloat16(300, 5, seed=1)
    exact = (a.double() @ b.double()).bfloat16()
    with WideProducts():
        found = products(a, b)
    assert all(f.dtype == torch.bfloat16 for f in found)
    assert all(torch.equal(f, (a.float() @ b.float()).bfloat16()) for f in found)
    assert (found[0] == exact).float().mean() > 0.9, "what is left is the order of sums"


def test_autocast_is_to_bfloat16_as_ever():
    a, w = torch.randn(7, 300).requires_grad_(), torch.randn(5, 300).requires_grad_()
    q = torch.randn(2, 3, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        native = F.linear(a, w), F.scaled_dot_product_attention(q, q, q, is_causal=True), a.softmax(-1)
        with WideProducts():
            found = F.linear(a, w), F.scaled_dot_product_attention(q, q, q, is_causal=True), a.softmax(-1)
    assert [f.dtype for f in found] == [n.dtype for n in native]
    for one, other in zip(found, native, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
    assert torch.equal(found[0], F.linear(a.bfloat16().float(), w.bfloat16().float()).bfloat16())
    grads = [torch.autograd.grad(f[0].float().square().sum(), [a, w]) for f in (found, native)]
    for one, other in zip(*grads, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.3)
    with torch.autocast("cpu", torch.bfloat16), WideProducts():
        assert torch.mm(a.double(), w.double().T).dtype == torch.float64


def test_factors_may_come_by_name():
    a, w = bfloat16(7, 300), bfloat16(5, 300, seed=1)
    with WideProducts():
        assert torch.equal(F.linear(input=a, weight=w), F.linear(a, w))


def test_a_bias_is_added_before_the_rounding():
    a, w, bias = bfloat16(7, 300), bfloat16(5, 300, seed=1), bfloat16(5, seed=2)
    with WideProducts():
        found = F.linear(a, w, bias)
    assert torch.equal(found, F.linear(a.float(), w.float(), bias.float()).bfloat16())


def test_what_is_not_a_product_of_bfloat16_is_left_alone():
    a, b = torch.randn(7, 30), torch.randn(30, 5)
    with WideProducts():
        assert torch.equal(a @ b, torch.mm(a, b))
        assert (a @ b).dtype == torch.float32
        assert (bfloat16(3) + bfloat16(3)).dtype == torch.bfloat16


def test_gradients_are_those_of_the_wide_product():
    a, w = bfloat16(7, 300).requires_grad_(), bfloat16(5, 300, seed=1).requires_grad_()
    with WideProducts():
        F.linear(a, w).float().square().sum().backward()
    out = F.linear(a.float(), w.float()).bfloat16()
    dy = (2 * out.float()).bfloat16().float().detach()
    assert a.grad.dtype == w.grad.dtype == torch.bfloat16
    assert torch.equal(a.grad, (dy @ w.float()).bfloat16())
    torch.testing.assert_close(w.grad, (dy.T @ a.float()).bfloat16(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(7, 300), (2, 5, 300), (300,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_torchs_own_and_keep_no_factor_in_float32(
    shape: tuple[int, ...], dtype: torch.dtype, biased: bool
):
    """Of what is computed from widened factors; what is kept for them is the factors as they were given."""
    a, w, bias = (torch.randn(*size).to(dtype).requires_grad_() for size in (shape, (6, 300), (6,)))
    factors = [a, w, *([bias] if biased else [])]
    dy = torch.randn(*shape[:-1], 6).bfloat16()
    expected = F.linear(*(factor.bfloat16().float() for factor in factors)).bfloat16()
    wanted = torch.autograd.grad(expected, factors, dy)
    kept: list[torch.Tensor] = []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), WideProducts(), keeping:
        found = F.linear(*factors)
        grads = torch.autograd.grad(found, factors, dy)
    assert torch.equal(found, expected)
    assert all(torch.equal(one, other) and one.dtype == dtype for one, other in zip(grads, wanted, strict=True))
    assert {t.data_ptr() for t in kept} == {a.data_ptr(), w.data_ptr()}


def test_no_gradient_is_computed_that_nobody_needs():
    a, w = bfloat16(7, 300), bfloat16(5, 300, seed=1).requires_grad_()
    with WideProducts(), FlopCounterMode(display=False) as counter:
        F.linear(a, w).sum().backward()
        assert not F.linear(a, w.detach()).requires_grad
    assert counter.get_total_flops() == 3 * 2 * 7 * 300 * 5, "twice forward, and once for the gradient of w"


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_in_wide_products_is_the_model_in_bfloat16(kind, narrow_processor):
    """As near to float32 as transformers' own model in bfloat16 is, which the processor multiplies in its way."""
    model, ids = tiny(kind), tokens(3, 11)
    reads = [(row, (column,), (token,)) for row in range(3) for column in (4, 10) for token in range(61)]

    def swept(dtype: torch.dtype) -> torch.Tensor:
        checkpoint = opened(model)
        planned = [Planned(PruningPlan.identity(checkpoint.shape))]
        sweeper = Sweeper(Blocks(checkpoint, dtype=dtype))
        ((_, answers),) = sweeper.sweep(planned, [Batch(ids, reads)])
        return torch.tensor([score for score, _ in answers[0]]).view(-1, 61)

    exact, wide = swept(torch.float32), swept(torch.bfloat16)
    with torch.no_grad():
        logits = tiny(kind).bfloat16()(ids).logits.float()[:, [4, 10]].flatten(0, 1)
    native = logits.log_softmax(-1)
    assert not torch.equal(exact, wide), "it was computed in bfloat16"
    assert (exact - wide).abs().mean() < 2 * (exact - native).abs().mean()


def test_a_block_runs_in_wide_products_only_where_the_processor_has_none(monkeypatch):
    entered = []
    monkeypatch.setattr(WideProducts, "__enter__", lambda self: entered.append(1))
    monkeypatch.setattr(WideProducts, "__exit__", lambda self, *error: None)
    cpu, narrow, wide = torch.device("cpu"), torch.bfloat16, torch.float32
    for native, dtype, expected in ((True, narrow, 0), (False, narrow, 1), (False, wide, 0), (True, wide, 0)):
        entered.clear()
        monkeypatch.setattr(precision, "native_bfloat16", lambda device, native=native: native)
        with precision.products(dtype, cpu):
            assert len(entered) == expected


@pytest.mark.parametrize(("native", "copies"), [(True, 0), (False, 1)])
def test_the_memory_for_factors_in_float32_is_counted(monkeypatch, native: bool, copies: int):
    """A tiny model's head is larger than a map, and than all maps of a block."""
    monkeypatch.setattr(precision, "native_bfloat16", lambda device="cpu": native)
    checkpoint = opened(tiny("llama", vocab_size=1000))
    plan = PruningPlan.identity(checkpoint.shape)
    nodes = build_trie([plan], Prefixes())
    found = layout._widened_bytes(Blocks(checkpoint, torch.bfloat16), [plan], nodes)
    assert found == copies * 4 * 1000 * 32
    assert layout._widened_bytes(Blocks(checkpoint, torch.float32), [plan], nodes) == 0
    small = opened(tiny("llama", vocab_size=2))
    shape = small.shape.maps(small.shape.blocks[0])
    sizes = [rows * columns for rows, columns in shape.values()]
    blocks, inside = Blocks(small, torch.bfloat16), copies * 4 * max(sizes)
    assert layout._widened_bytes(blocks, [PruningPlan.identity(small.shape)], nodes) == inside
    without_head = layout._widened_bytes(Blocks(checkpoint, torch.bfloat16), [plan], nodes, reads=False)
    assert without_head == inside, "nothing is read from states"


def test_the_statistics_products_are_the_same_everywhere(narrow_processor):
    a, b = bfloat16(7, 300), bfloat16(300, 5, seed=1)
    assert torch.equal(numerics.product(a, b), (a.float() @ b.float()).bfloat16().float())
