"""The modules of examples/paper lie beside its command and are imported as that does."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples" / "paper"))
