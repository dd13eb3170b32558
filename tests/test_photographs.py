"""For people without target labels: plain folders of photographs, predict.py, --unlabelled, --keep-every."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from commands import script, table
from PIL import Image

import check_data
import colours
import data
import models


@pytest.fixture
def photos(tmp_path):
    """A plain folder: JPEG and PNG files of three sizes, in it and in subfolders, with spaces and an accent in their names."""
    generator = np.random.default_rng(0)
    for name, size in (
        ("a b.png", (72, 48)),
        ("deep/er/é.jpg", (48, 64)),
        ("deep/a.JPEG", (72, 48)),
        (".hidden/x.png", (9, 9)),
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(path)
    (tmp_path / "photos" / "notes.txt").touch()
    return tmp_path / "photos"


NAMES = ["a b", "deep/a", "deep/er/é"]


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    network = models.UNet(encoder="efficientnet-b0").train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(2, 3, 64, 64))
        network.head.weight.normal_(0, 5)
    (tmp_path / "run").mkdir()
    torch.save(models.network_state(network, 64), tmp_path / "run" / "weights.pt")
    return tmp_path / "run"


def test_a_plain_folder_is_a_set_of_frames_where_labels_are_not_read(photos):
    frames = data.list_frames(photos, labelled=False)
    assert sorted(frame.name for frame in frames) == NAMES and all(frame.label is None for frame in frames)
    assert {frame.size for frame in frames} == {(72, 48), (48, 64)}
    assert [frame.name for frame in data.list_frames(photos, labelled=False, exclude={"é", "a b"})] == ["deep/a"]
    with pytest.raises(ValueError, match="photos: no images/ .GTA5. or leftImg8bit/"):
        data.list_frames(photos)
    shutil.copy(photos / "a b.png", photos / "a b.jpg")
    with pytest.raises(ValueError, match="a second file of frame a b"):
        data.list_frames(photos, labelled=False)


def test_images_are_folders_and_files(photos):
    frames = check_data.list_images([photos / "deep", photos / "a b.png"])
    assert sorted(frame.name for frame in frames) == ["a", "a b", "er/é"]
    with pytest.raises(ValueError, match="different names: a b$"):
        check_data.list_images([photos, photos / "a b.png"])
    with pytest.raises(ValueError, match="gone.png: No such file"):
        check_data.list_images([photos / "gone.png"])


@pytest.mark.parametrize("method", ["cut", "cyclegan"])
def test_translators_train_on_plain_folders(photos, tmp_path, method):
    words = ["--method", method, "--base-channels", 4, "--width", 48, "--crop-size", 32, "--iterations", 2, "--device", "cpu"]
    result = script("train_translator.py", "--source", photos, "--target", photos / "deep", "--out", tmp_path / "t", *words)
    assert result.returncode == 0, result.stderr
    result = script("translate_dataset.py", "--source", photos, "--translator", tmp_path / "t", "--out", tmp_path / "u")
    assert result.returncode == 2 and "no images/" in result.stderr  # labels are needed without --unlabelled
    words = ["--unlabelled", "--translator", tmp_path / "t", "--out", tmp_path / "u"]
    for source in ([photos], [photos], [photos / "deep", photos / "a b.png"]):
        out = tmp_path / f"u{len(source)}"
        result = script("translate_dataset.py", "--source", *source, *words[:-1], out)
        assert result.returncode == 0, result.stderr
    assert sorted(frame.name for frame in data.list_frames(tmp_path / "u1" / "images", labelled=False)) == NAMES
    assert Image.open(tmp_path / "u1" / "images" / "deep" / "er" / "é.png").size == (48, 64)
    assert {path.name for path in (tmp_path / "u2" / "images").rglob("*.png")} == {"a.png", "é.png", "a b.png"}
    assert not (tmp_path / "u1" / "labels").exists()


def test_the_colour_transfer_is_reinhard_et_als(photos, tmp_path):
    """Mean and deviation in log-LMS, decorrelated, become those of one of the target's photographs, drawn by seed and name."""
    words = ["--unlabelled", "--source", photos, "--colours-of", photos / "deep", "--width", 48, "--device", "cpu"]
    assert script("translate_dataset.py", *words, "--out", tmp_path / "a").returncode == 0
    assert script("translate_dataset.py", *words, "--out", tmp_path / "b", "--workers", 0).returncode == 0
    lms = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
    mix = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])

    def lab(image):
        return mix @ np.log10(lms @ image.reshape(3, -1).clip(1).astype(float))

    targets = [lab(data.load_at_width(frame.image, 48).numpy()) for frame in data.list_frames(photos / "deep", labelled=False)]
    for frame in data.list_frames(photos, labelled=False):
        path = tmp_path / "a" / "images" / f"{frame.name}.png"
        assert path.read_bytes() == (tmp_path / "b" / "images" / f"{frame.name}.png").read_bytes()
        source, found = lab(data.load_at_width(frame.image, 48).numpy()), data.load_image(path).numpy().reshape(3, -1)
        distances = []
        for target in targets:
            moments = [(x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)) for x in (source, target)]
            moved = (source - moments[0][0]) / moments[0][1] * moments[1][1] + moments[1][0]
            distances.append(np.abs(np.linalg.inv(lms) @ 10 ** (np.linalg.inv(mix) @ moved) - found).clip(0, 255).mean())
        assert min(distances) < 5 and len(distances) == 2  # values outside of 0 to 255 are clipped


def test_the_colours_of_replaced_photographs_are_not_mixed_with_the_old_ones(photos, tmp_path):
    target = shutil.copytree(photos / "deep", tmp_path / "target")
    words = ["--unlabelled", "--source", photos, "--colours-of", target, "--width", 48]
    words += ["--device", "cpu", "--out", tmp_path / "a"]
    assert script("translate_dataset.py", *words).returncode == 0
    assert "finished" in script("translate_dataset.py", *words).stdout
    path = data.list_frames(target, labelled=False)[0].image
    image = np.array(Image.open(path))
    Image.fromarray(image // 2).save(path)
    result = script("translate_dataset.py", *words)
    assert result.returncode == 2 and "started with other arguments: the weights (was" in result.stderr


def test_a_translator_that_starts_from_the_colour_transfer(photos, tmp_path):
    """Stage 2 applies what is in weights.pt: the transfer to the target's colours, then G, which adds to it."""
    words = ["--method", "fastcut_l5", "--colour-transfer", "--base-channels", 4, "--width", 48, "--crop-size", 32]
    words += ["--iterations", 2, "--device", "cpu", "--seed", 3, "--source", photos, "--target", photos / "deep"]
    assert script("train_translator.py", *words, "--out", tmp_path / "t").returncode == 0
    words = ["--unlabelled", "--source", photos, "--translator", tmp_path / "t", "--device", "cpu", "--precision", "fp32"]
    assert script("translate_dataset.py", *words, "--out", tmp_path / "u").returncode == 0
    G = models.load_network(tmp_path / "t")
    targets = data.list_frames(photos / "deep", labelled=False)
    transfer = colours.ColourTransfer(colours.photograph_statistics(targets, 48), seed=3)
    for frame in data.list_frames(photos, labelled=False):
        matched = transfer(frame.name, data.load_at_width(frame.image, 48).as_subclass(torch.Tensor))
        with torch.inference_mode():
            expected = ((G(data.to_signed(matched)[None])[0] + 1) * 127.5).round().clamp(0, 255)
        found = data.load_image(tmp_path / "u" / "images" / f"{frame.name}.png").float()
        assert (found - expected).abs().max() <= 1  # channels_last may round differently
        assert (found - matched).abs().mean() < 20  # after two steps


def test_predictions_are_palette_images_of_label_ids(photos, run, tmp_path):
    words = ["--segmenter", run, "--images", photos, "--out", tmp_path / "p", "--device", "cpu"]
    result = script("predict.py", *words, "--overlay")
    assert result.returncode == 0 and "3 photographs, 0 already segmented" in result.stderr, result.stderr
    for frame in data.list_frames(photos, labelled=False):
        with Image.open(tmp_path / "p" / f"{frame.name}.png") as image:
            assert image.mode == "P" and image.size == frame.size
            ids, shown = np.array(image), np.array(image.convert("RGB"))
        assert np.array_equal(shown, data.ID_COLOURS[ids]) and {*np.unique(ids)} <= {c.id for c in data.CLASSES}
        overlay = np.array(Image.open(tmp_path / "p" / f"{frame.name}_overlay.jpg")).astype(float)
        expected = (data.load_image(frame.image).permute(1, 2, 0).numpy() + shown.astype(float)) / 2
        assert abs(overlay - expected).mean() < 16  # JPEG
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*.*g")}
    (tmp_path / "p" / "deep" / "a.png").unlink()
    result = script("predict.py", *words, "--overlay")
    assert result.returncode == 0 and "3 photographs, 2 already segmented" in result.stderr
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*.*g")}
    assert before.keys() == after.keys() and sum(before[path] != after[path] for path in before) == 2


def test_predictions_of_other_photographs_are_not_taken_for_these(photos, run, tmp_path, pair):
    words = ["--segmenter", run, "--out", tmp_path / "p", "--device", "cpu"]
    assert script("predict.py", *words, "--images", photos).returncode == 0
    result = script("predict.py", *words, "--images", photos / "deep")
    assert result.returncode == 2 and "started with other arguments" in result.stderr
    later = (tmp_path / "p" / "a b.png").stat().st_mtime + 5
    os.utime(photos / "a b.png", (later, later))  # a video's frame that was extracted anew
    assert "3 photographs, 2 already segmented" in script("predict.py", *words, "--images", photos).stderr
    other = ["evaluate.py", "--segmenter", run, "--data", pair / "target", "--save-predictions", tmp_path / "p"]
    result = script(*other)
    assert result.returncode == 2 and "started with other arguments" in result.stderr


def test_frames_beside_the_city_folders_are_found(photos, tmp_path):
    """Some copies of Cityscapes have no folders for cities."""
    for i, folder in enumerate(("", "city")):
        path = tmp_path / "leftImg8bit" / "train" / folder / f"{i}_leftImg8bit.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "a b.png", path)
    (tmp_path / "leftImg8bit" / "train" / "city" / "deeper").mkdir()
    shutil.copy(photos / "a b.png", tmp_path / "leftImg8bit" / "train" / "city" / "deeper" / "2_leftImg8bit.png")
    assert [frame.name for frame in data.list_frames(tmp_path, labelled=False)] == ["0", "1"]


def test_linked_folders_are_followed_once(photos, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "deep").symlink_to(photos / "deep")
    for name in ("loop", "loop2"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "linked")
    names = [frame.name for frame in data.list_frames(tmp_path / "linked", labelled=False)]
    assert sorted(names) == ["deep/a", "deep/er/é"]


def test_a_sample_is_evenly_spaced(photos, run, tmp_path):
    words = ["--segmenter", run, "--images", photos, "--out", tmp_path / "p", "--sample", 2, "--exclude", tmp_path / "list"]
    (tmp_path / "list").write_text("a b\n")
    assert script("predict.py", *words).returncode == 0
    assert sorted(path.stem for path in (tmp_path / "p").rglob("*.png")) == ["a", "é"]


def test_a_killed_prediction_goes_on(photos, run, tmp_path, watched):
    words = ["--segmenter", run, "--images", photos, "--out", tmp_path / "p", "--device", "cpu"]
    assert script("predict.py", *words, **watched, KILL_AT="SIGKILL .png 2").returncode != 0
    assert len([*(tmp_path / "p").rglob("*.png")]) == 1
    assert script("predict.py", *words).returncode == 0
    assert len([*(tmp_path / "p").rglob("*.png")]) == 3 and not [*(tmp_path / "p").rglob("*.part")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "{photos}", "--out", "{photos}/p"], "lies inside"),
        (["--images", "{photos}/a b.png", "--out", "{photos}"], "is the folder of"),
        (["--images", "{photos}/a b.png", "--out", "{other}"], "holds files that are not predictions"),
        (["--images", "{other}/empty", "--out", "{out}"], "no image"),
        (["--images", "{photos}/gone", "--out", "{out}"], "gone: No such file"),
        (["--images", "{photos}", "--out", "{out}", "--segmenter", "{photos}"], "--segmenter .*: not a finished run"),
        (["--images", "{other}/16.png", "--out", "{out}"], "16.png: .*16-bit"),
        (["--images", "{other}/damaged.png", "--out", "{out}"], "damaged.png: damaged image"),
        (["--images", "{photos}", "{photos}/a b.png", "--out", "{out}"], "different names"),
        (["--images", "--out", "{out}"], "--images"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(photos, run, tmp_path, words, message):
    other = tmp_path / "other"
    (other / "empty").mkdir(parents=True)
    Image.fromarray(np.full((40, 40), 999, np.uint16)).save(other / "16.png")
    (other / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    words = [word.format(photos=photos, other=other, out=tmp_path / "out") for word in words]
    result = script("predict.py", "--segmenter", run, "--device", "cpu", *words)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "out").exists() and not [*photos.rglob(".lock")]


def test_cmyk_photographs_are_segmented(run, tmp_path):
    (tmp_path / "c").mkdir()
    Image.new("CMYK", (64, 48), (9, 99, 9, 0)).save(tmp_path / "c" / "cmyk.jpg")
    result = script("predict.py", "--segmenter", run, "--images", tmp_path / "c" / "cmyk.jpg", "--out", tmp_path / "p")
    assert result.returncode == 0 and Image.open(tmp_path / "p" / "cmyk.png").size == (64, 48)


def test_networks_are_kept_at_multiples_and_taken_by_every_script(pair, tmp_path):
    out, small = tmp_path / "run", ["--device", "cpu", "--width", 128, "--crop-size", 64, "--iterations", 5]
    words = ["--data", pair / "source", "--encoder", "efficientnet-b0", "--encoder-weights", "none", *small, "--out", out]
    assert script("train_segmenter.py", *words, "--batch-size", 2, "--keep-every", 2).returncode == 0
    assert sorted(path.name for path in out.glob("weights*")) == ["weights.pt", "weights_0000002.pt", "weights_0000004.pt"]
    kept = out / "weights_0000002.pt"
    states = [models.load_network(path).state_dict() for path in (out, kept)]
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"])
    assert script("evaluate.py", "--segmenter", kept, "--data", pair / "target").returncode == 0
    assert json.loads((out / "evaluation_0000002.json").read_text())["row"]["model"] == "run_0000002"
    assert not (out / "evaluation.json").exists()
    result = script("predict.py", "--segmenter", kept, "--images", pair / "target", "--out", tmp_path / "p")
    assert result.returncode == 0 and len([*(tmp_path / "p").glob("*.png")]) == 2
    words = ["--source", pair / "source", "--target", pair / "target", "--segmenter", kept, *small, "--out", tmp_path / "a"]
    assert script("adapt_features.py", *words, "--batch-size", 2).returncode == 0
    assert script("predict.py", "--segmenter", out / "weights_9.pt", "--images", pair / "target", "--out", "x").returncode == 2


def test_a_network_that_diverged_is_not_kept(pair, tmp_path):
    words = ["--data", pair / "source", "--encoder", "efficientnet-b0", "--encoder-weights", "none", "--out", tmp_path / "run"]
    words += ["--device", "cpu", "--width", 128, "--crop-size", 64, "--batch-size", 2, "--iterations", 6, "--log-every", 6]
    result = script("train_segmenter.py", *words, "--lr", 1e30, "--keep-every", 1)
    assert result.returncode == 1 and "diverged" in result.stderr
    for path in (tmp_path / "run").glob("weights_*.pt"):
        assert all(value.isfinite().all() for value in models.load_network(path).state_dict().values())


def test_progress_without_a_terminal_is_lines(pair, tmp_path):
    words = ["--source", pair / "source", "--target", pair / "target", "--method", "cut", "--base-channels", 4]
    words += [
        "--device",
        "cpu",
        "--width",
        128,
        "--crop-size",
        64,
        "--iterations",
        4,
        "--log-every",
        1,
        "--out",
        tmp_path / "t",
    ]
    result = script("train_translator.py", *words)
    assert result.returncode == 0 and "\r" not in result.stderr and len(result.stderr.splitlines()) < 6
    assert "nce_x=" in result.stderr.splitlines()[-1] and "4/4" in result.stderr.splitlines()[-1]
    assert len(table(tmp_path / "t" / "log.csv")) == 4
    with Image.open(tmp_path / "t" / "samples" / "0000004.png") as grid:  # titles, and three pictures of 320 pixels
        assert grid.size == (3 * 324 - 4, 24 + 324) and os.path.getsize(grid.filename) > 5000
