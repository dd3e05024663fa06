"""The generators: one transformer for DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740), which learn differently.

Names read `[vca_]{dit | sit}_{size}_{patch}`. Sizes s, b, l and xl work on 32x32x4 latents of 256 px images, xs and ti
on 32 px images; `input_size`, `in_channels` and `vae` change that. Modules are named as in the official repositories.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vca.diffusion import ddpm, flow
from vca.diffusion.sampling import Callback, Model, Sampler, check_guidance, class_indices, normal_noise, silent
from vca.diffusion.schedulers import of_diffusers
from vca.diffusion.vae import SD_VAE, LatentDecoder
from vca.layers.factory import AttentionConfig
from vca.models.common import GENERATION

PIXELS = dict(in_channels=3, vae=None)
LATENTS = dict(in_channels=4, vae=SD_VAE)
SIZES: dict[str, dict[str, Any]] = {
    "xs": dict(dim=160, depth=8, num_heads=5, **PIXELS),
    "ti": dict(dim=256, depth=12, num_heads=4, **PIXELS),
    "s": dict(dim=384, depth=12, num_heads=6, **LATENTS),
    "b": dict(dim=768, depth=12, num_heads=12, **LATENTS),
    "l": dict(dim=1024, depth=24, num_heads=16, **LATENTS),
    "xl": dict(dim=1152, depth=28, num_heads=16, **LATENTS),
}
PATCHES = (2, 4, 8)
OBJECTIVES = {"dit": ddpm, "sit": flow}

MODELS: dict[str, dict[str, Any]] = {
    f"{prefix}{family}_{size}_{patch}": dict(family=family, attention=attention, patch_size=patch, **SIZES[size])
    for prefix, attention in (("", "mhsa"), ("vca_", "vca"))
    for family in OBJECTIVES
    for size in SIZES
    for patch in PATCHES
}


def create_generator(name: str, **overrides) -> "DiffusionTransformer":
    """Builds the untrained generator `name` of `MODELS`; `overrides` are arguments of `DiffusionTransformer`."""
    model = DiffusionTransformer(**(MODELS[name] | overrides))
    model.architecture = name
    model.model_args = {key: value for key, value in overrides.items() if key != "num_classes"}
    return model


class DiffusionTransformer(nn.Module):
    """A class-conditional generator: noisy images or latents and a time in, what the objective learns out.

    Args:
        family: "dit" learns the noise of a ddpm, "sit" the velocity of a flow.
        dim, depth, num_heads: channels, blocks and heads.
        patch_size: side of a patch.
        input_size: side, or height and width, of the images or latents.
        in_channels: their channels.
        num_classes: classes; label `num_classes` is the null class of classifier-free guidance.
        mlp_ratio: hidden channels of the MLPs over `dim`.
        vae: Hub id or folder of the autoencoder whose latents these are; None for pixels in [-1, 1].
        **options: of the attention in every block, by the names of `vca.layers.factory.AttentionConfig`: `attention`
            (default "mhsa"), `token_grid` or `num_tokens` (default half the patch grid in each direction), `tokens`,
            `dwc`, `stage2_softmax` and `pooling`.

    Attributes:
        task: "generation".
        family: as given.
        sample_shape: channels, height and width of what is denoised.
        grid_size: rows and columns of patches.
        sampling: arguments of `sample` that suit these weights best, as `training.quality` measured them, of a
            checkpoint: `model.sample(labels, **model.sampling)`. {} where nothing was measured.
    """

    task = GENERATION
    num_prefix_tokens = 0

    def __init__(
        self,
        family: str,
        dim: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        *,
        input_size: int | Sequence[int] = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        vae: str | None = None,
        **options,
    ):
        super().__init__()
        config = AttentionConfig.pop_from(options, default="mhsa")
        if options:
            raise TypeError(f"{type(self).__name__} has no argument {next(iter(options))!r}.")
        if family not in OBJECTIVES:
            raise ValueError(f"family={family!r} is unknown; choose one of {', '.join(OBJECTIVES)}.")
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        if any(side % patch_size for side in size):
            raise ValueError(f"input_size={size} is not divisible by patch_size={patch_size}.")
        if vae is None and in_channels != 3:
            raise ValueError(f"in_channels={in_channels} without a vae; a generator of pixels has 3 channels.")
        self.family = family
        self.sampling: dict[str, Any] = {}
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.sample_shape = (in_channels, *size)
        self.latent_decoder = LatentDecoder(vae) if vae else None

        self.x_embedder = PatchEmbed(size, patch_size, in_channels, dim)
        self.grid_size = self.x_embedder.grid_size
        self.t_embedder = TimeEmbedding(dim)
        self.y_embedder = LabelEmbedding(num_classes, dim)
        self.pos_embed = nn.Parameter(sincos_positions(dim, self.grid_size), requires_grad=False)
        half = tuple(max(1, side // 2) for side in self.grid_size)
        (token_grid,) = config.token_grids([half])
        geometry = dict(grid_size=self.grid_size, token_grid=token_grid)
        layers = (config.create(dim, num_heads, depth=index, **geometry) for index in range(depth))
        self.blocks = nn.ModuleList(Block(dim, layer, mlp_ratio) for layer in layers)
        self.final_layer = FinalLayer(dim, 2 * in_channels * patch_size**2)
        self.grad_checkpointing = False
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Xavier for projections, 0.02 normal for the conditions, and zeros for all that adaLN-Zero starts at zero.

        Args:
            needs_reset: let attention layers initialise what else they have; False if they have just been made.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.pos_embed.data.copy_(sincos_positions(self.pos_embed.shape[-1], self.grid_size))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, *(self.t_embedder.mlp[i].weight for i in (0, 2))):
            nn.init.normal_(weight, std=0.02)
        for layer in (*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the activations inside a block are computed again in the backward pass instead of being kept."""
        self.grad_checkpointing = enable

    @property
    def patch_embed(self) -> PatchEmbed:
        """The embedding of the patches by the name that classifiers have for it."""
        return self.x_embedder

    @property
    def objective(self):
        """The module with the loss and the samplers: `vca.diffusion.ddpm` or `vca.diffusion.flow`."""
        return OBJECTIVES[self.family]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, tokens_after: int = 0) -> Tensor | tuple[Tensor, Tensor]:
        """The network's raw output.

        Args:
            x: noisy images or latents (B, C, H, W).
            t: times (B,): integers 0 ... 999 for DiT, 0 (noise) to 1 (data) for SiT.
            y: labels (B,); `num_classes` for none.
            tokens_after: a block, from 1, whose tokens (B, N, dim) are returned, too; 0 for none.

        Returns:
            (B, 2C, H, W): the noise or the velocity, then v, which interpolates DiT's variance and is unused in SiT.
        """
        condition = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.x_embedder(x) + self.pos_embed
        seen = None
        for number, block in enumerate(self.blocks, 1):
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, use_reentrant=False)
            else:
                tokens = block(tokens, condition)
            if number == tokens_after:
                seen = tokens
        tokens = self.final_layer(tokens, condition)
        patches = tokens.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, self.grid_size)
        output = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return output if seen is None else (output, seen)

    def learned(self, output: Tensor) -> Tensor:
        """What the objective learns of an output (B, 2C, H, W): all of it in DiT, the velocity (B, C, H, W) in SiT."""
        return output[:, : self.sample_shape[0]] if self.objective is flow else output

    def loss(self, x: Tensor, y: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The loss of each sample, (B,), on clean x: `vca.diffusion.ddpm.loss` or `vca.diffusion.flow.loss`."""
        return self.objective.loss(self.conditioned(y), x, noise, t)

    def conditioned(
        self, y: Tensor, guidance_scale: float = 1.0, guided_channels: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> Model:  # fmt: skip
        """The network as its objective takes it: a function of x and t alone.

        Args:
            y: labels (B,).
            guidance_scale: classifier-free guidance null + scale * (class - null); at 1 the null class is not asked.
            guided_channels: guide these first channels only, the others stay those of the class; default all.
                DiT's v is never guided.
            guidance_interval: guide from this share of the way from noise (0) to data (1) to that one, both included
                (arXiv 2404.07724); elsewhere the null class is not asked, which takes half the time. Of a batch all
                times must then be the same, as a sampler has them.
        """
        channels = self.sample_shape[0]
        begin, end = guidance_interval

        def unguided(x: Tensor, t: Tensor) -> Tensor:
            return self.learned(self(x, t, y))

        def guided(x: Tensor, t: Tensor) -> Tensor:
            if (begin, end) != (0, 1):  # else no time is asked for, for which a GPU would have to wait
                way = t[0].item() if self.objective is flow else 1 - t[0].item() / (ddpm.NUM_TIMESTEPS - 1)
                if not begin <= way <= end:
                    return unguided(x, t)
            both = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, self.num_classes)]))
            given, null = self.learned(both).chunk(2)
            part = slice(0, channels if guided_channels is None else guided_channels)
            given[:, part] = null[:, part] + guidance_scale * (given[:, part] - null[:, part])
            return given

        return unguided if guidance_scale == 1 else guided

    @torch.no_grad()
    def sample(
        self,
        labels: Sequence[int | str] | int | str | Tensor,
        *,
        steps: int = 50,
        guidance_scale: float = 1.0,
        seed: int = 0,
        sampler: Any = None,
        guided_channels: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        time_shift: float = 1.0,
        indices: Sequence[int] | None = None,
        callback: Callback | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Generates one image per label.

        Args:
            labels: names or indices of the classes (B,); `num_classes` for no class. One label is a batch of one.
            steps: steps of the sampler; Heun's method calls the network twice in each, "dopri5" as often as it needs.
            guidance_scale: classifier-free guidance; 1 for none.
            seed: with `indices` it decides all noise.
            sampler: "ddpm" or "ddim" for DiT, "euler", "heun", "sde" or "dopri5" (of the extra [ode]) for SiT, default
                the first; or a scheduler of diffusers, see `vca.diffusion.schedulers`.
            guided_channels: guide these first channels only; default all. The official scripts guide 3 of 4 latents.
            guidance_interval: guide only on this part of the way from noise (0) to data (1), see `conditioned`.
            time_shift: of SiT's own samplers: above 1 more of the steps are near the noise, below near the data, see
                `vca.diffusion.flow.shifted`; 1 for even steps.
            indices: one non-negative number per image; default 0, 1, ... An image depends on its own label and index,
                not on the others of the batch.
            callback: called as (step, total, x) with the state (B, C, H, W) after 0, 1, ..., total steps. The network
                sees state k at time `times(steps, sampler)[k]`, `decode` shows it. Raising ends the sampling.
            num_inference_steps: diffusers' name for `steps`.
            generator: as in diffusers, in the place of a seed: the seed is its next random number.

        Returns:
            float32 (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: a label, the guidance, the sampler, its time shift, the number of steps or indices is wrong.
            vca.diffusion.vae.DecoderError: the model needs a VAE that is not here; raised before sampling.
        """
        device = self.pos_embed.device
        y = class_indices(labels, self.num_classes, getattr(self, "label_names", ())).to(device)
        steps = steps if num_inference_steps is None else num_inference_steps
        if generator is not None:
            seed = int(torch.randint(2**32, (1,), generator=generator, device=generator.device))
        check_guidance(guidance_scale, guidance_interval)
        indices = range(len(y)) if indices is None else indices
        if len(indices) != len(y):
            raise ValueError(f"{len(indices)} indices for {len(y)} labels.")
        if self.latent_decoder:
            self.latent_decoder.load(device)
        run, times = self._sampler(sampler, time_shift)
        noise = normal_noise(seed, indices, self.sample_shape, device)
        model = self.conditioned(y, guidance_scale, guided_channels, guidance_interval)
        return self.decode(run(model, noise, times(steps), callback or silent))

    def times(self, steps: int, sampler: Any = None, time_shift: float = 1.0) -> list[float]:
        """The time t at which the network sees the state after 0, 1, ..., steps - 1 steps."""
        return self._sampler(sampler, time_shift).times(steps)[:steps]

    def _sampler(self, name: Any, time_shift: float = 1.0) -> Sampler:
        if not (0 < time_shift < math.inf):
            raise ValueError(f"time_shift = {time_shift} must be a positive number.")
        if time_shift != 1 and (self.objective is not flow or not isinstance(name, str | None)):
            raise ValueError(f"time_shift = {time_shift} is for SiT with a sampler of its own; leave it at 1.")
        if name is not None and not isinstance(name, str):
            return of_diffusers(name, self.family)
        samplers = self.objective.SAMPLERS | self.objective.ADAPTIVE
        if name is not None and name not in samplers:
            raise ValueError(f"sampler={name!r} is unknown; {self.family} has {', '.join(samplers)}.")
        chosen = samplers[name or next(iter(samplers))]
        if time_shift == 1:
            return chosen
        return Sampler(chosen.run, lambda steps: flow.shifted(chosen.times(steps), time_shift))

    def decode(self, x: Tensor) -> Tensor:
        """States (B, C, H, W) of a sampler, or clean latents, as images (B, 3, H, W) in [0, 1]."""
        images = self.latent_decoder.decode(x) if self.latent_decoder else x
        return (images.float() / 2 + 0.5).clamp(0, 1)


class TimeEmbedding(nn.Module):
    """Times (B,) -> (B, dim): cosines and sines of 128 frequencies from 1 down to 1e-4, then an MLP."""

    FREQUENCIES = 128

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        exponents = torch.arange(self.FREQUENCIES, device=t.device, dtype=torch.float32) / self.FREQUENCIES
        angles = t[:, None].float() * torch.exp(-math.log(10000) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """Labels (B,) -> (B, dim); the last row is the null class."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Block(nn.Module):
    """A transformer block whose two norms are shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """The last norm, shifted and scaled by the condition, and the projection to the values of a patch."""

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def sincos_positions(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Position table (1, Hg * Wg, dim): the first half of the channels encodes the column, the second the row.

    Each half is sines, then cosines, of dim / 4 frequencies falling from 1 towards 1e-4.
    """
    quarter = dim // 4
    frequencies = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, cols = (torch.arange(side, dtype=torch.float64)[:, None] * frequencies for side in grid_size)
    height, width = grid_size
    by_col = torch.cat([cols.sin(), cols.cos()], dim=1).expand(height, -1, -1)
    by_row = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, width, -1)
    return torch.cat([by_col, by_row], dim=-1).flatten(0, 1)[None].float()
