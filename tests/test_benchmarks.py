# SPDX-License-Identifier: MIT
"""The benchmarks at tiny sizes: a whole run, and wrong results, which must not be timed."""

import contextlib
import json
import os
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("skimage", reason="the benchmarks need scikit-image: pip install .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks need matplotlib: pip install .[bench]")

from benchmarks import __main__ as command
from benchmarks import bounds, goals, report, runner
from benchmarks.__main__ import main
from benchmarks.call_checks import CallChecks
from benchmarks.devices import DEVICES, Cpu
from benchmarks.memory import MemoryNotMeasured, peak_bytes
from benchmarks.peers import PEERS, TRAINING, run_pass, search
from benchmarks.runner import Case, Group
from benchmarks.suites import MODELS, SUITES
from benchmarks.workloads import (
    PHOTOGRAPHS,
    Workload,
    make_inputs,
    photograph,
    photograph_tokens,
    random_candidates,
    spatial_candidates,
)

TINY = Workload(2, 64, 16, 3)
SEARCH_LIKE = Workload(1, 40, 16, 5, "random", keys=90)
EFFORT = runner.Effort(seconds=0.0, fewest_rounds=2, most_rounds=2, sample_seconds=0.0)


def measure(peers, workload=TINY, passes=TRAINING, memory=()):
    """Rows of these peers, by name, on one workload."""
    cases = [Case(workload, peer, each) for peer in peers for each in passes]
    rows = []
    group = Group("test", tuple(cases), EFFORT, tuple(memory))
    runner.measure(group, DEVICES["cpu"], torch.get_num_threads(), rows)
    return rows


@pytest.mark.slow
def test_run_leaves_a_file_tables_and_plots(tmp_path, capsys):
    output = tmp_path / "cpu.json"
    shapes = ["--shapes", "2,64,16,3", "2,144,16,3", "--threads", "1"]
    assert main([*shapes, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "(2, 144, 16, 3) photographs = (B, N, C, k)" in text
    assert all(PEERS[peer].label.split(",")[0] in text for peer in MODELS)
    assert all(column in text for column in ("÷ eager", "÷ SDPA", "÷ Conv2d", "MB"))
    for name in ("time", "memory", "neighbors"):
        assert 5_000 < output.with_name(f"cpu-{name}.png").stat().st_size < 300_000

    result = report.read(output)
    stamp = result["stamp"]
    assert result["complete"]
    assert (stamp["device"], stamp["threads"]) == ("cpu", 1)
    assert stamp["versions"]["torch"] == torch.__version__
    assert stamp["cpu"]["model"]
    assert {"commit", "dirty", "date"} <= stamp.keys()
    rows = {(row["workload"]["tokens"], row["peer"], row["pass"]): row for row in result["rows"]}
    assert rows.keys() == {(n, peer, p) for n in (64, 144) for peer in MODELS for p in TRAINING}
    for row in rows.values():
        assert row["status"] == "measured", row["reason"]
        assert row["checked"]
        seconds = row["seconds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
        assert len(seconds["samples"]) >= 3
        assert row["peak_bytes"] is not None, row["peak_reason"]


def _with_outputs(change):
    """A peer whose operator returns changed outputs."""

    def wrap(build):
        def wrong_build(workload, inputs):
            call = build(workload, inputs)
            return replace(call, forward=lambda: change(*call.forward()))

        return wrong_build

    return wrap


def _with_value_gradient_doubled(build):
    def wrong_build(workload, inputs):
        value = inputs.value
        twice = value + value - value.detach()
        call = build(workload, replace(inputs, value=twice))
        return replace(call, leaves=call.leaves | {"value": value})

    return wrong_build


def _swap_first_two(output, similarities, indices):
    order = torch.tensor([1, 0, *range(2, indices.shape[-1])])
    return output, similarities, indices[..., order]


def _another_neighbor(output, similarities, indices):
    # The last neighbor, replaced by a row that is farther for most queries.
    indices = indices.clone()
    indices[..., -1] = (indices[..., 0] + 31) % 64
    return output, similarities, indices


def _another_of_select(similarities, indices):
    return _another_neighbor(None, similarities, indices)[1:]


WRONG = {
    "output": ("convnn-all", _with_outputs(lambda y, s, i: (y * 1.0001, s, i)), TRAINING),
    "similarities": ("convnn-all", _with_outputs(lambda y, s, i: (y, s + 1e-5, i)), TRAINING),
    "order": ("convnn-all", _with_outputs(_swap_first_two), TRAINING),
    "neighbor": ("convnn-random", _with_outputs(_another_neighbor), TRAINING),
    "gradient": ("convnn-all", _with_value_gradient_doubled, TRAINING[1:]),
    "attention": ("sdpa", _with_outputs(lambda y: (y * 1.001,)), TRAINING),
    "attention-gradient": (
        "sdpa",
        _with_outputs(lambda y: (y + (y - y.detach()),)),
        TRAINING[1:],
    ),
    # Within the bound of any sum, but less accurate than eager PyTorch.
    "dot": ("select-dot", _with_outputs(lambda s, i: (s * (1 + 6e-7), i)), TRAINING),
    "dot-order": ("select-dot", _with_outputs(lambda s, i: (s, i.flip(-1))), TRAINING),
    "dot-neighbor": ("select-dot", _with_outputs(_another_of_select), TRAINING),
    "dot-eager": ("eager-dot", _with_outputs(_another_of_select), TRAINING),
    "dot-values": ("eager-dot", _with_outputs(lambda s, i: (s * 1.01, i)), TRAINING),
    "decoding": ("convnn-dot", _with_outputs(lambda y, s, i: (y * 1.0001, s, i)), TRAINING),
    "decoding-neighbor": ("convnn-dot", _with_outputs(_another_neighbor), TRAINING),
    "decoding-gradient": (
        "convnn-dot",
        _with_outputs(lambda y, s, i: (y + (y - y.detach()), s, i)),
        TRAINING[1:],
    ),
    "select": ("select", _with_outputs(lambda s, i: (s, i.flip(-1))), TRAINING),
    "search": ("matmul-topk", _with_outputs(lambda s, i: (s, (i + 1) % 64)), TRAINING),
    "aggregate": ("aggregate-dense", _with_outputs(lambda y: (y * 1.0001,)), TRAINING),
    "product": ("matmul", _with_outputs(lambda S: (S.mT.roll(1, 0),)), TRAINING),
    "convolution": ("conv2d", _with_outputs(lambda y: (y.roll(1, -1),)), TRAINING),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_result_is_refused_and_not_timed(name, monkeypatch):
    peer_name, make_wrong, wrong_passes = WRONG[name]
    peer = PEERS[peer_name]
    monkeypatch.setitem(PEERS, "wrong", replace(peer, build=make_wrong(peer.build)))
    for row in measure(["wrong"], passes=[p for p in TRAINING if p in peer.passes]):
        refused = row["pass"] in wrong_passes
        assert row["status"] == ("refused" if refused else "measured"), row
        assert (row["seconds"] is None) == refused
        assert (row["peak_bytes"] is None) or not refused
        assert bool(row["reason"]) == refused


@pytest.mark.parametrize("name", ["eager", "eager-random", "eager-spatial"])
def test_neighbors_of_half_precision_are_the_nearest_up_to_rounding(name, monkeypatch):
    """Eager PyTorch then returns bfloat16 similarities; a farther neighbor is still detected."""
    peer, workload = PEERS[name], Workload(1, 64, 16, 9, dtype="bfloat16", candidates=25)
    make_wrong = _with_outputs(_another_neighbor)
    monkeypatch.setitem(PEERS, "wrong", replace(peer, build=make_wrong(peer.build)))
    for each, expected in ((name, None), ("wrong", "refused")):
        found = runner.prepare("test", Case(workload, each), DEVICES["cpu"])
        status = None if isinstance(found, runner.Ready) else found["status"]
        assert status == expected, found


def test_few_queries_and_decoding_are_checked():
    """At small sizes: one query among keys, and one query of each head."""
    for workload, peers in (
        (Workload(1, 1, 16, 10, "random", keys=300), ("select-dot", "eager-dot")),
        (Workload(6, 1, 16, 9, "random", keys=300, heads=3), ("convnn-dot", "sdpa")),
    ):
        for row in measure(peers, workload, TRAINING[:1]):
            assert row["status"] == "measured", row["reason"]
            assert "1 of 1 queries" in row["checked"]


def test_heads_are_a_dimension():
    workload = Workload(6, 5, 16, 3, "random", keys=40, heads=3)
    assert workload.shape == "(2×3, 5 of 40, 16, 3)"
    results = {}
    for peer in ("convnn-dot", "sdpa"):
        call = PEERS[peer].build(workload, make_inputs(workload, requires_grad=True))
        results[peer] = run_pass(call, "forward+backward")
        assert [list(each.shape) for each in results[peer]] == [
            [2, 3, 5, 16],
            [2, 3, 5, 16],
            [2, 3, 40, 16],
            [2, 3, 40, 16],
        ]
    # With all keys as neighbors it is attention.
    everything = replace(workload, k=40)
    call = PEERS["convnn-dot"].build(everything, make_inputs(everything))
    torch.testing.assert_close(call.forward()[0], results["sdpa"][0])
    with pytest.raises(ValueError, match="multiple of heads"):
        replace(workload, heads=4)


NARROWER = {"avx2": "avx2", "avx512": "avx512vnni"}  # a peer's name ends with one of them


@pytest.mark.quick_one_in(3)
@pytest.mark.parametrize("name", sorted(p for p in PEERS if p.rpartition("-")[2] in NARROWER))
def test_all_of_a_pass_runs_on_the_narrower_set(name, monkeypatch):
    """The check, forward and backward of the peer, and nothing else."""
    from convnn_kernels import native

    used = []

    @contextlib.contextmanager
    def use(instruction_set):
        used.append(instruction_set)
        yield
        used.append(None)

    monkeypatch.setattr(native, "cpu_instruction_set", lambda: "amx")
    monkeypatch.setattr(native, "use_cpu_instruction_set", use)
    original_name, _, suffix = name.rpartition("-")
    original = PEERS[original_name]
    seen = {each: [] for each in (name, original_name)}

    def record(peer):
        def build(workload, inputs):
            call = peer.build(workload, inputs)

            def forward():
                seen[peer_name].append(used[-1] if used else None)
                first, *others = call.forward()
                if first.requires_grad:
                    first.register_hook(lambda _: seen[peer_name].append(used[-1]))
                return first, *others

            return replace(call, forward=forward)

        peer_name = name if peer is not original else original_name
        return replace(peer, build=build)

    for each in seen:
        monkeypatch.setitem(PEERS, each, record(PEERS[each]))
    passes = [p for p in TRAINING if p in original.passes]
    assert {row["status"] for row in measure(seen, passes=passes)} == {"measured"}
    narrower, default = seen.values()
    assert len(narrower) == len(default) > len(passes) * 3
    assert set(narrower) == {NARROWER[suffix]}
    assert set(default) == {None}


@pytest.mark.parametrize(
    ("peer", "default", "reason"),
    [
        ("select-avx2", "avx2", "for avx2"),
        ("select-avx2", "avx512", "not here"),
        ("select-avx512", "avx512vnni", "for avx512vnni, not amx"),
        ("select-avx512", "amx", "not here"),
    ],
)
def test_a_set_is_skipped_where_there_is_nothing_to_compare(peer, default, reason, monkeypatch):
    from convnn_kernels import native

    def use(instruction_set):
        raise ValueError("not here")

    monkeypatch.setattr(native, "cpu_instruction_set", lambda: default)
    monkeypatch.setattr(native, "use_cpu_instruction_set", use)
    (row,) = measure([peer], passes=TRAINING[:1])
    assert row["status"] == "skipped"
    assert reason in row["reason"]


def test_refusal_ends_a_run_with_an_error(tmp_path, monkeypatch, capsys):
    peer = PEERS["sdpa"]
    _, make_wrong, _ = WRONG["attention"]
    monkeypatch.setitem(PEERS, "sdpa", replace(peer, build=make_wrong(peer.build)))
    output = tmp_path / "result.json"
    arguments = ["--shapes", "1,64,16,3", "--peers", "sdpa", "--output", str(output)]
    assert main([*arguments, "--no-plots"]) == 1
    assert "refused: (1, 64, 16, 3)" in capsys.readouterr().err
    assert {row["status"] for row in json.loads(output.read_text())["rows"]} == {"refused"}


def test_missing_peer_is_skipped_by_name(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "SHAPES_EFFORT", EFFORT)
    monkeypatch.setattr(Cpu, "peak_bytes", lambda *arguments: 10**6)
    monkeypatch.setitem(sys.modules, "faiss", None)
    output = tmp_path / "result.json"
    arguments = ["--shapes", "1,64,16,3", "--peers", "faiss", "select", "--output", str(output)]
    assert main([*arguments, "--no-plots"]) == 0
    faiss, select = json.loads(output.read_text())["rows"]
    assert (faiss["status"], select["status"]) == ("skipped", "measured")
    assert "pip install faiss-cpu" in faiss["reason"]
    assert "FAISS, exact inner product, forward: skipped: faiss is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "core"), [("AVX512", "SkylakeX"), ("AVX2", "Haswell"), ("DEFAULT", "Zen")]
)
def test_faiss_is_loaded_with_the_fastest_kernels(capability, core, monkeypatch):
    """Whatever the environment says, which is as before afterwards."""
    cores = []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(
        search, "_module", lambda *names: cores.append(os.environ["OPENBLAS_CORETYPE"])
    )
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")
    search._import_faiss()
    assert cores == [core]
    assert os.environ["OPENBLAS_CORETYPE"] == "Zen"
    monkeypatch.delenv("OPENBLAS_CORETYPE")
    if core != "Zen":
        search._import_faiss()
        assert cores == [core, core]
        assert "OPENBLAS_CORETYPE" not in os.environ


def test_peer_that_needs_too_much_memory_is_skipped():
    (row,) = measure(["eager"], replace(TINY, batch=10**9), ("forward",))
    assert row["status"] == "skipped"
    assert "the limit is" in row["reason"]


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "bf16"), ("float16", "fp16")])
def test_products_that_pytorch_emulates_are_skipped(dtype, name, monkeypatch):
    """Matrices of 2048 rows take it a minute without instructions for the dtype."""
    monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False)
    rows = measure(["mm", "sdpa", "convnn-all"], replace(TINY, dtype=dtype))
    emulated = {("mm", "forward"), ("sdpa", "forward+backward")}
    skipped = {(row["peer"], row["pass"]) for row in rows if row["status"] == "skipped"}
    assert skipped - {("mm", "forward+backward")} == emulated
    assert all(dtype in r["reason"] for r in rows if (r["peer"], r["pass"]) in emulated)


# These compute more than a tiny call and have their own tests.
_HEAVY = {"mm", "copy", "compiled"}
_MODELS = {name for name in PEERS if name.startswith(("vgg11", "vit"))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "workload",
    [TINY, Workload(2, 65, 12, 3), SEARCH_LIKE, replace(TINY, dtype="bfloat16")],
    ids=str,
)
def test_every_peer_passes_its_check_or_says_why_not(workload):
    statuses = {}
    for name in PEERS.keys() - _HEAVY - _MODELS:
        for passes in PEERS[name].passes[:2]:
            case = Case(workload, name, passes)
            ready = runner.prepare("test", case, DEVICES["cpu"])
            row = ready.row if isinstance(ready, runner.Ready) else ready
            assert row["status"] in ("measured", "skipped"), (name, row["reason"])
            assert row["status"] == "measured" or row["reason"]
            assert row["flops"] is not None
            assert row["bytes"] > 0
            statuses[name, passes] = row["status"]
    assert statuses["convnn-all", "forward+backward"] == "measured"
    assert statuses["sdpa-cudnn", "forward"] == "skipped"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(_HEAVY))
def test_heavy_peer_passes_its_check(name):
    (ready,) = measure([name], passes=PEERS[name].passes[:1])
    assert ready["status"] == "measured", ready["reason"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workload", "checked"),
    [
        ("vgg11-hybrid", Workload(1, 1024, 3, 9, "random"), "16 calls of the operators"),
        ("vgg11-conv2d", Workload(1, 1024, 3, 9, "random"), "all outputs"),
        ("vit-convnn", Workload(1, 16, 192, 9, "random"), "24 calls of the operators"),
        ("vit-local", Workload(1, 16, 192, 9, "random"), "all outputs"),
    ],
)
def test_models_are_checked(name, workload, checked):
    ready = runner.prepare("test", Case(workload, name, "forward+backward"), DEVICES["cpu"])
    assert isinstance(ready, runner.Ready), ready
    assert ready.row["checked"] == checked


@pytest.mark.parametrize("wrong", [None, *range(5)])
def test_wrong_call_of_an_operator_is_found(wrong):
    inputs = make_inputs(TINY, requires_grad=True)
    with CallChecks() as calls:
        run_pass(PEERS["convnn-all"].build(TINY, inputs), "forward+backward")
    recorded = {name: results for name, _, results in calls.calls}
    assert list(recorded) == ["forward", "forward_backward"]
    results = [*recorded["forward"][:2], *recorded["forward_backward"][:3]]
    if wrong is None:
        assert calls.check() == 2
        return
    results[wrong].detach().mul_(1.001)
    with pytest.raises(AssertionError):
        calls.check()


@pytest.mark.parametrize("operator", ["select", "aggregate"])
def test_separate_backward_operators_are_checked(operator):
    inputs = make_inputs(TINY, requires_grad=True)
    s, indices = torch.ops.convnn.select(inputs.query, inputs.key, 3)
    with CallChecks() as calls:
        if operator == "select":
            s.sum().backward()
        else:
            Y = torch.ops.convnn.aggregate(inputs.value, s.detach(), indices, inputs.weight)
            calls.calls.clear()
            Y.backward(inputs.grad_output)
    ((name, _, results),) = calls.calls
    assert name == f"{operator}_backward"
    assert calls.check() == 1
    results[0].detach().mul_(1.001)
    with pytest.raises(AssertionError):
        calls.check()


def test_every_suite_names_peers_and_passes_that_exist():
    pairs = [(name, device) for name in SUITES for device in ("cpu", "cuda")]
    for name, device in pairs:
        if (name, device) == ("gpu", "cpu"):
            continue
        groups = SUITES[name].groups(device)
        assert len({group.name for group in groups}) == len(groups)
        for group in groups:
            assert set(group.memory) <= PEERS.keys()
            for case in group.cases:
                assert case.passes in PEERS[case.peer].passes


def test_every_goal_is_of_a_row_of_make_bench():
    """And of the first workload of its group, beside what it is divided by."""
    groups = {group.name: group for group in SUITES["cpu"].groups("cpu")}
    for goal in goals.GOALS:
        cases = groups[goal.group].cases
        for peer in (goal.peer, goal.other):
            first = next(c for c in cases if (c.peer, c.passes) == (peer, goal.passes))
            assert first.workload == cases[0].workload, goal
    assert len({(g.group, g.peer, g.passes, g.other) for g in goals.GOALS}) == len(goals.GOALS)


@pytest.mark.slow
def test_peak_memory_sees_the_whole_matrix_of_eager():
    workload = Workload(1, 1024, 16, 3)
    matrix = 4 * workload.tokens**2
    assert peak_bytes(workload, "eager", "forward", 1) > 0.9 * matrix
    assert peak_bytes(workload, "convnn-all", "forward", 1) < 0.5 * matrix


def test_peak_memory_names_what_went_wrong():
    with pytest.raises(MemoryNotMeasured, match="KeyError"):
        peak_bytes(TINY, "nobody", "forward", 1)


def test_photographs_are_square_and_their_tokens_reproducible():
    for name in PHOTOGRAPHS:
        side = photograph(name).shape[0]
        assert photograph(name).shape == (side, side, 3)
        tokens = photograph_tokens(name, 16, 64)
        assert tokens.shape == (256, 64)
        assert tokens.isfinite().all()
        photograph_tokens.cache_clear()
        assert torch.equal(tokens, photograph_tokens(name, 16, 64))


def test_inputs_share_no_storage():
    inputs = make_inputs(TINY, requires_grad=True)
    assert torch.equal(inputs.query, inputs.key)
    pointers = {tensor.data_ptr() for tensor in (inputs.query, inputs.key, inputs.value)}
    assert len(pointers) == 3


def test_candidates():
    chosen = random_candidates(4096, 64)
    assert len(set(chosen.tolist())) == 64
    assert torch.equal(chosen, random_candidates(4096, 64))
    grid = spatial_candidates(64, 64)
    assert len(set(grid.tolist())) == 64
    assert set((grid % 64).tolist()) == set((grid // 64).tolist()) == set(range(4, 64, 8))
    assert torch.equal(spatial_candidates(4, 64), torch.arange(16))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--device", "tpu"], "'tpu'"),
        (["--shapes", "1,1000,64,9"], "square"),
        (["--shapes", "1,64,9"], "B,N,C,k"),
        (["--shapes", "1,64,16,65"], "k must be at most"),
        (["--threads", "0"], "at least 1"),
        (["--peers", "nobody"], "nobody"),
        (["--suite", "everything"], "everything"),
        (["--groups", "no such group"], "no group"),
        (["--suite", "gpu"], "needs --device cuda"),
    ],
)
def test_wrong_use_is_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_predictions_are_found() -> None:
    """What `python -m tools.predict` has written, for the workload, the pass and the backend."""
    rows = bounds._predictions()["rows"]
    vit = next(row for row in rows if row["work"].startswith("ViT-Tiny, forward+backward"))
    w, (name, least) = Workload(**vit["workload"]), [*vit["kernels"][0].values()][::7]
    assert least > 0
    both = "forward+backward"
    assert bounds.predicted_microseconds(name, w, both, "triton") == least
    random = replace(w, source="random")
    assert bounds.predicted_microseconds(name, random, both, "triton") == least
    assert bounds.predicted_microseconds(name, w, "forward", "triton") is None
    assert bounds.predicted_microseconds(name, w, both, "cuda") is None
    assert bounds.predicted_microseconds("no_kernel", w, both, "triton") is None
    for other in ({"tokens": 1024}, {"channels": 64}, {"dtype": "float32"}, {"keys": 400}):
        assert bounds.predicted_microseconds(name, replace(w, **other), both, "triton") is None


def test_the_bound_of_a_kernel() -> None:
    w = Workload(1, 16384, 64, 9, dtype="bfloat16")
    assert bounds.kernel_microseconds("sweep_kernel", w) == pytest.approx(43.5, abs=0.1)


def test_packages_that_are_missing(run_python) -> None:
    """As after an installation without the extra."""
    printed = run_python("""
        import sys
        sys.modules["PIL"] = None
        try:
            import benchmarks.paper
        except ModuleNotFoundError as error:
            print(error)
    """)
    assert printed.startswith("benchmarks needs PIL, which the extra bench installs:  pip install")
