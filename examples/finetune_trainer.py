"""Fine-tuning with the Trainer of transformers: K-Means routers in the place of a model's learned ones.

    python examples/finetune_trainer.py FOLDER --out tuned

FOLDER holds a mixture of transformers with its tokenizer, as tiny_mixtral.py writes one; the rows of its gates become
the first centroids. The text is the source of Python's standard library.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from kmeans_route.integrations.transformers import KMeansRouterCallback, apply_kmeans_routing, load_kmeans_pretrained

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="folder of a model of transformers")
parser.add_argument("--out", default="runs/tuned")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--length", type=int, default=128, help="tokens in a window")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
args = parser.parse_args()

model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
print(apply_kmeans_routing(model))

files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]
text = "\n".join(file.read_text(encoding="utf-8") for file in files)
ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
windows = ids[: len(ids) // args.length * args.length].view(-1, args.length)

trainer = Trainer(
    model,
    TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,  # both micro-batches enter one commit
        learning_rate=1e-3,
        logging_steps=max(1, args.steps // 10),
        save_steps=max(1, args.steps // 2),
        report_to=[],
    ),
    train_dataset=[{"input_ids": window, "labels": window} for window in windows],
)
# One commit an optimizer step; beside the loss the range of these metrics over the routers, for every logger.
KMeansRouterCallback(metrics=["maxvio", "dead_experts"], max_keys=10).add_to(trainer)
trainer.train(resume_from_checkpoint=args.resume)
model.save_pretrained(args.out)
tokenizer.save_pretrained(args.out)

again = load_kmeans_pretrained(AutoModelForCausalLM, args.out).eval()
prompt = tokenizer("import ", add_special_tokens=False, return_tensors="pt")
answer = again.generate(**prompt, max_new_tokens=20, do_sample=False)
print(repr(tokenizer.decode(answer[0])))
