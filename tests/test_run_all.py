"""The command lines: run_all.sh at the smallest scale, resuming, and what it says to mistakes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
from PIL import Image

import data

ROOT = Path(__file__).parent.parent
VARIABLES = "SOURCE TARGET OUT METHODS SEED ITERATIONS_SCALE FID_WEIGHTS TRANSLATOR_ARGS SEGMENTER_ARGS ADAPT_ARGS".split()
SMALL = "--device cpu --width 128 --workers 0 --log-every 1"


def run(*words, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(words, env=inherited | environment, capture_output=True, text=True, check=False)


def script(name, *words):
    return run(sys.executable, str(ROOT / name), *map(str, words))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    out = tmp_path_factory.mktemp("pair of domains")  # with spaces in its name
    made = script(
        "make_demo_data.py", out / "d", "--size", "64x128", "--source-count", 4, "--target-count", 3, "--val-count", 2
    )
    assert made.returncode == 0, made.stderr
    return out / "d"


def settings(pair, out, workers):
    """The paper's path through run_all.sh, two iterations a stage."""
    small = f"--device cpu --width 128 --workers {workers} --log-every 1"
    return {
        "SOURCE": str(pair / "source"),
        "TARGET": str(pair / "target"),
        "OUT": str(out),
        "PYTHON": sys.executable,
        "METHODS": "cyclegan fastcut_l5",
        "FID_WEIGHTS": "random",
        "ITERATIONS_SCALE": "0.000005",
        "TRANSLATOR_ARGS": f"--base-channels 4 --crop-size 64 {small}",
        "SEGMENTER_ARGS": f"--encoder efficientnet-b0 --encoder-weights none --batch-size 2 --crop-size 64x128 {small}",
        "ADAPT_ARGS": f"--batch-size 2 --crop-size 64x128 {small}",
    }


# Python runs a module of this name before a script; this one notes each script that opens a label of a Cityscapes layout.
SITECUSTOMIZE = """
import json, os, sys

def note(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)) and "gtFine" in os.fsdecode(args[0]):
        with open(os.environ["OPENED_LABELS"], "a") as file:
            file.write(json.dumps([sys.argv, os.fsdecode(args[0])]) + "\\n")

sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def everything(pair, tmp_path_factory):
    """All of run_all.sh, watched; and a second call, which has nothing left to do."""
    watch = tmp_path_factory.mktemp("watch")
    (watch / "sitecustomize.py").write_text(SITECUSTOMIZE)
    watched = settings(pair, pair.parent / "out", workers=0)
    watched |= {"PYTHONPATH": str(watch), "OPENED_LABELS": str(pair.parent / "opened")}
    first = run("bash", str(ROOT / "run_all.sh"), **watched)
    assert first.returncode == 0, first.stderr
    out = pair.parent / "out"
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")} | {p: p.stat().st_mtime_ns for p in out.rglob("0*.png")}
    again = run("bash", str(ROOT / "run_all.sh"), **settings(pair, out, workers=0) | {"METHODS": "fastcut_l5"})
    assert again.returncode == 0, again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in before}, "a finished stage was done again"
    return out, first.stdout


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_run_all_writes_every_table(everything):
    out, printed = everything
    table1, table2, table3 = (table(out / "results" / f"table{n}.csv") for n in (1, 2, 3))
    assert [row["model"] for row in table1] == ["Source", "CycleGAN", "FastCUT-L5"]
    assert list(table1[0]) == ["model", "frechet_random_inception", "seconds_per_iteration", "peak_memory_mib"]
    assert all(float(row["frechet_random_inception"]) >= 0 for row in table1)
    assert table1[0]["seconds_per_iteration"] == "" and float(table1[1]["seconds_per_iteration"]) > 0
    models = ["Source Only", "CycleGAN", "FastCUT-L5", "control", "CLADA", "Oracle"]
    assert [row["model"] for row in table2] == models
    assert list(table2[0]) == ["model", "mIoU", "fwIoU", "pixel_accuracy", *data.CLASS_NAMES]
    assert all(row["train"] == "" for row in table2)  # not in the truth
    for row in table2:
        ious = [float(row[name]) for name in data.CLASS_NAMES if row[name]]
        assert float(row["mIoU"]) == pytest.approx(sum(ious) / len(ious), abs=0.01)
    assert [row["class"] for row in table3] == [*data.CLASS_NAMES, "mIoU"]
    for n in (1, 2, 3):
        assert f"Table {n}:" in printed


def test_run_all_draws_both_figures(everything):
    out, _ = everything
    for name, columns in (("translations", 3), ("segmentations", 4)):
        figure = Image.open(out / "results" / f"{name}.png")
        assert figure.width > 300 * columns and len(figure.getcolors(2**24)) > 50


def test_translated_sets_fit_their_labels(everything):
    translated = everything[0] / "translated" / "fastcut_l5"
    source = {f.name: f for f in data.list_frames(Path(table_source(everything[0])))}
    frames = data.list_frames(translated)
    assert {f.name for f in frames} == set(source)
    for frame in frames:
        assert data.load_image(frame.image).shape[1:] == data.load_label_ids(frame.label).shape
        assert torch.equal(data.load_label_ids(frame.label), data.load_label_ids(source[frame.name].label))


def table_source(out):
    return json.loads((out / "segmenters" / "source_only" / "args.json").read_text())["data"]


def test_target_labels_are_opened_by_the_oracle_and_the_evaluation_alone(everything):
    """Stages 1, 2 and 4 never do, stage 3 for the Oracle's training only."""
    who = {"train": set(), "val": set()}
    for line in (everything[0].parent / "opened").read_text().splitlines():
        words, path = json.loads(line)
        run_directory = [Path(words[i + 1]).name for i, word in enumerate(words) if word == "--out"]
        who[Path(path).parent.parent.name].add((Path(words[0]).name, *run_directory))
    assert who["train"] == {("train_segmenter.py", "oracle")}
    assert who["val"] == {("data.py",), ("evaluate.py", "table2.csv"), ("evaluate.py",)}  # preflight, scores, figure 4


def test_the_same_seed_gives_the_same_bytes_with_and_without_workers(everything, pair, tmp_path):
    one, two = everything[0], tmp_path / "again"
    again = run("bash", str(ROOT / "run_all.sh"), **settings(pair, two, workers=2))
    assert again.returncode == 0, again.stderr
    files = [{p.relative_to(out) for p in out.rglob("*") if p.is_file() and p.suffix != ".npz"} for out in (one, two)]
    assert files[0] == files[1] and len([p for p in files[0] if p.suffix == ".pt"]) == 16
    for path in sorted(files[0]):
        assert result(one, path) == result(two, path), path


def result(out, path):
    """The content of a file, but for what was measured, where it lies, and how many workers read for it."""
    if path.suffix == ".csv":
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in table(out / path)]
    if path.suffix == ".json":
        content = json.loads((out / path).read_text().replace(str(out), "OUT"))
        return {k: v for k, v in content.items() if k not in (*MEASURED, "workers")}
    return (out / path).read_bytes()


def test_an_interrupted_translation_goes_on(everything, tmp_path):
    whole = everything[0] / "translated" / "fastcut_l5"
    shutil.copytree(whole, tmp_path / "t")
    lost = sorted((tmp_path / "t" / "images").iterdir())[1]
    lost.rename(lost.with_name(f".{lost.stem}.x1y2z3.png"))  # as a kill leaves it: not yet under its name
    words = ["--source", table_source(everything[0]), "--translator", everything[0] / "translators" / "fastcut_l5"]
    result = script("translate_dataset.py", *words, "--out", tmp_path / "t", "--workers", 0)
    assert result.returncode == 0 and lost.read_bytes() == (whole / "images" / lost.name).read_bytes()
    assert len(data.list_frames(tmp_path / "t")) == len(data.list_frames(whole))
    again = script("translate_dataset.py", *words, "--out", tmp_path / "t", "--workers", 0)
    assert "finished" in again.stdout


def test_stages_1_and_4_need_no_label_of_the_target(everything, pair, tmp_path):
    shutil.copytree(pair / "target" / "leftImg8bit", tmp_path / "target" / "leftImg8bit")
    words = ["--target", tmp_path / "target", "--iterations", 1, "--crop-size", 64, *SMALL.split()]
    one = script(
        "train_translator.py",
        "--source",
        pair / "source",
        "--method",
        "cut",
        "--base-channels",
        4,
        *words,
        "--out",
        tmp_path / "a",
    )
    translated, segmenter = everything[0] / "translated" / "fastcut_l5", everything[0] / "segmenters" / "fastcut_l5"
    four = script("adapt_features.py", "--source", translated, "--segmenter", segmenter, *words, "--out", tmp_path / "b")
    assert (one.returncode, four.returncode) == (0, 0), one.stderr + four.stderr


def test_run_directories_hold_what_they_should(everything):
    run_directory = everything[0] / "translators" / "fastcut_l5"
    assert {p.name for p in run_directory.iterdir()} == {
        "args.json", "checkpoint.pt", "log.csv", "samples", "summary.json", "weights.pt",
    }  # fmt: skip
    rows = table(run_directory / "log.csv")
    assert [int(row["iteration"]) for row in rows] == [1, 2]
    assert {"D", "G_gan", "nce_x", "lr", "seconds_per_iteration", "peak_memory_mib"} <= set(rows[0])
    assert (run_directory / "samples" / "0000002.png").is_file()


def test_predictions_are_saved_as_label_ids(everything, pair, tmp_path):
    result = script(
        "evaluate.py", "--segmenter", everything[0] / "segmenters" / "oracle", "--data", pair / "target",
        "--save-predictions", tmp_path / "p", "--workers", 0, "--out", tmp_path / "t.csv",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    files = sorted((tmp_path / "p").iterdir())
    names = [frame.name for frame in data.list_frames(pair / "target", "val")]
    assert len(names) == 2 and [f.name for f in files] == [f"{name}_pred_labelIds.png" for name in names]
    assert set(data.load_label_ids(files[0]).unique().tolist()) <= {c.id for c in data.CLASSES}

    # cityscapesscripts finds each file by its name, and has our scores from it.
    theirs = official.CArgs()
    vars(theirs).update(vars(official.args), predictionPath=str(tmp_path / "p"), predictionWalk=None)
    vars(theirs).update(evalInstLevelScore=False, JSONOutput=False, quiet=True)
    labels = sorted(map(str, (pair / "target" / "gtFine" / "val").glob("*/*_gtFine_labelIds.png")))
    found = [official.getPrediction(theirs, label) for label in labels]
    scores = official.evaluateImgLists(found, labels, theirs)["classScores"]
    (row,) = table(tmp_path / "t.csv")
    in_truth = [name for name in data.CLASS_NAMES if row[name] != ""]
    assert len(in_truth) > 5
    for name in in_truth:
        assert float(row[name]) == pytest.approx(100 * scores[name], abs=0.00501), name  # two digits are written
    assert float(row["mIoU"]) == pytest.approx(100 * sum(scores[name] for name in in_truth) / len(in_truth), abs=0.00501)


@pytest.mark.parametrize("kind", ["cut", "cyclegan", "segmenter"])
def test_an_interrupted_run_ends_as_one_that_was_not(pair, tmp_path, kind):
    words = [*SMALL.split(), "--iterations", 40, "--save-every", 4]
    if kind == "segmenter":
        name, words = "train_segmenter.py", [*words, "--data", pair / "source", "--encoder", "efficientnet-b0"]
        words += ["--encoder-weights", "none", "--freeze-iterations", 13, "--crop-size", 64, "--batch-size", 2]
        rates = [2e-4] * 26 + [1e-5] * 14
    else:
        name, words = "train_translator.py", [*words, "--source", pair / "source", "--target", pair / "target"]
        words += ["--method", kind, "--base-channels", 4, "--crop-size", 64]
        rates = [2e-4] * 20 + [2e-4 * (40 - i) / 20 for i in range(20, 40)]
    assert script(name, *words, "--out", tmp_path / "a").returncode == 0
    command = [sys.executable, str(ROOT / name), *map(str, words), "--out", str(tmp_path / "b")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (tmp_path / "b" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert script(name, *words, "--out", tmp_path / "b").returncode == 0
    a, b = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in "ab")
    assert same(a, b)
    logs = [result(tmp_path / run, Path("log.csv")) for run in "ab"]
    assert logs[0] == logs[1] and [float(row["lr"]) for row in logs[0]] == pytest.approx(rates, rel=1e-5)


MEASURED = ("seconds_per_iteration", "peak_memory_mib")


def same(a, b):
    """Bitwise equality of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


TRANSLATOR = ["--method", "cut", "--crop-size", 64, "--width", 128]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("train_translator.py", ["--source", "nowhere", "--target", "nowhere", *TRANSLATOR], "nowhere: no such folder"),
        ("train_segmenter.py", ["--data", "{pair}/source", "--encoder", "efficientnet-b9"], "efficientnet-b0 to"),
        ("train_segmenter.py", ["--data", "{pair}/source", "--lr", "nan"], "--lr"),
        ("train_segmenter.py", ["--data", "{pair}/source", "--encoder-weights", "no.pth"], "no.pth: No such file"),
        ("train_segmenter.py", ["--data", "{pair}/source", "--device", "tpu9"], "--device tpu9"),
        ("adapt_features.py", ["--source", "{pair}/source", "--target", "{pair}/target", "--segmenter", "x"], "--segmenter x"),
        ("translate_dataset.py", ["--source", "{pair}/source", "--translator", "x"], "--translator x"),
    ],
)
def test_mistakes_get_one_line(name, words, message, pair, tmp_path):
    words = [str(word).replace("{pair}", str(pair)) for word in words]
    result = script(name, *words, "--out", tmp_path / "out")
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SOURCE": "a"}, "one without the other"),
        ({"METHODS": "pix2pix"}, "METHODS has pix2pix"),
        ({"ITERATIONS_SCALE": "-1"}, "ITERATIONS_SCALE is -1"),
    ],
)
def test_run_all_says_what_is_wrong(environment, message, tmp_path):
    result = run("bash", str(ROOT / "run_all.sh"), PYTHON=sys.executable, OUT=str(tmp_path / "out"), **environment)
    assert result.returncode == 2 and message in result.stderr


def test_a_run_is_not_resumed_with_other_arguments(everything, pair):
    words = ["--data", pair / "source", "--out", everything[0] / "segmenters" / "source_only", "--lr", "0.5"]
    result = script("train_segmenter.py", *words)
    assert result.returncode == 2 and "--lr (was 0.0002, is 0.5)" in result.stderr
