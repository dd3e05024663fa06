"""Writes the tables into docs/evidence.md from the published logs, and draws their curves.

    python -m scripts.evidence

`docs/evidence/NAME.json` is the `log.json` of a `training.compare`. The page holds its table between the lines
`<!-- NAME -->` and `<!-- end -->`; the curves are `docs/evidence/NAME.png`.
"""

import json
import re
from pathlib import Path

from training.core.comparison import draw_curves, table
from vca.checkpoint import write_atomically

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evidence.md"


def read_logs() -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in sorted((ROOT / "docs" / "evidence").glob("*.json"))}


def fill(page: str, tables: dict[str, str]) -> str:
    """The text of a page with the tables between their marks.

    Raises:
        ValueError: a mark has no table or no end.
    """

    def replaced(match: re.Match) -> str:
        name = match[1]
        if name not in tables:
            raise ValueError(f"<!-- {name} --> has no log {name}.json.")
        return f"<!-- {name} -->\n{tables[name]}\n<!-- end -->"

    begun = len(re.findall(r"^<!-- (?!end -->)[\w-]+ -->$", page, re.M))
    filled, count = re.subn(r"^<!-- (?!end -->)([\w-]+) -->\n.*?^<!-- end -->$", replaced, page, flags=re.M | re.S)
    if count != begun:
        raise ValueError("a mark has no <!-- end -->.")
    return filled


def main() -> None:
    logs = read_logs()
    tables = {name: table(log) for name, log in logs.items()}
    write_atomically(PAGE, fill(PAGE.read_text(encoding="utf-8"), tables).encode())
    for name, log in logs.items():
        draw_curves(log, ROOT / "docs" / "evidence" / f"{name}.png")


if __name__ == "__main__":
    main()
