"""Files that the README says can be copied alone: each is imported in an empty folder, all packages but its own blocked."""

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

# What the file itself imports must be named; what torch and torchvision import in turn is theirs.
BLOCKED = """
import builtins, sys
file, allowed, imports = sys.argv[1], sys.argv[2].split(), builtins.__import__
def checked(name, scope=None, *rest):
    package = name.partition(".")[0]
    if scope and scope.get("__name__") == file and package not in allowed and package not in sys.stdlib_module_names:
        raise ImportError(f"{package} is not named in the README")
    return imports(name, scope, *rest)
builtins.__import__ = checked
sys.path.insert(0, ".")
__import__(file)
if file == "models":  # which imports its second package where it is used
    sys.modules[file].efficientnet("efficientnet-b0")
"""


@pytest.mark.parametrize("name", ["models.py", "losses.py", "data.py", "fid.py"])
def test_a_file_copied_alone_can_be_imported(name, tmp_path):
    allowed = [IMPORT_NAMES.get(word, word) for word in re.split(r",\s*", ROWS[name])]
    shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-c", BLOCKED, Path(name).stem, " ".join(allowed)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("*.py"))) == 1
    allowed.remove("torch")  # and the blocking blocks
    assert subprocess.run([*command[:-1], " ".join(allowed)], cwd=tmp_path, capture_output=True, check=False).returncode == 1
