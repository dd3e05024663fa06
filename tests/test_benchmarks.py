"""The benchmarks at toy sizes: every variant computes what its name says, the tables name what was measured."""

import json
import types

import pytest
import torch

from benchmarks import attention, table


def test_the_speed_benchmark_writes_table_plot_and_numbers(tmp_path, capsys):
    threads = torch.get_num_threads()
    variants = ["mhsa", "vca", "vca_maps"]
    sizes = ["--sides", "4", "--model-sides", "2", "--token-side", "2", "--dtypes", "float32", "--variants", *variants]
    attention.main([*sizes, "--rounds", "1", "--slice", "0.001", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    scopes = {(r["scope"], r["step"], r["dtype"], r["patches"]) for r in rows}
    assert len(rows) == len(scopes) * len(variants) and len(scopes) == 3 * 2
    assert all(r["ms"] > 0 and r["peak_mb"] > 0 for r in rows)
    text = (tmp_path / "attention.md").read_text()
    assert text in capsys.readouterr().out and text.count("| core |") == text.count("| model |") == 2
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_the_variants_of_a_layer_agree_where_they_must():
    """The paths of one layer give one output; another kind of attention gives another."""
    x = torch.randn(1, 16, attention.DIM, generator=torch.Generator().manual_seed(0))
    outputs = {}
    for variant in attention.VARIANTS:
        torch.manual_seed(0)
        layer = attention.finish(attention.make_layer(variant, 4, 2), variant).eval()
        with torch.no_grad():
            outputs[variant] = layer(x)
    torch.testing.assert_close(outputs["mhsa_eager"], outputs["mhsa"])
    torch.testing.assert_close(outputs["vca_maps"], outputs["vca"])
    different = [outputs[variant] for variant in ("mhsa", "vca", "diff", "agent", "mhsa_dwc")]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(different) for b in different[:i])


def test_the_reference_is_fused_attention():
    layer = attention.finish(attention.make_layer(attention.REFERENCE, 4, 2), attention.REFERENCE)
    assert type(layer) is attention.Attention and layer.fused_attn
    assert not attention.finish(attention.make_layer("mhsa_eager", 4, 2), "mhsa_eager").fused_attn


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
        (["--variants", "mhsa", "vca_fused"], "vca_fused needs a C++ compiler and ninja"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(attention.torch, "cuda", types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setattr(attention.cpu_kernels, "kernels", lambda: None)
    with pytest.raises(SystemExit):
        attention.parse(arguments)
    assert message in capsys.readouterr().err


def test_the_table_of_sizes_stands_beside_the_print(capsys, monkeypatch):
    names = ("vca_deit_tiny_patch16_224", "vca_deit_base_patch16_224")
    monkeypatch.setattr(table, "PRINTED", {name: table.PRINTED[name] for name in names})
    table.main()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| `vca_deit_tiny_patch16_224` | 5,973,928 | 1.2124 | 6.0 M | 1.2 |  |",
        "| `vca_deit_base_patch16_224` | 87,570,664 | 17.3985 | - | - |  |",
    ]
