# SPDX-License-Identifier: MIT
"""What the kernels of csrc/cuda occupy on sm_90a, for `tools.predict`: as predict.py counts those
of Triton, with the launches and the machine code of cuda_code.py and the table of expected_cuda.py.

Warps of a block with different roles share one walk, in which branches by role have the share of
the warps that go there. Copies by the bulk engine count as bytes of L2 and as writes to shared
memory. What a product reads of shared memory counts once for each warpgroup.
"""

import collections
import linecache
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from tools import cuda_code, sass
from tools.expected_cuda import EXPECTED, Expected


class Counted(NamedTuple):
    kernel: str
    cost: sass.Cost  # of the mean warp
    blocks: int
    warps: int  # of a block
    busiest: float  # what the block that has most does, over the mean


def text_of(line: sass.Line) -> str:
    return linecache.getline(line[0], line[1]).strip()


def unrolled(line: sass.Line) -> list[int]:
    """The numbers of a `#pragma unroll` above the line."""
    above = text_of((line[0], line[1] - 1))
    found = re.fullmatch(r"#pragma unroll\b(.*)", above)
    return [int(n) for n in re.findall(r"\b\d+\b", found[1]) if int(n) > 1] if found else []


def numbers_of(launch: cuda_code.Launch, before: Mapping[str, Any]) -> Any:
    """Those of the launch; `template`: the arguments of the kernel's template; `before`: the
    numbers of the last launch of each kernel before this one."""
    template = cuda_code.arguments_of(launch.instance)
    sizes = {"blocks": launch.blocks, "warps": launch.threads // 32}
    return SimpleNamespace(**launch.numbers | sizes, template=template, before=before)


def walk_of(program: sass.Program, expected: Expected, n: Any) -> sass.Walk:
    loops, branches = (
        {text: function(n) for text, function in table.items()}
        for table in (expected.loops, expected.branches)
    )
    return sass.Walk(program, text_of, loops, branches, unrolled)


def _by_line(walk: sass.Walk, table: dict[str, float], default: float | None) -> Any:
    def found(line: sass.Line) -> float | None:
        return next((x for text, x in table.items() if walk.is_at(line, text)), default)

    return found


def count(launch: cuda_code.Launch, n: Any, explain: bool = False) -> Counted:
    """A kernel or a loop that the table does not know is an error."""
    if launch.kernel not in EXPECTED:
        raise KeyError(f"tools/expected_cuda.py does not know what to expect of {launch.kernel}")
    expected = EXPECTED[launch.kernel]
    program = cuda_code.machine_code(launch.kernel, launch.instance)
    walk = walk_of(program, expected, n)
    shares, copied = (
        {text: function(n) for text, function in table.items()}
        for table in (expected.shares, expected.copied)
    )
    by_line = (_by_line(walk, shares, 1.0), _by_line(walk, copied, None))
    cost = sass.cost(program, walk, 1, {}, *by_line, expected.generic_is_shared)
    if explain:
        print(f"{launch.instance}: {launch.blocks} blocks of {n.warps} warps; {cost}")
        print("".join(f"    {note}\n" for note in dict.fromkeys(walk.notes)), end="")
        print("\n".join(lines(program, walk)))
    return Counted(launch.kernel, cost, launch.blocks, n.warps, expected.busiest(n))


def lines(program: sass.Program, walk: sass.Walk, most: int = 40) -> Iterable[str]:
    """The lines of csrc/cuda that most instructions of a warp come from, each with the functions
    that it calls in other places."""
    found = collections.defaultdict[tuple[str, int], float](float)
    for block, times in zip(walk.blocks, walk.executed, strict=True):
        for i in block.instructions:
            levels = [program.instructions[i].line[:2], *program.instructions[i].line[2:]]
            own = [each for each in levels if Path(each[0]).parent == cuda_code.SOURCES]
            own = [each for each in own if Path(each[0]).name not in _WRAPPERS] or own or levels
            found[own[0]] += times
    for line, times in sorted(found.items(), key=lambda each: -each[1])[:most]:
        yield f"{times:12.1f}  {Path(line[0]).name}:{line[1]}  {text_of(line)}"


_WRAPPERS = {"device.cuh", "hopper.cuh", "wgmma.cuh"}


def launches(operator: str, **numbers: int | str) -> Iterator[tuple[cuda_code.Launch, Any]]:
    """What is launched for a call, with the numbers of each launch."""
    before = dict[str, Any]()
    for launch in cuda_code.launches(operator, **numbers):
        n = numbers_of(launch, before.copy())
        yield launch, n
        before[launch.kernel] = n


def counts(operator: str, explain: bool = False, **numbers: int | str) -> list[Counted]:
    """Of all launches of a call."""
    return [count(launch, n, explain) for launch, n in launches(operator, **numbers)]
