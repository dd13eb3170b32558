"""Steps replayed as a CUDA graph, on a stand-in that records operations on the CPU, against steps taken one by one."""

import graphs
import pytest
import torch

import adapt_features
import models
import optimization
import runtime
import train_segmenter
import train_translator
import training

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
STEPS = 9


@pytest.fixture
def replays(monkeypatch):
    adam = torch.optim.Adam
    # As on a GPU, where a rate is a tensor.
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, **options: adam(parameters, torch.tensor(lr), **options))
    return graphs.stand_in(monkeypatch)


def trainer(kind):
    """(step, optimisers, parts whose state counts) of a stage, from one start."""
    torch.manual_seed(0)
    plain = runtime.autocast(CPU, "fp32")
    if kind in ("cut", "fastcut_l5", "cyclegan"):
        words = ["--source=.", "--target=.", "--out=.", "--method", kind, "--base-channels=4"]
        make = train_translator.CycleTranslation if kind == "cyclegan" else train_translator.ContrastiveTranslation
        made = make(train_translator.parse_args(words), CPU)
        return lambda x, labels, y: made.step(2 * x - 1, 2 * y - 1, plain), (made.opt_G, made.opt_D), made.state
    segmenter = models.UNet(3, "efficientnet-b0").train()
    discriminator = models.FeatureDiscriminator(segmenter.feature_channels["decoder3"])
    opt_F, opt_D = (optimization.adam(network.parameters(), 1e-3) for network in (segmenter, discriminator))
    gate = adapt_features.Gate(0.5)
    state = dict(segmenter=segmenter, discriminator=discriminator, opt_F=opt_F, opt_D=opt_D, gate=gate)
    if kind == "stage 3":
        return lambda x, labels, y: train_segmenter.training_step(segmenter, opt_F, x, labels, plain), (opt_F,), state
    parts = segmenter, discriminator, opt_F, opt_D, gate
    return lambda *batch: adapt_features.training_step(*parts, batch, "decoder3", 0.1, plain), (opt_F, opt_D), state


def trained(kind, device, batch=1):
    """Losses of each step and the state after the last, with a learning rate that changes from step to step."""
    step, optimizers, state = trainer(kind)
    step, losses = optimization.GraphedStep(step, device), []
    for k in range(STEPS):
        generator = torch.Generator().manual_seed(k)
        x, y = torch.rand(2, batch, 3, 32, 32, generator=generator)
        labels = torch.randint(3, (batch, 32, 32), generator=generator)
        for optimizer in optimizers:
            optimization.set_learning_rate(optimizer, 1e-3 / (k + 1))
        torch.manual_seed(k)
        found = step(x, labels, y)
        found = found if isinstance(found, dict) else found[1]
        losses.append([float(value.detach()) for value in (found.values() if isinstance(found, dict) else [found])])
    return losses, training._tensors({name: part.state_dict() for name, part in state.items()}, "")


@pytest.mark.parametrize("kind", ["cut", "fastcut_l5", "cyclegan", "stage 3", "stage 4"])
def test_replayed_steps_are_the_steps(replays, monkeypatch, kind):
    """Whatever a step took from Python (a count, a draw, the rate) would stay as it was when it was recorded."""
    monkeypatch.setattr(train_translator, "POOL_SIZE", 3)  # full before the steps are
    (losses, state), (graphed_losses, graphed_state) = (
        trained(kind, device, 1 + (kind in ("stage 3", "stage 4"))) for device in (CPU, CUDA)
    )
    assert len(replays) == STEPS - optimization.WARM_UP and min(replays) > 100
    assert graphed_losses == losses
    for (name, tensor), (_, graphed) in zip(state, graphed_state, strict=True):
        assert torch.equal(tensor, graphed), name
