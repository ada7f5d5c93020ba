# SPDX-License-Identifier: MIT
"""Wrong calls raise an error that names the argument, what was expected and what it got.

One table of calls with their complete messages. Each runs on CPU tensors, where C++ checks, also
with gradients, and on meta and fake tensors, where Python checks: the texts are the same.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from convnn_kernels import backend, functional
from convnn_kernels.backends import selection
from convnn_kernels.backends.selection import available

OPERATORS = {
    "forward": torch.ops.convnn.forward,
    "select": torch.ops.convnn.select,
    "aggregate": torch.ops.convnn.aggregate,
}
FUNCTIONS = {
    "forward": functional.convnn,
    "select": functional.select_neighbors,
    "aggregate": functional.aggregate_neighbors,
}


def base(op: str) -> dict[str, Any]:
    """All arguments of a valid call: batch 2, N = 6, M = 8, D = 4, C = 5, O = 7, R = 5."""
    select = {
        "query": torch.randn(2, 6, 4),
        "key": torch.randn(2, 8, 4),
        "k": 3,
        "candidates": torch.tensor([6, 0, 2, 3, 7]),
        "self_indices": torch.arange(6),
        "key_mask": torch.rand(2, 8) < 0.8,
        "metric": "dot",
        "order": "index",
        "key_range": torch.tensor([[0, 8], [0, 1], [2, 5], [3, 8], [8, 8], [1, 7]]),
        "exclude_self": True,
    }
    convolution = {
        "value": torch.randn(2, 8, 5),
        "weight": torch.randn(7, 5, 3),
        "bias": torch.randn(7),
        "rho": "softmax",
        "scale": 0.5,
    }
    neighbors = {
        "similarities": torch.randn(2, 6, 3),
        "indices": torch.randint(8, (2, 6, 3)),
    }
    if op == "select":
        return select
    return convolution | (select if op == "forward" else neighbors)


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    message: str
    """The text after "convnn::<op>: "; {device} and {other} stand for two devices."""
    change: Callable[[dict[str, Any]], dict[str, Any]]
    needs_values: bool = False
    """Whether the check reads values, which meta and fake tensors do not have."""


def replace(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Replaces arguments; a callable is applied to the original argument."""

    def change(args: dict[str, Any]) -> dict[str, Any]:
        new = {name: to(args[name]) if callable(to) else to for name, to in changes.items()}
        return args | new

    return change


def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


def elsewhere(tensor: Tensor) -> Tensor:
    """The tensor on a different device than the others; see `place`."""
    return Elsewhere(tensor)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    tensor: Tensor


def floats(*shape: int) -> Tensor:
    return torch.zeros(shape)


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def flags(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


FLOATING = "float64, float32, float16 or bfloat16"
FEW = "at most 72057594037927936 elements, a size of 0 counted as 1"


def select_cases(op: str) -> list[Case]:
    def case(message: str, needs_values: bool = False, **changes: Any) -> Case:
        return Case(op, message, replace(**changes), needs_values)

    return [
        case("query must be a tensor, got None", query=None),
        case("key must be a tensor, got None", key=None),
        case(
            "query must have at least 2 dimensions [..., N, D], got shape [4]",
            query=floats(4),
        ),
        case("query must have at least 2 dimensions [..., N, D], got shape []", query=floats()),
        case(f"query must be {FLOATING}, got int64", query=to(torch.int64)),
        case(f"query must be {FLOATING}, got bool", query=to(torch.bool)),
        case(f"query must be {FLOATING}, got complex64", query=to(torch.complex64)),
        case(
            "key must have as many dimensions as query (3), got shape [8, 4]",
            key=floats(8, 4),
        ),
        case(
            "key must have as many dimensions as query (3), got shape [1, 2, 8, 4]",
            key=floats(1, 2, 8, 4),
        ),
        case("key must be float32 as query is, got float64", key=to(torch.float64)),
        case("key must be bfloat16 as query is, got float32", query=to(torch.bfloat16)),
        case("key must be float32 as query is, got int32", key=to(torch.int32)),
        case("key must be on {device} as query is, got {other}", key=elsewhere),
        case(
            "key must have the leading dimensions [2] of query, got shape [3, 8, 4]",
            key=floats(3, 8, 4),
        ),
        case(
            "key must have the leading dimensions [2] of query, got shape [1, 8, 4]",
            key=floats(1, 8, 4),
        ),
        case("key must have the 4 columns of query, got shape [2, 8, 3]", key=floats(2, 8, 3)),
        case("key must have the 4 columns of query, got shape [2, 8, 1]", key=floats(2, 8, 1)),
        case(
            f"query must have {FEW}, got shape [2, {2**60}, 0]",
            query=floats(2, 2**60, 0),
            key=floats(2, 8, 0),
        ),
        case(
            f"key must have {FEW}, got shape [2, {2**60}, 0]",
            query=floats(2, 6, 0),
            key=floats(2, 2**60, 0),
        ),
        case(
            f"key must have {FEW}, got shape [2, {2**54}, 4]",
            key=floats(1).expand(2, 2**54, 4),
        ),
        case("metric must be 'cosine', 'dot' or 'euclidean', got 'l2'", metric="l2"),
        case("metric must be 'cosine', 'dot' or 'euclidean', got 'Cosine'", metric="Cosine"),
        case("metric must be 'cosine', 'dot' or 'euclidean', got ''", metric=""),
        case("order must be 'similarity' or 'index', got 'ascending'", order="ascending"),
        case("candidates must be int64, got int32", candidates=to(torch.int32)),
        case("candidates must be int64, got bool", candidates=flags(8)),
        case("candidates must be on {device} as query is, got {other}", candidates=elsewhere),
        case("candidates must have shape [R] or [2, R], got shape [3, 5]", candidates=ints(3, 5)),
        case("candidates must have shape [R] or [2, R], got shape []", candidates=ints()),
        case(
            "candidates must have shape [R] or [2, R], got shape [2, 1, 5]",
            candidates=ints(2, 1, 5),
        ),
        case("self_indices must be int64, got float32", self_indices=to(torch.float32)),
        case("self_indices must be on {device} as query is, got {other}", self_indices=elsewhere),
        case(
            "self_indices must have shape [6] or [2, 6], one row of key for each query, "
            "got shape [8]",
            self_indices=ints(8),
        ),
        case(
            "self_indices must have shape [6] or [2, 6], one row of key for each query, "
            "got shape [1, 6]",
            self_indices=ints(1, 6),
        ),
        case("key_mask must be bool, got float32", key_mask=to(torch.float32)),
        case("key_mask must be bool, got uint8", key_mask=to(torch.uint8)),
        case("key_mask must be on {device} as query is, got {other}", key_mask=elsewhere),
        case("key_mask must have shape [2, 8], got shape [8]", key_mask=flags(8)),
        case("key_mask must have shape [2, 8], got shape [2, 6]", key_mask=flags(2, 6)),
        case("key_mask must have shape [2, 8], got shape [2, 6, 8]", key_mask=flags(2, 6, 8)),
        case(
            "exclude_self must be False without self_indices, got True",
            self_indices=None,
        ),
        case("key_range must be int64, got int32", key_range=to(torch.int32)),
        case("key_range must be on {device} as query is, got {other}", key_range=elsewhere),
        *(
            case(
                "key_range must have shape [6, 2] or [2, 6, 2], begin and end for each query, "
                f"got shape {list(shape)}",
                key_range=ints(*shape),
            )
            for shape in ((2,), (8, 2), (6, 3), (1, 6, 2), (2, 1, 6, 2))
        ),
        case("k must be at least 1, got 0", k=0),
        case("k must be at least 1, got 0", k=0, candidates=None),
        case("k must be at least 1, got -1", k=-1, candidates=None),
        case(
            "candidates must be in [0, 8), got 8 at position 4",
            needs_values=True,
            candidates=torch.tensor([0, 1, 2, 3, 8]),
        ),
        case(
            "candidates must be in [0, 8), got -1 at position 1",
            needs_values=True,
            candidates=torch.tensor([0, -1, 2, 3, 4]),
        ),
        case(
            "candidates must be distinct, got 2 more than once",
            needs_values=True,
            candidates=torch.tensor([2, 1, 0, 2]),
        ),
        case(
            "self_indices must be in [0, 8), got 8 at position 2",
            needs_values=True,
            self_indices=torch.tensor([0, 1, 8, 3, 4, 5]),
        ),
        case(
            f"self_indices must be in [0, 8), got {-(2**63)} at position 5",
            needs_values=True,
            self_indices=torch.tensor([0, 1, 2, 3, 4, -(2**63)]),
        ),
        case(
            "candidates must be in [0, 8), got 9 at position 3",
            needs_values=True,
            candidates=torch.tensor([[0, 1], [2, 9]]),
        ),
        case(
            "candidates must be distinct, got 3 more than once",
            needs_values=True,
            candidates=torch.tensor([[0, 3], [3, 3]]),
        ),
        case(
            "self_indices must be in [0, 8), got 8 at position 11",
            needs_values=True,
            self_indices=torch.arange(12).reshape(2, 6) % 6
            + torch.arange(12).reshape(2, 6) // 11 * 3,
        ),
        *(
            case(
                f"key_range must be 0 <= begin <= end <= 8, got {begin} and {end} at position 7",
                needs_values=True,
                key_range=torch.tensor([[0, 8]] * 7 + [[begin, end]] + [[0, 0]] * 4).view(2, 6, 2),
            )
            for begin, end in ((-1, 3), (5, 4), (2, 9), (9, 9), (-(2**63), 2**63 - 1))
        ),
    ]


def convolution_cases(op: str) -> list[Case]:
    def case(message: str, **changes: Any) -> Case:
        return Case(op, message, replace(**changes))

    return [
        case("value must be a tensor, got None", value=None),
        case("value must have at least 2 dimensions [..., M, C], got shape [8]", value=floats(8)),
        case(f"value must be {FLOATING}, got int32", value=to(torch.int32)),
        case("weight must be float32 as value is, got float16", weight=to(torch.float16)),
        case("weight must be float64 as value is, got float32", value=to(torch.float64)),
        case("weight must be on {device} as value is, got {other}", weight=elsewhere),
        case(
            "weight must have shape [O, 5, 3] or [5, 1, 3], got shape [7, 5]",
            weight=floats(7, 5),
        ),
        case(
            "weight must have shape [O, 5, 3] or [5, 1, 3], got shape [7, 4, 3]",
            weight=floats(7, 4, 3),
        ),
        case(
            "weight must have shape [O, 5, 3] or [5, 1, 3], got shape [7, 1, 3]",
            weight=floats(7, 1, 3),
        ),
        case(
            "weight must have shape [O, 5, 3] or [5, 1, 3], got shape [5, 1, 2]",
            weight=floats(5, 1, 2),
        ),
        case(
            "weight must have shape [O, 5, 3] or [5, 1, 3], got shape [7, 5, 3, 1]",
            weight=floats(7, 5, 3, 1),
        ),
        case(
            f"weight must have {FEW}, got shape [{2**60}, 0, 3]",
            value=floats(2, 8, 0),
            weight=floats(2**60, 0, 3),
        ),
        case("bias must be float32 as value is, got float64", bias=to(torch.float64)),
        case("bias must be on {device} as value is, got {other}", bias=elsewhere),
        case("bias must have shape [7], got shape [5]", bias=floats(5)),
        case("bias must have shape [7], got shape [7, 1]", bias=floats(7, 1)),
        case("bias must have shape [7], got shape []", bias=floats()),
        case("bias must have shape [5], got shape [7]", weight=None),
        case("bias must have shape [5], got shape [7]", weight=floats(5, 1, 3)),
        case("rho must be 'softmax', 'ones' or 'similarity', got 'mean'", rho="mean"),
        case("scale must be finite, got inf", scale=float("inf")),
        case("scale must be finite, got -inf", scale=float("-inf")),
        case("scale must be finite, got nan", scale=float("nan")),
        # C++ prints the sign of a NaN.
        case("scale must be finite, got nan", scale=float("-nan")),
        case("scale must be 1.0 unless rho is 'softmax', got 0.5 with rho 'ones'", rho="ones"),
        case(
            "scale must be 1.0 unless rho is 'softmax', got -1e-05 with rho 'similarity'",
            rho="similarity",
            scale=-1e-5,
        ),
    ]


def forward_cases() -> list[Case]:
    def case(message: str, **changes: Any) -> Case:
        return Case("forward", message, replace(**changes))

    return [
        case("value must be on {device} as query is, got {other}", value=elsewhere),
        case(
            "value must have the leading dimensions [2] of query, got shape [3, 8, 5]",
            value=floats(3, 8, 5),
        ),
        case(
            "value must have the leading dimensions [2] of query, got shape [8, 5]",
            value=floats(8, 5),
        ),
        case("value must have the 8 rows of key, got shape [2, 6, 5]", value=floats(2, 6, 5)),
        case(
            f"value must have {FEW}, got shape [2, 8, {2**54}]",
            value=floats(1).expand(2, 8, 2**54),
        ),
    ]


def aggregate_cases() -> list[Case]:
    def case(message: str, needs_values: bool = False, **changes: Any) -> Case:
        return Case("aggregate", message, replace(**changes), needs_values)

    return [
        case("similarities must be a tensor, got None", similarities=None),
        case("indices must be a tensor, got None", indices=None),
        case("similarities must be float32 or float64, got float16", similarities=to(torch.half)),
        case("similarities must be float32 or float64, got int64", similarities=to(torch.int64)),
        case("similarities must be on {device} as value is, got {other}", similarities=elsewhere),
        case(
            "similarities must have as many dimensions as value (3), got shape [6, 3]",
            similarities=floats(6, 3),
        ),
        case(
            "similarities must have the leading dimensions [2] of value, got shape [1, 6, 3]",
            similarities=floats(1, 6, 3),
        ),
        case(
            "similarities must have at least one column (k >= 1), got shape [2, 6, 0]",
            similarities=floats(2, 6, 0),
            indices=ints(2, 6, 0),
        ),
        case(f"value must have {FEW}, got shape [2, {2**60}, 0]", value=floats(2, 2**60, 0)),
        case(
            f"similarities must have {FEW}, got shape [2, 6, {2**54}]",
            similarities=floats(1).expand(2, 6, 2**54),
        ),
        case("indices must be int64, got int32", indices=to(torch.int32)),
        case("indices must be on {device} as value is, got {other}", indices=elsewhere),
        case(
            "indices must have the shape [2, 6, 3] of similarities, got shape [2, 6, 4]",
            indices=ints(2, 6, 4),
        ),
        case(
            "indices must have the shape [2, 6, 3] of similarities, got shape [6, 3]",
            indices=ints(6, 3),
        ),
        case(
            "weight must have shape [O, 5, 2] or [5, 1, 2], got shape [7, 5, 3]",
            similarities=floats(2, 6, 2),
            indices=ints(2, 6, 2),
        ),
        case(
            "indices must be in [0, 8), got 8 at position 35",
            needs_values=True,
            indices=lambda indices: indices.flatten().index_fill(0, ints(1) + 35, 8).view(2, 6, 3),
        ),
        case(
            "indices must be in [0, 8), got -1 at position 0",
            needs_values=True,
            indices=lambda indices: indices.flatten().index_fill(0, ints(1), -1).view(2, 6, 3),
        ),
        case(
            "similarities must be -inf without rows of value, got 0.5 at position 0",
            needs_values=True,
            value=floats(2, 0, 5),
            similarities=lambda similarities: torch.full_like(similarities, 0.5),
        ),
        case(
            "similarities must be -inf without rows of value, got nan at position 0",
            needs_values=True,
            value=floats(2, 0, 5),
            similarities=lambda similarities: torch.full_like(similarities, float("-nan")),
        ),
    ]


CASES = [
    *select_cases("forward"),
    *select_cases("select"),
    *convolution_cases("forward"),
    *convolution_cases("aggregate"),
    *forward_cases(),
    *aggregate_cases(),
]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to run a call: where its tensors are, and whether they need gradients."""

    name: str
    device: str
    other: str
    has_values: bool
    fake: bool = False
    requires_grad: bool = False


WAYS = [
    Way("cpu", "cpu", "meta", has_values=True),
    Way("autograd", "cpu", "meta", has_values=True, requires_grad=True),
    Way("meta", "meta", "cpu", has_values=False),
    Way("fake", "cuda:0", "cpu", has_values=False, fake=True),
]


def place(arg: Any, way: Way) -> Any:
    """The argument on the device of `way`."""
    if isinstance(arg, Elsewhere):
        tensor, device = arg.tensor, way.other
    elif isinstance(arg, Tensor):
        tensor, device = arg, way.device
    else:
        return arg
    if way.fake:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    moved = tensor.detach().to(device)
    return moved.requires_grad_(way.requires_grad and tensor.is_floating_point())


def call(op: Callable[..., Any], args: dict[str, Any], way: Way) -> Any:
    if way.fake:
        with FakeTensorMode():
            return op(**{name: place(arg, way) for name, arg in args.items()})
    return op(**{name: place(arg, way) for name, arg in args.items()})


def complete_message(case: Case, way: Way) -> str:
    text = case.message.replace("{device}", way.device).replace("{other}", way.other)
    return f"convnn::{case.op}: {text}"


def first_line(error: BaseException) -> str:
    """The message without the C++ stack trace that PyTorch appends to some."""
    return str(error).splitlines()[0]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.message}")
def test_wrong_call(case: Case, way: Way) -> None:
    args = case.change(base(case.op))
    if case.needs_values and not way.has_values:
        call(OPERATORS[case.op], args, way)
        return
    with pytest.raises(RuntimeError) as error:
        call(OPERATORS[case.op], args, way)
    assert first_line(error.value) == complete_message(case, way)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.message}")
def test_wrong_call_of_a_function(case: Case) -> None:
    with pytest.raises(RuntimeError) as error:
        call(FUNCTIONS[case.op], case.change(base(case.op)), WAYS[0])
    assert first_line(error.value) == complete_message(case, WAYS[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.message}")
def test_wrong_call_in_inference_mode(case: Case) -> None:
    # In inference mode the dispatcher calls the C++ kernels directly, without any Python.
    with torch.inference_mode(), pytest.raises(RuntimeError) as error:
        call(OPERATORS[case.op], case.change(base(case.op)), WAYS[0])
    assert first_line(error.value) == complete_message(case, WAYS[0])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("op", OPERATORS)
def test_right_call(op: str, way: Way) -> None:
    """The calls of the table run without their mistakes."""
    results = call(OPERATORS[op], base(op), way)
    output = results if op == "aggregate" else results[0]
    assert output.shape == ((2, 6, 3) if op == "select" else (2, 6, 7))
    assert output.device == torch.device(way.device)


def test_there_are_enough_cases() -> None:
    assert len({(case.op, case.message) for case in CASES}) >= 80
    for op in OPERATORS:
        named = {case.message.split()[0] for case in CASES if case.op == op}
        assert set(base(op)) <= named, "some argument has no wrong call"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": "3"}, ("'int'", "'k'", "'str'")),
        ({"k": 2.5}, ("'int'", "'k'", "'float'")),
        ({"query": [[1.0]]}, ("'Tensor'", "'query'", "'list'")),
        ({"candidates": [0, 1, 2]}, ("'Optional[Tensor]'", "'candidates'", "'list'")),
        ({"metric": 1}, ("'str'", "'metric'", "'int'")),
        ({"scale": "1"}, ("'float'", "'scale'", "'str'")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_type(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    """PyTorch checks types against the schema, in its own words."""
    with pytest.raises(RuntimeError) as error:
        torch.ops.convnn.forward(**base("forward") | changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("missing", ["query", "key", "value", "k"])
def test_missing_argument(missing: str) -> None:
    args = base("forward")
    del args[missing]
    with pytest.raises(RuntimeError, match=f"missing value for argument '{missing}'"):
        torch.ops.convnn.forward(**args)
    with pytest.raises(TypeError, match=f"'{missing}'"):
        functional.convnn(**args)


def test_unknown_argument() -> None:
    args = base("forward")
    args["weights"] = args.pop("weight")
    with pytest.raises(RuntimeError, match="'weights'"):
        torch.ops.convnn.forward(**args)
    with pytest.raises(TypeError, match="'weights'"):
        functional.convnn(**args)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backend_that_cannot_run(name: str) -> None:
    reason = available()[name]
    assert reason
    with pytest.raises(RuntimeError) as error, backend(name):
        pass
    assert str(error.value) == (
        f"backend: name must be a backend that can run here ('cpu'), got '{name}': {reason}"
    )


@pytest.mark.parametrize("name", ["", "CPU", "gpu"])
def test_backend_that_does_not_exist(name: str) -> None:
    with pytest.raises(RuntimeError) as error:
        backend(name)
    assert str(error.value) == f"backend: name must be 'triton', 'cuda' or 'cpu', got '{name}'"


def test_backend_cpu_runs_and_ends() -> None:
    args = base("forward")
    expected = functional.convnn(**args)
    with backend("cpu"):
        assert torch.equal(functional.convnn(**args), expected)
        with pytest.raises(RuntimeError, match="k must be"), backend("cpu"):
            functional.convnn(**args | {"k": 0})
        assert selection._forced == "cpu"
    assert selection._forced is None


def test_cuda_tensors_have_no_backend() -> None:
    """The CUDA kernel checks the arguments, then reports why no backend can run them."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("convnn::forward", "CUDA")
    kernel = selection.cuda_kernel(torch.ops.convnn.select.default)
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"^convnn::select: k must be at least 1, got 0"):
        kernel(x, x, 0)
    with pytest.raises(RuntimeError) as error:
        kernel(x, x, 2)
    reasons = available()
    assert str(error.value) == (
        "convnn::select: no backend can run tensors on cpu: "
        f"triton: {reasons['triton']}; cuda: {reasons['cuda']}; cpu: it takes tensors on cpu only"
    )
    with backend("cpu"), pytest.raises(RuntimeError) as error:
        kernel(x, x, 2)
    assert str(error.value) == (
        "convnn::select: the forced backend 'cpu' cannot run tensors on cpu: "
        "it takes tensors on cpu only"
    )


CALLS_UNDER_ENVIRONMENT = """
    import torch
    import convnn_kernels

    x = torch.randn(5, 3)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        try:
            with mode():
                torch.ops.convnn.select(x, x, 2)
            print("ran")
        except RuntimeError as error:
            print(error)
    with convnn_kernels.backend("cpu"):
        convnn_kernels.functional.convnn(x, x, x, 2)
    print("ran")
"""


@pytest.mark.parametrize(
    "name",
    ["cpu", "gpu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("triton", "cuda"))],
)
def test_backend_from_the_environment(name: str, run_forked: Callable[..., str]) -> None:
    lines = run_forked(CALLS_UNDER_ENVIRONMENT, CONVNN_BACKEND=name).splitlines()
    if name == "cpu":
        expected = "ran"
    elif name == "gpu":
        expected = "CONVNN_BACKEND must be 'triton', 'cuda' or 'cpu', got 'gpu'"
    else:
        # Queried in a separate process, because other tests here may have faked a device.
        code = (
            f"from convnn_kernels.backends.selection import available\nprint(available()[{name!r}])"
        )
        expected = (
            "CONVNN_BACKEND must be a backend that can run here ('cpu'), "
            f"got '{name}': {run_forked(code).strip()}"
        )
    assert lines == [expected] * 3 + ["ran"]
