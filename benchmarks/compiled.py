"""What a compiler made of one launch, read from its own output: registers, spills, instructions, and two faults of
asynchronous products that no run in an interpreter can show.

*Refill race.* On sm_90 a product (wgmma) reads its operands from shared memory while the program goes on. A pipelined
loop copies later tiles into the same few buffers. The tile that a product in flight reads must not be written: each
operand needs as many buffers as tiles are copied ahead plus products that may be pending where the copy stands, and in
the machine code the wait, and a barrier for the other warps, must stand between the last product and the next write.
Triton gives too few buffers to a load that has a second use beside the product (triton#6691).

*Serialisation.* ptxas says so (note C7515) where it cannot keep products asynchronous and makes each wait for itself:
slow, and a race that it hides comes back with the next version.
"""

import contextlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from benchmarks import needs

needs.kernels()  # before any of those that import this imports them

NVIDIA_INSTRUCTIONS = (
    "HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "LDG.E.128", "STG.E.128", "LDG.E", "STG.E", "SHFL",
)  # fmt: skip
AMD_INSTRUCTIONS = (
    "v_mfma", "global_load_dwordx4", "buffer_load_dwordx4", "global_store_dwordx4", "buffer_store_dwordx4",
)  # fmt: skip
SM_REGISTERS, SM_THREADS = 65_536, 2048
STORES_SHARED = re.compile(r"^(@!?U?P\d+ )?(STS|STSM)\b")
WRITES_SHARED = re.compile(r"^(@!?U?P\d+ )?(LDGSTS|STS|STSM|UTMALDG|UBLKCP)\b")


@dataclass
class Compiled:
    """What one launch became.

    spills: bytes of a stack that the code touches. instructions: how often those of interest stand in the code. races:
    what is wrong with asynchronous products, in words. serialised: whether ptxas said that it serialises them.
    """

    registers: int
    spills: int
    shared: int
    instructions: dict[str, int] = field(default_factory=dict)
    races: list[str] = field(default_factory=list)
    serialised: bool = False

    def programs(self, num_warps: int, arch: str, shared_bytes: int) -> int:
        """Programs that fit on a multiprocessor at once, by registers, threads and shared memory."""
        threads = num_warps * (64 if arch.startswith("gfx") else 32)
        if arch.startswith("gfx"):  # 512 registers a lane and SIMD, four SIMDs
            by_registers = 4 * (512 // max(1, self.registers)) // num_warps if num_warps >= 4 else 8
        else:
            by_registers = SM_REGISTERS // (threads * max(1, -(-self.registers // 8) * 8))
        by_shared = shared_bytes // self.shared if self.shared else 32
        return max(0, min(by_registers, SM_THREADS // threads, by_shared))


def compile_source(source: Any, target: Any, options: dict[str, int]) -> Compiled:
    """Compile for `target`, without a GPU, and read what came out."""
    compiled, log = build(source, target, options)
    if target.backend == "hip":
        return _amd(compiled.asm["amdgcn"], compiled.metadata.shared)
    usage, sass = cuobjdump(compiled, "-res-usage"), cuobjdump(compiled, "-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    # ptxas sometimes leaves a frame of 8 bytes that no instruction touches.
    spills = int(found[2]) if re.search(r"\b(STL|LDL)\b", sass) else 0
    counts = {name: len(re.findall(rf"\b{re.escape(name)}", sass)) for name in NVIDIA_INSTRUCTIONS}
    races = refill_races(compiled.asm["ttgir"], sass) if counts["HGMMA"] else []
    serialised = "C7515" in log or "serialized" in log
    return Compiled(int(found[1]), spills, compiled.metadata.shared, counts, races, serialised)


def build(source: Any, target: Any, options: dict[str, int]) -> tuple[Any, str]:
    """Triton's compiled kernel, and what ptxas said."""
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # a cached binary has no log
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=target, options=options)
    return compiled, log.getvalue()


def _amd(text: str, shared: int) -> Compiled:
    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    counts = {name: text.count(name) for name in AMD_INSTRUCTIONS}
    return Compiled(figure("vgpr_count"), 4 * figure("vgpr_spill_count"), shared, counts)


def cuobjdump(compiled: Any, option: str) -> str:
    """What the tool beside Triton says of a kernel: "-sass" for its machine code, "-res-usage"."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


@dataclass
class _Loop:
    """A loop of TTGIR with products: the buffers of each operand, what is copied ahead, what may be pending."""

    operands: dict[str, tuple[int, int]]
    pending: int
    made_inside: list[str]


def refill_races(ttgir: str, sass: str) -> list[str]:
    """Each loop of products whose operands may be overwritten while a product reads them, in words."""
    found = []
    loops = _product_loops(ttgir)
    for loop in loops:
        for name, (buffers, ahead) in loop.operands.items():
            if loop.pending and buffers < ahead + loop.pending:
                found.append(f"{name}: {buffers} buffers, {ahead} tiles copied ahead, {loop.pending} products pending")
        if loop.pending:
            found += [f"{name}: written in each step, {loop.pending} products pending" for name in loop.made_inside]
    pending = max((loop.pending for loop in loops), default=0)
    # Where every operand is made in the loop, what is copied ahead is not what a product reads.
    return found + unguarded_refills(sass, pending, WRITES_SHARED if any(x.operands for x in loops) else STORES_SHARED)


def _product_loops(ttgir: str) -> list[_Loop]:
    """The innermost loops of TTGIR that hold a `warp_group_dot`, in order."""
    made_by: dict[str, tuple[str, list[str]]] = {}  # value -> operation and operands
    buffers: dict[str, int] = {}
    copied: dict[str, int] = {}  # copies into a buffer before the loop that uses it: how far ahead it runs
    loops: list[_Loop] = []
    depth_of: list[tuple[int, dict[str, Any]]] = []  # indentation of each open scf.for, and what stands in it

    def root(value: str) -> str:
        while made_by.get(value, ("", []))[0] in ("ttg.memdesc_index", "ttg.memdesc_trans", "ttg.memdesc_subslice"):
            value = made_by[value][1][0]
        return value

    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        while depth_of and line.strip().startswith("}") and indent <= depth_of[-1][0]:
            seen = depth_of.pop()[1]
            if seen["dots"]:
                operands, inside = {}, []
                for value in dict.fromkeys(seen["dots"]):
                    base = root(value)
                    if base in seen["made"]:
                        inside.append(base)
                    elif base in buffers:
                        operands[base] = (buffers[base], seen["ahead"].get(base, 0))
                loops.append(_Loop(operands, max(seen["pendings"], default=0), inside))
        made = re.match(r"\s*(%[\w.#]+)(?::\d+)? = ([\w.]+)\s*(.*)", line)
        if made is None:
            continue
        name, operation, rest = made.groups()
        made_by[name] = (operation, re.findall(r"%[\w.#]+", rest.split(" : ")[0]))
        if operation == "scf.for":
            depth_of.append((indent, {"dots": [], "pendings": [], "made": set(), "ahead": dict(copied)}))
        elif operation == "ttg.local_alloc":
            shape = re.search(r"-> !ttg\.memdesc<([\dx]+)x\w+,", line)
            dimensions = shape[1].split("x") if shape else []
            if depth_of:
                depth_of[-1][1]["made"].add(name)
            elif len(dimensions) == 3:
                buffers[name] = int(dimensions[0])
        elif operation == "ttg.async_copy_global_to_local" and not depth_of:
            target = root(made_by[name][1][1])
            copied[target] = copied.get(target, 0) + 1
        elif operation == "ttng.warp_group_dot" and depth_of:
            depth_of[-1][1]["dots"] += made_by[name][1][:2]
        elif operation == "ttng.warp_group_dot_wait" and depth_of:
            depth_of[-1][1]["pendings"].append(int(re.search(r"pendings = (\d+)", line)[1]))  # type: ignore[index]
    return loops


def unguarded_refills(sass: str, pending: int, writes: re.Pattern[str] = WRITES_SHARED) -> list[str]:
    """Loops of SASS in which shared memory is written after a product without the wait, or the barrier, before it."""
    code = [
        (int(m[1], 16), m[2].strip())
        for m in (re.match(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);", line) for line in sass.splitlines())
        if m
    ]
    place = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (address, text) in enumerate(code):
        jump = re.search(r"\bBRA(?:\.\w+)* (?:\w+, )?(0x[0-9a-f]+)", text)
        if jump and int(jump[1], 16) <= address and int(jump[1], 16) in place:
            loops.append((place[int(jump[1], 16)], i))
    found = []
    products = [i for i, (_, text) in enumerate(code) if "HGMMA" in text]
    innermost = {min(((e - s, s, e) for s, e in loops if s <= i <= e), default=None) for i in products} - {None}
    for _, start, end in sorted(x for x in innermost if x is not None):
        last = max(i for i in products if start <= i <= end)
        waited = barrier = False
        for i in [*range(last + 1, end + 1), *range(start, last)]:  # on, and once round
            text = code[i][1]
            wait = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", text)
            waited |= wait is not None and int(wait[1], 16) <= pending
            barrier |= waited and "BAR.SYNC" in text
            if writes.match(text):
                if not waited or not (barrier or pending):
                    found.append(f"machine code at {code[i][0]:#x} writes shared memory before the products are done")
                break
    return found
