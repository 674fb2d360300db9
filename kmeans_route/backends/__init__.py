"""The backends: modules with the same functions and signatures.

"torch" runs anywhere and is tuned for CPU; "triton" runs the fused kernels on a GPU; "reference" is the definition,
slow and plain. "auto" takes "triton" on a GPU where Triton is installed, for at most 1024 experts in fp16 and bf16 and
512 in fp32, else "torch". Each says of itself, as constants: NAME; PLAIN, that autograd differentiates its functions,
so that no operator stands before them; FUSED, that routing and dispatch are one function with one backward. Which
functions that takes, `tests/test_house.py` lists.
"""

import os
from importlib.util import find_spec
from types import ModuleType

from torch import _C, bfloat16, compiler, device, dtype, float16, float32
from torch.autograd import forward_ad

from kmeans_route.backends import reference, torch, triton  # not PyTorch and Triton: the modules beside this one
from kmeans_route.checks import check_choice
from kmeans_route.install import install_line
from kmeans_route.reference import exporting_onnx

BACKENDS = ("auto", "reference", "torch", "triton")
TRITON_INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_MAX_EXPERTS = {float32: 512, float16: 1024, bfloat16: 1024}
"""By the dtype of the hidden states. More spill registers; at 1040 a tile of scores takes 264 KB of shared memory."""
_MODULES: dict[str, ModuleType] = {"reference": reference, "torch": torch, "triton": triton}


def transformed() -> bool:
    """Whether a torch.func transform is active. As `by_definition`: private, one use, a test."""
    return bool(_C._are_functorch_transforms_active())


def by_definition() -> bool:
    """Whether the definition runs now in place of every backend: inside torch.func transforms, forward-mode
    derivatives and ONNX export, which know the operators of PyTorch alone.

    The level of forward-mode derivatives is private to PyTorch; this is its only use, and a test holds it for each
    version claimed.
    """
    if transformed():
        return True
    if compiler.is_dynamo_compiling():
        return False
    return forward_ad._current_level >= 0 or exporting_onnx()


def get(name: str) -> ModuleType:
    """The module of a backend, by the name that `choose` gave."""
    return _MODULES[name]


def choose(backend: str, where: device, kind: dtype | None = None, num_experts: int = 1) -> ModuleType:
    """The backend that runs on this device, for hidden states of this dtype, or of one that is not known yet.

    Whatever its name, it is the definition where nothing else would do: see `by_definition`.

    Raises:
        ValueError: an unknown name, or "triton" for more experts than it takes. RuntimeError: "triton" where it cannot
        run: it is not installed, or the tensor is not on a GPU (and TRITON_INTERPRET is not set). TypeError: "triton"
        for a dtype that it does not take.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "triton":
        _check_triton(where, kind, num_experts)
    if by_definition():
        return reference
    if backend == "auto":
        able = where.type == "cuda" and num_experts <= _most_experts(kind)
        return triton if TRITON_INSTALLED and able else torch
    return _MODULES[backend]


def _most_experts(kind: dtype | None) -> int:
    """That the kernels take; 0 where they do not take the dtype."""
    return max(TRITON_MAX_EXPERTS.values()) if kind is None else TRITON_MAX_EXPERTS.get(kind, 0)


def _check_triton(where: device, kind: dtype | None, num_experts: int) -> None:
    if not TRITON_INSTALLED:
        raise RuntimeError(
            "backend must be one whose library is installed, got 'triton' without Triton: "
            f'{install_line("triton")}, or use backend="auto"'
        )
    if where.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"backend='triton' must get tensors on a GPU, got one on {where}: move the tensors, or use backend='auto' "
            "(TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
        )
    if not _most_experts(kind):
        raise TypeError(
            f"backend='triton' must get float32, float16 or bfloat16, got {kind}: cast the tensor, or use "
            "backend='auto'"
        )
    if num_experts > _most_experts(kind):
        of = "" if kind is None else f" and {kind}"
        raise ValueError(
            f"num_experts must be at most {_most_experts(kind)} for backend='triton'{of}, got {num_experts}: use "
            "backend='auto', which takes the torch backend for more"
        )
