# SPDX-License-Identifier: MIT
"""tools.predict_cuda and what it takes: launches, machine code, expectations, simulated hits."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="no Triton here")
pytest.importorskip("skimage", reason="the benchmarks need scikit-image: pip install .[bench]")

from benchmarks.workloads import Workload
from tools import cuda_code, cuda_figures, cuda_hits, predict, predict_cuda, sass
from tools.expected_cuda import EXPECTED, Expected, _turns, in_waves


@pytest.mark.parametrize(
    ("signature", "instance", "arguments"),
    [
        ("convnn::cuda::a_kernel(long)", "convnn::cuda::a_kernel", []),
        (
            "convnn::cuda::a_kernel<convnn::cuda::BFloat16, 64, false>(convnn::cuda::Work<int>)",
            "convnn::cuda::a_kernel<convnn::cuda::BFloat16, 64, false>",
            ["BFloat16", "64", "false"],
        ),
        (
            "convnn::cuda::a_kernel<(convnn::Metric)1>(float (*)(int))",
            "convnn::cuda::a_kernel<(convnn::Metric)1>",
            ["1"],
        ),
    ],
)
def test_instances(signature: str, instance: str, arguments: list[str]) -> None:
    assert cuda_code._without_parameters(signature) == instance
    assert cuda_code.arguments_of(instance) == arguments


def test_one_function_of_a_file() -> None:
    text = "".join(
        f"//----- .text._ZN6convnn4cuda{len(name)}{name}{rest} -----\n{name} {rest}\n"
        for name, rest in (("a_kernel", "IfEEvT_"), ("other_kernel", "El"), ("a_kernels", "El"))
    )
    assert cuda_code.function(text, "a_kernel").splitlines()[1:] == ["a_kernel IfEEvT_"]
    assert cuda_code.function(text, "other_kernel").splitlines()[1:] == ["other_kernel El"]
    for wrong in (text, text + text):
        with pytest.raises(ValueError, match="functions are"):
            cuda_code.function(wrong, "kernel" if wrong == text else "a_kernel")


def test_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_code, "SOURCES", tmp_path)
    (tmp_path / "a.cuh").write_text(
        "constexpr int kMany = 12;\nint kOne = 1, kTwo = 2;\nint kFew = 1;\nkFew = 2;\n"
    )
    assert cuda_code.constant("a.cuh", "kMany") == 12
    assert [cuda_code.constant("a.cuh", name) for name in ("kOne", "kTwo")] == [1, 2]
    for name in ("kFew", "kNone"):
        with pytest.raises(ValueError, match=name):
            cuda_code.constant("a.cuh", name)


def test_what_is_expected_is_there() -> None:
    """Every kernel for Hopper and of the gradients, and lines that begin as is said."""
    files = [*cuda_code.SOURCES.glob("*.cuh"), *cuda_code.SOURCES.glob("*.h")]
    lines = {line.strip() for path in files for line in path.open()}
    counted = ("hopper_sweep", "hopper_finish", "hopper_keys", "query_side", "key_side", "pairs")
    names = set[str]()
    for name in counted:
        text = (cuda_code.SOURCES / f"{name}.cuh").read_text()
        names |= {*re.findall(r"\b(\w+_kernel)\(", text)}
    assert names <= EXPECTED.keys()
    for kernel, expected in EXPECTED.items():
        cuda_code.header_of(kernel)
        tables = (expected.loops, expected.branches, expected.shares, expected.copied)
        for text in (text for table in tables for text in table):
            for begin in text.split(" @ "):
                assert any(line.startswith(begin) for line in lines), (kernel, begin)


SOURCE = """__global__ void a_kernel() {
  for (int i = 0; i < n; ++i) {
    copy(shared, from);
    if (rare) store(x);
  }
}
void copy() { asm("bulk"); }
void store() { *p = x; }
#pragma unroll(kFast ? 3 : 1)
for (int j = 0; j < 12; ++j) x = p[j];
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cuda_code.Launch:
    """A launch of a kernel of a few instructions."""
    path = tmp_path / "a.cuh"
    path.write_text(SOURCE)
    code = (
        (2, "", "MOV R1"),
        (0, ".L_x_0", ""),
        (7, "3", "UTMALDG.3D [UR8]"),
        (4, "", "@P0 BRA `(.L_x_1)"),
        (8, "4", "STG.E.64 [R2]"),
        (0, ".L_x_1", ""),
        (2, "", "@P1 BRA `(.L_x_0)"),
        (5, "", "EXIT"),
    )
    text = []
    for at, (line, caller, instruction) in enumerate(code):
        if not line:
            text.append(f"{caller}:")
            continue
        inlined = f' inlined at "{path}", line {caller}' if caller else ""
        text.append(f'//## File "{path}", line {line}{inlined}')
        text += [f'//## File "{path}", line {caller}'] * bool(caller)
        text.append(f"        /*{16 * at:04x}*/    {instruction} ;")
    program = sass.parse("\n".join(text))
    monkeypatch.setattr(cuda_code, "machine_code", lambda kernel, instance: program)
    monkeypatch.setitem(
        EXPECTED,
        "a_kernel",
        Expected(
            {"for (int i = 0": lambda n: n.count},
            {"if (rare)": lambda n: 0.25},
            {"void store() { @ if (rare)": lambda n: 0.5},
            {"void copy() { @ copy(": lambda n: 1000},
            busiest=lambda n: in_waves(300, n.blocks),
        ),
    )
    return cuda_code.Launch("a_kernel", "convnn::cuda::a_kernel<64>", 200, 64, {"count": 8})


def test_a_launch_is_counted(tiny: cuda_code.Launch) -> None:
    counted = predict_cuda.count(tiny, predict_cuda.numbers_of(tiny, {}))
    assert (counted.kernel, counted.blocks, counted.warps) == ("a_kernel", 200, 2)
    # Two outside of the loop; three in it, and a store in a quarter of the trips.
    assert counted.cost.issued == 2 + 8 * 3.25
    assert counted.cost.moved == 8 * 1000 + 2 * 0.5 * 256
    assert counted.cost.shared == 8 * 1000
    # Three of 300 pieces, instead of two of 200 blocks.
    assert counted.busiest == 1


def test_lines(tiny: cuda_code.Launch, capsys: pytest.CaptureFixture[str]) -> None:
    predict_cuda.count(tiny, predict_cuda.numbers_of(tiny, {}), explain=True)
    told = capsys.readouterr().out
    assert "for (int i = 0; i < n; ++i) { 8" in told
    assert re.search(r"\b8\.0  a\.cuh:7  void copy", told)


def test_kernels_that_are_not_expected(
    tiny: cuda_code.Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(EXPECTED, "a_kernel")
    with pytest.raises(KeyError, match="a_kernel"):
        predict_cuda.count(tiny, predict_cuda.numbers_of(tiny, {}))


def test_pragmas(tiny: cuda_code.Launch, tmp_path: Path) -> None:
    path = str(tmp_path / "a.cuh")
    assert predict_cuda.unrolled((path, 10)) == [3]
    assert predict_cuda.unrolled((path, 2)) == []


def test_numbers_of_earlier_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [cuda_code.Launch(name, name, 1, 32, {"x": x}) for x, name in enumerate("aba")]
    monkeypatch.setattr(cuda_code, "launches", lambda operator, **numbers: made)
    numbers = [n for _, n in predict_cuda.launches("forward")]
    assert [{name: n.x for name, n in each.before.items()} for each in numbers] == [
        {},
        {"a": 0},
        {"a": 0, "b": 1},
    ]


@pytest.mark.parametrize(
    ("pieces", "blocks", "busiest"),
    [(264, 132, 1), (265, 132, 3 * 132 / 265), (4, 4, 1), (1056, 660, 1), (928, 660, 1056 / 928)],
)
def test_waves(pieces: int, blocks: int, busiest: float) -> None:
    assert in_waves(pieces, blocks) == pytest.approx(busiest)


# Hits


def rules(**changed: int) -> cuda_hits.Rules:
    of: dict[str, int] = {"columns": 1000, "k": 9, "step": 3, "groups": 32, "halvings": 9}
    of |= {"slots": 28, "moved": 12, "list": 24, "period": 0}
    return cuda_hits.Rules(**of | changed)


@pytest.mark.quick_one_in(5)
@pytest.mark.parametrize(
    "changed",
    [{}, {"period": 2}, {"step": 8}, {"list": 12}, {"k": 16, "step": 4}, {"k": 32, "groups": 64}],
)
def test_the_nearest_are_among_the_hits(changed: dict[str, int]) -> None:
    of = rules(**changed)
    for warp in cuda_hits._simulated(of, 16):
        S = warp.S.reshape(32, -1)
        for lists, row in zip(warp.of_rows(), S, strict=True):
            nearest = sorted(row.tolist(), reverse=True)[: of.k]
            hits = sorted((x for own in lists for x in own), reverse=True)
            assert hits[: of.k] == nearest
            assert max(map(len, lists)) <= of.list
    found = cuda_hits.simulate(of, 16)
    assert found.stored >= of.k
    assert (found.raises > 0) == bool({"list", "step", "k"} & changed.keys())
    assert found.planned == (4 if "period" in changed else 1)


def test_moves() -> None:
    """What is moved is what hit: two rows and two columns of a lane together."""
    of = rules(list=1000)
    found = cuda_hits.simulate(of, 16)
    assert found.raises == found.crowded == found.planned_crowded == 0
    assert found.passes == found.planned_passes == found.planned == 1
    assert found.moves <= of.moved
    for warp in cuda_hits._simulated(of, 16):
        first = cuda_hits.threshold(warp.S.reshape(32, -1), of)
        hits = warp.S.reshape(32, -1) >= first[:, None]
        assert sum(len(x) for lists in warp.of_rows() for x in lists) == hits.sum()


def test_halvings() -> None:
    values = [0.5 + i / 64 for i in range(32)]
    assert cuda_hits.halvings(values, 4, 32) == (0, 32)
    steps, left = cuda_hits.halvings(values, 4, 8)
    assert (steps, left) == (2, 8)
    assert cuda_hits.halvings([0.5] * 20, 4, 8)[1] == 8  # ends with ties


def test_threshold() -> None:
    S = np.zeros((1, 1024), np.float32)
    S[0, [0, 32, 3, 5, 128 + 7]] = [0.9, 0.8, 0.7, 0.6, 0.95]
    # Of the groups of columns modulo 32 of tiles 0, 2, ...: 0.9 once, 0.7 and 0.6.
    of = rules(columns=1024, step=2, k=3, halvings=20)
    assert cuda_hits.threshold(S, of)[0] == pytest.approx(0.6, rel=1e-4)
    assert cuda_hits.threshold(S, of)[0] <= np.float32(0.6)


def test_turns() -> None:
    n = SimpleNamespace(pairs=9 * 10_000, keys=10_000)
    counts = np.random.default_rng(0).poisson(9, (10_000, 4)).max(1)
    for pairs in (4, 8):
        assert _turns(n, pairs) == pytest.approx(np.ceil(counts / pairs).mean(), rel=0.02)


# In the table


def test_rows_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = predict.goals()
    cuda = [each for each in rows if each.backend == "cuda"]
    assert {each.title.replace(", CUDA C++", "") for each in cuda} < {each.title for each in rows}
    assert [each.most_us for each in cuda if each.most_us] == [480.0, 950.0]
    called = []

    def counts(operator: str, explain: bool, **numbers: Any) -> list[predict_cuda.Counted]:
        called.append((operator, numbers))
        return [predict_cuda.Counted(f"{operator}_kernel", sass.Cost(1e6), 132, 4, 2.0)]

    monkeypatch.setattr(predict_cuda, "counts", counts)
    w = Workload(2, 1000, 64, 9, "random", keys=3000, dtype="float16")
    row = predict.predict_work(
        predict.Work("depthwise", w, backward=True, backend="cuda", most_us=1e4)
    )
    numbers = {"batch": 2, "n": 1000, "m": 3000, "d": 64, "c": 64, "k": 9, "dtype": "float16"}
    assert called == [("forward", numbers), ("forward_backward", numbers)]
    # A warp on each quarter of each multiprocessor, and one that has twice as much.
    assert row["kernels"][0]["issue"] == pytest.approx(2e6 / 1755, rel=1e-3)
    assert "| ≤ 10000 µs |" in predict.summary([row])
    assert "| ≤ 10 µs, missed |" in predict.summary([row | {"most_us": 10.0}])


def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    w = Workload(1, 256, 64, 9, "random", dtype="bfloat16")
    works = [predict.Work("select", w, "select", backend=name) for name in ("cuda", "triton")]
    monkeypatch.setattr(predict, "goals", lambda: works)
    monkeypatch.setattr(predict, "launches", lambda work: [])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("sys.argv", ["predict"])
    cuda_code._plan_program.cache_clear()
    assert predict.main() == 0
    told = capsys.readouterr()
    assert "CUDA C++" in told.err
    assert "g++ is not here" in told.err
    assert "| select, 1 × 256" in told.out
    assert "CUDA C++" not in told.out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
def test_the_goals() -> None:
    """Flops by another count, and the counted goals."""
    counted = predict_cuda.counts(
        "forward", batch=2, n=4096, m=4096, d=64, c=64, k=9, dtype="bfloat16"
    )
    flops = sum(each.cost.products * each.blocks * each.warps for each in counted)
    sweep = 2 * 2 * 4096 * 4096 * 64
    sampled = [n for _, n in predict_cuda.launches("forward", **cuda_figures._numbers(64))]
    step = next(n.step for n in sampled if hasattr(n, "step"))
    assert flops == pytest.approx(sweep * (1 + -(-32 // step) / 32), rel=1e-6)
    figures = cuda_figures.figures()
    for counted_figure, goal in re.findall(r"\| ([\d.]+) \| ≤ ([\d.]+) \|", figures):
        assert float(counted_figure) <= float(goal)
    assert figures.count("≤") == 3
