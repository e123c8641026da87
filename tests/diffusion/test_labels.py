"""Labels of samples: proportions of a law, as a function of the index alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmt_fast.diffusion import rng
from cmt_fast.diffusion.labels import Law, Some
from cmt_fast.diffusion.rng import Random
from cmt_fast.teacher.pool import start_labels

SKEWED = [[95, 5], [3, 1, 1], [1000, *[1] * 50], [10**9, 1, 7], [0, 5, 0, 17, 402], [2**60, 2**59, 3]]


@pytest.mark.parametrize(
    "counts, want",
    [
        # windows of class 0: [0, 2) [1, 3) [2, 4), of class 1: [0, 4); the tie at 4 falls to the lower class
        ([3, 1], [0, 0, 0, 1, 0, 0, 0, 1]),
        # of class 0: [0, 3), of class 1: [0, 2) [1, 3); the tie at 3 falls to the lower class
        ([1, 2], [1, 0, 1, 1, 0, 1]),
        ([0, 2, 0, 2], [1, 3, 1, 3]),
        ([7], [0, 0, 0]),
        ([4, 4, 4], [0, 1, 2, 0, 1]),
    ],
)
def test_labels_worked_out_by_hand(counts, want):
    assert Law(counts, "data")(torch.arange(len(want))).tolist() == want


@pytest.mark.parametrize("counts", [*SKEWED, np.random.default_rng(0).integers(732, 1301, 1000).tolist()], ids=str)
def test_every_beginning_follows_the_law_to_within_one_sample(counts):
    law, n = Law(counts, "data"), 3000
    labels = law(torch.arange(n)).numpy()
    share = np.array([c / sum(counts) for c in counts])
    seen = np.zeros(len(counts))
    for i, k in enumerate(labels, 1):
        seen[k] += 1
        assert (abs(seen - i * share) < 1 + 1e-9).all(), i


def test_a_label_is_a_function_of_the_index_alone():
    counts = [95, 5, 33]
    whole = Law(counts, "data")(torch.arange(50_000))
    law = Law(counts, "data")
    for index in (torch.tensor([7]), torch.tensor([4999, 0, 3]), torch.arange(100, 200)):
        assert torch.equal(law(index), whole[index])
    period = sum(counts)
    assert torch.equal(whole[period : 2 * period], whole[:period])
    assert torch.equal(law(torch.empty(0, dtype=torch.int64)), torch.empty(0, dtype=torch.int64))


def test_equal_counts_go_round_the_classes_and_no_classes_have_no_labels():
    """The short way of equal counts is the schedule itself."""
    index = torch.arange(100)
    assert torch.equal(Law([6, 6, 6], "data")(index), index % 3)
    assert torch.equal(Law([6, 6, 6], "data")._beginning(100), index % 3)
    assert Law([], "data")(index) is None and Law([], "data").text() == "none"
    assert Law([95, 5], "data").text() == "data: 2 classes, 5 % to 95 %"
    assert Law.uniform(torch.tensor([1, 3]), 5).text() == "uniform over 2 classes"
    with pytest.raises(ValueError, match="no shares"):
        Law([0, 0], "data")


def test_trajectories_start_from_classes_that_have_rows_each_as_often():
    random, ids = Random(3, 1, 0), torch.arange(6000)
    plain = (random.uniform(rng.START_LABEL, ids) * 10).long()
    assert torch.equal(start_labels(random, ids, 10), plain)  # as ever where all ten have rows
    few = start_labels(random, ids, Some((5, 17), 1000))
    assert torch.equal(few, torch.tensor([5, 17])[(random.uniform(rng.START_LABEL, ids) * 2).long()])
    assert abs(float((few == 5).double().mean()) - 0.5) < 4 * 0.5 / 6000**0.5
    assert start_labels(random, ids, 0) is None
    dropped = random.uniform(rng.START_DROP, ids) < 0.1
    for of, null in (
        (10, 10),
        (Some((5, 17), 1000), 1000),
    ):  # the null class is the table's, not the number that are drawn
        labels = start_labels(random, ids, of, 0.1)
        assert torch.equal(labels == null, dropped) and torch.equal(
            labels[~dropped], start_labels(random, ids, of)[~dropped]
        )


def test_a_far_sample_costs_no_more_than_one_round_of_the_counts():
    law = Law([3, 0, 5, 1], "data")
    near, far = law(torch.arange(9)), law(torch.arange(9) + 9 * 10**15)
    assert torch.equal(near, far) and len(law._first) == 9
    assert torch.bincount(near, minlength=4).tolist() == [3, 0, 5, 1]
    long = Law([3, 0, 5, 1], "data")._beginning(45)  # what is cut off is what would have come
    assert torch.equal(long.view(5, 9), near.expand(5, 9))
