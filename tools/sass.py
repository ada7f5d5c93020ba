# SPDX-License-Identifier: MIT
"""Machine code as nvdisasm prints it, with the lines of source it comes from: how often each
instruction is executed, and what it occupies.

A loop of the machine code is one of the source, named by the text of its line, such as
`for d in range(0, D, BLOCK_D):`, because the branch back has that line. Where the compiler has
unrolled a loop, what is left of its trips follows it in pieces of half the size each, behind
branches of the same line, or in a loop of that line with one copy.

What a warp does at other branches, unless it is told otherwise: it goes where loops are; else it
executes what an `if` might skip; and numbers are ordinary, so that divisions and roots never take
the path that is a subroutine.
"""

import collections
import graphlib
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Of one source line, in the order of the machine code; or one number for all there are.
Expected = float | Sequence[float]
# File and number; behind them, of an inlined function, the lines that call it, innermost first.
Line = tuple[Any, ...]


class Instruction(NamedTuple):
    line: Line
    conditional: bool
    opcode: str
    operands: str


class Program(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]  # of which instruction


def parse(text: str) -> Program:
    """What `nvdisasm -g -c`, or `-gi` instead of `-g`, prints of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line: Line = ("", 0)
    inlined = False  # the line before was that of an inlined function, and its caller follows
    for each in text.splitlines():
        if found := re.match(r'\s*//## File "([^"]*)", line (\d+)', each):
            place = found[1], int(found[2])
            line = (*line, place) if inlined else place
            inlined = " inlined at " in each
        elif found := re.match(r"\s*([.$\w]+):\s*$", each):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s*/\*\w{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", each):
            instructions.append(Instruction(line, bool(found[1]), found[2], found[3].strip()))
    return Program(instructions, labels)


@dataclass
class Block:
    """Instructions that are executed one after the other.

    next: the blocks that may follow; the one behind it in the machine code is the first.
    """

    instructions: range
    next: list[int] = field(default_factory=list)
    calls: str | None = None  # the label of a subroutine, at the end


@dataclass
class Loop:
    header: int
    body: set[int]
    latch: int  # the last block that branches back
    end: int  # the block after which it is left
    line: Line
    exits: int = 1  # copies of the source's loop in the body, each of which may end it
    trips: float = 0.0
    times: float = 0.0  # how often its first block is executed for each time that it is entered
    entered: float = 0.0
    copies: int = 1  # of the source's loop, where it is unrolled
    before: "Loop | None" = None  # the unrolled loop of which this one has the rest
    rest: "Loop | None" = None


def blocks_of(program: Program) -> list[Block]:
    code, labels = program
    names = [each.opcode.split(".")[0] for each in code]
    ends = {i + 1 for i, name in enumerate(names) if name in ("BRA", "EXIT", "RET", "CALL")}
    starts = sorted({0, *labels.values(), *ends} - {len(code)})
    number = {start: i for i, start in enumerate(starts)}
    found = []
    # Where a conditional EXIT leads.
    over = len(starts)
    for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
        block, last, name = Block(range(start, end)), code[end - 1], names[end - 1]
        target = re.search(r"`\(([.$\w]+)\)", last.operands)
        # A condition is a predicate before the instruction, or a register among the operands.
        conditional = last.conditional or bool(re.match(r"[!~]?U?[PR]\w", last.operands))
        internal = ("`($__internal_", "`(.L_x_")  # the latter with uniform registers
        is_other = name == "CALL" and not any(each in last.operands for each in internal)
        if name in ("BRX", "JMX") or is_other:
            raise ValueError(f"a branch that leads anywhere: {last.opcode} {last.operands}")
        block.calls = target[1] if name == "CALL" and target else None
        if (name not in ("BRA", "EXIT", "RET") or conditional) and end < len(code):
            block.next.append(number[end])
        if name == "BRA" and target:
            block.next.append(number[labels[target[1]]])
        if name == "EXIT" and conditional:
            block.next.append(over)
        found.append(block)
    return [*found, Block(range(0))]


def _before(edges: Mapping[int, Iterable[int]]) -> dict[int, set[int]]:
    before: dict[int, set[int]] = {each: set() for each in edges}
    for a, after in edges.items():
        for b in after:
            before[b].add(a)
    return before


def _dominators(edges: Mapping[int, Iterable[int]]) -> dict[int, set[int]]:
    """Of each block that is reached from the first one, those on every way to it."""
    reached, todo = {0}, [0]
    while todo:
        new = set(edges[todo.pop()]) - reached
        reached |= new
        todo += new
    before = _before({each: edges[each] for each in reached})
    of = {each: set(reached) for each in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for each in sorted(reached - {0}):
            new = {each} | set.intersection(*(of[a] for a in before[each]))
            changed |= new != of[each]
            of[each] = new
    return of


class Walk:
    """How often a warp executes each block of a program, `executed`.

    Args:
        text: the text of a line of source.
        loops: the expected trips of a loop, by how its text begins.
        branches: how probable it is that what an `if` might skip is executed, by its text; of one
            with a `break`, that the loop goes on.
        unrolled: into how many copies the source wants the loop of a line to be unrolled. Then
            what is left of its trips counts as a part of one of these, not in copies behind it.
    """

    def __init__(
        self,
        program: Program,
        text: Callable[[Line], str],
        loops: Mapping[str, Expected],
        branches: Mapping[str, Expected],
        unrolled: Callable[[Line], Sequence[int]] = lambda line: (),
    ) -> None:
        self.code, self.blocks, self._text = program.instructions, blocks_of(program), text
        self.notes: list[str] = []
        self._calls_are_known = any(len(each.line) > 2 for each in self.code)
        edges = {i: block.next for i, block in enumerate(self.blocks)}
        dominators = _dominators(edges)
        back = {(a, b) for a in dominators for b in edges[a] if b in dominators[a]}
        # Without branches back nothing comes twice, and there is an order.
        self._forward = {a: [b for b in edges[a] if (a, b) not in back] for a in dominators}
        self._order = [*graphlib.TopologicalSorter(_before(self._forward)).static_order()]
        self._reaches: dict[int, set[int]] = {}
        for each in reversed(self._order):
            after = (self._reaches[a] for a in self._forward[each])
            self._reaches[each] = {each}.union(*after)
        self.loops = self._find_loops(back, _before({each: edges[each] for each in dominators}))
        self._headers = {loop.header for loop in self.loops}
        self._unrolled: list[Loop] = []
        for loop in self.loops:
            self._set_copies(loop, unrolled(loop.line))
        self._set_trips(loops)
        # Of a branch, the share of what is behind it.
        self._shares = self._told(branches)
        for loop in self.loops:
            if loop.before:
                self._shares |= self._pieces(loop.before, loop)
            self._shares |= self._guards(loop)
        for loop in self._unrolled:
            self._shares |= dict.fromkeys(self._rests(loop), 0.0)
        self.executed = self._flow()

    def _copies(self, loop: Loop, rest: Loop, second: Loop | None = None) -> int:
        """How many copies an unrolled loop has of another, which has the rest of its trips and, but
        where `second` is that loop, comes next."""
        second = second or rest
        first = loop if second is rest else rest
        if loop.line != rest.line or second.header not in self._reaches[first.latch]:
            return 1
        if self._accesses(rest):
            copies = self._accesses(loop) / self._accesses(rest)
            return int(copies) if copies in (2, 4, 8) else 1
        return 2 ** max(0, round(math.log2(self._size(loop) / self._size(rest))))

    def _size(self, loop: Loop) -> int:
        return sum(len(self.blocks[block].instructions) for block in loop.body)

    def _accesses(self, loop: Loop) -> int:
        """Instructions of a loop that access global memory."""
        places = (i for block in loop.body for i in self.blocks[block].instructions)
        return sum(self.code[i].opcode.split(".")[0] in _GLOBAL for i in places)

    def _branch(self, block: int) -> Instruction:
        return self.code[self.blocks[block].instructions[-1]]

    def _find_loops(self, back: set[tuple[int, int]], before: dict[int, set[int]]) -> list[Loop]:
        loops = []
        for header in sorted({b for _, b in back}):
            latches = [a for a, b in back if b == header]
            body, todo = {header}, [*latches]
            while todo:
                each = todo.pop()
                if each not in body:
                    body.add(each)
                    todo += before[each]
            ends = [a for a in sorted(body) for b in self._forward[a] if b not in body]
            # Or the program ends there.
            ends = ends or [a for a in sorted(body) if self._branch(a).opcode == "EXIT"]
            if not ends:
                raise ValueError(
                    f"a loop without an end: {self._text(self._branch(max(latches)).line)}"
                )
            # A `break` is another one, which is not taken.
            end = max(latches) if max(latches) in ends else header if header in ends else ends[-1]
            line = self._branch(end).line
            exits = sum(self._branch(each).line == line for each in ends)
            loops.append(Loop(header, body, max(latches), end, line, exits))
        return loops

    def _set_copies(self, loop: Loop, wanted: Sequence[int]) -> None:
        """Of wanted numbers the largest by which the accesses of memory in the loop can be divided,
        and most of them each line by itself."""
        if loop.exits > 1 or not wanted:
            return
        code = (self.code[i] for block in loop.body for i in self.blocks[block].instructions)
        names = _GLOBAL | _SHARED
        lines = collections.Counter(a.line for a in code if a.opcode.split(".")[0] in names)
        if not lines:
            return
        total = sum(lines.values())
        by_itself = {n: sum(a for a in lines.values() if a % n == 0) for n in wanted}
        fit = (n for n, a in by_itself.items() if total % n == 0 and 2 * a >= total)
        loop.exits = max(fit, default=1)
        if loop.exits > 1:
            self._unrolled.append(loop)

    def _rests(self, loop: Loop) -> list[int]:
        """The branches over copies of an unrolled loop before or behind it, where those are what
        comes next."""
        lines = {self.code[i].line for a in loop.body for i in self.blocks[a].instructions}
        found = []
        for each in self._two_ways():
            behind, target = self.blocks[each].next
            own = self._reaches[behind] - self._reaches[target]
            if each in loop.body or own & self._headers or target not in self._reaches[behind]:
                continue
            before = loop.header in self._reaches[target]
            if not before and each not in self._reaches[loop.latch]:
                continue
            code = [self.code[i].line in lines for a in own for i in self.blocks[a].instructions]
            if sum(code) > 0.7 * len(code) and len(code) > 0.3 * self._size(loop) / loop.exits:
                found.append(each)
        return found

    def _number(self, line: Line, table: Mapping[str, Expected], place: int) -> float | None:
        for begin, expected in table.items():
            if self.is_at(line, begin):
                number = expected if isinstance(expected, (int, float)) else expected[place]
                self.notes.append(f"{self._text(line)} {number:g}")
                return float(number)
        return None

    def is_at(self, line: Line, begin: str) -> bool:
        """Whether the text begins so; and behind an @, that of a line which calls the function."""
        own, *caller = begin.split(" @ ")
        texts = [self._text(line), *map(self._text, line[2:])]
        return texts[0].startswith(own) and all(
            any(each.startswith(of) for each in texts[1:]) for of in caller
        )

    def _set_trips(self, table: Mapping[str, Expected]) -> None:
        places, unknown = collections.Counter[Line](), []
        for loop in self.loops:
            trips = self._number(loop.line, table, places[loop.line])
            places[loop.line] += 1
            loop.trips = trips or 0.0
            loop.times = loop.trips / loop.exits
            if trips is None:
                unknown.append(self._text(loop.line) or str(loop.line))
        for loop, rest in itertools.pairwise(self.loops):
            copies = self._copies(loop, rest)
            if copies > 1:
                rest.before, loop.rest, loop.copies = loop, rest, copies
                loop.trips, rest.trips = divmod(loop.trips, copies)
            elif self._calls_are_known and (copies := self._copies(rest, loop, rest)) > 1:
                # The other way around; what is left counts as a part of a trip of all copies.
                rest.exits, rest.times = copies, rest.trips / copies
                loop.trips = loop.times = 0.0
        if unknown:
            raise KeyError(f"no number of trips of the loops {'; '.join(dict.fromkeys(unknown))}")

    def _two_ways(self) -> list[int]:
        """The blocks after which there is a choice, but for the branches back of loops."""
        return [
            each
            for each in self._order
            if len(set(self._forward[each])) == 2 and not self._diverges(each)
        ]

    def _breaks(self, block: int) -> bool:
        """Whether the branch leaves a loop of which it is not the end."""
        return any(
            block in loop.body and after not in loop.body and loop.end != block
            for loop in self.loops
            for after in self._forward[block]
        )

    def _diverges(self, block: int) -> bool:
        """Whether the branch is for warps whose lanes have parted."""
        return self._branch(block).opcode.startswith(("BRA.DIV", "BRA.CONV"))

    def _told(self, table: Mapping[str, Expected]) -> dict[int, float]:
        shares, places = {}, collections.Counter[Line]()
        for each in sorted(self._two_ways()):
            line, (behind, target) = self._branch(each).line, self.blocks[each].next
            share = self._number(line, table, places[line])
            places[line] += 1
            if share is not None and self._breaks(each):
                shares[each] = share
            elif share is not None:
                shares[each] = share if self._comes_first(behind, target, line) else 1 - share
        return shares

    def _comes_first(self, one: int, other: int, line: Line) -> bool:
        """Whether `one` is what the `if` of a line may skip, rather than `other`: which is reached
        in any case, or in the source comes later, behind an `else`."""
        if one in self._reaches[other] or other in self._reaches[one]:
            return other in self._reaches[one]

        def in_function(place: Line) -> Line:
            """What executes it of the function that `line` is in, as that was called."""
            levels = [place[:2], *place[2:]]
            outer = len(levels) - len(line[2:])
            is_in = outer > 0 and levels[outer:] == [*line[2:]]
            return tuple(levels[outer - 1]) if is_in else ("", 0)

        def begin(of: int, without: int) -> tuple[int, int]:
            blocks = self._reaches[of] - self._reaches[without]
            places = (self.code[i].line for a in blocks for i in self.blocks[a].instructions)
            levels = map(in_function, places)
            later = [number for file, number in levels if file == line[0] and number > line[1]]
            # Some instructions may have been moved here from the other one; but unless it is known
            # what calls them, lines of inlined functions are among the later ones.
            place = statistics.median_low if self._calls_are_known else min
            # Without such lines, what has loops is a function that it calls.
            return place(later or [2**31]), -len(self._headers & blocks)

        return begin(one, other) <= begin(other, one)

    def _guards(self, loop: Loop) -> dict[int, float]:
        """The branches of a loop's own line outside of it, and its number of times.

        Those before it skip it. Where it is unrolled, those behind it skip what is left: a half
        as many copies as the loop has, a quarter, ..., 1.
        """
        later = {a.header for a in self.loops if a.line == loop.line and a.header > loop.header}
        same = [each for each in self._two_ways() if self._branch(each).line == loop.line]
        same = [each for each in same if each not in loop.body]
        if loop.before:
            same = [each for each in same if each in self._reaches[loop.before.latch]]

        def leads_in(block: int) -> bool:
            return loop.header in self._reaches[block]

        entry = [a for a in same if sum(map(leads_in, self.blocks[a].next)) == 1]
        rest = sorted(a for a in same if a in self._reaches[loop.latch])
        rest = [a for a in rest if not self._reaches[a] & later and loop.exits == 1]
        copies = 2 ** len(rest)
        loop.copies = max(loop.copies, copies)
        left = round(loop.trips) % copies
        shares = {a: float(bool(left & copies >> i + 1)) for i, a in enumerate(rest)}
        if loop.end == loop.header != loop.latch and loop.exits == 1:
            loop.times = loop.trips + 1  # the condition comes first
        elif entry:
            loop.times = max(1, loop.trips) / loop.exits
        if rest:
            loop.times = loop.trips // copies
        for each in entry:
            behind, target = self.blocks[each].next
            outside = target if leads_in(behind) else behind
            # Either no trip at all, or too few for all the copies.
            inside = min(1.0, loop.times if rest and outside <= rest[0] else loop.trips)
            if loop.rest and loop.rest.header not in self._reaches[outside]:
                inside = min(1.0, loop.trips * loop.copies + loop.rest.trips)
            shares[each] = inside if leads_in(behind) else 1 - inside
        return shares

    def _pieces(self, loop: Loop, rest: Loop) -> dict[int, float]:
        """The branches over pieces of half the size, ... between a loop and its rest, and over what
        comes before it, which is for no number of trips. What they have is not left for the rest.
        """
        shares, copies = {}, loop.copies
        for each in sorted(self._two_ways()):
            behind, target = self.blocks[each].next
            both = self._reaches[behind] & self._reaches[target]
            if self._branch(each).line != loop.line or rest.header not in both:
                continue
            taken = 0.0
            if each in self._reaches[loop.latch]:
                copies //= 2
                taken = float(rest.trips >= copies)
                rest.trips -= taken * copies
            elif loop.header not in both:
                continue
            shares[each] = taken if target in self._reaches[behind] else 1 - taken
        return shares

    def _share(self, block: int) -> float:
        behind, target = self.blocks[block].next
        if block in self._shares:
            return self._shares[block]
        if self._diverges(block):
            return 1.0
        loops = [len(self._headers & self._reaches[each]) for each in (behind, target)]
        if loops[0] != loops[1]:
            return float(loops[0] > loops[1])
        slow = [self.blocks[each].calls is not None for each in (behind, target)]
        if slow[0] != slow[1]:
            return float(slow[1])
        return float(behind not in self._reaches[target])

    def _flow(self) -> list[float]:
        executed = [0.0] * len(self.blocks)
        executed[0] = 1.0
        for each in self._order:
            loops = [loop for loop in self.loops if each in loop.body]
            for loop in loops:
                if loop.header == each:
                    loop.entered = executed[each]
                    executed[each] *= loop.times
            after = self._forward[each]
            for place, a in enumerate(after):
                left = [loop for loop in loops if a not in loop.body]
                ended = [loop for loop in loops if loop.end == each]
                if left:
                    # As often as the loop was entered, whatever its trips.
                    executed[a] += ended[0].entered if ended else 0.0
                elif len(after) == 1:
                    executed[a] += executed[each]
                elif ended:
                    executed[a] += executed[each] - ended[0].entered
                elif any(b not in loop.body for loop in loops for b in after):
                    executed[a] += executed[each] * self._shares.get(each, 1.0)
                else:
                    share = self._share(each)
                    executed[a] += executed[each] * (1 - share if place else share)
        return executed


# For a warp: the pipe of a quarter of a multiprocessor (sm_90) and its clocks.
_PIPES = {
    name: (pipe, clocks)
    for pipe, clocks, names in (
        (
            "alu",
            2,
            "BMSK CS2R F2FP FCHK FMNMX FSEL FSET FSETP HMNMX2 HSET2 HSETP2 IABS IADD3 IMNMX ISETP "
            "LEA LOP3 MOV P2R PLOP3 PRMT R2P SEL SGXT SHF VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3 "
            "VOTE",
        ),
        ("fma", 1, "FADD FFMA FMUL FSWZADD HADD2 HFMA2 HMUL2"),
        ("imad", 2, "IMAD"),  # on one of the two halves of that pipe
        ("special", 8, "BREV F2F F2I FLO FRND I2F I2I MUFU POPC REDUX"),
    )
    for name in names.split()
}
_GLOBAL = {"ATOM", "ATOMG", "LD", "LDG", "LDGSTS", "RED", "REDG", "ST", "STG"}
_SHARED = {"ATOMS", "LDGSTS", "LDL", "LDS", "LDSM", "SHFL", "STL", "STS", "STSM"}
_COPIES = {"UBLKCP", "UTMALDG", "UTMASTG"}
# What only takes its slot of issue; as does what a warp does once for all lanes (U...).
_ISSUE_ONLY = {
    *("BAR", "BRA", "BREAK", "BSSY", "BSYNC", "CALL", "CCTL", "DEPBAR", "ELECT", "ERRBAR", "EXIT"),
    *("FENCE", "LDC", "LDGDEPBAR", "MEMBAR", "NANOSLEEP", "NOP", "R2UR", "RET", "S2R", "S2UR"),
    *("SYNCS", "VOTEU", "WARPGROUP", "WARPSYNC", "YIELD"),
}


@dataclass
class Cost:
    """Of one warp."""

    issued: float = 0.0
    # Clocks of each pipe.
    pipes: dict[str, float] = field(default_factory=lambda: collections.defaultdict(float))
    products: float = 0.0  # flops of 16-bit inputs; those of tf32 count twice
    moved: float = 0.0  # bytes between L2 and the multiprocessor
    shared: float = 0.0  # bytes of shared memory and shuffles
    unknown: set[str] = field(default_factory=set)

    def busiest_pipe(self) -> float:
        """Clocks. FMA and IMAD share a pipe, of which IMAD has one half only."""
        pipes = self.pipes
        both = pipes["fma"] + pipes["imad"] / 2
        return max(pipes["alu"], pipes["special"], pipes["imad"], both)

    def add(self, instruction: Instruction, times: float, share: float = 1.0) -> None:
        """share: of the lanes, those that access shared memory."""
        name, *suffixes = instruction.opcode.split(".")
        self.issued += times
        pipe, cycles = _PIPES.get(name, ("", 0))
        if pipe:
            self.pipes[pipe] += times * cycles
        elif name in ("HGMMA", "HMMA"):
            self._multiply(name, suffixes, instruction.operands, times)
        elif name not in _GLOBAL | _SHARED | _ISSUE_ONLY and not name.startswith("U"):
            self.unknown.add(name)
        if name in _SHARED:
            matrices = 128 * int(suffixes[-1]) if suffixes and suffixes[-1] in "24" else 128
            lanes = matrices if name[2:] == "SM" else 32 * width(suffixes)
            self.shared += times * share * lanes

    def _multiply(self, name: str, suffixes: list[str], operands: str, times: float) -> None:
        if name == "HGMMA":
            # Of four warps together. The first matrix is in registers or, as the second, in shared
            # memory: a descriptor.
            m, n, k = map(int, suffixes[0].split("x"))
            in_shared = n * k + (m * k if operands.count("gdesc") > 1 else 0)
            m, in_shared = m // 4, in_shared // 4
        else:
            shapes = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
            (m, n, k), in_shared = shapes[suffixes[0]], 0
        wide = "TF32" in suffixes
        self.products += times * 2 * m * n * k * (2 if wide else 1)
        self.shared += times * in_shared * (4 if wide else 2)


def width(suffixes: Sequence[str]) -> int:
    """Bytes of a lane."""
    for suffix in suffixes:
        if suffix in ("64", "128"):
            return int(suffix) // 8
        if suffix in ("U8", "S8", "U16", "S16"):
            return int(suffix[1:]) // 8
    return 4


def cost(
    program: Program,
    walk: Walk,
    warps: int,
    sizes: Mapping[Line, float],
    shares: Callable[[Line], float] = lambda line: 1.0,
    copied: Callable[[Line], float | None] = lambda line: None,
    generic_is_shared: bool = False,
) -> Cost:
    """What one of the warps of a program does.

    sizes: bytes of the tensors that a line of source loads or stores, by file name and line. Where
    lanes load more than that, they load the same.
    shares: of the lanes, those that access memory in a line, or L2 rather than L1.
    copied: the bytes that an asynchronous copy into shared memory, or out of it, moves.
    generic_is_shared: whether pointers of which the compiler cannot tell are to shared memory.
    """
    total, code = Cost(), program.instructions
    for number, (block, times) in enumerate(zip(walk.blocks, walk.executed, strict=True)):
        executed = [code[i] for i in block.instructions] if times else []
        if executed and block.calls:
            # A 64-bit division that is not avoided; straight through, up to its return.
            rest = code[program.labels[block.calls] :]
            executed += rest[: 1 + next(i for i, a in enumerate(rest) if a.opcode[:3] == "RET")]
        lanes = collections.defaultdict[Line, float](float)
        for instruction in executed:
            share = shares(instruction.line)
            total.add(instruction, times, share)
            name, *suffixes = instruction.opcode.split(".")
            if generic_is_shared and name in ("LD", "ST"):
                total.shared += times * share * 32 * width(suffixes)
            elif name in _GLOBAL:
                place = Path(instruction.line[0]).name, instruction.line[1]
                lanes[place] += share * 32 * width(suffixes)
            elif name in _COPIES:
                size = copied(instruction.line)
                if size is None:
                    raise ValueError(f"bytes of a descriptor are not in the instruction: {name}")
                total.moved += times * size
                total.shared += times * size
        copies = max([1, *(loop.copies for loop in walk.loops if number in loop.body)])
        for line, moved in lanes.items():
            total.moved += times * min(moved, copies * sizes.get(line, math.inf) / warps)
    return total
