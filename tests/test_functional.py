# SPDX-License-Identifier: MIT
"""The functions: types of arguments that the operators would take or would not name, and edges."""

import enum
import fractions
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from inputs import one_thread
from torch import Tensor, nn

from convnn_kernels import checks, functional
from convnn_kernels import nn as cnn

pytestmark = one_thread

N, C, K = 6, 4, 3
LEARN = (
    "which would get no gradient. To learn a temperature, multiply the similarities of "
    "select_neighbors by it and pass them to aggregate_neighbors"
)


class Metric(enum.Enum):
    DOT = "dot"


def arguments(function: str) -> dict[str, Any]:
    """The arguments of a valid call."""
    x = torch.randn(N, C)
    search = {"query": x, "key": x, "k": K}
    if function == "select_neighbors":
        return search
    if function == "convnn":
        return {**search, "value": x}
    similarities, indices = functional.select_neighbors(x, x, K)
    return {"value": x, "similarities": similarities, "indices": indices}


def call(function: str, **changes: Any) -> Any:
    return getattr(functional, function)(**arguments(function) | changes)


WRONG_K = [
    (torch.tensor(4.7), "a tensor (k.item() reads its number)"),
    (torch.tensor(3), "a tensor (k.item() reads its number)"),
    (torch.tensor([3]), "a tensor (k.item() reads its number)"),
    (True, "True"),
    (np.True_, "numpy.bool"),
    (4.7, "4.7"),
    (3.0, "3.0"),
    (np.float32(3), "numpy.float32"),
    (np.array(3), "numpy.ndarray"),
    ("3", "'3'"),
    (None, "None"),
    ([3], "list"),
]


@pytest.mark.parametrize("function", ["convnn", "select_neighbors"])
@pytest.mark.parametrize(("k", "got"), WRONG_K, ids=[str(got) for _, got in WRONG_K])
def test_k_is_a_whole_number(function: str, k: Any, got: str) -> None:
    with pytest.raises(TypeError) as error:
        call(function, k=k)
    assert str(error.value) == f"{function}: k must be a whole number, got {got}"


WRONG_SCALE = [
    (torch.tensor(2.0), f"a tensor, {LEARN}"),
    (torch.tensor(2.0, requires_grad=True), f"a tensor, {LEARN}"),
    (nn.Parameter(torch.ones(1)), f"a tensor, {LEARN}"),
    (torch.ones(3), f"a tensor, {LEARN}"),
    (True, "True"),
    ("2", "'2'"),
    (None, "None"),
    (1j, "1j"),
    (np.ones(1), "numpy.ndarray"),
]


@pytest.mark.parametrize("function", ["convnn", "aggregate_neighbors"])
@pytest.mark.parametrize(("scale", "got"), WRONG_SCALE, ids=[str(got) for _, got in WRONG_SCALE])
def test_scale_is_a_number(function: str, scale: Any, got: str) -> None:
    with pytest.raises(TypeError) as error:
        call(function, scale=scale)
    assert str(error.value) == f"{function}: scale must be a number, got {got}"


def test_warmup_checks_as_convnn_does() -> None:
    x = torch.randn(N, C)
    with pytest.raises(TypeError, match=r"^convnn: scale must be a number, got a tensor"):
        functional.warmup(x, x, x, K, scale=torch.tensor(1.0))


@pytest.mark.parametrize("k", [np.int64(K), np.int8(K), np.uint16(K)], ids=type)
def test_whole_numbers_of_numpy(k: Any) -> None:
    x = torch.randn(N, C)
    assert torch.equal(functional.convnn(x, x, x, k), functional.convnn(x, x, x, K))
    for mine, right in zip(
        functional.select_neighbors(x, x, k), functional.select_neighbors(x, x, K), strict=True
    ):
        assert torch.equal(mine, right)


@pytest.mark.parametrize(
    "scale", [np.float64(2), np.float16(2), np.int32(2), 2, fractions.Fraction(2)], ids=type
)
def test_real_numbers(scale: Any) -> None:
    args = arguments("aggregate_neighbors")
    assert torch.equal(
        functional.aggregate_neighbors(**args, scale=scale),
        functional.aggregate_neighbors(**args, scale=2.0),
    )
    x = torch.randn(N, C)
    assert torch.equal(
        functional.convnn(x, x, x, K, scale=scale), functional.convnn(x, x, x, K, scale=2.0)
    )


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(RuntimeError) as error:
        call("convnn", k=10**30)
    assert str(error.value) == f"convnn: k must be below 2**63, got {10**30}"
    with pytest.raises(RuntimeError, match="scale must be finite, got inf"):
        call("convnn", scale=10**400)


WRONG_TENSORS: list[tuple[str, str, Any, str]] = [
    ("select_neighbors", "query", np.ones((N, C)), "numpy.ndarray (torch.from_numpy converts it)"),
    ("select_neighbors", "key", np.ones((N, C)), "numpy.ndarray (torch.from_numpy converts it)"),
    ("select_neighbors", "key", [[0.0] * C] * N, "list (torch.tensor converts it)"),
    ("select_neighbors", "query", 3.0, "3.0"),
    ("select_neighbors", "query", "x" * 1000, "str"),
    ("aggregate_neighbors", "similarities", np.ones((N, K)), "numpy.ndarray (torch.from_numpy"),
    ("aggregate_neighbors", "indices", [[0] * K] * N, "list (torch.tensor converts it)"),
    ("convnn", "value", ((0.0,) * C,) * N, "tuple (torch.tensor converts it)"),
    ("convnn", "value", nn.Linear(C, C), "torch.nn.modules.linear.Linear"),
]
WRONG_OPTIONAL: list[tuple[str, str, Any, str]] = [
    ("select_neighbors", "candidates", [0, 1, 2], "list (torch.tensor converts it)"),
    ("select_neighbors", "candidates", range(3), "range (torch.tensor converts it)"),
    ("select_neighbors", "candidates", np.arange(3), "numpy.ndarray (torch.from_numpy converts it"),
    ("select_neighbors", "candidates", 3, "3"),
    ("select_neighbors", "self_indices", range(N), "range (torch.tensor converts it)"),
    ("select_neighbors", "key_mask", [True] * N, "list (torch.tensor converts it)"),
    ("convnn", "weight", nn.Conv1d(C, C, K), "torch.nn.modules.conv.Conv1d (pass its weight)"),
    ("convnn", "weight", 0.5, "0.5"),
    ("convnn", "bias", True, "True"),
    ("aggregate_neighbors", "bias", [0.0] * C, "list (torch.tensor converts it)"),
]
METRICS = "'cosine', 'dot' or 'euclidean'"
WRONG_TEXTS: list[tuple[str, str, Any, str]] = [
    ("select_neighbors", "metric", None, f"{METRICS}, got None"),
    ("select_neighbors", "metric", Metric.DOT, f"{METRICS}, got test_functional.Metric"),
    ("convnn", "metric", torch.nn.functional.cosine_similarity, f"{METRICS}, got builtin_function"),
    ("select_neighbors", "order", 0, "'similarity' or 'index', got 0"),
    ("aggregate_neighbors", "rho", None, "'softmax', 'ones' or 'similarity', got None"),
    ("convnn", "rho", torch.softmax, "'softmax', 'ones' or 'similarity', got builtin_function_or"),
]


@pytest.mark.parametrize(
    ("function", "name", "value", "expected"),
    [
        *[(f, name, value, f"a tensor, got {got}") for f, name, value, got in WRONG_TENSORS],
        *[(f, name, value, f"a tensor or None, got {g}") for f, name, value, g in WRONG_OPTIONAL],
        *WRONG_TEXTS,
    ],
)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_wrong_types_are_named(
    function: str, name: str, value: Any, expected: str, grad: bool
) -> None:
    args = arguments(function)
    if grad:
        args = {
            name: arg.detach().requires_grad_()
            if torch.is_tensor(arg) and arg.is_floating_point()
            else arg
            for name, arg in args.items()
        }
    with pytest.raises(TypeError) as error:
        getattr(functional, function)(**args | {name: value})
    message = str(error.value)
    assert message.startswith(f"{function}: {name} must be {expected}")
    assert len(message) < 150
    assert error.value.__suppress_context__


NOT_DENSE = {
    "one of layout sparse_coo (to_dense() converts it)": lambda X: X.to_sparse(),
    "one of layout sparse_csr (to_dense() converts it)": lambda X: X.flatten(1).to_sparse_csr(),
    "one of layout _mkldnn (to_dense() converts it)": lambda X: X.float().to_mkldnn(),
    "a nested one (pad it, and pass key_mask)": lambda X: torch.nested.as_nested_tensor([X]),
    "a quantized one (dequantize() converts it)": lambda X: torch.quantize_per_tensor(
        X.float(), 0.1, 0, torch.qint8
    ),
}


@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("convnn", "value"),
        ("select_neighbors", "query"),
        ("select_neighbors", "candidates"),
        ("aggregate_neighbors", "indices"),
        ("edge_index", "indices"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_must_be_dense(function: str, name: str, kind: str) -> None:
    edges = {"indices": INDICES, "similarities": SIMILARITIES}
    args = edges if function == "edge_index" else arguments(function)
    if name not in args:
        args["candidates"] = torch.arange(3)[:, None]
    with pytest.raises(TypeError) as error:
        getattr(functional, function)(**args | {name: NOT_DENSE[kind](args[name])})
    assert str(error.value) == f"{function}: {name} must be a dense tensor, got {kind}"


def test_other_errors_are_those_of_the_operators() -> None:
    with pytest.raises(RuntimeError, match=r"^convnn::select: query must be a tensor, got None"):
        call("select_neighbors", query=None)


@pytest.mark.parametrize("dynamic", [False, True])
def test_k_under_compile(dynamic: bool) -> None:
    x = torch.randn(N, C)
    compiled = torch.compile(
        lambda x, k: functional.convnn(x, x, x, k),
        fullgraph=True,
        dynamic=dynamic,
        backend="eager",
    )
    for k in (2, 3, 4):
        assert torch.equal(compiled(x, k), functional.convnn(x, x, x, k))


def test_k_from_a_shape_under_export() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, like: Tensor) -> Tensor:
            return functional.convnn(x, x, x, like.shape[0], scale=0.5)

    size = torch.export.Dim("size", min=2, max=N)
    args = torch.randn(N, C), torch.empty(4)
    for strict in (False, True):
        program = torch.export.export(Model(), args, dynamic_shapes=({}, {0: size}), strict=strict)
        other = args[0], torch.empty(5)
        assert torch.equal(program.module()(*other), Model()(*other))


def test_wrong_types_under_compile() -> None:
    """Outside full graphs, the error is the one without compilation."""
    x = torch.randn(N, C)
    compiled = torch.compile(functional.convnn, backend="eager")
    with pytest.raises(TypeError, match=r"^convnn: scale must be a number, got a tensor"):
        compiled(x, x, x, K, scale=torch.tensor(2.0))
    with pytest.raises(TypeError, match=r"^convnn: k must be a whole number, got 4.7"):
        compiled(x, x, x, 4.7)


def test_numbers_of_numpy_under_compile() -> None:
    x = torch.randn(N, C)
    compiled = torch.compile(functional.convnn, backend="eager")
    result = compiled(x, x, x, np.int64(K), scale=np.float64(0.5))
    assert torch.equal(result, functional.convnn(x, x, x, K, scale=0.5))


def test_an_int_for_scale_under_compile() -> None:
    x = torch.randn(N, C)
    compiled = torch.compile(functional.convnn, backend="eager", fullgraph=True)
    result = compiled(x, x, x, K, scale=2)
    assert torch.equal(result, functional.convnn(x, x, x, K, scale=2.0))


def test_symbolic_trace_takes_every_argument() -> None:
    x = torch.randn(N, C)

    def model(x: Tensor, k: int, scale: float) -> Tensor:
        return functional.convnn(x, x, x, k, scale=scale)

    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x, K, 0.5), model(x, K, 0.5))


def test_jit_trace_with_k_from_a_shape() -> None:
    def model(x: Tensor) -> Tensor:
        return functional.convnn(x, x, x, x.shape[1])

    x = torch.randn(N, C)
    assert torch.equal(torch.jit.trace(model, (x,))(x), model(x))


@pytest.mark.parametrize("has_mask", [False, True])
def test_a_learned_temperature(has_mask: bool) -> None:
    """The recipe of the documentation: the gradient is that of finite differences."""
    x = torch.randn(N, C, dtype=torch.float64)
    weight = torch.randn(C, 1, K, dtype=torch.float64)
    mask = torch.tensor([True] * 2 + [False] * (N - 2)) if has_mask else None
    similarities, indices = functional.select_neighbors(x, x, K, key_mask=mask)
    missing = similarities == -torch.inf
    assert missing.any() == has_mask

    def output(temperature: Tensor) -> Tensor:
        scaled = similarities.masked_fill(missing, 0) * temperature
        return functional.aggregate_neighbors(
            x, scaled.masked_fill(missing, -torch.inf), indices, weight
        )

    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    expected = functional.convnn(x, x, x, K, weight, key_mask=mask, scale=2.0)
    torch.testing.assert_close(output(temperature), expected)
    assert torch.autograd.gradcheck(output, temperature)


def test_literals_are_what_the_operators_take() -> None:
    assert get_args(functional.Metric) == checks.METRICS
    assert get_args(functional.Rho) == checks.RHOS
    assert get_args(functional.Order) == checks.ORDERS


SIGNED = [
    functional.convnn,
    functional.select_neighbors,
    functional.aggregate_neighbors,
    *(cnn.ConvNN1d, cnn.ConvNN2d, cnn.ConvNNAttention, cnn.HybridBranch2d),
]


@pytest.mark.parametrize("function", SIGNED, ids=lambda function: function.__name__)
def test_signatures_have_the_literals(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    for name, kind in (
        ("metric", functional.Metric),
        ("rho", functional.Rho),
        ("order", functional.Order),
    ):
        assert name not in parameters or parameters[name].annotation == kind


# edge_index


def expected_edges(
    indices: Tensor, similarities: Tensor, num_keys: int | None = None
) -> list[list[int]]:
    """Pairs of source and target, one by one."""
    rows, k = indices.shape[-2:]
    keys = rows if num_keys is None else num_keys
    edges = []
    flat = (
        each.flatten(0, -3) if each.dim() > 2 else each[None] for each in (indices, similarities)
    )
    for batch, (found, near) in enumerate(zip(*flat, strict=True)):
        for i in range(rows):
            for j in range(k):
                if near[i, j] != -torch.inf:
                    edges.append([batch * keys + int(found[i, j]), batch * rows + i])
    return edges


def neighbors(lead: Sequence[int], rows: int, keys: int, k: int) -> tuple[Tensor, Tensor]:
    """Indices and similarities, with missing neighbors."""
    query, key = torch.randn(*lead, rows, 2), torch.randn(*lead, keys, 2)
    mask = torch.rand(*lead, keys) < 0.5
    similarities, indices = functional.select_neighbors(query, key, k, key_mask=mask)
    return indices, similarities


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize(
    ("rows", "keys", "num_keys"), [(6, 6, None), (6, 6, 6), (4, 7, 7), (7, 4, 4), (0, 5, 5)]
)
def test_edges(lead: Sequence[int], rows: int, keys: int, num_keys: int | None) -> None:
    indices, similarities = neighbors(lead, rows, keys, 4)
    edges = functional.edge_index(indices, similarities, num_keys)
    assert edges.dtype == torch.int64
    assert edges.shape[0] == 2
    assert edges.T.tolist() == expected_edges(indices, similarities, num_keys)


def test_missing_neighbors_give_no_edge() -> None:
    """The case of the faults: a mask leaves 3 of k = 5, and the missing ones name row 0."""
    x = torch.randn(6, 3)
    mask = torch.tensor([False, True, True, True, False, False])
    similarities, indices = functional.select_neighbors(x, x, 5, key_mask=mask)
    assert (indices == 0).sum() == 12
    source, target = functional.edge_index(indices, similarities)
    assert sorted(set(source.tolist())) == [1, 2, 3]
    assert target.tolist() == [i for i in range(6) for _ in range(3)]


def test_edges_and_similarities_have_one_order() -> None:
    indices, similarities = neighbors((2,), 6, 6, 4)
    weights = similarities[similarities != -torch.inf]
    source, target = functional.edge_index(indices, similarities)
    assert len(weights) == len(source)
    for s, t, weight in zip(source.tolist(), target.tolist(), weights, strict=True):
        batch, i = divmod(t, 6)
        place = indices[batch, i].tolist().index(s - 6 * batch)
        while similarities[batch, i, place] == -torch.inf:  # a missing one may come first
            place = indices[batch, i].tolist().index(s - 6 * batch, place + 1)
        assert similarities[batch, i, place] == weight


def test_nan_is_a_neighbor() -> None:
    indices = torch.tensor([[1, 0], [0, 0]])
    similarities = torch.tensor([[float("nan"), -torch.inf], [torch.inf, -torch.inf]])
    assert functional.edge_index(indices, similarities).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_edges_of_converted_similarities(dtype: torch.dtype) -> None:
    indices, similarities = neighbors((2,), 6, 6, 4)
    expected = functional.edge_index(indices, similarities)
    assert torch.equal(functional.edge_index(indices, similarities.to(dtype)), expected)


def test_edges_without_gradient() -> None:
    x = torch.randn(6, 3, requires_grad=True)
    similarities, indices = functional.select_neighbors(x, x, 2)
    assert not functional.edge_index(indices, similarities).requires_grad

    def loss(x: Tensor) -> Tensor:
        similarities, indices = functional.select_neighbors(x, x, 2)
        source, target = functional.edge_index(indices, similarities)
        return (x[source] * x[target]).sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    assert torch.equal(torch.func.grad(loss)(x.detach()), expected)


def test_a_ragged_batch() -> None:
    """The recipe of docs/graphs.md: edges among the points of each cloud, without padding."""
    sizes = (5, 2, 7)
    clouds = [torch.randint(100, (size, 3)).float() for size in sizes]
    points = nn.utils.rnn.pad_sequence(clouds, batch_first=True)  # [3, 7, 3]
    mask = torch.arange(7) < torch.tensor(sizes).unsqueeze(1)  # [3, 7]
    similarities, indices = functional.select_neighbors(
        points, points, 4, key_mask=mask, metric="euclidean"
    )
    similarities = similarities.masked_fill(~mask.unsqueeze(-1), -torch.inf)
    edges = functional.edge_index(indices, similarities)
    edges = (mask.flatten().cumsum(0) - 1)[edges]
    start, expected = 0, []
    for cloud in clouds:
        k = min(4, len(cloud))
        near, found = functional.select_neighbors(cloud, cloud, k, metric="euclidean")
        expected.append(functional.edge_index(found, near) + start)
        start += len(cloud)
    assert torch.equal(edges, torch.cat(expected, 1))


@pytest.mark.parametrize("num_keys", [None, 9])
def test_edges_under_compile_and_export(num_keys: int | None) -> None:
    class Model(nn.Module):
        def forward(self, indices: Tensor, similarities: Tensor) -> Tensor:
            return functional.edge_index(indices, similarities, num_keys) * 2

    args = neighbors((2,), 6, 6, 4)
    expected = Model()(*args)
    assert torch.equal(torch.compile(Model(), backend="eager")(*args), expected)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        whole = torch.compile(Model(), backend="eager", fullgraph=True)
        assert torch.equal(whole(*args), expected)
    rows = torch.export.Dim("rows", min=2, max=100)
    program = torch.export.export(Model(), args, dynamic_shapes=({1: rows}, {1: rows}))
    assert torch.equal(program.module()(*args), expected)
    other = neighbors((2,), 8, 8, 4)
    assert torch.equal(program.module()(*other), Model()(*other))


INDICES, SIMILARITIES = torch.randint(5, (2, 5, 3)), torch.randn(2, 5, 3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((None, SIMILARITIES), TypeError, "indices must be a tensor, got None"),
        (
            (INDICES, SIMILARITIES.numpy()),
            TypeError,
            "similarities must be a tensor, got numpy.ndarray (torch.from_numpy converts it)",
        ),
        ((SIMILARITIES, INDICES), RuntimeError, "indices must be int64, got the similarities"),
        (
            (INDICES, INDICES),
            RuntimeError,
            "similarities must be float64, float32, float16 or bfloat16, got int64",
        ),
        (
            (INDICES[0, 0], SIMILARITIES[0, 0]),
            RuntimeError,
            "indices must have at least 2 dimensions [..., N, k], got shape [3]",
        ),
        (
            (INDICES, SIMILARITIES[0]),
            RuntimeError,
            "similarities must have the shape [2, 5, 3] of indices, got shape [5, 3]",
        ),
        (
            (INDICES, SIMILARITIES.to("meta")),
            RuntimeError,
            "similarities must be on cpu as indices is, got meta",
        ),
        (
            (INDICES + 1, SIMILARITIES),
            RuntimeError,
            "indices must be in [0, 5), got 5; num_keys, the number of keys of each batch element, "
            "is by default the number of queries, 5",
        ),
        (
            (INDICES[0] * 0 + 4, SIMILARITIES[0], 4),
            RuntimeError,
            "indices must be in [0, 4), got 4",
        ),
        ((INDICES - 9, SIMILARITIES, 7), RuntimeError, "indices must be in [0, 7), got -"),
        ((INDICES, SIMILARITIES, -1), RuntimeError, "num_keys must be at least 0, got -1"),
        (
            (INDICES, SIMILARITIES, 2**62),
            RuntimeError,
            f"num_keys must be below 2**63 / 2, got {2**62}",
        ),
        ((INDICES, SIMILARITIES, 2.0), TypeError, "num_keys must be a whole number, got 2.0"),
        ((INDICES, SIMILARITIES, True), TypeError, "num_keys must be a whole number, got True"),
        (
            (INDICES, SIMILARITIES, torch.tensor(5)),
            TypeError,
            "num_keys must be a whole number, got a tensor (num_keys.item() reads its number)",
        ),
    ],
)
def test_wrong_calls_of_edge_index(args: Any, error: type[Exception], message: str) -> None:
    if message.startswith("indices must be in [0, 5)"):
        args[0][0, 0, 0] = 5
    with pytest.raises(error) as raised:
        functional.edge_index(*args)
    assert str(raised.value).startswith(f"edge_index: {message}")


def test_edge_index_takes_whole_numbers_of_numpy() -> None:
    edges = functional.edge_index(INDICES, SIMILARITIES, np.int32(7))
    assert torch.equal(edges, functional.edge_index(INDICES, SIMILARITIES, 7))


def test_one_graph_needs_no_number_of_keys() -> None:
    """Without batch elements before it, a graph numbers its keys as they are."""
    indices, similarities = neighbors((), 4, 9, 3)
    expected = functional.edge_index(indices, similarities, 9)
    assert torch.equal(functional.edge_index(indices, similarities), expected)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
def test_vmap_of_edge_index(in_dims: tuple[int | None, int | None]) -> None:
    args = [
        x if dim == 0 else x[0] for x, dim in zip((INDICES, SIMILARITIES), in_dims, strict=True)
    ]
    with pytest.raises(RuntimeError) as error:
        torch.vmap(functional.edge_index, in_dims)(*args)
    assert str(error.value) == (
        "edge_index: vmap cannot run it, because the number of edges depends on the data; call it "
        "on the whole batch, whose leading dimensions it numbers consecutively"
    )


def test_edges_of_swapped_arguments() -> None:
    similarities, indices = functional.select_neighbors(torch.randn(5, 3), torch.randn(5, 3), 2)
    with pytest.raises(RuntimeError, match="indices must be int64, got the similarities: select"):
        functional.edge_index(similarities, indices)


HUGE = 10**5000  # of more digits than Python prints


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("convnn: k", lambda n: functional.convnn(*[torch.randn(5, 4)] * 3, n)),
        ("select_neighbors: k", lambda n: functional.select_neighbors(*[torch.randn(5, 4)] * 2, n)),
        (
            "edge_index: num_keys",
            lambda n: functional.edge_index(
                torch.zeros(5, 3).long(), torch.zeros(5, 3), num_keys=n
            ),
        ),
        ("window_ranges: N", lambda n: functional.window_ranges(n)),
        ("window_ranges: M", lambda n: functional.window_ranges(3, n)),
        ("segment_ranges: lengths[0]", lambda n: functional.segment_ranges([n])),
    ],
)
def test_numbers_that_python_does_not_print(
    name: str, call: Callable[[int], Any], sign: int
) -> None:
    expected = "(below|at most) 2" if sign > 0 else "at least [01]"
    pattern = rf"^{re.escape(name)} must be {expected}.*, got a number of 16610 bits$"
    with pytest.raises(RuntimeError, match=pattern):
        call(sign * HUGE)
