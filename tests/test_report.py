"""report.py on a small OUT of known scores."""

import base64
import io
import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from commands import MEASURED, ROOT, table
from PIL import Image

import data
import evaluate
import files
import models
import report

ROAD, SKY, CAR = 0, 10, 13  # train ids
SCORES = {"Oracle": "45.00", "CLADA": "30.00", "control": "28.50", "Source Only": "20.00", "CUT": "25.00", "mine": "1.00"}
FRAMES = {"frames": "3 frames, 0123", "content": "4567"}
ARGS = {"script": "train_segmenter.py", "iterations": 20, "processes": 1}


def row(miou, **iou):
    return {"mIoU": miou} | dict.fromkeys(data.CLASS_NAMES, 10.0) | iou


def write_evaluation(out, folder, model, miou="10.00", **settings):
    cells = dict.fromkeys((*evaluate.COLUMNS, *data.CLASS_NAMES), 10.0) | {"model": model, "mIoU": float(miou), "train": None}
    (out / "segmenters" / folder).mkdir(parents=True, exist_ok=True)
    files.write_json(out / "segmenters" / folder / "evaluation.json", {"row": cells} | FRAMES | settings)


def write_distance(out, name, **distance):
    (out / "distances").mkdir(exist_ok=True)
    files.write_json(out / "distances" / f"{name}.json", distance)


def write_image(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.broadcast_to(np.uint8(colour), (24, 48, *np.shape(colour))).copy()).save(path)


@pytest.fixture
def out(tmp_path):
    """What run_all.sh leaves: scores of six models, distances of two, translations of one, two networks, two data sets."""
    out = tmp_path / "out"
    for model, miou in SCORES.items():
        write_evaluation(out, report.MODELS.get(model, model), model, miou)
    write_distance(out, "source", FID=123.456789)
    write_distance(out, "cut", FID=7)
    (out / "translators" / "cut").mkdir(parents=True)
    summary = {"seconds_per_iteration": 0.25, "wait_seconds": 1e-5, "peak_memory_mib": 512, "device": "cpu"}
    files.write_json(out / "translators" / "cut" / "summary.json", summary)
    for i in range(6):
        write_image(tmp_path / "source" / "images" / f"{i}.png", (40 * i, 0, 0))
        if i < 5:
            write_image(out / "translated" / "cut" / "images" / f"{i}.png", (0, 40 * i, 0))
    target = tmp_path / "target"
    write_image(target / "leftImg8bit" / "val" / "a" / "1_leftImg8bit.png", (1, 2, 3))
    write_image(target / "gtFine" / "val" / "a" / "1_gtFine_labelIds.png", data.CLASSES[SKY].id)
    for name, domain, train_id in (("source_only", "source", ROAD), ("clada", "target", CAR), ("oracle", "target", None)):
        settings = ARGS | {"data": str(tmp_path / domain), "target": str(target), "exclude": None}
        files.write_json(out / "segmenters" / name / "args.json", settings)
        if train_id is not None:
            segmenter = models.UNet(encoder="efficientnet-b0")
            segmenter.head.weight.data.zero_()
            segmenter.head.bias.data.copy_(torch.eye(19)[train_id])  # predicts one class everywhere
            torch.save(models.network_state(segmenter, 32), out / "segmenters" / name / "weights.pt")
    return out


@pytest.fixture
def call(monkeypatch, capsys):
    def call(out):
        monkeypatch.setattr(sys, "argv", ["report.py", str(out)])
        report.main()
        return capsys.readouterr().out

    return call


def colours(figure, columns):
    """The colour in the middle of the first picture of each column."""
    width = files.COLUMN_WIDTH
    return [figure.getpixel((i * (figure.width + 4) // columns + width // 2, 24 + width // 4)) for i in range(columns)]


def test_everything_is_written_by_one_process_at_a_time(out):
    (out / "results").mkdir()
    (out / "results" / ".table1.csv.1.part").touch()  # left by a process that was killed
    held = files.lock(out / "results")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, str(ROOT / "report.py"), str(out)], **pipes)
    assert f"waiting for process {os.getpid()}" in process.stderr.readline()
    held.close()
    printed, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    table1, table2, table3 = (table(out / "results" / f"table{n}.csv") for n in (1, 2, 3))
    assert [list(row.values()) for row in table1] == [
        ["Source", "123.457", "", "", ""],
        ["CUT", "7", "0.25000", "0.00001", "512"],
    ]
    assert list(table1[0]) == ["model", "FID", *MEASURED]
    assert [(row["model"], row["mIoU"]) for row in table2] == [
        (model, SCORES[model]) for model in ("Source Only", "CUT", "control", "CLADA", "Oracle", "mine")
    ]
    assert list(table2[0]) == [*evaluate.COLUMNS, *data.CLASS_NAMES]
    parts = dict(source_gap="25.00", clada_gap="15.00", recovered="40.0", CUT="20.0", control="34.0", mine="-76.0")
    assert table3[-1] == {"class": "mIoU"} | parts and list(table3[-1]) == ["class", *parts]
    assert all(f"Table {n}:" in printed for n in (1, 2, 3)) and "left out" not in printed
    assert "Stage 4, the adversary: +1.50 mIoU (CLADA - control)" in printed
    assert {path.name for path in (out / "results").iterdir()} == {
        ".lock", "index.html", "segmentations.png", "table1.csv", "table2.csv", "table3.csv", "translations.csv",
        "translations.png",
    }  # fmt: skip
    translations, segmentations = (Image.open(out / "results" / f"{name}ations.png") for name in ("transl", "segment"))
    assert colours(translations, 2) == [(0, 0, 0), (0, 0, 0)]
    last = translations.crop((0, translations.height - 24 - 160, *translations.size))  # of the frames that both have
    assert colours(last, 2) == [(160, 0, 0), (0, 160, 0)]
    assert colours(segmentations, 4) == [(1, 2, 3), *(tuple(data.PALETTE[i]) for i in (ROAD, CAR, SKY))]
    assert {tuple(colour) for colour in data.PALETTE} <= {colour for _, colour in segmentations.getcolors(2**20)}  # legend


@pytest.mark.parametrize(("open_steps", "is_marked"), [(0, True), (5, True), (6, False), (60, False)])
def test_clada_is_marked_where_the_adversary_hardly_took_part(out, call, open_steps, is_marked):
    files.write_json(out / "segmenters" / "clada" / "summary.json", {"gate_open_steps": open_steps, "gate_steps": 60})
    printed = call(out)
    assert ("CLADA*" in printed) == (f"took part in {open_steps} of 60 steps" in printed) == is_marked
    assert "CLADA" in [row["model"] for row in table(out / "results" / "table2.csv")]


def test_what_cannot_be_made_yet_is_named(out, call):
    (out / "segmenters" / "oracle" / "evaluation.json").unlink()
    (out / "segmenters" / "clada" / "weights.pt").unlink()
    (out / "segmenters" / "source_only" / "args.json").unlink()
    (out / "translators" / "cut" / "summary.json").unlink()
    printed = call(out)
    assert "Table 3 needs Oracle in table 2: left out" in printed
    assert f"Figure 3 needs {out}/segmenters/source_only/args.json: left out" in printed
    assert f"Figure 4 needs {out}/segmenters/clada/weights.pt: left out" in printed
    assert {path.name for path in (out / "results").iterdir()} == {".lock", "index.html", "table1.csv", "table2.csv"}
    missing = "table3.csv, translations.csv, translations.png, segmentations.png"
    assert f"<dt>Missing</dt><dd>{missing}</dd>" in (out / "results" / "index.html").read_text()
    assert list(table(out / "results" / "table1.csv")[1].values()) == ["CUT", "7", "", "", ""]


@pytest.mark.parametrize("missing", ["distances", "segmenters"])
def test_one_kind_of_input_is_enough(out, call, missing):
    (out / missing).rename(out / "aside")
    (out / "translated").rename(out / "aside" / "translated")
    printed = call(out)
    expected = {"distances": "Table 1 needs", "segmenters": "Tables 2 and 3 need"}[missing]
    assert f"{expected} {out}/{missing}/*" in printed and f"Figure 3 needs {out}/translated/*/images: left out" in printed
    (out / {"distances": "segmenters", "segmenters": "distances"}[missing]).rename(out / "other")
    with pytest.raises(ValueError, match="no distances.*no segmenters.*give the OUT of run_all.sh"):
        call(out)


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path, call):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="give the OUT of run_all.sh"):
            call(folder)
    assert not list(tmp_path.iterdir())


def test_distances_of_several_kinds_get_a_column_each(out, call):
    write_distance(out, "fastcut", frechet_random_inception=0.5)
    call(out)
    rows = table(out / "results" / "table1.csv")
    assert list(rows[0]) == ["model", "FID", "frechet_random_inception", *MEASURED]
    assert [(row["FID"], row["frechet_random_inception"]) for row in rows] == [("123.457", ""), ("7", ""), ("", "0.5")]


@pytest.mark.parametrize("path", ["distances/cut.json", "translators/cut/summary.json"])
@pytest.mark.parametrize("content", ["", '{"FID": "low", "peak_memory_mib": null}'])
def test_damaged_numbers_are_refused_by_name(out, call, path, content):
    (out / path).write_text(content)
    with pytest.raises(ValueError, match=path):
        call(out)


def test_damaged_and_foreign_evaluations_are_refused_by_name(out, call):
    """In more detail in test_evaluate.py."""
    path = out / "segmenters" / "cut" / "evaluation.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match="cut/evaluation.json"):
        call(out)
    write_evaluation(out, "cut", "CUT", content="of other labels")
    with pytest.raises(ValueError, match="cut/evaluation.json: evaluated on other frames|other frames than .*cut/evaluation"):
        call(out)
    write_evaluation(out, "cut", "CUT")
    write_evaluation(out, "copy_of_cut", "CUT")
    with pytest.raises(ValueError, match="cut/evaluation.json: the name 'CUT' is taken"):
        call(out)
    assert not list((out / "results").glob("table*"))


def test_a_damaged_frame_that_is_excluded_is_not_drawn(out, call, tmp_path):
    for path in ("leftImg8bit/val/a/0_leftImg8bit.png", "gtFine/val/a/0_gtFine_labelIds.png"):
        (tmp_path / "target" / path).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="0_leftImg8bit.png"):
        call(out)
    assert (out / "results" / "table3.csv").is_file()  # tables come first
    (tmp_path / "list").write_text("0\n")
    (tmp_path / "source" / "images" / "0.png").write_bytes(b"damaged")
    for name in ("clada", "source_only"):
        settings = json.loads((out / "segmenters" / name / "args.json").read_text()) | {"exclude": str(tmp_path / "list")}
        files.write_json(out / "segmenters" / name / "args.json", settings)
    call(out)
    assert (out / "results" / "segmentations.png").is_file() and (out / "results" / "translations.png").is_file()


def test_table3_is_the_recovered_part():
    scores = {
        "Source Only": row(20.0, car=30.0, train=None, bus=50.0, road=10.004, sky=10.0),
        "CUT": row(25.0, car=45.0, train=None, bus=50.0, road=10.254, sky=10.3),
        "CLADA": row(30.0, car=70.0, train=None, bus=60.0, road=10.0, sky=10.4),
        "Oracle": row(45.0, car=60.0, train=None, bus=40.0, road=10.504, sky=10.499),
    }
    cells = {r.pop("class"): r for r in report.table3(scores)}
    assert list(cells) == [*data.CLASS_NAMES, "mIoU"]
    assert cells["mIoU"] == {"source_gap": "25.00", "clada_gap": "15.00", "recovered": "40.0", "CUT": "20.0"}
    assert cells["car"]["recovered"] == "133.3"  # above the Oracle
    assert set(cells["train"].values()) == {""}
    assert cells["bus"]["recovered"] == "" and cells["bus"]["source_gap"] == "-10.00"  # no gap to recover
    assert cells["road"]["CUT"] == "50.0"  # of unrounded scores: rounded ones give 48.0
    assert cells["sky"]["source_gap"] == "0.50" and cells["sky"]["CUT"] == ""  # below half a point
    del scores["CLADA"]
    assert report.table3(scores)[-1] == {
        "class": "mIoU",
        "source_gap": "25.00",
        "clada_gap": "",
        "recovered": "",
        "CUT": "20.0",
    }


def test_checkerboard_artefacts_are_a_grid_of_two_or_four_pixels():
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randint(60, 190, (3, 62, 101), generator=generator, dtype=torch.uint8) for _ in range(40)]
    assert report.checkerboard(plain) == pytest.approx(1, abs=0.1)
    for period, size in ((2, 3), (4, 6)):
        grid = torch.zeros(62, 101, dtype=torch.uint8)
        grid[::period, ::period] = size * 5
        assert report.checkerboard([image + grid for image in plain]) > 1.2
    grid = (20 * torch.arange(101).mul(2 * torch.pi / 7).cos() + 20).byte().expand(62, 101)  # a period of seven is none
    assert report.checkerboard([image // 2 + grid for image in plain]) == pytest.approx(1, abs=0.1)


def test_translations_are_judged_without_labels(out, tmp_path, call):
    """A model that predicts road everywhere finds all content kept; one that tells red from green finds none."""
    settings = ARGS | {"target": str(tmp_path / "target"), "target_splits": "val"}
    files.write_json(out / "translators" / "cut" / "args.json", settings)
    call(out)
    rows = table(out / "results" / "translations.csv")
    assert [row["model"] for row in rows] == ["Target", "CUT"] and rows[1]["content_kept"] == "100.0"
    network = models.load_network(out / "segmenters" / "source_only")
    torch.nn.init.normal_(network.head.weight, 0, 100)
    torch.save(models.network_state(network, 32), out / "segmenters" / "source_only" / "weights.pt")
    (row,) = (row for row in report.judge_translations(out) if row["model"] == "CUT")
    kept = []
    for name in "01234":
        pair = [
            data.load_at_width(folder / f"{name}.png", 32)
            for folder in (tmp_path / "source/images", out / "translated/cut/images")
        ]
        with torch.inference_mode():
            one, two = (network(data.to_unit(image)[None])[0].argmax(0) for image in pair)
        kept.append((one == two).double().mean().item())
    assert float(row["content_kept"]) == pytest.approx(100 * np.mean(kept), abs=0.06)


class Page(HTMLParser):
    """OUT/results/index.html: its text, tags, attributes, and tables as lists of rows of (text, is_marked)."""

    def __init__(self, out):
        super().__init__()
        self.source = (out / "results" / "index.html").read_text()
        self.tags, self.attributes, self.tables, self.words = [], [], [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append(["", ("class", "best") in attributes])

    def handle_data(self, text):
        self.words.append(text)
        if self.tags and self.tags[-1] in ("th", "td") and text.strip():
            self.tables[-1][-1][-1][0] += text

    @property
    def pictures(self):
        sources = [value for name, value in self.attributes if name == "src"]
        return [Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))) for source in sources]


@pytest.fixture
def filled(out, tmp_path):
    """OUT with logs, samples and predictions, too; stage 1 unfinished."""
    settings = ARGS | {"script": "train_translator.py", "iterations": 2000, "method": "cut", "crop_size": [64, 128], "seed": 0}
    settings |= {"target": str(tmp_path / "target"), "target_splits": "val", "out": "a b", "antialias": True, "compile": False}
    files.write_json(out / "translators" / "cut" / "args.json", settings | {"processes": 2, "content_of_target": "01"})
    rows = [{"iteration": i, "D": 0.5, "nce_x": 1000 - i, "lr": 0.1, "wait_seconds": 0} for i in range(1, 1000)]
    files.write_csv(out / "translators" / "cut" / "log.csv", rows)
    for name in ("source_only", "clada"):
        files.write_csv(
            out / "segmenters" / name / "log.csv", [{"iteration": 10, "loss": 2.5, "lr": 0.1, "peak_memory_mib": 9}]
        )
    for step, colour in ((20, (250, 0, 0)), (100, (0, 250, 0)), (3, (0, 0, 250))):
        write_image(out / "translators" / "cut" / "samples" / f"{step:07d}.png", colour)
    write_image(out / "results" / "predictions" / "a city" / "1_overlay.jpg", (0, 0, 250))
    return out


def test_the_page_is_one_file_with_everything(filled, call):
    printed = call(filled)
    page = Page(filled)
    assert "index.html" in printed and len(page.source) < 3e6
    assert "http://" not in page.source and "https://" not in page.source and "url(" not in page.source
    assert not {"script", "link", "iframe", "object", "embed", "a"} & set(page.tags)
    assert page.tags.count("img") == len(page.pictures) == 4  # figures 3 and 4, a prediction, samples
    assert max(picture.width for picture in page.pictures) == 1280
    sample, prediction = page.pictures[-1], page.pictures[-2]
    assert np.allclose(sample.getpixel((9, 9)), (0, 250, 0), atol=9)  # the newest
    assert np.allclose(prediction.getpixel((9, 9)), (0, 0, 250), atol=9)
    assert page.tags.count("svg") == len([*filled.glob("*/*/log.csv")]) == 3
    assert page.tags.count("polyline") == 2 + 1 + 1
    (line,) = re.findall(r'points="([^"]*)"/><polyline', page.source)
    assert 100 < len(line.split()) <= 201 and line.endswith("354.0,122.0")
    command = re.search("torchrun .* --antialias", "".join(page.words))[0]
    assert shlex.split(command) == [
        "torchrun", "--nproc-per-node=2", "train_translator.py", "--iterations", "2000", "--method", "cut", "--crop-size",
        "64x128", "--seed", "0", "--target", str(filled.parent / "target"), "--target-splits", "val", "--out", "a b",
        "--antialias",
    ]  # fmt: skip
    assert "cut (unfinished: step 999 of 2000)" in page.source and "<dt>Missing</dt><dd>none</dd>" in page.source


def test_the_pages_numbers_are_those_of_the_tables_and_the_best_are_marked(filled, call):
    write_evaluation(filled, "cut", "CUT", "30.00")
    path = filled / "segmenters" / "cut" / "evaluation.json"
    content = files.read_json(path)
    files.write_json(path, content | {"row": content["row"] | {"person": 12.0, "rider": 9.0}})
    write_distance(filled, "fastcut", FID=8)
    call(filled)
    page = Page(filled)
    lower = {"FID", *MEASURED, "checkerboard"}
    names = ("table1.csv", "table2.csv", "table3.csv", "translations.csv")
    for name, (head, *shown) in zip(names, page.tables[:4], strict=True):
        rows = table(filled / "results" / name)
        columns = list(rows[0])
        is_ranked = name != "table3.csv"  # its rows are classes
        arrows = [column + (" ↓" if column in lower else " ↑") * is_ranked for column in columns[1:]]
        assert [text for text, _ in head] == [columns[0], *arrows]
        assert [[text for text, _ in row] for row in shown] == [list(row.values()) for row in rows]
        for i, column in enumerate(columns):
            scores = {
                row[columns[0]]: float(row[column]) * (-1 if column in lower else 1)
                for row in rows
                if is_ranked
                and i
                and row[column]
                and row[columns[0]] not in ("Source", "Source Only", "Oracle", "Target", "mIoU")
            }
            top = {
                key for key, score in scores.items() if score == max(scores.values()) > min(scores.values())
            }  # none if equal
            assert {row[0][0] for row in shown if row[i][1]} == top, (name, column)
    marked = {(row[0][0], page.tables[1][0][i][0]) for row in page.tables[1] for i, cell in enumerate(row) if cell[1]}
    expected = {("CLADA", "mIoU ↑"), ("CUT", "mIoU ↑"), ("CUT", "person ↑")}
    assert expected < marked and not {"Oracle", "Source Only", "CUT"} & {name for name, column in marked if column == "rider ↑"}


def test_where_the_data_have_gone_tables_and_page_are_made(filled, call, tmp_path):
    settings = filled / "segmenters" / "source_only" / "args.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"data": str(tmp_path / "gone")}))
    printed = call(filled)
    assert f"Figure 3: left out ({tmp_path / 'gone'}, which" in printed
    assert (filled / "results" / "index.html").is_file() and (filled / "results" / "table2.csv").is_file()


def test_the_page_of_an_unfinished_run_names_what_is_missing(filled, call):
    for part in ("segmenters", "translated"):
        (filled / part).rename(filled.parent / part)
    for path in (filled / "translators" / "cut").glob("s*"):
        path.rename(filled.parent / path.name)
    (filled / "translators" / "cut" / "log.csv").unlink()
    call(filled)
    page = Page(filled)
    missing = "table2.csv, table3.csv, translations.csv, translations.png, segmentations.png"
    assert (
        f"<dt>Missing</dt><dd>{missing}</dd>" in page.source
        and "<dt>Stage 4, adapt_features.py</dt><dd>none</dd>" in page.source
    )
    assert "cut (unfinished: step 0 of 2000)" in page.source
    assert len(page.tables) == 1 and page.tags.count("img") == 1 and "svg" not in page.tags


def test_names_are_escaped_on_the_page(filled, call):
    name = "<script>alert('1')<&quot;\udcff"
    (filled / "segmenters" / "clada").rename(filled / "segmenters" / name)
    write_evaluation(filled, name, "<i>mine")
    (filled / "results" / "predictions" / "a city").rename(filled / "results" / "predictions" / "<script>")
    there = filled.rename(filled.with_name("<script>$name"))
    call(there)
    page = Page(there)
    assert not {"script", "i"} & set(page.tags)
    text = "".join(page.words)
    shown = (
        "CLADA: <script>$name",
        "segmenters/<script>alert('1')<&quot;\\udcff",
        "predictions/<script>/1_overlay.jpg",
        "<i>mine",
    )
    assert all(words in text for words in shown), text
