"""transformers' own common tests on swapped models: what fails before the swap, and what fails after it.

    python -m benchmarks.transformers_suite --checkout DIR [--json FILE]

DIR is a checkout of transformers' sources of the version that is installed: its wheel has no tests. They need
`parameterized` too. The models are tiny ones of five types, with the mixins for modelling and generation; nothing is
downloaded. About 15 minutes.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUTCOME = re.compile(r"^(FAILED|ERROR) \S*?::(\w+::\w+)", re.MULTILINE)


def run_suite(checkout: Path, *, swapped: bool, workers: int) -> dict[str, Any]:
    """Counts of the summary line, and the names of what failed."""
    environment = os.environ | {
        "KMEANS_ROUTE_SWAPPED": str(int(swapped)),
        "PYTHONPATH": os.pathsep.join([str(checkout), str(HERE.parent)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--tb=no"]
    command += ["-n", str(workers), "-c", os.devnull, "--rootdir", str(checkout)]
    command.append(str(HERE / "transformers_suite_cases.py"))
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", summary)}
    if "passed" not in counts:
        raise RuntimeError(f"the suite did not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return counts | {"failures": sorted(name for _, name in OUTCOME.findall(done.stdout))}


def main(argv: list[str] | None = None) -> int:
    """Both runs; exit code 2 where DIR has no such tests."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformers_suite", description=__doc__)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of transformers' sources")
    parser.add_argument("--json", type=Path, help="write the record there")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest (2)")
    args = parser.parse_args(argv)
    if not (args.checkout / "tests" / "test_modeling_common.py").is_file():
        print(f"{args.checkout} must hold tests/test_modeling_common.py of transformers", file=sys.stderr)
        return 2
    checkout = args.checkout.resolve()
    runs = {name: run_suite(checkout, swapped=name == "after", workers=args.workers) for name in ("before", "after")}
    both = set(runs["before"]["failures"])
    record = {
        "what": "transformers' common modelling and generation tests on tiny models, before and after the swap",
        "transformers": version("transformers"),
        "torch": version("torch"),
        "date": datetime.date.today().isoformat(),
        **runs,
        "new_failures": [name for name in runs["after"]["failures"] if name not in both],
    }
    text = json.dumps(record, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
