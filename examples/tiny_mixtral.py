"""A model for the other examples, where no hub can be reached: a tiny Mixtral that has learned to read bytes.

    python examples/tiny_mixtral.py FOLDER

Writes an ordinary checkpoint of transformers with learned gates, and its tokenizer, in which a byte is a token.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("out", help="folder to write")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--length", type=int, default=128, help="bytes in a window")
args = parser.parse_args()

symbols = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
bytewise = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>")

torch.manual_seed(0)
model = MixtralForCausalLM(
    MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        output_router_logits=True,  # asks for the auxiliary loss
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
)

files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]
ids = torch.tensor(tokenizer("\n".join(file.read_text(encoding="utf-8") for file in files))["input_ids"])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(args.steps):
    rows = ids[torch.randint(len(ids) - args.length, (8, 1)) + torch.arange(args.length)]
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"{args.steps} steps: loss {loss.item():.3f}, auxiliary loss included")

model.save_pretrained(args.out)
tokenizer.save_pretrained(args.out)
