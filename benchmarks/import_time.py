"""What all names of the package add to importing pytorch_lightning, and how long the command's help takes.

uv run benchmarks/import_time.py
"""

import json
import statistics
import subprocess
import sys
import time

import pytorch_lightning as pl
import torch

ROUNDS = 11
# The package imports its names when they are used.
IMPORT = """
import time, pytorch_lightning
start = time.perf_counter()
from pl_layer_rotation import *
print(1000 * (time.perf_counter() - start))
"""
HELP = "import sys; from pl_layer_rotation.cli import main; sys.exit(main(['--help']))"


def added_milliseconds() -> float:
    """What importing everything takes with pytorch_lightning already loaded."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    return float(done.stdout)


def help_milliseconds() -> float:
    """What the help of the command takes from start to end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", HELP], capture_output=True, check=True)
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    figures = {"added": added_milliseconds, "help": help_milliseconds}
    times = {name: [measure() for _ in range(ROUNDS)] for name, measure in figures.items()}
    rows = {
        name: {"median_ms": round(statistics.median(t), 1), "max_ms": round(max(t), 1)} for name, t in times.items()
    }
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "pytorch_lightning": pl.__version__}
    print(json.dumps({**rows, "rounds": ROUNDS, **versions}))
