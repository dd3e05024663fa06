"""What is measured of a model: accuracy of a classifier, validation loss of a generator."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.core.distributed import ALONE, World
from training.data.images import Images, decode, generator_cfg, normalize
from training.data.latents import Latents
from training.data.seeding import derive_seed
from vca.diffusion import ddpm, flow
from vca.extras import import_extra
from vca.models.dit import DiffusionTransformer

VAL_SAMPLES = 1000


def validation_data(val: Images | Latents, input_size: int, workers: int) -> tuple[Tensor, Tensor]:
    """The clean samples of the validation loss, at most VAL_SAMPLES evenly from the split, and their labels."""
    chosen = torch.linspace(0, len(val) - 1, min(VAL_SAMPLES, len(val))).long()
    if isinstance(val, Latents):
        return val.means(chosen), val.labels[chosen]
    cfg = generator_cfg(input_size)
    pixels, labels = decode(val, cfg, workers)
    return normalize(pixels[chosen], cfg), labels[chosen]


def draw_times(family: str, time_sampling: str, count: int, device, generator=None) -> Tensor:
    """The times of a batch: integers for DiT, in [0, 1] for SiT."""
    if family == "dit":
        return torch.randint(ddpm.NUM_TIMESTEPS, (count,), device=device, generator=generator)
    if time_sampling == "uniform":
        return torch.rand(count, device=device, generator=generator)
    return flow.logit_normal(torch.randn(count, device=device, generator=generator))


@torch.inference_mode()
def validation_loss(model: DiffusionTransformer, samples: Tensor, labels: Tensor, batch_size: int = 250) -> float:
    """Mean loss in float32 at uniform times; noise and times are the same at each call, for models of any attention."""
    device = model.pos_embed.device
    generator = torch.Generator().manual_seed(derive_seed(0, len(samples)))
    noise = torch.randn(samples.shape, generator=generator)
    t = draw_times(model.family, "uniform", len(samples), "cpu", generator)
    parts = zip(*(tensor.split(batch_size) for tensor in (samples, labels, noise, t)), strict=True)
    return sum(model.loss(*(part.to(device) for part in four)).sum().item() for four in parts) / len(samples)


@torch.inference_mode()
def outputs(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, classes), in float32, and labels (B,) of each batch of decoded images, uint8 (B, 3, H, W)."""
    model.eval()
    device = next(model.parameters()).device
    for x, y in batches:
        yield model(normalize(x.to(device), model.pretrained_cfg)).float(), y.to(device)


def accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], world: World = ALONE, classes: list[int] | None = None
) -> dict:
    """Accuracy in percent and mean cross-entropy, in float32; of fewer than six classes no top-5, which says nothing.

    Args:
        batches: decoded images and their labels; of several processes, this one's share.
        classes: the only classes that compete; default all.
    """
    top1 = top5 = loss = count = choices = 0.0
    device = next(model.parameters()).device
    for logits, y in outputs(model, batches):
        if classes:
            allowed = torch.full_like(logits[0], float("-inf"))
            allowed[classes] = 0
            logits = logits + allowed
        choices = len(classes or logits[0])
        ranked = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        top1 += ranked[:, 0].sum().item()
        top5 += ranked.sum().item()
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        count += len(y)
    top1, top5, loss, count = world.sum([top1, top5, loss, count], device)
    shares = dict(top1=round(100 * top1 / count, 2)) | (dict(top5=round(100 * top5 / count, 2)) if choices > 5 else {})
    return shares | dict(loss=round(loss / count, 4), images=int(count))


def interval(percent: float, count: int) -> list[float]:
    """Wilson's 95 % interval of an accuracy, both in percent: what as many other images would have given.

    Args:
        percent: the accuracy.
        count: the number of images it was measured on.
    """
    stats = import_extra("scipy.stats", "train")
    measured = stats.binomtest(round(percent / 100 * count), count)
    return [round(100 * bound, 2) for bound in measured.proportion_ci(0.95, method="wilson")]
