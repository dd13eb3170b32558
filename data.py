"""The data sets of CLADA: labelled frames of a game (GTA5), photographs of a dashcam (Cityscapes).

Copies alone into other projects: needs numpy, pillow, torch and torchvision. As a command it reads a data set's names
and headers and says what it found; with --check-data it reads all pixels and lists all that is wrong:

    python data.py DIR [--split train] [--unlabelled] [--exclude FILE] [--check-data]

Two layouts, told apart by looking (Richter et al. 2016; Cordts et al. 2016):

    GTA5        DIR/images/NAME.{png,jpg}  DIR/labels/NAME.png                   one set of frames, no splits
    Cityscapes  DIR/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png  DIR/gtFine/SPLIT/CITY/*_gtFine_labelIds.png

Label files hold Cityscapes label ids (0 to 33); what leaves this file are train ids, 0 to 18, and VOID (255).
"""

import argparse
import contextlib
import errno
import hashlib
import logging
import math
import os
import re
import signal
import stat
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes
from torchvision.transforms import InterpolationMode, v2

VOID = 255
CLASSES = [c for c in Cityscapes.classes if 0 <= c.train_id < VOID]  # the 19 that are evaluated, by train id
CLASS_NAMES = [c.name for c in CLASSES]
PALETTE = np.array([c.color for c in CLASSES], dtype=np.uint8)  # (19, 3)

TRAIN_IDS = np.full(256, VOID, dtype=np.uint8)  # label id -> train id; every other id is void
for _class in CLASSES:
    TRAIN_IDS[_class.id] = _class.train_id
# Beside the table's ids: 34, which occurs in GTA5 as published, and 255, which is -1 (licence plate) in eight bits.
KNOWN_IDS = np.isin(np.arange(256), [*(c.id for c in Cityscapes.classes if c.id >= 0), 34, 255])

IDS_BY_COLOUR = {}
for _class in Cityscapes.classes:
    IDS_BY_COLOUR.setdefault(_class.color, []).append(_class.id)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
SMALLEST = 16  # pixels on a side, which the translator needs
# Pillow warns of images of more than MAX_IMAGE_PIXELS and refuses those of twice as many; here both are refused.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # else a PNG whose ICC profile has 1 MiB is refused
log = logging.getLogger("data")


class Frame(NamedTuple):
    """An image and, where it is known and wanted, its label map. `name` is unique within a data set."""

    name: str
    image: Path
    label: Path | None


class FrameList(list):
    """Frames, and `left_out`, {name: why} of those that are not among them."""

    left_out = {}

    def fingerprint(self):
        """The number of frames and a hash of their names and sizes in pixels: the same wherever the data set lies.

        Raises ValueError for an image whose header cannot be read.
        """
        sizes = [*_each(lambda frame: image_size(frame.image), self)]
        _refuse([size for size in sizes if isinstance(size, str)])
        return f"{len(self)} frames, {_hashed(f'{frame.name} {size}' for frame, size in zip(self, sizes))}"

    def content(self, images=False):
        """A hash of the labels' content and the image files' sizes in bytes; with `images`, of the images' content, too."""

        def of(frame):
            label = hashlib.sha256(frame.label.read_bytes()).hexdigest() if frame.label else ""
            image = hashlib.sha256(frame.image.read_bytes()).hexdigest() if images else os.path.getsize(frame.image)
            return f"{frame.name} {image} {label}"

        return _hashed(_each(of, self))


def _hashed(lines):
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:12]


def printable(text):
    """A path or an error as part of one line: control characters and bytes that are no UTF-8 are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


# ---------------------------------------------------------------------------------------------------------------------
# Finding frames


def list_frames(root, split="train", labelled=True, exclude=()):
    """The frames of a data set of either layout, by name: a `FrameList`.

    split: a Cityscapes split or several joined by commas ("train,train_extra"); the GTA5 layout has none and ignores it.
    labelled: False takes the images alone and does not look at labels. exclude: names of frames that are left out unseen,
    as read_names has them. Pairs of the GTA5 layout whose two sizes differ, of which GTA5 has a few, are left out too. The log
    says how many of either, and how many names in `exclude` match no frame.
    Raises ValueError for anything else that does not fit: the first such thing, and how many there are.
    """
    frames, issues, notes = _survey(root, split, labelled, exclude)
    _refuse(issues)
    for note in notes:
        log.warning("%s", note)
    return frames


def first_few(names):
    """The first few of some names, for a message."""
    names = [*map(printable, names)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def check_frames(frames, width=None, crop=None):
    """Read the header of every file of some frames; ValueError for the first that cannot be used, and how many there are.

    That is what load_image and load_label_ids refuse, an image of fewer than 16 pixels on a side, and one that at `width`
    has too many pixels or is smaller than `crop` (height, width). Labels without a pixel of an evaluated class in any of them,
    as those of Cityscapes' test split, are refused, too.
    """
    _refuse(list(_faults(frames, width=width, crop=crop)))
    labels = [frame.label for frame in frames if frame.label]
    evaluated = is_above = False
    for label in labels:  # most often the first one settles it
        ids = load_label_ids(label).numpy()
        evaluated |= bool((TRAIN_IDS[ids] != VOID).any())
        is_above |= bool(((ids > 18) & (ids < 34)).any())
        if evaluated and is_above:
            return
    if labels and not evaluated:
        raise ValueError(
            f"{printable(labels[0])}: all of it is void, and so are all {len(labels)} labels; label ids are needed"
        )
    if labels:
        log.warning(
            "%s: no label has an id above 18: are they train ids? Label ids (car is 26) are needed", printable(labels[0])
        )


def problems(root, split="train", labelled=True, exclude=()):
    """Read a data set whole, pixels too, and yield all that is wrong with it, a line each. Arguments as list_frames."""
    try:
        frames, issues, _ = _survey(root, split, labelled, exclude)
    except (ValueError, OSError) as error:
        frames, issues = [], [printable(error)]
    yield from (said := dict.fromkeys(issues))
    # Threads decode side by side, since Pillow lets go of Python's lock; one a core, since each holds an image.
    yield from (line for line in _faults(frames, os.cpu_count(), pixels=True) if line not in said)


def read_names(path):
    """A text file of names, one a line, # begins a comment -> frozenset, for `exclude`.

    A name may be that of a frame, or of its image or label file, with or without folders and suffix.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # which is how Python decodes paths
            names = [re.sub(r"(^|\s)#.*", "", line).strip() for line in file]
    except OSError as error:
        raise ValueError(f"{printable(path)}: {error.strerror}, where a text file of frames' names is needed") from error
    if not any(names):
        raise ValueError(f"{printable(path)}: no name in it, where frames' names are needed, one a line")
    return frozenset(_bare(name) for name in names if name)


def _bare(name):
    """The name of a frame, of its image or of its label file -> what is the same in all three."""
    name = os.path.basename(name)
    stem, suffix = os.path.splitext(name)
    name = stem if suffix.lower() in IMAGE_SUFFIXES else name
    return name.removesuffix("_leftImg8bit").removesuffix("_gtFine_labelIds")


def _survey(root, split, labelled, exclude):
    """(frames, a line for each thing that does not fit, notes on what is left out). A frame that cannot be read stays in."""
    root, exclude, issues, notes = Path(root), {_bare(name) for name in exclude}, [], []
    is_gta5 = (root / "images").is_dir()
    if is_gta5:
        folders, endings = [("images", "labels")], ("", "")
    elif (root / "leftImg8bit").is_dir():
        folders = [(f"leftImg8bit/{part}", f"gtFine/{part}") for part in dict.fromkeys(split.split(","))]
        endings = ("_leftImg8bit", "_gtFine_labelIds")
    else:
        neither = "neither GTA5's layout (images/, labels/) nor Cityscapes' (leftImg8bit/, gtFine/)"
        raise ValueError(f"{printable(root)}: {neither if root.is_dir() else 'no such folder'}")
    frames, fitting, left_out = [], FrameList(), {}
    for image_folder, label_folder in folders:
        images = _by_name(root / image_folder, endings[0], IMAGE_SUFFIXES)
        labels = _by_name(root / label_folder, endings[1], IMAGE_SUFFIXES) if labelled else {}
        for name in dict.fromkeys([*images, *labels]):
            if _bare(name) in exclude:
                left_out[name] = "excluded"
                continue
            found = labels.get(name, [])
            pair = images.get(name, []), [path for path in found if path.suffix.lower() == ".png"] or found
            for first, *others in filter(None, pair):  # they would be written to one name later
                issues += [f"{printable(path)}: there is {printable(first)} too, and names must be unique" for path in others]
            if labelled and not all(pair):
                issues.append(f"{printable((pair[0] or pair[1])[0])}: has no {'label' if pair[0] else 'image'}")
            elif labelled and pair[1][0].suffix.lower() != ".png":
                issues.append(f"{printable(pair[1][0])}: a label as JPEG, which alters label ids; PNG is needed")
            else:
                frames.append(Frame(name, pair[0][0], pair[1][0] if labelled else None))
    if unmatched := exclude - {_bare(name) for name in left_out}:
        notes.append(
            f"{printable(root)}: {len(unmatched)} of {len(exclude)} names to exclude match no frame: "
            f"{first_few(sorted(unmatched))}"
        )
    if left_out:
        notes.append(f"{printable(root)}: {len(left_out)} excluded: {first_few(left_out)}")
    misfits = {}
    for frame, sizes in zip(frames, _each(_sizes, frames)):
        if isinstance(sizes, str) or sizes[0] == sizes[1] or not is_gta5:
            fitting.append(frame)
        else:
            misfits[frame.name] = f"its label has another size, {sizes[1]}"
        if isinstance(sizes, str):
            issues.append(sizes)
        elif sizes[0] != sizes[1] and not is_gta5:
            issues.append(f"{printable(frame.label)}: {sizes[1]} pixels, its image {sizes[0]}")
    if misfits:
        notes.append(f"{printable(root)}: {len(misfits)} of {len(frames)} pairs left out, sizes differ: {first_few(misfits)}")
    if not fitting and not issues:
        why = f"split {printable(split)}; {len(left_out)} excluded, {len(misfits)} whose label has another size"
        issues.append(f"{printable(root)}: no image (.png, .jpg) is left where the layout has them ({why})")
    fitting.left_out = left_out | misfits
    return fitting, issues, notes


def _by_name(folder, ending, suffixes):
    """{name: [paths]} of the files NAME + ending + suffix in a folder or, where there is an ending, in its folders (cities)."""
    if not folder.is_dir():
        raise ValueError(f"{printable(folder)}: no such {'split' if ending else 'folder'}")
    found = {}
    for city in sorted(path for path in folder.iterdir() if path.is_dir()) if ending else [folder]:
        for path in sorted(city.iterdir()):
            hidden = path.name.startswith(".")  # what an interrupted writer or a file manager left
            if not hidden and path.suffix.lower() in suffixes and path.stem.endswith(ending):
                found.setdefault(path.stem.removesuffix(ending), []).append(path)
    return found


def _sizes(frame):
    """The sizes of image and label; an image alone need only be a file."""
    if frame.label is None:
        return (_check_is_file(frame.image),) * 2
    return image_size(frame.image), image_size(frame.label, is_label=True)


def _faults(frames, workers=16, **options):
    """Yield what is wrong with the files of some frames, a line for each that _check refuses."""
    files = [file for frame in frames for file in ((frame.image, False), (frame.label, True)) if file[0]]
    yield from filter(None, _each(lambda file: _check(*file, **options), files, workers))


def _each(function, items, workers=16):
    """Yield function(item) for each, or a line if it raises; by threads, since reading over a network is mostly waiting."""

    def call(item):
        try:
            return function(item)
        except (ValueError, OSError) as error:
            return printable(error)  # not the error, whose traceback would keep pixels

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(call, items)


def _refuse(issues):
    if issues:
        more = f" (and {len(issues) - 1} more; python data.py DIR --check-data lists all that is wrong with a data set)"
        raise ValueError(issues[0] + (more if issues[1:] else ""))


# ---------------------------------------------------------------------------------------------------------------------
# Reading frames


def _check_is_file(path):
    """ValueError for anything but a regular file: to open a FIFO would be to wait for ever."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        regular = False
        if not os.path.lexists(path):
            raise ValueError(f"{printable(path)}: no such file") from None
    except OSError as error:
        regular = False
        if error.errno != errno.ELOOP:  # its folder does not let one look
            raise ValueError(f"{printable(path)}: {error.strerror}") from None
    if not regular:
        raise ValueError(f"{printable(path)}: not a regular file, nor a link to one")


def _open(path, is_label=False):
    """The open image, its header read; ValueError for what load_image or load_label_ids cannot take."""
    _check_is_file(path)
    formats = ("PNG",) if is_label else ("PNG", "JPEG")
    try:
        image = Image.open(path, formats=formats)
        raw = str(image.tile[0][3])  # the file's pixels; image.mode is what Pillow makes of them
    except Image.DecompressionBombError as error:
        raise ValueError(f"{printable(path)}: more than PIL.Image.MAX_IMAGE_PIXELS ({Image.MAX_IMAGE_PIXELS})") from error
    except MemoryError:
        raise
    except Exception as error:  # for damaged files Pillow raises many kinds, struct.error and IndexError among them
        said = "" if isinstance(error, UnidentifiedImageError) or not error.args else f" ({printable(error)})"
        reason = getattr(error, "strerror", None) or f"not a {' or '.join(formats)} image{said}"
        raise ValueError(f"{printable(path)}: {reason}") from error
    wrong = None
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        wrong = f"{image.width}x{image.height}, more than PIL.Image.MAX_IMAGE_PIXELS ({Image.MAX_IMAGE_PIXELS})"
    elif is_label and raw not in ("L", "P", "P;1", "P;2", "P;4", "1"):  # Pillow scales grey of 2 or 4 bits
        wrong = f"{raw} pixels, where 8-bit label ids are needed (grey or palette)"
    elif "16" in raw:  # Pillow would cut colour to 8 bits without a word
        wrong = f"16-bit pixels ({raw}), where 8 bits a channel are needed"
    if wrong:
        image.close()
        raise ValueError(f"{printable(path)}: {wrong}")
    return image


def _orientation(image):
    """EXIF's orientation of an open image, 1 where there is none: a viewer mirrors and turns by it. 5 to 8 swap the sides."""
    if image.format == "PNG" and not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return 1  # getexif would decode the pixels in search of it
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF, which viewers ignore
        return 1
    return orientation if orientation in range(1, 9) else 1


def _pixels(path, image, mode=None):
    try:
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        return np.array(image if mode in (None, image.mode) else image.convert(mode))  # to convert is to copy
    except MemoryError:  # which says nothing of the file
        raise
    except Exception as error:  # as many kinds
        reason = printable(error) if any(error.args) else type(error).__name__
        raise ValueError(f"{printable(path)}: damaged image ({reason})") from error


def image_size(path, is_label=False):
    """(width, height) as a viewer shows it, from the header alone; ValueError for what load_image or load_label_ids refuse."""
    with _open(path, is_label) as image:
        return image.size[::-1] if _orientation(image) > 4 else image.size


def _check(path, is_label, width=None, crop=None, pixels=False):
    """ValueError for a file that cannot be used, see check_frames; with `pixels`, or that cannot be decoded."""
    size = image_size(path, is_label)
    if not is_label:  # which has its image's size
        _check_size(path, size)
        _check_size(path, size, width, crop)
    if pixels:
        (load_label_ids if is_label else load_image)(path)


def _check_size(path, size, width=None, crop=None):
    """ValueError if an image of `size` (width, height) cannot be resized to `width` and cropped to `crop` (height, width)."""
    w, h = width or size[0], _height_at(width or size[0], *size)
    found = f"{printable(path)}: {w}x{h}" + (f" at --width {width}" if width else "")
    if w * h > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"{found}, more than PIL.Image.MAX_IMAGE_PIXELS ({Image.MAX_IMAGE_PIXELS})")
    least_h, least_w = crop or (SMALLEST, SMALLEST)
    if h < least_h or w < least_w:
        least = f"the crop of {least_w}x{least_h}: lower --crop-size" if crop else f"{least_w}x{least_h}, the least allowed"
        raise ValueError(f"{found}, which is smaller than {least}")


def load_image(path):
    """A PNG or JPEG file of any 8-bit mode (colour, grey, palette, with alpha) -> tv_tensors.Image (3, H, W) uint8.

    Turned as EXIF says, as a viewer shows it. Raises ValueError for anything else, damaged files and those of more than
    PIL.Image.MAX_IMAGE_PIXELS included.
    """
    with _open(path) as image:
        return tv_tensors.Image(torch.from_numpy(_pixels(path, image, "RGB")).permute(2, 0, 1))


def load_label_ids(path):
    """A PNG of Cityscapes label ids, grey or palette -> tv_tensors.Mask (H, W) uint8 of those ids. Raises as load_image."""
    with _open(path, is_label=True) as image:
        ids = _pixels(path, image).astype(np.uint8)
        _check_palette(path, image, np.unique(ids))
    if unknown := np.flatnonzero(np.bincount(ids.ravel(), minlength=256) * ~KNOWN_IDS).tolist():
        raise ValueError(f"{printable(path)}: label ids {unknown} are not in Cityscapes' table (0 to 33)")
    return tv_tensors.Mask(torch.from_numpy(ids))


def _check_palette(path, image, indices):
    """ValueError for a palette image of Cityscapes' colours under other indices than its ids, as quantize() makes it."""
    colours = np.array(image.getpalette() or []).reshape(-1, 3) if image.mode == "P" else ()
    used = [(i, tuple(colours[i])) for i in indices if i < len(colours) and colours[i].any()]  # black is no evidence
    known = [(i, colour) for i, colour in used if colour in IDS_BY_COLOUR]
    if 2 * len(known) > len(used):
        for i, colour in known:
            if i not in IDS_BY_COLOUR[colour]:
                wrong = f"index {i} has the colour of label id {IDS_BY_COLOUR[colour][0]}"
                raise ValueError(f"{printable(path)}: Cityscapes' colours, but {wrong}: indices must be label ids")


def load_label(path):
    """The same file -> tv_tensors.Mask (H, W) uint8 of train ids, 0 to 18 and VOID."""
    return _to_train_ids(load_label_ids(path))


def _to_train_ids(label_ids):
    return tv_tensors.Mask(torch.from_numpy(TRAIN_IDS[label_ids.numpy()]))


def resize_to_width(frame, width):
    """Resize a tv_tensors Image (antialiased) or Mask (nearest-exact) to `width`, its height in proportion."""
    height, old_width = frame.shape[-2:]
    if old_width == width:
        return frame
    size = [_height_at(width, old_width, height), width]
    if isinstance(frame, tv_tensors.Mask):
        # Nearest-exact, since plain nearest shifts labels by half a pixel. As a plain image of one channel: for a Mask,
        # torchvision before 0.29 takes plain nearest whatever it is told.
        resized = v2.functional.resize(frame.as_subclass(torch.Tensor)[None], size, InterpolationMode.NEAREST_EXACT)
        return tv_tensors.Mask(resized[0])
    return v2.functional.resize(frame, size, InterpolationMode.BILINEAR, antialias=True)


def load_at_width(path, width, load=load_image, cache=None):
    """load(path), resized to `width`; `load` is load_image or load_label_ids, and raises what it raises.

    cache: a folder that keeps resized frames as PNG, which decode faster than larger originals. A kept frame is found by its
    original's path, size and modification time; a damaged one is made again.
    """
    if cache is None:
        return resize_to_width(load(path), width)
    now = os.stat(path)
    key = f"1 {os.path.abspath(path)} {now.st_size} {now.st_mtime_ns} {width}"  # count up when resizing changes
    kept = Path(cache) / f"{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:32]}.png"
    with contextlib.suppress(ValueError):
        return load(kept)
    original = load(path)
    frame = resize_to_width(original, width)
    if frame is not original:
        _keep(kept, frame)
    return frame


def _keep(path, frame):
    """Write an image or label ids as PNG, whole or not at all; a disk that is full is no reason to stop."""
    pixels = frame.numpy() if frame.ndim == 2 else frame.permute(1, 2, 0).contiguous().numpy()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _height_at(width, old_width, height):
    return max(1, round(height * width / old_width))


def colourise(train_ids):
    """(..., H, W) train ids -> (..., 3, H, W) uint8 in Cityscapes' colours, void black."""
    table = torch.zeros(256, 3, dtype=torch.uint8)
    table[: len(PALETTE)] = torch.from_numpy(PALETTE)
    return table[train_ids.long()].movedim(-1, -3)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


class Crops(Dataset):
    """Random crops of a shuffled data set without end: sample k depends on `seed`, `stream` and k alone.

    Every frame is used once before any is used twice, in a new order each time. Each sample is resized to `width`, cropped
    to `crop` (height, width), and flipped half of the time. Give (3, h, w) uint8, with `labelled` also (h, w) uint8 train ids.
    Two domains are sampled side by side, each shuffled on its own and the shorter one begun again, by
    torch.utils.data.StackDataset of two Crops of different `stream`.
    """

    def __init__(self, frames, width, crop, length, seed=0, stream=0, labelled=False, cache=None):
        self.frames, self.width, self.length, self.labelled = frames, width, length, labelled
        self.seed, self.stream, self.crop, self.cache = seed, stream, crop, cache
        self.augment = v2.Compose([v2.RandomCrop(crop), v2.RandomHorizontalFlip()])
        self.order = (None, None)  # the epoch it is for, and a permutation of the frames

    def __len__(self):
        return self.length

    def frame(self, k):
        epoch, position = divmod(k, len(self.frames))
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, self.stream, 0, epoch))
            self.order = (epoch, torch.randperm(len(self.frames), generator=generator))
        return self.frames[self.order[1][position]]

    def __getitem__(self, k):
        frame = self.frame(k)
        sample = [load_at_width(frame.image, self.width, cache=self.cache)]
        _check_size(frame.image, sample[0].shape[:0:-1], self.width, self.crop)
        if self.labelled:
            sample.append(_to_train_ids(load_at_width(frame.label, self.width, load_label_ids, self.cache)))
            if sample[1].shape != sample[0].shape[1:]:  # files may have changed since they were checked
                raise ValueError(f"{printable(frame.label)}: its size is not its image's")
        with torch.random.fork_rng(devices=[]):  # the transforms draw from torch's global generator
            torch.manual_seed(_mix(self.seed, self.stream, 1, k))
            sample = self.augment(*sample)
        if self.labelled:
            return tuple(part.as_subclass(torch.Tensor) for part in sample)
        return sample.as_subclass(torch.Tensor)


class Frames(Dataset):
    """Whole labelled frames in order: (3, h, w) uint8 at `width`, and (H, W) uint8 train ids at the label's own size."""

    def __init__(self, frames, width):
        self.frames, self.width = frames, width

    def __len__(self):
        return len(self.frames)

    def frame(self, i):
        return self.frames[i]

    def __getitem__(self, i):
        image, label = load_image(self.frames[i].image), load_label(self.frames[i].label)
        return resize_to_width(image, self.width).as_subclass(torch.Tensor), label.as_subclass(torch.Tensor)


def _mix(*numbers):
    """Some numbers -> one seed, such that neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def to_signed(images):
    """uint8 images of any shape -> float32 in [-1, 1], the range of the translator."""
    return images.float() / 127.5 - 1


def to_unit(images):
    """uint8 images of any shape -> float32 in [0, 1], the range of the task model."""
    return images.float() / 255


def print_shares(frames):
    """Print what part of the labels' pixels each class has."""
    counts = sum(_each(lambda frame: np.bincount(load_label(frame.label).flatten(), minlength=256), frames))
    for name, count in zip([*CLASS_NAMES, "void"], [*counts[: len(CLASS_NAMES)], counts[VOID]]):
        print(f"  {name:<14}{count / counts.sum():7.2%}")


def main():
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end with the reader of the list, as `head`
    parser = argparse.ArgumentParser(description="Find the frames of a data set, pair them with their labels, count them.")
    parser.add_argument("folder", metavar="DIR", help="a data set in GTA5's or in Cityscapes' layout")
    parser.add_argument("--split", default="train", help="of a Cityscapes layout, several joined by commas (default train)")
    parser.add_argument("--unlabelled", action="store_true", help="look at the images alone")
    parser.add_argument("--exclude", metavar="FILE", help="names of frames to leave out, one a line")
    parser.add_argument("--check-data", action="store_true", help="read all pixels, too, and list all that is wrong")
    args = parser.parse_args()
    folder = printable(args.folder)
    try:
        exclude = read_names(args.exclude) if args.exclude else ()
        data_set = (args.folder, args.split, not args.unlabelled, exclude)
        if args.check_data:
            count = 0
            for line in problems(*data_set):
                print(line, flush=True)
                count += 1
            if count:
                print(f"{folder}: {count} problem{'s' if count > 1 else ''}")
                sys.exit(2)
        frames = list_frames(*data_set)
        check_frames(frames)
        if args.check_data:
            print(f"{folder}: all {len(frames)} frames can be read")
            if not args.unlabelled:
                print_shares(frames)
            return
        sizes = sorted(set(_each(image_size, [frame.image for frame in frames])))
        some = ", ".join(f"{w}x{h}" for w, h in sizes[:5]) + (", ..." if len(sizes) > 5 else "")
        print(f"{folder}: {len(frames)} frames of {some}" + ("" if args.unlabelled else ", each with its label"), flush=True)
    except (ValueError, OSError) as error:
        print(f"data.py: {printable(error)}", file=sys.stderr)
        if isinstance(error, OSError) and error.filename is None:
            sys.stdout = None  # what it could not take is not tried again at exit
        sys.exit(2)


if __name__ == "__main__":
    main()
