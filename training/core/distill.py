"""What a classifier learns beside plain labels: a teacher's probabilities, and labels that know some classes only."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.core.teacher import resize
from training.data.errors import DataError
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


def partial_cross_entropy(logits: Tensor, labels: Tensor, labeled: Tensor, weight: float, smoothing: float) -> Tensor:
    """Cross-entropy of images from sources that label only some of the classes, a scalar.

    A source says nothing about the classes it does not label: they compete with `weight` in the softmax, so that the
    source of an image does not tell its class. Images of such a class are unlabeled and count as zero.

    Args:
        logits: (B, classes).
        labels: (B,).
        labeled: which classes the source of each image labels (B, classes).
        weight: of the exponentials of the other classes; 1 is plain cross-entropy, 0 leaves them out.
        smoothing: label smoothing.
    """
    logits = logits.float() + math.log(max(weight, 1e-30)) * ~labeled
    targets = (1 - smoothing) * F.one_hot(labels, labeled.shape[1]) + smoothing * labeled / labeled.sum(1, True)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * labeled.gather(1, labels[:, None])[:, 0]).mean()


def read_teacher_classes(data: str, class_folders: list[str], teacher: nn.Module) -> Tensor | None:
    """What each class of the data is among the teacher's, (teacher's classes, classes) of 0 and 1; None if not said.

    `teacher_classes.json` beside the splits says it: {CLASS: {NUMBER: NAME, ...}}, with the teacher's numbers. A class
    that the teacher does not know is left out.

    Raises:
        DataError: the file is damaged, or names a class that the data or the teacher does not have.
    """
    file = Path(data) / "teacher_classes.json"
    if not file.is_file():
        return None
    matrix = torch.zeros(teacher.num_classes, len(class_folders))
    try:
        for name, numbers in json.loads(file.read_text(encoding="utf-8")).items():
            for number in map(int, numbers):
                if number < 0:
                    raise IndexError(f"{number} is no class")
                matrix[number, class_folders.index(name)] = 1
    except (ValueError, AttributeError, TypeError, IndexError) as error:
        raise DataError(f"{file} must hold {{CLASS: {{NUMBER: NAME, ...}}}} in JSON: {error}.") from None
    return matrix


def mapped_cross_entropy(logits: Tensor, probabilities: Tensor, matrix: Tensor) -> Tensor:
    """Cross-entropy with the teacher's probabilities, as far as they are about the student's classes, a scalar.

    Both are compared over the classes that the teacher knows. An image counts as much as the teacher says that it is
    of one of these.

    Args:
        logits: the student's (B, classes).
        probabilities: the teacher's (B, teacher's classes).
        matrix: as `read_teacher_classes` gives it.
    """
    known = matrix.any(0)
    targets = probabilities @ matrix[:, known]
    return -(targets * logits.float()[:, known].log_softmax(1)).sum(1).mean()
