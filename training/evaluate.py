"""Top-1 and top-5 accuracy of a checkpoint on a folder of images.

python -m training.evaluate weights/NAME --data FOLDER
"""

import argparse
import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vca
from training.data import DataError, Images, decode, normalize
from training.engine import RunError, open_device


@torch.inference_mode()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor, batch_size: int = 500) -> dict:
    """Accuracy in percent and mean cross-entropy, in float32, of a model in evaluation mode.

    Args:
        pixels: decoded images, uint8 (N, 3, H, W), on any device.
        labels: (N,).
    """
    device = next(model.parameters()).device
    top1 = top5 = loss = 0.0
    for x, y in zip(pixels.split(batch_size), labels.split(batch_size), strict=True):
        y = y.to(device)
        logits = model(normalize(x.to(device), model.pretrained_cfg))
        ranked = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        top1 += ranked[:, 0].sum().item()
        top5 += ranked.sum().item()
        loss += F.cross_entropy(logits, y, reduction="sum").item()
    count = len(labels)
    return dict(
        top1=round(100 * top1 / count, 2), top5=round(100 * top5 / count, 2), loss=round(loss / count, 4), images=count
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder")
    parser.add_argument("--data", required=True, help="data folder with a sub-folder for the split")
    parser.add_argument("--split", default="val")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        model = vca.load(args.checkpoint, device=open_device(args.device))
        images = Images(args.data, args.split)
        if len(images.class_names) != model.num_classes:
            raise DataError(f"{args.data} has {len(images.class_names)} classes, the model {model.num_classes}.")
        if images.class_names != model.label_names:
            raise DataError(f"the classes of {args.data} are not those of the model, in its order.")
        result = accuracy(model, *decode(images, model.pretrained_cfg, workers=os.cpu_count()))
    except (vca.CheckpointError, DataError, RunError) as error:
        sys.exit(f"error: {error}")
    top1, top5, loss, count = (result[key] for key in ("top1", "top5", "loss", "images"))
    print(f"top-1 {top1:.2f} %  top-5 {top5:.2f} %  loss {loss:.4f}  ({count} images)")


if __name__ == "__main__":
    main()
