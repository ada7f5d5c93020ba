# SPDX-License-Identifier: MIT
"""What options of the commands here accept; argparse names the option in its error."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

import torch

_Number = TypeVar("_Number", int, float)


def _number(
    convert: Callable[[str], _Number], expected: str, is_accepted: Callable[[_Number], bool]
) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
        try:
            number = convert(text)
        except ValueError:
            pass
        else:
            if is_accepted(number):
                return number
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")

    return parse


at_least_one = _number(int, "an integer of at least 1", lambda number: number >= 1)
positive = _number(float, "a positive number", lambda number: 0 < number < math.inf)
not_negative = _number(float, "a number of at least 0", lambda number: 0 <= number < math.inf)
fraction = _number(float, "a number from 0 to 1", lambda number: 0 <= number <= 1)


def device(text: str) -> str:
    """ "cpu", "cuda" or "cuda:" and an index, if there is such a device."""
    accepted = ["cpu"]
    if torch.cuda.is_available():
        accepted += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if text not in accepted:
        without = "cpu, as there is no CUDA device"
        expected = f"one of {', '.join(accepted)}" if len(accepted) > 1 else without
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return text
