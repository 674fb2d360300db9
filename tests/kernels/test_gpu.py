"""What only a GPU can show, by the functions of `make gpu`. Needs a GPU and KMEANS_ROUTE_GPU_TESTS=1."""

from collections.abc import Iterator

import pytest
import torch

from kmeans_route.bench.clock import Clock
from kmeans_route.testing import MODEL_SHAPES

pytest.importorskip("triton")
from benchmarks.gpu import race
from benchmarks.gpu.cells import CELLS, LAYER, Cell
from benchmarks.gpu.checks import Problem, verify

pytestmark = pytest.mark.gpu
DTYPES = ["bfloat16", "float16", "float32"]


@pytest.fixture
def clock() -> Iterator[Clock]:
    """Everything on one stream, as in the run."""
    made = Clock(torch.device("cuda", torch.cuda.current_device()))
    with made.scope():
        yield made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 33, 512, 5000, 20000])
@pytest.mark.parametrize("name", list(MODEL_SHAPES))
def test_named_shapes(name: str, num_tokens: int, dtype: str, clock: Clock) -> None:
    """Every kernel, every result, against fp64."""
    found = verify(Problem(Cell(name, num_tokens, *MODEL_SHAPES[name], dtype), clock.device, common=0.5))
    wrong = {check: result["message"] for check, result in found.items() if not result["ok"]}
    assert not wrong


@pytest.mark.parametrize("cell", CELLS["race"], ids=lambda cell: cell.label)
def test_same_bits_of_hidden_states_in_l2(cell: Cell, clock: Clock) -> None:
    race.race(cell, clock)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_against_the_torch_backend(dtype: str, clock: Clock) -> None:
    race.layer_against_torch(Cell("layer", 3000, *LAYER, dtype), clock)


@pytest.mark.parametrize("cell", CELLS["sums"], ids=lambda cell: cell.label)
def test_same_sums_a_hundred_times(cell: Cell, clock: Clock) -> None:
    race.same_sums(cell, clock)


@pytest.mark.parametrize("cell", CELLS["streams"], ids=lambda cell: cell.label)
def test_streams_beside_each_other(cell: Cell, clock: Clock) -> None:
    race.streams(cell, clock)


@pytest.mark.parametrize("cell", CELLS["graphs"], ids=lambda cell: cell.label)
def test_graph_replay(cell: Cell, clock: Clock) -> None:
    race.graph_replay(cell, clock)


@pytest.mark.parametrize("cell", CELLS["graphs"], ids=lambda cell: cell.label)
def test_graph_replay_follows_the_centroids(cell: Cell, clock: Clock) -> None:
    race.graph_follows_centroids(cell, clock)


@pytest.mark.parametrize("cell", CELLS["no sync"], ids=lambda cell: cell.label)
def test_no_synchronisation_in_a_training_step(cell: Cell, clock: Clock) -> None:
    race.no_sync(cell, clock)
