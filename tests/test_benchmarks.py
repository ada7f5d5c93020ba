# SPDX-License-Identifier: MIT
"""The benchmark suite at tiny sizes: a whole run, and the gate that must refuse wrong results."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("skimage", reason="the benchmarks need scikit-image: pip install .[bench]")
pytest.importorskip("matplotlib", reason="the benchmarks need matplotlib: pip install .[bench]")

from benchmarks import report, runner
from benchmarks.__main__ import main
from benchmarks.devices import DEVICES
from benchmarks.memory import MemoryNotMeasured, peak_bytes
from benchmarks.peers import DEFAULT_PEERS, PASSES, PEERS, Call
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
EFFORT = runner.Effort(seconds=0.0, fewest_rounds=2, most_rounds=2, sample_seconds=0.0)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "cpu.json"
    shapes = ["--shapes", "2,64,16,3", "2,144,16,3", "--threads", "1"]
    assert main(["--quick", *shapes, "--output", str(output)]) == 0
    return output


@pytest.mark.slow
def test_run_has_stamp_and_every_row(finished_run):
    result = report.read(finished_run)
    assert result["complete"]
    stamp = result["stamp"]
    assert stamp["device"] == "cpu"
    assert stamp["threads"] == 1
    assert stamp["cpu"]["model"]
    assert stamp["cpu"]["logical_cores"] >= 1
    assert stamp["cpu"]["pytorch_instruction_set"]
    assert stamp["versions"]["torch"] == torch.__version__
    assert {"python", "convnn_kernels"} <= stamp["versions"].keys()
    assert {"commit", "dirty", "date"} <= stamp.keys()

    rows = {(row["workload"]["tokens"], row["peer"], row["pass"]): row for row in result["rows"]}
    expected = {(n, peer, p) for n in (64, 144) for peer in DEFAULT_PEERS for p in PASSES}
    assert rows.keys() == expected
    for row in rows.values():
        assert row["status"] == "measured", row["reason"]
        assert row["checked"]
        seconds = row["seconds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
        assert row["ratios"].keys() == {"eager", "sdpa"}
        assert row["peak_bytes"] is not None, row["peak_reason"]
    assert rows[64, "convnn-random", "forward"]["ratios"]["eager"]["peer"] == "eager-random"
    assert rows[64, "sdpa", "forward"]["ratios"]["sdpa"]["median"] == 1


@pytest.mark.slow
def test_run_draws_pictures(finished_run):
    for name in ("time", "memory", "neighbors"):
        picture = finished_run.with_name(f"cpu-{name}.png")
        assert 5_000 < picture.stat().st_size < 300_000


@pytest.mark.slow
def test_tables_and_readme_block(finished_run, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold figures\n{report.END}\nafter\n")
    assert report.main([str(finished_run), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old figures" not in text
    assert all(PEERS[peer].label in text for peer in DEFAULT_PEERS)

    assert report.main([str(finished_run)]) == 0
    assert "(B, N, C, k) = (2, 144, 16, 3)" in capsys.readouterr().out

    readme.write_text("no markers\n")
    assert report.main([str(finished_run), "--readme", str(readme)]) == 2
    assert report.BEGIN in capsys.readouterr().err
    assert readme.read_text() == "no markers\n"


def _with_outputs(change):
    """A build like that of a peer whose operator returns changed outputs."""

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
    # A row that is farther for most queries, in the last place.
    indices = indices.clone()
    indices[..., -1] = (indices[..., 0] + 31) % 64
    return output, similarities, indices


WRONG = {
    "output": ("convnn-all", _with_outputs(lambda y, s, i: (y * 1.0001, s, i)), PASSES),
    "similarities": ("convnn-all", _with_outputs(lambda y, s, i: (y, s + 1e-5, i)), PASSES),
    "order": ("convnn-all", _with_outputs(_swap_first_two), PASSES),
    "neighbor": ("convnn-random", _with_outputs(_another_neighbor), PASSES),
    "gradient": ("convnn-all", _with_value_gradient_doubled, PASSES[1:]),
    "attention": ("sdpa", _with_outputs(lambda y: (y * 1.001,)), PASSES),
    "attention-gradient": ("sdpa", _with_value_gradient_doubled, PASSES[1:]),
    "convolution": ("conv2d", _with_outputs(lambda y: (y.roll(1, -1),)), PASSES),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_result_is_refused_and_not_timed(name):
    peer_name, make_wrong, wrong_passes = WRONG[name]
    peer = PEERS[peer_name]
    wrong = replace(peer, build=make_wrong(peer.build))
    rows = runner.measure(TINY, {"wrong": wrong}, DEVICES["cpu"], torch.get_num_threads(), EFFORT)
    for row in rows:
        refused = row["pass"] in wrong_passes
        assert row["status"] == ("refused" if refused else "measured"), row
        assert (row["seconds"] is None) == refused
        assert (row["peak_bytes"] is None) or not refused
        assert bool(row["reason"]) == refused


def test_refusal_ends_a_run_with_an_error(tmp_path, monkeypatch, capsys):
    peer = PEERS["sdpa"]
    _, make_wrong, _ = WRONG["attention"]
    monkeypatch.setitem(PEERS, "sdpa", replace(peer, build=make_wrong(peer.build)))
    output = tmp_path / "result.json"
    arguments = ["--shapes", "1,64,16,3", "--peers", "sdpa", "--output", str(output)]
    assert main([*arguments, "--no-pictures"]) == 1
    assert "refused: (1, 64, 16, 3)" in capsys.readouterr().err
    assert {row["status"] for row in json.loads(output.read_text())["rows"]} == {"refused"}


def test_peer_that_raises_is_named_and_others_go_on():
    def build(workload, inputs) -> Call:
        raise RuntimeError("no such kernel")

    peers = {"broken": replace(PEERS["sdpa"], build=build), "conv2d": PEERS["conv2d"]}
    rows = runner.measure(TINY, peers, DEVICES["cpu"], torch.get_num_threads(), EFFORT)
    assert [row["status"] for row in rows] == ["failed", "failed", "measured", "measured"]
    assert rows[0]["reason"] == "RuntimeError: no such kernel"


def test_eager_is_skipped_where_it_would_exhaust_memory():
    large = Workload(1, 65536, 64, 9)
    assert PEERS["eager"].bytes_needed(large, False) > runner.LARGEST_BYTES
    assert PEERS["eager"].bytes_needed(Workload(1, 16384, 64, 9), True) < runner.LARGEST_BYTES
    greedy = replace(PEERS["eager"], bytes_needed=lambda workload, backward: 10**12)
    rows = runner.measure(TINY, {"eager": greedy}, DEVICES["cpu"], 1, EFFORT)
    assert {row["status"] for row in rows} == {"skipped"}
    assert "1000 GB" in rows[0]["reason"]


def test_peak_memory_sees_the_whole_matrix_of_eager():
    workload = Workload(1, 1024, 16, 3)
    matrix = 4 * workload.tokens**2
    assert peak_bytes(workload, "eager", "forward", 1) > 0.9 * matrix
    assert peak_bytes(workload, "convnn-all", "forward", 1) < 0.5 * matrix


def test_peak_memory_names_what_went_wrong():
    with pytest.raises(MemoryNotMeasured, match="KeyError"):
        peak_bytes(TINY, "nobody", "forward", 1)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_square_and_in_the_package(name):
    image = photograph(name)
    assert image.shape[0] == image.shape[1]
    assert image.shape[2] == 3


@pytest.mark.parametrize("channels", [64, 192])
def test_tokens_are_finite_and_reproducible(channels):
    tokens = photograph_tokens("astronaut", 16, channels)
    assert tokens.shape == (256, channels)
    assert tokens.dtype == torch.float32
    assert tokens.isfinite().all()
    photograph_tokens.cache_clear()
    assert torch.equal(tokens, photograph_tokens("astronaut", 16, channels))


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
        (["--device", "cuda"], "'cuda'"),
        (["--shapes", "1,1000,64,9"], "square"),
        (["--shapes", "1,64,9"], "B,N,C,k"),
        (["--shapes", "1,64,16,65"], "k must be at most"),
        (["--threads", "0"], "at least 1"),
        (["--peers", "nobody"], "nobody"),
    ],
)
def test_wrong_use_is_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_unwritable_output_is_found_out_first(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(["--quick", "--output", str(file / "result.json")]) == 2
    assert str(file) in capsys.readouterr().err
