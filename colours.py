"""Colour transfer (Reinhard et al. 2001): give frames the colour statistics of random target photographs, without training.

    transfer = ColourTransfer(photograph_statistics(photographs, width=1024), seed=0)
    image = transfer("00001", image)                 # (3, H, W) uint8 -> (3, H, W) uint8

Not in the paper. It is a control for trained translators (`translate_dataset.py --colours-of`), and the starting point of
`train_translator.py --colour-transfer`.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

import data

PHOTOGRAPHS = 500  # whose statistics are taken, at most

# The decorrelated, logarithmic colour space of Ruderman et al. 1998, as in Reinhard et al. 2001.
RGB_TO_LMS = torch.tensor([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
LMS_TO_LAB = torch.tensor([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / torch.tensor([3, 6, 2]).sqrt()[:, None]


def to_lab(image):
    """(3, H, W) uint8 RGB -> (3, H*W) float32 in the decorrelated space."""
    return LMS_TO_LAB @ (RGB_TO_LMS @ image.flatten(1).clamp(min=1).float()).log10()


def statistics(image):
    """(3, H, W) uint8 -> (2, 3): mean and standard deviation of each decorrelated channel."""
    return torch.stack([*reversed(torch.std_mean(to_lab(image), 1))])


def photograph_statistics(photographs, width):
    """The `statistics` of at most 500 evenly spaced frames (data.FrameList), resized to `width` pixels -> (N, 2, 3)."""
    with ThreadPoolExecutor() as pool:
        step = -(-len(photographs) // PHOTOGRAPHS)
        return torch.stack([*pool.map(lambda frame: statistics(data.load_at_width(frame.image, width)), photographs[::step])])


class ColourTransfer(NamedTuple):
    """Give an image the mean and deviation, channel by channel, of a photograph drawn by `seed` and the image's name."""

    photographs: torch.Tensor  # their statistics, (N, 2, 3)
    seed: int

    def __call__(self, name, image):
        """A frame's name and image (3, H, W) uint8 -> image (3, H, W) uint8."""
        draw = np.random.default_rng((self.seed, *name.encode(errors="surrogateescape"))).integers(len(self.photographs))
        (mean, deviation), (new_mean, new_deviation) = (s[..., None] for s in (statistics(image), self.photographs[draw]))
        lab = (to_lab(image) - mean) / deviation.clamp(min=1e-4) * new_deviation + new_mean
        rgb = RGB_TO_LMS.inverse() @ 10 ** (LMS_TO_LAB.inverse() @ lab)
        return rgb.round().clamp(0, 255).to(torch.uint8).view_as(image)
