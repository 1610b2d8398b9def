"""A source distribution holds what builds, tests and shows the package: every file of the checkout, none too large."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

LARGEST = 1 << 20  # bytes of a file; pictures and results of benchmarks are smaller
root = Path(__file__).parents[1]
with tarfile.open(sys.argv[1]) as archive:
    sizes = {member.name.partition("/")[2]: member.size for member in archive if member.isfile()}
    top = archive.getnames()[0].partition("/")[0]
    readme = archive.extractfile(f"{top}/README.md").read().decode()

listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
tracked = set(listed.stdout.splitlines())
found = set(sizes) - {"PKG-INFO"}
assert found == tracked, f"not in the checkout: {sorted(found - tracked)}, missing: {sorted(tracked - found)}"
large = {name: size for name, size in sizes.items() if size > LARGEST}
assert not large, f"over {LARGEST:,} bytes: {large}"
# Links within the repository; a release makes them absolute.
linked = set(re.findall(r"\]\(([^):#]+)\)", readme))
folders = {folder.as_posix() for name in found for folder in Path(name).parents}
assert linked <= found | folders, f"linked by README.md and missing: {sorted(linked - found - folders)}"
print(f"{Path(sys.argv[1]).name}: {len(sizes)} files, {sum(sizes.values()):,} bytes")
