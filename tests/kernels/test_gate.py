"""The gate over compiled code: what can be reached is enumerated whole, a planted race is found, a part passes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.compiled import refill_races

ROOT = Path(__file__).parents[2]

EVERY_T = """
import json, random
import torch
from benchmarks import gate
random.seed(0)
tokens = [1, 2, 15, 16, 17, 128, 129, 255, 256, 257, 1024, 1025, 2048, 2049, 4096, 4097, 8192, 16383, 16384, 65536]
tokens += [random.randint(1, 65536) for _ in range(40)] + [random.randint(1, 4100) for _ in range(40)]
found = {}
for shape in ((2048, 64, 8), (7168, 256, 8), (1000, 13, 2)):
    for dtype in (torch.bfloat16, torch.float32):
        keys = lambda ts: {launch.source()[1] for t in ts for v in gate.ROUTE_VARIANTS.values()
                           for launch in gate.route_launches(shape, dtype, t, v)}
        chosen = gate.token_counts(shape, dtype, "sm_90")
        geometries = [{gate.geometry(shape, dtype, "sm_90", t) for t in ts} for ts in (chosen, range(1, 65537))]
        known = keys(chosen)
        missed = len(geometries[1] - geometries[0]) + len(keys(tokens) - known)
        found[str((shape, dtype))] = [len(known), missed]
print(json.dumps(found))
"""

RACE = """
import json
from triton.compiler import ASTSource
from benchmarks import compiled, offline
from tests.kernels.racing_kernel import racing_kernel
signature = {"x_ptr": "*bf16", "d_ptr": "*bf16", "out_ptr": "*fp32", "D": "i32"}
found = []
for wait in (False, True):
    constants = {"BT": 128, "BD": 64, "BE": 64, "WAIT": wait}
    source = ASTSource(racing_kernel, signature | dict.fromkeys(constants, "constexpr"), constants,
                       {(i,): [["tt.divisibility", 16]] for i in range(4)})
    options = {"num_warps": 8, "num_stages": 3}
    made, _ = compiled.build(source, offline.TARGETS["sm_90"], options)
    code = compiled.cuobjdump(made, "-sass")
    found.append(compiled.refill_races(made.asm["ttgir"], code))
    # As if nothing were pending in the compiler's own form: then the machine code alone must tell.
    found.append(compiled.unguarded_refills(code, 0))
print(json.dumps(found))
"""


def compiled_here(*arguments: str) -> Any:
    """The JSON that Python prints for these arguments, without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_no_number_of_tokens_is_missed() -> None:
    """No T has a geometry that the gate leaves out; and launches at a hundred T compile nothing it has not compiled."""
    for where, (known, missed) in compiled_here("-c", EVERY_T).items():
        assert known >= 6, where
        assert missed == 0, where


def test_the_main_loop_as_it_was_is_found_to_race() -> None:
    racing, in_machine_code, mended, mended_code = compiled_here("-c", RACE)
    assert len(racing) == 1
    assert "2 buffers, 2 tiles copied ahead, 1 products pending" in racing[0]
    assert len(in_machine_code) == 1
    assert "writes shared memory before the products are done" in in_machine_code[0]
    assert mended == mended_code == []


def test_a_part_of_the_gate_passes() -> None:
    """The routing kernels at every T of three shapes, in bf16, for training, on sm_90."""
    document = compiled_here("-m", "benchmarks.gate", "--part", "--arch", "sm_90", "--json", "--processes", "2")
    result = document["archs"]["sm_90"]
    assert result["problems"] == []
    assert result["distinct"] == 29
    assert set(result["kernels"]) == {"route_fwd", "route_select", "route_rank"}
    for row in result["kernels"].values():
        assert 0 < row["most_registers"] <= 255
        assert row["spilling"] == row["racing"] == row["serialised"] == 0


LOOP = """
    %x_buf = ttg.local_alloc : () -> !ttg.memdesc<{x}x128x64xbf16, #shared, #smem, mutable>
    %d_buf = ttg.local_alloc : () -> !ttg.memdesc<3x64x64xbf16, #shared, #smem, mutable>
    %x0 = ttg.memdesc_index %x_buf[%c0] : !ttg.memdesc<{x}x128x64xbf16> -> !ttg.memdesc<128x64xbf16>
    %1 = ttg.async_copy_global_to_local %p, %x0 mask %m : tensor<128x64x!tt.ptr<bf16>> -> <128x64xbf16>
    %x1 = ttg.memdesc_index %x_buf[%c1] : !ttg.memdesc<{x}x128x64xbf16> -> !ttg.memdesc<128x64xbf16>
    %2 = ttg.async_copy_global_to_local %q, %x1 mask %m : tensor<128x64x!tt.ptr<bf16>> -> <128x64xbf16>
    %r:2 = scf.for %i = %c0 to %n step %c64 iter_args(%acc = %zero) -> (tensor<128x64xf32>)  : i32 {{
      %xi = ttg.memdesc_index %x_buf[%i] : !ttg.memdesc<{x}x128x64xbf16> -> !ttg.memdesc<128x64xbf16>
      %di = {d}
      %dots = ttng.warp_group_dot %xi, %di, %acc {{isAsync = true}} : !ttg.memdesc<128x64xbf16>
      %w:3 = ttng.warp_group_dot_wait %dots, %xi, %di {{pendings = {p} : i32}} : tensor<128x64xf32>
      scf.yield %w#0 : tensor<128x64xf32>
    }}
"""


def test_the_rule_for_buffers() -> None:
    """An operand needs the tiles that are copied ahead and those that pending products read; one made in the loop, and
    so written in each step, allows none pending."""
    from_buffer = "ttg.memdesc_index %d_buf[%i] : !ttg.memdesc<3x64x64xbf16> -> !ttg.memdesc<64x64xbf16>"
    made = "ttg.local_alloc %v : (tensor<64x64xbf16>) -> !ttg.memdesc<64x64xbf16, #shared, #smem>"
    for buffers, pending, d, races in [(2, 1, from_buffer, 1), (2, 0, from_buffer, 0), (3, 1, from_buffer, 0),
                                       (3, 2, from_buffer, 1), (3, 1, made, 1), (2, 0, made, 0)]:  # fmt: skip
        found = refill_races(LOOP.format(x=buffers, p=pending, d=d), "")
        assert len(found) == races, (buffers, pending, d, found)
