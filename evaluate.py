"""Score a task model on labelled frames: equation 5 of the paper, one row of table 2.

    python evaluate.py --segmenter runs/clada --data cityscapes --split val --name CLADA
    python evaluate.py --segmenter runs/clada --data other_photos --out scores.csv        # add a row to a table of your own
    python evaluate.py --segmenter runs/clada --data cityscapes --save-predictions DIR    # also write what predict.py writes
    torchrun --standalone --nproc-per-node 4 evaluate.py ...                              # on four GPUs

The scores are mIoU, frequency-weighted IoU, pixel accuracy and the IoU of each class, in percent, at the resolution of the
labels (ours). They go into RUN/evaluation.json, from which report.py builds table 2, or with --out into that CSV file. A class
that is absent from the ground truth has an empty cell and is left out of the means. cityscapesscripts scores such a class 0 if
it is predicted anywhere; otherwise the two agree. To use the metrics elsewhere, import confusion_matrix and scores.
"""

import logging
import os
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import files
import loading
import models
import runtime
from check_data import check_frames

log = logging.getLogger("evaluate")
MEANS = ("mIoU", "fwIoU", "pixel_accuracy")
COLUMNS = ("model", *MEANS)  # of table 2, before those of the classes


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def confusion_matrix(prediction, label, num_classes=19, ignore=255):
    """Count pixels by (truth, prediction): two integer tensors of the same shape -> (C, C) int64, row = truth.

    Pixels labelled `ignore` are not counted. Raises ValueError if the shapes differ or an id is outside 0 to C - 1.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ in shape")
    n = num_classes
    counted = label != ignore
    for name, ids in (("label", label), ("prediction", prediction)):
        least, most = ids.where(counted, 0).aminmax() if ids.numel() else (0, 0)
        if not 0 <= least <= most < n:
            raise ValueError(f"{name} holds class ids outside 0 to {n - 1}")
    # Ignored pixels share one extra bin. Selecting the counted pixels first would take three times as long.
    pairs = torch.where(counted, label.int() * n + prediction.int(), n * n)
    return torch.bincount(pairs.flatten(), minlength=n * n + 1)[: n * n].view(n, n)


def scores(confusion):
    """(C, C) counts n_ij of pixels of class i predicted as j, t_i = sum_j n_ij -> scores of equation 5, from 0 to 1.

    iou: (C,) float64, n_ii / (t_i + sum_j n_ji - n_ii), nan for classes absent from the truth; miou: its mean over the
    other classes; fwiou: its mean weighted by t_i; pixel_accuracy: sum n_ii / sum t_i. All are nan if no pixel was counted.
    """
    n = confusion.double().cpu()
    hits, truth, predicted = n.diag(), n.sum(1), n.sum(0)
    iou = torch.where(truth > 0, hits / (truth + predicted - hits), torch.nan)
    return {
        "iou": iou,
        "miou": iou.nanmean().item(),
        "fwiou": ((truth * iou).nansum() / truth.sum()).item(),
        "pixel_accuracy": (hits.sum() / truth.sum()).item(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def load_segmenter(run, device):
    """The UNet of a finished run of stage 3 or 4, or of its weights.pt, in eval mode; its `classes` are data.Classes."""
    segmenter = models.load_network(run, models.UNet, device)
    segmenter.classes = data.Classes(segmenter.classes or data.CITYSCAPES.rows)
    return segmenter.to(memory_format=torch.channels_last)


def evenly_spaced(items, count):
    """At most `count` items of a list, the first and the last among them."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def read_frame(frame, width, classes=data.CITYSCAPES):
    """Frame -> [(3, h, w) uint8 at `width`, and if labelled (H, W) uint8 train ids at the label's own size]."""
    labels = [data.load_label(frame.label, classes)] if frame.label else []
    sample = [data.resize_to_width(data.load_image(frame.image), width), *labels]
    return [part.as_subclass(torch.Tensor) for part in sample]


@torch.inference_mode()
def predict(segmenter, image, size, precision="fp32"):
    """(3, h, w) uint8 on the network's device -> (H, W) train ids; the logits are resized to `size` (H, W) before argmax."""
    with runtime.autocast(image.device, precision):
        logits = segmenter(data.to_unit(image)[None].contiguous(memory_format=torch.channels_last))
    if logits.shape[-2:] != size:
        logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
    return logits[0].argmax(0)


def predictions(segmenter, frames, classes, args, device, precision):
    """Yield (frame, (H, W) train ids on `device`, labels) for each frame, at its own size.

    labels: [(H, W) train ids by `classes`], or [] where the frame has no label.
    """
    indices = [[i] for i in range(len(frames))]  # batches of one, as sizes differ
    dataset = loading.Frames(frames, partial(read_frame, width=segmenter.width, classes=classes))
    with loading.progress(len(frames), args.segmenter) as bar:
        for i, [(image, *labels)] in enumerate(loading.batches(dataset, indices, args.workers, device, collate=list)):
            yield frames[i], predict(segmenter, image, frames[i].size[::-1], precision), labels
            bar.update()


def open_predictions(out, weights, precision, images):
    """Lock a folder for predictions -> the lock. Raises ValueError if it holds predictions made otherwise, or other files."""
    saved = files.read_settings(out)
    folders = sorted({os.path.realpath(p) if os.path.isdir(p) else os.path.dirname(p) for p in images})
    settings = {"script": "predict.py", "weights": files.digest(weights), "precision": precision, "images": folders}
    if not saved and any(out.rglob("*.png")):
        raise ValueError(f"{out}: holds files that are not predictions; give another folder")
    files.check_settings(out, saved, settings)
    lock = files.lock(out)
    files.clear_parts(out)
    files.write_json(out / "args.json", settings)
    return lock


def save_prediction(out, frame, prediction, classes, overlay=False):
    """Write (H, W) train ids to OUT/NAME.png, as a palette PNG of label ids with the ids and colours of `classes`.

    overlay: also write NAME_overlay.jpg, these colours over the photograph.
    """
    path = out / f"{frame.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if overlay:
        mixed = (data.load_image(frame.image).float() + data.colourise(prediction, classes)) / 2
        photo = Image.fromarray(mixed.round().byte().permute(1, 2, 0).numpy())
        files.write_whole(path.with_name(f"{path.stem}_overlay.jpg"), files.image_bytes(photo, "JPEG", quality=90))
    ids = Image.fromarray(classes.label_ids[prediction.numpy()])
    ids.putpalette(classes.colours.tobytes())
    files.write_whole(path, files.image_bytes(ids))  # last: its file marks the frame as finished


def evaluate(args, frames, device, precision):
    """Predict labelled frames -> their confusion matrix; --save-predictions also writes the predictions.

    Under torchrun each process predicts every n-th frame and returns the matrix summed over all of them.
    """
    segmenter, classes = load_segmenter(args.segmenter, device), frames.classes
    classes.check_same(segmenter.classes, "--data and --segmenter")
    check_frames(frames, segmenter.width)
    log.info("%s: %s; %d frames", args.segmenter, runtime.describe(device, precision), len(frames))
    frames = frames[runtime.rank() :: runtime.processes()]
    total = torch.zeros(len(classes.names), len(classes.names), dtype=torch.int64)
    for frame, prediction, [label] in predictions(segmenter, frames, classes, args, device, precision):
        total += confusion_matrix(prediction, label, len(classes.names)).cpu()
        if args.save_predictions:
            save_prediction(args.save_predictions, frame, prediction.cpu(), classes)
    return runtime.all_reduce_sum_(total)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of table 2


def table_row(name, result, class_names=data.CLASS_NAMES):
    """The `scores` of a model -> its row of table 2: numbers by column, in percent, None where the score is nan."""
    values = [result["miou"], result["fwiou"], result["pixel_accuracy"], *result["iou"].tolist()]
    cells = (name, *(None if np.isnan(value) else 100 * value for value in values))
    return dict(zip((*COLUMNS, *class_names), cells, strict=True))


def rounded(row):
    """A row as it is printed and written to CSV: two digits, empty where there is no score."""
    return {column: cell if column == "model" else "" if cell is None else f"{cell:.2f}" for column, cell in row.items()}


def read_table(path):
    """A CSV file with the first columns of table 2 -> {model: row}, empty if there is no such file."""
    return {row["model"]: row for row in files.read_csv(path, *COLUMNS)}


def add_row(path, row):
    """Add a row to a CSV file, or replace the row of the same model. The lock lets several evaluations share the file."""
    with files.lock(path.parent, wait=True):
        files.write_csv(path, list((read_table(path) | {row["model"]: rounded(row)}).values()))


# ---------------------------------------------------------------------------------------------------------------------


def parse_args():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    add("--segmenter", type=runtime.path, required=True, metavar="RUN", help="a finished run of stage 3 or 4")
    add("--data", required=True, metavar="DIR", help="labelled data set, GTA5 or Cityscapes layout")
    add("--split", default="val", help="split of a Cityscapes layout (default val)")
    add("--name", metavar="MODEL", help="model name in the row (default: the name of RUN)")
    add("--out", type=runtime.path, metavar="FILE.csv", help="add the row to this table, instead of RUN/evaluation.json")
    done = "do nothing if RUN/evaluation.json is of the same weights, frames and settings"
    add("--skip-done", action="store_true", help=done)
    add("--save-predictions", type=runtime.path, metavar="DIR", help="also write predictions, as predict.py does")
    runtime.add_compute_arguments(parser, precision="fp32")  # so that scores agree between machines
    args = parser.parse_args()
    if args.skip_done and (args.out or args.save_predictions):
        parser.error("--skip-done cannot be combined with --out or --save-predictions, which are always written")
    return args


def main():
    args = parse_args()
    weights = files.finished(args.segmenter, "--segmenter").absolute()
    kept = weights.stem.removeprefix("weights")  # _0100000 of --keep-every
    name, evaluation = args.name or weights.parent.name + kept, weights.parent / f"evaluation{kept}.json"
    for flag, path in (("--out", args.out), ("--save-predictions", args.save_predictions)):
        if path:
            files.check_out(path, args.data, flag=flag)
    if args.out:
        read_table(args.out)  # before the work, not after it
    device = runtime.pick_device(args.device, deterministic=args.deterministic)
    runtime.join_processes(device)
    frames = data.list_frames(args.data, args.split, exclude=data.read_names(args.exclude))
    settings = {
        "frames": frames.fingerprint(),
        "content": frames.content(images=True),
        "weights": files.digest(weights),
        "precision": runtime.pick_precision(args.precision, device),
    }
    previous = files.read_json(evaluation, "row") if args.skip_done and evaluation.is_file() else {}
    is_done = settings.items() <= previous.items() and previous["row"]["model"] == name
    if runtime.all_gather(is_done)[0]:  # for all processes the same
        print(f"{name}: already evaluated")
        return
    if runtime.is_first():
        folder = args.out.parent if args.out else weights.parent
        folder.mkdir(parents=True, exist_ok=True)
        files.write_whole(folder / ".writable", bytes(65536))  # a full disk fails now, not after the work
        (folder / ".writable").unlink(missing_ok=True)
        if args.save_predictions:
            lock = open_predictions(args.save_predictions, weights, settings["precision"], [args.data])  # noqa: F841
    runtime.barrier()  # no process writes a prediction before the folder is checked
    row = table_row(name, scores(evaluate(args, frames, device, settings["precision"])), frames.classes.names)
    print(f"{name}: " + ", ".join(f"{mean} {rounded(row)[mean]}" for mean in MEANS))
    if runtime.is_first() and args.out:
        add_row(args.out, row)
    elif runtime.is_first():
        files.write_json(evaluation, {"row": row} | settings)


if __name__ == "__main__":
    runtime.run_script(main)
