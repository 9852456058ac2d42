"""Ranks, recalls and embedding of splits."""

import json
from argparse import Namespace

import loops
import numpy as np
import pytest
import torch
from conftest import REFERENCE

import evaluation
import loss
from data import get_test_loader
from errors import InputError
from evaluation import embed, encode_data, i2t, mean_metrics, metrics_of, recall_of, split_loss, t2i
from loss import ContrastiveLoss
from meters import AverageMeter, LogCollector
from model import VSE
from ranking import Cosine, rank_both_ways
from vocab import build_vocab
from word_ids import WordIds

CASES = json.loads((REFERENCE / "metrics.json").read_text())
ARRAYS = dict(np.load(REFERENCE / "metrics.npz"))
BOTH = {"i2t": i2t, "t2i": t2i}
TILE = Cosine.tile_images


def as_family(images):
    """One image row a caption, as the family's code passes them."""
    return np.repeat(images, 5, axis=0)


# Against the released code ----------------------------------------------------------------------

@pytest.mark.parametrize("rows", [as_family, lambda images: images], ids=["row a caption", "unique rows"])
@pytest.mark.parametrize("container", [np.asarray, torch.as_tensor], ids=["arrays", "tensors"])
@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['measure']}")
def test_ranks_and_recalls_equal_the_released_code_s(case, direction, container, rows):
    arrays = {name.partition("_")[2]: array for name, array in ARRAYS.items() if name.startswith(f"{case['case']}_")}
    recall, (ranks, top1) = BOTH[direction](container(rows(arrays["images"])), container(arrays["captions"]),
                                            measure=case["measure"], return_ranks=True)
    assert np.array_equal(ranks, arrays[f"{direction}_ranks"])
    assert np.array_equal(top1, arrays[f"{direction}_top1"])
    assert recall._asdict() == pytest.approx(case[direction], abs=1e-9)


@pytest.mark.parametrize("direction", BOTH)
def test_without_ranks_only_the_recall_is_returned(direction):
    recall = BOTH[direction](ARRAYS["0_images"], ARRAYS["0_captions"])
    assert tuple(recall) == pytest.approx(tuple(CASES[0][direction].values()), abs=1e-9)


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("npts", [1, 7])
def test_npts_takes_the_first_images_and_their_captions(direction, npts):
    images, captions = ARRAYS["0_images"], ARRAYS["0_captions"]
    _, (ranks, _) = BOTH[direction](as_family(images), captions, npts=npts, return_ranks=True)
    expected = loops.ranks(images[:npts] @ captions[:5 * npts].T)
    assert ranks.tolist() == expected[direction == "t2i"]


# Against loops, with ties -----------------------------------------------------------------------

def whole_numbers(n, width, seed, dtype=np.float64):
    """Embeddings whose similarities are exact, and full of ties."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-1, 2, (n, width)).astype(dtype), rng.integers(-1, 2, (5 * n, width)).astype(dtype))


def exact_scores(images, captions, measure):
    if measure == "cosine":
        return images @ captions.T
    squares = np.maximum(0, captions[None] - images[:, None]) ** 2
    return -np.sqrt(squares.sum(2))


def both_ranks(images, captions, measure="cosine"):
    return [direction(images, captions, measure=measure, return_ranks=True)[1][0].tolist() for direction in (i2t, t2i)]


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
    others = [sum(score >= own[i].max() for c, score in enumerate(row) if c // 5 != i)
              for i, row in enumerate(scores.tolist())]
    assert image_ranks == others
    columns = scores.T.tolist()
    assert caption_ranks == [sum(score >= own[c // 5, c % 5] for i, score in enumerate(column) if i != c // 5)
                             for c, column in enumerate(columns)]


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
@pytest.mark.parametrize("steps, before", [(1, True), (0, True), (-1, True), (-2, True), (-3, False)])
def test_text_to_image_ties_reach_two_units_in_the_last_place(value, steps, before, dtype):
    """Captions of 1 make the images' embeddings the scores themselves."""
    images = np.array([[dtype(value)], [steps_away(value, steps, dtype)]])
    _, (ranks, _) = t2i(images, np.ones((10, 1), dtype), return_ranks=True)
    assert ranks[:5].tolist() == [int(before)] * 5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [-0.75, 0.3])
@pytest.mark.parametrize("steps, before", [(0, True), (-2, True), (-3, False)])
def test_image_to_text_ties_reach_two_units_in_the_last_place(value, steps, before, dtype):
    """An image of 1 makes the captions' embeddings the scores; two of its own are lower and do not count."""
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


@pytest.mark.parametrize("n, width", [(TILE // 2 + 1, 1024), (TILE + 1, 1024), (TILE + 2, 300), (TILE + 88, 1000)])
def test_equal_images_rank_last_however_the_work_is_shared_out(n, width):
    """The same product need not come out the same to the bit in another block; it is a tie all the same."""
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
    assert [rank for i, rank in enumerate(found[0]) if i != 2] == [r for i, r in enumerate(expected[0]) if i != 2]


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
    assert both_ranks(images, captions) == [[0] * 3 + [n - 1, one] + [0] * (n - 5) for one in (1, 0)]


def test_rows_of_one_image_may_differ_by_rounding():
    images, captions = (ARRAYS[f"0_{name}"].astype(np.float32) for name in ("images", "captions"))
    noise = 1 + 1e-6 * np.random.default_rng(0).standard_normal((len(captions), 1)).astype(np.float32)
    assert both_ranks(as_family(images) * noise, captions) == both_ranks(images * noise[::5], captions)


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
    assert both_ranks(torch.from_numpy(images).cuda(), torch.from_numpy(captions).cuda(), measure) == list(expected)


# Recalls ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks", [[0], [1], [0, 0, 4, 9], [0, 5, 10], [4, 5, 9, 10], [3, 3, 4, 5], list(range(101)),
                                   [7] * 6], ids=str)
def test_recall_equals_the_loop(ranks):
    assert list(recall_of(ranks)) == pytest.approx(loops.recall(ranks), abs=1e-12)


@pytest.mark.parametrize("container", [np.array, torch.tensor], ids=["array", "tensor"])
def test_recall_takes_any_container(container):
    assert recall_of(container([0, 5, 10])) == recall_of([0, 5, 10])


def test_metrics_have_the_averages_and_the_sum_of_the_six_recalls():
    images, captions = whole_numbers(20, 5, seed=9)
    metrics = metrics_of(rank_both_ways(torch.from_numpy(images), torch.from_numpy(captions)))
    to_text, to_image = map(loops.recall, loops.ranks(images @ captions.T))
    assert list(metrics.i2t) == pytest.approx(to_text) and list(metrics.t2i) == pytest.approx(to_image)
    assert metrics.ar == pytest.approx((to_text[0] + to_text[1] + to_text[2]) / 3)
    assert metrics.ari == pytest.approx((to_image[0] + to_image[1] + to_image[2]) / 3)
    assert metrics.rsum == pytest.approx(sum(to_text[:3]) + sum(to_image[:3]))


def test_the_mean_of_folds_is_that_of_each_figure():
    folds = [metrics_of(rank_both_ways(*map(torch.from_numpy, whole_numbers(8, 5, seed=seed)))) for seed in range(3)]
    mean = mean_metrics(folds)
    assert list(mean.i2t) == pytest.approx([(a + b + c) / 3 for a, b, c in zip(*(fold.i2t for fold in folds))])
    assert list(mean.t2i) == pytest.approx([(a + b + c) / 3 for a, b, c in zip(*(fold.t2i for fold in folds))])


@pytest.mark.parametrize("updates, now, mean", [
    ([(2.0, 1), (4.0, 3)], 4.0, 3.5), ([(5.0, 0)], 5.0, 5.0), ([(1.0, 10), (9.0, 0)], 9.0, 1.0)], ids=str)
def test_a_meter_keeps_the_latest_value_and_the_weighted_mean(updates, now, mean):
    meter = AverageMeter()
    for value, count in updates:
        meter.update(value, count)
    assert (meter.val, meter.avg) == (now, pytest.approx(mean))


def test_meters_are_printed_in_the_order_they_came():
    meters = LogCollector()
    meters.update("Eit", 7)
    meters.update("Loss", 0.5, 4)
    meters.update("Loss", 0.25, 4)
    assert str(meters) == "Eit 7  Loss 0.2500 (0.3750)"


@pytest.mark.parametrize("batch_size", [1, 4, 10, 100])
@pytest.mark.parametrize("with_bank", [False, True])
def test_a_split_s_loss_is_the_mean_of_its_batches_in_file_order(batch_size, with_bank):
    """With a bank, entries whose index is a caption's of the batch are left out."""
    generator = torch.Generator().manual_seed(0)
    images, captions, bank_images, bank_captions = (
        torch.nn.functional.normalize(torch.randn(n, 4, generator=generator, dtype=torch.float64))
        for n in (2, 10, 6, 6))
    bank = (bank_images, bank_captions, torch.tensor([0, 3, 8, 20, 21, 22]))
    total = 0
    for first in range(0, 10, batch_size):
        indices = range(first, min(first + batch_size, 10))
        parts = [images[c // 5].tolist() for c in indices], [captions[c].tolist() for c in indices]
        weights = loops.global_weights(*parts, indices, [part.tolist() for part in bank], 3, 40, 40, 0.1)
        total += len(indices) * loops.hal(loops.similarities(*parts), 30.0, 0.3, *(weights if with_bank else ()))
    opt = Namespace(measure="cosine", max_violation=False, sum_violation=False, local_alpha=30.0, local_ep=0.3,
                    global_alpha=40.0, global_beta=40.0, global_ep_nega=0.1, mb_k=3)
    found = split_loss(images, captions, ContrastiveLoss(opt), batch_size, bank if with_bank else None)
    assert found == pytest.approx(total / 10, abs=1e-11)


def test_a_meter_that_is_reset_starts_anew():
    meter = AverageMeter()
    meter.update(8.0, 5)
    meter.reset()
    assert (meter.val, meter.avg, meter.sum, meter.count) == (0, 0, 0, 0)
    meter.update(2.0, 1)
    assert meter.avg == 2.0


@pytest.mark.parametrize("named, expected", [
    ({}, [("Eit", 7, None), ("Loss", 0.25, None)]),
    ({"prefix": "data/", "step": 7}, [("data/Eit", 7, 7), ("data/Loss", 0.25, 7)])], ids=["plain", "prefix and step"])
def test_meters_log_their_latest_values(named, expected):
    meters, logged = LogCollector(), []
    meters.update("Eit", 7)
    meters.update("Loss", 0.5, 4)
    meters.update("Loss", 0.25, 4)
    logger = Namespace(log_value=lambda tag, value, step: logged.append((tag, value, step)))
    meters.tb_log(logger, **named)
    assert logged == expected


def test_the_family_s_names_are_importable_from_here():
    assert evaluation.order_sim is loss.order_sim
    assert evaluation.AverageMeter is AverageMeter and evaluation.LogCollector is LogCollector


# Embedding --------------------------------------------------------------------------------------

def tiny(drawn_data, batch_size, name="tiny_precomp", split="test", **changes):
    """A random model and a loader of a split."""
    vocabulary = build_vocab(str(drawn_data), name)
    opt = Namespace(**{"data_path": str(drawn_data), "data_name": name, "img_dim": 8, "embed_size": 16,
                       "finetune": False, "cnn_type": "resnet18", "cnn_weights": "none", "use_abs": False,
                       "no_imgnorm": False, "vocab_size": len(vocabulary), "word_dim": 6, "num_layers": 1, **changes})
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
        alone = [model.txt_enc(loader.dataset[c][1].unsqueeze(0), [len(loader.dataset[c][1])]) for c in range(30)]
    assert (images - expected).abs().max() < 1e-6
    assert (captions - torch.cat(alone)).abs().max() < 1e-6


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_equal_captions_get_equal_embeddings_to_the_bit(workdir, batch_size):
    captions = ["a dog", "a cat", "a dog", "the dog is red .", "a dog", *["a dog"] * 24, "a cat"]
    (workdir / "data" / "tiny_precomp" / "test_caps.txt").write_text("".join(f"{c}\n" for c in captions))
    _, found = embed(*tiny(workdir / "data", batch_size))
    assert all(torch.equal(found[i], found[j]) == (captions[i] == captions[j])
               for i in range(30) for j in range(30))


def test_one_long_caption_does_not_make_all_as_long(workdir, monkeypatch):
    captions = [f"a dog {'red ' * (number % 7)}" for number in range(29)] + ["dog " * 5000]
    (workdir / "data" / "tiny_precomp" / "test_caps.txt").write_text("".join(f"{c}\n" for c in captions))
    made, padded = [], WordIds.padded
    monkeypatch.setattr(WordIds, "padded", lambda *arguments: made.append(padded(*arguments)) or made[-1])
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
