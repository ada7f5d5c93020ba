# SPDX-License-Identifier: MIT
"""Trains causal language models of characters on a CPU, each in about a minute.

    python examples/causal_language_model.py

The text is the reference of the language that every Python ships (`help("for")` shows a part of
it); its last tenth is held out. Three transformers of one size learn it from the same batches. They
differ in what a token attends to:

1. `ConvNNAttention` with causal=True: in all blocks but the last, the last W tokens, each with a
   weight of its own (window=W, k=W, order="index"), as in a convolution; in the last block, the k
   nearest of all tokens before, as in attention;
2. the k nearest of all tokens before in every block, without a window;
3. all tokens before in every block: `scaled_dot_product_attention`.

The table has the bits per character of the text held out.
"""

import argparse
import json
import math
import platform
import pydoc_data.topics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn_kernels.nn import ConvNNAttention

WIDTH, HEADS, LAYERS = 96, 4, 3
CONTEXT, BATCH = 256, 12
K, WINDOW = 16, 8
LEARNING_RATE, WARMUP_STEPS = 3e-3, 40


class Attention(nn.Module):
    """Causal attention to all tokens before, [B, N, E] → [B, N, E]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            X.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for X in self.query_key_value(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """A transformer block, [B, N, E] → [B, N, E]."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = attention
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class LanguageModel(nn.Module):
    """Characters [B, N] → logits of the next ones [B, N, characters]."""

    def __init__(self, characters: int, attention: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block(WIDTH, attention(i)) for i in range(LAYERS)])
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.token(x) + self.position.weight[: x.shape[1]]))


def read_text() -> tuple[Tensor, int]:
    """The text as numbers of characters, [length], and how many different ones there are."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text]), len(number)


def batch_of(text: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Characters [B, CONTEXT] that begin at `first` [B], and those that follow each."""
    rows = first.unsqueeze(1) + torch.arange(CONTEXT + 1)
    return text[rows[:, :-1]], text[rows[:, 1:]]


def train(model: nn.Module, text: Tensor, steps: int, seed: int) -> float:
    """Trains on random parts of the text; returns the seconds that it took."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.99), weight_decay=0.1)
    begin = time.perf_counter()
    for step in range(steps):
        progress = step / steps
        factor = min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        first = torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator)
        characters, targets = batch_of(text, first)
        loss = F.cross_entropy(model(characters).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return time.perf_counter() - begin


@torch.no_grad()
def bits_per_character(model: nn.Module, text: Tensor) -> float:
    """Over the text in parts of CONTEXT characters, without what is left after the last one."""
    model.eval()
    losses = []
    for first in torch.arange(0, len(text) - CONTEXT, CONTEXT).split(32):
        characters, targets = batch_of(text, first)
        loss = F.cross_entropy(model(characters).mT, targets, reduction="none")
        losses.append(loss.mean(dim=1))
    return float(torch.cat(losses).mean()) / math.log(2)


def nearest(block: int) -> nn.Module:
    """The k nearest of all tokens before."""
    return ConvNNAttention(WIDTH, HEADS, K, metric="dot", causal=True)


def last_then_nearest(block: int) -> nn.Module:
    """The last tokens, each with a weight of its own; in the last block, the nearest."""
    if block == LAYERS - 1:
        return nearest(block)
    settings: dict[str, Any] = {"causal": True, "window": WINDOW, "order": "index"}
    return ConvNNAttention(WIDTH, HEADS, WINDOW, metric="dot", **settings)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    f"ConvNN, the last {WINDOW}, then the {K} nearest": last_then_nearest,
    f"ConvNN, the {K} nearest": nearest,
    "attention to all": lambda block: Attention(WIDTH, HEADS),
}


def compare(steps: int, seed: int) -> list[dict[str, Any]]:
    """A row of the table for each model."""
    text, characters = read_text()
    cut = len(text) * 9 // 10
    rows = []
    for name, attention in MODELS.items():
        print(f"{name} ...", flush=True)
        torch.manual_seed(seed)
        model = LanguageModel(characters, attention)
        seconds = train(model, text[:cut], steps, seed)
        rows.append(
            {
                "model": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "bits per character": round(bits_per_character(model, text[cut:]), 3),
                "seconds": round(seconds, 1),
            }
        )
        print("   " + ", ".join(f"{value} {name}" for name, value in [*rows[-1].items()][1:]))
    return rows


def main() -> None:
    """Reads the options, trains, and says which model is best."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=900, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="a file for the table")
    options = parser.parse_args()
    rows = compare(options.steps, options.seed)
    with_window, *others = (row["bits per character"] for row in rows)
    outcome = "beats" if with_window < min(others) else "does not beat"
    print(f"With a window, ConvNN {outcome} both models without one.")
    if options.json:
        stamp = {"python": platform.python_version(), "torch": torch.__version__}
        stamp |= {"threads": torch.get_num_threads(), "steps": options.steps, "seed": options.seed}
        options.json.write_text(json.dumps(stamp | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
