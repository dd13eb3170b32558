"""models.py: networks against their formulas, sizes, shifts, features, PatchNCE, freezing, saving and loading."""

import functools
import hashlib
import sys

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
    """Instance norm by its formula, over each map of each image."""
    return (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()


def blurred(x):
    """Each map convolved with (1, 2, 1) / 4 in both directions, reflected at the border."""
    line = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype) / 4
    maps = F.pad(x, [1] * 4, "reflect").flatten(0, 1)[:, None]
    return F.conv2d(maps, line.outer(line)[None, None]).view_as(x)


def interpolated(x):
    """Twice the size: between two pixels stands their mean; the last row and column are repeated."""
    right = torch.cat([x[..., 1:], x[..., -1:]], -1)
    x = torch.stack([x, (x + right) / 2], -1).flatten(-2)
    below = torch.cat([x[..., 1:, :], x[..., -1:, :]], -2)
    return torch.stack([x, (x + below) / 2], -2).flatten(-3, -2)


@pytest.mark.parametrize(("antialias", "residual"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("batch", "size"), [(1, (24, 32)), (2, (25, 34)), (1, (27, 23))])
def test_generator_and_its_features_are_their_formula(batch, size, antialias, residual):
    """Zhu et al. 2017: c7s1-64, d128, d256, 9 x R256, u128, u64, c7s1-3. Parameters come in the order in which they are used.

    Features, Park et al. 2020: pixels, both downsampling convolutions before their norm, first and fifth residual block.
    """
    generator = models.ResnetGenerator(base_channels=4, antialias=antialias, residual=residual).double()
    if residual:  # begins as the identity
        torch.testing.assert_close(generator(x := torch.rand(1, 3, *size).double()), 0.98 * x)
        torch.nn.init.normal_(generator.head.weight)
    parameters = iter(generator.parameters())

    def conv(x, pad):
        return F.conv2d(F.pad(x, [pad] * 4, "reflect"), next(parameters), next(parameters))

    x = torch.rand(batch, 3, *size, dtype=torch.float64) * 2 - 1
    features, sizes = [x], []
    y = normalised(conv(x, 3)).relu()
    for _ in range(2):
        sizes.append(y.shape[-2:])
        y = F.conv2d(y, next(parameters), next(parameters), stride=1 if antialias else 2, padding=1)
        features.append(y)
        y = normalised(y).relu()
        y = blurred(y)[..., ::2, ::2] if antialias else y
    for n in range(9):
        y = y + normalised(conv(normalised(conv(y, 1)).relu(), 1))
        features += [y] if n in (0, 4) else []
    for height, width in reversed(sizes):
        weight, bias = next(parameters), next(parameters)
        if antialias:
            y = F.conv2d(interpolated(y)[..., :height, :width], weight, bias, padding=1)
        else:  # output pixel 2i is centred on input pixel i
            y = F.conv_transpose2d(y, weight, bias, stride=2, padding=1, output_padding=1)[..., :height, :width]
        y = normalised(y).relu()
    image, found = generator(x, return_features=True)
    torch.testing.assert_close(image, (conv(y, 3) + (0.98 * x).atanh() * residual).tanh())
    torch.testing.assert_close(found, features)
    assert not list(parameters)


def test_leaving_out_a_bias_before_a_norm_changes_nothing(monkeypatch):
    """With biases as published weights have them."""
    generator, x = models.ResnetGenerator(base_channels=4).double(), torch.rand(1, 3, 20, 24, dtype=torch.float64)
    for bias in (p for p in generator.parameters() if p.ndim == 1):
        torch.nn.init.normal_(bias)
    image, trained = generator(x), [p for p in generator.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(image.square().mean(), trained)
    left_out = [p.requires_grad_() for p in generator.parameters() if not p.requires_grad]
    assert len(left_out) == 19

    def forward(self, x):
        return F.conv2d(models.reflect_pad(x, self.kernel_size[0] // 2), self.weight, self.bias)

    assert all(p.grad_fn is None for p in left_out)
    generator(x).mean().backward()  # as DistributedDataParallel demands, all that may be trained is used
    assert all(p.grad is not None for p in left_out)
    monkeypatch.setattr(models.ReflectConv2d, "forward", forward)
    expected = generator(x)
    torch.testing.assert_close(image, expected)
    found = torch.autograd.grad(expected.square().mean(), [*trained, *left_out])
    torch.testing.assert_close(found, (*gradients, *map(torch.zeros_like, left_out)), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_discriminator_is_its_formula(batch, antialias):
    """C64-C128-C256-C512 and a last 4x4 convolution; no norm on the first; leaky ReLU of slope 0.2."""
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


def test_generator_refuses_small_images_and_few_blocks():
    with pytest.raises(ValueError, match="15x40.*16x16"):
        models.ResnetGenerator(base_channels=4)(torch.zeros(1, 3, 15, 40))
    with pytest.raises(ValueError, match="n_blocks is 4"):
        models.ResnetGenerator(n_blocks=4)


@pytest.fixture
def no_norm(monkeypatch):
    """Remove instance norm, which depends on the whole map and so makes every receptive field that large."""
    monkeypatch.setattr(models.InstanceNorm2d, "forward", lambda self, x: x)


def test_discriminator_sees_70_pixels(no_norm):
    """The input pixels with a gradient from one logit."""
    x = torch.rand(1, 3, 160, 160, requires_grad=True)
    models.PatchDiscriminator(base_channels=4)(x)[0, 0, 9, 9].backward()
    touched = x.grad.abs().sum((0, 1)).nonzero()
    assert (touched.amax(0) - touched.amin(0) + 1).tolist() == [70, 70]


def identity_generator(antialias):
    """A generator that copies its input, except for the blur of its resampling.

    Residual blocks add nothing; convolutions pass the middle pixel on. Strided convolutions blur by (1, 2, 1) / 4, transposed
    ones interpolate by (1, 2, 1) / 2. A delta then keeps its sum and its centre of mass.
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


def centre_of_mass(image):
    return [float((image.sum(dim) * torch.arange(image.shape[1 - dim])).sum() / image.sum()) for dim in (1, 0)]


@pytest.mark.parametrize("antialias", [False, True])
@torch.inference_mode()
def test_every_size_comes_back_without_a_shift(no_norm, antialias):
    generator = identity_generator(antialias)
    sizes = [(16 + n, 16 + 7 * n % 55) for n in range(55)]  # every height and every width from 16 to 70
    assert len({(height % 4, width % 4) for height, width in sizes}) == 16
    for height, width in sizes:
        y, x = height // 2, width // 2
        delta = torch.zeros(1, 1, height, width)
        delta[..., y, x] = 0.01  # small, so that tanh is linear
        image = generator(delta)[0, 0]
        assert image.shape == (height, width)
        assert centre_of_mass(image) == pytest.approx([y, x], abs=1e-3), (height, width)
        if y % 4 == x % 4 == 0:
            assert image.argmax() == y * width + x


@pytest.mark.parametrize("antialias", [False, True])
@torch.inference_mode()
def test_a_delta_stays_in_place_at_every_position(no_norm, antialias):
    generator = identity_generator(antialias)
    for y in range(8, 23):
        for x in range(8, 23):
            delta = torch.zeros(1, 1, 31, 31)
            delta[..., y, x] = 0.01
            assert centre_of_mass(generator(delta)[0, 0]) == pytest.approx([y, x], abs=1e-3)


def test_projector_takes_the_sampled_locations():
    features = [torch.randn(2, 5, 6, 7), torch.randn(2, 3, 2, 2)]
    projector = models.PatchProjector([5, 3], width=8)
    locations = models.sample_locations(features, 10)
    assert [len(set(ids.tolist())) for ids in locations] == [10, 4]  # at most as many as a layer has, without repeats
    vectors = projector(features, locations)
    assert [v.shape for v in vectors] == [(2, 10, 8), (2, 4, 8)]
    i = locations[0][3].item()
    w1, b1, w2, b2 = list(projector.parameters())[:4]  # of the MLP of the first layer
    expected = F.linear(F.linear(features[0][1, :, i // 7, i % 7], w1, b1).relu(), w2, b2)
    torch.testing.assert_close(vectors[0][1, 3], expected / expected.norm())


def test_all_locations_are_drawn_and_every_draw_differs():
    draws = [models.sample_locations([torch.zeros(1, 1, 5, 6)], 4)[0].tolist() for _ in range(60)]
    assert {i for draw in draws for i in draw} == set(range(30)) and len({tuple(draw) for draw in draws}) > 50


@pytest.mark.parametrize(("batch", "size"), [(3, (16, 16)), (1, (17, 30)), (2, (64, 47))])
@pytest.mark.parametrize("num_patches", [1, 16, 10_000])
def test_patch_nce_from_features_to_loss(size, batch, num_patches):
    """At most as many locations as a layer has (16 in the last layers of 16x16 images); images of a batch are independent."""
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
            assert (loss == 0) == (num_patches == 1)  # a single location has no negatives


@functools.cache
def small_unet():
    return models.UNet(num_classes=4, encoder="efficientnet-b0").eval()


@settings(max_examples=15)
@given(size=st.tuples(st.integers(32, 130), st.integers(32, 130)))
@torch.inference_mode()
def test_unet_keeps_every_size(size):
    unet = small_unet()
    logits, features = unet(torch.rand(1, 3, *size), return_features=True)
    assert logits.shape == (1, 4, *size)
    assert {name: f.shape[1] for name, f in features.items()} == unet.feature_channels
    strides = [(-(-size[0] // 2**n), -(-size[1] // 2**n)) for n in range(1, 6)]
    assert [tuple(features[f"encoder{n}"].shape[-2:]) for n in range(1, 6)] == strides
    assert models.FeatureDiscriminator(unet.feature_channels["decoder2"])(features["decoder2"]).shape[1] == 1


@pytest.mark.parametrize("size", [(64, 64), (70, 90)])
@torch.inference_mode()
def test_unet_decoder_is_its_formula(size):
    """Nearest upsampling to the size of the skip, concatenation, two times convolution, BatchNorm and ReLU."""
    unet, x = small_unet(), torch.rand(2, 3, *size)
    logits, features = unet(x, return_features=True)
    *skips, y = (features[f"encoder{n}"] for n in range(1, 6))
    modules = iter([module for block in unet.decoder for module in block])
    expected = {}
    for n, skip in enumerate([*reversed(skips), torch.zeros(2, 0, *size)], 1):
        rows, columns = (torch.arange(new) * old // new for new, old in zip(skip.shape[-2:], y.shape[-2:]))
        y = torch.cat([y[..., rows, :][..., columns], skip], dim=1)
        for _ in range(2):
            conv, norm, _ = (next(modules) for _ in range(3))
            y = F.conv2d(y, conv.weight, padding=1)
            y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5).relu()
        expected[f"decoder{n}"] = y
    torch.testing.assert_close({name: features[name] for name in expected}, expected)
    torch.testing.assert_close(logits, F.conv2d(y, unet.head.weight, unet.head.bias))


def test_unet_encoder_is_the_packages_network():
    """The deepest map equals that of efficientnet-pytorch before its head, for a size that is no multiple of 32 too."""
    unet = models.UNet(encoder="efficientnet-b0").eval()
    theirs = EfficientNet.from_name("efficientnet-b0", image_size=None).eval()
    theirs.load_state_dict(unet.encoder.state_dict(), strict=False)
    x = torch.rand(1, 3, 70, 90)
    preset = EfficientNet_B0_Weights.IMAGENET1K_V1.transforms()
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (preset.mean, preset.std))
    deepest = theirs.extract_endpoints((x - mean) / deviation)["reduction_5"]
    found = unet(x, return_features=True)[1]["encoder5"]
    torch.testing.assert_close(found, deepest, atol=1e-4 * deepest.abs().max().item(), rtol=0)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 9), (9, 8)])
def test_depthwise_convolution_is_the_packages_and_runs_in_float32_on_a_cpu(kernel, stride, size):
    theirs = Conv2dDynamicSamePadding(4, 4, kernel, stride, groups=4, bias=False)
    ours = models.DepthwiseConv2d(4, kernel, stride)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, *size).bfloat16()
    expected = theirs(x.float())
    torch.testing.assert_close(ours(x.float()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), expected.bfloat16())
        assert not torch.equal(theirs(x), expected.bfloat16())  # plain autocast also rounds the weights


def test_padding_keeps_the_dtype_under_autocast():
    x = torch.randn(1, 2, 5, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        padded = models.reflect_pad(x, 3)
    assert padded.dtype == torch.bfloat16 and torch.equal(padded, F.pad(x, (3, 3, 3, 3), "reflect"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("n", "size"), [(1, (2, 2)), (1, (9, 8)), (3, (4, 4)), (3, (7, 16))])
@pytest.mark.parametrize("batch", [1, 2])
def test_reflection_padding_for_cuda_is_torchs_in_channels_last(layout, n, size, batch):
    x = torch.randn(batch, 5, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    expected, padded = F.pad(x, (n,) * 4, "reflect"), models.ReflectPad2d.apply(x, n)
    assert torch.equal(padded, expected) and padded.is_contiguous(memory_format=torch.channels_last)
    towards = torch.randn_like(expected)
    given = towards.clone()
    (gradient,) = torch.autograd.grad(padded, x, towards)
    assert torch.equal(towards, given) and gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x, given)[0], rtol=1e-15, atol=2e-15)


def test_reflection_padding_can_be_differentiated_twice():
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: models.ReflectPad2d.apply(x, 3), x)


def test_encoder_weights_come_from_a_file(tmp_path):
    theirs = EfficientNet.from_name("efficientnet-b0")
    torch.save(theirs.state_dict(), tmp_path / "b0.pth")
    encoder = models.UNet(encoder="efficientnet-b0", encoder_weights=tmp_path / "b0.pth").encoder
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in encoder.state_dict().items())
    (tmp_path / "text.pth").write_bytes(b"no checkpoint")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "b0.pth").read_bytes()[:5000])
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("text.pth", "cut.pth", "other.pth", "list.pth", "none.pth"):
        with pytest.raises(ValueError, match=f"efficientnet-b0: cannot load .*{name}.*--encoder-weights FILE") as raised:
            models.UNet(encoder="efficientnet-b0", encoder_weights=tmp_path / name)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="resnet.*efficientnet-b0 to efficientnet-b7"):
        models.UNet(encoder="resnet")


def test_imagenet_weights_are_downloaded_once_and_checked_against_the_hash_in_their_name(tmp_path, monkeypatch):
    published = tmp_path / "published"
    theirs = EfficientNet.from_name("efficientnet-b0")
    torch.save(theirs.state_dict(), published)
    digest = hashlib.sha256(published.read_bytes()).hexdigest()[:8]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    def load(name):
        if published.exists():
            published.rename(tmp_path / name)
        monkeypatch.setitem(efficientnet_pytorch.utils.url_map, "efficientnet-b0", (tmp_path / name).as_uri())
        return models.UNet(encoder="efficientnet-b0", encoder_weights="imagenet")

    assert torch.equal(load(f"b0-{digest}.pth").encoder._conv_stem.weight, theirs._conv_stem.weight)
    published.write_bytes((tmp_path / f"b0-{digest}.pth").read_bytes())
    with pytest.raises(ValueError, match="file://.*b0-01234567.pth.*invalid hash.*--encoder-weights FILE"):
        load("b0-01234567.pth")
    (tmp_path / f"b0-{digest}.pth").unlink()
    load(f"b0-{digest}.pth")  # from the copy
    with pytest.raises(ValueError, match="file://.*b0-89abcdef.pth.*--encoder-weights FILE"):
        load("b0-89abcdef.pth")
    (copy,) = (tmp_path / "home").glob(f"*/*/b0-{digest}.pth")
    copy.write_bytes(copy.read_bytes()[:5000])
    with pytest.raises(ValueError, match=rf"{digest}.pth \(.*--encoder-weights FILE"):
        load(f"b0-{digest}.pth")


def test_frozen_means_frozen():
    unet = models.UNet(num_classes=3, encoder="efficientnet-b0").train()
    unet.freeze_encoder()
    unet.train()
    before = {name: value.clone() for name, value in unet.encoder.state_dict().items()}
    optimizer = torch.optim.Adam(unet.parameters(), lr=0.1)
    head = unet.head.weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        unet(torch.rand(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    assert {"_bn0.running_mean", "_blocks.0._bn1.num_batches_tracked"} <= before.keys()  # BatchNorm's buffers are included
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
    path = tmp_path / "weights.pt"
    torch.save(models.network_state(network, 1024), path)
    again = models.load_network(path, type(network))
    x = torch.rand(1, 3, 32, 48)
    assert again.width == 1024 and not again.training and torch.equal(again(x), network.eval()(x))
    assert type(models.load_network(str(path))) is type(network)
    other = models.UNet if isinstance(network, models.ResnetGenerator) else models.ResnetGenerator
    with pytest.raises(ValueError, match=f"weights.pt: holds a {type(network).__name__}; a {other.__name__} is needed"):
        models.load_network(path, other)


def test_a_missing_package_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    torch.save(models.network_state(models.UNet(5, "efficientnet-b0"), 64), tmp_path / "weights.pt")
    monkeypatch.setitem(sys.modules, "efficientnet_pytorch", None)
    with pytest.raises(ImportError, match="efficientnet_pytorch"):
        models.load_network(tmp_path / "weights.pt")


def test_weights_are_drawn_for_networks_without_biases_too():
    conv = torch.nn.Conv2d(64, 64, 3, bias=False)
    models.init_normal(conv)
    assert conv.weight.std().item() == pytest.approx(0.02, rel=0.05)


class Code:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_that_is_not_weights_is_named_and_never_executed(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(FileNotFoundError):
        models.load_network(path)
    generator = models.ResnetGenerator(base_channels=4)
    state = models.network_state(generator, 64)
    torch.save(state, path)
    whole = path.read_bytes()
    contents = [whole[:1000], whole[:-1000], b"", b"text", {"iteration": 3}, [1], generator.state_dict()]
    contents += [{key: state[key] for key in ("network", "arguments", "state_dict")}]  # version 0.1 wrote no width
    contents += [state | {"network": "PatchDiscriminator"}, state | {"width": Code(tmp_path / "run")}]
    contents += [state | {"state_dict": models.ResnetGenerator(base_channels=5).state_dict()}]
    for content in contents:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=r"/weights.pt: not the weights.pt of a finished run, or too old \(\w+\)$"):
            models.load_network(path)
    assert not (tmp_path / "run").exists()
