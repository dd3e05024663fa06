"""Writes the tables and their curves into docs/evidence.md from the published logs.

    python -m scripts.evidence

`docs/evidence/NAME.json` is the `log.json` of a `training.compare`. The page holds its table and its curves,
`docs/evidence/NAME.png`, between the lines `<!-- NAME -->` and `<!-- end -->`; without such a log it says so there.
"""

import json
import re
from pathlib import Path

from training.core.comparison_report import draw_curves, table
from vca.checkpoint import write_atomically

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evidence.md"
NOT_RUN = "*This has not been run to its end yet.*"


def read_logs() -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in sorted((ROOT / "docs" / "evidence").glob("*.json"))}


def section(name: str, log: dict) -> str:
    """What the page shows of a log."""
    return f"{table(log)}\n\n![The curves of every run](evidence/{name}.png)"


def fill(page: str, logs: dict[str, dict]) -> str:
    """The text of a page with the sections of the logs between their marks, and `NOT_RUN` between those of no log.

    Raises:
        ValueError: a mark has no end.
    """

    def replaced(match: re.Match) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{section(name, logs[name]) if name in logs else NOT_RUN}\n<!-- end -->"

    begun = len(re.findall(r"^<!-- (?!end -->)[\w-]+ -->$", page, re.M))
    filled, count = re.subn(r"^<!-- (?!end -->)([\w-]+) -->\n.*?^<!-- end -->$", replaced, page, flags=re.M | re.S)
    if count != begun:
        raise ValueError("a mark has no <!-- end -->.")
    return filled


def main() -> None:
    logs = read_logs()
    write_atomically(PAGE, fill(PAGE.read_text(encoding="utf-8"), logs).encode())
    for name, log in logs.items():
        draw_curves(log, ROOT / "docs" / "evidence" / f"{name}.png")


if __name__ == "__main__":
    main()
