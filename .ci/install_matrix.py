"""Install the wheel in clean environments of several Pythons, at the oldest and newest dependencies, and use it there.

Prints one row of a Markdown table for each environment; ends with 1 if anything failed. Needs ``uv`` alone. The result
that the page *Versions* shows:

    uv run --no-project .ci/install_matrix.py --python 3.10 --python 3.13 --tests --output docs/results/installs.json
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

root = Path(__file__).resolve().parents[1]
# What a user of the wheel has: no checkout on the path.
environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
environ["WANDB_MODE"] = "offline"
packages = ("torch", "pytorch-lightning", "torchmetrics", "wandb", "plotly", "jinja2", "click")
# No dependency of the wheel's users: newest in every environment.
test_tools = ("pytest", "pytest-timeout", "hypothesis", "jsonargparse[signatures]", "mpmath", "pandas", "tensorboard")
topics = ("layca", "scratch", "geometry", "metric", "monitor", "history", "measuring")
core_tests = [file for topic in topics for file in sorted(root.glob(f"tests/test_{topic}*.py"))]


def main() -> int:
    """Print the table; 1 if a step failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", action="append", required=True, help="a version or an interpreter; may be repeated")
    parser.add_argument("--resolution", choices=("lowest-direct", "highest"), help="one of the two instead of both")
    parser.add_argument("--dist", type=Path, help="folder of the wheel; built from this checkout where left out")
    parser.add_argument("--tests", action="store_true", help="run the core tests in each environment too")
    parser.add_argument("--output", type=Path, help="JSON file to write the table to")
    options = parser.parse_args()
    resolutions = [options.resolution] if options.resolution else ["lowest-direct", "highest"]
    rows = [("Python", "dependencies", *packages, "result"), ("---",) * (len(packages) + 3)]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if options.dist is None:
            subprocess.run(["uv", "build", "--quiet", "--out-dir", work, root], check=True, env=environ)
        (wheel,) = (options.dist or work).resolve().glob("*.whl")
        for name in (".ci/try_wheel.py", "examples/quickstart.py"):
            shutil.copy(root / name, work)
        for python in options.python:
            for resolution in resolutions:
                rows.append(row(work, wheel, python, resolution, tests=options.tests))
    print(*(f"| {' | '.join(cells)} |" for cells in rows), sep="\n")
    if options.output:
        records = [dict(zip(rows[0], cells, strict=True)) for cells in rows[2:]]
        options.output.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    return int(any("FAILED" in cell for cells in rows for cell in cells))


def row(work: Path, wheel: Path, python: str, resolution: str, *, tests: bool) -> tuple[str, ...]:
    """Make one environment, use the wheel in it, and say which versions it had and what came of each step."""
    venv = work / "venv"
    subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", python, venv], check=True, env=environ)
    binaries = venv / ("Scripts" if sys.platform == "win32" else "bin")
    results = []
    for name, command in steps(wheel, binaries, resolution, tests):
        results.append(f"{name} {outcome(command, work)}")
        if "FAILED" in results[-1]:
            break
    versions = "import sys, importlib.metadata as m; print(sys.version.split()[0], *map(m.version, sys.argv[1:]))"
    found = subprocess.run(
        [binaries / "python", "-c", versions, *packages], capture_output=True, text=True, env=environ
    )
    interpreter, *installed = found.stdout.split() or [python] + ["?"] * len(packages)
    return (interpreter, resolution, *installed, ", ".join(results))


def steps(wheel: Path, binaries: Path, resolution: str, tests: bool) -> Iterator[tuple[str, list[str | Path]]]:
    """What is done in an environment: name and command, in this order."""
    python = binaries / "python"
    # With the checkout's settings for uv.
    install: list[str | Path] = ["uv", "--directory", root, "pip", "install", "--quiet", "--python", python]
    # From pyproject.toml they are direct dependencies: of a wheel's own, uv takes the newest at either resolution.
    direct = ["--resolution", resolution, "-r", root / "pyproject.toml", "--extra", "examples"]
    yield "install", [*install, *direct, wheel]
    yield "import", [python, "try_wheel.py"]
    yield "command", [binaries / "pl-layer-rotation", "--help"]
    yield "quickstart", [python, "quickstart.py", "--max-epochs", "1"]
    if tests:
        yield "test tools", [*install, *test_tools]
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", root / "pyproject.toml"]
        # Old releases warn of what the newest Python or their neighbours deprecate.
        yield "tests", [*pytest, "-o", "filterwarnings=default", *core_tests]


def outcome(command: list[str | Path], work: Path) -> str:
    """``ok``, for pytest its closing line; ``FAILED`` after the output of a command that failed."""
    done = subprocess.run(command, cwd=work, env=environ, capture_output=True, text=True)
    lines = done.stdout.splitlines() or [""]
    if done.returncode:
        print("$", *command, f"\n{done.stdout}{done.stderr}", file=sys.stderr)
    summary = lines[-1] if "-m" in command else "ok"
    return f"FAILED ({summary})" if done.returncode else summary


if __name__ == "__main__":
    sys.exit(main())
