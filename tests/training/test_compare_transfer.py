"""Comparing kinds of attention by how well they stand in for a teacher's: ranking, equality, going on, the page."""

import contextlib
import gc
import importlib
import io
import json
import signal
import statistics
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
from scipy.stats import ttest_rel

import vca
from scripts import evidence
from tests.helpers.runs import CLASSES, write_images
from tests.helpers.transfers import discerning_teacher, transfer_recipe
from training import compare
from training.core import comparison_report
from training.core.trainer import Trainer

SAME = "vca:tokens=pool+emb"  # which is what vca has anyway
HANDICAPPED = "vca_stage1:tokens=emb:dwc=false:num_tokens=1"
MIXED = "vca:blocks=[0,1,2]"
KINDS = ("vca", SAME, HANDICAPPED, MIXED, "mhsa_dwc", "mhsa")
SIZES = [16, 32]
FINETUNE = """
dataset = "three colors"
model = "vca_vit_pico_patch4_32"
epochs = 2
batch_size = 20
lr = 1e-4
warmup_epochs = 0
precision = "fp32"
workers = 0
save_every = 2
"""


class InThisProcess:
    """Takes the place of a process of a training command, which would take seconds to start."""

    def __init__(self, arguments, stdout, **_):
        self.arguments, self.stdout = arguments[2:], stdout

    def wait(self):
        self.returncode = 0
        with mock.patch.object(sys, "argv", self.arguments), contextlib.redirect_stderr(self.stdout):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    importlib.import_module(self.arguments[0]).main()
            except SystemExit as end:
                print(end.code, file=self.stdout)
                self.returncode = 1 if end.code else 0
        gc.collect()  # the lock of the folder hangs on the run
        return self.returncode


def run(root, *more):
    arguments = ["compare", str(root / "steps30.toml"), "--out", str(root / "out"), "--kinds", ",".join(KINDS), *more]
    patches = (
        mock.patch.object(sys, "argv", arguments),
        mock.patch.object(compare, "subprocess", SimpleNamespace(Popen=InThisProcess, STDOUT=subprocess.STDOUT)),
        mock.patch.object(signal, "signal", lambda *_: None),  # only a main thread may
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        printed = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        compare.main()
    return printed.getvalue()


def interrupting(kind, step):
    """Ends what trains that kind after so many steps, when its state has been saved."""

    def checkpoint(trainer, force=False, save=Trainer.checkpoint):
        save(trainer, force)
        if kind.replace(":", "-") in str(trainer.run.path) and trainer.step == step:
            sys.exit(1)

    return mock.patch.object(Trainer, "checkpoint", checkpoint)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder with a finished comparison; SAME was interrupted in its transfer and in its fine-tuning, and went on."""
    root = tmp_path_factory.mktemp("compared")
    write_images(root / "data", "train", 20, seed=0)
    write_images(root / "data", "val", 8, seed=1)
    vca.save(discerning_teacher(), root / "teacher", label_names=list(CLASSES))
    recipe = transfer_recipe(root, 30)
    recipe.write_text(recipe.read_text().replace("[32]", str(SIZES)).replace("eval_every = 20", "eval_every = 10"))
    (root / "finetune.toml").write_text(FINETUNE)
    given = ["--seeds", "0", "--data", str(root / "data"), "--teacher", str(root / "teacher"), "--device", "cpu"]
    given += ["--finetune", str(root / "finetune.toml"), "--labeled", str(root / "data")]

    finished = []
    for step, message in ((10, "1 of 6 runs failed; see .*seed0.txt"), (2, "1 of 1 runs failed; see .*finetuned.txt")):
        with interrupting(SAME, step), pytest.raises(SystemExit, match=message):
            run(root, *given)
        checkpoints = (root / "out").rglob("checkpoint")
        finished.append({folder: folder.stat().st_mtime_ns for folder in checkpoints})
    (root / "printed").write_text(run(root, *given))
    return root, finished


def test_an_interrupted_comparison_goes_on(compared):
    root, finished = compared
    assert [len(checkpoints) for checkpoints in finished] == [10, 11]
    assert all(folder.stat().st_mtime_ns == then for folder, then in finished[1].items())
    folder = folder_of(root, dict(kind=SAME, seed=0))
    assert "state-00000010.pt at step 10" in folder.with_suffix(".txt").read_text()
    assert "state-00000002.pt at step 2" in (folder / "finetuned.txt").read_text()


def test_a_handicapped_kind_is_ranked_last_and_the_original_first(compared):
    root, _ = compared
    ranking, by_block = (root / "printed").read_text().split("The error by block:")
    for text, head in ((ranking, "| attention"), (by_block, "| block")):
        rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
        assert rows[:2] == [head, "| mhsa"] and rows[-3:] == ["| vca", f"| {SAME}", f"| {HANDICAPPED}"]
    errors = {run["kind"]: run["error"][-1][1] for run in log_of(root)["runs"]}
    assert errors["mhsa"] == 0 < errors["mhsa_dwc"] < errors["vca"] - 0.1 < errors[HANDICAPPED] - 0.2


def test_a_mixed_model_errs_in_its_own_blocks_alone(compared):
    runs = {run["kind"]: run for run in log_of(compared[0])["runs"]}
    mixed = runs[MIXED]["by_block"]
    assert min(mixed[:3]) > 0 == max(mixed[3:]) and 0 < runs[MIXED]["error"][-1][1] < runs["vca"]["error"][-1][1]
    assert runs["mhsa"]["parameters"] < runs[MIXED]["parameters"] < runs["vca"]["parameters"]


def test_equal_kinds_get_equal_numbers(compared):
    root, _ = compared
    one, other = log_of(root)["runs"][:2]
    assert {key for key in one if one[key] != other[key]} <= {"kind", "seconds_per_step", "ms"}
    for place in ("checkpoint", "finetuned/checkpoint"):
        first, second = ((folder_of(root, run) / place / "model.safetensors").read_bytes() for run in (one, other))
        assert first == second


def log_of(root):
    return json.loads((root / "out" / "log.json").read_text())


def folder_of(root, run):
    return root / "out" / f"{run['kind'].translate(str.maketrans(':', '-', '[]'))}-seed{run['seed']}"


def test_a_log_holds_what_was_measured(compared):
    root, _ = compared
    log = log_of(root)
    assert (log["task"], log["batch_size"], log["steps"], log["images"]) == ("transfer", 8, 30, 16)
    shared = dict(model="vca_vit_pico_patch4_32", dataset="three colors", epochs=2, steps=6, images=24)
    assert log["finetuned"] == shared
    for run in log["runs"]:
        lines = [json.loads(line) for line in (folder_of(root, run) / "log.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "by_block" in line]
        for key in ("error", "error_16", "error_32"):
            assert run[key] == [[80 * (i + 1), line[key]] for i, line in enumerate(lines)] and len(lines) == 3
        assert run["by_block"] == lines[-1]["by_block"] and len(run["by_block"]) == 6
        assert run["error"] == run["error_32"] and run["seconds_per_step"] > 0
        assert list(run["macs"]) == list(run["ms"]) == [str(side) for side in SIZES] and min(run["ms"].values()) > 0
        config = json.loads((folder_of(root, run) / "finetuned" / "checkpoint" / "config.json").read_text())
        assert [epoch for epoch, _ in run["top1"]] == [1, 2]
        assert [part["recipe"]["model"] for part in config["training"]] == [shared["model"]] * 2
        model = vca.load(folder_of(root, run) / "checkpoint")
        assert run["parameters"] == sum(p.numel() for block in model.blocks for p in block.attn.parameters())
    macs = {run["kind"]: run["macs"] for run in log["runs"]}
    assert macs["mhsa_dwc"]["16"] < macs["mhsa"]["32"] < macs["mhsa_dwc"]["32"]
    convolution = 6 * 9 * 128 * 64  # blocks, weights of a channel, channels, patches
    assert macs["mhsa_dwc"]["32"] - macs["mhsa"]["32"] == convolution
    assert len(json.dumps(log)) < 24_000


@pytest.mark.parametrize(
    "more, message",
    [
        (["--seeds", "0", "--data", "FOLDER", "--teacher", "OTHER"], "vca-seed0 holds a run with another teacher"),
        (["--seeds", "0", "--report", "--lr", "1"], "vca-seed0 holds a run with another lr"),
        (["--seeds", "0", "--report", "--epochs", "1"], "--epochs is of another sort of recipe"),
        (["--seeds", "0", "--report", "--kinds", "vca:img_sizes=[]"], r"img_sizes = \[\] must be sizes in pixels"),
        (["--seeds", "0", "--report", "--kinds", "vca:num_tokens=64:img_sizes=[16]"], r"token_grid=\(8, 8\) must lie"),
        (["--seeds", "0", "--report", "--finetune", "cifar10_sit_vca"], "--finetune names a classification recipe"),
        (
            ["--seeds", "0", "--report", "--finetune", "cifar10_vca"],
            "finetuned holds a run with another dataset|epochs",
        ),
    ],
)
def test_another_comparison_in_the_same_folder_is_refused(compared, more, message):
    with pytest.raises(SystemExit, match=message):
        run(compared[0], *more)


def test_without_a_teacher_it_says_so(compared, capsys):
    with pytest.raises(SystemExit) as end:
        run(compared[0], "--data", "FOLDER", "--finetune", "cifar10_vca")
    assert end.value.code == 2 and "--teacher and --labeled must be given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(compared[0], "--labeled", "FOLDER", "--report")
    assert "--labeled is the data of --finetune" in capsys.readouterr().err


def made_log(errors):
    """A log of a transfer of two sizes and of fine-tuning, whose accuracy falls by a point for a hundredth of error."""
    shared = dict(task="transfer", model="student", teacher="teacher", dataset="photos")
    shared["finetuned"] = dict(model="student", dataset="cats", epochs=1, steps=9, images=500)
    runs = [
        dict(
            kind=kind, seed=seed, seconds_per_step=1.5 + seed / 10, parameters=1000, macs={"112": 5e8, "224": 2.25e9},
            error=[[320, 0.9], [640, error]], error_112=[[320, 0.8], [640, error / 2]], by_block=[error, error],
            error_224=[[320, 0.9], [640, error]], loss=[[10, 0.9], [20, error]], top1=[[1, 90 - 100 * error]],
            ms={"112": 5 + seed, "224": 20 + seed},
        )
        for kind, values in errors.items() for seed, error in enumerate(values)
    ]  # fmt: skip
    return shared | dict(batch_size=32, steps=20, images=256, runs=runs)


def test_the_table_of_a_log_has_differences_to_the_first_kind_and_the_control():
    errors = dict(vca=[0.1331, 0.1342, 0.1326], agent=[0.1081, 0.1079, 0.1092], mhsa_dwc=[0.041, 0.042, 0.043])
    text, _, by_block = comparison_report.table(made_log(errors)).partition("\n\nThe error by block:\n\n")
    title, _, head, _, *rows = text.splitlines()
    assert "student taught by teacher on photos, 20 steps of 32 images" in title
    assert "256 held-out images of 224 px; top-1 in percent on 500 images after 1 epoch of fine-tuning on cats" in title
    assert "the seeds 0, 1, 2; best first" in title
    cells = [dict(zip(head.split(" | "), row.split(" | "), strict=True)) for row in rows]
    assert [row["| attention"] for row in cells] == ["| mhsa_dwc", "| agent", "| vca"]
    agent = cells[1]
    assert agent["error"] == f"{statistics.mean(errors['agent']):.4f} ± {statistics.stdev(errors['agent']):.4f}"
    assert agent["each seed"] == "0.1081 0.1079 0.1092"
    low, high = ttest_rel(errors["agent"], errors["vca"]).confidence_interval(0.95)
    assert agent["against vca (95 %)"] == f"-0.0249 ({low:+.4f} to {high:+.4f})" and low < -0.0249 < high < 0
    assert agent["against mhsa_dwc (95 %)"].startswith("+0.0664 (") and agent["at 112 px"] == "0.0542 ± 0.0004"
    assert agent["top-1 after fine-tuning"].startswith("79.16 ± ") and cells[2]["against vca (95 %)"] == ""
    assert agent["top-1 after fine-tuning against vca (95 %)"] == f"+2.49 ({-100 * high:+.2f} to {-100 * low:+.2f})"
    assert agent["G multiply-adds at 112 px"] == "0.500" and agent["G multiply-adds at 224 px"] == "2.250"
    assert agent["ms/image at 112 px"] == "5.00" and agent["ms/image at 224 px"] == "20.00"
    assert agent["parameters of the attention"] == "1,000" and agent["s/step |"] == "1.5 |"
    mean = f"{statistics.mean(errors['agent']):.3f}"
    assert by_block.splitlines()[0] == "| block | 0 | 1 |" and f"| agent | {mean} | {mean} |" in by_block


def test_kinds_of_different_image_sizes_share_a_table():
    log = made_log({"vca:img_sizes=[112]": [0.1, 0.2], "vca:img_sizes=[224]": [0.3, 0.5]})
    for run in log["runs"][:2]:
        run["macs"], run["ms"] = {"112": 5e8}, {"112": 5.0}
    title, _, head, _, small, large, *_ = comparison_report.table(log).splitlines()
    assert "256 held-out images of the largest size of each row" in title
    small, large = (dict(zip(head.split(" | "), row.split(" | "), strict=True)) for row in (small, large))
    assert small["error"].startswith("0.1500") and large["at 112 px"].startswith("0.2000") and "at 224 px" not in small
    assert (large["ms/image at 112 px"], small["ms/image at 224 px"]) == ("5.00", "")


def test_the_page_is_filled_from_logs_of_both_sorts(tmp_path, monkeypatch):
    folder = tmp_path / "docs" / "evidence"
    folder.mkdir(parents=True)
    made = dict(seed=0, parameters=9, seconds_per_step=1.0, loss=[[1, 2.0], [2, 1.0]])
    runs = [dict(made, kind=kind, top1=[[1, 50.0], [5, top1]]) for kind, top1 in (("mhsa", 60.0), ("vca", 64.0))]
    accuracies = dict(task="classify", model="m", dataset="d", epochs=5, steps=60, images=30, runs=runs)
    logs = dict(accuracy=accuracies, error=made_log(dict(vca=[0.2, 0.3], mhsa=[0.0, 0.0])))
    for name, log in logs.items():
        (folder / f"{name}.json").write_text(json.dumps(log))
    page = tmp_path / "docs" / "evidence.md"
    marks = "<!-- error -->\nold\n<!-- end -->", "<!-- accuracy -->\n<!-- end -->", "<!-- later -->\n<!-- end -->"
    page.write_text("\n\n".join(("# Page", *marks, "")))
    monkeypatch.setattr(evidence, "FOLDER", folder)
    monkeypatch.setattr(evidence, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["evidence"])
    evidence.main()
    text = page.read_text()
    for name, log in logs.items():
        assert f"<!-- {name} -->\n{comparison_report.table(log)}\n\n![The curves" in text
        assert (folder / f"{name}.png").stat().st_size > 5000
    assert "old" not in text and f"<!-- later -->\n{evidence.NOT_RUN}\n<!-- end -->" in text
