"""The logit lens: what a vision transformer would answer after every block."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def logit_lens(model: nn.Module, images: Tensor) -> Tensor:
    """The logits that the model's last norm, pooling and head make of the tokens after every block.

    The last ones are the model's own answer, bit for bit. Those before say what a head that was trained for the last
    block reads in earlier ones (after nostalgebraist, "interpreting GPT: the logit lens", 2020). Gradients pass.

    Args:
        model: a ViT or DeiT in evaluation mode: blocks of one width, and a classifier's head.
        images: (B, C, H, W), normalised as the model takes them.

    Returns:
        (blocks, B, classes).

    Raises:
        ValueError: the model is another, has no head, or is in training mode.
    """
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"the logit lens needs a ViT or DeiT, whose blocks all have the width that the head takes; "
            f"this is a {type(model).__name__}."
        )
    if isinstance(model.head, nn.Identity):
        raise ValueError("this model has no classes: it was built without a head.")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first.")
    hidden = model.forward_intermediates(
        images, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    if model.num_prefix_tokens:
        hidden = [torch.cat([prefix, patches], dim=1) for patches, prefix in hidden]
    return torch.stack([model.forward_head(tokens) for tokens in hidden])
