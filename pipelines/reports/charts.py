"""Curves as inline SVG, and histograms beside what a recipe allows.

Colours and fonts come from the page around them, so that they follow light and dark.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.reports.page import templates

WIDTH, HEIGHT = 1000, 400  # drawing units; the page stretches the plot, lines keep their width
SMOOTHED_FROM = 60  # points: a curve with at least so many is drawn faint, its running mean above it
MAX_POINTS = 600  # of one line in the page
TONES = 8  # colours that stay apart, in `templates/style.html`


def tone(number: int) -> str:
    """Class of a colour."""
    return f"tone-{number}" if number < TONES else "tone-rest"


@dataclass(frozen=True)
class Curve:
    """One line: `points` are (step, value) in rising steps; values that are not finite are left out.

    `tone`: number of its colour, None = its place in the chart; from `TONES` on it is grey until pointed at.
    """

    name: str
    points: Sequence[tuple[float, float]]
    tone: int | None = None

    def finite(self) -> list[tuple[float, float]]:
        points = [(float(x), float(y)) for x, y in self.points if math.isfinite(y)]
        stride = max(1, math.ceil(len(points) / MAX_POINTS))
        return points[:-1:stride] + points[-1:]


def draw(curves: Sequence[Curve], label: str) -> str:
    """Markup of a chart of several curves over one x axis, with axes, ticks and (for more than one) a legend.

    `label` names the vertical axis. Curves without a finite point are left out; with none left, a line of text.
    """
    found = [(curve, points) for curve in curves if (points := curve.finite())]
    numbers = [number if curve.tone is None else curve.tone for number, (curve, _) in enumerate(found)]
    lines = [(curve.name, points, tone(number)) for (curve, points), number in zip(found, numbers, strict=True)]
    xs = [x for _, points, _ in lines for x, _ in points] or [0.0]
    ys = [y for _, points, _ in lines for _, y in points] or [0.0]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6), ticks(min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    left = lambda x: (x - x_low) / (x_high - x_low)
    top = lambda y: 1 - (y - y_low) / (y_high - y_low)
    path = lambda points: "M" + "L".join(f"{left(x) * WIDTH:.1f},{top(y) * HEIGHT:.1f}" for x, y in points)
    paths = []
    for number in sorted(range(len(lines)), key=lambda number: -numbers[number]):  # grey ones below the others
        points = lines[number][1]
        smooth = len(points) >= SMOOTHED_FROM
        raw = path(points) if smooth and numbers[number] < TONES else ""
        paths.append((number, raw, path(running_mean(points) if smooth else points)))
    data = {
        "x": [x_low, x_high],
        "y": [y_low, y_high],
        "rest": [place for place, number in enumerate(numbers) if number >= TONES],
        "lines": [[name, [[x, float(f"{y:.5g}")] for x, y in points]] for name, points, _ in lines],
    }
    return (
        templates()
        .get_template("parts.html")
        .module.chart(  # type: ignore[attr-defined]
            label=label,
            lines=lines,
            paths=paths,
            data=json.dumps(data, separators=(",", ":")),
            size=(WIDTH, HEIGHT),
            x_ticks=[(x, left(x)) for x in x_ticks if x_low <= x <= x_high],
            y_ticks=[(y, top(y)) for y in y_ticks],
        )
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        pad = abs(low) / 10 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(1, about - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each value averaged with its neighbours, about a thirtieth of the curve to each side (less at the ends)."""
    reach = max(2, len(points) // 30)
    smooth = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        window = [y for _, y in points[i - near : i + near + 1]]
        smooth.append((x, sum(window) / len(window)))
    return smooth


_BINS = 30  # over the limits of continuous values
_MAX_BEYOND = 30  # bins on either side of the limits; the outermost also takes what lies still further out


@dataclass(frozen=True)
class Bar:
    """One bin: from `low` to `high`, its count, and that count as a share of the highest bin's."""

    low: float
    high: float
    count: int
    height: float
    outside: bool  # beyond the limits


class Histogram:
    """Counts of numbers over bins that end at `limits` (what is allowed, None if nothing is known) and go beyond them.

    `extremes`: least and greatest value to come, as far as known. `step`: the distance of neighbouring values, each of
    which gets its own bin; 0 for continuous ones.
    """

    def __init__(
        self, limits: tuple[float, float] | None, extremes: tuple[float, float] | None = None, step: float = 0.0
    ):
        self.limits = limits
        least, greatest = extremes or limits or (0.0, 1.0)
        low, high = limits or (least, greatest)
        self.edges, self.width, self.step = (low, high), step, step
        if step:
            low, high = low - step / 2, high + step / 2
        else:
            if high <= low:  # one value: some width around it
                low, high = low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
            self.width = (high - low) / _BINS
        self._inside = max(1, round((high - low) / self.width))
        self._below = min(_MAX_BEYOND, max(0, math.ceil((low - least) / self.width)))
        above = min(_MAX_BEYOND, max(0, math.ceil((greatest - high) / self.width)))
        self.start = low - self._below * self.width
        self.counts = np.zeros(self._below + self._inside + above, np.int64)
        self.outside = 0  # values beyond the limits
        self._sum = 0.0

    def add(self, values: np.ndarray) -> None:
        """Counts some values; those that are not finite are left out."""
        values = values[np.isfinite(values)]
        places = np.floor((values - self.start) / self.width).astype(np.int64).clip(0, len(self.counts) - 1)
        low, high = self.edges
        places[values == high] = self._below + self._inside - 1  # the upper limit belongs to what it limits
        self.counts += np.bincount(places, minlength=len(self.counts))
        self._sum += float(values.sum())
        if self.limits is not None:
            slack = 1e-9 * max(1.0, abs(low), abs(high))
            self.outside += int(np.count_nonzero((values < low - slack) | (values > high + slack)))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return self._sum / self.total

    @property
    def span(self) -> tuple[float, float]:
        """Where the first bin begins and the last one ends."""
        return self.start, self.start + len(self.counts) * self.width

    @property
    def marks(self) -> tuple[float, ...]:
        """Where the limits end: beside the bins of the values that are still allowed."""
        low, high = self.edges
        return (low - self.step / 2, high + self.step / 2) if self.limits else ()

    def place(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        return (value - self.start) / (len(self.counts) * self.width)

    def ticks(self) -> list[float]:
        """Some round numbers between the ends."""
        low, high = self.span
        return [tick for tick in ticks(low, high, 6) if low <= tick <= high]

    def bars(self) -> list[Bar]:
        highest = max(1, int(self.counts.max()))
        return [
            Bar(
                low=self.start + number * self.width,
                high=self.start + (number + 1) * self.width,
                count=int(count),
                height=count / highest,
                outside=self.limits is not None and not 0 <= number - self._below < self._inside,
            )
            for number, count in enumerate(self.counts)
        ]


@dataclass
class NamedCounts:
    """Counts of values that are names: `names[i]` stands for the number i. `expected`: the share each should have."""

    names: Sequence[str]
    expected: Mapping[str, float] = field(default_factory=dict)
    counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.names) + 1, np.int64)  # the last: numbers without a name

    def add(self, values: np.ndarray) -> None:
        """Counts some numbers; those that are not finite are left out."""
        numbers = values[np.isfinite(values)]
        known = (numbers >= 0) & (numbers < len(self.names)) & (numbers == np.floor(numbers))
        places = np.where(known, numbers, len(self.names)).astype(np.int64)
        self.counts += np.bincount(places, minlength=len(self.counts))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def outside(self) -> int:
        """Values that have no name, or one that is never to be drawn."""
        never = [self.expected.get(name) == 0 for name in self.names]
        return int(self.counts[-1] + self.counts[:-1][never].sum())

    def rows(self) -> list[tuple[str, int, float, float | None]]:
        """(name, count, share, expected share or None) of all that was or should have been drawn."""
        total = max(1, self.total)
        named = zip(self.names, self.counts[:-1], strict=True)
        rows = [(name, int(count), count / total, self.expected.get(name)) for name, count in named]
        if self.counts[-1]:
            rows.append(("unknown", int(self.counts[-1]), self.counts[-1] / total, None))
        return [row for row in rows if row[1] or row[3]]
