"""Scores of task models, the paper's tables 1 to 3 and its figures 3 and 4.

    python evaluate.py --segmenter runs/clada --data cityscapes --split val --out table2.csv --name CLADA
    python evaluate.py --report runs/demo        # tables and figures from what run_all.sh left there

The first adds or replaces the model's row: mIoU, frequency-weighted IoU and pixel accuracy (equation 5) and the IoU of each
class, in percent, at the labels' own resolution. A class that does not occur in the truth is an empty cell and counts in
no mean (cityscapesscripts has 0 for it where it is predicted somewhere; all else is the same). As a library:
`confusion_matrix` and `scores`.
"""

import logging
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import files
import loading
import models
import runtime
import training

log = logging.getLogger("evaluate")

# The models of table 2 in its order, and the folders in which run_all.sh trains them; translators have the same names.
MODELS = {
    "Source Only": "source_only",
    "CycleGAN": "cyclegan",
    "CUT": "cut",
    "FastCUT": "fastcut",
    "FastCUT-L5": "fastcut_l5",
    "control": "control",
    "CLADA": "clada",
    "Oracle": "oracle",
}
MEANS = ("mIoU", "fwIoU", "pixel_accuracy")
FIGURE_ROWS, FIGURE_WIDTH = 4, 320  # frames a figure, pixels a picture


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def confusion_matrix(prediction, label, num_classes=19, ignore=255):
    """Count pixels by (truth, prediction): two integer tensors of one shape -> (C, C) int64, row = truth.

    Pixels whose label is `ignore` are left out. Raises ValueError for shapes that differ, and for ids outside 0 to C - 1.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ in shape")
    n = num_classes
    counted = label != ignore
    for name, ids in (("label", label), ("prediction", prediction)):
        least, most = ids.where(counted, 0).aminmax() if ids.numel() else (0, 0)
        if not 0 <= least <= most < n:
            raise ValueError(f"{name} holds class ids outside 0 to {n - 1}")
    # One number a pixel and one count over all: to take the counted pixels out first costs three times as much.
    pairs = torch.where(counted, label.int() * n + prediction.int(), n * n)
    return torch.bincount(pairs.flatten(), minlength=n * n + 1)[: n * n].view(n, n)


def scores(confusion):
    """(C, C) pixel counts n_ij of class i predicted as j -> equation 5, as fractions from 0 to 1.

    iou: (C,) float64, n_ii / (t_i + sum_j n_ji - n_ii), nan for classes absent from the truth; miou: its mean over the
    others; fwiou: its mean weighted by t_i; pixel_accuracy: sum n_ii / sum t_i. All nan if no pixel was counted.
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


def load_segmenter(run, flag, device):
    """A finished run of stage 3 or 4 -> (UNet in evaluation mode, the width it was trained at)."""
    segmenter = models.load_network(files.finished(run, flag), models.UNet, device)
    return segmenter.to(memory_format=torch.channels_last), training.trained_width(Path(run))


@torch.inference_mode()
def predict(segmenter, image, size, autocast):
    """(3, h, w) uint8 on the network's device -> (H, W) train ids; logits are resized to `size` (H, W) before the choice."""
    with autocast:
        logits = segmenter(data.to_unit(image)[None].contiguous(memory_format=torch.channels_last))
    if logits.shape[-2:] != size:
        logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
    return logits[0].argmax(0)


def evaluate(args, frames):
    """Predict labelled frames -> the summed confusion matrix; with --save-predictions also PNG files.

    Under torchrun each process predicts every n-th frame, and all have the whole sum.
    """
    device = runtime.pick_device(args.device)
    segmenter, width = load_segmenter(args.segmenter, "--segmenter", device)
    data.check_frames(frames, width)
    runtime.join_processes(device)
    precision = runtime.pick_precision(args.precision, device)
    autocast = runtime.autocast(device, precision)
    log.info("%s: %s; %d frames", args.segmenter, runtime.describe(device, precision), len(frames))
    frames = runtime.shard(frames)
    label_ids = np.array([c.id for c in data.CLASSES], dtype=np.uint8)
    total = torch.zeros(len(data.CLASSES), len(data.CLASSES), dtype=torch.int64)
    indices = [[i] for i in range(len(frames))]  # one at a time: frames differ in size
    batches = loading.batches(data.Frames(frames, width), indices, args.workers, device, collate=list)
    bar = tqdm(batches, desc=str(args.segmenter), total=len(frames), disable=not runtime.is_first())
    for frame, [(image, label)] in zip(frames, bar, strict=True):
        prediction = predict(segmenter, image, label.shape, autocast)
        total += confusion_matrix(prediction, label).cpu()
        if args.save_predictions:  # label ids under the names that the Cityscapes server takes
            ids = Image.fromarray(label_ids[prediction.cpu().numpy()])
            files.write_whole(args.save_predictions / f"{frame.name}_pred_labelIds.png", files.png_bytes(ids))
    return runtime.all_reduce_sum_(total)


def table_row(name, result):
    """The scores of one model as a row of table 2, in percent."""
    values = [result["miou"], result["fwiou"], result["pixel_accuracy"], *result["iou"].tolist()]
    cells = ["" if np.isnan(value) else f"{100 * value:.2f}" for value in values]
    return dict(zip(("model", *MEANS, *data.CLASS_NAMES), (name, *cells), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures


def report(out):
    """Write tables 1 to 3 and figures 3 and 4 of an $OUT of run_all.sh, and print the tables."""
    results = out / "results"
    if not (results / "table2.csv").is_file():
        raise ValueError(f"--report {out}: no {results / 'table2.csv'}, which evaluating a model with --out writes")
    table2 = read_table(results / "table2.csv")
    order = [name for name in MODELS if name in table2] + [name for name in table2 if name not in MODELS]
    files.write_csv(results / "table2.csv", [table2[name] for name in order])

    if rows := table1(out):
        files.write_csv(results / "table1.csv", rows)
        print_table("Table 1: distance to the target's photographs, and cost of a training step", rows)
    shown = ("model", *MEANS)
    print_table("Table 2: scores on the target's val split, percent", [{k: table2[m][k] for k in shown} for m in order])
    if missing := [name for name in ("Source Only", "CLADA", "Oracle") if name not in table2]:
        print(f"Table 3 and figure 4 need {', '.join(missing)} in table 2: left out")
    else:
        rows = table3(*(table2[name] for name in ("Source Only", "CLADA", "Oracle")))
        files.write_csv(results / "table3.csv", rows)
        print_table("Table 3: IoU lost to the Oracle, and the part of it that CLADA recovers, percent", rows)
        if "" not in (table2["CLADA"]["mIoU"], table2.get("control", {}).get("mIoU", "")):
            gain = float(table2["CLADA"]["mIoU"]) - float(table2["control"]["mIoU"])
            print(f"CLADA's adversary: {gain:+.2f} mIoU over the control, the same fine-tuning without it")
        segmentations_figure(out, results / "segmentations.png")
    translations_figure(out, results / "translations.png")


def read_table(path):
    """Rows of a table 2 by model. ValueError where a cell is neither empty nor a number, or a column is missing."""
    rows = files.read_csv(path, "model", *MEANS, *data.CLASS_NAMES)
    for row in rows:
        for name in (*MEANS, *data.CLASS_NAMES):
            try:
                float(row[name] or 0)
            except ValueError as error:
                raise ValueError(f"{path}: {row['model']!r} has {name} {row[name][:40]!r}, which is no number") from error
    return {row["model"]: row for row in rows}


def table1(out):
    """One row per translated data set: the distance that fid.py wrote, and the cost of its translator's training.

    Seconds of a step (without the wait for data), seconds of that wait, and peak memory.
    """
    path = out / "results" / "distances.csv"
    distances = {row.pop("model"): row for row in files.read_csv(path, *(["model"] if path.is_file() else []))}
    rows = []
    for name in ("Source", *MODELS):
        if name not in distances:
            continue
        row = {"model": name} | distances[name] | {"seconds_per_iteration": "", "wait_seconds": "", "peak_memory_mib": ""}
        if name != "Source":
            path = out / "translators" / MODELS[name] / "summary.json"
            summary = files.read_json(path, "seconds_per_iteration", "peak_memory_mib")
            try:
                row["seconds_per_iteration"] = f"{float(summary['seconds_per_iteration']):.5f}"
                row["wait_seconds"] = f"{float(summary['wait_seconds']):.5f}" if "wait_seconds" in summary else ""
                row["peak_memory_mib"] = str(int(summary["peak_memory_mib"]))
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{path}: seconds_per_iteration and peak_memory_mib must be numbers") from error
        rows.append(row)
    return rows


def table3(source, clada, oracle):
    """Rows of table 2 -> per class and for the mean: gaps to the Oracle, and (CLADA - Source) / (Oracle - Source).

    Classes without truth have empty cells, and so has the recovered part where the Oracle is not above Source Only.
    """
    rows = []
    for name in (*data.CLASS_NAMES, "mIoU"):
        row = {"class": name, "source_gap": "", "clada_gap": "", "recovered": ""}
        if "" not in (source[name], clada[name], oracle[name]):
            s, c, o = float(source[name]), float(clada[name]), float(oracle[name])
            row |= {"source_gap": f"{o - s:.2f}", "clada_gap": f"{o - c:.2f}"}
            if o > s:
                row["recovered"] = f"{100 * (c - s) / (o - s):.1f}"
        rows.append(row)
    return rows


def print_table(title, rows):
    columns = list(rows[0])
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
    print(f"\n{title}")
    for row in (dict(zip(columns, columns, strict=True)), *rows):
        cells = [f"{row[c]:<{w}}" if i == 0 else f"{row[c]:>{w}}" for i, (c, w) in enumerate(zip(columns, widths, strict=True))]
        print("  " + "  ".join(cells))


def translations_figure(out, path):
    """Figure 3: source frames beside each model's translation."""
    folders = {name: out / "translated" / folder for name, folder in MODELS.items()}
    folders = {name: folder for name, folder in folders.items() if any(folder.glob("images/[!.]*.png"))}
    translated = {name: data.list_frames(folder, labelled=False) for name, folder in folders.items()}
    if not translated:
        return
    source = files.read_json(out / "segmenters" / "source_only" / "args.json", "data")["data"]
    by_name = [
        {f.name: f.image for f in frames} for frames in ([*data.list_frames(source, labelled=False)], *translated.values())
    ]
    names = sorted(set.intersection(*map(set, by_name)))  # a set may be unfinished
    rows = [[picture(data.load_image(images[name])) for images in by_name] for name in spread(names)]
    save_figure(path, ["Source", *translated], rows)


def segmentations_figure(out, path):
    """Figure 4: test image, Source Only's prediction, CLADA's prediction, ground truth, void black."""
    target = files.read_json(out / "segmenters" / "oracle" / "args.json", "data")["data"]
    device = torch.device("cpu")
    names = ("Source Only", "CLADA")
    segmenters = [load_segmenter(out / "segmenters" / MODELS[name], "--report", device) for name in names]
    rows = []
    for frame in spread(data.list_frames(target, "val")):
        image, label = data.load_image(frame.image), data.load_label(frame.label)
        row = [picture(image)]
        for segmenter, width in segmenters:
            prediction = predict(segmenter, data.resize_to_width(image, width), label.shape, runtime.autocast(device, "fp32"))
            row.append(picture(data.colourise(prediction), Image.Resampling.NEAREST))
        rows.append([*row, picture(data.colourise(label), Image.Resampling.NEAREST)])
    save_figure(path, ["Target", *names, "Ground truth"], rows, legend=True)


def spread(items):
    """A few items, evenly spaced over a list."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(FIGURE_ROWS, len(items))).round().astype(int)]


def picture(image, resample=Image.Resampling.LANCZOS):
    """(3, H, W) uint8 -> a PIL image of the figure's width."""
    image = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return image.resize((FIGURE_WIDTH, max(1, round(image.height * FIGURE_WIDTH / image.width))), resample)


def save_figure(path, titles, rows, legend=False):
    """Rows of PIL pictures under column titles, with Cityscapes' colours named below where `legend` asks for it."""
    font, margin, line = ImageFont.load_default(15), 4, 24
    heights = [max(image.height for image in row) for row in rows]
    width = len(titles) * (FIGURE_WIDTH + margin) - margin
    per_line = width // 120
    legend_height = line * -(-len(data.CLASSES) // per_line) if legend else 0
    figure = Image.new("RGB", (width, line + sum(heights) + margin * len(rows) + legend_height), "white")
    draw = ImageDraw.Draw(figure)
    for column, title in enumerate(titles):
        draw.text((column * (FIGURE_WIDTH + margin) + FIGURE_WIDTH // 2, line // 2), title, "black", font, anchor="mm")
    y = line
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            figure.paste(image, (column * (FIGURE_WIDTH + margin), y))
        y += height + margin
    if legend:
        for i, (name, colour) in enumerate(zip(data.CLASS_NAMES, data.PALETTE.tolist(), strict=True)):
            left, top = i % per_line * 120, y + i // per_line * line
            draw.rectangle((left, top + 5, left + 14, top + 18), fill=tuple(colour))
            draw.text((left + 20, top + line // 2), name, "black", font, anchor="lm")
    files.write_whole(path, files.png_bytes(figure))


# ---------------------------------------------------------------------------------------------------------------------


def parse_args():
    parser = runtime.parser(__doc__.split("\n\n")[0], __doc__)
    parser.add_argument(
        "--report", type=runtime.path, metavar="OUT", help="write all tables and figures of an $OUT of run_all.sh"
    )
    parser.add_argument("--segmenter", type=runtime.run_path, metavar="RUN", help="a finished run of stage 3 or 4")
    parser.add_argument("--data", metavar="DIR", help="labelled data set, GTA5 or Cityscapes layout")
    parser.add_argument("--split", default="val", help="of a Cityscapes layout (default val)")
    parser.add_argument("--exclude", metavar="FILE", help="names of frames to leave out, one a line")
    parser.add_argument("--out", type=runtime.path, metavar="FILE.csv", help="the table that gets the row")
    parser.add_argument("--name", metavar="MODEL", help="of the row (default: the name of RUN)")
    parser.add_argument("--skip-done", action="store_true", help="do nothing if the table has RUN's row as it stands")
    parser.add_argument(
        "--save-predictions", type=runtime.path, metavar="DIR", help="write label ids as the Cityscapes server takes them"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="fp32",
        help="fp32 (default): float32 throughout, so that scores of any machine agree; bf16: autocast",
    )
    runtime.add_device_arguments(parser)
    args = parser.parse_args()
    if args.report is None and None in (args.segmenter, args.data):
        parser.error("either --report OUT, or --segmenter RUN and --data DIR")
    return args


def main():
    args = parse_args()
    if args.report is not None:
        if not (args.report / "results").is_dir():
            raise ValueError(f"--report {args.report}: no folder results there, which run_all.sh makes")
        with files.lock(args.report / "results", wait=True):
            report(args.report)
        return
    name = args.name or args.segmenter.name
    for flag, written in (("--out", args.out), ("--save-predictions", args.save_predictions)):
        files.check_out(written or os.devnull, args.data, flag=flag)
    weights, note = files.finished(args.segmenter, "--segmenter"), args.segmenter / "evaluation.json"
    frames = data.list_frames(args.data, args.split, exclude=data.read_names(args.exclude) if args.exclude else ())
    settings = {
        "frames": frames.fingerprint(),
        "content": frames.content(images=True),
        "weights": files.digest(weights),
        "precision": args.precision,
    }
    rows = list(read_table(args.out).values()) if args.out and args.out.is_file() else []
    if args.skip_done and note.is_file():
        noted = files.read_json(note)
        if noted.pop("row", None) in rows and noted == settings:
            print(f"{name}: evaluated")
            return
    if args.out and args.out.is_dir():
        raise ValueError(f"--out {args.out}: a folder, where a table's file is needed")
    for folder in filter(None, (args.out and args.out.parent, args.save_predictions)):
        if runtime.torchrun("RANK", 0) == 0:
            files.check_writable(folder)
    row = table_row(name, scores(evaluate(args, frames)))
    print(f"{name}: " + ", ".join(f"{mean} {row[mean]}" for mean in MEANS))
    if args.out and runtime.is_first():
        with files.lock(args.out.parent, wait=True):  # another model's row may be on its way into the same table
            files.clear_parts(args.out.parent)
            table = read_table(args.out) if args.out.is_file() else {}
            files.write_csv(args.out, list((table | {name: row}).values()))
        try:
            files.write_json(note, {"row": row} | settings)  # by which --skip-done sees that the row is this run's
        except OSError as error:
            log.warning("%s: not written (%s), so that --skip-done will evaluate again", note, error.strerror)


if __name__ == "__main__":
    runtime.run_script(main)
