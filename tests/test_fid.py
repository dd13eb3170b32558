"""fid.py: the distance compared with other formulas, the network with pytorch-fid's, files, and the command line."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
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

import data
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


def call(monkeypatch, capsys, *words):
    """Run the command line in this process: (exit status, stdout, stderr). Words may override the flags given first."""
    flags = ["--weights=random", "--dims=64", "--device=cpu", "--workers=0"]
    monkeypatch.setattr(sys, "argv", ["fid.py", *flags, *map(str, words)])
    status = 0
    try:
        fid.main()
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
def test_distance_of_a_set_to_itself_is_zero_for_any_rank_and_spectrum(n):
    x = np.random.default_rng(n).standard_normal((n, 100)) * np.logspace(0, -7, 100) + 50
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    assert 0 <= fid.frechet_distance(mu, sigma, mu, sigma) <= 1e-9 * np.trace(sigma)


def test_distance_of_few_images_equals_the_nuclear_norm_formula():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 60)), 2 * rng.standard_normal((5, 60))
    cx, cy = (x - x.mean(0)) / np.sqrt(6), (y - y.mean(0)) / np.sqrt(4)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + (cx**2).sum() + (cy**2).sum()
    expected -= 2 * np.linalg.norm(cx @ cy.T, "nuc")
    d = fid.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert isinstance(d, float) and d == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("n", [20, 50, 400])
def test_a_covariance_computed_in_float32_is_one(n):
    """Rounded, it has eigenvalues below zero."""
    x = torch.rand(n, 300, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    exact, rounded = ((x.to(dtype).mean(0).numpy(), x.to(dtype).T.cov().numpy()) for dtype in (torch.float64, torch.float32))
    other = np.full(300, 0.4), np.eye(300) / 12
    assert fid.frechet_distance(*rounded, *other) == pytest.approx(fid.frechet_distance(*exact, *other), rel=1e-3)


def test_distance_of_constant_features_is_that_of_their_means():
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
def test_invalid_statistics_are_refused(mu, sigma, says):
    with pytest.raises(ValueError, match=says):
        fid.frechet_distance(np.zeros(3), np.eye(3), mu, sigma)


# --- the network


def plain_inception(seed):
    """torchvision's network with random weights and BatchNorm statistics, none at its default."""
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


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    else:  # relative to each feature, or to a thousandth of the largest where a feature is almost zero
        scale = theirs.abs().clamp_min(1e-3 * theirs.abs().max())
        assert ((ours - theirs).abs() / scale).max() < 1e-4


@pytest.fixture
def same_weights(checkpoint, monkeypatch):
    """Path of a checkpoint that pytorch-fid, too, is made to use in the place of its download."""
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: checkpoint[0].state_dict())
    return checkpoint[1]


@pytest.mark.parametrize(
    ("size", "dtype"), [((97, 350), torch.float64), ((299, 299), torch.float32), ((420, 333), torch.float32)]
)
@torch.inference_mode()
def test_features_equal_pytorch_fid(same_weights, size, dtype):
    x = torch.rand(1, 3, *size, dtype=dtype)
    theirs = pytorch_fid.inception.InceptionV3([0, 1, 2, 3]).eval().to(dtype)(x)
    for dims, expected in zip(DIMS, theirs, strict=True):
        assert_close(fid.inception(same_weights, dims).to(dtype)(x), expected.mean((2, 3)))


@torch.inference_mode()
def test_features_are_float32_whatever_the_caller_has_set(checkpoint):
    network, x = fid.inception(checkpoint[1], 64), torch.rand(1, 3, 299, 299)
    expected = network(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(x), expected)
    torch.testing.assert_close(network(x.bfloat16()), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["", ".cudnn", ".cudnn.conv"])
def test_torchs_newer_setting_of_precision_is_restored(name):
    """torch raises an error when its older one is read after the newer one was changed."""
    code = f"""
        import torch, fid
        torch.backends{name}.fp32_precision, torch.backends.cudnn.benchmark = "tf32", True
        before = torch.backends.cudnn.conv.fp32_precision
        with fid.without_tf32():
            assert torch.backends.cudnn.conv.fp32_precision == "ieee" and torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.conv.fp32_precision == before
    """
    if hasattr(torch.backends.cudnn, "conv"):
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=SCRIPT.parent)


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


@pytest.mark.parametrize("dims", [192, pytest.param(2048, marks=pytest.mark.slow)])  # pytorch-fid's root takes a minute
def test_distance_of_folders_equals_pytorch_fid(same_weights, photos, dims, tmp_path, monkeypatch, capsys):
    theirs = pytorch_fid.fid_score.calculate_fid_given_paths([*map(str, photos)], 1, "cpu", dims, num_workers=0)
    words = ["--weights", same_weights, "--dims", dims]
    status, out, err = call(monkeypatch, capsys, *photos, *words, "--save", tmp_path / "ours.npz")
    assert status == 0, err
    assert float(out.split()[-1]) == pytest.approx(theirs, rel=1e-3)

    # Either program reads the statistics that the other one wrote.
    paths = [str(photos[1]), str(tmp_path / "theirs.npz")]
    pytorch_fid.fid_score.save_fid_stats(paths, 1, "cpu", dims, num_workers=0)
    status, through, err = call(monkeypatch, capsys, tmp_path / "ours.npz", tmp_path / "theirs.npz", *words)
    assert status == 0, err
    assert float(through.split()[-1]) == pytest.approx(theirs, rel=1e-3)
    paths = [str(tmp_path / "ours.npz"), str(photos[1])]
    assert pytorch_fid.fid_score.calculate_fid_given_paths(paths, 1, "cpu", dims, num_workers=0) == pytest.approx(
        theirs, rel=1e-3
    )


def test_width_is_that_of_stage_2_for_the_first_set(photos, tmp_path, monkeypatch, capsys):
    """As if A's files had been resized as data.py resizes frames; B stays as it is, and the cache tells widths apart."""
    for path in sorted(photos[0].iterdir()):
        resized = data.resize_to_width(data.load_image(path), 50)
        (tmp_path / "resized").mkdir(exist_ok=True)
        Image.fromarray(resized.permute(1, 2, 0).numpy()).save(tmp_path / "resized" / f"{path.stem}.png")
    words = [photos[1], "--weights", "random", "--dims", 64, "--cache", tmp_path / "cache"]
    values = []
    for a, more in ((photos[0], ["--width", 50]), (tmp_path / "resized", []), (photos[0], []), (photos[0], ["--width", 50])):
        status, out, err = call(monkeypatch, capsys, a, *words, *more)
        assert status == 0, err
        values.append(float(out.split()[-1]))
    assert values[0] == values[3] == pytest.approx(values[1], rel=1e-3) and values[0] != pytest.approx(values[2], rel=5e-3)


def test_fid_of_folders_equals_that_of_pytorch_fids_features(same_weights, photos, monkeypatch, capsys):
    """At 2048 dimensions pytorch-fid's square root is slow: take its features, and the nuclear norm formula."""
    network = pytorch_fid.inception.InceptionV3([3]).eval()
    x, y = (pytorch_fid.fid_score.get_activations(sorted(f.iterdir()), network, 1, 2048, "cpu", 0) for f in photos)
    cx, cy = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    expected = np.square(x.mean(0) - y.mean(0)).sum() + (cx**2).sum() + (cy**2).sum() - 2 * np.linalg.norm(cx @ cy.T, "nuc")
    status, out, err = call(monkeypatch, capsys, *photos, "--weights", same_weights, "--dims", 2048)
    assert status == 0, err
    assert out.split()[-2] == "FID" and float(out.split()[-1]) == pytest.approx(expected, rel=1e-3)


@given(d=st.integers(1, 12), n=st.integers(2, 30), m=st.integers(2, 30), seed=st.integers(0, 2**32), scale=st.floats(1e-3, 1e3))
def test_distance_is_real_symmetric_and_zero_to_itself(d, n, m, seed, scale):
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
def test_random_weights_depend_on_the_seed_alone():
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


def test_a_set_may_mix_sizes_modes_and_formats(tmp_path, network):
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
    (tmp_path / "set" / "._photo.jpeg").write_text("a resource fork, as macOS creates them")
    mu, sigma = fid.statistics(tmp_path / "set", network, batch_size=2, workers=1)

    rows = []
    for path in paths:
        rgb = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
        with torch.inference_mode():
            rows.append(network(torch.from_numpy(rgb).permute(2, 0, 1)[None]).numpy()[0].astype(np.float64))
    np.testing.assert_allclose(mu, np.mean(rows, axis=0), rtol=1e-5)
    np.testing.assert_allclose(sigma, np.cov(np.stack(rows), rowvar=False), atol=1e-5 * np.abs(sigma).max())
    assert mu.dtype == sigma.dtype == np.float64


def test_a_single_image_is_refused(folders, network):
    with pytest.raises(ValueError, match="at least 2"):
        fid.statistics([folders[0] / "0.png"], network)


def test_a_truncated_image_is_named(folders, network):
    data = (folders[0] / "1.png").read_bytes()
    (folders[0] / "1.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"1\.png: not a readable image"):
        fid.statistics(folders[0], network)


def test_decompression_bombs_are_refused(folders, network, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)  # Pillow refuses twice as many; the images have 40 x 30
    with pytest.raises(ValueError, match=r"0\.png.*decompression bomb"):
        fid.statistics(folders[0], network)


def test_photographs_are_turned_by_their_exif_tag(folders, network):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    paths = sorted(folders[0].iterdir())
    upright = fid.statistics(paths, network)
    for path in paths:
        Image.open(path).rotate(180).save(path, exif=exif)
    assert np.array_equal(upright[0], fid.statistics(paths, network)[0])


def test_a_reading_process_that_dies_while_writing_ends_the_work(folders):
    """Each batch is larger than a pipe's buffer, so the workers are writing while the network computes."""

    class KillsReaders(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
            return x.mean((2, 3))

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        fid.statistics([folders[0] / "0.png"] * 40, KillsReaders(), batch_size=1, workers=2)


def test_sixteen_bits_are_refused(folders, network):
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(folders[0] / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png.*8 bits"):
        fid.statistics(folders[0], network)


def test_the_cache_depends_on_weights_and_files(folders, network, tmp_path):
    cache = tmp_path / "cache"
    passes = []
    handle = network.register_forward_pre_hook(lambda *_: passes.append(1))

    def computed(folder, network=network):
        """Statistics, and whether the network computed them."""
        passes.clear()
        return fid.statistics(folder, network, cache=cache), bool(passes)

    try:
        first, new = computed(folders[0])
        again, repeated = computed(folders[0])
        assert new and not repeated and all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
        assert [path.suffix for path in cache.iterdir()] == [".npz"]
        assert computed(folders[1])[1]
        os.utime(folders[0] / "0.png", (1, 1))
        assert computed(folders[0])[1]
        save_image(folders[0] / "1.png", np.random.default_rng(9))
        changed, new = computed(folders[0])
        assert new and not np.allclose(first[0], changed[0], rtol=1e-6)
    finally:
        handle.remove()
    other = fid.statistics(folders[0], fid.inception("random", 64, seed=3), cache=cache)
    assert not np.allclose(changed[0], other[0], rtol=1e-2)


# --- the command line


@pytest.mark.parametrize(
    ("published", "dims", "name"),
    [
        (True, 2048, "FID"),
        (True, 64, "FID_64"),
        (False, 2048, "frechet_random_inception"),
        (False, 768, "frechet_random_inception_768"),
    ],
)
def test_only_real_weights_at_2048_dimensions_are_called_fid(
    checkpoint, folders, tmp_path, monkeypatch, capsys, published, dims, name
):
    for k in range(2):
        np.savez(tmp_path / f"{k}.npz", mu=np.full(dims, k), sigma=np.zeros((dims, dims)))
    weights = checkpoint[1] if published else "random"
    words = [tmp_path / "0.npz", tmp_path / "1.npz", "--dims", dims, "--weights", weights, "--out", tmp_path / "new" / "d.json"]
    assert call(monkeypatch, capsys, *words)[:2] == (0, f"{name} {dims}\n")
    assert json.loads((tmp_path / "new" / "d.json").read_text()) == {name: dims}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["d.json"]


def test_folders_and_saved_statistics_agree(folders, tmp_path, monkeypatch, capsys):
    a, b = folders
    npz = tmp_path / "new" / "a.npz"
    words = [a, b, "--weights=random", "--dims=64", "--device=cpu", "--workers=1", f"--out={tmp_path / 'd.json'}"]
    direct = subprocess.run([sys.executable, SCRIPT, *words], check=False, capture_output=True, text=True, timeout=120)
    assert direct.returncode == 0, direct.stderr
    name, value = direct.stdout.split()
    assert name == "frechet_random_inception_64" and float(value) > 0
    assert json.loads((tmp_path / "d.json").read_text()) == {name: float(value)}
    status, out, err = call(monkeypatch, capsys, a, "--save", npz)
    assert (status, out) == (0, ""), err
    with np.load(npz) as file:
        assert sorted(file) == ["mu", "sigma"] and file["sigma"].shape == (64, 64)
    through = call(monkeypatch, capsys, npz, b)[1]
    assert float(through.split()[1]) == pytest.approx(float(value), rel=1e-4)
    same = call(monkeypatch, capsys, npz, a)[1]
    assert float(same.split()[1]) < 1e-6 * float(value)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "x.npz").write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left.*x\.npz"):
        fid.save_statistics(tmp_path / "x.npz", np.zeros(2), np.eye(2))
    assert (tmp_path / "x.npz").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_check_reads_every_header_and_hidden_folders_do_not_count(folders, checkpoint, monkeypatch, capsys):
    hidden = folders[0] / ".thumbnails"
    hidden.mkdir()
    Image.new("I;16", (8, 8)).save(hidden / "x.png")
    words = [*map(str, folders), "--weights", str(checkpoint[1]), "--dims", "64", "--check"]
    monkeypatch.setattr(sys, "argv", ["fid.py", *words])
    fid.main()
    hidden.rename(folders[0] / "scans")
    with pytest.raises(SystemExit) as end:
        fid.main()
    assert end.value.code == 2 and "x.png: not a readable image (mode I;16 has more than 8 bits" in capsys.readouterr().err


def test_a_damaged_cache_is_made_anew(folders, network, tmp_path):
    expected = fid.statistics(folders[0], network, cache=tmp_path / "c")
    [cached] = (tmp_path / "c").iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(whole[:100])  # after a power failure, for example
    assert all(map(np.array_equal, fid.statistics(folders[0], network, cache=tmp_path / "c"), expected))
    assert cached.read_bytes() == whole


def test_an_unusable_cache_loses_no_distance(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    status, out, err = call(monkeypatch, capsys, *folders, "--cache", tmp_path / "file" / "cache")
    assert status == 0 and out.startswith("frechet") and err.count("statistics not cached") == 2


@pytest.mark.parametrize("flag", ["--out=/proc/clada/d.json", "--save=/proc/clada/d.npz"])
def test_an_unwritable_output_is_refused_before_the_work(folders, monkeypatch, capsys, flag):
    monkeypatch.setattr(fid, "statistics", None)
    status, out, err = call(monkeypatch, capsys, *folders, flag)
    assert status == 2 and out == "" and "/proc/clada" in err and err.count("\n") == 1


def test_check_computes_nothing(folders, tmp_path, monkeypatch, capsys, checkpoint):
    monkeypatch.setattr(fid, "statistics", None)
    status, out, err = call(monkeypatch, capsys, *folders, "--check", "--weights", checkpoint[1], "--out", tmp_path / "d.json")
    assert status == 0 and out.count("\n") == 1 and "3 images" in out and err == "" and not (tmp_path / "d.json").exists()
    assert call(monkeypatch, capsys, "--check")[0] == 0
    assert call(monkeypatch, capsys, tmp_path / "gone", "--check")[0] == 2


def test_published_weights_are_downloaded_once(monkeypatch, checkpoint, tmp_path, capsys):
    assert fid.WEIGHTS_URL.endswith("/fid_weights/pt_inception-2015-12-05-6726825d.pth")
    digest = hashlib.sha256(checkpoint[1].read_bytes()).hexdigest()[:8]
    source = tmp_path / f"inception-{digest}.pth"
    source.write_bytes(checkpoint[1].read_bytes())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(fid, "WEIGHTS_URL", source.as_uri())
    x = torch.rand(1, 3, 40, 40)
    expected = fid.inception(checkpoint[1], dims=64)(x)
    assert torch.equal(fid.inception(dims=64)(x), expected)
    source.unlink()
    assert torch.equal(fid.inception(dims=64)(x), expected)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("exists", "reason"), [(True, "invalid hash"), (False, "No such file")])
def test_a_failed_download_names_the_address_and_the_flag(folders, tmp_path, monkeypatch, capsys, exists, reason):
    source = tmp_path / "inception-00000000.pth"
    if exists:
        source.write_text("an error page")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(fid, "WEIGHTS_URL", source.as_uri())
    status, _, err = call(monkeypatch, capsys, *folders, "--weights", "published")
    line = err.splitlines()[-1]
    assert status == 2 and line.startswith("fid.py: ")
    assert source.as_uri() in line and "--weights FILE" in line and reason in line


def test_excluded_images_are_left_out(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "names").write_text("1  # dark\n\n# and\n2.png\nnowhere\n")
    for name in ("0_leftImg8bit", "3"):
        save_image(folders[0] / f"{name}.png", np.random.default_rng(0))
    found = fid.find_images(folders[0], {"1", "2.png"})
    assert [Path(path).name for path in found] == ["0.png", "0_leftImg8bit.png", "3.png"]
    found = fid.find_images(folders[0], {"sub/0_gtFine_labelIds.PNG"})
    assert [Path(path).name for path in found] == ["1.png", "2.png", "3.png"]
    _, out, err = call(monkeypatch, capsys, folders[0], "--exclude", tmp_path / "names", "--check")
    assert "a: 3 images" in out
    assert "names: 1 of 3 names match no image: nowhere" in err and err.count("\n") == 1


def test_a_fifo_is_refused(folders):
    os.mkfifo(folders[0] / "z.png")
    with pytest.raises(ValueError, match="z.png: not a regular file"):
        fid.find_images(folders[0])


@pytest.fixture
def wrong(folders, tmp_path):
    """A folder with one of every wrong input."""
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
    return tmp_path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a"], "A and B"),
        (["a", "--save", "a.npz", "--out", "d.json"], "A and B"),
        (["a", "gone"], "gone: no such file"),
        (["a", ""], "no such file"),
        (["a", "empty"], "empty: 0 images"),
        (["one", "a"], "one: 1 images"),
        (["a", "broken"], "broken/bad.png: "),
        (["a", "broken", "--workers", "1"], "broken/bad.png: "),
        (["a", "text.pth"], "text.pth: not statistics"),
        (["a", "text.npz"], "text.npz"),
        (["a", "keys.npz"], "keys.npz"),
        (["a", "shapes.npz"], "shapes.npz"),
        (["a", "narrow.npz"], "192"),
        (["a", "objects.npz"], "objects.npz"),
        (["a", "b", "--dims", "100"], "--dims"),
        (["a", "b", "--batch-size", "0"], "--batch-size"),
        (["a", "b", "--device", "cuda:99"], "--device cuda:99"),
        (["a", "b", "--weights", "gone.pth"], "No such file or directory: 'gone.pth'"),
        (["a", "b", "--weights", "text.pth"], "text.pth"),
        (["a", "b", "--weights", "other.pth"], "other.pth"),
        (["a", "b", "--weights", "list.pth"], "list.pth"),
        (["a", "b", "--exclude", "gone"], "gone"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(wrong, monkeypatch, capsys, words, says):
    monkeypatch.chdir(wrong)
    status, out, err = call(monkeypatch, capsys, *words)
    err = "".join(line for line in err.splitlines(True) if ": cpu, float32" not in line)  # printed before the work
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("fid.py: ") and says in err and len(err) < 400


def kill_this_process(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_memory(*_, **__):
    raise MemoryError


@pytest.mark.parametrize(
    ("image_open", "workers", "says"),
    [(kill_this_process, 1, "died"), (run_out_of_memory, 1, "not enough memory"), (run_out_of_memory, 0, "not enough memory")],
)
def test_lost_readers_and_lack_of_memory_end_with_status_1_and_one_line(
    folders, monkeypatch, capsys, image_open, workers, says
):
    monkeypatch.setattr(Image, "open", image_open)
    status, out, err = call(monkeypatch, capsys, *folders, "--workers", workers)
    line = err.splitlines()[-1]
    assert status == 1 and out == "" and err.count("\n") == 2
    assert line.startswith("fid.py: ") and says in line and "--batch-size (32)" in line
