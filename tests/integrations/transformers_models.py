"""Tiny random models of transformers, one a supported model type, built in place, and what their tests share."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kmeans_route import attach
from kmeans_route.integrations.transformers.router import ROUTERS

transformers.utils.logging.disable_progress_bar()  # of loading and saving

VOCAB = 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
HEADS = {"head_dim": 16}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
PLAIN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0,
}  # fmt: skip

# model type: what its config needs, over COMMON
TYPES: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "qwen2_moe": {**PLAIN, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**PLAIN, **HEADS, "norm_topk_prob": True},
    "qwen3_next": {
        **PLAIN, **HEADS, "shared_expert_intermediate_size": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"],
    },
    "olmoe": PLAIN,
    "flex_olmo": PLAIN,
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    "deepseek_v3": {**LATENT, "routed_scaling_factor": 2.5},
    "glm4_moe": {
        **HEADS, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
    },
    "exaone_moe": {
        **PLAIN, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "layer_types": ["full_attention", "full_attention"], "sliding_window_pattern": None,
    },
    "gpt_oss": {**LOCAL, **HEADS, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "granitemoe": LOCAL,
    "ernie4_5_moe": {
        "moe_intermediate_size": 16, "moe_k": 2, "moe_num_experts": 8, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0, "moe_layer_end_index": 1,
    },
    "phimoe": LOCAL,
    "hunyuan_v1_moe": {**HEADS, "num_experts": 8, "moe_topk": 2},
    "minimax_m2": {**LOCAL, **HEADS},
    "lfm2_moe": {**PLAIN, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "llama4_text": {
        **LOCAL, **HEADS, "num_experts_per_tok": 1, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 1,
        "attention_chunk_size": 32,
    },
}  # fmt: skip


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The config of a tiny model of that type."""
    return transformers.AutoConfig.for_model(model_type, **{**COMMON, **TYPES[model_type], **overrides})


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A fresh tiny causal language model of that type, in eval mode; the same weights each time.

    Some versions start the gates of some types at zero, from where nothing is learnt here and no centroid can come.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), dtype=dtype).eval()
    for module in model.modules():
        if type(module).__name__ == "Ernie4_5_MoeTopKRouter" and not module.weight.any():
            torch.nn.init.normal_(module.weight, std=0.02)
    return model


def some_tokens(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def realigned(model: nn.Module) -> nn.Module:
    """The same tensors at addresses of their own: loaded ones lie anywhere in a mapped file, and BLAS looks at that."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def train(model: nn.Module, steps: int, tokens: Tensor | None = None, **inputs: Any) -> list[float]:
    """Losses of AdamW on the same tokens, attached."""
    tokens = some_tokens(4, 16) if tokens is None else tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    attachment, losses = attach(model, optimizer), []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens, **inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    attachment.remove()
    model.eval()
    return losses


def gate_paths(vanilla: nn.Module) -> list[str]:
    """Where the routers of a model that is not swapped are."""
    return [path for path, module in vanilla.named_modules() if type(module).__name__ in ROUTERS]


def gate_rows(vanilla: nn.Module, path: str) -> Tensor:
    """The weight (E, D) of the router there."""
    router = vanilla.get_submodule(path)
    return (router.wg if hasattr(router, "wg") else router).weight.detach()
