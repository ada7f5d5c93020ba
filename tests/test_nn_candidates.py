# SPDX-License-Identifier: MIT
"""Random and spatial candidates (section 4.2.2), alone and in layers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from convnn_kernels.nn import (
    AllCandidates,
    Candidates,
    ConvNN1d,
    ConvNN2d,
    ConvNNAttention,
    RandomCandidates,
    SpatialCandidates,
)

CPU = torch.device("cpu")


def draw(candidates: Candidates, shape: tuple[int, ...], padding: int = 0) -> Tensor | None:
    return candidates(shape, padding, CPU)


def rows(candidates: Candidates, shape: tuple[int, ...], padding: int = 0) -> list[int]:
    drawn = draw(candidates, shape, padding)
    assert drawn is not None
    assert drawn.dtype == torch.int64
    return drawn.tolist()


def test_spatial_count_in_1d() -> None:
    assert rows(SpatialCandidates(4), (16,)) == [0, 4, 8, 12]
    assert rows(SpatialCandidates(3), (10,)) == [0, 3, 6]
    assert rows(SpatialCandidates(3), (10,), padding=2) == [2, 5, 8]
    # The map has 10 tokens, the padded map 14.
    assert len(set(rows(SpatialCandidates(12), (10,), padding=2))) == 12


def test_spatial_count_in_2d() -> None:
    assert rows(SpatialCandidates(4), (4, 6)) == [0, 3, 12, 15]
    assert rows(SpatialCandidates(4), (4, 6), padding=1) == [9, 12, 25, 28]
    assert len(rows(SpatialCandidates(16), (8, 8))) == 16


def test_spatial_count_from_end_to_end() -> None:
    assert rows(SpatialCandidates(4, spacing="ends"), (16,)) == [0, 5, 10, 15]
    assert rows(SpatialCandidates(3, spacing="ends"), (10,), padding=2) == [2, 6, 11]
    assert rows(SpatialCandidates(1, spacing="ends"), (10,)) == [0]
    assert rows(SpatialCandidates(9, spacing="ends"), (4, 6)) == [0, 2, 5, 6, 8, 11, 18, 20, 23]
    assert rows(SpatialCandidates(4, spacing="ends"), (4, 6), padding=1) == [9, 14, 33, 38]
    # The map has 10 tokens, the padded map 14.
    drawn = rows(SpatialCandidates(12, spacing="ends"), (10,), padding=2)
    assert (len(set(drawn)), drawn[0], drawn[-1]) == (12, 0, 13)


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64, 100, 196])
def test_spatial_count_from_end_to_end_is_linspace(size: int) -> None:
    for r in range(1, size):
        # In float64, a step that ends on a token may be rounded to slightly before it.
        expected = (torch.linspace(0, size - 1, r, dtype=torch.float64) + 1e-9).long()
        assert rows(SpatialCandidates(r, spacing="ends"), (size,)) == expected.tolist()


def test_spacing_is_printed() -> None:
    assert "spacing" not in repr(SpatialCandidates(4))
    assert "spacing='ends'" in repr(SpatialCandidates(4, spacing="ends"))


def test_spatial_stride_is_that_of_the_paper() -> None:
    assert rows(SpatialCandidates(stride=3), (10,)) == [0, 3, 6, 9]
    x = torch.arange(5 * 7).view(5, 7)
    assert rows(SpatialCandidates(stride=2), (5, 7)) == x[::2, ::2].flatten().tolist()
    padded = torch.arange(7 * 9).view(7, 9)[1:-1, 1:-1]
    assert rows(SpatialCandidates(stride=2), (5, 7), 1) == padded[::2, ::2].flatten().tolist()


@pytest.mark.parametrize("make", [RandomCandidates, SpatialCandidates])
def test_r_of_at_least_the_number_of_keys_means_all(make: type) -> None:
    for r in (16, 25):
        assert draw(make(r), (2, 2), padding=1) is None
        assert draw(make(r), (4, 4)) is None
    assert draw(AllCandidates(), (4, 4)) is None


def test_random_draws_tokens_of_the_map_first() -> None:
    inside = set(torch.arange(36).view(6, 6)[1:-1, 1:-1].flatten().tolist())
    drawn = rows(RandomCandidates(9), (4, 4), padding=1)
    assert len(set(drawn)) == 9
    assert set(drawn) <= inside
    # The map has only 16 tokens; the others are padding.
    drawn = rows(RandomCandidates(30), (4, 4), padding=1)
    assert len(set(drawn)) == 30


@pytest.mark.parametrize("fixed", [False, True])
def test_random_is_uniform(fixed: bool) -> None:
    counts = torch.zeros(20)
    for _ in range(2000):
        candidates = RandomCandidates(5, fixed_in_eval=fixed).eval()
        counts[rows(candidates, (20,))] += 1
    # Binomial(2000, 1/4) has mean 500 and standard deviation 19.4.
    assert (counts - 500).abs().max() < 5 * 19.4


def test_random_changes_and_repeats_under_a_seed() -> None:
    candidates = RandomCandidates(8)
    torch.manual_seed(3)
    first, second = rows(candidates, (100,)), rows(candidates, (100,))
    assert first != second
    torch.manual_seed(3)
    assert [first, second] == [rows(candidates, (100,)), rows(candidates, (100,))]


def test_fixed_in_eval() -> None:
    candidates = RandomCandidates(8, fixed_in_eval=True)
    assert rows(candidates, (100,)) != rows(candidates, (100,))
    candidates.eval()
    fixed = rows(candidates, (100,))
    assert rows(candidates, (100,)) == fixed
    assert len(set(fixed)) == 8
    other = RandomCandidates(8, fixed_in_eval=True).eval()
    assert rows(other, (100,)) != fixed
    other.load_state_dict(candidates.state_dict())
    assert rows(other, (100,)) == fixed
    plain = RandomCandidates(8).eval()
    assert rows(plain, (100,)) != rows(plain, (100,))


def test_random_pairs_are_uniform() -> None:
    """Nor does whether one token is drawn say whether another is."""
    T, N, R = 4000, 40, 8
    candidates = RandomCandidates(R, fixed_in_eval=True).eval()
    drawn = torch.zeros(T, N)
    for i in range(T):
        candidates.reset_parameters()
        drawn[i, rows(candidates, (N,))] = 1
    pairs = (drawn.T @ drawn)[tuple(torch.triu_indices(N, N, 1))]
    p = R * (R - 1) / (N * (N - 1))
    deviations = (pairs - T * p) / (T * p * (1 - p)) ** 0.5
    assert deviations.abs().max() < 5
    assert 0.8 < deviations.std() < 1.2


def attention_with_a_fixed_draw() -> ConvNNAttention:
    return ConvNNAttention(16, k=4, candidates=RandomCandidates(8, fixed_in_eval=True)).eval()


def lerp_everything(average: Tensor, current: Tensor) -> Tensor:
    """As averages of timm and of trainers do with every entry of a state dict."""
    return 0.9999 * average + (1 - 0.9999) * current


AVERAGES: dict[str, dict] = {
    "default": {},
    "ema": {"avg_fn": swa_utils.get_ema_avg_fn(0.999)},
    "multi-ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "multi-swa": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
}


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES.keys())
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_has_the_same_draw(options: dict, use_buffers: bool) -> None:
    layer = attention_with_a_fixed_draw()
    average = swa_utils.AveragedModel(layer, use_buffers=use_buffers, **options)
    for _ in range(100):
        average.update_parameters(layer)
    x = torch.randn(2, 50, 16)
    expected = rows(layer.candidates, (50,))
    assert rows(average.module.candidates, (50,)) == expected
    torch.testing.assert_close(average(x), layer(x))


def test_an_average_of_the_state_dict_has_the_same_draw() -> None:
    layer = attention_with_a_fixed_draw()
    average = copy.deepcopy(layer)
    for _ in range(100):
        state = layer.state_dict()
        for name, value in average.state_dict().items():
            value.copy_(lerp_everything(value, state[name]))
    assert rows(average.candidates, (50,)) == rows(layer.candidates, (50,))


@pytest.mark.parametrize(
    "cast",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        lambda module: module.half().float(),
        lambda module: module.to(torch.float8_e4m3fn).to(torch.float32),
        lambda module: module.type(torch.int64),
        copy.deepcopy,
    ],
    ids=["half", "bfloat16", "double", "half-float", "float8-float", "int64", "deepcopy"],
)
def test_a_cast_keeps_the_draw(cast: Callable[[nn.Module], nn.Module]) -> None:
    candidates = RandomCandidates(8, fixed_in_eval=True).eval()
    expected = rows(candidates, (100,))
    assert rows(cast(candidates), (100,)) == expected  # type: ignore[arg-type]


def test_a_seed_saved_as_one_number_can_be_loaded() -> None:
    layers = [attention_with_a_fixed_draw() for _ in range(3)]
    state = layers[0].state_dict()
    for layer, seed in zip(layers, (2**62 + 5, 2**62 + 5, 2**62 + 4), strict=True):
        layer.load_state_dict({**state, "candidates.seed": torch.tensor(seed)})
    first, same, other = (rows(layer.candidates, (100,)) for layer in layers)
    assert first == same
    assert first != other


# Seeds as one number, and what they draw: r, shape of the map, padding, rows.
DRAWS = {
    2**62 + 5: [
        (5, (7,), 0, [5, 0, 3, 1, 6]),
        (4, (3, 4), 0, [5, 8, 0, 3]),
        (4, (3, 4), 1, [14, 19, 7, 10]),
        (7, (2, 3), 1, [5, 8, 14, 13, 0, 3, 7]),
        (6, (5,), 2, [5, 8, 0, 3, 7, 1]),
        (8, (40, 50), 0, [48, 247, 1560, 473, 186, 1370, 1438, 1593]),
    ],
    -1: [
        (5, (7,), 0, [5, 3, 1, 6, 0]),
        (4, (3, 4), 0, [5, 3, 1, 7]),
        (4, (3, 4), 1, [14, 10, 8, 16]),
        (7, (2, 3), 1, [5, 3, 1, 7, 12, 6, 14]),
        (6, (5,), 2, [5, 3, 1, 7, 6, 8]),
        (8, (40, 50), 0, [922, 187, 1233, 800, 1035, 1903, 479, 1648]),
    ],
}


@pytest.mark.parametrize("seed", DRAWS)
def test_a_seed_draws_the_same_in_every_version(seed: int) -> None:
    """Saved models depend on it."""
    for r, shape, padding, expected in DRAWS[seed]:
        candidates = RandomCandidates(r, fixed_in_eval=True).eval()
        candidates.load_state_dict({"seed": torch.tensor(seed)})
        assert rows(candidates, shape, padding) == expected
        bits = [seed >> i & 1 for i in range(64)]
        signs = torch.tensor([1.0 if bit else -1.0 for bit in bits]).view(2, 32)
        candidates = RandomCandidates(r, fixed_in_eval=True).eval()
        candidates.load_state_dict({"seed": signs})
        assert rows(candidates, shape, padding) == expected


def test_the_seed_and_draws_in_training_are_those_of_the_generator() -> None:
    """For a fixed PyTorch: its generator may change between versions."""
    torch.manual_seed(3)
    candidates = RandomCandidates(5, fixed_in_eval=True)
    torch.manual_seed(3)
    assert torch.equal(candidates.seed, torch.empty(2, 32).random_(0, 2) * 2 - 1)
    for training in (candidates, RandomCandidates(5).eval()):
        torch.manual_seed(3)
        drawn = rows(training, (3, 4), 1), rows(training, (2, 1), 2)
        torch.manual_seed(3)
        inner = torch.arange(12) // 4 * 6 + torch.arange(12) % 4 + 7  # of the padded 5×6 map
        assert drawn[0] == inner[torch.randperm(12)[:5]].tolist()
        assert drawn[1] == torch.randperm(30)[:5].tolist()  # of all, as the map has only two


@pytest.mark.slow
def test_ranks_have_the_same_draw(run_python: Callable[..., str], tmp_path: Path) -> None:
    printed = run_python(
        f"""
        import os, torch, torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        import convnn_kernels.nn as cnn

        child = os.fork()
        rank = 1 if child == 0 else 0
        torch.manual_seed(rank)
        store = dist.FileStore({str(tmp_path / "store")!r}, 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        layer = cnn.ConvNNAttention(16, candidates=cnn.RandomCandidates(8, fixed_in_eval=True))
        DistributedDataParallel(layer)
        drawn = layer.eval().candidates((50,), 0, torch.device("cpu"))
        both = [torch.empty_like(drawn) for _ in range(2)]
        dist.all_gather(both, drawn)
        equal = torch.equal(*both)
        dist.destroy_process_group()
        if rank == 1:
            os._exit(0)
        os.waitpid(child, 0)
        print(equal)
        """
    )
    assert printed == "True\n"


def test_the_buffers_of_layers_may_be_averaged() -> None:
    """What a layer keeps besides parameters is a floating-point tensor or nothing."""
    for layer in (ConvNN1d(4, 4), ConvNN2d(4, 4), attention_with_a_fixed_draw()):
        assert all(buffer.is_floating_point() for buffer in layer.buffers())


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_counts_may_be_numbers_of_numpy(integer: type) -> None:
    spatial = SpatialCandidates(stride=integer(4))
    for value in (RandomCandidates(integer(4)).r, SpatialCandidates(integer(4)).r, spatial.stride):
        assert type(value) is int
        assert value == 4


@pytest.mark.parametrize(
    "layer",
    [
        ConvNN1d(4, 4, k=3, candidates=RandomCandidates(5)),
        ConvNN2d(4, 4, k=3, padding=1, candidates=RandomCandidates(5)),
        ConvNNAttention(4, k=3, candidates=RandomCandidates(5)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_redraw_and_repeat_under_a_seed(layer: torch.nn.Module) -> None:
    sizes = {"ConvNN1d": (2, 4, 49), "ConvNN2d": (2, 4, 7, 7), "ConvNNAttention": (2, 49, 4)}
    x = torch.randn(sizes[type(layer).__name__])
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer(x), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("include_self", [False, True])
def test_include_self(include_self: bool) -> None:
    layer = ConvNN2d(
        3, 3, k=4, padding=1, candidates=SpatialCandidates(4, include_self=include_self)
    )
    _, indices = layer.neighbors(torch.randn(1, 3, 6, 6))
    queries = torch.arange(64).view(8, 8)[1:-1, 1:-1].flatten()
    assert torch.equal(indices[0, :, 0], queries) == include_self
    candidates = set(rows(layer.candidates, (6, 6), 1))
    for query, found in zip(queries.tolist(), indices[0].tolist(), strict=True):
        assert set(found) <= candidates | ({query} if include_self else set())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomCandidates(0), "RandomCandidates: r must be a whole number of at least 1"),
        (lambda: SpatialCandidates(0), "SpatialCandidates: r must be a whole number of at least 1"),
        (lambda: SpatialCandidates(stride=0), "SpatialCandidates: stride must be a whole number"),
        (lambda: RandomCandidates(True), "RandomCandidates: r must be a whole number"),
        (lambda: RandomCandidates(np.bool_(True)), "RandomCandidates: r must be a whole number"),
        (lambda: RandomCandidates(torch.tensor(4)), "got Tensor of shape"),
        (
            lambda: SpatialCandidates(),
            "SpatialCandidates: r must be given without a stride, got None",
        ),
        (
            lambda: SpatialCandidates(4, stride=2),
            "SpatialCandidates: stride must be None where r is given, got 2",
        ),
        (lambda: draw(SpatialCandidates(5), (8, 8)), "r must be a square number in 2-D, got 5"),
        (lambda: draw(SpatialCandidates(9), (1, 50)), "fit into a map of"),
        (
            lambda: SpatialCandidates(4, spacing="round"),
            "SpatialCandidates: spacing must be 'even' or 'ends', got 'round'",
        ),
        (
            lambda: SpatialCandidates(stride=4, spacing="ends"),
            "SpatialCandidates: spacing must be 'even' with a stride, got 'ends'",
        ),
    ],
)
def test_wrong_settings(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("got", ["yes", 1, None, torch.tensor(True)])
def test_flags_must_be_bools(got: Any) -> None:
    with pytest.raises(ValueError, match="AllCandidates: include_self must be True or False, got"):
        AllCandidates(include_self=got)
    with pytest.raises(ValueError, match="RandomCandidates: fixed_in_eval must be True or False"):
        RandomCandidates(4, fixed_in_eval=got)
    with pytest.raises(ValueError, match="ConvNN2d: standardize must be True or False, got"):
        ConvNN2d(4, 4, positional_encoding="similarity", standardize=got)


def test_flags_may_be_bools_of_numpy() -> None:
    assert AllCandidates(include_self=np.bool_(True)).include_self is True
