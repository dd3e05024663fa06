"""Grad-CAM of the CNNs that visitors compare with, each on one image at a time."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca import attribution

CELLS = 32


def grad_cam(model: nn.Module, x: Tensor, index: int) -> Tensor:
    """The Grad-CAM of a class, see `vca.attribution.grad_cam`, as means over cells.

    Args:
        model: a CNN. Other threads may run it meanwhile, so that its copy gets Captum's hooks; the weights are shared.
        x: its input (1, 3, H, W).
        index: the class.

    Returns:
        (rows, columns), at most `CELLS` each; none is negative.
    """
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    values = attribution.grad_cam(twin, x, torch.tensor([index]))
    return F.adaptive_avg_pool2d(values, [min(side, CELLS) for side in x.shape[2:]])[0]
