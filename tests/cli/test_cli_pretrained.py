"""`kmeans-route inspect`, `convert` and `export` on folders that transformers' save_pretrained has written."""

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.16")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("typer")


from kmeans_route import KMeansRouter  # noqa: E402
from kmeans_route.integrations.transformers import apply_kmeans_routing, load_kmeans_pretrained  # noqa: E402
from tests.helpers.commands import invoke, write_text  # noqa: E402
from tests.integrations.transformers_models import some_tokens, tiny_config  # noqa: E402

NAMES = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
BYTES = ("--calibration-bytes", 8192)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a byte tokenizer, and learned models with it."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_text(folder / "text", 16)
    words = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({word: n for n, word in enumerate(sorted(words))}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    for model_type in ("mixtral", "deepseek_v3"):
        torch.manual_seed(0)
        config = tiny_config(model_type, vocab_size=256)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / model_type)
        tokenizer.save_pretrained(folder / model_type)
    return folder


@pytest.mark.parametrize(("model_type", "start"), [("mixtral", "rows"), ("deepseek_v3", "means")])
def test_there_and_back(folder: Path, tmp_path: Path, model_type: str, start: str) -> None:
    text, out = ("--text", folder / "text"), ("--out", tmp_path / "kmeans")
    code, there = invoke(
        "convert", folder / model_type, *out, "--start", start, "--balance-steps", 8, *text, *BYTES, "--json"
    )
    assert code == 0, there
    assert sorted(there["routers"]) == NAMES
    assert there["calibration_tokens"] == 8192 // 64 * 64
    assert there["mean"]["overlap"] > 0.3
    assert there["mean"]["max_vio_after"] < there["mean"]["max_vio_before"]
    model = load_kmeans_pretrained(transformers.AutoModelForCausalLM, tmp_path / "kmeans")
    routers = [module for module in model.modules() if isinstance(module, KMeansRouter)]
    assert len(routers) == 2
    assert all(router.initialized for router in routers)
    assert {router.options.tau for router in routers} == {there["tau"]}, "the fitted tau is saved"
    rule = {"rows": "centroids", "means": "whitened"}[start]
    assert [router.commit_options.directions for router in routers] == [rule] * 2
    assert all(router.expert_bias.abs().max() > 0 for router in routers)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "kmeans")

    code, back = invoke("export", tmp_path / "kmeans", "--out", tmp_path / "back", *text, *BYTES, "--json")
    assert code == 0, back
    assert back["mean"]["overlap"] > 0.75
    assert back["loss_before"] == pytest.approx(there["loss_after"], abs=1e-4)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert not any(isinstance(module, KMeansRouter) for module in plain.modules())
    assert torch.isfinite(plain(some_tokens()).logits).all()

    code, seen = invoke("inspect", tmp_path / "kmeans", *text, "--json")
    assert code == 0, seen
    for name in NAMES:
        facts = seen["routers"][name]
        assert (facts["kind"], facts["experts"], facts["hidden"]) == ("kmeans", 8, 32)
        assert sum(facts["load"]) == pytest.approx(8, rel=1e-4)
        assert facts["bias_abs_max"] > 0
    code, seen = invoke("inspect", folder / model_type, *text, "--json")
    assert code == 0, seen
    assert seen["routers"][NAMES[0]]["kind"] == "learned"
    assert seen["routers"][NAMES[0]]["max_vio"] >= 0


def test_the_words_of_a_conversion(folder: Path, tmp_path: Path) -> None:
    code, said = invoke(
        "convert", folder / "mixtral", "--out", tmp_path / "kmeans", "--text", folder / "text", *BYTES, "--plain"
    )
    assert code == 0, said
    for words in ("convert: mixtral, held-out text", "loss a token:", NAMES[0], f"model: {tmp_path / 'kmeans'}"):
        assert words in said


def test_refusals(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(tiny_config("mixtral")).save_pretrained(bare)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "mixtral"}')
    text = ("--text", folder / "text")
    for arguments, message in (
        (("convert", bare, *text), "must hold a tokenizer"),
        (("convert", broken, *text), "no model that transformers can read"),
        (("convert", folder / "mixtral", "--more-steps", 5, *text), "--more-steps is for runs of kmeans-route train"),
        (("export", folder / "mixtral", *text), "nothing to export"),
        (("export", folder / "mixtral", "--router", "softmax", *text), "--router is for runs"),
        (("convert", folder / "mixtral", "--calibration-bytes", 8, *text), "at least 64 training tokens, got 8"),
    ):
        code, document = invoke(*arguments, "--out", tmp_path / "out", "--json")
        assert code == 1, arguments
        assert message in document["error"], (arguments, document["error"])
        assert not (tmp_path / "out").exists()
    code, document = invoke(
        "convert", folder / "mixtral", "--out", folder / "mixtral", "--overwrite", *text, *BYTES, "--json"
    )
    assert code == 1
    assert "already holds a model" in document["error"]


def test_a_folder_without_tokenizer_says_so_and_shows_what_is_stored(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("mixtral", vocab_size=256))
    model.save_pretrained(tmp_path / "learned")
    apply_kmeans_routing(model, average="cumulative", from_gate=True)
    for router in (module for module in model.modules() if isinstance(module, KMeansRouter)):
        router.steps.fill_(7)
        router.score_std.fill_(0.25)
        router.expert_bias[3] = -0.5
        router.tokens_seen.copy_(torch.arange(8))
    model.save_pretrained(tmp_path / "kmeans")
    remedy = "must hold a tokenizer beside the model, got none"
    for name, kind in (("learned", "learned"), ("kmeans", "kmeans")):
        code, seen = invoke("inspect", tmp_path / name, "--json")
        assert code == 0, seen
        assert f"{tmp_path / name} {remedy}: write it there" in seen["no_loads"]
        assert "write it there with tokenizer.save_pretrained" in seen["no_loads"]
        (tmp_path / name / "tokenizer.json").write_text("[]")
        code, broken = invoke("inspect", tmp_path / name, "--json")
        assert code == 0
        assert "got one that transformers cannot read (" in broken["no_loads"]
        (tmp_path / name / "tokenizer.json").unlink()
        facts = seen["routers"][NAMES[0]]
        assert "max_vio" not in facts
        assert (facts["kind"], facts["experts"]) == (kind, 8)
        assert -1 <= facts["direction_cosine"] <= 1
    assert (facts["steps"], facts["score_std"], facts["bias_abs_max"]) == (7, 0.25, 0.5)
    assert facts["tokens_seen"] == list(range(8))
    code, said = invoke("inspect", tmp_path / "kmeans", "--plain")
    assert code == 0, said
    words = " ".join(said.split())
    for shown in ("the state as it is stored, without loads", remedy, "0.5000", "0.250", "spread: of the scores"):
        assert shown in words
    code, seen = invoke("inspect", folder / "mixtral", "--text", folder / "text", "--json")
    assert (code, seen["no_loads"]) == (0, None)
    assert 1 <= seen["routers"][NAMES[0]]["effective_experts"] <= 8
