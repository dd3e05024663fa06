"""Visual-Contrast Attention as a drop-in replacement for the self-attention layer of a vision transformer."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.layers import register_notrace_module, to_2tuple
from torch import Tensor, nn

from vca import functional as VF
from vca import fused
from vca.kernels import ops, whole
from vca.layers.change import UNCHANGED, Change
from vca.layers.depthwise import depthwise_conv3x3
from vca.layers.grid import OnGrid, check_token_grid
from vca.layers.layer_maps import ContrastMaps, StageMaps

TOKENS = ("pool+emb", "emb", "pool")
STAGE2_SOFTMAX = ("separate", "joint")
POOLING = ("avg", "learned")


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, tuple[int, ...]], Tensor]


class _Recorded(NamedTuple):
    """What one stage leaves for `ContrastMaps`: its maps, the row factors (B, H, rows, 1) and lambda."""

    maps: StageMaps
    row_scale: Tensor
    lam: Tensor | None


class ContrastStage(nn.Module):
    """The learned parts of one stage: the gain of the RMSNorm and, if differential, the lambda vectors; of length d."""

    def __init__(self, head_dim: int, differential: bool = True):
        super().__init__()
        self.differential = differential
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self.register_parameter(name, nn.Parameter(torch.empty(head_dim)) if differential else None)
        self.norm = nn.RMSNorm(head_dim, eps=VF.RMS_EPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for vector in self.parameters(recurse=False):
            nn.init.normal_(vector, std=0.1)
        self.norm.reset_parameters()

    @property
    def lambda_vectors(self) -> tuple[nn.Parameter, ...]:
        return self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2

    def contrast_lambda(self, init: float) -> Tensor | None:
        if not self.differential:
            return None
        return VF.contrast_lambda(*self.lambda_vectors, init)


@register_notrace_module
class VisualContrastAttention(OnGrid, nn.Module):
    """Two-stage differential attention through n pooled contrast tokens (arXiv 2511.00833, section 3).

    Stage I lets n positive and n negative contrast tokens, pooled from the queries, attend to all tokens; Stage II lets
    all tokens attend to the contrast tokens. Each stage uses the difference of its two softmax maps, so the cost is
    linear in the number of tokens.

    Args:
        dim: channels C; divisible by `num_heads`.
        num_heads: heads H, each with d = C / H channels.
        grid_size: rows and columns (Hg, Wg) of the patch grid.
        token_grid: rows and columns (h, w) of the contrast tokens, n = h * w; at most `grid_size` in each direction.
        num_prefix_tokens: class, register and distillation tokens before the patches. They attend and are attended to,
            but are not pooled and get no depthwise convolution.
        depth: 0-based index of the block in the whole network; sets `lambda_init`.
        qkv_bias: bias in the qkv projection.
        proj_drop: dropout after the output projection.
        dwc: add a depthwise 3x3 convolution of the values.
        tokens: what a contrast token is made of: the pooled query, a learned embedding, or their sum.
        stage2_softmax: one softmax per stream, or one over the tokens of both.
        pooling: the average of a pooling cell's queries, or one weighted by softmax(a . q_i), one vector a per head.
        stage1_differential, stage2_differential: False leaves a stage with its positive stream, without lambda.

    Attributes:
        fused_attn: use the operators of `vca.kernels.ops` where they apply, which waits for their kernels; None, the
            initial value unless VCA_FUSED says otherwise: where they win and are there, see `vca.fused`.

    Raises:
        ValueError: the arguments contradict one another; the message says how.
    """

    token_grid: tuple[int, int]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        grid_size: tuple[int, int],
        token_grid: tuple[int, int],
        num_prefix_tokens: int = 0,
        depth: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        dwc: bool = True,
        tokens: str = "pool+emb",
        stage2_softmax: str = "separate",
        pooling: str = "avg",
        stage1_differential: bool = True,
        stage2_differential: bool = True,
    ):
        super().__init__()
        grid_size, token_grid = to_2tuple(grid_size), to_2tuple(token_grid)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}.")
        check_token_grid(token_grid, grid_size)
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens={num_prefix_tokens} is negative.")
        for name, value, choices in (
            ("tokens", tokens, TOKENS),
            ("stage2_softmax", stage2_softmax, STAGE2_SOFTMAX),
            ("pooling", pooling, POOLING),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}.")
        if not (stage1_differential or stage2_differential):
            raise ValueError("one stage at least must be differential; attention='agent' has none.")
        if stage2_softmax == "joint" and not stage2_differential:
            raise ValueError("stage2_softmax='joint' needs both streams in Stage II, of which this kind has one.")
        if pooling == "learned" and tokens == "emb":
            raise ValueError("pooling='learned' has nothing to pool with tokens='emb'.")
        self.num_heads = num_heads
        self.grid_size = grid_size
        self.token_grid = token_grid
        self.num_prefix_tokens = num_prefix_tokens
        self.tokens = tokens
        self.stage2_softmax = stage2_softmax
        self.lambda_init = VF.lambda_init(depth)
        self.fused_attn: bool | None = ops.ENABLED

        num_tokens = token_grid[0] * token_grid[1]
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        with_embed = tokens != "pool"
        self.positive_embed = nn.Parameter(torch.empty(num_tokens, dim)) if with_embed else None
        self.negative_embed = nn.Parameter(torch.empty(num_tokens, dim)) if with_embed else None
        self.pool_query = nn.Parameter(torch.empty(num_heads, dim // num_heads)) if pooling == "learned" else None
        self.stage1 = ContrastStage(dim // num_heads, stage1_differential)
        self.stage2 = ContrastStage(dim // num_heads, stage2_differential)
        self.dwc = depthwise_conv3x3(dim) if dwc else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws e+- from a standard normal and zeroes the pooling vectors; every submodule initialises itself."""
        if self.positive_embed is not None:
            nn.init.normal_(self.positive_embed)
            nn.init.normal_(self.negative_embed)
        if self.pool_query is not None:
            nn.init.zeros_(self.pool_query)

    @property
    def kind(self) -> str:
        """The name of this attention for `vca.create_attention`."""
        if self.stage1.differential and self.stage2.differential:
            return "vca"
        return "vca_stage1" if self.stage1.differential else "vca_stage2"

    @property
    def has_kernels(self) -> bool:
        """Whether there are fused operators for this form of the layer."""
        return self.kind == "vca" and self.stage2_softmax == "separate"

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, grid_size={self.grid_size}, token_grid={self.token_grid}, "
            f"num_prefix_tokens={self.num_prefix_tokens}, tokens={self.tokens!r}, "
            f"stage2_softmax={self.stage2_softmax!r}, kind={self.kind!r}"
        )

    def forward(
        self,
        x: Tensor,
        attn_mask: None = None,
        is_causal: bool = False,
        grid_size: tuple[int, int] | None = None,
        change: Change = UNCHANGED,
    ) -> Tensor:
        """Attends over (B, P + N, C) and returns the same shape.

        `grid_size` is that of this call, if not the layer's; `change` is that of `vca.intervene`.

        Raises:
            ValueError: the number of tokens is not P + Hg * Wg, or a mask is given: VCA has no masked form.
        """
        return self._attend(x, attn_mask, is_causal, grid_size, keep_maps=False, change=change)[0]

    def forward_with_maps(
        self,
        x: Tensor,
        attn_mask: None = None,
        is_causal: bool = False,
        grid_size: tuple[int, int] | None = None,
        change: Change = UNCHANGED,
    ) -> tuple[Tensor, ContrastMaps]:
        """Like `forward`, and also returns the maps of both stages; `vca.record` is the comfortable way to them.

        Returns:
            The output (B, P + N, C), and the maps: `stage1` has (B, H, n, P + N), `stage2` has (B, H, P + N, n).
        """
        return self._attend(x, attn_mask, is_causal, grid_size, keep_maps=True, change=change)

    def _attend(
        self, x: Tensor, attn_mask: None, is_causal: bool, grid_size: tuple[int, int] | None, keep_maps: bool,
        change: Change,
    ):  # fmt: skip
        """The layer on x (B, T, C); H heads of d channels, n contrast tokens, BH = B * H."""
        x, grid_size = self.checked(x, grid_size, attn_mask, is_causal)
        batch, length, dim = x.shape
        prefix = self.num_prefix_tokens

        qkv = self.qkv(x)
        split = qkv.view(batch, length, 3, self.num_heads, dim // self.num_heads)
        explicit = keep_maps or change.needs_maps
        is_fused = not explicit and self._is_fused(split)
        if is_fused and change is UNCHANGED and self._is_whole and whole.takes(qkv):
            return self.proj_drop(self.proj(self._attend_at_once(qkv, grid_size))), None
        q, k, v = split.unbind(2)  # (B, T, H, d)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, d), as the fused operators take them
        values = v
        if not is_fused:
            q, k, v = (y.flatten(0, 1) for y in (q, k, v))  # (BH, T, d)
        kernel = None if explicit else ops.contrast if is_fused else VF.contrast

        tokens = self._contrast_tokens(qkv[:, prefix:, :dim], grid_size).to(q.dtype)  # (BH, 2n, d)
        v_hat, recorded1 = self._stage(kernel, 1, tokens, k, v, change)
        v_hat = (v_hat * self.stage1.norm.weight).to(v.dtype)  # (BH, n, d)
        out, recorded2 = self._stage(kernel, 2, tokens, q, v_hat, change)  # (B, H, T, d) or (BH, T, d)

        gathered = change.heads(out.view(batch, self.num_heads, length, dim // self.num_heads))  # (B, H, T, d)
        gain = self.stage2.norm.weight
        if self.dwc is None:
            out = (gathered.transpose(1, 2) * gain.to(out.dtype)).flatten(2)  # (B, T, C)
        else:
            join = ops.join if is_fused else VF.join
            out = join(gathered, values, gain, self.dwc.weight, self.dwc.bias, grid_size, prefix)
        out = self.proj_drop(self.proj(out))

        if recorded1 is None or recorded2 is None:
            return out, None
        return out, ContrastMaps(
            kind=self.kind,
            grid_size=grid_size,
            token_grid=self.token_grid,
            num_prefix_tokens=prefix,
            stage1=recorded1.maps,
            stage2=recorded2.maps,
            values=(v * self.stage1.norm.weight).view(gathered.shape),
            gathered=gathered,
            row_scale1=recorded1.row_scale,
            row_scale2=recorded2.row_scale,
            lambda1=recorded1.lam,
            lambda2=recorded2.lam,
        )

    def _is_fused(self, x: Tensor) -> bool:
        return self.has_kernels and fused.applies(self.fused_attn, x, math.prod(self.token_grid))

    @property
    def _is_whole(self) -> bool:
        """Whether it has all parts of the paper's layer, and no other."""
        return self.tokens == "pool+emb" and self.pool_query is None and self.dwc is not None

    def _attend_at_once(self, qkv: Tensor, grid_size: tuple[int, int]) -> Tensor:
        assert self.dwc is not None
        stages = self.stage1, self.stage2
        vectors = [vector for stage in stages for vector in stage.lambda_vectors]
        gains = [stage.norm.weight for stage in stages]
        parameters = [self.positive_embed, self.negative_embed, *vectors, *gains, self.dwc.weight, self.dwc.bias]
        return whole.attend(qkv, parameters, grid_size, self.token_grid, self.num_prefix_tokens, self.lambda_init)

    def _contrast_tokens(self, q: Tensor, grid_size: tuple[int, int]) -> Tensor:
        pooled = embeds = None
        if self.tokens != "emb":
            pooled = VF.pool_queries(q, grid_size, self.token_grid, self.pool_query)
        if self.tokens != "pool":
            embeds = self.positive_embed, self.negative_embed
        return VF.contrast_tokens(pooled, embeds, self.num_heads, q.shape[0])

    def _stage(
        self, kernel: Kernel | None, number: int, tokens: Tensor, x: Tensor, values: Tensor, change: Change
    ) -> tuple[Tensor, _Recorded | None]:  # fmt: skip
        """One stage without its learned gains, by a kernel or through its maps.

        Args:
            kernel: `VF.contrast` for sequences (BH, T, d), `ops.contrast` for (B, H, T, d); None to materialize the
                maps of sequences (BH, T, d), which are then returned too.
            number: 1 or 2.
            tokens: both streams of contrast tokens (BH, 2n, d).
            x, values: see `VF.contrast`.
            change: what is done differently.

        Returns:
            The output, (BH, n, d) in Stage I; and what was recorded, without a kernel.
        """
        stage = self.stage1 if number == 1 else self.stage2
        axes: tuple[int, ...] = VF.STAGE1
        if number == 2:
            axes = VF.STAGE2_JOINT if self.stage2_softmax == "joint" else VF.STAGE2
        lam, gain = stage.contrast_lambda(self.lambda_init), 1 - self.lambda_init
        lam, x = change.contrast_lambda(number, lam), change.scored(number, x)
        if kernel is not None:
            return kernel(tokens, x, values, lam, gain, axes), None

        def with_rows_of_queries(maps: Tensor) -> Tensor:
            """(BH, ..., n, T) as (B, H, ..., n, T) in Stage I, (B, H, ..., T, n) in Stage II."""
            maps = maps.unflatten(0, (-1, self.num_heads))
            return maps if number == 1 else maps.transpose(-2, -1)

        in_place = not torch.is_grad_enabled()
        streams = VF.stream_maps(tokens, x, axes, lam is not None, in_place)  # (BH, S, n, T)
        streams = change.streams(streams, dim=1)
        applied = with_rows_of_queries(VF.subtract_streams(streams, lam))
        if number == 2:
            applied = change.heads(applied)
        out = torch.bmm(applied.flatten(0, 1).to(values.dtype), values)  # (BH, rows, d)
        scale = VF.rms_scale(out, gain)  # (BH, rows, 1)
        maps = StageMaps(applied)
        if lam is not None:
            positive, negative = with_rows_of_queries(streams).unbind(2)
            maps = StageMaps(positive, negative, applied)
        return out * scale.to(out.dtype), _Recorded(maps, scale.unflatten(0, (-1, self.num_heads)), lam)
