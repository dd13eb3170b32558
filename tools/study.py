"""Run run_all.sh for several seeds and summarise the scores: mean, deviation, and differences on the same seed.

    python tools/study.py runs/study --seeds 0 1 2 3 4 --baseline-seeds 0 1 2
    SETTINGS=demo SOURCE=day TARGET=dusk python tools/study.py runs/study_dusk --seeds 0 1 2

The variables of run_all.sh pass through, except OUT, SEED, METHODS and PYTHON. OUT/seedN is the OUT of seed N, OUT/seedN.log
the output of its run_all.sh. Finished seeds are skipped, unfinished ones resumed, and seeds can be added later. CycleGAN and
CUT take most of the time and are trained only for --baseline-seeds. OUT/study.csv (one row per seed and model) and
OUT/study.png (one dot per seed, one bar for the mean) are updated after each seed.

*Recovered* is the part of the mIoU gap between Source Only and Oracle of the same seed that a model closes, in percent.
Deviations are sample standard deviations over seeds. The demo also draws its frames from the seed; real data sets stay the
same.
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

import files
import runtime
from evaluate import MEANS, rounded
from report import MODELS, print_table, recovered, table2

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (*MEANS, "recovered")
BASELINES = ("cyclegan", "cut")
# Differences on the same seed that show what a step of the method gains.
PAIRS = (
    ("FastCUT-L5", "Source Only"),
    ("FastCUT-L5", "colour transfer"),
    ("FastCUT-L5", "CycleGAN"),
    ("FastCUT-L5", "CUT"),
    ("control without target", "FastCUT-L5"),
    ("control", "control without target"),
    ("CLADA", "FastCUT-L5"),
    ("CLADA", "CUT"),
    ("CLADA", "control"),
)


def run_seed(out, seed, methods, threads, running):
    """Run run_all.sh for one seed -> its exit status. The process is in the list `running` until it ends."""
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
    """Rows of study.csv from the evaluations of every seed below OUT, ordered by seed and then as in table 2."""
    rows = []
    folders = {path.name.removeprefix("seed"): path for path in out.glob("seed*")}
    for seed in sorted(filter(str.isdecimal, folders), key=int):
        table = table2(folders[seed])
        for model in (name for name in MODELS if name in table):
            part = recovered(*(table.get(name, {}).get("mIoU") for name in ("Source Only", model, "Oracle")))
            scores = {mean: rounded(table[model])[mean] for mean in MEANS}
            rows.append({"seed": seed, "model": model, **scores, "recovered": "" if part is None else f"{part:.2f}"})
    return rows


def mean_and_deviation(values):
    """Numbers -> "mean ± deviation", or the mean alone if there is only one number."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def models_table(rows):
    """One row per model: mean and deviation of each score over the seeds."""
    table = []
    for model in MODELS:
        own = [row for row in rows if row["model"] == model]
        if not own:
            continue
        cells = {column: [float(row[column]) for row in own if row[column]] for column in COLUMNS}
        cells = {column: mean_and_deviation(values) if values else "" for column, values in cells.items()}
        table.append({"model": model, "seeds": str(len(own))} | cells)
    return table


def pairs_table(rows):
    """One row per pair of models: their difference in mIoU on the same seed, and on how many seeds it is positive."""
    miou = {(row["seed"], row["model"]): float(row["mIoU"]) for row in rows}
    table = []
    for better, worse in PAIRS:
        seeds = [seed for seed, model in miou if model == better and (seed, worse) in miou]
        differences = [miou[seed, better] - miou[seed, worse] for seed in seeds]
        if differences:
            above = f"{sum(difference > 0 for difference in differences)} of {len(differences)}"
            mean = mean_and_deviation(differences)
            table.append({"difference in mIoU": f"{better} - {worse}", "mean": mean, "seeds above 0": above})
    return table


def draw(rows, path):
    """Draw two panels, mIoU and recovered part: one dot per seed, one bar for the mean."""
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


def write_study(out):
    """Write study.csv and study.png -> the rows of study.csv."""
    rows = read_seeds(out)
    if rows:
        files.write_csv(out / "study.csv", rows)
        draw(rows, out / "study.png")
    return rows


def parse_args():
    parser = runtime.parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the study; an unfinished study is resumed")
    parser.add_argument("--seeds", type=runtime.seed, nargs="*", default=[0, 1, 2, 3, 4], help="(default 0 1 2 3 4)")
    parser.add_argument("--baseline-seeds", type=runtime.seed, nargs="*", help="seeds with CycleGAN and CUT (default: all)")
    parser.add_argument(
        "--at-once",
        type=runtime.positive_int,
        default=1,
        metavar="N",
        help="seeds that run at the same time and share the cores; faster where networks are small (default 1)",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    baseline_seeds = args.seeds if args.baseline_seeds is None else args.baseline_seeds
    threads = max(1, (os.cpu_count() or 1) // args.at_once) if args.at_once > 1 else None
    rows, failed, running = write_study(args.out), [], []

    def work(seed):
        methods = [*(BASELINES if seed in baseline_seeds else ()), "colour", "fastcut_l5"]
        return run_seed(args.out, seed, methods, threads, running)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ThreadPoolExecutor(args.at_once) as pool:
        try:
            for seed, status in zip(args.seeds, pool.map(work, args.seeds), strict=True):
                print(f"seed {seed}: " + (f"failed, see {args.out / f'seed{seed}.log'}" if status else "done"), flush=True)
                failed += [seed] if status else []
                rows = write_study(args.out)
        except BaseException:  # also Ctrl-C: the seeds that are running save their work, and no other seed starts
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise
    titles = "Mean and deviation over seeds, percent", "Difference between two models on the same seed, mIoU"
    for title, table in zip(titles, (models_table(rows), pairs_table(rows)), strict=True):
        if table:
            print_table(title, table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    runtime.run_script(main)
