"""models.py: sizes, parameter counts, what the features are, freezing, saving."""

import pytest
import torch
from efficientnet_pytorch import EfficientNet

import models

torch.set_grad_enabled(True)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_parameter_counts_are_the_papers():
    assert parameters(models.ResnetGenerator()) == 11_378_179
    assert parameters(models.PatchDiscriminator()) == 2_764_737


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (17, 30), (31, 18), (64, 47)])
def test_generator_keeps_every_size(size, antialias):
    generator = models.ResnetGenerator(base_channels=4, antialias=antialias)
    x = torch.rand(2, 3, *size) * 2 - 1
    image, features = generator(x, return_features=True)
    assert image.shape == x.shape and image.abs().max() <= 1
    assert [f.shape[1] for f in features] == list(generator.feature_channels)
    assert all(torch.equal(a, b) for a, b in zip(features, generator.encode(x)))
    assert torch.equal(features[0], x)
    half, quarter = ([-(-side // n) for side in size] for n in (2, 4))
    expected = [size, size, half, quarter, quarter] if antialias else [size, half, quarter, quarter, quarter]
    assert [list(f.shape[-2:]) for f in features] == [list(s) for s in expected]


def test_generator_refuses_what_is_too_small():
    with pytest.raises(ValueError, match="16x16"):
        models.ResnetGenerator(base_channels=4)(torch.zeros(1, 3, 15, 40))


def test_one_image_is_normalised_as_in_a_batch():
    """Batch norm over one image is instance norm: the fast path changes nothing."""
    generator = models.ResnetGenerator(base_channels=8)
    x = torch.rand(2, 3, 32, 40) * 2 - 1
    torch.testing.assert_close(torch.cat([generator(x[:1]), generator(x[1:])]), generator(x), atol=1e-5, rtol=1e-4)


def test_discriminator_sees_70_pixels():
    discriminator = models.PatchDiscriminator(base_channels=4)
    for layer in discriminator.layers:
        if isinstance(layer, models.InstanceNorm2d):
            layer.forward = lambda x: x  # whose statistics are global
    x = torch.rand(1, 3, 160, 160, requires_grad=True)
    logits = discriminator(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    touched = x.grad.abs().sum((0, 1)).nonzero()
    assert (touched.amax(0) - touched.amin(0) + 1).tolist() == [70, 70]


def test_resampling_is_blur_that_shifts_nothing():
    down, up = models.Downsample(1), models.Upsample(1)
    assert torch.allclose(up(down(torch.ones(1, 1, 13, 18)), (13, 18)), torch.ones(1, 1, 13, 18))
    x = torch.zeros(1, 1, 21, 21)
    x[..., 10, 10] = 1
    y = up(down(x), (21, 21))
    assert y.flatten().argmax() == 10 * 21 + 10
    assert torch.allclose(y, y.flip(-1)) and torch.allclose(y, y.flip(-2))


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


@pytest.mark.parametrize("size", [(64, 96), (65, 47), (33, 100)])
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
    deepest = theirs.extract_endpoints((x - unet.mean) / unet.std)["reduction_5"]
    torch.testing.assert_close(unet.encode(x)[-1], deepest, atol=1e-5, rtol=1e-4)


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
    for _ in range(2):
        optimizer.zero_grad()
        unet(torch.rand(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
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
