"""The first centroids of a model are those of its tokens, however they were computed: rounding moves them, no more."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.model import DecoderLM
from tests.helpers.compare import routers_of

pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")


def text_of(seed: int) -> Tensor:
    """Letters with the odds of a language, so that many tokens are alike."""
    odds = 1 / torch.arange(1, 65, dtype=torch.float64)
    letters = torch.multinomial(odds, 16 * 64, replacement=True, generator=torch.Generator().manual_seed(seed))
    return letters.view(16, 64)


def after(run: Callable[[DecoderLM, Tensor], object], seed: int) -> tuple[Tensor, Tensor]:
    """Centroids and directions (layers, E, D) after the first commit."""
    model = DecoderLM(TrainConfig(layers=2, hidden=64, heads=2, experts=16, expert_hidden=32, seq_len=64, seed=seed))
    run(model, text_of(seed))
    for router in routers_of(model):
        router.commit()
    centroids, weight = zip(*((router.centroids, router.weight) for router in routers_of(model)), strict=True)
    return torch.stack(centroids), torch.stack(weight)


def in_micro_batches(model: DecoderLM, text: Tensor) -> None:
    for part in text.split(5):
        model(part)


def compiled(model: DecoderLM, text: Tensor) -> None:
    torch.compile(model)(text)


def in_bfloat16(model: DecoderLM, text: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model(text)


@pytest.mark.parametrize("run", [in_micro_batches, compiled])
def test_models_of_one_seed_start_alike(run: Callable[[DecoderLM, Tensor], object]) -> None:
    for seed in range(1 if run is compiled else 3):  # compiling takes long
        (centroids, weight), (others, theirs) = after(DecoderLM.forward, seed), after(run, seed)
        assert float((centroids - others).norm(dim=-1).max()) < 1e-6
        assert float((weight - theirs).norm(dim=-1).max()) < 1e-5


def test_bfloat16_starts_with_the_same_tokens() -> None:
    rounded = [(after(DecoderLM.forward, seed), after(in_bfloat16, seed)) for seed in range(6)]
    for which in range(2):  # centroids, directions
        cosine = torch.stack([(one[which] * other[which]).sum(-1) for one, other in rounded])
        assert float((cosine > 0.99).double().mean()) >= 0.99
        assert float(cosine.median()) > 0.9999
