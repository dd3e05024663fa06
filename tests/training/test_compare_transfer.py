"""Comparing kinds of attention by how well they stand in for a teacher's: ranking, equality, going on, the page."""

import contextlib
import gc
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
from training import compare, transfer
from training.core import comparison
from training.core.trainer import Trainer

SAME = "vca:tokens=pool+emb"  # which is what vca has anyway
HANDICAPPED = "vca:tokens=emb:dwc=false:num_tokens=1"
KINDS = ("vca", SAME, HANDICAPPED, "mhsa_dwc", "mhsa")
SIZES = [16, 32]


class InThisProcess:
    """Takes the place of a process of `training.transfer`, which would take seconds to start."""

    def __init__(self, arguments, stdout, **_):
        self.arguments, self.stdout = arguments[2:], stdout

    def wait(self):
        self.returncode = 0
        with mock.patch.object(sys, "argv", self.arguments), contextlib.redirect_stderr(self.stdout):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    transfer.main()
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


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder with a finished comparison; the second run was interrupted after ten of its steps, and went on."""
    root = tmp_path_factory.mktemp("compared")
    write_images(root / "data", "train", 20, seed=0)
    write_images(root / "data", "val", 8, seed=1)
    vca.save(discerning_teacher(), root / "teacher", label_names=list(CLASSES))
    recipe = transfer_recipe(root, 30)
    recipe.write_text(recipe.read_text().replace("[32]", str(SIZES)).replace("eval_every = 20", "eval_every = 10"))
    given = ["--seeds", "0", "--data", str(root / "data"), "--teacher", str(root / "teacher"), "--device", "cpu"]

    def interrupted(trainer, force=False, save=Trainer.checkpoint):
        save(trainer, force)
        if SAME.replace(":", "-") in str(trainer.run.path) and trainer.step == 10:
            sys.exit(1)

    with mock.patch.object(Trainer, "checkpoint", interrupted), pytest.raises(SystemExit, match="1 of 5 runs failed"):
        run(root, *given)
    finished = {folder.parent.name: folder.stat().st_mtime_ns for folder in (root / "out").glob("*/checkpoint")}
    (root / "printed").write_text(run(root, *given))
    return root, finished


def test_an_interrupted_comparison_goes_on(compared):
    root, finished = compared
    assert len(finished) == 4
    assert all((root / "out" / name / "checkpoint").stat().st_mtime_ns == then for name, then in finished.items())
    said = next(file for file in (root / "out").glob("*.txt") if "pool+emb" in file.name).read_text()
    assert "state-00000010.pt at step 10" in said


def test_a_handicapped_kind_is_ranked_last_and_the_original_first(compared):
    root, _ = compared
    rows = [line.split(" | ")[0] for line in (root / "printed").read_text().splitlines() if line.startswith("| ")]
    assert rows == ["| attention", "| mhsa", "| mhsa_dwc", "| vca", f"| {SAME}", f"| {HANDICAPPED}"]
    errors = {run["kind"]: run["error"][-1][1] for run in log_of(root)["runs"]}
    assert errors["mhsa"] == 0 < errors["mhsa_dwc"] < errors["vca"] - 0.1 < errors[HANDICAPPED] - 0.2


def test_equal_kinds_get_equal_numbers(compared):
    root, _ = compared
    one, other = log_of(root)["runs"][:2]
    assert {key for key in one if one[key] != other[key]} <= {"kind", "seconds_per_step"}
    weights = [(folder_of(root, run) / "checkpoint" / "model.safetensors").read_bytes() for run in (one, other)]
    assert weights[0] == weights[1]


def log_of(root):
    return json.loads((root / "out" / "log.json").read_text())


def folder_of(root, run):
    return root / "out" / f"{run['kind'].replace(':', '-')}-seed{run['seed']}"


def test_a_log_holds_what_was_measured(compared):
    root, _ = compared
    log = log_of(root)
    budget = (log["task"], log["img_sizes"], log["batch_size"], log["steps"], log["images"])
    assert budget == ("transfer", SIZES, 8, 30, 16)
    for run in log["runs"]:
        lines = [json.loads(line) for line in (folder_of(root, run) / "log.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "by_block" in line]
        for key in ("error", "error_16", "error_32"):
            assert run[key] == [[80 * (i + 1), line[key]] for i, line in enumerate(lines)] and len(lines) == 3
        assert run["by_block"] == lines[-1]["by_block"] and len(run["by_block"]) == 6
        assert run["error"] == run["error_32"] and run["seconds_per_step"] > 0
        model = vca.load(folder_of(root, run) / "checkpoint")
        assert run["parameters"] == sum(p.numel() for block in model.blocks for p in block.attn.parameters())
    macs = {run["kind"]: run["macs"] for run in log["runs"]}
    assert macs["mhsa_dwc"]["16"] < macs["mhsa"]["32"] < macs["mhsa_dwc"]["32"]
    convolution = 6 * 9 * 128 * 64  # blocks, weights of a channel, channels, patches
    assert macs["mhsa_dwc"]["32"] - macs["mhsa"]["32"] == convolution
    assert len(json.dumps(log)) < 20_000


@pytest.mark.parametrize(
    "more, message",
    [
        (["--seeds", "0", "--data", "FOLDER", "--teacher", "OTHER"], "vca-seed0 holds a run with another teacher"),
        (["--seeds", "0", "--report", "--lr", "1"], "vca-seed0 holds a run with another lr"),
        (["--seeds", "0", "--report", "--epochs", "1"], "--epochs is of another sort of recipe"),
    ],
)
def test_another_comparison_in_the_same_folder_is_refused(compared, more, message):
    with pytest.raises(SystemExit, match=message):
        run(compared[0], *more)


def test_without_a_teacher_it_says_so(compared, capsys):
    with pytest.raises(SystemExit) as end:
        run(compared[0], "--data", "FOLDER")
    assert end.value.code == 2 and "--teacher must be given" in capsys.readouterr().err


def made_log(errors):
    """A log of a transfer of two sizes."""
    shared = dict(task="transfer", model="student", teacher="teacher", dataset="photos", img_sizes=[112, 224])
    runs = [
        dict(
            kind=kind, seed=seed, seconds_per_step=1.5 + seed / 10, parameters=1000, macs={"112": 5e8, "224": 2.25e9},
            error=[[320, 0.9], [640, error]], error_112=[[320, 0.8], [640, error / 2]], by_block=[error, error],
            error_224=[[320, 0.9], [640, error]], loss=[[10, 0.9], [20, error]],
        )
        for kind, values in errors.items() for seed, error in enumerate(values)
    ]  # fmt: skip
    return shared | dict(batch_size=32, steps=20, images=256, runs=runs)


def test_the_table_of_a_log_has_differences_to_the_first_kind_and_the_control():
    errors = dict(vca=[0.1331, 0.1342, 0.1326], agent=[0.1081, 0.1079, 0.1092], mhsa_dwc=[0.041, 0.042, 0.043])
    text = comparison.table(made_log(errors))
    title, _, head, _, *rows = text.splitlines()
    assert "student taught by teacher on photos, 20 steps of 32 images" in title
    assert "256 held-out images of 224 px" in title and "the seeds 0, 1, 2; best first" in title
    cells = [dict(zip(head.split(" | "), row.split(" | "), strict=True)) for row in rows]
    assert [row["| attention"] for row in cells] == ["| mhsa_dwc", "| agent", "| vca"]
    agent = cells[1]
    assert agent["error"] == f"{statistics.mean(errors['agent']):.4f} ± {statistics.stdev(errors['agent']):.4f}"
    assert agent["each seed"] == "0.1081 0.1079 0.1092"
    p = ttest_rel(errors["agent"], errors["vca"]).pvalue
    assert agent["against vca (p)"].startswith("-0.0249 ± ") and agent["against vca (p)"].endswith(f"({p:.3f})")
    assert agent["against mhsa_dwc (p)"].startswith("+0.0664 ± ") and agent["at 112 px"] == "0.0542 ± 0.0004"
    assert agent["G multiply-adds at 112 px"] == "0.500" and agent["G multiply-adds at 224 px"] == "2.250"
    assert agent["parameters of the attention"] == "1,000" and agent["s/step |"] == "1.5 |"


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
    page.write_text("# Page\n\n<!-- error -->\nold\n<!-- end -->\n\n<!-- accuracy -->\n<!-- end -->\n")
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "PAGE", page)
    evidence.main()
    text = page.read_text()
    for name, log in logs.items():
        assert f"<!-- {name} -->\n{comparison.table(log)}\n<!-- end -->" in text
        assert (folder / f"{name}.png").stat().st_size > 5000
    assert "old" not in text
