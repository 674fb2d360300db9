"""Package metadata; the one thing pyproject.toml cannot say is that `kernels/triton` is `kmeans_route.kernels`."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "kmeans_route" / "__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None

TRITON = ["triton>=3.6; platform_system == 'Linux'"]
CLI = ["typer>=0.12", "rich>=13", "safetensors>=0.4", "numpy>=1.26"]
VIZ = ["matplotlib>=3.8", "numpy>=1.26"]
HF = ["transformers>=5.16,<6", "accelerate>=1.1"]
TITAN = ["torchtitan>=0.3,<0.4"]
MEGATRON = ["megatron-core>=0.16,<0.20"]
LIGHTNING = ["lightning>=2.4,<3"]
VLLM = ["vllm>=0.32,<0.33"]
HUB = ["kernels>=0.17"]
BENCH = ["pytest>=8", "pytest-benchmark>=4", "numpy>=1.26"]
DEV = [
    *BENCH,
    *TRITON,
    *CLI,
    *VIZ,
    *HF,
    "peft>=0.20",
    "hypothesis>=6.100",
    "pytest-cov>=5",
    "pytest-xdist>=3.5",
    "scikit-learn>=1.7",
    "ruff>=0.6",
    "mypy>=1.11",
]

setup(
    name="kmeans_route",
    version=VERSION.group(1),
    description="Route tokens to mixture-of-experts experts by online K-Means: no router weights, no auxiliary loss.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "kmeans_route",
        *(
            f"kmeans_route.{name}"
            for name in (
                "backends",
                "bench",
                "cli",
                "conversion",
                "integrations",
                "integrations.transformers",
                "kernels",
                "lm",
                "ops",
                "parallel",
                "routing",
                "training",
            )
        ),
    ],
    package_dir={"kmeans_route": "kmeans_route", "kmeans_route.kernels": "kernels/triton"},
    package_data={"kmeans_route": ["py.typed"]},
    # No lower or upper bound: an install must never replace the torch that the user has.
    install_requires=["torch"],
    extras_require={
        "triton": TRITON,
        "cli": CLI,
        "viz": VIZ,
        "hf": HF,
        "titan": TITAN,
        "megatron": MEGATRON,
        "lightning": LIGHTNING,
        "vllm": VLLM,
        "hub": HUB,
        "bench": BENCH,
        "dev": DEV,
        "all": sorted({*TRITON, *CLI, *VIZ, *HF, *DEV}),
    },
    entry_points={
        "console_scripts": ["kmeans-route = kmeans_route.cli:main"],
        "vllm.general_plugins": ["kmeans_route = kmeans_route.integrations.vllm:register"],
    },
)
