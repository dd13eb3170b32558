"""losses.py: values and gradients against formulas written out in float64."""

import math

import pytest
import torch

from losses import at_least_float32, discriminator_loss, gan_loss, patch_nce_loss, segmentation_loss


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.uint8, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_at_least_float32_keeps_higher_precision(dtype, expected):
    x = torch.tensor([0, 1, 3]).to(dtype)
    assert at_least_float32(x).dtype == expected and at_least_float32(x).tolist() == [0, 1, 3]


def unit_vectors(*shape, seed=0):
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vectors / vectors.norm(dim=-1, keepdim=True)


def double_loop(query, positive, tau):
    """Equations 2 and 3, one location at a time."""
    total, (b, s, _) = 0.0, query.shape
    for image in range(b):  # images do not see each other's patches
        for i in range(s):
            similarity = [math.exp(float(query[image, i] @ positive[image, j]) / tau) for j in range(s)]
            total -= math.log(similarity[i] / sum(similarity))
    return total / (b * s)


@pytest.mark.parametrize(("b", "s", "tau"), [(1, 1, 0.07), (1, 40, 0.07), (3, 5, 0.5), (3, 2, 0.07)])
def test_patch_nce_is_the_double_loop(b, s, tau):
    query, positive = unit_vectors(b, s, 8, seed=1), unit_vectors(b, s, 8, seed=2)
    expected = double_loop(query, positive, tau)
    assert patch_nce_loss(query, positive, tau).item() == pytest.approx(expected, rel=1e-12)
    assert tau != 0.07 or patch_nce_loss(query, positive).item() == pytest.approx(expected, rel=1e-12)  # the default


def test_patch_nce_sends_gradient_only_to_the_query():
    query, positive = unit_vectors(2, 4, 8, seed=1).requires_grad_(), unit_vectors(2, 4, 8, seed=2).requires_grad_()
    patch_nce_loss(query, positive).backward()
    # The derivative of cross entropy: the mean of all positives, weighted by probability, minus the right one; over tau.
    with torch.no_grad():
        probability = (query @ positive.transpose(1, 2) / 0.07).softmax(-1)
        expected = (probability @ positive - positive) / 0.07 / 8
    torch.testing.assert_close(query.grad, expected, rtol=1e-9, atol=1e-12)
    assert positive.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_patch_nce_computes_half_precision_in_float32(dtype, autocast):
    query, positive = unit_vectors(1, 64, 256, seed=1).to(dtype), unit_vectors(1, 64, 256, seed=2).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = patch_nce_loss(query, positive)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(patch_nce_loss(query.double(), positive.double()).item(), rel=1e-5)


def test_patch_nce_takes_two_precisions():
    q, p = (torch.nn.functional.normalize(torch.randn(1, 5, 8), dim=-1) for _ in range(2))
    for pair in ((q.double(), p), (q, p.double())):
        assert patch_nce_loss(*pair).item() == pytest.approx(patch_nce_loss(q, p).item(), rel=1e-5)


@pytest.mark.parametrize("shapes", [((1, 4, 8), (1, 5, 8)), ((1, 4, 8), (1, 4, 9)), ((4, 8), (4, 8))])
def test_patch_nce_refuses_other_shapes(shapes):
    with pytest.raises(ValueError, match="must be the same"):
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
    [  # at -100 and at 100; log(1 + exp(-100)) rounds to 0, log(1 + exp(100)) to 100
        ("lsgan", True, (10201, 9801), (-202, 198)),
        ("lsgan", False, (10000, 10000), (-200, 200)),
        ("vanilla", True, (100, 0), (-1, 0)),
        ("vanilla", False, (0, 100), (0, 1)),
    ],
)
def test_gan_loss_is_stable_for_large_logits(kind, is_real, value, derivative, z, dtype):
    logits = torch.full((3,), z, dtype=dtype, requires_grad=True)
    loss = gan_loss(logits, is_real, kind)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value[z > 0], rel=1e-6, abs=1e-12)
    assert logits.grad.float().tolist() == pytest.approx([derivative[z > 0] / 3] * 3, rel=5e-3, abs=1e-12)  # in `dtype`


@pytest.mark.parametrize("kind", ["lsgan", "vanilla"])
def test_discriminator_loss_is_the_mean_of_real_and_fake(kind):
    """Real and fake logits may differ in number."""
    real, fake = torch.randn(2, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    terms = []
    for logits, is_real in ((real, True), (fake, False)):
        values = [FORMULAS[kind, is_real][0](z) for z in logits.flatten().tolist()]
        terms.append(sum(values) / len(values))
    assert discriminator_loss(real, fake, kind).item() == pytest.approx(sum(terms) / 2, rel=1e-12)
    if kind == "lsgan":
        assert torch.equal(discriminator_loss(real, fake), discriminator_loss(real, fake, kind))  # the default


def test_segmentation_loss_refuses_labels_of_another_shape_or_type():
    x = torch.rand(2, 3, 4, 6)
    for labels in (torch.zeros(2, 6, 4, dtype=torch.long), torch.zeros(2, 1, 4, 6, dtype=torch.long), torch.zeros(2, 4, 6)):
        with pytest.raises(ValueError, match=r"must be integers \(2, 4, 6\)"):
            segmentation_loss(x, labels)


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
