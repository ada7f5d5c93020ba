# SPDX-License-Identifier: MIT
"""The backward for few candidates in Triton's interpreter, which needs a process of its own,
started with ``TRITON_INTERPRET=1``: `make test` has one."""

import math
from typing import Any

import pytest
import torch
from test_triton_backward import (
    F16,
    F32,
    NEEDS,
    assert_padding_has_no_gradient,
    expected,
    normal,
)
from test_triton_backward import pytestmark as pytestmark
from test_triton_backward_small import SMALL
from test_triton_backward_small import launched as launched
from test_triton_backward_small import without_work as without_work
from torch import Tensor

from convnn_kernels.triton import backend, configs

CANDIDATES = ["query_side_candidates_kernel", "key_side_candidates_kernel", "sum_parts_kernel"]


def make_call(
    N: int = 37,
    M: int = 45,
    k: int = 3,
    R: int = 10,
    metric: str = "cosine",
    rho: str = "softmax",
    weight: bool = True,
    B: int = 2,
    D: int = 10,
    C: int = 7,
    selves: str = "itself",
    dtype: torch.dtype = F16,
) -> dict[str, Any]:
    """The arguments of forward_backward, but for the needed gradients: several tiles of queries and
    of keys, the last ones not full; missing neighbors of both kinds, a candidate that most chose,
    and ones that nobody chose. `selves`: which rows of key are the queries' own."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        normal(B, n, size, seed=seed, dtype=dtype)
        for seed, (n, size) in enumerate([(N, D), (M, D), (M, C)])
    )
    candidates = torch.randperm(M, generator=generator)[:R]
    own = {
        "itself": torch.arange(N) % M,
        "shifted": (torch.arange(N) + 5) % M,
        "any": torch.randint(M, (N,), generator=generator),
        "one": torch.full((N,), M - 1),
        "none": torch.arange(0),
    }[selves]
    I = torch.rand(B, N, R, generator=generator)
    I[..., 0] *= 0.3
    I[..., -1] += 1
    I = candidates[I.argsort(-1)[..., :k]]
    if selves != "none":
        # In any slot, as with order="index"; but where it is among the candidates.
        slot = torch.randint(k, (B, N, 1), generator=generator)
        is_other = ~torch.isin(own, candidates)
        I = torch.where((torch.arange(k) == slot) & is_other[None, :, None], own[None, :, None], I)
    rows = key.float().gather(1, I.view(B, -1, 1).expand(-1, -1, D)).view(B, N, k, D)
    q = query.float().unsqueeze(2)
    if metric == "cosine":
        s = torch.nn.functional.cosine_similarity(q, rows, dim=-1)
    else:
        s = (q * rows).sum(-1)
    s[0, 5:9], s[-1, 3, k - 1] = -math.inf, -math.inf
    I[-1, N // 2, 0] = M
    return {
        "grad_output": normal(B, N, C, seed=4, dtype=dtype),
        "grad_similarities": normal(B, N, k, seed=5),
        **{"query": query, "key": key, "value": value},
        "weight": normal(C, 1, k, seed=6, dtype=dtype) if weight else None,
        **{"similarities": s, "indices": I, "has_bias": True},
        **{"metric": metric, "rho": rho, "scale": 0.7 if rho == "softmax" else 1.0},
        "candidates": candidates,
    }


def run(call: dict[str, Any], needed: tuple[str, ...] = NEEDS) -> dict[str, Tensor]:
    backward = backend.operators()["convnn::forward_backward"]
    results = backward(**call, **{f"need_{name}": name in needed for name in NEEDS})
    return dict(zip(NEEDS, results, strict=True))


def run_otherwise(call: dict[str, Any], needed: tuple[str, ...] = NEEDS) -> dict[str, Tensor]:
    """By the kernels for pairs."""
    return run({**call, "candidates": None}, needed)


def assert_close(call: dict[str, Any], needed: tuple[str, ...] = NEEDS) -> None:
    results, references = run(call, needed), expected(without_candidates(call))
    for name in needed:
        if name == "weight" and call["weight"] is None:
            continue
        assert results[name].dtype == call["value"].dtype
        error = (results[name].double() - references[name]).abs().amax()
        bound = 2**-9 * references[name].abs().amax() + 2**-24
        assert error <= bound, (name, float(error / bound))


@pytest.mark.parametrize(
    ("selves", "options"),
    [
        ("itself", {"N": 197, "M": 197, "k": 9, "R": 32, "B": 1, "C": 16, "D": 16}),
        ("shifted", {"rho": "similarity", "weight": False, "C": 70}),
        ("any", {"k": 9, "D": 40, "R": 17}),
        ("one", {"k": 1, "R": 1}),
        ("none", {"k": 16, "R": 20, "rho": "similarity"}),
        ("itself", {"N": 12, "M": 90, "metric": "dot"}),
    ],
)
def test_gradients(selves: str, options: dict[str, Any], launched: list[str]) -> None:
    call = make_call(selves=selves, **options)
    assert_close(call)
    assert launched == CANDIDATES
    if call["rho"] == "similarity" or call["query"].shape[1] < 20:
        assert_close({**call, "grad_similarities": None})


@pytest.mark.parametrize("options", [{}, {"rho": "similarity", "weight": False}], ids=str)
def test_some_or_all_gradients(options: dict[str, Any], launched: list[str]) -> None:
    """Without those of weight and bias, or without others, which is for the kernels for pairs."""
    call = make_call(**options)
    everything, some = run(call), run(call, NEEDS[:3])
    assert launched == [*CANDIDATES, *CANDIDATES[:2]]
    for name in NEEDS[:3]:
        assert torch.equal(some[name], everything[name]), name
    assert not some["weight"].numel() + some["bias"].numel()
    run(call, NEEDS[1:])
    assert launched[5:] == SMALL


def test_integers_have_the_bits_of_the_other_kernels() -> None:
    call = make_call(metric="cosine", rho="similarity", D=4)
    for name in ("grad_output", "value", "weight"):
        call[name] = (2 * call[name]).round().clamp(-3, 3)
    call["similarities"] = call["similarities"].clamp(-1, 1).round()
    results, others = run(call), run_otherwise(call)
    for name in ("value", "weight", "bias"):
        assert results[name].abs().amax() > 0
        assert torch.equal(results[name], others[name]), name


def assert_as_otherwise(call: dict[str, Any]) -> None:
    """As by the kernels for pairs, also in what is not finite; and rows of key and value that are
    nobody's neighbors have a gradient of 0."""
    results, others = run(call), run_otherwise(call)
    I, M = call["indices"], call["key"].shape[1]
    present = (call["similarities"] != -math.inf) & (I < M)
    for b in range(len(I)):
        unused = ~torch.isin(torch.arange(M), I[b][present[b]])
        for name in ("key", "value"):
            assert not results[name][b, unused].any(), name
    for name in NEEDS:
        finite = others[name].isfinite()
        assert torch.equal(results[name].isfinite(), finite), name
        result, other = results[name][finite].double(), others[name][finite].double()
        if finite.any():
            assert (result - other).abs().amax() <= 2**-8 * other.abs().amax(), name


NOT_FINITE: dict[str, tuple[tuple[str, tuple[int, ...], float], ...]] = {
    "grad": (("grad_output", (0, 20, 3), math.nan), ("grad_output", (1, 35, 0), math.inf)),
    "query": (("query", (0, 30, 2), math.inf),),
    "key": (("key", (0, 7, 0), math.nan), ("key", (1, 30, 1), -math.inf)),
    "value": (("value", (0, 4, 1), -math.inf), ("value", (1, 31, 2), math.nan)),
    "weight": (("weight", (3, 0, 2), math.inf),),
    "similarities": (("similarities", (0, 11, 1), math.nan),),
    "direct": (("grad_similarities", (0, 12, 0), math.inf),),
}


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize("selves", ["itself", "one", "none"])
@pytest.mark.parametrize("case", NOT_FINITE)
def test_what_is_not_finite_stays_where_it_belongs(case: str, selves: str) -> None:
    """In single rows, of candidates and others, that are chosen or not."""
    call = make_call(selves=selves)
    for name, place, number in NOT_FINITE[case]:
        call[name][place] = number
    assert_as_otherwise(call)


@pytest.mark.parametrize("tensor", ["value", "key"])
def test_each_candidate_that_is_not_finite_stays_where_it_belongs(tensor: str) -> None:
    call = make_call(R=12)
    I, candidates = call["indices"], call["candidates"]
    chosen = [int((c == I).sum()) for c in candidates]
    assert max(chosen) > 20
    assert min(chosen) == 0
    for which in (max(chosen), min(chosen)):
        x = call[tensor].clone()
        x[0, candidates[chosen.index(which)], 1] = math.inf
        assert_as_otherwise({**call, tensor: x})


def test_rows_without_a_direction() -> None:
    """Their gradients are 0, whatever comes from outside."""
    call = make_call()
    candidate = int(call["candidates"][0])
    own = int(next(i for i in range(37) if i not in call["candidates"] and i not in range(5, 9)))
    call["query"][0, 3], call["key"][1, candidate], call["key"][0, own] = 0.0, 0.0, 0.0
    at = (call["indices"][1] == candidate).nonzero()[0]
    call["grad_similarities"][0, 3, 0] = call["grad_similarities"][1, at[0], at[1]] = math.inf
    slot = int((call["indices"][0, own] == own).nonzero()[0, 0])
    call["grad_similarities"][0, own, slot] = math.inf
    results, others = run(call), run_otherwise(call)
    assert not results["query"][0, 3].any()
    assert not results["key"][1, candidate].any()
    assert not results["key"][0, own].any()
    for name in NEEDS:
        assert results[name][others[name].isfinite()].isfinite().all(), name


@pytest.mark.parametrize("selves", ["itself", "one", "none"])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_padding_has_no_gradient(metric: str, selves: str, launched: list[str]) -> None:
    assert_padding_has_no_gradient(run, make_call(metric=metric, selves=selves))
    assert set(CANDIDATES) <= set(launched)


def test_queries_without_neighbors_add_nothing() -> None:
    """Not even where the gradient of their output is not finite."""
    call = make_call()
    clean = run(call)
    call["grad_output"][0, 5:9] = math.nan
    dirty = run(call)
    for name in NEEDS[:4]:
        assert torch.equal(clean[name], dirty[name]), name


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_what_is_finite_is_known_to_be(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where queries have no neighbors: nothing is computed query by query."""
    from convnn_kernels.triton.launch import Plan

    flags: list[Tensor] = []
    launch = Plan.launch

    def keep(plan: Plan, pointers: Any) -> None:
        launch(plan, pointers)
        found = pointers.tensor("p_flags")
        assert found is not None
        flags.append(found.clone())

    monkeypatch.setattr(Plan, "launch", keep)
    call = make_call(metric=metric)
    call["grad_output"][0, 5:9] = math.nan
    run(call)
    assert not flags[0].any()
    call["query"][1, 3, 0] = math.inf
    run(call)
    assert flags[1].isnan().any()


def test_no_pair_at_all() -> None:
    call = make_call()
    call["similarities"][:] = -math.inf
    call["grad_output"][0, 3] = math.inf
    results = run(call)
    assert not any(results[name].any() for name in NEEDS[:4])


SIZES: dict[str, tuple[dict[str, Any], dict[str, float], set[str]]] = {
    # Options; sizes of tensors; which gradients leave the range of float16.
    "small": ({}, {"grad_output": 1e-4, "query": 1e3, "key": 1e-2}, set()),
    "large": ({}, {"grad_output": 1e4, "value": 1e-3, "weight": 1e-1}, {"bias"}),
    "products_beyond": ({}, {"grad_output": 1 / 16, "value": 3e3, "weight": 1 / 64}, set()),
    "large_direct": ({"metric": "dot"}, {"grad_similarities": 1e6, "query": 1e-4}, {"query"}),
    "small_direct": ({"metric": "dot"}, {"grad_similarities": 1e-6, "grad_output": 1e-5}, set()),
    "large_weight": ({}, {"weight": 1e4, "grad_output": 10, "value": 1e-4}, {"value"}),
}


@pytest.mark.parametrize("case", SIZES)
def test_float16_of_any_size(case: str) -> None:
    """Where products within a kernel leave its range."""
    options, sizes, beyond = SIZES[case]
    call = make_call(**options)
    if "grad_similarities" not in sizes:
        call["grad_similarities"] = None
    for name, size in sizes.items():
        call[name] = (size * call[name]).to(call[name].dtype)
        if call["metric"] == "dot" and name == "query":
            call["similarities"] *= size
    references = expected(without_candidates(call))
    assert {name for name in NEEDS if references[name].abs().amax() > 65504} == beyond
    results = run(call)
    for name in set(NEEDS) - beyond:
        error = (results[name].double() - references[name]).abs().amax()
        assert error <= 2**-9 * references[name].abs().amax() + 2**-24, name


def without_candidates(call: dict[str, Any]) -> dict[str, Any]:
    return {name: X for name, X in call.items() if name != "candidates"}


def test_a_row_keeps_its_bits_beside_a_large_one() -> None:
    call = make_call()
    call["grad_similarities"] = None
    call["grad_output"] *= 1e-2
    alone = run(call)["query"].double()
    call["grad_output"][:, 0] *= 1e6
    beside = run(call)["query"].double()
    error = (alone - beside)[:, 1:].abs().amax(-1)
    assert (error <= 2**-10 * alone[:, 1:].abs().amax(-1) + 2**-24).all()


def test_strides() -> None:
    """Heads as they lie in memory, keys that they share, and a gradient that is expanded."""
    call = make_call(B=6)
    names = ("grad_output", "grad_similarities", "query", "key", "value", "similarities", "indices")
    for name in names:
        call[name] = call[name].unflatten(0, (2, 3))
    call["key"] = call["key"][:, :1].expand(call["key"].shape)
    call["grad_output"] = call["grad_output"][..., :1].expand(call["grad_output"].shape)
    copies = {name: X.contiguous() if name in names else X for name, X in call.items()}
    for name in ("query", "value"):
        call[name] = call[name].transpose(1, 2).contiguous().transpose(1, 2)
    for X, other in zip(run(call).values(), run(copies).values(), strict=True):
        assert torch.equal(X, other)


@pytest.mark.parametrize("wrong", ["few", "twice", "outside"])
def test_wrong_candidates_do_no_harm(wrong: str, launched: list[str]) -> None:
    """Gradients are wrong, or not; but there is no access out of bounds, and all are written."""
    call = make_call(selves="any")
    C = call["candidates"]
    call["candidates"] = {
        "few": C[:3],
        "twice": torch.cat([C, C[:2]]),
        "outside": torch.cat([C, torch.tensor([-1, 45, 2**40])]),
    }[wrong]
    results = run(call)
    assert launched == CANDIDATES
    others = run_otherwise(call)
    for name in NEEDS:
        assert results[name].isfinite().all()
        if wrong == "outside":
            bound = 2**-8 * others[name].abs().amax()
            assert (results[name] - others[name]).abs().amax() <= bound


@pytest.mark.parametrize(
    "change",
    [
        {"R": 33},
        {"N": 257},
        {"M": 257, "selves": "one"},
        {"k": 17, "R": 20},
        {"rho": "ones"},
        {"dtype": F32},
        {"metric": "dot", "rho": "similarity"},
    ],
    ids=str,
)
def test_what_the_kernels_are_not_for(change: dict[str, Any], without_work: list[str]) -> None:
    run(make_call(**{"N": 20} | change))
    assert without_work
    assert without_work[0] not in CANDIDATES


def test_more_memory_than_is_allowed(
    without_work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "allowed_backward", lambda *_: 2**10)
    run(make_call(N=5, k=1))
    assert without_work[0] == "query_side_kernel"
