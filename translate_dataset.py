"""Stage 2 of CLADA: translate a labelled data set with a trained translator; the labels carry over.

    python translate_dataset.py --source gta5 --translator runs/fastcut_l5 --out translated/fastcut_l5
    python translate_dataset.py --unlabelled --source frames a.png b.jpg --translator runs/fastcut_l5 --out translated
    python translate_dataset.py --source gta5 --colours-of cityscapes --out translated/colour    # a control: no training at all

Writes OUT/images/NAME.png and OUT/labels/NAME.png (the source's label ids), GTA5's layout, at the width that the translator was
trained for, keeping the aspect ratio; labels are resized by nearest-exact (ours). The same command resumes an interrupted run.
Until it is finished, OUT/.unfinished makes scripts that read labels refuse OUT.
"""

import itertools
import logging
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
from PIL import Image

import colours
import data
import files
import loading
import models
import runtime
from check_data import check_frames, list_images

log = logging.getLogger("translate_dataset")
WRITERS = runtime.default_workers()  # threads that encode PNG files; a GPU translates faster than one of them encodes
COMPRESSION = 1  # of PNG files: much faster than the default, and the files are little larger
# translate: images (B, 3, h, w) uint8 on `device` -> the same; transfer: a ColourTransfer applied first, or None; width: of
# frames, in pixels; content: identifies both in args.json.
Translator = namedtuple("Translator", "translate transfer width content device")


def parse_args():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    source = "labelled data set, GTA5 or Cityscapes layout; with --unlabelled, folders and files of images"
    add("--source", type=runtime.real_path, required=True, nargs="+", metavar="DIR", help=source)
    add("--split", default="train", help="split to use, in the Cityscapes layout (default train)")
    add("--unlabelled", action="store_true", help="translate images only, into OUT/images; subfolders are kept")
    translators = parser.add_mutually_exclusive_group(required=True)
    translators.add_argument("--translator", type=runtime.path, metavar="RUN", help="finished run of train_translator.py")
    text = "instead of a translator, give each frame the colour statistics of a random photograph of this data set"
    translators.add_argument("--colours-of", type=runtime.real_path, metavar="DIR", help=text)
    add("--target-splits", default="train", help="with --colours-of: Cityscapes splits (default train)")
    add("--width", type=runtime.positive_int, default=1024, help="with --colours-of: output width (default 1024)")
    add("--out", type=runtime.path, required=True, metavar="DIR", help="the translated data set")
    add("--batch-size", type=runtime.positive_int, default=1, help="frames per batch (default 1)")
    add("--cache", type=runtime.path, metavar="DIR", help="folder for resized frames, shared with the trainers' --cache")
    runtime.add_compute_arguments(parser)
    args = parser.parse_args()
    if not args.unlabelled and len(args.source) > 1:
        parser.error("--source: one data set; several folders or files only with --unlabelled")
    return args


def read_pair(frame, width, classes, transfer, cache):
    """Frame -> (name, image (3, h, w) uint8, label ids as the bytes of a PNG, or None), both resized to `width`.

    transfer: a colours.ColourTransfer that the image goes through, or None. cache: as for data.load_at_width.
    """
    image = data.load_at_width(frame.image, width, cache=cache).as_subclass(torch.Tensor)
    if transfer:
        image = transfer(frame.name, image)
    if frame.label is None:
        return frame.name, image, None
    ids = data.load_at_width(frame.label, width, partial(data.load_label_ids, classes=classes), cache)
    label = Image.fromarray(ids.numpy())
    label.putpalette(classes.colours.tobytes())
    return frame.name, image, bytes(files.image_bytes(label, compress_level=COMPRESSION))


@torch.inference_mode()
def translate(generator, images, autocast):
    """(B, 3, H, W) uint8 -> (B, 3, H, W) uint8, the translation rounded to 8 bits."""
    x = data.to_signed(images).contiguous(memory_format=torch.channels_last)
    with autocast:
        fake = generator(x)
    return ((fake.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def open_out(args, settings, frames):
    """Record the settings that the images in --out depend on. ValueError if some were made with other settings."""
    saved = files.read_settings(args.out)
    if not saved and any(any((args.out / part).glob("*")) for part in parts(args)):
        raise ValueError(f"--out {args.out}: holds files that are not from this script; give another folder")
    is_finished = finished_names(args).issuperset(frame.name for frame in frames)  # else a damaged file may have been repaired
    files.check_settings(f"--out {args.out}", saved, settings, () if is_finished else ["content_of_source"])
    runtime.barrier()  # all processes have compared
    for part in parts(args):
        (args.out / part).mkdir(exist_ok=True)
    if runtime.is_first():
        if not is_finished:
            (args.out / data.UNFINISHED).touch()
        files.clear_parts(args.out)
        files.write_json(args.out / "args.json", settings)
        if frames.classes is not data.CITYSCAPES:
            files.write_whole(args.out / "classes.csv", (Path(args.source[0]) / "classes.csv").read_bytes())
        if frames.left_out:
            files.write_left_out(args.out, frames.left_out)
    runtime.barrier()


def parts(args):
    return ("images",) if args.unlabelled else ("images", "labels")


def finished_names(args):
    folders = [args.out / part for part in parts(args)]
    names = ({path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.png")} for folder in folders)
    return set.intersection(*names)


def translate_batches(translator, frames, batches, args):
    """Translate batches, sequences of indices into frames, and write images and labels; threads encode the PNGs meanwhile."""

    def write(name, fake, label):
        if label is not None:
            files.write_whole(args.out / "labels" / f"{name}.png", label)
        path = args.out / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(fake.cpu().numpy())  # waits for the GPU, so that the main thread need not
        files.write_whole(path, files.image_bytes(image, compress_level=COMPRESSION))

    options = dict(width=translator.width, classes=frames.classes, transfer=translator.transfer, cache=args.cache)
    pairs = loading.Frames(frames, partial(read_pair, **options))
    with loading.progress(sum(map(len, batches)), args.out) as bar, files.writers(WRITERS) as submit:
        for batch in loading.batches(pairs, batches, args.workers, translator.device, collate=list):  # sizes may differ
            for _, group in itertools.groupby(batch, key=lambda item: item[1].shape):
                names, images, labels = zip(*group, strict=True)
                translated = translator.translate(torch.stack(images)).permute(0, 2, 3, 1)
                for translation in zip(names, translated, labels, strict=True):
                    submit(write, *translation)
            bar.update(len(batch))


def load_translator(args, exclude, device, precision):
    """--translator or --colours-of -> Translator."""
    if args.colours_of:
        photographs = data.list_frames(args.colours_of, args.target_splits, labelled=False, exclude=exclude)
        transfer = colours.ColourTransfer(colours.photograph_statistics(photographs, args.width), args.seed)
        content = f"{photographs.fingerprint()}, {photographs.content()}, seed {args.seed}"
        return Translator(lambda images: images, transfer, args.width, content, torch.device("cpu"))
    weights, autocast = files.finished(args.translator, "--translator"), runtime.autocast(device, precision)
    G = models.load_network(weights, models.ResnetGenerator, device).to(memory_format=torch.channels_last)
    transfer = colours.ColourTransfer(**G.colours) if G.colours else None
    return Translator(lambda images: translate(G, images, autocast), transfer, G.width, files.digest(weights), device)


def main():
    args = parse_args()
    files.check_out(args.out, *args.source, args.translator, args.colours_of)
    if args.cache:
        files.check_out(args.cache, *args.source, args.translator, args.colours_of, flag="--cache")
    exclude = data.read_names(args.exclude)
    if args.unlabelled:
        frames = list_images(args.source, args.split, exclude)
    else:
        frames = data.list_frames(args.source[0], args.split, exclude=exclude)
    device = runtime.pick_device(args.device, tf32=True, deterministic=args.deterministic)
    runtime.join_processes(device)
    precision = runtime.pick_precision(args.precision, device, files.read_settings(args.out).get("precision"))
    translator = load_translator(args, exclude, device, precision)
    check_frames(frames, translator.width)

    if runtime.is_first():
        lock = files.lock(args.out)  # noqa: F841 - held until main ends
    settings = {
        "script": "translate_dataset.py",
        "frames_of_source": frames.fingerprint(),
        "content_of_source": frames.content(),
        "width": translator.width,
        "weights": translator.content,
        "unlabelled": args.unlabelled,
        "batch_size": args.batch_size,
        "precision": precision,
    }
    if args.cache:
        files.open_cache(args.cache)
    open_out(args, settings, frames)

    # Shard before skipping finished frames, so that a resumed run batches exactly as an uninterrupted one.
    batches = [range(len(frames))[i : i + args.batch_size] for i in range(0, len(frames), args.batch_size)]
    done = finished_names(args)
    own = batches[runtime.rank() :: runtime.processes()]
    own = [batch for batch in own if not done.issuperset(frames[i].name for i in batch)]
    count = sum(frame.name in done for frame in frames)
    where = runtime.describe(device, precision)
    log.info("%s: %s; %d frames, %d already translated", args.out, where, len(frames), count)
    if own:
        translate_batches(translator, frames, own, args)
    runtime.barrier()
    if runtime.is_first():
        (args.out / data.UNFINISHED).unlink(missing_ok=True)
    if count == len(frames):
        print(f"{args.out}: finished")


if __name__ == "__main__":
    runtime.run_script(main)
