"""demo/: frames depend on the seed alone, labels match images, both domains show the same kind of street; the command line."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_demo_data import main, paths
from PIL import Image
from rendering import DOMAINS, IDS, render
from torchvision.datasets import Cityscapes

import runtime

ROOT = Path(__file__).resolve().parents[1]
TRAIN_ID = {c.id: c.train_id for c in Cityscapes.classes}


def run(*arguments):
    """Run the command within this process: starting another one takes seconds."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            runtime.run_script(lambda: main([str(argument) for argument in arguments]))
        except SystemExit as stop:
            status = stop.code
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())


def small_arguments(out, seed=0, source=2, target=1, val=1):
    counts = ("--source-count", source, "--target-count", target, "--val-count", val)
    return [str(word) for word in (out, "--seed", seed, "--size", "64x128", *counts)]


def make(*arguments, **options):
    return run(*small_arguments(*arguments, **options))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def labels(domain, count=40):
    return np.stack([render(np.random.default_rng([5, k]), domain, 64, 128)[1] for k in range(count)])


@pytest.fixture(scope="module")
def label_sets():
    return {domain: labels(domain) for domain in DOMAINS}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "small"
    command = [sys.executable, str(ROOT / "demo/make_demo_data.py"), *small_arguments(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_frame_depends_on_its_generator_alone(domain):
    image, label = render(np.random.default_rng(1), domain, 64, 128)
    again, label_again = render(np.random.default_rng(1), domain, 64, 128)
    other, _ = render(np.random.default_rng(2), domain, 64, 128)
    assert np.array_equal(image, again) and np.array_equal(label, label_again)
    assert not np.array_equal(image, other)


@pytest.mark.parametrize("size", [(64, 128), (131, 239), (405, 737)])  # odd sizes; the last is not supersampled
@pytest.mark.parametrize("domain", DOMAINS)
def test_image_and_label_have_the_same_size(domain, size):
    image, label = render(np.random.default_rng(0), domain, *size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert label.shape == size and label.dtype == np.uint8


def test_image_and_label_match_to_the_pixel():
    """Source edges are sharp: colours change more across the lower edge of the sky than one or two pixels away from it."""
    jumps = np.zeros(5)
    for k in range(10):
        image, label = render(np.random.default_rng(k), "source", 128, 256)
        step = np.abs(np.diff(image.astype(float).mean(2), axis=0))
        edge = np.diff((label == IDS["sky"]).astype(int), axis=0) == -1  # sky above, something else below
        edge[:2] = edge[-2:] = False
        rows, columns = np.nonzero(edge)
        jumps += [step[rows + shift, columns].sum() for shift in (-2, -1, 0, 1, 2)]
    assert jumps.argmax() == 2 and jumps[2] > 2 * max(jumps[0], jumps[4])


@pytest.mark.parametrize("domain", DOMAINS)
def test_classes(label_sets, domain):
    ids = set(np.unique(label_sets[domain]).tolist())
    assert ids <= set(TRAIN_ID), "an id that is not in Cityscapes"
    assert len({TRAIN_ID[i] for i in ids} - {255}) >= 14
    assert IDS["static"] in ids and IDS["dynamic"] in ids
    assert (IDS["ego vehicle"] in ids) == (IDS["out of roi"] in ids) == (domain == "target")


def test_domains_have_the_same_streets(label_sets):
    """Class frequencies, without void, differ only by the camera height: the domain gap is one of appearance."""
    table = np.array([TRAIN_ID.get(i, 255) for i in range(256)])
    frequency = {}
    for domain, ids in label_sets.items():
        train_ids = table[ids]
        frequency[domain] = np.bincount(train_ids[train_ids < 19], minlength=19) / (train_ids < 19).sum()
    assert np.abs(frequency["source"] - frequency["target"]).sum() / 2 < 0.08


def test_domains_look_different():
    """Every source frame is more saturated than every target frame."""

    def saturation(domain, k):
        image = render(np.random.default_rng(k), domain, 64, 128)[0].astype(float)
        return (image.max(2) - image.min(2)).mean()

    assert min(saturation("source", k) for k in range(12)) > max(saturation("target", k) for k in range(12))


def test_layouts(small):
    for domain, split, count in (("source", "train", 2), ("target", "train", 1), ("target", "val", 1)):
        for k in range(count):
            image, label = (Image.open(path) for path in paths(small, domain, split, k))
            assert (image.mode, label.mode) == ("RGB", "P" if domain == "source" else "L")
            assert image.size == label.size == (128, 64)
    palette = Image.open(small / "source/labels/00000.png").getpalette()
    assert palette[3 * 7 : 3 * 7 + 3] == [128, 64, 128]  # road
    assert len(contents(small)) == 8 and not list(small.rglob("*.tmp"))


def test_seed_and_count(small, tmp_path):
    assert make(tmp_path / "more", source=3, val=2).returncode == 0
    assert make(tmp_path / "other", seed=1).returncode == 0
    few, more, other = contents(small), contents(tmp_path / "more"), contents(tmp_path / "other")
    assert len(more) == len(few) + 4 and few.items() <= more.items()
    assert few.keys() == other.keys() and all(few[name] != other[name] for name in few if "label" not in name)
    train, val = (Image.open(paths(small, "target", split, 0)[0]) for split in ("train", "val"))
    assert not np.array_equal(train, val)


def test_second_run_does_nothing(small):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    again = make(small)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert before == {p: p.stat().st_mtime_ns for p in small.rglob("*")}


def test_an_interrupted_run_is_resumed(small, tmp_path):
    arguments = json.loads((small / "demo.json").read_text())
    for name in contents(small):
        if not name.startswith("target"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"kept")
    (tmp_path / "demo.unfinished.json").write_text(json.dumps(arguments))
    assert make(tmp_path).returncode == 0
    assert (tmp_path / "demo.json").exists() and not (tmp_path / "demo.unfinished.json").exists()
    assert (tmp_path / "source/images/00000.png").read_bytes() == b"kept"
    assert contents(tmp_path / "target") == contents(small / "target")


def test_a_frame_that_is_gone_is_drawn_again(small, tmp_path):
    shutil.copytree(small, tmp_path / "again")
    [gone, *_] = sorted((tmp_path / "again" / "source" / "images").iterdir())
    gone.unlink()
    assert make(tmp_path / "again").returncode == 0
    assert contents(tmp_path / "again") == contents(small)


def refused(process, *words):
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.count("\n") == 1 and all(word in process.stderr for word in words), process.stderr


def test_other_arguments_are_refused(small):
    refused(make(small, seed=1), "--seed", "0", "1")
    refused(make(small, source=3), "--source-count", "2", "3")


def test_user_errors_are_one_line(tmp_path):
    refused(run(tmp_path / "a", "--size", "128"), "--size", "128x256")
    refused(run(tmp_path / "a", "--size", "32x64"), "--size", "64")
    refused(run(tmp_path / "a", "--val-count", "0"), "--val-count", "'0'")
    refused(run(tmp_path / "a", "--seed", "-1"), "--seed", "'-1'")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    refused(run(tmp_path / "file"), str(tmp_path / "file"))
    (tmp_path / "real/source").mkdir(parents=True)
    refused(run(tmp_path / "real"), "OUT", "another folder")
