"""Steps replayed as a CUDA graph equal steps taken one by one; a stand-in records and replays operations on the CPU."""

import graphs
import pytest
import torch
from gpu_steps import tensors_of
from steps import build

import adapt_features
import optimization
import runtime
import train_translator

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
STEPS = 9


@pytest.fixture
def replays(monkeypatch):
    adam = torch.optim.Adam
    # As on a GPU, where the learning rate is a tensor.
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, **options: adam(parameters, torch.tensor(lr), **options))
    return graphs.stand_in(monkeypatch)


def trained(kind, device):
    """Losses of each step, and the tensors of the final state, with a learning rate that changes from step to step."""
    # In channels_last, autograd adds in another order while operations are being recorded.
    made = build(kind, CPU, 32, layout=torch.contiguous_format, channels=4, encoder="efficientnet-b0")
    if "gate" in made.parts:
        made.parts["gate"].threshold = 0.5  # opens and shuts
    batch = 2 if "segmenter" in made.parts else 1
    step = optimization.GraphedStep(lambda *inputs: made.step(runtime.autocast(CPU, "fp32"), *inputs), device)
    losses = []
    for k in range(STEPS):
        generator = torch.Generator().manual_seed(k)
        x, y = torch.rand(2, batch, 3, 32, 32, generator=generator)
        labels = torch.randint(3, (batch, 32, 32), generator=generator)
        for optimizer in made.optimizers:
            optimization.set_learning_rate(optimizer, 1e-3 / (k + 1))
        torch.manual_seed(k)
        _, found = step(x, y, labels)
        losses.append([float(value.detach()) for value in found.values()])
    return losses, tensors_of([part.state_dict() for part in made.parts.values()])


@pytest.mark.parametrize("kind", ["cut", "fastcut_l5", "cyclegan", "stage 3", "stage 4"])
def test_replayed_steps_equal_the_steps(replays, monkeypatch, kind):
    """A graph keeps whatever a step takes from Python (a count, a draw, the rate) as it was when the graph was recorded."""
    monkeypatch.setattr(train_translator, "POOL_SIZE", 3)  # full before the last step
    (losses, state), (graphed_losses, graphed_state) = trained(kind, CPU), trained(kind, CUDA)
    assert len(replays) == STEPS - optimization.WARM_UP and min(replays) > 100
    assert graphed_losses == losses
    for k, (tensor, graphed) in enumerate(zip(state, graphed_state, strict=True)):
        assert torch.equal(tensor, graphed), k


def test_the_head_start_of_stage_4_is_a_graph_of_its_own(replays):
    """D_feat's steps alone, then both networks' steps, on the same parameters."""
    ends = []
    for device in (CPU, CUDA):
        made = build("stage 4", CPU, 32, layout=torch.contiguous_format, channels=4, encoder="efficientnet-b0")
        names, losses = ("segmenter", "discriminator", "opt_F", "opt_D", "gate"), []
        parts, autocast = [made.parts[name] for name in names], runtime.autocast(CPU, "fp32")
        for head_start in (True, False):

            def step(x, labels, y, head_start=head_start):
                batch = x, labels, y
                return adapt_features.training_step(*parts, batch, "decoder3", 0.1, autocast, head_start)  # noqa: B023

            graphed = optimization.GraphedStep(step, device)
            for k in range(6):
                torch.manual_seed(k)
                x, y = torch.rand(2, 2, 3, 32, 32)
                losses += [float(value.detach()) for value in graphed(x, torch.randint(3, (2, 32, 32)), y).values()]
        ends.append((losses, tensors_of([part.state_dict() for part in made.parts.values()])))
    assert len(replays) == 2 * (6 - optimization.WARM_UP) and ends[0][0] == ends[1][0]
    assert all(torch.equal(one, two) for one, two in zip(ends[0][1], ends[1][1], strict=True))
