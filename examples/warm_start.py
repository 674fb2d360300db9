"""From a learned router to K-Means, and back to an ordinary checkpoint, in a model of transformers.

    python examples/warm_start.py FOLDER --out vanilla

FOLDER holds a mixture of transformers with its tokenizer, as tiny_mixtral.py writes one. The text is the source of
Python's standard library. `kmeans-route convert` and `export` do as much on the command line.
"""

import argparse
import copy
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kmeans_route import attach, calibrate
from kmeans_route.integrations.transformers import apply_kmeans_routing, export_vanilla

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="folder of a model of transformers")
parser.add_argument("--out", default="runs/vanilla")
parser.add_argument("--steps", type=int, default=50, help="of training between the two")
parser.add_argument("--length", type=int, default=128, help="tokens in a window")
args = parser.parse_args()

learned, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)

files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]
text = "\n".join(file.read_text(encoding="utf-8") for file in files)
ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
windows = ids[: len(ids) // args.length * args.length].view(-1, args.length)
windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
batches = [{"input_ids": rows, "labels": rows} for rows in windows.split(8)]
held_out, batches = batches[:4], batches[4:]

# The rows of the learned gates become the directions; a selection bias evens the load on this text. No training step.
model = copy.deepcopy(learned)
apply_kmeans_routing(model, from_gate=True)
print(calibrate(learned, model, batches[:4], held_out=held_out, start="rows", balance_steps=20, progress=False))

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
attachment = attach(model.train(), optimizer)
for step in range(args.steps):
    loss = model(**batches[step % len(batches)]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
attachment.remove()
model.eval()
print(f"{args.steps} steps later: loss {loss.item():.3f} in training")

# Gates of the architecture's own kind that choose as the K-Means routers do: from_pretrained and engines know them.
export = export_vanilla(model, batches[:4], held_out=held_out, progress=False)
print(export)
export.model.save_pretrained(args.out)
tokenizer.save_pretrained(args.out)
