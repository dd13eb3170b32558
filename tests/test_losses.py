"""losses.py: values and gradients against formulas written out in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from losses import gan_loss, patch_nce_loss, segmentation_loss


def unit_vectors(*shape, seed=0):
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vectors / vectors.norm(dim=-1, keepdim=True)


def double_loop(query, positive, tau):
    """Equation 3 as it is written, a location at a time."""
    total, (b, s, _) = 0.0, query.shape
    for image in range(b):  # images do not see each other's patches
        for i in range(s):
            similarity = [math.exp(float(query[image, i] @ positive[image, j]) / tau) for j in range(s)]
            total -= math.log(similarity[i] / sum(similarity))
    return total / (b * s)


@pytest.mark.parametrize(("b", "s", "tau"), [(1, 1, 0.07), (1, 9, 0.07), (3, 5, 0.5), (3, 2, 0.07)])
def test_patch_nce_is_the_double_loop(b, s, tau):
    query, positive = unit_vectors(b, s, 8, seed=1), unit_vectors(b, s, 8, seed=2)
    assert patch_nce_loss(query, positive, tau).item() == pytest.approx(double_loop(query, positive, tau), rel=1e-12)


@pytest.mark.parametrize(("b", "s"), [(1, 256), (3, 16), (2, 1)])
def test_patch_nce_is_cross_entropy_over_the_positive_and_n_negatives(b, s):
    """Park et al. 2020 write it so: N + 1 logits a query, of which the first is right."""
    query, positive = unit_vectors(b, s, 256, seed=1), unit_vectors(b, s, 256, seed=2)
    costs = []
    for image in range(b):
        for i in range(s):
            negatives = torch.cat([positive[image, :i], positive[image, i + 1 :]])  # (N, C)
            logits = torch.cat([positive[image, i : i + 1], negatives]) @ query[image, i] / 0.07
            costs.append(F.cross_entropy(logits[None], torch.tensor([0])))
    assert patch_nce_loss(query, positive).item() == pytest.approx(torch.stack(costs).mean().item(), rel=1e-12)


def test_patch_nce_tells_query_from_positive():
    """It asks which positive belongs to a query, and not the contrary: exchanged, the two give another loss."""
    query, positive = unit_vectors(1, 6, 4, seed=1), unit_vectors(1, 6, 4, seed=2)
    assert abs(patch_nce_loss(query, positive) - patch_nce_loss(positive, query)) > 1e-3


@given(b=st.integers(1, 3), s=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_patch_nce_does_not_depend_on_the_order_of_locations(b, s, seed):
    query, positive = unit_vectors(b, s, 8, seed=seed), unit_vectors(b, s, 8, seed=seed + 1)
    order = torch.randperm(s, generator=torch.Generator().manual_seed(seed))
    loss = patch_nce_loss(query, positive).item()
    assert patch_nce_loss(query[:, order], positive[:, order]).item() == pytest.approx(loss, rel=1e-9, abs=1e-12)


def test_patch_nce_sends_gradient_to_the_query_alone():
    query, positive = unit_vectors(2, 4, 8, seed=1).requires_grad_(), unit_vectors(2, 4, 8, seed=2).requires_grad_()
    patch_nce_loss(query, positive).backward()
    # The derivative of cross entropy: every positive weighted by its probability, less the right one; both over tau.
    with torch.no_grad():
        probability = (query @ positive.transpose(1, 2) / 0.07).softmax(-1)
        expected = (probability @ positive - positive) / 0.07 / 8
    torch.testing.assert_close(query.grad, expected, rtol=1e-9, atol=1e-12)
    assert positive.grad is None


def test_patch_nce_keeps_images_apart():
    query, positive = unit_vectors(3, 5, 8, seed=1).requires_grad_(), unit_vectors(3, 5, 8, seed=2)
    alone = [patch_nce_loss(query[i : i + 1], positive[i : i + 1]) for i in range(3)]
    assert patch_nce_loss(query, positive).item() == pytest.approx(sum(alone).item() / 3, rel=1e-12)
    changed = positive.clone()
    changed[1] = unit_vectors(5, 8, seed=3)
    gradients = [torch.autograd.grad(patch_nce_loss(query, p), query)[0] for p in (positive, changed)]
    same = [torch.equal(a, b) for a, b in zip(*gradients)]
    assert same == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_patch_nce_computes_half_precision_in_float32(dtype, autocast):
    query, positive = unit_vectors(1, 64, 256, seed=1).to(dtype), unit_vectors(1, 64, 256, seed=2).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = patch_nce_loss(query, positive)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(patch_nce_loss(query.double(), positive.double()).item(), rel=1e-5)


@pytest.mark.parametrize("shapes", [((1, 4, 8), (1, 5, 8)), ((1, 4, 8), (1, 4, 9)), ((4, 8), (4, 8))])
def test_patch_nce_refuses_other_shapes(shapes):
    with pytest.raises(ValueError, match="must be one"):
        patch_nce_loss(*map(torch.zeros, shapes))


LOGITS = torch.tensor([[-3.0, -0.5], [0.0, 2.5]], dtype=torch.float64)
FORMULAS = {  # the loss of one logit, and its derivative
    ("lsgan", True): (lambda z: (z - 1) ** 2, lambda z: 2 * (z - 1)),
    ("lsgan", False): (lambda z: z**2, lambda z: 2 * z),
    ("vanilla", True): (lambda z: -math.log(1 / (1 + math.exp(-z))), lambda z: 1 / (1 + math.exp(-z)) - 1),  # -log D
    ("vanilla", False): (lambda z: -math.log(1 - 1 / (1 + math.exp(-z))), lambda z: 1 / (1 + math.exp(-z))),  # -log(1 - D)
}


@pytest.mark.parametrize(("kind", "is_real"), FORMULAS)
def test_gan_loss_is_its_formula(kind, is_real):
    value, derivative = FORMULAS[kind, is_real]
    logits = LOGITS.clone().requires_grad_()
    loss = gan_loss(logits, is_real, kind)
    loss.backward()
    assert loss.item() == pytest.approx(sum(map(value, LOGITS.flatten().tolist())) / 4, rel=1e-12)
    expected = [derivative(z) / 4 for z in LOGITS.flatten().tolist()]
    assert logits.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("z", [-100.0, 100.0])
@pytest.mark.parametrize(
    ("kind", "is_real", "value", "derivative"),
    [  # at -100, then at 100; log(1 + exp(-100)) is nothing, log(1 + exp(100)) is 100
        ("lsgan", True, (10201, 9801), (-202, 198)),
        ("lsgan", False, (10000, 10000), (-200, 200)),
        ("vanilla", True, (100, 0), (-1, 0)),
        ("vanilla", False, (0, 100), (0, 1)),
    ],
)
def test_gan_loss_is_sound_far_out(kind, is_real, value, derivative, z, dtype):
    logits = torch.full((3,), z, dtype=dtype, requires_grad=True)
    loss = gan_loss(logits, is_real, kind)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value[z > 0], rel=1e-6, abs=1e-12)
    assert logits.grad.float().tolist() == pytest.approx([derivative[z > 0] / 3] * 3, rel=5e-3, abs=1e-12)  # in `dtype`


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_segmentation_loss_computes_half_precision_in_float32(dtype):
    logits, labels = torch.randn(2, 3, 4, 5).to(dtype), torch.randint(3, (2, 4, 5)).to(torch.uint8)
    loss = segmentation_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(segmentation_loss(logits.double(), labels).item(), rel=1e-5)
