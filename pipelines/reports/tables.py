"""Tables for a terminal, no wider than its window."""

import shutil
import textwrap
from collections.abc import Sequence

_CELL = 26  # characters of a cell; of a fixed one a third of the window
_GAP = "  "


def text_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], fixed: int, width: int | None = None
) -> str:
    """The title, and a line for each row. The first `fixed` columns are always there, others as far as they fit;
    those left out are named below. `width`: None = of the window, 160 where the output is no terminal."""
    width = width or shutil.get_terminal_size((160, 24)).columns
    most = max(_CELL, width // 3)
    cells = [list(columns)]
    cells += [[_short(cell, most if number < fixed else _CELL) for number, cell in enumerate(row)] for row in rows]
    widths = [max(len(row[number]) for row in cells) for number in range(len(columns))]
    shown, used = [], 0
    for number, size in enumerate(widths):
        if number < fixed or used + size <= width:
            shown.append(number)
            used += size + len(_GAP)
    lines = textwrap.wrap(title, width)
    lines += [_GAP.join(row[number].ljust(widths[number]) for number in shown).rstrip() for row in cells]
    if left := [name for number, name in enumerate(columns) if number not in shown]:
        lines += textwrap.wrap(f"(a wider window shows also: {', '.join(left)})", width)
    return "\n".join(lines)


def _short(cell: str, most: int) -> str:
    return cell if len(cell) <= most else f"{cell[: most - 1]}…"
