"""Self-contained HTML pages: one file that opens without a network, with its styles, scripts and pictures inside."""

import base64
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from deedsr.dataset.members import decode_stored
from deedsr.errors import UsageError
from deedsr.metrics.registry import known
from pipelines.reports.tables import bytes_text, count_text, duration_text, metric_text, share_text
from pipelines.storage import Storage, object_at

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_SIDE = 1280  # px: larger pictures are reduced for the page
WEBP_QUALITY = 90
_CAPTION = 18  # px: height of a line of text in a picture


def page_place(out: str | Path) -> tuple[Storage, str]:
    """Where a page is written: a storage, and the path in it. Raises UsageError if `out` is the location of no file."""
    storage, name = object_at(str(out))
    if not name:
        raise UsageError(
            f"--out {out} names no file: write a file's location, such as {str(out).rstrip('/')}/page.html"
        )
    return storage, name


@functools.cache
def templates() -> "Environment":
    """The page engine: `templates/`, with figures as text by the filters of their kind."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    engine = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {
        "number": metric_text,
        "duration": duration_text,
        "count": count_text,
        "bytes": bytes_text,
        "share": share_text,
    }
    return engine


def write_page(out: str | Path, template: str, **content: Any) -> None:
    """Render `templates/{template}` with `content` and write it to the location `out` in one step; a reader never sees
    half a page."""
    html = templates().get_template(template).render(metric_names=known(), **content)
    storage, name = page_place(out)
    # A file name that is not UTF-8 comes as lone surrogates, which UTF-8 cannot hold.
    storage.write(name, html.encode("utf-8", errors="backslashreplace"))


def read_picture(picture: np.ndarray | str | Path) -> np.ndarray:
    """A picture as uint8 HWC RGB, from an array of that kind or a file."""
    if isinstance(picture, np.ndarray):
        return picture
    return decode_stored(Path(picture).read_bytes())


def data_uri(image_HWC: np.ndarray, lossless: bool = False) -> str:
    """A uint8 RGB picture as WebP inside a `data:` URI, at most `MAX_SIDE` px a side."""
    height, width = image_HWC.shape[:2]
    if max(height, width) > MAX_SIDE:
        share = MAX_SIDE / max(height, width)
        size = (max(1, round(width * share)), max(1, round(height * share)))
        image_HWC = cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA)
    quality = 101 if lossless else WEBP_QUALITY  # OpenCV: above 100 means lossless
    _, data = cv2.imencode(".webp", cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, quality])
    return "data:image/webp;base64," + base64.b64encode(data.tobytes()).decode()


def picture_name(source: str, key: str) -> str:
    """Name of a sample's picture among those of a run: the photograph's, and what of the key tells its crops apart."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", Path(source).stem)
    return f"{stem[:60]}-{key[:6]}{key[-3:]}"


def strip(title: str, lr: np.ndarray | None, others: Mapping[str, np.ndarray]) -> np.ndarray:
    """One labelled picture: the LR with its pixels as squares beside the others, which have one size; a title above."""
    height, width = next(iter(others.values())).shape[:2]
    squares = {} if lr is None else {"LR": cv2.resize(lr, (width, height), interpolation=cv2.INTER_NEAREST)}
    columns = squares | dict(others)
    labelled = [np.concatenate([caption(name, width), picture]) for name, picture in columns.items()]
    return np.concatenate([caption(title, width * len(columns)), np.concatenate(labelled, axis=1)])


def caption(text: str, width: int) -> np.ndarray:
    """Dark letters on a light bar; a text that is too long loses its beginning."""
    bar = np.full((_CAPTION, width, 3), 244, np.uint8)
    text = text.encode("ascii", "replace").decode()  # OpenCV's letters
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.42
    while len(text) > 1 and cv2.getTextSize(text, font, scale, 1)[0][0] > width - 6:
        text = text[1:]
    return cv2.putText(bar, text, (3, _CAPTION - 5), font, scale, (30, 30, 30), 1, cv2.LINE_AA)
