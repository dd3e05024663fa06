"""Attention transfer: what it learns, what it refuses, and that a killed run ends as an undisturbed one."""

import json
import signal

import pytest
import timm
import torch
from safetensors.torch import save_file

import vca
from tests.helpers.runs import run, start_and_signal_command, write_images
from tests.helpers.transfers import random_teacher, transfer_recipe
from training.core.teacher import attention_pairs, blocks, hidden_states, open_teacher, relative_error
from training.transfer import layer_errors


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a teacher with self-attention and random weights, and recipes of 12 and 60 steps."""
    root = tmp_path_factory.mktemp("transfer")
    write_images(root / "data", "train", 20, seed=0)
    write_images(root / "data", "val", 8, seed=1)
    vca.save(random_teacher(), root / "teacher", label_names=["bird", "cat", "dog"])
    for steps in (12, 60):
        transfer_recipe(root, steps)
    return root


def command(place, steps, out, *more, teacher=None):
    from sys import executable

    teacher = teacher or place / "teacher"
    return [executable, "-m", "training.transfer", str(place / f"steps{steps}.toml"), "--data", str(place / "data"),
            "--teacher", str(teacher), "--out", str(out), "--device", "cpu", *more]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(place):
    result = run(command(place, 60, place / "undisturbed"))
    assert result.returncode == 0, result.stderr
    return place / "undisturbed"


def test_the_error_falls_below_a_bound(undisturbed):
    lines = [json.loads(line) for line in (undisturbed / "log.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "by_block" in line]
    assert len(held_out[-1]["by_block"]) == 6
    assert held_out[-1]["error"] == pytest.approx(sum(held_out[-1]["by_block"]) / 6, abs=1e-4)
    assert held_out[-1]["images"] == 16
    assert held_out[-1]["error"] < 0.1 < 0.5 < lines[0]["loss"]


def test_the_checkpoint_keeps_the_teachers_head_and_all_but_its_attention(place, undisturbed):
    student, teacher = vca.load(undisturbed / "checkpoint"), vca.load(place / "teacher")
    assert student.label_names == teacher.label_names
    changed = {
        k
        for k, v in student.state_dict().items()
        if k not in teacher.state_dict() or (v != teacher.state_dict()[k]).any()
    }
    assert changed and all(".attn." in key for key in changed)
    assert student.training_history[-1]["results"]["error"] < 0.1


def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(place, undisturbed):
    out = place / "killed"
    start_and_signal_command(command(place, 60, out), out, signal.SIGKILL, 0.2)
    assert not (out / "checkpoint").exists()
    result = run(command(place, 60, out))
    assert result.returncode == 0, result.stderr
    same = "model.safetensors"
    assert (out / "checkpoint" / same).read_bytes() == (undisturbed / "checkpoint" / same).read_bytes()


@pytest.mark.parametrize(
    "teacher, words",
    [
        ("nowhere/at/all", "nowhere/at/all"),
        ("timm:vit_tiny_patch16_224=missing.safetensors", "missing.safetensors: file not found"),
        ("timm:resnet18=FILE", "ResNet"),
        ("timm:vit_tiny_patch16_224=FILE", "vit_tiny_patch16_224"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_in_one_line(place, tmp_path, teacher, words):
    import timm

    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("resnet18", num_classes=3).state_dict(), file)
    result = run(command(place, 12, tmp_path / "out", teacher=teacher.replace("FILE", str(file))))
    assert result.returncode == 1 and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_without_a_teacher_it_says_so(place, tmp_path):
    args = [word for word in command(place, 12, tmp_path / "out")]
    at = args.index("--teacher")
    result = run(args[:at] + args[at + 2 :])
    assert result.returncode == 2 and "--teacher" in result.stderr


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_pairs_are_what_the_attention_reads_and_gives(name):
    import timm

    model = timm.create_model(name, num_classes=0, **(dict(init_values=0.1) if name.startswith("vit") else {})).eval()
    images = torch.randn(1, 3, 224, 224)
    pairs = attention_pairs(model, images)
    assert len(pairs) == len(blocks(model))
    for block, (read, given) in zip(blocks(model), pairs, strict=True):
        with torch.no_grad():
            again = block._attn(read) if hasattr(block, "_attn") else block.attn(read)
        torch.testing.assert_close(again, given)


def test_a_student_that_is_its_teacher_has_no_error(place):
    teacher = open_teacher(str(place / "teacher"))
    images = torch.randn(2, 3, 32, 32)
    assert layer_errors(teacher, teacher, images).abs().max() < 1e-10
    assert relative_error(torch.zeros(3), torch.ones(3)) == 1
    assert len(hidden_states(teacher, images)) == len(teacher.blocks) + 1


def test_a_checkpoint_teaches_at_another_image_size(place):
    teacher = open_teacher(str(place / "teacher"), img_size=16)
    assert teacher.pos_embed.shape == (1, 16, 128) and len(attention_pairs(teacher, torch.randn(1, 3, 16, 16))) == 6


def test_smoke_needs_no_teacher_and_no_images(place):
    from sys import executable

    args = [str(place / "steps12.toml"), "--smoke", "3", "--device", "cpu"]
    result = run([executable, "-m", "training.transfer", *args])
    assert result.returncode == 0 and result.stdout.startswith("smoke: 3 steps of 8 images"), result.stderr


@pytest.mark.parametrize("img_sizes", ["[64]", "[48, 64]"])
def test_a_model_of_timm_is_taught_by_its_own_weights(place, tmp_path, img_sizes):
    name, file = "vit_tiny_patch16_224", tmp_path / "weights.safetensors"
    teacher = timm.create_model(name, num_classes=0)
    save_file(teacher.state_dict(), file)
    more = ["--model", name, "--attention", "vca", "--num-tokens", "4", "--img-sizes", img_sizes]
    result = run(command(place, 12, tmp_path / "run", *more, teacher=f"timm:{name}={file}"))
    assert result.returncode == 0, result.stderr
    student = vca.load(tmp_path / "run" / "checkpoint")
    assert all(type(block.attn) is vca.VisualContrastAttention for block in student.blocks)
    assert all(block.attn.token_grid == (2, 2) for block in student.blocks)
    assert student.num_classes == 0 and tuple(student.pretrained_cfg["input_size"]) == (3, 64, 64)
    for ours, theirs in zip(student.blocks, teacher.blocks, strict=True):
        assert torch.equal(ours.mlp.fc1.weight, theirs.mlp.fc1.weight)
