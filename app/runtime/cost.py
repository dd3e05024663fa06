"""What a model costs: parameters, multiply-adds, and latency measured here."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vca import preprocessing
from vca.diffusion.sampling import at_time
from vca.models.dit import DiffusionTransformer

ROUNDS, SECONDS = 21, 2.0  # of the interleaved measurement, whichever ends first; at least three rounds
Forward = Callable[[], object]
_measuring, _counting = Lock(), Lock()
_flops: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def forward_of(model: nn.Module) -> Forward:
    """One forward pass of a classifier or a generator with one image of zeros."""
    if isinstance(model, DiffusionTransformer):
        x = torch.zeros(1, *model.sample_shape)
        return partial(model, x, at_time(model.times(1)[0], x), torch.tensor([0]))
    return partial(model, torch.zeros(1, *preprocessing.input_size(model)))


def size_facts(model: nn.Module) -> dict[str, str]:
    """Parameters, and the multiply-adds of a forward pass with one image, as the page says them."""
    with _counting:
        if model not in _flops:
            with torch.no_grad(), _FlopCounter() as counter:
                forward_of(model)()
            _flops[model] = counter.total
    return {
        "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "Multiply-adds, one image": f"{_flops[model] / 2e9:.3g} G",
    }


class _FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations of its own thread by PyTorch's formulas.

    PyTorch's `FlopCounterMode` names them by module, for which it hooks every module of the process; a gradient that
    another thread computes meanwhile then fails.
    """

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if formula := flop_registry.get(operation._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def measure(models: list[nn.Module]) -> dict:
    """The latency of each model in milliseconds, or `busy` while another visitor's are measured."""
    if not _measuring.acquire(blocking=False):
        return dict(busy=True)
    try:
        return dict(milliseconds=latencies([forward_of(model) for model in models]), threads=torch.get_num_threads())
    finally:
        _measuring.release()


@torch.inference_mode()
def latencies(pair: list[Forward]) -> list[float]:
    """Milliseconds of each of two forward passes: medians of passes that take turns."""
    taken: list[list[float]] = [[] for _ in pair]
    for forward in pair:
        forward()
    end = time.perf_counter() + SECONDS
    while len(taken[0]) < 3 or (len(taken[0]) < ROUNDS and time.perf_counter() < end):
        for times, forward in zip(taken, pair, strict=True):
            start = time.perf_counter()
            forward()
            times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]
