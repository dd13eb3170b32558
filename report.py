"""Build the paper's tables 1 to 3 and figures 3 and 4 from the folder that run_all.sh fills.

    python report.py runs/demo

It reads OUT/distances/*.json (from fid.py), OUT/translators/*/summary.json, OUT/segmenters/*/evaluation.json (from
evaluate.py) and OUT/translated, and writes OUT/results: table1.csv, table2.csv, table3.csv, translations.csv (translations
judged without labels), translations.png (figure 3), segmentations.png (figure 4) and index.html, one page with all of it.
It prints the tables, and says what is missing for those that cannot be made yet. With --scale below 1 it also prints what
the whole experiment would take.
"""

import itertools
from pathlib import Path

import numpy as np
import torch

import data
import files
import results_page
import runtime
from evaluate import COLUMNS, MEANS, evenly_spaced, load_segmenter, predict, rounded

# Models -> folders of their runs. Colour transfer, FastCUT and the controls are not in the paper's table 2.
MODELS = {
    "Source Only": "source_only",
    "colour transfer": "colour",
    "CycleGAN": "cyclegan",
    "CUT": "cut",
    "FastCUT": "fastcut",
    "FastCUT-L5": "fastcut_l5",
    "control without target": "no_target",
    "control": "control",
    "CLADA": "clada",
    "Oracle": "oracle",
}
SOURCES = {"Source": "source", "Source, resized": "source_resized"}  # frames at their own size, and at the translations' width
COST = {"seconds_per_iteration": ".5f", "wait_seconds": ".5f", "peak_memory_mib": ".0f"}  # columns of table 1, and their format
LEAST_GAP = 0.5  # points of IoU between Source Only and Oracle below which a part of their gap says nothing (ours)
INPUTS = ("distances/*.json", "segmenters/*/evaluation.json")
LEAST_OPEN = 0.1  # share of steps with an open gate below which CLADA's row is marked (ours); adapt_features.py warns there
FIGURE_ROWS, JUDGED = 4, 16  # frames per figure, and per translator in translations.csv


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def table1(out):
    """Rows of table 1, one per data set compared with the target: its distance, and the cost of training its translator.

    The cost is the median time of a training step and of the wait for its data, in seconds, and the peak memory in MiB.
    Raises ValueError naming a file whose entries are not numbers.
    """
    numbers = {}
    for model, name in {**SOURCES, **MODELS}.items():
        distance, cost = out / "distances" / f"{name}.json", out / "translators" / name / "summary.json"
        if distance.is_file():
            numbers[model] = read_numbers(distance) | (read_numbers(cost, *COST) if cost.is_file() else {})
    kinds = dict.fromkeys(key for row in numbers.values() for key in row if key not in COST)  # one, unless FID_WEIGHTS changed
    formats = dict.fromkeys(kinds, ".6g") | COST
    return [
        {"model": model} | {column: format(row[column], spec) if column in row else "" for column, spec in formats.items()}
        for model, row in numbers.items()
    ]


def read_numbers(path, *keys):
    """The numbers in a JSON object, {key: number}: all of them, or those of `keys` that it has. Raises ValueError naming it."""
    content = files.read_json(path)
    numbers = {key: content[key] for key in keys or content if key in content}
    if not all(isinstance(number, (int, float)) for number in numbers.values()):
        raise ValueError(f"{path}: {', '.join(numbers)} must be numbers")
    return numbers


def table2(out):
    """{model: row} of table 2, the models of the paper first. Raises ValueError for rows that do not belong in one table."""
    rows, first, names = {}, None, {name: model for model, name in MODELS.items()}
    for path in sorted(out.glob("segmenters/*/evaluation.json")):
        settings = files.read_json(path, "row")
        row = settings["row"]
        row["model"] = names.get(path.parent.name, row["model"])
        frames = settings.get("frames"), settings.get("content")
        first = first or (path, frames)
        if frames != first[1]:
            raise ValueError(f"{path}: evaluated on other frames than {first[0]}; evaluate both on the same, or delete one")
        if row["model"] in rows:
            raise ValueError(f"{path}: the name {row['model']!r} is taken by another run; evaluate one with another --name")
        rows[row["model"]] = row
    return {model: rows[model] for model in (*MODELS, *rows) if model in rows}


def recovered(source, model, oracle):
    """The part of the gap between Source Only and Oracle that a model closes, in percent: (model - source) / (oracle - source)
    (ours: the paper's formula is lost; its text says "recovers approx, 39% mIoU lost to domain shift").

    None where a score is missing (None) or the gap is below LEAST_GAP. Above 100 if the model beats the Oracle.
    """
    if None in (source, model, oracle) or oracle - source < LEAST_GAP:
        return None
    return 100 * (model - source) / (oracle - source)


def table3(rows):
    """{model: row of table 2} -> rows of table 3, one per class and one for the mean.

    Columns: the gaps of Source Only and of CLADA to the Oracle, the part of the gap that CLADA recovers, and after them
    the part that each other model recovers. Cells are empty where there is no such number.
    """
    others, table = [model for model in rows if model not in ("Source Only", "CLADA", "Oracle")], []
    for name in [name for name in rows["Oracle"] if name not in COLUMNS] + ["mIoU"]:
        scores = {model: row[name] for model, row in rows.items()}
        source, clada, oracle = (scores.get(model) for model in ("Source Only", "CLADA", "Oracle"))
        gaps = [None if None in (score, oracle) else oracle - score for score in (source, clada)]
        parts = [recovered(source, score, oracle) for score in (clada, *(scores[model] for model in others))]
        cells = [*("" if gap is None else f"{gap:.2f}" for gap in gaps), *("" if p is None else f"{p:.1f}" for p in parts)]
        table.append(dict(zip(("class", "source_gap", "clada_gap", "recovered", *others), (name, *cells), strict=True)))
    return table


def print_table(title, rows):
    """Print rows (dicts of strings with the same keys) in aligned columns."""
    columns = list(rows[0])
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
    print(f"\n{title}")
    for row in (dict(zip(columns, columns, strict=True)), *rows):
        cells = [f"{row[c]:<{w}}" if i == 0 else f"{row[c]:>{w}}" for i, (c, w) in enumerate(zip(columns, widths, strict=True))]
        print("  " + "  ".join(cells))


def write_tables(out):
    """Write and print the tables that can be made -> notes on table 2."""
    results, scores, notes = out / "results", table2(out), []
    if rows := table1(out):
        files.write_csv(results / "table1.csv", rows)
        print_table(results_page.CAPTIONS["table1.csv"], rows)
        print("Source: frames at their own size. Resized: at the translations' width, for comparison with them.")
    else:
        print(f"Table 1 needs {out / INPUTS[0]}: left out")
    if not scores:
        print(f"Tables 2 and 3 need {out / INPUTS[1]}: left out")
        return notes
    rows = [rounded(row) for row in scores.values()]
    files.write_csv(results / "table2.csv", rows)
    shown, notes = [{c: row[c] for c in ("model", *MEANS)} for row in rows], shut_gate(out)
    for row in shown:
        row["model"] += "*" if notes and row["model"] == "CLADA" else ""
    print_table("Table 2: scores on the target's val split, percent", shown)
    gains = {"more steps": ("control without target", "FastCUT-L5"), "target frames": ("control", "control without target")}
    for what, (better, worse) in (gains | {"the adversary": ("CLADA", "control")}).items():
        if better in scores and worse in scores:
            notes.append(f"Stage 4, {what}: {scores[better]['mIoU'] - scores[worse]['mIoU']:+.2f} mIoU ({better} - {worse})")
    for note in notes:
        print(note)
    if missing := [model for model in ("Source Only", "Oracle") if model not in scores]:
        print(f"Table 3 needs {', '.join(missing)} in table 2: left out")
        return notes
    files.write_csv(results / "table3.csv", table3(scores))
    print_table(results_page.CAPTIONS["table3.csv"], table3(scores))
    return notes


def shut_gate(out):
    """A list with one note if the adversary took part in few of CLADA's steps, else an empty one."""
    path = out / "segmenters" / MODELS["CLADA"] / "summary.json"
    gate = read_numbers(path, "gate_open_steps", "gate_steps") if path.is_file() else {}
    if len(gate) < 2 or gate["gate_open_steps"] >= LEAST_OPEN * gate["gate_steps"]:
        return []
    took_part = "{gate_open_steps} of {gate_steps} steps".format(**gate)
    return [f"* CLADA: the adversary took part in {took_part}, so CLADA is effectively its control"]


# ---------------------------------------------------------------------------------------------------------------------
# Translations, judged without labels


def checkerboard(images):
    """Strength of checkerboard artefacts in images (3, H, W) uint8: 1 means none (ours).

    Two transposed convolutions leave a grid with periods of 2 and 4 pixels (Odena et al. 2016). The strength is the mean power
    at these periods over that at the three frequencies on each side, averaged over both periods, rows and columns.
    """
    ratios = []
    for axis, k in itertools.product((1, 2), (2, 4)):
        grid = beside = 0.0
        for image in images:
            length = image.shape[axis] // 4 * 4
            lines = image.double().mean(0).movedim(axis - 1, -1)[..., :length]
            power = torch.fft.rfft(lines - lines.mean()).abs().square().mean(0)
            at = length // k
            grid += power[at].item()
            beside += power[[i for i in range(at - 3, min(at + 4, len(power))) if i != at]].mean().item()
        ratios.append((grid + 1e-9) / (beside + 1e-9))  # 1 for images of one colour
    return float(np.mean(ratios))


def judge_translations(out):
    """Rows of translations.csv, one per translator: its checkerboard artefacts, and how much of the content it keeps.

    checkerboard: see above; for the target, of its photographs at the translations' width. content_kept: percentage of
    pixels to which Source Only's model gives the same class in a frame and in its translation.
    """
    rows, run = [], out / "segmenters" / "source_only"
    if not all((run / name).is_file() for name in ("weights.pt", "args.json")):
        return rows
    source, exclude = data_set(run / "args.json", "data")
    originals = {frame.name: frame.image for frame in data.list_frames(source, labelled=False, exclude=exclude)}
    segmenter = load_segmenter(run, "cpu")
    for model, name in MODELS.items():
        frames = {path.stem: path for path in (out / "translated" / name / "images").glob("[!.]*.png")}
        names = evenly_spaced(sorted(frames.keys() & originals.keys()), JUDGED)
        if not names:
            continue
        translations, kept = [data.load_image(frames[name]) for name in names], []
        for name, translation in zip(names, translations, strict=True):
            pair = [data.resize_to_width(image, segmenter.width) for image in (data.load_image(originals[name]), translation)]
            one, two = (predict(segmenter, image, pair[0].shape[-2:]) for image in pair)
            kept.append((one == two).double().mean().item())
        artefacts, kept = f"{checkerboard(translations):.2f}", f"{100 * np.mean(kept):.1f}"
        rows.append({"model": model, "checkerboard": artefacts, "content_kept": kept})
    if rows and (settings := sorted(out.glob("translators/*/args.json"))):
        target, exclude = data_set(settings[0], "target")
        splits = files.read_json(settings[0], "target_splits")["target_splits"]
        listed = data.list_frames(target, splits, labelled=False, exclude=exclude)
        photographs = [data.load_at_width(f.image, translations[0].shape[-1]) for f in evenly_spaced(listed, JUDGED)]
        rows.insert(0, {"model": "Target", "checkerboard": f"{checkerboard(photographs):.2f}", "content_kept": ""})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def or_left_out(what, function, out):
    """function(out), or None if a data set is no longer where its run found it, as after copying OUT to another machine."""
    try:
        return function(out)
    except FileNotFoundError as error:
        print(f"{what}: left out ({error})")


def data_set(path, argument):
    """A data set of a run and the names that it excludes, from its args.json."""
    args = files.read_json(path, argument)
    is_there = args.get("exclude") and Path(args["exclude"]).is_file()
    if not Path(args[argument]).is_dir():
        raise FileNotFoundError(f"{args[argument]}, which {path} names, is not there")
    return args[argument], data.read_names(args["exclude"]) if is_there else ()


def translations_figure(out):
    """Figure 3: frames of the source, and what each translator makes of them."""
    folders = {model: out / "translated" / name for model, name in MODELS.items()}
    folders = {model: folder for model, folder in folders.items() if any(folder.glob("images/[!.]*.png"))}
    settings = out / "segmenters" / "source_only" / "args.json"
    if not folders or not settings.is_file():
        print(f"Figure 3 needs {settings if folders else out / 'translated/*/images'}: left out")
        return
    source, exclude = data_set(settings, "data")
    folders = {"Source": source, **folders}
    frames = [data.list_frames(folder, labelled=False, exclude=exclude) for folder in folders.values()]
    images = [{frame.name: frame.image for frame in listed} for listed in frames]
    names = sorted(set.intersection(*map(set, images)))  # stage 2 may still be at work
    rows = [[data.load_image(paths[name]) for paths in images] for name in evenly_spaced(names, FIGURE_ROWS)]
    files.write_figure(out / "results" / "translations.png", list(folders), rows)


def segmentations_figure(out):
    """Figure 4: frames of the target's val split, the predictions of Source Only and CLADA, and the ground truth."""
    models = ("Source Only", "CLADA")
    runs = [out / "segmenters" / MODELS[model] for model in models]
    needed = [run / name for run in runs for name in ("weights.pt", "evaluation.json")]  # evaluated: the target has labels
    if missing := [path for path in needed if not path.is_file()]:
        print(f"Figure 4 needs {', '.join(map(str, missing))}: left out")
        return
    target, exclude = data_set(runs[1] / "args.json", "target")
    segmenters = [load_segmenter(run, "cpu") for run in runs]
    frames, rows = data.list_frames(target, "val", exclude=exclude), []
    for frame in evenly_spaced(frames, FIGURE_ROWS):
        image, label = data.load_image(frame.image), data.load_label(frame.label, frames.classes)
        maps = [predict(s, data.resize_to_width(image, s.width), label.shape) for s in segmenters]
        rows.append([image, *(data.colourise(ids, frames.classes) for ids in (*maps, label))])
    legend = dict(zip(frames.classes.names, map(tuple, frames.classes.palette.tolist()), strict=True))
    files.write_figure(out / "results" / "segmentations.png", ["Target", *models, "Ground truth"], rows, legend)


# ---------------------------------------------------------------------------------------------------------------------
# Forecast


def forecast(out, scale):
    """What run_all.sh would take with ITERATIONS_SCALE=1 after a trial with `scale` -> rows of a table, one per script.

    A trainer's further steps take as long as the trial's; everything else takes the time that OUT/times.csv has for it.
    """
    seconds, memory, longest, disk = {}, {}, {}, {"translate_dataset.py": size_of(out / "translated")}
    for row in files.read_csv(out / "times.csv", "script", "stage", "seconds"):  # a stage that was resumed has several rows
        key = row["script"], row["stage"]
        if row["seconds"].isdecimal():  # a full disk or a power failure may have cut the last line
            longest[key] = max(longest.get(key, 0), float(row["seconds"]))
    for (script, _), wall in longest.items():
        seconds[script] = seconds.get(script, 0) + wall
    for path in sorted(out.glob("*/*/summary.json")):
        script, run = files.read_json(path.with_name("args.json"), "script")["script"], files.read_json(path, *COST)
        further = run["iterations"] * (1 / scale - 1)
        seconds[script] = seconds.get(script, 0) + further * (run["seconds_per_iteration"] + run["wait_seconds"])
        memory[script] = max(memory.get(script, 0), run["peak_memory_mib"])
        disk[script] = disk.get(script, 0) + size_of(path.parent)
    seconds["all"], memory["all"], disk["all"] = sum(seconds.values()), max(memory.values(), default=0), size_of(out)
    hours = {script: f"{wall / 3600:.3f}" for script, wall in seconds.items()}
    mib = {script: f"{peak:.0f}" for script, peak in memory.items()}
    gib = {script: f"{size / 2**30:.2f}" for script, size in disk.items()}
    columns = {"hours": hours, "peak memory, MiB": mib, "disk, GiB": gib}
    return [{"script": script} | {name: cells.get(script, "") for name, cells in columns.items()} for script in seconds]


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------------------


def parse_args():
    parser = runtime.parser(__doc__)
    parser.add_argument("out", type=runtime.path, metavar="OUT", help="the folder that run_all.sh fills")
    parser.add_argument("--scale", type=runtime.positive, default=1.0, help="the ITERATIONS_SCALE of OUT (default 1)")
    return parser.parse_args()


def main():
    args = parse_args()
    out = args.out
    if not any(path for pattern in INPUTS for path in out.glob(pattern)):
        raise ValueError(f"{out}: no {' and no '.join(INPUTS)} there; give the OUT of run_all.sh")
    with files.lock(out / "results", wait=True):
        files.clear_parts(out / "results")
        notes = write_tables(out)
        if rows := or_left_out("translations.csv", judge_translations, out):
            files.write_csv(out / "results" / "translations.csv", rows)
            print_table(results_page.CAPTIONS["translations.csv"], rows)
        or_left_out("Figure 3", translations_figure, out)
        or_left_out("Figure 4", segmentations_figure, out)
        results_page.write_page(out, notes)
        print(f"\nAll on one page: {out / 'results' / 'index.html'}")
    if args.scale < 1:
        title = f"Forecast from this trial (ITERATIONS_SCALE={args.scale:g}): the whole experiment on this machine would take"
        print_table(title, forecast(out, args.scale))
        print("The first steps of a run are slower than others: a trial of 100 steps or more per trainer is more exact.")


if __name__ == "__main__":
    runtime.run_script(main)
