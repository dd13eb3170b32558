"""Training steps without a data set: learning rates at their corners, variants of equation 4, image pool, gate, step."""

import pytest
import torch

import adapt_features
import models
import train_segmenter
import train_translator


@pytest.mark.parametrize(
    ("iteration", "expected"), [(0, 2e-4), (199_999, 2e-4), (200_000, 2e-4), (300_000, 1e-4), (399_999, 1e-9)]
)
@pytest.mark.parametrize("scale", [1, 0.01])
def test_translators_learning_rate(iteration, expected, scale):
    lr = train_translator.learning_rate(int(iteration * scale), int(400_000 * scale), 2e-4)
    if iteration == 399_999:  # one step before zero
        expected /= scale
    assert lr == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("iteration", "expected"), [(0, 2e-4), (79_999, 2e-4), (80_000, 1e-5), (119_999, 1e-5)])
def test_segmenters_learning_rate(iteration, expected):
    assert train_segmenter.learning_rate(iteration, 120_000, 2e-4) == pytest.approx(expected, rel=1e-12)


WORDS = ["--source", "a", "--target", "b", "--out", "c", "--method"]


@pytest.mark.parametrize(("method", "expected"), [("cut", (1, 1, 256)), ("fastcut", (10, 0, 16)), ("fastcut_l5", (5, 0, 16))])
def test_variants_are_the_papers(method, expected):
    args = train_translator.parse_args([*WORDS, method])
    assert (args.lambda_x, args.lambda_y, args.num_patches) == expected
    assert (args.iterations, args.batch_size, args.crop_size, args.width, args.lr) == (400_000, 1, (400, 400), 1024, 2e-4)
    assert train_translator.parse_args([*WORDS, method, "--lambda-x", "2"]).lambda_x == 2


def test_cyclegan_takes_no_patches(capsys):
    with pytest.raises(SystemExit, match="2"):
        train_translator.parse_args([*WORDS, "cyclegan", "--num-patches", "8"])
    assert "--num-patches" in capsys.readouterr().err


def test_encoder_is_frozen_for_a_third_unless_its_weights_are_random():
    words = ["--data", "a", "--out", "b"]
    assert train_segmenter.parse_args(words).freeze_iterations == 40_000
    assert train_segmenter.parse_args([*words, "--encoder-weights", "none"]).freeze_iterations == 0
    assert train_segmenter.parse_args([*words, "--freeze-iterations", "7"]).freeze_iterations == 7


def test_image_pool_keeps_size_images_and_gives_back_older_ones():
    torch.manual_seed(0)
    pool = train_translator.ImagePool(5)
    images = torch.arange(60.0).view(60, 1, 1, 1)
    shown = torch.cat([pool.exchange(image[None]) for image in images]).flatten()
    assert torch.equal(shown[:5], images[:5].flatten()) and len(pool.images) == 5
    old = shown[5:] != images[5:].flatten()
    assert 10 < old.sum() < 45 and (shown[5:][old] < images[5:].flatten()[old]).all()


def test_gate_opens_on_the_mean_of_the_last_hundred():
    gate = adapt_features.Gate(0.6)
    assert not gate.opens(0.6) and gate.opens(0.9)
    for _ in range(99):
        gate.opens(0.5)
    assert not gate.opens(0.5)
    again = adapt_features.Gate(0.6)
    again.load_state_dict(gate.state_dict())
    assert again.state_dict() == gate.state_dict() and len(again.accuracies) == 100


def tiny(method, **changes):
    args = train_translator.parse_args(
        [*WORDS, method, "--base-channels", "4", "--num-patches", "8"][: 10 if method == "cyclegan" else None]
    )
    for name, value in changes.items():
        setattr(args, name, value)
    torch.manual_seed(0)
    kind = train_translator.CycleTranslation if method == "cyclegan" else train_translator.ContrastiveTranslation
    return kind(args, torch.device("cpu"))


@pytest.mark.parametrize("method", ["cyclegan", "cut", "fastcut_l5"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_trains_every_network(method, batch):
    translation = tiny(method, identity_weight=1.0)
    networks = {name: part for name, part in translation.state.items() if isinstance(part, torch.nn.Module)}
    before = {name: [p.clone() for p in network.parameters()] for name, network in networks.items()}
    x, y = torch.rand(2, batch, 3, 32, 32) * 2 - 1
    fake, losses = translation.step(x, y, torch.autocast("cpu", enabled=False))
    assert fake.shape == x.shape and all(loss.isfinite() for loss in losses.values())
    for name, network in networks.items():
        weights = [(p, old) for p, old in zip(network.parameters(), before[name]) if p.ndim > 1]
        assert all(not torch.equal(p, old) for p, old in weights), name
        assert all(p.requires_grad for p in network.parameters())


def test_identity_term_is_lambda_y():
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    assert "nce_y" in tiny("cut").step(x, y, torch.autocast("cpu", enabled=False))[1]
    assert "nce_y" not in tiny("fastcut_l5").step(x, y, torch.autocast("cpu", enabled=False))[1]


def adapted(gate, weight):
    """F and D after one step of stage 4 from one start, and the gate's count."""
    torch.manual_seed(0)
    segmenter = models.UNet(3, "efficientnet-b0").train()
    discriminator = models.FeatureDiscriminator(segmenter.feature_channels["decoder3"])
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (segmenter, discriminator)]
    gate = adapt_features.Gate(gate)
    batch = torch.rand(2, 3, 32, 32), torch.randint(3, (2, 32, 32)), torch.rand(2, 3, 32, 32)
    autocast = torch.autocast("cpu", enabled=False)
    adapt_features.training_step(segmenter, discriminator, *optimizers, gate, batch, "decoder3", weight, autocast)
    return [torch.cat([p.detach().flatten() for p in network.parameters()]) for network in (segmenter, discriminator)], gate


def test_the_gate_holds_back_the_adversary_and_nothing_else():
    (shut, d_shut), gate = adapted(gate=1.0, weight=0.5)
    assert (gate.opened, gate.asked) == (0, 1)
    (opened, d_open), gate = adapted(gate=0.0, weight=0.5)
    assert (gate.opened, gate.asked) == (1, 1)
    (control, d_control), _ = adapted(gate=0.0, weight=0.0)
    assert torch.equal(shut, control) and not torch.equal(opened, control)
    assert torch.equal(d_shut, d_control) and torch.equal(d_open, d_control)  # D_feat learns all the same, from its own loss
