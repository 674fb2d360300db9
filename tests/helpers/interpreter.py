"""Triton's interpreter as the tests run it: bf16 by value, memory checked, programs in orders of one's choice."""

import triton

from tests.helpers import bf16, programs

_installed = False


def install() -> None:
    """Patch the interpreter of this process, once.

    Raises:
        RuntimeError: this version of Triton has other private methods than those that are replaced.
    """
    global _installed
    if not _installed:
        assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before anything imports Triton"
        bf16.install()
        programs.install()
        _installed = True
