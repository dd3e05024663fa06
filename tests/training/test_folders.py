"""What is read of a folder: which files, under which labels, and what is said about the rest."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from tests.helpers.runs import PATIENCE, environment
from training.core.distributed import World
from training.data.batches import MemoryEvaluation
from training.data.errors import DataError
from training.data.folders import VAL_SHARE, find_images, natural_key
from training.data.images import Images, check_ranks, open_splits


def write(root, *files):
    """Small images of these names, all of one picture; of other endings text."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".txt", ".heic")):
            (root / name).write_text("no image")
        else:
            Image.new("RGB", (4, 4), (200, 10, 10)).save(root / name)
    return root


def classes_of(root, *names):
    write(root, *(f"train/{name}/a.png" for name in names))
    return Images(root, "train").class_folders


@pytest.mark.parametrize(
    "names, order",
    [
        (["b", "A", "a", "B"], ["A", "a", "B", "b"]),
        (["01", "1", "001", "10", "2"], ["001", "01", "1", "2", "10"]),
        (["10²", "10", "9²", "²"], ["9²", "10", "10²", "²"]),
        (["x10y2", "x10y10", "x9"], ["x9", "x10y2", "x10y10"]),
    ],
)
def test_labels_are_in_natural_order_then_by_name(tmp_path, names, order):
    assert classes_of(tmp_path, *names) == order
    assert sorted(reversed(order), key=natural_key) == order


def test_labels_are_the_same_in_every_process(tmp_path):
    write(tmp_path, *(f"train/{name}/a.png" for name in ("A", "a", "B", "b", "1", "01")))
    program = f"from training.data.images import Images; print(Images({str(tmp_path)!r}, 'train').class_folders)"
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=environment() | {"PYTHONHASHSEED": seed},
            capture_output=True,
            timeout=PATIENCE,
        ).stdout
        for seed in ("0", "1")
    }
    assert said == {b"['01', '1', 'A', 'a', 'B', 'b']\n"}


def test_the_class_is_the_first_folder_below_the_split(tmp_path):
    write(tmp_path, "train/cats/2019/a.png", "train/cats/2020/deep/b.png", "train/dogs/2019/c.png", "train/dogs/d.png")
    images = Images(tmp_path, "train")
    assert images.class_folders == ["cats", "dogs"] and images.labels() == [0, 0, 1, 1]
    assert images.reader.names() == ["cats/2019/a.png", "cats/2020/deep/b.png", "dogs/2019/c.png", "dogs/d.png"]


def test_names_that_begin_with_a_dot_are_left_out(tmp_path):
    write(tmp_path, "train/a/x.png", "train/b/x.png", "train/a/.ipynb_checkpoints/x-checkpoint.png", "train/.git/y.png")
    (tmp_path / "train" / "a" / "._x.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "train" / ".DS_Store").write_bytes(b"")
    images = Images(tmp_path, "train")
    assert images.reader.names() == ["a/x.png", "b/x.png"] and images.reader.left_out == []
    assert images.summary() == "2 images of 2 classes (1, 1)"


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".gif", ".tif", ".TIFF", ".avif", ".JPG", ".jfif", ".ppm"])
def test_what_the_app_takes_is_trained_on(tmp_path, suffix):
    write(tmp_path, f"train/a/x{suffix}", "train/b/x.png")
    images = Images(tmp_path, "train")
    assert len(images) == 2 and images[0][0].size == (4, 4)
    assert max(abs(c - d) for c, d in zip(images[0][0].getpixel((1, 1)), (200, 10, 10), strict=True)) < 12


def test_files_that_are_no_images_are_counted_and_named(tmp_path):
    write(tmp_path, "train/a/x.png", "train/a/y.png", "train/b/x.png", "train/a/notes.txt", "train/z.png")
    (tmp_path / "train" / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "train" / "empty").mkdir()
    assert Images(tmp_path, "train").summary() == (
        "3 images of 2 classes (2, 1); 3 files left out, such as z.png; 1 empty folder left out, such as empty"
    )
    write(tmp_path, "train/c/x.heic", "train/c/y.heic")
    with pytest.raises(DataError, match=r"train/c holds 2 files, but no image; .*Convert the files"):
        Images(tmp_path, "train")


@pytest.mark.parametrize("name", ["caf\udce9", "two\nlines"])
def test_a_class_needs_a_name_that_can_be_written_down(tmp_path, name):
    write(tmp_path, f"train/{name}/x.png", "train/b/x.png")
    with pytest.raises(DataError, match="is no name for a class; rename the folder"):
        Images(tmp_path, "train")


def test_many_classes_are_summed_up(tmp_path):
    write(tmp_path, *(f"train/{number}/a.png" for number in range(30)), "train/7/b.png")
    assert Images(tmp_path, "train").summary() == "31 images of 30 classes (1 to 2 each)"


def test_an_archive_beside_the_classes_is_no_shard(tmp_path):
    write(tmp_path, "train/a/x.png", "train/b/x.png")
    (tmp_path / "train" / "a.tar").write_bytes(b"what it was unpacked from")
    (tmp_path / "train-backup.tar").write_bytes(b"another")
    images = Images(tmp_path, "train")
    assert len(images) == 2 and images.reader.left_out == ["a.tar"]


def test_links_are_followed_once_and_never_up(tmp_path):
    write(tmp_path, "train/a/x.png", "train/b/y.png", "elsewhere/z.png")
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "a" / "self").symlink_to(tmp_path / "train" / "a")
    (tmp_path / "train" / "a" / "knot").symlink_to("knot")
    for name in ("first", "second"):
        (tmp_path / "train" / "a" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "c").symlink_to(tmp_path / "elsewhere")
    assert Images(tmp_path, "train").reader.names() == ["a/first/z.png", "a/x.png", "b/y.png", "c/z.png"]
    assert find_images(tmp_path / "train" / "a")[1] == ["knot"]


def test_an_image_that_cannot_be_opened_is_named(tmp_path):
    write(tmp_path, "train/a/x.png", "train/b/y.png")
    images = Images(tmp_path, "train")
    (tmp_path / "train" / "b" / "y.png").unlink()
    with pytest.raises(DataError, match=r"b/y\.png is not a readable image \(.*No such file"):
        images[1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_without_splits_is_split_by_the_names_alone(tmp_path, split):
    names = [f"{kind}/{number:02}.png" for kind, count in (("cats", 20), ("dogs", 7)) for number in range(count)]
    write(tmp_path / "one", *names)
    write(tmp_path / "two", *reversed(names))
    one, two = (Images(tmp_path / root, split).reader.names() for root in ("one", "two"))
    train, val = (Images(tmp_path / "one", part) for part in ("train", "val"))
    assert one == two and train.class_folders == val.class_folders == ["cats", "dogs"]
    assert sorted(train.reader.names() + val.reader.names()) == sorted(names)
    assert [val.labels().count(label) for label in (0, 1)] == [round(VAL_SHARE * 20), round(VAL_SHARE * 7)]
    write(tmp_path / "one", "snake/only.png")
    with pytest.raises(DataError, match=r"snake/only\.png is alone in its class"):
        Images(tmp_path / "one", split)


@pytest.mark.parametrize("inside", ["training/a/x.png", "cats/train/x.png", "Test/a/x.png", "val/a/x.png"])
def test_folders_named_as_splits_are_no_classes(tmp_path, inside):
    write(tmp_path, inside, "dogs/b/x.png")
    with pytest.raises(DataError, match="has no folder 'train'"):
        Images(tmp_path, "train")


def test_what_was_found_is_said(tmp_path, capsys):
    write(tmp_path, *(f"{kind}/{number}.png" for kind in "ab" for number in range(5)))
    open_splits(str(tmp_path))
    said = capsys.readouterr().err
    assert "has no train and val: a fifth of each class, chosen by name, is val" in said
    assert "train: 8 images of 2 classes (4, 4)\nval: 2 images of 2 classes (1, 1)\n" in said


def test_the_splits_must_hold_the_same_classes(tmp_path):
    write(tmp_path, *(f"{part}/{kind}/x.png" for part in ("train", "val") for kind in "ab"), "val/c/x.png")
    with pytest.raises(DataError, match="do not hold the same class folders; c is in val alone"):
        open_splits(str(tmp_path))


class Other(World):
    """The second of two processes, the first of which saw something else."""

    def share(self, value):
        return ["something else", *value[1:]]

    def sum(self, values, device):
        return values


def test_processes_that_see_other_images_are_refused(tmp_path):
    write(tmp_path, *(f"{part}/{kind}/x.png" for part in ("train", "val") for kind in "ab"))
    splits = [Images(tmp_path, part) for part in ("train", "val")]
    check_ranks("data", splits, World(), "cpu")
    with pytest.raises(DataError, match="data: not all processes see the same images"):
        check_ranks("data", splits, Other(1, 2), "cpu")


def test_the_fingerprint_is_of_names_and_classes(tmp_path):
    write(tmp_path, "train/a/x.png", "train/a/y.png", "train/b/z.png")
    before = Images(tmp_path, "train").fingerprint()
    assert Images(tmp_path, "train").fingerprint() == before
    os.rename(tmp_path / "train/a/y.png", tmp_path / "train/b/y.png")
    moved = Images(tmp_path, "train").fingerprint()
    os.rename(tmp_path / "train/b/y.png", tmp_path / "train/b/w.png")
    assert len({before, moved, Images(tmp_path, "train").fingerprint()}) == 3


def test_an_empty_share_of_the_validation_images_ends_well():
    pixels, labels = torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.arange(3)
    assert list(MemoryEvaluation(pixels, labels, share=slice(3, None, 4))) == []
    sizes = [len(y) for _, y in MemoryEvaluation(pixels, labels, batch_size=2)]
    assert sizes == [2, 1]
