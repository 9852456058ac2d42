"""Weights and embeddings that are not finite, or that are all zero."""

import numpy as np
import pytest
import torch

from runtime.finite import BrokenModel, check_size, checked

ROW, ZERO = [0.5, 0.0, -2.0], [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "blocks, fault, zeros",
    [
        ([], None, 0),
        ([[ROW, ROW], [ROW]], None, 0),
        ([[ZERO, ROW], [ROW, ZERO, ROW]], None, 2),
        ([[ZERO], [[0.0, 0.0, -1e-30]], [ROW]], None, 1),
        ([[ZERO, ZERO], [ZERO]], r"zero \(3 of 3\)", 0),
        ([[ZERO, ROW], [ROW, ZERO]], r"zero \(2 of 4\)", 0),
        ([[ROW], [ROW, [0.0, np.nan, 1.0]]], "not finite", 0),
        ([[ROW, [np.inf, 0.0, 0.0]]], "not finite", 0),
        ([[[0.0, -np.inf, 0.0]]], "not finite", 0),
        ([[[0.0, 2e15, 0.0]]], "beyond", 0),
        ([[[-1e15, 0.0, 0.0]]], None, 0),
    ],
)
@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3)], ids=str)
def test_embeddings_that_rank_nothing_are_refused_and_single_zeros_counted(
    capsys, blocks, fault, zeros, shape
):
    tensors = [torch.tensor(block).unflatten(1, shape) for block in blocks]
    if fault:
        with pytest.raises(BrokenModel, match=f"embeddings of photos that are .*{fault}"):
            list(checked(iter(tensors), "photos"))
    else:
        assert all(
            one is other
            for one, other in zip(checked(iter(tensors), "photos"), tensors, strict=True)
        )
    said = capsys.readouterr().err
    assert (
        (f"{zeros} of {sum(map(len, blocks))} photos are zero" in said) == bool(said) == bool(zeros)
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e15, -2e15], ids=str)
def test_a_weight_by_which_nothing_can_be_ranked_is_refused(value):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    check_size(model)
    with torch.no_grad():
        model[1].weight[0, 1] = value
    with pytest.raises(BrokenModel, match="has weights beyond 1e"):
        check_size(model)
