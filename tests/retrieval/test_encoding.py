"""Anybody's model over anybody's loader: which part of a batch is taken for what, and the rows."""

from collections import namedtuple

import numpy as np
import pytest
import torch

from retrieval.encoding import Places, compute_sim, encode, places_in, shard_attn_scores
from runtime.errors import InputError

CAPTIONS = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0], [1, 2, 0, 0]])

LENGTHS, IDS = [4, 3, 2], [3, 1, 2]

IMAGES = torch.arange(6.0).view(3, 2)


class Sums:
    """A model whose embeddings show what it was given: an image's, and a caption's, sum and count."""

    def forward_emb(self, images, captions, lengths):
        sums = [[float(one[:n].sum()), float(n)] for one, n in zip(captions, lengths)]
        return images.flatten(1).sum(1, keepdim=True), torch.tensor(sums)


@pytest.mark.parametrize(
    "batch, expected",
    [
        ((IMAGES, CAPTIONS, LENGTHS, IDS), (0, 1, 2, 3, None)),
        ((IMAGES, CAPTIONS, LENGTHS, tuple(IDS), tuple(IDS)), (0, 1, 2, 3, None)),
        ([IMAGES, CAPTIONS, torch.tensor(LENGTHS), torch.tensor(IDS)], (0, 1, 2, 3, None)),
        ((IMAGES, torch.ones(3) * 2, CAPTIONS, LENGTHS, IDS), (0, 2, 3, 4, 1)),
        ((IMAGES, CAPTIONS.numpy(), np.array(LENGTHS), np.array(IDS)), (0, 1, 2, 3, None)),
    ],
    ids=["VSE++", "HAL", "tensors", "VSE-infinity", "arrays"],
)
def test_a_usual_batch_is_recognised_without_a_word(capsys, batch, expected):
    assert places_in(batch) == Places(*expected)
    assert capsys.readouterr().err == ""


Item = namedtuple("Item", "ids images captions cap_lens")


@pytest.mark.parametrize(
    "batch, expected",
    [
        ((IMAGES, CAPTIONS, IDS, LENGTHS), (0, 1, 3, 2, None)),
        ((IMAGES, CAPTIONS, LENGTHS, [7, 7, 8], IDS), (0, 1, 2, 4, None)),
        ((IMAGES, CAPTIONS, LENGTHS, IDS, CAPTIONS, CAPTIONS > 0), (0, 1, 2, 3, None)),
        ((IMAGES, CAPTIONS, LENGTHS, ["a", "b", "c"]), (0, 1, 2, None, None)),
        ((IMAGES, CAPTIONS, LENGTHS), (0, 1, 2, None, None)),
        ((IMAGES, ["a dog", "a cat", "dogs"], LENGTHS, IDS), (0, 1, 2, 3, None)),
        (
            {"img": IMAGES, "targets": CAPTIONS, "lengths": LENGTHS, "index": IDS},
            ("img", "targets", "lengths", "index", None),
        ),
    ],
    ids=["ids first", "image ids too", "VSRN", "names for ids", "no ids", "texts", "a dict"],
)
def test_an_unusual_batch_is_recognised_and_said(capsys, batch, expected):
    assert places_in(batch) == Places(*expected)
    said = capsys.readouterr().err
    assert ("captions 2" in said or "captions 'targets'" in said) == (said.count("\n") == 1)
    assert ("in the order of loading" in said) == (expected[3] is None)


@pytest.mark.parametrize(
    "batch, lacking",
    [
        ((IMAGES,), "1 parts has no captions and no lengths"),
        ((IMAGES, CAPTIONS), "2 parts has no lengths"),
        ({"images": IMAGES, "text": ["a"] * 3}, "images, text has no captions and no lengths"),
        ((IMAGES, CAPTIONS, [9, 9, 9], IDS[::-1] + [4]), "4 parts has no lengths"),
    ],
    ids=["images alone", "no lengths", "a dict", "numbers that are no lengths"],
)
def test_a_batch_that_lacks_a_part_is_refused(batch, lacking):
    with pytest.raises(InputError, match=lacking):
        places_in(batch)


def batches(order, size, ids=True):
    """Batches of made-up captions in this order, longest first within each."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 6, len(order)).tolist()
    for start in range(0, len(order), size):
        own = sorted(order[start : start + size], key=lambda one: -lengths[one])
        images = torch.tensor([[float(one), 2.0 * one] for one in own])
        captions = torch.zeros(len(own), lengths[own[0]], dtype=torch.int64)
        for row, one in zip(captions, own):
            row[: lengths[one]] = one + 1
        yield (images, captions, [lengths[one] for one in own]) + ((own,) if ids else ())


@pytest.mark.parametrize("size", [1, 4, 30])
def test_rows_stand_where_the_ids_say(capsys, size):
    order = np.random.default_rng(1).permutation(11).tolist()
    images, captions = encode(Sums(), batches(order, size), log_step=2, logging=lambda line: None)
    assert images.tolist() == [[3.0 * one] for one in range(11)]
    assert [row[0] for row in captions] == [(one + 1) * n for one, n in enumerate(captions[:, 1])]
    assert capsys.readouterr().err == ""


def test_words_are_padded_to_the_longest_and_come_with_lengths():
    class Words(Sums):
        def forward_emb(self, images, captions, lengths):
            return images, captions.unsqueeze(2).float() / 2, lengths

    order = [3, 0, 4, 1, 2]
    lengths = {one: n for batch in batches(order, 2) for one, n in zip(batch[3], batch[2])}
    images, captions, found = encode(Words(), batches(order, 2), logging=lambda line: None)
    assert found.tolist() == [lengths[one] for one in range(5)]
    assert captions.shape == (5, max(found), 1)
    for one in range(5):
        assert captions[one, :, 0].tolist() == [
            (one + 1) / 2 if place < lengths[one] else 0 for place in range(max(found))
        ]
    assert images.tolist() == [[one, 2 * one] for one in range(5)]


def test_ids_that_are_no_positions_leave_the_order_of_loading(capsys):
    made = [
        (images, captions, lengths, [100 + 7 * one for one in ids])
        for images, captions, lengths, ids in batches(list(range(6)), 1)
    ]
    images, _ = encode(Sums(), made, logging=lambda line: None)
    assert images.tolist() == [[3.0 * one] for one in range(6)]
    assert "ids are not the 6 captions' positions" in capsys.readouterr().err


def test_a_shuffled_loader_without_positions_is_refused():
    made = list(batches(list(range(6)), 1, ids=False))
    loader = torch.utils.data.DataLoader(made, 1, shuffle=True, collate_fn=lambda one: one[0])
    with pytest.raises(InputError, match="6 captions of a shuffled loader come without their pos"):
        encode(Sums(), loader, logging=lambda line: None)


def test_a_model_without_forward_emb_and_a_loader_without_batches_are_refused():
    with pytest.raises(InputError, match="Linear has none"):
        encode(torch.nn.Linear(2, 2), batches([0, 1], 2))
    with pytest.raises(InputError, match="gives no batch"):
        encode(Sums(), [])


def test_the_log_has_a_line_every_log_step():
    lines = []
    encode(Sums(), list(batches(list(range(5)), 1)), log_step=2, logging=lines.append)
    assert lines == ["Test: [0/5]", "Test: [2/5]", "Test: [4/5]"]
    lines.clear()
    encode(Sums(), batches(list(range(5)), 1), log_step=3, logging=lines.append)
    assert lines == ["Test: [0]", "Test: [3]"]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_embeddings_of_any_precision_become_arrays(kind):
    class Half(Sums):
        def forward_emb(self, *batch):
            return [part.to(kind) for part in super().forward_emb(*batch)]

    images, _ = encode(Half(), batches(list(range(4)), 2), logging=lambda line: None)
    assert images.dtype == (np.float64 if kind == torch.float64 else np.float32)
    assert images.ravel().tolist() == [0, 3, 6, 9]


def test_encoding_leaves_no_graph_and_evaluates():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)

        def forward_emb(self, images, captions, lengths):
            assert not torch.is_grad_enabled()
            return self.dropout(images), self.dropout(captions.float()[:, :2])

    model = torch.nn.DataParallel(Model())
    images, _ = encode(model, batches(list(range(4)), 2), logging=lambda line: None)
    assert images.tolist() == [[one, 2 * one] for one in range(4)] and not model.module.training


def test_products_equal_the_loop():
    rng = np.random.default_rng(0)
    images, captions = rng.standard_normal((3, 4)), rng.standard_normal((15, 4))
    expected = [[sum(a * b for a, b in zip(i, c)) for c in captions] for i in images]
    assert np.abs(compute_sim(images, captions) - expected).max() < 1e-12
    assert (
        np.abs(compute_sim(torch.tensor(images), torch.tensor(captions)) - expected).max() < 1e-12
    )


@pytest.mark.parametrize("shard_size", [1, 4, 100])
def test_shards_of_a_model_s_own_similarity_are_put_together(shard_size):
    class Model(torch.nn.Module):
        def forward_sim(self, images, captions, lengths):
            sums = [one[:n].sum() for one, n in zip(captions, lengths)]
            return images.sum(2).sum(1, keepdim=True) + torch.stack(sums)

    rng = np.random.default_rng(0)
    images, captions = rng.random((5, 3, 2)), rng.random((9, 4, 2))
    lengths = [4, 1, 2, 3, 4, 2, 1, 3, 4]
    found = shard_attn_scores(Model(), images, captions, lengths, None, shard_size)
    for i in range(5):
        for c in range(9):
            assert found[i, c] == pytest.approx(images[i].sum() + captions[c, : lengths[c]].sum())
