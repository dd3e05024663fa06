"""Writes the tables and their curves into docs/evidence.md from the published logs.

    python -m scripts.evidence

`docs/evidence/NAME.json` is the `log.json` of a `training.compare`. The page holds its table and its curves,
`docs/evidence/NAME.png`, between the lines `<!-- NAME -->` and `<!-- end -->`; without such a log it says so there. The
table of the generators that ship is that of their checkpoints, as `training.quality` measured them.
"""

import json
import re
from pathlib import Path

from training.core.comparison_report import draw_curves, table
from training.core.generator_card import deviation
from vca.checkpoint import write_atomically

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evidence.md"
GENERATORS = ("vca_sit_xs_2_scenes", "sit_xs_2_scenes")
NOT_RUN = "*This has not been run to its end yet.*"


def read_logs() -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in sorted((ROOT / "docs" / "evidence").glob("*.json"))}


def section(name: str, log: dict) -> str:
    """What the page shows of a log."""
    return f"{table(log)}\n\n![The curves of every run](evidence/{name}.png)"


def generators() -> str:
    """A table of the generators of `GENERATORS`, at every guidance scale."""
    files = {name: ROOT / "weights" / name / "config.json" for name in GENERATORS}
    if not all(file.exists() for file in files.values()):
        return NOT_RUN
    runs = {name: json.loads(file.read_text())["training"][-1] for name, file in files.items()}
    if not all("quality" in run["results"] for run in runs.values()):
        return NOT_RUN
    numbers = dict(recognised="recognised", frechet_distance="Fréchet distance", precision="precision", recall="recall")
    lines = [f"| generator | steps | validation loss | guidance | {' | '.join(numbers.values())} |", "|---" * 8 + "|"]
    for name, run in runs.items():
        for row in run["results"]["quality"]["guidance"]:
            cells = [f"{row[key]:.1f}{deviation(row, key)}" for key in numbers]
            loss = f"{run['results']['val_loss']:.4f}"
            lines.append(f"| `{name}` | {run['steps']:,} | {loss} | {row['guidance']:g} | {' | '.join(cells)} |")
    real = runs[GENERATORS[0]]["results"]["quality"]["held_out"]
    lines.append(f"| {real['images']:,} real images | | | | {' | '.join(f'{real[key]:.1f}' for key in numbers)} |")
    return "\n".join(lines)


def sections(logs: dict[str, dict]) -> dict[str, str]:
    """What stands between the marks of the page."""
    return {name: section(name, log) for name, log in logs.items()} | dict(generators=generators())


def fill(page: str, sections: dict[str, str]) -> str:
    """The text of a page with sections between their marks, and `NOT_RUN` where there is none.

    Raises:
        ValueError: a mark has no end.
    """

    def replaced(match: re.Match) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{sections.get(name, NOT_RUN)}\n<!-- end -->"

    begun = len(re.findall(r"^<!-- (?!end -->)[\w-]+ -->$", page, re.M))
    filled, count = re.subn(r"^<!-- (?!end -->)([\w-]+) -->\n.*?^<!-- end -->$", replaced, page, flags=re.M | re.S)
    if count != begun:
        raise ValueError("a mark has no <!-- end -->.")
    return filled


def main() -> None:
    logs = read_logs()
    write_atomically(PAGE, fill(PAGE.read_text(encoding="utf-8"), sections(logs)).encode())
    for name, log in logs.items():
        draw_curves(log, ROOT / "docs" / "evidence" / f"{name}.png")


if __name__ == "__main__":
    main()
