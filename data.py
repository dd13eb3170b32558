"""Data sets: labelled frames of a game (GTA5, the source) and photographs of streets (Cityscapes, the target).

Self-contained: depends only on numpy, pillow, torch and torchvision. As a script, it describes and checks a data set:

    python data.py DIR [--split train] [--unlabelled] [--exclude FILE] [--check-data]

Two layouts, recognised by their folders (Richter et al. 2016; Cordts et al. 2016):
    GTA5        DIR/images/NAME.{png,jpg}  DIR/labels/NAME.png
    Cityscapes  DIR/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png  DIR/gtFine/SPLIT/CITY/*_gtFine_labelIds.png
Where labels are not read, any other folder with PNG or JPEG files in it or below will do. Label files hold Cityscapes
label ids (0 to 33), or those of DIR/classes.csv (`read_classes`). Training and evaluation use train ids and VOID (255).
"""

import argparse
import contextlib
import csv
import hashlib
import logging
import os
import re
import signal
import sys
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes
from torchvision.transforms import InterpolationMode, v2

VOID = 255
CLASSES = [c for c in Cityscapes.classes if 0 <= c.train_id < VOID]  # the 19 evaluated classes, ordered by train id
LAYOUTS = {  # folder and ending of images, and of labels
    "GTA5": (("images", ""), ("labels", "")),
    "Cityscapes": (("leftImg8bit", "_leftImg8bit"), ("gtFine", "_gtFine_labelIds")),
    "plain": (("", ""), None),
}
log = logging.getLogger("data")
# The paths of an image and of its label map or None, a name unique within the data set, and (width, height) in pixels.
Frame = namedtuple("Frame", "name image label size")


class Classes:
    """The classes of a data set: rows (label id, name, train id, red, green, blue); train id VOID where not evaluated.

    names: by train id. label_ids: train id -> label id. train_ids: label id -> train id. colours: label id -> RGB, black where
    there is none. palette: train id -> RGB. Several label ids may share a train id; its name and colour are those of the first.
    """

    def __init__(self, rows):
        self.rows = [tuple(row) for row in rows]
        evaluated = {row[2]: row for row in reversed(self.rows) if row[2] != VOID}
        self.names = [evaluated[train_id][1] for train_id in sorted(evaluated)]
        self.label_ids = np.array([evaluated[train_id][0] for train_id in sorted(evaluated)], dtype=np.uint8)
        self.train_ids, self.colours = np.full(256, VOID, dtype=np.uint8), np.zeros((256, 3), dtype=np.uint8)
        for label_id, _, train_id, *colour in self.rows:
            self.train_ids[label_id], self.colours[label_id] = train_id, colour
        self.palette = self.colours[self.label_ids]

    def check_same(self, other, what):
        """Raise ValueError, saying where they differ, unless another table is the same."""
        for one, two in zip_longest(self.rows, other.rows):
            if one != two:
                raise ValueError(f"{what}: the tables of classes differ: {one or 'nothing'} and {two or 'nothing'}")


CITYSCAPES = Classes((c.id, c.name, c.train_id if c.train_id >= 0 else VOID, *c.color) for c in Cityscapes.classes if c.id >= 0)
CLASS_NAMES, TRAIN_IDS, ID_COLOURS, PALETTE = CITYSCAPES.names, CITYSCAPES.train_ids, CITYSCAPES.colours, CITYSCAPES.palette


def read_classes(root):
    """The classes of a data set: its classes.csv, with columns id, name, train_id, red, green, blue, or else Cityscapes'."""
    path = Path(root) / "classes.csv"
    if not path.is_file():
        return CITYSCAPES
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            numbers = ("train_id", "red", "green", "blue")
            rows = [(int(row["id"]), row["name"].strip(), *(int(row[n]) for n in numbers)) for row in csv.DictReader(file)]
        rows[0]  # an empty table
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{printable(path)}: columns id, name, train_id, red, green, blue are needed, with integers"
        ) from error
    ids, trained = [row[0] for row in rows], {row[2] for row in rows} - {VOID}
    if not all(0 <= number <= 255 for row in rows for number in (row[0], *row[2:])) or VOID in ids:
        raise ValueError(f"{printable(path)}: ids from 0 to 254, train ids and colours from 0 to 255 are needed")
    if repeated := [label_id for label_id, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"{printable(path)}: id {repeated[0]} stands there more than once")
    names = Classes(rows).names
    if trained != {*range(len(trained))} or len({*names}) < len(names) or not trained:
        raise ValueError(f"{printable(path)}: train ids must be 0, 1, 2, ... (255: not evaluated), with different names")
    if reserved := {*names} & {"", "model", "mIoU", "fwIoU", "pixel_accuracy"}:
        raise ValueError(f"{printable(path)}: a class cannot have the name {min(reserved)!r}")
    return Classes(rows)


class FrameList(list):
    """The usable frames of a data set, its `classes`, and `left_out`, {name: reason} of the frames that are left out."""

    def __init__(self, classes=CITYSCAPES):
        self.classes, self.left_out = classes, {}

    def fingerprint(self):
        """Return the number of frames and a hash of their names and sizes; independent of where the data set is stored."""
        classes = [] if self.classes is CITYSCAPES else map(str, self.classes.rows)
        return f"{len(self)} frames, {_hash([*(f'{frame.name} {frame.size}' for frame in self), *classes])[:12]}"

    def content(self, images=False):
        """Return a hash of the labels' bytes and of the image files' sizes; with `images`, of the images' bytes too."""

        def describe(frame):
            label = hashlib.sha256(frame.label.read_bytes()).hexdigest() if frame.label else ""
            image = hashlib.sha256(frame.image.read_bytes()).hexdigest() if images else os.path.getsize(frame.image)
            return f"{frame.name} {image} {label}"

        with ThreadPoolExecutor(16) as pool:
            return _hash(pool.map(describe, self))[:12]


def _hash(lines):
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def printable(text):
    """Return a path or an error as one line: control characters and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def first_few(names):
    """Return the first three names and the number of the others, for a message."""
    return ", ".join(map(printable, names[:3])) + (f" and {len(names) - 3} more" if names[3:] else "")


def list_frames(root, split="train", labelled=True, exclude=()):
    """Find the frames of a data set and check the headers of their files -> FrameList.

    split: a Cityscapes split, or several joined by commas ("train,train_extra"). labelled: if False, labels are not read, and
    frames of a folder in neither layout are named by their relative path, such as "trainA/0001".
    exclude: names of frames to leave out (read_names). Pairs in GTA5's layout whose image and label differ in size are left
    out too (about sixty in GTA5, 20801 to 20860). Logs how many are left out. Raises ValueError for any other problem.
    """
    frames = FrameList(read_classes(root) if labelled else CITYSCAPES)
    problems = [*_problems(frames, Path(root), split, labelled, exclude)]
    if not frames and not problems:
        problems = [f"{printable(root)}: no image (.png, .jpg) to use; {len(frames.left_out)} left out"]
    if problems:
        raise ValueError(problems[0] + f" (and {len(problems) - 1} more: see data.py DIR --check-data)" * (len(problems) > 1))
    if unmatched := sorted({*map(_bare_name, exclude)} - {*map(_bare_name, frames.left_out)}):
        log.warning("%s: %d excluded names match no frame: %s", printable(root), len(unmatched), first_few(unmatched))
    for reason in dict.fromkeys(frames.left_out.values()):
        names = [name for name, why in frames.left_out.items() if why == reason]
        log.warning("%s: %d %s: %s", printable(root), len(names), reason, first_few(names))
    return frames


def list_images(paths, split="val", exclude=()):
    """Find the images of folders, as list_frames does without labels, and single image files -> FrameList."""
    frames = FrameList()
    for path in map(Path, paths):
        if path.is_dir():
            listed = list_frames(path, split, labelled=False, exclude=exclude)
            frames.left_out |= listed.left_out
        elif _bare_name(path.name) in {*map(_bare_name, exclude)}:
            listed, frames.left_out[path.stem] = [], "excluded"
        else:
            frame, _, problems = _examine(Frame(path.stem, path, None, None), CITYSCAPES, decode=False)
            if problems:
                raise ValueError(problems[0])
            listed = [frame]
        frames += listed
    if repeated := [name for name, count in Counter(frame.name for frame in frames).items() if count > 1]:
        raise ValueError(f"images must have different names: {first_few(repeated)}")
    return frames


def check_frames(frames, width=None, crop=None):
    """Raise ValueError if frames are smaller at `width` than `crop` (height, width) or 16x16, or if all labels are void."""
    too_small, (least_h, least_w) = [], crop or (16, 16)  # the generator needs 16
    for frame in frames:
        w = width or frame.size[0]
        h = max(1, round(frame.size[1] * w / frame.size[0]))  # as in resize_to_width
        if h < least_h or w < least_w:
            too_small.append(f"{printable(frame.image)}: {w}x{h}{f' at --width {width}' if width else ''}, smaller than")
    if too_small:
        least = f"the crop of {least_h}x{least_w} (HxW): lower --crop-size" if crop else "the minimum of 16x16"
        raise ValueError(f"{too_small[0]} {least}" + f" ({len(too_small)} of {len(frames)} frames)" * (len(frames) > 1))
    labels, ids, classes = [frame.label for frame in frames if frame.label], set(), getattr(frames, "classes", CITYSCAPES)
    for label in labels:  # usually the first one settles it
        ids.update(load_label_ids(label, classes).unique().tolist())
        is_void = all(classes.train_ids[i] == VOID for i in ids)
        if not is_void and (ids & {*range(19, 34)} or classes is not CITYSCAPES):
            return
    if labels and is_void:  # such as Cityscapes' test split
        raise ValueError(f"{printable(labels[0])}: all void, as are all {len(labels)} labels; label ids are needed")
    if labels:
        log.warning("%s: no label has an id above 18. Train ids? Label ids are needed (car is 26)", printable(labels[0]))


def _problems(frames, root, split, labelled, exclude, decode=False):
    """Yield one line per problem and add the usable frames to `frames`. Reads headers, and all pixels if `decode`."""
    found = [name for name, ((folder, _), _) in LAYOUTS.items() if (root / folder).is_dir()]  # a plain folder always is one
    if not found or (labelled and found == ["plain"]):
        missing = "images/ (GTA5) or leftImg8bit/ (Cityscapes) in it" if found else "such folder"
        raise ValueError(f"{printable(root)}: no {missing}")
    layout, excluded, pairs = found[0], {*map(_bare_name, exclude)}, []
    for part in dict.fromkeys(split.split(",")) if layout == "Cityscapes" else [""]:
        of_images, of_labels = LAYOUTS[layout]
        images = _by_name(root, *of_images, part, layout, (".png", ".jpg", ".jpeg"))
        labels = _by_name(root, *of_labels, part, layout, (".png",)) if labelled else {}
        for name in dict.fromkeys([*images, *labels]):
            image, label = images.get(name, []), labels.get(name, [])
            if _bare_name(name) in excluded:
                frames.left_out[name] = "excluded"
            elif not image or (labelled and not label):
                yield f"{printable((image or label)[0])}: has no {'label (PNG)' if image else 'image'}"
            elif others := image[1:] + label[1:]:  # outputs named after frames would overwrite each other
                yield f"{printable(others[0])}: a second file of frame {printable(name)}; names must be unique"
            else:
                pairs.append(Frame(name, image[0], label[0] if labelled else None, None))
    with ThreadPoolExecutor(os.cpu_count() if decode else 16) as pool:  # decoding needs a core; reading headers mostly waits
        for frame, differs, problems in pool.map(lambda frame: _examine(frame, frames.classes, decode), pairs):
            if differs and layout == "GTA5":
                frames.left_out[frame.name] = "left out, because image and label differ in size"
            elif differs or problems:
                yield from problems + differs * [f"{printable(frame.label)}: differs from its image in size"]
            else:
                frames.append(frame)


def _by_name(root, folder, ending, part, layout, suffixes):
    """Return {name: [paths]} of the files NAME + ending + suffix in the folders of a layout; plain: in all below, by path."""
    folder = root / folder / part
    if not folder.is_dir():
        raise ValueError(f"{printable(folder)}: no such {'split' if part else 'folder'}")
    folders, visited, found = [folder], set(), {}
    for parent in folders:  # which grows below; links are followed, but each real folder is visited once, so loops end
        if os.path.realpath(parent) in visited:
            continue
        visited.add(os.path.realpath(parent))
        for path in sorted(path for path in parent.iterdir() if not path.name.startswith(".")):
            name = path.relative_to(folder).with_suffix("").as_posix() if layout == "plain" else path.stem
            if path.is_dir() and (layout == "plain" or (layout == "Cityscapes" and parent == folder)):
                folders.append(path)
            elif name.endswith(ending) and path.suffix.lower() in suffixes:
                found.setdefault(name.removesuffix(ending), []).append(path)
    return found


def _examine(frame, classes, decode):
    """Check a frame's files -> (frame with its size, whether its label has another size, list of problems)."""
    problems, sizes = [], {}
    load_ids = partial(load_label_ids, classes=classes)
    for path, load in ((frame.image, load_image), (frame.label, load_ids))[: 2 if frame.label else 1]:
        try:
            sizes[load] = tuple(load(path).shape[:-3:-1]) if decode else _read(path, load is load_ids, True)[0]
            if load is load_image:  # at least 16x16
                check_frames([Frame(frame.name, path, None, sizes[load])])
        except ValueError as error:
            problems.append(str(error))  # not the exception: its traceback would keep pixels in memory
    return frame._replace(size=sizes.get(load_image)), len({*sizes.values()}) == 2, problems


def read_names(path):
    """Read names of frames, or of their files, from a text file (or None), one per line, # starting a comment -> frozenset."""
    if path is None:
        return frozenset()
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # as Python decodes paths
        names = {re.sub(r"(^|\s)#.*", "", line).strip() for line in file} - {""}
    if not names:
        raise ValueError(f"{printable(path)}: no name in it; one frame name per line is needed")
    return frozenset(map(_bare_name, names))


def _bare_name(name):
    return re.sub(r"(_leftImg8bit|_gtFine_labelIds)?(?i:\.png|\.jpg|\.jpeg)?\Z", "", os.path.basename(name))


def _read(path, is_label=False, header_only=False):
    """Read a PNG or, unless it is a label, JPEG -> ((width, height), pixels, palette), of which the header gives the first."""
    pixels = palette = orientation = None
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a FIFO would block
            raise OSError(0, "not a regular file")
        with Image.open(path, formats=["PNG"] if is_label else ["PNG", "JPEG"]) as image:
            raw = str(image.tile[0][3])  # the file's pixel format; image.mode is what Pillow makes of it
            if "16" in raw:  # Pillow would silently reduce colour to 8 bits
                raise ValueError(f"16-bit pixels, {raw}; 8 bits per channel are needed")
            if is_label and raw not in ("L", "P", "P;1", "P;2", "P;4", "1"):  # Pillow rescales grey of 2 or 4 bits
                raise ValueError(f"{raw} pixels; 8-bit label ids are needed, grey or palette")
            with contextlib.suppress(Exception):  # viewers ignore damaged EXIF; getexif would decode a PNG without these keys
                if image.format != "PNG" or image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
                    orientation = image.getexif().get(ExifTags.Base.Orientation)
            size = image.size[::-1] if orientation in range(5, 9) else image.size
            if not header_only:
                image = ImageOps.exif_transpose(image) if orientation in range(2, 9) else image
                pixels = np.array(image if is_label or image.mode == "RGB" else image.convert("RGB"))
                palette = image.getpalette() if image.mode == "P" else None
    except MemoryError:  # not a fault of the file
        raise
    except Exception as error:  # Pillow raises anything for damaged files, struct.error and IndexError included
        reason = f"damaged image or unsupported format ({printable(error) if any(error.args) else type(error).__name__})"
        raise ValueError(f"{printable(path)}: {getattr(error, 'strerror', None) or reason}") from error
    return size, pixels, palette


def load_image(path):
    """Load an 8-bit PNG or JPEG, rotated as EXIF says -> tv_tensors.Image (3, H, W) uint8. Raises ValueError."""
    return tv_tensors.Image(torch.from_numpy(_read(path)[1]).permute(2, 0, 1))


def load_label_ids(path, classes=CITYSCAPES):
    """Load a grey or palette PNG of label ids -> tv_tensors.Mask (H, W) uint8. Raises ValueError, for unknown ids too."""
    _, ids, palette = _read(path, is_label=True)
    used = np.flatnonzero(np.bincount(ids.ravel()))
    # 34 occurs in GTA5 as published; 255 is accepted as void because some tools write void that way (ours).
    known, table = {row[0] for row in classes.rows} | {255}, "classes.csv"
    if classes is CITYSCAPES:
        known, table = known | {34}, "Cityscapes' table (0 to 33)"
    if unknown := {*used.tolist()} - known:
        raise ValueError(f"{printable(path)}: label ids {sorted(unknown)} are not in {table}")
    # Pillow's quantize(), for one, gives Cityscapes' colours other indices: then indices are not label ids.
    colours = np.array(palette or []).reshape(-1, 3)
    used = used[used < len(colours)]
    used = used[colours[used].any(1)]  # black proves nothing: it is also the colour of void and of unused entries
    matches = (colours[used, None] == classes.colours).all(2)  # (used indices, label ids)
    wrong = np.flatnonzero(matches.any(1) & ~matches[np.arange(len(used)), used])
    if len(wrong) and 2 * matches.any(1).sum() > len(used):
        found = f"index {used[wrong[0]]} has the colour of label id {matches[wrong[0]].argmax()}"
        raise ValueError(
            f"{printable(path)}: colours of {table.partition(' table')[0]}, but {found}; indices must be label ids"
        )
    return tv_tensors.Mask(torch.from_numpy(ids.astype(np.uint8)))


def load_label(path, classes=CITYSCAPES):
    """Load a PNG of label ids -> tv_tensors.Mask (H, W) uint8 of train ids and VOID. Raises ValueError."""
    return tv_tensors.Mask(torch.from_numpy(classes.train_ids)[load_label_ids(path, classes).long()])


def resize_to_width(frame, width):
    """Resize a tv_tensors Image (antialiased bilinear) or Mask (nearest-exact) to `width` pixels, keeping its proportions."""
    height, old_width = frame.shape[-2:]
    if old_width == width:
        return frame
    size = [max(1, round(height * width / old_width)), width]
    if not isinstance(frame, tv_tensors.Mask):
        return v2.functional.resize(frame, size, InterpolationMode.BILINEAR, antialias=True)
    # Plain nearest shifts labels by half a pixel; torchvision before 0.29 uses it for every Mask, but not for an image.
    resized = v2.functional.resize(frame.as_subclass(torch.Tensor)[None], size, InterpolationMode.NEAREST_EXACT)
    return tv_tensors.Mask(resized[0])


def load_at_width(path, width, load=load_image, cache=None):
    """Return load(path) resized to `width` pixels; `load` is load_image or load_label_ids. Raises what `load` raises.

    cache: a folder for resized copies (PNG), which decode faster than larger originals. A copy is valid until the path,
    size or modification time of its original changes; a damaged copy is replaced.
    """
    if cache is None:
        return resize_to_width(load(path), width)
    now = os.stat(path)
    key = f"1 {os.path.abspath(path)} {now.st_size} {now.st_mtime_ns} {width}"  # increase the 1 when resizing changes
    copy = Path(cache) / f"{_hash([key])[:32]}.png"
    with contextlib.suppress(ValueError):
        return load(copy)
    frame = resize_to_width(original := load(path), width)
    if frame is not original:
        temporary = copy.with_name(f".{copy.name}.{os.getpid()}.part")
        try:
            pixels = frame.numpy() if frame.ndim == 2 else frame.permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(temporary, format="PNG", compress_level=1)
            os.replace(temporary, copy)
        except OSError:  # a full disk, for example: the cache is optional
            with contextlib.suppress(OSError):
                temporary.unlink()
    return frame


class Crops(torch.utils.data.Dataset):
    """Random crops of a data set, shuffled anew in every epoch. Sample k depends only on `seed`, `stream` and k.

    A sample is a frame resized to `width`, cropped to `crop` (height, width), flipped with probability 1/2: (3, h, w) uint8
    and, if `labelled`, (h, w) uint8 train ids. For two domains, use a torch.utils.data.StackDataset of two Crops with
    different `stream`: each is shuffled separately, and the shorter one repeats.
    """

    def __init__(self, frames, width, crop, length, seed=0, stream=0, labelled=False, cache=None):
        self.frames, self.width, self.length, self.labelled = frames, width, length, labelled
        self.seed, self.stream, self.cache, self.classes = seed, stream, cache, frames.classes
        self.augment = v2.Compose([v2.RandomCrop(crop), v2.RandomHorizontalFlip()])

    def __len__(self):
        return self.length

    def frame(self, k):
        epoch, position = divmod(k, len(self.frames))
        generator = torch.Generator().manual_seed(_mix(self.seed, self.stream, 0, epoch))
        return self.frames[torch.randperm(len(self.frames), generator=generator)[position]]

    def __getitem__(self, k):
        frame = self.frame(k)
        sample = [load_at_width(frame.image, self.width, cache=self.cache)]
        if self.labelled:
            sample.append(load_at_width(frame.label, self.width, partial(load_label_ids, classes=self.classes), self.cache))
        with torch.random.fork_rng(devices=[]):  # the transforms use torch's global generator
            torch.manual_seed(_mix(self.seed, self.stream, 1, k))
            image, *label_ids = (part.as_subclass(torch.Tensor) for part in self.augment(sample))
        return (image, torch.from_numpy(self.classes.train_ids)[label_ids[0].long()]) if self.labelled else image


def _mix(*numbers):  # one seed, so that consecutive k give unrelated samples
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Frames(torch.utils.data.Dataset):
    """Whole frames in order: (3, h, w) uint8 at `width`, and if labelled (H, W) uint8 train ids at the label's own size."""

    def __init__(self, frames, width, classes=CITYSCAPES):
        self.frames, self.width, self.classes = frames, width, classes

    def __len__(self):
        return len(self.frames)

    def frame(self, i):
        return self.frames[i]

    def __getitem__(self, i):
        frame = self.frames[i]
        labels = [load_label(frame.label, self.classes)] if frame.label else []
        sample = [resize_to_width(load_image(frame.image), self.width), *labels]
        return [part.as_subclass(torch.Tensor) for part in sample]


def to_signed(images):
    """Convert uint8 images to float32 in [-1, 1], the range of the generator."""
    return images.float() / 127.5 - 1


def to_unit(images):
    """Convert uint8 images to float32 in [0, 1], the range of the segmenter."""
    return images.float() / 255


def colourise(train_ids, classes=CITYSCAPES):
    """Convert train ids (..., H, W) to the classes' colours (..., 3, H, W) uint8; void is black."""
    palette = np.pad(classes.palette, ((0, 256 - len(classes.palette)), (0, 0)))
    return torch.from_numpy(palette)[train_ids.long()].movedim(-1, -3)


def main():
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently if the output is piped to `head`
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", help="data set in the layout of GTA5 or Cityscapes")
    parser.add_argument("--split", default="train", help="Cityscapes split, or several joined by commas (default: train)")
    parser.add_argument("--unlabelled", action="store_true", help="use the images only")
    parser.add_argument("--exclude", metavar="FILE", help="text file with the names of frames to leave out, one per line")
    parser.add_argument(
        "--check-data", action="store_true", help="decode all files; list problems, class shares, frames of one colour"
    )
    args = parser.parse_args()
    folder, count = printable(args.folder), 0
    try:
        data_set = Path(args.folder), args.split, not args.unlabelled, read_names(args.exclude)
        found = FrameList(CITYSCAPES if args.unlabelled else read_classes(args.folder))
        for problem in _problems(found, *data_set, decode=True) if args.check_data else ():
            print(problem, flush=True)
            count += 1
        if count:
            raise ValueError(f"{folder}: {count} problem{'s' if count > 1 else ''}")
        frames = list_frames(*data_set)
        check_frames(frames)
        sizes = first_few([f"{w}x{h}" for w, h in sorted({frame.size for frame in frames})])
        print(f"{folder}: {len(frames)} {'' if args.unlabelled else 'labelled '}frames of {sizes}", flush=True)
        if args.check_data:
            varied = ThreadPoolExecutor().map(lambda f: np.ptp(load_image(f.image).numpy(), axis=(1, 2)).any(), frames)
            if plain := [printable(frame.name) for frame, is_varied in zip(frames, varied) if not is_varied]:
                print("# Frames of a single colour; --exclude FILE takes these lines:", *plain, sep="\n")
        if args.check_data and not args.unlabelled:
            classes = frames.classes
            count = lambda f: np.bincount(load_label(f.label, classes).ravel(), minlength=256)  # noqa: E731
            counts = sum(ThreadPoolExecutor().map(count, frames))
            for name, pixels in zip([*classes.names, "void"], [*counts[: len(classes.names)], counts[VOID]]):
                print(f"  {name:<14}{pixels / counts.sum():7.2%}")
    except (ValueError, OSError) as error:
        print(f"data.py: {printable(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
