"""Training steps without a data set: learning rates at their corners, variants of equation 4, pool, gate, step, memory."""

import copy
import platform
import re
import sys

import pytest
import torch
from commands import ROOT, run
from hypothesis import given
from hypothesis import strategies as st

import adapt_features
import models
import optimization
import train_segmenter
import train_translator
from losses import gan_loss, patch_nce_loss, segmentation_loss


# The paper's corners; with another --iterations they move in proportion.
@pytest.mark.parametrize("iterations", [400_000, 4_000, 1_000_000, 40])
@pytest.mark.parametrize(
    ("part", "expected"), [(0, 2e-4), (0.1, 2e-4), (0.2, 2e-4), (0.3, 2e-4), (0.5, 2e-4), (0.75, 1e-4), (0.875, 0.5e-4)]
)
def test_translators_learning_rate(part, expected, iterations):
    """Iterations 0, 40k, 80k, 120k, 200k, 300k and 350k of 400k."""
    assert optimization.constant_then_linear(round(part * iterations), iterations, 2e-4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("iterations", [400_000, 4_000, 1_000_000, 40])
def test_translators_learning_rate_reaches_zero_after_the_last_iteration(iterations):
    lr = [optimization.constant_then_linear(i, iterations, 2e-4) for i in (iterations // 2 - 1, iterations - 2, iterations - 1)]
    assert lr == pytest.approx([2e-4, 2 * 2e-4 / (iterations / 2), 2e-4 / (iterations / 2)], rel=1e-12)


@pytest.mark.parametrize("iterations", [120_000, 1_200, 300_000, 24])
@pytest.mark.parametrize(("part", "expected"), [(0, 2e-4), (1 / 3, 2e-4), (1 / 2, 2e-4), (2 / 3, 1e-5), (5 / 6, 1e-5)])
def test_segmenters_learning_rate(part, expected, iterations):
    """Iterations 0, 40k, 60k, 80k and 100k of 120k."""
    assert train_segmenter.learning_rate(round(part * iterations), iterations, 2e-4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("iterations", "corner"), [(120_000, 80_000), (1_200, 800), (24, 16), (10, 7), (2, 2), (1, 1)])
def test_segmenters_learning_rate_falls_at_two_thirds(iterations, corner):
    rates = [train_segmenter.learning_rate(i, iterations, 2e-4) for i in (0, corner - 1)]
    assert rates == [2e-4, 2e-4]
    if corner < iterations:
        rates = [train_segmenter.learning_rate(i, iterations, 2e-4) for i in (corner, iterations - 1)]
        assert rates == pytest.approx([1e-5, 1e-5], rel=1e-12)


@given(st.integers(1, 1000))
def test_any_number_of_iterations_begins_at_the_base_rate_and_never_rises(iterations):
    for rate in (optimization.constant_then_linear, train_segmenter.learning_rate):
        rates = [rate(i, iterations, 2e-4) for i in range(iterations)]
        assert rates[0] == 2e-4 and rates == sorted(rates, reverse=True) and rates[-1] > 0


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
    assert train_segmenter.parse_args([*words, "--iterations", "1200"]).freeze_iterations == 400
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
    assert not gate.update(0.6) and gate.update(0.9)
    for _ in range(99):
        gate.update(0.5)
    assert not gate.update(0.5)
    gate.threshold = 0.4
    assert gate.update(0.5, counts=False)  # a step of the head start
    again = adapt_features.Gate(0.6)
    again.load_state_dict(gate.state_dict())
    assert (again.batches, again.open_steps) == (gate.batches, gate.open_steps) == (103, 3)
    assert torch.equal(again.accuracies, gate.accuracies) and len(gate.accuracies) == 100


def tiny(method, **changes):
    words = [*WORDS, method, "--base-channels", "4", *([] if method == "cyclegan" else ["--num-patches", "8"])]
    args = train_translator.parse_args(words)
    for name, value in changes.items():
        setattr(args, name, value)
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
        assert all(p.requires_grad for p in network.parameters() if p.ndim > 1), name


def test_patch_nce_trains_the_translation_and_the_heads_but_not_the_positives():
    translation = tiny("cut")
    features, translated = (translation.G.encode(torch.rand(1, 3, 32, 32)) for _ in range(2))
    for maps in (features, translated):
        for feature in maps:
            if feature.requires_grad:
                feature.retain_grad()
            else:
                feature.requires_grad_()
    translation.patch_nce(features, translated).backward()
    assert all(f.grad is None for f in features) and all(f.grad.abs().sum() > 0 for f in translated)
    assert all(p.grad.abs().sum() > 0 for p in translation.H.parameters() if p.ndim > 1)


def descended(networks, loss):
    """What plain gradient descent at rate 0.1 makes of the networks' parameters."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        p.data -= 0.1 * gradient


def plain_descent(translation):
    """Adam's first step is almost the sign of the gradient; plain descent, in float64, shows the gradient itself."""
    for network in translation.state.values():
        if isinstance(network, torch.nn.Module):
            network.double()
    for name in ("opt_G", "opt_D"):
        parameters = [p for group in getattr(translation, name).param_groups for p in group["params"]]
        setattr(translation, name, torch.optim.SGD(parameters, lr=0.1))


def assert_same_networks(translation, networks):
    for name, network in networks.items():
        for p, expected in zip(getattr(translation, name).parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["lsgan", "vanilla"])
@pytest.mark.parametrize("lambda_y", [0.0, 0.7])
def test_a_contrastive_step_is_equation_4(kind, lambda_y):
    """Against the step done plainly: D on equation 1; then G and H on equation 4, with an encoder pass of its own over x."""
    translation = tiny("cut", lambda_x=3.0, lambda_y=lambda_y, gan_loss=kind)
    plain_descent(translation)
    G, D, H = (copy.deepcopy(network) for network in (translation.G, translation.D, translation.H))
    x, y = torch.rand(2, 1, 3, 32, 32, dtype=torch.float64) * 2 - 1
    torch.manual_seed(1)
    translation.step(x, y, torch.autocast("cpu", enabled=False))

    torch.manual_seed(1)
    descended([D], (gan_loss(D(y), True, kind) + gan_loss(D(G(x).detach()), False, kind)) / 2)
    loss = gan_loss(D(G(x)), True, kind)
    for weight, real in ((3.0, x), (lambda_y, y)):
        if weight > 0:
            with torch.no_grad():
                features = G.encode(real)
                locations = models.sample_locations(features, 8)
                positives = H(features, locations)
            queries = H(G.encode(G(real)), locations)
            loss = loss + weight * torch.stack([*map(patch_nce_loss, queries, positives)]).mean()
    descended([G, H], loss)
    assert_same_networks(translation, {"G": G, "D": D, "H": H})


@pytest.mark.parametrize("seed", range(4))
def test_flip_equivariance_is_park_et_als(seed):
    """A coin per image mirrors G's input; queries are mirrored back; positives come from the image as it is."""
    translation = tiny("cut", lambda_x=3.0, lambda_y=0.7, flip_equivariance=True)
    plain_descent(translation)
    G, D, H = (copy.deepcopy(network) for network in (translation.G, translation.D, translation.H))
    x, y = torch.rand(2, 2, 3, 32, 36, dtype=torch.float64) * 2 - 1
    torch.manual_seed(seed)
    shown, _ = translation.step(x, y, torch.autocast("cpu", enabled=False))

    torch.manual_seed(seed)
    flips = [bool(coin < 0.5) for coin in torch.rand(2, 1, 1, 1)]

    def flip(images):
        return torch.stack([image.flip(2) if is_flipped else image for image, is_flipped in zip(images, flips)])

    torch.testing.assert_close(shown, flip(G(flip(x))))
    descended([D], (gan_loss(D(y), True) + gan_loss(D(G(flip(x)).detach()), False)) / 2)
    loss = gan_loss(D(G(flip(x))), True)
    for weight, real in ((3.0, x), (0.7, y)):
        with torch.no_grad():
            features = G.encode(real)
            locations = models.sample_locations(features, 8)
            positives = H(features, locations)
        queries = H([flip(feature) for feature in G.encode(G(flip(real)))], locations)
        loss = loss + weight * torch.stack([*map(patch_nce_loss, queries, positives)]).mean()
    descended([G, H], loss)
    assert_same_networks(translation, {"G": G, "D": D, "H": H})


@pytest.mark.parametrize("identity", [0.0, 0.5])
def test_a_cyclegan_step_is_zhu_et_als(identity):
    translation = tiny("cyclegan", identity_weight=identity, gan_loss="lsgan")
    plain_descent(translation)
    G, G_back, D_y, D_x = (copy.deepcopy(getattr(translation, name)) for name in ("G", "G_back", "D_y", "D_x"))
    x, y = torch.rand(2, 1, 3, 32, 32, dtype=torch.float64) * 2 - 1
    translation.step(x, y, torch.autocast("cpu", enabled=False))

    fake_y, fake_x = G(x), G_back(y)
    cycle = (G_back(fake_y) - x).abs().mean() + (G(fake_x) - y).abs().mean()
    same = (G(y) - y).abs().mean() + (G_back(x) - x).abs().mean()
    descended([G, G_back], gan_loss(D_y(fake_y), True) + gan_loss(D_x(fake_x), True) + 10 * cycle + identity * same)
    for D, real, fake in ((D_y, y, fake_y), (D_x, x, fake_x)):
        descended([D], (gan_loss(D(real), True) + gan_loss(D(fake.detach()), False)) / 2)
    assert_same_networks(translation, {"G": G, "G_back": G_back, "D_y": D_y, "D_x": D_x})


def test_identity_term_is_lambda_y():
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    assert "nce_y" in tiny("cut").step(x, y, torch.autocast("cpu", enabled=False))[1]
    assert "nce_y" not in tiny("fastcut_l5").step(x, y, torch.autocast("cpu", enabled=False))[1]


def start_of_adaptation():
    torch.manual_seed(0)
    segmenter = models.UNet(3, "efficientnet-b0").double().train()
    return segmenter, models.FeatureDiscriminator(segmenter.feature_channels["decoder3"]).double()


def vectors(networks):
    return [torch.cat([p.detach().flatten() for p in network.parameters()]) for network in networks]


def adapted(gate, weight, with_target=True, head_start=False):
    """F and D after one step of stage 4, and the gate."""
    networks = start_of_adaptation()
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks]
    gate = adapt_features.Gate(gate)
    source, labels, target = torch.rand(2, 3, 32, 32).double(), torch.randint(3, (2, 32, 32)), torch.rand(2, 3, 32, 32).double()
    batch, autocast = (source, labels, target if with_target else None), torch.autocast("cpu", enabled=False)
    adapt_features.training_step(*networks, *optimizers, gate, batch, "decoder3", weight, autocast, head_start)
    return vectors(networks), gate


def test_the_gate_holds_back_the_adversary_and_nothing_else():
    (shut, d_shut), gate = adapted(gate=1.0, weight=0.5)
    assert (gate.open_steps, gate.batches) == (0, 1)
    (opened, d_open), gate = adapted(gate=0.0, weight=0.5)
    assert (gate.open_steps, gate.batches) == (1, 1)
    (control, d_control), _ = adapted(gate=0.0, weight=0.0)
    assert torch.equal(shut, control) and not torch.equal(opened, control)
    assert torch.equal(d_shut, d_control) and torch.equal(d_open, d_control)  # D_feat learns all the same, from its own loss


def test_in_its_head_start_d_feat_learns_alone():
    before, d_before = vectors(start_of_adaptation())
    (after, d_after), gate = adapted(gate=0.0, weight=0.5, head_start=True)
    assert torch.equal(after, before) and not torch.equal(d_after, d_before)
    assert torch.equal(d_after, adapted(gate=0.0, weight=0.5)[0][1])
    assert (gate.open_steps, gate.batches) == (0, 1)  # its accuracy counts, its step does not


def test_without_target_a_step_is_supervised():
    before, d_before = vectors(start_of_adaptation())
    (after, d_after), gate = adapted(gate=0.0, weight=0.5, with_target=False)
    assert torch.equal(d_after, d_before) and gate.batches == 0
    F, _ = start_of_adaptation()
    source, labels, _ = torch.rand(2, 3, 32, 32).double(), torch.randint(3, (2, 32, 32)), torch.rand(2, 3, 32, 32)
    descended([F], segmentation_loss(F(source), labels))
    torch.testing.assert_close(after, vectors([F])[0])
    assert not torch.equal(after, before)


def test_an_adaptation_step_is_its_two_losses():
    """D_feat on equation 1 over the features as they are; then F on its task and on passing for source before that D_feat."""
    (ours, d_ours), _ = adapted(gate=0.0, weight=0.5)
    F, D = start_of_adaptation()
    source, labels, target = torch.rand(2, 3, 32, 32).double(), torch.randint(3, (2, 32, 32)), torch.rand(2, 3, 32, 32).double()
    (logits, on_source), (_, on_target) = F(source, return_features=True), F(target, return_features=True)
    real, fake = D(on_source["decoder3"].detach()), D(on_target["decoder3"].detach())
    descended([D], (gan_loss(real, True, "vanilla") + gan_loss(fake, False, "vanilla")) / 2)
    task, fooling = segmentation_loss(logits, labels), gan_loss(D(on_target["decoder3"]), True, "vanilla")
    descended([F], task + 0.5 * fooling)
    for network, found in ((F, ours), (D, d_ours)):
        torch.testing.assert_close(found, vectors([network])[0])


FAULTS = """
import resource, torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(32 << 20, dtype=torch.uint8)  # from 32 MiB up glibc by default returns the memory to the kernel
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tests glibc's allocator")
def test_run_alls_variables_keep_the_memory_that_a_step_frees():
    export = re.search(r"^export MALLOC.*$", (ROOT / "run_all.sh").read_text(), re.M)[0]
    found = [run("bash", "-c", f"{line}\nexec {sys.executable} -c '{FAULTS}'").stdout for line in ("", export)]
    default, kept = map(float, found)  # MiB that the kernel had to provide
    assert default > 40 * 30 and kept < 10 * 32
