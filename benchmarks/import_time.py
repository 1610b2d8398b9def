"""What `import pl_layer_rotation` adds to importing pytorch_lightning: `uv run benchmarks/import_time.py`."""

import json
import statistics
import subprocess
import sys

import pytorch_lightning as pl
import torch

ROUNDS = 11


def added_milliseconds() -> float:
    """Cumulative import time of the package, with pytorch_lightning already loaded, as Python itself reports it."""
    code = "import pytorch_lightning, pl_layer_rotation"
    report = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    )
    (line,) = (row for row in report.stderr.splitlines() if row.endswith("| pl_layer_rotation"))
    return int(line.split("|")[1]) / 1000


if __name__ == "__main__":
    times = [added_milliseconds() for _ in range(ROUNDS)]
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "pytorch_lightning": pl.__version__}
    print(json.dumps({"median_ms": statistics.median(times), "max_ms": max(times), "rounds": ROUNDS, **versions}))
