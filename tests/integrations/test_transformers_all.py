"""Every model type of transformers, each with all of it: the slow lane, whose summary is committed."""

import datetime
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.16")

from kmeans_route import KMeansRouter, attach  # noqa: E402
from kmeans_route.integrations.transformers import (  # noqa: E402
    apply_kmeans_routing,
    export_vanilla,
    load_kmeans_pretrained,
    revert,
)
from kmeans_route.lm.data import BatchSampler, load_corpus, validation_windows  # noqa: E402
from tests.integrations.transformers_models import TYPES, some_tokens, tiny_config, tiny_model, train  # noqa: E402

STEPS = 20


def compiled_losses(model_type: str, *, swapped: bool = True) -> list[float]:
    """Losses of compiled training; without the swap one step, which says whether the architecture compiles at all."""
    model = tiny_model(model_type).train()
    model.set_experts_implementation("batched_mm")
    if swapped:
        apply_kmeans_routing(model)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if swapped:
            return train(model, STEPS)
        tokens = some_tokens(4, 16)
        model(input_ids=tokens, labels=tokens).loss.backward()
        return []


@pytest.mark.slow
def test_every_type_with_all_of_it(subtests: Any, tmp_path: Path) -> None:
    """One test, not one a type, so that one process holds all the rows of the summary."""
    rows = []
    for model_type in TYPES:
        with subtests.test(model_type):
            rows.append(all_of_it(model_type, tmp_path / model_type))
    folder = os.environ.get("KMEANS_ROUTE_SUMMARY")
    if folder and len(rows) == len(TYPES):
        record = {
            "what": "each model type from a tiny configuration: training, eager and compiled, and the ways out",
            "command": "python -m pytest tests/integrations/test_transformers_all.py -m slow",
            "date": datetime.date.today().isoformat(),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "steps": STEPS,
            "types": rows,
        }
        (Path(folder) / "transformers-types.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def all_of_it(model_type: str, folder: Path) -> dict[str, Any]:
    """Swap, train, generate, save, load, export, revert, compile: what was seen."""
    model, tokens = tiny_model(model_type), some_tokens()
    before, weights = model(tokens).logits, {n: v.clone() for n, v in model.state_dict().items()}
    summary = apply_kmeans_routing(model)
    losses = train(model, STEPS)
    assert losses[-1] < 0.8 * losses[0]
    routers = [swap.router for swap in summary]
    assert all(int(router.steps) == STEPS - 1 for router in routers)
    row: dict[str, Any] = {
        "type": model_type,
        "router": summary[0].old_class,
        "routers": len(summary),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.generate(tokens[:, :4], max_new_tokens=4, do_sample=False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    row["generate_leaves_state"] = True

    model.save_pretrained(folder)
    loaded = load_kmeans_pretrained(transformers.AutoModelForCausalLM, folder)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    row["save_load_equal"] = True

    batches = [{"input_ids": some_tokens(8, 32, seed=s), "labels": some_tokens(8, 32, seed=s)} for s in (1, 2)]
    if model_type == "phimoe":
        row["export"] = "refused: sparsemixer gates"
    else:
        comparison = export_vanilla(model, batches, progress=False).comparison
        assert comparison.mean("overlap") > 0.7
        row["export"] = {
            "top1": round(comparison.mean("top1"), 4),
            "overlap": round(comparison.mean("overlap"), 4),
            "loss_before": comparison.loss_before,
            "loss_after": comparison.loss_after,
        }

    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(weights[name])
    revert(model)
    assert torch.equal(model(tokens).logits, before)
    assert not any(isinstance(module, KMeansRouter) for module in model.modules())
    row["revert_equal"] = True

    try:
        compiled = compiled_losses(model_type)
    except Exception as error:
        with pytest.raises(type(error)):  # the model as it came fails likewise, else this is ours
            compiled_losses(model_type, swapped=False)
        row["compiled"] = f"fails without the swap too, {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    else:
        assert compiled[-1] < 0.8 * compiled[0]
        difference = max(abs(a - b) for a, b in zip(losses, compiled, strict=True))
        row["compiled"] = {"loss_last": compiled[-1], "largest_difference": difference}
    return row


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_model_trained_on_text_goes_back(model_type: str) -> None:
    """What the way back costs where the experts and the biases mean something: figures of docs/transformers.md."""
    torch.manual_seed(0)
    corpus = load_corpus()
    config = tiny_config(model_type, vocab_size=256, hidden_size=64, num_hidden_layers=2, max_position_embeddings=256)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    apply_kmeans_routing(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    attachment = attach(model, optimizer)
    sampler = BatchSampler(corpus.train, 128, 16, 0)
    for _ in range(300):
        tokens = sampler.next()[:, :-1].long()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    attachment.remove()

    def batches(text: torch.Tensor, count: int) -> list[dict[str, torch.Tensor]]:
        rows = validation_windows(text, 128, count * 16 * 128)[:, :-1].long()
        return [{"input_ids": part, "labels": part} for part in torch.split(rows, 16)]

    export = export_vanilla(model, batches(corpus.train, 16), held_out=batches(corpus.validation, 32), progress=False)
    told = export.comparison
    print(f"\n{model_type}\n{told}")
    assert told.loss_before is not None
    assert told.loss_after is not None
    assert told.loss_before < 2.5
    assert told.loss_after < told.loss_before + 0.15
    assert told.mean("overlap") > 0.8
