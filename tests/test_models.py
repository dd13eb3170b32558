"""models.py: networks against plain builds, sizes, shifts, receptive fields, features, PatchNCE, freezing, saving."""

import hashlib
import shutil

import efficientnet_pytorch.utils
import pytest
import torch
import torch.nn.functional as F
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import Conv2dDynamicSamePadding
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models import EfficientNet_B0_Weights

import models
from losses import patch_nce_loss


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_parameter_counts_are_the_papers():
    assert parameters(models.ResnetGenerator()) == 11_378_179
    assert parameters(models.PatchDiscriminator()) == 2_764_737


@pytest.mark.parametrize("antialias", [False, True])
@given(size=st.tuples(st.integers(16, 70), st.integers(16, 70)), batch=st.integers(1, 3))
def test_generator_keeps_every_size(size, batch, antialias):
    generator = models.ResnetGenerator(base_channels=4, antialias=antialias)
    x = torch.rand(batch, 3, *size) * 2 - 1
    image, features = generator(x, return_features=True)
    assert image.shape == x.shape and image.abs().max() <= 1
    assert [f.shape[1] for f in features] == list(generator.feature_channels)
    assert all(torch.equal(a, b) for a, b in zip(features, generator.encode(x)))
    assert torch.equal(features[0], x)
    half, quarter = ([-(-side // n) for side in size] for n in (2, 4))
    expected = [size, size, half, quarter, quarter] if antialias else [size, half, quarter, quarter, quarter]
    assert [list(f.shape[-2:]) for f in features] == [list(s) for s in expected]


def normalised(x):
    """Instance norm by its formula: each map of each image for itself."""
    return (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()


def blurred(x):
    """Every map by the kernel (1, 2, 1) / 4 in both directions, over its reflection at the border."""
    line = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype) / 4
    maps = F.pad(x, [1] * 4, "reflect").flatten(0, 1)[:, None]
    return F.conv2d(maps, line.outer(line)[None, None]).view_as(x)


def interpolated(x):
    """Twice the size: the pixels, and between two the mean of them; the last is repeated."""
    right = torch.cat([x[..., 1:], x[..., -1:]], -1)
    x = torch.stack([x, (x + right) / 2], -1).flatten(-2)
    below = torch.cat([x[..., 1:, :], x[..., -1:, :]], -2)
    return torch.stack([x, (x + below) / 2], -2).flatten(-3, -2)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_generator_is_zhu_et_als(batch, antialias):
    """c7s1-64, d128, d256, 9 x R256, u128, u64, c7s1-3, by functions, its parameters in the order in which data pass them."""
    generator = models.ResnetGenerator(base_channels=4, antialias=antialias).double()
    parameters = iter(generator.parameters())

    def conv(x, pad):
        return F.conv2d(F.pad(x, [pad] * 4, "reflect"), next(parameters), next(parameters))

    x = torch.rand(batch, 3, 24, 32, dtype=torch.float64) * 2 - 1
    y = normalised(conv(x, 3)).relu()
    for _ in range(2):
        stride = 1 if antialias else 2
        y = normalised(F.conv2d(y, next(parameters), next(parameters), stride=stride, padding=1)).relu()
        y = blurred(y)[..., ::2, ::2] if antialias else y
    for _ in range(9):
        y = y + normalised(conv(normalised(conv(y, 1)).relu(), 1))
    for _ in range(2):
        if antialias:
            up = F.conv2d(interpolated(y), next(parameters), next(parameters), padding=1)
        else:
            up = F.conv_transpose2d(y, next(parameters), next(parameters), stride=2, padding=1, output_padding=1)
        y = normalised(up).relu()
    torch.testing.assert_close(generator(x), conv(y, 3).tanh())
    assert not list(parameters)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_discriminator_is_isola_et_als(batch, antialias):
    """C64-C128-C256-C512 and a last convolution, 4x4, no norm on the first, leaky ReLUs of slope 0.2."""
    discriminator = models.PatchDiscriminator(base_channels=4, antialias=antialias).double()
    parameters = iter(discriminator.parameters())
    y = x = torch.rand(batch, 3, 64, 80, dtype=torch.float64) * 2 - 1
    for n, stride in enumerate((2, 2, 2, 1, 1)):
        y = F.conv2d(y, next(parameters), next(parameters), stride=1 if antialias else stride, padding=1)
        y = F.leaky_relu(normalised(y) if n > 0 else y, 0.2) if n < 4 else y
        y = blurred(y)[..., ::2, ::2] if antialias and stride == 2 else y
    torch.testing.assert_close(discriminator(x), y)
    assert not list(parameters)


def test_translation_networks_start_from_small_normal_weights():
    torch.manual_seed(0)
    for network in (models.ResnetGenerator(), models.PatchDiscriminator(), models.PatchProjector([64, 256])):
        for parameter in network.parameters():
            if parameter.ndim == 1:
                assert not parameter.any()
            elif parameter.numel() > 5000:
                assert parameter.mean().abs() < 1e-3 and parameter.std().item() == pytest.approx(0.02, rel=0.05)


def test_generator_refuses_what_is_too_small():
    with pytest.raises(ValueError, match="16x16"):
        models.ResnetGenerator(base_channels=4)(torch.zeros(1, 3, 15, 40))


def test_one_image_is_normalised_as_in_a_batch():
    """Batch norm over one image is instance norm: the fast path changes nothing."""
    generator = models.ResnetGenerator(base_channels=8)
    x = torch.rand(2, 3, 32, 40) * 2 - 1
    torch.testing.assert_close(torch.cat([generator(x[:1]), generator(x[1:])]), generator(x), atol=1e-5, rtol=1e-4)


@pytest.fixture
def no_norm(monkeypatch):
    """Instance norm looks at the whole map; without it a receptive field is that of the convolutions."""
    monkeypatch.setattr(models.InstanceNorm2d, "forward", lambda self, x: x)


def receptive_field(network, size):
    """The sides of the input region that reaches one output, found by gradient."""
    x = torch.rand(1, 3, size, size, requires_grad=True)
    out = network(x)
    out[0, :, out.shape[2] // 2, out.shape[3] // 2].sum().backward()
    touched = x.grad.abs().sum((0, 1)).nonzero()
    return (touched.amax(0) - touched.amin(0) + 1).tolist()


def test_discriminator_sees_70_pixels(no_norm):
    assert receptive_field(models.PatchDiscriminator(base_channels=4), 160) == [70, 70]


# By hand: a k x k convolution adds (k - 1) times the stride so far; a block is two of 3 x 3; blurs are 3 x 3.
@pytest.mark.parametrize(("antialias", "fields"), [(False, [1, 9, 13, 29, 93]), (True, [1, 9, 15, 35, 99])])
def test_the_five_features_are_the_papers_layers(no_norm, antialias, fields):
    generator = models.ResnetGenerator(base_channels=4, antialias=antialias)
    assert [receptive_field(lambda x, i=i: generator.encode(x)[i], 160) for i in range(5)] == [[n, n] for n in fields]


@pytest.mark.parametrize("antialias", [False, True])
def test_features_of_the_downsampling_convolutions_are_taken_before_their_norm(antialias):
    generator, x = models.ResnetGenerator(base_channels=4, antialias=antialias), torch.rand(1, 3, 40, 40)
    found = {}
    for name in ("down1", "down2"):
        getattr(generator, name).register_forward_hook(lambda module, x, out, name=name: found.update({name: out}))
    for i in (0, 4):
        generator.blocks[i].register_forward_hook(lambda module, x, out, i=i: found.update({i: out}))
    for feature, expected in zip(generator.encode(x), (x, found["down1"], found["down2"], found[0], found[4])):
        assert torch.equal(feature, expected)


def test_blurs_keep_a_constant_at_every_size():
    for side in range(2, 20):
        small = -(-side // 2)
        down, up = models.Downsample(1)(torch.ones(1, 1, side, side)), torch.ones(1, 1, small, small)
        assert torch.equal(down, up)  # the weights sum to one
        assert torch.equal(models.Upsample(1)(up, (side, side)), torch.ones(1, 1, side, side))


def test_blurs_keep_a_ramp_where_it_is():
    """But for the borders, where it is reflected or ends: output i of the smaller map is at 2i of the larger."""
    ramp = torch.arange(20.0).expand(1, 1, 20, 20)
    down, up = models.Downsample(1)(ramp)[0, 0], models.Upsample(1)(ramp, (40, 40))[0, 0]
    torch.testing.assert_close(down[:, 1:], (2 * torch.arange(1.0, 10)).expand(10, 9))
    torch.testing.assert_close(up[:, :-1], (torch.arange(39.0) / 2).expand(40, 39))


def test_blurs_treat_all_sides_alike():
    delta = torch.zeros(1, 1, 21, 21)
    delta[..., 10, 10] = 1
    for y in (models.Downsample(1)(delta), models.Upsample(1)(delta, (41, 41))):
        assert y.flatten().argmax() == y.numel() // 2
        assert torch.allclose(y, y.flip(-1)) and torch.allclose(y, y.flip(-2)) and torch.allclose(y, y.mT)


def identity_generator(antialias):
    """A generator whose weights make it copy its input, but for the blur of its resampling.

    Residual blocks add nothing, convolutions have a one in the middle. Strided ones blur by (1, 2, 1) / 4, transposed ones
    interpolate by (1, 2, 1) / 2; a delta then keeps its sum and its centre of mass, wherever it stands.
    """
    generator = models.ResnetGenerator(1, 1, base_channels=1, n_blocks=5, antialias=antialias)
    middle, blur = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 1.0])
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.zero_()
        for name, scale in (("stem", 0), ("down1", 4), ("down2", 4), ("up1", 2), ("up2", 2), ("head", 0)):
            weight = getattr(generator, name).weight
            if weight.shape[-1] == 7:
                weight[0, 0, 3, 3] = 1
            else:
                line = middle if antialias else blur / scale
                weight[0, 0] = line.outer(line)
    return generator


@pytest.mark.parametrize("antialias", [False, True])
@torch.inference_mode()
def test_every_size_comes_back_without_a_shift(no_norm, antialias):
    generator = identity_generator(antialias)
    for height in range(16, 71):
        for width in range(16, 71):
            y, x = height // 2, width // 2
            delta = torch.zeros(1, 1, height, width)
            delta[..., y, x] = 0.01  # where tanh is a straight line
            image = generator(delta)[0, 0]
            assert image.shape == (height, width)
            places = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            centre = [float((image * place).sum() / image.sum()) for place in places]
            assert centre == pytest.approx([y, x], abs=1e-3), (height, width)
            if y % 4 == x % 4 == 0:
                assert image.argmax() == y * width + x


@pytest.mark.parametrize("antialias", [False, True])
@torch.inference_mode()
def test_a_delta_stays_wherever_it_stands(no_norm, antialias):
    generator, side = identity_generator(antialias), 31
    for y in range(8, 23):
        for x in range(8, 23):
            delta = torch.zeros(1, 1, side, side)
            delta[..., y, x] = 0.01
            image = generator(delta)[0, 0]
            line = torch.arange(side)
            centre = [float((image.sum(dim) * line).sum() / image.sum()) for dim in (1, 0)]
            assert centre == pytest.approx([y, x], abs=1e-3)


def test_projector_takes_the_sampled_locations():
    features = [torch.randn(2, 5, 6, 7), torch.randn(2, 3, 2, 2)]
    projector = models.PatchProjector([5, 3], width=8)
    locations = models.sample_locations(features, 10)
    assert [len(set(ids.tolist())) for ids in locations] == [10, 4]  # no more than a layer has, none twice
    vectors = projector(features, locations)
    assert [v.shape for v in vectors] == [(2, 10, 8), (2, 4, 8)]
    i = locations[0][3].item()
    w1, b1, w2, b2 = list(projector.parameters())[:4]  # of the first layer's two-layer perceptron
    expected = F.linear(F.linear(features[0][1, :, i // 7, i % 7], w1, b1).relu(), w2, b2)
    torch.testing.assert_close(vectors[0][1, 3], expected / expected.norm())


def test_every_location_is_drawn_and_anew():
    draws = [models.sample_locations([torch.zeros(1, 1, 5, 6)], 4)[0].tolist() for _ in range(60)]
    assert {i for draw in draws for i in draw} == set(range(30)) and len({tuple(draw) for draw in draws}) > 50


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (64, 47)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_patches", [1, 16, 256, 10_000])
def test_patch_nce_from_features_to_loss(size, batch, num_patches):
    """As many locations as a layer has and no more, each image for itself, the last layers of 16x16 having 16."""
    generator, projector = models.ResnetGenerator(base_channels=4), models.PatchProjector((3, 8, 16, 16, 16), width=8)
    with torch.no_grad():
        features, translated = (generator.encode(torch.rand(batch, 3, *size) * 2 - 1) for _ in range(2))
        locations = models.sample_locations(features, num_patches)
        queries, positives = projector(translated, locations), projector(features, locations)
        losses = [patch_nce_loss(q, p).item() for q, p in zip(queries, positives)]
        areas = [f.shape[-2] * f.shape[-1] for f in features]
        assert [q.shape for q in queries] == [(batch, min(num_patches, area), 8) for area in areas]
        assert all(len(set(ids.tolist())) == len(ids) and ids.max() < area for ids, area in zip(locations, areas))
        for layer, loss in enumerate(losses):
            alone = []
            for i in range(batch):
                pair = [projector([f[i : i + 1] for f in maps], locations)[layer] for maps in (translated, features)]
                alone.append(patch_nce_loss(*pair).item())
            assert loss == pytest.approx(sum(alone) / batch, rel=1e-4, abs=1e-6)
            assert (loss == 0) == (num_patches == 1)  # one location has no negative, and nothing to tell apart


@settings(max_examples=15)
@given(size=st.tuples(st.integers(32, 130), st.integers(32, 130)))
def test_unet_keeps_every_size(size):
    unet = models.UNet(num_classes=4, encoder="efficientnet-b0").eval()
    logits, features = unet(torch.rand(1, 3, *size), return_features=True)
    assert logits.shape == (1, 4, *size)
    assert {name: f.shape[1] for name, f in features.items()} == unet.feature_channels
    strides = [(-(-size[0] // 2**n), -(-size[1] // 2**n)) for n in range(1, 6)]
    assert [tuple(features[f"encoder{n}"].shape[-2:]) for n in range(1, 6)] == strides
    assert models.FeatureDiscriminator(unet.feature_channels["decoder2"])(features["decoder2"]).shape[1] == 1


def test_unet_encoder_is_the_packages_network():
    """Same weights, same image: the deepest map equals the package's own, before its head, for an unusual size too."""
    unet = models.UNet(encoder="efficientnet-b0").eval()
    theirs = EfficientNet.from_name("efficientnet-b0", image_size=None).eval()
    theirs.load_state_dict(unet.encoder.state_dict(), strict=False)
    x = torch.rand(1, 3, 70, 90)
    preset = EfficientNet_B0_Weights.IMAGENET1K_V1.transforms()
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (preset.mean, preset.std))
    deepest = theirs.extract_endpoints((x - mean) / deviation)["reduction_5"]
    torch.testing.assert_close(unet.encode(x)[-1], deepest, atol=1e-4 * deepest.abs().max().item(), rtol=0)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 9), (9, 8)])
def test_depthwise_convolution_is_the_packages_and_in_float32_on_a_cpu(kernel, stride, size):
    theirs = Conv2dDynamicSamePadding(4, 4, kernel, stride, groups=4, bias=False)
    ours = models.DepthwiseConv2d(4, kernel, stride)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, *size).bfloat16()
    expected = theirs(x.float())
    torch.testing.assert_close(ours(x.float()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), expected.bfloat16())
        assert not torch.equal(theirs(x), expected.bfloat16())  # the weights, too, would be rounded


def test_autocast_pads_as_it_is():
    x = torch.randn(1, 2, 5, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        padded = models.reflect_pad(x, 3)
    assert padded.dtype == torch.bfloat16 and torch.equal(padded, F.pad(x, (3, 3, 3, 3), "reflect"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("n", "size"), [(1, (2, 2)), (1, (9, 8)), (3, (4, 4)), (3, (7, 16))])
@pytest.mark.parametrize("batch", [1, 2])
def test_cudas_reflection_padding_is_torchs_and_keeps_the_layout(layout, n, size, batch):
    x = torch.randn(batch, 5, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    expected, padded = F.pad(x, (n,) * 4, "reflect"), models.ReflectPad2d.apply(x, n)
    assert torch.equal(padded, expected) and padded.is_contiguous(memory_format=layout)
    towards = torch.randn_like(expected)
    given = towards.clone()
    (gradient,) = torch.autograd.grad(padded, x, towards)
    assert torch.equal(towards, given) and gradient.is_contiguous(memory_format=layout)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x, given)[0], rtol=1e-15, atol=2e-15)
    assert torch.autograd.gradgradcheck(lambda x: models.ReflectPad2d.apply(x, n), x)


def test_encoder_weights_come_from_a_file(tmp_path):
    theirs = EfficientNet.from_name("efficientnet-b0")
    torch.save(theirs.state_dict(), tmp_path / "b0.pth")
    unet = models.UNet(encoder="efficientnet-b0", encoder_weights=tmp_path / "b0.pth")
    assert torch.equal(unet.encoder._conv_stem.weight, theirs._conv_stem.weight)
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    cases = (("bad.pth", "not a file that torch.load"), ("none.pth", "No such file"), ("other.pth", "not a state_dict"))
    for path, message in cases:
        with pytest.raises(ValueError, match=message):
            models.UNet(encoder="efficientnet-b0", encoder_weights=tmp_path / path)


def test_downloaded_weights_must_have_the_hash_of_their_name(tmp_path, monkeypatch):
    """The hub is a file here: its address is asked for once, and what comes is checked against its name each time."""
    torch.save(EfficientNet.from_name("efficientnet-b0").state_dict(), tmp_path / "hub")
    digest = hashlib.sha256((tmp_path / "hub").read_bytes()).hexdigest()[:8]
    asked = []

    def download(url, path, **options):
        asked.append(url)
        shutil.copy(tmp_path / "hub", path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setitem(efficientnet_pytorch.utils.url_map, "efficientnet-b0", f"https://example.org/b0-{digest}.pth")
    for _ in range(2):
        models.UNet(encoder="efficientnet-b0", encoder_weights="imagenet")
    assert asked == [f"https://example.org/b0-{digest}.pth"]
    monkeypatch.setitem(efficientnet_pytorch.utils.url_map, "efficientnet-b0", "https://example.org/b0-01234567.pth")
    with pytest.raises(ValueError, match=f"b0-01234567.pth: its sha256 begins with {digest}, not 01234567"):
        models.UNet(encoder="efficientnet-b0", encoder_weights="imagenet")


def test_frozen_means_frozen():
    unet = models.UNet(num_classes=3, encoder="efficientnet-b0").train()
    unet.freeze_encoder()
    unet.train()
    before = {name: value.clone() for name, value in unet.encoder.state_dict().items()}
    optimizer = torch.optim.Adam(unet.parameters(), lr=0.1)
    head = unet.head.weight.clone()
    for _ in range(10):
        optimizer.zero_grad()
        unet(torch.rand(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    assert {"_bn0.running_mean", "_blocks.0._bn1.num_batches_tracked"} <= before.keys()  # BatchNorm's buffers among them
    assert not torch.equal(head, unet.head.weight)
    assert all(torch.equal(before[name], value) for name, value in unet.encoder.state_dict().items())
    unet.freeze_encoder(False)
    unet(torch.rand(2, 3, 32, 32)).square().mean().backward()
    assert unet.encoder._bn0.training and unet.encoder._conv_stem.weight.grad is not None


def test_batch_norm_moves_by_a_tenth_a_step():
    unet = models.UNet(num_classes=3, encoder="efficientnet-b0").train()
    seen = {}
    norms = {"encoder": unet.encoder._bn0, "decoder": unet.decoder[0][1]}
    for name, norm in norms.items():
        norm.register_forward_hook(lambda module, x, out, name=name: seen.update({name: x[0].mean((0, 2, 3))}))
    unet(torch.rand(2, 3, 64, 64))
    for name, norm in norms.items():
        torch.testing.assert_close(norm.running_mean, 0.1 * seen[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("network", [models.ResnetGenerator(base_channels=4), models.UNet(5, "efficientnet-b0")])
def test_a_saved_network_comes_back(network, tmp_path):
    torch.save(models.network_state(network), tmp_path / "weights.pt")
    again = models.load_network(tmp_path / "weights.pt", type(network))
    x = torch.rand(1, 3, 32, 48)
    assert not again.training and torch.equal(again(x), network.eval()(x))
    other = models.UNet if isinstance(network, models.ResnetGenerator) else models.ResnetGenerator
    with pytest.raises(ValueError, match="where a"):
        models.load_network(tmp_path / "weights.pt", other)
    (tmp_path / "weights.pt").write_bytes((tmp_path / "weights.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="not the weights.pt"):
        models.load_network(tmp_path / "weights.pt")
