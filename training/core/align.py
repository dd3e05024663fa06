"""Representation alignment (REPA, arXiv 2410.06940): a generator's tokens learn to say what a pretrained model sees."""

import torch
from torch import Tensor, nn

from training.core.features import misalignment
from training.core.recipe import RecipeError
from vca.models.dit import DiffusionTransformer


class Aligned(nn.Module):
    """A generator with an MLP on the tokens of one block, which is dropped at the end.

    Args:
        model: a generator.
        block: whose tokens are aligned, from 1.
        channels: of the features that they are aligned with; of the two hidden layers, too.

    Raises:
        RecipeError: there is no such block.
    """

    def __init__(self, model: DiffusionTransformer, block: int, channels: int):
        super().__init__()
        if block > len(model.blocks):
            raise RecipeError(f"align_block = {block}, but the model has {len(model.blocks)} blocks.")
        self.model, self.block = model, block
        dim = model.pos_embed.shape[-1]
        self.projector = nn.Sequential(
            nn.Linear(dim, channels), nn.SiLU(), nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels)
        )
        self._distances: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The output of the generator, and its projected tokens (B, T, channels)."""
        output, tokens = self.model(x, t, y, tokens_after=self.block)
        return output, self.projector(tokens)

    def loss(self, x: Tensor, y: Tensor, noise: Tensor, t: Tensor, features: Tensor, weight: float) -> Tensor:
        """The generator's loss of each sample, and `weight` times the distance of its tokens from the features, (B,).

        Args:
            x, y, noise, t: as `DiffusionTransformer.loss` takes them.
            features: of the clean image, (B, T, channels).
        """
        projected = []

        def network(x: Tensor, t: Tensor) -> Tensor:
            output, tokens = self(x, t, y)
            projected.append(tokens)
            return self.model.learned(output)

        own = self.model.objective.loss(network, x, noise, t)
        distance = misalignment(projected[0], features)
        self._distances.append(distance.detach().mean())
        return own + weight * distance

    def distance(self) -> float:
        """The mean distance of this process's samples since the last call, for the log."""
        mean = torch.stack(self._distances).mean().item()
        self._distances.clear()
        return mean
