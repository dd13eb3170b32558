"""What the method recovers, seed by seed: run_all.sh for each seed, one table over all of them and one picture.

    python tools/study.py runs/study --seeds 0 1 2 3 4 --baseline-seeds 0 1 2
    SETTINGS=demo SOURCE=day TARGET=dusk python tools/study.py runs/study_dusk --seeds 0 1 2

The variables of run_all.sh pass through, but for OUT, SEED, METHODS and PYTHON. OUT/seedN is what run_all.sh leaves for a
seed, OUT/seedN.log what it said. A finished seed takes a minute, an unfinished one goes on, and more may be asked for later.
CycleGAN and CUT, which take most of the time, are trained for --baseline-seeds alone. Written anew after each seed, from all
that OUT holds: OUT/study.csv, a row a seed and model, and OUT/study.png, a dot a seed and a bar for the mean.

*Recovered* is the part of the mIoU between Source Only and Oracle of the same seed that a model gains, in percent. Deviations
are over seeds, with n - 1. The demo draws its frames from the seed, too; a real pair is always the same.
"""

import os
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import evaluate
import files
import runtime

ROOT = Path(evaluate.__file__).resolve().parent
COLUMNS = (*evaluate.MEANS, "recovered")
BASELINES = ("cyclegan", "cut")
# Differences on the same seed that say what a step of the method gains.
PAIRS = (
    ("FastCUT-L5", "Source Only"),
    ("FastCUT-L5", "CycleGAN"),
    ("FastCUT-L5", "CUT"),
    ("CLADA", "FastCUT-L5"),
    ("CLADA", "CUT"),
    ("CLADA", "control"),
)


def run_seed(out, seed, methods, threads, running):
    """One run_all.sh -> its exit status. It stands in the list `running` for as long as it does."""
    environment = {"OUT": str(out / f"seed{seed}"), "SEED": str(seed), "METHODS": " ".join(methods), "PYTHON": sys.executable}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with open(out / f"seed{seed}.log", "a") as log:
        process = subprocess.Popen(["bash", ROOT / "run_all.sh"], env=os.environ | environment, stdout=log, stderr=log)
        running.append(process)
        process.wait()
        running.remove(process)
    return process.returncode


def read_seeds(out):
    """Rows of study.csv from every table 2 below OUT, by seed and then in table 2's order."""
    rows = []
    tables = {path.parts[-3].removeprefix("seed"): path for path in out.glob("seed*/results/table2.csv")}
    for seed in sorted(filter(str.isdigit, tables), key=int):
        table = evaluate.read_table(tables[seed])
        for model in (name for name in evaluate.MODELS if name in table):
            row = {"seed": seed, "model": model, **{mean: table[model][mean] for mean in evaluate.MEANS}, "recovered": ""}
            if "Source Only" in table and "Oracle" in table:
                gaps = evaluate.table3(table["Source Only"], table[model], table["Oracle"])
                row["recovered"] = gaps[-1]["recovered"]
            rows.append(row)
    return rows


def spread_of(values):
    """ "mean ± deviation" of some numbers, of one number itself."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def models_table(rows):
    """A row a model: mean and deviation of each score over the seeds."""
    table = []
    for model in evaluate.MODELS:
        own = [row for row in rows if row["model"] == model]
        if not own:
            continue
        cells = {column: [float(row[column]) for row in own if row[column]] for column in COLUMNS}
        cells = {column: spread_of(values) if values else "" for column, values in cells.items()}
        table.append({"model": model, "seeds": str(len(own))} | cells)
    return table


def pairs_table(rows):
    """A row a pair of models: their difference in mIoU on the same seed, and on how many seeds it is positive."""
    miou = {(row["seed"], row["model"]): float(row["mIoU"]) for row in rows}
    table = []
    for better, worse in PAIRS:
        seeds = [seed for seed, model in miou if model == better and (seed, worse) in miou]
        differences = [miou[seed, better] - miou[seed, worse] for seed in seeds]
        if differences:
            above = f"{sum(difference > 0 for difference in differences)} of {len(differences)}"
            table.append({"difference in mIoU": f"{better} - {worse}", "mean": spread_of(differences), "seeds above 0": above})
    return table


def draw(rows, path):
    """Two panels, mIoU and recovered part: a dot a seed, a bar for the mean."""
    models = [row["model"] for row in models_table(rows)]
    seeds = sorted({row["seed"] for row in rows}, key=int)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for panel, column, label in zip(panels, ("mIoU", "recovered"), ("mIoU, %", "recovered part of the gap, %"), strict=True):
        for x, model in enumerate(models):
            points = {row["seed"]: float(row[column]) for row in rows if row["model"] == model and row[column]}
            if points:
                panel.bar(x, statistics.mean(points.values()), color="0.85", width=0.7, zorder=1)
            for seed, value in points.items():
                k = seeds.index(seed)
                shift = 0.5 * (k / max(1, len(seeds) - 1) - 0.5)
                panel.scatter(x + shift, value, s=22, color=plt.cm.viridis(k / max(1, len(seeds))), zorder=2, label=seed)
        panel.set_xticks(range(len(models)), models, rotation=30, ha="right")
        panel.set_ylabel(label)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    panels[1].legend([handles[s] for s in seeds], seeds, title="seed", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(out):
    """Write study.csv and study.png, and return the rows."""
    rows = read_seeds(out)
    if rows:
        files.write_csv(out / "study.csv", rows)
        draw(rows, out / "study.png")
    return rows


def parse_args():
    parser = runtime.parser(__doc__.split("\n\n")[0], __doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the study; an unfinished one goes on")
    parser.add_argument("--seeds", type=runtime.seed, nargs="*", default=[0, 1, 2, 3, 4], help="(default 0 1 2 3 4)")
    parser.add_argument("--baseline-seeds", type=runtime.seed, nargs="*", help="with CycleGAN and CUT (default: all)")
    parser.add_argument(
        "--at-once",
        type=runtime.positive_int,
        default=1,
        metavar="N",
        help="seeds, which share the cores: small networks do better with few threads each (default 1)",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    baseline_seeds = args.seeds if args.baseline_seeds is None else args.baseline_seeds
    threads = max(1, (os.cpu_count() or 1) // args.at_once) if args.at_once > 1 else None
    rows, failed, running = report(args.out), [], []

    def work(seed):
        methods = [*(BASELINES if seed in baseline_seeds else ()), "fastcut_l5"]
        return run_seed(args.out, seed, methods, threads, running)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ThreadPoolExecutor(args.at_once) as pool:
        try:
            for seed, status in zip(args.seeds, pool.map(work, args.seeds), strict=True):
                print(f"seed {seed}: " + (f"failed, see {args.out / f'seed{seed}.log'}" if status else "done"), flush=True)
                failed += [seed] if status else []
                rows = report(args.out)
        except BaseException:  # Ctrl-C, too: what runs saves its work, and no other seed is begun
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise
    titles = "Mean and deviation over seeds, percent", "The same seed, one model less another, mIoU"
    for title, table in zip(titles, (models_table(rows), pairs_table(rows)), strict=True):
        if table:
            evaluate.print_table(title, table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    runtime.run_script(main)
