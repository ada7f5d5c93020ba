# SPDX-License-Identifier: MIT
"""The output of a benchmark run: files, tables, plots, figures in documents."""

import errno
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import outside_workers

pytest.importorskip("skimage", reason="the benchmarks need scikit-image: pip install .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks need matplotlib: pip install .[bench]")

from benchmarks import __main__ as command
from benchmarks import compare, devices, environment, figures, goals, gpu, ratios, report, runner
from benchmarks.__main__ import main
from benchmarks.environment import REPOSITORY, make_stamp
from benchmarks.peers import PEERS
from benchmarks.runner import Case, Effort, Group
from benchmarks.suites import SUITES
from benchmarks.workloads import Workload

TINY = ["--shapes", "1,64,16,3", "1,144,16,3", "--peers", "select", "sdpa", "--threads", "1"]


@pytest.fixture(autouse=True)
def little_effort(request, monkeypatch):
    """In tests that are not slow: two rounds, and no processes that measure memory."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(command, "SHAPES_EFFORT", runner.Effort(0, 2, 2, 0))
        monkeypatch.setattr(devices.Cpu, "peak_bytes", lambda *arguments: 10**6)


def synthetic_row(group, case, samples):
    row = runner.new_row(group, case, PEERS[case.peer])
    return row | {"seconds": runner._summary(samples) | {"repeats": 1}, "peak_bytes": 10**6}


def synthetic_result(groups, seconds=None, rounds=9, noise=0.05, seed=0):
    """The result of a run of these groups, with a rate for each peer, drift and noise."""
    generator = np.random.default_rng(seed)
    rows = []
    for group in groups:
        # What slows down a round slows down all of its cases.
        drift = np.exp(generator.normal(0, 0.3, rounds))
        for case in group.cases:
            base = (seconds or _seconds)(case)
            samples = base * drift * np.exp(generator.normal(0, noise, rounds))
            rows.append(synthetic_row(group.name, case, samples))
    stamp = make_stamp("cpu", 2)
    return {"complete": True, "stamp": stamp, "rows": rows}


def _seconds(case):
    row = runner.new_row("", case, PEERS[case.peer])
    return 1e-6 + (row["flops"] or 1e9) / 1e11 + (row["bytes"] or 0) / 1e10


# Interruptions and files that cannot be written.


class Interrupting(devices.Cpu):
    """Ctrl-C at a sample."""

    def __init__(self, at):
        self.at = at
        self.calls = itertools.count()

    def seconds(self, run, repeats):
        if next(self.calls) == self.at:
            raise KeyboardInterrupt
        return super().seconds(run, repeats)


def test_interruption_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    counting = Interrupting(None)
    monkeypatch.setitem(devices.DEVICES, "cpu", counting)
    output = tmp_path / "result.json"
    arguments = [*TINY, "--output", str(output), "--no-plots"]
    assert main(arguments) == 0
    everything = next(counting.calls)

    monkeypatch.setitem(devices.DEVICES, "cpu", Interrupting(everything - 2))
    assert main(arguments) == 130
    said = capsys.readouterr()
    assert f"interrupted; the results so far are in {output}" in said.err
    assert "(1, 64, 16, 3)" in said.out
    result = json.loads(output.read_text())
    assert not result["complete"]
    assert "did not finish" in report.terminal(result)
    assert [row["workload"]["tokens"] for row in result["rows"]] == [64] * 3 + [144] * 3
    # Of the interrupted group, the complete rounds: the same number for each case.
    rounds = [len(row["seconds"]["samples"]) for row in result["rows"]]
    assert rounds == [2, 2, 2, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.left_out)]
)
def test_interrupted_process_ends_with_its_results(tmp_path, number):
    output = tmp_path / "result.json"
    arguments = [sys.executable, "-m", "benchmarks", *TINY, "--output", str(output)]
    process = subprocess.Popen(arguments, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if output.exists() and json.loads(output.read_text())["rows"]:
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted; the results so far are in" in error
    assert "Traceback" not in error
    assert json.loads(output.read_text())["rows"][0]["seconds"]


def test_full_disk_keeps_the_results_before_and_prints_all(tmp_path, monkeypatch, capsys):
    write_text, written = pathlib.Path.write_text, itertools.count()

    def full(path, text):
        # The first write is before the first group, the second after it.
        if path.suffix == ".partial" and next(written) >= 2:
            write_text(path, text[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_text(path, text)

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    output = tmp_path / "result.json"
    assert main([*TINY, "--output", str(output), "--no-plots"]) == 2
    said = capsys.readouterr()
    assert "No space left on device" in said.err
    assert "has 3 of the 6 results so far" in said.err
    assert len(json.loads(output.read_text())["rows"]) == 3
    assert "(1, 144, 16, 3)" in said.out
    assert list(tmp_path.iterdir()) == [output]


def test_unwritable_folder_is_found_before_measuring(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "measure", lambda *arguments: pytest.fail("it measured"))
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "result.json"
    assert main(["--suite", "quick", "--output", str(output)]) == 2
    assert f"cannot write {output}" in capsys.readouterr().err


# Comparing runs.

GROUPS = SUITES["cpu"].groups("cpu")


def moved(before, after):
    changes, only = compare.compare(before, after)
    assert not only
    return {change.name: change.factor for change in changes if change.moved}


@pytest.mark.parametrize("seed", range(3))
def test_two_runs_of_the_same_commit_do_not_differ(seed):
    before = synthetic_result(GROUPS, seed=seed)
    # Another day: everything takes 1.4 times as long.
    after = synthetic_result(GROUPS, lambda case: 1.4 * _seconds(case), seed=seed + 100)
    references = {group.name for group in GROUPS if any(c.peer == "sdpa" for c in group.cases)}
    assert {name for name in moved(before, after) if name.partition(": ")[0] in references} == set()


@pytest.mark.parametrize("factor", [1.3, 1 / 1.3])
def test_planted_change_is_flagged(factor, tmp_path, capsys):
    def planted(case):
        return _seconds(case) * (factor if case.peer == "select" else 1.0)

    before = synthetic_result(GROUPS, seed=1)
    after = synthetic_result(GROUPS, planted, seed=2)
    found = moved(before, after)
    cases = {c for group in GROUPS for c in group.cases if c.peer == "select"}
    assert len(found) == len(cases)
    assert all(": select," in name for name in found)
    assert all(value == pytest.approx(factor, rel=0.1) for value in found.values())

    for name, result in (("before", before), ("after", after)):
        report.write(result, tmp_path / f"{name}.json")
    arguments = ["compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")]
    assert main(arguments) == (1 if factor > 1 else 0)
    assert ("slower: " if factor > 1 else "faster: ") in capsys.readouterr().out


def test_noise_is_no_change_and_is_reported():
    before = synthetic_result(GROUPS[:2], seed=1, noise=1.0)
    after = synthetic_result(GROUPS[:1], lambda case: 1.3 * _seconds(case), seed=2, noise=1.0)
    changes, only = compare.compare(before, after)
    assert not any(change.moved for change in changes)
    assert all(change.noise > 1.3 for change in changes)
    assert {name.partition(":")[0] for name in only} == {GROUPS[1].name}
    assert "too noisy to detect a factor of 1.3" in compare.describe(changes, only)


def test_compare_names_an_unreadable_file(tmp_path, capsys):
    path = str(tmp_path / "missing.json")
    assert main(["compare", path, path]) == 2
    assert path in capsys.readouterr().err


# Ratios and tables.


def test_ratios_are_taken_within_rounds():
    workload, drift = Workload(1, 4096, 64, 9), np.array([1.0, 2.0, 4.0])
    rows = [
        synthetic_row("g", Case(workload, peer), seconds * drift)
        for peer, seconds in (("convnn-all", 0.03), ("sdpa", 0.05), ("sdpa-math", 0.04))
    ]
    found = ratios.references(rows[0], rows)
    assert found == {"÷ SDPA": rows[2]}  # the fastest kernel
    assert ratios.ratio(rows[0], rows[2]) == pytest.approx((0.75, 0.75, 0.75))
    header, lines = report.table(rows, spread=False)
    assert lines[0][header.index("÷ SDPA")] == "0.75"
    assert lines[1][header.index("÷ SDPA")] == ""


def test_avx2_is_divided_by_avx512_or_else_by_the_default_instruction_set():
    for group in (group for group in GROUPS if any("avx2" in c.peer for c in group.cases)):
        rows = synthetic_result([group])["rows"]
        for row in (row for row in rows if row["peer"].endswith("-avx2")):
            name = row["peer"].removesuffix("-avx2")
            on_avx512 = f"{name}-avx512"
            other = ratios.references(row, rows)["÷ AVX-512"]
            assert other["peer"] == (on_avx512 if on_avx512 in PEERS else name)
            assert (other["pass"], other["workload"]) == (row["pass"], row["workload"])
            without = [each for each in rows if each["peer"] != on_avx512]
            assert ratios.references(row, without)["÷ AVX-512"]["peer"] == name
        others = [row for row in rows if not row["peer"].endswith("-avx2")]
        assert not any("÷ AVX-512" in ratios.references(row, rows) for row in others)


def test_rows_of_the_gpu_suite_have_their_references():
    rows = synthetic_result(SUITES["gpu"].groups("cuda"))["rows"]

    def titles(group, peer, passes, source):
        what = (peer, passes, source)
        found = [
            values
            for row, values in ratios.ours(rows)
            if row["group"].startswith(group)
            and (row["peer"], row["pass"], row["workload"]["source"]) == what
        ]
        return set.intersection(*map(set, found))

    both = "forward+backward"
    for source in ("photographs", "random"):
        assert "÷ SDPA" in titles("gpu layer", "convnn-all", both, source)
        assert "÷ SDPA" in titles("gpu ViT-Tiny", "convnn-random", both, source)
        assert "÷ flashlib" in titles("gpu search", "select", "forward", source)
        assert titles("gpu VGG-11 layer", "convnn-dense", both, source) == {"÷ Conv2d"}
    # Eager is a product and its topk.
    assert titles("gpu select", "select", "forward", "random") == {"÷ eager", "÷ matmul"}
    assert "÷ SDPA" in titles("gpu host", "host-triton", both, "random")
    text = "\n".join(report.ratio_lines(rows))
    assert "÷ bfloat16" in text
    # All of them fit the summary, beside some failures.
    assert text.count("\n") < gpu.LINES - 40
    assert len(text) < gpu.CHARACTERS - 2000
    assert "all layers of VGG-11 ÷ Conv2d, convnn-dense: photographs " in text


def test_sums_of_layers():
    rows = [
        synthetic_row(f"gpu VGG-11 layer {i}", Case(Workload(1, 64, 8, 9), peer), [seconds] * 2)
        for i, (ours, theirs) in enumerate(((1.0, 1.0), (5.0, 2.0)))
        for peer, seconds in (("convnn-dense", ours), ("conv2d", theirs))
    ]
    key = ("convnn-dense", "forward", "photographs")
    assert ratios.sums_of_layers(rows) == {key: pytest.approx(2.0)}
    rows[2]["seconds"] = None
    assert ratios.sums_of_layers(rows) == {}


def test_summary_spans_the_shapes():
    rows = []
    for tokens, factor in ((1024, 2.0), (4096, 0.5), (16384, 0.25)):
        workload = Workload(1, tokens, 64, 9)
        for peer, seconds in (("convnn-all", factor), ("sdpa", 1.0)):
            rows.append(synthetic_row(str(tokens), Case(workload, peer), [seconds, seconds]))
    assert report.summary(rows) == ["ConvNN, all candidates, forward: ÷ SDPA 0.25 to 2.00"]


def test_bound_is_the_slower_of_flops_and_bytes():
    workload = Workload(1, 4096, 64, 9)
    mm, copy, select = rows = [
        synthetic_row("g", Case(workload, peer), [seconds])
        for peer, seconds in (("mm", 0.1), ("copy", 0.05), ("select", 0.03))
    ]
    by_flops = 0.1 * select["flops"] / mm["flops"]
    by_bytes = 0.05 * select["bytes"] / copy["bytes"]
    assert by_flops > by_bytes
    assert ratios.bound(select, rows) == pytest.approx(by_flops)
    copy["seconds"]["median"] *= 2 * by_flops / by_bytes
    assert ratios.bound(select, rows) == pytest.approx(2 * by_flops)


# Goals.


def outcome(outcomes, group, peer, passes, other):
    what = (group, peer, passes, other)
    (found,) = [
        each
        for each in outcomes
        if (each["group"], each["peer"], each["passes"], each["other"]) == what
    ]
    return found


LAYER = "layer (1, 4096, 64, 9)"
SELECT_BESIDE_MM = LAYER, "select", "forward", "mm"
FORWARD_BESIDE_SDPA = LAYER, "convnn-all", "forward", "sdpa"


def exact_result(change=None):
    """Every group of make bench; a case takes what `change` says, or a second."""

    def seconds(case):
        return change(case) if change and change(case) else 1.0

    return synthetic_result(GROUPS, seconds, rounds=3, noise=0.0)


def test_a_whole_run_measures_every_goal():
    outcomes = goals.evaluate(exact_result()["rows"])
    assert len(outcomes) == len(goals.GOALS)
    assert {each["result"] for each in outcomes} <= {"met", "not met"}
    for each in outcomes:
        assert each["other"] == "mm" or each["measured"] == pytest.approx(1.0, rel=1e-4)
    select = outcome(outcomes, *SELECT_BESIDE_MM)
    assert select["measured"] == pytest.approx(4096**2 * 64 / 2048**3, rel=1e-4)
    assert select["result"] == "not met"


@pytest.mark.parametrize(("factor", "result"), [(0.999, "met"), (1.001, "not met")])
def test_goals_are_met_up_to_their_bound(factor, result):
    def seconds(case):
        return factor * 0.4 if case.peer == "convnn-all" else None

    def share(case):
        return factor * 4096**2 * 64 / 2048**3 if case.peer == "select" else None

    found = outcome(goals.evaluate(exact_result(seconds)["rows"]), *FORWARD_BESIDE_SDPA)
    assert (found["bound"], found["result"]) == (0.4, result)
    found = outcome(goals.evaluate(exact_result(share)["rows"]), *SELECT_BESIDE_MM)
    assert (found["bound"], found["result"]) == (1.0, result)


def test_goals_are_ratios_within_rounds_of_the_fastest_kernel_on_photographs():
    def seconds(case):
        if case.workload.source == "random":
            return 100.0
        return {"convnn-all": 0.2, "sdpa-math": 0.8}.get(case.peer)

    result = exact_result(seconds)
    found = outcome(goals.evaluate(result["rows"]), *FORWARD_BESIDE_SDPA)
    assert found["measured"] == pytest.approx(0.25, rel=1e-4)
    # The same as in the tables.
    rows = [row for row in result["rows"] if row["group"] == LAYER]
    (row,) = [
        row
        for row in rows
        if (row["peer"], row["pass"], row["workload"]["source"])
        == ("convnn-all", "forward", "photographs")
    ]
    other = ratios.references(row, rows)["÷ SDPA"]
    assert found["measured"] == ratios.ratio(row, other)[0]


def test_goals_that_were_not_measured_are_not_met():
    rows = exact_result(lambda case: 0.01 if case.peer == "select" else None)["rows"]
    rows = [row for row in rows if not row["group"].startswith("decoding")]
    for row in rows:
        if row["peer"] == "faiss":
            row.update(status="skipped", reason="faiss is not installed", seconds=None)
        if row["peer"] == "select-avx2":
            row.update(status="refused", reason="a wrong neighbor", seconds=None)
    outcomes = goals.evaluate(rows)
    missing = [each for each in outcomes if each["measured"] is None]
    assert {each["result"] for each in missing} == {"not measured"}
    expected = {"faiss", "sdpa", "convnn-dot", "select"}
    assert {each["other"] for each in missing} == expected
    assert len(missing) == 5 + 5 + 2
    reasons = goals.notes(outcomes)
    assert any("faiss is not installed" in each for each in reasons)
    assert any("a wrong neighbor" in each for each in reasons)
    assert any("not in this run" in each for each in reasons)
    counted = goals.summary(outcomes)
    assert f"{len(missing)} not measured" in counted
    assert int(counted.split()[0]) == sum(each["result"] == "met" for each in outcomes)


def test_other_runs_have_no_goals():
    assert goals.evaluate(synthetic_result(SUITES["quick"].groups("cpu"))["rows"]) == []
    assert goals.evaluate(synthetic_result(SUITES["gpu"].groups("cuda"))["rows"]) == []


def test_a_missed_goal_is_shown_and_no_error(tmp_path, monkeypatch, capsys):
    group = "shape (1, 64, 16, 3) photographs"
    planted = [
        goals.Goal(group, "select", "forward", "sdpa", "≤", 0.0),
        goals.Goal(group, "select", "forward", "sdpa", "≥", 0.0),
        goals.Goal(group, "select", "forward", "faiss", "≤", 1.0),
    ]
    monkeypatch.setattr(goals, "GOALS", planted)
    output = tmp_path / "run.json"
    assert main([*TINY, "--output", str(output), "--no-plots"]) == 0
    result = report.read(output)
    assert [each["result"] for each in result["goals"]] == ["not met", "met", "not measured"]
    assert len(result["rows"]) == 6
    text = report.terminal(result)
    assert text in capsys.readouterr().out
    *_, heading, header, missed, met, other, reason = text.splitlines()
    assert heading == f"goals on {report.processor(result)}: " + goals.summary(result["goals"])
    assert result["stamp"]["cpu"]["model"] in heading
    assert "1 of 3 goals met, 1 not met, 1 not measured" in heading
    assert header.split()[:2] == ["row", "measured"]
    assert missed.endswith(" not met")
    assert met.endswith(" met")
    assert not met.endswith(" not met")
    assert other.endswith(" not measured")
    assert reason == "  not measured: not in this run"


def test_the_stamp_names_what_limits_the_instructions(monkeypatch):
    from convnn_kernels import native

    monkeypatch.setattr(native, "cpu_instruction_set", lambda: "avx2")
    for name in environment._FORCING:
        monkeypatch.delenv(name, raising=False)
    result = {"stamp": make_stamp("cpu", 2)}
    assert result["stamp"]["forced"] == {}
    assert report.processor(result).endswith("convnn_kernels on avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    result = {"stamp": make_stamp("cpu", 2)}
    assert report.processor(result).endswith(", forced by ONEDNN_MAX_CPU_ISA=AVX2")


def test_make_bench_limits_every_library():
    command = ["make", "-n", "-o", ".venv/.bench", "-o", ".venv/.faiss", "bench", "VENV=.venv"]
    done = subprocess.run([*command, "ISA=avx2"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = [each for each in done.stdout.splitlines() if "-m benchmarks" in each]
    assert {each.partition("=")[0] for each in line.split() if "=" in each} == {
        *environment._FORCING
    }
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert "avx2" not in done.stdout.lower()
    done = subprocess.run([*command, "ISA=sse"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert "ISA must be avx2, not sse" in done.stderr


# A faked GPU: its events count calls.


@pytest.fixture
def fake_cuda(monkeypatch):
    # now: milliseconds of the GPU; host: seconds of the host.
    clock = SimpleNamespace(now=0.0, host=0.0, slept=0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.now

        def elapsed_time(self, end):
            return end.at - self.at

    properties = SimpleNamespace(
        name="a GPU",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=10**11,
        L2_cache_size=2**20,
    )
    fakes = {
        "Event": Event,
        "synchronize": lambda where: None,
        "is_available": lambda: True,
        "get_device_properties": lambda where: properties,
        "mem_get_info": lambda where: (10**11, 10**11),
        "reset_peak_memory_stats": lambda where: None,
        "memory_allocated": lambda where: 1000,
        "max_memory_allocated": lambda where: 5000,
        "_sleep": lambda cycles: setattr(clock, "slept", clock.slept + 1),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [each.fp32_precision for each in settings], torch.backends.cudnn.benchmark
    yield clock
    for each, precision in zip(settings, before[0], strict=True):
        each.fp32_precision = precision
    torch.backends.cudnn.benchmark = before[1]


def test_gpu_times_are_between_events(fake_cuda):
    faked = devices.Cuda(where="cpu")

    def run():
        fake_cuda.now += 2.0  # milliseconds

    assert faked.seconds(run, 5) == pytest.approx(2e-3)
    assert faked.cold_seconds(run) == pytest.approx(2e-3)
    assert faked._flushed.numel() == 4 * 2**20
    assert fake_cuda.slept == 2


def test_gpu_sleeps_until_the_host_has_launched(fake_cuda, monkeypatch):
    """A sample whose launches took too long is repeated behind a longer sleep."""
    faked, runs = devices.Cuda(where="cpu"), []
    monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=lambda: fake_cuda.host))

    def run():
        runs.append(0)
        fake_cuda.host += 2e-3
        fake_cuda.now += 2.0

    assert faked.seconds(run, 1000) == pytest.approx(2e-3)
    assert len(runs) == 2 * faked._MOST_REPEATS
    assert fake_cuda.slept == 2


def test_gpu_sample_fits_the_launch_queue(fake_cuda, monkeypatch):
    """At about the thousandth launch the driver blocks the host until the GPU catches up."""
    faked, queued = devices.Cuda(where="cpu"), []
    faked._LONGEST_SLEEP = 0.02
    monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=lambda: fake_cuda.host))

    def run():
        queued.append(0)
        if len(queued) > 10:
            fake_cuda.host += 0.03
        fake_cuda.now += 2.0

    assert faked._between_events(run, 20, queued.clear) == pytest.approx(2e-3)
    assert len(queued) == 10


SMALL = Workload(1, 64, 16, 5, "random")


def breaking_peer(monkeypatch, breaks_at):
    """A peer whose call fails from the `breaks_at`-th on."""
    peer, calls = PEERS["sdpa"], []

    def build(workload, inputs):
        call = peer.build(workload, inputs)

        def forward():
            calls.append(0)
            if len(calls) >= breaks_at:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return call.forward()

        return replace(call, forward=forward)

    monkeypatch.setitem(PEERS, "sdpa", replace(peer, build=build))


@pytest.mark.parametrize("breaks_at", [1, 2, 7])
def test_a_failing_peer_does_not_stop_the_others(breaks_at, monkeypatch):
    """In the check, in the warm-up, between two rounds."""
    breaking_peer(monkeypatch, breaks_at)
    rows = []
    cases = tuple(Case(SMALL, peer) for peer in ("select", "sdpa", "convnn-all"))
    effort = Effort(0.0, 3, 3, sample_seconds=0.0)
    runner.measure(Group("g", cases, effort), devices.Cpu(), 1, rows)
    assert [row["status"] for row in rows] == ["measured", "failed", "measured"]
    assert "illegal memory access" in rows[1]["reason"]
    assert [row["seconds"] is None for row in rows] == [False, True, False]
    assert len(rows[0]["seconds"]["samples"]) == 3


def test_a_broken_device_ends_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(devices.Cpu, "broken", lambda self: "its context is gone")
    breaking_peer(monkeypatch, 2)
    output = tmp_path / "run.json"
    assert main([*TINY, "--output", str(output), "--no-plots"]) == 2
    assert "its context is gone" in capsys.readouterr().err
    result = report.read(output)
    assert [row["status"] for row in result["rows"]] == ["measured", "measured", "failed"]
    assert {row["workload"]["tokens"] for row in result["rows"]} == {64}
    assert not result["complete"]


def test_run_on_a_faked_gpu(fake_cuda, tmp_path, monkeypatch, capsys):
    class Faked(devices.Cuda):
        def _between_events(self, run, repeats, before=bool):
            return devices.Cpu().seconds(run, repeats)

    monkeypatch.setitem(devices.DEVICES, "cuda", Faked(where="cpu"))
    output = tmp_path / "gpu.json"
    assert main([*TINY, "--device", "cuda", "--output", str(output)]) == 0
    result = report.read(output)
    assert result["stamp"]["gpu"]["name"] == "a GPU"
    assert result["stamp"]["device"] == "cuda"
    assert [row["status"] for row in result["rows"]] == ["measured"] * 6
    assert all(row["cold_seconds"]["median"] > 0 for row in result["rows"])
    assert {row["peak_bytes"] for row in result["rows"]} == {4000}
    assert "a GPU; " in capsys.readouterr().out


def test_missing_gpu_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "built without CUDA" in capsys.readouterr().err


# Figures in documents.


@pytest.mark.parametrize("path", figures.DOCUMENTS, ids=lambda path: path.name)
def test_figures_of_the_documentation_are_those_of_a_result(path):
    assert figures.disagreements(path) == []


DOCUMENT = """<!-- figures: run.json -->
PyTorch 2.13, limits ≤ 1.5 and `0.3 ms` are no figures.

<!-- table: layer (1, 4096, 64, 9) -->
old
<!-- end -->

<!-- by hand: a sampling profile -->
60% of the time
<!-- end -->
"""


@pytest.fixture
def documented(tmp_path, monkeypatch):
    groups = [group for group in GROUPS if group.name == "layer (1, 4096, 64, 9)"]
    report.write(synthetic_result(groups), tmp_path / "run.json")
    path = tmp_path / "document.md"
    path.write_text(DOCUMENT)
    return path


def test_tables_of_a_document_are_rewritten(documented):
    (found,) = figures.disagreements(documented, documented.parent)
    assert "the result says" in found
    text = figures.rewrite(DOCUMENT, documented.parent)
    documented.write_text(text)
    assert figures.disagreements(documented, documented.parent) == []
    assert "old" not in text
    assert "| select, all candidates |" in text
    assert "60% of the time" in text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("| select,", "| selects,"), "the result says"),
        (("the time", "the time\n<!-- end -->\nand it takes 12 ms."), "'12 ms' comes from no"),
        (("PyTorch", "That is 0.73 of it. PyTorch"), "'0.73' comes from no"),
        (("PyTorch", "That is 3× as much. PyTorch"), "'3×' comes from no"),
        (("run.json", "walk.json"), "walk.json"),
        (("<!-- figures: run.json -->", ""), "before any"),
        (("table: layer", "table: lawyer"), "no group 'lawyer"),
    ],
)
def test_wrong_figure_is_found(documented, change, problem):
    right = figures.rewrite(DOCUMENT, documented.parent)
    documented.write_text(right.replace(*change))
    assert documented.read_text() != right
    found = figures.disagreements(documented, documented.parent)
    assert any(problem in each for each in found), found


def test_goals_of_a_document(tmp_path):
    text = "<!-- figures: run.json -->\n<!-- table: goals -->\nold\n<!-- end -->\n"
    groups = [group for group in GROUPS if group.name == LAYER]
    result = synthetic_result(groups)
    report.write(result, tmp_path / "run.json")
    with pytest.raises(figures.WrongFigureError, match="no goals"):
        figures.rewrite(text, tmp_path)
    result["goals"] = goals.evaluate(result["rows"])
    report.write(result, tmp_path / "run.json")
    assert report.read(tmp_path / "run.json") == json.loads(json.dumps(result))
    written = figures.rewrite(text, tmp_path)
    assert report.processor(result) in written
    assert f"| {LAYER} | select, all candidates, forward, share of torch.mm | ≥ 1.00 |" in written
    assert "- not measured: " in written
    assert "old" not in written


@pytest.mark.slow
def test_operators_under_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    arguments = [
        *(
            sys.executable,
            "-m",
            "pytest",
            "benchmarks/bench_operators.py",
            "--benchmark-only",
            "-q",
        ),
        *("-k", "forward-1024", "--benchmark-max-time=0.05", "-p", "no:cacheprovider"),
        *(f"--benchmark-storage={tmp_path}", "--benchmark-save=before"),
    ]
    done = subprocess.run(
        arguments, cwd=REPOSITORY, env=outside_workers(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = tmp_path.rglob("*_before.json")
    found = {each["name"] for each in json.loads(saved.read_text())["benchmarks"]}
    assert "test_operator[convnn-all-forward-1024]" in found
