# SPDX-License-Identifier: MIT
"""One small change of one source file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@dataclass(frozen=True)
class Slip:
    path: str  # relative to the checkout
    before: str  # occurs once in the file
    after: str
    what: str  # the name of a rule, or what a slip made by hand breaks
    by_hand: bool = False

    @property
    def id(self) -> str:
        name = "hand" if self.by_hand else self.what
        text = f"{self.path}\0{self.before}\0{self.after}"
        return f"{PurePosixPath(self.path).name}:{name}:{digest(text.encode())[:6]}"

    def line(self, text: str) -> int:
        """The number of the first line that it changes, of this text of the file."""
        same = 0
        while self.before[same : same + 1] == self.after[same : same + 1] != "":
            same += 1
        return text.count("\n", 0, text.index(self.before) + same) + 1

    def apply(self, text: str) -> str:
        """The text of the file with the slip.

        Raises:
            ValueError: unless its text occurs exactly once.
        """
        found = text.count(self.before)
        if found != 1:
            raise ValueError(f"{self.id}: its text must occur once in {self.path}, found {found}")
        if self.before == self.after:
            raise ValueError(f"{self.id}: changes nothing")
        return text.replace(self.before, self.after)


def changed_part(before: str, after: str) -> tuple[str, str]:
    """What differs, with the rest of its line on both sides."""
    old, new = before.strip().splitlines(), after.strip().splitlines()
    while old and new and old[0] == new[0]:
        old, new = old[1:], new[1:]
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return " ".join(line.strip() for line in old), " ".join(line.strip() for line in new)


def file_digest(path: Path) -> str:
    return digest(path.read_bytes()) if path.exists() else ""
