"""Pre-training with Megatron-Core: a GPT whose mixtures route by K-Means, in Megatron's own schedule.

    torchrun --nproc-per-node 1 examples/pretrain_megatron.py

The text is the source of Python's standard library, byte by byte. Megatron-Core needs a GPU; the tests run this on a
CPU, with a few of its calls to torch.cuda replaced.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from kmeans_route.integrations.megatron import FinalizeModelGrads, with_kmeans_router

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--micro-batches", type=int, default=2)
parser.add_argument("--batch", type=int, default=8, help="windows of text in a micro-batch")
parser.add_argument("--length", type=int, default=128, help="bytes in a window")
parser.add_argument("--clip-grad", type=float, default=1.0)
args = parser.parse_args()

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(0)

config = TransformerConfig(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    ffn_hidden_size=128,
    gated_linear_unit=True,
    add_bias_linear=False,
    normalization="RMSNorm",
    use_cpu_initialization=True,
    num_moe_experts=8,
    moe_router_topk=2,
    moe_token_dispatcher_type="allgather",
    moe_router_load_balancing_type="none",  # the router balances by its own rule
    moe_aux_loss_coeff=0.0,
)
layer = get_gpt_layer_local_spec(num_experts=8, normalization="RMSNorm")
with_kmeans_router(layer.submodules.mlp)
model = GPTModel(config, layer, vocab_size=256, max_sequence_length=args.length).to(torch.cuda.current_device())
model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
# Megatron calls this after the last micro-batch of a step; the centroids are committed with it.
finalize = FinalizeModelGrads(finalize_model_grads, [model])
config.finalize_model_grads_func = finalize
optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-3, clip_grad=args.clip_grad), [model])

files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = torch.frombuffer(bytearray(b"\0".join(file.read_bytes() for file in files)), dtype=torch.uint8)
positions = torch.arange(args.length, device=torch.cuda.current_device()).expand(args.batch, -1)
future = torch.ones(1, 1, args.length, args.length, dtype=torch.bool, device=positions.device).triu(1)


def batch() -> Tensor:
    starts = torch.randint(len(text) - args.length, (args.batch, 1))
    return text[starts + torch.arange(args.length + 1)].long().to(positions.device)


def forward_step(batches, model):
    tokens = next(batches)
    losses = model(tokens[:, :-1], positions, future, labels=tokens[:, 1:])

    def loss_of(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return losses.mean(), {"loss": losses.detach().mean()}

    return losses, loss_of


forward_backward = get_forward_backward_func()
for step in range(1, args.steps + 1):
    model.zero_grad_buffer()
    optimizer.zero_grad()
    reports = forward_backward(
        forward_step_func=forward_step,
        data_iterator=(batch() for _ in range(args.micro_batches)),
        model=model,
        num_microbatches=args.micro_batches,
        seq_length=args.length,
        micro_batch_size=args.batch,
        forward_only=False,
    )
    optimizer.step()
    if step == 1 or step % 10 == 0 or step == args.steps:
        loss = torch.stack([report["loss"] for report in reports]).mean()
        worst = finalize.metrics(names=["maxvio"])["routers/maxvio_max"]
        print(f"step {step}: loss {loss.item():.3f}, largest MaxVio {worst:.2f}", flush=True)

parallel_state.destroy_model_parallel()
dist.destroy_process_group()
