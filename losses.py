"""The losses of CLADA: PatchNCE (equations 2 and 3), the GAN loss in two forms (equation 1), cross entropy for the task.

Copies alone into other projects: needs torch. It is no command.

    loss = patch_nce_loss(query, positive)           # (B, S, C) unit vectors, e.g. from models.PatchProjector
    loss = gan_loss(discriminator(image), is_real=True)
"""

import torch
import torch.nn.functional as F


def patch_nce_loss(query, positive, temperature=0.07):
    """PatchNCE of Park et al. 2020 for one layer (the paper's equations 2 and 3).

    query, positive: (B, S, C) unit vectors at the same S locations of the translated and of the input image. Returns the
    scalar mean over B * S of the cross entropy of finding each query's positive among the S vectors of its own image:

        -log exp(q_s . p_s / tau) / sum_t exp(q_s . p_t / tau)

    The S - 1 others are the negatives; images of a batch do not see each other. No gradient reaches `positive`.
    Computed in float32 at least. Raises ValueError where the two shapes differ or are not (B, S, C).
    """
    if query.ndim != 3 or query.shape != positive.shape:
        raise ValueError(f"query {tuple(query.shape)} and positive {tuple(positive.shape)}: both must be one (B, S, C)")
    dtype = torch.promote_types(query.dtype, torch.float32)  # fp16 and bf16 cannot resolve similarities / 0.07
    with torch.autocast(query.device.type, enabled=False):
        logits = query.to(dtype) @ positive.detach().to(dtype).transpose(1, 2) / temperature  # (B, S, C) -> (B, S, S)
    labels = torch.arange(query.shape[1], device=query.device).expand(query.shape[:2])  # the diagonal is right
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def gan_loss(logits, is_real, kind="lsgan"):
    """How far a discriminator's logits (any shape) are from calling everything real, or everything fake: a scalar.

    "vanilla" is equation 1 as written: -log D for real, -log(1 - D) for fake, with D = sigmoid(logits); a generator that
    minimises it with is_real=True has the non-saturating form. "lsgan" is its least-squares form, (logits - 1)^2 and
    logits^2 (Mao et al. 2017). Computed in float32 at least. Raises ValueError for another kind.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "lsgan":
        return (logits - float(is_real)).square().mean()
    if kind == "vanilla":
        return F.softplus(-logits if is_real else logits).mean()
    raise ValueError(f"kind is {kind!r}: lsgan or vanilla")


def segmentation_loss(logits, labels, ignore=255):
    """Mean cross entropy over the pixels that are not void; 0, not nan, for a batch that is void throughout.

    logits: (B, C, H, W); labels: (B, H, W) integer train ids, `ignore` where void. Computed in float32 at least.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    pixels = logits.permute(0, 2, 3, 1).flatten(0, 2)  # (B, C, H, W) -> (B*H*W, C), without a copy in channels_last
    # Summed apart: cross entropy's own sum over images adds with atomics on CUDA, in no fixed order.
    total = F.cross_entropy(pixels, labels.long().flatten(), ignore_index=ignore, reduction="none").sum()
    return total / (labels != ignore).sum().clamp(min=1)
