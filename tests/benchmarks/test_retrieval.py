"""The reference ranks: a difference from ours is noticed."""

import pytest
import torch

from benchmarks.made_up import (
    made_up_embeddings,
)
from benchmarks.retrieval import check_ranks, reference_ranks
from retrieval.ranking import rank_both_ways


def test_ranks_that_differ_from_the_reference_are_noticed():
    images, captions = made_up_embeddings(10, 8, torch.device("cpu"))
    expected, ranked = reference_ranks(images, captions), rank_both_ways(images, captions)
    check_ranks(images, captions, ranked, expected)
    wrong = (ranked[0]._replace(ranks=ranked[0].ranks + 1), ranked[1])
    with pytest.raises(AssertionError):
        check_ranks(images, captions, wrong, expected)
