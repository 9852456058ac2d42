"""Seeds and random states."""

import numpy as np
import torch

from runtime import distributed


def own_draws(seed, step):
    """Let dropout's draws depend on the seed, the step and the process, if there are several."""
    if distributed.size() > 1:
        torch.manual_seed(seed_for(seed, step, distributed.rank()))


def _random_state(device):
    own = {"cuda": lambda: torch.cuda.get_rng_state(device), "mps": torch.mps.get_rng_state}
    return torch.get_rng_state(), own.get(device.type, lambda: None)()


def _set_random_state(state, device):
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state[1])


def seed_for(*numbers):
    """A seed for torch that depends only on the given non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
