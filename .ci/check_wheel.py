"""A wheel holds the package, its template, ``py.typed`` and its metadata, and nothing else."""

import sys
import zipfile
from pathlib import Path

package = Path(__file__).parents[1] / "pl_layer_rotation"
expected = {
    path.relative_to(package.parent).as_posix()
    for path in package.rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
found = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
assert {"pl_layer_rotation/py.typed", "pl_layer_rotation/report/template.html"} <= found, sorted(found)
assert found == expected, f"only in the wheel: {sorted(found - expected)}, missing: {sorted(expected - found)}"
print(f"{Path(sys.argv[1]).name}: {len(found)} files")
