"""Distillation: a classifier that learns from a teacher's probabilities beside its labels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.core.teacher import resize
from training.data.images import denormalize, normalize


class Student(nn.Module):
    """A classifier with one more head, which learns the teacher's classes and is dropped at the end.

    Args:
        model: a timm classifier; its features before the head feed both.
        num_classes: of the teacher.
    """

    def __init__(self, model: nn.Module, num_classes: int):
        super().__init__()
        self.model = model
        self.teacher_head = nn.Linear(model.head_hidden_size, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> logits of the model's classes and of the teacher's, (B, classes) each."""
        features = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return self.model.get_classifier()(features), self.teacher_head(features)


@torch.no_grad()
def teacher_probabilities(teacher: nn.Module, images: Tensor, pretrained_cfg: dict, side: int) -> Tensor:
    """What the teacher says to the student's images, (B, classes), in float32.

    Args:
        images: normalized as the student's `pretrained_cfg` says.
        side: image size that the teacher sees, in pixels; 0 for its own.
    """
    pixels = resize(denormalize(images, pretrained_cfg), side or teacher.pretrained_cfg["input_size"][-1]).clamp(0, 1)
    pixels = normalize(pixels, teacher.pretrained_cfg).contiguous(memory_format=torch.channels_last)
    return F.softmax(teacher(pixels).float(), dim=1)
