"""Exchanging the attention of an existing timm model in place."""

from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vca.layers.factory import AttentionConfig
from vca.models import swin, vit

SUPPORTED = {
    VisionTransformer: vit.ContrastVisionTransformer,
    VisionTransformerDistilled: vit.ContrastVisionTransformerDistilled,
    SwinTransformer: swin.ContrastSwinTransformer,
}
TRAINED = ("qkv", "proj")


def replace_attention(model: nn.Module, kind: str = "vca", **options) -> nn.Module:
    """Exchanges the attention of a timm ViT, DeiT or Swin in place, keeping the weights of `qkv` and `proj`.

    What the new layers have beyond those two is untrained. The model's class becomes the corresponding one of this
    library, so that `set_input_size`, `no_weight_decay` and `dynamic_img_size` know the new layers.

    Args:
        model: exactly a timm `VisionTransformer`, `VisionTransformerDistilled` or `SwinTransformer`.
        kind: one of `vca.layers.factory.KINDS`.
        **options: `token_grid` or `num_tokens`, `tokens`, `dwc`, `stage2_softmax` and `pooling` as in `create_model`.
            A ViT has 8x8 contrast tokens at most unless asked for more, so that the cost stays linear when the images
            grow. For a ViT also `blocks`, indices of those whose attention is exchanged (default all); for a Swin
            `stages`, indices of those whose shifted windows give way to attention over the whole grid (default all but
            the last).

    Returns:
        The same model.

    Raises:
        ValueError: the model or its attention is of another kind. The model is then unchanged.
    """
    if type(model) not in SUPPORTED:
        names = ", ".join(cls.__name__ for cls in SUPPORTED)
        raise ValueError(
            f"cannot exchange the attention of a {type(model).__name__}; it must be exactly one of {names}."
        )
    config = AttentionConfig.pop_from(options, default=kind)
    is_swin = isinstance(model, SwinTransformer)
    blocks = [block for layer in model.layers for block in layer.blocks] if is_swin else list(model.blocks)
    for index, block in enumerate(blocks):
        if hasattr(block, "attn"):  # those without are refused by `exchange`
            _check_layer(index, block.attn)
    exchange = swin.exchange_attention if is_swin else vit.exchange_attention
    trained = {name: parameter for name, parameter in model.named_parameters() if ".attn." in name}
    mode, like = model.training, next(model.parameters())
    exchange(model, config, **options)
    model.to(device=like.device, dtype=like.dtype).train(mode)
    new = dict(model.named_parameters())
    for name, parameter in trained.items():
        if name in new and name.split(".")[-2] in TRAINED:
            new[name].data.copy_(parameter.data)
    model.__class__ = SUPPORTED[type(model)]
    vars(model).pop("model_args", None)
    return model


def _check_layer(index: int, layer: nn.Module) -> None:
    """Refuses attention with parts that the new layers would drop without a word."""
    if type(layer) is WindowAttention:
        if layer.qkv.out_features != 3 * layer.dim:
            raise ValueError(f"block {index}: heads whose channels do not add up to {layer.dim} cannot be kept.")
        return
    if type(layer) is not Attention:
        raise ValueError(f"block {index} has {type(layer).__name__}, not timm's Attention.")
    extra = [name for name in ("q_norm", "k_norm", "norm", "gate") if getattr(layer, name, None) is not None]
    extra = [name for name in extra if not isinstance(getattr(layer, name), nn.Identity)]
    if extra or layer.qkv.out_features != 3 * layer.qkv.in_features or layer.proj.bias is None:
        what = ", ".join(extra) or "unusual projections"
        raise ValueError(f"block {index}: attention with {what} cannot be exchanged.")
