"""Seeds: what they depend on, and random states that are put back."""

import torch

from runtime import distributed, seeds
from runtime.seeds import seed_for


def test_a_seed_depends_on_all_of_its_numbers():
    numbers = [
        (0, 0, 0),
        (1, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
        (1, 1, 0),
        (2**40, 1, 0),
        (2**63 - 1, 0, 0),
    ]
    found = {seed_for(*three) for three in numbers}
    assert len(found) == 7 and all(0 <= seed < 2**63 for seed in found)


def test_a_random_state_that_is_put_back_draws_the_same_again():
    state = seeds._random_state(torch.device("cpu"))
    drawn = torch.rand(5)
    assert not torch.equal(torch.rand(5), drawn)
    seeds._set_random_state(state, torch.device("cpu"))
    assert torch.equal(torch.rand(5), drawn)


def test_dropout_s_draws_follow_from_seed_step_and_process_alone(monkeypatch):
    def drawn(seed, step, rank):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        seeds.own_draws(seed, step)
        return tuple(torch.rand(3).tolist())

    before = torch.get_rng_state()
    seeds.own_draws(1, 2)  # of one process
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    places = [(seed, step, rank) for seed in (1, 2) for step in (1, 2) for rank in (0, 1)]
    first = [drawn(*place) for place in places]
    assert len(set(first)) == 8 and first == [drawn(*place) for place in places]
