"""fid.py: the distance against other formulas, the network against other builds of it, files, and the command line."""

import copy
import csv
import hashlib
import os
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import pytorch_fid.fid_score
import pytorch_fid.inception
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.models import inception_v3

import fid

SCRIPT = Path(fid.__file__).resolve()
DIMS = (64, 192, 768, 2048)


def random_spd(rng, size):
    x = rng.standard_normal((3 * size, size))
    return x.T @ x / len(x) + 0.1 * np.eye(size)


def save_image(path, rng, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    rgb.convert(mode).save(path)
    return path


@pytest.fixture(scope="module")
def network():
    return fid.inception("random", dims=64, seed=0)


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("a", "b"):
        for k in range(3):
            save_image(tmp_path / folder / f"{k}.png", rng)
    return tmp_path / "a", tmp_path / "b"


def command(*words):
    """The command line as people call it."""
    words = [sys.executable, SCRIPT, *words, "--device", "cpu", "--workers", "0"]
    return subprocess.run(list(map(str, words)), check=False, capture_output=True, text=True, timeout=120)


def call(monkeypatch, capsys, *words):
    """The command line in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, words), "--device", "cpu", "--workers", "0"])
    try:
        fid.main()
        status = 0
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


# --- the distance


@pytest.mark.parametrize("size", [1, 5, 40])
def test_distance_equals_sqrtm(size):
    rng = np.random.default_rng(size)
    mu1, mu2 = rng.standard_normal((2, size))
    s1, s2 = random_spd(rng, size), 2 * random_spd(rng, size)
    expected = np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-9)


def test_distance_of_diagonal_gaussians_has_a_closed_form():
    mu1, mu2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    d1, d2 = np.array([1.0, 4.0, 0.0]), np.array([9.0, 1.0, 4.0])
    # 1 + 4 from the means; (1 - 3)^2 + (2 - 1)^2 + (0 - 2)^2 from the deviations
    assert fid.frechet_distance(mu1, np.diag(d1), mu2, np.diag(d2)) == pytest.approx(5 + 9, rel=1e-12)


@pytest.mark.parametrize("n", [2, 10, 500])
def test_identical_sets_are_at_zero_whatever_the_rank_and_spectrum(n):
    x = np.random.default_rng(n).standard_normal((n, 100)) * np.logspace(0, -7, 100) + 50
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    assert 0 <= fid.frechet_distance(mu, sigma, mu, sigma) <= 1e-9 * np.trace(sigma)


def test_fewer_images_than_dimensions_agree_with_the_nuclear_norm_of_the_centred_features():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 60)), 2 * rng.standard_normal((5, 60))
    cx, cy = (x - x.mean(0)) / np.sqrt(6), (y - y.mean(0)) / np.sqrt(4)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + (cx**2).sum() + (cy**2).sum()
    expected -= 2 * np.linalg.norm(cx @ cy.T, "nuc")
    d = fid.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert isinstance(d, float) and d == pytest.approx(expected, rel=1e-7)


def test_constant_features_leave_the_distance_of_the_means():
    zero = np.zeros((3, 3))
    assert fid.frechet_distance(np.zeros(3), zero, np.full(3, 2.0), zero) == 12


@pytest.mark.parametrize(
    ("mu", "sigma", "says"),
    [
        (np.zeros(2), np.eye(3), "expected"),
        (np.zeros((1, 3)), np.eye(3), "expected"),
        (np.zeros(3), np.full((3, 3), np.nan), "finite"),
        (np.array([0, np.inf, 0]), np.eye(3), "finite"),
        (np.zeros(3), np.diag([1.0, 1.0, -1.0]), "covariance"),
        (np.zeros(3), np.eye(3)[::-1].copy(), "covariance"),
        (np.zeros(3), np.eye(3) + np.eye(3, k=1), "covariance"),
        (np.zeros(4), np.eye(4), "dimensions"),
    ],
)
def test_what_is_no_gaussian_is_refused(mu, sigma, says):
    with pytest.raises(ValueError, match=says):
        fid.frechet_distance(np.zeros(3), np.eye(3), mu, sigma)


# --- the network


def plain_inception(seed):
    """torchvision's network with weights and BatchNorm statistics that are all different from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = plain_inception(1)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(model.state_dict(), path)
    return model, path


def fid_features(m, x):
    """The four features from torchvision's layers, by pytorch-fid's description of TensorFlow's network."""

    def avg(y):
        return F.avg_pool2d(y, 3, 1, 1, count_include_pad=False)

    def a(b, y):
        three = b.branch3x3dbl_3(b.branch3x3dbl_2(b.branch3x3dbl_1(y)))
        return [b.branch1x1(y), b.branch5x5_2(b.branch5x5_1(y)), three, b.branch_pool(avg(y))]

    def c(b, y):
        z = b.branch7x7dbl_3(b.branch7x7dbl_2(b.branch7x7dbl_1(y)))
        seven = b.branch7x7_3(b.branch7x7_2(b.branch7x7_1(y)))
        return [b.branch1x1(y), seven, b.branch7x7dbl_5(b.branch7x7dbl_4(z)), b.branch_pool(avg(y))]

    def e(b, y, pool):
        p, q = b.branch3x3_1(y), b.branch3x3dbl_2(b.branch3x3dbl_1(y))
        three, double = [b.branch3x3_2a(p), b.branch3x3_2b(p)], [b.branch3x3dbl_3a(q), b.branch3x3dbl_3b(q)]
        return [b.branch1x1(y), *three, *double, b.branch_pool(pool(y))]

    y = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
    out = [m.maxpool1(m.Conv2d_2b_3x3(m.Conv2d_2a_3x3(m.Conv2d_1a_3x3(y))))]
    out.append(m.maxpool2(m.Conv2d_4a_3x3(m.Conv2d_3b_1x1(out[0]))))
    y = out[1]
    for block in (m.Mixed_5b, m.Mixed_5c, m.Mixed_5d):
        y = torch.cat(a(block, y), 1)
    y = m.Mixed_6a(y)
    for block in (m.Mixed_6b, m.Mixed_6c, m.Mixed_6d, m.Mixed_6e):
        y = torch.cat(c(block, y), 1)
    out.append(y)
    y = torch.cat(e(m.Mixed_7b, m.Mixed_7a(y), avg), 1)
    out.append(torch.cat(e(m.Mixed_7c, y, lambda z: F.max_pool2d(z, 3, 1, 1)), 1))
    return [y.mean((2, 3)) for y in out]


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    else:  # relative to the feature, or to a thousandth of the largest one where ReLU leaves next to nothing
        scale = theirs.abs().clamp_min(1e-3 * theirs.abs().max())
        assert ((ours - theirs).abs() / scale).max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.inference_mode()
def test_features_equal_an_independent_build(checkpoint, dtype):
    model, path = checkpoint
    x = torch.rand(1, 3, 97, 350, dtype=dtype)
    for dims, expected in zip(DIMS, fid_features(copy.deepcopy(model).to(dtype), x), strict=True):
        assert_close(fid.inception(path, dims).to(dtype)(x), expected)


@pytest.fixture
def same_weights(checkpoint, monkeypatch):
    """pytorch-fid with the weights of `checkpoint`, which it would download; their path for fid.py."""
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: checkpoint[0].state_dict())
    return checkpoint[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(97, 350), (299, 299), (420, 333)])
@torch.inference_mode()
def test_features_equal_pytorch_fid(same_weights, size, dtype):
    x = torch.rand(1, 3, *size, dtype=dtype)
    theirs = pytorch_fid.inception.InceptionV3([0, 1, 2, 3]).eval().to(dtype)(x)
    for dims, expected in zip(DIMS, theirs, strict=True):
        assert_close(fid.inception(same_weights, dims).to(dtype)(x), expected.mean((2, 3)))


@pytest.fixture
def photos(tmp_path):
    """Two folders of smooth pictures, as PNG and JPEG, of odd sizes below and above 299."""
    for k, (folder, low) in enumerate((("a", 0), ("b", 60))):
        for i, (width, height) in enumerate([(40, 31), (299, 299), (17, 300), (333, 301), (501, 98), (64, 64)]):
            coarse = np.random.default_rng(10 * k + i).integers(low, 256, (4, 5, 3), dtype=np.uint8)
            (tmp_path / folder).mkdir(exist_ok=True)
            image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            image.save(tmp_path / folder / f"{i}{'.jpg' if i % 2 else '.png'}")
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("dims", [64, 192, 768, pytest.param(2048, marks=pytest.mark.slow)])  # a minute for their root
def test_distance_of_folders_equals_pytorch_fid(same_weights, photos, dims, tmp_path, monkeypatch, capsys):
    theirs = pytorch_fid.fid_score.calculate_fid_given_paths([*map(str, photos)], 1, "cpu", dims, num_workers=0)
    words = ["--weights", same_weights, "--dims", dims]
    status, out, err = call(monkeypatch, capsys, *photos, *words, "--save", tmp_path / "ours.npz")
    assert status == 0, err
    assert float(out.split()[-1]) == pytest.approx(theirs, rel=1e-3)

    # Their statistics file of the second folder is ours, and ours of the first is theirs.
    paths = [str(photos[1]), str(tmp_path / "theirs.npz")]
    pytorch_fid.fid_score.save_fid_stats(paths, 1, "cpu", dims, num_workers=0)
    status, through, err = call(monkeypatch, capsys, tmp_path / "ours.npz", tmp_path / "theirs.npz", *words)
    assert status == 0, err
    assert float(through.split()[-1]) == pytest.approx(theirs, rel=1e-3)
    paths = [str(tmp_path / "ours.npz"), str(photos[1])]
    assert pytorch_fid.fid_score.calculate_fid_given_paths(paths, 1, "cpu", dims, num_workers=0) == pytest.approx(
        theirs, rel=1e-3
    )


def test_fid_of_folders_equals_that_of_pytorch_fids_features(same_weights, photos, monkeypatch, capsys):
    """At 2048 their features, and for the root of so large a matrix the nuclear norm of the centred features."""
    network = pytorch_fid.inception.InceptionV3([3]).eval()
    x, y = (pytorch_fid.fid_score.get_activations(sorted(f.iterdir()), network, 1, 2048, "cpu", 0) for f in photos)
    cx, cy = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    expected = np.square(x.mean(0) - y.mean(0)).sum() + (cx**2).sum() + (cy**2).sum() - 2 * np.linalg.norm(cx @ cy.T, "nuc")
    status, out, err = call(monkeypatch, capsys, *photos, "--weights", same_weights)
    assert status == 0, err
    assert out.split()[-2] == "FID" and float(out.split()[-1]) == pytest.approx(expected, rel=1e-3)


@given(d=st.integers(1, 12), n=st.integers(2, 30), m=st.integers(2, 30), seed=st.integers(0, 2**32), scale=st.floats(1e-3, 1e3))
def test_any_distance_is_real_and_symmetric_and_zero_to_itself(d, n, m, seed, scale):
    rng = np.random.default_rng(seed)
    x, y = scale * rng.standard_normal((n, d)), scale * (rng.standard_normal((m, d)) @ rng.standard_normal((d, d)) + 1)
    a, b = ((z.mean(0), np.atleast_2d(np.cov(z, rowvar=False))) for z in (x, y))
    there, back = fid.frechet_distance(*a, *b), fid.frechet_distance(*b, *a)
    size = np.trace(a[1]) + np.trace(b[1]) + np.square(a[0] - b[0]).sum()
    assert 0 <= there <= size * (1 + 1e-9)  # the root's trace is never negative
    assert there == pytest.approx(back, abs=1e-9 * size)
    assert 0 <= fid.frechet_distance(*a, *a) <= 1e-6 * np.trace(a[1])
    assert fid.frechet_distance(a[0] + 3 * scale, a[1], *a) == pytest.approx(9 * d * scale**2, rel=1e-6)


@torch.inference_mode()
def test_random_weights_are_seeded_sane_and_leave_the_callers_numbers_alone():
    coarse = torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(coarse, (299, 299), mode="bicubic").clamp(0, 1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = fid.inception("random", seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, other = (fid.inception("random", seed=seed)(x[:1]) for seed in (1, 2))
    assert torch.equal(first(x[:1]), again)
    assert not torch.allclose(again, other, rtol=0.1)
    for dims in (64, 2048):
        features = fid.inception("random", dims, seed=1)(x)
        assert features.shape == (3, dims) and not features.requires_grad
        assert 0.05 < features.mean() < 5
        deviation = features.std(0)
        assert deviation.mean() > 0.02 * features.mean() and (deviation > 0).float().mean() > 0.7


def test_dims_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="64, 192, 768, 2048"):
        fid.inception("random", dims=100)


# --- sets of images


def test_any_sizes_modes_and_formats_make_a_set(tmp_path, network):
    rng = np.random.default_rng(0)
    paths = [
        save_image(tmp_path / "set" / "grey.PNG", rng, (31, 50), "L"),
        save_image(tmp_path / "set" / "deep" / "er" / "palette.png", rng, (320, 310), "P"),
        save_image(tmp_path / "set" / "alpha.png", rng, (64, 64), "RGBA"),
        save_image(tmp_path / "set" / "photo.jpeg", rng, (299, 299)),
        save_image(tmp_path / "set" / "cmyk.jpg", rng, (500, 10), "CMYK"),
    ]
    (tmp_path / "set" / "notes.txt").write_text("no image")
    (tmp_path / "set" / "deep" / "loop").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set" / "._photo.jpeg").write_text("what macOS leaves behind")
    mu, sigma = fid.statistics(tmp_path / "set", network, batch_size=2, workers=1)

    rows = []
    for path in paths:
        rgb = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
        with torch.inference_mode():
            rows.append(network(torch.from_numpy(rgb).permute(2, 0, 1)[None]).numpy()[0].astype(np.float64))
    np.testing.assert_allclose(mu, np.mean(rows, axis=0), rtol=1e-5)
    np.testing.assert_allclose(sigma, np.cov(np.stack(rows), rowvar=False), atol=1e-5 * np.abs(sigma).max())
    assert mu.dtype == sigma.dtype == np.float64


def test_one_image_is_no_set(folders, network):
    with pytest.raises(ValueError, match="at least 2"):
        fid.statistics([folders[0] / "0.png"], network)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(folders, network, workers):
    data = (folders[0] / "1.png").read_bytes()
    (folders[0] / "1.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"1\.png: not an image"):
        fid.statistics(folders[0], network, workers=workers)


def test_sixteen_bits_are_refused_and_not_clipped(folders, network):
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(folders[0] / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png.*8 bits"):
        fid.statistics(folders[0], network)


def test_the_cache_knows_weights_and_files(folders, network, tmp_path):
    cache = tmp_path / "cache"
    first = fid.statistics(folders[0], network, cache=cache)
    assert {path.suffix or path.name for path in cache.iterdir()} == {".npz", ".lock"}

    def never(_):
        raise AssertionError("computed again")

    handle = network.register_forward_pre_hook(lambda _, args: never(args))
    try:
        again = fid.statistics(folders[0], network, cache=cache)
        for change in (
            lambda: fid.statistics(folders[1], network, cache=cache),
            lambda: (os.utime(folders[0] / "0.png", (1, 1)), fid.statistics(folders[0], network, cache=cache)),
        ):
            with pytest.raises(AssertionError, match="computed again"):
                change()
    finally:
        handle.remove()
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    save_image(folders[0] / "1.png", np.random.default_rng(9))
    assert not np.allclose(first[0], fid.statistics(folders[0], network, cache=cache)[0], rtol=1e-6)
    other = fid.statistics(folders[0], fid.inception("random", 64, seed=3), cache=cache)
    assert not np.allclose(first[0], other[0], rtol=1e-2) and len(list(cache.glob("*.npz"))) == 3


# --- the command line


def test_column_names():
    assert fid.column_name("published", 2048) == fid.column_name("weights.pth", 2048) == "FID"
    assert fid.column_name("published", 64) == "FID_64"
    assert fid.column_name("random", 2048) == "frechet_random_inception"
    assert fid.column_name("random", 768) == "frechet_random_inception_768"


def test_folders_and_saved_statistics_agree(folders, tmp_path, monkeypatch, capsys):
    a, b = folders
    npz = tmp_path / "new" / "a.npz"
    words = ["--weights", "random", "--dims", "64"]
    direct = command(a, b, *words, "--out", tmp_path / "t.csv", "--name", "CUT")
    assert direct.returncode == 0, direct.stderr
    status, out, err = call(monkeypatch, capsys, a, "--save", npz, *words)
    assert (status, out) == (0, ""), err
    with np.load(npz) as file:
        assert sorted(file) == ["mu", "sigma"] and file["sigma"].shape == (64, 64)
    column, value = direct.stdout.split()
    assert column == "frechet_random_inception_64" and float(value) > 0
    assert (tmp_path / "t.csv").read_text() == f"model,{column}\nCUT,{value}\n"
    through = call(monkeypatch, capsys, npz, b, *words)[1]
    assert float(through.split()[1]) == pytest.approx(float(value), rel=1e-4)
    same = call(monkeypatch, capsys, npz, a, *words)[1]
    assert float(same.split()[1]) < 1e-6 * float(value)


def test_rows_are_added_and_replaced_and_other_columns_refused(tmp_path):
    table = tmp_path / "results" / "t.csv"
    for model, distance in (("Source", 68.6), ("CUT", 1e-7), ("Source", 70.25)):
        fid.write_row(table, model, "FID", distance)
    assert table.read_text() == "model,FID\nSource,70.25\nCUT,1e-07\n"
    with pytest.raises(ValueError, match="FID.*frechet_random_inception"):
        fid.write_row(table, "CUT", "frechet_random_inception", 3.0)
    table.write_text("model,seconds,FID\nCUT,0.3,9\n")
    fid.write_row(table, "CUT", "FID", 8.0)
    with open(table, newline="") as file:
        assert list(csv.DictReader(file)) == [{"model": "CUT", "seconds": "0.3", "FID": "8"}]
    assert sorted(path.name for path in table.parent.iterdir()) == [".lock", "t.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="5 bytes are needed.*x'"):
        fid.write_whole(tmp_path / "x", b"newer")
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_check_computes_nothing(folders, tmp_path, monkeypatch, capsys, checkpoint):
    monkeypatch.setattr(fid, "statistics", None)
    status, out, err = call(monkeypatch, capsys, *folders, "--check", "--weights", checkpoint[1])
    assert status == 0 and out.count("\n") == 1 and "3 images" in out and err == ""
    assert call(monkeypatch, capsys, "--check", "--weights", "random")[0] == 0
    assert call(monkeypatch, capsys, tmp_path / "gone", "--check", "--weights", "random")[0] == 2


def test_published_weights_must_have_the_hash_of_their_name(monkeypatch, checkpoint, tmp_path):
    digest, asked = hashlib.sha256(checkpoint[1].read_bytes()).hexdigest()[:8], []

    def download(url, path, **_):
        asked.append(url)
        shutil.copy(checkpoint[1], path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(fid, "WEIGHTS_FILE", f"inception-{digest}.pth")
    x = torch.rand(1, 3, 40, 40)
    for _ in range(2):
        assert torch.equal(fid.inception(dims=64)(x), fid.inception(checkpoint[1], dims=64)(x))
    assert len(asked) == 1 and asked[0].endswith("/fid_weights/pt_inception-2015-12-05-6726825d.pth")
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "b"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match=f"6726825d.pth: its sha256 begins with {digest}"):
        fid.inception(dims=64)


def test_excluded_images_are_left_out(folders, tmp_path, network):
    (tmp_path / "names").write_text("1  # dark\n\n# and\n2.png\n")
    for name in ("0_leftImg8bit", "3"):
        save_image(folders[0] / f"{name}.png", np.random.default_rng(0))
    found = fid.find_images(folders[0], {"1", "2.png"})
    assert [Path(path).name for path in found] == ["0.png", "0_leftImg8bit.png", "3.png"]
    words = [folders[0], "--weights", "random", "--dims", 64, "--exclude", tmp_path / "names", "--check"]
    assert "a: 3 images" in command(*words).stdout


def test_what_is_no_file_does_not_hang(folders):
    os.mkfifo(folders[0] / "z.png")
    with pytest.raises(ValueError, match="z.png: not a regular file"):
        fid.find_images(folders[0])


@pytest.fixture
def wrong(folders, tmp_path):
    """A folder with one of every wrong thing."""
    (tmp_path / "empty").mkdir()
    save_image(tmp_path / "one" / "0.png", np.random.default_rng(0))
    save_image(tmp_path / "broken" / "0.png", np.random.default_rng(0))
    (tmp_path / "broken" / "bad.png").write_text("text")
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "keys.npz", mean=np.zeros(64))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(64), sigma=np.eye(63))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(192), sigma=np.eye(192))
    np.savez(tmp_path / "objects.npz", mu=np.array([None] * 64), sigma=np.eye(64))
    (tmp_path / "text.pth").write_text("text")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "other.csv").write_text("model,FID\nCUT,1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a"], "A and B"),
        (["a", "gone"], "gone: not there"),
        (["a", ""], "not there"),
        (["a", "empty"], "empty: 0 images"),
        (["one", "a"], "one: 1 images"),
        (["a", "broken"], "bad.png"),
        (["a", "text.pth"], "text.pth: not one"),
        (["a", "text.npz"], "text.npz"),
        (["a", "keys.npz"], "keys.npz"),
        (["a", "shapes.npz"], "shapes.npz"),
        (["a", "narrow.npz"], "192"),
        (["a", "objects.npz"], "objects.npz"),
        (["a", "b", "--dims", "100"], "--dims"),
        (["a", "b", "--batch-size", "0"], "--batch-size"),
        (["a", "b", "--device", "cuda:99"], "--device cuda:99"),
        (["a", "b", "--weights", "gone.pth"], "gone.pth"),
        (["a", "b", "--weights", "text.pth"], "text.pth"),
        (["a", "b", "--weights", "other.pth"], "other.pth"),
        (["a", "b", "--weights", "list.pth"], "list.pth"),
        (["a", "b", "--out", "new.csv"], "--name"),
        (["a", "b", "--out", "other.csv", "--name", "CUT"], "other.csv"),
        (["a", "b", "--save", "statistics"], "--save"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(wrong, monkeypatch, capsys, words, says):
    monkeypatch.chdir(wrong)
    # The tests' own flags come first, so that a case can set them otherwise.
    monkeypatch.setattr(sys, "argv", ["fid.py", "--weights=random", "--dims=64", "--device=cpu", "--workers=0", *words])
    with pytest.raises(SystemExit) as end:
        fid.main()
    out, err = capsys.readouterr()
    err = "".join(line for line in err.splitlines(True) if ": cpu, float32" not in line)  # as it starts
    assert end.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("fid.py: ") and says in err and len(err) < 400


def test_without_network_the_address_and_the_flag_are_named(folders, tmp_path, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    status, _, err = call(monkeypatch, capsys, *folders)
    assert status == 2 and err.splitlines()[-1].startswith("fid.py: ")
    assert fid.WEIGHTS_URL in err.splitlines()[-1] and "--weights FILE" in err and "no route" in err


def test_a_broken_image_in_a_reading_process_ends_with_one_line(wrong, monkeypatch, capsys):
    monkeypatch.chdir(wrong)
    words = ["--weights=random", "--dims=64", "--device=cpu", "--workers=1"]
    monkeypatch.setattr(sys, "argv", ["fid.py", "a", "broken", *words])
    with pytest.raises(SystemExit):
        fid.main()
    start, err = capsys.readouterr().err.splitlines(True)
    assert ": cpu, float32" in start
    assert err.count("\n") == 1 and err.startswith("fid.py: broken/bad.png: ")
