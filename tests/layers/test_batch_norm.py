"""Batch normalisation over several processes."""

import torch

from layers.batch_norm import share_batch_norm
from runtime import distributed


def test_batch_norm_over_processes_is_exact_where_the_mean_is_large(monkeypatch):
    rows = 100 + 0.1 * torch.randn(4096, 6, generator=torch.Generator().manual_seed(1))
    exact, shared = torch.nn.BatchNorm1d(6).double(), torch.nn.Sequential(torch.nn.BatchNorm1d(6))
    monkeypatch.setattr(distributed, "size", lambda: 2)
    share_batch_norm(shared)
    assert (shared(rows) - exact(rows.double())).abs().max() < 5e-3
    assert torch.allclose(shared[0].running_var, exact.running_var.float(), rtol=1e-4)
