# SPDX-License-Identifier: MIT
"""Peak memory of forward and backward, in a separate process, relative to what they return."""

import json
import sys
from collections.abc import Callable

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

# Prints the bytes of inputs, outputs and gradients, and how far peak resident memory rose above
# that before any of them were allocated.
MEASURE = """
    import json, pathlib, torch, convnn_kernels

    def resident(field):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024

    def size(*tensors):
        return sum(X.numel() * X.element_size() for X in tensors)

    def run(N, k):
        query, key, value = (torch.randn(N, 64).requires_grad_() for _ in range(3))
        weight = torch.randn(64, 1, k).requires_grad_()
        inputs = (query, key, value, weight)
        outputs = {operation}
        grads = [torch.ones_like(X) for X in outputs if X.requires_grad]
        gradients = torch.autograd.grad([X for X in outputs if X.requires_grad], inputs, grads)
        return size(*inputs, *outputs, *grads, *gradients)

    torch.set_num_threads(2)
    run(64, 3)  # starts threads and fills caches that remain
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    total = run({N}, {k})
    print(json.dumps(dict(total=total, rise=resident("VmHWM") - before)))
"""

CONVNN = "torch.ops.convnn.forward(query, key, value, k, weight)"
# Materializes N x M, as eager PyTorch does, and nothing else that is large.
EAGER = """(
            *(lambda S: (S.values, S.indices))((query @ key.mT).topk(k)),
            value.square() * weight[:, 0, 0]
        )"""


def measure(run_python: Callable[..., str], operation: str, N: int, k: int) -> tuple[int, int]:
    code = MEASURE.format(operation=operation, N=N, k=k)
    found = json.loads(run_python(code, timeout=900.0).splitlines()[-1])
    return found["total"], found["rise"]


@pytest.mark.parametrize(("N", "k"), [(65_536, 9), (16_384, 512)])
def test_no_more_than_twice_what_is_returned(
    N: int, k: int, run_python: Callable[..., str]
) -> None:
    total, rise = measure(run_python, CONVNN, N, k)
    print(f"inputs, outputs and gradients {total / 2**20:.0f} MiB, peak {rise / 2**20:.0f} MiB")
    assert rise <= 2 * total


def test_an_allocation_of_all_pairs_is_seen(run_python: Callable[..., str]) -> None:
    """The control: even at a fourth of the size, S exceeds the limit."""
    total, rise = measure(run_python, EAGER, 16_384, 9)
    assert rise > 2 * total


KEPT = """
    import pathlib, torch, convnn_kernels

    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

    def run(calls):
        for _ in range(calls):
            {call}

    rows = torch.randn(8, 8)
    with torch.inference_mode():
        similarities, indices = torch.ops.convnn.select(rows, rows, 2)
        run(10_000)
        before = resident()
        run(60_000)
    print(resident() - before)
"""


@pytest.mark.parametrize(
    "call",
    [
        "torch.ops.convnn.forward(rows, rows, rows, 2)",
        "torch.ops.convnn.aggregate_backward("
        'rows, rows, similarities, indices, None, False, "softmax", 1.0, True, True, True, True)',
        "torch.ops.convnn.forward_backward("
        "rows, None, rows, rows, rows, None, similarities, indices, "
        'False, "cosine", "softmax", 1.0, True, True, True, False, False)',
    ],
    ids=["forward", "aggregate_backward", "forward_backward"],
)
def test_a_call_keeps_no_memory(call: str, run_python: Callable[..., str]) -> None:
    kept = int(run_python(KEPT.format(call=call)))
    assert kept < 60_000 * 16, f"{kept / 60_000:.0f} bytes for each call"


REFUSED = """
    import pathlib, torch, convnn_kernels

    query, key = torch.empty(8, 8, dtype=torch.uint8).view(torch.bits8), torch.randn(8, 8)

    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

    def run(calls):
        for _ in range(calls):
            try:
                torch.ops.convnn.forward(query, key, torch.ones(1000, 1000), 2)
            except RuntimeError as error:
                message = str(error).splitlines()[0]
        return message

    with torch.inference_mode():
        run(10)
        before = resident()
        message = run(60)
    print(resident() - before, message)
"""


def test_a_refused_dtype_keeps_no_memory(run_python: Callable[..., str]) -> None:
    """Nor does it keep later arguments, if LibTorch's stable ABI does not know the dtype."""
    kept, message = run_python(REFUSED).split(maxsplit=1)
    assert int(kept) < 60 * 2**20
    assert "query must be float64, float32, float16 or bfloat16, got " in message
