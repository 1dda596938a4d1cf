"""Writes what tests/test_stored.py reads: small results of this version's commands, and what is expected of them.

    PYTHONPATH=$PWD/tests python tests/stored/write.py --folder /srv/stored

Makes the things in `--folder`, whose path they keep (a folder that is bind-mounted there will do), then
`tests/stored/VERSION.tar.xz` and `tests/stored/VERSION.json`. The same command again continues. Run it at a release
whose formats differ, beside the archives of the versions before, which stay readable.

To fit into a megabyte, photographs are 160 px wide, crops 64 px, the weights of the base have seven values, and both
adapters start (`--init`) from one in which most channels are zero: those stay zero, with zero moments.
"""

import argparse
import json
import lzma
import os
import re
import shutil
import signal
import sqlite3
import tarfile
import threading
import time
from contextlib import closing
from pathlib import Path

import cv2
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from small_networks import SCHEDULE
from stored_things import DONE, FOLDERS, STORED, TRAININGS, expectations

import deedsr
from deedsr.adapter.adapter import DegradationAwareAdapter
from jobs import cli

ROOT = STORED.parent.parent
PHOTOS = ROOT / "deedsr" / "assets" / "photos"
SOURCES = ["train/Bamboo.jpg", "train/Red-Maple.jpg", "train/White-Flower.jpg", "validation/Green-Maple.jpg"]
LONG_AGO = 1_700_000_000  # seconds since the epoch: mtime of the sources, which a shard's identity depends on
ALIVE = 12  # a twelfth of each dimension of the adapter's weights is not zero
LOUD = 2.5  # factor of those weights, so that pictures show the adapter


def write_sources(folder: Path) -> None:
    """Photographs, one of which has no texture and is rejected, and a recipe for them; a picture to upscale."""
    for name in SOURCES:
        photo = cv2.imread(str(PHOTOS / name))
        size = 160, round(160 * photo.shape[0] / photo.shape[1])
        (folder / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
        small = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / "sources" / name), small, [cv2.IMWRITE_JPEG_QUALITY, 90])
    cv2.imwrite(str(folder / "sources/train/flat.jpg"), cv2.blur(small, (65, 65)), [cv2.IMWRITE_JPEG_QUALITY, 90])
    for path in (folder / "sources").rglob("*.jpg"):
        os.utime(path, (LONG_AGO, LONG_AGO))
    recipe = {
        "base": "deedsr",
        "name": "stored",
        "variants": 4,
        "crop": {"size": 64, "per_source": 1},
        "shard": {"min_sources": 1, "target_sources": 1, "max_sources": 2},
        "split": {"validation_patterns": ["validation/*"], "validation_share": 0},
        "max_rejected_share": 0.5,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "pictures").mkdir(exist_ok=True)
    cv2.imwrite(str(folder / "pictures" / "maple.png"), cv2.resize(small, (24, 16), interpolation=cv2.INTER_AREA))


def write_base(folder: Path) -> None:
    """An autoencoder of factor 4 and a UNet of two levels, and an adapter for them in `init/`."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    adapter = DegradationAwareAdapter.for_unet(unet, "tiny", degradation_dim=128, prediction_type="v_prediction")
    adapter.initialize_from(unet)
    with torch.no_grad():
        for weights in (*vae.parameters(), *unet.parameters()):
            few_values(weights)
        vae.decoder.conv_out.weight.mul_(4)  # else its pictures are grey
        for weights in adapter.parameters():
            if not weights.any():
                weights.normal_(std=0.05)
            few_values(weights)
            for dimension, length in enumerate(weights.shape[:2]):
                if length > 16:  # channels of the UNet are whole
                    weights.index_fill_(dimension, torch.arange(-(-length // ALIVE), length), 0)
            weights.mul_(LOUD)
    vae.save_pretrained(folder / "base" / "vae")
    unet.save_pretrained(folder / "base" / "unet")
    DDIMScheduler(**SCHEDULE, prediction_type="v_prediction").save_pretrained(folder / "base" / "scheduler")
    adapter.save_pretrained(folder / "init" / "adapter")


def few_values(weights: torch.Tensor) -> None:
    """Rounds weights to -3 ... 3 times a number, so that they compress; those that are all equal stay."""
    step = weights.std() if weights.numel() > 1 else 0
    if step:
        weights.copy_((weights / step).round().clamp(-3, 3) * step)


def run(command: str, exit_code: int = 0) -> None:
    print("$ deedsr", command, flush=True)
    code = cli.main([*command.split(), "--json"])
    assert code == exit_code, code


def run_half(command: str, out: Path) -> None:
    """Ends a training by SIGTERM after some steps: it writes a checkpoint then."""

    def found() -> bool:
        return any(out.glob("checkpoints/*/checkpoint.json"))

    def end() -> None:
        while not found():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    if not found():
        threading.Thread(target=end, daemon=True).start()
        run(command, exit_code=130)


def write_things(folder: Path) -> None:
    """Everything in the working directory, by the commands."""
    write_sources(folder)
    if not (folder / "init").exists():
        write_base(folder)
    for name, options in (TRAININGS | DONE).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
    run("shards --source sources --recipe recipe.yaml --out dataset")
    run("shards --hr-from dataset --recipe light --out hr_from")
    learner = "train learner --data dataset --config"
    adapter = "train adapter --data dataset --learner learner --base base --init init --config"
    run(f"{learner} learner.yaml --out learner")
    run("latents --data dataset --base base --learner learner --out latents")
    run(f"{adapter} model.yaml --out model")
    run_half(f"{learner} half_learner.yaml --out half_learner", folder / "half_learner")
    run_half(f"{adapter} half_adapter.yaml --out half_adapter", folder / "half_adapter")
    if not (folder / "pipeline").exists():
        run("export model --out pipeline")
    run("upscale pictures --model model --out upscaled")
    (folder / "jobs").mkdir(exist_ok=True)
    for path in (ROOT / "jobs").glob("*.yaml"):
        shutil.copy(path, folder / "jobs")
    (folder / "jobs" / "every_key.yaml").write_text(EVERY_KEY)


EVERY_KEY = """\
command: train learner
options:
  preset: tiny
  data: s3://bucket/my shards
  out: s3://bucket/learner
  train: {lr: 1e-3, num_workers: 1..4, best_metric: validation/loss, cpus_per_worker: null}
name: every-key
working_dir: null
excludes: [big_folder/]
runtime_env:
  env_vars: {MLFLOW_TRACKING_URI: "http://mlflow.internal:5000"}
  pip: [pillow-heif]
entrypoint_num_cpus: 0.5
entrypoint_num_gpus: 0
entrypoint_memory: 1000000000
"""


def write_store(folder: Path) -> None:
    """The MLflow store as SQL, which compresses to a twentieth of the file, without names of this machine."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as store:
        store.execute("UPDATE runs SET user_id = 'somebody'")
        store.execute("DELETE FROM tags WHERE key IN ('mlflow.user', 'mlflow.source.name')")
        store.commit()
        (folder / "mlflow.sql").write_text("\n".join(store.iterdump()))


def write_archive(folder: Path, archive: Path) -> None:
    """What belongs to no machine, sorted. Of finished trainings the tensors of the checkpoint are left out: nothing
    reads them any more."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mtime = LONG_AGO
        return info

    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 64 << 20}]
    with lzma.open(archive, "wb", filters=filters) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name in FOLDERS:
            for path in sorted([folder / name, *(folder / name).rglob("*")]):
                relative = path.relative_to(folder)
                finished = relative.parts[0] in DONE and "checkpoints" in relative.parts
                if path.is_dir() or path.name == "claim.json" or (finished and path.suffix == ".safetensors"):
                    continue
                tar.add(path, str(relative), recursive=False, filter=plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the things are made")
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"DEEDSR_CPUS": "2", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    os.chdir(folder)
    write_things(folder)
    write_store(folder)
    archive = STORED / f"{deedsr.__version__}.tar.xz"
    write_archive(folder, archive)
    expected = {"folder": str(folder)} | expectations(folder)
    text = re.sub(r"\[\s+(\d+),\s+([\d.e-]+)\s+\]", r"[\1, \2]", json.dumps(expected, indent=1))  # a loss on a line
    (STORED / f"{deedsr.__version__}.json").write_text(f"{text}\n")
    print(f"{archive}: {archive.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
