# SPDX-License-Identifier: MIT
"""Fails if a kernel for Hopper in a built library would be slow or hang.

    python csrc/cuda/hopper_rules.py [--may-be-slow] LIBRARY

Of the kernels of sm_90a whose name begins with "hopper", an error is:

- an access of the stack, where spilled registers are, in every turn of a sweep, an innermost loop
  around matrix products. What a turn does only sometimes, such as to move hits, may use the stack;
- registers that warpgroups claim of each other and that their block does not have: they would wait
  for them forever.

With --may-be-slow, only the second: for a build with CONVNN_BOUNDED_WAITS, where registers are
spilled around the calls of printf.

What only the compiler tells, checked_compile.py reads. Without cuobjdump, which resources.py looks
for, nothing is checked.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import resources


def faults(library: Path, tool: str, may_be_slow: bool = False) -> list[str]:
    dump = [tool, "--gpu-architecture", "sm_90a", str(library)]
    usage = _output(*dump, "--dump-resource-usage")
    found = re.findall(r"Function (\w*\d+hopper_\w+):\s+REG:(\d+)", usage)
    registers = {name: int(count) for name, count in found}
    if not registers:
        return []
    dump += ["--function", ",".join(registers)]
    threads = threads_of_blocks(_output(*dump, "--dump-elf"))
    all_of_them = []
    for part in re.split(r"Function : ", _output(*dump, "--dump-sass"))[1:]:
        name = part.split()[0]
        for fault in (
            "" if may_be_slow else stack_fault(part),
            pool_fault(part, registers[name], threads.get(name, 0)),
        ):
            if fault:
                all_of_them.append(f"{resources.readable([name])[0]}: {fault}")
    return all_of_them


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def threads_of_blocks(elf: str) -> dict[str, int]:
    """The threads of a block of each kernel, by __launch_bounds__."""
    found = {}
    for part in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        if match := re.search(
            r"EIATTR_MAX_THREADS\s.*?Value:((?:\s+0x[0-9a-f]+)+)", part, re.DOTALL
        ):
            sizes = [int(size, 16) for size in match[1].split()]
            found[part.split()[0]] = sizes[0] * sizes[1] * sizes[2]
    return found


def stack_fault(sass: str) -> str:
    """What is wrong with the stack of a disassembled function."""
    code, following = resources.control_flow(sass)
    products = {at for at in code if "HGMMA" in code[at]}
    used = {
        at
        for loop in innermost_loops(following, products)
        for at in loop
        if resources.uses_stack(code[at])
        # Without it nothing goes round.
        and not any(cycle & products for cycle in _cycles(following, loop - {at}))
    }
    return f"{len(used)} accesses of the stack in every turn of a sweep" if used else ""


def innermost_loops(following: dict[int, list[int]], inside: set[int]) -> Iterator[set[int]]:
    """The innermost loops that contain one of these addresses."""
    for loop in _cycles(following, set(following)):
        products = loop & inside
        if not products:
            continue
        # Without the instructions by which it is entered, what still goes round is a loop within.
        entries = {to for at in following if at not in loop for to in following[at] if to in loop}
        within = {at: [to for to in following[at] if to in loop] for at in loop}
        inner = loop - (entries or {min(loop)})
        loops_within = [each for each in _cycles(within, inner) if each & inside]
        covered = set().union(*loops_within) & inside
        if products - covered:
            yield loop
        if loops_within:
            yield from innermost_loops(
                {at: [to for to in within[at] if to in inner] for at in inner}, covered
            )


def _cycles(following: dict[int, list[int]], nodes: set[int]) -> list[set[int]]:
    """The strongly connected components of some nodes, without single ones that do not go round."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    path: list[int] = []
    on_path: set[int] = set()
    found = []
    for start in sorted(nodes):
        if start in index:
            continue
        # Tarjan's algorithm, without recursion.
        index[start] = low[start] = len(index)
        path.append(start)
        on_path.add(start)
        work = [(start, iter(following[start]))]
        while work:
            at, rest = work[-1]
            to = next((to for to in rest if to in nodes), None)
            if to is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[at])
                if low[at] == index[at]:
                    component = set(path[path.index(at) :])
                    del path[path.index(at) :]
                    on_path -= component
                    if len(component) > 1 or at in following[at]:
                        found.append(component)
            elif to not in index:
                index[to] = low[to] = len(index)
                path.append(to)
                on_path.add(to)
                work.append((to, iter(following[to])))
            elif to in on_path:
                low[at] = min(low[at], index[to])
    return found


def pool_fault(sass: str, registers: int, threads: int) -> str:
    """What is wrong with the registers that warpgroups of a kernel release and claim.

    A block has `registers` for each of its threads. One warpgroup keeps the fewest that
    setmaxnreg.dec leaves, and each other one may claim what setmaxnreg.inc names.
    """
    changes = re.findall(r"USETMAXREG\.(TRY_ALLOC|DEALLOC)\.CTAPOOL.*?0x([0-9a-f]+)", sass)
    claims = [int(n, 16) for change, n in changes if change == "TRY_ALLOC"]
    if not claims:
        return ""
    if not threads:
        return "setmaxnreg needs __launch_bounds__"
    groups = threads // 128
    kept = min((int(n, 16) for change, n in changes if change == "DEALLOC"), default=registers)
    wanted, all_of_them = (groups - 1) * max(claims) + kept, groups * registers
    if wanted <= all_of_them <= resources.REGISTERS // 128:
        return ""
    return (
        f"{groups} warpgroups have {all_of_them} registers for each thread of one, and want "
        f"{groups - 1} x {max(claims)} + {kept} = {wanted}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--may-be-slow", action="store_true")
    parser.add_argument("library", type=Path)
    args = parser.parse_args()
    tool = resources.find_cuobjdump()
    if tool is None:
        print("convnn_kernels: cuobjdump was not found, so that Hopper's kernels are not checked")
    elif wrong := faults(args.library, tool, args.may_be_slow):
        sys.exit("\n".join(["convnn_kernels: kernels that would be slow or hang:", *wrong]))


if __name__ == "__main__":
    main()
