"""What an instruction of SASS does to the integers and predicates of one thread: enough of them to follow its loops.

Registers hold 32 bits, or None where nothing is known: what was loaded, and floating point but for the reciprocal that
an integer division starts with. An instruction that is not here makes its result unknown; nothing is ever guessed.
"""

import operator
import re
import struct
from collections.abc import Callable
from typing import NamedTuple


class Bits(NamedTuple):
    """A register of which some bits are known, as where predicates are kept in one."""

    value: int
    known: int


Value = int | None
Values = dict[str, int | Bits | None]
Reader = Callable[[Values], Value]
Act = Callable[[Values], None]
MASK = 0xFFFFFFFF
PREDICATE = re.compile(r"!?U?P(\d|T)$")
REGISTER = re.compile(r"(U?R)(\d+)$")
CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]$")
FIXED = {"RZ": 0, "URZ": 0, "SRZ": 0, "PT": 1, "UPT": 1}
ON_INTEGERS = re.compile(
    r"(IADD3|VIADD|VIADDMNMX|LEA|SHF|V?IMNMX|IABS|SGXT|I2F|MUFU|F2I|IMAD|SEL|MOV|LDC|S2R|S2UR|R2UR|CS2R|LOP3)$"
)


def signed(value: int) -> int:
    """32 bits as a number with a sign."""
    return value - (1 << 32) if value >> 31 else value


def reader(name: str) -> Reader:
    """What gives an operand's 32 bits, or a predicate's one."""
    if name[0] in "-~!":
        inner, one, mask = reader(name[1:]), int(name[0] == "-"), 1 if name[0] == "!" else MASK

        def changed(values: Values) -> Value:
            value = inner(values)
            return None if value is None else (~value + one) & mask

        return changed
    number = int(name, 16) & MASK if re.fullmatch(r"0x[0-9a-f]+", name) else FIXED.get(name)
    if number is not None:
        return lambda values: number

    def read(values: Values) -> Value:
        value = values.get(name)
        return value if isinstance(value, int) else None

    return read


def as_bits(own: int | Bits | None) -> Bits:
    """A word with the bits of it that are known."""
    return own if isinstance(own, Bits) else Bits(own or 0, 0 if own is None else MASK)


def next_word(name: str, words: int = 1) -> str:
    """The register, or the word of the constant bank, behind this one."""
    if found := REGISTER.match(name):
        return f"{found[1]}{int(found[2]) + words}"
    if found := CONSTANT.match(name):
        return f"c[0x0][{int(found[1], 16) + 4 * words:#x}]"
    return "RZ" if FIXED.get(name) == 0 else "none"


def lookup(lut: int, names: list[str], readers: list[Reader], values: Values) -> Bits:
    """Three words, bit by bit, through a table of eight bits, as LOP3 and PLOP3 do."""
    words = []
    for name, read in zip(names, readers, strict=True):
        own = values.get(name)
        words.append(own if isinstance(own, Bits) else as_bits(read(values)))
    may_be = [0, 0]
    for i in range(8):
        matching = MASK
        for bit, word in zip((4, 2, 1), words, strict=True):
            matching &= (word.value if i & bit else ~word.value) | ~word.known
        may_be[lut >> i & 1] |= matching
    known = MASK & ~(may_be[0] & may_be[1])
    return Bits(may_be[1] & known, known)


def _compare(parts: list[str], names: list[str]) -> Act:
    """ISETP P, Q, a, b, R [, low]: P = (a ? b) with R, Q = not (a ? b) with R; low: of the lower words, for .EX."""
    a_of, b_of, other_of, low_of = (reader(name) for name in (*names[2:5], names[-1]))
    test, extended, plain = getattr(operator, parts[1].lower()), "EX" in parts, "U32" in parts
    deciding = int("OR" in parts)

    def act(values: Values) -> None:
        a, b, other = a_of(values), b_of(values), other_of(values)
        held: Value = None
        if a is not None and b is not None:
            held = low_of(values) if extended and a == b else int(test(a, b) if plain else test(signed(a), signed(b)))
        for name, own in ((names[0], held), (names[1], None if held is None else 1 - held)):
            values[name] = other if other == deciding else None if other is None else own

    return act


def _funnel(parts: list[str], low: int, by: int, high: int) -> Value:
    if parts[1] == "L" and "HI" not in parts and by < 32:
        return low << by
    if parts[1] == "R" and "HI" in parts and by < 32:
        return (signed(high) if "S32" in parts else high) >> by
    return None


def _multiplied(parts: list[str], a: Value, b: Value, c: Value) -> Value:
    """a b + c, c of up to 64 bits."""
    if c is None or (0 not in (a, b) and (a is None or b is None)):
        return None
    a, b = a or 0, b or 0
    return c + (a * b if "U32" in parts else signed(a) * signed(b))


def _integer(base: str, parts: list[str], known: list[int], predicates: list[Value], carry: int) -> Value:
    """The result, with the bits above 32 where there are any, of an instruction all of whose operands are known."""
    match base:
        case "IADD3" | "VIADD":
            return sum(known) + carry
        case "LEA" if "HI" in parts:
            return None if "SX32" in parts else ((known[2] << 32 | known[0]) << known[3] >> 32) + known[1] + carry
        case "LEA":
            return (known[0] << known[2]) + known[1] + carry
        case "SHF":
            return _funnel(parts, known[0], known[1], known[2])
        case "IMNMX" | "VIMNMX" if predicates[-1] is not None:
            return (min if predicates[-1] else max)(known, key=int if "U32" in parts else signed)
        case "VIADDMNMX" if predicates[-1] is not None and "U32" not in parts:
            return (min if predicates[-1] else max)(known[0] + known[1] & MASK, known[2], key=signed)
        case "IABS":
            return abs(signed(known[0]))
        case "SGXT" if "U32" in parts:
            return known[0] & (1 << known[1]) - 1
        case "I2F" if "RP" in parts:
            return int(struct.unpack("<I", struct.pack("<f", known[0] if "U32" in parts else signed(known[0])))[0])
        case "MUFU" if "RCP" in parts and known[0]:
            number = struct.unpack("<f", struct.pack("<I", known[0]))[0]
            return int(struct.unpack("<I", struct.pack("<f", 1 / number))[0])
        case "F2I" if "U32" in parts:
            return int(struct.unpack("<f", struct.pack("<I", known[0]))[0])
        case "MOV" | "LDC" | "S2R" | "S2UR" | "CS2R" | "R2UR":
            return known[0]
    return None


def written(opcode: str, names: list[str]) -> list[str]:
    """Registers and predicates that an instruction may write."""
    words = 4 if re.search(r"\.128|^HMMA|^LDSM.*\.4", opcode) else 2 if re.search(r"\.64|\.WIDE|^CS2R", opcode) else 1
    own = [next_word(names[0], i) for i in range(words)] if REGISTER.match(names[0]) else [names[0]]
    return [*own, *(name for name in names[1:3] if re.match(r"U?P\d$", name))]


def _register(base: str, opcode: str, names: list[str]) -> Act:
    """An instruction with a register for a result. A carry out stands behind the result, a carry in at the end."""
    parts = opcode.split(".")
    carry_out = names[1] if base in ("IADD3", "LEA", "IMAD") and re.match(r"U?P\d$", names[1]) else ""
    rest = names[1 + bool(carry_out) :]
    numbered = [name for name in rest if not PREDICATE.match(name)]
    sources, inputs = [reader(name) for name in numbered], [reader(name) for name in rest if PREDICATE.match(name)]
    upper_of = [reader(next_word(name)) for name in numbered]
    targets = written(opcode, names)
    wide = "WIDE" in parts or "HI" in parts

    def act(values: Values) -> None:
        numbers, predicates = [each(values) for each in sources], [each(values) for each in inputs]
        carry = sum(each or 0 for each in predicates) if "X" in parts else 0
        out: Value = None
        bits = Bits(0, 0)
        if base == "SEL":
            out = None if predicates[-1] is None else numbers[0 if predicates[-1] else 1]
        elif base == "LOP3":
            bits = lookup(numbers[3] or 0, numbered[:3], sources[:3], values)
            out = bits.value if bits.known == MASK else None
        elif "X" in parts and None in predicates:
            pass
        elif base == "IMAD":
            third, above = numbers[2], upper_of[2](values) if wide else 0
            third = None if third is None or above is None else (above << 32 | third) + carry
            out = _multiplied(parts, numbers[0], numbers[1], third)
            out = out >> 32 if out is not None and "HI" in parts else out
        elif None not in numbers:
            out = _integer(base, parts, [number or 0 for number in numbers], predicates, carry)
        above = upper_of[0](values) if base in ("LDC", "CS2R") else None if out is None else out >> 32 & MASK
        values.update(dict.fromkeys(targets))
        values[names[0]] = bits if out is None and bits.known else None if out is None else out & MASK
        if len(targets) > 1 and not carry_out:
            values[targets[1]] = above
        elif carry_out:
            values[carry_out] = None if out is None else out >> 32 & 1

    return act


def _predicates(base: str, names: list[str]) -> Act:
    """PLOP3 P, Q, a, b, c, table, table; LOP3 P, R, a, b, c, table, !PT; P2R R, PR, R, mask; R2P PR, R, mask."""
    readers = [reader(name) for name in names]

    def act(values: Values) -> None:
        if base == "P2R":
            mask = readers[-1](values) or 0
            held = [reader(f"P{i}")(values) if mask >> i & 1 else 0 for i in range(7)]
            known = MASK & ~sum((bit is None) << i for i, bit in enumerate(held))
            bits = Bits(sum((bit or 0) << i for i, bit in enumerate(held)), known)
            values[names[0]] = bits.value if known == MASK else bits
        elif base == "R2P":
            word, mask = readers[1](values), readers[2](values) or 0
            values.update({f"P{i}": None if word is None else word >> i & 1 for i in range(7) if mask >> i & 1})
        else:
            first, second = (
                lookup(each(values) or 0, names[2:5], readers[2:5], values) for each in (readers[5], readers[-1])
            )
            if base == "LOP3":  # whether any bit is set
                unset = 0 if first.known == MASK else None
                values[names[0]] = 1 if first.value else unset
                values[names[1]] = first.value if first.known == MASK else first
            else:
                values[names[0]] = first.value & 1 if first.known & 1 else None
                values[names[1]] = second.value & 1 if second.known & 1 else None

    return act


def action(guard: str, opcode: str, names: list[str]) -> Act | None:
    """What an instruction does to registers and predicates; None for nothing."""
    first = opcode.partition(".")[0]
    base = first if ON_INTEGERS.match(first) else first.removeprefix("U")
    if not names or not re.match(r"(U?[RP]\d+|U?PT|U?RZ|PR)$", names[0]) or re.match(r"ST|REDG|RED\.|BAR|RET", opcode):
        return None
    unknown = dict.fromkeys(written(opcode, names))
    if base == "ISETP":
        own = _compare(opcode.split("."), names)
    elif base in ("PLOP3", "P2R", "R2P") or (base == "LOP3" and PREDICATE.match(names[0])):
        own = _predicates(base, names)
    elif ON_INTEGERS.match(base):
        own = _register(base, opcode, names)
    elif base == "HFMA2" and names[1:3] == ["-RZ", "RZ"]:  # how the compiler writes a constant: two halves
        high, low = (int(struct.unpack("<H", struct.pack("<e", float(half)))[0]) for half in names[3:5])
        own = lambda values: values.update({names[0]: high << 16 | low})  # noqa: E731
    else:  # loads, floating point, votes, atomics
        return lambda values: values.update(unknown)
    if not guard:
        return own
    guard_of = reader(guard)

    def guarded(values: Values) -> None:
        may = guard_of(values)
        if may is None and base == "LOP3":  # the bits that are the same with it and without
            before = as_bits(values.get(names[0]))
            own(values)
            after = as_bits(values[names[0]])
            same = before.known & after.known & ~(before.value ^ after.value)
            values.update(unknown | {names[0]: Bits(before.value & same, same)})
        elif may is None:
            values.update(unknown)
        elif may:
            own(values)

    return guarded
