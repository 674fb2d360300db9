"""Kernel modules with planted faults, made from the source of the real ones so that they stay in step with them."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

_numbers = itertools.count()


def planted(module: ModuleType, folder: Path, *replacements: tuple[str, str]) -> ModuleType:
    """A copy of the module in which pieces of the source are replaced, launchers included.

    Raises:
        AssertionError: a piece is not there, or there more than once: the kernel has changed, and the fault must too.
    """
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    for old, new in replacements:
        assert source.count(old) == 1, f"{module.__name__} has {source.count(old)} of: {old.strip()}"
        source = source.replace(old, new)
    name = f"{module.__name__.rpartition('.')[2]}_{next(_numbers)}"
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
