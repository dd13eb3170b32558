"""losses.py against formulas written out in float64."""

import math

import pytest
import torch

from losses import gan_loss, patch_nce_loss, segmentation_loss


def unit_vectors(*shape, seed=0):
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vectors / vectors.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(("b", "s", "tau"), [(1, 1, 0.07), (1, 9, 0.07), (3, 5, 0.5)])
def test_patch_nce_is_the_double_loop(b, s, tau):
    query, positive = unit_vectors(b, s, 8, seed=1), unit_vectors(b, s, 8, seed=2)
    total = 0.0
    for image in range(b):  # images do not see each other's patches
        for i in range(s):
            similarity = [math.exp(float(query[image, i] @ positive[image, j]) / tau) for j in range(s)]
            total -= math.log(similarity[i] / sum(similarity))
    assert patch_nce_loss(query, positive, tau).item() == pytest.approx(total / (b * s), rel=1e-12)


def test_patch_nce_sends_gradient_to_the_query_alone():
    query, positive = unit_vectors(2, 4, 8, seed=1).requires_grad_(), unit_vectors(2, 4, 8, seed=2).requires_grad_()
    patch_nce_loss(query, positive).backward()
    assert query.grad.abs().sum() > 0
    assert positive.grad is None


def test_patch_nce_computes_half_precision_in_float32():
    query, positive = unit_vectors(1, 64, 256, seed=1).bfloat16(), unit_vectors(1, 64, 256, seed=2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = patch_nce_loss(query, positive)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(patch_nce_loss(query.double(), positive.double()).item(), rel=1e-5)


def test_patch_nce_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match="must be one"):
        patch_nce_loss(torch.zeros(1, 4, 8), torch.zeros(1, 5, 8))


LOGITS = torch.tensor([[-3.0, -0.5], [0.0, 2.5]], dtype=torch.float64)
FORMULAS = {
    ("lsgan", True): lambda z: (z - 1) ** 2,
    ("lsgan", False): lambda z: z**2,
    ("vanilla", True): lambda z: -math.log(1 / (1 + math.exp(-z))),  # -log D
    ("vanilla", False): lambda z: -math.log(1 - 1 / (1 + math.exp(-z))),  # -log(1 - D)
}


@pytest.mark.parametrize(("kind", "is_real"), FORMULAS)
def test_gan_loss_is_its_formula(kind, is_real):
    expected = [FORMULAS[kind, is_real](z) for z in LOGITS.flatten().tolist()]
    assert gan_loss(LOGITS, is_real, kind).item() == pytest.approx(sum(expected) / 4, rel=1e-12)
    assert gan_loss(torch.tensor([100.0, -100.0]), is_real, kind).isfinite()


def test_gan_loss_refuses_another_kind():
    with pytest.raises(ValueError, match="lsgan or vanilla"):
        gan_loss(LOGITS, True, "hinge")


def test_segmentation_loss_leaves_out_void():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    labels[0, 1:, 2:] = 255
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    costs = [-log_p[b, labels[b, y, x], y, x] for b, y, x in (labels != 255).nonzero().tolist()]
    assert segmentation_loss(logits, labels).item() == pytest.approx(sum(costs).item() / len(costs), rel=1e-12)
    assert segmentation_loss(logits, torch.full_like(labels, 255)).item() == 0
