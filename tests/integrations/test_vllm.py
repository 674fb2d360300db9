"""vLLM serves K-Means checkpoints as they are: tokens, logits and choices of transformers.

`make test-engines` runs this with vllm-cpu in an environment of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", minversion="0.32")
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is in reach
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

import tokenizers
import transformers
from safetensors.torch import load_file, save_file
from vllm import LLM, EngineArgs, ModelRegistry, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)

from kmeans_route import attach, ops, replay
from kmeans_route.integrations.transformers import apply_kmeans_routing, load_kmeans_pretrained
from kmeans_route.integrations.transformers.router import TransformersRouter
from kmeans_route.integrations.vllm import ARCHITECTURES, register
from tests.helpers.compare import assert_same_bits
from tests.integrations.transformers_models import TYPES, VOCAB, some_tokens, tiny_config, tiny_model

CLASSES = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
MODEL_TYPES = {CLASSES[model_type]: model_type for model_type in TYPES}
SERVED = [MODEL_TYPES[name] for name in ARCHITECTURES]
PROMPTS, WATCHED, LENGTH, NEW = 20, 5, 12, 16
# vLLM's attention takes no smaller heads on a CPU. It looks for moe_intermediate_size first, which is not OLMoE's.
SIZES = {"hidden_size": 64, "head_dim": 32}
OWN_SIZES = {"olmoe": {"moe_intermediate_size": 32}}
pytestmark = pytest.mark.usefixtures("plain_empty")


class Expected(NamedTuple):
    """A checkpoint, and what transformers makes of it.

    tokens: (PROMPTS, LENGTH + NEW), prompts and what follows greedily. given, truth, learned: log-probabilities
    (PROMPTS, NEW, VOCAB) of what follows, in fp32, in fp64, and of learned routers made of the centroids. chosen:
    expert ids of the first prompts, a tensor a router and prompt.
    """

    path: Path
    tokens: Tensor
    given: Tensor
    truth: Tensor
    learned: Tensor
    chosen: list[Tensor]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By model type, made once, and before vLLM is asked: it changes the classes of transformers."""
    made: dict[str, Expected] = {}

    def of(model_type: str) -> Expected:
        if model_type not in made:
            made[model_type] = _expected(model_type, tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return of


def _expected(model_type: str, path: Path) -> Expected:
    trained = tiny_model(model_type, **SIZES, **OWN_SIZES.get(model_type, {}))
    apply_kmeans_routing(trained)
    optimizer, text = torch.optim.AdamW(trained.parameters(), lr=3e-3), some_tokens(8, 32)
    attachment = attach(trained, optimizer)
    trained.train()
    for _ in range(20):
        trained(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    attachment.remove()
    trained.save_pretrained(path)
    tokenizer().save_pretrained(path)

    model = load_kmeans_pretrained(transformers.AutoModelForCausalLM, path).eval()
    ordinary = tiny_config(model_type, **SIZES, **OWN_SIZES.get(model_type, {}))
    learned = transformers.AutoModelForCausalLM.from_pretrained(path, config=ordinary).eval()
    tokens = some_tokens(PROMPTS, LENGTH, seed=3)
    seen = watch(model)
    with torch.no_grad():
        for prompt in tokens[:WATCHED]:
            model(prompt[None])
        chosen = list(seen)
        for _ in range(NEW):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    given = log_probabilities(model, tokens)
    model.set_experts_implementation("eager")  # the others have no fp64
    truth = log_probabilities(model.double(), tokens)
    return Expected(path, tokens, given, truth, log_probabilities(learned, tokens), chosen)


def log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """Of what follows the prompts: (PROMPTS, NEW, VOCAB) fp64."""
    with torch.no_grad():
        return model(tokens).logits[:, LENGTH - 1 : -1].double().log_softmax(-1)


def tokenizer() -> Any:
    """A word a token: w3, w4, ..."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def routers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, TransformersRouter)]


def watch(model: Any) -> list[Tensor]:
    """The ids that its routers choose from now on, a row sorted."""
    seen: list[Tensor] = []
    for router in routers_of(model):
        at = router.contract.answer.index("indices")
        router.register_forward_hook(lambda _module, _args, out, at=at: seen.append(out[at].sort(-1).values.clone()))
    return seen


@pytest.fixture
def serve() -> Iterator[Any]:
    """An engine in this process, one at a time, and the model in it."""

    def start(path: Path) -> tuple[Any, Any]:
        llm = LLM(
            str(path), dtype="float32", max_model_len=64, max_num_seqs=8, max_logprobs=VOCAB, enforce_eager=True,
            enable_prefix_caching=False,
        )  # fmt: skip
        return llm, llm.apply_model(lambda model: model)[0]

    yield start
    cleanup_dist_env_and_memory()


def ask(llm: Any, prompts: Tensor, new: int = NEW, **options: Any) -> list[Any]:
    asked = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
    sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, **options)
    return [done.outputs[0] for done in llm.generate(asked, sampling, use_tqdm=False)]


@pytest.mark.parametrize("model_type", SERVED)
def test_tokens_logits_and_choices_are_those_of_transformers(model_type: str, expected: Any, serve: Any) -> None:
    want = expected(model_type)
    follows = want.tokens[:, LENGTH:]
    assert not want.learned.argmax(-1).equal(follows)  # a learned router of the centroids would show
    before = load_file(want.path / "model.safetensors")
    llm, model = serve(want.path)
    outputs = ask(llm, want.tokens[:, :LENGTH], logprobs=VOCAB)
    assert torch.tensor([list(output.token_ids) for output in outputs]).equal(follows)
    given = torch.tensor([[[step[t].logprob for t in range(VOCAB)] for step in output.logprobs] for output in outputs])
    # Not farther from fp64 than transformers in fp32 is, with other sums in other orders: hence twice.
    assert (given - want.truth).abs().max() <= 2 * (want.given - want.truth).abs().max()

    seen = watch(model)
    for prompt in want.tokens[:WATCHED, :LENGTH]:
        ask(llm, prompt[None], new=1)
    assert len(seen) == len(want.chosen) > 0
    for ours, theirs in zip(seen, want.chosen, strict=True):
        assert ours.equal(theirs)

    routers = routers_of(model)
    assert all(router.frozen and not router.training for router in routers)
    centroids = sorted(name for name in before if name.endswith(".centroids"))
    assert len(centroids) == len(routers)
    for router, name in zip(routers, centroids, strict=True):
        for key, buffer in router.named_buffers():
            assert_same_bits(buffer, before[name.removesuffix("centroids") + key])
        assert not router.tokens_per_expert.any()


def test_what_vllm_captures_is_what_replay_takes(expected: Any, serve: Any) -> None:
    """enable_return_routed_experts, by hand: the runner that returns the array needs Triton. Layer 0 is dense here."""
    want = expected("glm4_moe")
    llm, model = serve(want.path)
    capturer = RoutedExpertsCapturer(LENGTH, llm.llm_engine.vllm_config)
    bind_routed_experts_capturer(model, capturer)
    ask(llm, want.tokens[:1, :LENGTH], new=1)
    array = capturer.snapshot_routing_data(LENGTH).numpy()
    paths = [path for path, module in model.named_modules() if isinstance(module, TransformersRouter)]
    assert (str(array.dtype), array.shape[:2], len(paths)) == ("uint8", (LENGTH, 2), 1)
    ids = torch.from_numpy(array)[:, 1]
    assert ids.long().sort(-1).values.equal(want.chosen[0])
    others = (ids + 1) % routers_of(model)[0].num_experts
    seen = watch(model)
    with replay(model, {paths[0]: others}):
        ask(llm, want.tokens[:1, :LENGTH], new=1)
    assert seen[0].equal(others.long().sort(-1).values)


def test_directions_are_pinned_until_weights_are_loaded_again(
    expected: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = expected("mixtral")
    llm, model = serve(want.path)
    prompts, follows = want.tokens[:2, :LENGTH], want.tokens[:2, LENGTH:]
    saved = {name: tensor for name, tensor in load_file(want.path / "model.safetensors").items() if ".gate." in name}

    def answers() -> bool:
        return torch.tensor([list(output.token_ids) for output in ask(llm, prompts)]).equal(follows)

    assert answers()
    monkeypatch.setattr(ops, "directions", lambda *_: pytest.fail("directions must be made once"))
    for router in routers_of(model):
        router.weight.neg_()
    assert answers()
    monkeypatch.undo()
    model.load_weights((name, -tensor if name.endswith("gate.weight") else tensor) for name, tensor in saved.items())
    assert not answers()
    model.load_weights(saved.items())
    assert answers()


def with_changes(path: Path, to: Path, change: Any) -> str:
    """A copy of a checkpoint whose config `change` was given."""
    shutil.copytree(path, to)
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    change(config)
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(to)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["kmeans_route"].update(version=99), "must have a version of 1 to 2, got 99"),
        (lambda config: config.pop("kmeans_route"), "must have a kmeans_route section"),
        (lambda config: config["kmeans_route"]["routers"].update(lost={}), "must name routers of MixtralModel"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    change: Any, message: str, expected: Any, serve: Any, tmp_path: Path
) -> None:
    path = with_changes(expected("mixtral").path, tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message):
        serve(path)


def test_a_checkpoint_of_section_version_1_is_served(expected: Any, serve: Any, tmp_path: Path) -> None:
    """Its model type is that of the architecture."""

    def change(config: dict[str, Any]) -> None:
        config["model_type"] = "mixtral"
        config["kmeans_route"]["version"] = 1
        del config["auto_map"], config["transformers_weights"]

    want = expected("mixtral")
    llm, model = serve(with_changes(want.path, tmp_path / "old", change))
    assert len(routers_of(model)) == 2
    outputs = ask(llm, want.tokens[:2, :LENGTH])
    assert torch.tensor([list(output.token_ids) for output in outputs]).equal(want.tokens[:2, LENGTH:])


def test_weights_without_the_state_of_a_router_are_refused(expected: Any, serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "partial"
    shutil.copytree(expected("mixtral").path, path)
    weights = load_file(path / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if "1.block_sparse_moe.gate.centroids" not in name}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"must hold the state of all its K-Means routers, got none of \S+1\.mlp\.gate"
    ):
        serve(path)


def test_an_architecture_that_is_not_served_is_refused_by_name(expected: Any, tmp_path: Path) -> None:
    def rename(config: dict[str, Any]) -> None:
        config["architectures"] = ["KMeansLlama4ForCausalLM"]

    path = with_changes(expected("mixtral").path, tmp_path / "renamed", rename)
    with pytest.raises(ValueError, match=r"KMeansLlama4ForCausalLM.* are not supported"):
        EngineArgs(model=path).create_model_config()


def test_registering_twice_is_registering_once() -> None:
    register()
    before = dict(ModelRegistry.models)
    register()
    assert ModelRegistry.models.keys() == before.keys()
    assert {f"KMeans{name}" for name in ARCHITECTURES} <= before.keys()


PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    path, prompts, new, trust = json.loads(sys.argv[1])
    llm = LLM(path, dtype="float32", max_model_len=64, max_num_seqs=8, trust_remote_code=trust)
    sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in done]))
"""


def run(want: Expected, tmp_path: Path, trust: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """The engine as users start it: in a process of its own, compiled."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    asked = json.dumps([str(want.path), want.tokens[:, :LENGTH].tolist(), NEW, trust])
    return subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), asked],
        capture_output=True, text=True, check=False,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TRITON_INTERPRET": "0", **environment},
    )  # fmt: skip


def test_a_process_of_its_own_serves_compiled(expected: Any, tmp_path: Path) -> None:
    want = expected("mixtral")
    done = run(want, tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert json.loads(line.removeprefix("TOKENS ")) == want.tokens[:, LENGTH:].tolist()


@pytest.mark.parametrize(
    ("trust", "message"),
    [
        (False, "contains custom code which must be executed"),
        (True, "Model architectures ['KMeansMixtralForCausalLM'] are not supported"),
    ],
)
def test_without_the_plugin_vllm_refuses(trust: bool, message: str, expected: Any, tmp_path: Path) -> None:
    modules = str(tmp_path / "modules")
    done = run(expected("mixtral"), tmp_path, trust, VLLM_PLUGINS="lora_filesystem_resolver", HF_MODULES_CACHE=modules)
    assert done.returncode != 0
    assert message in done.stderr
