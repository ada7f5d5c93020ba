# SPDX-License-Identifier: MIT
"""The resources of each CUDA kernel of a built library: registers, stack, shared memory.

    python csrc/cuda/resources.py LIBRARY [--header FILE] [--json FILE] [--most-stack BYTES]

Prints a table, or writes the initializer that csrc/introspect.cpp includes and the same as JSON.
With ``--most-stack``, it is an error if a kernel uses more stack, which holds spilled registers, or
any within a loop; for a kernel for Hopper, all of which is a loop over items, hopper_rules.py says
more. The numbers come from ``cuobjdump`` of the CUDA toolkit or of Triton; the
environment variable CUOBJDUMP may give its path.
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# A multiprocessor of sm_80, sm_90 and sm_100: registers, warps, allocation unit of registers for a
# warp, shared memory (less on sm_80), and the shared memory reserved for each block.
REGISTERS, WARPS, STEP = 65536, 64, 256
SHARED, SHARED_SM_80, SHARED_OF_BLOCK = 228 << 10, 164 << 10, 1 << 10
# Warps of a block: kWarps in device.cuh, but for a kernel that has its own number.
WARPS_OF_BLOCK = 4
_OTHER_WARPS = {"hopper_sweep_kernel": 12, "hopper_dense_kernel": 12}

# The dynamic shared memory of a launch, by the bytes of an element and of a sum; the most that it
# can be, where it depends on sizes. tests/test_host_cuda.py compares this with the launches.
_LISTS = WARPS_OF_BLOCK * 2 * 256


def _tiles(size: int) -> int:
    return 2 * 64 * (32 + (8 if size == 2 else 4)) * size


DYNAMIC_SHARED: dict[str, Callable[[int, int], int]] = {
    "group_maxima_kernel": lambda element, sum: _tiles(element) + 2 * 64 * 4,
    "top_groups_kernel": lambda element, sum: _LISTS * 8,
    "exact_topk_kernel": lambda element, sum: _LISTS * 2 * sum,
    "aggregate_dense_kernel": lambda element, sum: _tiles(element),
    "rho_grad_dense_kernel": lambda element, sum: _tiles(element),
    "value_chunks_kernel": lambda element, sum: 32 * WARPS_OF_BLOCK * sum,
    "value_grad_dense_kernel": lambda element, sum: _tiles(sum) + 2 * 64 * 8,
    "weight_grad_dense_kernel": lambda element, sum: _tiles(sum),
    "query_side_kernel": lambda element, sum: 48 << 10,
    "sum_parts_kernel": lambda element, sum: 32 * WARPS_OF_BLOCK * sum,
    "count_pairs_kernel": lambda element, sum: 32 << 10,
    "place_keys_kernel": lambda element, sum: 32 * WARPS_OF_BLOCK * sum,
    "scatter_pairs_kernel": lambda element, sum: 32 << 10,
    "count_digits_kernel": lambda element, sum: WARPS_OF_BLOCK * 256 * 4,
    "sum_counts_kernel": lambda element, sum: 32 * WARPS_OF_BLOCK * 8,
    "scatter_kernel": lambda element, sum: (
        WARPS_OF_BLOCK * 256 * 4 + (WARPS_OF_BLOCK + 1) * 256 * 8
    ),
}
# The bytes of kernels for Hopper by the numbers of their instance, the finish with a weight of 64
# channels.
_HOPPER_SHARED = {
    "hopper_sweep_kernel": {(64,): 229_376, (128,): 230_400},
    "hopper_finish_kernel": {
        (10,): 3328 + 10 * 256,
        (16,): 6144 + 16 * 256,
        (32,): 3072 + 32 * 256,
        (64,): 6144 + 64 * 256,
    },
    "hopper_dense_kernel": {
        (1, 64): 118_848,
        (1, 128): 151_616,
        (2, 64): 144_432,
        (2, 128): 169_008,
    },
}


def _numbers(types: str) -> tuple[int, ...]:
    """Those among template arguments, such as "BFloat16, 64, true>"."""
    return tuple(int(each) for each in re.split("[, >]+", types) if each.isdigit())


_ELEMENTS = {"double": (8, 8), "float": (4, 4), "unsigned long long": (8, 8)}


def dynamic_shared(kernel: str) -> int:
    """Bytes for a kernel such as "group_maxima_kernel<float, true>"."""
    name, _, types = kernel.partition("<")
    if name in _HOPPER_SHARED:
        return _HOPPER_SHARED[name][_numbers(types)]
    shared = DYNAMIC_SHARED.get(name)
    first = re.split("[,>]", types)[0]
    return 0 if shared is None else shared(*_ELEMENTS.get(first, (2, 4)))


def find_cuobjdump() -> str | None:
    named = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump")
    if named:
        return named
    beside = [Path(path).parent / "cuobjdump" for path in (shutil.which("nvcc"),) if path]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        beside.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((str(path) for path in beside if path.exists()), None)


def readable(mangled: list[str]) -> list[str]:
    """Demangled names, such as "group_maxima_kernel<float, true>"."""
    tool = shutil.which("c++filt")
    if tool is None:
        return mangled
    output = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True)
    names = []
    for line in output.stdout.splitlines():
        found = re.search(r"(\w+_kernel)(<[^(]*>)?", line)
        types = (found[2] or "") if found else ""
        names.append(found[1] + types.replace("convnn::cuda::", "") if found else line)
    return names


def occupancy(architecture: str, registers: int, shared: int, warps: int = WARPS_OF_BLOCK) -> int:
    """Percent of the warps of a multiprocessor that registers and shared memory allow."""
    each = -(-registers * 32 // STEP) * STEP
    by_registers = REGISTERS // max(1, each * warps)
    all_shared = SHARED_SM_80 if architecture == "sm_80" else SHARED
    by_shared = all_shared // (shared + SHARED_OF_BLOCK)
    return 100 * min(WARPS, min(by_registers, by_shared) * warps) // WARPS


def resources(library: Path, tool: str) -> dict[str, dict[str, int]]:
    """Resources by architecture and kernel, such as "sm_90 scale_rows_kernel<float>"."""
    dump = subprocess.run(
        [tool, "--dump-resource-usage", str(library)], capture_output=True, text=True, check=True
    ).stdout
    architecture = ""
    found: list[tuple[str, str, dict[str, int]]] = []
    for line in dump.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\w+):", line):
            found.append((architecture, match[1], {}))
        elif "REG:" in line:
            found[-1][2].update({name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)})
    result = {}
    names = readable([name for _, name, _ in found])
    for (architecture, _, numbers), name in zip(found, names, strict=True):
        # No kernel has static shared memory; what cuobjdump reports is reserved for the system.
        shared = dynamic_shared(name)
        result[f"{architecture} {name}"] = {
            "registers": numbers["REG"],
            "local_bytes": numbers["STACK"] + numbers["LOCAL"],
            "shared_bytes": shared,
            "occupancy_percent": occupancy(
                architecture,
                numbers["REG"],
                shared,
                _OTHER_WARPS.get(name.partition("<")[0], WARPS_OF_BLOCK),
            ),
        }
    return result


_UNCONDITIONAL = ("BRA", "JMP", "BRX", "BRXU", "JMX", "JMXU", "RET", "EXIT")


def stack_in_loops(sass: str) -> dict[str, int]:
    """For each function of disassembled code, the number of stack accesses within loops.

    An instruction is in a loop if it can be reached from itself. An indirect jump may lead anywhere
    in the function, and the return from a subroutine to the instruction after any call. Raises
    ValueError if no instruction of a function can be parsed.
    """
    found: dict[str, int] = {}
    for part in re.split(r"Function : ", sass)[1:]:
        code, following = control_flow(part)
        # A function occurs once for each architecture.
        found[part.split()[0]] = found.get(part.split()[0], 0) + sum(
            uses_stack(code[at]) and at in _reached(following, at) for at in code
        )
    return found


def uses_stack(instruction: str) -> bool:
    return bool(re.search(r"\b(LDL|STL)\b", instruction))


def control_flow(function: str) -> tuple[dict[int, str], dict[int, list[int]]]:
    """The instructions of a disassembled function by address, and those that may follow each."""
    lines = re.findall(r"^ *(?:\w+:)? */\*([0-9a-f]{4,})\*/ +(.*?) *;", function, re.MULTILINE)
    code = {int(address, 16): instruction for address, instruction in lines}
    order = sorted(code)
    if not order:
        raise ValueError(f"cannot parse any instruction of {function.split()[0]}")
    after = dict(itertools.pairwise(order))
    returns = [after[at] for at in order if "CALL" in code[at] and at in after]
    following: dict[int, list[int]] = {}
    for at in order:
        words = code[at].split()
        conditional = words[0].startswith("@")
        name = words[1 if conditional else 0].split(".")[0]
        target = re.search(r"0x([0-9a-f]+)\)?$", code[at])
        # The condition may also be an operand: BRA.U UP0, 0x40.
        conditional |= name in ("BRA", "JMP") and "," in code[at]
        goes_on = conditional or name not in _UNCONDITIONAL
        following[at] = [after[at]] if goes_on and at in after else []
        if name in ("BRA", "JMP", "CALL") and target:
            following[at].append(int(target[1], 16))
        elif name in ("BRX", "BRXU", "JMX", "JMXU"):
            following[at] += order
        elif name == "RET":
            following[at] += returns
    return code, following


def _reached(following: dict[int, list[int]], start: int) -> set[int]:
    seen: set[int] = set()
    left = list(following[start])
    while left:
        at = left.pop()
        if at not in seen:
            seen.add(at)
            left += following.get(at, [])
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--header", type=Path, help="write a C++ initializer instead of a table")
    parser.add_argument("--json", type=Path, help="with --header, write JSON, too")
    parser.add_argument("--most-stack", type=int, help="fail if a kernel uses more stack")
    arguments = parser.parse_args()
    tool = find_cuobjdump()
    if tool is None and arguments.header is None:
        sys.exit("cuobjdump was not found; set CUOBJDUMP to its path")
    kernels = resources(arguments.library, tool) if tool else {}
    if arguments.header:
        lines = [
            f'{{"{name}", {{{", ".join(f"""{{"{key}", {n}}}""" for key, n in numbers.items())}}}}},'
            for name, numbers in sorted(kernels.items())
        ]
        arguments.header.write_text("\n".join(lines) + "\n")
        if arguments.json:
            arguments.json.write_text(json.dumps(kernels, indent=1, sort_keys=True) + "\n")
        return
    for name, numbers in sorted(kernels.items()):
        print(f"{name:<60}" + "  ".join(f"{key} {n}" for key, n in numbers.items()))
    if not kernels:
        sys.exit("no kernels")
    most = arguments.most_stack
    if most is None:
        return
    if large := [name for name, numbers in kernels.items() if numbers["local_bytes"] > most]:
        sys.exit(f"more than {most} bytes of stack: {', '.join(large)}")
    if any(numbers["local_bytes"] for numbers in kernels.values()):
        command = [str(tool), "--dump-sass", str(arguments.library)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        counts = stack_in_loops(sass)
        looping = [name for name in counts if counts[name] and "hopper_" not in name]
        if looping:
            sys.exit(f"stack within a loop: {', '.join(readable(looping))}")


if __name__ == "__main__":
    main()
