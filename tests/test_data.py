"""data.py: both layouts, reading of every kind of file, and alignment of image and label."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import StackDataset
from torchvision.datasets import Cityscapes

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


def test_train_ids_are_torchvisions_table():
    for c in Cityscapes.classes:
        if c.id >= 0:
            assert data.TRAIN_IDS[c.id] == (c.train_id if 0 <= c.train_id < 255 else data.VOID)
    assert len(data.CLASS_NAMES) == 19 and data.CLASS_NAMES[13] == "car"


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
