"""Describe and check a data set: its layout, sizes and labels, and with --check-data every file.

    python check_data.py DIR [--split train] [--unlabelled] [--exclude FILE] [--check-data]

The layouts are described in data.py. Scripts call `check_frames` before they start, and `list_images` where no labels are read.
"""

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

import data
import runtime

log = logging.getLogger("check_data")


def list_images(paths, split="val", exclude=()):
    """Find the images of folders, as data.list_frames does without labels, and single image files -> FrameList."""
    frames = data.FrameList()
    for path in map(Path, paths):
        if path.is_dir():
            listed = data.list_frames(path, split, labelled=False, exclude=exclude)
            frames += listed
            frames.left_out |= listed.left_out
        elif data.bare_name(path.name) in exclude:
            frames.left_out[path.stem] = "excluded"
        else:
            frames.append(data.Frame(path.stem, path, None, data.read_file(path, header_only=True)[0]))
    if repeated := [name for name, count in Counter(frame.name for frame in frames).items() if count > 1]:
        raise ValueError(f"images must have different names: {data.first_few(repeated)}")
    return frames


def check_frames(frames, width=None, crop=None):
    """Raise ValueError if frames are smaller at `width` than `crop` (height, width) or 16x16, or if all labels are void."""
    too_small, (least_h, least_w) = [], crop or (16, 16)  # the generator needs 16
    for frame in frames:
        w = width or frame.size[0]
        h = max(1, round(frame.size[1] * w / frame.size[0]))  # as in resize_to_width
        if h < least_h or w < least_w:
            too_small.append(f"{frame.image}: {w}x{h}{f' at --width {width}' if width else ''}")
    if too_small:
        least = f"the crop of {least_h}x{least_w} (HxW): lower --crop-size" if crop else "the minimum of 16x16"
        raise ValueError(f"{too_small[0]}, smaller than {least} ({len(too_small)} of {len(frames)} frames)")
    ids, labels = set(), [frame.label for frame in frames if frame.label]
    for count, label in enumerate(labels, 1):  # usually the first one settles it
        ids.update(data.load_label_ids(label, frames.classes).unique().tolist())
        is_void = all(frames.classes.train_ids[i] == data.VOID for i in ids)
        are_train_ids = frames.classes is data.CITYSCAPES and not ids & {*range(19, 34)}
        if not is_void and (not are_train_ids or count >= 100):
            break
    if labels and is_void:  # such as Cityscapes' test split
        raise ValueError(f"{labels[0]}: all void, as are all {len(labels)} labels; label ids are needed")
    if labels and are_train_ids:
        log.warning("%s: no label id is above 18; are these train ids? Label ids are needed (car is 26)", labels[0])


def inspect(frame, classes):
    """Decode a frame's files -> (problem or None, whether the image has a single colour, (256,) pixels by train id)."""
    try:
        image = data.load_image(frame.image)
        label = data.load_label(frame.label, classes) if frame.label else image[0]
    except ValueError as error:
        return str(error), False, 0  # not the exception: its traceback would keep pixels in memory
    if label.shape != image.shape[1:]:  # list_frames leaves it out, or refuses it
        return None, False, 0
    is_plain = not np.ptp(image.numpy(), axis=(1, 2)).any()
    return None, is_plain, np.bincount(label.ravel(), minlength=256) if frame.label else 0


def parse_args():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("folder", type=runtime.path, metavar="DIR", help="data set: GTA5 or Cityscapes layout, or with --unlabelled any folder")
    add("--split", default="train", help="Cityscapes split, or several joined by commas (default: train)")
    add("--unlabelled", action="store_true", help="use the images only")
    add("--exclude", metavar="FILE", help="text file with the names of frames to leave out, one per line")
    add("--check-data", action="store_true", help="decode all files; list problems, class shares, frames of one colour")
    return parser.parse_args()


def main():
    args = parse_args()
    problems, plain, counts = [], [], np.zeros(256, np.int64)
    data_set = args.folder, args.split, not args.unlabelled, data.read_names(args.exclude)
    if args.check_data:
        frames, problems = data.match_files(*data_set)
        print("".join(f"{data.printable(problem)}\n" for problem in problems), end="", flush=True)
        with ThreadPoolExecutor() as pool:
            inspected = pool.map(partial(inspect, classes=frames.classes), frames)
            for frame, (problem, is_plain, pixels) in zip(frames, inspected):
                if problem:
                    problems.append(problem)
                    print(data.printable(problem), flush=True)
                plain += [data.printable(frame.name)] if is_plain else []
                counts += pixels
    if plain:
        print("# Frames of a single colour; --exclude FILE takes these lines:", *plain, sep="\n", flush=True)
    if problems:
        raise ValueError(f"{args.folder}: {len(problems)} problem{'s' if len(problems) > 1 else ''}")
    frames = data.list_frames(*data_set)
    check_frames(frames)
    sizes = data.first_few([f"{w}x{h}" for w, h in sorted({frame.size for frame in frames})])
    kind = "" if args.unlabelled else "labelled "
    print(f"{data.printable(args.folder)}: {len(frames)} {kind}frames of {sizes}", flush=True)
    if counts.any():
        names = frames.classes.names
        for name, pixels in zip([*names, "void"], [*counts[: len(names)], counts[data.VOID]]):
            print(f"  {name:<14}{pixels / counts.sum():7.2%}")


if __name__ == "__main__":
    runtime.run_script(main)
