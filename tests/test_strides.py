# SPDX-License-Identifier: MIT
"""query, key and value are read where they lie on the CPU: expanded, sliced or transposed.

Results are contiguous, also those without elements.
"""

import json
import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import convnn_kernels  # noqa: F401, defines the operators

convnn = torch.ops.convnn

B, H, N, M, D = 2, 3, 5, 40, 8

# [B, H, M, D] each. The elements of a row are adjacent, and so are the rows.
ADJACENT: dict[str, Callable[[torch.dtype], Tensor]] = {
    "bank-over-the-batch": lambda dtype: torch.randn(M, D).to(dtype).expand(B, H, M, D),
    "grouped-heads": lambda dtype: torch.randn(B, 1, M, D).to(dtype).expand(B, H, M, D),
    "bank-for-each-head": lambda dtype: torch.randn(1, H, M, D).to(dtype).expand(B, H, M, D),
    "sliced-cache": lambda dtype: torch.randn(B, H, 2 * M, D).to(dtype)[:, :, :M],
    "heads-first": lambda dtype: torch.randn(H, B, M, D).to(dtype).transpose(0, 1),
    "one-row": lambda dtype: torch.randn(B, 1, H, D).to(dtype).transpose(1, 2),
    "one-row-repeated": lambda dtype: torch.randn(B, H, 1, D).to(dtype).expand(B, H, M, D),
    # Each head and each batch element begins one row after the one before.
    "sliding": lambda dtype: (
        torch.randn(B + H + M, D).to(dtype).as_strided((B, H, M, D), (D, D, D, 1))
    ),
    "offset": lambda dtype: torch.randn(1 + B * H * M * D).to(dtype)[1:].view(B, H, M, D),
}
# Rows that are far apart: in place only for few queries, or where few of them are read.
APART: dict[str, Callable[[torch.dtype], Tensor]] = {
    "every-other-row": lambda dtype: torch.randn(B, H, 2 * M, D).to(dtype)[:, :, ::2],
    "sliced-columns": lambda dtype: torch.randn(B, H, M, 3 * D).to(dtype)[..., D : 2 * D],
    "heads-behind-tokens": lambda dtype: torch.randn(B, M, H, D).to(dtype).transpose(1, 2),
    "bank-of-columns": lambda dtype: torch.randn(M, 3 * D).to(dtype)[:, :D].expand(B, H, M, D),
}
COPIED: dict[str, Callable[[torch.dtype], Tensor]] = {
    "channels-first": lambda dtype: torch.randn(B, H, D, M).to(dtype).mT,
    "channels-first-bank": lambda dtype: torch.randn(D, M).to(dtype).mT.expand(B, H, M, D),
    "one-column-repeated": lambda dtype: torch.randn(B, H, M, 1).to(dtype).expand(B, H, M, D),
}
LAYOUTS = ADJACENT | APART | COPIED
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def results(query: Tensor, key: Tensor, value: Tensor, metric: str) -> list[Tensor]:
    """Outputs and gradients of forward, and of select and aggregate by themselves."""
    leaves = [X.detach().requires_grad_() for X in (query, key, value)]
    torch.manual_seed(0)
    weight = torch.randn(D, 1, 4).to(value.dtype)
    output, similarities, indices = convnn.forward(*leaves, 4, weight, metric=metric)
    found = [output, similarities, indices]
    loss = (output.float() * torch.linspace(-1, 2, D)).sum() + similarities.sum()
    found += torch.autograd.grad(loss, leaves)
    similarities, indices = convnn.select(*leaves[:2], 3, metric=metric)
    y = convnn.aggregate(leaves[2], similarities, indices)
    return [*found, similarities, indices, y, *torch.autograd.grad(y.float().sum(), leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_contiguous(layout: str, metric: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    query = LAYOUTS[layout](dtype)[:, :, :N]
    key, value = LAYOUTS[layout](dtype), LAYOUTS[layout](dtype)
    got = results(query, key, value, metric)
    expected = results(query.contiguous(), key.contiguous(), value.contiguous(), metric)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["bank-over-the-batch", "grouped-heads", "bank-for-each-head"])
@pytest.mark.parametrize("query_layout", ["contiguous", "heads-behind-tokens"])
@pytest.mark.parametrize(
    "restriction", ["none", "candidates", "self", "self-by-index", "mask", "shared-mask"]
)
def test_shared_keys_with_many_queries(layout: str, query_layout: str, restriction: str) -> None:
    """More queries than a block, and enough keys for the screen."""
    torch.manual_seed(2)
    n, m, d = 300, 600, 32
    bank = {"bank-over-the-batch": (m, d), "grouped-heads": (B, 1, m, d)}
    key = torch.randn(bank.get(layout, (1, H, m, d))).expand(B, H, m, d)
    query = torch.randn(B, n, H, d).transpose(1, 2)
    if query_layout == "contiguous":
        query = query.contiguous()
    options = {
        "none": {},
        "candidates": {"candidates": torch.randperm(m)[:100]},
        "self": {"self_indices": torch.randint(m, (n,))},
        "self-by-index": {"self_indices": torch.randint(m, (n,)), "order": "index"},
        "mask": {"key_mask": torch.rand(B, H, m) > 0.5},
        "shared-mask": {"key_mask": (torch.rand(B, 1, m) > 0.5).expand(B, H, m)},
    }[restriction]
    got = convnn.select(query, key, 9, **options)
    expected = convnn.select(query.contiguous(), key.contiguous(), 9, **options)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("restriction", ["mask", "candidates", "candidates-of-pairs"])
def test_shared_keys_of_groups(restriction: str) -> None:
    """Batch elements with the same keys are searched as one; some of them are like others."""
    batch, n, m, d = 6, 20, 200, 8
    query, key = torch.randn(batch, n, d), torch.randn(m, d).expand(batch, m, d)
    # 0, 0, 1 is no pattern that repeats; 0, 0, 1, 1, 2, 2 is.
    group = torch.arange(batch) // 2
    if restriction == "mask":
        batch = 3
        options = {"key_mask": (torch.rand(batch, m) > 0.5)[group[:batch]]}
    elif restriction == "candidates":
        batch = 3
        options = {"candidates": torch.rand(batch, m).argsort()[:, :50][group[:batch]]}
    else:
        options = {"candidates": torch.rand(3, m).argsort()[:, :50][group]}
    got = convnn.select(query[:batch], key[:batch], 9, **options)
    for b in range(batch):
        own = {name: X[b] for name, X in options.items()}
        alone = convnn.select(query[b], key[b], 9, **own)
        assert torch.equal(got[0][b], alone[0])
        assert torch.equal(got[1][b], alone[1])


def copied(call: Callable[[], object]) -> tuple[int, int]:
    """How many tensors of float32 a call copies, and their bytes."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        call()
    copies = [event for event in recorded.events() if event.name == "aten::copy_"]
    assert not any(event.name == "aten::clone" for event in recorded.events())
    return len(copies), sum(4 * math.prod(event.input_shapes[0]) for event in copies)


def backward(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], object]:
    output, similarities, indices = convnn.forward(query, key, value, 4)
    return lambda: convnn.forward_backward(
        *(output, None, query, key, value, None, similarities, indices, False),
        *("cosine", "softmax", 1.0, True, True, True, False, False),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies(layout: str) -> None:
    query, key, value = (LAYOUTS[layout](torch.float32) for _ in range(3))
    query = query[:, :, :N]
    neighbors = convnn.select(query, key, 4)  # fewer pairs than keys
    as_many = convnn.select(query, key, M // N)
    all_neighbors = convnn.select(key, key, 4)
    few = copied(lambda: convnn.aggregate(value, *neighbors))
    as_many_as_keys = copied(lambda: convnn.aggregate(value, *as_many))
    many = copied(lambda: convnn.aggregate(value, *all_neighbors))
    search = copied(lambda: convnn.select(query, key, 4))
    many_queries = torch.cat([key, key], -2)
    many_search = copied(lambda: convnn.select(many_queries, key, 4))
    gradients = copied(backward(query, key, value))
    assert (few[0] > 0) == (layout in COPIED)
    assert (as_many_as_keys[0] > 0) == (layout in APART | COPIED)
    assert (many[0] > 0) == (layout in APART | COPIED)
    assert (search[0] > 0) == (layout in COPIED)
    assert (many_search[0] > 0) == (layout in APART | COPIED)
    assert (gradients[0] > 0) == (layout in APART | COPIED)


@pytest.mark.parametrize("layout", ["channels-first-bank", "bank-of-columns"])
def test_only_distinct_elements_are_copied(layout: str) -> None:
    query, key, value = (LAYOUTS[layout](torch.float32) for _ in range(3))
    query = torch.cat([query, query], -2)
    bank = M * D * 4
    assert bank <= copied(lambda: convnn.forward(query, key, value, 4))[1] <= 3 * bank
    assert copied(backward(query, key, value))[1] <= 3 * bank


MEASURE = """
    import json, pathlib, torch, convnn_kernels

    def resident(field):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024

    torch.set_num_threads(2)
    {make}
    torch.ops.convnn.forward(query[..., :2, :], key[..., :64, :], key[..., :64, :], 4)
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    torch.ops.convnn.forward(query, key, key, 4)
    print(json.dumps(resident("VmHWM") - before))
"""
LARGE = {
    # 16 MiB of keys, packed with their screen, which is at most as large, and what a thread needs;
    # copied for each batch element, that is 1 GiB.
    "bank": (
        "query = torch.randn(64, 16, 64); key = torch.randn(65536, 64).expand(64, -1, -1)",
        2 * 16 + 2,
    ),
    # 128 MiB are used; 16 MiB of them are packed at a time.
    "cache": (
        "query = torch.randn(1, 8, 65, 64); key = torch.randn(1, 8, 131072, 64)[:, :, :65536]",
        24,
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", LARGE)
def test_peak_memory(case: str, run_python: Callable[..., str]) -> None:
    make, most = LARGE[case]
    rise = json.loads(run_python(MEASURE.format(make=make), timeout=300.0).splitlines()[-1])
    print(f"{rise / 2**20:.0f} MiB")
    assert rise <= most * 2**20


@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (2, 0, 5, 3), (2, 4, 5, 0)], ids=str)
def test_results_without_elements_have_the_strides_of_new_tensors(
    shape: tuple[int, int, int, int],
) -> None:
    """As PyTorch makes them, so that compiled code, which expects these, takes them."""
    batch, queries, rows, channels = shape
    leaves = [
        torch.randn(batch, count, columns, requires_grad=True)
        for count, columns in ((queries, 3), (rows, 3), (rows, channels))
    ]
    output, s, I = convnn.forward(*leaves, 2)
    grads = torch.autograd.grad((output, s), leaves, (output.detach(), s.detach()))
    for X in (output, s, I, *grads):
        assert X.stride() == torch.empty(X.shape).stride()
