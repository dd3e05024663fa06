"""The explorer as one web page that contains its maps and works offline."""

import json
from collections.abc import Iterable
from html import escape

from vca import drawing
from vca.explorer.assets import script, text

MOST_BYTES = 96 * 2**20  # of the maps in one page


class TooLarge(ValueError):
    """Maps that take more than a page may hold; the message is a sentence."""


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' blob:; img-src data: blob:">
<title>%(title)s</title>
<style>
%(css)s
</style>
<body>
<header><h1>Visual-Contrast Attention</h1><p>%(title)s</p></header>
<main>%(html)s</main>
<script>
const saved = %(data)s;
if (matchMedia("(prefers-color-scheme: dark)").matches) document.body.classList.add("dark");
(function (element, props, server, trigger, watch) {
%(js)s
})(document.querySelector("main"), saved.props, { fetch_maps: async ({ block }) => saved.maps[block] }, () => {}, () => {});
</script>
</body>
</html>
"""  # noqa: E501


def page(run: dict, maps: Iterable[dict], view: dict) -> str:
    """A web page that contains a run, its arrays and the whole explorer. It makes no request to a server.

    Args:
        run: what the explorer was given to show: `vca.explorer.packing.run_facts`, and a token.
        maps: the arrays of each block, as they are sent to the page; they are taken one after another.
        view: what to show first.

    Raises:
        TooLarge: the arrays take more than `MOST_BYTES`.
    """
    props = dict(value=json.dumps(run), palette=drawing.PALETTE, view=view, offline=True)
    title = " · ".join(filter(None, [run.get("model"), ": ".join(run["caption"])]))
    before, after = PAGE.split("%(data)s")
    names = dict(
        title=escape(title, quote=False),
        css=text("page.css", "view.css", "explorer.css"),
        html=text("explorer.html"),
        js=script("explorer.js"),
    )
    parts = [before % names, '{"props": ', json.dumps(props).replace("<", "\\u003c"), ', "maps": [']
    size = 0
    for number, arrays in enumerate(maps):
        parts += ["," if number else "", json.dumps(arrays)]
        if (size := size + len(parts[-1])) > MOST_BYTES:
            raise TooLarge("These maps are too large for a page.")
    return "".join([*parts, "]}", after % names])
