"""Which rows and captions belong to one image: order and repetition do not change the recalls."""

import json
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compute_results
import train
from data import DEV_CAPTIONS, Loader, PrecompDataset, get_loaders, get_test_loader
from evaluation import embed, i2t
from inputs.tokenizer import SPECIAL_WORDS
from model import VSE
from retrieval.metrics import metrics_of
from retrieval.ranking import rank_shifted
from retrieval.similarity import Cosine
from runtime.errors import InputError
from tests.helpers.made import TINY, captions_of, write_coco
from vocab import vocabulary_of

N, WIDTH = 20, 12

MODEL = "runs/runX/model_best.pth.tar"

WORDS = [f"word{number}" for number in range(40)]


def write(folder, features, captions, ids=None, split="test"):
    """The files of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{split}_ims.npy", features)
    (folder / f"{split}_caps.txt").write_text("".join(f"{caption}\n" for caption in captions))
    ids_file = folder / f"{split}_ids.txt"
    if ids is None:
        ids_file.unlink(missing_ok=True)
    else:
        ids_file.write_text("".join(f"{name}\n" for name in ids))
    return str(folder)


def opened(folder, features, captions, ids=None, split="test", **options):
    """The data set of made-up files."""
    return PrecompDataset(
        write(folder, np.asarray(features), captions, ids, split), split, vocabulary, **options
    )


vocabulary = vocabulary_of([*SPECIAL_WORDS, *WORDS])


def drawn(counts, seed=0):
    """Features (N, WIDTH), and for each image its captions, as many as `counts` says."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((len(counts), WIDTH)).astype(np.float32), [
        [" ".join(rng.choice(WORDS, rng.integers(3, 8))) for _ in range(count)] for count in counts
    ]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = VSE(
        Namespace(
            data_name="x_precomp",
            img_dim=WIDTH,
            embed_size=24,
            finetune=False,
            cnn_type="resnet18",
            use_abs=False,
            no_imgnorm=False,
            vocab_size=len(vocabulary),
            word_dim=16,
            num_layers=1,
        )
    )
    made.txt_enc.embed.weight.data *= 20  # so that captions lie apart
    return made


def source_of(model, folder, split):
    """The similarities of a split, and each caption's image, as evaluation and validation have them."""
    loader = get_test_loader(
        split, folder.name, vocabulary, 224, 16, 0, Namespace(data_path=str(folder.parent))
    )
    return Cosine(*embed(model, loader)), loader.dataset.image_of


def figures(model, folder, split="test"):
    """All metrics of a split."""
    source, image_of = source_of(model, folder, split)
    return metrics_of(rank_shifted(source, image_of=image_of)[0])


# Any order, any repetition ----------------------------------------------------------------------


def shuffled_pairs(data, order, noise, rng):
    """One row per caption in any order: features, captions, names."""
    features, captions = data
    pairs = [(image, caption) for image, own in enumerate(captions) for caption in own]
    pairs = [pairs[place] for place in order]
    rows = np.stack([features[image] for image, _ in pairs])
    rows = (rows * (1 + noise * rng.standard_normal(rows.shape))).astype(np.float32)
    return rows, [caption for _, caption in pairs], [f"{image}.jpg" for image, _ in pairs]


@pytest.fixture(scope="module")
def sorted_files(tmp_path_factory, model):
    """{kind: (data, its figures)}: five captions an image or any number of them."""
    found = {}
    for kind, counts in (("five", [5] * N), ("uneven", [1 + image * 7 % 6 for image in range(N)])):
        data, folder = drawn(counts), tmp_path_factory.mktemp(kind) / "x_precomp"
        owner = np.repeat(np.arange(N), counts)
        write(folder, data[0], sum(data[1], []), None if kind == "five" else owner)
        source, _ = source_of(model, folder, "test")
        scores = (source.images.double() @ source.captions.double().T).numpy()
        is_own = owner == np.arange(N)[:, None]
        for query, own in zip([*scores, *scores.T], [*is_own, *is_own.T]):
            assert (
                np.abs(query[own].max() - query[~own]).min() > 1e-5
            )  # so that rounding decides nothing
        ranks = (
            [sum(row > row[owner == image].max()) for image, row in enumerate(scores)],
            [sum(column > column[image]) for image, column in zip(owner, scores.T)],
        )
        found[kind] = (
            data,
            metrics_of([SimpleNamespace(ranks=torch.tensor(side)) for side in ranks]),
        )
        assert figures(model, folder) == found[kind][1]
    return found


@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.parametrize(
    "kind, named", [("five", False), ("five", True), ("uneven", False), ("uneven", True)]
)
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1), noise=st.sampled_from([0, 1e-6]))
def test_pairs_in_any_order_give_the_sorted_file_s_figures(
    tmp_path_factory, sorted_files, model, split, kind, named, seed, noise
):
    (data, expected), rng = sorted_files[kind], np.random.default_rng(seed)
    rows, captions, names = shuffled_pairs(
        data, rng.permutation(sum(map(len, data[1]))), noise, rng
    )
    folder = tmp_path_factory.mktemp("any") / "x_precomp"
    write(folder, rows, captions, names if named else None, split)
    assert figures(model, folder, split) == expected


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1), each=st.sampled_from([1, 5]))
def test_images_in_any_order_give_the_sorted_file_s_figures(
    tmp_path_factory, sorted_files, model, seed, each
):
    ((features, captions), expected), order = (
        sorted_files["five"],
        np.random.default_rng(seed).permutation(N),
    )
    folder = tmp_path_factory.mktemp("any") / "x_precomp"
    write(folder, features[order].repeat(each, 0), sum((captions[image] for image in order), []))
    assert figures(model, folder, "test") == expected


# Every layout -----------------------------------------------------------------------------------

ROWS = np.random.default_rng(3).standard_normal((10, 6)).astype(np.float32)

ROUNDED = [
    lambda rows: rows,
    lambda rows: rows * np.float32(1 + 1e-6),
    lambda rows: rows.astype(np.float16),
    lambda rows: torch.from_numpy(rows).bfloat16().float().numpy(),
]


@pytest.mark.parametrize("rounded", ROUNDED, ids=["same", "1e-6", "float16", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-20, 1e-4, 1, 1e3])
@pytest.mark.parametrize(
    "order", [[0] * 5 + [1] * 5, [1, 0, 1, 0, 2, 0, 2, 2, 2, 3]], ids=["fives", "any"]
)
def test_rows_that_differ_by_rounding_are_one_image(tmp_path, order, scale, rounded):
    rows = ROWS[order]
    rows[1::2] = rounded(rows[1::2])
    dataset = opened(tmp_path / "x_precomp", rows * np.float32(scale), WORDS[:10])
    numbers = list(dict.fromkeys(order))
    assert dataset.image_of.tolist() == [numbers.index(image) for image in order]
    first = [order.index(image) for image in numbers]
    assert torch.equal(
        torch.cat(list(dataset.load_images(3))), torch.from_numpy(rows * np.float32(scale))[first]
    )


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        1 + 1e-4 * ROWS,
        1e-30 * ROWS,
        np.ones((10, 6)),
        np.concatenate([np.zeros((7, 6)), ROWS[:3]]),
    ],
    ids=["drawn", "much in common", "tiny", "all the same", "zeros"],
)
def test_different_images_are_never_one(tmp_path, rows):
    rows = np.asarray(rows, np.float32)[:9]  # no fives
    dataset = opened(tmp_path / "x_precomp", rows, WORDS[:9])
    assert dataset.image_of.tolist() == list(range(9)) and dataset.n_images == 9


@pytest.mark.parametrize(
    "order, images, says",
    [
        (range(10), 10, "taken for one caption an image"),
        ([0, 1, 0, 2, 3], 4, "taken for 4 images, whose rows are the same"),
        ([0] * 5 + [1] * 5, 2, None),
    ],
    ids=str,
)
def test_what_is_guessed_of_a_row_a_caption_is_said(tmp_path, capsys, order, images, says):
    dataset = opened(tmp_path / "x_precomp", ROWS[list(order)], WORDS[: len(order)])
    said = capsys.readouterr().err
    assert dataset.n_images == images
    assert said.count("\n") == (says is not None) and (says or "") in said
    assert says is None or "test_ids.txt with a line per caption that names its image" in said


@pytest.mark.parametrize("named", [False, True])
def test_rows_of_which_the_first_fifth_are_described(tmp_path, capsys, named):
    rows = np.random.default_rng(0).standard_normal((15, 4)).astype(np.float32)
    ids = [f"{c // 5}.jpg" for c in range(15)] if named else None
    dataset = opened(tmp_path / "x_precomp", rows, WORDS[:15], ids)
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and ("its first 3 rows are taken" if named else "one caption an image") in said
    )
    expected = [c // 5 for c in range(15)] if named else list(range(15))
    assert dataset.image_of.tolist() == dataset.row_of.tolist() == expected
    assert np.array_equal(torch.cat(list(dataset.load_images(2))), rows[: 3 if named else 15])
    images, *_, indices = next(iter(Loader(dataset, 15, shuffle=True)))
    assert np.array_equal(images, rows[[expected[c] for c in indices.tolist()]])
    assert dataset.names == (["0.jpg", "1.jpg", "2.jpg"] if named else None)


def test_an_id_a_row_that_comes_back_is_the_same_image(tmp_path, capsys):
    rows = ROWS[[0, 1, 0]]
    dataset = opened(tmp_path / "x_precomp", rows, WORDS[:15], ["a", "b", "a"], together=True)
    assert dataset.image_of.tolist() == [0] * 10 + [1] * 5 and dataset.names == ["a", "b"]
    assert dataset.lines.tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 5, 6, 7, 8, 9]
    assert "has 2 names for 3 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rows, captions, ids",
    [(10, 10, list("aabbccddee")), (3, 15, list("aba")), (3, 4, list("abba"))],
    ids=["a caption", "a row", "a run"],
)
def test_rows_of_one_name_that_are_not_the_same_are_told_of(tmp_path, capsys, rows, captions, ids):
    features = ROWS[:rows].copy()
    if captions == 10:
        features[1] = features[0]  # some are: else the first five rows would be taken
    opened(tmp_path / "x_precomp", features, WORDS[:captions], ids)
    warning = capsys.readouterr().err.splitlines()[-1]
    unlike = {10: "4 rows", 15: "1 rows", 4: "1 rows"}[captions]
    assert (
        warning.startswith(f"Warning: {unlike} of ")
        and "not the same as the first row of their image" in warning
    )


def test_captions_that_come_round_by_round_have_a_row_for_each_name(tmp_path):
    dataset = opened(tmp_path / "x_precomp", ROWS[:3], WORDS[:7], list("abcabcb"), together=True)
    assert dataset.image_of.tolist() == [0, 0, 1, 1, 1, 2, 2] and dataset.lines.tolist() == [
        0,
        3,
        1,
        4,
        6,
        2,
        5,
    ]
    assert dataset.captions == [WORDS[c] for c in (0, 3, 1, 4, 6, 2, 5)]
    assert np.array_equal(torch.cat(list(dataset.load_images(2))), ROWS[:3])


@pytest.mark.parametrize("seed", [0, 1])
def test_dev_s_cap_takes_whole_images_of_captions_in_any_order(tmp_path, seed):
    ids = np.random.default_rng(seed).permutation(np.repeat(np.arange(1100), 5))
    dataset = opened(
        tmp_path / "x_precomp",
        np.ones((5500, 1), np.float32),
        [f"word{n % 40}" for n in range(5500)],
        ids,
        "dev",
        together=True,
    )
    first = list(dict.fromkeys(ids.tolist()))[:1000]
    assert len(dataset) == DEV_CAPTIONS and dataset.n_images == 1000 and dataset.left_out == 500
    assert dataset.names == [str(image) for image in first]
    assert dataset.image_of.tolist() == [c // 5 for c in range(5000)]
    assert ids[dataset.lines].tolist() == [image for image in first for _ in range(5)]


def test_the_family_s_call_says_what_it_takes_for_one_caption_an_image(capsys):
    i2t(ROWS, ROWS)
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "10 rows of images for as many captions are taken for one caption an image" in said
    )
    i2t(ROWS[:2].repeat(5, 0), ROWS)
    assert capsys.readouterr().err == ""


# Photos -----------------------------------------------------------------------------------------


def test_coco_s_caption_ids_in_any_order_are_evaluated_as_sorted(tmp_path):
    write_coco(tmp_path / "coco")
    path, found = tmp_path / "coco" / "annotations" / "coco_test_ids.npy", []
    sorted_ids = np.load(path)
    for ids in (sorted_ids, sorted_ids[[7, 0, 3, 5, 1, 9, 2, 8, 4, 6]]):
        np.save(path, ids)
        found.append(
            get_test_loader(
                "test", "coco", vocabulary, 32, 4, 0, Namespace(data_path=str(tmp_path))
            ).dataset
        )
    by_name = [
        {
            name: [one.captions[c] for c in np.flatnonzero(one.image_of == number)]
            for number, name in enumerate(one.names)
        }
        for one in found
    ]
    assert by_name[0].keys() == by_name[1].keys() and all(
        sorted(by_name[0][name]) == sorted(by_name[1][name]) for name in by_name[0]
    )
    assert found[1].image_of.tolist() == [0] * 5 + [1] * 5


def test_a_training_loader_keeps_the_file_s_order_of_captions(tmp_path):
    write_coco(tmp_path / "coco")
    path = tmp_path / "coco" / "annotations" / "coco_train_ids.npy"
    ids = np.random.default_rng(0).permutation(np.load(path))
    np.save(path, ids)
    train, _ = get_loaders("coco", vocabulary, 32, 4, 0, Namespace(data_path=str(tmp_path), seed=0))
    assert train.dataset.captions == [
        captions_of(number // 10)[number % 10] for number in ids.tolist()
    ]


# The scripts ------------------------------------------------------------------------------------


def shuffle_files(folder, split, seed=0):
    """Rewrite a split with a row and an id per caption, in another order; returns the order."""
    features = np.load(folder / f"{split}_ims.npy")
    lines = (folder / f"{split}_caps.txt").read_text().splitlines()
    order = np.random.default_rng(seed).permutation(len(lines))
    write(
        folder,
        features[order // 5],
        [lines[c] for c in order],
        [f"{c // 5}.png" for c in order],
        split,
    )
    return order


def test_compute_results_gives_the_sorted_file_s_figures_and_embeddings(evaluated, capsys):
    found, embeddings = [], []
    for order in (np.arange(30), None):
        order = (
            shuffle_files(evaluated / "data" / "tiny_precomp", "test") if order is None else order
        )
        compute_results.main(
            ["--model_path", MODEL, "--device", "cpu", "--save_json", "r.json", "--save_embeddings"]
        )
        found.append((json.loads((evaluated / "r.json").read_text()), capsys.readouterr()))
        arrays = np.load("runX_img_and_cap_embeddings.npz")
        embeddings.append([arrays[name][order.argsort()] for name in ("img_embs", "cap_embs")])
    assert found[0][0] == found[1][0] and found[0][1].out == found[1][1].out
    assert "Images: 6, Captions: 30" in found[1][1].err
    for one, other in zip(*embeddings):  # rows in the caption file's order
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_training_validates_by_the_sorted_file_s_figures(workdir):
    found = []
    for shuffled in (False, True):
        if shuffled:
            shuffle_files(workdir / "data" / "tiny_precomp", "dev")
        train.main([*TINY, "--num_epochs", "1", "--logger_name", f"runs/{shuffled}"])
        lines = map(
            json.loads, (workdir / "runs" / str(shuffled) / "log.jsonl").read_text().splitlines()
        )
        last = [line for line in lines if line["kind"] == "validation"][-1]
        found.append(
            {name: last[name] for name in ("rsum", "r1", "r5", "r10", "meanr", "r1i", "meanri")}
        )
    assert found[0] == found[1]


def test_folds_are_over_images_whose_captions_stand_anywhere(evaluated, capsys):
    shuffle_files(evaluated / "data" / "tiny_precomp", "testall")
    compute_results.main(
        ["--model_path", MODEL, "--device", "cpu", "--split", "testall", "--fold5"]
    )
    assert "five folds of 2 images each" in capsys.readouterr().err


def test_names_that_do_not_tell_whose_the_rows_are_end_in_one_sentence(evaluated):
    folder = evaluated / "data" / "tiny_precomp"
    features = np.load(folder / "test_ims.npy")
    shuffle_files(folder, "test")
    np.save(folder / "test_ims.npy", features)
    with pytest.raises(InputError, match="nothing tells which row is whose"):
        compute_results.main(["--model_path", MODEL, "--device", "cpu"])
