"""One self-contained HTML page of a run: pictures inlined as data URIs, no script, nothing fetched from anywhere."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIDE, SMALL_SIDE = 1024, 448  # pixels of the pictures on the page: more would make it megabytes, and show no more


@dataclass(frozen=True)
class Outcome:
    """What one method made of one sample. `correct` is None where the true answer is unknown."""

    method: str
    text: str
    correct: bool | None = None
    passes: int = 0
    seconds: float = 0.0
    boxes: tuple[tuple[float, ...], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """One sample: its question, its pictures (caption, image; the first is large), what each method answered."""

    name: str
    question: str
    pictures: "tuple[tuple[str, Image], ...]"
    outcomes: tuple[Outcome, ...]
    expected: str | None = None


def render(title: str, facts: Sequence[tuple[str, str]], entries: Iterable[Entry]) -> str:
    """The page as one HTML string.

    title: heading of the page.
    facts: what holds for the whole run, as (label, value).
    entries: the samples, in the order of the page.
    """
    entries = tuple(entries)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<dl>{"".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in facts)}</dl>
{_summary(entries)}
</header>
<main>
{"".join(_section(number, entry) for number, entry in enumerate(entries, 1))}
</main>
</body>
</html>
"""


def data_uri(image: "Image", max_side: int = MAX_SIDE) -> str:
    """The image as a JPEG data URI, shrunk so that its longer side is at most `max_side` pixels."""
    image = image.convert("RGB")
    image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _summary(entries: Sequence[Entry]) -> str:
    """Per method: right answers of those that can be judged, and mean passes."""
    by_method: dict[str, list[Outcome]] = {}
    for entry in entries:
        for outcome in entry.outcomes:
            by_method.setdefault(outcome.method, []).append(outcome)
    rows = []
    for method, outcomes in by_method.items():
        judged = [outcome.correct for outcome in outcomes if outcome.correct is not None]
        right = f"{sum(judged)} of {len(judged)}" if judged else "–"
        share = f'<meter min="0" max="1" value="{sum(judged) / len(judged):.3f}"></meter>' if judged else ""
        passes = sum(outcome.passes for outcome in outcomes) / len(outcomes)
        rows.append(f"<tr><th>{escape(method)}</th><td>{right}</td><td>{share}</td><td>{passes:.1f}</td></tr>")
    if not rows:
        return ""
    return (
        '<table class="summary"><thead><tr><th>method</th><th colspan="2">right</th>'
        f"<th>passes per question</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _section(number: int, entry: Entry) -> str:
    figures = "".join(
        f'<figure><img src="{data_uri(image, SMALL_SIDE if place else MAX_SIDE)}" alt="{escape(caption)}" '
        f'width="{image.width}" height="{image.height}"><figcaption>{escape(caption)}</figcaption></figure>'
        for place, (caption, image) in enumerate(entry.pictures)
    )
    expected = "" if entry.expected is None else f'<p class="expected">true answer <b>{escape(entry.expected)}</b></p>'
    return f"""<section id="sample-{number}">
<h2><span>{escape(entry.name)}</span>{escape(entry.question)}</h2>
{expected}
<div class="pictures">{figures}</div>
<table><thead><tr><th>method</th><th>answer</th><th></th><th>passes</th><th>seconds</th><th>box</th></tr></thead>
<tbody>{"".join(map(_row, entry.outcomes))}</tbody></table>
</section>
"""


def _row(outcome: Outcome) -> str:
    verdict = {True: '<b class="right">✓ right</b>', False: '<b class="wrong">✗ wrong</b>', None: ""}[outcome.correct]
    boxes = "; ".join(", ".join(str(round(float(edge))) for edge in box) for box in outcome.boxes)
    note = f'<small class="wrong">{escape(outcome.note)}</small>' if outcome.note else ""
    return (
        f'<tr><th>{escape(outcome.method)}</th><td class="answer">{escape(outcome.text)}{note}</td>'
        f"<td>{verdict}</td><td>{outcome.passes}</td><td>{outcome.seconds:.1f}</td><td>{boxes}</td></tr>"
    )


STYLE = """
:root {
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d1c1a; --soft: #6d6a63; --line: #e4e1d9;
  --right: #1a7f4b; --wrong: #b3372b; --accent: #b4541a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161614; --card: #1f1f1c; --ink: #ecebe6; --soft: #a09d94; --line: #35342f;
    --right: #5bc98d; --wrong: #f0857a; --accent: #f0a35e;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3rem 1.25rem 5rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0 0 1rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; text-wrap: balance; }
h2 { margin: 0; font-size: 1.2rem; line-height: 1.35; font-weight: 600; text-wrap: pretty; }
h2 span {
  display: block; color: var(--accent); font-size: .75rem; font-weight: 600; letter-spacing: .08em;
  text-transform: uppercase;
}
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0 0 2rem; }
dt, thead th, figcaption, .expected { color: var(--soft); font-size: .8125rem; font-weight: 400; }
dd { margin: 0; }
section {
  margin: 1.5rem 0; padding: 1.5rem; background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
}
.expected { margin: .25rem 0 0; font-size: .9375rem; }
.expected b { color: var(--ink); }
.pictures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1rem; margin: 1.25rem 0; align-items: start; }
figure { margin: 0; min-width: 0; }
figure:first-child { grid-area: span 2 / span 2; }
@media (max-width: 40rem) {
  .pictures { grid-template-columns: 1fr 1fr; }
}
img { display: block; width: 100%; height: auto; border-radius: .375rem; }
figcaption { margin-top: .375rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td {
  padding: .45rem .75rem .45rem 0; text-align: left; vertical-align: baseline; border-top: 1px solid var(--line);
}
thead th { border-top: 0; padding-top: 0; }
tbody th { font-weight: 600; white-space: nowrap; }
.answer { width: 40%; overflow-wrap: anywhere; }
.summary { width: auto; min-width: min(28rem, 100%); }
.summary td, .summary th { padding-right: 1.5rem; }
meter { width: 8rem; height: .6rem; }
small { display: block; }
.right { color: var(--right); font-weight: 600; white-space: nowrap; }
.wrong { color: var(--wrong); font-weight: 600; }
@media print { body { padding: 0; } section { break-inside: avoid; } }
"""
