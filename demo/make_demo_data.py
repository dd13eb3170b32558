"""Stage 0, only without real data: draw a small, labelled pair of synthetic driving domains to train on.

    python demo/make_demo_data.py demo                      # 400 + 200 + 60 frames of 128x256 in half a minute
    python demo/make_demo_data.py big --size 1024x2048 --source-count 8 --target-count 4 --val-count 4

OUT/source has the GTA5 layout and looks like a game: clean edges, saturated colours, flat repeating texture, hard sunlight.
OUT/target has the Cityscapes layout and looks like a dashcam: green haze, cobbles, dirt, noise, a bonnet.

One grammar draws both. `streets.street` samples a street in metres. `rendering.render` projects it to an index map, which
says what part of the street each pixel shows, and shades each part in the style of the domain. Image and label are both read
from that map, so they match to the pixel. The domains differ in how a street looks, not in what stands there: the gap
between them is one of appearance, which is the kind that CLADA bridges.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image
from rendering import DOMAINS, render
from tqdm import tqdm

import data
import files
import loading
import runtime


def paths(out, domain, split, k):
    """Image and label file of frame k, in the layout of the real data set."""
    if domain == "source":
        return out / f"source/images/{k:05d}.png", out / f"source/labels/{k:05d}.png"
    name = f"{split}/demo/demo_{k:06d}_000000"
    return out / f"target/leftImg8bit/{name}_leftImg8bit.png", out / f"target/gtFine/{name}_gtFine_labelIds.png"


def write_frame(frame, seed):
    """Draw and save one frame, whose name is (domain, split, number), unless an interrupted run has already done so."""
    domain, split, k = frame.name
    width, height = frame.size
    if frame.image.exists() and frame.label.exists():
        return
    rng = np.random.default_rng([seed, DOMAINS.index(domain), ("train", "val").index(split), k])
    image, label = map(Image.fromarray, render(rng, domain, height, width))
    if domain == "source":  # GTA5's labels are palette images whose indices are the label ids
        label.putpalette(data.ID_COLOURS[:34].tobytes())  # ids 0 to 33
    files.write_whole(frame.image, files.image_bytes(image))
    files.write_whole(frame.label, files.image_bytes(label))


def is_finished(out, arguments, frames):
    """Whether OUT already holds all frames of these arguments. ValueError if it holds anything else."""
    finished, unfinished = out / "demo.json", out / "demo.unfinished.json"
    for path in (path for path in (finished, unfinished) if path.exists()):
        previous = files.read_json(path)
        for name, value in arguments.items():
            if previous.get(name) != value:
                flag = "--" + name.replace("_", "-")
                before = f"{flag} was {previous.get(name)} and is now {value} (see {path})"
                raise ValueError(f"{before}; give another OUT, or delete this one to start anew")
        return path == finished and all(file.is_file() for frame in frames for file in (frame.image, frame.label))
    if (out / "source").exists() or (out / "target").exists():
        raise ValueError(f"OUT: {out} holds a source or target folder that this script did not write; give another folder")
    return False


def draw_frames(frames, seed):
    """Draw all frames, in one process per core, with a progress bar. ChildProcessError if a process was killed."""
    for folder in {path.parent for frame in frames for path in (frame.image, frame.label)}:
        folder.mkdir(parents=True, exist_ok=True)
        files.clear_parts(folder)
    drawings = loading.Frames(frames, partial(write_frame, seed=seed))
    drawn = loading.batches(drawings, [[i] for i in range(len(frames))], runtime.default_workers(), collate=list)
    try:
        for _ in tqdm(drawn, total=len(frames), unit="frame", desc="demo data", disable=None):
            pass
    except ChildProcessError as error:
        raise ChildProcessError("a process that draws frames was killed, most likely for lack of memory") from error


def parse_size(text):
    """The argument HxW, e.g. 0128x256 -> "128x256"."""
    height, x, width = text.partition("x")
    if not (x and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, such as 128x256")
    if not (64 <= int(height) <= 4096 and 128 <= int(width) <= 8192):
        raise argparse.ArgumentTypeError(f"'{text}' is out of range: height 64 to 4096, width 128 to 8192")
    return f"{int(height)}x{int(width)}"


count = runtime.number(int, 1, 999_999)
seed = runtime.number(int, 0, 999_999)


def main(argv=None):
    parser = runtime.parser(__doc__)
    parser.add_argument("out", metavar="OUT", type=runtime.path, help="a new folder, for OUT/source and OUT/target")
    parser.add_argument("--seed", type=seed, default=0, help="other seeds give other streets (default 0)")
    parser.add_argument("--size", type=parse_size, default="128x256", metavar="HxW", help="of a frame (default 128x256)")
    parser.add_argument("--source-count", type=count, default=400, metavar="N", help="source frames (default 400)")
    parser.add_argument("--target-count", type=count, default=200, metavar="N", help="target train frames (default 200)")
    parser.add_argument("--val-count", type=count, default=60, metavar="N", help="target val frames (default 60)")

    args = parser.parse_args(argv)
    arguments = {name: value for name, value in vars(args).items() if name != "out"}
    counts = {("source", "train"): args.source_count, ("target", "train"): args.target_count, ("target", "val"): args.val_count}
    size = tuple(map(int, args.size.split("x")[::-1]))
    names = [(domain, split, k) for (domain, split), n in counts.items() for k in range(n)]
    frames = [data.Frame(name, *paths(args.out, *name), size) for name in names]
    if is_finished(args.out, arguments, frames):
        print(f"{args.out} is finished: nothing to do")
        return
    with files.lock(args.out):
        files.write_json(args.out / "demo.unfinished.json", arguments)
        draw_frames(frames, args.seed)
        os.replace(args.out / "demo.unfinished.json", args.out / "demo.json")


if __name__ == "__main__":
    runtime.run_script(main)
