# SPDX-License-Identifier: MIT
"""The table of compiled Triton kernels: up to date, complete, and without what would be slow.

Reading it needs no Triton. That offsets have 64 bits is also read from Triton's representation of
each kernel as it is now, with every widening taken away once.
"""

import functools
import importlib
import importlib.util
import itertools
import math
import os
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from allocations import Live
from test_peak import SHAPES, WORKSPACE, Shape

from tools import aot_table
from tools.aot_table import ARCHITECTURES, RESULTS, VERSIONS, Row, Table

DTYPES = ("float16", "bfloat16", "float32")


@cache
def table(version: str) -> Table:
    return aot_table.read(RESULTS / f"triton-{version}.json")


@pytest.mark.parametrize("version", VERSIONS)
def test_no_kernel_has_changed_since_it_was_compiled(version: str) -> None:
    """If this fails: `make aot`."""
    assert table(version)["sources"] == aot_table.source_hashes()


CHANGES = {
    "order.py": ("0x7FFFFFFE", "0x7FFFFFFD"),
    "configs.py": ("WORKSPACE = 2**26", "WORKSPACE = 2**25"),
    "query_side.py": ("-2.0 * b_ds", "-4.0 * b_ds"),
    # Host code, a docstring and a comment.
    "select_small.py": ("Q = search.Q", "layout = search.Q"),
    "norms.py": ("Norms of the rows", "All norms of the rows"),
    "integers.py": ("", "# A comment.\n"),
}


@pytest.mark.parametrize("file", CHANGES)
def test_a_change_is_noticed(file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    change = CHANGES[file]
    before = aot_table.source_hashes()
    shutil.copytree(aot_table.KERNELS, tmp_path / "kernels")
    monkeypatch.setattr(aot_table, "KERNELS", tmp_path / "kernels")
    assert aot_table.source_hashes() == before
    path = tmp_path / "kernels" / file
    path.write_text(f"{path.read_text().replace(change[0], change[1], 1)}\n# a comment\n")
    changed = {name for name, digest in aot_table.source_hashes().items() if digest != before[name]}
    expected = {
        "order.py": {
            "finish_kernel",
            "exact_topk_kernel",
            "select_medium_kernel",
            "select_network_kernel",
            "select_small_kernel",
        },
        "configs.py": {"configs"},
        "query_side.py": {"query_side_kernel"},
    }.get(file, set())
    assert changed == expected


SELECT_OF_FEW = {"select_medium_kernel", "select_network_kernel", "select_small_kernel"}
OF_16_BITS = {
    "select_medium_kernel",
    "select_small_kernel",
    "value_grad_one_hot_kernel",
    "query_side_small_kernel",
    "key_side_small_kernel",
    "search_grad_small_kernel",
}
OF_FEW_CANDIDATES = {
    "query_side_candidates_kernel",
    "key_side_candidates_kernel",
    "sum_parts_kernel",
}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_kernel_is_there(version: str) -> None:
    """A table may lack launches, and its summary in the documentation says how many it has."""
    assert len(table(version)["rows"]) <= table(version)["launches"]
    kernels = set(aot_table.source_hashes()) - {"configs"}
    for arch in ARCHITECTURES:
        for dtype in DTYPES:
            rows = [row for row in table(version)["rows"] if row["arch"] == arch]
            found = {row["kernel"] for row in rows if dtype in row["dtype"].split("+")}
            allowed = OF_16_BITS if dtype == "float32" else set()
            if arch < 90:
                allowed = allowed | {"select_medium_kernel"}
            if (arch, dtype) != (90, "bfloat16"):
                allowed = allowed | OF_FEW_CANDIDATES
            if dtype == "float32" and arch >= 100:
                allowed = allowed | {"select_network_kernel"}
            assert kernels - found <= allowed


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_is_wrong(version: str) -> None:
    """No spills in loops, no more stack or shared memory than allowed, offsets of 64 bits."""
    rows = table(version)["rows"]
    assert len(rows) > 100
    wrong = {
        (row["kernel"], row["arch"], row["dtype"], *aot_table.faults(row))
        for row in rows
        if aot_table.faults(row)
    }
    assert not wrong


FINE = {
    "arch": 90,
    "stack": 64,
    "shared": 227 * 1024,
    "spills_in_main_loop": 0,
    "narrow_offsets": 0,
    "error": None,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack": 72}, "72 bytes of stack"),
        ({"spills_in_main_loop": 1}, "1 spills in the main loop"),
        ({"arch": 80}, "232448 bytes of shared memory"),
        ({"narrow_offsets": 2}, "2 offsets in 32 bits"),
        ({"error": "it crashed"}, "it crashed"),
    ],
)
def test_a_fault_is_seen(change: Row, said: str) -> None:
    assert aot_table.faults(FINE) == []
    assert aot_table.faults({**FINE, **change}) == [said]


def settings(row: Row) -> dict[str, str]:
    return dict(item.split("=") for item in row["configuration"].split())


def needs_wgmma(row: Row) -> bool:
    """Whether the main loop of a kernel on sm_90 multiplies matrices that are large enough."""
    values = settings(row)
    if row["kernel"] in SELECT_OF_FEW:
        return int(values["BLOCK_N"]) >= 64
    if row["kernel"] == "weight_grad_dense_kernel":
        return int(values["BLOCK_C"]) >= 64
    if row["kernel"] == "rho_grad_dense_kernel" and values.get("C") == values.get("O") == "1":
        return False  # a loop of one turn is none
    return row["kernel"] in (
        "aggregate_dense_kernel",
        "rho_grad_dense_kernel",
        "value_grad_dense_kernel",
        "value_grad_one_hot_kernel",
        "threshold_kernel",
        "sweep_kernel",
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_main_loops_use_wgmma(version: str) -> None:
    rows = [row for row in table(version)["rows"] if row["arch"] == 90 and needs_wgmma(row)]
    for dtype in DTYPES:
        assert {row["kernel"] for row in rows if row["dtype"] == dtype} >= {
            "threshold_kernel",
            "sweep_kernel",
            "aggregate_dense_kernel",
            "rho_grad_dense_kernel",
            "value_grad_dense_kernel",
            "weight_grad_dense_kernel",
        }
    # What multiplies rows where they are (row_products.py, convolve.py) is for one warp.
    allowed = {"select_network_kernel": {"HGMMA", "HGMMA+HMMA"}}
    assert not [
        row for row in rows if row["matrix_in_loop"] not in allowed.get(row["kernel"], {"HGMMA"})
    ]


def test_machine_code() -> None:
    """A loop with a matrix instruction in another loop, a spill there, and the endless last one."""
    names = [
        "MOV R1, c[0x0][0x28]",
        "LDL R2, [R1]",
        "HMMA.16816.F32 R4, R8, R6, R4",
        "IADD3 R0, R0",
    ]
    names += ["@P0 BRA 0x20", "STL [R1], R2", "@!P1 BRA 0x10", "HMMA.16816.F32 R4", "EXIT"]
    names += ["BRA 0x90"]
    sass = "".join(
        f"        /*{16 * i:04x}*/   {text} ;  /* 0x00 */\n" for i, text in enumerate(names)
    )
    assert aot_table.machine_code(sass) == {
        "matrix": "HMMA",
        "matrix_in_loop": "HMMA",
        "main_loop": 3,
        "spills_in_main_loop": 0,
    }
    assert aot_table.machine_code(sass.replace("HMMA", "FFMA"))["main_loop"] == 3
    assert aot_table.machine_code(sass.replace("IADD3 R0", "LDL R0"))["spills_in_main_loop"] == 1


def test_the_documentation_has_the_summary() -> None:
    """If this fails: `python -m tools.aot_table`."""
    assert aot_table.summary(map(table, VERSIONS)) in aot_table.DOCUMENT.read_text()


def needs_compiler(test: Any) -> Any:
    missing = importlib.util.find_spec("triton") is None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    reason = "needs Triton, not its interpreter"
    return pytest.mark.slow(pytest.mark.skipif(missing or interpreted, reason=reason)(test))


def launches() -> dict[str, Any]:
    """One launch of each kernel."""
    from tools import aot

    plain = {"N": 4096, "D": 48, "C": 48, "O": 40, "k": 9, "masked": True}
    options = [
        {**plain, "weight": "dense", "candidates": True, "with_self": True},
        {**plain, "weight": "depthwise", "metric": "euclidean"},
        {**plain, "N": 200, "weight": "none", "candidates": True},
        {**plain, "N": 200, "weight": "dense"},
        {**plain, "N": 200, "weight": "depthwise", "candidates": True, "R": 20, "lead": (32,)},
        {**plain, "N": 300, "weight": "none"},
        {**plain, "N": 1024, "D": 16, "weight": "dense", "lead": (64,)},
    ]
    calls = [functools.partial(aot.run_both_ways, **each) for each in options]
    found: dict[str, Any] = {}
    # The 16 bits of which `norms_kernel` stores scaled rows.
    for launch in aot.record(90, torch.bfloat16, calls):
        found.setdefault(launch["kernel"], launch)
    return found


def wanted(architectures: tuple[int, ...], quick: bool) -> set[tuple[int, str, str]]:
    """Architecture, fingerprint and dtypes of each launch that `make aot` would compile now: what
    the host side and configs.py choose, but for grids. Nothing is compiled."""
    from tools import aot

    jobs = aot.jobs(architectures, aot.DTYPES, quick, only="")
    return {(arch, aot._fingerprint(launch), dtypes) for launch, arch, dtypes in jobs}


@needs_compiler
def test_launches_are_those_of_the_tables() -> None:
    """If this fails: `make aot`. The sources of the kernels need not have changed for it."""
    now = wanted(ARCHITECTURES, quick=False)
    for version in VERSIONS:
        rows = [(row["arch"], row["launch"], row["dtype"]) for row in table(version)["rows"]]
        assert len(rows) == len(set(rows))
        assert set(rows) <= now, version
        assert table(version)["launches"] == len(now), version


@needs_compiler
def test_a_run_for_one_kernel_counts_all_launches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tools import aot

    launches = [
        ({"kernel": name, "constants": {}}, 90, "float32")
        for name in ("norms_kernel", "columns_kernel")
    ]
    monkeypatch.setattr(
        aot, "jobs", lambda *call: [job for job in launches if call[3] in job[0]["kernel"]]
    )
    monkeypatch.setattr(aot, "compile_launch", lambda *_: {"error": "not compiled"})
    monkeypatch.setattr(
        aot.concurrent.futures, "ProcessPoolExecutor", aot.concurrent.futures.ThreadPoolExecutor
    )
    monkeypatch.setattr(aot_table, "RESULTS", tmp_path)
    for arguments, rows in (["--only", "norms"], 1), ([], 2), (["--only", "norms"], 2):
        monkeypatch.setattr("sys.argv", ["aot", "--write", *arguments])
        aot.main()
        (written,) = map(aot_table.read, tmp_path.glob("triton-*.json"))
        assert (written["launches"], len(written["rows"])) == (2, rows)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "option"),
    [("exact_topk", "maxnreg"), ("finish", "BLOCK_C"), ("query_side", "num_warps")],
)
def test_another_tile_is_noticed(name: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from convnn_kernels.triton import configs

    before, chosen = wanted((90,), quick=True), getattr(configs, name)
    monkeypatch.setattr(
        configs, name, lambda *sizes: (tile := chosen(*sizes)) | {option: 2 * tile[option]}
    )
    assert wanted((90,), quick=True) != before


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
# Sizes of one class each: hits of columns that are not divided, or are; all in one launch, all
# columns, and passes over them.
CLASSES = {
    "sweep": {"M": (513, 640, 701), "k": (9, 12, 16), "metric": "euclidean"},
    "sweep_of_parts": {"M": (2101, 2500, 3001), "k": (9, 10, 11)},
    "one_launch": {"M": (257, 400, 511), "k": (9, 12, 16)},
    "all_columns": {"M": (130, 192, 255), "k": (17, 24, 32), "metric": "euclidean"},
    "passes": {"M": (513, 576, 701), "k": (257, 300, 304), "order": "index"},
}
BATCHES: list[tuple[int, ...]] = [(), (1,), (2,), (5,), (1, 1), (2, 3), (16, 1), (3, 16)]
EXTRAS = [{}, {"masked": True}, {"candidates": True, "masked": True}, {"with_self": True}]


def compiled(dtype: Any, **options: Any) -> set[str]:
    from tools import aot

    call = functools.partial(aot.run_both_ways, **options)
    return {aot._fingerprint(launch) for launch in aot.record(90, dtype, [call])}


@pytest.mark.quick_one_in(7)
@needs_triton
@pytest.mark.parametrize("extra", EXTRAS, ids="-".join)
@pytest.mark.parametrize("weight", ["none", "depthwise", "dense"])
@pytest.mark.parametrize("D", [64, 40, 3])
@pytest.mark.parametrize("sizes", CLASSES)
def test_other_sizes_compile_nothing_new(
    sizes: str, D: int, weight: str, extra: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled depends on channels; not on N, M, the batch, heads, or k within a tile.

    Queries of the backward are not divided: with parts, the key side is another variant.
    """
    from convnn_kernels.triton import configs

    monkeypatch.setattr(configs, "allowed_backward", lambda *_: 2**62)
    options = {**CLASSES[sizes], "D": D, "C": D, "O": D, "weight": weight, **extra}
    rows, neighbors = options.pop("M"), options.pop("k")
    for dtype in (torch.float16, torch.float32):
        expected = compiled(dtype, **options, N=200, M=rows[0], k=neighbors[0])
        assert len(expected) > 5
        for i, lead in enumerate(BATCHES):
            changed = {"N": (64, 197, 200, 256)[i % 4], "M": rows[i % 3], "k": neighbors[i // 3]}
            assert compiled(dtype, **options, **changed, lead=lead) == expected, (dtype, changed)


@needs_triton
def test_an_alignment_depends_on_channels_only() -> None:
    """However rows are laid out: heads before rows or after, one of them or many."""
    from convnn_kernels.triton.tensors import alignment, rows_of

    for D in (1, 3, 8, 16, 40, 64):
        found = set()
        for B, heads, N in itertools.product((1, 2, 3, 16), (1, 2, 3, 16), (1, 2, 15, 16)):
            apart = torch.empty(B, heads, N, D)
            together = torch.empty(B, N, heads, D).transpose(1, 2)
            rows = torch.empty(N, B, heads, D).permute(1, 2, 0, 3)
            fused = torch.empty(B, N, 3, heads, D)[:, :, 1].transpose(1, 2)
            shared = torch.empty(B, 1, N, D).expand(B, heads, N, D)
            # A stride of a dimension of one may be anything.
            strides = [step if apart.shape[i] > 1 else 1 for i, step in enumerate(apart.stride())]
            odd = apart.as_strided(apart.shape, strides)
            for X in (apart, together, rows, fused, shared, odd):
                found.add(alignment(rows_of(X)[1]))
        assert found == {16 if D % 16 == 0 else 1}


@needs_triton
def test_rows_with_channels_apart_are_copied() -> None:
    from convnn_kernels.triton.tensors import rows_of

    X = torch.randn(2, 3, 8, 5).mT
    copy, layout = rows_of(X)
    assert torch.equal(copy, X)
    assert copy.stride(-1) == 1
    assert layout == (2, 3, 5, 8, *copy.stride()[:3])
    bank = torch.randn(8, 5).mT.expand(2, 3, 5, 8)
    copy, layout = rows_of(bank)
    assert torch.equal(copy, bank)
    assert layout == (2, 3, 5, 8, 0, 0, 8)
    assert copy.untyped_storage().nbytes() == 4 * 5 * 8
    for same in (torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(8, 1).expand(2, 3, 8, 1)):
        assert rows_of(same)[0].data_ptr() == same.data_ptr()


@needs_triton
@pytest.mark.parametrize(
    "shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0), (0, 2, 3, 5, 8), (0, 8), (5, 0)]
)
def test_an_empty_tensor_is_laid_out_as_any_other(shape: tuple[int, ...]) -> None:
    """Though a copy of it keeps strides that rows cannot have."""
    from convnn_kernels.triton.tensors import rows_of

    X, odd = torch.empty(shape), torch.empty_strided(shape, [7] * len(shape))
    assert odd.contiguous().stride(-1) == 7
    assert rows_of(odd)[1] == rows_of(X)[1]
    assert rows_of(X)[1].B * rows_of(X)[1].N * rows_of(X)[1].D == 0


@needs_triton
def test_batch_elements_are_not_folded_beyond_the_rows_that_kernels_count() -> None:
    from convnn_kernels.triton.search import prepare

    for B, N in ((30_000, 30_000 * 32_768), (40_000, 32_768)):
        query = torch.empty(B, 32_768, 1, device="meta")
        key = torch.empty(9, 1, device="meta").expand(B, 9, 1)
        search, _ = prepare(query, key, 2, None, None, None, "dot", "similarity")
        assert search.Q.N == N


@needs_triton
@pytest.mark.parametrize(
    "shape", [(5, 8), (2, 5, 8), (2, 3, 5, 8), (2, 3, 4, 5, 8), (2, 1, 3, 1, 5, 8)]
)
def test_a_layout_reaches_every_row(shape: tuple[int, ...]) -> None:
    """Also of a tensor whose rows come before its batch in memory, and of one that is expanded."""
    from convnn_kernels.triton.tensors import rows_of

    X = torch.arange(math.prod(shape)).view(shape)
    apart = X.movedim(-2, 0).contiguous().movedim(0, -2)
    for Y in (X, apart, X[:1].expand(shape)):
        data, (B1, B2, N, D, b1, b2, n) = rows_of(Y)
        found = data.as_strided((B1, B2, N, D), (b1, b2, n, 1), data.storage_offset())
        assert torch.equal(found.reshape(shape), Y)


@needs_triton
@pytest.mark.parametrize(
    ("D", "arch", "tf32", "precision"),
    [
        (32, 90, False, "split"),
        (31, 90, False, None),
        (32, 100, False, None),
        (3, 100, True, "tf32"),
    ],
)
def test_where_few_columns_of_float32_take_one_launch(
    D: int, arch: int, tf32: bool, precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convnn_kernels.triton import hardware
    from tools import aot

    monkeypatch.setattr(hardware, "allows_tf32", lambda: tf32)
    options = {"N": 197, "D": D, "C": 48, "O": 8, "k": 9, "weight": "depthwise"}
    launches = aot.record(arch, torch.float32, [functools.partial(aot.run_both_ways, **options)])
    of = {launch["kernel"]: launch["constants"] for launch in launches}
    assert of.get("select_network_kernel", {}).get("PRECISION") == precision
    for other in ("norms_kernel", "exact_topk_kernel", "aggregate_depthwise_kernel"):
        assert (other in of) == (precision is None)


@needs_triton
@pytest.mark.parametrize(
    ("metric", "D", "small"),
    [("dot", 15, False), ("dot", 16, True), ("cosine", 3, True), ("euclidean", 64, False)],
)
@pytest.mark.parametrize(("N", "kernel"), [(197, "select_network"), (257, "select_small")])
def test_which_sums_of_tensor_cores_are_returned(
    N: int, kernel: str, metric: str, D: int, small: bool
) -> None:
    """Not those of `dot` over few columns, for which the certificate is stricter."""
    from tools import aot

    options = {"N": N, "D": D, "C": 8, "O": 8, "k": 9, "weight": "none", "metric": metric}
    launches = aot.record(90, torch.float16, [functools.partial(aot.run_both_ways, **options)])
    names = {launch["kernel"] for launch in launches}
    assert (f"{kernel}_kernel" in names, "exact_topk_kernel" in names) == (small, not small)


@needs_triton
@pytest.mark.parametrize(
    ("other", "one_launch"),
    [
        ({}, True),
        ({"masked": True}, True),
        ({"N": 257}, True),
        ({"N": 1024, "M": 1156}, True),
        ({"N": 1281}, False),
        ({"D": 17}, False),
        ({"lead": (31,)}, False),
        ({"lead": (300,), "N": 127, "M": 1024}, False),
        ({"with_self": True}, False),
        ({"candidates": True}, False),
        ({"metric": "dot"}, False),
        ({"k": 16}, False),
    ],
)
def test_a_layer_of_an_image_takes_three_launches(other: dict[str, Any], one_launch: bool) -> None:
    """The first one of VGG-11: select, what is multiplied, and the convolution."""
    from tools import aot

    layer = {"N": 1024, "D": 3, "C": 3, "O": 64, "k": 9, "lead": (256,)}
    options = {**layer, "weight": "dense", "rho": "ones", "itself": True, **other}
    options["itself"] &= "M" not in other
    found: list[Any] = []
    record = functools.partial(aot.run_both_ways, **options)
    with mock.patch.object(aot, "_variant", lambda launch, pointers: found.append(launch)):
        aot.record(90, torch.bfloat16, [record])
    names = [launch.kernel.name for launch in found]
    forward = names[: names.index("aggregate_dense_kernel") + 1]
    assert forward[-2:] == ["dense_inputs_kernel", "aggregate_dense_kernel"]
    assert (forward[:-2] == ["select_medium_kernel"]) == one_launch


# More neighbors than channels: one large batch element, and many small ones.
MANY = [
    Shape(1, 65536, 65536, 64, 300, torch.bfloat16),
    Shape(64, 1000, 1000, 64, 300, torch.float16),
    Shape(1000, 200, 200, 64, 150, torch.bfloat16),
    Shape(2000, 100, 300, 64, 100, torch.float32),
    Shape(1, 16384, 100_000, 32, 300, torch.bfloat16),
    # Windows of which every token has all others.
    Shape(8192, 49, 49, 32, 49, torch.float16),
    Shape(20_000, 16, 16, 8, 16, torch.bfloat16),
    Shape(3000, 17, 200, 16, 200, torch.float32),
]


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_value", [False, True], ids=["select", "forward"])
def test_memory_of_a_forward(shape: Shape, has_value: bool) -> None:
    """No more than the contract allows, but for what is given and returned."""
    from tools import aot

    B, N, M, C, k, dtype = shape.B, shape.N, shape.M, shape.C, shape.k, shape.dtype
    bound = 8 * B * (N * k + N * C + M * C * (1 + has_value)) + WORKSPACE

    def run(_: torch.dtype) -> None:
        with torch.device("meta"):
            query, key, value = (torch.empty(B, n, C, dtype=dtype) for n in (N, M, M))
            W = torch.empty(C, 1 if shape.weight == "depthwise" else C, k, dtype=dtype)
        no_columns, softmax = (None, None, None, "cosine"), ("softmax", 1.0)
        with Live() as live:
            if has_value:
                of_value = (query, key, value, k, W, None, *no_columns, *softmax, "similarity")
                results = aot.operator("forward")(*of_value)
            else:
                results = aot.operator("select")(query, key, k, *no_columns, "similarity")
        taken = live.peak - sum(X.untyped_storage().nbytes() for X in results)
        assert taken <= bound, f"{taken / bound:.2f} of the bound"

    aot.record(90, dtype, [run])


@needs_triton
@pytest.mark.parametrize("shape", [*SHAPES, *MANY], ids=str)
def test_memory_of_a_backward(shape: Shape) -> None:
    """No more than the contract allows, but for what is given and returned."""
    from tools import aot

    B, N, M, C, k, dtype = shape.B, shape.N, shape.M, shape.C, shape.k, shape.dtype
    bound = 8 * B * (N * k + N * C + M * 2 * C) + WORKSPACE
    with torch.device("meta"):
        query, key, value, Y = (torch.empty(B, n, C, dtype=dtype) for n in (N, M, M, N))
        W = torch.empty(C, 1 if shape.weight == "depthwise" else C, k, dtype=dtype)
        s, I = torch.empty(B, N, k), torch.empty(B, N, k, dtype=torch.int64)

    def above(run: Callable[[], tuple[torch.Tensor, ...]]) -> int:
        with Live() as live:
            results = run()
        return live.peak - sum(X.untyped_storage().nbytes() for X in results)

    options = ("softmax", 1.0)
    calls = {
        "aggregate_backward": (Y, value, s, I, W, True, *options, *[True] * 4),
        "select_backward": (s, query, key, s, I, "cosine", True, True),
        "forward_backward": (
            *(Y, s, query, key, value, W, s, I, True, "cosine", *options),
            *[True] * 5,
        ),
    }

    def run(_: torch.dtype) -> None:
        for name, arguments in calls.items():
            taken = above(lambda name=name, args=arguments: aot.operator(name)(*args))
            assert taken <= bound, f"{name}: {taken / (B * N * k):.1f} bytes a pair"

    aot.record(90, dtype, [run])


@needs_compiler
def test_offsets_have_64_bits() -> None:
    from tools import aot

    found = launches()
    assert set(found) == set(aot.kernels())
    for name, launch in found.items():
        text = aot.intermediate(launch, 90)
        assert text.count("tt.addptr") > 2
        assert aot.narrow_offsets(text) == [], name


# Where a program's number meets 64 bits, those of a number of tiles or chunks, before any product.
WIDE_ANYWAY = {"columns_kernel", "value_grad_chunks_kernel"}


@needs_compiler
def test_a_cast_that_is_left_out_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every widening of a program's number, of a quotient and of a range, one after the other."""
    from tools import aot

    found = launches()
    monkeypatch.syspath_prepend(tmp_path)
    casts = re.compile(r"(tl\.program_id\(0\)|\(\w+ // \w+\)|\bb)\.to\(tl\.int64\)")
    ranges = re.compile(r"(tl\.arange\(0, BLOCK_[CDO]\))\.to\(tl\.int64\)")
    tried = 0
    for path in sorted(aot_table.KERNELS.glob("*.py")):
        source = path.read_text()
        for pattern, new in ((casts, r"\1"), (ranges, r"\1")):
            for match in pattern.finditer(source):
                names = re.findall(r"def (\w+_kernel)\(", source[: match.start()])
                if not names:
                    continue
                package = f"mutated_{tried}"
                shutil.copytree(aot_table.KERNELS, tmp_path / package)
                mutated = source[: match.start()] + match.expand(new) + source[match.end() :]
                (tmp_path / package / path.name).write_text(mutated)
                kernel = getattr(importlib.import_module(f"{package}.{path.stem}"), names[-1])
                monkeypatch.setattr(
                    aot, "kernels", lambda kernel=kernel, name=names[-1]: {name: kernel}
                )
                text = aot.intermediate(found[names[-1]], 90)
                is_seen = bool(aot.narrow_offsets(text))
                expected = "program_id" not in match[0] or names[-1] not in WIDE_ANYWAY
                assert is_seen == expected, f"{path.name}: {match[0]} of {names[-1]}"
                tried += 1
    assert tried > 20
