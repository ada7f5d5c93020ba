# SPDX-License-Identifier: MIT
"""Tries ``nn.replace`` on models of torchvision, timm and transformers, with random weights.

Prints the table of docs/layers.md. Attention becomes "kvt" with k = N, and convolutions what
``from_conv2d`` gives; neither changes what a model computes. "off by" is the difference of its
outputs before and after, relative to the largest.

    pip install torchvision timm transformers
    python -m tools.replace_models
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from convnn_kernels.nn import ConvNN2d, ConvNNAttention, replace

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def torchvision_models() -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    import torchvision

    for name in ("vit_b_16", "swin_t", "resnet18", "resnet50", "convnext_tiny"):
        yield name, torchvision.models.get_model(name), {"": torch.randn(1, 3, 224, 224)}


def timm_models() -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    import timm

    for name, options in (
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"qk_norm": True}),
        ("deit3_small_patch16_224", {}),
        ("eva02_tiny_patch14_224", {}),
        ("beit_base_patch16_224", {}),
        ("davit_tiny", {}),
        ("swin_tiny_patch4_window7_224", {}),
        ("convnext_atto", {}),
        ("resnet18", {}),
    ):
        title = ", ".join([name, *(f"{key}={value}" for key, value in options.items())])
        yield title, timm.create_model(name, **options), {"": torch.randn(1, 3, 224, 224)}


def transformers_models() -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    import transformers

    image = {"pixel_values": torch.randn(2, 3, 224, 224)}
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, 12:] = 0
    text = {"input_ids": torch.randint(5, 90, (2, 20)), "attention_mask": mask}
    without_cache = {**text, "use_cache": False}
    names = {"dim": 64, "n_heads": 4, "n_layers": 2, "hidden_dim": 128}
    for name, options, inputs in (
        ("ViT", SMALL, image),
        ("DeiT", SMALL, image),
        ("Dinov2", SMALL, image),
        ("CLIPVision", SMALL, image),
        ("Bert", SMALL, text),
        ("Roberta", SMALL, text),
        ("DistilBert", names, text),
        ("CLIPText", SMALL, text),
        ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, without_cache),
        ("OPT", {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64}, without_cache),
    ):
        config = getattr(transformers, f"{name}Config")(**options)
        yield f"{name}Model", getattr(transformers, f"{name}Model")(config), inputs


def call(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    y: Any = model(*inputs.values()) if "" in inputs else model(**inputs)[0]
    return y


def take_all_tokens(layer: ConvNNAttention, args: tuple[Tensor, ...]) -> None:
    layer.k = (args[1] if len(args) > 1 and args[1] is not None else args[0]).shape[1]


def short(reason: str) -> str:
    reason = re.sub(r"from_conv2d: (\w+) must be .*, got (.*)", r"convolution, \1 \2", reason)
    return re.sub(": off by .*", "", reason)


def row(model: nn.Module, inputs: dict[str, Any]) -> str:
    model.eval()
    for parameter in model.parameters():
        # Such as a scale that would hide its block.
        if parameter.numel() > 0 and parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        expected = call(model, inputs)
        done = replace(model, attention="kvt", conv2d=ConvNN2d.from_conv2d)
        for layer in model.modules():
            if isinstance(layer, ConvNNAttention):
                layer.register_forward_pre_hook(take_all_tokens)
        try:
            got = call(model, inputs)
            off = f"{float((got - expected).abs().max() / expected.abs().max()):.0e}"
        except ValueError as error:
            off = f"error: {error}"
    swapped = Counter(done.swapped.values())
    left = Counter(map(short, done.left.values()))
    cells = ["; ".join(f"{n} × {what}" for what, n in each.items()) for each in (swapped, left)]
    return f"{cells[0] or '-'} | {cells[1] or '-'} | {off}"


PACKAGES: dict[str, Callable[[], Iterator[tuple[str, nn.Module, dict[str, Any]]]]] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", help=f"of {', '.join(PACKAGES)}; default: all")
    torch.manual_seed(0)
    print("| model | swapped | left | off by |\n|---|---|---|---|")
    for package in parser.parse_args().packages or PACKAGES:
        for name, model, inputs in PACKAGES[package]():
            print(f"| {package} {version(package)}: {name} | {row(model, inputs)} |", flush=True)


if __name__ == "__main__":
    main()
