"""Write OUT/results/index.html: the tables, figures, samples, loss curves and commands of a run in one file.

The page embeds its pictures and loads nothing. Its numbers come from OUT/results/*.csv and the log.csv of each run.
"""

import base64
import shlex
from html import escape
from string import Template

from PIL import Image

import files

CAPTIONS = {
    "table1.csv": "Table 1: Fréchet distance to the target's photographs; median seconds and peak MiB of a training step.",
    "table2.csv": "Table 2: scores on the target's val split, in percent: means, and the IoU of each class.",
    "table3.csv": "Table 3: IoU gap to the Oracle, in points; percentage of it that CLADA (recovered) and the others recover.",
    "translations.csv": "Translations without labels: checkerboard artefacts (1: none), % of pixels whose class is kept.",
    "translations.png": "Figure 3: frames of the source, and what each translator makes of them.",
    "segmentations.png": "Figure 4: frames of the target's val split, two models' predictions, and the ground truth.",
}
LOWER_IS_BETTER = ("FID", "frechet", "seconds", "wait", "peak", "checkerboard")  # starts of columns
NOT_RANKED = ("Source", "Source, resized", "Source Only", "Oracle", "Target")  # rows: bounds and references
NOT_LOSSES = ("iteration", "lr", "seconds_per_iteration", "wait_seconds", "peak_memory_mib")  # columns of log.csv
NOT_SHOWN = set("script version processes check device workers log_every save_every keep_every cache".split())  # in commands
VERSIONS = ("iterations", "version", "python", "torch", "device", "precision")  # of summary.json
COLOURS = ("#3b82f6", "#e8710a", "#16a34a", "#dc2626", "#a855f7", "#0891b2", "#a16207", "#ec4899")  # on white and on black
PAGE = Template("""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>CLADA: $name</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --page: #fff; --text: #1f2328; --line: #d1d9e0; --best: #d5f5df }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --text: #e6edf3; --line: #3d444d; --best: #14472a } }
body { margin: auto; max-width: 1100px; padding: 1rem; font: 16px/1.5 sans-serif; background: var(--page); color: var(--text) }
body { overflow-wrap: anywhere } h2 { margin: 2rem 0 1rem; border-bottom: 1px solid var(--line) } pre { white-space: pre-wrap }
dl { display: grid; grid-template-columns: fit-content(50%) 1fr; gap: .3rem 1rem } dd { margin: 0 } dt { opacity: .7 }
figure { margin: 0 0 1.5rem } figcaption { padding: .3rem 0; font-size: .9rem } span { display: inline-block }
.box { overflow-x: auto } table { border-spacing: 0; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .65rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child { position: sticky; left: 0; background: var(--page); text-align: left } .best { background: var(--best) }
figcaption span { margin-left: .8em } td.best { font-weight: bold } img, svg { display: block; max-width: 100% }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least, 20rem)), 1fr)); gap: 0 1.5rem }
.wide { --least: 30rem } text { fill: currentColor; font-size: 11px } h2 + :empty::after { content: "None yet." }
</style></head><body><h1>CLADA: $name</h1>
<p>Contrastive image translation and adversarial feature adaptation for semantic segmentation: what one run has produced.</p>
<dl>$state</dl><h2>Tables</h2><p>↑ higher is better, ↓ lower is better, <b class="best">best of its column</b> (bounds,
references and table 3 are not ranked)</p><div>$tables</div>$notes<h2>Figures</h2><div>$figures</div>
<section class="wide">$predictions</section><h2>Newest samples of each translator</h2><section class="wide">$samples</section>
<h2>Loss curves</h2><section>$charts</section><h2>Commands and versions</h2><div>$versions</div>
<details><summary>Commands</summary>$commands</details></body></html>
""")


def write_page(out, notes=()):
    """Write OUT/results/index.html from whatever OUT holds, with notes on table 2. The caller holds the lock of OUT/results."""
    results, newest = out / "results", {}
    paths = [path for kind in ("translators", "segmenters") for path in sorted(out.glob(f"{kind}/*/args.json"))]
    runs = {path.parent: files.read_json(path, "script", "iterations", "processes") for path in paths}
    logs = {run: files.read_csv(run / "log.csv", "iteration") for run in runs}
    for path in sorted(out.glob("translators/*/samples/[0-9]*.png"), key=lambda path: int(path.stem)):
        newest[path.parts[-3]] = path
    made = {results / name: caption for name, caption in CAPTIONS.items() if (results / name).is_file()}
    summaries = {str(run.relative_to(out)): files.read_json(path) for run in runs if (path := run / "summary.json").is_file()}
    versions = [{"run": name} | {key: summary.get(key, "") for key in VERSIONS} for name, summary in summaries.items()]
    overlays = {path: str(path.relative_to(results)) for path in sorted(results.glob("predictions/**/*_overlay.jpg"))}
    tables = [(files.read_csv(path), caption) for path, caption in made.items() if path.suffix == ".csv"]
    page = PAGE.substitute(
        name=escape(out.resolve().name),
        state="".join(f"<dt>{what}</dt><dd>{escape(names)}</dd>" for what, names in _state(out, runs, logs).items()),
        tables="".join(_table(rows, caption, caption[:7] != "Table 3") for rows, caption in tables if rows),
        notes="".join(f"<p>{escape(note)}</p>" for note in notes),
        figures="".join(_picture(path, caption) for path, caption in made.items() if path.suffix == ".png"),
        predictions="".join(_picture(path, caption) for path, caption in overlays.items()),
        samples="".join(_picture(path, f"{name}, step {int(path.stem)}") for name, path in sorted(newest.items())),
        charts="".join(_chart(str(run.relative_to(out)), rows) for run, rows in logs.items() if rows),
        versions=_table(versions, "Finished runs, and the versions that finished them.", ranked=False) if versions else "",
        commands="".join(f"<pre>{_command(args)}</pre>" for args in runs.values()),
    )
    files.write_whole(results / "index.html", page.encode(errors="backslashreplace"))


def _state(out, runs, logs):
    """What each stage has made, with the progress of unfinished runs, and which tables and figures are missing."""
    made = {"train_translator.py": [], "translate_dataset.py": [], "train_segmenter.py": [], "adapt_features.py": []}
    for run, args in runs.items():
        step = logs[run][-1]["iteration"] if logs[run] else 0
        progress = "" if (run / "weights.pt").is_file() else f" (unfinished: step {step} of {args['iterations']})"
        made.setdefault(args["script"], []).append(run.name + progress)
    for path in sorted(out.glob("translated/*/args.json")):
        done = len([*path.parent.glob("images/[!.]*.png")])
        total = files.read_json(path, "frames_of_source")["frames_of_source"]
        progress = "" if total.startswith(f"{done} ") else f" (unfinished: {done} of {total.partition(',')[0]})"
        made["translate_dataset.py"].append(path.parent.name + progress)
    lines = {f"Stage {number}, {script}": names for number, (script, names) in enumerate(made.items(), 1)}
    lines["Missing"] = [name for name in CAPTIONS if not (out / "results" / name).is_file()]
    return {what: ", ".join(names) or "none" for what, names in lines.items()}


def _table(rows, caption, ranked=True):
    """Rows (dicts with the same keys) as a table that scrolls sideways. ranked: mark the best number of each column."""
    first, *columns = rows[0]
    candidates = [row for row in rows if ranked and row[first] not in NOT_RANKED]
    lines = [f"<th>{escape(cell)}</th>" for cell in (first, *(row[first] for row in rows))]
    for column in columns:
        numbers = {float(row[column]) for row in candidates if row[column]}
        pick, arrow = (min, " ↓") if column.startswith(LOWER_IS_BETTER) else (max, " ↑")
        best = pick(numbers) if len(numbers) > 1 else None  # where all are equal there is no best
        lines[0] += f"<th>{escape(column)}{arrow if ranked else ''}</th>"
        for i, row in enumerate(rows, 1):
            is_best = row in candidates and row[column] and float(row[column]) == best
            lines[i] += f"<td{' class=best' if is_best else ''}>{escape(str(row[column]))}</td>"
    return f'<figure><figcaption>{caption}</figcaption><div class="box"><table><tr>{"<tr>".join(lines)}</table></div></figure>'


def _picture(path, caption):
    """A picture as a figure that embeds it as a JPEG."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((1280, 1920))
    source = f"data:image/jpeg;base64,{base64.b64encode(files.image_bytes(image, 'JPEG', quality=85)).decode()}"
    return f'<figure><img alt="{escape(caption)}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'


def _chart(name, rows):
    """The losses in the rows of a log.csv as an SVG line chart. The first row is the mean of all steps from 0 on."""
    losses, lines, legend = {}, "", ""
    for column in [column for column in rows[0] if column not in NOT_LOSSES]:
        points = [(int(row["iteration"]), float(row[column])) for row in (rows[0] | {"iteration": 0}, *rows) if row[column]]
        share = -(-len(rows) // 200)  # rows per point of a curve
        shares = [points[i : i + share] for i in range(0, len(points), share)]
        losses[column] = [(part[-1][0], sum(y for _, y in part) / len(part)) for part in shares]
    values = [y for points in losses.values() for _, y in points] or [0.0]
    low, high, last = min(values), max(values), int(rows[-1]["iteration"])
    for (column, points), colour in zip(losses.items(), COLOURS * len(losses)):
        places = [f"{44 + 310 * x / last:.1f},{122 - 112 * (y - low) / (high - low or 1):.1f}" for x, y in points]
        lines += f'<polyline stroke="{colour}" points="{" ".join(places)}"/>'
        legend += f'<span><b style="color: {colour}">■</b> {escape(column)}</span>'
    return f"""<figure><svg viewBox="0 0 360 140" fill="none" stroke-width="1.5" stroke-linejoin="round">
<path d="M44 10V122H354" stroke="currentColor" opacity=".4"/>{lines}<text x="40" y="15" text-anchor="end">{high:.3g}</text>
<text x="40" y="122" text-anchor="end">{low:.3g}</text><text x="44" y="136">0</text><text x="354" y="136" text-anchor="end">
step {last}</text></svg><figcaption><b>{escape(name)}</b>{legend}</figcaption></figure>"""


def _command(args):
    """The command line of a run, from its args.json without what does not change the result. Lines break between arguments."""
    pieces = [("python " if args["processes"] == 1 else f"torchrun --nproc-per-node={args['processes']} ") + args["script"]]
    for key, value in args.items():
        if key not in NOT_SHOWN and "_of_" not in key and value is not None and value is not False:
            text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
            pieces.append(f"--{key.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(text)}"))
    return " ".join(f"<span>{escape(piece)}</span>" for piece in pieces)
