"""Used by several tests: running the command lines, watching or killing them at a chosen moment, comparing their output."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import served
import torch

ROOT = Path(__file__).parent.parent
VARIABLES = "SOURCE TARGET TARGET_SPLITS ORACLE SETTINGS OUT METHODS SEED NPROC ITERATIONS_SCALE FID_WEIGHTS".split()
VARIABLES += "WORKERS TRANSLATOR_ARGS SEGMENTER_ARGS ADAPT_ARGS".split()
MEASURED_FILES = (".lock", ".finished", "times.csv", "index.html")  # the page holds times
MEASURED = ("seconds_per_iteration", "wait_seconds", "peak_memory_mib")

# Python runs a module of this name before a script. This one records which scripts open labels of a Cityscapes layout, and
# kills the script's process group when it is about to rename a file to a given name for the nth time.
SITECUSTOMIZE = """
import json, os, signal, sys

labels, kill = os.environ.get("NOTE_LABELS"), os.environ.get("KILL_AT", "").split()
renamed = 0

def watch(event, args):
    global renamed
    if labels and event == "open" and isinstance(args[0], (str, bytes, os.PathLike)) and "gtFine" in os.fsdecode(args[0]):
        with open(labels, "a") as file:
            file.write(json.dumps([sys.argv, os.fsdecode(args[0])]) + "\\n")
    if kill and event == "os.rename" and os.fsdecode(args[1]).endswith(kill[1]):
        renamed += 1
        if renamed == int(kill[2]):
            os.killpg(os.getpgrp(), signal.Signals[kill[0]])

if labels or kill:
    sys.addaudithook(watch)
"""


def run(*words, **environment):
    """A command, without a GPU, in a process group of its own: a result with returncode, stdout and stderr."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", None), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        list(map(str, words)),
        env=inherited | {"CUDA_VISIBLE_DEVICES": ""} | environment | ({"PYTHONPATH": path} if path else {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        start_new_session=True,
    )


def script(name, *words, **environment):
    return run(served.python(), ROOT / name, *words, **environment)


def torchrun(*words, nproc=2, restarts=0, python=None, **environment):
    """A script in several processes of torchrun. python: the interpreter (default: served.python())."""
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", nproc, "--max-restarts", restarts]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--no-python", python or served.python()]
    return run(*command, *words, **environment)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def content(out, path):
    """A file's content, without what was measured, where it lies, and the number of workers; of a checkpoint, its tensors."""
    if path.name == "checkpoint.pt":
        return list(leaves(torch.load(out / path, weights_only=True)))
    if path.suffix == ".csv":
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in table(out / path)]
    if path.suffix == ".json":
        held = json.loads((out / path).read_text().replace(str(out), "OUT"))
        return {k: v for k, v in held.items() if k not in (*MEASURED, "workers", "out")}
    return (out / path).read_bytes()


def leaves(part, name=""):
    """(name, value) of everything in nested dicts and lists; of tensors dtype, shape and bytes."""
    if isinstance(part, (dict, list, tuple)):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from leaves(value, f"{name}.{key}")
    elif isinstance(part, torch.Tensor):
        yield name, (part.dtype, part.shape, part.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    else:
        yield name, part


def assert_same_outputs(one, two):
    """Every file of two folders: the same names, and the same bytes but for what `content` leaves out."""
    files = [
        {p.relative_to(out) for p in out.rglob("*") if p.is_file() and p.suffix != ".npz" and p.name not in MEASURED_FILES}
        for out in (one, two)
    ]
    assert files[0] == files[1]
    for path in sorted(files[0]):
        assert content(one, path) == content(two, path), path
    return files[0]
