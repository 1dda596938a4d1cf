"""Self-contained HTML pages: one file that opens without a network, with its styles, scripts and pictures inside.

Below the engine is what pages have in common: pictures, pairs with their draws, scenes with a slider.
"""

import base64
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
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

    from pipelines.data.dataset import Sample

MAX_SIDE = 1280  # px: larger pictures are reduced for the page
WEBP_QUALITY = 90
Picture = np.ndarray | str | Path  # uint8 HWC RGB, or a file
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


def read_picture(picture: Picture) -> np.ndarray:
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


@dataclass(frozen=True)
class PictureSet:
    """One scene in several versions, by label, from worst to best; all of one aspect ratio.

    The slider first shows `against`, by default the second version (bicubic), against `shown`, by default the last one
    that is not HR.
    `figures[label]` is one line under a version, such as `24.1 dB`.
    """

    title: str
    versions: Mapping[str, Picture]
    note: str = ""
    shown: str = ""
    against: str = ""
    figures: Mapping[str, str] = field(default_factory=dict)


def picture_view(picture: PictureSet) -> dict[str, Any]:
    """What the comparison slider of one picture needs: encoded versions and which two it starts with."""
    labels = list(picture.versions)
    arrays = {label: read_picture(version) for label, version in picture.versions.items()}
    height, width = max((array.shape[:2] for array in arrays.values()), key=lambda size: size[0])
    candidates = [label for label in labels if label != "HR"] or labels
    return {
        "title": picture.title,
        "note": picture.note,
        "width": width,
        "height": height,
        "focus": busiest_spot(arrays[labels[-1]]),
        "left": picture.against or (labels[1] if len(labels) > 2 else labels[0]),
        "right": picture.shown or candidates[-1],
        "versions": [
            {
                "label": label,
                "src": data_uri(array, lossless=array.shape[0] < height),
                "coarse": array.shape[0] < height,
                "figure": picture.figures.get(label, ""),
            }
            for label, array in arrays.items()
        ],
    }


def busiest_spot(image_HWC: np.ndarray) -> tuple[float, float]:
    """Centre (x, y as shares of the sides) of the window, a third of the picture wide, with the most fine detail."""
    gray = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY).astype(np.float32)
    height, width = gray.shape
    window = (max(1, width // 3), max(1, height // 3))
    detail = cv2.blur(np.abs(cv2.Laplacian(gray, cv2.CV_32F)), window)
    inner = detail[window[1] // 2 : height - window[1] // 2, window[0] // 2 : width - window[0] // 2]
    row, column = np.unravel_index(int(inner.argmax()), inner.shape)
    return (column + window[0] // 2) / width, (row + window[1] // 2) / height


def pair_view(sample: "Sample") -> dict[str, Any]:
    """One pair as the template shows it."""
    height, width = sample.hr.shape[:2]
    # Pairs of two photographs were degraded by the world, not by a chain.
    draws = sample.info.get("degradation") or {"steps": [], "clean": False}
    return {
        "key": sample.key,
        "title": f"sample {sample.key}",
        "width": width,
        "height": height,
        "hr": data_uri(sample.hr),
        "lr": data_uri(sample.lr, lossless=True),
        "lr_size": sample.lr.shape[1::-1],
        "source": sample.info["source"]["path"],
        "crop": sample.info["crop"],
        "flip": sample.info["flip"],
        "steps": describe_degradation(draws),
        "clean": draws["clean"],
    }


def describe_degradation(draws: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The drawn chain as text, in order: (operation, values)."""
    titles = {"blur": "Blur", "resize": "Resize", "noise": "Noise", "jpeg": "JPEG", "sinc": "Sinc"}
    lines = []
    for step in draws["steps"]:
        kind = step["step"].rstrip("0123456789")
        lines.append((titles.get(kind, kind), ", ".join(_values(kind, step))))
    return lines


def _values(kind: str, step: Mapping[str, Any]) -> list[str]:
    if kind in ("blur", "sinc"):
        words = [step["kernel"].replace("_", " ")] if kind == "blur" else []
        words.append(f"{step['size']} px")
        if "cutoff" in step:
            return [*words, f"cut-off {step['cutoff']:.2f}"]
        width = f"σ {step['sigma_x']:.2f} px"
        if step["sigma_y"] != step["sigma_x"]:
            angle = math.degrees(step["theta"])
            width = f"σ {step['sigma_x']:.2f} × {step['sigma_y']:.2f} px at {angle:.0f}°"
        return [*words, width, *([f"β {step['beta']:.2f}"] if "beta" in step else [])]
    if kind == "resize":
        factor = [f"×{step['factor']:.2f}"] if "factor" in step else []
        return [step["mode"], *factor, *([f"to {step['size'][1]}×{step['size'][0]}"] if "size" in step else [])]
    if kind == "noise":
        strength = f"σ {step['sigma']:.1f}" if "sigma" in step else f"scale {step['scale']:.2f}"
        return [step["family"], strength, *(["gray"] if step["gray"] else [])]
    if kind == "jpeg":
        return [f"quality {step['quality']}"]
    return [f"{name} {value}" for name, value in step.items() if name != "step"]


def yaml_text(config: Mapping[str, Any]) -> str:
    """A configuration as people write it; empty for none."""
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True) if config else ""
