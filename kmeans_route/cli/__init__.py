"""The `kmeans-route` command: demo, train, bench, inspect, convert, export, info, selftest."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from kmeans_route.install import install_line

_NEEDED = ("typer", "rich", "safetensors", "numpy")


def main() -> None:
    """Run the command line and exit: 0 when all went well, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(f"error: kmeans-route needs {', '.join(missing)}: {install_line('cli')}", file=sys.stderr)
        raise SystemExit(1)
    try:
        from kmeans_route.cli.app import app

        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
