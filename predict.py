"""Segment photographs that have no labels, with a task model of stage 3 or 4.

    python predict.py --segmenter runs/clada --images photos --out segmented --overlay
    python predict.py --segmenter runs/clada --images a.jpg b.png --out segmented

Photographs may differ in size. Each is segmented as in evaluate.py, and its result is as large as the photograph. OUT/NAME.png
is a palette PNG of label ids in their colours: Cityscapes', or those of the model's classes.csv. Subfolders of a plain folder
are kept. The same command resumes: finished photographs are skipped.
"""

import logging

import data
import files
import runtime
from check_data import check_frames, list_images
from evaluate import evenly_spaced, load_segmenter, open_predictions, predictions, save_prediction

log = logging.getLogger("predict")


def parse_args():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("--segmenter", type=runtime.path, required=True, metavar="RUN", help="a finished run of stage 3 or 4")
    images = "folders with PNG or JPEG files in them or below, data sets, or image files"
    add("--images", type=runtime.real_path, required=True, nargs="+", metavar="DIR|FILE", help=images)
    add("--split", default="val", help="split to use, in the Cityscapes layout (default val)")
    add("--out", type=runtime.path, required=True, metavar="DIR", help="folder for the predictions")
    add("--sample", type=runtime.positive_int, metavar="N", help="only N photographs, evenly spaced")
    add("--overlay", action="store_true", help="also write NAME_overlay.jpg, the colours over the photograph")
    runtime.add_compute_arguments(parser, precision="fp32")
    return parser.parse_args()


def is_done(frame, args):
    """Is the frame segmented, and not newer than its prediction?"""
    path, info = args.out / f"{frame.name}.png", frame.image.stat()
    changed = max(info.st_mtime, info.st_ctime)  # a copy that keeps an older time (cp -p, rsync) changes ctime
    paths = [path, path.with_name(f"{path.stem}_overlay.jpg")] if args.overlay else [path]
    return all(path.is_file() and path.stat().st_mtime >= changed for path in paths)


def main():
    args = parse_args()
    files.check_out(args.out, *args.images)
    weights = files.finished(args.segmenter, "--segmenter")
    frames = list_images(args.images, args.split, data.read_names(args.exclude))
    device = runtime.pick_device(args.device, deterministic=args.deterministic)
    runtime.join_processes(device)
    precision = runtime.pick_precision(args.precision, device)
    segmenter = load_segmenter(args.segmenter, device)
    if args.sample:
        frames = evenly_spaced(frames, args.sample)
    check_frames(frames, segmenter.width)
    if runtime.is_first():
        lock = open_predictions(args.out, weights, precision, args.images)  # noqa: F841 - held until main ends
    runtime.barrier()
    own = [frame for frame in frames[runtime.rank() :: runtime.processes()] if not is_done(frame, args)]
    done, where = sum(is_done(frame, args) for frame in frames), runtime.describe(device, precision)
    log.info("%s: %s; %d photographs, %d already segmented", args.out, where, len(frames), done)

    with files.writers(runtime.default_workers()) as submit:
        for frame, prediction, _ in predictions(segmenter, own, segmenter.classes, args, device, precision):
            submit(save_prediction, args.out, frame, prediction.cpu(), segmenter.classes, args.overlay)
    runtime.barrier()


if __name__ == "__main__":
    runtime.run_script(main)
