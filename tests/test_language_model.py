# SPDX-License-Identifier: MIT
"""examples/causal_language_model.py: its models are causal, and learn."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# Steps this small wait longer for a second thread than they compute.
pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = Path(__file__).parent.parent / "examples" / "causal_language_model.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with models and batches of a small size."""
    spec = importlib.util.spec_from_file_location("causal_language_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, size in {"WIDTH": 32, "CONTEXT": 48, "BATCH": 4}.items():
        monkeypatch.setattr(module, name, size)
    return module


@pytest.mark.parametrize("index", range(3))
def test_a_character_does_not_depend_on_later_ones(example: Any, index: int) -> None:
    name = list(example.MODELS)[index]
    model = example.LanguageModel(20, example.MODELS[name]).eval()
    text = torch.randint(20, (2, 48))
    changed = text.clone()
    changed[:, 30:] = torch.randint(20, (2, 18))
    with torch.no_grad():
        before, after = model(text), model(changed)
    torch.testing.assert_close(before[:, :30], after[:, :30])
    assert not torch.allclose(before[:, 30:], after[:, 30:])


def test_training_lowers_the_loss(example: Any) -> None:
    model = example.LanguageModel(3, example.last_then_nearest)
    text = torch.tensor([0, 0, 1, 2]).repeat(300)
    before = example.bits_per_character(model, text)
    example.train(model, text, steps=60, seed=0)
    assert example.bits_per_character(model, text) < 0.5 * before


def test_the_program_writes_its_table(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(example, "read_text", lambda: (torch.randint(7, (2000,)), 7))
    file = tmp_path / "table.json"
    arguments = ["causal_language_model.py", "--steps", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", arguments)
    example.main()
    table = json.loads(file.read_text())
    assert [row["model"] for row in table["rows"]] == list(example.MODELS)
    sizes = [row["parameters"] for row in table["rows"]]
    assert max(sizes) < 1.05 * min(sizes)
    with_window, *others = (row["bits per character"] for row in table["rows"])
    beats = with_window < min(others)
    assert ("ConvNN beats" if beats else "ConvNN does not beat") in capsys.readouterr().out
