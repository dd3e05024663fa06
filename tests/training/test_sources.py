"""Data of several sources, each of which labels only some of the classes."""

import json

import pytest
import torch
import torch.nn.functional as F

import vca
from tests.helpers.runs import CLASSES, run_here, write_images
from training.core.classifier_recipe import ClassifierRecipe
from training.core.distill import mapped_cross_entropy, partial_cross_entropy, read_teacher_classes
from training.core.init import build_model
from training.data.images import DataError, Images
from training.data.sources import read_sources

LABELED = dict(zoo=["bird", "cat"], web=["dog"])


@pytest.fixture
def data(tmp_path):
    """Twelve images a class, of which a third come from the web; cats of the web are unlabeled, dogs of the zoo too."""
    for split in ("train", "val"):
        write_images(tmp_path, split, 12, seed=len(split))
    for number, file in enumerate(sorted((tmp_path / "train").rglob("*.png"))):
        file.rename(file.with_name(f"{'zoo' if number % 3 else 'web'}-{file.name}"))
    (tmp_path / "sources.json").write_text(json.dumps(LABELED))
    return tmp_path


def test_every_image_has_its_source(data):
    images = Images(data, "train")
    sources = read_sources(data, images)
    names = images.reader.names()
    assert [list(LABELED)[i] for i in sources.of_images] == [name.split("/")[1].split("-")[0] for name in names]
    assert sources.labeled.tolist() == [[True, True, False], [False, False, True]]
    images.sources = sources.of_images
    assert images[5][1:] == (0, sources.of_images[5])
    assert read_sources(data / "train", images) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"sources.json must hold \{SOURCE: \[CLASS, ...\]\} in JSON"),
        ("[1]", "must hold"),
        ('{"zoo": ["owl"], "web": []}', "names a class 'owl' that has no folder"),
        ('{"zoo": ["cat"]}', r"web-.*\.png is of none of the sources"),
    ],
)
def test_a_file_that_says_something_else_is_refused(data, text, words):
    (data / "sources.json").write_text(text)
    with pytest.raises(DataError, match=words):
        read_sources(data, Images(data, "train"))
    assert "sources" in run_here(data, data / "out", ends_with=1)


def test_classes_that_a_source_does_not_label_compete_with_their_weight():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 0])
    labeled = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 1], [1, 1, 1]], dtype=torch.bool)
    expected = []
    for row, label, known in zip(logits.exp(), labels, labeled, strict=True):
        if known[label]:
            total = (row * torch.where(known, 1, 0.1)).sum()
            expected.append(-torch.log(row[label] / total))
    loss = partial_cross_entropy(logits, labels, labeled, 0.1, 0.0)
    assert torch.isclose(loss, (sum(expected) / 4).float())
    everything = torch.ones_like(labeled)
    for weight, smoothing in ((1.0, 0.1), (0.0, 0.1)):
        plain = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        assert torch.isclose(partial_cross_entropy(logits, labels, everything, weight, smoothing), plain)
    alone = partial_cross_entropy(logits, labels, labeled, 0.0, 0.0)
    pairs = [torch.log(logits[i].exp()[:n].sum()) - logits[i, 0] for i, n in ((0, 2), (3, 3))]
    assert torch.isclose(alone, (sum(pairs) / 4).float()), "row 1 has one class to choose from, row 2 no label"


def test_label_smoothing_leaves_out_what_a_source_does_not_label():
    logits = torch.zeros(1, 3)
    loss = partial_cross_entropy(logits, torch.tensor([0]), torch.tensor([[True, True, False]]), 0.0, 0.1)
    assert torch.isclose(loss, torch.tensor(2.0).log()), "two classes of equal logits"


def test_a_teachers_classes_are_added_up_over_the_classes_it_knows():
    matrix = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]])  # the second class is unknown to it
    probabilities = torch.tensor([[0.3, 0.2, 0.1, 0.4]])
    logits = torch.tensor([[1.0, 5.0, 2.0]])
    log_softmax = F.log_softmax(logits[:, [0, 2]], dim=1)[0]
    loss = mapped_cross_entropy(logits, probabilities, matrix)
    assert torch.isclose(loss, -(0.5 * log_softmax[0] + 0.1 * log_softmax[1]))


def test_the_teachers_classes_are_read_from_a_file(tmp_path):
    teacher = torch.nn.Module()
    teacher.num_classes = 4
    assert read_teacher_classes(tmp_path, CLASSES, teacher) is None
    file = tmp_path / "teacher_classes.json"
    file.write_text(json.dumps(dict(bird={"0": "cock", "1": "hen"}, dog={"2": "pug"})))
    matrix = read_teacher_classes(tmp_path, list(CLASSES), teacher)
    assert matrix.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]
    for text in ("{", "[]", '{"owl": {"0": "owl"}}', '{"dog": {"4": "pug"}}', '{"dog": {"-1": "pug"}}', '{"dog": 3}'):
        file.write_text(text)
        with pytest.raises(DataError, match=r"teacher_classes.json must hold"):
            read_teacher_classes(tmp_path, list(CLASSES), teacher)


def test_a_run_knows_what_its_sources_label(data):
    short = ("--epochs", "1", "--mixup", "0", "--cutmix", "0", "--memory", "false", "--padding", "0")
    run_here(data, data / "out", *short, "--unlabeled-weight", "0.1")
    (data / "sources.json").write_text(json.dumps(LABELED | dict(web=["cat", "dog"])))
    assert "other data" in run_here(data, data / "out", *short, "--unlabeled-weight", "0.1", ends_with=1)


def test_mixed_images_have_no_source(data):
    said = run_here(data, data / "out", "--epochs", "1", "--memory", "false", ends_with=1)
    assert "sources.json" in said and "mixup" in said


def test_a_head_can_be_drawn_anew(tmp_path):
    torch.manual_seed(5)
    source = vca.create_model("vca_vit_pico_patch4_32", num_classes=3)
    vca.save(source, tmp_path / "old", label_names=list(CLASSES), training=[dict(results={})])
    recipe = ClassifierRecipe("vca_vit_pico_patch4_32", 1, 8, 1e-3, reset_head=True)
    model, history = build_model(recipe, list(CLASSES), str(tmp_path / "old"))
    assert len(history) == 1 and torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)
    assert not torch.equal(model.head.weight, source.head.weight)
