"""The project's metrics against a published log of the same pictures.

    python -m benchmarks.calibration FOLDER [--metric-weights FOLDER]

FOLDER holds test sets as OSEDiff's repository has them (`preset/datasets`, or one set in it): a set is a folder with
`test_HR/`, and `results_NAME/` with pictures of the same names and `metrics/*.log`. The pictures have research licences
and are the user's; nothing of them is part of this project. Every metric of the log that can be computed here is
compared: LPIPS, DISTS and FID where their weights are found, CLIP-IQA, MUSIQ and MANIQA where pyiqa is installed. What
cannot be compared is listed with the reason. Prints a table for each log and, last, one JSON line; exit code 1 where a
metric differs by more than its tolerance.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from deedsr.errors import DeeDSRError
from deedsr.metrics.metric import Metric, Setting
from deedsr.metrics.registry import find


class Column(NamedTuple):
    """A column of the log: our metric, and how far a picture's figure (FID: the set's) may be from the log's."""

    metric: str
    tolerance: float


COLUMNS = {
    "PSNR": Column("psnr", 1e-4),
    "SSIM": Column("ssim", 1e-4),
    "NIQE": Column("niqe", 0.01),
    "LPIPS": Column("lpips", 1e-3),
    "DISTS": Column("dists", 1e-3),
    "FID": Column("fid", 0.1),
    "CLIPIQA": Column("pyiqa:clipiqa", 1e-2),
    "MUSIQ": Column("pyiqa:musiq", 0.1),
    "MANIQA": Column("pyiqa:maniqa-pipal", 1e-2),
}
FIGURE = re.compile(r"([A-Z]+): (-?\d+(?:\.\d+)?)")


class Log(NamedTuple):
    pictures: dict[str, dict[str, float]]  # file name -> column -> figure
    means: dict[str, float]  # of the set; FID stands only here


def read_log(path: Path) -> Log:
    """Figures of a log with lines `FOLDER/NAME.png | PSNR: 25.1; SSIM: .7 | ...` and one of averages."""
    pictures, means = {}, {}
    for line in path.read_text(errors="replace").splitlines():
        name = re.search(r"(\S+)/(\S+\.(?:png|jpg)) \| (.*)", line)
        if name:
            pictures[name[2]] = figures(name[3])
        elif line.startswith("PSNR: "):
            means = figures(line)
    if not pictures or not means:
        raise SystemExit(f"{path} holds no figures of pictures and no line of averages")
    return Log(pictures, means)


def figures(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in FIGURE.findall(text) if name in COLUMNS}


def read(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path))
    if picture is None:
        raise SystemExit(f"{path} is missing or no picture")
    return np.ascontiguousarray(picture[..., ::-1])


def usable(setting: Setting) -> tuple[dict[str, Metric], dict[str, str]]:
    """Metrics by column, and why the others cannot be computed here."""
    metrics, reasons = {}, {}
    for name, column in COLUMNS.items():
        try:
            metrics[name] = find(column.metric, setting)
            metrics[name].prepare()
        except DeeDSRError as error:
            metrics.pop(name, None)
            reasons[name] = str(error)
    return metrics, reasons


def compared(path: Path, metrics: dict[str, Metric]) -> dict[str, dict[str, Any]]:
    """For each column the number of figures and how far they are from the log's."""
    log, results, references = read_log(path), path.parent.parent, path.parent.parent.parent / "test_HR"
    measured: dict[str, list[Any]] = {name: [] for name in metrics}
    for name in tqdm(log.pictures, desc=results.parent.name, unit="picture", disable=not sys.stderr.isatty()):
        picture, reference = read(results / name), read(references / name)
        for column, metric in metrics.items():
            measured[column].append(metric.measure(picture, reference))
    table = {}
    for column, metric in metrics.items():
        mean, logged = metric.summary(measured[column]), log.means.get(column)
        if metric.of_pictures:
            pairs = [(value, row[column]) for value, row in zip(measured[column], log.pictures.values(), strict=True)]
            differences = np.array([np.nan if value is None else value - other for value, other in pairs])
        else:
            differences = np.array([np.nan if mean is None or logged is None else mean - logged])
        table[column] = {
            "metric": metric.name,
            "figures": len(differences),
            "mean": mean,
            "logged": logged,
            "largest": float(np.abs(differences).max()),
            "median": float(np.median(np.abs(differences))),
            "tolerance": COLUMNS[column].tolerance,
            "within": bool(np.abs(differences).max() <= COLUMNS[column].tolerance),  # False for NaN
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--metric-weights", type=Path, help="as for `deedsr evaluate`")
    parser.add_argument("--device", default="cpu", help="of torch, for the learned metrics")
    asked = parser.parse_args()
    logs = sorted(path for path in asked.folder.rglob("*.log") if path.parent.name == "metrics")
    if not logs:
        raise SystemExit(f"{asked.folder} holds no results_NAME/metrics/*.log")
    metrics, reasons = usable(Setting(weights=asked.metric_weights, device=asked.device))
    result = {}
    for path in logs:
        name = str(path.parent.parent.relative_to(asked.folder))
        result[name] = compared(path, metrics)
        print(f"\n{name}\n{'':9}{'figures':>8}{'mean':>12}{'log':>12}{'largest':>12}{'median':>12}{'tolerance':>11}")
        for column, row in result[name].items():
            shown = [f"{row[key]:12.4f}" if row[key] is not None else f"{'-':>12}" for key in ("mean", "logged")]
            print(
                f"{column:9}{row['figures']:8}{''.join(shown)}{row['largest']:12.2e}{row['median']:12.2e}"
                f"{row['tolerance']:11.0e}{'' if row['within'] else '  differs'}"
            )
    for column, reason in reasons.items():
        print(f"\n{column} could not be compared: {reason}")
    print(json.dumps({"benchmark": "calibration", "sets": result, "not compared": reasons}))
    if not all(row["within"] for table in result.values() for row in table.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
