"""Statistics of a picture: JPEG's tables and steps, blur and noise are in them; any size; no precision is lost."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from deedsr.errors import UsageError
from deedsr.learner import DegradationLearner
from deedsr.learner.statistics import (
    CHROMA_TABLE,
    LUMA_TABLE,
    QUALITIES,
    PictureStatistics,
    _fit,
    dct_basis,
    quantisation_tables,
)
from deedsr.precision import set_tf32
from deedsr.presets import LEARNER_PRESETS
from pipelines.training.config import LearnerModelOptions, LearnerOptions, check
from pipelines.training.stage import learner_config

FITS = slice(960, 960 + len(QUALITIES))  # of luma


@pytest.fixture(scope="module")
def photo(photos) -> np.ndarray:
    """A real crop, uint8 RGB (256, 256, 3)."""
    path = sorted((photos / "train").glob("*.jpg"))[0]
    picture = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    return np.ascontiguousarray(picture[200:712:2, 200:712:2])


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None] / 255


def statistics(picture: np.ndarray) -> torch.Tensor:
    return PictureStatistics()(as_tensor(picture))[0]


def compressed(picture: np.ndarray, quality: int) -> np.ndarray:
    data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])


@pytest.mark.parametrize("quality", [30, 52, 90])
def test_tables_are_those_of_a_real_encoder(tmp_path, photo, quality):
    cv2.imwrite(str(tmp_path / "picture.jpg"), photo, [cv2.IMWRITE_JPEG_QUALITY, quality])
    with Image.open(tmp_path / "picture.jpg") as picture:
        written = picture.quantization
    row = QUALITIES.index(quality)
    for number, table in enumerate((LUMA_TABLE, CHROMA_TABLE)):
        assert quantisation_tables(table)[row].tolist() == written[number]


def test_basis_is_orthonormal_and_starts_with_the_mean():
    basis = dct_basis().view(64, 64)
    torch.testing.assert_close(basis @ basis.T, torch.eye(64), atol=1e-6, rtol=0)
    torch.testing.assert_close(basis[0], torch.full((64,), 1 / 8))
    block = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    np.testing.assert_allclose(basis @ torch.from_numpy(block).flatten(), cv2.dct(block).ravel(), atol=1e-5)


@pytest.mark.parametrize("quality", [30, 50, 70, 86])
def test_the_fit_finds_the_quality_of_a_jpeg(photo, quality):
    fits = statistics(compressed(photo, quality))[FITS]
    assert fits[QUALITIES.index(quality)] > 0.8
    assert abs(QUALITIES[int(fits.argmax())] - quality) <= 2
    plain = statistics(photo)[FITS]
    assert fits.max() > plain.max() + 0.3


def test_blur_empties_the_high_frequencies_and_noise_fills_them(photo):
    def high(picture: np.ndarray) -> float:
        return float(statistics(picture)[-128:].view(16, 8)[4:12, 4:].mean())

    noise = np.random.default_rng(0).normal(0, 15, photo.shape)
    noisy = (photo + noise).clip(0, 255).round().astype(np.uint8)
    assert high(cv2.GaussianBlur(photo, (0, 0), 2.0)) < high(photo) - 1
    assert high(noisy) > high(photo) + 1


def test_any_size_has_finite_statistics(photo):
    measured = PictureStatistics()
    for height, width in ((1, 1), (3, 200), (31, 32), (33, 50), (64, 64), (250, 130)):
        rows = measured(as_tensor(photo[:height, :width]).repeat(2, 1, 1, 1))
        assert rows.shape == (2, measured.size)
        assert rows.isfinite().all()
    for level in (0.0, 1.0):
        assert measured(torch.full((1, 3, 64, 64), level)).isfinite().all()
    torch.testing.assert_close(statistics(photo[:79, :70]), statistics(photo[:64, :64]))  # whole 16 px count


def test_half_precision_and_autocast_leave_the_statistics_alone(photo):
    expected = statistics(photo)
    half = PictureStatistics().half()
    assert torch.equal(half(as_tensor(photo))[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(PictureStatistics()(as_tensor(photo))[0], expected)
    assert not PictureStatistics().state_dict()


def test_statistics_go_beside_the_convolutions_or_in_their_place(photo):
    torch.manual_seed(0)
    sizes = {"stem": 8, "widths": (8, 16), "blocks": (1, 1)}
    both = DegradationLearner(**sizes, statistics=(12,)).eval()
    vector = both(as_tensor(photo))
    assert vector.shape == (1, both.dim)
    alone = DegradationLearner(stem=0, widths=(16,), blocks=(), statistics=(12,)).eval()
    alone.statistics_network.load_state_dict(both.statistics_network.state_dict())
    convolved = DegradationLearner(**sizes).eval()
    convolved.load_state_dict({k: v for k, v in both.state_dict().items() if not k.startswith("statistics")})
    torch.testing.assert_close(alone(as_tensor(photo)) + convolved(as_tensor(photo)), vector)


@pytest.mark.parametrize("wrong", [{"statistics": ()}, {"blocks": (1,)}, {"widths": (8, 16)}])
def test_a_learner_that_could_see_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="without convolutions"):
        DegradationLearner(**LEARNER_PRESETS["tiny"] | wrong)


def test_statistics_are_an_option_of_stage_1():
    with torch.device("meta"):
        paper = DegradationLearner(**learner_config(LearnerModelOptions("paper")))
        assert not hasattr(paper, "statistics_network")
        both = DegradationLearner(**learner_config(LearnerModelOptions("paper", statistics=[256])))
        assert both.statistics_network.layers[0].out_features == 256
        assert both.dim == paper.dim
    assert learner_config(LearnerModelOptions("tiny"))["statistics"] == LEARNER_PRESETS["tiny"]["statistics"]
    for preset, widths in (("tiny", []), ("paper", [0])):
        with pytest.raises(UsageError, match="model.statistics"):
            check(LearnerOptions(model=LearnerModelOptions(preset, statistics=widths)))


def test_statistics_are_computed_without_tf32(photo):
    """Whatever a training has set, which stays set."""

    class Products(TorchFunctionMode):
        seen: list[tuple[bool, bool]] = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.conv2d, torch.nn.functional.conv2d, torch.einsum):
                self.seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            return function(*args, **(kwargs or {}))

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        set_tf32(True)
        with Products() as products:
            statistics(photo)
        assert set(products.seen) == {(False, False)}
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Launches(TorchDispatchMode):
    """Counts operators that compute: kernels, on a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **kwargs or {})


def test_qualities_are_computed_together_but_on_a_cpu():
    statistics = PictureStatistics().to("meta")
    with Launches() as launches:
        statistics._statistics(torch.empty(32, 3, 48, 48, device="meta"))
    assert launches.count < 100  # one by one 700


def test_qualities_together_give_what_they_give_one_by_one():
    statistics = PictureStatistics()
    lr = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    coefficients = statistics._coefficients(255 * lr)[:, 0]
    alone, together = (_fit(coefficients, statistics.luma_QC, count) for count in (1, len(QUALITIES)))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
