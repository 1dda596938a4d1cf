"""The numbers of a training's curves: buckets of timesteps, smoothing, rates; and how the progress bar shows them."""

import math

import pytest
import torch

from pipelines.training.metrics import Meter, by_timestep, means
from pipelines.training.supervision import advance, bar, postfix


def test_means_by_timestep_are_over_all_samples_whatever_the_split_over_workers_and_accumulation():
    loss, timestep = torch.rand(24, dtype=torch.float64), torch.randint(0, 750, (24,))
    whole = {name: float(value) for name, value in by_timestep(loss, timestep, 1000).items()}
    parts = [by_timestep(loss[i : i + 6], timestep[i : i + 6], 1000) for i in range(0, 24, 6)]
    averaged = {name: sum(float(part[name]) for part in parts) / 4 for name in whole}  # as the loop averages
    assert means(averaged) == pytest.approx(means(whole))
    expected = {
        f"loss_timestep/{low:03d}-{low + 249:03d}": float(loss[(timestep >= low) & (timestep < low + 250)].mean())
        for low in (0, 250, 500)
    }
    assert means(whole) == pytest.approx(expected)  # and none of the empty bucket


def test_the_buckets_share_the_timesteps_that_are_trained():
    timestep = torch.arange(310)
    numbers = by_timestep(timestep.double(), timestep, 310)
    found = means({name: float(value) for name, value in numbers.items()})
    for name, mean in found.items():
        low, high = map(int, name.rpartition("/")[2].split("-"))
        assert mean == (low + high) / 2
    assert list(found)[0].endswith("/000-077")
    assert list(found)[-1].endswith("-309")


def test_a_meter_smooths_the_loss_goes_on_from_a_checkpoint_and_restarts_its_means_at_each_reading():
    whole, first = Meter(8, torch.device("cpu")), Meter(8, torch.device("cpu"))
    curve = []
    for number, loss in enumerate((4.0, 2.0, math.nan, 1.0)):
        whole.step({"loss": loss, "x:sum": 3.0, "x:count": 2.0}, waited=0.0)
        curve.append(whole.read()["loss_smoothed"])
        if number < 2:
            first.step({"loss": loss}, waited=0.0)
            first.read()
    assert curve == pytest.approx([4.0, 3.8, 3.8, 3.52])
    rest = Meter(8, torch.device("cpu"), first.smoothed)
    rest.step({"loss": 1.0}, waited=0.0)
    assert rest.read()["loss_smoothed"] == curve[-1]

    for x in (2.0, 4.0):
        whole.step({"loss": 1.0, "top1": x, "x:sum": x, "x:count": 1.0}, waited=1e-4)
    read = whole.read()
    assert (read["x"], read["top1"], read["loss"]) == (3.0, 4.0, 1.0)
    assert "x:sum" not in read
    assert read["data_wait_share"] > 0
    assert read["samples_per_second"] > 0
    assert 10 < read["memory/rss_mib"] < 1e6


def test_the_bar_shows_smoothed_loss_rate_learning_rate_and_waiting_and_lines_where_there_is_no_terminal(
    capsys, monkeypatch
):
    values = {"loss": 9.0, "loss_smoothed": 0.5, "samples_per_second": 123.4, "lr": 1e-4, "data_wait_share": 0.034}
    monkeypatch.setattr("pipelines.training.supervision.LINE_SECONDS", 0.0)
    with bar("learner", 100, 20, show=True) as shown:
        for _ in range(3):
            shown.set_postfix(postfix(values), refresh=False)
            shown.update(10)
    printed = capsys.readouterr().err
    assert "\r" not in printed
    lines = printed.splitlines()
    assert "50/100" in lines[-1]
    assert "loss=0.5000, samples/s=123, lr=1.00e-04, waiting=3%" in lines[-1]
    with bar("learner", 100, 0, show=False) as shown:
        shown.update(1)
    assert capsys.readouterr().err == ""


def test_the_first_step_is_shown_at_once_where_there_is_no_terminal(capsys):
    with bar("learner", 400, 40, show=True) as shown:
        advance(shown, 41, {})
        assert "41/400" in capsys.readouterr().err
        advance(shown, 50, {})
        assert capsys.readouterr().err == ""
    capsys.readouterr()  # the line at the end
    with bar("learner", 400, 40, show=False) as hidden:
        advance(hidden, 41, {})
    assert capsys.readouterr().err == ""
