"""DA block, modulation and momentum contrast are those of a plain transcription of docs/method.md."""

import numpy as np
import plain_method
import pytest
import torch
from torch import nn

from deedsr.adapter.da_block import DegradationAwareGroup
from deedsr.adapter.modulation import Modulation
from deedsr.learner import DegradationLearner, MomentumContrast
from deedsr.learner.moco import UNGROUPED

CHANNELS, VECTOR = 8, 5
ARRAYS = np.random.default_rng(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(ARRAYS.normal(size=shape))


def with_weights(module: nn.Module) -> tuple[nn.Module, plain_method.Weights]:
    """The module in float64 with no weight at its initial value, and its weights by name."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * normal(*parameter.shape))
    return module, {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def test_the_da_group_is_the_plain_one():
    group, weights = with_weights(DegradationAwareGroup(CHANNELS, VECTOR, reduction=4))
    x_BCHW, vector_BD = normal(3, CHANNELS, 5, 7), normal(3, VECTOR)  # each sample with kernels of its own
    with torch.no_grad():
        found = group(x_BCHW, vector_BD)
        prepared = group(x_BCHW, group.prepare(vector_BD))
    expected = [plain_method.da_group(x, v, weights) for x, v in zip(x_BCHW.numpy(), vector_BD.numpy(), strict=True)]
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=1e-9, atol=1e-9)
    assert torch.equal(prepared, found)


def test_the_modulation_is_the_plain_one():
    local, weights = with_weights(Modulation(CHANNELS, feature_channels=3, hidden=4))
    h_BCHW, feature_BFHW = normal(2, CHANNELS, 6, 4), normal(2, 3, 6, 4)
    with torch.no_grad():
        found = local(h_BCHW, feature_BFHW).numpy()
    pairs = zip(h_BCHW.numpy(), feature_BFHW.numpy(), strict=True)
    expected = [plain_method.modulation(h, feature, weights) for h, feature in pairs]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-9, atol=1e-9)


def test_five_steps_of_contrast_are_the_plain_ones():
    """Losses, queue and momentum encoder, photographs and groups repeat, and the queue wraps around."""
    torch.manual_seed(0)
    query = DegradationLearner(stem=4, widths=(8,), blocks=(1,))
    moco = MomentumContrast(query, queue_size=20, temperature=0.3, momentum=0.9, batch_block=4, batch_negatives=True)
    plain = plain_method.Contrast(20, 0.3, 4)
    parameters = {name: p.detach().double().numpy() for name, p in query.named_parameters()}
    for _ in range(5):
        queries, keys = (nn.functional.normalize(normal(8, 8)) for _ in range(2))
        photographs = ARRAYS.integers(0, 6, 8).tolist()
        groups = [None if group == 3 else group for group in ARRAYS.integers(0, 4, 8).tolist()]
        sources_B = torch.tensor(photographs)
        groups_B = torch.tensor([UNGROUPED if group is None else group for group in groups])
        loss, _ = moco.loss(queries, keys, sources_B, groups_B)
        expected = plain.loss(queries.numpy(), keys.numpy(), photographs, groups)
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        moco.advance(keys, sources_B, groups_B)
        plain.advance(keys.numpy(), photographs, groups)
        with torch.no_grad():
            for name, parameter in query.named_parameters():
                parameter += 0.1 * normal(*parameter.shape)
                parameters[name] = 0.9 * parameters[name] + 0.1 * parameter.double().numpy()
        moco.update_momentum(query.named_parameters())
    oldest = int(moco.queue_pointer)
    order = [*range(oldest, 20), *range(oldest)]
    np.testing.assert_allclose(moco.queue_KD[order], np.stack([key for key, _, _ in plain.queue]), atol=1e-6)
    assert moco.queue_sources_K[order].tolist() == [photograph for _, photograph, _ in plain.queue]
    for name, key in moco.key_encoder.named_parameters():
        np.testing.assert_allclose(key, parameters[name], atol=1e-6, err_msg=name)
