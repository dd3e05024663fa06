"""What attention transfer at toy size needs: a teacher and a recipe."""

import torch

import vca

RECIPE = """
model = "vca_vit_pico_patch4_32"
img_sizes = [32]
steps = {steps}
batch_size = 8
lr = 5e-3
lr_kept = 1e-3
warmup_steps = 5
eval_images = 16
eval_every = 20
log_every = 1
save_every = 5
precision = "fp32"
workers = 0
"""


def transfer_recipe(folder, steps=20):
    """The file of a recipe of that many steps, written into `folder`."""
    file = folder / f"steps{steps}.toml"
    file.write_text(RECIPE.format(steps=steps))
    return file


def random_teacher():
    """A model with self-attention and random weights, and with attention that looks somewhere: not nearly uniform."""
    torch.manual_seed(0)
    teacher = vca.create_model("mhsa_vit_pico_patch4_32", num_classes=3)
    with torch.no_grad():
        for block in teacher.blocks:
            block.attn.qkv.weight.mul_(4)
    return teacher


def discerning_teacher():
    """A `random_teacher` that looks somewhere else from every position, for which one contrast token is too few."""
    teacher = random_teacher()
    with torch.no_grad():
        teacher.pos_embed.mul_(50)
        for block in teacher.blocks:
            block.attn.qkv.weight[: 2 * teacher.embed_dim].mul_(2)  # queries and keys
    return teacher
