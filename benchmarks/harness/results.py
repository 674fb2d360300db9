"""The file that keeps what a suite measured."""

import json
from pathlib import Path

from kmeans_route.bench.results import environment


def write_results(path: Path, command: str, records: list[dict[str, object]]) -> None:
    """Write one JSON file: the environment and a record for each contest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment(command), "results": records}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
