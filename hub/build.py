"""Write the layout that Hugging Face's `kernels` loads: build/hub/build/torch-cpu, torch-cuda, torch-rocm.

Each holds the functions of the package and a stateless layer, self-contained: imports become relative, and operators
get a namespace of their own, so that the package may be loaded beside it.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "backends/__init__", "backends/chunks", "backends/first", "backends/reference", "backends/torch",
    "backends/torch_statistics", "backends/torch_topk", "backends/triton", "backends/whitening", "checks", "functional",
    "install", "metrics", "ops/__init__", "ops/dispatch", "ops/flops", "ops/route", "ops/schema", "ops/statistics",
    "reference", "types",
)  # fmt: skip
BACKENDS = ("cpu", "cuda", "rocm")
FUNCTIONS = ("centroid_sums", "combine", "directions", "dispatch", "route")
RESULTS = ("Dispatch", "Routing")


def sources(backend: str) -> dict[str, str]:
    """The files of one variant by their path in it, as they are in the package."""
    files = {f"{name}.py": (ROOT / "kmeans_route" / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    files["layers.py"] = (ROOT / "hub" / "layers.py").read_text(encoding="utf-8")
    if backend != "cpu":
        kernels = sorted((ROOT / "kernels" / "triton").glob("*.py"))
        files |= {f"kernels/{path.name}": path.read_text(encoding="utf-8") for path in kernels}
    return files


def relative(path: str, text: str, namespace: str) -> str:
    """The file with relative imports and the namespace in the names that PyTorch registers."""
    top = "." + "." * path.count("/")
    text = re.sub(r"\bfrom kmeans_route\.", f"from {top}", text)
    text = re.sub(r"\bfrom kmeans_route import", f"from {top} import", text)
    return text.replace('"kmeans_route::', f'"{namespace}::').replace('f"kmeans_route.{', f'f"{namespace}.{{')


def entry() -> str:
    names = sorted([*FUNCTIONS, *RESULTS, "layers"])
    listed = "".join(f'    "{name}",\n' for name in names)
    return (
        '"""Routing by online K-Means centroids: the functions, and a stateless layer in `layers`."""\n\n'
        "from . import layers\n"
        f"from .functional import {', '.join(FUNCTIONS)}\n"
        f"from .types import {', '.join(RESULTS)}\n\n"
        f"__all__ = [\n{listed}]\n"
    )


def write(folder: Path) -> list[Path]:
    """Write all variants below `folder`/build, in place of what is there, and return their folders."""
    version = re.search(r'__version__ = "(\d+)', (ROOT / "kmeans_route" / "__init__.py").read_text(encoding="utf-8"))
    assert version is not None
    written = []
    for backend in BACKENDS:
        files = sources(backend)
        digest = hashlib.blake2b(json.dumps(files).encode(), digest_size=4).hexdigest()
        namespace = f"kmeans_route_{backend}_{digest}"
        target = folder / "build" / f"torch-{backend}"
        shutil.rmtree(target, ignore_errors=True)
        for path, text in files.items():
            place = target / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(relative(path, text, namespace), encoding="utf-8")
        (target / "__init__.py").write_text(entry(), encoding="utf-8")
        metadata = {
            "id": namespace,
            "name": "kmeans-route",
            "version": int(version[1]),
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        written.append(target)
    return written


if __name__ == "__main__":
    for place in write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "hub"):
        print(f"{place}: {sum(1 for _ in place.rglob('*.py'))} files")
