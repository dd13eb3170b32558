"""Losses of CLADA: the GAN loss (equation 1), PatchNCE (equations 2 and 3) and cross entropy.

Self-contained: depends only on torch. Import it; it is not a script.

    loss = patch_nce_loss(query, positive)           # (B, S, C) unit vectors, e.g. from models.PatchProjector
    loss = gan_loss(discriminator(fake), is_real=True)

Equation 4, their weighted sum, is `ContrastiveTranslation.step` in train_translator.py. Every loss is a scalar, computed in
float32 or higher.
"""

import torch
import torch.nn.functional as F


def at_least_float32(x):
    """x in float32, or in its own dtype if that is more precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gan_loss(logits, is_real, kind="lsgan"):
    """One term of equation 1: loss of a discriminator's logits (any shape) against the target "real" or "fake".

    "vanilla" is equation 1 as written: -log D for real, -log(1 - D) for fake, with D = sigmoid(logits). For the generator,
    is_real=True on fakes is its non-saturating form. "lsgan" is the least-squares form: (logits - 1)^2 for real, logits^2
    for fake (Mao et al. 2017). Raises ValueError for any other kind.
    """
    logits = at_least_float32(logits)
    if kind == "lsgan":
        return (logits - float(is_real)).square().mean()
    if kind == "vanilla":
        return F.softplus(-logits if is_real else logits).mean()
    raise ValueError(f"kind is {kind!r}: must be lsgan or vanilla")


def discriminator_loss(real_logits, fake_logits, kind="lsgan"):
    """Equation 1 for D: the mean of `gan_loss` on real as real and on fake as fake.

    Halved as in Zhu et al. 2017, to slow D relative to G. Detach the fakes, so that no gradient reaches G.
    """
    return (gan_loss(real_logits, True, kind) + gan_loss(fake_logits, False, kind)) / 2


def patch_nce_loss(query, positive, temperature=0.07):  # Park et al. 2020; not in the paper
    """Equations 2 and 3 for one layer: PatchNCE as in Park et al. 2020's released code, because the paper's scan lacks them.

    query, positive: (B, S, C) unit vectors at the same S locations of the translated image and of the input. The loss of
    query q_s is its cross entropy over the S vectors of its own image (equation 2):

        -log exp(q_s . p_s / tau) / sum_t exp(q_s . p_t / tau)

    The S - 1 others are the negatives; none come from other images of the batch. Returns the mean over B and S, which
    `train_translator.py` averages over layers (equation 3). No gradient reaches `positive`.
    Raises ValueError unless both shapes are the same (B, S, C).
    """
    if query.ndim != 3 or query.shape != positive.shape:
        raise ValueError(f"query is {tuple(query.shape)}, positive {tuple(positive.shape)}: must be the same (B, S, C)")
    with torch.autocast(query.device.type, enabled=False):  # half precision is too coarse for similarities / 0.07
        query = at_least_float32(query)
        positive = positive.detach().to(query.dtype)
        logits = query @ positive.transpose(1, 2) / temperature  # (B, S, C) -> (B, S, S)
    labels = torch.arange(query.shape[1], device=query.device).expand(query.shape[:2])  # the positives are on the diagonal
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def segmentation_loss(logits, labels, ignore=255):
    """Mean cross entropy over the pixels that are not void, 0 if all are (ours: the paper names no loss).

    logits: (B, C, H, W); labels: (B, H, W) integer train ids, `ignore` for void. Raises ValueError for labels of another
    shape or kind.
    """
    if labels.shape != logits.shape[:1] + logits.shape[2:] or labels.is_floating_point():
        shape = (len(logits), *logits.shape[2:])
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}: must be integers {shape}")
    logits = at_least_float32(logits)
    pixels = logits.permute(0, 2, 3, 1).flatten(0, 2)  # (B, C, H, W) -> (B*H*W, C); does not copy in channels_last
    # reduction="none", then a sum: on CUDA, the built-in reduction over images uses atomics and is not deterministic.
    total = F.cross_entropy(pixels, labels.long().flatten(), ignore_index=ignore, reduction="none").sum()
    return total / (labels != ignore).sum().clamp(min=1)
