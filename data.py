"""The data sets of CLADA: labelled frames of a game (GTA5), photographs of a dashcam (Cityscapes).

Copies alone into other projects: needs numpy, pillow, torch and torchvision. As a command it reads a data set's names
and headers and says what it found:

    python data.py DIR [--split train] [--unlabelled]

Two layouts, told apart by looking (Richter et al. 2016; Cordts et al. 2016):

    GTA5        DIR/images/NAME.{png,jpg}  DIR/labels/NAME.png                   one set of frames, no splits
    Cityscapes  DIR/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png  DIR/gtFine/SPLIT/CITY/*_gtFine_labelIds.png

Label files hold Cityscapes label ids (0 to 33); what leaves this file are train ids, 0 to 18, and VOID (255).
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
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

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
log = logging.getLogger("data")


class Frame(NamedTuple):
    """An image and, where it is known and wanted, its label map. `name` is unique within a data set."""

    name: str
    image: Path
    label: Path | None


# ---------------------------------------------------------------------------------------------------------------------
# Finding frames


def list_frames(root, split="train", labelled=True):
    """The frames of a data set of either layout, by name: a list of `Frame`.

    split: a Cityscapes split or several joined by commas ("train,train_extra"); the GTA5 layout has none and ignores it.
    labelled: False takes the images alone and does not look at labels. Pairs of the GTA5 layout whose two sizes differ,
    of which GTA5 has a few, are left out and named in the log. Raises ValueError for anything else that does not fit.
    """
    root = Path(root)
    if (root / "images").is_dir():
        frames = _gta5_frames(root, labelled)
    elif (root / "leftImg8bit").is_dir():
        frames = [frame for part in split.split(",") for frame in _cityscapes_frames(root, part, labelled)]
    elif root.is_dir():
        raise ValueError(f"{root}: neither GTA5's layout (images/, labels/) nor Cityscapes' (leftImg8bit/, gtFine/)")
    else:
        raise ValueError(f"{root}: no such folder")
    if not frames:
        raise ValueError(f"{root}: no image (.png, .jpg) where the layout has them, split {split}")
    return frames


def _gta5_frames(root, labelled):
    images = _by_stem(p for p in (root / "images").iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not labelled:
        return [Frame(name, image, None) for name, image in images.items()]
    if not (root / "labels").is_dir():
        raise ValueError(f"{root / 'labels'}: no such folder, which holds the labels of images/")
    labels = _by_stem((root / "labels").glob("*.png"))
    frames = _paired(images, labels)
    fitting = [f for f in frames if image_size(f.image) == image_size(f.label)]
    if frames and not fitting:
        raise ValueError(f"{root}: no label has the size of its image, first {frames[0].name}")
    if len(fitting) < len(frames):
        skipped = sorted({f.name for f in frames} - {f.name for f in fitting})
        log.warning("%s: %d of %d pairs left out, sizes differ: %s", root, len(skipped), len(frames), ", ".join(skipped))
    return fitting


def _cityscapes_frames(root, split, labelled):
    folder, ending = root / "leftImg8bit" / split, "_leftImg8bit"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such split")
    found = (p for p in folder.glob("*/*") if p.stem.endswith(ending) and p.suffix.lower() in IMAGE_SUFFIXES)
    images = _by_stem(found, ending)
    if not labelled:
        return [Frame(name, image, None) for name, image in images.items()]
    ending = "_gtFine_labelIds"
    frames = _paired(images, _by_stem((root / "gtFine" / split).glob(f"*/*{ending}.png"), ending))
    for frame in frames:
        if (size := image_size(frame.image)) != image_size(frame.label):
            raise ValueError(f"{frame.label}: {image_size(frame.label)} pixels, its image {size}")
    return frames


def _by_stem(paths, ending=""):
    """Sorted {stem without ending: path}; two files of one stem would be written to one name later."""
    found = {}
    for path in sorted(paths):
        if path.name.startswith("."):  # what an interrupted writer or a file manager left
            continue
        name = path.stem.removesuffix(ending)
        if name in found:
            raise ValueError(f"{path}: there is {found[name]} too, and names must be unique")
        found[name] = path
    return found


def _paired(images, labels):
    for name in images.keys() ^ labels.keys():
        lone, kind = (images[name], "label") if name in images else (labels[name], "image")
        raise ValueError(f"{lone}: has no {kind}")
    return [Frame(name, image, labels[name]) for name, image in images.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Reading frames


def _open(path):
    try:
        return Image.open(path)  # reads the header alone
    except OSError as error:  # PIL.UnidentifiedImageError is one
        raise ValueError(f"{path}: {error.strerror or 'not an image'}") from error


def _pixels(path, image, mode=None):
    try:
        return np.array(image if mode is None else image.convert(mode))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise ValueError(f"{path}: damaged image ({error})") from error


def image_size(path):
    """(width, height) in pixels, from the header alone."""
    with _open(path) as image:
        return image.size


def load_image(path):
    """An image file of any 8-bit mode (colour, grey, palette, with alpha) -> tv_tensors.Image (3, H, W) uint8."""
    with _open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{path}: {image.mode} pixels (16-bit or float), where 8 bits a channel are needed")
        return tv_tensors.Image(torch.from_numpy(_pixels(path, image, "RGB")).permute(2, 0, 1))


def load_label_ids(path):
    """A PNG of Cityscapes label ids, grey or palette -> tv_tensors.Mask (H, W) uint8 of those ids."""
    with _open(path) as image:
        if image.mode not in ("L", "P", "1"):
            raise ValueError(f"{path}: {image.mode} pixels, where 8-bit label ids are needed (grey or palette)")
        ids = _pixels(path, image).astype(np.uint8)
    if unknown := np.flatnonzero(np.bincount(ids.ravel(), minlength=256) * ~KNOWN_IDS).tolist():
        raise ValueError(f"{path}: label ids {unknown} are not in Cityscapes' table (0 to 33)")
    return tv_tensors.Mask(torch.from_numpy(ids))


def load_label(path):
    """The same file -> tv_tensors.Mask (H, W) uint8 of train ids, 0 to 18 and VOID."""
    return tv_tensors.Mask(torch.from_numpy(TRAIN_IDS[load_label_ids(path).numpy()]))


def resize_to_width(frame, width):
    """Resize a tv_tensors Image (antialiased) or Mask (nearest-exact) to `width`, its height in proportion."""
    height, old_width = frame.shape[-2:]
    if old_width == width:
        return frame
    size = [max(1, round(height * width / old_width)), width]
    if isinstance(frame, tv_tensors.Mask):
        # Nearest-exact, since plain nearest shifts labels by half a pixel. As a plain image of one channel: for a Mask,
        # torchvision before 0.29 takes plain nearest whatever it is told.
        resized = v2.functional.resize(frame.as_subclass(torch.Tensor)[None], size, InterpolationMode.NEAREST_EXACT)
        return tv_tensors.Mask(resized[0])
    return v2.functional.resize(frame, size, InterpolationMode.BILINEAR, antialias=True)


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

    def __init__(self, frames, width, crop, length, seed=0, stream=0, labelled=False):
        self.frames, self.width, self.length, self.labelled = frames, width, length, labelled
        self.seed, self.stream, self.crop = seed, stream, crop
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
        sample = [resize_to_width(load_image(frame.image), self.width)]
        if self.labelled:
            sample.append(resize_to_width(load_label(frame.label), self.width))
        height, width = sample[0].shape[-2:]
        if height < self.crop[0] or width < self.crop[1]:
            raise ValueError(
                f"{frame.image}: {width}x{height} at --width {self.width}, which is smaller than the crop of "
                f"{self.crop[1]}x{self.crop[0]}: lower --crop-size"
            )
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


def main():
    parser = argparse.ArgumentParser(description="Find the frames of a data set, pair them with their labels, count them.")
    parser.add_argument("folder", metavar="DIR", help="a data set in GTA5's or in Cityscapes' layout")
    parser.add_argument("--split", default="train", help="of a Cityscapes layout, several joined by commas (default train)")
    parser.add_argument("--unlabelled", action="store_true", help="look at the images alone")
    args = parser.parse_args()
    try:
        frames = list_frames(args.folder, args.split, labelled=not args.unlabelled)
        sizes = {image_size(f.image) for f in frames}
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    shown = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:5]) + (", ..." if len(sizes) > 5 else "")
    print(f"{args.folder}: {len(frames)} frames of {shown}" + ("" if args.unlabelled else ", each with its label"))


if __name__ == "__main__":
    main()
