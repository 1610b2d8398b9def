"""Print the README's command under a marker, so that CI runs what newcomers are told to type."""

import re
import sys
from pathlib import Path


def readme_command(marker: str, readme: str) -> str:
    """The first line of the code block that follows ``<!-- marker -->`` in the README."""
    block = re.search(rf"<!-- {re.escape(marker)} -->\s*```bash\n(.+?)\n```", readme, re.DOTALL)
    if block is None:
        raise SystemExit(f"README.md has no code block after <!-- {marker} -->")
    return block.group(1)


if __name__ == "__main__":
    print(readme_command(sys.argv[1], Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")))
