"""A wheel holds the package with its templates and ``py.typed``, its metadata, and nothing else."""

import sys
import zipfile
from pathlib import Path

package = Path(__file__).parents[1] / "pl_layer_rotation"
expected = {
    path.relative_to(package.parent).as_posix()
    for path in package.rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
names = zipfile.ZipFile(sys.argv[1]).namelist()
found = {name for name in names if ".dist-info/" not in name}
assert {"pl_layer_rotation/py.typed", "pl_layer_rotation/report/template.html"} <= found, sorted(found)
assert found == expected, f"only in the wheel: {sorted(found - expected)}, missing: {sorted(expected - found)}"
metadata = {name.partition(".dist-info/")[2] for name in names} - {""}
assert metadata == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}, sorted(metadata)
print(f"{Path(sys.argv[1]).name}: {len(found)} files")
