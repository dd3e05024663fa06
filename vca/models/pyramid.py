"""What PVT and CSwin have in common: stages of falling resolution, and all that timm asks of a classifier."""

from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath, Mlp, resample_abs_pos_embed_nhwc, to_2tuple, trunc_normal_
from timm.models import checkpoint_seq
from torch import Tensor, nn

from vca.layers.grid import GridBlock, OnGrid
from vca.models.common import note_input_size, undecayed
from vca.timm_internals import feature_take_indices, trace_assert


class ConvEmbed(nn.Module):
    """Convolution and LayerNorm that lower the resolution: (B, C, H, W) -> (B, Hg, Wg, C')."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchEmbed(ConvEmbed):
    """The first `ConvEmbed`, which takes images of one size, (B, C, H, W)."""

    img_size: tuple[int, int]
    grid_size: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.img_size
        trace_assert(x.shape[2] == height, f"Input height ({x.shape[2]}) doesn't match model ({height}).")
        trace_assert(x.shape[3] == width, f"Input width ({x.shape[3]}) doesn't match model ({width}).")
        return super().forward(x)


class Stage(nn.Module):
    """Blocks at one resolution after an optional `ConvEmbed` and position embedding: (B, Hg, Wg, C) -> the same."""

    def __init__(self, downsample: ConvEmbed | None, blocks: list[GridBlock], dim: int, position_grid=None):
        super().__init__()
        self.downsample = downsample
        self.pos_embed = nn.Parameter(torch.empty(1, *position_grid, dim)) if position_grid else None
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def set_input_size(self, grid_size: tuple[int, int]) -> None:
        if self.pos_embed is not None and self.pos_embed.shape[1:3] != grid_size:
            new = resample_abs_pos_embed_nhwc(self.pos_embed.detach(), list(grid_size))
            self.pos_embed = nn.Parameter(new, self.pos_embed.requires_grad)
        for layer in self.modules():
            if isinstance(layer, OnGrid):
                layer.grid_size = grid_size

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x.permute(0, 3, 1, 2))
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)


class Pyramid(nn.Module):
    """A classifier of stages; each but the first halves the resolution.

    Args:
        create_layer: the attention layer of a block, from stage, depth in the network, channels, heads and grid.
        stem: kernel, stride and padding of the patch embedding.
        merge: kernel, stride and padding of the convolutions between stages.
        positions: a learned position embedding in each stage.
        final_norm: a LayerNorm before pooling.
        eps: of every LayerNorm in blocks, and of the final one; those of `ConvEmbed` have 1e-5.
        img_size: height and width of the images, multiples of the last stage's patch, or one number for both.
        in_chans, num_classes: channels of the images, and classes; no classes, no head.
        global_pool: "avg", or "" for the map of features.
        embed_dims, depths, num_heads, mlp_ratios: one for each stage.
        drop_rate, proj_drop_rate, drop_path_rate: of the head, of projections, and of whole blocks (the last block's;
            it rises linearly from 0).
        attn_drop_rate, dynamic_img_size: of timm's ViTs; refused unless 0 and False.

    Attributes:
        output_fmt: the format of `forward_features`, and of the features of `features_only`.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        create_layer: Callable[[int, int, int, int, tuple[int, int]], nn.Module],
        *,
        stem: tuple[int, int, int],
        merge: tuple[int, int, int],
        positions: bool,
        final_norm: bool,
        eps: float,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        dynamic_img_size: bool = False,
    ):
        super().__init__()
        if attn_drop_rate:
            raise ValueError(f"attn_drop_rate={attn_drop_rate}: these models have no attention dropout; leave it out.")
        if dynamic_img_size:
            raise ValueError("dynamic_img_size: these models have one size; give img_size, or call set_input_size.")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.grad_checkpointing = False
        self._check_pool(global_pool)
        self.global_pool = global_pool

        self.patch_embed = PatchEmbed(in_chans, embed_dims[0], *stem)
        self.feature_info = [
            dict(num_chs=dim, reduction=stem[1] * 2**i, module=f"stages.{i}") for i, dim in enumerate(embed_dims)
        ]
        grids = self.grids(img_size)
        self.patch_embed.img_size, self.patch_embed.grid_size = to_2tuple(img_size), grids[0]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        stages, depth = [], 0
        for stage, dim in enumerate(embed_dims):
            blocks = []
            for _ in range(depths[stage]):
                path = [DropPath(rates[depth]) if rates[depth] else nn.Identity() for _ in range(2)]
                layer = create_layer(stage, depth, dim, num_heads[stage], grids[stage])
                mlp = Mlp(dim, int(dim * mlp_ratios[stage]), drop=proj_drop_rate)
                norms = [nn.LayerNorm(dim, eps=eps) for _ in range(2)]
                blocks.append(GridBlock(norms[0], layer, path[0], norms[1], mlp, path[1]))
                depth += 1
            downsample = ConvEmbed(embed_dims[stage - 1], dim, *merge) if stage else None
            stages.append(Stage(downsample, blocks, dim, grids[stage] if positions else None))
            stages[-1].set_input_size(grids[stage])
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(embed_dims[-1], eps=eps) if final_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dims[-1], num_classes) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Linear weights and position embeddings truncated normal of 0.02, biases zero; layers initialise the rest.

        Args:
            needs_reset: let layers do that; False if they have just been made.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for stage in self.stages:
            if stage.pos_embed is not None:
                trunc_normal_(stage.pos_embed, std=0.02)

    def grids(self, img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """The patch grid of every stage for images of a size.

        Raises:
            ValueError: the size is no multiple of the last stage's patch.
        """
        height, width = to_2tuple(img_size)
        patches = [info["reduction"] for info in self.feature_info]
        if height < 1 or width < 1 or height % patches[-1] or width % patches[-1]:
            raise ValueError(f"img_size={(height, width)} must be a multiple of {patches[-1]} in both directions.")
        return [(height // patch, width // patch) for patch in patches]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Changes the image size: resamples position embeddings and tells every layer its new grid.

        The preprocessing and the arguments that a checkpoint is rebuilt from follow.
        """
        grids = self.grids(img_size)
        self.patch_embed.img_size, self.patch_embed.grid_size = to_2tuple(img_size), grids[0]
        for stage, grid_size in zip(self.stages, grids, strict=True):
            stage.set_input_size(grid_size)
        note_input_size(self)

    @staticmethod
    def filter_checkpoint(state_dict: dict[str, Tensor], model: "Pyramid") -> dict[str, Tensor]:
        """Weights of another image size as those of `model`: what timm calls a `pretrained_filter_fn`."""
        for index, stage in enumerate(model.stages):
            if stage.pos_embed is not None and (key := f"stages.{index}.pos_embed") in state_dict:
                grid_size = list(stage.pos_embed.shape[1:3])
                state_dict = state_dict | {key: resample_abs_pos_embed_nhwc(state_dict[key], grid_size)}
        return state_dict

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, beside all of fewer than two dimensions."""
        return undecayed(self)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that sort parameters into layers, for layer-wise learning rates."""
        if coarse:
            return dict(stem=r"^patch_embed", blocks=[(r"^stages\.(\d+)", None), (r"^norm", (99999,))])
        first = [(rf"^stages\.(\d+)\.{part}", (0,)) for part in ("downsample", "pos_embed")]
        return dict(
            stem=r"^patch_embed", blocks=[*first, (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Gives the model a new head, or none for 0 classes."""
        if global_pool is not None:
            self._check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = dict(device=self.patch_embed.proj.weight.device, dtype=self.patch_embed.proj.weight.dtype)
        self.head = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()
        self.head.train(self.training)

    @staticmethod
    def _check_pool(global_pool: str) -> None:
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool={global_pool!r} is unknown; choose 'avg' or ''.")

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features after chosen stages, (B, C, Hg, Wg) or for "NHWC" (B, Hg, Wg, C), as in timm's models.

        Args:
            x: images (B, C, H, W).
            indices: stages, or how many of the last; default all.
            norm: apply the final norm to the last stage's features.
            stop_early: do not run stages after the last one that is asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: leave out the final features.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown; choose 'NCHW' or 'NHWC'.")
        take, last = feature_take_indices(len(self.stages), indices)
        x, features = self.patch_embed(x), []
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if index in take:
                feature = self.norm(x) if norm and index == len(self.stages) - 1 else x
                features.append(feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return features
        return (self.norm(x) if index == len(self.stages) - 1 else x), features

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Removes what is not needed for the features of `forward_intermediates` at `indices`."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> features (B, Hg, Wg, C)."""
        return self.norm(self.stages(self.patch_embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, Hg, Wg, C) -> logits (B, classes), or the features that the head takes."""
        if self.global_pool:
            x = x.mean((1, 2))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
