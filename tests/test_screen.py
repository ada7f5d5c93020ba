# SPDX-License-Identifier: MIT
"""A screen in fixed point changes the time of a selection and not one bit of its result."""

from collections.abc import Callable

import pytest
from instruction_sets import INSTRUCTION_SETS, quick_last

# Shapes large enough for a screen. Each case says what makes its bound easy, useless or impossible.
CODE = """
    import torch
    import convnn_kernels

    def cases():
        def features(*shape):
            return torch.randn(*shape)

        yield "random", features(2, 100, 64), features(2, 1500, 64), 9
        yield "odd number of columns", features(1, 100, 33), features(1, 2500, 33), 16
        yield "k close to a quarter", features(1, 100, 48), features(1, 1200, 48), 280
        yield "far from the origin", features(1, 100, 128) + 5, features(1, 2000, 128) + 5, 32
        yield "all keys equal", features(1, 100, 64), torch.ones(1, 2048, 64), 9
        yield "pairs of equal keys", features(1, 100, 64), features(1, 1024, 64).repeat(1, 2, 1), 9
        yield "whole numbers", features(1, 100, 64).round(), features(1, 2100, 64).round(), 9
        close = features(1, 1, 64) + 1e-4 * features(1, 2000, 64)
        yield "nearly equal keys", close[:, :110], close, 9
        sizes = torch.logspace(-6, 6, 2000).reshape(1, -1, 1)
        yield "one large norm among small ones", features(1, 100, 64), torch.cat(
            [features(1, 1, 64) * 1e4, features(1, 15, 64)], 1
        ).repeat(1, 70, 1), 9
        yield "norms of twelve decades", features(1, 100, 64), features(1, 2000, 64) * sizes, 9
        yield "subnormal", features(1, 100, 64) * 1e-20, features(1, 2000, 64) * 1e-22, 9
        yield "too large to bound", features(1, 100, 64) * 1e25, features(1, 2000, 64), 9
        broken = features(1, 2000, 64)
        broken[0, 7], broken[0, 1100, 3], broken[0, 1500, 5] = torch.nan, torch.inf, -torch.inf
        yield "NaN and infinity", features(1, 100, 64), broken, 9
        yield "zeros", torch.zeros(1, 100, 64), features(1, 2000, 64), 9
        yield "many pieces and a tail", features(1, 100, 100), features(1, 1500, 100), 9
        yield "k of all groups", features(1, 100, 64), features(1, 2048, 64), 120
        yield "one neighbor", features(1, 100, 64), broken, 1
        clusters = features(1, 20, 64).repeat(1, 100, 1) + 1e-4 * features(1, 2000, 64)
        yield "clusters larger than k", clusters[:, :100], clusters, 64
        # In every chunk so many keys are close that they do not fit among those that wait.
        crowd = torch.where((torch.arange(4096) % 8 < 5)[:, None], close[0, 0], features(4096, 64))
        crowd = crowd[None] + 1e-6 * features(1, 4096, 64)
        yield "more close keys than can wait", crowd[:, :100], crowd, 64
        # A chunk of 1024 keys that no screen tells apart, between others.
        mixed = features(1, 5120, 64)
        mixed[:, 1024:2048] = mixed[:, 3072:4096] = mixed[:, :1]
        yield "chunks of either kind", mixed[:, ::51], mixed, 20
        # The error of a rounded row points along the other row. A row of this norm is rounded to
        # whole numbers. The last keys come first, and their screened similarities last of all.
        def of_norm(rows):
            rows[..., 0] = (32766.0**2 - rows[..., 1:].double().square().sum(-1)).sqrt()
            return rows

        ones = torch.ones(64)
        ones[0] = 0
        low = of_norm(-10 * features(1, 2048, 64).abs())
        low[0, :12] = of_norm(1000.51 * ones)
        low[0, -4:] = of_norm(1000.49 * ones + (torch.arange(64) < 3))
        yield "keys as far off as can be", ones.expand(1, 100, 64), low, 9
        signs = torch.where(torch.arange(64) % 2 == 0, 1, -1)
        query = of_norm((1000 * signs + 0.49) * ones)
        low = -0.01 * features(1, 2048, 64).abs()
        first = 0.01 * (1 - ones)
        low[0, :12], low[0, -4:] = first - 0.1 * ones, first + 0.1 * ones
        low[0, -4:, 0] += (query * (low[0, 0] - low[0, -1])).sum() / query[0] + 1e-6
        yield "a query as far off as can be", query.expand(1, 100, 64), low, 9
        least, large = 2.0**-149, 2.0**59
        tiny = torch.zeros(1, 2048, 16)
        tiny[0, :, 0] = tiny[0, :1024, 2] = tiny[0, 1024:, 1] = least
        query = torch.zeros(1, 100, 16)
        query[..., 0] = query[..., 1] = large
        query[..., 2] = 0.625 * large
        yield "elements as small as can be", query, tiny, 9
        tiny = torch.zeros(1, 1024, 16)
        tiny[..., :2] = least
        yield "all below zero by nothing", -query, tiny, 120

    def select(query, key, k, self_indices, key_mask, metric):
        return torch.ops.convnn.select(query, key, k, None, self_indices, key_mask, metric)

    def select_in_pieces(query, key, k, self_indices, key_mask, metric):
        # Fewer than 96 query rows are not screened.
        rows = torch.arange(query.shape[1]).split(48)
        pieces = [
            select(
                query[:, i], key, k, None if self_indices is None else i, key_mask, metric
            )
            for i in rows
        ]
        return [torch.cat(parts, 1) for parts in zip(*pieces)]

    torch.manual_seed(0)
    for name, query, key, k in cases():
        mask = torch.rand(key.shape[:-1]) < 0.9
        for dtype in (torch.float32, torch.bfloat16):
            for metric in ("cosine", "dot"):
                for plain in (True, False):
                    own = None if plain else torch.arange(query.shape[-2])
                    key_mask = None if plain else mask
                    args = query.to(dtype), key.to(dtype), k, own, key_mask, metric
                    (s, i), (s_plain, i_plain) = select(*args), select_in_pieces(*args)
                    same = torch.equal(s.view(torch.int32), s_plain.view(torch.int32))
                    print(same and torch.equal(i, i_plain), name, dtype, metric, plain)
"""


@pytest.mark.parametrize(
    "instruction_set", quick_last([name for name in INSTRUCTION_SETS if name != "portable"])
)
def test_a_screen_changes_no_bit(run_python: Callable[..., str], instruction_set: str) -> None:
    lines = run_python(CODE, CONVNN_CPU_ISA=instruction_set).splitlines()
    assert len(lines) == 24 * 8
    assert [line for line in lines if not line.startswith("True ")] == []
