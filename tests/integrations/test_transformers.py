"""K-Means routers inside the models of transformers."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.16")

from kmeans_route import KMeansRouter, attach, ops  # noqa: E402
from kmeans_route.integrations import require  # noqa: E402
from kmeans_route.integrations.transformers import (  # noqa: E402
    SUPPORTED,
    apply_kmeans_routing,
    export_vanilla,
    load_kmeans_pretrained,
    revert,
)
from kmeans_route.integrations.transformers.config import MODEL_TYPES  # noqa: E402
from kmeans_route.integrations.transformers.router import ROUTERS  # noqa: E402
from tests.helpers.compare import assert_same_bits, routers_of  # noqa: E402
from tests.helpers.examples import run_example  # noqa: E402
from tests.integrations.transformers_models import (  # noqa: E402
    TYPES,
    VOCAB,
    gate_paths,
    gate_rows,
    realigned,
    some_tokens,
    tiny_model,
    train,
)

# How an architecture's own options arrive: normalize, scaling, n_group, topk_group, group_score.
PLAIN = (True, 1.0, 1, 1)
OPTIONS = {
    "qwen2_moe": (False, 1.0, 1, 1),
    "olmoe": (False, 1.0, 1, 1),
    "flex_olmo": (False, 1.0, 1, 1),
    "deepseek_v2": (False, 2.0, 4, 2),
    "deepseek_v3": (True, 2.5, 4, 2),
    "glm4_moe": (True, 1.5, 2, 1),
    "exaone_moe": (True, 2.5, 2, 1),
    "llama4_text": (False, 1.0, 1, 1),
}


# ---- every model type ----


@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_swaps_trains_saves_loads_generates_and_reverts(model_type: str, tmp_path: Path) -> None:
    model, tokens = tiny_model(model_type), some_tokens()
    before = model(tokens).logits
    weights_before = {name: value.clone() for name, value in model.state_dict().items()}
    summary = apply_kmeans_routing(model)
    assert [type(swap.router).__name__ for swap in summary] == [f"KMeans{swap.old_class}" for swap in summary]
    assert len(summary) == len(routers_of(model)) > 0
    options = summary[0].router.options
    assert (options.normalize, options.scaling, options.n_group, options.topk_group) == OPTIONS.get(model_type, PLAIN)
    assert not torch.equal(model(tokens).logits, before)
    losses = train(model, 3)
    assert losses[-1] < losses[0]
    assert all(int(router.steps) == 2 and bool(router.initialized) for router in routers_of(model))

    state = {name: value.clone() for name, value in model.state_dict().items()}
    generated = model.generate(tokens[:, :4], max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 8)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name

    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(loaded.config) is type(model.config)
    assert loaded.config.model_type == model_type
    assert loaded.config.kmeans_route == model.config.kmeans_route
    assert set(loaded.state_dict()) == set(state)
    for name, value in loaded.state_dict().items():
        assert_same_bits(value, state[name])
    assert_same_bits(realigned(loaded)(tokens).logits, model(tokens).logits)

    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(weights_before[name])
    revert(model)
    assert_same_bits(model(tokens).logits, before)
    assert set(model.state_dict()) == set(weights_before)
    assert not hasattr(model.config, "kmeans_route")


def test_every_supported_router_has_a_tiny_model() -> None:
    found = {model_type: {type(module).__name__ for module in tiny_model(model_type).modules()} for model_type in TYPES}
    assert all(len(names & ROUTERS.keys()) == 1 for names in found.values())
    assert set().union(*found.values()) >= ROUTERS.keys()


def captures_logits(model: Any, tokens: Tensor) -> bool:
    """Whether a plain model answers with a row of E logits a token."""
    captured = getattr(model.model(tokens, output_router_logits=True), "router_logits", None) or ()
    shapes = [tuple(logits.shape) for logits in captured]
    return bool(shapes) and shapes == [(tokens.numel(), len(gate_rows(model, path))) for path in gate_paths(model)]


@pytest.mark.parametrize("model_type", TYPES)
def test_capture_of_logits_and_hidden_states_stays(model_type: str) -> None:
    model, tokens = tiny_model(model_type), some_tokens()
    if not captures_logits(model, tokens):
        pytest.skip("this version of transformers does not capture the logits of this type")
    swaps = apply_kmeans_routing(model)
    plain = model(tokens).logits
    # Some heads leave router_logits out of their answer; the model inside has them.
    out = model.model(tokens, output_router_logits=True, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert len(out.router_logits) == len(swaps)
    for logits, swap in zip(out.router_logits, swaps, strict=True):
        assert logits.shape == (24, swap.router.num_experts)
        assert float(logits.detach().abs().max()) <= 1.0001 / swap.router.options.tau  # cosines over tau
        assert float(logits.detach().std()) > 0.1
    assert_same_bits(model(tokens).logits, plain)
    revert(model)
    assert len(model.model(tokens, output_router_logits=True).router_logits) == len(swaps)


def test_capture_hooks_of_before_the_swap_go_on(tmp_path: Path) -> None:
    model, tokens = tiny_model("mixtral"), some_tokens()
    assert len(model(tokens, output_router_logits=True).router_logits) == 2
    apply_kmeans_routing(model, tau=0.1)
    captured = model(tokens, output_router_logits=True).router_logits
    assert max(float(logits.detach().abs().max()) for logits in captured) <= 10.001
    revert(model)
    assert len(model(tokens, output_router_logits=True).router_logits) == 2


# ---- what is swapped ----


def test_summary_names_what_was_swapped() -> None:
    text = str(apply_kmeans_routing(tiny_model("deepseek_v3"), layers=[1], tau=0.1))
    assert text == (
        "1 router swapped\n"
        "model.layers.1.mlp.gate  DeepseekV3TopkRouter  E=8 D=32 K=2 gate=softmax tau=0.1 directions=whitened "
        "scaling=2.5 groups=2/4"
    )


@pytest.mark.parametrize("layers", [1, "model.layers.0.mlp.gate"])
def test_one_layer_alone_is_answered_with_its_list(layers: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a list .*: write \["):
        apply_kmeans_routing(tiny_model("mixtral"), layers)


@pytest.mark.parametrize("layers", [[0], ["model.layers.0.mlp.gate"], lambda path: ".0." in path])
def test_layers_choose_by_index_path_or_predicate(layers: Any) -> None:
    model = tiny_model("mixtral")
    assert [swap.path for swap in apply_kmeans_routing(model, layers)] == ["model.layers.0.mlp.gate"]
    assert [swap.path for swap in apply_kmeans_routing(model)] == ["model.layers.1.mlp.gate"]  # the rest, later
    assert revert(model) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [([5], "must name routers, got 5"), (["lm_head"], "must name routers, got 'lm_head'"), ([], "at least one router"),
     (lambda path: False, "take at least one router")],
)  # fmt: skip
def test_a_filter_that_names_nothing_is_refused(layers: Any, message: str) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(ValueError, match=message):
        apply_kmeans_routing(model, layers)
    assert not routers_of(model)


def test_models_without_a_known_router_are_refused_by_name() -> None:
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_dense(), "num_hidden_layers": 1}))
    types = re.escape(", ".join(MODEL_TYPES))
    with pytest.raises(
        ValueError, match=rf"supported type \({types}\), got LlamaForCausalLM of type llama without a router: "
    ):
        apply_kmeans_routing(dense)
    config = transformers.JetMoeConfig(**{**_dense(), "num_hidden_layers": 1, "kv_channels": 16})
    with pytest.raises(ValueError, match=r"of type jetmoe with JetMoeTopKGating at model\.layers\.0"):
        apply_kmeans_routing(transformers.JetMoeForCausalLM(config))
    with pytest.raises(TypeError, match="got Linear"):
        apply_kmeans_routing(nn.Linear(2, 2))
    assert set(MODEL_TYPES) == set(TYPES)


def test_misspelt_options_and_arguments_are_named() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(
        TypeError, match=r"apply_kmeans_routing must get options among .*, got 'tua': did you mean 'tau'"
    ):
        apply_kmeans_routing(model, tua=0.2)
    with pytest.raises(TypeError, match=r"cls must be a model class of transformers, got 'folder': call load_kmeans_"):
        load_kmeans_pretrained("folder", type(model))
    apply_kmeans_routing(model)
    with pytest.raises(TypeError, match=r"batches must be a list of batches, got a single dict: put it into a list"):
        export_vanilla(model, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})


def test_a_second_swap_says_what_is_swapped_and_what_is_left() -> None:
    model = tiny_model("mixtral")
    apply_kmeans_routing(model, [0])
    config = model.config
    for again in (0, "model.layers.0.mlp.gate"):
        with pytest.raises(
            ValueError,
            match=rf"got {again!r}, model\.layers\.0\.mlp\.gate that is swapped: call revert first, or name those that "
            r"are left, \['model\.layers\.1\.mlp\.gate'\]",
        ):
            apply_kmeans_routing(model, [again])
    apply_kmeans_routing(model)
    assert model.config is config
    with pytest.raises(
        ValueError,
        match=r"got MixtralForCausalLM with all 2 swapped \(model\.layers\.0\.mlp\.gate, .*\): call revert first",
    ):
        apply_kmeans_routing(model)
    assert len(revert(model)) == 2


def _dense() -> dict[str, Any]:
    return {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


def test_a_router_that_answers_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    cls = type(model.model.layers[0].mlp.gate)
    original = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: original(self, x)[::-1])
    with pytest.raises(
        ValueError, match=re.escape("must return (logits (T, E), weights (T, K), int64 indices (T, K))")
    ):
        apply_kmeans_routing(model)

    def fails(self: nn.Module, x: Tensor) -> None:
        raise RuntimeError("no meta here")

    monkeypatch.setattr(cls, "forward", fails)
    with pytest.raises(ValueError, match="got RuntimeError: no meta here"):
        apply_kmeans_routing(model)
    assert not routers_of(model)


def test_paths_that_bypass_the_router_are_refused() -> None:
    model = tiny_model("gpt_oss")
    model._use_kernels = True
    with pytest.raises(RuntimeError, match="use_kernels=True"):
        apply_kmeans_routing(model)
    model._use_kernels = False
    block = model.model.layers[0].mlp
    block.experts.__class__ = type("Mxfp4GptOssExperts", (type(block.experts),), {})
    with pytest.raises(RuntimeError, match="MXFP4"):
        apply_kmeans_routing(model)
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    with pytest.raises(RuntimeError, match="a forward that something has replaced"):
        apply_kmeans_routing(model)
    assert not routers_of(model)


def test_kernels_leave_swapped_blocks_and_routers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's kernelize takes layers by a name of their class, which a swapped router's class inherits."""
    kernelize = pytest.importorskip("kernels.layer.kernelize")
    taken: list[nn.Module] = []
    monkeypatch.setattr(kernelize, "kernelize_layer", lambda module, **_: taken.append(module))
    model = tiny_model("gpt_oss")
    layers = model.model.layers
    block, gate = type(layers[0].mlp), type(layers[0].mlp.router)
    # As transformers' own decorator sets them, where it takes the version of `kernels` that is installed.
    monkeypatch.setattr(block, "kernel_layer_name", "MegaBlocksMoeMLP", raising=False)
    monkeypatch.setattr(block, "kernel_condition", lambda _: True, raising=False)
    monkeypatch.setattr(gate, "kernel_layer_name", "SoftmaxTopKRouter", raising=False)

    def named() -> list[type[nn.Module]]:
        taken.clear()
        kernelize.kernelize(model, mode=kernelize.Mode.TRAINING, device="cpu")
        return [type(module) for module in taken if isinstance(module, block | gate)]

    assert named() == [block, gate] * 2
    apply_kmeans_routing(model, layers=[1])
    assert named() == [block, gate]
    revert(model)
    assert named() == [block, gate] * 2


def test_deepspeeds_replacement_is_refused_by_name() -> None:
    model = tiny_model("mixtral")
    model.model.layers[1].mlp = type("AutoEPMoELayer", (nn.Module,), {})()
    with pytest.raises(
        RuntimeError, match=r"model\.layers\.1\.mlp must be a block of transformers, got DeepSpeed's AutoEP"
    ):
        apply_kmeans_routing(model)
    assert not routers_of(model)


def test_options_of_the_router_override_the_architecture_and_bad_ones_change_nothing() -> None:
    model = tiny_model("deepseek_v3")
    with pytest.raises(ValueError, match="must not hold top_k, got 3"):
        apply_kmeans_routing(model, top_k=3)
    with pytest.raises(ValueError, match="tau"):
        apply_kmeans_routing(model, tau=-1.0)
    assert not routers_of(model)
    apply_kmeans_routing(model, balance="quantile", n_group=None, topk_group=None, scaling=1.0, decay=0.5)
    router = routers_of(model)[0]
    assert (router.commit_options.balance, router.commit_options.decay) == ("quantile", 0.5)
    assert (router.options.n_group, router.options.scaling) == (1, 1.0)


def test_the_auxiliary_loss_is_off_and_comes_back() -> None:
    model, tokens = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5), some_tokens()
    apply_kmeans_routing(model)
    assert not model.config.output_router_logits
    plain = float(model(tokens, labels=tokens).loss)
    assert float(model(tokens, labels=tokens, output_router_logits=True).loss) == plain
    revert(model)
    assert model.config.output_router_logits
    assert model.config.router_aux_loss_coef == model.router_aux_loss_coef == 0.5


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("5.15.1", "6.0.0"):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        with pytest.raises(ImportError, match=rf"must be a supported version, >=5\.16,<6, got {version}: pip install"):
            require("transformers", SUPPORTED)


# ---- masks, and rows that cannot be routed ----


def padded() -> tuple[Tensor, Tensor]:
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[1, 10:] = 0
    mask[3, :5] = 0
    return some_tokens(4, 16), mask


@pytest.mark.parametrize("how", ["keyword", "position", "checkpoint", "reentrant", "compiled"])
def test_only_tokens_of_the_attention_mask_count(how: str) -> None:
    model, (tokens, mask) = tiny_model("mixtral", num_hidden_layers=1).train(), padded()
    apply_kmeans_routing(model)
    attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    if how in ("checkpoint", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    model.set_experts_implementation("batched_mm")
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if how == "compiled" else model
    args = (tokens, mask) if how == "position" else (tokens,)
    out = run(*args, **({} if how == "position" else {"attention_mask": mask}), labels=tokens)
    out.loss.backward()
    for router in routers_of(model):
        assert int(router.pending.num_tokens) == int(mask.sum())
        assert int(router.pending.counts.sum()) == 2 * int(mask.sum())
    if how == "compiled":
        return  # a second graph takes its time and says nothing new
    run(tokens, labels=tokens).loss.backward()  # without a mask every token counts
    assert int(routers_of(model)[0].pending.num_tokens) == int(mask.sum()) + tokens.numel()


def test_finite_masked_tokens_are_routed_as_usual() -> None:
    """What padding gets is nobody's business, but it must not depend on the mask of statistics."""
    router = routers_of_swapped("mixtral")[0].train()
    router._commits_by_hand = True
    x = torch.randn(6, 32)
    plain = router(x)
    router.masks.mask = torch.tensor([[True, True, False, False, True, False]])
    masked = router(x)
    for a, b in zip(plain, masked, strict=True):
        assert_same_bits(a, b)
    assert int(router.pending.num_tokens) == 6 + 3


def test_a_padded_batch_is_routed_once_and_leaves_the_statistics_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (tokens, mask) = tiny_model("mixtral", num_hidden_layers=1).train(), padded()
    apply_kmeans_routing(model, balance="quantile")
    attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    (router,) = routers_of(model)
    alone = KMeansRouter(32, 8, 2, balance="quantile")
    with torch.no_grad():
        alone.weight.copy_(router.weight)
    routings, entered, route = [], [], ops.route

    def counted(*args: Any) -> Any:
        routings.append(args)
        return route(*args)

    monkeypatch.setattr(ops, "route", counted)
    router.observe(lambda at, _routing: entered.append(at.x))
    model(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
    assert len(routings) == len(entered) == 1
    assert entered[0].shape == (tokens.numel(), 32), "padding is routed too"
    alone._commits_by_hand = True
    alone(entered[0].detach()[mask.flatten().bool()])
    assert int(alone.pending.num_tokens) == int(mask.sum())
    for field in alone.pending.FIELDS:
        got, want = getattr(router.pending, field), getattr(alone.pending, field)
        if field in ("sums", "std_sum", "moments"):  # another order of the same terms
            torch.testing.assert_close(got, want)
        else:
            assert_same_bits(got, want, field)


def routers_of_swapped(model_type: str, **options: Any) -> list[Any]:
    model = tiny_model(model_type)
    apply_kmeans_routing(model, **options)
    return routers_of(model)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_rows_that_cannot_be_routed_reach_no_expert(model_type: str, bad: float) -> None:
    model = tiny_model(model_type).train()
    apply_kmeans_routing(model)
    layer = model.model.layers[0]
    block = getattr(layer, "mlp", None) or layer.feed_forward
    routers_of(block)[0]._commits_by_hand = True
    x = torch.randn(1, 6, 32)
    x[0, 2] = bad
    experts = block.experts
    y = (block(x)[0] if isinstance(block(x), tuple) else block(x)).view(6, 32)
    good = [0, 1, 3, 4, 5]
    assert bool(y[good].isfinite().all())
    y[good].square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in experts.parameters())
    assert bool(routers_of(block)[0].pending.sums.isfinite().all())


# ---- in company ----


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_all_implementations_of_experts_agree(model_type: str, implementation: str) -> None:
    tokens, results = some_tokens(), []
    for chosen in ("eager", implementation):
        model = tiny_model(model_type)
        model.set_experts_implementation(chosen)
        apply_kmeans_routing(model)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    for a, b in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    (tokens, mask), runs = padded(), []
    for checkpointed in (False, True):
        model = tiny_model("qwen3_moe")
        apply_kmeans_routing(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        train(model, 3, tokens, attention_mask=mask)
        runs.append(model.state_dict())
    for name, value in runs[0].items():
        assert_same_bits(value, runs[1][name])


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_twenty_compiled_steps_learn(model_type: str) -> None:
    plain, compiled = (tiny_model(model_type, num_hidden_layers=1) for _ in range(2))
    for model in (plain, compiled):
        model.set_experts_implementation("batched_mm")
        apply_kmeans_routing(model)
    reference = train(plain, 20)
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = train(compiled, 20)
    assert losses[-1] < 0.6 * losses[0]
    assert losses == pytest.approx(reference, rel=1e-3)
    for a, b in zip(routers_of(plain), routers_of(compiled), strict=True):
        assert int(a.steps) == int(b.steps) == 19
        torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=1e-3)


def test_generate_while_training_changes_no_state() -> None:
    model, tokens = tiny_model("mixtral").train(), some_tokens()
    apply_kmeans_routing(model)
    attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.generate(tokens[:, :4], max_new_tokens=3, do_sample=False)
    assert all(int(router.pending.num_tokens) == 0 for router in routers_of(model))


def test_lora_on_the_experts() -> None:
    peft = pytest.importorskip("peft")
    model, (tokens, mask) = tiny_model("mixtral"), padded()
    apply_kmeans_routing(model)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]
    )
    wrapped = peft.get_peft_model(model, config)
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert any("experts" in name for name in trained)
    assert all("lora" in name for name in trained)
    losses = train(wrapped, 4, tokens, attention_mask=mask)
    assert losses[-1] < losses[0]
    routers = routers_of(wrapped)
    assert [int(router.tokens_per_expert.sum()) for router in routers] == [2 * int(mask.sum())] * 2
    assert all(int(router.steps) == 3 for router in routers)
    merged = wrapped.merge_and_unload()
    assert len(routers_of(merged)) == 2
    assert len(revert(merged)) == 2


def test_an_adapter_finds_its_k_means_base_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokens = tiny_model("mixtral"), some_tokens()
    apply_kmeans_routing(model)
    train(model, 2)
    model.save_pretrained(tmp_path / "base")
    options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    for task_type in (None, "CAUSAL_LM"):
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        wrapped = peft.get_peft_model(base, peft.LoraConfig(task_type=task_type, **options))
        wrapped.save_pretrained(tmp_path / "adapter")
        if task_type is None:  # PEFT takes the class of the architecture
            with pytest.raises(ValueError, match="the routers are K-Means"):
                peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert len(routers_of(loaded)) == 2
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, wrapped.eval()(tokens).logits)
        assert not torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_the_example_of_the_page_does_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_example("transformers")
    assert len(routers_of(names["again"])) == 2
    assert [bool(router.initialized) for router in routers_of(names["model"])] == [True, True]
    assert names["attachment"].metrics()["model.layers.1.mlp.gate/dead_experts"] >= 0
    assert type(names["export"].model.model.layers[0].mlp.gate).__name__ == "MixtralTopKRouter"
