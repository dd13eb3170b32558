"""Stage 2 of CLADA: translate a labelled data set with a trained translator; the labels carry over.

    python translate_dataset.py --source gta5 --translator runs/fastcut_l5 --out translated/fastcut_l5

Images are written at the width that the translator was trained for, height in proportion, labels beside them at the same
size by nearest-exact, in GTA5's layout: OUT/images/NAME.png and OUT/labels/NAME.png, Cityscapes ids. An interrupted run
is resumed by the same command.
"""

import collections
import itertools
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

import data
import files
import loading
import models
import runtime
import training

log = logging.getLogger("translate_dataset")
WRITERS = runtime.default_workers()  # threads that encode PNG files: a GPU translates faster than one does


def parse_args():
    parser = runtime.parser(__doc__.split("\n\n")[0], __doc__)
    parser.add_argument(
        "--source", type=runtime.real_path, required=True, metavar="DIR", help="labelled data set, GTA5 or Cityscapes layout"
    )
    parser.add_argument("--split", default="train", help="of a Cityscapes layout (default train)")
    parser.add_argument(
        "--translator", type=runtime.run_path, required=True, metavar="RUN", help="a finished run of train_translator.py"
    )
    parser.add_argument("--out", type=runtime.path, required=True, metavar="DIR", help="the translated data set")
    parser.add_argument("--exclude", metavar="FILE", help="names of frames to leave out, one a line")
    parser.add_argument("--restart", action="store_true", help="throw away the frames that OUT holds and begin anew")
    parser.add_argument("--batch-size", type=runtime.positive_int, default=1, help="frames at a time (default 1)")
    runtime.add_compute_arguments(parser)
    runtime.add_device_arguments(parser)
    return parser.parse_args()


class ResizedPairs(Dataset):
    """Frame i -> (name, image (3, h, w) uint8, label ids (h, w) uint8), both at `width`."""

    def __init__(self, frames, width):
        self.frames, self.width = frames, width

    def __len__(self):
        return len(self.frames)

    def frame(self, i):
        return self.frames[i]

    def __getitem__(self, i):
        frame = self.frames[i]
        image = data.resize_to_width(data.load_image(frame.image), self.width)
        ids = data.resize_to_width(data.load_label_ids(frame.label), self.width)
        return frame.name, image.as_subclass(torch.Tensor), ids.as_subclass(torch.Tensor)


@torch.inference_mode()
def translate(generator, images, autocast):
    """(B, 3, H, W) uint8 -> (B, 3, H, W) uint8, the translation rounded to whole levels."""
    x = data.to_signed(images).contiguous(memory_format=torch.channels_last)
    with autocast:
        fake = generator(x)
    return ((fake.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def write_png(path, array, palette=None):
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette)
    files.write_whole(path, files.png_bytes(image, compress_level=1))  # much faster than the default level, and little larger


def check_disk(out, frames, width):
    """ValueError if the free space is less than what the translation will take (about 2 bytes a pixel as PNG)."""
    w, h = data.image_size(frames[0].image)
    needed, free = len(frames) * 2 * width * round(h * width / w), shutil.disk_usage(out).free
    if free < needed:
        raise ValueError(f"--out {out}: {needed / 2**20:,.1f} MiB needed for {len(frames)} frames, {free / 2**20:,.1f} free")


def main():
    args = parse_args()
    files.check_out(args.out, args.source, args.translator)
    frames = data.list_frames(args.source, args.split, exclude=data.read_names(args.exclude) if args.exclude else ())
    weights = files.finished(args.translator, "--translator")
    width = training.trained_width(args.translator)
    data.check_frames(frames, width)

    device = runtime.pick_device(args.device, tf32=True, deterministic=args.deterministic)
    runtime.join_processes(device)
    generator = models.load_network(weights, models.ResnetGenerator, device).to(memory_format=torch.channels_last)

    # What the output depends on: a folder that was begun with something else is not gone on with.
    begun = args.out / "args.json"
    if runtime.is_first():
        lock = files.lock(args.out)  # noqa: F841 - held as long as the process lives
    was = files.read_json(begun) if begun.is_file() else {}
    if not was and any((args.out / "images").glob("*")):
        raise ValueError(f"--out {args.out}: holds images that are not from this script; give another folder")
    precision = was.get("precision") if args.precision == "auto" and not args.restart else None
    precision = precision or runtime.pick_precision(args.precision, device)
    facts = {"frames_of_source": frames.fingerprint(), "content_of_source": frames.content()}
    facts |= {"width": width, "weights": files.digest(weights), "batch_size": args.batch_size, "precision": precision}
    changed = [key for key in facts if key in was and was[key] != facts[key] and not args.restart]
    if changed == ["content_of_source"] and not finished_names(args.out).issuperset(frame.name for frame in frames):
        log.warning("%s: files of --source have changed since it was started", args.out)  # a damaged one may have been mended
    elif changed:
        listed = ", ".join(f"{key} (was {was[key]}, is now {facts[key]})" for key in changed)
        raise ValueError(
            f"--out {args.out}: begun with another {listed}; give another --out, or --restart to throw away what is there"
        )
    runtime.barrier()
    if runtime.is_first():
        prepare(args.out, facts, args.restart)
        if frames.left_out:
            files.write_left_out(args.out, frames.left_out)
    runtime.barrier()

    # Batches are cut, and dealt out to processes, before finished ones are left out: what stands beside a frame, and who
    # translates it, is the same in an interrupted run.
    batches = [frames[i : i + args.batch_size] for i in range(0, len(frames), args.batch_size)]
    done = finished_names(args.out)  # again: --restart removes them
    own = [batch for batch in runtime.shard(batches) if not done.issuperset(frame.name for frame in batch)]
    left = [frame for frame in frames if frame.name not in done]
    where = runtime.describe(device, precision)
    log.info("%s: %s; %d frames, %d of them done", args.out, where, len(frames), len(frames) - len(left))
    if left:
        check_disk(args.out, left, width)
    if own:
        translate_batches(generator, own, width, args, device, precision)
    runtime.barrier()
    if not left:
        print(f"{args.out}: finished")


def finished_names(out):
    return set.intersection(*({path.stem for path in (out / part).glob("[!.]*.png")} for part in ("images", "labels")))


def prepare(out, facts, restart):
    """The folders, without what a killed run or, with `restart`, any run before has left there."""
    for folder in (out, out / "images", out / "labels"):
        folder.mkdir(exist_ok=True)
        files.clear_parts(folder)
    if restart:
        for frame in itertools.chain(*((out / part).glob("[!.]*.png") for part in ("images", "labels"))):
            frame.unlink()
    files.write_json(out / "args.json", facts)


def translate_batches(generator, batches, width, args, device, precision):
    """Write the translations of lists of frames, and their labels. Threads encode PNG files while the generator goes on."""
    frames = [frame for batch in batches for frame in batch]
    starts = itertools.accumulate(map(len, batches), initial=0)
    indices = [range(start, start + len(batch)) for start, batch in zip(starts, batches, strict=False)]
    palette = [channel for color in _id_colours() for channel in color]

    def write(name, fake, label):
        write_png(args.out / "labels" / f"{name}.png", label.numpy(), palette)
        write_png(args.out / "images" / f"{name}.png", fake.numpy())  # last: it says that the pair is done

    with (
        tqdm(total=len(frames), desc=str(args.out), disable=not runtime.is_first()) as bar,
        ThreadPoolExecutor(WRITERS) as pool,
    ):
        written = collections.deque()
        for batch in loading.batches(ResizedPairs(frames, width), indices, args.workers, collate=list):  # sizes differ
            for _, group in itertools.groupby(batch, key=lambda item: item[1].shape):
                names, images, labels = zip(*group, strict=True)
                images = torch.stack(images).to(device)
                fakes = translate(generator, images, runtime.autocast(device, precision)).permute(0, 2, 3, 1).cpu()
                written.extend(map(partial(pool.submit, write), names, fakes, labels))
            while len(written) > 4 * WRITERS:  # few wait in memory, and what cannot be written is known soon
                written.popleft().result()
            bar.update(len(batch))
        for pair in written:
            pair.result()


def _id_colours():
    colours = [(0, 0, 0)] * 256
    for c in data.Cityscapes.classes:
        if c.id >= 0:
            colours[c.id] = c.color
    return colours


if __name__ == "__main__":
    runtime.run_script(main)
