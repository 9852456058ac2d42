"""Checks that weights and embeddings are finite: a model that fails them is never evaluated."""

import sys

import torch

from runtime.errors import InputError

LARGEST = 1e15  # the squares of larger numbers overflow in sums


class BrokenModel(InputError):
    """A model's weights or embeddings are unusable for ranking."""


def checked(blocks, what):
    """Yield the blocks (n, ..., D) of a model's embeddings after checking each.

    what: names the embedded items in messages. Raises BrokenModel for a block with a number that is
    not finite, or whose square would overflow in a sum; and at the end if half of the items or more
    are zero, which happens if lengths overflow. Fewer zeros are counted in a warning.
    """
    items = zeros = 0
    for block in blocks:
        if block.numel():
            if not (block.amin() >= -LARGEST and block.amax() <= LARGEST):  # NaN fails, too
                raise _broken(
                    f"gives embeddings of {what} that are not finite, or beyond {LARGEST:g}"
                )
            rows = block.flatten(1)
            # Rows that begin with 0 are rare: for most blocks this reads a single column.
            rows = rows[rows[:, 0] == 0]
            items, zeros = items + len(block), zeros + int((~rows.any(1)).sum())
        yield block
    if zeros and 2 * zeros >= items:
        raise _broken(f"gives embeddings of {what} that are zero ({zeros} of {items})")
    if zeros:
        print(
            f"Warning: the embeddings of {zeros} of {items} {what} are zero, equally near to "
            "everything: check the features, and whether the model's weights are far too large",
            file=sys.stderr,
        )


def check_size(model):
    """Raise BrokenModel for a weight so large that embeddings would overflow."""
    largest = torch.stack(
        [weight.detach().abs().amax().float() for weight in model.parameters()]
    ).amax()
    if not largest <= LARGEST:  # NaN fails, too
        raise _broken(f"has weights beyond {LARGEST:g}")


def _broken(fault):
    return BrokenModel(
        f"the model {fault}, so nothing can be ranked by it, as happens after a far too high "
        "learning rate or if the file is damaged: take an earlier checkpoint, or train again "
        "with a lower --learning_rate"
    )
