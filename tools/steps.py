"""One training step of each stage on random images, made as the stage's trainer makes it: for tools/ and tests/."""

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import adapt_features
import data
import models
import optimization
import train_segmenter
import train_translator

METHODS = ("fastcut_l5", "cyclegan", "cut", "fastcut")


def build(kind, device, size, batch=1, dtype=torch.float32, layout=None, channels=64, encoder="efficientnet-b3", words=()):
    """Networks, optimisers, inputs and step function of `kind`: a method of stage 1, "stage 3" or "stage 4".

    size: side of square crops, or (height, width). layout: memory format (default: the trainer's). words: further arguments of
    train_translator.py. Weights and inputs are drawn on the CPU from one seed, so that they are the same for every device,
    precision and layout.

    Returns a namespace: step(autocast, *inputs) -> (output or None, losses by name), and takes `inputs` if none are given;
    parts (all the state, by name), networks (by name), optimizers, inputs (two batches of images, and labels).
    """
    torch.manual_seed(0)
    height, width = size if isinstance(size, tuple) else (size, size)
    if kind in METHODS:
        step, parts = _translator(kind, device, ["--base-channels", str(channels), *words])
        layout = layout or optimization.translator_layout(device)
    else:
        step, parts = _task_model(kind, device, encoder)
        layout = layout or torch.channels_last
    networks = {name: part.to(dtype) for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    for name, network in networks.items():
        if kind in METHODS or name == "segmenter":
            network.to(memory_format=layout)
    images = torch.rand(2, batch, 3, height, width)
    labels = torch.randint(len(data.CLASS_NAMES), (batch, height, width)).to(device)
    x, y = ((2 * images - 1) if kind in METHODS else images).to(device, dtype).unbind()
    inputs = x.contiguous(memory_format=layout), y.contiguous(memory_format=layout), labels
    optimizers = [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]
    return SimpleNamespace(
        step=lambda autocast, *batch: step(autocast, *(batch or inputs)),
        parts=parts,
        networks=networks,
        optimizers=optimizers,
        inputs=inputs,
    )


def _translator(method, device, words):
    args = train_translator.parse_args(["--source=.", "--target=.", "--out=.", "--method", method, *words])
    make = train_translator.CycleTranslation if method == "cyclegan" else train_translator.ContrastiveTranslation
    translation = make(args, device)
    return lambda autocast, x, y, labels: translation.step(x, y, autocast), translation.state


def _task_model(kind, device, encoder):
    segmenter = models.UNet(len(data.CLASS_NAMES), encoder).to(device).train()
    opt_F = optimization.adam(segmenter.parameters(), lr=1e-4)
    parts = {"segmenter": segmenter, "opt_F": opt_F}
    if kind == "stage 3":

        def step(autocast, x, y, labels):
            logits, loss = train_segmenter.training_step(segmenter, opt_F, x, labels, autocast)
            return logits, {"task": loss}

        return step, parts

    discriminator = models.FeatureDiscriminator(segmenter.feature_channels["decoder3"]).to(device)
    opt_D = optimization.adam(discriminator.parameters(), lr=1e-4)
    gate = adapt_features.Gate(0.0, device)  # always open
    networks = segmenter, discriminator, opt_F, opt_D, gate

    def step(autocast, x, y, labels):
        losses = adapt_features.training_step(*networks, (x, labels, y), "decoder3", 0.1, autocast)
        return None, {name: losses[name] for name in ("task", "D")}

    return step, parts | {"discriminator": discriminator, "opt_D": opt_D, "gate": gate}


def patched(*replacements):
    """A context in which each (object, attribute name, replacement) is replaced."""
    stack = contextlib.ExitStack()
    for replacement in replacements:
        stack.enter_context(mock.patch.object(*replacement))
    return stack
