"""Top-1 and top-5 accuracy of a classifier, or the validation loss of a generator, on a folder of images.

python -m training.evaluate weights/NAME --data FOLDER
"""

import argparse
import os
import sys
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vca
from training.data import DataError, FolderEvaluation, Images, normalize
from training.engine import RunError, open_device
from training.generate import validation_data, validation_loss
from training.latents import Latents
from training.world import ALONE, World
from vca.models.dit import DiffusionTransformer


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], world: World = ALONE) -> dict:
    """Accuracy in percent and mean cross-entropy, in float32, of a model in evaluation mode.

    Args:
        batches: decoded images, uint8 (B, 3, H, W), and labels (B,); of several processes, this one's share.
    """
    model.eval()
    device = next(model.parameters()).device
    top1 = top5 = loss = count = 0.0
    for x, y in batches:
        y = y.to(device)
        logits = model(normalize(x.to(device), model.pretrained_cfg))
        ranked = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        top1 += ranked[:, 0].sum().item()
        top5 += ranked.sum().item()
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        count += len(y)
    top1, top5, loss, count = world.sum([top1, top5, loss, count], device)
    return dict(
        top1=round(100 * top1 / count, 2), top5=round(100 * top5 / count, 2), loss=round(loss / count, 4),
        images=int(count),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder")
    parser.add_argument("--data", required=True, help="data folder with a sub-folder for the split")
    parser.add_argument("--split", default="val")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        model = vca.load(args.checkpoint, device=open_device(args.device))
        latent = getattr(model, "latent_decoder", None) is not None
        images = (Latents if latent else Images)(args.data, args.split)
        if len(images.class_names) != model.num_classes:
            raise DataError(f"{args.data} has {len(images.class_names)} classes, the model {model.num_classes}.")
        if images.class_names != model.label_names:
            raise DataError(f"the classes of {args.data} are not those of the model, in its order.")
        if isinstance(model, DiffusionTransformer):
            samples, labels = validation_data(images, model.sample_shape[-1], os.cpu_count())
            print(f"validation loss {round(validation_loss(model, samples, labels), 5):.4f}  ({len(labels)} images)")
            return
        result = accuracy(model, FolderEvaluation(images, model.pretrained_cfg, os.cpu_count()))
    except (vca.CheckpointError, DataError, RunError) as error:
        sys.exit(f"error: {error}")
    top1, top5, loss, count = (result[key] for key in ("top1", "top5", "loss", "images"))
    print(f"top-1 {top1:.2f} %  top-5 {top5:.2f} %  loss {loss:.4f}  ({count} images)")


if __name__ == "__main__":
    main()
