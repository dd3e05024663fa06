"""Seeds as functions of integers, such as (seed, epoch, index)."""

import random

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """A 32-bit seed for any tuple of non-negative integers, such as (seed, epoch, index)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_everything(*parts: int) -> None:
    """Seeds Python, NumPy and PyTorch (all devices): timm's augmentations draw from each of them."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
