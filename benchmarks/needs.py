"""What a benchmark needs beyond the repository, said with the remedy."""

import sys
from importlib.util import find_spec


def kernels() -> None:
    """End the process where `kmeans_route.kernels` cannot be imported.

    Here Python takes kmeans_route/ of the repository, before a package that was installed; kernels/triton has its name
    in an editable installation alone.
    """
    if find_spec("kmeans_route.kernels") is None:
        sys.exit('kmeans_route.kernels cannot be imported in this folder: run pip install -e ".[triton]" here')
