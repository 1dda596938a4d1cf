"""Degradation learner: the paper's size, statistics and contrast that no split of the batch changes."""

import json

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deedsr.errors import UsageError
from deedsr.hub.model_folder import load_part
from deedsr.learner import (
    DegradationLearner,
    GroupedBatchNorm2d,
    MomentumContrast,
    commit_statistics,
    pending_statistics,
    quadrant_pair,
)
from deedsr.learner.moco import UNGROUPED
from deedsr.presets import LEARNER_PRESETS


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def small_learner(norm_group: int = 4, seed: int = 0, **options) -> DegradationLearner:
    torch.manual_seed(seed)
    sizes = {"stem": 8, "widths": (8, 16), "blocks": (1, 1)}
    return DegradationLearner(**sizes | options, norm_group=norm_group)


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Unit vectors."""
    return nn.functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def crops(photos) -> torch.Tensor:
    """16 real crops (16, 3, 32, 32) in [0, 1]."""
    found = []
    for path in sorted((photos / "train").glob("*.jpg"))[:4]:
        photo = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        found += [photo[200 : 200 + 32, x : x + 32] for x in (100, 200, 300, 400)]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2) / 255


def test_paper_preset_has_the_papers_parameters_and_vector():
    with torch.device("meta"):
        learner = DegradationLearner(**LEARNER_PRESETS["paper"])
        assert count(learner) == 85_011_008
        assert count(learner.stages[0]) == 820_992
        assert count(learner.stages[3]) == 52_443_136
        features = learner.stages(torch.empty(1, 64, 32, 32))  # what the stem leaves of a 128 px image
        assert features.shape == (1, 1024, 4, 4)
        assert learner(torch.empty(2, 3, 128, 128)).shape == (2, 1024)


def test_tiny_preset_is_small_and_takes_any_size():
    learner = DegradationLearner(**LEARNER_PRESETS["tiny"]).eval()
    assert count(learner) < 1_300_000
    for height, width in ((24, 24), (33, 50)):
        assert learner(torch.rand(1, 3, height, width)).shape == (1, learner.dim)


def test_embedding_has_length_one_and_the_vectors_width(crops):
    learner = small_learner().eval()
    embedding = learner.embed(crops)
    assert embedding.shape == (16, learner.dim) == (16, 16)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(16))


def test_grouped_batch_norm_is_batch_norm_when_the_batch_is_one_group():
    torch.manual_seed(0)
    ours, reference = GroupedBatchNorm2d(6), nn.BatchNorm2d(6)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    reference.load_state_dict(ours.state_dict(), strict=False)
    for step in range(3):
        x = torch.randn(8, 6, 5, 4) * (step + 2) + step
        torch.testing.assert_close(ours(x), reference(x))
        commit_statistics(ours, pending_statistics(ours))
    torch.testing.assert_close(ours.running_mean, reference.running_mean)
    torch.testing.assert_close(ours.running_var, reference.running_var)
    torch.testing.assert_close(ours.eval()(x), reference.eval()(x))


def test_splitting_the_batch_changes_neither_output_nor_gradient_nor_statistics(crops):
    whole, split = small_learner(), small_learner()
    together = whole(crops)
    together.square().sum().backward()
    parts, sums = [], 0
    for part in crops.split(8):  # two workers, whose sums are added
        parts.append(split(part))
        parts[-1].square().sum().backward()
        sums = sums + pending_statistics(split)
        commit_statistics(split, 0 * sums)  # the other worker starts from nothing pending
    torch.testing.assert_close(torch.cat(parts), together)
    for (name, a), b in zip(whole.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
    commit_statistics(whole, pending_statistics(whole))
    commit_statistics(split, sums)
    for (name, a), b in zip(whole.named_buffers(), split.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    # Groups are equally large, so the mean of their means is the batch's.
    torch.testing.assert_close(whole.norm.running_mean, 0.1 * whole.conv(crops).mean((0, 2, 3)))


def test_groups_are_normalised_by_themselves(crops):
    learner = small_learner()
    changed = crops.clone()
    changed[12:] = 0.5
    before, after = learner(crops), learner(changed)
    assert torch.equal(before[:12], after[:12])
    assert not torch.allclose(before[12:], after[12:])


def test_a_batch_that_is_no_multiple_of_the_group_is_refused():
    with pytest.raises(ValueError, match="batch of 6 samples .* groups of 4"):
        GroupedBatchNorm2d(3, 4)(torch.rand(6, 3, 2, 2))


def test_running_statistics_move_only_on_commit_and_only_by_forwards_with_gradients(crops):
    learner = small_learner()
    before = {name: b.clone() for name, b in learner.state_dict().items()}
    with torch.no_grad():
        learner(crops)
    assert not pending_statistics(learner).any()
    learner(crops)
    assert pending_statistics(learner).any()
    assert all(torch.equal(before[name], b) for name, b in learner.state_dict().items())
    commit_statistics(learner, pending_statistics(learner))
    assert not torch.equal(before["norm.running_var"], learner.norm.running_var)
    assert not pending_statistics(learner).any()


def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(crops):
    seen = []
    for checkpointing in (False, True):
        learner = small_learner().train()
        if checkpointing:
            learner.checkpoint_gradients()
        learner(crops).square().mean().backward()
        seen.append({name: p.grad for name, p in learner.named_parameters() if p.grad is not None})
        seen[-1] |= {name: b for name, b in learner.named_buffers() if name.endswith("pending")}
    assert seen[0].keys() == seen[1].keys()
    for name, value in seen[0].items():
        torch.testing.assert_close(seen[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_half_precision_weights_keep_full_precision_statistics(crops):
    learner = small_learner()
    for _ in range(3):
        learner(crops)
        commit_statistics(learner, pending_statistics(learner))
    learner.eval()
    exact = learner(crops)
    statistics = learner.norm.running_var.clone()
    half = learner.to(torch.bfloat16)
    assert torch.equal(half.norm.running_var, statistics)
    assert half.norm.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half(crops.bfloat16()).float(), exact, rtol=0.1, atol=0.05)


def test_saved_learner_returns_exactly(tmp_path, crops):
    learner = small_learner()
    learner(crops)
    commit_statistics(learner, pending_statistics(learner))
    learner.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again = DegradationLearner.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in learner.state_dict().items())
    assert torch.equal(learner.eval().embed(crops), again.embed(crops))


def test_a_stored_configuration_of_earlier_versions_is_read_and_what_is_gone_is_refused(tmp_path, crops):
    learner = small_learner().eval()
    learner.save_pretrained(tmp_path / "learner")
    path = tmp_path / "learner" / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"high_pass": False, "projection": 0, "stem_stride": 4}))
    again = load_part(tmp_path, "learner")
    assert torch.equal(again.embed(crops), learner.embed(crops))
    assert not {"high_pass", "projection", "stem_stride"} & again.config.keys()
    path.write_text(json.dumps(stored | {"stem_stride": 2}))  # the same weights, another network
    with pytest.raises(UsageError, match="stem_stride 2 is of an earlier version"):
        load_part(tmp_path, "learner")


def test_quadrant_pairs_are_two_different_quadrants_and_all_twelve_orders_occur(crops):
    image = crops[0].numpy()
    quadrants = [image[:, y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16)]
    place = lambda part: next(i for i, quadrant in enumerate(quadrants) if np.array_equal(quadrant, part))
    rng = np.random.default_rng(0)
    drawn = [tuple(map(place, quadrant_pair(image, rng))) for _ in range(400)]
    assert all(query != key for query, key in drawn)
    assert len(set(drawn)) == 12
    query, key = quadrant_pair(crops[0], np.random.default_rng(1))
    again = quadrant_pair(image, np.random.default_rng(1))
    assert np.array_equal(query.numpy(), again[0])
    assert np.array_equal(key.numpy(), again[1])
    with pytest.raises(ValueError, match="5x4"):
        quadrant_pair(np.zeros((3, 5, 4)), rng)


def ungrouped(samples: int) -> torch.Tensor:
    return torch.full((samples,), UNGROUPED)


def contrast(queue_size: int = 10, batch_block: int = 8, **options) -> MomentumContrast:
    return MomentumContrast(small_learner(), queue_size, batch_block=batch_block, **options)


def test_queue_takes_keys_in_order_and_wraps_at_any_length():
    moco = contrast(queue_size=10)
    written = rows(24, 16)
    for start in (0, 8, 16):
        moco.advance(written[start : start + 8], torch.arange(start, start + 8), ungrouped(8))
    # Slot s holds the newest key whose number is s modulo 10.
    newest = [20, 21, 22, 23, 14, 15, 16, 17, 18, 19]
    assert moco.queue_sources_K.tolist() == newest
    assert torch.equal(moco.queue_KD, written[newest])
    assert int(moco.queue_pointer) == 4
    moco.advance(rows(23, 16, 1), torch.arange(100, 123), ungrouped(23))  # more than the queue holds
    assert sorted(moco.queue_sources_K.tolist()) == list(range(113, 123))
    assert torch.equal(moco.queue_KD[moco.queue_sources_K.argmax()], rows(23, 16, 1)[-1])


def test_loss_is_info_nce_over_other_photographs_in_the_queue():
    moco = contrast(temperature=0.5)
    query, key, queued = rows(8, 16), rows(8, 16, 1), rows(6, 16, 2)
    moco.advance(queued, torch.tensor([1, 2, 3, 4, 5, 6]), ungrouped(6))  # four of ten slots stay empty
    sources = torch.tensor([1, 2, 3, 4, 5, 6, 7, 1])
    loss, _ = moco.loss(query, key, sources, ungrouped(8))
    expected = []
    for i in range(8):
        scores = [query[i] @ key[i]] + [query[i] @ queued[j] for j in range(6) if j + 1 != sources[i]]
        expected.append(-torch.log_softmax(torch.stack(scores) / 0.5, 0)[0])
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_batch_negatives_are_the_other_keys_of_the_block():
    moco = contrast(temperature=0.5, batch_block=4, batch_negatives=True)
    query, key = rows(8, 16), rows(8, 16, 1)
    loss, _ = moco.loss(query, key, torch.zeros(8, dtype=torch.long), ungrouped(8))
    blocks = [query[i : i + 4] @ key[i : i + 4].T / 0.5 for i in (0, 4)]
    expected = torch.stack([nn.functional.cross_entropy(scores, torch.arange(4)) for scores in blocks]).mean()
    torch.testing.assert_close(loss, expected)
    alone = (torch.zeros(4, dtype=torch.long), ungrouped(4))
    halves = [moco.loss(query[i : i + 4], key[i : i + 4], *alone)[0] for i in (0, 4)]
    torch.testing.assert_close(torch.stack(halves).mean(), loss)
    with pytest.raises(ValueError, match="whole blocks of 4"):
        moco.loss(query[:6], key[:6], torch.zeros(6, dtype=torch.long), ungrouped(6))


@pytest.mark.parametrize("batch_negatives", [False, True])
def test_keys_of_the_querys_own_degradation_group_are_no_negatives(batch_negatives):
    """As if they were not there, in the queue and in the block; those of its photograph stay negatives in the block."""
    moco = contrast(temperature=0.5, batch_block=4, batch_negatives=batch_negatives)
    query, key, queued = rows(8, 16), rows(8, 16, 1), rows(6, 16, 2)
    sources, groups = torch.tensor([1, 1, 2, 3, 4, 5, 6, 7]), torch.tensor([0, 5, 0, UNGROUPED, 5, 5, 0, UNGROUPED])
    queue_sources, queue_groups = torch.tensor([1, 2, 3, 8, 8, 9]), torch.tensor([5, 0, 5, 5, 0, UNGROUPED])
    moco.advance(queued, queue_sources, queue_groups)
    share = lambda one, other: one == other != UNGROUPED
    expected = []
    for i in range(8):
        scores = [query[i] @ key[i]]
        for j in range(6):
            if queue_sources[j] != sources[i] and not share(int(groups[i]), int(queue_groups[j])):
                scores.append(query[i] @ queued[j])
        for j in range(i - i % 4, i - i % 4 + 4) if batch_negatives else ():
            if j != i and not share(int(groups[i]), int(groups[j])):
                scores.append(query[i] @ key[j])
        expected.append(-torch.log_softmax(torch.stack(scores) / 0.5, 0)[0])
    torch.testing.assert_close(moco.loss(query, key, sources, groups)[0], torch.stack(expected).mean())


def test_positives_are_recovered_and_an_empty_queue_teaches_nothing():
    moco = contrast(queue_size=32)
    query = rows(8, 16).requires_grad_()
    loss, shares = moco.loss(query, query.detach(), torch.arange(8), ungrouped(8))
    loss.backward()
    assert loss == 0
    assert not query.grad.any()
    moco.advance(rows(32, 16, 1), torch.arange(100, 132), ungrouped(32))
    _, shares = moco.loss(query, query.detach(), torch.arange(8), ungrouped(8))
    assert shares["top1"] == 1
    assert shares["top5"] == 1
    _, shares = moco.loss(query, -query.detach(), torch.arange(8), ungrouped(8))
    assert shares["top1"] == 0
    assert shares["top5"] == 0


def test_keys_keep_their_order_but_meet_other_normalisation_groups(crops):
    moco = contrast()
    keys = moco.keys(crops)
    assert not keys.requires_grad
    together = crops.clone()
    together[5] = 0.5  # second group of queries; among the keys it shares a group with sample 1
    assert not torch.allclose(moco.keys(together)[1], keys[1])
    assert torch.equal(moco.keys(together)[8:], keys[8:])  # blocks do not touch each other
    moco.key_encoder.eval()
    torch.testing.assert_close(moco.keys(crops), moco.key_encoder.embed(crops))


def test_key_encoder_follows_slowly_and_without_gradients(crops):
    query = small_learner(seed=0)
    moco = MomentumContrast(query, 8, momentum=0.75, batch_block=8)
    start = {name: p.clone() for name, p in moco.key_encoder.named_parameters()}
    goal = dict(small_learner(seed=1).named_parameters())
    moco.update_momentum(goal.items())
    for name, key in moco.key_encoder.named_parameters():
        torch.testing.assert_close(key, 0.75 * start[name] + 0.25 * goal[name])
        assert not key.requires_grad
    with pytest.raises(ValueError, match=r"conv\.weight"):
        moco.update_momentum((name, p) for name, p in goal.items() if name != "conv.weight")


def test_contrast_state_is_tensors_and_continues_exactly(tmp_path, crops):
    moco, fresh = contrast(), contrast()
    moco.advance(moco.keys(crops), torch.arange(16), torch.arange(16))
    moco.update_momentum(small_learner(seed=1).named_parameters())
    save_file(moco.state_dict(), tmp_path / "contrast.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "contrast.safetensors"))
    assert torch.equal(fresh.keys(crops), moco.keys(crops))
    query, sources = rows(8, 16), torch.arange(8)
    assert torch.equal(fresh.loss(query, query, sources, sources)[0], moco.loss(query, query, sources, sources)[0])
    assert fresh.queue_pointer == moco.queue_pointer == 6
