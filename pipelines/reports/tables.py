"""Figures as text, and tables of them: of an evaluation, for a terminal, in Markdown and in LaTeX, on a page."""

import math
import re
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from deedsr.metrics.metric import Metric
from deedsr.metrics.registry import known

if TYPE_CHECKING:
    from deedsr.metrics.intervals import Difference, Interval

_CELL = 26  # characters of a cell; of a fixed one a third of the window
_GAP = "  "


class Cell(NamedTuple):
    text: str
    note: str = ""  # interval, win rate, difference
    best: bool = False  # of its column
    tone: str = ""  # of the note: `good`, `bad`


class Table(NamedTuple):
    head: list[str]
    rows: list[tuple[str, list[Cell]]]  # by label


Figures = dict[str, dict[str, "Interval"]]  # by method and metric


def best_of(values: Collection[float | None], higher_is_better: bool | None) -> float | None:
    """The best of several values; None of fewer than two, and of a metric without a direction."""
    numbers = [value for value in values if value is not None]
    return None if higher_is_better is None or len(numbers) < 2 else (max if higher_is_better else min)(numbers)


def means_table(metrics: Figures, measures: Mapping[str, Metric], labels: Mapping[str, str]) -> Table:
    """A row for each method; the best mean of each metric is marked."""
    best = {
        name: best_of([found[name].mean for found in metrics.values()], metric.higher_is_better)
        for name, metric in measures.items()
    }
    cells = lambda found: [
        _cell(found[name], metric, found[name].mean == best[name]) for name, metric in measures.items()
    ]
    rows = [(labels[method], cells(found)) for method, found in metrics.items()]
    return Table([metric_title(metric) for metric in measures.values()], rows)


def differences_table(
    changes: "Sequence[Difference]", measures: Mapping[str, Metric], labels: Mapping[str, str]
) -> Table:
    """A row for each two methods: mean difference, interval, and on how many pictures the first one is better."""
    names = [name for name in measures if any(change.metric == name for change in changes)]
    rows: dict[str, dict[str, Cell]] = {}
    for change in changes:
        metric, label = measures[change.metric], f"{labels[change.method]} - {labels[change.other]}"
        cell = _cell(change, metric, sign="+")
        wins = f" {100 * change.wins:.0f}%" if change.wins is not None else ""
        rows.setdefault(label, {})[change.metric] = cell._replace(note=cell.note + wins)
    return Table(
        [metric_title(measures[name]) for name in names],
        [(label, [cells.get(name, Cell("-")) for name in names]) for label, cells in rows.items()],
    )


def _cell(figure: "Interval | Difference", metric: Metric, best: bool = False, sign: str = "") -> Cell:
    if figure.mean is None:
        return Cell("-")
    number = f"{sign}.{metric.digits}f"
    note = f"[{figure.low:{number}}, {figure.high:{number}}]" if figure.low is not None else ""
    return Cell(f"{figure.mean:{number}}", note, best)


def methods_table(metrics: Mapping[str, Mapping[str, float | None]]) -> Table:
    """A table of methods by metrics: the best value of each is marked, notes are differences from the first method."""
    first = next(iter(metrics.values()))

    def cell(name: str, row: Mapping[str, float | None]) -> Cell:
        value, baseline = row.get(name), first.get(name)
        if value is None:
            return Cell("–")
        # Of a metric of another package the direction is not known here: none is called the best.
        higher = known()[name].higher_is_better if name in known() else None
        best = best_of([one.get(name) for one in metrics.values()], higher)
        shown = Cell(metric_text(value, name), best=value == best)
        if row is first or baseline is None:
            return shown
        difference = value - baseline
        note = f"{'+' if difference >= 0 else '−'}{metric_text(abs(difference), name)}"
        return shown._replace(note=note, tone="good" if difference and higher == (difference > 0) else "bad")

    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    head = [metric_title(known()[name]) if name in known() else name for name in names]
    return Table(head, [(label, [cell(name, row) for name in names]) for label, row in metrics.items()])


def plain(table: Table) -> str:
    """For a terminal."""
    lines = [["", *table.head], *([label, *(f"{c.text} {c.note}".strip() for c in row)] for label, row in table.rows)]
    return "\n".join(_aligned(lines))


def markdown(table: Table) -> str:
    escaped = lambda text: text.replace("|", "\\|")
    shown = lambda cell: f"**{cell.text}** {cell.note}" if cell.best else f"{cell.text} {cell.note}"
    lines = [["", *table.head], ["---"] * (len(table.head) + 1)]
    lines += [[escaped(label), *(shown(cell).strip() for cell in row)] for label, row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex(table: Table) -> str:
    """Needs no package."""
    shown = lambda cell: rf"\textbf{{{cell.text}}}" if cell.best else cell.text
    small = lambda note: rf" {{\scriptsize {_escaped(note)}}}" if note else ""
    lines = [["", *map(_escaped, table.head)]]
    lines += [[_escaped(label), *(shown(cell) + small(cell.note) for cell in row)] for label, row in table.rows]
    head, *body = [" & ".join(line) + r" \\" for line in lines]
    columns = "l" * (len(table.head) + 1)
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\hline", head, r"\hline", *body, r"\hline", r"\end{tabular}"]
    )


def _escaped(text: str) -> str:
    text = re.sub(r"([&%$#_{}])", r"\\\1", text)
    return text.replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$")


def text_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], fixed: int, width: int | None = None
) -> str:
    """The title, and a line for each row. The first `fixed` columns are always there, others as far as they fit;
    those left out are named below. `width`: None = of the window, 160 where the output is no terminal."""
    width = width or shutil.get_terminal_size((160, 24)).columns
    most = max(_CELL, width // 3)
    cells = [list(columns)]
    cells += [[_short(cell, most if number < fixed else _CELL) for number, cell in enumerate(row)] for row in rows]
    shown, used = [], 0
    for number, column in enumerate(zip(*cells, strict=True)):
        size = max(map(len, column))
        if number < fixed or used + size <= width:
            shown.append(number)
            used += size + len(_GAP)
    lines = textwrap.wrap(title, width) + _aligned([[row[number] for number in shown] for row in cells])
    if left := [name for number, name in enumerate(columns) if number not in shown]:
        lines += textwrap.wrap(f"(a wider window shows also: {', '.join(left)})", width)
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_GAP.join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _short(cell: str, most: int) -> str:
    return cell if len(cell) <= most else f"{cell[: most - 1]}…"


def metric_title(metric: Metric | type[Metric]) -> str:
    return f"{metric.title}{f' {metric.unit}' if metric.unit else ''} {'↑' if metric.higher_is_better else '↓'}"


def metric_text(value: float, metric: str = "") -> str:
    """A metric to the digits in which it is usually given; other figures to four significant digits."""
    return f"{value:.{known()[metric].digits}f}" if metric in known() else number_text(value)


def number_text(value: float) -> str:
    """Four significant digits at most, thousands grouped, a true minus sign."""
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3g}".replace("-", "−")
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{digits}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−")


def count_text(value: int) -> str:
    """A whole number in full, its thousands apart."""
    return f"{value:,}"


def bytes_text(size: float) -> str:
    """Bytes in powers of 1000: `820 B`, `1.2 MB`, `340 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB" if size < 999.5 else f"{size:,.0f} TB"


def share_text(share: float) -> str:
    """A share in per cent; only 0 is shown as 0 %, and only 1 as 100 %."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.1f} %"


def duration_text(seconds: float) -> str:
    """Seconds as text: `0.42 s`, `38 s`, `9 min 12 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
