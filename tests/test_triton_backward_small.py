# SPDX-License-Identifier: MIT
"""The backward for few tokens in Triton's interpreter, which needs a process of its own, started
with ``TRITON_INTERPRET=1``: `make test` has one."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_triton_backward import (
    F16,
    F32,
    NEEDS,
    _Kernels,
    assert_padding_has_no_gradient,
    expected,
    make_call,
    normal,
    run,
)
from test_triton_backward import pytestmark as pytestmark
from torch import Tensor

import convnn_kernels
from convnn_kernels.triton import backend, configs
from python_ref import assert_aggregate, assert_forward, assert_select

ops = torch.ops.convnn
SMALL = ["query_side_small_kernel", "key_side_small_kernel", "search_grad_small_kernel"]


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that are launched, with temporary memory that nobody should read."""
    from convnn_kernels.triton.launch import Plan, forget_plans

    names: list[str] = []
    launch = Plan.launch

    def record(plan: Plan, pointers: Any) -> None:
        names.extend(each.kernel.name for each in plan.launches)
        for name in plan.workspace.offsets:
            X = pointers.tensor(name)
            X.fill_(math.nan if X.is_floating_point() else torch.iinfo(X.dtype).max)
        launch(plan, pointers)

    forget_plans()
    monkeypatch.setattr(Plan, "launch", record)
    with convnn_kernels.backend("triton"):
        yield names
    monkeypatch.undo()
    forget_plans()


def run_otherwise(call: dict[str, Any]) -> dict[str, Tensor]:
    """By the kernels for many tokens."""
    from convnn_kernels.triton.launch import forget_plans

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "allows_backward_small", lambda *_: False)
        forget_plans()
        results = run(call)
    forget_plans()
    return results


def assert_close(call: dict[str, Any], needed: tuple[str, ...] = NEEDS) -> None:
    results, references = run(call, needed), expected(call)
    for name in needed:
        if name == "weight" and call["weight"] is None:
            continue
        assert results[name].dtype == F16
        error = (results[name].double() - references[name]).abs().amax()
        bound = 2**-9 * references[name].abs().amax() + 2**-24
        assert error <= bound, (name, float(error / bound))


@pytest.mark.parametrize(
    ("N", "M", "k", "metric", "rho", "weight", "C"),
    [
        (197, 197, 9, "cosine", "softmax", True, 16),
        (37, 37, 4, "cosine", "similarity", False, 70),
        (37, 21, 9, "dot", "softmax", True, 7),
        (37, 90, 1, "cosine", "ones", True, 16),
        (5, 6, 4, "dot", "similarity", True, 7),
        (5, 40, 16, "dot", "ones", False, 7),
    ],
)
def test_gradients(
    N: int, M: int, k: int, metric: str, rho: str, weight: bool, C: int, launched: list[str]
) -> None:
    """Several blocks of channels and full ones; of one batch element, or two."""
    D = 16 if C == 16 else 10
    call = make_call(M, k, metric, rho, weight, F16, N, 1 if N == 197 else 2, D, C)
    assert_close(call)
    assert launched == SMALL
    if N < 100:
        assert_close({**call, "grad_similarities": None})


@pytest.mark.parametrize("chunks", [2, 3])
def test_several_blocks_of_channels_at_once(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full ones, and of five the last one alone or beside an empty one."""
    blocks = configs.key_side_small
    several = {"BLOCK": 16, "CHUNKS": chunks, "WIDTH": 128}
    monkeypatch.setattr(configs, "key_side_small", lambda *sizes: blocks(*sizes) | several)
    for C in (16 * chunks, 70):
        assert_close(make_call(dtype=F16, N=37, C=C), ("value",))
    call = make_call(dtype=F16, N=37, C=70)
    call["grad_output"][0, 20, 3] = math.nan
    assert_as_otherwise(call)


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which sums are computed again, pair by pair."""
    from convnn_kernels.triton import key_side_small, query_side_small, search_grad_small

    names: list[str] = []
    for module, name in (
        (query_side_small, "differentiate_output"),
        (key_side_small, "_sum_one_by_one"),
        (search_grad_small, "_differentiate_query"),
        (search_grad_small, "_differentiate_key"),
    ):
        function = getattr(module, name)

        def again(*arguments: Any, function: Any = function, name: str = name) -> Any:
            names.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, again)
    return names


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_what_is_finite_is_computed_once(metric: str, exactly: list[str]) -> None:
    """Also where neighbors are missing, in temporary memory of which all is NaN before."""
    run(make_call(dtype=F16, N=37, metric=metric))
    assert exactly == []


def test_what_is_not_finite_is_computed_again(exactly: list[str]) -> None:
    call = make_call(dtype=F16, N=37, C=40)
    call["grad_output"][0, 20, 3] = math.inf
    run(call)
    assert set(exactly) == {
        *("differentiate_output", "_sum_one_by_one"),
        *("_differentiate_query", "_differentiate_key"),
    }


@pytest.mark.parametrize(("metric", "rho"), [("cosine", "softmax"), ("dot", "similarity")])
def test_without_powers_of_two(
    metric: str, rho: str, launched: list[str], monkeypatch: pytest.MonkeyPatch, exactly: list[str]
) -> None:
    """What bfloat16 has instead, in float32: the interpreter does not multiply bfloat16."""
    monkeypatch.setattr(configs, "allows_backward_small", lambda *_: True)
    call = make_call(dtype=F32, N=37, metric=metric, rho=rho, C=40)
    results, references = run(call), expected(call)
    assert launched == SMALL
    assert exactly == []
    for name in NEEDS:
        error = (results[name].double() - references[name]).abs().amax()
        assert error <= 2**-18 * references[name].abs().amax(), name
    call["query"][0, 30, 2], call["key"][0, 7, 0] = math.inf, math.nan
    call["value"][1, 4, 1] = math.inf
    assert_as_otherwise(call)


@pytest.mark.parametrize("rho", ["ones", "similarity"])
def test_integers_have_the_bits_of_the_other_kernels(rho: str) -> None:
    call = make_call(metric="dot", rho=rho, dtype=F16, N=37, M=21)
    for name in ("grad_output", "grad_similarities", "query", "key", "value", "weight"):
        call[name] = (2 * call[name]).round().clamp(-3, 3)
    call["similarities"] = call["similarities"].clamp(-3, 3).round()
    for X, other in zip(run(call).values(), run_otherwise(call).values(), strict=True):
        assert X.abs().amax() > 0
        assert torch.equal(X, other)


@pytest.mark.quick_one_in(4)
@pytest.mark.parametrize("needed", [*((name,) for name in NEEDS), NEEDS[:2], NEEDS[2:]], ids=str)
def test_only_what_is_needed(needed: tuple[str, ...]) -> None:
    """The bits are those of a call that needs everything, which are those of every run."""
    call = make_call(dtype=F16, N=37)
    everything, some = run(call), run(call, needed)
    for name in NEEDS:
        assert torch.equal(some[name], everything[name] if name in needed else torch.empty(0))


def assert_as_otherwise(call: dict[str, Any]) -> None:
    """As by the kernels for many tokens, also in what is not finite; and there is something."""
    results, others = run(call), run_otherwise(call)
    for name in NEEDS:
        finite = others[name].isfinite()
        assert torch.equal(results[name].isfinite(), finite), name
        difference = (results[name].double() - others[name].double())[finite].abs()
        assert difference.amax() <= 2**-8 * others[name][finite].double().abs().amax() > 0, name


@pytest.mark.parametrize("rho", ["softmax", "ones"])
def test_what_is_not_finite_stays_where_it_belongs(
    rho: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows of G, V, query and key, of a tile that is not full and has two groups of queries."""
    blocks = configs.query_side_small
    monkeypatch.setattr(configs, "query_side_small", lambda *sizes: blocks(*sizes) | {"ROWS": 32})
    call = make_call(dtype=F16, N=37, rho=rho)
    call["grad_output"][0, 20, 3], call["query"][0, 30, 2] = math.nan, math.inf
    call["grad_output"][1, 35, 0] = math.inf
    call["value"][0, 4, 1], call["key"][0, 7, 0] = -math.inf, math.nan
    assert_as_otherwise(call)


def test_rows_without_a_direction() -> None:
    """Their gradients are 0, whatever comes from outside."""
    call = make_call(dtype=F16, N=37)
    call["query"][0, 3], call["key"][1, 40] = 0.0, 0.0
    call["indices"][1, 20, 1] = 40
    call["grad_similarities"][0, 3, 0] = call["grad_similarities"][1, 20, 1] = math.inf
    assert_as_otherwise(call)
    results = run(call)
    assert not results["query"][0, 3].any()
    assert not results["key"][1, 40].any()


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_padding_has_no_gradient(metric: str, launched: list[str]) -> None:
    assert_padding_has_no_gradient(run, make_call(metric=metric, dtype=F16, N=37))
    assert set(launched) == set(SMALL)


def test_queries_without_neighbors_add_nothing() -> None:
    """Not even where the gradient of their output is not finite."""
    call = make_call(dtype=F16, N=37)
    clean = run(call)
    call["grad_output"][0, 5:9] = math.nan
    dirty = run(call)
    for name in NEEDS[:4]:
        assert torch.equal(clean[name], dirty[name]), name


def test_no_pair_at_all() -> None:
    call = make_call(dtype=F16, N=5)
    call["similarities"][:] = -math.inf
    call["grad_output"][0, 3] = math.inf
    results = run(call)
    assert not any(results[name].any() for name in NEEDS[:4])


SIZES: dict[str, tuple[str, dict[str, float], set[str]]] = {
    # rho; sizes of tensors; which gradients leave the range of float16.
    "small": ("ones", {"grad_output": 1e-7, "grad_similarities": 1e-8, "query": 1e3}, set()),
    "large": (
        "ones",
        {"grad_output": 1e4, "value": 1e-3, "grad_similarities": 1e6, "query": 1e-4},
        {"query", "bias"},
    ),
    "products_beyond": ("softmax", {"grad_output": 1 / 16, "value": 3e3}, set()),
    "large_rho": (
        "similarity",
        {"query": 1e4, "key": 10, "similarities": 1e5, "grad_output": 1e-3, "value": 1e-2},
        set(),
    ),
    "small_rho": (
        "similarity",
        {"query": 1e-4, "key": 1e-3, "similarities": 1e-7, "grad_output": 1e3, "value": 1e2},
        set(),
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_float16_of_any_size(case: str) -> None:
    """Where products within a kernel leave its range; also without the gradients of value."""
    rho, sizes, beyond = SIZES[case]
    call = make_call(dtype=F16, rho=rho, metric="dot", N=37)
    if "grad_similarities" not in sizes:
        call["grad_similarities"] = None
    for name, size in sizes.items():
        call[name] = (size * call[name]).to(call[name].dtype)
    call["weight"] = (call["weight"] / 64).to(F16)
    references = expected(call)
    assert {name for name in NEEDS if references[name].abs().amax() > 65504} == beyond
    for needed in (NEEDS, ("query", "key")):
        results = run(call, needed)
        for name in set(needed) - beyond:
            error = (results[name].double() - references[name]).abs().amax()
            assert error <= 2**-9 * references[name].abs().amax() + 2**-24, name


def test_a_row_keeps_its_bits_beside_a_large_one() -> None:
    call = make_call(dtype=F16, N=37)
    call["grad_similarities"] = None
    call["grad_output"] *= 1e-2
    alone = run(call)["query"].double()
    call["grad_output"][:, 0] *= 1e6
    beside = run(call)["query"].double()
    error = (alone - beside)[:, 1:].abs().amax(-1)
    assert (error <= 2**-10 * alone[:, 1:].abs().amax(-1) + 2**-24).all()


def test_strides() -> None:
    """Heads as they lie in memory, keys that they share, and a gradient that is expanded."""
    call = make_call(B=6, dtype=F16, N=37)
    tensors = {name for name, X in call.items() if isinstance(X, Tensor)} - {"weight"}
    for name in tensors:
        call[name] = call[name].unflatten(0, (2, 3))
    call["key"] = call["key"][:, :1].expand(call["key"].shape)
    call["grad_output"] = call["grad_output"][..., :1].expand(call["grad_output"].shape)
    copies = {name: X.contiguous() if name in tensors else X for name, X in call.items()}
    for name in ("query", "value"):
        call[name] = call[name].transpose(1, 2).contiguous().transpose(1, 2)
    for X, other in zip(run(call).values(), run(copies).values(), strict=True):
        assert torch.equal(X, other)


@pytest.fixture
def without_work(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that would be launched."""
    from convnn_kernels.triton.launch import Plan

    monkeypatch.setattr(
        Plan, "launch", lambda plan, _: launched.extend(each.kernel.name for each in plan.launches)
    )
    return launched


def test_three_launches_and_nothing_else(without_work: list[str]) -> None:
    launched, call = without_work, make_call(dtype=F16, N=37)
    with _Kernels() as kernels:
        run(call)
    assert kernels.names == []
    assert launched == SMALL
    launched.clear()
    run({**call, "metric": "dot"}, ("query",))  # without norms
    assert launched == SMALL[::2]


@pytest.mark.parametrize(
    "change",
    [{"N": 257}, {"M": 257}, {"k": 17}, {"metric": "euclidean"}, {"dtype": F32}],
    ids=lambda change: next(iter(change)),
)
def test_what_the_kernels_are_not_for(change: dict[str, Any], without_work: list[str]) -> None:
    run(make_call(**{"dtype": F16, "N": 20} | change))
    assert without_work[0] == "query_side_kernel"


def test_more_memory_than_is_allowed(
    without_work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "allowed_backward", lambda *_: 2**10)
    run(make_call(dtype=F16, N=5, k=1))
    assert without_work[0] == "query_side_kernel"


def test_pairs_are_sorted_by_blocks_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair that is present once, in its block, by queries and slots."""
    from convnn_kernels.triton.launch import Plan

    made: dict[str, Tensor | None] = {}
    launch = Plan.launch

    def keep(plan: Plan, pointers: Any) -> None:
        launch(plan, pointers)
        made.update({name: pointers.tensor(name) for name in ("p_pairs", "p_ends")})

    monkeypatch.setattr(Plan, "launch", keep)
    call = make_call(dtype=F16, N=37)
    run(call)
    I, M = call["indices"], call["key"].shape[1]
    B = len(I)
    pairs, ends = made["p_pairs"], made["p_ends"]
    assert pairs is not None
    assert ends is not None
    present = (call["similarities"] != -math.inf) & (I < M)
    blocks = configs.key_side_small(0, 7, 10, 1, True)
    keys, tile = blocks["KEYS"], blocks["TILE"]
    for b in range(B):
        wanted, numbers = [], []
        for block in range(-(-M // keys)):
            i, j = (present[b] & (I[b] // keys == block)).nonzero(as_tuple=True)
            of_keys = I[b, i, j] % tile
            wanted += ((i << 12) | (j << 8) | of_keys).tolist()
            numbers.append(len(wanted))
        assert ends.view(B, -1)[b].tolist() == numbers
        assert pairs.view(B, -1)[b, : len(wanted)].tolist() == wanted


def test_the_certificate_of_operators(launched: list[str]) -> None:
    """Through autograd, compared with eager PyTorch: more channels than a block has."""
    query, key, value = (
        normal(n, size, seed=seed, dtype=F16)
        for seed, (n, size) in enumerate([(40, 70), (50, 70), (50, 66)])
    )
    W, bias = normal(66, 1, 4, seed=3, dtype=F16), normal(66, seed=4, dtype=F16)
    assert_forward(ops.forward, query, key, value, 4, W, bias)
    assert_select(ops.select, query, key, 4)
    assert launched.count("search_grad_small_kernel") == 2
    # The gradient of similarities has float32.
    I = torch.randint(50, (40, 4), generator=torch.Generator().manual_seed(0))
    assert_aggregate(ops.aggregate, value, normal(40, 4), I, W)
    assert "query_side_kernel" in launched


def test_other_operators_alone() -> None:
    """Without V, or without query and key."""
    call = make_call(dtype=F16, N=37)
    x = {name: X for name, X in call.items() if isinstance(X, Tensor)}
    neighbors = x["similarities"], x["indices"]
    calls = {
        "select_backward": (
            *(x["grad_similarities"], x["query"], x["key"], *neighbors, "cosine"),
            *(True, True),
        ),
        "aggregate_backward": (
            *(x["grad_output"], x["value"], *neighbors, x["weight"], True, "softmax", 0.7),
            *(True, False, True, True),
        ),
    }
    everything = run({**call, "rho": "ones"}), run({**call, "grad_similarities": None})
    results = {
        name: backend.operators()[f"convnn::{name}"](*arguments)
        for name, arguments in calls.items()
    }
    assert all(map(torch.equal, results["select_backward"], (everything[0][n] for n in NEEDS[:2])))
    dv, _, dw, db = results["aggregate_backward"]
    assert all(map(torch.equal, (dv, dw, db), (everything[1][name] for name in NEEDS[2:])))
