"""Supervised fine-tuning with TRL: K-Means routers in its SFTTrainer.

    python examples/finetune_trl.py FOLDER --out tuned

FOLDER holds a mixture of transformers with its tokenizer, as tiny_mixtral.py writes one. The text is the source of
Python's standard library.
"""

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from kmeans_route.integrations.transformers import KMeansRouterCallback, apply_kmeans_routing

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="folder of a model of transformers")
parser.add_argument("--out", default="runs/tuned")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--length", type=int, default=128, help="most tokens of a text")
args = parser.parse_args()

model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
print(apply_kmeans_routing(model))

files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]


def functions() -> Iterator[dict[str, str]]:
    """Each top-level function or class."""
    for file in files:
        for part in file.read_text(encoding="utf-8").split("\n\n\n"):
            yield {"text": part}


trainer = SFTTrainer(
    model,
    SFTConfig(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_length=args.length,
        learning_rate=1e-3,
        logging_steps=max(1, args.steps // 10),
        bf16=torch.cuda.is_available(),  # TRL's default asks for a GPU
        report_to=[],
        save_strategy="no",
    ),
    train_dataset=IterableDataset.from_generator(functions),
    processing_class=tokenizer,
)
KMeansRouterCallback(metrics=["maxvio", "dead_experts"], max_keys=10).add_to(trainer)  # before any logger
trainer.train()
trainer.save_model(args.out)  # load_kmeans_pretrained reads it
