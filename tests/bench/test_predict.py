"""The model of times: machine code by hand, with hand-computed clocks; one real compilation; what is committed."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import predict, sass
from benchmarks.integers import Bits, Values, action
from benchmarks.offline import Work

ROOT = Path(__file__).resolve().parent.parent.parent
CLOCK = predict.H200.clock_hz / 1e6  # clocks a microsecond


def listing(*lines: tuple[str, int, Sequence[int], int]) -> str:
    """What cuobjdump would print: instruction, stall, scoreboards waited for, scoreboard set (7: none)."""
    text = []
    for number, (code, stall, wait, sets) in enumerate(lines):
        high = (stall | sets << 5 | 7 << 8 | sum(1 << 11 + board for board in wait)) << 41
        text.append(f"        /*{16 * number:04x}*/  {code} ;  /* 0x{0:016x} */")
        text.append(f"        /* 0x{high:016x} */")
    return "\n".join(text)


def loop(load: str = "LDG.E.128 R4, desc[UR4][R8.64]", bound: str = "MOV R0, c[0x0][0x210]") -> str:
    return listing(
        (bound, 4, (), 7),
        ("MOV R1, RZ", 1, (), 7),
        (load, 1, (), 0),
        ("IADD3 R1, R1, 0x1, RZ", 4, (), 7),
        ("FFMA R2, R4.reuse, R5, R2", 4, (0,), 7),
        ("ISETP.GE.AND P0, PT, R1, R0, PT", 13, (), 7),
        ("@!P0 BRA 0x20", 5, (), 7),
        ("EXIT", 5, (), 7),
    )


def test_a_loop_is_walked_as_often_as_its_argument_says() -> None:
    """Each trip: the product waits for the load, then 4 + 13 + 5 clocks."""
    ((before, inside, after),) = sass.walk(loop(), {0x210: 3})
    assert (before.name, inside.name, after.name) == ("straight", "loop 1", "straight")
    assert (before.clk, inside.clk, after.clk) == (5, 3 * (sass.HBM_CLK + 4 + 13 + 5), 5)
    assert inside.units["issue"] == 3 * 5
    assert inside.units["alu"] == 3 * 2 * 2  # two instructions of half rate
    assert inside.units["fma"] == 3
    assert inside.units["load_store"] == 3 * 4  # 16 bytes a lane
    assert (inside.units["loads"], inside.units["global_bytes"]) == (3, 3 * 512)
    ((_, twice, _),) = sass.walk(loop(), {0x210: 6})
    assert twice.clk == 2 * inside.clk
    assert twice.units == {unit: 2 * amount for unit, amount in inside.units.items()}
    ((_, warm, _),) = sass.walk(loop(), {0x210: 3}, warm=True)
    assert warm.clk == 3 * (sass.L2_CLK + 4 + 13 + 5)


def test_a_sector_that_was_read_comes_from_l1() -> None:
    """Narrow loads are tables in L2; the same address again is in L1."""
    text = loop("LDG.E R4, desc[UR4][R20.64+0x8]").replace("MOV R1, RZ", "CS2R R20, SRZ")
    text = text.replace("IADD3 R1, R1, 0x1, RZ", "IADD3 R20, R20, 0x1, RZ").replace("AND P0, PT, R1", "AND P0, PT, R20")
    ((_, inside, _),) = sass.walk(text, {0x210: 3})
    assert inside.clk == sass.L2_CLK + 2 * sass.L1_CLK + 3 * (4 + 13 + 5)


def test_a_loop_without_a_known_end_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"the loop that ends at 0x60 has an unknown end"):
        sass.walk(loop(bound="LDG.E R0, desc[UR4][R8.64]"), {})
    table = {0x7F0: 3}  # an address beside the one that is read says nothing
    with pytest.raises(AssertionError, match=r"unknown end"):
        sass.walk(loop(bound="LDG.E R0, desc[UR4][R8.64+0x7f4]").replace("MOV R1, RZ", "CS2R R8, SRZ"), {}, table=table)
    with pytest.raises(AssertionError, match="no instruction in this text"):
        sass.walk("", {})


def test_a_loop_may_end_where_a_table_says() -> None:
    """As where an expert's rows begin and end in memory: the word that is read takes the place of the argument."""
    text = loop(bound="CS2R R8, SRZ").replace("MOV R1, RZ", "LDG.E R0, desc[UR4][R8.64+0x7f0]")
    text = text.replace("IADD3 R1, R1, 0x1, RZ", "IADD3 R9, R9, 0x1, RZ").replace("AND P0, PT, R1", "AND P0, PT, R9")
    ((_, thrice, _),) = sass.walk(text, {}, table={0x7F0: 3})
    ((_, once, _),) = sass.walk(text, {}, table={0x7F0: 1})
    assert thrice.units["issue"] == 3 * once.units["issue"] == 15


def test_copies_and_products_are_waited_for_in_order() -> None:
    """Two groups of copies: with one allowed to be pending, the first alone is waited for."""
    copies = [("LDGSTS.E.BYPASS.128 [R2], desc[UR4][R8.64]", 1, (), 7), ("LDGDEPBAR", 15, (), 7)] * 2
    for pending, done in ((1, sass.HBM_CLK), (0, 16 + sass.HBM_CLK)):
        (((phase),),) = sass.walk(listing(*copies, (f"DEPBAR.LE SB0, {pending:#x}", 1, (), 7), ("EXIT", 1, (), 7)), {})
        assert phase.clk == done + 2
    product = ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", 2, (), 7)
    ((phase,),) = sass.walk(
        listing(product, product, ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 1, (), 7), ("EXIT", 1, (), 7)), {}
    )
    assert phase.clk == 2 * 64 + 20 + 2  # 64 clocks each on one warp group's share
    assert phase.units["tensor"] == 2 * 64 / 4


def test_a_ticket_ends_a_stage() -> None:
    text = listing(
        ("ATOMG.E.ADD.STRONG.GPU PT, R7, desc[UR8][R6.64], R9", 2, (), 0), ("LDS R0, [UR4]", 1, (0,), 1),
        ("ISETP.NE.AND P0, PT, R0, c[0x0][0x210], PT", 13, (1,), 7), ("@P0 EXIT", 5, (), 7),
        ("LDG.E.128 R0, desc[UR8][R2.64]", 2, (), 0), ("MOV R1, R0", 4, (0,), 7), ("EXIT", 5, (), 7),
    )  # fmt: skip
    (first,), (second,) = sass.walk(text, {0x210: 1})
    assert first.clk == sass.L2_CLK + 29 + 13 + 5
    assert second.clk == sass.L2_CLK + 4 + 5  # what others have written lies in L2


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("IADD3", "R0, P1, R2, R3, RZ", {"R0": 1, "P1": 1}),
        ("IADD3.X", "R0, R2, R3, RZ, P0, !PT", {"R0": 2}),
        ("IMAD.WIDE.U32", "R0, R2, 0x10, R4", {"R0": 0xFFFFFFF0, "R1": 0xF + 7}),
        ("IMAD.X", "R0, RZ, RZ, R4, P0", {"R0": 1}),
        ("LEA.HI", "R0, R3, R4, RZ, 0x2", {"R0": 0}),
        ("SHF.R.S32.HI", "R0, RZ, 0x1f, R2", {"R0": 0xFFFFFFFF}),
        ("SHF.L.U32", "R0, R3, 0x4, RZ", {"R0": 0x20}),
        ("LOP3.LUT", "R0, R2, 0xf0, RZ, 0xc0, !PT", {"R0": 0xF0}),
        ("LOP3.LUT", "P1, RZ, R3, 0x1, RZ, 0xc0, !PT", {"P1": 0}),
        ("LOP3.LUT", "R0, R9, RZ, RZ, 0xc0, !PT", {"R0": 0}),
        ("LOP3.LUT", "R0, R9, 0x40, RZ, 0xfc, !PT", {"R0": Bits(0x40, 0x40)}),
        ("LOP3.LUT", "P1, RZ, R8, 0x40, RZ, 0xc0, !PT", {"P1": 1}),
        ("LOP3.LUT", "P1, RZ, R8, 0x80, RZ, 0xc0, !PT", {"P1": None}),
        ("PLOP3.LUT", "P1, P2, P0, P3, PT, 0xf8, 0x80", {"P1": 1, "P2": None}),
        ("ISETP.LT.AND", "P1, PT, R2, RZ, PT", {"P1": 1}),
        ("ISETP.LT.U32.AND", "P1, P2, R2, RZ, PT", {"P1": 0, "P2": 1}),
        ("ISETP.GE.AND.EX", "P1, PT, R4, RZ, PT, P0", {"P1": 1}),
        ("ISETP.LT.AND", "P1, PT, R9, RZ, !PT", {"P1": 0}),
        ("VIMNMX", "R0, R2, R3, PT", {"R0": 0xFFFFFFFF}),
        ("VIADDMNMX", "R0, R2, R3, R5, PT", {"R0": 1}),
        ("VIADDMNMX", "R0, R2, R3, R5, !PT", {"R0": 7}),
        ("SEL", "R0, R2, R3, !P0", {"R0": 2}),
        ("P2R", "R0, PR, RZ, 0x1", {"R0": 1}),
        ("HFMA2.MMA", "R3, -RZ, RZ, 0, 6.103515625e-05", {"R3": 0x400}),
        ("FADD", "R3, R2, R2", {"R3": None}),
        ("LDG.E.64", "R2, desc[UR4][R8.64]", {"R2": None, "R3": None}),
        ("IMAD.MOV.U32", "R3, RZ, RZ, R9", {"R3": None}),
    ],
)
def test_integers(opcode: str, operands: str, expected: Values) -> None:
    values: Values = {"R2": 0xFFFFFFFF, "R3": 2, "R4": 0, "R5": 7, "R8": Bits(0x40, 0x7F), "P0": 1}
    act = action("", opcode, operands.split(", "))
    assert act is not None
    act(values)
    assert {name: values.get(name) for name in expected} == expected


def test_a_guard_that_is_not_known_leaves_what_is_the_same_either_way() -> None:
    values: Values = {"R2": 0x5}
    for guard, mask in (("P1", "0x4"), ("P1", "0x8")):
        act = action(guard, "LOP3.LUT", ["R2", "R2", mask, "RZ", "0xfc", "!PT"])
        assert act is not None
        act(values)
    assert values["R2"] == Bits(0x5, 0xFFFFFFFF - 0x8)
    act = action("P1", "IADD3", ["R2", "R3", "R3", "RZ"])
    assert act is not None
    act(values)
    assert values["R2"] is None


def phase(clk: float = 0.0, **units: float) -> sass.Phase:
    made = sass.Phase("straight", clk)
    made.units |= units
    return made


def test_terms_by_hand() -> None:
    """One phase, 4 warps, 132 programs, one a multiprocessor: each term by its rate, and the longest bounds."""
    none = Work(0, 0, 0)
    for units, name, clk in (
        ({"clk": 1000.0, "issue": 800.0}, "latency", 1000),
        ({"clk": 700.0, "issue": 800.0}, "issue", 800),  # 4 warps over 4 schedulers
        ({"alu": 900.0}, "compare", 900),
        ({"load_store": 250.0, "issue": 10.0}, "load/store", 1000),
        ({"tensor": 300.0}, "matrix", 1200),
    ):
        terms = predict.time_us([[phase(**units)]], [132], 4, 1, none, predict.H200)
        assert terms == {"start": predict.START_US, name: pytest.approx(clk / CLOCK)}
    stream = [[phase(clk=10.0, global_bytes=512.0)]]
    terms = predict.time_us(stream, [1320], 4, 2, Work(43_000_000, 0, 0), predict.H200)
    assert terms["HBM"] == pytest.approx(10.0)  # 43 MB at 4.3 TB/s, in five full waves
    terms = predict.time_us(stream, [1320], 4, 2, Work(86_000_000, 0, 0), predict.H200)
    assert terms["HBM"] == pytest.approx(20.0)  # planted: twice the bytes
    terms = predict.time_us(stream, [4], 4, 2, Work(0, 4 * 64_000, 0), predict.H200)
    assert terms["L2"] == pytest.approx(1000 / CLOCK)  # four multiprocessors take 64 bytes a clock each


def test_waves_and_overlap_by_hand() -> None:
    both = [[phase(clk=100.0), phase(issue=300.0)]]
    none = Work(0, 0, 0)

    def clk(programs: int, resident: int) -> float:
        terms = predict.time_us(both, [programs], 4, resident, none, predict.H200)
        return (sum(terms.values()) - predict.START_US) * CLOCK

    assert clk(132, 1) == pytest.approx(400)
    assert clk(133, 1) == pytest.approx(800)  # one program more, one wave more
    assert clk(264, 2) == pytest.approx(600 + (700 - 600) / 2)  # the other's phase hides half of the wait
    stages = [both[0], [phase(clk=50.0)]]
    terms = predict.time_us(stages, [132, 1], 4, 1, none, predict.H200)
    assert sum(terms.values()) == pytest.approx(predict.START_US + 450 / CLOCK)


def test_a_compiled_kernel_is_walked_by_its_arguments(tmp_path: Path) -> None:
    """The backward of combine: one compilation; D is an argument: 8 tiles of 256, then 28."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.predict", "--shape", "OLMoE", "DeepSeek-V3", "--tokens", "4096",
         "--kernel", "combine_bwd", "--json", "--results", str(tmp_path / "out.json")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    document = json.loads(run.stdout)
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == document
    assert run.stderr == ""  # progress is for a terminal
    narrow, wide = document["rows"]
    assert {row["bound"] for row in document["rows"]} <= {"HBM", "L2"}
    loads = [row["code"]["loads"] for row in (narrow, wide)]
    assert loads[0] == 1 + 2 * 2 + 8 * 2 * 2  # whether valid; of 2 copies row and weight, dy and y of 8 tiles
    assert loads[1] - loads[0] == (28 - 8) * 2 * 2
    assert wide["time_us"] / narrow["time_us"] == pytest.approx(7168 / 2048, rel=0.1)
    for row in document["rows"]:
        assert row["time_us"] > row["floor_us"]
        assert sum(row["terms_us"].values()) == pytest.approx(row["time_us"], abs=0.05)


def newest(pattern: str) -> dict[str, object]:
    path = sorted((ROOT / "benchmarks" / "results").glob(pattern))[-1]
    return dict(json.loads(path.read_text(encoding="utf-8")))


def test_the_stated_error_is_that_of_the_published_times() -> None:
    """Geometric: the root mean square of log (predicted / published) over the rows that count."""
    table = newest("predict-published-*.json")
    logs = [math.log(row["predicted_us"] / row["published_us"]) for row in table["rows"] if row["counts"]]
    spread = math.exp(math.sqrt(sum(each**2 for each in logs) / len(logs)))
    bias = math.exp(sum(logs) / len(logs))
    assert (table["spread"], table["bias"]) == (pytest.approx(spread, abs=6e-3), pytest.approx(bias, abs=6e-3))
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert f"factor of {table['spread']:.2f}" in page
    worst = max(table["rows"], key=lambda row: abs(math.log(row["predicted_us"] / row["published_us"])))
    assert f"{worst['predicted_us'] / worst['published_us']:.2f}" in page


def test_no_committed_prediction_is_below_its_floor() -> None:
    rows = newest("predict-h200-*.json")["rows"]
    assert {(row["shape"], row["num_tokens"]) for row in rows} == {
        (shape, tokens) for shape in predict.MODEL_SHAPES for tokens in predict.TOKENS
    }
    for row in rows:
        assert row["time_us"] > row["floor_us"], row
        assert sum(row["terms_us"].values()) == pytest.approx(row["time_us"], abs=0.05)
        assert re.fullmatch("|".join(["start", "latency", "L2", "HBM", *(name for name, _ in predict.UNITS.values())]),
                            row["bound"])  # fmt: skip
