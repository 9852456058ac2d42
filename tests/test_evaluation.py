"""Ranks, embeddings and the loss of splits, against the released code and plain loops."""

import json
import statistics
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import loss
from data import get_test_loader
from evaluation import (
    embed,
    encode_data,
    evaluate_model,
    i2t,
    split_loss,
    t2i,
    write_csv,
    write_results,
)
from inputs.word_ids import WordIds
from loss import ContrastiveLoss, order_sim
from model import VSE
from retrieval.ensemble import Ensemble
from retrieval.similarity import Cosine
from runtime.errors import InputError
from tests.helpers import loops
from tests.helpers.loops import whole_numbers
from tests.helpers.made import REFERENCE
from training.meters import AverageMeter, LogCollector
from vocab import build_vocab

CASES = json.loads((REFERENCE / "metrics.json").read_text())

ARRAYS = dict(np.load(REFERENCE / "metrics.npz"))

BOTH = {"i2t": i2t, "t2i": t2i}

TILE = Cosine.tile_images


def as_family(images):
    """One image row per caption, as VSE++ code passes them."""
    return np.repeat(images, 5, axis=0)


# Against the released code ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows", [as_family, lambda images: images], ids=["row a caption", "unique rows"]
)
@pytest.mark.parametrize("container", [np.asarray, torch.as_tensor], ids=["arrays", "tensors"])
@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['measure']}")
def test_ranks_and_recalls_equal_the_released_code_s(case, direction, container, rows):
    arrays = {
        name.partition("_")[2]: array
        for name, array in ARRAYS.items()
        if name.startswith(f"{case['case']}_")
    }
    recall, (ranks, top1) = BOTH[direction](
        container(rows(arrays["images"])),
        container(arrays["captions"]),
        measure=case["measure"],
        return_ranks=True,
    )
    assert np.array_equal(ranks, arrays[f"{direction}_ranks"])
    assert np.array_equal(top1, arrays[f"{direction}_top1"])
    assert recall._asdict() == pytest.approx(case[direction], abs=1e-9)


@pytest.mark.parametrize("direction", BOTH)
def test_without_ranks_only_the_recall_is_returned(direction):
    recall = BOTH[direction](ARRAYS["0_images"], ARRAYS["0_captions"])
    assert tuple(recall) == pytest.approx(tuple(CASES[0][direction].values()), abs=1e-9)


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("npts", [1, 7])
@pytest.mark.parametrize("each", [1, 5])
def test_npts_limits_the_queries_and_not_what_they_are_ranked_among(direction, npts, each):
    images, captions = ARRAYS["0_images"], ARRAYS["0_captions"][:: 5 // each]
    rows = as_family(images) if each == 5 else images
    recall, (ranks, top1) = BOTH[direction](rows, captions, npts=npts, return_ranks=True)
    expected_ranks, expected_top1 = [], []
    for number in range(npts):
        own = range(each * number, each * (number + 1))
        if direction == "i2t":
            scores = [float(images[number] @ caption) for caption in captions]
            best = max(scores[c] for c in own)
            expected_ranks.append(
                sum(score >= best for c, score in enumerate(scores) if c not in own)
            )
            expected_top1.append(scores.index(max(scores)))
        for c in own if direction == "t2i" else ():
            scores = [float(image @ captions[c]) for image in images]
            expected_ranks.append(
                sum(score >= scores[number] for i, score in enumerate(scores) if i != number)
            )
            expected_top1.append(scores.index(max(scores)))
    assert (ranks.tolist(), top1.tolist()) == (expected_ranks, expected_top1)
    assert recall.r1 == 100 * sum(rank < 1 for rank in expected_ranks) / len(expected_ranks)
    assert recall == BOTH[direction](rows, captions, npts=npts)


@pytest.mark.parametrize("npts", [0, -1, 1001])
def test_npts_beyond_the_images_is_refused(npts):
    with pytest.raises(InputError, match=f"npts is {npts} for "):
        i2t(ARRAYS["0_images"], ARRAYS["0_captions"], npts=npts)


# Against loops, with ties -----------------------------------------------------------------------


def exact_scores(images, captions, measure):
    if measure == "cosine":
        return images @ captions.T
    squares = np.maximum(0, captions[None] - images[:, None]) ** 2
    return -np.sqrt(squares.sum(2))


def both_ranks(images, captions, measure="cosine"):
    return [
        direction(images, captions, measure=measure, return_ranks=True)[1][0].tolist()
        for direction in (i2t, t2i)
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("measure", ["cosine", "order"])
@pytest.mark.parametrize("n", [1, 2, 16, 37])
def test_ranks_of_scores_full_of_ties_equal_the_loop(n, measure, dtype):
    images, captions = whole_numbers(n, 5, seed=n, dtype=dtype)
    expected = loops.ranks(exact_scores(images, captions, measure))
    assert both_ranks(images, captions, measure) == list(expected)


def test_ranks_of_many_images_equal_the_loop():
    n = TILE + 1
    images, captions = whole_numbers(n, 6, seed=n)
    images[200] = images[3]
    image_ranks, caption_ranks = both_ranks(images, captions)
    scores = images @ captions.T  # integers: a tie is equality
    own = scores.reshape(n, n, 5)[np.arange(n), np.arange(n)]
    others = [
        sum(score >= own[i].max() for c, score in enumerate(row) if c // 5 != i)
        for i, row in enumerate(scores.tolist())
    ]
    assert image_ranks == others
    columns = scores.T.tolist()
    assert caption_ranks == [
        sum(score >= own[c // 5, c % 5] for i, score in enumerate(column) if i != c // 5)
        for c, column in enumerate(columns)
    ]


@pytest.mark.parametrize("direction", BOTH)
def test_the_first_item_is_one_of_the_best(direction):
    images, captions = whole_numbers(19, 4, seed=2)
    scores = images @ captions.T if direction == "i2t" else captions @ images.T
    _, (_, top1) = BOTH[direction](images, captions, return_ranks=True)
    assert [row[item] for row, item in zip(scores, top1)] == [row.max() for row in scores]


def steps_away(value, steps, dtype):
    """The float `steps` units in the last place above (or below) `value`."""
    found = dtype(value)
    for _ in range(abs(steps)):
        found = np.nextafter(found, dtype(np.inf if steps > 0 else -np.inf))
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [-0.75, 1.5e-7])
@pytest.mark.parametrize(
    "steps, before", [(1, True), (0, True), (-1, True), (-2, True), (-3, False)]
)
def test_text_to_image_ties_reach_two_units_in_the_last_place(value, steps, before, dtype):
    """Captions of 1 make the images' embeddings the scores themselves."""
    images = np.array([[dtype(value)], [steps_away(value, steps, dtype)]])
    _, (ranks, _) = t2i(images, np.ones((10, 1), dtype), return_ranks=True)
    assert ranks[:5].tolist() == [int(before)] * 5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [-0.75, 0.3])
@pytest.mark.parametrize("steps, before", [(0, True), (-2, True), (-3, False)])
def test_image_to_text_ties_reach_two_units_in_the_last_place(value, steps, before, dtype):
    """An image of 1 makes the captions' embeddings the scores.

    Two of its own are lower and do not count.
    """
    captions = np.full((10, 1), dtype(value) - 1, dtype)
    captions[3] = value
    captions[[5, 8]] = steps_away(value, steps, dtype)
    _, (ranks, _) = i2t(np.ones((2, 1), dtype), captions, return_ranks=True)
    assert ranks[0] == 2 * before


def test_scores_that_only_float64_tells_apart_are_told_apart():
    images = np.array([[1.0], [1.0 - 1e-12]])
    assert both_ranks(images, np.ones((10, 1)))[1] == [0] * 5 + [1] * 5
    assert both_ranks(images.astype(np.float32), np.ones((10, 1), np.float32))[1] == [1] * 10


@pytest.mark.parametrize("measure", ["cosine", "order"])
@pytest.mark.parametrize("value", [0.0, 0.37, np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("n", [2, 40])
def test_collapsed_embeddings_rank_last(n, value, measure):
    images, captions = np.full((n, 3), value, np.float32), np.full((5 * n, 3), value, np.float32)
    assert both_ranks(images, captions, measure) == [[5 * n - 5] * n, [n - 1] * (5 * n)]


@pytest.mark.parametrize(
    "n, width", [(TILE // 2 + 1, 1024), (TILE + 1, 1024), (TILE + 2, 300), (TILE + 88, 1000)]
)
def test_equal_images_rank_last_however_the_work_is_shared_out(n, width):
    """The same product need not come out the same to the bit in another block.

    It is a tie all the same.
    """
    rng = np.random.default_rng(n)
    captions = rng.standard_normal((5 * n, width)).astype(np.float32)
    captions /= np.linalg.norm(captions, axis=1, keepdims=True)
    images = np.repeat(captions[:1], n, axis=0)
    _, (ranks, _) = t2i(images, captions, return_ranks=True)
    assert (ranks == n - 1).mean() == 1


@pytest.mark.parametrize("measure", ["cosine", "order"])
def test_one_image_of_nan_ranks_last_and_stands_before_every_other(measure):
    rng = np.random.default_rng(3)
    images, captions = rng.random((6, 4)), rng.random((30, 4))
    images[2] = np.nan
    expected = loops.ranks(exact_scores(images, captions, measure))
    assert expected[0][2] == 25 and expected[1][10:15] == [5] * 5
    assert both_ranks(images, captions, measure) == list(expected)


@pytest.mark.parametrize("measure", ["cosine", "order"])
def test_one_caption_of_nan_ranks_last(measure):
    rng = np.random.default_rng(4)
    images, captions = rng.random((6, 4)), rng.random((30, 4))
    captions[12] = np.nan
    expected = loops.ranks(exact_scores(images, captions, measure))
    assert expected[1][12] == 5
    found = both_ranks(images, captions, measure)
    assert found[1] == expected[1]
    assert [rank for i, rank in enumerate(found[0]) if i != 2] == [
        r for i, r in enumerate(expected[0]) if i != 2
    ]


def test_zero_vectors_among_others_equal_the_loop():
    images, captions = whole_numbers(9, 3, seed=5)
    images[[1, 4]], captions[[0, 7, 44]] = 0, 0
    assert both_ranks(images, captions) == list(loops.ranks(images @ captions.T))


def test_captions_that_two_images_share_are_ties():
    images, captions = np.eye(3), np.repeat(np.eye(3), 5, axis=0)
    images[1], captions[5:10] = images[0], captions[0:5]
    assert both_ranks(images, captions) == [[5, 5, 0], [1] * 10 + [0] * 5]


def test_own_captions_are_never_counted_against_their_image():
    assert both_ranks(np.ones((1, 2)), np.ones((5, 2))) == [[0], [0] * 5]


@pytest.mark.parametrize("n", [50, 7])
def test_one_caption_a_photo_is_evaluated_as_such(n):
    """As many rows as captions are five an image only where five in turn are alike."""
    images, captions = np.eye(n, dtype=np.float32), np.eye(n, dtype=np.float32)
    captions[3] = captions[4]
    assert both_ranks(images, captions) == [
        [0] * 3 + [n - 1, one] + [0] * (n - 5) for one in (1, 0)
    ]


def test_rows_of_one_image_may_differ_by_rounding():
    images, captions = (ARRAYS[f"0_{name}"].astype(np.float32) for name in ("images", "captions"))
    noise = 1 + 1e-6 * np.random.default_rng(0).standard_normal((len(captions), 1)).astype(
        np.float32
    )
    assert both_ranks(as_family(images) * noise, captions) == both_ranks(
        images * noise[::5], captions
    )


@pytest.mark.parametrize("images, captions", [(3, 14), (2, 15), (0, 0), (4, 3)])
@pytest.mark.parametrize("direction", BOTH)
def test_counts_that_do_not_fit_are_refused_with_both(direction, images, captions):
    with pytest.raises(InputError, match=f"{captions} captions for {images} images"):
        BOTH[direction](np.ones((images, 2)), np.ones((captions, 2)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("measure", ["cosine", "order"])
@pytest.mark.parametrize("n", [1, 17, 37])
def test_ranks_on_cuda_equal_the_loop(n, measure):
    images, captions = whole_numbers(n, 5, seed=n)
    expected = loops.ranks(exact_scores(images, captions, measure))
    assert both_ranks(
        torch.from_numpy(images).cuda(), torch.from_numpy(captions).cuda(), measure
    ) == list(expected)


# Recalls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 10, 100])
@pytest.mark.parametrize("with_bank", [False, True])
def test_a_split_s_loss_is_the_mean_of_its_batches_in_file_order(batch_size, with_bank):
    """With a bank, entries whose index is a caption's of the batch are left out."""
    generator = torch.Generator().manual_seed(0)
    images, captions, bank_images, bank_captions = (
        torch.nn.functional.normalize(torch.randn(n, 4, generator=generator, dtype=torch.float64))
        for n in (2, 10, 6, 6)
    )
    bank = (bank_images, bank_captions, torch.tensor([0, 3, 8, 20, 21, 22]))
    total = 0
    for first in range(0, 10, batch_size):
        indices = range(first, min(first + batch_size, 10))
        parts = [images[c // 5].tolist() for c in indices], [captions[c].tolist() for c in indices]
        weights = loops.global_weights(
            *parts, indices, [part.tolist() for part in bank], 3, 40, 40, 0.1
        )
        total += len(indices) * loops.hal(
            loops.similarities(*parts), 30.0, 0.3, *(weights if with_bank else ())
        )
    opt = Namespace(
        measure="cosine",
        max_violation=False,
        sum_violation=False,
        local_alpha=30.0,
        local_ep=0.3,
        global_alpha=40.0,
        global_beta=40.0,
        global_ep_nega=0.1,
        mb_k=3,
    )
    found = split_loss(
        images, captions, ContrastiveLoss(opt), batch_size, bank if with_bank else None
    )
    assert found == pytest.approx(total / 10, abs=1e-11)


def test_the_family_s_names_are_importable_from_here():
    assert order_sim is loss.order_sim
    assert AverageMeter is AverageMeter and LogCollector is LogCollector


# Embedding --------------------------------------------------------------------------------------


def tiny(drawn_data, batch_size, name="tiny_precomp", split="test", **changes):
    """A random model and a loader of a split."""
    vocabulary = build_vocab(str(drawn_data), name)
    opt = Namespace(
        **{
            "data_path": str(drawn_data),
            "data_name": name,
            "img_dim": 8,
            "embed_size": 16,
            "finetune": False,
            "cnn_type": "resnet18",
            "cnn_weights": "none",
            "use_abs": False,
            "no_imgnorm": False,
            "vocab_size": len(vocabulary),
            "word_dim": 6,
            "num_layers": 1,
            **changes,
        }
    )
    torch.manual_seed(1)
    return VSE(opt), get_test_loader(split, name, vocabulary, 32, batch_size, 0, opt)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_a_split_s_embeddings_are_its_items_own(drawn_data, batch_size):
    model, loader = tiny(drawn_data, batch_size)
    model.train_start()
    images, captions = embed(model, loader)
    assert not model.training and not images.requires_grad and not captions.requires_grad
    assert (images.shape, captions.shape) == ((6, 16), (30, 16))
    features = np.load(drawn_data / "tiny_precomp" / "test_ims.npy")
    with torch.no_grad():
        expected = model.img_enc(torch.from_numpy(features))
        alone = [
            model.txt_enc(loader.dataset[c][1].unsqueeze(0), [len(loader.dataset[c][1])])
            for c in range(30)
        ]
    assert (images - expected).abs().max() < 1e-6
    assert (captions - torch.cat(alone)).abs().max() < 1e-6


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_equal_captions_get_equal_embeddings_to_the_bit(workdir, batch_size):
    captions = ["a dog", "a cat", "a dog", "the dog is red .", "a dog", *["a dog"] * 24, "a cat"]
    (workdir / "data" / "tiny_precomp" / "test_caps.txt").write_text(
        "".join(f"{c}\n" for c in captions)
    )
    _, found = embed(*tiny(workdir / "data", batch_size))
    assert all(
        torch.equal(found[i], found[j]) == (captions[i] == captions[j])
        for i in range(30)
        for j in range(30)
    )


def test_one_long_caption_does_not_make_all_as_long(workdir, monkeypatch):
    captions = [f"a dog {'red ' * (number % 7)}" for number in range(29)] + ["dog " * 5000]
    (workdir / "data" / "tiny_precomp" / "test_caps.txt").write_text(
        "".join(f"{c}\n" for c in captions)
    )
    made, padded = [], WordIds.padded
    monkeypatch.setattr(
        WordIds, "padded", lambda *arguments: made.append(padded(*arguments)) or made[-1]
    )
    embed(*tiny(workdir / "data", 4))
    assert max(each.numel() for each in made) <= 4 * 5002


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 1000])
def test_a_split_of_one_repeated_image_ranks_last(workdir, batch_size):
    """Image rows that are equal are tied, whatever batches they were encoded in."""
    path = workdir / "data" / "tiny_precomp" / "test_ims.npy"
    np.save(path, np.repeat(np.load(path)[:1], 6, axis=0))
    images, captions = embed(*tiny(workdir / "data", batch_size, embed_size=301))
    _, (ranks, _) = t2i(images, captions, return_ranks=True)
    assert ranks.tolist() == [5] * 30


def test_the_family_s_call_gives_one_image_row_a_caption(drawn_data):
    model, loader = tiny(drawn_data, 7)
    images, captions = encode_data(model, loader, logging=lambda line: None)
    expected_images, expected_captions = embed(model, loader)
    assert isinstance(images, np.ndarray) and images.shape == captions.shape == (30, 16)
    assert all(np.array_equal(images[c], expected_images[c // 5]) for c in range(30))
    assert np.array_equal(captions, expected_captions)


def test_each_raw_image_is_encoded_once(drawn_data, monkeypatch):
    model, loader = tiny(drawn_data, 2, name="f8k", embed_size=4)
    seen = []
    model.img_enc.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    images, captions = embed(model, loader)
    assert sum(seen) == len(images) == 5 and len(captions) == 25


# A model of somebody's own ----------------------------------------------------------------------


class Looked:
    """A source of similarities that are looked up in a table."""

    tile_images, width = 3, 1

    def __init__(self, table):
        self.table = table
        self.n_images, self.n_captions = table.shape

    def tile(self, images, captions, shape):
        return self.table[images, captions]

    def across(self, side, targets):
        return self.table[:, targets].t() if side == "i2t" else self.table[targets]

    def pairs(self, images, captions):
        return self.table[images, captions]


class TableModel:
    """Somebody's own model, with the five attributes that `evaluation` names, and nothing else."""

    opt = Namespace(
        data_path="somewhere",
        data_name="theirs",
        logger_name="runs/theirs",
        measure="table",
        cross_attn=None,
    )

    def __init__(self, captions_each, seed=0):
        self.image_of = torch.arange(len(captions_each)).repeat_interleave(
            torch.tensor(captions_each)
        )
        shape = len(captions_each), len(self.image_of)
        # Few values, so that many scores tie.
        self.table = torch.from_numpy(
            np.random.default_rng(seed).integers(0, 9, shape).astype(np.float32)
        )
        self.members = [self]

    def loader(self, split):
        captions = [f"{split} {number}" for number in range(len(self.image_of))]

        class Dataset:
            n_images = len(self.table)
            image_of, names = self.image_of, None

            def __len__(self):
                return len(captions)

        dataset = Dataset()
        dataset.captions = captions
        return SimpleNamespace(dataset=dataset)

    def embed(self, loader, stride=1):
        assert stride == 1
        return torch.arange(len(self.table)), torch.arange(len(self.image_of))

    def similarities(self, images, captions):
        return Looked(self.table[images][:, captions])


def looped_recalls(table, image_of):
    """The six recalls of a table of similarities, query by query."""
    ranks = {"i2t": [], "t2i": []}
    for image, row in enumerate(table):
        best = max(score for score, own in zip(row, image_of) if own == image)
        others = [score for score, own in zip(row, image_of) if own != image]
        ranks["i2t"].append(sum(score >= best for score in others))
    for caption, own in enumerate(image_of):
        others = [row[caption] for image, row in enumerate(table) if image != own]
        ranks["t2i"].append(sum(score >= table[own][caption] for score in others))
    return [
        100 * sum(rank < k for rank in own) / len(own) for own in ranks.values() for k in (1, 5, 10)
    ]


@pytest.mark.parametrize("several", [False, True])
def test_a_model_of_somebody_s_own_is_evaluated(several, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = TableModel([1, 5, 2, 3, 1, 7, 1, 1, 4, 2, 6])
    model = Ensemble([own, own]) if several else own
    result = evaluate_model(model, "test", top=10)
    expected = looped_recalls(own.table.tolist(), own.image_of.tolist())
    assert [*result.metrics.i2t[:3], *result.metrics.t2i[:3]] == pytest.approx(expected)
    assert capsys.readouterr().out.startswith(f"rsum: {sum(expected):.1f}\n")
    flags = Namespace(model_path="theirs", save_json="found.json", save_csv="found.csv")
    write_results(flags, "test", result)
    write_csv(flags, result)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["captions"] == 33 and found["rsum"] == pytest.approx(sum(expected))
    assert (tmp_path / "found.csv").read_text().startswith("runs/theirs")


def test_a_model_of_somebody_s_own_is_evaluated_in_folds():
    own = TableModel([5] * 60)
    result = evaluate_model(own, "testall", fold5=True)
    folds = [
        looped_recalls(
            own.table[12 * fold : 12 * fold + 12, 60 * fold : 60 * fold + 60].tolist(),
            [caption // 5 for caption in range(60)],
        )
        for fold in range(5)
    ]
    expected = [statistics.fmean(values) for values in zip(*folds)]
    assert [*result.metrics.i2t[:3], *result.metrics.t2i[:3]] == pytest.approx(expected)
