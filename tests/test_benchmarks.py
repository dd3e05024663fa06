"""The benchmarks at toy sizes: every variant computes what its name says, the tables name what was measured."""

import json
import types

import pytest
import torch

from benchmarks import attention, report
from scripts import model_sizes


def test_the_speed_benchmark_writes_table_plot_and_numbers(tmp_path, capsys):
    threads = torch.get_num_threads()
    variants = ["mhsa", "vca", "vca_maps"]
    models = ["--models", "deit_tiny_patch16_224", "sit_s_2", "--no-dwc", "--dim", "64"]
    sizes = [
        *models,
        "--sides",
        "4",
        "--model-sides",
        "2",
        "--token-side",
        "2",
        "--dtypes",
        "float32",
        "--variants",
        *variants,
    ]
    attention.main([*sizes, "--rounds", "1", "--slice", "0.001", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    scopes = {(r["scope"], r["step"], r["dtype"], r["patches"]) for r in rows}
    assert len(rows) == len(scopes) * len(variants) and len(scopes) == 4 * 2
    assert all(r["ms"] > 0 and r["peak_mb"] > 0 for r in rows)
    text = (tmp_path / "attention.md").read_text()
    assert text in capsys.readouterr().out
    assert all(text.count(f"| {scope} |") == 2 for scope in ("core", "layer", "deit_tiny_patch16_224", "sit_s_2"))
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_the_variants_of_a_layer_agree_where_they_must():
    """The paths of one layer give one output; another kind of attention gives another."""
    x = torch.randn(1, 16, 192, generator=torch.Generator().manual_seed(0))
    outputs = {}
    for variant in attention.VARIANTS:
        torch.manual_seed(0)
        layer = attention.finish(attention.make_layer(variant, 192, 4, 2), variant).eval()
        with torch.no_grad():
            outputs[variant] = layer(x)
    torch.testing.assert_close(outputs["mhsa_eager"], outputs["mhsa"])
    torch.testing.assert_close(outputs["vca_maps"], outputs["vca"])
    different = [outputs[variant] for variant in ("mhsa", "vca", "diff", "agent", "mhsa_dwc")]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(different) for b in different[:i])
    torch.manual_seed(0)
    quantized = attention.finish(attention.make_layer("mhsa_int8", 192, 4, 2), "mhsa_int8")
    assert 1e-5 < (quantized(x) - outputs["mhsa"]).abs().max() < 0.05


def test_the_exponent_of_growth_is_that_of_the_times():
    def row(patches: int, ms: float, variant: str) -> report.Row:
        return report.Row("layer", "forward", "float32", patches, variant, ms, 1.0)

    rows = [row(n, 3 * n**power, name) for n in (64, 196, 784) for name, power in (("mhsa", 2), ("vca", 1.25))]
    assert "| layer | forward | float32 | 64 to 784 | 2.00 | 1.25 |" in report.growth(rows, ["mhsa", "vca"])


@pytest.mark.parametrize("name", attention.PEERS)
def test_other_linear_kinds_are_layers_of_the_same_width(name, capsys):
    layer, x = attention.make_layer(name, 192, 4, 2).eval(), torch.randn(2, 16, 192)
    with torch.no_grad():
        out = layer(x)
        mixed = layer(torch.cat([x[:, :1] + 1, x[:, 1:]], dim=1))
    assert out.shape == x.shape and (out[:, 5:] - mixed[:, 5:]).abs().max() > 1e-6, "patches see one another"
    with pytest.raises(SystemExit):
        attention.parse(["--variants", "mhsa", name])
    assert "--scopes layer" in capsys.readouterr().err
    assert attention.parse(["--variants", "mhsa", name, "--scopes", "layer"]).variants == ["mhsa", name]


def test_a_token_for_four_patches():
    args = attention.parse(["--token-side", "0"])
    assert [attention.tokens_of(args, side) for side in (1, 8, 14)] == [1, 4, 7]
    assert attention.tokens_of(attention.parse([]), 5) == 5


def test_the_reference_is_fused_attention():
    layer = attention.finish(attention.make_layer(report.REFERENCE, 192, 4, 2), report.REFERENCE)
    assert type(layer) is attention.Attention and layer.fused_attn
    assert not attention.finish(attention.make_layer("mhsa_eager", 192, 4, 2), "mhsa_eager").fused_attn


def test_the_roofline_is_that_of_bytes_or_of_products(monkeypatch):
    args = types.SimpleNamespace(batch=2, dim=384, token_side=7, device="cuda")
    monkeypatch.setattr(attention, "rates", lambda device, dtype: (1e9, 1e12))
    tensor = 2 * 1024 * 384 * 2  # bytes of a sequence in bfloat16
    assert attention.floor(args, "forward", torch.bfloat16, 32, "vca_fused") == 5 * tensor / 1e9
    assert attention.floor(args, "train", torch.bfloat16, 32, "vca") == 14 * tensor / 1e9
    assert attention.floor(args, "forward", torch.bfloat16, 32, "agent") is None
    monkeypatch.setattr(attention, "rates", lambda device, dtype: (1e12, 1e9))
    assert attention.floor(args, "forward", torch.bfloat16, 32, "mhsa") == 4 * 2 * 1024**2 * 384 / 1e9
    assert attention.floor(args, "forward", torch.bfloat16, 32, "vca") == 2 * 6 * 2 * 1024 * 49 * 384 / 1e9
    rows = [report.Row("core", "forward", "bfloat16", 1024, v, 3.0, 1.0, 1.5) for v in ("mhsa", "vca")]
    assert report.floors(rows).splitlines()[-1] == "| core | forward | bfloat16 | 1024 | vca | 3 | 1.5 | 2.00 |"


def test_peak_memory_counts_what_is_held_at_one_time():
    def run():
        kept = torch.zeros(1000, 1000)
        for _ in range(3):
            kept + 1

    assert attention.peak_memory(run, "cpu") == pytest.approx(8e6, rel=0.01)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variants", "vca"], "--variants must name mhsa"),
        (["--rounds", "0"], "sides, batch and rounds must be positive"),
        (["--device", "cuda"], "there is no CUDA device"),
        (["--dim", "100"], "--dim must be a multiple of 64"),
        (["--variants", "mhsa", "mhsa_cudnn"], "mhsa_cudnn needs --device cuda"),
        (["--variants", "mhsa", "vca_fused"], "vca_fused needs a C++ compiler and ninja"),
        (["--variants", "mhsa", "mhsa_int8", "--steps", "forward"], "int8 is measured on a CPU with"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(attention.torch, "cuda", types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setattr(attention.cpu, "kernels", lambda: None)
    with pytest.raises(SystemExit):
        attention.parse(arguments)
    assert message in capsys.readouterr().err


def test_the_table_of_sizes_stands_beside_the_print(capsys, monkeypatch):
    names = ("vca_deit_tiny_patch16_224", "vca_deit_base_patch16_224")
    monkeypatch.setattr(model_sizes, "PRINTED", {name: model_sizes.PRINTED[name] for name in names})
    model_sizes.main()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| `vca_deit_tiny_patch16_224` | 5,973,928 | 1.2124 | 6.0 M | 1.2 |  |",
        "| `vca_deit_base_patch16_224` | 87,570,664 | 17.3985 | - | - |  |",
    ]
