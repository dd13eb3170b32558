"""data.py and check_data.py: both layouts, every kind of file, alignment of image and label, sampling, the command."""

import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import labels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from torch.utils.data import StackDataset
from torchvision.datasets import Cityscapes

import check_data
import data
import fid
import runtime

IDS = [c.id for c in data.CLASSES]


def colour_of(ids):
    """Give each label id a colour of its own, its three levels far apart."""
    ids = ids.astype(int)
    return np.stack([ids * 7 % 256, ids * 31 % 256, 255 - ids * 5 % 256], -1).astype(np.uint8)


def draw_pair(seed, height, width):
    rng = np.random.default_rng(seed)
    ids = np.full((height, width), 7, np.uint8)
    for _ in range(6):
        y, x = rng.integers(height - 4), rng.integers(width - 4)
        ids[y : y + height // 2, x : x + width // 2] = rng.choice(IDS)
    return colour_of(ids), ids


def write_gta5(root, sizes):
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for i, size in enumerate(sizes):
        image, ids = draw_pair(i, *size)
        Image.fromarray(image).save(root / "images" / f"{i:05d}.png")
        Image.fromarray(ids).save(root / "labels" / f"{i:05d}.png")
    return root


def write_cityscapes(root, splits):
    for split, n in splits.items():
        for i in range(n):
            for folder, ending, array in zip(
                ("leftImg8bit", "gtFine"), ("leftImg8bit", "gtFine_labelIds"), draw_pair(i, 24, 48)
            ):
                path = root / folder / split / "ulm" / f"ulm_000000_{i:06d}_{ending}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return root


def test_class_table_is_cityscapesscripts():
    evaluated = {label.name: label for label in labels if not label.ignoreInEval}
    for name, c, colour in zip(data.CLASS_NAMES, data.CLASSES, data.PALETTE.tolist(), strict=True):
        theirs = evaluated.pop(name)
        assert (c.id, c.train_id, tuple(colour)) == (theirs.id, theirs.trainId, theirs.color), name
        assert data.CLASS_NAMES[theirs.trainId] == name  # train ids index all our lists
    assert not evaluated
    expected = {label.id: label.trainId for label in labels if not label.ignoreInEval}
    assert data.TRAIN_IDS.tolist() == [expected.get(i, data.VOID) for i in range(256)]
    table = {(c.name, c.id, c.color, c.ignore_in_eval) for c in Cityscapes.classes}
    assert table == {(label.name, label.id, label.color, label.ignoreInEval) for label in labels}  # void classes too
    colours = {label.id: label.color for label in labels}
    assert data.ID_COLOURS.tolist() == [list(colours.get(i, (0, 0, 0))) for i in range(256)]
    assert data.ID_COLOURS.dtype == data.PALETTE.dtype == data.TRAIN_IDS.dtype == np.uint8


def test_layouts_are_told_apart(tmp_path):
    gta5 = write_gta5(tmp_path / "a", [(20, 30), (24, 48)])
    cityscapes = write_cityscapes(tmp_path / "b", {"train": 3, "val": 1})
    assert [f.name for f in data.list_frames(gta5)] == ["00000", "00001"]
    assert len(data.list_frames(cityscapes)) == 3
    assert [f.label.name for f in data.list_frames(cityscapes, "val")] == ["ulm_000000_000000_gtFine_labelIds.png"]
    assert len(data.list_frames(cityscapes, "train,val", labelled=False)) == 4
    with pytest.raises(ValueError, match="no images/ .GTA5. or leftImg8bit/"):
        data.list_frames(tmp_path)
    with pytest.raises(ValueError, match="leftImg8bit/test: no such folder"):
        data.list_frames(cityscapes, "train,test")


def test_suffixes_are_read_in_capitals_too(tmp_path):
    root = write_gta5(tmp_path, [(20, 30)] * 2)
    for path in (root / "images" / "00001.png", root / "labels" / "00001.png"):
        path.rename(path.with_suffix(".PNG"))
    assert [f.name for f in data.list_frames(root)] == ["00000", "00001"]


def test_unlabelled_frames_need_no_labels(tmp_path):
    root = write_cityscapes(tmp_path, {"train": 2})
    next((root / "gtFine").rglob("*.png")).unlink()
    assert len(data.list_frames(root, labelled=False)) == 2
    with pytest.raises(ValueError, match="has no label"):
        data.list_frames(root)


@pytest.mark.parametrize(("size", "width"), [((40, 60), 60), ((41, 67), 30), ((37, 90), 97)])
def test_image_and_label_stay_aligned_through_resizing(tmp_path, size, width):
    root = write_gta5(tmp_path, [size])
    frame = data.list_frames(root)[0]
    image, ids = (
        data.resize_to_width(load(path), width) for load, path in zip((data.load_image, data.load_label_ids), frame[1:])
    )
    assert image.shape[1:] == ids.shape == (round(size[0] * width / size[1]), width)
    # Antialiasing mixes colours at borders, so not all pixels agree; but no shift of the label agrees better.
    shifts = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)]
    found = [agreement(image, ids.roll(shift, (0, 1))) for shift in shifts]
    assert found[0] == max(found) and found.count(found[0]) == 1 and found[0] > (0.99 if width == size[1] else 0.7)


def test_ranges_of_the_networks():
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(data.to_signed(levels), torch.tensor([-1.0, -0.6, 1.0]))
    torch.testing.assert_close(data.to_unit(levels), torch.tensor([0.0, 0.2, 1.0]))


def agreement(image, ids):
    """Return the fraction of pixels that have the colour of their id, up to what antialiasing does at borders."""
    expected = torch.from_numpy(colour_of(ids.numpy())).permute(2, 0, 1)
    return ((image.int() - expected.int()).abs().amax(0) <= 8).float().mean()


def test_half_of_the_samples_are_mirrored_image_and_label_together(tmp_path):
    frames = data.list_frames(write_gta5(tmp_path, [(20, 30)]))
    whole = data.load_image(frames[0].image), data.load_label(frames[0].label)
    crops = data.Crops(frames, 30, (20, 30), length=24, labelled=True)
    mirrored = 0
    for image, label in (crops[k] for k in range(24)):
        is_mirrored = torch.equal(image, whole[0].flip(-1))
        for part, original in zip((image, label), whole):
            assert torch.equal(part, original.flip(-1) if is_mirrored else original)
        mirrored += is_mirrored
    assert 5 <= mirrored <= 19


def test_streams_differ_in_order_and_crop(tmp_path):
    frames = data.list_frames(write_gta5(tmp_path, [(40, 60)] * 8))
    x, y = (data.Crops(frames, 60, (16, 16), 16, stream=stream) for stream in (0, 1))
    assert [x.frame(k).name for k in range(16)] != [y.frame(k).name for k in range(16)]
    one = data.list_frames(write_gta5(tmp_path / "one", [(40, 60)]))
    x, y = (data.Crops(one, 60, (16, 16), 8, stream=stream) for stream in (0, 1))
    assert not any(torch.equal(x[k], y[k]) for k in range(8))


@pytest.mark.parametrize("width", [60, 47, 130])
def test_images_are_resized_as_pillow_does(width):
    """Bilinear and antialiased; Pillow and torchvision may round differently."""
    pixels = np.random.default_rng(0).integers(256, size=(60, 90, 3), dtype=np.uint8)
    image = data.tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
    resized = data.resize_to_width(image, width).permute(1, 2, 0).numpy()
    expected = Image.fromarray(pixels).resize((width, round(60 * width / 90)), Image.Resampling.BILINEAR)
    assert np.abs(resized.astype(int) - np.asarray(expected)).max() <= 1


def test_train_ids_are_shown_in_cityscapes_colours():
    colours = {label.trainId: label.color for label in labels if not label.ignoreInEval}
    ids = torch.arange(256, dtype=torch.uint8).view(16, 16)
    shown = data.colourise(ids).permute(1, 2, 0).view(256, 3).tolist()
    assert shown == [list(colours.get(i, (0, 0, 0))) for i in range(256)]


def test_sample_k_depends_on_seed_and_k_alone(tmp_path):
    frames = data.list_frames(write_gta5(tmp_path, [(40, 60)] * 5))
    one, two = (data.Crops(frames, 60, (16, 16), 20, seed=3) for _ in range(2))
    forward = [one[k] for k in range(20)]
    torch.manual_seed(123)
    backward = [two[k] for k in reversed(range(20))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward))
    assert len({sample.numpy().tobytes() for sample in forward}) > 15  # crops differ
    other = data.Crops(frames, 60, (16, 16), 20, seed=4)
    assert not all(torch.equal(a, other[k]) for k, a in enumerate(forward))


def test_samples_end_and_leave_other_random_numbers_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("CUDA's generators were seeded"))
    crops = data.Crops(data.list_frames(write_gta5(tmp_path, [(24, 48)] * 2)), 48, (16, 16), length=3)
    torch.default_generator.manual_seed(0)
    expected = torch.rand(3)
    torch.default_generator.manual_seed(0)
    assert len([*crops]) == 3 and torch.equal(torch.rand(3), expected)


def test_two_domains_are_shuffled_separately_and_the_shorter_one_repeats(tmp_path):
    long = data.list_frames(write_gta5(tmp_path / "a", [(20, 20)] * 6))
    short = data.list_frames(write_gta5(tmp_path / "b", [(20, 20)] * 4))
    x, y = data.Crops(long, 20, (16, 16), 12, stream=0), data.Crops(short, 20, (16, 16), 12, stream=1)
    assert len(StackDataset(x, y)) == 12
    names = [[crops.frame(k).name for k in range(12)] for crops in (x, y)]
    for epoch in range(2):
        assert len(set(names[0][6 * epoch : 6 * epoch + 6])) == 6
    for epoch in range(3):
        assert len(set(names[1][4 * epoch : 4 * epoch + 4])) == 4
    assert names[0][:6] != names[0][6:] and names[0][:4] != names[1][:4]


def test_cached_samples_are_the_same_to_the_bit(tmp_path):
    """While the cache fills and once it is full. Frames that already have the width are not copied."""
    frames = data.list_frames(write_gta5(tmp_path / "a", [(40, 60), (30, 50), (20, 36)]))
    plain, cached = (data.Crops(frames, 36, (16, 16), 9, labelled=True, cache=c) for c in (None, tmp_path / "kept"))
    for k in range(9):
        assert all(torch.equal(a, b) for a, b in zip(plain[k], cached[k], strict=True))
    kept = sorted((tmp_path / "kept").iterdir())
    assert len(kept) == 4 and {Image.open(path).width for path in kept} == {36}
    for path in kept:
        Image.fromarray(np.zeros_like(Image.open(path))).save(path)
    assert sorted(cached[k][0].any().item() for k in range(3)) == [False, False, True]  # the copies are what is read


def test_a_cache_notices_changed_originals_and_damaged_copies(tmp_path):
    path, kept = write_gta5(tmp_path / "a", [(40, 60)]) / "images" / "00000.png", tmp_path / "kept"
    data.load_at_width(path, 30, cache=kept)
    (once,) = kept.iterdir()
    once.write_bytes(once.read_bytes()[:100])
    assert torch.equal(data.load_at_width(path, 30, cache=kept), data.load_at_width(path, 30))
    assert torch.equal(data.load_image(once), data.load_at_width(path, 30))  # replaced
    Image.fromarray(draw_pair(5, 40, 60)[0]).save(path)
    assert torch.equal(data.load_at_width(path, 30, cache=kept), data.load_at_width(path, 30))
    data.load_at_width(path, 20, cache=kept)
    assert len(list(kept.iterdir())) == 3  # before the change, after it, at another width


def test_a_cache_that_cannot_be_written_is_ignored(tmp_path, monkeypatch):
    path, kept = write_gta5(tmp_path / "a", [(40, 60)]) / "images" / "00000.png", tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert torch.equal(data.load_at_width(path, 30, cache=kept), data.load_at_width(path, 30))
    assert not list(kept.iterdir())


# --- unusable input: one line that names the file


def refused(function, *args, **options):
    """Return the message of the ValueError that a call raises, as it is printed. It must be one line."""
    with pytest.raises(ValueError) as error:
        function(*args, **options)
    message = data.printable(error.value)
    assert message.isascii() and "Error" not in message, message
    return message


def command(monkeypatch, capsys, *args):
    """Run `python check_data.py args` in this process -> (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["check_data.py", *map(str, args)])
    try:
        runtime.run_script(check_data.main)
        status = 0
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


def png(width, height, bits, colour, pixels=b""):
    """Return a PNG file of a kind that Pillow cannot write. colour: 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA."""
    chunks = (
        (b"IHDR", struct.pack(">2I5B", width, height, bits, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(pixels)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def write_bytes(content):
    return lambda path: path.write_bytes(content)


def save(mode, size, format="PNG"):
    return lambda path: Image.new(mode, size).save(path, format)


NO_FILE = {  # how to make it, and what list_frames and the loaders say
    "folder": (lambda path: path.mkdir(), "not a regular file"),
    "fifo": (os.mkfifo, "not a regular file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    "loop of links": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
}
DAMAGED = "damaged image or unsupported format "
NO_IMAGE = {  # what list_frames and load_image say
    "empty": (write_bytes(b""), DAMAGED),
    "text": (write_bytes(b"version https://git-lfs.github.com/spec/v1"), DAMAGED),
    "header cut off": (write_bytes(png(20, 20, 8, 2)[:20]), DAMAGED),
    "no height": (write_bytes(png(0, 20, 8, 2)), DAMAGED),
    "float": (save("F", (20, 20), "TIFF"), DAMAGED),
    "16-bit grey": (save("I;16", (20, 20)), "16-bit pixels"),
    "16-bit colour": (write_bytes(png(20, 20, 16, 2, bytes(20 * 121))), "16-bit pixels"),
    "16-bit grey with alpha": (write_bytes(png(20, 20, 16, 4, bytes(20 * 81))), "16-bit pixels"),
    "16-bit colour with alpha": (write_bytes(png(20, 20, 16, 6, bytes(20 * 161))), "16-bit pixels"),
    "too many pixels": (write_bytes(png(100_000, 100_000, 8, 2)), "exceeds limit of 178956970 pixels"),
}
NO_SIZE = {  # what check_frames says; load_image reads them
    "1x1": (save("RGB", (1, 1)), "1x1, smaller than the minimum of 16x16"),
    "1xN": (save("RGB", (400, 1)), "400x1, smaller than the minimum of 16x16"),
    "Nx15": (save("L", (15, 400)), "15x400, smaller than the minimum of 16x16"),
}
NO_LABEL = {  # what list_frames and load_label_ids say
    "colour": (save("RGB", (30, 20)), "RGB pixels; 8-bit label ids"),
    "16-bit": (save("I;16", (30, 20)), "16-bit pixels"),
    "4-bit grey": (write_bytes(png(30, 20, 4, 0, bytes(20 * 16))), "L;4 pixels; 8-bit label ids"),
    "JPEG": (save("L", (30, 20), "JPEG"), DAMAGED),
}


def cases(*tables):
    return [pytest.param(*case, id=name) for table in tables for name, case in table.items()]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("make", "message"), cases(NO_FILE, NO_IMAGE))
def test_unusable_images_are_refused_from_their_headers(tmp_path, make, message, labelled):
    """A FIFO among them: opening one would wait for ever."""
    root = write_gta5(tmp_path, [(20, 30)] * 3)
    path = root / "images" / "00001.png"
    path.unlink()
    make(path)
    found = refused(data.list_frames, root, labelled=labelled)
    assert found.startswith(f"{path}: ") and message in found and "more" not in found
    assert message in refused(data.load_image, path)
    assert f"{path}: " in refused(data.load_label_ids, path)


@pytest.mark.parametrize(("make", "message"), cases(NO_SIZE))
def test_images_that_are_too_small_are_refused(tmp_path, make, message):
    root = write_gta5(tmp_path, [(20, 30)] * 3)
    path = root / "images" / "00001.png"
    make(path)
    assert data.list_frames(root).left_out.keys() == {"00001"}  # the pair's sizes differ
    frames = data.list_frames(root, labelled=False)
    assert refused(check_data.check_frames, frames) == f"{path}: {message} (1 of 3 frames)"
    data.load_image(path)


@pytest.mark.parametrize(("make", "message"), cases(NO_FILE, NO_LABEL))
def test_unusable_labels_are_refused_from_their_headers(tmp_path, make, message):
    root = write_gta5(tmp_path, [(20, 30)] * 2)
    path = root / "labels" / "00001.png"
    path.unlink()
    make(path)
    assert message in refused(data.list_frames, root)
    assert message in refused(data.load_label_ids, path)
    assert len(data.list_frames(root, labelled=False)) == 2


def test_labels_of_few_bits_are_read(tmp_path):
    """In palette and black-and-white files, Pillow returns the stored indices."""
    for bits in (1, 2, 4):
        ids = (np.arange(20 * 30) % 2**bits).astype(np.uint8).reshape(20, 30)
        image = Image.fromarray(ids)
        image.putpalette(list(range(256)) * 3)
        image.save(tmp_path / "x.png", bits=bits)
        assert np.array_equal(data.load_label_ids(tmp_path / "x.png").numpy(), ids)
    Image.fromarray(ids > 7).save(tmp_path / "x.png")
    assert np.array_equal(data.load_label_ids(tmp_path / "x.png").numpy(), ids > 7)


def test_sizes_are_checked_at_the_width_of_training():
    def frames(*sizes):
        return [data.Frame("x", Path(f"{w}x{h}.png"), None, (w, h)) for w, h in sizes]

    check_data.check_frames(frames((60, 40)), 60, (40, 60))
    check_data.check_frames(frames((60, 40)), 120, (80, 120))
    check_data.check_frames(frames((60, 40)), 24)
    assert "60x40.png: 30x20 at --width 30, smaller than the crop of 21x30 (HxW): lower --crop-size" in refused(
        check_data.check_frames, frames((60, 40)), 30, (21, 30)
    )
    assert "60x40, smaller than the crop of 40x61" in refused(check_data.check_frames, frames((60, 40)), crop=(40, 61))
    assert "21x14 at --width 21, smaller than the minimum of 16x16" in refused(check_data.check_frames, frames((60, 40)), 21)
    message = refused(check_data.check_frames, frames((60, 40), (50, 20), (60, 30)), crop=(40, 60))
    assert message.startswith("50x20.png: 50x20, ") and "(2 of 3 frames)" in message


@pytest.mark.parametrize("error", [struct.error, IndexError, zlib.error, SyntaxError])
def test_whatever_pillow_raises_means_a_damaged_file(tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error

    Image.new("L", (30, 20)).save(tmp_path / "x.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    for load in (data.load_image, data.load_label_ids):
        with pytest.raises(ValueError, match=f"x.png: damaged image .*{error.__name__}"):
            load(tmp_path / "x.png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match="x.png: damaged image"):
        data.read_file(tmp_path / "x.png", header_only=True)


def test_lack_of_memory_does_not_mean_a_damaged_file(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise MemoryError

    Image.new("L", (30, 20)).save(tmp_path / "x.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError):
        data.load_image(tmp_path / "x.png")


def listed(root, monkeypatch, capsys, *args):
    """Return the lines that --check-data prints, having checked their number at the end and that nothing else is said."""
    status, out, err = command(monkeypatch, capsys, root, "--check-data", *args)
    lines = out.splitlines()
    assert (status, err) == (2, f"check_data.py: {root}: {len(lines)} problem{'s' if len(lines) > 1 else ''}\n")
    return sorted(lines)


def test_all_problems_of_the_structure_are_counted_and_listed(tmp_path, monkeypatch, capsys):
    root = write_cityscapes(tmp_path, {"train": 6})
    images, labels = (sorted((root / folder).rglob("*.png")) for folder in ("leftImg8bit", "gtFine"))
    images[0].unlink()
    labels[1].unlink()
    images[2].with_suffix(".jpg").write_bytes(images[2].read_bytes())
    Image.new("L", (48, 25), 7).save(labels[3])
    labels[4].write_bytes(b"")
    names = [path.name.removesuffix("_leftImg8bit.png") for path in images]
    expected = [
        f"{labels[0]}: has no image",
        f"{images[1]}: has no label (PNG)",
        f"{images[2]}: a second file of frame {names[2]}; names must be unique",
        f"{labels[4]}: {DAMAGED}(cannot identify image file '{labels[4]}')",
    ]
    assert listed(root, monkeypatch, capsys) == sorted(expected)
    message = refused(data.list_frames, root)
    assert message.startswith(tuple(expected)) and message.endswith("(and 2 more: see check_data.py DIR --check-data)")
    assert [frame.name for frame in data.list_frames(root, exclude=names[:5])] == names[5:]  # excluded files are not read
    assert refused(data.list_frames, root, exclude=names[:4]) == expected[3]  # a single problem, no count
    differing = f"{labels[3]}: differs from its image in size (1 of 2 labels)"
    assert refused(data.list_frames, root, exclude=[*names[:3], names[4]]) == differing
    assert "6 excluded" in refused(data.list_frames, root, exclude=names)


def test_a_name_in_two_cities_is_refused(tmp_path):
    root = write_cityscapes(tmp_path, {"train": 1})
    shutil.copytree(root / "leftImg8bit/train/ulm", root / "leftImg8bit/train/jena")
    assert "names must be unique" in refused(data.list_frames, root, labelled=False)


def test_missing_folders_are_named(tmp_path):
    root = write_gta5(tmp_path / "a", [(20, 30)])
    (root / "labels").rename(root / "elsewhere")
    assert "labels: no such folder" in refused(data.list_frames, root)
    assert "gone: no such folder" in refused(data.list_frames, tmp_path / "gone")
    root = write_cityscapes(tmp_path / "b", {"train": 1})
    (root / "gtFine").rename(root / "elsewhere")
    assert "gtFine/train: no such folder" in refused(data.list_frames, root)


def test_check_data_lists_problems_of_headers_and_pixels(tmp_path, monkeypatch, capsys):
    root = write_gta5(tmp_path, [(40, 60)] * 6)
    images, labels = (sorted((root / folder).iterdir()) for folder in ("images", "labels"))
    images[0].write_bytes(images[0].read_bytes()[:-40])
    Image.fromarray(np.full((40, 60), 77, np.uint8)).save(labels[1])
    images[2].write_bytes(png(60, 40, 16, 2, bytes(40 * 361)))
    labels[2].write_bytes(b"")  # of the files of a frame, the first that is damaged is named
    labels[3].write_bytes(labels[3].read_bytes()[:-40])
    found = listed(root, monkeypatch, capsys)
    starts = [
        f"{images[0]}: {DAMAGED}(",
        f"{images[2]}: {DAMAGED}(16-bit pixels",
        f"{labels[1]}: label ids [77] are not in Cityscapes' table",
        f"{labels[3]}: {DAMAGED}(",
    ]
    assert len(found) == len(starts) and all(map(str.startswith, found, starts))
    assert listed(root, monkeypatch, capsys, "--unlabelled") == found[:2]
    (tmp_path / "exclude").write_text("00000\n00001\n00002\n00003\n")
    assert command(monkeypatch, capsys, root, "--check-data", "--exclude", tmp_path / "exclude")[0] == 0


NAMES = [b"new\nline", b"carriage\rreturn", b"\x1b[31mescape", b"not \xff\xfe utf-8", "\u202eright to left\u2028".encode()]


@pytest.mark.parametrize("name", NAMES)
def test_messages_stay_on_one_line_for_any_file_name(tmp_path, name, monkeypatch, capsys, caplog):
    root = write_gta5(tmp_path, [(20, 30)])
    image = Path(os.fsdecode(os.path.join(os.fsencode(root / "images"), name + b".png")))
    image.write_bytes(b"")
    assert "has no label" in refused(data.list_frames, root)
    label = root / "labels" / image.name
    Image.new("L", (31, 20), 7).save(label)
    assert DAMAGED in refused(data.list_frames, root)
    assert DAMAGED in refused(data.load_image, image)
    status, out, err = command(monkeypatch, capsys, root, "--check-data")
    assert status == 2 and out.isascii() and out.count("\n") == 1 and err.endswith(": 1 problem\n")
    status, out, err = command(monkeypatch, capsys, root)
    assert status == 2 and err.isascii() and err.count("\n") == 1 and err[:-1].isprintable() and not out
    Image.new("RGB", (30, 20)).save(image)
    assert len(data.list_frames(root)) == 1 and len(data.list_frames(root, labelled=False)) == 2
    assert [frame.name for frame in data.list_frames(root, exclude=[image.stem])] == ["00000"]
    assert len(caplog.messages) == 2 and all(line.isprintable() and line.isascii() for line in caplog.messages)
    (root / "exclude").write_bytes(name + b".png\n")
    if not {10, 13} & set(name):  # a line of a file cannot name those
        assert data.read_names(root / "exclude") == {image.stem}


def test_names_to_exclude_are_read_with_and_without_suffix(tmp_path, caplog):
    file = tmp_path / "exclude.txt"
    file.write_bytes(b"\xef\xbb\xbf00000\r\n# seen twice\n\n  00002.png  # dark\nv1.5\na#b.JPG\n")
    assert data.read_names(file) == {"00000", "00002", "v1.5", "a#b"}
    root = write_gta5(tmp_path / "set", [(20, 30)] * 4)
    (root / "labels" / "00002.png").unlink()
    assert [f.name for f in data.list_frames(root, exclude=data.read_names(file))] == ["00001", "00003"]
    assert caplog.messages == [
        f"{root}: 2 excluded names match no frame: a#b, v1.5",
        f"{root}: 2 excluded: 00000, 00002",
    ]
    file.write_text("# none\n\n")
    assert "exclude.txt: no name in it" in refused(data.read_names, file)
    with pytest.raises(FileNotFoundError):
        data.read_names(tmp_path / "gone")


@pytest.mark.parametrize(
    "line", ["ulm_000000_000001", "ulm_000000_000001_leftImg8bit.png", "train/ulm/ulm_000000_000001_gtFine_labelIds.png"]
)
def test_one_list_of_names_serves_both_layouts(tmp_path, line):
    """A frame may be named by its image or by its label."""
    (tmp_path / "exclude.txt").write_text(f"{line}\n")
    city = write_cityscapes(tmp_path / "a", {"train": 3})
    (tmp_path / "b" / "images").mkdir(parents=True)
    for path in city.rglob("*leftImg8bit.png"):  # names as they are
        (tmp_path / "b" / "images" / path.name).write_bytes(path.read_bytes())
    exclude = data.read_names(tmp_path / "exclude.txt")
    for root in (city, tmp_path / "b"):
        frames = data.list_frames(root, labelled=False, exclude=exclude)
        assert len(frames) == 2 and list(frames.left_out.values()) == ["excluded"]


def test_frames_of_a_single_colour_are_listed_in_the_form_that_exclude_takes(tmp_path, monkeypatch, capsys):
    """As some frames of GTA5, and Cityscapes' troisdorf_000000_000073, are."""
    root = write_gta5(tmp_path / "set", [(20, 30), (24, 40), (20, 30)])
    Image.new("RGB", (30, 20), (0, 0, 9)).save(root / "images" / "00002.png")
    status, out, err = command(monkeypatch, capsys, root, "--check-data", "--unlabelled")
    assert (status, err) == (0, "") and out.splitlines()[1:] == ["00002", f"{root}: 3 frames of 30x20, 40x24"]
    (tmp_path / "list").write_text(out.rsplit("\n", 2)[0])
    frames = data.list_frames(root, exclude=data.read_names(tmp_path / "list"))
    assert [frame.name for frame in frames] == ["00000", "00001"]
    (root / "images" / "00001.png").write_bytes(b"")
    status, again, err = command(monkeypatch, capsys, root, "--check-data", "--unlabelled")
    assert status == 2 and again.splitlines()[1:] == out.splitlines()[:2] and err.endswith("set: 1 problem\n")


def test_the_command_describes_a_sound_data_set(tmp_path, monkeypatch, capsys, caplog):
    root = write_gta5(tmp_path / "set", [(20, 30), (24, 40), (20, 30)])
    line = f"{root}: 3 labelled frames of 30x20, 40x24\n"
    assert command(monkeypatch, capsys, root) == (0, line, "")
    assert command(monkeypatch, capsys, root, "--unlabelled", "--check-data") == (0, line.replace("labelled ", ""), "")
    status, out, err = command(monkeypatch, capsys, root, "--check-data")
    assert (status, err) == (0, "") and out.startswith(line) and not caplog.messages
    shown = {" ".join(words[:-1]): words[-1] for words in map(str.split, out.splitlines()[1:])}
    pixels = np.concatenate([np.ravel(Image.open(path)) for path in (root / "labels").iterdir()])
    expected = {c.name: (pixels == c.id).mean() for c in data.CLASSES}
    expected["void"] = 1 - sum(expected.values())
    assert shown == {name: f"{fraction:.2%}" for name, fraction in expected.items()}


def test_the_command_keeps_to_its_streams(tmp_path):
    """In a process of its own: the log goes to stderr."""
    root = write_gta5(tmp_path / "set", [(20, 30)] * 2)
    (root / "images" / "00001.png").write_bytes(b"")
    (tmp_path / "exclude.txt").write_text("00001.png\n")
    line = [sys.executable, check_data.__file__, root, "--exclude", tmp_path / "exclude.txt"]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    expected = (0, f"{root}: 1 labelled frames of 30x20\n", f"{root}: 1 excluded: 00001\n")
    assert (result.returncode, result.stdout, result.stderr) == expected


def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    root = write_gta5(tmp_path, [(20, 30), (20, 15)])
    message = f"check_data.py: {root}/images/00001.png: 15x20, smaller than the minimum of 16x16 (1 of 2 frames)\n"
    assert command(monkeypatch, capsys, root, "--unlabelled") == (2, "", message)
    status, out, err = command(monkeypatch, capsys, root, "--exclude", root / "gone")
    assert (status, out) == (2, "") and "No such file" in err and "gone" in err and err.count("\n") == 1
    status, out, err = command(monkeypatch, capsys, root / "gone", "--check-data")
    assert (status, out, err) == (2, "", f"check_data.py: {root}/gone: no such folder\n")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(seed=st.integers(0, 2**31), cut=st.booleans(), changes=st.integers(1, 6), suffix=st.sampled_from([".png", ".jpg"]))
def test_any_damage_is_reported_or_harmless(tmp_path, seed, cut, changes, suffix):
    rng = np.random.default_rng(seed)
    path = tmp_path / f"x{suffix}"
    Image.fromarray(rng.integers(256, size=(20, 20), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    for place in rng.integers(len(content), size=changes):
        content[place] = rng.integers(256)
    path.write_bytes(content[: rng.integers(len(content))] if cut else content)
    for load in (data.load_image, data.load_label_ids):
        try:
            load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()


# --- for any size, id, aspect ratio and mode

KNOWN = [*range(35), 255]  # 34 as in GTA5, 255 as some tools write void
MODES = ("RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "YCbCr")
SIDES = array_shapes(min_dims=2, max_dims=2, max_side=60)
one_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # each example overwrites the files of the last one


@one_folder
@given(ids=arrays(np.uint8, SIDES, elements=st.sampled_from(KNOWN)), palette=st.booleans())
def test_any_known_ids_are_read(tmp_path, ids, palette):
    image = Image.fromarray(ids)
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(tmp_path / "x.png")
    assert np.array_equal(data.load_label_ids(tmp_path / "x.png").numpy(), ids)
    assert np.array_equal(data.load_label(tmp_path / "x.png").numpy(), data.TRAIN_IDS[ids])


@one_folder
@given(ids=arrays(np.uint8, SIDES, elements=st.integers(0, 255)))
def test_any_unknown_id_is_named(tmp_path, ids):
    Image.fromarray(ids).save(tmp_path / "x.png")
    unknown = sorted(set(ids.ravel().tolist()) - set(KNOWN))
    if unknown:
        with pytest.raises(ValueError) as error:
            data.load_label(tmp_path / "x.png")
        assert f"x.png: label ids {unknown} " in str(error.value)
    else:
        data.load_label(tmp_path / "x.png")


COLOURED = SIDES.map(lambda sides: (*sides, 3))


@one_folder
@given(pixels=arrays(np.uint8, COLOURED), mode=st.sampled_from(MODES), suffix=st.sampled_from([".png", ".jpg"]))
def test_any_mode_and_size_is_read_as_pillow_shows_it(tmp_path, pixels, mode, suffix):
    if mode in ("CMYK", "YCbCr"):
        suffix = ".jpg"
    elif suffix == ".jpg" and mode not in ("RGB", "L"):
        mode = "RGB"
    Image.fromarray(pixels).convert(mode).save(tmp_path / f"x{suffix}")
    with Image.open(tmp_path / f"x{suffix}") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(data.load_image(tmp_path / f"x{suffix}").permute(1, 2, 0).numpy(), expected)


@given(ids=arrays(np.uint8, SIDES), width=st.integers(1, 90))
def test_any_label_is_resized_nearest_exact(ids, width):
    """Output pixel i of n has its centre at (i + 1/2) / n of the side; it takes the input pixel in which that point lies."""
    resized = data.resize_to_width(data.tv_tensors.Mask(torch.from_numpy(ids)), width).numpy()
    assert resized.shape == (max(1, round(ids.shape[0] * width / ids.shape[1])), width)
    # Where a centre falls on the border of two pixels, rounding in float32 may give either.
    rows, columns = ([nearest(n, side, shift) for shift in (-1e-4, 1e-4)] for n, side in zip(resized.shape, ids.shape))
    assert np.any([resized == ids[np.ix_(i, j)] for i in rows for j in columns], axis=0).all()


def nearest(n, side, shift):
    return np.clip(np.floor((2 * np.arange(n) + 1) * side / (2 * n) + shift).astype(int), 0, side - 1)


@given(seed=st.integers(0, 2**31), height=st.integers(16, 40), width=st.integers(16, 80), k=st.integers(0, 10**6))
def test_any_crop_keeps_image_and_label_together(tmp_path_factory, seed, height, width, k):
    root = tmp_path_factory.mktemp("crops")
    frames = data.list_frames(write_gta5(root, [(height, width)]))
    crop = (1 + seed % height, 1 + seed // 7 % width)
    image, label = data.Crops(frames, width, crop, k + 1, seed, labelled=True)[k]
    assert image.shape == (3, *crop) and label.shape == crop
    assert torch.equal(image, torch.from_numpy(colour_of(np.array(IDS)[label.numpy()])).permute(2, 0, 1))


# --- what labels hold, and how files are rotated


def test_labels_without_an_evaluated_class_are_refused(tmp_path):
    """As those of Cityscapes' test split."""
    root = write_gta5(tmp_path, [(20, 30)] * 2)
    for path in (root / "labels").iterdir():
        Image.fromarray(np.full((20, 30), 3, np.uint8)).save(path)
    assert "00000.png: all void, as are all 2 labels" in refused(check_data.check_frames, data.list_frames(root))
    Image.fromarray(np.full((20, 30), 26, np.uint8)).save(path)
    check_data.check_frames(data.list_frames(root))


def test_a_palette_with_cityscapes_colours_under_other_indices_is_refused(tmp_path):
    colours = {c.id: c.color for c in Cityscapes.classes}
    ids = np.repeat(np.array([7, 8, 11, 26], np.uint8), 5)[None].repeat(10, 0)
    rgb = np.array([[colours[i] for i in row] for row in ids], np.uint8)
    Image.fromarray(rgb).quantize(4).save(tmp_path / "quantized.png")
    assert "has the colour of label id" in refused(data.load_label_ids, tmp_path / "quantized.png")
    train_ids = Image.fromarray(data.TRAIN_IDS[ids])
    train_ids.putpalette(data.PALETTE.flatten().tolist())
    train_ids.save(tmp_path / "train_ids.png")
    assert "has the colour of label id 7" in refused(data.load_label_ids, tmp_path / "train_ids.png")


@pytest.mark.parametrize("palette", ["cityscapes", "grey", "web", "black"])
def test_other_palettes_are_accepted(tmp_path, palette):
    image = Image.fromarray(np.arange(34, dtype=np.uint8)[None].repeat(4, 0))
    colours = {"grey": [v for i in range(256) for v in (i, i, i)], "black": [0, 0, 0] * 256}
    colours["web"] = Image.new("RGB", (1, 1)).convert("P", palette=Image.Palette.WEB).getpalette()
    colours["cityscapes"] = [v for c in Cityscapes.classes if c.id >= 0 for v in c.color]
    image.putpalette(colours[palette])
    image.save(tmp_path / "x.png")
    assert data.load_label_ids(tmp_path / "x.png")[0].tolist() == list(range(34))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_rotated_as_a_viewer_does(tmp_path, orientation, suffix):
    """The file holds what the sensor saw; EXIF says how the camera was held."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[16:, 24:] = 250, 120
    t = upright.swapaxes(0, 1)
    seen = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], t, t[::-1], t[::-1, ::-1], t[:, ::-1]][
        orientation - 1
    ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(seen)).save(
        tmp_path / f"x.{suffix}", exif=exif, **{"quality": 95} if suffix == "jpg" else {}
    )
    path = tmp_path / f"x.{suffix}"
    assert data.read_file(path, header_only=True)[0] == (48, 32)
    read = data.load_image(path).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(read - upright)[4:12, 4:-4].max() < 8 and np.abs(read - upright)[20:-4, 4:-4].mean() < 8


def test_photographs_with_a_preview_are_rotated_too(tmp_path):
    """Many phones write JPEG files of several images, which Pillow calls MPO."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (48, 32))
    image.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[image], exif=exif)
    with Image.open(tmp_path / "x.jpg") as saved:
        assert saved.format == "MPO"
    assert data.read_file(tmp_path / "x.jpg", header_only=True)[0] == (32, 48)
    assert data.load_image(tmp_path / "x.jpg").shape == (3, 48, 32)


@pytest.mark.parametrize("tag", [0x011A, 0xA005])  # resolution, which is a fraction; place of further tags, a number
def test_a_damaged_tag_does_not_keep_a_photograph_from_being_turned(tmp_path, tag):
    """It holds the text abc."""
    tags = struct.pack("<HHLHHHHL4s", 0x0112, 3, 1, 6, 0, tag, 2, 4, b"abc")
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + tags + struct.pack("<L", 0)
    Image.new("RGB", (48, 32)).save(tmp_path / "x.jpg", exif=exif)
    assert data.load_image(tmp_path / "x.jpg").shape == (3, 48, 32)
    assert fid.read_image(tmp_path / "x.jpg", width=16).shape == (3, 299, 299)


@pytest.mark.parametrize("tag", [0, 9, 65535])
def test_an_invalid_orientation_is_ignored(tmp_path, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.new("RGB", (48, 32)).save(tmp_path / "x.jpg", exif=exif)
    assert data.read_file(tmp_path / "x.jpg", header_only=True)[0] == (48, 32)
    assert data.load_image(tmp_path / "x.jpg").shape == (3, 32, 48)


def test_train_ids_instead_of_label_ids_cause_a_warning(tmp_path, caplog, monkeypatch):
    root = write_gta5(tmp_path, [(20, 30)] * 2)
    for path in (root / "labels").iterdir():
        Image.fromarray(np.tile(np.array([0, 8, 13, 255], np.uint8), (20, 8))[:, :30]).save(path)
    frames, read, load = data.list_frames(root), [], data.load_label_ids
    monkeypatch.setattr(data, "load_label_ids", lambda path, *classes: read.append(path) or load(path, *classes))
    frames *= 80
    check_data.check_frames(frames)
    assert "are these train ids?" in caplog.text and len(read) == 100  # not those of a whole data set


def test_a_label_must_be_png(tmp_path):
    root = write_gta5(tmp_path, [(20, 30)] * 2)
    Image.open(root / "labels" / "00001.png").save(root / "labels" / "00001.jpg")
    data.list_frames(root)  # a JPEG copy of a PNG is ignored
    (root / "labels" / "00001.png").unlink()
    assert "00001.png: has no label (PNG)" in refused(data.list_frames, root)


def test_pairs_that_differ_in_size_are_left_out_and_counted(tmp_path, caplog):
    root = write_gta5(tmp_path, [(20, 30)] * 12)
    for i in range(1, 12):
        Image.new("L", (30, 21), 7).save(root / "labels" / f"{i:05d}.png")
    frames = data.list_frames(root)
    assert len(frames) == 1 and len(frames.left_out) == 11
    assert caplog.messages == [f"{root}: 11 left out, because image and label differ in size: 00001, 00002, 00003 and 8 more"]
    Image.new("L", (30, 21), 7).save(root / "labels" / "00000.png")
    assert "no image (.png, .jpg) to use; 12 left out" in refused(data.list_frames, root)


def test_fingerprints_depend_on_frames_and_their_content_but_not_on_the_folder(tmp_path):
    root = write_gta5(tmp_path / "a", [(20, 30)] * 3)

    def now(labelled=True):
        frames = data.list_frames(root, labelled=labelled)
        return frames.fingerprint(), frames.content()

    first, unlabelled = now(), now(labelled=False)
    root = root.rename(tmp_path / "b")
    assert now() == first and first[0].startswith("3 frames, ")
    ids = np.array(Image.open(root / "labels" / "00001.png"))
    ids[0, 0] = 26 if ids[0, 0] != 26 else 7
    Image.fromarray(ids).save(root / "labels" / "00001.png")
    assert now()[0] == first[0] and now()[1] != first[1] and now(labelled=False) == unlabelled
    Image.new("RGB", (30, 20)).save(root / "images" / "00001.png")
    assert now(labelled=False)[0] == unlabelled[0] and now(labelled=False)[1] != unlabelled[1]
    Image.new("RGB", (31, 20)).save(root / "images" / "00001.png")
    assert now(labelled=False)[0] != unlabelled[0]
