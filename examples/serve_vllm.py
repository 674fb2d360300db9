"""Serving with vLLM: a K-Means checkpoint of transformers as it is.

    python examples/serve_vllm.py FOLDER

FOLDER is what save_pretrained of a swapped model has written, as the --out of finetune_trainer.py, with a tokenizer.
kmeans_route must be installed beside vLLM, which finds its plugin by itself; on the command line: vllm serve FOLDER.
"""

import argparse

from vllm import LLM, SamplingParams

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="folder of a K-Means checkpoint")
parser.add_argument("--prompt", action="append", help="may be given several times")
parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
parser.add_argument("--dtype", default="auto")
parser.add_argument("--max-length", type=int, help="most tokens of a prompt with its answer")
args = parser.parse_args()

if __name__ == "__main__":  # vLLM's engine is a process of its own, which imports this file
    # Eager: the centroids' directions are made once. A compiled model makes them in each forward.
    llm = LLM(args.model, dtype=args.dtype, max_model_len=args.max_length, enforce_eager=True)
    prompts = args.prompt or ["import ", "def main("]
    answers = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=args.tokens))
    for done in answers:
        print(repr(done.prompt), "->", repr(done.outputs[0].text))
