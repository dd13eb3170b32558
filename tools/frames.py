"""Draw the frames that benchmark.py and gpu_check.py load, as large as those of GTA5 and Cityscapes."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / "demo/make_demo_data.py"


def draw(out, size, source, target, val=1):
    """Draw a pair of domains -> (source folder, target folder). size: HxW; source, target, val: numbers of frames."""
    counts = ["--source-count", source, "--target-count", target, "--val-count", val]
    command = [sys.executable, SCRIPT, out, "--size", size, *map(str, counts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise ChildProcessError(f"status {done.returncode}: {done.stderr[-400:]}")
    return out / "source", out / "target"


def add_grain(*folders):
    """Add noise to all images of drawn domains: as PNGs they then take about 1.1 bytes per pixel, as a camera's do."""
    paths = [path for folder in folders for pattern in ("images/*", "leftImg8bit/*/*/*") for path in folder.glob(pattern)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_add_grain, paths))


def _add_grain(path):
    image = np.asarray(Image.open(path))
    grain = np.random.default_rng(0).normal(0, 2.5, (*image.shape[:2], 1))
    Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)).save(path)
