"""The keys of a classification recipe."""

from dataclasses import dataclass

from timm.optim import list_optimizers

from training.core import recipe as recipes
from training.core.recipe import key
from vca.models import is_classifier


@dataclass(frozen=True)
class ClassifierRecipe(recipes.BaseRecipe):
    """Every key that a classification recipe may set."""

    model: str
    epochs: int
    batch_size: int
    lr: float
    lr_batch: int = key(0, "batch size that lr, warmup_lr and min_lr are for, scaled linearly; 0: batch_size")
    weight_decay: float = key(0.05, "not applied to norms, biases, positions, lambdas and contrast embeddings")
    embed_decay: bool = key(False, "decay contrast embeddings, too, as the code of Agent Attention would")
    warmup_epochs: float = key(5.0, "epochs of linear warm-up")
    warmup_lr: float = key(1e-6, "learning rate at the first step")
    min_lr: float = key(1e-5, "learning rate at the end of the cosine")
    cooldown_epochs: int = key(0, "of all epochs, the last ones that stay at min_lr")
    drop_path: float = key(0.0, "stochastic depth rate of the last block")
    label_smoothing: float = key(0.1, "label smoothing")
    mixup: float = key(0.0, "mixup alpha; 0 for none")
    cutmix: float = key(0.0, "CutMix alpha; 0 for none")
    mix_group: int = key(0, "neighbouring rows of a batch that are mixed with one another; 0 for all of it")
    memory: bool = key(True, "decode all images once and augment in batches on the training device")
    padding: int = key(4, "in memory: largest shift of the random crop in pixels")
    smallest_crop: float = key(1.0, "in memory: smallest area of a crop that is resized; 1 for none")
    rotation: float = key(0.0, "in memory: largest rotation in degrees")
    auto_augment: str = key("", "from files: timm's AutoAugment string, such as rand-m9-mstd0.5-inc1")
    color_jitter: float = key(0.0, "brightness, contrast and saturation; from files for images without auto_augment")
    erasing: float = key(0.0, "probability of random erasing")
    crop_scale: float = key(0.08, "from files: smallest area of the random resized crop")
    downscale: int = key(
        0, "from files: half of the images are first reduced to this shorter side, so that blur tells nothing"
    )
    img_sizes: list = key(
        [], "image size in pixels from a share of the steps on: [[0, 112], [0.9, 224]]; empty: the model's own"
    )
    optimizer: str = key("adamw", "an optimizer of timm, such as lion, lamb or muon: timm.optim.list_optimizers()")
    layer_decay: float = key(0.0, "factor on the learning rate for each block further from the head; 0 for none")
    layer_decay_no_opt_scale: float = key(0.0, "blocks whose layer_decay is below this are not trained; 0: all are")
    teacher_weight: float = key(1.0, "with a teacher: weight of the cross-entropy with its probabilities")
    teacher_size: int = key(0, "with a teacher: image size that it sees, in pixels; 0 for its own")
    unlabeled_weight: float = key(
        1.0, "with sources.json: weight in the softmax of classes that an image's source does not label; 1: plain"
    )
    reset_head: bool = key(False, "draw the classes' weights anew, though --init has them")
    repeats: int = key(1, "from files: repeated augmentation, copies of an image in a batch")
    mean: list = key([0.5, 0.5, 0.5], "channel means, images in [0, 1]")
    std: list = key([0.5, 0.5, 0.5], "channel standard deviations")
    crop_pct: float = key(0.0, "evaluation: share of the resized image's side that is seen; 0 for the model's own")
    ema_decay: float = key(0.999, "decay of the EMA of the weights; 0 for none")
    ema_warmup: bool = key(True, "let the decay rise with the steps")
    eval_every: int = key(1, "epochs between evaluations")

    def __post_init__(self):
        self.check_shared()
        recipes.check_ranges(
            self,
            positive=("epochs", "eval_every", "crop_scale", "smallest_crop", "repeats"),
            not_negative=(
                "lr_batch", "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs", "mixup",
                "cutmix", "mix_group", "padding", "rotation", "color_jitter", "crop_pct", "downscale",
                "layer_decay", "layer_decay_no_opt_scale", "teacher_weight", "teacher_size", "unlabeled_weight",
            ),
            shares=("drop_path", "label_smoothing", "erasing"),
        )  # fmt: skip
        if self.img_sizes and not _grows(self.img_sizes):
            raise ValueError(
                f"img_sizes = {self.img_sizes} must be [share, pixels] pairs, shares rising from 0 to below 1."
            )
        if self.memory and (self.img_sizes or self.downscale):
            raise ValueError("img_sizes and downscale need memory = false.")
        if not is_classifier(self.model):
            raise ValueError(f"model = {self.model!r} is no classifier; vca.list_models() names them.")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(type(value) in (int, float) and abs(value) < 1e3 for value in values):
                raise ValueError(f"{name} = {values} must be three numbers, one for each channel.")
        if min(self.std) <= 0:
            raise ValueError(f"std = {self.std} must be positive.")
        if self.optimizer not in list_optimizers():
            raise ValueError(
                f"optimizer = {self.optimizer!r} is none of timm's; timm.optim.list_optimizers() names them."
            )
        if self.memory and (self.auto_augment or self.repeats > 1):
            raise ValueError("auto_augment and repeats need memory = false.")
        if not self.memory and (self.smallest_crop < 1 or self.rotation):
            raise ValueError("smallest_crop and rotation need memory = true; from files it is crop_scale.")
        if max(self.smallest_crop, self.color_jitter, self.unlabeled_weight) > 1:
            raise ValueError("smallest_crop, color_jitter and unlabeled_weight must be at most 1.")
        if self.mix_group and (self.mix_group % 2 or self.batch_size % self.mix_group):
            raise ValueError(f"mix_group = {self.mix_group} must be an even divisor of batch_size = {self.batch_size}.")
        if self.cooldown_epochs >= self.epochs:
            raise ValueError(f"cooldown_epochs = {self.cooldown_epochs} must be fewer than epochs = {self.epochs}.")

    @property
    def lr_scale(self) -> float:
        """What the three learning rates are multiplied with."""
        return self.batch_size / self.lr_batch if self.lr_batch else 1.0

    def img_size_at(self, share: float) -> int:
        """The image size after that share of the steps, in pixels."""
        return next(side for start, side in reversed(self.img_sizes) if share >= start)

    def relative_area(self, side: int) -> float:
        """Pixels of an image, on average over the steps, relative to a square of `side` pixels."""
        if not self.img_sizes:
            return 1.0
        ends = [*(start for start, _ in self.img_sizes[1:]), 1]
        return sum((end - start) * (own / side) ** 2 for (start, own), end in zip(self.img_sizes, ends, strict=True))


def _grows(img_sizes: list) -> bool:
    try:
        starts, sides = zip(*img_sizes, strict=True)
        return (
            starts[0] == 0
            and list(starts) == sorted(set(starts))
            and starts[-1] < 1
            and all(type(side) is int and side > 0 for side in sides)
        )
    except (TypeError, ValueError):
        return False
