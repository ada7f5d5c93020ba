# SPDX-License-Identifier: MIT
"""Few queries: their keys are read where they lie, in ranges, and not one bit changes."""

import functools
import json
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from inputs import each_dtype, each_metric, randn
from instruction_sets import INSTRUCTION_SETS
from torch import Tensor

import convnn_kernels  # noqa: F401, defines the operators
from python_ref import assert_forward, assert_select

ops = torch.ops.convnn

# Keys of several ranges, for every number of queries below, unless a case says otherwise.
M = 5000


def restrictions(name: str, N: int, columns: int, batch: int) -> dict[str, object]:
    """Arguments that leave out keys, or add the token itself."""
    torch.manual_seed(3)
    own = torch.randint(columns, (N,))
    candidates = torch.randperm(columns)[: columns * 9 // 10]
    mask = torch.rand(batch, columns) < 0.7
    return {
        "none": {},
        "candidates": {"candidates": candidates},
        "mask": {"key_mask": mask},
        "self": {"self_indices": own},
        "by index": {"self_indices": own, "order": "index"},
        "all": {"candidates": candidates, "key_mask": mask, "self_indices": own},
    }[name]


@pytest.mark.quick_one_in(11)
@each_metric
@each_dtype
@pytest.mark.parametrize("N", [1, 6, 33])
@pytest.mark.parametrize("restriction", ["none", "candidates", "mask", "by index", "all"])
def test_against_the_reference(metric: str, dtype: torch.dtype, N: int, restriction: str) -> None:
    query, key = randn(2, N, 32, dtype=dtype), randn(2, M, 32, dtype=dtype)
    key[:, 4000:4500] = key[:, :500]
    options = restrictions(restriction, N, M, 2)
    assert_select(ops.select, query, key, 9, metric=metric, **options)


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@pytest.mark.parametrize("N", [1, 7])
@pytest.mark.parametrize("k", [1, 40, 900])
def test_whole_numbers_are_exact(metric: str, N: int, k: int) -> None:
    """With as many ties as there can be, within and between ranges."""
    query, key = torch.randint(-2, 3, (N, 4)).float(), torch.randint(-2, 3, (M * 4, 4)).float()
    assert_select(ops.select, query, key, k, metric=metric, exact=True)


@pytest.mark.parametrize("weight", ["none", "depthwise", "dense"])
def test_decoding(weight: str) -> None:
    """One query of many heads."""
    shape = {"none": None, "depthwise": (16, 1, 9), "dense": (5, 16, 9)}[weight]
    w = None if shape is None else randn(*shape)
    tensors = randn(4, 32, 1, 16), randn(4, 32, 300, 16), randn(4, 32, 300, 16)
    assert_forward(ops.forward, *tensors, 9, w, metric="dot", scale=0.25)


def test_equal_keys_come_in_their_order() -> None:
    """All keys are equal, or NaN, in every range."""
    query, key = torch.ones(3, 64), torch.ones(20_000, 64)
    assert torch.equal(ops.select(query, key, 30)[1], torch.arange(30).expand(3, 30))
    later = torch.tensor([4500, 9000, 19_999])
    key[later] = torch.nan
    s, I = ops.select(query, key, 30)
    assert torch.equal(I, torch.cat([later, torch.arange(27)]).expand(3, 30))
    assert torch.equal(s.isnan(), (I >= 4500))


@each_metric
def test_queries_that_are_not_finite(metric: str) -> None:
    """Beside finite ones, which have the same neighbors as without them."""
    query, key = randn(6, 33), randn(9000, 33)
    finite = ops.select(query, key, 9, metric=metric)
    query[1], query[3, 5], query[4, 0] = torch.nan, torch.inf, -torch.inf
    s, I = assert_select(ops.select, query, key, 9, metric=metric)
    rows = torch.tensor([0, 2, 5])
    assert torch.equal(s[rows], finite[0][rows])
    assert torch.equal(I[rows], finite[1][rows])


@pytest.mark.parametrize("columns", [0, 1, 3, 15, 16, 17, 1023, 1025, 4097])
@pytest.mark.parametrize("N", [1, 5])
@pytest.mark.parametrize("D", [1, 16, 20])
def test_sizes(columns: int, N: int, D: int) -> None:
    """Including more neighbors than keys, and no keys at all."""
    query, key = randn(N, D), randn(columns, D)
    for k in (1, 9, 1500):
        s, I = ops.select(query, key, k)
        found = min(k, columns)
        assert s[:, found:].isneginf().all()
        assert I[:, found:].eq(0).all()
        if found:
            reference = ops.select(query.double(), key.double(), found)[0]
            torch.testing.assert_close(s[:, :found].double(), reference, atol=1e-6, rtol=1e-6)
            assert I.sort().values.diff()[:, k - found :].ne(0).all()


def test_no_columns() -> None:
    """All similarities are zero: the first keys are the neighbors."""
    for N in (1, 2):
        s, I = ops.select(torch.ones(N, 0), torch.ones(M, 0), 4, metric="dot")
        assert s.eq(0).all()
        assert torch.equal(I, torch.arange(4).expand(N, 4))


# Prints a line for each comparison of a few queries with the same ones among many, which are
# selected from packed keys, and with the same on two threads.
AMONG_MANY = """
    import torch
    import convnn_kernels
    from test_few_queries import restrictions

    def cases():
        def features(*shape):
            return torch.randn(*shape)

        yield "one range", features(1, 200, 64), features(1, 700, 64), 9
        yield "several ranges", features(2, 200, 128), features(2, 9000, 128), 9
        yield "odd sizes", features(1, 200, 77), features(1, 9001, 77), 16
        yield "short rows", features(2, 200, 3), features(2, 40_001, 3), 9
        yield "rows of one block of sums", features(1, 200, 32), features(1, 9000, 32), 9
        yield "many neighbors", features(1, 200, 64), features(1, 9000, 64), 700
        yield "whole numbers", features(1, 200, 64).round(), features(1, 9000, 64).round(), 9
        keys = features(1, 1000, 64)
        yield "ties of all ranges", keys[:, :200], keys.repeat(1, 9, 1), 30
        broken = features(1, 9000, 64)
        broken[0, 7], broken[0, 4100, 3], broken[0, 8500, 5] = torch.nan, torch.inf, -torch.inf
        yield "NaN and infinity", features(1, 200, 64), broken, 9
        yield "all NaN", features(1, 200, 64), broken * torch.nan, 9
        yield "zeros", torch.zeros(1, 200, 64), features(1, 9000, 64), 9
        # The cosine of very few queries is screened, unless norms or products are out of range.
        sizes = torch.logspace(-30, 18, 9000).reshape(1, -1, 1)
        yield "norms of many decades", features(1, 200, 64), features(1, 9000, 64) * sizes, 9
        yield "small norms", features(1, 200, 64) * 1e-16, features(1, 9000, 64) * 1e-11, 9
        unit = torch.nn.functional.normalize(features(1, 900, 64), dim=-1)
        unit[:, ::3] *= 9.5e-13  # not more than epsilon, so the cosine is 0
        yield "norms of about epsilon", features(1, 200, 64), unit, 9
        some = features(1, 9000, 64) * (torch.rand(1, 9000, 1) < 0.999)
        yield "some zeros", features(1, 200, 64), some, 9
        close = features(1, 1, 64) + 1e-4 * features(1, 9000, 64)
        yield "nearly equal keys", close[:, :200], close, 9
        close = torch.where(torch.rand(1, 9000, 1) < 0.02, close, features(1, 9000, 64))
        yield "some nearly equal keys", close[:, :1] + features(1, 200, 64) * 1e-3, close, 9
        rising = torch.linspace(-1, 1, 9000).reshape(1, -1, 1) * features(1, 1, 64)
        yield "later is nearer", rising[:, -200:], rising + features(1, 9000, 64), 9
        queries = features(1, 200, 64)
        queries[0, [0, 103]], queries[0, 8, 3], queries[0, 7] = torch.nan, torch.inf, 0
        yield "broken queries", queries, features(1, 9000, 64), 9
        yield "flushed", features(1, 200, 48) * 1e-19, features(1, 9000, 48) * 1e-20, 9

    torch.manual_seed(0)
    dtypes = torch.float64, torch.float32, torch.bfloat16, torch.float16
    for number, (name, query, key, k) in enumerate(cases()):
        torch.set_flush_denormal(name == "flushed")
        for i, dtype in enumerate(dtypes):
            for j, metric in enumerate(("cosine", "dot", "euclidean")):
                if (number + i + j) % 2 != {half}:
                    continue
                restriction = {restrictions}[len(name) % {count}]
                options = restrictions(restriction, 200, key.shape[1], key.shape[0])
                options |= {{"metric": metric}}
                q, K = query.to(dtype), key.to(dtype)
                torch.set_num_threads(1)
                many = torch.ops.convnn.select(q, K, k, **options)
                for rows in (slice(0, 1), slice(7, 9), slice(100, 106), slice(160, 193)):
                    if "self_indices" in options:
                        own = options["self_indices"][rows]
                    else:
                        own = None
                    for threads in (1, 2):
                        torch.set_num_threads(threads)
                        few = torch.ops.convnn.select(
                            q[:, rows], K, k, **(options | {{"self_indices": own}})
                        )
                        same = all(
                            torch.equal(a.view(torch.int32), b[:, rows].view(torch.int32))
                            for a, b in zip(few, many)
                        )
                        print(same, name, dtype, metric, restriction, rows, threads)
"""
RESTRICTIONS = ["none", "candidates", "mask", "self", "by index", "all"]


def among_many_cases() -> list[Any]:
    """An instruction set, the first restriction and the half: two of each, of the default all."""
    slow, left_out = pytest.mark.slow, pytest.mark.left_out
    *others, default = INSTRUCTION_SETS
    chosen = (0, 0), (3, 1)
    more = [case for case in product(range(len(RESTRICTIONS)), (0, 1)) if case not in chosen]
    return [
        (default, *chosen[0]),
        pytest.param(default, *chosen[1], marks=slow),
        *(pytest.param(name, *case, marks=slow) for name in others for case in chosen),
        *(pytest.param(default, *case, marks=[slow, left_out]) for case in more),
    ]


@pytest.mark.parametrize(("instruction_set", "first", "half"), among_many_cases())
def test_the_same_bits_among_many_queries(
    instruction_set: str, first: int, half: int, run_forked: Callable[..., str]
) -> None:
    """Each case has half of the pairs of a dtype and a metric, the next case the other half."""
    rotated = RESTRICTIONS[first:] + RESTRICTIONS[:first]
    code = AMONG_MANY.format(restrictions=rotated, count=len(rotated), half=half)
    lines = run_forked(code, CONVNN_CPU_ISA=instruction_set).splitlines()
    assert len(lines) == 20 * 4 * 3 // 2 * 4 * 2
    assert [line for line in lines if not line.startswith("True ")] == []


@functools.cache
def head_layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """Keys [2, 4, 3, 600, 32] as caches have them: B, heads, heads that share keys."""
    torch.manual_seed(1)
    B, H, G, m, D = 2, 4, 3, 600, 32
    return {
        "cache": randn(B, H, G, 2 * m, D, dtype=dtype)[..., :m, :],
        "grouped": randn(B, H, 1, m, D, dtype=dtype).expand(B, H, G, m, D),
        "grouped cache": randn(B, H, 1, 2 * m, D, dtype=dtype)[..., :m, :].expand(B, H, G, m, D),
        "heads behind tokens": randn(B, m, H, G, D, dtype=dtype).permute(0, 2, 3, 1, 4),
        "grouped behind tokens": (
            randn(B, m, H, 1, D, dtype=dtype).permute(0, 2, 3, 1, 4).expand(B, H, G, m, D)
        ),
        "a bank": randn(m, D, dtype=dtype).expand(B, H, G, m, D),
        "every other row": randn(B, H, G, 2 * m, D, dtype=dtype)[..., ::2, :],
        "some columns": randn(B, H, G, m, 2 * D, dtype=dtype)[..., 1 : D + 1],
    }


@pytest.mark.quick_one_in(7)
@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("query_layout", ["contiguous", "heads behind tokens", "some columns"])
@pytest.mark.parametrize("restriction", ["none", "candidates", "self", "mask", "shared mask"])
@each_dtype
def test_heads_where_they_lie(
    restriction: str, query_layout: str, N: int, dtype: torch.dtype
) -> None:
    B, H, G, m, D = 2, 4, 3, 600, 32
    query = {
        "contiguous": randn(B, H, G, N, D, dtype=dtype),
        "heads behind tokens": randn(B, N, H, G, D, dtype=dtype).permute(0, 2, 3, 1, 4),
        "some columns": randn(B, N, H, G, 2 * D, dtype=dtype)[..., :D].permute(0, 2, 3, 1, 4),
    }[query_layout]
    options = {
        "none": {},
        "candidates": {"candidates": torch.randperm(m)[:100]},
        "self": {"self_indices": torch.randint(m, (N,))},
        "mask": {"key_mask": torch.rand(B, H, G, m) > 0.5},
        "shared mask": {"key_mask": (torch.rand(B, H, 1, m) > 0.5).expand(B, H, G, m)},
    }[restriction]
    for name, key in head_layouts(dtype).items():
        got = ops.forward(query, key, key, 9, **options)
        expected = ops.forward(query.contiguous(), key.contiguous(), key.contiguous(), 9, **options)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), name


PEAK = """
    import json, pathlib, torch, convnn_kernels

    def resident(field):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024

    torch.set_num_threads(2)
    query, key = {make}
    torch.ops.convnn.forward(query, key[..., :64, :], key[..., :64, :], 4)
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    torch.ops.convnn.forward(query, key, key, 4, metric="{metric}")
    print(json.dumps(resident("VmHWM") - before))
"""
# 64 MiB of keys each.
CACHES = {
    "one bank": "torch.randn(32, 64), torch.randn(262_144, 64)",
    "sliced": "torch.randn(8, 1, 64), torch.randn(8, 65_536, 64)[:, :32_768]",
    "grouped": ("torch.randn(8, 4, 1, 64), torch.randn(8, 1, 32_768, 64).expand(8, 4, 32_768, 64)"),
    "heads behind tokens": (
        "torch.randn(1, 8, 1, 64), torch.randn(1, 32_768, 8, 64).transpose(1, 2)"
    ),
}


@pytest.mark.quick_one_in(3)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("case", CACHES)
def test_keys_are_not_copied(case: str, metric: str, run_forked: Callable[..., str]) -> None:
    rise = json.loads(run_forked(PEAK.format(make=CACHES[case], metric=metric)).splitlines()[-1])
    assert rise <= 4 * 2**20, f"{rise / 2**20:.1f} MiB"
