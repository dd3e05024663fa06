"""Recipes: bases, heads, costs, a few steps at true size; and that timm's parts do what a recipe says."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.optim import create_optimizer_v2

import vca
from training import autoencoder, classify, generate, transfer
from training.core import autoencoder_recipe, classifier_recipe, cost, generator_recipe, transfer_recipe
from training.core import recipe as recipes
from training.core.distributed import World
from training.core.init import build_model
from training.core.precision import bf16_slowdown
from training.core.recipe import RecipeError
from training.core.run import RunError, RunFolder
from training.core.trainer import Trainer
from training.data.batches import epoch_order, repeated_order

CPU = torch.device("cpu")
MODULES = dict(autoencoder=autoencoder, classify=classify, generate=generate, transfer=transfer)
KINDS = dict(
    autoencoder=autoencoder_recipe.AutoencoderRecipe,
    classify=classifier_recipe.ClassifierRecipe,
    generate=generator_recipe.GeneratorRecipe,
    transfer=transfer_recipe.TransferRecipe,
)
ROWS = [name for name in recipes.names() if name.startswith("imagenet")]


def read(name, **overrides):
    kind = KINDS[recipes.task(name)]
    return recipes.read(name, kind, {key: str(value) for key, value in overrides.items()})


def test_there_is_a_recipe_for_every_row_of_the_paper_and_its_controls():
    for model in ("deit_tiny", "deit_small", "pvt_tiny", "swin_tiny", "cswin_tiny", "dit_s_2", "dit_s_4", "dit_b_2",
                  "sit_s_2", "sit_b_2", "pvt_small", "pvt_medium", "swin_small", "swin_base", "cswin_small", "dit_s_8",
                  "dit_b_4", "dit_b_8", "sit_s_8", "sit_b_4", "sit_b_8"):  # fmt: skip
        ours, baseline = read(f"imagenet_vca_{model}"), read(f"imagenet_{model}")
        assert ours.model.startswith("vca_") and not baseline.model.startswith("vca_")
        assert replace(ours, model=baseline.model) == baseline
    for model in ("deit_tiny", "dit_s_2"):
        whole = read(f"imagenet_vca_{model}")
        for row, keys in dict(
            stage1=dict(attention="vca_stage1"), stage2=dict(attention="vca_stage2"), diff=dict(attention="diff"),
            emb=dict(tokens="emb"), no_dwc=dict(dwc=False), mhsa_dwc=dict(attention="mhsa_dwc"),
            agent=dict(attention="agent"),
        ).items():  # fmt: skip
            assert read(f"imagenet_vca_{model}_{row}") == replace(whole, **keys)
    for model in ("deit_tiny", "deit_small", "pvt_tiny", "swin_tiny", "cswin_tiny", "dit_s_2", "sit_s_2"):
        joint = replace(read(f"imagenet_vca_{model}"), stage2_softmax="joint")
        assert read(f"imagenet_vca_{model}_joint") == joint


@pytest.mark.parametrize("name", ROWS)
def test_the_head_of_a_row_says_all_that_one_wants_to_know(name):
    text = recipes.shipped(name).read_text()
    head = text.partition("\n\n")[0]
    module = recipes.task(name)
    for start in ("1 GPU: python -m", "8 GPUs: torchrun --nproc-per-node 8 -m"):
        assert f"# {start} training.{module} {name} --data" in head
    for start in ("Source: ", "Machines: torchrun --nnodes 2", "Cost: ", "Expected: "):
        assert f"\n# {start}" in head


SETTINGS = {  # what the papers and their code state
    "imagenet_vca_deit_tiny": dict(lr=1e-3, warmup=1e-6, min=1e-5, warmup_epochs=5, clip=0, repeats=3, path=0.1, ema=0),
    "imagenet_vca_deit_tiny_agent_code": dict(lr=4e-3, warmup=4e-6, min=4e-5, warmup_epochs=20, clip=5, repeats=1,
                                              path=0, ema=0),
    "imagenet_vca_deit_small_agent_code": dict(lr=1e-3, warmup=1e-6, min=1e-5, warmup_epochs=20, clip=5, repeats=1,
                                               path=0.1, ema=0),
    "imagenet_vca_pvt_tiny_agent_code": dict(lr=1e-3, warmup=2e-6, min=2e-5, warmup_epochs=5, clip=0, repeats=1,
                                             path=0.1, ema=0),
    "imagenet_vca_swin_tiny": dict(lr=1e-3, warmup=1e-6, min=1e-5, warmup_epochs=20, clip=5, repeats=1, path=0.2,
                                   ema=0),
    "imagenet_vca_cswin_tiny": dict(lr=1e-3, warmup=2e-6, min=2e-5, warmup_epochs=20, clip=0, repeats=1, path=0.2,
                                    ema=0.99984),
    "imagenet_vca_pvt_small": dict(lr=1e-3, warmup=1e-6, min=1e-5, warmup_epochs=5, clip=0, repeats=3, path=0.1, ema=0),
    "imagenet_vca_pvt_medium": dict(lr=1e-3, warmup=1e-6, min=1e-5, warmup_epochs=5, clip=1, repeats=3, path=0.3,
                                    ema=0),
    "imagenet_vca_swin_small": dict(lr=1e-3, warmup=1e-6, min=1e-5, warmup_epochs=20, clip=5, repeats=1, path=0.3,
                                    ema=0),
    "imagenet_vca_swin_base": dict(lr=1e-3, warmup=1e-6, min=1e-5, warmup_epochs=20, clip=5, repeats=1, path=0.5,
                                   ema=0),
    "imagenet_vca_cswin_small": dict(lr=1e-3, warmup=2e-6, min=2e-5, warmup_epochs=20, clip=0, repeats=1, path=0.4,
                                     ema=0.99984),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_the_learning_rate_at_chosen_steps(name):
    stated, recipe = SETTINGS[name], read(name)
    per_epoch, parameter = 100, torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=recipe.lr * recipe.lr_scale)
    schedule = classify.create_scheduler(recipe, optimizer, per_epoch)

    def lr(step):
        schedule.step_update(step)
        return optimizer.param_groups[0]["lr"]

    warm, end = stated["warmup_epochs"] * per_epoch, 300 * per_epoch
    assert lr(0) == pytest.approx(stated["warmup"])
    assert lr(warm // 2) == pytest.approx((stated["lr"] + stated["warmup"]) / 2)
    for step in (warm, end // 2, end - 1):
        cosine = (1 + math.cos(math.pi * step / end)) / 2
        assert lr(step) == pytest.approx(stated["min"] + (stated["lr"] - stated["min"]) * cosine)
    if recipe.epochs > 300:
        assert lr(end) == lr(recipe.epochs * per_epoch - 1) == pytest.approx(stated["min"])
    assert recipe.epochs - recipe.cooldown_epochs == 300
    assert (recipe.clip_grad, recipe.repeats, recipe.drop_path) == (stated["clip"], stated["repeats"], stated["path"])
    assert recipe.ema_decay == stated["ema"]
    assert recipe.auto_augment == "rand-m9-mstd0.5-inc1" and recipe.erasing == 0.25


@pytest.mark.parametrize(
    "name", ["vca_deit_tiny", "deit_tiny", "vca_pvt_tiny", "vca_swin_tiny", "vca_cswin_tiny", "vca_deit_tiny_diff"]
)
def test_nothing_but_weights_of_products_is_decayed_and_drop_paths_rise_to_the_recipes_rate(name):
    recipe = read(f"imagenet_{name}", drop_path=0.2)
    with torch.device("meta"):
        model, _ = build_model(recipe, [""] * 1000, None, drop_path_rate=recipe.drop_path)
    groups = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=recipe.weight_decay).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    named = {id(parameter): key for key, parameter in model.named_parameters()}
    decayed = {named[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert all(key.endswith("weight") and "norm" not in key for key in decayed)
    left = named.keys() - {id(p) for group in groups for p in group["params"]}
    assert not left
    spared = set(named.values()) - decayed
    for part in ("lambda_", "positive_embed", "negative_embed", "pos_embed", "cls_token", "bias", "norm"):
        assert all(key in spared for key in named.values() if part in key)

    for layer_decay in (0.0, 0.75):
        optimizer = classify.create_optimizer(replace(recipe, embed_decay=True, layer_decay=layer_decay), model, model)
        more = {named[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        assert more - decayed == {key for key in spared if key.endswith(("positive_embed", "negative_embed"))}
        optimizer = classify.create_optimizer(replace(recipe, layer_decay=layer_decay), model, model)
        same = {named[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        assert same == decayed

    blocks = [module for module in model.modules() if hasattr(module, "drop_path1")]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.2 * i / (len(blocks) - 1) for i in range(len(blocks))])
    assert rates == [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks]


def test_half_of_the_groups_are_mixed_by_cutmix_and_half_by_mixup():
    recipe = read("imagenet_vca_deit_tiny", batch_size=1024)
    mix = classify.create_mix(recipe, num_classes=3)
    x, y = torch.randn(1024, 1, 4, 4), torch.arange(1024) % 3
    cut = shares = 0
    for step in range(20):
        mixed, labels = mix(step, x.clone(), y)
        assert labels.shape == (1024, 3) and torch.allclose(labels.sum(1), torch.ones(1024), atol=1e-5)
        for group, source in zip(mixed.split(64), x.split(64), strict=True):
            pasted = ((group == source) | (group == source.flip(0))).all()
            cut += int(pasted)
            shares += 1
    assert shares == 320 and abs(cut / shares - 0.5) < 0.1  # three standard deviations are 0.084


def test_mixing_does_not_depend_on_the_number_of_processes():
    recipe = read("imagenet_vca_deit_tiny", batch_size=256)
    x, y = torch.randn(256, 1, 4, 4), torch.arange(256) % 3
    whole = classify.create_mix(recipe, 3)(7, x.clone(), y)
    for size in (2, 4):
        parts = []
        for rank in range(size):
            world = World(rank, size)
            rows = world.rows(256)
            parts.append(classify.create_mix(recipe, 3, world)(7, x[rows].clone(), y[rows]))
        for one, many in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(one, torch.cat(many))
    with pytest.raises(RecipeError, match="set --mix-group 32"):
        classify.create_mix(recipe, 3, World(0, 8))
    with pytest.raises(ValueError, match="cannot be shared equally by 3"):
        World(0, 3).rows(256)


def test_repeated_augmentation_visits_what_timms_sampler_visits():
    order = epoch_order(1000, seed=0, epoch=0)
    indices, copies = repeated_order(order, repeats=3, groups=4, batch_size=64)
    assert len(indices) == 960 and set(copies.tolist()) == {0, 1, 2}
    assert len({*zip(indices.tolist(), copies.tolist(), strict=True)}) == 960
    for rank in range(4):
        sampler = RepeatAugSampler(range(1000), num_replicas=4, rank=rank, shuffle=False, num_repeats=3)
        ours = indices.view(-1, 4, 16)[:, rank].flatten()
        theirs = order[torch.tensor(list(sampler))]
        count = min(len(ours), len(theirs))
        assert count > 190 and torch.equal(ours[:count], theirs[:count])
    plain, copies = repeated_order(order, repeats=1, groups=1, batch_size=64)
    assert torch.equal(plain, order[:960]) and not copies.any()


@pytest.mark.parametrize("warmup, step, decay", [(False, 5, 0.9), (True, 5, 1 - 5 ** (-2 / 3)), (True, 10**6, 0.9)])
def test_the_average_of_the_weights_decays_as_the_recipe_says(tmp_path, warmup, step, decay):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    class Constant:
        def step_update(self, step):
            pass

    settings = dict(precision="fp32", ema_decay=0.9, ema_warmup=warmup, clip_grad=0.0, micro_batch=0, compile=False)
    recipe = replace(read("cifar10_vca"), **settings)
    folder = RunFolder(tmp_path, recipe)
    trainer = Trainer(folder, model, lambda model, x: model(x).mean(), optimizer, Constant(), recipe, device=CPU)
    trainer.step = step - 1
    trainer.train_step((torch.ones(1, 1),))
    assert model.weight.item() == 0.0
    assert trainer.eval_model.weight.item() == pytest.approx(decay, abs=1e-6)


COUNTS = {  # DESIGN's tables: parameters, and multiply-adds of the fast path in G
    "imagenet_deit_tiny": (5717416, 1.2537), "imagenet_vca_deit_tiny": (5973928, 1.2124),
    "imagenet_deit_small": (22050664, 4.5989), "imagenet_vca_deit_small": (22556008, 4.5162),
    "imagenet_pvt_tiny": (13227240, 1.9264), "imagenet_vca_pvt_tiny": (11555560, 2.0172),
    "imagenet_swin_tiny": (28288354, 4.4906), "imagenet_vca_swin_tiny": (28546680, 4.5641),
    "imagenet_cswin_tiny": (20393320, 4.3419), "imagenet_vca_cswin_tiny": (20413928, 4.3122),
    "imagenet_vca_pvt_medium": (35811624, 7.1410), "imagenet_vca_swin_base": (88746536, 15.7760),
    "imagenet_vca_cswin_small": (34663912, 6.7711),
    "imagenet_dit_s_2": (32963360, 6.0557), "imagenet_vca_dit_s_2": (33606944, 5.9153),
    "imagenet_dit_s_4": (32945024, 1.4126), "imagenet_vca_dit_s_4": (33146240, 1.4058),
    "imagenet_dit_b_2": (130512416, 23.0051), "imagenet_vca_dit_b_2": (131791904, 22.7243),
}  # fmt: skip


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_plans(name):
    recipe = read(name)
    text = cost.plan(recipe, None, "h100")
    estimate = cost.estimate(recipe, cost.GPUS["h100"])
    if name in COUNTS:
        parameters, gmacs = COUNTS[name]
        assert f"{parameters:,}" in text and estimate.macs / 1e9 == pytest.approx(gmacs, abs=1e-4)
    if name in ROWS:
        stated = re.search(r"# Cost: ([\d.]+) H100 hours", recipes.shipped(name).read_text())
        assert float(stated[1]) == pytest.approx(estimate.hours, abs=0.051)
        steps = getattr(recipe, "steps", None) or 1281167 // recipe.batch_size * recipe.epochs
        assert estimate.steps == steps and (recipes.task(name) != "generate" or steps == 400_000)
    if recipes.task(name) == "classify" and name in ROWS:
        assert re.search(r"loader +[\d,]+ images/s at that speed: about \d+ CPU cores", text)
    if recipes.task(name) == "generate" and name in ROWS:
        assert "latents          87.2 GB on disk" in text  # 64 KiB for each of 1,331,167 images


def test_activations_are_those_that_a_true_forward_pass_keeps():
    recipe = read("cifar10_vca", precision="fp32")
    model, _ = build_model(recipe, [""] * 10, None)
    _, planned = cost.trace(model, recipe)
    kept = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(torch.randn(8, 3, 32, 32)).sum()
    true = sum(storage.nbytes() for storage in kept.values()) / 8
    del loss
    assert planned == pytest.approx(true, rel=0.1)
    _, less = cost.trace(model, replace(recipe, checkpointing=True))
    assert less < planned / 4


SMALLEST = ("deit_tiny", "vca_deit_tiny", "vca_pvt_tiny", "vca_swin_tiny", "vca_cswin_tiny", "dit_s_4", "vca_dit_s_4",
            "vca_sit_s_8")  # fmt: skip
TRUE_SIZE = [f"imagenet_{model}" for model in SMALLEST]


@pytest.mark.parametrize(
    "name", [n if n in TRUE_SIZE else pytest.param(n, marks=pytest.mark.long) for n in recipes.names()]
)
def test_two_steps_at_true_size(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    module = MODULES[recipes.task(name)]
    short = dict(batch_size=2, workers=0, compile=False, precision="fp32" if bf16_slowdown() > 1 else "bf16")
    short |= dict(mix_group=2) if module is classify else {}
    text = cost.smoke(replace(read(name), **short), module.train, CPU, 2)
    assert re.match(r"smoke: 2 steps of 2 images, loss [\d.]+ to [\d.]+; a process takes", text), text


def test_a_base_is_taken_over_and_a_base_of_itself_is_refused(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "cifar10_vca"\nepochs = 7\n')
    recipe = recipes.read(str(mine), classifier_recipe.ClassifierRecipe, dict(lr="2e-3"))
    assert recipe == replace(read("cifar10_vca"), epochs=7, lr=2e-3)
    mine.write_text('base = "mine"\n')
    with pytest.raises(RecipeError, match="base = 'mine' is no other recipe"):
        recipes.read(str(mine), classifier_recipe.ClassifierRecipe, {})
    mine.write_text('base = "nobody"\n')
    with pytest.raises(RecipeError, match="base = 'nobody' is no other recipe"):
        recipes.read(str(mine), classifier_recipe.ClassifierRecipe, {})


def test_a_run_folder_of_a_recipe_with_fewer_keys_is_gone_on_with(tmp_path):
    recipe = read("cifar10_vca")
    RunFolder(tmp_path, recipe, init=None)._lock.close()
    file = tmp_path / "recipe.json"
    old = json.loads(file.read_text())
    for key in ("mix_group", "repeats", "tokens", "tf32", "log_every", "checkpointing", "crop_pct"):
        del old[key]
    file.write_text(json.dumps(old))
    RunFolder(tmp_path, recipe, init=None)._lock.close()
    assert json.loads(file.read_text())["repeats"] == 1
    file.write_text(json.dumps(old))
    (tmp_path / "state-00000001.pt").touch()
    with pytest.raises(RunError, match="another memory, repeats"):
        RunFolder(tmp_path, replace(recipe, memory=False, repeats=3), init=None)


def test_all_kinds_train_every_parameter():
    """Several processes would wait for the gradient of a parameter without one."""
    for name in ("vca_vit_pico_patch4_32", "vca_sit_xs_4"):
        for kind in vca.layers.factory.KINDS:
            model = vca.create_model(name, attention=kind, num_classes=3)
            model.set_grad_checkpointing()
            if hasattr(model, "sample_shape"):
                loss = model(torch.randn(2, 3, 32, 32), torch.rand(2), torch.tensor([0, 3]))
            else:
                loss = model(torch.randn(2, 3, 32, 32))
            loss.sum().backward()
            missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
            assert not missing, (name, kind)


def test_a_growing_image_costs_its_mean_area():
    recipe = read("everyday_vca", img_sizes="[[0, 112], [0.75, 224]]")
    assert recipe.relative_area(224) == pytest.approx(0.75 / 4 + 0.25)
    assert [recipe.img_size_at(share) for share in (0, 0.74, 0.75, 1)] == [112, 112, 224, 224]
    transfer = read("everyday_transfer", img_sizes="[112, 224]")
    assert transfer.relative_area(224) == pytest.approx(0.625) and transfer.passes == 2
    assert read("everyday_transfer", stream="student").passes == 4


@pytest.mark.parametrize(
    "img_sizes", ["[[0.1, 112]]", "[[0, 112], [0, 224]]", "[[0, 112], [1, 224]]", "[112]", "[[0, 1.5]]"]
)
def test_image_sizes_that_do_not_grow_from_the_start_are_refused(img_sizes):
    with pytest.raises(RecipeError, match="img_sizes"):
        read("everyday_vca", img_sizes=img_sizes)
