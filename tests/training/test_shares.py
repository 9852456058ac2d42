"""How a batch is shared between processes, and gradients in pieces."""

import pytest
import torch

from tests.helpers import together
from tests.helpers.together import check_same_gradients, whole
from training.shares import shares


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("alike", [False, True])
def test_each_pair_is_in_one_share_and_shares_are_balanced(n, alike):
    generator = torch.Generator().manual_seed(n)
    lengths = torch.randint(3, 20, (60,), generator=generator).sort(descending=True).values
    words = torch.randint(1, 50, (60, 20), generator=generator) * (
        torch.arange(20) < lengths.unsqueeze(1)
    )
    found = shares(lengths, n, words if alike else None)
    assert sorted(torch.cat(found).tolist()) == list(range(60)) and len(found) == n
    assert all(places.tolist() == sorted(places.tolist()) for places in found)
    loads = [int(lengths[places].sum()) for places in found]
    assert max(loads) - min(loads) <= 2 * 20


def test_captions_that_begin_alike_go_to_one_process():
    words = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 9], [5, 6, 7, 1]])
    one, other = shares(torch.tensor([4, 4, 4, 4]), 2, words)
    assert {tuple(one.tolist()), tuple(other.tolist())} == {(0, 2), (1, 3)}


def test_fewer_pairs_than_processes():
    assert [len(one) for one in shares(torch.tensor([3]), 3)] == [1, 0, 0]
    assert sum(len(one) for one in shares(torch.tensor([3]), 3, torch.tensor([[1, 2, 3]]))) == 1


@pytest.mark.parametrize("name", [name for name in together.CASES if "micro" in name])
def test_pieces_have_the_whole_batch_s_gradients(name):
    check_same_gradients(together.gradients_of(name), whole(name), 1e-12)
