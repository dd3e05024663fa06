"""The layout of the photo model's data: what is held back is in no training image, by source and by label."""

import json
import sys

import pytest
from PIL import Image

from scripts import everyday_data
from training.data.images import Images
from training.data.sources import read_sources

CLASSES = [f"class {letter}" for letter in "abcdefghijkl"]
NEW, HELD_BACK = (
    {"photos": "class a", "tinyimagenet100": "class b"},
    {"photos": "class i", "tinyimagenet100": "class j"},
)


@pytest.fixture
def everyday(tmp_path, monkeypatch, capsys):
    """Both sources have the first ten classes; ten training and four validation images a class."""
    vocabulary = dict(photos={}, tinyimagenet100={})
    for source, classes in (("photos", CLASSES[:11]), ("tinyimagenet100", [*CLASSES[:10], CLASSES[11]])):
        for number, name in enumerate(classes):
            vocabulary[source][f"n{number:02}"] = name
            for split, count in (("train", 10), ("val", 4)):
                folder = tmp_path / source / split / f"n{number:02}"
                folder.mkdir(parents=True)
                for image in range(count):
                    Image.new("RGB", (8, 8), (number, image, count)).save(folder / f"{image}.png")
    (tmp_path / "vocabulary.json").write_text(json.dumps(vocabulary))
    given = dict(photos="photos", tinyimagenet="tinyimagenet100", vocabulary="vocabulary.json", out="out")
    arguments = [text for key, name in given.items() for text in (f"--{key}", str(tmp_path / name))]
    monkeypatch.setattr(sys, "argv", ["everyday_data", *arguments, "--per-class", "8", "--unlabeled-per-class", "12"])
    everyday_data.main()
    return tmp_path / "out"


def of(folder, name, source):
    """The images that links of a class and source lead to."""
    return {link.resolve() for link in (folder / name).glob(f"*{source}-*")}


@pytest.mark.parametrize("source", ["photos", "tinyimagenet100"])
def test_what_is_tested_is_not_trained_on(everyday, source):
    new, held_back = NEW[source], HELD_BACK[source]
    assert not of(everyday / "train", new, source) and not of(everyday / "val", new, source)
    assert len(of(everyday / "new_sources", new, source)) == (14 if source == "photos" else 4)
    seen, tested = of(everyday / "train", held_back, source), of(everyday / "other_sources", held_back, source)
    assert seen and tested and not seen & tested
    assert len(tested) == (9 if source == "photos" else 4), "half of the photos' training images, and all of val"
    assert {folder.name for folder in (everyday / "other_sources").iterdir()} == set(HELD_BACK.values())


def test_images_of_held_back_classes_are_unlabeled(everyday):
    images = Images(everyday, "train")
    sources = read_sources(everyday, images)
    for index, (file, label) in enumerate(images.reader.samples):
        name, source = images.class_folders[label], file.split("/")[1].split("-")[0]
        assert sources.labeled[sources.of_images[index], label] == (name != HELD_BACK[source])


def test_every_source_has_as_many_images_of_a_class_as_asked_for(everyday):
    for folder in (everyday / "train").iterdir():
        for source in NEW:
            count = len(list(folder.glob(f"{source}-*")))
            assert count == 12 if folder.name == HELD_BACK[source] else count <= 8


def test_every_class_of_imagenet_means_one_class():
    stored = json.loads(everyday_data.IMAGENET.read_text())
    numbers = [number for classes in stored.values() for number in classes]
    assert len(numbers) == len(set(numbers)) and all(0 <= int(number) < 1000 for number in numbers)
    assert stored["cat"]["283"] == "Persian cat" and "251" not in stored["dog"]
