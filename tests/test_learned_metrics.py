"""Claims about LPIPS, DISTS and FID and their weights files.

The networks have made-up weights. The figures are those of the public implementations with the same weights, on the
same pictures: lpips 0.1.4, DISTS_pytorch 0.1, and clean-fid 0.1.35 on the network of pytorch-fid 0.3.0, with
torch 2.13, torchvision 0.29.1 and scipy 1.17.1.
"""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_weights import write_weights
from plain_metrics import made_picture, softened
from safetensors.torch import load_file, save_file

from deedsr.errors import UsageError
from deedsr.metrics.fid import frechet_distance
from deedsr.metrics.metric import Setting
from deedsr.metrics.networks import VGG16, AlexNet, InceptionV3, load_into, read_tensors
from deedsr.metrics.registry import find

LPIPS = [0.009379485622048378, 0.016104664653539658, 0.1622425615787506]
DISTS = [0.007885932922363281, 0.013968169689178467, 0.13093239068984985]
FEATURES = [1.6729222536087036, 0.08894132077693939, 0.18270906805992126, 0.00019653304480016232]  # the first four
MEAN_FEATURE = 0.3811813294887543
FID = 31.2907507


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    reference = made_picture(1, 128)
    soft = softened(reference)
    return [(soft, reference), (softened(soft), reference), (made_picture(2, 128), reference)]


def test_lpips_and_dists_are_those_of_their_authors(weights, pairs):
    for name, figures in {"lpips": LPIPS, "dists": DISTS}.items():
        metric = find(name, Setting(weights=weights))
        measured = [metric.measure(*pair) for pair in pairs]
        assert measured == pytest.approx(figures, abs=2e-7, rel=1e-5)
        assert metric.measure(pairs[0][1], pairs[0][1]) == pytest.approx(0, abs=1e-6)
        assert metric.summary(measured) == pytest.approx(np.mean(figures), rel=1e-5)
        with pytest.raises(ValueError, match="pictures of one size"):
            metric.measure(pairs[0][0][:100], pairs[0][1])
        with pytest.raises(ValueError, match="pixels a side, got 8x128"):
            metric.measure(pairs[0][0][:8], pairs[0][1][:8])


def test_fid_is_clean_fids(weights, pairs):
    metric = find("fid", Setting(weights=weights))
    measured = [
        metric.measure(picture, made_picture(seed, 128)) for (picture, _), seed in zip(pairs, (3, 4, 5), strict=True)
    ]
    features = np.stack([found[0] for found in measured])
    assert features.shape == (3, 2048)
    assert features[0, :4] == pytest.approx(FEATURES, rel=1e-3, abs=1e-5)
    assert features.mean() == pytest.approx(MEAN_FEATURE, rel=1e-5)
    assert metric.summary(measured) == pytest.approx(FID, rel=1e-4)
    assert metric.summary(measured[:1]) is None


def test_the_frechet_distance_is_that_of_matrix_roots():
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(count, 12)) @ rng.normal(size=(12, 12)) + shift for count, shift in ((40, 0), (9, 0.3)))
    a, b = (np.cov(features, rowvar=False) for features in (x, y))
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values) @ vectors.T
    trace = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b @ root), 0, None)).sum()  # of (A B)^(1/2), B being singular
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * trace
    assert frechet_distance(x, y) == pytest.approx(expected)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="two pictures in each set, got 40 and 1"):
        frechet_distance(x, y[:1])


def test_a_statement_names_the_weights_that_were_loaded_in_any_format(weights, tmp_path, monkeypatch):
    metric = find("lpips", Setting(weights=weights))
    assert "SHA-256" not in metric.statement()
    metric.prepare()
    name = Path(AlexNet.file.name)
    stored = load_file(weights / name.with_suffix(".safetensors"))
    plain, network = tmp_path / "plain.pth", AlexNet()
    torch.save(stored, plain)
    assert metric.statement().endswith(f"weights {name.stem}, tensors' SHA-256 {load_into(network, plain)}")
    save_file(stored | {"features.0.bias": stored["features.0.bias"] + 1}, tmp_path / "other.safetensors")
    assert load_into(network, plain) != load_into(network, tmp_path / "other.safetensors")


def test_weights_come_from_the_folder_or_from_the_cache_of_torchs_hub(weights, tmp_path, monkeypatch, pairs):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, file in {"lpips": AlexNet.file, "dists": VGG16.file, "fid": InceptionV3.file}.items():
        for folder in (None, tmp_path / "empty"):
            with pytest.raises(UsageError) as told:
                find(name, Setting(weights=folder)).prepare()
            for word in (name, file.name, file.sha256, file.url, "--metric-weights", str(tmp_path / "hub/checkpoints")):
                assert word in str(told.value)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    stored = Path(AlexNet.file.name).with_suffix(".safetensors")
    shutil.copy(weights / stored, tmp_path / "hub" / "checkpoints")
    assert find("lpips").measure(*pairs[0]) == pytest.approx(LPIPS[0], rel=1e-5)


def refusal(action, *arguments) -> str:
    with pytest.raises(UsageError) as told:
        action(*arguments)
    return str(told.value)


def test_a_file_that_is_not_the_published_one_or_runs_code_is_refused(tmp_path, capfd):
    class Code:
        def __reduce__(self):
            return print, ("this ran",)

    file, setting = tmp_path / AlexNet.file.name, Setting(weights=tmp_path)
    torch.save({"features.0.weight": torch.zeros(3)}, file)
    assert "is not the published file: its SHA-256 is " in refusal(find("lpips", setting).prepare)

    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), file)
    said = refusal(find("lpips", setting).prepare)
    assert f"{file} is a TorchScript archive, which runs code" in said
    assert f"torch.jit.load('{file}').state_dict(), '{file.with_suffix('.safetensors')}'" in said
    # clean-fid's archive is found under its own name, and the published plain file is named
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "inception-2015-12-05.pt")
    assert f"take {InceptionV3.file.name} from {InceptionV3.file.url}" in refusal(find("fid", setting).prepare)

    with (tmp_path / "code.pth").open("wb") as stream:
        pickle.dump(Code(), stream)
    torch.save({"a": Code()}, tmp_path / "code.zip.pth")
    for name in ("code.pth", "code.zip.pth"):
        assert "holds more than tensors" in refusal(read_tensors, tmp_path / name)
    assert "this ran" not in capfd.readouterr().out


def test_damaged_files_and_weights_of_another_network_are_refused(weights, tmp_path):
    name = Path(AlexNet.file.name).with_suffix(".safetensors")
    metric = find("lpips", Setting(weights=tmp_path))
    shutil.copy(weights / Path(VGG16.file.name).with_suffix(".safetensors"), tmp_path / name)
    assert (
        "another network: it has the shape (64, 3, 3, 3) for features.0.weight (64, 3, 11, 11) of AlexNet"
        in refusal(metric.prepare)
    )
    save_file({"a": torch.zeros(2)}, tmp_path / name)
    assert "it lacks features.0.bias (64,) of AlexNet" in refusal(metric.prepare)
    for content in (b"", b"no weights at all", (weights / name).read_bytes()[:1000]):
        (tmp_path / name).write_bytes(content)
        assert "is damaged or no weights file" in refusal(metric.prepare)
        (tmp_path / "plain.pth").write_bytes(content)
        assert str(tmp_path / "plain.pth") in refusal(read_tensors, tmp_path / "plain.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "no mapping of names to tensors" in refusal(read_tensors, tmp_path / "list.pth")
