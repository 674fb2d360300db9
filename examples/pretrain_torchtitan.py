"""Pre-training with torchtitan's Trainer: its debug-size DeepSeek-V3 with K-Means routers.

    torchrun --nproc-per-node 1 examples/pretrain_torchtitan.py

It needs a GPU, as torchtitan's Trainer does, and what examples/requirements.txt lists.

One line asks for K-Means: kmeans_routing. The rest lets the Trainer read bytes of Python's standard library without a
tokenizer or a data set.
"""

import argparse
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel
from torchtitan.tools.logging import init_logger

from kmeans_route.integrations.torchtitan import kmeans_routing

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=8, help="windows of text on each rank")
parser.add_argument("--length", type=int, default=128, help="bytes in a window")
parser.add_argument("--out", default="runs/torchtitan")
args = parser.parse_args()


class Bytes(BaseTokenizer):
    """Byte i is token i."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, tokenizer_path: str) -> None:
        super().__init__()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def get_vocab_size(self) -> int:
        return 256


class StandardLibrary(BaseDataLoader):
    """Random windows of its source, others on each rank; the generator's state is what a checkpoint holds."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, dp_rank: int, seq_len: int, local_batch_size: int, **unused: Any) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        joined = bytearray(b"\0".join(file.read_bytes() for file in files))
        self.text, self.shape = torch.frombuffer(joined, dtype=torch.uint8), (local_batch_size, seq_len)
        self.rank, self.generator = dp_rank, torch.Generator().manual_seed(dp_rank)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        rows, length = self.shape
        while True:
            starts = torch.randint(len(self.text) - length, (rows, 1), generator=self.generator)
            window = self.text[starts + torch.arange(length + 1)].long()
            yield {"input": window[:, :-1]}, window[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {f"rank_{self.rank}": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if f"rank_{self.rank}" in state:
            self.generator.set_state(state[f"rank_{self.rank}"])


config = deepseek_v3_debugmodel()
config.model_spec = kmeans_routing(config.model_spec)  # attaches the routers once the optimizers are made
config.tokenizer, config.dataloader = Bytes.Config(), StandardLibrary.Config()
config.loss = CrossEntropyLoss.Config()
config.training.steps, config.training.seq_len = args.steps, args.length
config.training.local_batch_size = args.batch
config.training.disable_cuda_graphs = True
config.metrics.log_freq = max(1, args.steps // 10)
config.checkpoint.enable, config.checkpoint.interval = True, args.steps
config.dump_folder = args.out
if not torch.cuda.is_available():
    config.training.mixed_precision_param = "float32"
    for layer in config.model_spec.model.layers:  # FlexAttention has no backward pass on a CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()

init_logger()
trainer = config.build()
trainer.train()
trainer.close()
torch.distributed.destroy_process_group()
