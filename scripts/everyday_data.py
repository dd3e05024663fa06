"""Lays out the data of the photo model: two ImageFolders under one vocabulary, and tests by source.

    python -m scripts.everyday_data --photos FOLDER --tinyimagenet FOLDER --vocabulary FILE --out EVERYDAY

Of the classes that both sources have, a quarter are labeled in one of them only. The other source's pictures of them
are the test of what a stranger brings. The alphabet decides which, whatever their accuracy. EVERYDAY holds links:

    train, val            of every class, from the sources it is trained on; the few photos come REPEATS times in train.
                          With them, without a label, half of what is held back, see `sources.json`
    val_photos            the photos' whole validation split
    val_tinyimagenet      Tiny-ImageNet-100's
    other_sources         pictures of a class from the source that does not label it
    new_sources           the same of classes of which this source gives no picture at all, labeled or not
    unlabeled/train, val  all training and validation images, those of --unlabeled too, for training.transfer
    sources.json          the classes that each source labels
    teacher_classes.json  what each class is among the 1,000 of ImageNet, as far as it is among them

With --per-class N, train has no more than N links of a class from each source, evenly from all that it would have.
With --unlabeled-per-class N, the pictures that a source does not label come again until they are N of each class.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import cycle, product
from pathlib import Path

REPEATS = 2
IMAGENET = Path(__file__).with_name("everyday_imagenet.json")


def held_back(vocabulary: dict) -> dict[str, list[str]]:
    """The classes that a source has, but does not label. Of the first one no picture is trained on at all."""
    shared = sorted(set(vocabulary["photos"].values()) & set(vocabulary["tinyimagenet100"].values()))
    return dict(photos=shared[::8], tinyimagenet100=shared[1::8])


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


def repeat(links: list[Path], least: int) -> None:
    """Links the same files again, in turn, until there are `least`."""
    for number, file in zip(range(len(links), least), cycle(links), strict=False):
        source, _, name = file.name.split("-", 2)
        link(file, file.with_name(f"{source}-again{number}-{name}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--photos", "--tinyimagenet", "--vocabulary", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--unlabeled", type=Path, nargs="*", default=[], help="more ImageFolders for the transfer")
    parser.add_argument("--per-class", type=int, help="at most so many images of a class and source in train")
    parser.add_argument("--unlabeled-per-class", type=int, default=0, help="at least so many of those without a label")
    args = parser.parse_args()
    vocabulary = json.loads(args.vocabulary.read_text())
    sources = dict(photos=(args.photos, REPEATS), tinyimagenet100=(args.tinyimagenet, 1))
    kept_back = held_back(vocabulary)
    out = args.out
    for source, (folder, repeats) in sources.items():
        for split in ("train", "val"):
            for number, file in enumerate(images(folder / split)):
                name = vocabulary[source][file.parent.name]
                own = f"{source}-{file.parent.name}-{file.name}"
                link(file, out / "unlabeled" / split / own)
                if split == "val":
                    link(file, out / f"val_{source.removesuffix('100')}" / name / own)
                if name in kept_back[source]:
                    new = name == kept_back[source][0]
                    tested = split == "val" or (source == "photos" and (new or number % 2 == 1))
                    if tested:
                        link(file, out / ("new_sources" if new else "other_sources") / name / f"{split}-{own}")
                    if new or tested:
                        continue
                for copy in range(repeats if split == "train" else 1):
                    link(file, out / split / name / f"{source}-{copy}-{file.parent.name}-{file.name}")
    if args.per_class:
        for folder, source in product((out / "train").iterdir(), sources):
            thin(sorted(folder.glob(f"{source}-?-*")), args.per_class)
    for source, names in kept_back.items():
        for name in names[1:]:
            repeat(sorted((out / "train" / name).glob(f"{source}-?-*")), args.unlabeled_per_class)
    for folder in args.unlabeled:
        for split in ("train", "val"):
            for file in images(folder / split):
                link(file, out / "unlabeled" / split / f"{folder.name}-{file.parent.name}-{file.name}")
    labeled = {source: sorted(set(vocabulary[source].values()) - set(kept_back[source])) for source in sources}
    (out / "sources.json").write_text(json.dumps(labeled, indent=2))
    (out / "teacher_classes.json").write_text(IMAGENET.read_text())
    for split in sorted(path for path in out.iterdir() if path.is_dir() and path.name != "unlabeled"):
        print(f"{split}: {sum(1 for _ in images(split))} images of {sum(1 for _ in split.iterdir())} classes")


if __name__ == "__main__":
    main()
