"""Donors of large models: the randomised factorisation against the exact one, distances, and what a search reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import noting, opened, sharing, tiny
from torch import Tensor

from flexi_plugins import numerics
from flexi_plugins.data import BlockShape, ModelShape, PruningPlan, Scores
from flexi_plugins.errors import FlexiError
from flexi_plugins.hookspecs import Budget, PruningRequest, TensorRequest
from flexi_plugins.models import default_model, open_model
from flexi_plugins.numerics import truncated_svd
from flexi_plugins.plugins import Plugins
from flexi_plugins.strategies.share_lora import (
    ShareLora,
    difference_adapter,
    donor_distances,
    reconstruction,
    tail_energy,
)

ROWS, COLUMNS, RANK = 300, 400, 20  # the Krylov space has 96 dimensions


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(rows, columns, seed=seed).double()).Q


def of_spectrum(singular: Tensor, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """Return a float32 matrix with these singular values."""
    u, v = orthonormal(rows, len(singular), seed), orthonormal(columns, len(singular), seed + 1000)
    return ((u * singular.double()) @ v.T).float()


def like_trained(seed: int = 0) -> Tensor:
    """A spectrum like an MLP map of SmolLM2: a few large values, then a slow decay (18 % of the energy in 1/16)."""
    place = torch.linspace(0, 1, ROWS)
    return of_spectrum(1 + 10 * (1 - place) + 10 * torch.exp(-40 * place), seed=seed)


def best(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank (Eckart and Young), float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def distance_by_hand(own: Tensor, donor: Tensor, rank: int) -> float:
    """d as the paper writes it, from matrices of full size."""
    difference = best(own, rank) - best(donor, rank)
    return float((difference - best(difference, rank)).norm())


# ---------------------------------------------------------------------------------------- the factorisation


@pytest.mark.parametrize("transposed", [False, True])
def test_the_randomised_factorisation_is_nearly_the_best(transposed):
    matrix = like_trained().T if transposed else like_trained()
    u, s, v = truncated_svd(matrix, RANK, "randomised")
    assert (u.shape, s.shape, v.shape) == ((len(matrix), RANK), (RANK,), (matrix.shape[1], RANK))
    left_out = float((matrix - (u * s) @ v.T).norm() / (matrix - best(matrix, RANK)).norm())
    assert 1 - 1e-6 <= left_out < 1.002
    exact = torch.linalg.svdvals(matrix)[:RANK]
    assert bool((s <= exact * (1 + 1e-5)).all())  # values of a projection are never larger
    assert bool((s >= exact * 0.97).all())


DEFICIENT = {
    "zero": torch.zeros(ROWS, COLUMNS),
    "of rank 1": torch.ones(ROWS, COLUMNS),
    "of rank 5": random(ROWS, 5) @ random(5, COLUMNS, seed=1),
    "of two entries": torch.zeros(ROWS, COLUMNS).index_put(
        (torch.tensor([3, 5]), torch.tensor([4, 6])), torch.tensor(7.0)
    ),
    "orthogonal": orthonormal(COLUMNS, ROWS).T.float(),
    "the identity": torch.eye(ROWS, COLUMNS),
    "with an outlier": like_trained() + 1e4 * random(ROWS, 1) @ random(1, COLUMNS, seed=1) / 300,
    "tiny": 1e-12 * like_trained(),
    "huge": 1e12 * like_trained(),
}


@pytest.mark.parametrize("name", DEFICIENT)
def test_factors_are_orthonormal_whatever_the_matrix(name):
    """Also where the Krylov space is exhausted before it has as many dimensions as it should."""
    matrix = DEFICIENT[name]
    u, s, v = truncated_svd(matrix, RANK, "randomised")
    for factor in (u, v):
        assert float((factor.T @ factor - torch.eye(RANK)).abs().max()) < 1e-5
    size = float(matrix.norm())
    expected = float((matrix - best(matrix, RANK)).norm())
    assert float((matrix - (u * s) @ v.T).norm()) <= 1.002 * expected + 2e-5 * size
    exact = torch.linalg.svdvals(matrix.double())[:RANK]
    assert bool(((s - exact).abs() <= 0.03 * exact + 1e-6 * size).all())


def test_small_matrices_are_factorised_exactly_unless_asked_otherwise(monkeypatch):
    matrix = like_trained()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    exact = (u[:, :RANK], s[:RANK], vh[:RANK].T)
    for found in (truncated_svd(matrix, RANK), truncated_svd(matrix, RANK, "exact")):
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    randomised = truncated_svd(matrix, RANK, "randomised")
    assert not torch.equal(randomised[1], exact[1])
    monkeypatch.setattr(numerics, "SMALL", ROWS - 1)
    assert torch.equal(truncated_svd(matrix, RANK)[1], randomised[1])
    assert torch.equal(truncated_svd(matrix, RANK, "exact")[1], exact[1])


@pytest.mark.parametrize("rank", [0, 1, 25, 300, 1000])
def test_any_rank_will_do(rank):
    """A rank at which the randomised space would be the whole space is factorised exactly."""
    matrix = like_trained()
    u, s, v = truncated_svd(matrix, rank, "randomised")
    assert u.shape[1] == len(s) == v.shape[1] == min(rank, ROWS)
    expected = float((matrix - best(matrix, rank)).norm())
    assert float((matrix - (u * s) @ v.T).norm()) == pytest.approx(expected, rel=2e-3, abs=1e-3)


def test_factorisations_are_repeatable_and_leave_the_random_state_alone():
    matrix = like_trained()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = truncated_svd(matrix, RANK, "randomised")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, truncated_svd(matrix, RANK, "randomised"), strict=True))


def test_a_factorisation_of_bfloat16_is_one_of_the_same_numbers():
    matrix = like_trained().bfloat16()
    for method in ("exact", "randomised"):
        found, expected = (truncated_svd(m, RANK, method) for m in (matrix, matrix.float()))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------------- distances


@pytest.mark.parametrize(("own", "donor"), list(itertools.combinations(range(3), 2)))
def test_randomised_distances_are_within_a_hundredth(own, donor):
    matrices = [like_trained(seed) for seed in range(3)]
    pair = [reconstruction(matrices[i], RANK, "randomised") for i in (own, donor)]
    expected = distance_by_hand(matrices[own], matrices[donor], RANK)
    assert tail_energy(*pair, RANK) == pytest.approx(expected, rel=0.01)
    assert tail_energy(*pair, RANK) == pytest.approx(tail_energy(*pair[::-1], RANK), rel=1e-6)


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_identical_weights_are_at_distance_zero(svd):
    matrix = like_trained()
    twice = [reconstruction(matrix.clone(), RANK, svd) for _ in range(2)]
    assert tail_energy(*twice, RANK) < 1e-5 * float(matrix.norm())


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_what_an_adapter_can_hold_costs_nothing(svd):
    """Reconstructions that differ in fewer directions than an adapter has: the distance is 0, however large they are."""
    u, v = orthonormal(ROWS, RANK), orthonormal(COLUMNS, RANK, seed=1)
    own, donor = (10 * u @ v.T).float(), (10 * u[:, 3:] @ v[:, 3:].T).float()
    pair = [reconstruction(m, RANK, svd) for m in (own, donor)]
    assert float((own - donor).norm()) > 10
    assert tail_energy(*pair, RANK) < 1e-4 * float(own.norm())


class Reading:
    """Weights of random blocks, all of one shape, that note what is read."""

    def __init__(self, shape: ModelShape, near: Mapping[int, int]) -> None:
        self.shape, self.read, self.cache = shape, [], {}
        sizes = shape.maps(shape.blocks[0])
        self.blocks = [
            {r: random(*size, seed=100 * i + k) for k, (r, size) in enumerate(sizes.items())}
            for i in range(len(shape.blocks))
        ]
        for block, donor in near.items():
            self.blocks[block] = {r: 0.9 * w + 0.2 * self.blocks[block][r] for r, w in self.blocks[donor].items()}

    def block(self, index: int) -> Mapping[str, Tensor]:
        noted = self

        class Lazy(Mapping[str, Tensor]):
            def __getitem__(self, role: str) -> Tensor:
                noted.read.append((role, index))
                return noted.blocks[index][role]

            def __iter__(self) -> Iterator[str]:
                return iter(noted.blocks[index])

            def __len__(self) -> int:
                return len(noted.blocks[index])

        return Lazy()

    def cached(self, key, make):
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]


SHAPE = ModelShape((BlockShape(8, 4, 16, 160),) * 6, hidden=128, vocabulary=61, tied=False)


def planned(weights, scores: list[float], strategy: ShareLora, shape: ModelShape = SHAPE) -> dict[int, int]:
    """Return the donor of each replaced block."""
    plan = PruningPlan.identity(shape)
    request = PruningRequest(
        shape, plan, Budget(shape.parameters, 0.1), weights=weights, scores=Scores(block=torch.tensor(scores))
    )
    return {i: r.shares for i, r in enumerate(strategy.plan(request).blocks) if r.shares is not None}


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_the_donor_is_the_block_that_a_pruned_one_resembles(svd):
    weights = Reading(SHAPE, {1: 4, 2: 0, 5: 4})
    assert planned(weights, [9, 1, 2, 8, 7, 3], ShareLora(blocks=3, svd=svd)) == {1: 4, 2: 0, 5: 4}


def test_a_search_reads_every_map_once_one_role_after_the_other():
    """And no metric, ratio or number of blocks makes it read again: what is pruned changes no distance."""
    weights = Reading(SHAPE, {})
    planned(weights, [9, 1, 2, 8, 7, 3], ShareLora(blocks=3))
    assert weights.read == [(role, block) for role in SHAPE.maps(SHAPE.blocks[0]) for block in range(6)]
    weights.read.clear()
    planned(weights, [1, 9, 8, 2, 3, 7], ShareLora(blocks=4))
    assert not weights.read
    planned(weights, [1, 9, 8, 2, 3, 7], ShareLora(blocks=4, rank=5))
    assert len(weights.read) == 6 * 7


def test_of_a_large_model_only_the_pairs_in_question_are_compared(monkeypatch):
    small = Reading(SHAPE, {})
    expected = planned(small, [9, 1, 2, 8, 7, 3], ShareLora(blocks=3))
    monkeypatch.setattr(numerics, "SMALL", 64)
    weights = Reading(SHAPE, {})
    assert planned(weights, [9, 1, 2, 8, 7, 3], ShareLora(blocks=3)) == expected
    (distances,) = weights.cache.values()
    assert set(distances) == {frozenset((i, j)) for i in (1, 2, 5) for j in (0, 3, 4)}
    assert weights.read == [(role, block) for role in SHAPE.maps(SHAPE.blocks[0]) for block in range(6)]


def test_donors_are_only_sought_among_blocks_of_the_same_shape():
    other = replace(SHAPE.blocks[0], channels=96)
    shape = replace(SHAPE, blocks=(SHAPE.blocks[0], other) * 3)
    weights = Reading(SHAPE, {})
    for index in (1, 3, 5):
        sizes = shape.maps(other)
        weights.blocks[index] = {r: random(*size, seed=index) for r, size in sizes.items()}
    found = planned(weights, [9, 1, 8, 2, 7, 6], ShareLora(blocks=2), shape)
    assert found == {1: 5, 3: 5}
    assert {block for _, block in weights.read} == {1, 3, 5}


def test_a_search_leaves_only_numbers_behind():
    weights = Reading(SHAPE, {})
    planned(weights, [9, 1, 2, 8, 7, 3], ShareLora(blocks=3))
    (distances,) = weights.cache.values()
    assert len(distances) == 15
    assert all(type(d) is float for d in distances.values())


@pytest.mark.parametrize("distance", ["reconstruction", "difference", "frobenius"])
def test_a_search_reports_every_step_that_it_announces(distance):
    weights, pairs, shown = Reading(SHAPE, {}), [(1, 0), (1, 3), (2, 0)], []
    for _ in range(2):  # what is known is not announced again
        donor_distances(weights, SHAPE, pairs, RANK, "exact", distance, noting(shown))
    steps = 7 * (15 + 6 if distance == "reconstruction" else 3)
    assert shown == [("distances of donors", steps, steps)]


def test_rank_zero_has_no_distances_and_takes_any_donor():
    assert planned(Reading(SHAPE, {}), [9, 1, 2, 8, 7, 3], ShareLora(blocks=1, rank=0)) == {1: 0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_map_that_is_not_finite_is_named(bad):
    weights = Reading(SHAPE, {})
    weights.blocks[3]["gate"][0, 0] = bad
    message = "share-lora: the gate map of block 3 holds NaN or infinity; expected finite weights"
    for svd in ("exact", "randomised"):
        with pytest.raises(FlexiError, match=message):
            planned(weights, [9, 1, 2, 8, 7, 3], ShareLora(blocks=3, svd=svd))
        plan = sharing(SHAPE, {1: 3})
        with pytest.raises(FlexiError, match=message):
            ShareLora(svd=svd).tensors(TensorRequest(plan, plan, weights))


@pytest.mark.real
def test_on_trained_weights_both_factorisations_choose_the_same_donors():
    """The first six blocks of SmolLM2, all maps: distances within 1.5 %, and the nearest of them the same."""
    checkpoint = open_model(str(default_model()), Plugins.load().family)
    shape = replace(checkpoint.shape, blocks=checkpoint.shape.blocks[:6])
    rank = shape.hidden // 16
    pairs = list(itertools.combinations(range(6), 2))
    exact, found = (donor_distances(checkpoint, shape, pairs, rank, svd) for svd in ("exact", "randomised"))
    for pair, distance in exact.items():
        assert found[pair] == pytest.approx(distance, rel=0.015)

    def nearest(distances):
        return [min((p for p in distances if block in p), key=distances.__getitem__) for block in range(6)]

    assert nearest(found) == nearest(exact)


RECORDS = Path(__file__).parents[1] / "results" / "flexigpt-ablation-smollm2" / "records"
CHOSEN = {  # of the nine blocks that go at 20 %, in their order
    "reconstruction": [4, 11, 11, 8, 18, 18, 18, 0, 0],
    "frobenius": [18] * 9,
    "difference": [0] * 9,
}


@pytest.mark.parametrize("distance", CHOSEN)
def test_only_the_papers_distance_does_not_give_all_blocks_one_donor(distance):
    """Of SmolLM2 at 20 %, in every committed plan."""
    plans = [json.loads(file.read_text())["plan"] for file in sorted(RECORDS.glob("*-share-lora-*.json"))]
    found = [p["blocks"] for p in plans if p["origin"]["strategy_options"]["donor"] == distance]
    assert len(found) >= 2
    for blocks in found:
        assert [b["shares"] for b in blocks if "shares" in b] == CHOSEN[distance]


# ---------------------------------------------------------------------------------------- adapters


def test_randomised_adapters_hold_nearly_all_that_adapters_can():
    own, donor = like_trained(0), like_trained(1)
    a, b = difference_adapter(own, donor, RANK, "randomised")
    assert float((own - donor - a @ b).norm()) < 1.002 * float((own - donor - best(own - donor, RANK)).norm())
    assert float((b @ b.T - torch.eye(RANK)).abs().max()) < 1e-5  # the singular values are all on A
    assert torch.allclose(a.norm(dim=0), torch.linalg.svdvals(own - donor)[:RANK], rtol=0.03)


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_an_adapter_between_equal_weights_is_zero_and_can_be_trained(svd):
    """A = 0 and B orthonormal, as a fresh LoRA: were both 0, neither would have a gradient."""
    a, b = difference_adapter(like_trained(), like_trained(), RANK, svd)
    assert not a.any()
    assert float((b @ b.T - torch.eye(RANK)).abs().max()) < 1e-5


def test_adapters_read_each_map_of_the_two_blocks_once():
    weights = Reading(SHAPE, {})
    plan = sharing(SHAPE, {1: 4, 2: 4})
    ShareLora().tensors(TensorRequest(plan, plan, weights))
    roles = list(SHAPE.maps(SHAPE.blocks[0]))
    assert weights.read == [(role, block) for pruned in (1, 2) for role in roles for block in (pruned, 4)]


def test_adapters_of_bfloat16_weights_are_bfloat16():
    plan = sharing(opened(tiny()).shape, {1: 4})
    made = ShareLora(svd="randomised").tensors(TensorRequest(plan, plan, opened(tiny().bfloat16())))
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
