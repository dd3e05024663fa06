"""Latency and memory of every kind of attention against timm's self-attention.

    python -m benchmarks.attention                          # about 10 minutes on one CPU thread
    python -m benchmarks.attention --quick                  # under a minute
    python -m benchmarks.attention --device cuda --dtypes bfloat16 --out runs/benchmark
    python -m benchmarks.attention --variants mhsa vca vca_fused  # the C++ kernels; needs a C++ compiler
    python -m benchmarks.attention --device cuda --dtypes bfloat16 --variants mhsa vca vca_fused  # the Triton kernels
    python -m benchmarks.attention --scopes layer --variants mhsa vca vca_fused agent diff xca lite_mla  # other kinds
    python -m benchmarks.attention --models deit_small_patch16_224 sit_b_2 --scopes model --batch 8
    python -m benchmarks.attention --variants mhsa vca vca_compiled --scopes core  # needs a C++ compiler on a CPU

Scopes: `core` is what a layer does between its projections, from a given qkv to what it hands to `proj`; `layer` is
the layer; `model` is every one of --models. All variants of one row run in turn, round after round, so that a
disturbance of the machine meets all of them; a cell is the median. On a GPU a core also has its roofline: the time in
which that GPU moves what must be moved, or multiplies what must be multiplied, at the rates of its copies and matrix
products. Writes `attention.md`, `attention.json` and `attention.png`.
"""

import argparse
import copy
import functools
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported; its profiler measures memory

import torch
from timm.layers import Attention
from timm.models.efficientvit_mit import LiteMLA
from timm.models.xcit import XCA
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vca
from benchmarks.report import REFERENCE, Row, floors, growth, plot, table
from training.core.cli import interruptible
from training.core.cost import example
from training.core.precision import prepare_compiler
from vca.kernels import cpu, ops
from vca.models import GENERATORS

PEERS = ("xca", "lite_mla")  # timm's: cross-covariance attention of XCiT, ReLU attention of EfficientViT
VARIANTS = ("mhsa", "vca", "mhsa_eager", "diff", "agent", "mhsa_dwc", "vca_maps")
COMPILED = ("vca_compiled", "vca_fused_compiled", "mhsa_compiled")
INT8 = ("mhsa_int8", "vca_fused_int8")  # the linear layers' products alone, weights kept in int8
FUSED = ("vca_fused", "vca_fused_compiled", "vca_fused_int8")
CUDNN = "mhsa_cudnn"  # SDPA by cuDNN, where PyTorch's own choice is another
SCOPES = ("core", "layer", "model")
MODELS = (
    "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "vit_small_patch14_224", "sit_s_2",
    "sit_b_2", "sit_xl_2",
)  # fmt: skip
HEAD_DIM = 64
# Tensors of a sequence (B, N, C) that a core reads or writes at least, in a forward pass and in a training step: VCA
# reads q twice, the gradients once more.
MOVED = {"vca": dict(forward=5, train=14), "mhsa": dict(forward=4, train=12)}


class Given(nn.Module):
    """Stands in for a projection to queries, keys and values: returns what it was given, whatever the input."""

    def __init__(self, qkv: Tensor):
        super().__init__()
        self.qkv = qkv

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv


class OnTokens(nn.Module):
    """A layer of images (B, C, H, W) as one of patches (B, N, C) on a square grid."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        return self.layer(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)


class WithMaps(nn.Module):
    """A layer on the path that materialises its maps."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **_) -> Tensor:
        return self.layer.forward_with_maps(x)[0]


class WithBackend(nn.Module):
    """A module whose SDPA must be that of one backend."""

    def __init__(self, module: nn.Module, backend: SDPBackend):
        super().__init__()
        self.module, self.backend = module, backend

    def forward(self, *inputs: Tensor) -> Tensor:
        with sdpa_kernel(self.backend):
            return self.module(*inputs)


def kind_of(variant: str) -> str:
    return re.sub("_(eager|maps|fused|compiled|cudnn|int8)", "", variant)


def tokens_of(args, side: int) -> int:
    """The side of the grid of contrast tokens for a patch grid of that side."""
    return min(args.token_side, side) if args.token_side else max(1, side // 2)


def make_layer(variant: str, dim: int, side: int, token_side: int, dwc: bool = True) -> nn.Module:
    if variant == "xca":
        return XCA(dim, dim // HEAD_DIM, qkv_bias=True)
    if variant == "lite_mla":
        return OnTokens(LiteMLA(dim, dim))
    place = dict(grid_size=(side, side), token_grid=(token_side, token_side))
    return vca.create_attention(kind_of(variant), dim, dim // HEAD_DIM, dwc=dwc, **place)


def make_model(name: str, variant: str, side: int, token_side: int, dwc: bool = True) -> nn.Module:
    name = f"vca_{name}"
    generator = GENERATORS.get(name)
    patch = generator["patch_size"] if generator else int(re.search(r"patch(\d+)", name)[1])
    size = {"input_size" if generator else "img_size": patch * side}
    return vca.create_model(name, attention=kind_of(variant), token_grid=(token_side, token_side), dwc=dwc, **size)


def make_inputs(model: nn.Module, batch: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """What the model takes: noise in the place of images and times."""
    inputs = [x.to(device) for x in example(model, batch)]
    return [torch.randn_like(x, dtype=dtype) if x.is_floating_point() else x for x in inputs]


def finish(module: nn.Module, variant: str) -> nn.Module:
    """Turns the layers of a variant that differs by its path alone to that path."""
    if variant == "mhsa_eager":
        for layer in module.modules():
            if isinstance(layer, Attention):
                layer.fused_attn = False
    for layer in module.modules():
        if isinstance(layer, vca.VisualContrastAttention):
            layer.fused_attn = variant in FUSED
    if variant == "vca_maps":
        if hasattr(module, "blocks"):
            for block in module.blocks:
                block.attn = WithMaps(block.attn)
        else:
            module = WithMaps(module)
    if variant == CUDNN:
        module = WithBackend(module, SDPBackend.CUDNN_ATTENTION)
    if variant in INT8:
        module = torch.ao.quantization.quantize_dynamic(module.eval(), {nn.Linear}, dtype=torch.qint8)
    if variant in COMPILED:
        prepare_compiler()
        module = torch.compile(module, dynamic=False)
    return module


def make_run(args, scope: str, step: str, dtype: torch.dtype, side: int, variant: str) -> Callable[[], None]:
    """A function that runs the variant once."""
    torch.manual_seed(0)
    place = dict(device=args.device, dtype=dtype)
    token_side = tokens_of(args, side)
    if scope in MODELS:
        module = make_model(scope, variant, side, token_side, args.dwc)
        inputs = make_inputs(module, args.batch, **place)
    else:
        module = make_layer(variant, args.dim, side, token_side, args.dwc)
        inputs = [torch.randn(args.batch, side * side, args.dim, **place)]
    module = module.to(**place).train(step == "train")
    sources = [inputs[0].requires_grad_(step == "train"), *module.parameters()]
    if scope == "core":
        qkv = torch.randn(args.batch, side * side, 3 * args.dim, **place).requires_grad_(step == "train")
        module = copy.copy(module)
        module.qkv, module.proj = Given(qkv), nn.Identity()
        sources = [qkv, *module.parameters()]
    module = finish(module, variant)

    if step == "forward":

        def run():
            with torch.no_grad():
                module(*inputs)

        return run

    with torch.no_grad():
        weight = torch.randn_like(module(*inputs))
    sources = [s for s in sources if s.requires_grad]

    def run():
        torch.autograd.grad(module(*inputs), sources, weight, allow_unused=True)

    return run


def settle_allocator() -> None:
    """Lets the C library keep freed memory, as it does in a process that has once held a large tensor.

    glibc hands memory back to the system above a threshold that grows with the largest block freed so far (32 MB at
    most). Below it, a layer alone in a process spends up to half its time on page faults.
    """
    torch.zeros(31 * 2**20, dtype=torch.uint8)


def seconds(run: Callable[[], None], device: str, repeats: int) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def peak_memory(run: Callable[[], None], device: str) -> int:
    """The largest number of bytes that a run holds in new tensors at one time."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@functools.cache
def rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy, read and written, and floating-point operations a second of a matrix product."""
    a = torch.randn(8192, 8192, device=device, dtype=dtype)
    b = torch.empty_like(a)
    runs = (lambda: b.copy_(a), lambda: torch.mm(a, a, out=b))
    copy, product = (statistics.median(seconds(run, device, 10) for _ in range(7)) for run in runs)
    return 2 * a.nbytes / copy, 2 * 8192**3 / product


def floor(args, step: str, dtype: torch.dtype, side: int, variant: str) -> float | None:
    """Seconds that a core takes at least on this GPU, by memory or by products; None for kinds without a count."""
    kind = kind_of(variant)
    if kind not in MOVED:
        return None
    length, tokens = side * side, tokens_of(args, side) ** 2
    sequence = args.batch * length * args.dim
    flops = sequence * (12 * tokens if kind == "vca" else 4 * length) * (3 if step == "train" else 1)
    bandwidth, throughput = rates(args.device, dtype)
    return max(MOVED[kind][step] * sequence * dtype.itemsize / bandwidth, flops / throughput)


def measure(args, scope: str, step: str, dtype: str, side: int) -> list[Row]:
    """All variants of one row, in turn."""
    torch.compiler.reset()  # it would leave uncompiled what it has compiled for many other sizes
    runs = {v: make_run(args, scope, step, getattr(torch, dtype), side, v) for v in args.variants}
    for run in runs.values():
        run()
    once = max(seconds(runs[REFERENCE], args.device, 1), 1e-5)
    repeats = max(1, round(args.slice / once))
    times = {variant: [] for variant in runs}
    for _ in range(args.rounds):
        for variant, run in runs.items():
            times[variant].append(seconds(run, args.device, repeats))
    rows = []
    for variant, run in runs.items():
        ms, mb = 1e3 * statistics.median(times[variant]), peak_memory(run, args.device) / 1e6
        least = None
        if args.device == "cuda" and scope == "core":
            least = floor(args, step, getattr(torch, dtype), side, variant)
        rows.append(Row(scope, step, dtype, side * side, variant, ms, mb, least and 1e3 * least))
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sides", type=int, nargs="+", default=[8, 14, 20, 28, 42, 64], help="sides of the patch grid")
    parser.add_argument("--model-sides", type=int, nargs="+", default=[14, 28, 56], help="the same, for whole models")
    parser.add_argument("--models", nargs="+", default=MODELS[:1], choices=MODELS, help="the whole models")
    parser.add_argument("--dim", type=int, default=192, help="channels of core and layer, 64 a head")
    parser.add_argument("--no-dwc", dest="dwc", action="store_false", help="without the depthwise convolution")
    parser.add_argument(
        "--token-side", type=int, default=7,
        help="side of the grid of contrast tokens; 0: half that of the patches, one token for four patches",
    )  # fmt: skip
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--scopes", nargs="+", default=SCOPES, choices=SCOPES)
    parser.add_argument("--steps", nargs="+", default=["forward", "train"], choices=["forward", "train"])
    parser.add_argument(
        "--variants", nargs="+", default=VARIANTS, choices=(*VARIANTS, *PEERS, "vca_fused", CUDNN, *COMPILED, *INT8)
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of which the median is taken")
    parser.add_argument("--slice", type=float, default=0.05, help="seconds that one measurement of the reference takes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="few sizes, few rounds, float32")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder for the results")
    args = parser.parse_args(argv)
    if args.quick:
        args.sides, args.model_sides, args.dtypes, args.rounds, args.slice = [14, 28], [14], ["float32"], 7, 0.02
    if REFERENCE not in args.variants:
        parser.error(f"--variants must name {REFERENCE}, which all are compared with")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    if set(FUSED) & set(args.variants):
        if args.device == "cpu" and cpu.kernels() is None:
            parser.error("vca_fused needs a C++ compiler and ninja, to compile its kernels for this CPU")
        if args.device == "cuda" and ("float32" in args.dtypes or not ops.HAS_TRITON):
            parser.error("vca_fused needs triton on a GPU, and --dtypes bfloat16 or float16")
        if args.device == "cuda" and args.token_side**2 > ops.MAX_TOKENS:
            parser.error(f"vca_fused takes at most {ops.MAX_TOKENS} contrast tokens on a GPU; lower --token-side")
    if CUDNN in args.variants and (args.device == "cpu" or "float32" in args.dtypes):
        parser.error(f"{CUDNN} needs --device cuda, and --dtypes bfloat16 or float16")
    quantizable = args.device == "cpu" and args.steps == ["forward"] and args.dtypes == ["float32"]
    if set(INT8) & set(args.variants) and not (quantizable and "core" not in args.scopes):
        parser.error("int8 is measured on a CPU with --steps forward --dtypes float32 --scopes layer model")
    if set(PEERS) & set(args.variants) and set(args.scopes) != {"layer"}:
        parser.error(f"{' and '.join(PEERS)} are measured as layers alone: --scopes layer")
    if args.dim < HEAD_DIM or args.dim % HEAD_DIM:
        parser.error(f"--dim must be a multiple of {HEAD_DIM}, the channels of a head")
    if min(*args.sides, *args.model_sides, args.batch, args.rounds) < 1 or args.token_side < 0:
        parser.error("sides, batch and rounds must be positive")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    settle_allocator()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    layers = [scope for scope in args.scopes if scope != "model"]
    for scope in [*layers, *(args.models if "model" in args.scopes else [])]:
        for step in args.steps:
            for dtype in args.dtypes:
                for side in args.model_sides if scope in MODELS else args.sides:
                    rows += measure(args, scope, step, dtype, side)
                    newest = rows[-len(args.variants) :]
                    print(table(newest, args.variants).splitlines()[-1], flush=True)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU thread(s)"
    title = f"torch {torch.__version__}, {machine}, batch {args.batch}, C = {args.dim}, {args.dim // HEAD_DIM} heads, "
    tokens = (
        f"{args.token_side}x{args.token_side} contrast tokens" if args.token_side else "a contrast token for 4 patches"
    )
    title += f"{tokens}{'' if args.dwc else ', no depthwise convolution'}"
    title += f"; above 1 is faster than {REFERENCE} (SDPA)"
    text = f"{title}\n\n{table(rows, args.variants)}\n"
    text += f"\n{growth(rows, args.variants)}\n" if max(len(args.sides), len(args.model_sides)) > 1 else ""
    if any(r.floor_ms for r in rows):
        text += f"\n{floors(rows)}\n"
    (args.out / "attention.md").write_text(text, encoding="utf-8")
    (args.out / "attention.json").write_text(json.dumps(dict(title=title, rows=[asdict(r) for r in rows]), indent=1))
    plot(rows, args.variants, args.out / "attention.png")
    print(f"\n{text}\nwritten to {args.out}")


if __name__ == "__main__":
    interruptible(main)
