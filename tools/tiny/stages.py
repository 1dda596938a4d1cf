"""Make `tiny`, stage by stage; docs/tiny.md says which stages made what ships.

    python -m tools.tiny photographs --photos DIR [DIR ...] --work work
    python -m tools.tiny autoencoder --work work
    python -m tools.tiny unet        --work work
    python -m tools.tiny export      --work work --to base
    python -m tools.tiny bank        --work work [--model tiny] --chunks 60
    python -m tools.tiny teacher     --work work
    python -m tools.tiny pictures    --work work [--model tiny]
    python -m tools.tiny assemble    --work work [--model tiny] --to model
    python -m tools.tiny gate        --work work --model model --to model

Every stage keeps its state under --work and continues from there: the same command again, until it is done. With
--minutes a stage ends early, its state saved. On a GPU batches are made on the device, networks are compiled, and
batches are --batch-factor times as large; everywhere networks compute in bf16 with fp32 weights.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import torch

from tools.tiny import bank, base, calibration, pictures
from tools.tiny.photographs import reduce_photographs
from tools.tiny.training import Budget

STEPS = {"autoencoder": 12_000, "unet": 40_000, "pictures": 12_000}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stage",
        choices=["photographs", "autoencoder", "unet", "export", "bank", "teacher", "pictures", "assemble", "gate"],
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of reduced photographs and training state")
    parser.add_argument("--photos", type=Path, nargs="+", help="photographs: folders of the originals")
    parser.add_argument("--quality", type=int, default=95, help="photographs: of the reduced ones, as JPEG")
    parser.add_argument("--base", choices=list(base.BASES), default="next", help="which base is made")
    parser.add_argument("--model", default="tiny", help="bank, pictures, assemble: the model to start from")
    parser.add_argument("--chunks", type=int, default=60, help="bank: files of 24 pairs")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="teacher: this one of so many processes")
    parser.add_argument("--teacher-weight", type=float, default=0.5, help="pictures: the HR has the rest")
    parser.add_argument("--perceptual-weight", type=float, default=1.0, help="pictures")
    parser.add_argument("--adversarial-weight", type=float, default=0.05, help="pictures")
    parser.add_argument("--gate-name", default="gate", help="gate: folder of its measurements, one for each model")
    parser.add_argument("--to", type=Path, help="export: folder of the model")
    parser.add_argument("--steps", type=int, help="of this stage in all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so many, to be continued")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-factor", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parsed(arguments)
    cv2.setNumThreads(1)
    photographs = asked.work / "photographs"
    budget = Budget(torch.device(asked.device), asked.minutes, asked.batch_factor)
    steps = asked.steps or STEPS.get(asked.stage, 0)
    match asked.stage:
        case "photographs":
            reduce_photographs(asked.photos, photographs, asked.quality)
        case "autoencoder":
            base.train_autoencoder(photographs, asked.work, asked.base, steps, budget)
        case "unet":
            base.train_unet(photographs, asked.work, asked.base, steps, budget)
        case "export":
            base.export(asked.work, asked.base, asked.to)
        case "bank":
            bank.make_bank(photographs, asked.work, asked.model, asked.chunks, budget)
        case "teacher":
            bank.make_targets(asked.work, budget, tuple(asked.part))
        case "pictures":
            weights = pictures.Weights(asked.teacher_weight, asked.perceptual_weight, asked.adversarial_weight)
            pictures.train(asked.work, asked.model, steps, weights, budget)
        case "assemble":
            pictures.assemble(asked.work, asked.model, asked.to)
        case "gate":
            calibration.measure(asked.work, asked.model, asked.gate_name, budget)
            pictures.set_gate(asked.to, calibration.fit(asked.work, asked.gate_name))
