"""Files that the README says can be copied alone: each is imported in an empty folder with all other packages blocked."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The README's table "Copying one file": | `losses.py` | ... | torch |
ROWS = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| ([^|]+?) \|$", (ROOT / "README.md").read_text(), re.M))
IMPORT_NAMES = {"pillow": "PIL", "efficientnet-pytorch": "efficientnet_pytorch"}

BLOCKED = """
import importlib.abc, sys
ours, allowed, packages = sys.argv[1], sys.argv[2].split(), sys.argv[3].split()
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in packages and name not in allowed:
            raise ImportError(f"{name} is not named in the README")
sys.meta_path.insert(0, Block())
sys.path.insert(0, ".")
__import__(ours)
"""


@pytest.mark.parametrize("name", ["models.py", "losses.py", "data.py", "fid.py"])
def test_a_file_copied_alone_can_be_imported(name, tmp_path):
    allowed = {IMPORT_NAMES.get(word, word) for word in re.split(r",\s*", ROWS[name])}
    ours = {path.stem for path in ROOT.glob("*.py")} - {Path(name).stem}
    # Every package that requirements.txt names and every script of ours is blocked, unless the file's row names it;
    # what torch and torchvision themselves import is theirs.
    known = {"torch", "torchvision", "numpy", "scipy", "PIL", "tqdm", "efficientnet_pytorch"}
    needed_by = {"torch": {"numpy"}, "torchvision": {"numpy", "PIL", "torch"}, "efficientnet_pytorch": {"torch", "numpy"}}
    implied = set().union(*(needed_by.get(package, set()) for package in allowed))
    shutil.copy(ROOT / name, tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED, Path(name).stem, " ".join(allowed | implied), " ".join(known | ours)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    source = (ROOT / name).read_text()
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.M)) & (known | ours)
    assert imported <= allowed, f"{name} imports {imported - allowed}, which its row of the README does not name"
