# SPDX-License-Identifier: MIT
"""The choice of the best columns of a row, against a stable sort.

Rows have one element and queries are 1 or -1, so that similarities are the keys themselves, to the
bit: any number may be a similarity, as often as wanted and in any column.
"""

from collections.abc import Callable

import pytest
from instruction_sets import INSTRUCTION_SETS, quick_last

CODE = """
    import random
    import torch
    import convnn_kernels

    def similarities(kind, m):
        if kind == "normal":
            return torch.randn(m)
        if kind == "few values":
            return torch.randint(-2, 3, (m,)) * 0.5
        if kind == "all equal":
            return torch.zeros(m)
        if kind == "signed zeros":
            return torch.where(torch.rand(m) < 0.5, 0.0, -0.0)
        if kind == "all -inf":
            return torch.full((m,), -torch.inf)
        if kind == "all NaN":
            return torch.full((m,), torch.nan)
        if kind == "NaN among others":
            return torch.where(torch.rand(m) < 0.02, torch.nan, torch.randn(m))
        if kind == "infinities and few numbers":
            return torch.where(torch.rand(m) < 0.01, torch.randn(m), torch.inf)
        if kind == "few above -inf":
            return torch.where(torch.rand(m) < 0.02, torch.randn(m), -torch.inf)
        if kind == "ascending":
            return torch.arange(m) * 0.25
        if kind == "descending":
            return torch.arange(m) * -0.25
        if kind == "the best side by side":
            return torch.randn(m) + 10 * (torch.arange(m) // 11 == m // 23)
        period = {"the best in one lane": 16, "the best in one lane of two cells": 128}[kind]
        return torch.randn(m) + 10 * (torch.arange(m) % period == 3)

    KINDS = [
        "normal", "few values", "all equal", "signed zeros", "all -inf", "all NaN",
        "NaN among others", "infinities and few numbers", "few above -inf", "ascending",
        "descending", "the best side by side", "the best in one lane",
        "the best in one lane of two cells",
    ]
    N = 27  # one block of rows and a part

    def expected(values, own, allowed, k):
        # values [n, m]
        n, m = values.shape
        s, indices = torch.full((n, k), -torch.inf, dtype=values.dtype), torch.zeros(n, k).long()
        for row in range(n):
            columns = allowed.nonzero()[:, 0]
            first = []
            if own is not None and allowed[own[row]]:
                columns, first = columns[columns != own[row]], [own[row].item()]
            order = values[row, columns].sort(descending=True, stable=True).indices
            best = torch.tensor(first + columns[order].tolist()).long()[:k]
            s[row, : len(best)], indices[row, : len(best)] = values[row, best], best
        return s, indices

    def sizes():
        for m in (1, 2, 7, 16, 63, 64, 65, 130, 197, 500, 1024, 1100, 2500):
            for k in (1, 2, 9, 16, 17, 33, 64, 65, 100, m, m + 3):
                if k <= m + 3:
                    yield m, k

    torch.manual_seed(0)
    random.seed(0)
    query = torch.where(torch.arange(N) % 5 < 4, 1.0, -1.0)[:, None]
    count = 0
    for m, k in sizes():
        for kind in random.sample(KINDS, 4):
            dtype = random.choice((torch.float32, torch.float32, torch.float64))
            key = similarities(kind, m).to(dtype)
            own = torch.randint(0, m, (N,)) if random.random() < 0.3 else None
            mask = torch.rand(m) < 0.8 if random.random() < 0.3 else torch.ones(m, dtype=torch.bool)
            s, indices = torch.ops.convnn.select(
                query.to(dtype)[None], key[None, :, None], k,
                self_indices=own, key_mask=mask[None], metric="dot")
            # Adding 0 turns -0 into 0, as a sum of products does.
            s_expected, expected_indices = expected(query.to(dtype) * key + 0, own, mask, k)
            missing = s_expected.isneginf() & s[0].isneginf()
            same = torch.equal(s[0].nan_to_num(123), s_expected.nan_to_num(123))
            same = same and torch.equal(s[0].isnan(), s_expected.isnan())
            print(same and torch.equal(indices[0], expected_indices), m, k, kind, dtype,
                  own is not None, mask.all().item())
            count += 1
    print(count)
"""


@pytest.mark.parametrize("instruction_set", quick_last(INSTRUCTION_SETS))
def test_equals_a_stable_sort(run_forked: Callable[..., str], instruction_set: str) -> None:
    *lines, count = run_forked(CODE, CONVNN_CPU_ISA=instruction_set).splitlines()
    assert [line for line in lines if not line.startswith("True ")] == []
    assert len(lines) == int(count) > 400
