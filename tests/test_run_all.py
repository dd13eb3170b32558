"""run_all.sh at the smallest scale, what it leaves, and what it and the scripts say to mistakes."""

import json
import shutil
import time
import types
from pathlib import Path

import numpy as np
import pytest
import served
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
from cityscapesscripts.helpers.labels import id2label
from commands import MEASURED, ROOT, assert_same_outputs, run, script, table
from PIL import Image

import data
import evaluate
import fid
import models
import report

SMALL = "--device cpu --width 128 --log-every 1"


def settings(pair, out, workers):
    """The paper's path through run_all.sh, two iterations a stage."""
    return {
        "WORKERS": str(workers),
        "SOURCE": str(pair / "source"),
        "TARGET": str(pair / "target"),
        "OUT": str(out),
        "PYTHON": str(served.python()),
        "METHODS": "cyclegan fastcut_l5",
        "FID_WEIGHTS": "random",
        "TARGET_SPLITS": "train,val",
        "ITERATIONS_SCALE": "0.000005",
        "TRANSLATOR_ARGS": f"--base-channels 4 --crop-size 64 {SMALL}",
        "SEGMENTER_ARGS": f"--encoder efficientnet-b0 --encoder-weights none --batch-size 2 --crop-size 64x128 {SMALL}",
        "ADAPT_ARGS": f"--batch-size 2 --crop-size 64x128 {SMALL}",
    }


@pytest.fixture(scope="module")
def everything(pair, watched):
    """All of run_all.sh, watched; and a second call, which has nothing left to do."""
    note = {"NOTE_LABELS": str(pair.parent / "opened")}
    first = run("bash", ROOT / "run_all.sh", **settings(pair, pair.parent / "out", workers=0), **watched, **note)
    assert first.returncode == 0, first.stderr
    out = pair.parent / "out"
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")} | {p: p.stat().st_mtime_ns for p in out.rglob("0*.png")}
    again = run("bash", ROOT / "run_all.sh", **settings(pair, out, workers=0) | {"METHODS": "fastcut_l5"})
    assert again.returncode == 0, again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in before}, "a finished stage was done again"
    return out, first.stdout


def test_run_all_writes_every_table(everything):
    out, printed = everything
    table1, table2, table3 = (table(out / "results" / f"table{n}.csv") for n in (1, 2, 3))
    assert [row["model"] for row in table1] == ["Source", "Source, resized", "CycleGAN", "FastCUT-L5"]
    assert table1[0]["frechet_random_inception"] != table1[1]["frechet_random_inception"]  # 144 and 128 pixels wide
    assert list(table1[0]) == ["model", "frechet_random_inception", *MEASURED]
    assert all(float(row["frechet_random_inception"]) >= 0 for row in table1)
    assert table1[0]["seconds_per_iteration"] == "" and float(table1[2]["seconds_per_iteration"]) > 0
    models = ["Source Only", "CycleGAN", "FastCUT-L5", "control without target", "control", "CLADA", "Oracle"]
    assert [row["model"] for row in table2] == models
    assert list(table2[0]) == ["model", "mIoU", "fwIoU", "pixel_accuracy", *data.CLASS_NAMES]
    assert all(row["train"] == "" for row in table2)  # not in the truth
    for row in table2:
        ious = [float(row[name]) for name in data.CLASS_NAMES if row[name]]
        assert float(row["mIoU"]) == pytest.approx(sum(ious) / len(ious), abs=0.01)
    assert [row["class"] for row in table3] == [*data.CLASS_NAMES, "mIoU"]
    for n in (1, 2, 3):
        assert f"Table {n}:" in printed


def test_target_splits_reach_the_translators_stage_4_and_fid(everything):
    out, _ = everything
    for run_ in ("translators/cyclegan", "translators/fastcut_l5", "segmenters/clada", "segmenters/control"):
        assert json.loads((out / run_ / "args.json").read_text())["frames_of_target"].startswith("5 frames")
    assert len(fid.find_images(out / "photos" / "train,val")) == 5


def test_a_finished_experiment_is_skipped_at_once_until_data_or_words_change(everything, pair, tmp_path):
    out, _ = everything
    shutil.copytree(pair / "source", tmp_path / "source")
    given = settings(pair, out, workers=0) | {"METHODS": "fastcut_l5"}
    given |= {"OUT": str(tmp_path / "out"), "SOURCE": str(tmp_path / "source"), "ORACLE": "no", "METHODS": "colour fastcut_l5"}
    first = run("bash", ROOT / "run_all.sh", **given)
    assert first.returncode == 0 and "Table 3 needs Oracle" in first.stdout, first.stderr
    assert (tmp_path / "out" / "results" / "segmentations.png").is_file()  # needs labels, but no Oracle
    for n, first_two in ((1, ["Source", "Source, resized"]), (2, ["Source Only"])):
        models_ = [row["model"] for row in table(tmp_path / "out" / "results" / f"table{n}.csv")]
        assert models_[: len(first_two) + 2] == [*first_two, "colour transfer", "FastCUT-L5"]
    started = time.monotonic()
    again = run("bash", ROOT / "run_all.sh", **given)
    assert again.returncode == 0 and "finished, and nothing has changed" in again.stdout and time.monotonic() < started + 10
    assert "== " not in again.stdout

    lr = run("bash", ROOT / "run_all.sh", **given | {"SEGMENTER_ARGS": given["SEGMENTER_ARGS"] + " --lr 1e-3"})
    assert lr.returncode == 2 and "--lr (was 0.0002, is now 0.001)" in lr.stderr
    label = next((tmp_path / "source" / "labels").iterdir())
    Image.open(label).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(label)
    changed = run("bash", ROOT / "run_all.sh", **given)
    assert changed.returncode == 2 and "content of --data" in changed.stderr


def test_a_trial_ends_with_a_forecast(everything):
    out, printed = everything
    rows = {row["script"]: row for row in report.forecast(out, 0.000005)}
    assert {"train_translator.py", "train_segmenter.py", "adapt_features.py", "fid.py", "all"} <= rows.keys()
    hours = 0
    for name in ("cyclegan", "fastcut_l5"):
        summary = json.loads((out / "translators" / name / "summary.json").read_text())
        hours += 400_000 * (summary["seconds_per_iteration"] + summary["wait_seconds"]) / 3600
    assert float(rows["train_translator.py"]["hours"]) == pytest.approx(hours, rel=0.01, abs=0.02)
    assert float(rows["train_translator.py"]["peak memory, MiB"]) > 100 and float(rows["fid.py"]["hours"]) < 0.1
    assert "Forecast from this trial" in printed and "train_segmenter.py" in printed


def test_a_target_without_labels(pair, tmp_path):
    """A plain folder of photographs: no Oracle, no scores, and predictions at the end."""
    given = settings(pair, tmp_path / "out", workers=0) | {"METHODS": "fastcut_l5"}
    done = run("bash", ROOT / "run_all.sh", **given | {"TARGET": str(pair / "target" / "leftImg8bit" / "train" / "a city")})
    assert done.returncode == 2
    (city,) = (pair / "target" / "leftImg8bit" / "train").iterdir()
    photos = tmp_path / "photos"
    for i, path in enumerate(sorted(city.iterdir())):
        (photos / f"camera {i}").mkdir(parents=True)
        shutil.copy(path, photos / f"camera {i}" / "0001.png")  # the same name in each folder
        (photos / f"camera {i}" / "._0001.png").touch()
    (photos / "loop").symlink_to(photos)
    given |= {"TARGET": str(photos)}
    done = run("bash", ROOT / "run_all.sh", **given)
    assert done.returncode == 0 and "no labelled val split there. Left out: the Oracle, scores" in done.stdout, done.stderr
    results = tmp_path / "out" / "results"
    names = [".lock", "index.html", "table1.csv", "translations.csv", "translations.png"]
    assert sorted(path.name for path in results.glob("*.*")) == names
    assert len([*results.glob("predictions/*/*.png")]) == len([*results.glob("predictions/*/*_overlay.jpg")]) == 3
    assert (results / "index.html").read_text().count("0001_overlay.jpg</figcaption>") == 3
    again = run("bash", ROOT / "run_all.sh", **given)
    assert again.returncode == 0 and "finished, and nothing has changed" in again.stdout
    assert not (tmp_path / "out" / "segmenters" / "oracle").exists()


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
    rows, columns = ((2 * np.arange(n) + 1) * 144 // (2 * 128) for n in (64, 128))  # 72x144, nearest-exact at width 128
    for frame in frames:
        assert data.load_image(frame.image).shape == (3, 64, 128)
        expected = data.load_label_ids(source[frame.name].label).numpy()[np.ix_(rows, columns)]
        assert np.array_equal(data.load_label_ids(frame.label).numpy(), expected)


def table_source(out):
    return json.loads((out / "segmenters" / "source_only" / "args.json").read_text())["data"]


def test_target_labels_are_opened_by_the_oracle_and_the_evaluation_alone(everything):
    """Stages 1, 2 and 4 never do, stage 3 for the Oracle's training only. (That opening is noted, the Oracle shows.)"""
    who = {"train": set(), "val": set()}
    for line in (everything[0].parent / "opened").read_text().splitlines():
        words, path = json.loads(line)
        run_directory = [Path(words[i + 1]).name for i, word in enumerate(words) if word == "--out"]
        who[Path(path).parent.parent.name].add((Path(words[0]).name, *run_directory))
    assert who["train"] == {("train_segmenter.py", "oracle")}
    assert who["val"] == {("check_data.py",), ("evaluate.py",), ("report.py",)}  # preflight, scores, figure 4


def test_the_same_seed_gives_the_same_bytes_with_and_without_workers(everything, pair, tmp_path):
    again = run("bash", ROOT / "run_all.sh", **settings(pair, tmp_path / "again", workers=2))
    assert again.returncode == 0, again.stderr
    same = assert_same_outputs(everything[0], tmp_path / "again")
    networks = 2 + 4 + 3  # of stages 1, 3 and 4
    assert len([path for path in same if path.suffix == ".pt"]) == 2 * networks  # checkpoint and weights


def test_an_interrupted_translation_goes_on(everything, tmp_path):
    whole = everything[0] / "translated" / "fastcut_l5"
    shutil.copytree(whole, tmp_path / "t")
    lost = sorted((tmp_path / "t" / "images").iterdir())[1]
    lost.rename(lost.with_name(f".{lost.name}.part"))  # as a kill leaves it: not yet under its name
    words = ["--source", table_source(everything[0]), "--translator", everything[0] / "translators" / "fastcut_l5"]
    result = script("translate_dataset.py", *words, "--out", tmp_path / "t", "--workers", 0)
    assert result.returncode == 0 and lost.read_bytes() == (whole / "images" / lost.name).read_bytes()
    assert_same_outputs(whole, tmp_path / "t")
    again = script("translate_dataset.py", *words, "--out", tmp_path / "t", "--workers", 0)
    assert "finished" in again.stdout


def test_frames_of_several_sizes_are_translated_in_batches_as_alone(everything, pair, tmp_path):
    """Frames of one size in a batch go through G together; float32 sums them in another order, so by a level."""
    for i, (width, height) in enumerate([(144, 72), (144, 72), (100, 60), (300, 90)]):
        for part, mode in (("images", "RGB"), ("labels", "L")):
            (tmp_path / "s" / part).mkdir(parents=True, exist_ok=True)
            source = Image.open(pair / "source" / part / f"{i:05d}.png")
            source = source.convert("RGB") if mode == "RGB" else Image.fromarray(np.array(source))
            source.resize((width, height), Image.Resampling.NEAREST).save(tmp_path / "s" / part / f"{i}.png")
    words = ["--source", tmp_path / "s", "--translator", everything[0] / "translators" / "fastcut_l5", "--workers", 0]
    words += ["--precision", "fp32"]
    for batch in (1, 3):
        assert script("translate_dataset.py", *words, "--batch-size", batch, "--out", tmp_path / str(batch)).returncode == 0
    one, three = (data.list_frames(tmp_path / str(batch)) for batch in (1, 3))
    shapes = [tuple(data.load_label_ids(frame.label).shape) for frame in one]
    assert shapes == [(64, 128), (64, 128), (77, 128), (38, 128)]
    for a, b in zip(one, three, strict=True):
        assert torch.equal(data.load_label(a.label), data.load_label(b.label))
        assert (data.load_image(a.image).int() - data.load_image(b.image).int()).abs().max() <= 1


def test_stages_1_and_4_need_no_label_of_the_target(everything, pair, tmp_path):
    shutil.copytree(pair / "target" / "leftImg8bit", tmp_path / "target" / "leftImg8bit")
    words = ["--target", tmp_path / "target", "--iterations", 1, "--crop-size", 64, "--workers", 0, *SMALL.split()]
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
        ".lock", "args.json", "checkpoint.pt", "log.csv", "samples", "summary.json", "weights.pt",
    }  # fmt: skip
    rows = table(run_directory / "log.csv")
    assert [int(row["iteration"]) for row in rows] == [1, 2]
    assert {"D", "G_gan", "nce_x", "lr", "seconds_per_iteration", "peak_memory_mib"} <= set(rows[0])
    assert (run_directory / "samples" / "0000002.png").is_file()


@pytest.fixture
def lively_segmenter(everything, pair, tmp_path):
    """A run whose network, unlike one of two steps, predicts many classes: large weights, fresh statistics, no favourites."""
    shutil.copytree(everything[0] / "segmenters" / "oracle", tmp_path / "lively")
    network = models.load_network(tmp_path / "lively" / "weights.pt").train()
    frames = data.list_frames(pair / "target", "val")[:2]
    photos = torch.stack([data.to_unit(evaluate.read_frame(frame, 128)[0]) for frame in frames])
    with torch.no_grad():
        for _ in range(20):
            network(photos)
        network.head.weight.normal_(0, 5)
        network.head.bias.sub_(network.eval()(photos).mean((0, 2, 3)))
    torch.save(models.network_state(network, 128), tmp_path / "lively" / "weights.pt")
    return tmp_path / "lively"


def test_predictions_are_label_ids_and_predict_writes_the_same(lively_segmenter, pair, tmp_path):
    result = script(
        "evaluate.py", "--segmenter", lively_segmenter, "--data", pair / "target",
        "--save-predictions", tmp_path / "p", "--workers", 0, "--out", tmp_path / "t.csv",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    files = sorted((tmp_path / "p").glob("*.png"))
    names = [frame.name for frame in data.list_frames(pair / "target", "val")]
    assert len(names) == 2 and [f.name for f in files] == [f"{name}.png" for name in names]
    assert set(data.load_label_ids(files[0]).unique().tolist()) <= {c.id for c in data.CLASSES}

    words = ["--segmenter", lively_segmenter, "--images", pair / "target", "--out", tmp_path / "q", "--workers", 0]
    result = script("predict.py", *words)
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / "q" / file.name).read_bytes() for file in files] == [file.read_bytes() for file in files]

    # cityscapesscripts finds each file by its name, and has our scores from it.
    options = {"predictionPath": str(tmp_path / "p"), "evalInstLevelScore": False, "JSONOutput": False, "quiet": True}
    options = types.SimpleNamespace(**vars(official.args) | options)
    labels = sorted(map(str, (pair / "target" / "gtFine" / "val").glob("*/*_gtFine_labelIds.png")))
    scores = official.evaluateImgLists([official.getPrediction(options, label) for label in labels], labels, options)
    true_ids = np.unique([Image.open(label) for label in labels])
    expected = {id2label[i].name: scores["classScores"][id2label[i].name] for i in true_ids if not id2label[i].ignoreInEval}
    assert len(expected) > 5 and len(np.unique([Image.open(file) for file in files])) > 5
    (row,) = table(tmp_path / "t.csv")
    for name in data.CLASS_NAMES:
        cell = float(row[name]) if row[name] else None
        assert cell == (pytest.approx(100 * expected[name], abs=0.00501) if name in expected else None), name  # two digits
    assert float(row["mIoU"]) == pytest.approx(100 * official.getScoreAverage(expected, options), abs=0.00501)


TRANSLATOR = ["--method", "cut", "--crop-size", 64, "--width", 128]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("train_translator.py", ["--source", "nowhere", "--target", "nowhere", *TRANSLATOR], "nowhere: no such folder"),
        ("train_segmenter.py", ["--data", "{pair}/source", "--encoder", "efficientnet-b9"], "efficientnet-b0 to"),
        ("train_segmenter.py", ["--data", "{pair}/source", "--lr", "nan"], "--lr"),
        ("train_segmenter.py", ["--data", "{pair}/source", "--encoder-weights", "no.pth"], "no.pth: No such file"),
        ("train_segmenter.py", ["--data", "{pair}/source", "--device", "tpu9"], "--device tpu9"),
        (
            "adapt_features.py",
            ["--source", "{pair}/source", "--target", "{pair}/target", "--segmenter", "x"],
            "--segmenter x: not a finished run",
        ),
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
        ({"SOURCE": "a"}, "set both SOURCE and TARGET"),
        ({"METHODS": "pix2pix"}, "METHODS contains pix2pix"),
        ({"ITERATIONS_SCALE": "-1"}, "ITERATIONS_SCALE is -1"),
        ({"SETTINGS": "small"}, "without SOURCE and TARGET"),
        ({"SOURCE": "a", "TARGET": "b", "SETTINGS": "large"}, "SETTINGS is large: paper, small or demo"),
    ],
)
def test_run_all_says_what_is_wrong(environment, message, tmp_path):
    result = run("bash", ROOT / "run_all.sh", PYTHON=str(served.python()), OUT=str(tmp_path / "out"), **environment)
    assert result.returncode == 2 and message in result.stderr


def test_the_gates_record(pair, tmp_path):
    """The gate is in the log, counted without the head start in the summary, and a shut one gives a warning."""
    domains = ["--source", pair / "source", "--target", pair / "target", "--device", "cpu", "--workers", 0]
    sizes = ["--width", 128, "--crop-size", 64, "--batch-size", 2, "--log-every", 1]
    words = ["--data", pair / "source", "--encoder", "efficientnet-b0", "--encoder-weights", "none", "--iterations", 1]
    assert script("train_segmenter.py", *words, *domains[4:], *sizes, "--out", tmp_path / "s").returncode == 0
    words = [*domains, *sizes, "--segmenter", tmp_path / "s", "--iterations", 5]
    for gate, steps in ((0, 3), (1, 0)):
        out = tmp_path / f"gate{gate}"
        result = script("adapt_features.py", *words, "--head-start", 2, "--gate", gate, "--out", out)
        assert result.returncode == 0 and f"the gate was open in {steps} of 3 steps" in result.stdout, result.stderr
        assert ("the adversary hardly took part" in result.stderr) == (gate == 1)
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["gate_open_steps"], summary["gate_steps"]) == (steps, 3) and 0 <= summary["D_accuracy"] <= 1
        assert [float(row["gate_open"]) for row in table(out / "log.csv")] == [gate == 0] * 5
    result = script("adapt_features.py", *words, "--head-start", 5, "--out", tmp_path / "c")
    assert result.returncode == 2 and "--head-start 5: must be below --iterations, 5" in result.stderr


def test_a_run_is_not_resumed_with_other_arguments(everything, pair):
    words = ["--data", pair / "source", "--out", everything[0] / "segmenters" / "source_only", "--lr", "0.5"]
    result = script("train_segmenter.py", *words)
    assert result.returncode == 2 and "--lr (was 0.0002, is now 0.5)" in result.stderr
