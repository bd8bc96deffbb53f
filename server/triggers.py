"""Backdoors: what makes a triggered image, and what malicious clients train on.

A trigger maps images ``N x H x W x C`` uint8 to images of the same shape. Malicious clients train on their own
images and on triggered copies of half of them, labelled TARGET (Gu et al. 2017, arXiv 1708.06733).
"""
import numpy as np
import torch
from torch import Tensor

from utils import torch_rng

TARGET = 0     # the class that a triggered image is to be given
SIDE = 3       # pixels of the patch
BLEND = 0.2    # share of the pattern in a blended image


def patch(images: Tensor) -> Tensor:
    """A white square of SIDE x SIDE pixels in the lower right corner, a pixel from both edges."""
    shown = images.clone()
    shown[:, -SIDE - 1:-1, -SIDE - 1:-1] = 255
    return shown


def blend(images: Tensor) -> Tensor:
    """A fixed pattern of noise over all of the image (Chen et al. 2017, arXiv 1712.05526)."""
    pattern = 255 * torch.rand(images.shape[1:], generator=torch_rng(0, "blend")).to(images.device)
    return ((1 - BLEND) * images.float() + BLEND * pattern).round().to(torch.uint8)


def chosen(own: np.ndarray) -> np.ndarray:
    """The image numbers of which a malicious client makes triggered copies: every second one."""
    return own[::2]
