"""What the suites measure beside the published shapes of `kmeans_route.testing.MODEL_SHAPES`."""

from kmeans_route.testing import BenchShape

TOKEN_COUNTS = (1, 64, 512, 4096, 16384, 65536)

CPU_BENCH_SHAPES = {
    "T8192-D1024-E64-K8": BenchShape(8192, 1024, 64, 8),
    "T4096-D2048-E128-K8": BenchShape(4096, 2048, 128, 8),
    "T16384-D768-E16-K2": BenchShape(16384, 768, 16, 2),
}
