"""Noisy linear imputation (ROAD, arXiv 2202.00449, section 4.2): removed pixels say as little as they can."""

import numpy as np
import torch
from torch import Tensor

from vca.extras import import_extra

NEIGHBORS = {(0, 1): 1 / 6, (0, -1): 1 / 6, (1, 0): 1 / 6, (-1, 0): 1 / 6,
             (1, 1): 1 / 12, (1, -1): 1 / 12, (-1, 1): 1 / 12, (-1, -1): 1 / 12}  # fmt: skip
NOISE = 0.01  # standard deviation, in normalised pixels


def impute(image: Tensor, removed: Tensor, seed: int = 0) -> Tensor:
    """An image whose removed pixels are the weighted mean of their eight neighbours, all at once, and a little noise.

    Direct neighbours weigh 1/6 and diagonal ones 1/12; at the border the weights of those that are there are scaled up
    to a sum of 1. This is one sparse linear system for all removed pixels, which SciPy solves.

    Args:
        image: (C, H, W).
        removed: bool (H, W); at least one pixel must stay.
        seed: of the noise, N(0, 0.01^2), which the paper adds so that a model cannot see what was smoothed.

    Raises:
        ImportError: SciPy is not installed; the message names the extra.
        ValueError: nothing stays.
    """
    sparse, linalg = (import_extra(name, "explain") for name in ("scipy.sparse", "scipy.sparse.linalg"))
    gone = removed.cpu().numpy()
    if gone.all():
        raise ValueError("all pixels are removed; there is nothing to impute them from.")
    pixels = image.detach().double().cpu().numpy().copy()  # else a float64 image itself would change
    count, (height, width) = int(gone.sum()), gone.shape
    number = np.full(gone.shape, -1)
    number[gone] = np.arange(count)
    rows, cols = np.nonzero(gone)
    total, known = np.zeros(count), np.zeros((count, len(pixels)))
    entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for (down, right), weight in NEIGHBORS.items():
        inside = (rows + down >= 0) & (rows + down < height) & (cols + right >= 0) & (cols + right < width)
        at = np.nonzero(inside)[0]
        there = rows[at] + down, cols[at] + right
        total[at] += weight
        unknown = gone[there]
        known[at[~unknown]] += weight * pixels[:, there[0][~unknown], there[1][~unknown]].T
        entries.append((at[unknown], number[there][unknown], np.full(unknown.sum(), -weight)))
    entries.append((np.arange(count), np.arange(count), total))
    across, down_to, values = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    system = sparse.csc_matrix((values, (across, down_to)), shape=(count, count))
    noise = np.random.default_rng(seed).standard_normal((len(pixels), count))
    pixels[:, gone] = linalg.splu(system).solve(known).T + NOISE * noise
    return torch.from_numpy(pixels).to(image)
