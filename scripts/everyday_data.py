"""Lays out the data of the photo model: two ImageFolders under one vocabulary, and tests by source.

    python -m scripts.everyday_data --photos FOLDER --tinyimagenet FOLDER --vocabulary FILE --out EVERYDAY

Of the classes that both sources have, a quarter keep only one of them for training. The other source's pictures of them
are the test of what a stranger brings (EVERYDAY/other_sources). The alphabet decides which, whatever their accuracy.
EVERYDAY holds links:

    train, val            of every class, from the sources it is trained on; the few photos come REPEATS times in train
    val_photos            the photos' whole validation split
    val_tinyimagenet      Tiny-ImageNet-100's
    other_sources         pictures of a class from the source that it was not trained on
    unlabeled/train, val  all training and validation images, those of --unlabeled too, for training.transfer

With --per-class N, train has no more than N links of a class from each source, evenly from all that it would have.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

REPEATS = 2


def held_back(vocabulary: dict) -> dict[str, set[str]]:
    """The classes by the source of which none of their pictures are trained on."""
    shared = sorted(set(vocabulary["photos"].values()) & set(vocabulary["tinyimagenet100"].values()))
    return dict(photos=set(shared[::8]), tinyimagenet100=set(shared[1::8]))


def images(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".txt")


def link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(file.resolve())


def thin(links: list[Path], most: int) -> None:
    """Removes links, evenly over the list, until there are `most`."""
    kept = {links[i * len(links) // most] for i in range(most)} if len(links) > most else set(links)
    for path in set(links) - kept:
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--photos", "--tinyimagenet", "--vocabulary", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--unlabeled", type=Path, nargs="*", default=[], help="more ImageFolders for the transfer")
    parser.add_argument("--per-class", type=int, help="at most so many images of a class and source in train")
    args = parser.parse_args()
    vocabulary = json.loads(args.vocabulary.read_text())
    sources = dict(photos=(args.photos, REPEATS), tinyimagenet100=(args.tinyimagenet, 1))
    kept_back = held_back(vocabulary)
    out = args.out
    for source, (folder, repeats) in sources.items():
        for split in ("train", "val"):
            for file in images(folder / split):
                name = vocabulary[source][file.parent.name]
                own = f"{source}-{file.parent.name}-{file.name}"
                link(file, out / "unlabeled" / split / own)
                if split == "val":
                    link(file, out / f"val_{source.removesuffix('100')}" / name / own)
                if name not in kept_back[source]:
                    for copy in range(repeats if split == "train" else 1):
                        link(file, out / split / name / f"{copy}-{own}")
                elif split == "val" or source == "photos":
                    link(file, out / "other_sources" / name / own)
    if args.per_class:
        for folder, source in product((out / "train").iterdir(), sources):
            thin(sorted(folder.glob(f"?-{source}-*")), args.per_class)
    for folder in args.unlabeled:
        for split in ("train", "val"):
            for file in images(folder / split):
                link(file, out / "unlabeled" / split / f"{folder.name}-{file.parent.name}-{file.name}")
    for split in sorted(path for path in out.iterdir() if path.name != "unlabeled"):
        print(f"{split}: {sum(1 for _ in images(split))} images of {sum(1 for _ in split.iterdir())} classes")


if __name__ == "__main__":
    main()
