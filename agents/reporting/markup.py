"""HTML for one self-contained page: elements that escape by default, pictures as data URIs, the style."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final

from PIL import Image

_VOID: Final = frozenset({"img", "link", "meta"})
_ENLARGED: Final = 480  # pixels; wider grids hold pictures that `pictures.grid` did not have to enlarge
_WIDEST: Final = 1200  # pixels; wider grids are made smaller, or the page would have tens of megabytes

_HEAD: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
"""

STYLE: Final = """
:root { color-scheme: light dark;
  --page: #ffffff; --card: #f6f7f9; --line: #e1e5ea; --text: #1b1f24; --muted: #59636e;
  --first: #1f5fc4; --second: #a8500a; --note: #fff7e0; --note-line: #e0b84a;
  --third: #0b7d55; --fourth: #b0388c; --fifth: #6b4fc0; --sixth: #8a6d00; --seventh: #0a7f96; --eighth: #c22b2b; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171b; --card: #1c2026; --line: #313841; --text: #e7eaee; --muted: #9ba6b2;
  --first: #7db1ff; --second: #f0ac5c; --note: #2a2413; --note-line: #8a6d1f;
  --third: #4fd0a0; --fourth: #f08fd0; --fifth: #b7a3ff; --sixth: #e0cc50; --seventh: #58cfe6; --eighth: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 3rem 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0; font-size: clamp(1.35rem, 4.5vw, 2.1rem); line-height: 1.2; letter-spacing: -.015em;
  overflow-wrap: anywhere; }
h2 { margin: 3.5rem 0 .25rem; font-size: 1.3rem; letter-spacing: -.01em; }
h3 { margin: 1.75rem 0 .5rem; font-size: 1rem; }
p { margin: .25rem 0 1rem; max-width: 50rem; }
.muted, figcaption, .axis { color: var(--muted); }
.lead { font-size: 1.1rem; margin-top: .5rem; }
code, pre { font: .875em/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
.note { margin: 1.25rem 0; padding: .75rem 1rem; max-width: none; background: var(--note);
  border-left: 4px solid var(--note-line); border-radius: 4px; }
.cards { display: grid; gap: .75rem; margin: .75rem 0; }
.results { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); margin-top: 2rem; }
.costs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); }
.card { margin: 0; padding: 1rem 1.25rem; background: var(--card); border-radius: 10px; }
.card p { margin: 0; }
.card .value { font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.35; }
.results .value { font-size: 1.9rem; letter-spacing: -.02em; }
.card .from { color: var(--muted); font-weight: 400; }
.card .detail { font-size: .875rem; color: var(--muted); font-variant-numeric: tabular-nums; }
figure { margin: 0; min-width: 0; }
figcaption { margin-top: .4rem; font-size: .875rem; }
.pair, .charts, .strip { display: grid; gap: 1.5rem; margin: 1rem 0; }
.charts { gap: 0 2rem; }
.pair, .charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.strip { gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
img.pixelated { image-rendering: pixelated; }
.chart { display: flow-root; margin: 1.25rem 0 0; }
.chart > svg { width: calc(100% - 4.65rem); margin: .8rem .75rem 3rem 3.9rem; padding: 0; }
.chart.rows > svg { width: calc(100% - 1.5rem); margin-left: .75rem; }
.chart svg { display: block; overflow: visible; }
.chart svg text { font-size: .8125rem; fill: var(--muted); font-variant-numeric: tabular-nums; }
.chart .grid { stroke: var(--line); }
.chart path { fill: none; stroke: var(--ink); stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round; }
.chart circle { fill: var(--ink); opacity: .4; }
.chart .level { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 5 5; }
.chart .band { fill: var(--ink); stroke: none; opacity: .16; }
.chart .interval { stroke: var(--ink); stroke-width: 4; stroke-linecap: round; opacity: .45; }
.chart .mark { stroke: var(--muted); stroke-dasharray: 3 4; }
.chart .whole circle { opacity: 1; }
.chart svg text.name { fill: var(--text); }
.chart rect { fill: var(--ink); }
.dashed path { stroke-dasharray: 7 5; }
.first { --ink: var(--first); } .second { --ink: var(--second); }
.series-1 { --ink: var(--first); } .series-2 { --ink: var(--second); } .series-3 { --ink: var(--third); }
.series-4 { --ink: var(--fourth); } .series-5 { --ink: var(--fifth); } .series-6 { --ink: var(--sixth); }
.series-7 { --ink: var(--seventh); } .series-8 { --ink: var(--eighth); }
.title { margin: 0; font-weight: 600; font-size: .95rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; margin: .2rem 0 0; padding: 0; list-style: none;
  font-size: .875rem; color: var(--muted); }
.legend svg, .chart .legend svg { display: inline-block; width: 1.6rem; margin: 0 .45rem 0 0; vertical-align: middle; }
.scroll { overflow: auto; max-height: 29rem; border: 1px solid var(--line); border-radius: 10px; }
:focus-visible { outline: 2px solid var(--first); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th[scope="row"], thead th:first-child[rowspan] { text-align: left; white-space: normal; min-width: 11rem;
  overflow-wrap: anywhere; }
thead { position: sticky; top: 0; background: var(--card); }
thead th { color: var(--muted); font-weight: 600; }
thead th[colspan] { text-align: left; border-left: 1px solid var(--line); }
tbody th { font-weight: 400; }
.family th, .family td { background: var(--card); font-weight: 600; }
tbody:last-child tr:last-child > * { border-bottom: 0; }
.plain { max-height: none; }
.files { margin: 0; font-size: .8125rem; color: var(--muted); }
.files a { color: inherit; }
.scroll + .files { margin-top: .4rem; }
a { color: var(--first); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1.5rem 0 0; font-size: .9rem; }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: 10px; padding: .55rem 1rem; }
details[open] { padding-bottom: 1rem; }
summary { cursor: pointer; font-weight: 600; font-size: .95rem; overflow-wrap: anywhere; }
summary .muted { font-weight: 400; }
h4 { margin: 1.25rem 0 .25rem; font-size: .9rem; }
.samples { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 12rem), 1fr)); }
.rolls { display: grid; gap: 1.1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
b.whole { white-space: nowrap; }
.labels { display: grid; grid-auto-columns: 1fr; grid-auto-flow: column; text-align: center; font-size: .72rem;
  color: var(--muted); font-variant-numeric: tabular-nums; line-height: 1.5; }
.columns { columns: 18rem; column-gap: 3rem; margin: 1.25rem 0; }
.columns section { break-inside: avoid; padding-bottom: 1.5rem; }
.columns h3 { margin-top: 0; }
dl { display: grid; grid-template-columns: auto 1fr; margin: 0; font-size: .9rem; }
dt, dd { margin: 0; padding: .25rem 0; border-bottom: 1px solid var(--line); }
dt { color: var(--muted); padding-right: 1rem; }
dd { text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre { margin: .75rem 0; padding: 1rem 1.25rem; overflow-x: auto; background: var(--card); border-radius: 10px; }
@media (max-width: 40rem) { body { padding-top: 2rem; } th, td { padding: .4rem .6rem; }
  th[scope="row"], thead th:first-child[rowspan] { min-width: 8.5rem; } .results .value { font-size: 1.7rem; } }
@media print { .scroll { max-height: none; } figure, .card { break-inside: avoid; } }
"""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, *content: object, **attributes: object) -> Html:
    """One element.

    Args:
        tag: its name.
        content: what is inside; whatever is not `Html` is escaped.
        attributes: always escaped; `class_` stands for `class`, and any other `_` for `-`.
    """
    pairs = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    inner = "" if tag in _VOID else f"{join(content)}</{tag}>"
    return Html(f"<{tag}{pairs}>{inner}")


def join(parts: Iterable[object]) -> Html:
    """Parts one after the other; whatever is not `Html` is escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts))


def page(title: str, *content: Html) -> str:
    """A whole document, which may not load anything from anywhere."""
    head = join([element("title", title), Html(f"<style>{STYLE}</style>")])
    return f"{_HEAD}{head}\n</head>\n<body>\n<main>\n" + "\n".join(content) + "\n</main>\n</body>\n</html>\n"


def note(*content: object) -> Html:
    """A paragraph that the reader should not miss."""
    return element("p", *content, class_="note", role="note")


def card(label: str, value: object, *details: object) -> Html:
    """A number with its name above and what to know about it below."""
    below = [element("p", detail, class_="detail") for detail in details]
    return element(
        "div", element("p", label, class_="muted"), element("p", value, class_="value"), *below, class_="card"
    )


def picture(path: Path, alt: str, caption: object) -> Html:
    """A picture file as a figure, its bytes within the page."""
    return element("figure", image(path.read_bytes(), alt), element("figcaption", caption))


def image(data: bytes, alt: str, widest: int = _WIDEST) -> Html:
    """A PNG picture, its bytes within the page; one wider than `widest` pixels is made smaller, a JPEG."""
    kind = "png"
    with Image.open(io.BytesIO(data)) as opened:
        width, height = opened.size
        if width > widest:
            width, height = widest, round(height * widest / width)
            buffer = io.BytesIO()
            opened.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=88)
            data, kind = buffer.getvalue(), "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    pixels = "pixelated" if width <= _ENLARGED else "smooth"
    return element("img", src=source, alt=alt, width=width, height=height, class_=pixels)


def table(
    label: str,
    head: Sequence[str | tuple[str, Sequence[str]]],
    groups: Iterable[Sequence[tuple[str, Sequence[object]]]],
) -> Html:
    """A table in a box of its own, in which it scrolls.

    Args:
        label: what a screen reader calls it.
        head: names of the columns, the later ones in groups: a group is its name and those of its columns.
        groups: row groups; a row is its class ("" for none) and its cells, the first of which heads it.
    """
    top = element("thead", *_head_rows(head))
    bodies = [element("tbody", *(_row(kind, cells) for kind, cells in rows)) for rows in groups]
    return element("div", element("table", top, *bodies), class_="scroll", tabindex=0, role="region", aria_label=label)


def _head_rows(head: Sequence[str | tuple[str, Sequence[str]]]) -> tuple[Html, Html]:
    upper, lower = [], []
    for entry in head:
        if isinstance(entry, str):
            upper.append(element("th", entry, scope="col", rowspan=2))
        else:
            upper.append(element("th", entry[0], scope="colgroup", colspan=len(entry[1])))
            lower += [element("th", name, scope="col") for name in entry[1]]
    return element("tr", *upper), element("tr", *lower)


def _row(kind: str, cells: Sequence[object]) -> Html:
    first, *others = cells
    inside = [element("th", first, scope="row"), *(element("td", cell) for cell in others)]
    return element("tr", *inside, class_=kind) if kind else element("tr", *inside)


def definitions(title: str, entries: Iterable[tuple[object, object]]) -> Html:
    """Names and values under a small heading."""
    pairs = [join([element("dt", name), element("dd", value)]) for name, value in entries]
    return element("section", element("h3", title), element("dl", *pairs))
