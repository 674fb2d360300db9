"""Routing of few tokens, as in decoding: T = 1, 64 and 512 at the routers of published models."""

import torch

from benchmarks.conftest import Bench
from benchmarks.harness.shapes import TOKEN_COUNTS
from benchmarks.test_bench_route import eval_bytes, eval_contest
from kmeans_route.testing import MODEL_SHAPES, BenchShape

DECODE_TOKENS = [num_tokens for num_tokens in TOKEN_COUNTS if num_tokens <= 512]
SHAPES = {f"{name}-T{t}": BenchShape(t, *shape) for name, shape in MODEL_SHAPES.items() for t in DECODE_TOKENS}
QUICK = {f"quick-T{num_tokens}": BenchShape(num_tokens, 24, 8, 2) for num_tokens in (1, 5)}


def test_decode(shape: BenchShape, dtype: torch.dtype, bench: Bench) -> None:
    contest = eval_contest(shape, dtype, compiles=bench.compiles)
    with torch.no_grad():
        bench.run(contest, {"shape": shape._asdict(), "dtype": str(dtype), "floor_num_bytes": eval_bytes(shape, dtype)})
