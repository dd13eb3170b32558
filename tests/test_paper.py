"""The paper's numbers, written here by hand and not read from the code."""

import contextlib

import pytest
import steps
import torch
from torch.utils.flop_counter import FlopCounterMode

import adapt_features
import models
import optimization
import train_segmenter
import train_translator


def translator(method):
    return train_translator.parse_args(["--source=a", "--target=b", "--out=c", "--method", method])


SEGMENTER = train_segmenter.parse_args(["--data=a", "--out=b"])


@pytest.mark.parametrize(
    ("method", "lambda_x", "lambda_y", "patches"),
    [("cut", 1.0, 1.0, 256), ("fastcut", 10.0, 0.0, 16), ("fastcut_l5", 5.0, 0.0, 16)],
)
def test_variants_of_equation_4(method, lambda_x, lambda_y, patches):
    args = translator(method)
    assert (args.lambda_x, args.lambda_y, args.num_patches) == (lambda_x, lambda_y, patches)


@pytest.mark.parametrize("method", ["cyclegan", "cut", "fastcut", "fastcut_l5"])
def test_stage_1(method):
    args = translator(method)
    assert (args.width, args.crop_size, args.batch_size, args.iterations, args.lr) == (1024, (400, 400), 1, 400_000, 2e-4)
    rate = [optimization.constant_then_linear(i, args.iterations, args.lr) for i in (0, 199_999, 200_000, 300_000, 399_999)]
    assert rate == pytest.approx([2e-4, 2e-4, 2e-4, 1e-4, 2e-4 / 200_000], rel=1e-9)
    assert optimization.constant_then_linear(400_000, args.iterations, args.lr) == 0


def test_stage_3():
    assert (SEGMENTER.encoder, SEGMENTER.encoder_weights) == ("efficientnet-b3", "imagenet")
    assert (SEGMENTER.batch_size, SEGMENTER.iterations, SEGMENTER.freeze_iterations) == (8, 120_000, 40_000)
    rate = [train_segmenter.learning_rate(i, SEGMENTER.iterations, SEGMENTER.lr) for i in (0, 79_999, 80_000, 119_999)]
    assert rate == pytest.approx([2e-4, 2e-4, 1e-5, 1e-5])


def test_stage_4():
    """The gate of Hoffman et al. 2018, 60% over 100 batches, and a weight of 0.1 at most."""
    args = adapt_features.parse_args(["--source=a", "--target=b", "--segmenter=c", "--out=d"])
    assert args.gate == 0.6 and args.adversarial_weight <= 0.1 and len(adapt_features.Gate(args.gate).accuracies) == 100


@pytest.mark.parametrize("antialias", [False, True])
def test_the_five_layers(antialias):
    """Pixels, both downsampling convolutions (the antialiased generator resamples only after them), two residual blocks."""
    generator = models.ResnetGenerator(antialias=antialias)
    features = generator.encode(torch.zeros(1, 3, 32, 64))
    assert generator.feature_channels == (3, 128, 256, 256, 256)
    strides = (1, 1, 2, 4, 4) if antialias else (1, 2, 4, 4, 4)
    shapes = [(1, c, 32 // s, 64 // s) for c, s in zip(generator.feature_channels, strides)]
    assert [tuple(feature.shape) for feature in features] == shapes


def test_a_step_costs_what_the_papers_times_say(monkeypatch):
    """Multiply-adds of a step on tensors without content. The paper's times: 170, 321, 426 ms, ratios 0.399 and 0.754."""
    monkeypatch.setattr(train_translator, "backward_and_step", lambda optimizer, loss: loss.backward())
    monkeypatch.setattr(torch, "autocast", lambda *_, **options: contextlib.nullcontext())  # knows no meta device
    cost = {}
    for name in ("fastcut_l5", "cut", "cyclegan", "fastcut_l5 --flip-equivariance", "cut --flip-equivariance"):
        method, *words = name.split()
        made = steps.build(method, torch.device("meta"), 400, words=words)
        with FlopCounterMode(display=False) as counter:
            made.step(contextlib.nullcontext())
        cost[name] = counter.get_total_flops()
    assert cost["fastcut_l5"] / cost["cyclegan"] == pytest.approx(0.396, abs=0.002)
    assert cost["cut"] / cost["cyclegan"] == pytest.approx(0.752, abs=0.002)
    # With flips the encoder runs once more, for the positives.
    assert cost["fastcut_l5 --flip-equivariance"] / cost["cyclegan"] == pytest.approx(0.438, abs=0.002)
    assert cost["cut --flip-equivariance"] / cost["cyclegan"] == pytest.approx(0.838, abs=0.002)
