"""For scripts beside a clone named kmeans_route: Python takes that folder for the package, before it asks what an
editable install has put in place. It is no part of the package, and gives way to the one inside."""

import importlib.util
import sys
from pathlib import Path

if __name__ == "kmeans_route":
    _inside = Path(__file__).resolve().parent / "kmeans_route"
    _spec = importlib.util.spec_from_file_location(
        __name__, _inside / "__init__.py", submodule_search_locations=[str(_inside)]
    )
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules[__name__] = _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
