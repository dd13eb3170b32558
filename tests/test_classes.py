"""Data sets with classes of their own: classes.csv, from drawn frames to table 3."""

import copy
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import served
import torch
from commands import ROOT, run, script, table
from PIL import Image

import data
import models

TABLE = """id,name,train_id,red,green,blue
0,unknown,255,0,0,0
3,sky,0,0,0,250
7,ground,1,90,60,30
8,path,1,200,200,200
40,thing,2,250,0,0
"""


def write(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path)


def draw(seed, tint):
    """A sky, a ground with a path, and a thing on it: an image and its label ids."""
    rng = np.random.default_rng(seed)
    ids = np.full((72, 144), 3, np.uint8)
    ids[rng.integers(30, 45) :] = 7
    ids[60:, rng.integers(10, 60) :][:, :40] = 8
    ids[30:50, rng.integers(0, 110) :][:, :24] = 40
    ids[:2] = 0
    colours = np.zeros((41, 3))
    colours[[0, 3, 7, 8, 40]] = (0, 0, 0), (120, 160, 220), (90, 80, 60), (150, 150, 150), (200, 40, 40)
    image = colours[ids] * tint + rng.normal(0, 8, (72, 144, 3))
    return image.clip(0, 255).astype(np.uint8), ids


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A pair of domains with three classes, in both layouts."""
    root = tmp_path_factory.mktemp("own")
    for i in range(4):
        image, ids = draw(i, 1.0)
        write(root / "source" / "images" / f"{i}.png", image)
        write(root / "source" / "labels" / f"{i}.png", ids)
    for i, split in enumerate(("train", "train", "val", "val")):
        image, ids = draw(10 + i, 0.7)
        write(root / "target" / "leftImg8bit" / split / "a" / f"a_{i}_leftImg8bit.png", image)
        write(root / "target" / "gtFine" / split / "a" / f"a_{i}_gtFine_labelIds.png", ids)
    for domain in ("source", "target"):
        (root / domain / "classes.csv").write_text(TABLE)
    return root


def test_the_table_of_a_data_set(own):
    classes = data.list_frames(own / "source").classes
    assert classes.names == ["sky", "ground", "thing"] and classes.label_ids.tolist() == [3, 7, 40]
    assert classes.palette.tolist() == [[0, 0, 250], [90, 60, 30], [250, 0, 0]]
    ids = np.array(Image.open(own / "source" / "labels" / "0.png"))
    expected = np.select([ids == 3, np.isin(ids, (7, 8)), ids == 40], [0, 1, 2], 255)
    assert np.array_equal(data.load_label(own / "source" / "labels" / "0.png", classes).numpy(), expected)
    with pytest.raises(ValueError, match=r"0.png: label ids \[40\] are not in Cityscapes' table"):
        data.load_label(own / "source" / "labels" / "0.png")
    assert data.list_frames(own / "target", labelled=False).classes is data.CITYSCAPES  # not needed where labels are not read


def test_a_table_survives_the_way_to_a_worker(own):
    """Cityscapes' is recognised by identity."""
    mine = data.read_classes(own / "source")
    for copied in (copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))):
        assert copied(data.CITYSCAPES) is data.CITYSCAPES and copied(mine).rows == mine.rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train ids must be 0, 1, 2"),
        (TABLE.replace("train_id", "class"), "columns id, name, train_id"),
        (TABLE.replace("40,thing", "forty,thing"), "with integers"),
        (TABLE.replace("40,thing", "255,thing"), "from 0 to 254"),
        (TABLE.replace("250,0,0", "256,0,0"), "colours from 0 to 255"),
        (TABLE.replace("8,path", "7,path"), "must be distinct and from 0 to 254"),
        (TABLE.replace("thing,2", "thing,3"), "train ids must be 0, 1, 2"),
        (TABLE.replace("thing,2", "sky,2"), "with different names"),
    ],
)
def test_a_table_that_is_wrong_is_one_line(own, tmp_path, text, message):
    shutil.copytree(own / "source", tmp_path / "source")
    (tmp_path / "source" / "classes.csv").write_text(text)
    result = script("check_data.py", tmp_path / "source")
    assert result.returncode == 2 and "classes.csv" in result.stderr and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_from_frames_to_table_3(own, tmp_path):
    small = "--device cpu --width 128 --log-every 1 --workers 0"
    given = {"SOURCE": own / "source", "TARGET": own / "target", "OUT": tmp_path / "out", "PYTHON": served.python()}
    given |= {"METHODS": "fastcut_l5", "FID_WEIGHTS": "random", "ITERATIONS_SCALE": "0.0001", "CACHE": tmp_path / "cache"}
    given["TRANSLATOR_ARGS"] = f"--base-channels 4 --crop-size 64 {small} --iterations 2"
    crops = f"--batch-size 2 --crop-size 64x128 {small}"
    given["SEGMENTER_ARGS"] = f"--encoder efficientnet-b0 --encoder-weights none --lr 1e-3 {crops}"
    given["ADAPT_ARGS"] = crops
    done = run("bash", ROOT / "run_all.sh", **{name: str(value) for name, value in given.items()})
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    rows = table(out / "results" / "table2.csv")
    assert list(rows[0]) == ["model", "mIoU", "fwIoU", "pixel_accuracy", "sky", "ground", "thing"]
    assert all(row["sky"] and row["thing"] for row in rows) and len(rows) == 6
    assert [row["class"] for row in table(out / "results" / "table3.csv")] == ["sky", "ground", "thing", "mIoU"]
    translated = data.list_frames(out / "translated" / "fastcut_l5")
    assert translated.classes.rows == data.read_classes(own / "source").rows
    with Image.open(translated[0].label) as label:
        assert label.getpalette()[3 * 40 : 3 * 41] == [250, 0, 0]
    network = models.load_network(out / "segmenters" / "clada")
    assert network.head.out_channels == 3 and data.Classes(network.classes).names == ["sky", "ground", "thing"]
    shown = {colour for _, colour in Image.open(out / "results" / "segmentations.png").getcolors(2**20)}
    assert {(0, 0, 250), (90, 60, 30), (250, 0, 0)} <= shown and tuple(data.PALETTE[0]) not in shown
    words = ["--segmenter", out / "segmenters" / "clada", "--images", own / "target", "--out", tmp_path / "p"]
    assert script("predict.py", *words).returncode == 0
    assert set(np.unique(Image.open(tmp_path / "p" / "a_2.png"))) <= {3, 7, 40}


def test_the_preflight_compares_the_tables(own, pair, tmp_path):
    given = {"SOURCE": own / "source", "TARGET": pair / "target", "OUT": tmp_path / "out", "PYTHON": served.python()}
    done = run("bash", ROOT / "run_all.sh", **{name: str(value) for name, value in given.items()})
    assert done.returncode == 2 and "classes.csv must be the same" in done.stderr


def png_of_16_bits(array):
    """(H, W, 3) uint16 -> a PNG as SYNTHIA has them, which Pillow cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))

    def pack(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + b"".join(pack(*chunk) for chunk in chunks)


def convert(folder, table, out):
    return script("tools/convert_labels.py", folder, "--table", ROOT / "docs" / "classes" / table, "--out", out)


def test_labels_of_synthia_and_camvid_become_cityscapes_ids(tmp_path):
    synthia = np.zeros((4, 6, 3), np.uint16)
    synthia[..., 0], synthia[..., 1] = np.arange(24).reshape(4, 6) % 23, 700  # classes and instances
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "0000001.png").write_bytes(png_of_16_bits(synthia))
    assert convert(tmp_path / "s", "synthia_to_cityscapes.csv", tmp_path / "s_ids").returncode == 0
    names = {c.id: c.name for c in data.Cityscapes.classes}
    found = [names[i] for i in np.array(Image.open(tmp_path / "s_ids" / "0000001.png")).ravel()[:23]]
    assert found[1:13] == "sky,building,road,sidewalk,fence,vegetation,pole,car,traffic sign,person,bicycle,motorcycle".split(
        ","
    )
    assert (
        found[15:22] == "traffic light,terrain,rider,truck,bus,train,wall".split(",") and found[0] == found[22] == "unlabeled"
    )

    camvid = np.zeros((3, 4, 3), np.uint8)
    camvid[0], camvid[1] = (128, 64, 128), (0, 128, 192)
    write(tmp_path / "c" / "a_L.png", camvid)
    assert convert(tmp_path / "c", "camvid_to_cityscapes.csv", tmp_path / "c_ids").returncode == 0
    assert np.array_equal(data.load_label_ids(tmp_path / "c_ids" / "a_L.png").numpy()[:, 0], [7, 25, 0])
    camvid[2, 2] = (1, 2, 3)
    write(tmp_path / "c" / "b_L.png", camvid)
    result = convert(tmp_path / "c", "camvid_to_cityscapes.csv", tmp_path / "c_ids")
    assert result.returncode == 2 and "b_L.png: colour 1, 2, 3 is not in the table" in result.stderr
    result = convert(tmp_path / "c", "synthia_to_cityscapes.csv", tmp_path / "c_ids")
    assert result.returncode == 2 and "started with other arguments: --table" in result.stderr
    shutil.copytree(tmp_path / "c", tmp_path / "other")
    result = convert(tmp_path / "other", "camvid_to_cityscapes.csv", tmp_path / "c_ids")
    assert result.returncode == 2 and "started with other arguments: the labels" in result.stderr
    shutil.copytree(tmp_path / "c", tmp_path / "full")
    result = convert(tmp_path / "c", "camvid_to_cityscapes.csv", tmp_path / "full")
    assert result.returncode == 2 and "holds files that are not from this script" in result.stderr
    os.mkfifo(tmp_path / "s" / "x.png")
    result = convert(tmp_path / "s", "synthia_to_cityscapes.csv", tmp_path / "s_ids")
    assert result.returncode == 2 and "x.png: not a regular file" in result.stderr


def test_the_tables_of_synthia(tmp_path):
    for count, absent in ((16, {"terrain", "truck", "train"}), (13, {"terrain", "truck", "train", "wall", "fence", "pole"})):
        shutil.copy(ROOT / "docs" / "classes" / f"synthia{count}.csv", tmp_path / "classes.csv")
        names = data.read_classes(tmp_path).names
        assert names == [name for name in data.CLASS_NAMES if name not in absent] and len(names) == count


def test_tables_that_differ_are_named(own, pair, tmp_path):
    (tmp_path / "run").mkdir()
    network = models.UNet(3, "efficientnet-b0")
    classes = data.read_classes(own / "source").rows
    torch.save(models.network_state(network, 128, classes), tmp_path / "run" / "weights.pt")
    result = script("evaluate.py", "--segmenter", tmp_path / "run", "--data", pair / "target")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "--data and --segmenter: the class tables differ: (0, 'unlabeled'" in result.stderr
    assert "(0, 'unknown'" in result.stderr
