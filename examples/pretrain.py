"""Pre-training from scratch: a byte-level mixture of experts with K-Means routers, sharded by FSDP2.

    torchrun --nproc-per-node 2 examples/pretrain.py

The text is the source of Python's standard library. Started again with the same --out, a run goes on from its last
checkpoint, bit for bit.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from kmeans_route import MoE, attach

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--save-every", type=int, default=50)
parser.add_argument("--batch", type=int, default=8, help="windows of text on each rank")
parser.add_argument("--length", type=int, default=128, help="bytes in a window")
parser.add_argument("--hidden", type=int, default=64)
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--out", type=Path, default=Path("runs/pretrain"))
args = parser.parse_args()


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm mixture of experts. name: gives each router a random stream of its own."""

    def __init__(self, hidden: int, name: str) -> None:
        super().__init__()
        self.norm, self.moe_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.moe = MoE(hidden, 2 * hidden, num_experts=16, top_k=2, router="kmeans", name=name)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.moe(self.moe_norm(x))


class Decoder(nn.Module):
    """Bytes (B, S + 1) to the loss of each byte from those before it."""

    def __init__(self, hidden: int, layers: int, length: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, hidden), nn.Embedding(length, hidden)
        self.blocks = nn.ModuleList(Block(hidden, f"block_{i}") for i in range(layers))
        self.head = nn.Sequential(nn.RMSNorm(hidden), nn.Linear(hidden, 256))

    def forward(self, tokens: Tensor) -> Tensor:
        given, wanted = tokens[:, :-1], tokens[:, 1:]
        x = self.bytes(given) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), wanted.flatten())


cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
rank, device = dist.get_rank(), torch.device("cpu")
if cuda:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)

files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = torch.frombuffer(bytearray(b"\0".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def batch(step: int) -> Tensor:
    """Other windows on each rank and in each step, and the same again when a run resumes."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + rank)
    starts = torch.randint(len(text) - args.length, (args.batch, 1), generator=generator)
    return text[starts + torch.arange(args.length + 1)].long().to(device)


torch.manual_seed(0)
model = Decoder(args.hidden, args.layers, args.length).to(device)
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
attachment = attach(model, optimizer)  # after fully_shard: one commit of the centroids a step, on all ranks


def state() -> dict[str, dict]:
    """What a checkpoint holds; the routers' state is in the model's."""
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


first = 0
finished = [int(path.parent.name) for path in args.out.glob("*/.metadata")]  # what dcp.save writes last
if finished:
    first, saved = max(finished), state()
    dcp.load(saved, checkpoint_id=args.out / str(first))
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])

for step in range(first + 1, args.steps + 1):
    loss = model(batch(step))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and (step == first + 1 or step % 10 == 0 or step == args.steps):
        worst = attachment.metrics(names=["maxvio"])["routers/maxvio_max"]
        print(f"step {step}: loss {loss.item():.3f}, largest MaxVio {worst:.2f}", flush=True)
    if step % args.save_every == 0 or step == args.steps:
        dcp.save(state(), checkpoint_id=args.out / str(step))  # after a step, so that no statistics are pending

dist.destroy_process_group()
