"""The generators: exact sizes, official names, sampling by seed and index, guidance, maps, checkpoints."""

import json
import pickle
import sys
from argparse import Namespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vca
from tests.helpers.checkpoints import TINY, tiny
from vca import CheckpointError
from vca.checkpoint import load_official
from vca.diffusion import ddpm, flow
from vca.diffusion.vae import SCALE, SD_VAE, DecoderError, LatentDecoder, sample_latents
from vca.layers.factory import KINDS
from vca.models.dit import MODELS, sincos_positions

SIZES = {
    "dit_s_2": 32_963_360,
    "vca_dit_s_2": 33_606_944,
    "dit_s_4": 32_945_024,
    "vca_dit_s_4": 33_146_240,
    "dit_s_8": 33_148_160,
    "vca_dit_s_8": 33_238_784,
    "dit_b_2": 130_512_416,
    "vca_dit_b_2": 131_791_904,
    "dit_b_4": 130_475_648,
    "vca_dit_b_4": 130_870_400,
    "dit_b_8": 130_881_536,
    "vca_dit_b_8": 131_055_104,
}
GMACS = {"dit_s_2": 6.0557, "vca_dit_s_2": 5.9153, "dit_s_4": 1.4126, "vca_dit_s_4": 1.4058, "vca_dit_b_2": 22.7243}


@pytest.mark.parametrize("name", SIZES)
def test_exact_sizes(name):
    with torch.device("meta"):
        for family in ("dit", "sit"):
            model = vca.create_model(name.replace("dit", family))
            assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[name]
        if name in GMACS:
            with FlopCounterMode(display=False) as counter:
                model(torch.randn(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long))
            assert counter.get_total_flops() / 2e9 == pytest.approx(GMACS[name], abs=5e-5)


def test_every_name_of_the_table_builds():
    assert len(MODELS) == 72 and set(MODELS) <= set(vca.list_models())
    with torch.device("meta"):
        for name, spec in MODELS.items():
            model = vca.create_model(name, depth=1)
            assert model.architecture == name and model.family == spec["family"]


def test_parameters_are_named_as_in_the_official_repositories():
    model = tiny("dit_s_2", depth=1)
    expected = {"pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias", "y_embedder.embedding_table.weight"}
    layers = ["t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    layers += [f"blocks.0.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")]
    expected |= {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(model.state_dict()) == expected
    assert not model.pos_embed.requires_grad
    assert model.y_embedder.embedding_table.num_embeddings == model.num_classes + 1


def test_positions_encode_the_column_then_the_row():
    table = sincos_positions(8, (2, 3))[0].view(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4]) and torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    col = torch.tensor(2.0)
    want = torch.stack([col.sin(), (col / 100).sin(), col.cos(), (col / 100).cos()])
    assert torch.allclose(table[0, 2, :4], want)


def test_time_embedding_takes_flow_times_unscaled():
    embedder = tiny().t_embedder
    embedder.mlp = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False))
    torch.nn.init.eye_(embedder.mlp[0].weight)
    t = torch.tensor([0.0, 0.5, 700.0])
    out = embedder(t)
    frequencies = 10000 ** (-torch.arange(128) / 128)
    assert torch.allclose(out[:, :128], (t[:, None] * frequencies).cos(), atol=1e-4)
    assert torch.allclose(out[:, 128:], (t[:, None] * frequencies).sin(), atol=1e-4)


def test_an_untrained_generator_predicts_zero_from_any_attention():
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 3])
    for attention in KINDS:
        model = vca.create_model("sit_xs_2", **(TINY | dict(attention=attention)))
        assert torch.equal(model(x, t, y), torch.zeros(2, 6, 8, 8))


def test_patches_of_the_output_lie_where_those_of_the_input_do():
    model = vca.create_model("dit_xs_2", **(TINY | dict(input_size=(6, 8)))).eval()
    with torch.no_grad():
        torch.nn.init.normal_(model.final_layer.linear.weight)
        x = torch.randn(1, 3, 6, 8)
        changed = x.clone()
        changed[:, :, 2:4, 6:8] += 1
        t, y = torch.zeros(1), torch.zeros(1, dtype=torch.long)
        difference = (model(x, t, y) != model(changed, t, y))[0]
        where = torch.zeros(6, 8, dtype=torch.bool)
        where[2:4, 6:8] = True
        assert torch.equal(difference.all(0), where) and torch.equal(difference.any(0), where)
        model.final_layer.linear.weight.zero_()
        model.final_layer.linear.bias.copy_(torch.arange(24))
        out = model(x, t, y)[0]
    for channel, row, col in ((0, 0, 0), (5, 0, 1), (2, 3, 6), (4, 5, 7)):
        assert out[channel, row, col] == ((row % 2) * 2 + col % 2) * 6 + channel


@pytest.mark.parametrize("name", ["vca_sit_xs_2", "dit_xs_2"])
def test_a_picture_depends_on_seed_label_and_index_alone(name):
    model = tiny(name)
    for sampler in model.objective.SAMPLERS:
        args = dict(steps=4, guidance_scale=2.0, sampler=sampler)
        whole = model.sample([0, 1, 2, 3], seed=5, **args)
        assert whole.shape == (4, 3, 8, 8) and whole.min() >= 0 and whole.max() <= 1
        first = model.sample([0], seed=5, **args)
        rest = model.sample([1, 2, 3], seed=5, indices=[1, 2, 3], **args)
        assert torch.allclose(whole, torch.cat([first, rest]), atol=1e-5)
        assert torch.equal(whole, model.sample([0, 1, 2, 3], seed=5, **args))
        assert not torch.allclose(whole, model.sample([0, 1, 2, 3], seed=6, **args), atol=0.1)
        assert not torch.allclose(whole[:1], model.sample([0], seed=5, indices=[1], **args), atol=0.1)


def test_guidance_of_one_is_exactly_none():
    model = tiny("dit_xs_2")
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), args[2].max().item())))
    plain = model.sample([0, 1, 2], steps=5)
    assert seen == [(3, 2)] * 5
    noise = vca.diffusion.sampling.normal_noise(0, range(3), model.sample_shape, "cpu")
    with torch.no_grad():
        alone = ddpm.sample_ddpm(lambda x, t: model(x, t, torch.tensor([0, 1, 2])), noise, ddpm.even_times(5))
    assert torch.equal(plain, model.decode(alone))
    seen.clear()
    model.sample([0, 1, 2], steps=5, guidance_scale=1.5)
    assert seen == [(6, 3)] * 5


def test_guidance_extrapolates_the_chosen_channels():
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([10, 500]), torch.tensor([0, 2])
    model = tiny("dit_xs_2")
    with torch.no_grad():
        given, null = model(x, t, y), model(x, t, torch.tensor([3, 3]))
        for channels, guided in ((None, 3), (2, 2)):
            out = model.conditioned(y, 4.0, channels)(x, t)
            assert torch.allclose(out[:, :guided], (null + 4 * (given - null))[:, :guided], atol=1e-5)
            assert torch.allclose(out[:, guided:], given[:, guided:], atol=1e-5)
        assert tiny("sit_xs_2").conditioned(y)(x, t).shape == x.shape


def test_callback_and_times_tell_what_the_network_sees():
    model, states, seen = tiny("vca_dit_xs_2"), [], []
    model.register_forward_pre_hook(lambda module, args: seen.append((args[0].clone(), args[1][0].item())))
    image = model.sample([1], steps=4, callback=lambda step, total, x: states.append((step, total, x)))
    assert [state[:2] for state in states] == [(step, 4) for step in range(5)]
    assert model.times(4) == [t for _, t in seen] == [999, 666, 333, 0]
    assert all(torch.equal(x, state[2]) for (x, _), state in zip(seen, states[:4], strict=True))
    assert torch.equal(model.decode(states[-1][2]), image)


@pytest.mark.parametrize(
    "args, message",
    [
        (dict(labels=[4]), "numbers from 0 to 3"),
        (dict(labels=[]), "numbers from 0 to 3"),
        (dict(labels=[0], sampler="ddim"), "'ddim' is unknown; sit has euler, heun, sde"),
        (dict(labels=[0], steps=0), "steps=0"),
        (dict(labels=[0], indices=[0, 1]), "2 indices for 1 labels"),
    ],
)
def test_impossible_requests_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        tiny().sample(**args)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(attention="none"), "attention='none' is unknown"),
        (dict(input_size=9), "not divisible by patch_size=2"),
        (dict(in_channels=4), "in_channels=4 without a vae"),
        (dict(family="git"), "family='git' is unknown"),
        (dict(token_grid=(5, 5)), "token_grid"),
    ],
)
def test_impossible_models_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


def test_a_small_flow_learns():
    model = vca.create_model("vca_sit_xs_2", **TINY)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    x = torch.ones(16, 3, 8, 8) * torch.tensor([-0.8, 0.0, 0.8])[torch.arange(16) % 3].view(-1, 1, 1, 1)
    losses = []
    for _ in range(60):
        loss = model.loss(x, torch.arange(16) % 3, torch.randn_like(x), flow.logit_normal(torch.randn(16))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("attention", ["vca", "mhsa"])
def test_recorded_maps_reproduce_the_attention(attention):
    """Without prefix tokens, over the grid of patches; E v times the gains, plus the convolution, is the output."""
    model = tiny(attention=attention).double()
    inputs, outputs = [], []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
        block.attn.register_forward_hook(lambda layer, args, out: outputs.append(out))
    with torch.no_grad(), vca.record(model) as maps:
        model(torch.randn(2, 3, 8, 8).double(), torch.rand(2).double(), torch.tensor([0, 3]))
        assert len(maps) == 2
        for block, layer_maps, x, out in zip(model.blocks, maps, inputs, outputs, strict=True):
            assert layer_maps.kind == attention and tuple(layer_maps.grid_size) == (4, 4)
            assert layer_maps.num_prefix_tokens == 0 and layer_maps.effective.shape == (2, 2, 16, 16)
            layer = block.attn
            v = layer.qkv(x)[..., 32:].unflatten(2, (2, 8)).transpose(1, 2)
            heads = layer_maps.effective @ v
            if attention == "vca":
                assert layer_maps.stage1.positive.shape == (2, 2, 4, 16)
                heads = heads * layer.stage1.norm.weight * layer.stage2.norm.weight
                heads = heads + layer.dwc(v.transpose(2, 3).reshape(2, 16, 4, 4)).view(2, 2, 8, 16).transpose(2, 3)
            assert torch.allclose(layer.proj(heads.transpose(1, 2).flatten(2)), out, atol=1e-10)


def test_maps_of_every_timestep_are_those_of_the_state_the_network_saw():
    """The callback after a step reads what the network attended to in it; guidance puts the null class second."""
    model = tiny()
    states, recorded = [], []

    def callback(step, total, x):
        states.append(x)
        recorded.extend([[layer.effective for layer in maps]] if step else [])

    with vca.record(model) as maps:
        model.sample([0, 2], steps=3, guidance_scale=2.0, callback=callback)
    assert len(recorded) == 3 and not torch.allclose(recorded[0][1], recorded[2][1], atol=1e-3)
    for x, t, by_layer in zip(states, model.times(3), recorded, strict=False):
        with torch.no_grad(), vca.record(model) as maps:
            model(torch.cat([x, x]), torch.full((4,), t), torch.tensor([0, 2, 3, 3]))
        for layer, effective in zip(maps, by_layer, strict=True):
            assert effective.shape == (4, 2, 16, 16) and torch.allclose(layer.effective, effective, atol=1e-5)
            assert torch.allclose(layer.effective @ layer.values, layer.gathered, atol=1e-5)


@pytest.fixture
def official(tmp_path):
    """A file as the official repositories publish it, and the model it was made from."""
    model = tiny("dit_xs_2")
    torch.save(model.state_dict(), tmp_path / "official.pt")
    return model, tmp_path / "official.pt"


def test_official_checkpoints_load(official, tmp_path):
    model, file = official
    training = dict(model={}, ema=model.state_dict(), opt={}, args=Namespace(lr=1e-4))
    torch.save(training, tmp_path / "training.pt")
    for path in (file, tmp_path / "training.pt"):
        fresh = vca.create_model("dit_xs_2", **TINY).eval()
        load_official(fresh, path)
        assert torch.equal(fresh.sample([0], steps=2), model.sample([0], steps=2))


def test_official_checkpoints_that_do_not_fit_are_refused(official, tmp_path):
    model, file = official
    good, bad = model.state_dict(), tmp_path / "bad.pt"

    def refuse(stored, message):
        torch.save(stored, bad)
        with pytest.raises(CheckpointError, match=message):
            load_official(vca.create_model("dit_xs_2", **TINY), bad)

    refuse({**good, "extra": torch.ones(1)}, r"bad\.pt: unexpected extra")
    refuse({k: v for k, v in good.items() if k != "pos_embed"}, "missing pos_embed")
    refuse({**good, "pos_embed": torch.zeros(1, 9, 16)}, r"pos_embed is \(1, 9, 16\) instead of \(1, 16, 16\)")
    refuse({**good, "final_layer.linear.bias": torch.full((24,), torch.nan)}, "NaN")
    refuse({"epoch": 3}, "dictionary of tensors")
    refuse([1, 2], "dictionary of tensors")
    with pytest.raises(CheckpointError, match=r"missing blocks\.0\.attn\.dwc"):
        load_official(vca.create_model("vca_dit_xs_2", **TINY), file)
    bad.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(CheckpointError, match="not a checkpoint that can be read safely"):
        load_official(vca.create_model("dit_xs_2", **TINY), bad)
    with pytest.raises(CheckpointError, match="file not found"):
        load_official(model, tmp_path / "none.pt")


class Evil:
    def __reduce__(self):
        return sys.exit, ("a checkpoint ran code",)


def test_checkpoints_come_back_and_damaged_ones_do_not(tmp_path):
    model = tiny("vca_dit_xs_2", token_grid=(3, 2), attention="vca_stage1")
    vca.save(model, tmp_path / "c", label_names=["a", "b", "c"], training=[{"seed": 1}])
    loaded = vca.load(tmp_path / "c")
    assert loaded.label_names == ["a", "b", "c"] and loaded.training_history == [{"seed": 1}]
    assert loaded.blocks[0].attn.token_grid == (3, 2) and not loaded.training
    assert torch.equal(loaded.sample([0, 3], steps=3), model.sample([0, 3], steps=3))

    file = tmp_path / "c" / "config.json"
    config = json.loads(file.read_text())
    checksums = {"weights_sha256", "config_sha256"}
    assert set(config) == {"architecture", "num_classes", "label_names", "model_args", "training"} | checksums
    for change, message in (
        (dict(pretrained_cfg={}), "unknown field pretrained_cfg"),
        (dict(model_args={**config["model_args"], "speed": 2}), "cannot build vca_dit_xs_2.*speed"),
        (dict(model_args={**config["model_args"], "depth": 3}), "missing blocks.2"),
        (dict(architecture="vca_dit_xs_3"), "unknown architecture|pretrained_cfg is missing"),
        (dict(label_names=["a"]), "1 label_names for 3 classes"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            vca.load(tmp_path / "c")
    with pytest.raises(ValueError, match="2 label names for a model with 3 classes"):
        vca.save(model, tmp_path / "d", label_names=["a", "b"])


def test_what_suits_a_checkpoint_best_comes_back_with_it_and_is_checked(tmp_path):
    model = tiny("sit_xs_2")
    model.sampling = dict(steps=2, guidance_scale=3, guidance_interval=[0.5, 1.0], time_shift=0.5)
    vca.save(model, tmp_path, label_names=["a", "b", "c"])
    loaded = vca.load(tmp_path)
    assert loaded.sampling == model.sampling
    expected = model.sample([0], steps=2, guidance_scale=3, guidance_interval=(0.5, 1), time_shift=0.5)
    assert torch.equal(loaded.sample(["a"], **loaded.sampling), expected)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["config_sha256"]
    for change, message in (
        (dict(steps=0), "sampling.steps = 0 must be a whole number from 1 to 1000"),
        (dict(steps=True), "sampling.steps"),
        (dict(guidance_scale="3"), "sampling.guidance_scale = '3' must be from 0 to 100"),
        (dict(guidance_scale=float("nan")), "sampling.guidance_scale"),
        (dict(guidance_interval=[0.6, 0.5]), "sampling.guidance_interval = .* must be two rising numbers"),
        (dict(guidance_interval=0.5), "sampling.guidance_interval"),
        (dict(time_shift=0), "sampling.time_shift"),
        (dict(sampler="x"), "unknown field sampling.sampler"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | dict(sampling=change)))
        with pytest.raises(CheckpointError, match=message):
            vca.load(tmp_path)
    assert vca.create_model("sit_xs_2").sampling == {}


def test_a_missing_autoencoder_is_named_before_sampling(monkeypatch, tmp_path):
    model = tiny("sit_xs_2", in_channels=4, vae=str(tmp_path / "nowhere"))
    model.forward = None
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DecoderError, match=r"pip install diffusers.*nowhere"):
        model.sample([0], steps=2)


def test_latents_through_an_autoencoder(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers, which has the autoencoder, is not installed")
    for source, words in ((str(tmp_path / "nowhere"), "nowhere: it is no"), (SD_VAE, r"\(335 MB\): it is no folder")):
        with pytest.raises(DecoderError, match=words):
            LatentDecoder(source).load("cpu")
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    theirs = diffusers.AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4).eval()
    theirs.save_pretrained(tmp_path / "vae")
    model = tiny("vca_sit_xs_2", in_channels=4, vae=str(tmp_path / "vae"))
    assert not any("decoder" in key for key in model.state_dict())
    states = []
    image = model.sample([0], steps=2, callback=lambda step, total, x: states.append(x))
    with torch.no_grad():
        want = (theirs.decode(states[-1] / 0.18215).sample / 2 + 0.5).clamp(0, 1)
        assert image.shape == (1, 3, 16, 16) and torch.allclose(image, want, atol=1e-6)
        pixels = torch.rand(2, 3, 16, 16) * 2 - 1
        posterior = theirs.encode(pixels).latent_dist
        moments = model.latent_decoder.moments(pixels)
        assert torch.allclose(sample_latents(moments, torch.zeros(2, 4, 8, 8)), SCALE * posterior.mode())
        torch.manual_seed(3)
        normal = torch.randn(2, 4, 8, 8)
        torch.manual_seed(3)
        assert torch.allclose(sample_latents(moments, normal), SCALE * posterior.sample(), atol=1e-6)
