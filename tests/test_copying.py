"""The files that README says can be copied alone: each is imported without the rest, with all packages but its own blocked."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The README's table "Copying one file": | `losses.py` | ... | torch |
ROWS = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| ([^|]+?) \|$", (ROOT / "README.md").read_text(), re.M))
IMPORT_NAMES = {"pillow": "PIL", "efficientnet-pytorch": "efficientnet_pytorch"}

# Arguments: "FOLDER FILE PACKAGE...", one per file. Only what the file itself imports is checked, not what packages import.
IMPORT_EACH = """
import builtins, sys
imports = builtins.__import__
def checked(name, scope=None, *rest):
    package = name.partition(".")[0]
    if scope and scope.get("__name__") == file and package not in allowed and package not in sys.stdlib_module_names:
        raise ImportError(f"{package} is not named in the README")
    return imports(name, scope, *rest)
builtins.__import__ = checked
for words in sys.argv[1:]:
    folder, file, *allowed = words.split("|")
    sys.path[0] = folder
    try:
        __import__(file)
        if file == "models":  # which imports its second package where it is used
            sys.modules[file].efficientnet("efficientnet-b0")
        print(file)
    except ImportError as error:
        print(f"{file}: {error}")
"""


def test_files_copied_alone_can_be_imported(tmp_path):
    words = []
    for name in ("models.py", "losses.py", "data.py", "fid.py"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
        packages = [IMPORT_NAMES.get(word, word) for word in re.split(r",\s*", ROWS[name])]
        words.append("|".join([str(tmp_path / name), Path(name).stem, *packages]))
    shutil.copy(ROOT / "losses.py", tmp_path / "again.py")
    words.append(f"{tmp_path}|again|numpy")  # the check itself: losses.py needs torch
    command = [sys.executable, "-c", IMPORT_EACH, *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    expected = ["models", "losses", "data", "fid", "again: torch is not named in the README"]
    assert result.stdout.splitlines() == expected, result
