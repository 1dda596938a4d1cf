"""What vector, global branch and DA blocks are worth on `tiny`, in two ways, on pairs of the bank that no arm sees.

Trained: adapters from new weights, equal steps and batches, each without one part; the loss is the absolute error of
the picture that one step makes, to the HR and the teacher's picture in equal parts. Replaced: in the given model a part
of one picture is put in the place of another picture's, so that what changes is what the part says of the picture.
Distance is that of EfficientNet-Lite0's features, PSNR that of RGB. Intervals are bootstraps over seeds and pairs.
Shape suffixes: P pairs, B batch, C channels, H W pixels, D degradation vector.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.ablations import difference
from benchmarks.picture_measures import psnr
from benchmarks.sampled import perceptual_distance
from deedsr import DeeDSRPipeline, DegradationAwareAdapter
from deedsr.adapter.condition_encoder import Condition
from deedsr.adapter.da_block import DegradationAwareGroup
from deedsr.sampling.autoencoder import decode_latents
from deedsr.sampling.images import to_uint8
from tools.tiny.bank import SIDE, read_bank
from tools.tiny.base import FACTOR
from tools.tiny.pictures import CROP, REALISM, cut, lr_latents, one_step, pixels
from tools.tiny.training import SEED, Budget, Run

ARMS = ("full", "vector", "global", "da")
SEEDS = 3
HELD_OUT = 72  # last pairs of the bank
BATCH, TRAINED_CROP = 2, 64  # pixels
EVALUATED = 8  # pairs at a time

Bank = dict[str, torch.Tensor]
Rows = np.ndarray  # (2, P): distance, PSNR


def measure(work: Path, model: str, steps: int, budget: Budget) -> None:
    """Train and measure what is not yet kept under `work/arms`; print both tables and, last, one JSON line."""
    bank = read_bank(work, budget.device)
    seen = {name: tensor[:-HELD_OUT] for name, tensor in bank.items()}
    held_out = {name: tensor[-HELD_OUT:] for name, tensor in bank.items()}
    pipeline = DeeDSRPipeline.from_pretrained(model, torch_dtype=torch.float32).to(budget.device)
    for part in (pipeline.vae, pipeline.unet, pipeline.learner, pipeline.adapter):
        part.requires_grad_(False)
    result = {"replaced": replaced(pipeline, held_out)}
    rows = {}
    for arm in ARMS:
        by_seed = [trained(work, pipeline, seen, held_out, arm, seed, steps, budget) for seed in range(SEEDS)]
        if any(found is None for found in by_seed):
            return  # time is over
        rows[arm] = np.stack([found for found in by_seed if found is not None], 1)  # (2, seeds, P)
    result["trained"] = compared(rows, f"trained, {steps} steps, {SEEDS} seeds")
    print(json.dumps({"steps": steps, "pairs": HELD_OUT} | result))


def compared(rows: dict[str, Rows], title: str) -> dict[str, dict[str, list[float]]]:
    """Prints and returns, for each arm but the first, distance and PSNR minus the first one's, with intervals."""
    first = next(iter(rows))
    print(f"\n{title}; {first}: distance {rows[first][0].mean():.4f}, PSNR {rows[first][1].mean():.3f} dB")
    found = {}
    for name in list(rows)[1:]:
        figures = [difference(arm, full) for arm, full in zip(rows[name], rows[first], strict=True)]
        found[name] = {"distance": list(figures[0]), "psnr": list(figures[1])}
        said = [f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]" for mean, low, high in figures]
        print(f"{name:28} distance {said[0]}, PSNR {said[1]} dB", flush=True)
    return found


def trained(
    work: Path, pipeline: DeeDSRPipeline, seen: Bank, held_out: Bank, arm: str, seed: int, steps: int, budget: Budget
) -> Rows | None:
    """Distance and PSNR of the held-out pairs after the training; None if its time ended before."""
    kept = work / "arms" / f"{arm}-{seed}-{steps}.json"
    if not kept.exists():
        with new_adapter(pipeline, arm, seed) as adapter:
            run = Run(
                kept.with_suffix(".pt"), {"adapter": adapter}, budget, steps=steps, lr=8e-4, averaged=("adapter",),
                decay=0.998,
            )  # fmt: skip
            adapter.attach(pipeline.unet)
            for step, _ in run:
                rng = np.random.default_rng([SEED, seed, step])  # equal for all arms
                x, target, lr, vector = cut(seen, rng, BATCH, TRAINED_CROP)
                t = torch.full((BATCH,), REALISM, device=budget.device)
                with budget.autocast():
                    with torch.no_grad():
                        z_lr = lr_latents(pipeline.vae, lr)
                    z_sr = one_step(pipeline, z_lr, t, vector)
                    y = decode_latents(pipeline.vae, z_sr).float()
                loss = (pixels(y, x) + pixels(y, target)) / 2
                run.update("adapter", loss)
                run.log(loss=loss)
            if run.step < steps:
                return None
            adapter.load_state_dict(run.ema["adapter"].state_dict())
            kept.write_text(json.dumps(measured(pipeline, held_out).tolist()))
    return np.array(json.loads(kept.read_text()))


@contextmanager
def new_adapter(pipeline: DeeDSRPipeline, arm: str, seed: int) -> Iterator[DegradationAwareAdapter]:
    """A new adapter without a part in the pipeline, and afterwards the pipeline's own again."""
    own = pipeline.adapter
    own.detach()
    torch.manual_seed(SEED + seed)
    ablate = [] if arm == "full" else [arm]
    adapter = DegradationAwareAdapter.for_unet(
        pipeline.unet, "tiny", pipeline.learner.dim, ablate=ablate, prediction_type="v_prediction"
    )
    adapter.initialize_from(pipeline.unet)
    pipeline.adapter = adapter.train()
    try:
        yield adapter
    finally:
        adapter.detach()
        pipeline.adapter = own
        own.attach(pipeline.unet)


@torch.no_grad()
def measured(
    pipeline: DeeDSRPipeline,
    bank: Bank,
    vectors_PD: torch.Tensor | None = None,
    change: Callable[[Condition], Condition] = lambda condition: condition,
) -> Rows:
    """Distance and PSNR of the middles of all pairs, with other vectors or a changed condition if given."""
    first, cells = (SIDE - CROP) // 2, CROP // FACTOR
    inner = slice(first // FACTOR, first // FACTOR + cells)
    hr_PCHW = bank["hr"][:, :, first : first + CROP, first : first + CROP]
    z_PCHW = bank["latent"][:, :, inner, inner].float()
    vectors_PD = bank["degradation"] if vectors_PD is None else vectors_PD
    torch.manual_seed(SEED)
    t_P = torch.full((len(z_PCHW),), REALISM, device=z_PCHW.device)
    adapter, pictures = pipeline.adapter, []
    condition = change(adapter.condition_encoder(z_PCHW, t_P, vectors_PD))
    for part in torch.arange(len(z_PCHW), device=z_PCHW.device).split(EVALUATED):
        given = Condition(condition.tokens[part], tuple(level[part] for level in condition.features))
        z_sr = one_step(pipeline, z_PCHW[part], t_P[part], vectors_PD[part], given)
        pictures += [to_uint8(one) for one in (decode_latents(pipeline.vae, z_sr).float() / 2 + 0.5).clamp(0, 1)]
    hrs = [np.ascontiguousarray(hr.permute(1, 2, 0).cpu().numpy()) for hr in hr_PCHW]
    pairs = list(zip(pictures, hrs, strict=True))
    return np.array([[perceptual_distance()(*pair) for pair in pairs], [psnr(*pair) for pair in pairs]])


def replaced(pipeline: DeeDSRPipeline, bank: Bank) -> dict[str, dict[str, list[float]]]:
    """What the model loses when a part says the same of every picture, or speaks of another one."""
    vectors_PD = bank["degradation"]
    others = torch.arange(len(vectors_PD)).roll(7).to(vectors_PD.device)
    everywhere = lambda x, dims: x.mean(dims, keepdim=True).expand_as(x)
    changes: dict[str, Callable[[Condition], Condition]] = {
        "tokens: the mean one": lambda c: Condition(everywhere(c.tokens, (0, 1)), c.features),
        "tokens: another picture's": lambda c: Condition(c.tokens[others], c.features),
        "feature maps: their means": lambda c: Condition(c.tokens, tuple(everywhere(x, (0, 2, 3)) for x in c.features)),
    }
    rows = {
        "as it is": measured(pipeline, bank),
        "vector: the mean one": measured(pipeline, bank, everywhere(vectors_PD, 0)),
        "vector: another picture's": measured(pipeline, bank, vectors_PD[others]),
    } | {name: measured(pipeline, bank, change=change) for name, change in changes.items()}
    groups = [part for part in pipeline.adapter.modules() if isinstance(part, DegradationAwareGroup)]
    hooks = [group.register_forward_hook(lambda group, given, made: given[0]) for group in groups]
    rows["DA groups: left out"] = measured(pipeline, bank)
    for hook in hooks:
        hook.remove()
    return compared({name: found[:, None] for name, found in rows.items()}, "replaced in the model")
