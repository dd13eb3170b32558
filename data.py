"""Data sets: labelled frames of a game (GTA5, the source) and photographs of streets (Cityscapes, the target).

Self-contained: depends only on numpy, pillow, torch and torchvision. The command that checks a data set is check_data.py.

Two layouts, recognised by their folders (Richter et al. 2016; Cordts et al. 2016):
    GTA5        DIR/images/NAME.{png,jpg}  DIR/labels/NAME.png
    Cityscapes  DIR/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png  DIR/gtFine/SPLIT/CITY/*_gtFine_labelIds.png
Where labels are not read, any other folder with PNG or JPEG files in it or below will do. Label files hold Cityscapes
label ids (0 to 33), or those of DIR/classes.csv (`read_classes`). Training and evaluation use train ids and VOID (255).
"""

import contextlib
import csv
import hashlib
import logging
import math
import os
import re
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes
from torchvision.transforms import InterpolationMode, v2

VOID = 255
CLASSES = [c for c in Cityscapes.classes if 0 <= c.train_id < VOID]  # the 19 evaluated classes, ordered by train id
UNFINISHED = ".unfinished"  # file in the root of a data set that translate_dataset.py is still filling
LAYOUTS = {  # marker folder: (folder, file ending) of images, the same of labels, levels of subfolders to search
    "images": (("images", ""), ("labels", ""), 0),
    "leftImg8bit": (("leftImg8bit/{}", "_leftImg8bit"), ("gtFine/{}", "_gtFine_labelIds"), 1),  # {}: the split
    "": (("", ""), None, math.inf),  # any folder of images
}
# EXIF orientation -> what turns the image upright. (ImageOps.exif_transpose fails if any other tag is damaged.)
UPRIGHT = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2))))
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # by default, Pillow refuses PNGs with a 1 MiB ICC profile
log = logging.getLogger("data")
# name: unique within the data set; image, label: paths, label None if it is not read; size: (width, height) in pixels.
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

    def __reduce__(self):  # so that `is CITYSCAPES` also holds in workers that were not forked
        return "CITYSCAPES" if self is CITYSCAPES else (Classes, (self.rows,))

    def check_same(self, other, what):
        """Raise ValueError, naming the first difference, unless `other` is the same table. what: opens the message."""
        for one, two in zip_longest(self.rows, other.rows):
            if one != two:
                raise ValueError(f"{what}: the class tables differ: {one or 'no row'} and {two or 'no row'}")


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
    except (KeyError, TypeError, AttributeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: columns id, name, train_id, red, green, blue are needed, with integers") from error
    ids, train_ids = {row[0] for row in rows}, {row[2] for row in rows} - {VOID}
    if not all(0 <= number <= 255 for row in rows for number in (row[0], *row[2:])) or VOID in ids or len(ids) < len(rows):
        raise ValueError(f"{path}: ids must be distinct and from 0 to 254, train ids and colours from 0 to 255")
    classes = Classes(rows)
    if not train_ids or train_ids != {*range(len(train_ids))} or len({*classes.names}) < len(classes.names):
        raise ValueError(f"{path}: train ids must be 0, 1, 2, ... (255: not evaluated), with different names")
    return classes


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
    """Text for one line: control characters and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def first_few(names):
    """Return the first three names and the number of the others, for a message."""
    return ", ".join(map(printable, names[:3])) + (f" and {len(names) - 3} more" if names[3:] else "")


def list_frames(root, split="train", labelled=True, exclude=()):
    """Find the frames of a data set and check the headers of their files -> FrameList.

    split: a Cityscapes split, or several joined by commas ("train,train_extra"). labelled: if False, labels are not read, and
    frames of a folder in neither layout are named by their relative path ("trainA/0001"). exclude: names of frames to leave
    out (read_names). Pairs in GTA5's layout that differ in size are left out, too (about sixty in GTA5, 20801 to 20860). Logs
    how many are left out. Raises ValueError for any other problem.
    """
    frames, problems = match_files(Path(root), split, labelled, exclude)
    if problems:
        more = f" (and {len(problems) - 1} more: see check_data.py DIR --check-data)" if problems[1:] else ""
        raise ValueError(problems[0] + more)
    with ThreadPoolExecutor(16) as pool:  # reading headers mostly waits
        sizes = [*pool.map(_sizes, frames)]
    differing = [frame for frame, (size, label_size) in zip(frames, sizes) if size != label_size]
    if differing and not (Path(root) / "images").is_dir():
        raise ValueError(f"{differing[0].label}: differs from its image in size ({len(differing)} of {len(frames)} labels)")
    frames.left_out |= {frame.name: "left out, because image and label differ in size" for frame in differing}
    frames[:] = [frame._replace(size=size) for frame, (size, label_size) in zip(frames, sizes) if size == label_size]
    if not frames:
        where = f"{root}/images" if (Path(root) / "images").is_dir() else root
        left_out = "".join(f"; {number} {reason}" for reason, number in Counter(frames.left_out.values()).items())
        raise ValueError(f"{where}: no image (.png, .jpg) to use{left_out}")
    if unmatched := sorted({*exclude} - {*map(bare_name, frames.left_out)}):
        log.warning("%s: %d excluded names match no frame: %s", root, len(unmatched), first_few(unmatched))
    for reason in dict.fromkeys(frames.left_out.values()):
        names = [name for name, why in frames.left_out.items() if why == reason]
        log.warning("%s: %d %s: %s", root, len(names), reason, first_few(names))
    return frames


def match_files(root, split, labelled, exclude):
    """Find the files of frames by their names -> (FrameList without sizes, list of problems, one line each).

    Arguments as for list_frames. Raises ValueError where there is no such data set, or an unfinished translation.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    if labelled and (root / UNFINISHED).exists():
        raise ValueError(f"{root}: translate_dataset.py has not finished it; run that command again")
    layout = next(folder for folder in LAYOUTS if (root / folder).is_dir())
    if labelled and not layout:
        raise ValueError(f"{root}: no images/ (GTA5) or leftImg8bit/ (Cityscapes) in it")
    frames, problems = FrameList(read_classes(root) if labelled else CITYSCAPES), []
    of_images, of_labels, depth = LAYOUTS[layout]
    for part in dict.fromkeys(split.split(",")) if layout == "leftImg8bit" else [""]:
        images = _by_name(root, of_images, part, depth, (".png", ".jpg", ".jpeg"))
        labels = _by_name(root, of_labels, part, depth, (".png",)) if labelled else {}
        for name in dict.fromkeys([*images, *labels]):
            image, label = images.get(name, []), labels.get(name, [])
            if bare_name(name) in exclude:
                frames.left_out[name] = "excluded"
            elif not image or (labelled and not label):
                problems.append(f"{(image or label)[0]}: has no {'label (PNG)' if image else 'image'}")
            elif others := image[1:] + label[1:]:  # outputs named after frames would overwrite each other
                problems.append(f"{others[0]}: a second file of frame {name}; names must be unique")
            else:
                frames.append(Frame(name, image[0], label[0] if labelled else None, None))
    return frames, problems


def _sizes(frame):
    """(width, height) of a frame's image and of its label, or of the image twice, from their headers. Raises ValueError."""
    size = read_file(frame.image, header_only=True)[0]
    return size, read_file(frame.label, is_label=True, header_only=True)[0] if frame.label else size


def _by_name(root, place, part, depth, suffixes):
    """Return {name: [paths]} of the files in a place of LAYOUTS; the name is the path without suffix if depth is unlimited."""
    folder, ending = root / place[0].format(part), place[1]
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found = {}
    for path in sorted(_entries_below(folder, depth), key=lambda path: (len(path.parts), path)):
        if path.suffix.lower() in suffixes and path.stem.endswith(ending):
            name = path.with_suffix("").as_posix() if depth == math.inf else path.stem.removesuffix(ending)
            found.setdefault(name, []).append(folder / path)
    return found


def _entries_below(root, depth):
    """Yield what is in a folder and `depth` levels of folders below, as paths relative to it. Raises OSError."""
    folders, visited = [Path()], set()
    for inside in folders:  # which grows below
        if (real := os.path.realpath(root / inside)) in visited:  # links are followed, but loops end
            continue
        visited.add(real)
        with os.scandir(root / inside) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        for entry in entries:
            if not entry.name.startswith("."):
                yield inside / entry.name
                is_link = entry.is_symlink()  # entry.is_dir() would fail on a link to itself
                if len(inside.parts) < depth and (os.path.isdir(entry.path) if is_link else entry.is_dir()):
                    folders.append(inside / entry.name)


def read_names(path):
    """Names of frames or files in a text file, one per line, # for comments -> frozenset, empty for None. Raises ValueError."""
    if path is None:
        return frozenset()
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # as Python decodes paths
        names = {re.sub(r"(^|\s)#.*", "", line).strip() for line in file} - {""}
    if not names or any("\0" in name for name in names):  # UTF-16, as PowerShell writes it
        raise ValueError(f"{path}: no name in it, or not UTF-8 text; one frame name per line is needed")
    return frozenset(map(bare_name, names))


def bare_name(name):
    """Strip folders, Cityscapes' endings and the suffix from the name of a frame or of one of its files."""
    return re.sub(r"(_leftImg8bit|_gtFine_labelIds)?(?i:\.png|\.jpg|\.jpeg)?\Z", "", os.path.basename(name))


def read_file(path, is_label=False, header_only=False):
    """Read a PNG or, unless it is a label, JPEG -> ((width, height), pixels, palette). Raises ValueError.

    pixels: (H, W) or (H, W, 3) uint8, (H, W) for labels. With header_only, pixels and palette are None.
    """
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
                image = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
                pixels = np.array(image if is_label or image.mode == "RGB" else image.convert("RGB"))
                palette = image.getpalette()
    except MemoryError:  # not a fault of the file
        raise
    except Exception as error:  # Pillow raises anything for damaged files, struct.error and IndexError included
        reason = f"damaged image or unsupported format ({error if any(error.args) else type(error).__name__})"
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or reason}") from error
    return size, pixels, palette


def load_image(path):
    """Load an 8-bit PNG or JPEG, rotated as EXIF says -> tv_tensors.Image (3, H, W) uint8. Raises ValueError."""
    return tv_tensors.Image(torch.from_numpy(read_file(path)[1]).permute(2, 0, 1))


def load_label_ids(path, classes=CITYSCAPES):
    """Load a grey or palette PNG of label ids -> tv_tensors.Mask (H, W) uint8. Raises ValueError, for unknown ids too."""
    _, ids, palette = read_file(path, is_label=True)
    used = np.flatnonzero(np.bincount(ids.ravel()))
    # 34 occurs in GTA5 as published; 255 is accepted as void because some tools write void that way (ours).
    known = {row[0] for row in classes.rows} | ({34, VOID} if classes is CITYSCAPES else {VOID})
    if unknown := {*used.tolist()} - known:
        table = "Cityscapes' table (0 to 33)" if classes is CITYSCAPES else "classes.csv"
        raise ValueError(f"{path}: label ids {sorted(unknown)} are not in {table}")
    # Pillow's quantize(), for one, gives the classes' colours other indices: then indices are not label ids.
    shown = {i: tuple(palette[3 * i : 3 * i + 3]) for i in used.tolist()} if palette else {}
    shown = {i: colour for i, colour in shown.items() if any(colour)}  # black proves nothing: unused entries are black too
    owners = {tuple(colour): label_id for label_id, _, _, *colour in classes.rows}
    wrong = [i for i, colour in shown.items() if colour in owners and colour != tuple(classes.colours[i])]
    if wrong and 2 * sum(colour in owners for colour in shown.values()) > len(shown):
        found = f"index {wrong[0]} has the colour of label id {owners[shown[wrong[0]]]}"
        raise ValueError(f"{path}: {found}; indices of a palette image must be label ids")
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
        with contextlib.suppress(OSError):  # a full disk, for example: the cache is optional
            try:
                copy.parent.mkdir(parents=True, exist_ok=True)
                v2.functional.to_pil_image(frame).save(temporary, format="PNG", compress_level=1)
                os.replace(temporary, copy)
            finally:
                temporary.unlink(missing_ok=True)
    return frame


class Crops(torch.utils.data.Dataset):
    """Random crops of a data set, shuffled anew in every epoch. Sample k depends only on `seed`, `stream` and k.

    A sample is a frame resized to `width`, cropped to `crop` (height, width), flipped with probability 1/2: (3, h, w) uint8
    and, if `labelled`, (h, w) uint8 train ids. For two domains, use a torch.utils.data.StackDataset of two Crops with
    different `stream`: each is shuffled separately, and the shorter one repeats. transfer: a function (name, image) -> image
    that is applied before cropping, e.g. colours.ColourTransfer.
    """

    def __init__(self, frames, width, crop, length, seed=0, stream=0, labelled=False, cache=None, transfer=None):
        self.frames, self.width, self.length, self.labelled, self.transfer = frames, width, length, labelled, transfer
        self.seed, self.stream, self.cache, self.classes = seed, stream, cache, frames.classes
        self.augment = v2.Compose([v2.RandomCrop(crop), v2.RandomHorizontalFlip()])

    def __len__(self):
        return self.length

    def frame(self, k):
        epoch, position = divmod(k, len(self.frames))
        generator = torch.Generator().manual_seed(_mix(self.seed, self.stream, 0, epoch))
        return self.frames[torch.randperm(len(self.frames), generator=generator)[position]]

    def __getitem__(self, k):
        if not 0 <= k < self.length:
            raise IndexError(k)  # ends a for loop
        frame = self.frame(k)
        sample = [load_at_width(frame.image, self.width, cache=self.cache)]
        if self.transfer:
            sample = [tv_tensors.Image(self.transfer(frame.name, sample[0].as_subclass(torch.Tensor)))]
        if self.labelled:
            sample.append(load_at_width(frame.label, self.width, partial(load_label_ids, classes=self.classes), self.cache))
        with torch.random.fork_rng(devices=[]):  # the transforms use torch's global generator: not safe in threads
            torch.default_generator.manual_seed(_mix(self.seed, self.stream, 1, k))  # not CUDA's
            image, *label_ids = (part.as_subclass(torch.Tensor) for part in self.augment(sample))
        return (image, torch.from_numpy(self.classes.train_ids)[label_ids[0].long()]) if self.labelled else image


def _mix(*numbers):  # one seed, so that consecutive k give unrelated samples
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


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


if __name__ == "__main__":
    raise SystemExit("data.py is not a script: use check_data.py DIR")
