"""data.py: both layouts, reading of every kind of file, and alignment of image and label."""

import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import labels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from torch.utils.data import StackDataset

import data

IDS = [c.id for c in data.CLASSES]


def colour_of(ids):
    """An image whose colour is its label: three levels far apart, a function of the id alone."""
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
        assert data.CLASS_NAMES[theirs.trainId] == name  # a train id is a place in all our lists
    assert not evaluated  # none of theirs is left over
    expected = {label.id: label.trainId for label in labels if not label.ignoreInEval}
    assert data.TRAIN_IDS.tolist() == [expected.get(i, data.VOID) for i in range(256)]
    known = {label.id % 256 for label in labels} | {34}  # -1 is 255 in eight bits; 34 is GTA5's
    assert np.flatnonzero(data.KNOWN_IDS).tolist() == sorted(known)


def test_layouts_are_told_apart(tmp_path):
    gta5 = write_gta5(tmp_path / "a", [(20, 30), (24, 48)])
    cityscapes = write_cityscapes(tmp_path / "b", {"train": 3, "val": 1})
    assert [f.name for f in data.list_frames(gta5)] == ["00000", "00001"]
    assert len(data.list_frames(cityscapes)) == 3
    assert [f.label.name for f in data.list_frames(cityscapes, "val")] == ["ulm_000000_000000_gtFine_labelIds.png"]
    assert len(data.list_frames(cityscapes, "train,val", labelled=False)) == 4
    with pytest.raises(ValueError, match="neither"):
        data.list_frames(tmp_path)
    with pytest.raises(ValueError, match="no such split"):
        data.list_frames(cityscapes, "test")


def test_unlabelled_frames_need_no_labels(tmp_path):
    root = write_cityscapes(tmp_path, {"train": 2})
    next((root / "gtFine").rglob("*.png")).unlink()
    assert len(data.list_frames(root, labelled=False)) == 2
    with pytest.raises(ValueError, match="has no label"):
        data.list_frames(root)


def test_pairs_that_differ_in_size_are_left_out_and_named(tmp_path, caplog):
    root = write_gta5(tmp_path, [(20, 30)] * 3)
    Image.new("L", (31, 20), 7).save(root / "labels" / "00001.png")
    assert [f.name for f in data.list_frames(root)] == ["00000", "00002"]
    assert "1 of 3" in caplog.text and "00001" in caplog.text


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
def test_images_of_every_mode_are_read_as_pillow_shows_them(tmp_path, mode):
    image = Image.fromarray(draw_pair(3, 20, 30)[0]).convert(mode)
    image.save(tmp_path / "x.png")
    read = data.load_image(tmp_path / "x.png").permute(1, 2, 0).numpy()
    assert read.dtype == np.uint8 and np.array_equal(read, np.array(image.convert("RGB")))


def test_palette_labels_are_their_indices(tmp_path):
    ids = draw_pair(3, 20, 30)[1]
    ids[0, :4] = (0, 34, 255, 26)  # void, GTA5's extra id, licence plate, car
    image = Image.fromarray(ids)
    image.putpalette(list(range(256)) * 3)
    image.save(tmp_path / "x.png")
    label = data.load_label(tmp_path / "x.png")
    assert label[0, :4].tolist() == [255, 255, 255, 13]
    assert np.array_equal(label.numpy(), data.TRAIN_IDS[ids])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (4, 4)), "label ids are needed"),
        (Image.new("I;16", (4, 4)), "label ids are needed"),
        (Image.fromarray(np.full((4, 4), 77, np.uint8)), r"\[77\]"),
    ],
)
def test_labels_that_are_none_are_refused_by_name(tmp_path, image, message):
    image.save(tmp_path / "bad.png")
    with pytest.raises(ValueError, match=f"bad.png.*{message}"):
        data.load_label(tmp_path / "bad.png")


def test_damaged_images_are_refused_by_name(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)).save(tmp_path / "bad.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "bad.png").read_bytes()[:6000])
    with pytest.raises(ValueError, match="bad.png: damaged"):
        data.load_image(tmp_path / "bad.png")


@pytest.mark.parametrize("size", [(40, 60), (41, 67), (37, 90)])
@pytest.mark.parametrize("width", [60, 30, 97])
def test_image_and_label_stay_aligned_through_resizing(tmp_path, size, width):
    root = write_gta5(tmp_path, [size])
    frame = data.list_frames(root)[0]
    image, ids = (
        data.resize_to_width(load(path), width) for load, path in zip((data.load_image, data.load_label_ids), frame[1:])
    )
    assert image.shape[1:] == ids.shape == (round(size[0] * width / size[1]), width)
    # Antialiasing mixes colours at borders, so that not all agree; but by no shift do more.
    shifts = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)]
    found = [agreement(image, ids.roll(shift, (0, 1))) for shift in shifts]
    assert found[0] == max(found) and found.count(found[0]) == 1 and found[0] > (0.99 if width == size[1] else 0.7)


def test_ranges_of_the_networks():
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(data.to_signed(levels), torch.tensor([-1.0, -0.6, 1.0]))
    torch.testing.assert_close(data.to_unit(levels), torch.tensor([0.0, 0.2, 1.0]))


def test_labels_are_resized_nearest_exact():
    """Each pixel takes the label under its centre: 2 pixels into each block of 4, not its corner."""
    ids = torch.arange(64, dtype=torch.uint8).view(8, 8)
    assert torch.equal(data.resize_to_width(data.tv_tensors.Mask(ids), 2), ids[2::4, 2::4])


def agreement(image, ids):
    """The part of pixels whose colour is that of their id, give or take what antialiasing does at borders."""
    expected = torch.from_numpy(colour_of(ids.numpy())).permute(2, 0, 1)
    return ((image.int() - expected.int()).abs().amax(0) <= 8).float().mean()


def test_image_and_label_stay_aligned_through_crop_and_flip(tmp_path):
    root = write_gta5(tmp_path, [(40, 60), (50, 60)])
    crops = data.Crops(data.list_frames(root), 60, (16, 24), length=40, labelled=True)
    back = np.full(256, 0, np.uint8)
    back[: len(IDS)] = IDS
    samples = [crops[k] for k in range(40)]
    for image, label in samples:
        assert image.shape == (3, 16, 24) and label.shape == (16, 24) and label.dtype == torch.uint8
        assert agreement(image, torch.from_numpy(back[label.numpy()])) == 1
    assert len({image.numpy().tobytes() for image, _ in samples}) > 20  # not one crop again and again


def test_sample_k_depends_on_seed_and_k_alone(tmp_path):
    frames = data.list_frames(write_gta5(tmp_path, [(40, 60)] * 5))
    one, two = (data.Crops(frames, 60, (16, 16), 20, seed=3) for _ in range(2))
    forward = [one[k] for k in range(20)]
    torch.manual_seed(123)
    backward = [two[k] for k in reversed(range(20))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward))
    other = data.Crops(frames, 60, (16, 16), 20, seed=4)
    assert not all(torch.equal(a, other[k]) for k, a in enumerate(forward))


def test_two_domains_are_shuffled_apart_and_the_shorter_begins_again(tmp_path):
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


def test_a_crop_larger_than_a_frame_is_refused_by_name(tmp_path):
    crops = data.Crops(data.list_frames(write_gta5(tmp_path, [(20, 30)])), 30, (24, 24), 1)
    with pytest.raises(ValueError, match="00000.png: 30x20 .*--crop-size"):
        crops[0]


# --- for any size, id, aspect ratio and mode

KNOWN, MODES = np.flatnonzero(data.KNOWN_IDS).tolist(), ("RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "YCbCr")
SIDES = array_shapes(min_dims=2, max_dims=2, max_side=60)
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example writes its files anew


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
    for (i, j), value in np.ndenumerate(resized):
        candidates = [nearest(i, resized.shape[0], ids.shape[0]), nearest(j, resized.shape[1], ids.shape[1])]
        assert value in ids[np.ix_(*candidates)]


def nearest(i, n, side):
    """Where the centre falls on the line between two pixels, rounding in float32 may give either."""
    place = (2 * i + 1) * side / (2 * n)
    return sorted({min(side - 1, max(0, int(np.floor(place + shift)))) for shift in (-1e-4, 1e-4)})


@given(shape=SIDES, width=st.integers(1, 90), level=st.integers(0, 255))
def test_any_plain_image_stays_plain_when_resized(shape, width, level):
    image = data.tv_tensors.Image(torch.full((3, *shape), level, dtype=torch.uint8))
    resized = data.resize_to_width(image, width)
    assert resized.shape == (3, max(1, round(shape[0] * width / shape[1])), width) and (resized == level).all()


@given(seed=st.integers(0, 2**31), height=st.integers(16, 40), width=st.integers(16, 80), k=st.integers(0, 10**6))
def test_any_crop_keeps_image_and_label_together(tmp_path_factory, seed, height, width, k):
    root = tmp_path_factory.mktemp("crops")
    frames = data.list_frames(write_gta5(root, [(height, width)]))
    crop = (1 + seed % height, 1 + seed // 7 % width)
    image, label = data.Crops(frames, width, crop, k + 1, seed, labelled=True)[k]
    assert image.shape == (3, *crop) and label.shape == crop
    assert torch.equal(image, torch.from_numpy(colour_of(np.array(IDS)[label.numpy()])).permute(2, 0, 1))
