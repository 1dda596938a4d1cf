"""Claims on which degradation a sample gets: strata, shared degradations, weights, turns."""

from collections import Counter

import numpy as np
import pytest

from deedsr.dataset.assignment import assign_degradation
from deedsr.dataset.members import decode_stored
from deedsr.dataset.pictures import decode
from deedsr.dataset.recipe import Recipe, load_recipe
from deedsr.degradation.chain import degrade
from pipelines.shards.samples import samples_of
from pipelines.shards.source import Source

SIZE = (64, 64)


def recipe(tmp_path, text: str) -> Recipe:
    (tmp_path / "mine.yaml").write_text(text)
    return load_recipe(tmp_path / "mine.yaml")


def contents(count: int) -> list[str]:
    return [f"{number:020x}" for number in range(count)]


def without_seeds(draws: dict) -> dict:
    return draws | {"steps": [{k: v for k, v in step.items() if k != "seed"} for step in draws["steps"]]}


def test_strata_are_drawn_by_their_shares_from_the_sample_alone(tmp_path):
    mixed = recipe(tmp_path, "strata: {light: 0.2, medium: 0.5, heavy: 0.3}")
    assigned = {content: assign_degradation(mixed, content, 0, SIZE) for content in contents(2000)}
    counts = Counter(a.stratum for a in assigned.values())
    for name, share in (("light", 0.2), ("medium", 0.5), ("heavy", 0.3)):
        assert abs(counts[name] - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5
    for content in contents(50):  # again, alone
        assert assign_degradation(mixed, content, 0, SIZE) == assigned[content]
    qualities = {name: [] for name in counts}
    for a in assigned.values():
        qualities[a.stratum] += [step["quality"] for step in a.draws["steps"] if step["step"] == "jpeg1"]
    heavy = load_recipe("heavy").degradation.jpeg1_quality
    assert min(qualities["heavy"]) >= heavy[0]
    assert max(qualities["heavy"]) <= heavy[1] < max(qualities["light"])


def test_the_order_in_which_strata_are_written_changes_nothing(tmp_path):
    one = recipe(tmp_path, "strata: {light: 0.2, heavy: 0.8}")
    two = recipe(tmp_path, "strata: {heavy: 0.8, light: 0.2}")
    assert one.digest == two.digest
    for content in contents(20):
        assert assign_degradation(one, content, 0, SIZE) == assign_degradation(two, content, 0, SIZE)


def test_contents_share_degradations_but_not_noise_and_variants_are_told_apart(tmp_path):
    shared = recipe(tmp_path, "distinct_degradations: 8\nvariants: 2")
    groups: dict[int, list] = {}
    for content in contents(200):
        for variant in range(2):
            assigned = assign_degradation(shared, content, variant, SIZE)
            groups.setdefault(assigned.group, []).append(assigned)
    assert len(groups) == 16
    for members in groups.values():
        assert len(members) > 5
        assert all(without_seeds(m.draws) == without_seeds(members[0].draws) for m in members)
        seeds = [step["seed"] for m in members for step in m.draws["steps"] if "seed" in step]
        assert len(set(seeds)) == len(seeds)
    assert len({str(without_seeds(members[0].draws)) for members in groups.values()}) > 14
    assert assign_degradation(load_recipe("deedsr"), contents(1)[0], 0, SIZE).group is None


def test_weights_give_some_sources_more_degradations(tmp_path):
    weighted = recipe(tmp_path, "weights: [{pattern: 'faces/*', variants: 3}, {pattern: '*', variants: 2}]")
    assert [weighted.variants_of(path) for path in ("faces/a.jpg", "b.jpg")] == [3, 2]
    assert load_recipe("deedsr").variants_of("faces/a.jpg") == 1


@pytest.mark.parametrize("rotate", [0.0, 1.0])
def test_crops_are_mirrored_and_turned_as_the_json_says(photos, small_recipe, rotate):
    fields = small_recipe.model_dump(mode="json") | {"variants": 1, "flip": 0.5, "rotate": rotate}
    fields["crop"]["per_source"] = 12
    turning = Recipe.model_validate(fields)
    path = photos / "train" / "Wine.jpg"
    data = path.read_bytes()
    image = decode(data)
    drafts = samples_of(Source(0, "Wine.jpg", str(path), len(data), "1"), data, None, turning)
    turns = Counter()
    for draft in drafts.samples:
        row = draft.row
        cell = image[row["top"] : row["top"] + 128, row["left"] : row["left"] + 128]
        expected = np.rot90(cell[:, ::-1] if row["flip"] else cell, row["rotate"] // 90)
        assert np.array_equal(decode_stored(draft.members["hr"]), expected)
        turns[row["rotate"]] += 1
    assert set(turns) == ({0} if not rotate else {90, 180, 270})


def test_new_degradations_of_a_recipe_keep_what_fixes_its_hr(tmp_path):
    mine = recipe(
        tmp_path, "crop: {size: 256}\nflip: 0.1\nformats: {hr: jpeg, lr: png}\nsplit: {validation_share: 0.5}"
    )
    heavy = recipe(tmp_path, "base: heavy\nvariants: 3\nseed: 7\nformats: {hr: webp, lr: webp}")
    new = mine.degrading(heavy)
    assert (new.crop, new.flip, new.split, new.shard) == (mine.crop, mine.flip, mine.split, mine.shard)
    assert (new.formats.hr, new.formats.lr) == ("jpeg", "webp")
    assert (new.degradation, new.variants, new.seed, new.name) == (heavy.degradation, 3, 7, heavy.name)
    draws = assign_degradation(new, contents(1)[0], 1, (256, 256)).draws
    assert degrade(np.full((256, 256, 3), 128, np.uint8), draws).shape == (64, 64, 3)
