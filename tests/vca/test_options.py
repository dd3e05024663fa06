"""Options of the kinds of attention: learned pooling, and what contradicts itself."""

import pytest
import torch

import vca
from tests.helpers.kinds import BACKBONES, make
from vca import functional as VF
from vca.layers.factory import token_grids

CELLS = [((4, 6), (2, 3)), ((5, 7), (3, 4)), ((14, 14), (8, 8)), ((3, 3), (3, 3))]


@pytest.mark.parametrize("grid, cells", CELLS, ids=str)
def test_learned_pooling_starts_as_the_average(grid, cells):
    q = torch.randn(2, grid[0] * grid[1], 12)
    assert torch.equal(VF.pool_queries(q, grid, cells, torch.zeros(3, 4)), VF.pool_queries(q, grid, cells))


@pytest.mark.parametrize("grid, cells", CELLS, ids=str)
def test_learned_pooling_weights_the_patches_of_a_cell_by_a_softmax(grid, cells):
    (rows, cols), heads, d = grid, 3, 4
    q, a = torch.randn(2, rows * cols, heads * d, dtype=torch.float64), torch.randn(heads, d, dtype=torch.float64)
    got = VF.pool_queries(q, grid, cells, a).unflatten(1, cells).unflatten(-1, (heads, d))
    image = q.view(2, rows, cols, heads, d)
    for i in range(cells[0]):
        for j in range(cells[1]):
            top, bottom = i * rows // cells[0], -(-(i + 1) * rows // cells[0])
            left, right = j * cols // cells[1], -(-(j + 1) * cols // cells[1])
            cell = image[:, top:bottom, left:right].flatten(1, 2)
            weights = (cell * a).sum(-1).softmax(1)
            torch.testing.assert_close(got[:, i, j], (weights[..., None] * cell).sum(1), rtol=0, atol=1e-12)


def test_learned_pooling_of_extreme_scores_is_finite():
    q = torch.randn(1, 16, 8) * 1000
    for dtype in (torch.float32, torch.bfloat16):
        query = torch.full((2, 4), 100.0, requires_grad=True)
        pooled = VF.pool_queries(q.to(dtype), (4, 4), (2, 2), query)
        pooled.sum().backward()
        assert pooled.isfinite().all() and query.grad.isfinite().all() and pooled.dtype == torch.float32


@pytest.mark.parametrize("name", [*BACKBONES, "pvt_tiny", "cswin_tiny"])
def test_unknown_kinds_are_refused_by_all(name):
    with pytest.raises(
        ValueError, match="attention='linear' is unknown; choose one of vca, mhsa, mhsa_dwc, vca_stage1"
    ):
        make(name, attention="linear")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_tokens=50), "num_tokens=50 is not a square; give token_grid"),
        (dict(num_tokens=0), "num_tokens=0 is not a square"),
        (dict(num_tokens=4, token_grid=(2, 2)), "are both given; give one"),
        (dict(num_tokens=10000), r"token_grid=\(100, 100\) must lie between 1x1"),
        (dict(attention="agent", token_grid=(30, 30)), r"token_grid=\(30, 30\) must lie between 1x1"),
        (dict(pooling="max"), "pooling='max' is unknown; choose one of avg, learned"),
        (dict(pooling="learned", tokens="emb"), "pooling='learned' has nothing to pool"),
        (dict(attention="vca_stage1", stage2_softmax="joint"), "stage2_softmax='joint' needs both streams in Stage II"),
        (dict(token_grid=[(2, 2)] * 7), "7 token grids are given for"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", BACKBONES)
def test_contradictory_options_are_refused_in_words(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **(dict(token_grid=None if "num_tokens" in options else (2, 2)) | options))


def test_token_grids_for_stages():
    default = [(3, 3), (4, 4)]
    assert token_grids(None, None, default) == default
    assert token_grids([2, 3], None, default) == [(2, 3)] * 2
    assert token_grids([[1, 2], [2, 2]], None, default) == [(1, 2), (2, 2)]
    assert token_grids(None, 9, default) == [(3, 3)] * 2
    assert token_grids(None, [4, 1], default) == [(2, 2), (1, 1)]


def test_layers_refuse_masks_wrong_lengths_and_no_contrast_at_all():
    place = dict(grid_size=(4, 4), token_grid=(2, 2))
    for kind in ("vca", "agent", "mhsa_dwc"):
        layer = vca.create_attention(kind, 8, 2, **place)
        with pytest.raises(ValueError, match="not supported"):
            layer(torch.randn(1, 16, 8), is_causal=True)
        with pytest.raises(ValueError, match=r"got 15 tokens, but this layer is set to 0 prefix tokens and a 4x4 grid"):
            layer(torch.randn(1, 15, 8))
        assert layer(torch.randn(1, 24, 8), grid_size=(4, 6)).shape == (1, 24, 8)
    coarser = vca.create_attention("vca", 8, 2, **place)(torch.randn(1, 5, 8), grid_size=(1, 5))
    assert coarser.isfinite().all(), "a trained layer runs on any grid"
    with pytest.raises(ValueError, match="one stage at least must be differential"):
        vca.VisualContrastAttention(8, 2, **place, stage1_differential=False, stage2_differential=False)
    with pytest.raises(ValueError, match="dim=9 is not divisible by num_heads=2"):
        vca.create_attention("agent", 9, 2, **place)
    with pytest.raises(ValueError, match="'diff' halves the heads"):
        vca.create_attention("diff", 6, 2, **place)
