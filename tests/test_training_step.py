# SPDX-License-Identifier: MIT
"""tools.training_step: what is counted of a step, and what stands in for PyTorch's operations."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="no Triton here")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton, not its interpreter", allow_module_level=True)

from convnn_kernels.backends import selection
from convnn_kernels.functional import convnn
from convnn_kernels.triton import hardware
from convnn_kernels.triton.launch import Plan, forget_plans
from tools import training_step


def test_operations_of_pytorch_are_counted() -> None:
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 5, 8), (4, 8), 4))

    def step() -> None:
        F.dropout(F.linear(x, weight, bias), 0.5).transpose(0, 1).sum().backward()

    counts = training_step.count(step)
    assert counts.others == {
        "aten::addmm": 1,
        "aten::native_dropout": 1,
        "aten::sum": 1,
        "aten::ones_like": 1,
        "aten::native_dropout_backward": 1,
        "aten::mm": 2,
        "aten::sum.dim_IntList": 1,
    }
    assert not counts.within
    assert not counts.kernels
    assert not counts.calls


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hardware, "architecture", lambda X: 90)
    monkeypatch.setattr(selection, "choose", lambda call: ("triton", "for this test"))
    monkeypatch.setattr(selection, "_chosen", {})
    monkeypatch.setattr(selection, "_checked", {})
    forget_plans()
    yield
    forget_plans()


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


def test_launches_are_counted(on_triton: None) -> None:
    """As many of each kernel as are predicted for a call, at every call."""
    pytest.importorskip("skimage", reason="the benchmarks need scikit-image: pip install .[bench]")
    from benchmarks.workloads import Workload
    from tools import predict

    workload = Workload(2, 40, 32, 3, "random", dtype="bfloat16")
    work = predict.Work("small", workload, backward=True)
    expected = Counter(launch.kernel.name for launch, _ in predict.launches(work))
    query, key, value, weight = inputs(*[(2, 40, 32)] * 3, (32, 1, 3))

    def step() -> None:
        for _ in range(3):
            convnn(query, key, value, 3, weight).sum().backward()

    counts = training_step.count(step)
    assert len(expected) > 1
    assert counts.kernels == Counter({name: 3 * n for name, n in expected.items()})
    names = ["convnn::forward", "convnn::forward_backward"] * 3
    assert [op.name() for op, _ in counts.calls] == names


def test_a_plan_may_launch_a_kernel_twice() -> None:
    twice, once = (SimpleNamespace(kernel=SimpleNamespace(name=name)) for name in ("a", "b"))
    plan: Any = Plan([twice, twice, once])
    counts = training_step.count(lambda: plan.launch(None))
    assert counts.kernels == {"a": 2, "b": 1}


def test_operations_within_ours_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(*args: Any) -> tuple[Tensor, ...]:
        x = args[0].mT.contiguous().mT.float()  # two
        torch.zeros(0)
        return x.add_(1), x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.int64)  # one

    monkeypatch.setattr(selection, "cuda_kernel", lambda op: ours)
    x = torch.empty(2, 40, 32, dtype=torch.bfloat16)
    counts = training_step.count(lambda: convnn(x, x, x, 3).relu())
    assert counts.within == {"aten::clone": 1, "aten::_to_copy": 1, "aten::add_.Tensor": 1}
    assert counts.others == {"aten::relu": 1}


def test_what_stands_in_for_operations() -> None:
    x = torch.randn(3, 4, 5)
    functions: list[Callable[[], Any]] = [
        lambda: x.mT.contiguous(),
        lambda: x.mT.clone(),
        lambda: x.bfloat16(),
        lambda: x.sum((0, 1), dtype=torch.float64),
        lambda: x.max(dim=2),
        lambda: torch.zeros(7, dtype=torch.int32),
    ]
    expected = [function() for function in functions]
    aten = torch.ops.aten
    operations = {aten.clone.default, aten._to_copy.default, aten.sum.dim_IntList, aten.max.dim}
    with training_step.nothing_computed(operations | {aten.zeros.default, aten.cumsum_.default}):
        for _ in range(2):
            found = [function() for function in functions]
            assert training_step.tree_map(kind, found) == training_step.tree_map(kind, expected)
        before = x.tolist()
        assert aten.cumsum_(x, 0) is x
        assert x.tolist() == before
    # And they compute again.
    assert torch.equal(functions[0](), expected[0])


def kind(X: Tensor) -> Any:
    return [X.shape, X.stride(), X.dtype]


def test_what_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{training_step.BEGIN}old\n<!-- end -->\nafter\n<!-- end -->\n")
    files = {name: tmp_path / f"{name}.json" for name in ("before", "now")}
    monkeypatch.setattr(training_step, "DOCUMENT", document)
    monkeypatch.setattr(training_step, "FILES", files)
    row: dict[str, Any] = {"model": "A", "kernels": {"a_kernel": 20, "b_kernel": 5}, "within": {}}
    row |= {"others": {"aten::mm": 1000}, "forward_us": {"least": 100}, "backward_us": {"least": 7}}
    training_step.write(files["before"], [row])
    assert "| ratio |" not in document.read_text()
    training_step.write(files["now"], [row | {"kernels": {"c_kernel": 10}}])
    text = document.read_text()
    assert text.startswith(f"before\n{training_step.BEGIN}\n| a step of |")
    assert text.endswith("<!-- end -->\nafter\n<!-- end -->\n")
    assert "old" not in text
    assert "| A | our kernels | 25 | 10 | 0.40 |" in text
    assert "|  | PyTorch's operations in our operators | 0 | 0 |  |" in text
    assert "|  | PyTorch's other operations | 1,000 | 1,000 | 1.00 |" in text
    assert "|  | forward and backward, µs | 107 | 107 | 1.00 |" in text
    assert "- A: 10 `c_kernel`." in text
    assert json.loads(files["now"].read_text())["rows"][0]["kernels"] == {"c_kernel": 10}


def test_the_table_in_the_documentation() -> None:
    text = training_step.DOCUMENT.read_text()
    assert training_step.BEGIN + training_step.section(training_step.stored()) in text


@pytest.mark.slow
def test_a_model_over_a_driver_that_does_nothing(run_python: Callable[..., str]) -> None:
    """The driver counts as many launches, or row_of fails."""
    program = """
        from benchmarks.models import vit_tiny
        from tools import host_time, training_step
        driver = host_time.install_null_driver()
        host_time.take_cpu_tensors()
        def make():
            return vit_tiny(10, k=3, image_size=32, embed_dim=16, mlp_dim=16, depth=2)
        training_step.MODELS["small"] = make, 32
        row = training_step.row_of("small", 3, driver)
        assert row["calls"] == {"convnn::forward": 2, "convnn::forward_backward": 2}
        assert row["forward_us"]["least"] > 0 and row["backward_us"]["least"] > 0
        print(sum(row["kernels"].values()))
    """
    assert int(run_python(program).split()[-1]) > 2
