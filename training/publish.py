"""Publishes a checkpoint as a repository of the Hugging Face Hub, and the app as a Space that serves it.

    python -m training.publish weights/NAME --repo user/repo
    python -m training.publish weights/NAME --repo user/repo --space user/space
    python -m training.publish weights/NAME user/repo user/other --space user/space

A Space downloads the repositories when it is built, and carries along the folders that --repo does not publish. Log
in first with `hf auth login`, or set HF_TOKEN. What has not changed is not sent again; --dry-run prints every file with
its size and sends nothing.
"""

import argparse
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from string import Template

import yaml

import vca
from training.core.cli import interruptible
from vca.checkpoint import AUTOENCODER_FILES, FILES
from vca.hub import REPO_ID, published_files, upload

ROOT = Path(__file__).parent.parent
TITLE = "Visual-Contrast Attention"
SHORT = "Where every head of a vision transformer looks"  # at most 60 characters
TEMPLATES = ROOT / "training" / "space"


def space_files(
    folders: list[Path], repositories: list[str], published: Iterable[str] = FILES
) -> dict[str, Path | bytes]:
    """The files of a Space that serves checkpoint folders, which it carries, and repositories, which it preloads.

    Args:
        repositories: Hub ids, either with "@revision".
        published: the files of the first of them.

    Raises:
        CheckpointError: a folder must not be published.
    """
    code = [file for name in ("app", "vca") for file in sorted((ROOT / name).rglob("*")) if _is_code(file)]
    own = [*code, ROOT / "LICENSE", ROOT / "requirements.txt"]
    files: dict[str, Path | bytes] = {file.relative_to(ROOT).as_posix(): file for file in own}
    front = yaml.safe_dump(front_matter(repositories, published), sort_keys=False, allow_unicode=True)
    files["app.py"] = _filled("app.py", models=",".join(repositories))
    files["README.md"] = _filled("README.md", front_matter=front, title=TITLE)
    for folder in folders:
        carried = published_files(folder, vca.checkpoint.place(folder))
        files |= {f"weights/{folder.resolve().name}/{name}": content for name, content in carried.items()}
    return files


def _filled(name: str, **words: str) -> bytes:
    """The file that a Space has by this name, from its template."""
    return Template((TEMPLATES / f"{name}.template").read_text(encoding="utf-8")).substitute(words).encode()


def _is_code(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(ROOT).parts)
    return file.is_file() and not hidden and "__pycache__" not in file.parts


def front_matter(repositories: list[str], published: Iterable[str] = FILES) -> dict:
    """What a Space says about itself: how it is built, and which repositories it uses.

    It preloads what every checkpoint has, and the autoencoder of the first repository, if that has `published` one.
    """
    own = [*FILES, *(name for name in AUTOENCODER_FILES if name in published)]
    names = [REPO_ID.fullmatch(name) for name in repositories]
    built = dict(
        title=TITLE,
        emoji="🔍",
        colorFrom="indigo",
        colorTo="gray",
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version="3.12",
        app_file="app.py",
        license="apache-2.0",
        short_description=SHORT,
        suggested_hardware="cpu-basic",
        tags=["visual-contrast-attention", "attention", "interpretability", "image-classification", "mcp-server"],
    )
    used = dict(
        models=[name["repo"] for name in names],
        preload_from_hub=[
            " ".join(filter(None, (name["repo"], ",".join(FILES if number else own), name["revision"])))
            for number, name in enumerate(names)
        ],
    )
    return built | used if names else built


def report(title: str, files: dict[str, Path | bytes]) -> None:
    """Prints every file with its size."""
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    print(f"{title}: {len(sizes)} files, {sum(sizes.values()):,} bytes")
    for name in sorted(sizes):
        print(f"{sizes[name]:>13,}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="folder, or for a Space also a Hub id")
    parser.add_argument("--repo", metavar="USER/REPO", help="publish the folder here")
    parser.add_argument("--space", metavar="USER/SPACE", help="publish the app here")
    parser.add_argument("--private", action="store_true", help="only for you; a Space then needs the secret HF_TOKEN")
    parser.add_argument("--revision", metavar="BRANCH", help="branch of --repo; default main")
    parser.add_argument("--dry-run", action="store_true", help="print every file with its size, send nothing")
    args = parser.parse_args()
    if not (args.repo or args.space):
        parser.error("give --repo, --space, or both.")
    folders = [Path(name) for name in args.checkpoints if Path(name).is_dir()]
    repositories = [name for name in args.checkpoints if not Path(name).is_dir()]
    for name in [*filter(None, (args.repo, args.space)), *repositories]:
        if not REPO_ID.fullmatch(name):
            parser.error(f"{name!r} is neither a folder nor a name such as user/repo.")
    if not args.checkpoints:
        parser.error("name a checkpoint.")
    if args.repo and (len(folders) != 1 or (repositories and not args.space)):
        missing = f" There is no folder {repositories[0]}." if repositories else ""
        parser.error(f"--repo publishes exactly one folder.{missing}")
    try:
        targets, published = [], FILES
        if args.repo:
            published = published_files(folders.pop(), args.repo)
            targets.append(("model", args.repo, published))
            repositories.insert(0, f"{args.repo}@{args.revision}" if args.revision else args.repo)
        if args.space:
            targets.append(("space", args.space, space_files(folders, repositories, published)))
        for kind, repo, files in targets:
            if args.dry_run:
                report(f"{repo} ({kind})", files)
                continue
            own = dict(revision=args.revision) if kind == "model" else dict(owned=("app/", "vca/", "weights/"))
            print(f"{repo}: {upload(files, repo, kind=kind, private=args.private, **own)}")
    except (vca.CheckpointError, vca.PushError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    interruptible(main)
