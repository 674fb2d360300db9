"""One program of a kernel, walked through its own machine code: what it executes, and how long one warp takes alone.

The text of `cuobjdump -sass` holds all that is needed. Branches of a loop depend on the launch's integers, so the walk
computes with the integers of thread 0 (`benchmarks.integers`; anything else is unknown) and takes each branch as the
machine would. Trip counts come out of the code: no table of loops can go stale, and a loop whose end is unknown is an
error. Time comes from the compiler's own schedule: each instruction's encoding says for how many clocks the next one
waits, and which of six scoreboards it waits for, sets, or reads under. Only latencies that the hardware decides stand
in the table below. Source of the encoding's layout: Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via
Microbenchmarking", 2018.

A conditional exit behind a ticket (an atomic whose old value comes back) ends a *stage*: the programs that go on there
are fewer. Within a stage, each outermost loop is a *phase*, and so is what lies between loops.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.integers import Value, Values, action, reader

HBM_CLK, L2_CLK, L1_CLK = 479, 263, 41
"""A load's latency in clocks: Luo et al., arXiv 2402.13499, table 4 (H100); so is shared memory's 29."""
LATENCY_CLK = {
    "ATOMG": L2_CLK, "ATOM": L2_CLK, "LDS": 29, "LDSM": 33, "SHFL": 24, "MUFU": 18,
    "F2I": 18, "I2F": 18, "F2F": 18, "POPC": 18, "FLO": 18, "S2R": 24, "S2UR": 24, "LDC": 40, "ULDC": 40, "R2UR": 12,
    "VOTEU": 12, "REDUX": 24, "HMMA": 33,
}  # fmt: skip
"""Until an instruction's scoreboard is free; 20 for those not here. SHFL, MUFU, conversions: Jia et al."""
HELD_CLK = {"BAR": 25, "MEMBAR.ALL.GPU": L2_CLK, "MEMBAR.SC.GPU": L2_CLK, "CCTL": 25}
"""Of instructions behind which their warp waits, whatever comes next."""
HALF_RATE = re.compile(
    r"(IADD3|VIADD|VIADDMNMX|LOP3|SHF|LEA|ISETP|FSETP|FSEL|SEL|FMNMX|V?IMNMX3?|PRMT|IABS|SGXT|PLOP3|P2R|R2P|F2FP|MOV|CS2R|BMSK)$"
)
"""64 lanes a clock on a multiprocessor: CUDA C++ Programming Guide, throughput of arithmetic, capability 9.0."""
SIXTEENTH = re.compile(r"(MUFU|I2F|F2I|F2F|POPC|FLO|FRND|BREV)$")
GLOBAL = re.compile(r"(LDG|STG|LDGSTS|ATOMG?|REDG?)$")
SHARED = re.compile(r"(LDS|STS|LDSM|STSM|LDGSTS)$")
TENSOR_FLOP = 4096
"""bf16, of a multiprocessor in a clock. mma.sync reaches 0.63 of it: arXiv 2402.13499."""
UNITS = ("issue", "alu", "fma", "special", "load_store", "tensor", "barriers", "loads", "global_bytes", "shared_bytes")
MOST_STEPS = 3_000_000


@dataclass
class Phase:
    """What one warp does in a phase.

    clk: clocks alone. units: what it takes of each unit. issue, alu, fma, special: clocks of one of the four
    schedulers; load_store, tensor: clocks of the multiprocessor; barriers, loads: how many; the bytes: all lanes'.
    """

    name: str
    clk: float = 0.0
    units: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))


@dataclass
class Instruction:
    """One line of SASS. wait: the scoreboards waited for; sets, reads: held until its result, its operands are done."""

    address: int
    guard: Callable[[Values], Value]
    opcode: str
    operands: list[str]
    stall: int
    wait: tuple[int, ...]
    sets: int
    reads: int
    act: Callable[[Values], None] | None
    units: list[tuple[str, float]] = field(default_factory=list)
    base: str = ""
    tensor_clk: float = 0.0
    where: tuple[Callable[[Values], Value], int] | None = None

    def __post_init__(self) -> None:
        self.base = self.opcode.partition(".")[0]
        self.tensor_clk = _tensor_clk(self.base, self.opcode)
        self.units = list(_units(self.base, self.opcode, self.tensor_clk))
        found = ADDRESS.search(self.operands[-1]) if self.base == "LDG" and "STRONG" not in self.opcode else None
        self.where = (reader(found[1]), int(found[2] or "0", 16)) if found else None

    def target(self) -> int:
        """Where a branch goes; -1 when this is none."""
        return int(self.operands[-1], 16) if self.base == "BRA" and self.operands[-1].startswith("0x") else -1


LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/\s+"
    r"/\* 0x([0-9a-f]{16}) \*/"
)


ADDRESS = re.compile(r"\[(R\d+)(?:\.64)?(?:\+(-?0x[0-9a-f]+))?\]$")


def parse(sass: str) -> list[Instruction]:
    """The instructions of a kernel, by address."""
    code = []
    for address, guard, opcode, operands, high in LINE.findall(sass):
        bits = int(high, 16) >> 41
        wait = tuple(i for i in range(6) if bits >> 11 + i & 1)
        names = [name.strip().replace(".reuse", "") for name in operands.split(",")] if operands else []
        act = action(guard, opcode, names)
        fields = (reader(guard or "PT"), opcode, names, bits & 15, wait, bits >> 5 & 7, bits >> 8 & 7, act)
        code.append(Instruction(int(address, 16), *fields))
    assert code, "no instruction in this text: it must come from cuobjdump -sass, with the encodings"
    return code


def loops_of(code: list[Instruction]) -> list[tuple[int, int]]:
    """Outermost loops: first and last place in the code."""
    places = {each.address: i for i, each in enumerate(code)}
    jumps = sorted((places[each.target()], i) for i, each in enumerate(code) if each.target() in places)
    found: list[tuple[int, int]] = []
    for start, end in (jump for jump in jumps if jump[0] < jump[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def width_of(base: str, opcode: str) -> int:
    """Bytes a lane that an access to memory moves."""
    for mark, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if mark in opcode:
            return size
    return 4 * int(opcode[-1]) if base in ("LDSM", "STSM") and opcode[-1].isdigit() else 4


def _tensor_clk(base: str, opcode: str) -> float:
    """Clocks of a multiprocessor's tensor cores: for a warp group in HGMMA, for one warp in HMMA."""
    if base == "HGMMA":
        m, n, k = (int(number) for number in opcode.split(".")[1].split("x"))
        return 2 * m * n * k / TENSOR_FLOP * (2 if k == 8 else 1)
    return {"16816": 4096, "1688": 2048}[opcode.split(".")[1]] / (0.63 * TENSOR_FLOP) if base == "HMMA" else 0.0


def _units(base: str, opcode: str, tensor_clk: float) -> list[tuple[str, float]]:
    """What an instruction takes of each unit."""
    units: list[tuple[str, float]] = [("issue", 1)]
    wide = width_of(base, opcode)
    if HALF_RATE.match(base):
        units.append(("alu", 2))
    elif base in ("FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2"):
        units.append(("fma", 1))
    elif base == "IMAD":
        units.append(("fma", 2))
    elif SIXTEENTH.match(base):
        units.append(("special", 8))
    elif GLOBAL.match(base) or SHARED.match(base) or base in ("SHFL", "LDL", "STL", "ATOMS"):
        units.append(("load_store", max(1, wide // 4)))
    elif tensor_clk:
        units.append(("tensor", tensor_clk / 4 if base == "HGMMA" else tensor_clk))
    elif base == "BAR":
        units.append(("barriers", 1))
    if GLOBAL.match(base):
        units += [("global_bytes", 32 * wide), ("loads", float(base in ("LDG", "LDGSTS")))]
    if SHARED.match(base):
        units.append(("shared_bytes", 32 * wide))
    return units


class Clock:
    """Time of one warp: the clock, and when each scoreboard, group of copies and group of products is done."""

    def __init__(self, rows_clk: float) -> None:
        self.now, self.rows_clk = 0.0, rows_clk
        self.done = [0.0] * 8
        self.copied, self.tensor = 0.0, 0.0
        self.copies, self.products = [0.0], [0.0]  # in order, a group each
        self.sectors: dict[int, float] = {}  # of L1: when each was, or will be, there

    def _load(self, each: Instruction, values: Values, now: float) -> float:
        """Latency of a load. 16 bytes a lane are rows; less is a table that the launch before has left in L2; a sector
        of 32 bytes that thread 0 has read before comes from L1."""
        first = self.rows_clk if ".128" in each.opcode else L2_CLK
        base = each.where[0](values) if each.where else None
        if each.where is None or base is None:
            return first
        there = self.sectors.setdefault((base + each.where[1]) >> 5, now + first)
        return max(there - now, L1_CLK)

    def issue(self, each: Instruction, values: Values) -> None:
        """Wait as the encoding says, start, and note when the result will be there."""
        base, now = each.base, self.now
        for board in each.wait:
            now = max(now, self.done[board])
        if base == "DEPBAR" and len(each.operands) > 1:
            now = max(now, *self.copies[: len(self.copies) - int(each.operands[1], 16)], 0.0)
        elif base == "WARPGROUP" and "DEPBAR" in each.opcode:
            now = max(now, *self.products[: len(self.products) - int(each.operands[1], 16)], 0.0)
        latency = self._load(each, values, now) if base in ("LDG", "LDGSTS") else LATENCY_CLK.get(base, 20)
        if base == "LDGSTS":
            self.copied = now + latency
        elif base == "LDGDEPBAR":
            self.copies = [*self.copies[-7:], self.copied]
        elif base == "HGMMA":
            self.tensor = max(self.tensor, now) + each.tensor_clk
            if "gsb0" in each.operands:
                self.products = [*self.products[-7:], self.tensor + 20]
        if each.sets < 6:
            self.done[each.sets] = max(self.done[each.sets], now + latency)
        if each.reads < 6:
            self.done[each.reads] = max(self.done[each.reads], now + 20)
        self.now = now + max(1, each.stall) + (HELD_CLK.get(base, 0) or HELD_CLK.get(each.opcode, 0))


def walk(
    sass: str,
    constants: dict[int, int],
    program: tuple[int, ...] = (0,),
    *,
    warm: bool = False,
    table: dict[int, int] | None = None,
) -> list[list[Phase]]:
    """The stages of a program, each a list of phases in their order.

    Args:
        sass: from `cuobjdump -sass`.
        constants: 32-bit words of constant bank 0 by offset: arguments, threads a program, programs.
        program: its place in the grid.
        warm: rows lie in L2, not in HBM.
        table: 32-bit words of memory by the low word of their address, where a loop's end is loaded.
    """
    code = parse(sass)
    places = {each.address: i for i, each in enumerate(code)}
    phase_at = [0] * len(code)
    for number, (start, end) in enumerate(loops_of(code), 1):
        phase_at[start : end + 1] = [number] * (end + 1 - start)
    values: Values = {f"c[0x0][{offset:#x}]": value & 0xFFFFFFFF for offset, value in constants.items()}
    values |= dict.fromkeys(("SR_TID.X", "SR_TID.Y", "SR_TID.Z", "SR_LANEID", "SR_CgaCtaId"), 0)
    values |= {f"SR_CTAID.{axis}": where for axis, where in zip("XYZ", (*program, 0, 0), strict=False)}
    stages: list[list[Phase]] = [[]]
    clock, place, ticket, before = Clock(L2_CLK if warm else HBM_CLK), 0, False, -1
    for _ in range(MOST_STEPS):
        each = code[place]
        if phase_at[place] != before or not stages[-1]:
            before = phase_at[place]
            stages[-1].append(Phase(f"loop {before}" if before else "straight"))
        phase, start_clk = stages[-1][-1], clock.now
        clock.issue(each, values)
        phase.clk += clock.now - start_clk
        for unit, amount in each.units:
            phase.units[unit] += amount
        place += 1
        if each.base == "EXIT":
            taken = each.guard(values)
            if taken == 1:
                return stages
            if taken is None and ticket:  # only the last to arrive goes on
                stages.append([])
                ticket, clock.rows_clk = False, L2_CLK
        elif each.target() >= 0:
            taken, goal = each.guard(values), places[each.target()]
            assert taken is not None or goal > place, f"the loop that ends at {each.address:#x} has an unknown end"
            place = goal if taken else place
        else:
            ticket |= each.base == "ATOMG" and each.operands[0] != "RZ"
            word = None
            if table and each.where and each.guard(values) == 1 and width_of(each.base, each.opcode) == 4:
                word = table.get((each.where[0](values) or 0) + each.where[1])
            if each.act:
                each.act(values)
            if word is not None:
                values[each.operands[0]] = word
    raise AssertionError(f"a program of more than {MOST_STEPS} instructions")
