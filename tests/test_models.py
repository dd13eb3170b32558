"""models.py: sizes, parameter counts, what the features are, freezing, saving."""

import pytest
import torch
import torch.nn.functional as F
from efficientnet_pytorch import EfficientNet
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


@pytest.mark.parametrize("batch", [1, 2])
def test_generator_is_zhu_et_als(batch):
    """c7s1-64, d128, d256, 9 x R256, u128, u64, c7s1-3, by functions, its parameters in the order in which data pass them."""
    generator = models.ResnetGenerator(base_channels=4).double()
    parameters = iter(generator.parameters())

    def conv(x, pad, **options):
        return F.conv2d(F.pad(x, [pad] * 4, "reflect"), next(parameters), next(parameters), **options)

    x = torch.rand(batch, 3, 24, 32, dtype=torch.float64) * 2 - 1
    y = normalised(conv(x, 3)).relu()
    for _ in range(2):
        y = normalised(F.conv2d(y, next(parameters), next(parameters), stride=2, padding=1)).relu()
    for _ in range(9):
        y = y + normalised(conv(normalised(conv(y, 1)).relu(), 1))
    for _ in range(2):
        up = F.conv_transpose2d(y, next(parameters), next(parameters), stride=2, padding=1, output_padding=1)
        y = normalised(up).relu()
    torch.testing.assert_close(generator(x), conv(y, 3).tanh())
    assert not list(parameters)


@pytest.mark.parametrize("batch", [1, 2])
def test_discriminator_is_isola_et_als(batch):
    """C64-C128-C256-C512 and a last convolution, 4x4, no norm on the first, leaky ReLUs of slope 0.2."""
    discriminator = models.PatchDiscriminator(base_channels=4).double()
    parameters = iter(discriminator.parameters())
    y = x = torch.rand(batch, 3, 64, 80, dtype=torch.float64) * 2 - 1
    for n, stride in enumerate((2, 2, 2, 1, 1)):
        y = F.conv2d(y, next(parameters), next(parameters), stride=stride, padding=1)
        y = F.leaky_relu(normalised(y) if n > 0 else y, 0.2) if n < 4 else y
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
    assert [receptive_field(lambda x, i=i: generator.encode(x)[i], 160)[0] for i in range(5)] == fields


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


@pytest.mark.parametrize("resample", [models.Downsample, models.Upsample])
def test_blurs_keep_the_mean_and_shift_nothing(resample):
    """A constant stays one at every size; a ramp stays itself, and a delta stays where it is, to both sides alike."""
    down = resample is models.Downsample

    def apply(x, side):
        return models.Downsample(1)(x) if down else models.Upsample(1)(x, (side, side))

    for side in range(2, 20):
        small = -(-side // 2)
        x = torch.ones(1, 1, side if down else small, side if down else small)
        y = apply(x, side)
        assert y.shape[-2:] == ((small, small) if down else (side, side)) and torch.allclose(y, torch.ones_like(y))
    # Reflected at the border, a ramp is none; of the inner pixels, output i is input 2i (or half of that).
    ramp = torch.arange(20.0).expand(1, 1, 20, 20)
    y = apply(ramp, 40)[0, 0, 1:-2, 1:-2]
    torch.testing.assert_close(y, (torch.arange(y.shape[1]) + 1.0).mul(2 if down else 0.5).expand_as(y))
    total = sum(apply(torch.eye(400)[i].view(1, 1, 20, 20), 40) for i in range(400))
    torch.testing.assert_close(total, torch.ones_like(total))  # of each output, the weights sum to one
    delta = torch.zeros(1, 1, 21, 21)
    delta[..., 10, 10] = 1
    y = apply(delta, 41)
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
    expected = projector.heads[0](features[0][1, :, i // 7, i % 7])
    torch.testing.assert_close(vectors[0][1, 3], expected / expected.norm())


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


def test_encoder_weights_come_from_a_file(tmp_path):
    theirs = EfficientNet.from_name("efficientnet-b0")
    torch.save(theirs.state_dict(), tmp_path / "b0.pth")
    unet = models.UNet(encoder="efficientnet-b0", encoder_weights=tmp_path / "b0.pth")
    assert torch.equal(unet.encoder._conv_stem.weight, theirs._conv_stem.weight)
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    for path, message in (("bad.pth", "not a state_dict"), ("none.pth", "No such file")):
        with pytest.raises(ValueError, match=message):
            models.UNet(encoder="efficientnet-b0", encoder_weights=tmp_path / path)


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
    assert {"_bn0.running_mean", "_blocks.0._bn1.num_batches_tracked"} <= before.keys() and not torch.equal(
        head, unet.head.weight
    )
    assert all(torch.equal(before[name], value) for name, value in unet.encoder.state_dict().items())
    unet.freeze_encoder(False)
    unet(torch.rand(2, 3, 32, 32)).square().mean().backward()
    assert unet.encoder._bn0.training and unet.encoder._conv_stem.weight.grad is not None


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
