"""Models leave eager PyTorch: torch.export, ONNX and AOTInductor, at other batch sizes than the example's."""

import shutil
import sys

import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import vca
from tests.helpers.kinds import SMALL, images, make, randomized

BATCH = torch.export.Dim("batch", min=1, max=64)
FAMILIES = [*SMALL]
OPTIONS = [
    dict(attention="vca_stage1"), dict(attention="agent"), dict(attention="mhsa_dwc"), dict(attention="diff"),
    dict(tokens="emb"), dict(pooling="learned"), dict(token_grid=(3, 4)), dict(stage2_softmax="joint"),
]  # fmt: skip


def generator() -> nn.Module:
    return randomized(vca.create_model("vca_sit_xs_4", depth=1, dim=40, num_classes=3)).eval()


def generator_inputs(count: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(count, 3, 32, 32), torch.rand(count), torch.arange(count) % 4


def exported(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    return torch.export.export(model, inputs, dynamic_shapes=({0: BATCH},) * len(inputs))


def assert_same_in_onnx(model: nn.Module, inputs: tuple[torch.Tensor, ...], others: list) -> None:
    program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=({0: BATCH},) * len(inputs), verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    for other in others:
        (got,) = session.run(None, {name: x.numpy() for name, x in zip(names, other, strict=True)})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), model(*other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_exported_for_any_batch(name):
    model = make(name)
    program = exported(model, (images(model),)).module()
    with torch.no_grad():
        for count in (1, 5):
            torch.testing.assert_close(program(images(model, count)), model(images(model, count)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_is_exported_for_any_batch(options):
    model = make("vca_vit_pico_patch4_32", depth=1, **options)
    program = exported(model, (images(model),)).module()
    with torch.no_grad():
        torch.testing.assert_close(program(images(model, 5)), model(images(model, 5)), rtol=0, atol=1e-5)


def test_a_generator_is_exported_for_any_batch():
    model = generator()
    program = exported(model, generator_inputs(2)).module()
    given = generator_inputs(5)
    with torch.no_grad():
        torch.testing.assert_close(program(*given), model(*given), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "vca_vit_pico_patch4_32" else pytest.mark.long) for n in FAMILIES]
)
def test_onnx_runs_other_batches(name):
    model = make(name, **(dict(depth=1) if "vit" in name else {}))
    assert_same_in_onnx(model, (images(model),), [(images(model, count),) for count in (1, 5)])


@pytest.mark.long
def test_onnx_runs_other_batches_of_a_generator():
    assert_same_in_onnx(generator(), generator_inputs(2), [generator_inputs(count) for count in (1, 5)])


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="AOTInductor needs a C++ compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="AOTInductor's package is tried on Linux")
def test_aot_inductor_runs_other_batches(tmp_path):
    model = make("vca_vit_pico_patch4_32", depth=1)
    package = torch._inductor.aoti_compile_and_package(
        exported(model, (images(model),)), package_path=str(tmp_path / "model.pt2")
    )
    compiled = torch._inductor.aoti_load_package(package)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(model, 5)), model(images(model, 5)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["vca", "vca_stage1", "vca_stage2", "agent", "mhsa", "mhsa_dwc", "diff"])
def test_torchvisions_feature_extractor_traces_every_kind(kind):
    """It does not know timm's leaf modules. The graph is traced once, and learns and takes other batches."""
    model = make("vca_vit_pico_patch4_32", attention=kind)
    with torch.no_grad():
        traced = create_feature_extractor(model, {"blocks.0.norm2": "features", "head": "logits"})
        for count in (2, 5):
            assert torch.equal(traced(images(model, count))["logits"], model(images(model, count)))
    traced.train()(images(model))["logits"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.blocks[1].attn.parameters())
    if kind == "vca":
        with pytest.raises(ValueError, match="no masked form"):
            traced(images(model), attn_mask=torch.ones(1))
