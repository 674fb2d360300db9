"""The result files of a GPU run, and the screen: every record goes to both as it is made.

NAME.jsonl gets a line for each record, on the disk before the next one is made, so that a run that is killed loses
nothing. NAME.md, the table for the README, and NAME.json, one document, are written anew after every step.
"""

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.gpu.table import readme_table

ROOT = Path(__file__).resolve().parent.parent.parent
Record = dict[str, Any]


def output_of(*command: str) -> str | None:
    """First line that a command prints, or None where it cannot be run or fails."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else None


def header(command: str, device: Any) -> Record:
    """Device, driver, versions, date, command, commit: without paths of the machine."""
    import torch
    import triton

    import kmeans_route
    from kmeans_route.bench.results import processor_name

    gpu, commit = device.type == "cuda", output_of("git", "rev-parse", "HEAD")
    changes = output_of("git", "status", "--porcelain", "--untracked-files=no")
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None
    return {
        "kind": "header",
        "device": torch.cuda.get_device_name(device) if gpu else f"dry run on {processor_name()}",
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if gpu else None,
        "driver": driver,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "kmeans_route": kmeans_route.__version__,
        "commit": commit,
        "uncommitted_changes": None if commit is None else changes is not None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }


class Report:
    """The files of one run.

    go_on: append to the newest run of this device and commit, where the folder has one; what that run has finished is
    in `finished`.
    """

    def __init__(self, folder: Path, head: Record, *, go_on: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.records: list[Record] = []
        slug = re.sub(r"[^a-z0-9]+", "-", head["device"].lower()).strip("-")
        before = sorted(folder.glob(f"{slug}-*.jsonl"), key=lambda path: path.stat().st_mtime)
        if go_on and before:
            records = [json.loads(line) for line in before[-1].read_text(encoding="utf-8").splitlines()]
            if all(records[0][key] == head[key] for key in ("device", "commit", "torch", "triton")):
                self.path, self.records = before[-1], records
        if not self.records:
            stem, number = f"{slug}-{datetime.date.today().isoformat()}", 1
            while (path := folder / f"{stem}{'' if number == 1 else f'-{number}'}.jsonl").exists():
                number += 1
            self.path = path
        done = [r for r in self.records if r.get("step", "compile") != "compile"]
        self.finished = {f"{r['step']}: {r['unit']}" for r in done if r.get("ok", True) and not r.get("left")}
        self.add(head, "\n".join(f"{name}: {value}" for name, value in head.items() if name != "kind"))

    def add(self, record: Record, text: str) -> None:
        """Append a line and show it."""
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(text, flush=True)

    def publish(self) -> str:
        """Write table and document as they are by now; the table."""
        table = readme_table(self.records)
        kinds: dict[str, list[Record]] = {}
        for record in self.records:
            kinds.setdefault(record["kind"], []).append(record)
        self.path.with_suffix(".md").write_text(table, encoding="utf-8")
        self.path.with_suffix(".json").write_text(json.dumps(kinds, indent=1) + "\n", encoding="utf-8")
        return table
