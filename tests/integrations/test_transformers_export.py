"""The way back of models of transformers: ordinary checkpoints of their architectures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.16")

from kmeans_route import attach  # noqa: E402
from kmeans_route.integrations.transformers import (  # noqa: E402
    apply_kmeans_routing,
    export_vanilla,
    load_kmeans_pretrained,
)
from kmeans_route.integrations.transformers import export as integration  # noqa: E402
from kmeans_route.integrations.transformers.router import ROUTERS  # noqa: E402
from kmeans_route.routing.learned import KINDS  # noqa: E402
from tests.helpers.compare import assert_same_bits, routers_of  # noqa: E402
from tests.integrations.transformers_models import TYPES, some_tokens, tiny_model  # noqa: E402

EXPORTED = [model_type for model_type in TYPES if model_type != "phimoe"]
TWO_BEST = ("deepseek_v3", "glm4_moe", "exaone_moe")  # groups chosen by sums, which a sigmoid does not keep in order


def batches(count: int = 2, rows: int = 8) -> list[dict[str, Any]]:
    tokens = [some_tokens(rows, 32, seed=100 + number) for number in range(count)]
    return [{"input_ids": each, "labels": each} for each in tokens]


def swapped_model(model_type: str, steps: int = 0, first: int = 0, **options: Any) -> Any:
    """A swapped model whose routers have seen data, and whose biases have moved where there were steps.

    first: the number of its first batch.
    """
    model = tiny_model(model_type, **options).train()
    apply_kmeans_routing(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attachment = attach(model, optimizer)
    for step in range(1 + steps):
        tokens = some_tokens(4, 32, seed=first + step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    attachment.remove()
    if not steps:
        for router in routers_of(model):
            router.expert_bias.zero_()
    return model.eval()


def test_every_type_is_exported_or_refused_with_a_reason() -> None:
    assert [name for name, slot in ROUTERS.items() if slot.kind not in KINDS] == ["PhimoeTopKRouter"]
    with pytest.raises(ValueError, match="PhimoeTopKRouter: its gates are those of sparsemixer"):
        export_vanilla(swapped_model("phimoe"), batches())


@pytest.mark.parametrize("model_type", EXPORTED)
def test_without_a_bias_the_choices_are_equal_and_a_plain_load_runs_them(model_type: str, tmp_path: Path) -> None:
    model = swapped_model(model_type)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export = export_vanilla(model, batches())
    for agreement in export.comparison.routers.values():
        assert agreement.num_tokens == 512
        assert agreement.overlap > (0.9 if model_type in TWO_BEST else 0.998)
    assert abs(export.comparison.loss_after - export.comparison.loss_before) < 0.01
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name])

    export.model.save_pretrained(tmp_path)
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not hasattr(plain.config, "kmeans_route")
    assert not routers_of(plain)
    tokens = some_tokens()
    torch.testing.assert_close(plain(tokens).logits, export.model(tokens).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_type", EXPORTED)
def test_a_bias_goes_where_the_architecture_has_a_place(model_type: str) -> None:
    model = swapped_model(model_type, steps=1)
    for draw, router in enumerate(routers_of(model)):  # biases above the spread of scores: to lose them costs
        bias = torch.randn(router.num_experts, generator=torch.Generator().manual_seed(draw))
        router.expert_bias.copy_(0.3 * (bias - bias.mean()))
    export, lost = (export_vanilla(model, batches(), held_out=batches(1), bias=bias) for bias in (None, "none"))
    slot = ROUTERS[type(next(iter(routers_of(model)))).original_class.__name__]
    assert export.comparison.mean("overlap") > lost.comparison.mean("overlap") + 0.01
    if slot.bias == "score":  # which does not reach the gates
        assert export.comparison.mean("gate_error") < lost.comparison.mean("gate_error")
    for path, gate in export.gates.items():
        written = integration._bias_of(export.model, path, slot)
        given = gate.linear.bias if slot.bias == "logit" else gate.score_bias
        if slot.key:
            assert given is not None
            assert_same_bits(written.detach().flatten(), given.detach())
        else:
            assert written is None
            assert given is None


def test_the_report_is_of_the_routers_that_will_be_served() -> None:
    """The comparison calls the learned routers themselves: what is spoiled in them shows."""
    model = swapped_model("deepseek_v3", steps=6)
    export = export_vanilla(model, batches())
    x = torch.randn(300, 32)
    for path, router in zip(export.gates, routers_of(model), strict=True):
        _, weights, ids = export.model.get_submodule(path)(x)
        fitted, gates = export.gates[path].choose(x)
        same = (ids.sort(1).values == fitted.sort(1).values).all(1)
        assert same.float().mean() > 0.99
        order, other = ids[same].argsort(1), fitted[same].argsort(1)
        torch.testing.assert_close(weights[same].gather(1, order), gates[same].gather(1, other), atol=1e-5, rtol=1e-4)
        assert router.top_k == ids.shape[1]


def test_padding_is_not_counted() -> None:
    model, tokens = swapped_model("mixtral"), some_tokens(8, 32)
    mask = torch.ones_like(tokens)
    mask[:, 20:] = 0
    export = export_vanilla(model, [{"input_ids": tokens, "attention_mask": mask, "labels": tokens}])
    for agreement in export.comparison.routers.values():
        assert agreement.num_tokens == 8 * 20
        assert int(agreement.counts_after.sum()) == 8 * 20 * 2


def test_an_attached_or_loaded_model_can_be_exported(tmp_path: Path) -> None:
    model, tokens = swapped_model("minimax_m2", steps=3), some_tokens()
    first = export_vanilla(model, batches())
    attachment = attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    again = export_vanilla(model, batches())
    assert_same_bits(again.model(tokens).logits, first.model(tokens).logits)
    attachment.remove()
    model.save_pretrained(tmp_path)
    loaded = load_kmeans_pretrained(type(model), tmp_path)
    other = export_vanilla(loaded, batches())
    torch.testing.assert_close(other.model(tokens).logits, first.model(tokens).logits, atol=1e-6, rtol=1e-5)
    assert other.model.lm_head.weight is loaded.lm_head.weight


def test_half_precision_is_measured_after_the_rows_are_rounded() -> None:
    model = swapped_model("olmoe", dtype=torch.bfloat16)
    export = export_vanilla(model, batches())
    assert export.model.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
    assert 0.9 < export.comparison.mean("overlap") < 1


def test_bad_calls() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(ValueError, match="must have swapped routers, got MixtralForCausalLM without"):
        export_vanilla(model, batches())
    apply_kmeans_routing(model)
    with pytest.raises(ValueError, match=r"bias must be one of \['none', 'rows'\] for MixtralForCausalLM, got 'score'"):
        export_vanilla(model, batches(), bias="score")
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        export_vanilla(model, [])
    with pytest.raises(TypeError, match="must be a PreTrainedModel"):
        export_vanilla(nn.Linear(2, 2), batches())
    assert len(routers_of(model)) == 2
