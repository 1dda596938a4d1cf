"""Make `tiny`, stage by stage; docs/measured/tiny.md says which stages made what ships.

    python -m tools.tiny photographs --photos DIR [DIR ...] --work work   originals, reduced
    python -m tools.tiny autoencoder --work work                          of a new base
    python -m tools.tiny unet        --work work
    python -m tools.tiny export      --work work                          work/start: base, learner, new adapter
    python -m tools.tiny deepen      --work work --model tiny             or: a deeper decoder, as work/start
    python -m tools.tiny bank        --work work --model work/start       pairs for the last stage
    python -m tools.tiny mild        --work work --model work/start       more, of nearly clean LRs
    python -m tools.tiny teacher     --work work                          RealESRGAN's pictures of the bank's LRs
    python -m tools.tiny pictures    --work work --model work/start       adapter and decoder, on pictures
    python -m tools.tiny assemble    --work work --model work/start       work/model
    python -m tools.tiny gate        --work work                          its restoration gate

    python -m tools.tiny arms        --work work --model work/model       what parts of the method are worth on it

    python -m tools.tiny chain       --work work --minutes 8              all but the first, as far as time allows
    python -m tools.tiny parcel      --work work --to FILE                code and photographs for another machine

Every stage keeps its state under --work and continues from there: the same command again, until it is done. With
--minutes a stage ends early, its state saved. `--model tiny` in place of work/start trains what ships further, without
a new base. On a GPU batches are made on the device, base networks are compiled, and batches are --batch-factor times as
large; everywhere networks compute in bf16 with fp32 weights. `pictures`, `gate`, `teacher` and `arms` need the extra
`benchmarks`.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import torch

from deedsr.errors import UsageError
from tools.tiny import arms, assembly, bank, base, calibration, pictures
from tools.tiny.parcel import write_parcel
from tools.tiny.photographs import reduce_photographs
from tools.tiny.training import Budget, steps_taken

STEPS = {"autoencoder": 12_000, "unet": 40_000, "pictures": 12_000, "arms": 2000}
CHAIN = ("autoencoder", "unet", "export", "bank", "mild", "teacher", "pictures", "assemble", "gate")
RESERVE = 0.25  # minutes: with less left, no stage of a chain is begun


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    of_terms = pictures.Weights()
    parser.add_argument("stage", choices=["photographs", "deepen", *CHAIN, "arms", "chain", "parcel"])
    parser.add_argument("--work", type=Path, required=True, help="folder of reduced photographs and training state")
    parser.add_argument("--photos", type=Path, nargs="+", help="photographs: folders of the originals")
    parser.add_argument("--quality", type=int, default=95, help="photographs: of the reduced ones, as JPEG")
    parser.add_argument("--base", choices=list(base.BASES), default="next", help="which base is made")
    parser.add_argument(
        "--model", help="bank, mild, deepen, pictures, assemble, arms: the one to start from; default work/start"
    )
    parser.add_argument("--decoder-blocks", type=int, nargs="+", default=[16, 4, 1], help="deepen: coarsest first")
    parser.add_argument("--chunks", type=int, default=60, help="bank, mild, gate: files of 24 pairs")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="bank, mild, teacher, gate")
    parser.add_argument("--teacher-weight", type=float, default=of_terms.teacher, help="pictures: the HR has the rest")
    parser.add_argument("--pixel-weight", type=float, default=of_terms.pixels, help="pictures")
    parser.add_argument("--perceptual-weight", type=float, default=of_terms.perceptual, help="pictures")
    parser.add_argument("--adversarial-weight", type=float, default=of_terms.adversarial, help="pictures")
    parser.add_argument("--share", type=float, default=1.0, help="assemble: of the way to what was trained")
    parser.add_argument("--to", type=Path, help="parcel: file, .tar.gz")
    parser.add_argument("--steps", type=int, help="of this stage in all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after so many, to be continued")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-factor", type=int, default=1)
    asked = parser.parse_args(arguments)
    if not 0 <= asked.share <= 1:
        parser.error(f"--share must lie between 0 and 1, got {asked.share}")
    return asked


class Stages:
    """What a stage does, and whether it is done, under one --work."""

    def __init__(self, asked: argparse.Namespace):
        self.asked, self.work = asked, asked.work
        self.photographs, self.start, self.model = (self.work / name for name in ("photographs", "start", "model"))
        self.origin = asked.model or str(self.start)

    def steps(self, stage: str) -> int:
        return self.asked.steps or STEPS[stage]

    def run(self, stage: str, budget: Budget) -> None:
        asked, work = self.asked, self.work
        match stage:
            case "photographs":
                reduce_photographs(asked.photos, self.photographs, asked.quality)
            case "autoencoder":
                base.train_autoencoder(self.photographs, work, asked.base, self.steps(stage), budget)
            case "unet":
                base.train_unet(self.photographs, work, asked.base, self.steps(stage), budget)
            case "export":
                base.export(work, asked.base, self.start)
            case "deepen":
                base.deepen(self.origin, asked.decoder_blocks, self.start)
            case "bank" | "mild":
                by_cpu = Budget(torch.device("cpu"), budget.minutes)
                given = (self.photographs, work, stage, self.origin, asked.chunks, by_cpu)
                bank.spread(bank.make_bank, *given, processes=asked.processes)
            case "teacher":
                bank.spread(bank.make_targets, work, budget, processes=asked.processes)
            case "pictures":
                weights = pictures.Weights(
                    asked.teacher_weight, asked.pixel_weight, asked.perceptual_weight, asked.adversarial_weight
                )
                pictures.train(work, self.origin, self.steps(stage), weights, budget)
            case "assemble":
                assembly.assemble(work, self.origin, self.model, asked.share)
            case "gate":
                processes = asked.processes if budget.device.type == "cpu" else 1
                bank.spread(calibration.measure, work, self.model, asked.chunks, budget, processes=processes)
                if calibration.measured(work, self.model, asked.chunks):
                    found = calibration.measurements(work, self.model)
                    assembly.set_gate(self.model, calibration.fit(found))
            case "arms":
                arms.measure(work, self.origin, self.steps(stage), budget)
            case "parcel":
                write_parcel(self.photographs, asked.to)

    def done(self, stage: str) -> bool:
        files = lambda name: len(list((self.work / name).glob("*.safetensors")))
        checks: dict[str, Callable[[], bool]] = {
            "export": lambda: (self.start / "model_index.json").exists(),
            "bank": lambda: files("bank") >= self.asked.chunks,
            "mild": lambda: files("mild") >= self.asked.chunks,
            "teacher": lambda: files("teacher") >= self.asked.chunks,
            "assemble": lambda: (self.model / assembly.CURVES).exists(),
            "gate": lambda: assembly.has_gate(self.model),
        }
        if stage in STEPS:
            return steps_taken(self.work / f"{stage}.pt") >= self.steps(stage)
        return checks[stage]()

    def chain(self, budget: Budget) -> str | None:
        """Every stage that is not done yet; the one that time ran out in, or None."""
        began = time.monotonic()
        for stage in CHAIN:
            left = budget.minutes - (time.monotonic() - began) / 60
            if self.done(stage):
                continue
            if left < RESERVE:
                return stage
            print(f"{stage}, {left:.1f} minutes left", flush=True)
            self.run(stage, Budget(budget.device, left, budget.batch_factor))
            if not self.done(stage):
                return stage
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parsed(arguments)
    cv2.setNumThreads(1)
    try:
        perform(asked)
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None


def perform(asked: argparse.Namespace) -> None:
    stages = Stages(asked)
    budget = Budget(torch.device(asked.device), asked.minutes, asked.batch_factor)
    if asked.stage != "chain":
        stages.run(asked.stage, budget)
        return
    stopped = stages.chain(budget)
    print(f"to be continued: {stopped}" if stopped else f"done: {stages.model}")
