"""Each published setting of a recipe, beside its source: docs/published.yaml against the recipes as they resolve."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from bench.harness.pages import published
from cmt_fast.config import loading

SETTINGS = list(published.settings())


# met in public: haidog-yaqub/MeanFlow#17, Kinyugo/consistency_models#5, kynkaat/guidance-interval#3, sihyun-yu/REPA#19
def test_every_published_setting_is_ours_or_says_why_not() -> None:
    """Where a value differs, or nothing is published, there is a reason; where both agree there is none."""
    for s in SETTINGS:
        print(f"{s.recipe:24} {s.key:32} {s.published!s:14} {s.ours!s:14} {s.source}")
    wrong = [s for s in SETTINGS if s.agrees != (s.why is None)]
    assert not wrong, "\n".join(map(str, wrong))
    assert not [s for s in SETTINGS if s.why is not None and len(s.why) < 10]


def test_the_table_has_every_published_recipe() -> None:
    rows = Counter(s.recipe for s in SETTINGS)
    assert set(rows) == {
        "cifar10", "ffhq64", "afhqv2-64", "imagenet64-ect", "imagenet64-ecd", "imagenet512-ecd", "imagenet256-mf",
        "imagenet256-mf-teacher",
    }  # fmt: skip
    assert min(rows.values()) >= 20 and len({s.key for s in SETTINGS}) >= 60
    assert max(Counter((s.recipe, s.key, s.source) for s in SETTINGS).values()) == 1


@pytest.mark.parametrize("change, said", [({"why": None}, "why None"), ({"ours": 3}, "ours 3")])
def test_a_row_that_does_not_hold_stops_the_page(change: dict, said: str, monkeypatch) -> None:
    rows = [s for s in SETTINGS if s.why] if "why" in change else [s for s in SETTINGS if not s.why]
    monkeypatch.setattr(published, "settings", lambda: iter([rows[0]._replace(**change)]))
    with pytest.raises(ValueError, match=said):
        published.table()


def test_numbers_that_follow_from_published_ones() -> None:
    """Half-lives as decays, batches as images, and the shares of the sums that clips are of."""
    run = loading.load
    for name in ("cifar10", "ffhq64", "afhqv2-64"):
        pre = run(name).pre
        assert pre.ema[0].beta == pytest.approx(2 ** (-pre.batch / 500_000), abs=5e-6)  # a half-life of 0.5 M images
        t = run(name).mid.trajectories
        assert t.t_max * (t.t_min / t.t_max) ** (7 / t.nfe) == pytest.approx(
            0.77569, rel=1e-5
        )  # node 7 of mid-training's grid
    for name, batches in (("imagenet512-ecd", 70_000), ("imagenet64-ecd", 35_000), ("imagenet64-ect", 35_000)):
        assert run(name).pre.lr_knee_nimg == batches * run(name).pre.batch
    control = run("imagenet64-ect").control
    raised = range(control.images_nimg // (500 * 6_400))  # q is raised after each 500 ticks of 6,400 images: 0, 1, 2, 3
    assert control.objective.doublings == raised[-1] and control.objective.q ** (raised[-1] + 1) == 256
    for name, stage in (("imagenet256-mf", "mid"), ("imagenet256-mf-teacher", "mid"), ("imagenet512-dit", "mid")):
        numbers = math.prod(run(name).data.expects.shape)  # 1 of the mean over a row's numbers
        assert getattr(run(name), stage).grad_clip_norm == numbers and run(name).mid.objective.kind == "cmt_mf"
