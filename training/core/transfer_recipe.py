"""The keys of a transfer recipe."""

from dataclasses import dataclass
from typing import ClassVar

from training.core.recipe import BaseRecipe, check_ranges, key
from vca.models import is_classifier

STREAMS = ("teacher", "student")


@dataclass(frozen=True)
class TransferRecipe(BaseRecipe):
    """Every key that a transfer recipe may set."""

    labeled: ClassVar[bool] = False

    model: str
    steps: int
    batch_size: int
    lr: float
    lr_kept: float = key(5e-4, "learning rate of qkv and proj, which the teacher has trained; lr: of all that is new")
    min_lr: float = key(0.0, "learning rate at the end of the cosine")
    warmup_steps: int = key(20, "steps of linear warm-up")
    stream: str = key("teacher", "the hidden states that the layers read: the teacher's, or the student's own")
    img_sizes: list = key([224], "image sizes in pixels; every step draws one")
    crop_scale: float = key(0.35, "smallest area of the random resized crop")
    eval_images: int = key(256, "held-out images on which the error is measured")
    eval_every: int = key(200, "steps between evaluations")
    ema_decay: float = key(0.0, "decay of the EMA of the weights; 0 for none")
    ema_warmup: bool = key(True, "let the decay rise with the steps")

    def __post_init__(self):
        self.check_shared()
        check_ranges(
            self,
            positive=("steps", "crop_scale", "eval_images", "eval_every", "lr_kept"),
            not_negative=("warmup_steps", "min_lr"),
        )
        if not is_classifier(self.model):
            raise ValueError(f"model = {self.model!r} is no classifier; vca.list_models() names them.")
        if self.stream not in STREAMS:
            raise ValueError(f"stream = {self.stream!r} must be one of {', '.join(STREAMS)}.")
        if not self.img_sizes or not all(type(side) is int and side > 0 for side in self.img_sizes):
            raise ValueError(f"img_sizes = {self.img_sizes} must be sizes in pixels.")

    @property
    def size(self) -> dict:
        """The arguments of a model, teacher or student, that sees images of these sizes."""
        size = dict(img_size=max(self.img_sizes))  # of both position tables, whatever the teacher's own
        return size | (dict(dynamic_img_size=True) if len(set(self.img_sizes)) > 1 else {})

    @property
    def passes(self) -> float:
        """The teacher's forward pass; and those of the student or, on the teacher's stream, of attention: a third."""
        return 1 + super().passes / (3 if self.stream == "teacher" else 1)

    def relative_area(self, side: int) -> float:
        """Pixels of an image, on average over the steps, relative to a square of `side` pixels."""
        return sum((own / side) ** 2 for own in self.img_sizes) / len(self.img_sizes)
