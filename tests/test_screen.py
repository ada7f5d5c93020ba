# SPDX-License-Identifier: MIT
"""A fixed-point screen changes how long a selection takes, but not one bit of its result."""

from collections.abc import Callable

import pytest
from instruction_sets import INSTRUCTION_SETS, quick_last

# Shapes large enough for a screen. The name of a case says what makes its bound easy, useless or
# impossible.
CODE = """
    import torch
    import convnn_kernels

    def cases():
        def features(*shape):
            return torch.randn(*shape)

        yield "random", features(2, 200, 64), features(2, 1500, 64), 9
        yield "odd number of columns", features(1, 200, 33), features(1, 2500, 33), 16
        yield "as many neighbors as can be", features(1, 200, 48), features(1, 1200, 48), 96
        yield "far from the origin", features(1, 200, 128) + 5, features(1, 2000, 128) + 5, 32
        yield "all keys equal", features(1, 200, 64), torch.ones(1, 2048, 64), 9
        yield "pairs of equal keys", features(1, 200, 64), features(1, 1024, 64).repeat(1, 2, 1), 9
        yield "whole numbers", features(1, 200, 64).round(), features(1, 2100, 64).round(), 9
        close = features(1, 1, 64) + 1e-4 * features(1, 2000, 64)
        yield "nearly equal keys", close[:, :210], close, 9
        sizes = torch.logspace(-6, 6, 2000).reshape(1, -1, 1)
        yield "one large norm among small ones", features(1, 200, 64), torch.cat(
            [features(1, 1, 64) * 1e4, features(1, 15, 64)], 1
        ).repeat(1, 70, 1), 9
        yield "norms of twelve decades", features(1, 200, 64), features(1, 2000, 64) * sizes, 9
        yield "subnormal", features(1, 200, 64) * 1e-20, features(1, 2000, 64) * 1e-22, 9
        yield "too large to bound", features(1, 200, 64) * 1e25, features(1, 2000, 64), 9
        broken = features(1, 2000, 64)
        broken[0, 7], broken[0, 1100, 3], broken[0, 1500, 5] = torch.nan, torch.inf, -torch.inf
        yield "NaN and infinity", features(1, 200, 64), broken, 9
        yield "zeros", torch.zeros(1, 200, 64), features(1, 2000, 64), 9
        yield "many pieces and a tail", features(1, 200, 100), features(1, 1500, 100), 9
        yield "k of most groups", features(1, 200, 64), features(1, 2048, 64), 96
        yield "one neighbor", features(1, 200, 64), broken, 1
        clusters = features(1, 20, 64).repeat(1, 100, 1) + 1e-4 * features(1, 2000, 64)
        yield "clusters larger than k", clusters[:, :200], clusters, 64
        # Every chunk has more close keys than the buffer holds.
        crowd = torch.where((torch.arange(4096) % 8 < 5)[:, None], close[0, 0], features(4096, 64))
        crowd = crowd[None] + 1e-6 * features(1, 4096, 64)
        yield "more close keys than can wait", crowd[:, :200], crowd, 64
        # Chunks of 1024 keys that no screen can distinguish, among others.
        mixed = features(1, 5120, 64)
        mixed[:, 1024:2048] = mixed[:, 3072:4096] = mixed[:, :1]
        yield "chunks of either kind", mixed[:, ::25], mixed, 20
        # The error of a rounded row is parallel to the other row, or to the part of it that is
        # orthogonal to the rounded row. A row of this norm, most of it in one element, is rounded
        # to integers. The last keys are the nearest, but have the lowest screened similarities.
        def of_norm(rows):
            rows[..., 0] = (32766.0**2 - rows[..., 1:].double().square().sum(-1)).sqrt()
            return rows

        ones = torch.ones(64)
        ones[0] = 0
        low = of_norm(-10 * features(1, 2048, 64).abs())
        low[0, :12] = of_norm(1000.51 * ones)
        low[0, -4:] = of_norm(1000.49 * ones + (torch.arange(64) < 3))
        early = low.clone()
        early[0, 1016:1020], early[0, -4:] = low[0, -4:], low[0, 100:104]
        for query in (ones, of_norm(2500 * ones)):
            yield "keys as far off as can be", query.expand(1, 200, 64), low, 9
            yield "in the chunk that sets the bound", query.expand(1, 200, 64), early, 9
        signs = torch.where(torch.arange(64) % 2 == 0, 1, -1)
        query = of_norm((1000 * signs + 0.49) * ones)
        low = -0.01 * features(1, 2048, 64).abs()
        first = 0.01 * (1 - ones)
        low[0, :12], low[0, -4:] = first - 0.1 * ones, first + 0.1 * ones
        low[0, -4:, 0] += (query * (low[0, 0] - low[0, -1])).sum() / query[0] + 1e-6
        yield "a query as far off as can be", query.expand(1, 200, 64), low, 9
        # The best keys are collected with a large error, from the chunk of a long key, before
        # enough others with small errors arrive to prune them.
        base, long, sizes = features(64), features(64), 0.05 * features(1, 2048, 64)
        sizes[0, :4] = 1.0001 * base
        sizes[0, 40] = 30 * (long - (long @ base) / (base @ base) * base)
        sizes[0, 1024 + 17 * torch.arange(36)] = base
        yield "a large error, then small ones", base + 0.001 * features(1, 200, 64), sizes, 9
        # The product of the scales of a query and the later keys is subnormal.
        along = torch.nn.functional.normalize(features(64), dim=0)
        across = features(2048, 64)
        across -= (across @ along)[:, None] * along
        across /= across.norm(dim=-1, keepdim=True)
        largest = 2.0**-126 * 32766.0**2 / 2.0**-48
        keys = largest * (0.45 * across - 0.2 * along)
        keys[:12] = 1.05 * largest * (0.9 * along + 0.19**0.5 * across[:12])
        keys[-4:] = 0.97 * largest * along
        yield "flushed scales", (2.0**-48 * along).expand(1, 200, 64), keys[None], 9
        least, large = 2.0**-149, 2.0**59
        tiny = torch.zeros(1, 2048, 16)
        tiny[0, :, 0] = tiny[0, :1024, 2] = tiny[0, 1024:, 1] = least
        query = torch.zeros(1, 200, 16)
        query[..., 0] = query[..., 1] = large
        query[..., 2] = 0.625 * large
        yield "elements as small as can be", query, tiny, 9
        tiny = torch.zeros(1, 1024, 16)
        tiny[..., :2] = least
        yield "all below zero by nothing", -query, tiny, 90

    def select(query, key, k, own, *rest):
        return torch.ops.convnn.select(query, key, k, rest[0], own, *rest[1:])

    def select_in_pieces(query, key, k, own, *rest):
        # Fewer than 192 query rows are not screened.
        pieces = [
            select(query[:, i], key, k, None if own is None else i, *rest)
            for i in torch.arange(query.shape[1]).split(96)
        ]
        return [torch.cat(parts, 1) for parts in zip(*pieces)]

    torch.manual_seed(0)
    for name, query, key, k in cases():
        mask = torch.rand(key.shape[:-1]) < 0.9
        candidates = torch.randperm(key.shape[1])[: key.shape[1] * 9 // 10]
        torch.set_flush_denormal(name.startswith("flushed"))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for metric in ("cosine", "dot"):
                for options in (
                    (None, None, None, metric, "similarity"),
                    (torch.arange(query.shape[1]), candidates, mask, metric, "index"),
                ):
                    args = query.to(dtype), key.to(dtype), k, *options
                    (s, i), (s_plain, i_plain) = select(*args), select_in_pieces(*args)
                    same = torch.equal(s.view(torch.int32), s_plain.view(torch.int32))
                    print(same and torch.equal(i, i_plain), name, dtype, metric, options[-1])
"""


@pytest.mark.parametrize(
    "instruction_set", quick_last([name for name in INSTRUCTION_SETS if name != "portable"])
)
def test_a_screen_changes_no_bit(run_forked: Callable[..., str], instruction_set: str) -> None:
    lines = run_forked(CODE, CONVNN_CPU_ISA=instruction_set).splitlines()
    assert len(lines) == 29 * 12
    assert [line for line in lines if not line.startswith("True ")] == []
