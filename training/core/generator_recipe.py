"""The keys of a generation recipe."""

from dataclasses import dataclass
from typing import ClassVar

from training.core import recipe as recipes
from training.core.recipe import key
from vca.models import GENERATORS

TIME_SAMPLING = ("uniform", "logit_normal")


@dataclass(frozen=True)
class GeneratorRecipe(recipes.BaseRecipe):
    """Every key that a generation recipe may set."""

    may_grow: ClassVar[frozenset] = frozenset({"steps"})  # the learning rate is constant

    model: str
    steps: int
    batch_size: int
    lr: float
    input_size: int = key(32, "side of the images or latents")
    vae: str = key("", "folder or Hub id of the autoencoder whose latents these are, if not the model's own")
    in_channels: int = key(0, "channels of the latents; 0 for those of the model")
    warmup_steps: int = key(0, "steps of linear warm-up to the constant learning rate")
    class_dropout: float = key(0.1, "share of labels replaced by the null class")
    time_sampling: str = key("uniform", "SiT: uniform, or logit_normal for more times in the middle")
    ema_decay: float = key(0.9999, "decay of the EMA of the weights; 0 for none")
    ema_warmup: bool = key(False, "let the decay rise with the steps")
    val_every: int = key(2000, "steps between validation losses")
    sample_every: int = key(2000, "steps between sample grids; 0 for none, where a latent model has no VAE")
    sample_steps: int = key(50, "steps of the default sampler in a sample grid")
    sample_guidance: float = key(1.0, "guidance scale of a sample grid")
    align_weight: float = key(0.0, "of the distance between a block's tokens and the features of --teacher; 0 for none")
    align_block: int = key(4, "the block whose tokens are aligned, from 1")

    def __post_init__(self):
        self.check_shared()
        recipes.check_ranges(
            self,
            positive=("steps", "input_size", "val_every", "sample_steps", "align_block"),
            not_negative=("warmup_steps", "sample_every", "in_channels", "align_weight"),
            shares=("class_dropout",),
        )
        if self.model not in GENERATORS:
            raise ValueError(f"model = {self.model!r} is no generator; vca.list_models() names them.")
        if self.time_sampling not in TIME_SAMPLING:
            raise ValueError(f"time_sampling = {self.time_sampling!r} must be one of {', '.join(TIME_SAMPLING)}.")
        if self.time_sampling != "uniform" and GENERATORS[self.model]["family"] == "dit":
            raise ValueError(f"time_sampling = {self.time_sampling!r} is for SiT; DiT draws its times uniformly.")

    @property
    def latent(self) -> bool:
        """Whether its model works on the latents of an autoencoder."""
        return bool(self.vae) or super().latent

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what is denoised."""
        return self.in_channels or GENERATORS[self.model]["in_channels"], self.input_size, self.input_size

    def model_args(self) -> dict:
        """The arguments of `vca.create_model` that this recipe sets."""
        own = dict(vae=self.vae, in_channels=self.in_channels)
        return super().model_args() | {name: value for name, value in own.items() if value}
