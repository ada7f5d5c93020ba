# SPDX-License-Identifier: MIT
"""The layers as the paper's authors ran them, against numbers from their published code.

Each file in tests/data/paper holds what one of their layers computed: see README.md there.
Outputs and all gradients agree to 1e-12. What does not, or what the files do not hold:

- Among candidates a token may be its own neighbor twice. ConvNNAttention has no setting for it, and
  its output differs by 16% of the largest number; `CandidateAttention` has it.
- Which of two equally similar tokens comes first is up to rounding. The files have none, but for
  tokens of padding that add nothing.
- The order of coordinates changes no similarity; it matters only where they are aggregated.
- Dropout of the weights of attention is random, and 0 in the files. VGG and ViT show where all
  other dropout is.
- Metrics are compared to the decimals that they print: 1e-7 of the loss, 1e-4% of the accuracy.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.models import vgg11, vit_tiny
from benchmarks.models.as_run import (
    BandAttention,
    CandidateAttention,
    FlatRowCandidates,
    PaddedRandomCandidates,
    RotaryLocalAttention,
    TopKAttention,
)
from benchmarks.models.peers import Attention, LocalAttention, SparseAttention
from benchmarks.paper.data import AS_RUN_SCALE, Split, resized
from benchmarks.paper.train import Recipe, evaluate
from convnn_kernels import nn as cnn
from convnn_kernels.nn import (
    AllCandidates,
    Candidates,
    ConvNN2d,
    ConvNNAttention,
    HybridBranch2d,
    RandomCandidates,
    SpatialCandidates,
)

DATA = Path(__file__).parent / "data" / "paper"
TOLERANCE = 1e-12

# Parts of their names of weights, and ours. Rows of their similarities are W_k x, columns W_q x.
MAP = {"conv1d_layer.": ""}
BRANCHES = {"branch1.conv1d_layer": "convnn", "branch2": "conv", "pointwise_conv": "fuse"}
PROJECTIONS = {
    "W_q": "query_projection",
    "W_k": "key_projection",
    "W_v": "value_projection",
    "W_o": "output_projection",
}
CONVNN = PROJECTIONS | {"W_k": "query_projection", "W_q": "key_projection", "conv.": ""}

BAND = {
    "q_proj": "query_projection",
    "k_proj": "key_projection",
    "v_proj": "value_projection",
    "out_proj": "output_projection",
}


def read(name: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{name}.safetensors")


def differences(
    name: str,
    layer: nn.Module,
    names: Mapping[str, str],
    convert: Callable[[str, Tensor], dict[str, Tensor]] | None = None,
) -> dict[str, float]:
    """The largest difference of output and gradients from theirs, relative to the largest of them.

    Args:
        name: of the file.
        layer: ours; it gets their weights.
        names: parts of their names of weights → of ours.
        convert: from a name and a tensor of theirs, with parts renamed, to ours.
    """
    saved = read(name)
    weights, expected = (renamed(saved, kind, names, convert) for kind in ("weight", "gradient"))
    layer.double().load_state_dict(weights, strict=True)
    x = saved["input"].double().requires_grad_()
    y = layer(x)
    # The linear functional of the output whose gradients are in the files.
    (y.flatten() * torch.arange(y.numel(), dtype=y.dtype).cos()).sum().backward()
    expected |= {"output": saved["output"], "input": saved["input_gradient"]}
    got = {name: weight.grad for name, weight in layer.named_parameters()}
    got |= {"output": y.detach(), "input": x.grad}
    assert got.keys() == expected.keys()
    return {each: _difference(got[each], expected[each]) for each in expected}


def renamed(
    saved: Mapping[str, Tensor],
    kind: str,
    names: Mapping[str, str],
    convert: Callable[[str, Tensor], dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """The tensors whose name begins with `kind`, under our names."""
    result = {}
    for name, tensor in saved.items():
        if name.startswith(f"{kind}."):
            name = name.removeprefix(f"{kind}.")
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            result |= {name: tensor} if convert is None else convert(name, tensor)
    return result


def _difference(got: Tensor | None, expected: Tensor) -> float:
    assert got is not None
    assert got.shape == expected.shape
    largest = expected.abs().max().item()
    if largest < TOLERANCE and got.abs().max() < TOLERANCE:
        return 0.0  # A bias before a batch norm has no gradient but rounding.
    return (got - expected).abs().max().item() / largest


def split(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Their weight of query, key and value together → ours."""
    if "qkv" not in name:
        return {name: tensor}
    parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
    return {f"{part}_projection.weight": weight for part, weight in parts}


def swap(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The ConvNN branch comes first in their fusion of two equal branches, and last in ours."""
    if name.endswith("fuse.weight"):
        tensor = tensor.roll(tensor.shape[1] // 2, dims=1)
    return {name: tensor}


def worst(*args, **kwargs) -> float:
    return max(differences(*args, **kwargs).values())


def test_files() -> None:
    """README.md describes each, and all of them are read by a test below."""
    files = sorted(DATA.glob("*.safetensors"))
    described, tests = (DATA / "README.md").read_text(), Path(__file__).read_text()
    for name in (path.stem for path in files):
        assert f"`{name}`" in described
        assert f'"{name}"' in tests or name.startswith("branching_")
    assert sum(path.stat().st_size for path in files) < 300_000


@pytest.fixture
def draw(monkeypatch) -> Callable[[str, int], int]:
    """Has the next draw among so many tokens give the rows in the file; returns their number."""

    def set_drawn(name: str, tokens: int) -> int:
        rows = read(name)["drawn"]

        def randperm(n: int, **_) -> Tensor:
            assert n == tokens
            return rows

        monkeypatch.setattr(torch, "randperm", randperm)
        return len(rows)

    return set_drawn


def self_first() -> Candidates:
    return AllCandidates(include_self=True)


def convnn2d(
    candidates: Candidates | None = None, k: int = 4, inputs: int = 3, **settings
) -> ConvNN2d:
    """Their layer over a map; all tokens are candidates, and the token itself comes first."""
    settings["candidates"] = self_first() if candidates is None else candidates
    return ConvNN2d(inputs, 4, k, padding=1, projections="identity", rho="ones", **settings)


POSITIONS = {"positional_encoding": "similarity", "standardize": True, "coordinate_order": "xy"}


def test_map() -> None:
    assert worst("map_all", convnn2d(), MAP) < TOLERANCE


def test_map_where_tokens_have_equal_directions() -> None:
    """In each image one pixel is twice another. Without include_self, both take the first first."""
    assert worst("map_equal_directions", convnn2d(k=3), MAP) < TOLERANCE
    assert worst("map_equal_directions", convnn2d(AllCandidates(), k=3), MAP) > 0.1


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("map_positions", "similarity"),
        ("map_positions_faint", "similarity"),
        ("map_positions_both", "both"),
    ],
)
def test_map_with_positions(name: str, encoding: str) -> None:
    layer = convnn2d(**POSITIONS | {"positional_encoding": encoding})
    assert worst(name, layer, MAP) < TOLERANCE


def test_map_with_aggregated_positions() -> None:
    settings = {"positional_encoding": "aggregation", "coordinate_order": "xy"}
    assert worst("map_positions_values", convnn2d(**settings), MAP) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "settings"), [("map_random", {}), ("map_random_positions", POSITIONS)]
)
def test_map_with_random_candidates(name: str, settings, draw) -> None:
    """They are drawn among the 42 tokens of the padded 5×4 map."""
    candidates = PaddedRandomCandidates(draw(name, tokens=42))
    assert worst(name, convnn2d(candidates, **settings), MAP) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "settings"), [("map_spatial", {}), ("map_spatial_positions", POSITIONS)]
)
def test_map_with_spatial_candidates(name: str, settings) -> None:
    assert worst(name, convnn2d(FlatRowCandidates(3), **settings), MAP) < TOLERANCE


def test_map_smaller_than_the_grid() -> None:
    """A grid of 8×8 in a map of 4×4: all tokens are candidates."""
    assert worst("map_spatial_few_tokens", convnn2d(FlatRowCandidates(8)), MAP) < TOLERANCE


@pytest.mark.parametrize("ratio", [0, 0.5, 1])
def test_branches(ratio: float) -> None:
    """With λ = 0, "Conv2D" in the paper's tables, a 1×1 convolution follows the convolution."""
    layer = HybridBranch2d(3, 4, 3, ratio, k=4, padding=1, candidates=self_first())
    name = f"branching_{ratio:g}".replace(".", "_")
    assert worst(name, layer, BRANCHES, swap if ratio == 0.5 else None) < TOLERANCE


def test_pixel_shuffle() -> None:
    """Before the layer 2×2 pixels become channels, and after it channels 2×2 pixels."""
    shuffled = nn.Sequential(nn.PixelUnshuffle(2), convnn2d(inputs=8), nn.PixelShuffle(2))
    assert worst("map_pixel_shuffle", shuffled, {"conv1d_layer": "1"}) < TOLERANCE


def test_vgg() -> None:
    """A narrow VGG-11 in training mode, with λ = 0.5 and positions."""
    model = vgg11(
        3,
        "hybrid",
        candidates=self_first,
        channels=(4, "pool", 4, "pool", 4, 4, "pool", 4, 4, "pool", 4, 4, "pool"),
        hidden=6,
        **POSITIONS,
    )
    # Our classifier begins with the layer that flattens maps.
    shifted = {f"classifier.{i}": f"classifier.{i + 1}" for i in (6, 5, 3, 2, 0)}
    fix_dropouts("vgg", model, shifted)
    assert worst("vgg", without_statistics(model), BRANCHES | shifted, swap) < TOLERANCE


def fix_dropouts(name: str, model: nn.Module, names: Mapping[str, str]) -> None:
    """Has every dropout multiply by the numbers in the file; there must be no others."""
    masks = renamed(read(name), "mask", names)
    dropouts = {each for each, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert dropouts == masks.keys()
    for each, mask in masks.items():
        model.get_submodule(each).register_forward_hook(
            lambda _, inputs, __, mask=mask: inputs[0] * mask
        )


def without_statistics(model: nn.Module) -> nn.Module:
    """Norms that keep no averages over batches, as the files have none."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
    return model


class ResNetBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class DenseNetBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inputs),
                nn.ReLU(),
                nn.Conv2d(inputs, 4, 1, bias=False),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Conv2d(4, 2, 3, padding=1),
            )
            for inputs in (3, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


def replaced(block: nn.Module) -> nn.Module:
    """The block with ConvNN2d, k = 4, in place of its 3×3 convolutions."""
    result = cnn.replace(block, conv2d="convnn", k=4, candidates=self_first)
    assert len(result.swapped) == 2
    return without_statistics(block)


def test_resnet_block() -> None:
    names = {
        "conv_layer.1": "norm1",
        "conv_layer.4": "norm2",
        "identity": "shortcut",
        "conv1d_layer.": "",
    }
    assert worst("resnet_block", replaced(ResNetBlock()), names) < TOLERANCE


def test_densenet_block() -> None:
    names = {
        "denselayer1": "layers.0",
        "denselayer2": "layers.1",
        "norm1": "0",
        "conv1.": "2.",
        "norm2": "3",
        "conv2.conv1d_layer": "5",
    }
    assert worst("densenet_block", replaced(DenseNetBlock()), names) < TOLERANCE


def test_attention() -> None:
    assert worst("attention", Attention(6), PROJECTIONS) < TOLERANCE


def test_convnn() -> None:
    layer = ConvNNAttention(6, k=4, metric="dot")
    assert worst("attention_all", layer, CONVNN) < TOLERANCE


def test_convnn_with_cosine() -> None:
    assert worst("attention_cosine", ConvNNAttention(6, k=4), CONVNN) < TOLERANCE


def test_convnn_with_random_candidates(draw) -> None:
    name = "attention_random"
    candidates = RandomCandidates(draw(name, tokens=11))
    assert worst(name, CandidateAttention(6, 4, candidates), CONVNN) < TOLERANCE


def test_convnn_with_spatial_candidates() -> None:
    candidates = SpatialCandidates(7, spacing="ends")
    layer = CandidateAttention(6, 4, candidates)
    assert worst("attention_spatial", layer, CONVNN) < TOLERANCE


def test_convnn_where_no_token_is_its_neighbor_twice(draw) -> None:
    """Then the library's setting is enough: their constant 1, before the scale of 1/√6."""
    name = "attention_random_once"
    candidates = RandomCandidates(draw(name, tokens=11), self_similarity=6**0.5)
    layer = ConvNNAttention(6, k=3, metric="dot", candidates=candidates)
    assert worst(name, layer, CONVNN) < TOLERANCE


def test_convnn_where_tokens_are_their_neighbors_twice(draw) -> None:
    """ConvNNAttention has no setting for it, and its output differs by 16% of the largest number.

    Four of the 22 tokens do so, as similarities of other candidates are below the -0.1 that stands
    for their own. `CandidateAttention` has it, too: see `test_convnn_with_random_candidates`.
    """
    name = "attention_random"
    candidates = RandomCandidates(draw(name, tokens=11), self_similarity=6**0.5)
    layer = ConvNNAttention(6, k=4, metric="dot", candidates=candidates)
    assert differences(name, layer, CONVNN)["output"] == pytest.approx(0.161, abs=0.001)


def test_top_k_attention() -> None:
    names = {"proj.": "output_projection."}
    assert worst("kvt", TopKAttention(6, 4), names, split) < TOLERANCE
    kvt = ConvNNAttention(6, k=4, metric="dot", aggregation="sum")
    assert worst("kvt", kvt, names, split) < TOLERANCE


def test_local_attention() -> None:
    """A window of 4 and 10 tokens: the last block has two tokens of padding."""
    names = {"to_out": "output_projection"}
    layer = RotaryLocalAttention(6, window=4, head_dim=4)
    assert worst("local", layer, names, split) < TOLERANCE
    without = LocalAttention(6, window=4, head_dim=4)
    assert differences("local", without, names, split)["output"] > 0.1


def test_band_attention() -> None:
    """Their sparse attention: with window 5, to those at most two tokens away."""
    assert worst("sparse", BandAttention(6, 5), BAND) < TOLERANCE


def test_vit() -> None:
    """With two blocks, in training mode: where dropout is, its numbers multiply features."""
    model = vit_tiny(
        3,
        "convnn",
        3,
        metric="dot",
        image_size=8,
        patch_size=4,
        embed_dim=6,
        mlp_dim=8,
        depth=2,
        residual_dropout=0.1,
        class_token_deviation=1.0,
    )
    names = CONVNN | {
        "patch_embedding.linear_projection": "patches",
        "patch_embedding.norm": "patch_norm",
        "positional_encoding.cls_tokens": "class_token",
        "transformer_encoder": "blocks",
        "norm1": "attention_norm",
        "norm2": "mlp_norm",
        "dropout1": "attention_dropout",
        "dropout2": "mlp.4",
        "classifier": "head",
    }
    fix_dropouts("vit", model, names)
    assert worst("vit", model, names) < TOLERANCE


def test_class_token() -> None:
    """It is drawn with a standard deviation of 1; the paper's text gives none, and ours is 0.02."""
    theirs = read("class_token")["class_token"].std().item()
    ours = vit_tiny(10, depth=1, class_token_deviation=1.0).class_token.std().item()
    written = vit_tiny(10, depth=1).class_token.std().item()
    assert theirs == pytest.approx(1, abs=0.2)
    assert ours == pytest.approx(1, abs=0.2)
    assert written == pytest.approx(0.02, abs=0.004)


@pytest.mark.parametrize("r", range(16, 193, 16))
def test_rows_of_spatial_candidates(r: int) -> None:
    """The 197 tokens of ViT, and r as in the paper's Figure 8."""
    rows = SpatialCandidates(r, spacing="ends")((197,), 0, torch.device("cpu"))
    assert rows.tolist() == read("spatial_rows")[f"tokens_197_r_{r}"].tolist()


def test_rows_of_spatial_candidates_in_maps() -> None:
    saved = read("spatial_rows")
    maps = [name.split("_")[1::2] for name in saved if name.startswith("map_")]
    assert len(maps) == 10
    for side, n in maps:
        rows = FlatRowCandidates(int(n))((int(side), int(side)), 1, torch.device("cpu"))
        assert sorted(rows.tolist()) == sorted(saved[f"map_{side}_n_{n}"].tolist())


@pytest.mark.parametrize("settings", [{}, {"positional_encoding": "similarity"}])
def test_positions_as_written_differ(settings) -> None:
    """The order of the coordinates changes no similarity, but it does where they are aggregated."""
    assert differences("map_positions", convnn2d(**settings), MAP)["output"] > 0.1
    settings = {"positional_encoding": "aggregation", "coordinate_order": "yx"}
    assert differences("map_positions_values", convnn2d(**settings), MAP)["output"] > 0.1


@pytest.mark.parametrize("spacing", ["even", "ends"])
def test_spatial_candidates_of_a_map_are_not_those_of_the_library(spacing) -> None:
    candidates = SpatialCandidates(9, spacing=spacing)
    assert differences("map_spatial", convnn2d(candidates), MAP)["output"] > 0.1


def test_attention_as_written_differs() -> None:
    for name, layer, names in (
        ("attention_all", ConvNNAttention(6, k=4), CONVNN),  # cosine
        ("attention_all", ConvNNAttention(6, k=4, metric="dot"), PROJECTIONS | {"conv.": ""}),
        ("attention_spatial", CandidateAttention(6, 4, SpatialCandidates(7)), CONVNN),
        ("sparse", SparseAttention(6, 5), BAND),
    ):
        assert differences(name, layer, names)["output"] > 0.1


def test_resize() -> None:
    """Seven times, as 32×32 to 224×224, to bytes, which are normalized by constants; in float32."""
    saved = read("resize")
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in AS_RUN_SCALE["cifar10"])
    pixels = resized(saved["pixels"].unsqueeze(0), 28)[0]
    assert torch.equal((pixels / 255 - mean) / deviation, saved["resized"])


def test_metrics() -> None:
    """Means over batches of 4, 4 and 2, as they print them: exact ones are 1.6671 and 20%."""
    saved = read("metrics")
    rows = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    split = Split(rows, saved["labels"])
    unscaled = (torch.tensor(0.0), torch.tensor(1 / 255))

    class Saved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return saved["logits"][x.flatten().round().long()]

    loss, accuracy = evaluate(Saved(), split, Recipe(batch_size=4, as_run=True), unscaled, 1)
    assert loss == pytest.approx(saved["loss"].item(), abs=1e-7)
    assert 100 * accuracy == pytest.approx(saved["accuracy"].item(), abs=5e-5)
    loss, accuracy = evaluate(Saved(), split, Recipe(batch_size=4), unscaled, 1)
    assert (loss, accuracy) == (pytest.approx(1.66706, abs=1e-5), pytest.approx(0.2))
