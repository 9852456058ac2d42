"""Files as models to be evaluated: figures against plain loops over what the files hold."""

import os

import numpy as np
import pytest
import torch

from embeddings.as_model import Embeddings, Files, Similarities
from evaluation import evaluate_model
from runtime.errors import InputError
from tests.helpers import loops

CPU = torch.device("cpu")
EACH = [3, 1, 2, 7, 4, 2, 5, 1]  # captions of each image


def made(each=EACH, width=5, seed=0, noise=0.8):
    """(N, D) images, (C, D) captions in a random order, and each caption's image."""
    rng = np.random.default_rng(seed)
    own = rng.permutation(np.repeat(np.arange(len(each)), each))
    images = rng.standard_normal((len(each), width))
    captions = images[own] + noise * rng.standard_normal((len(own), width))
    return images.astype(np.float32), captions.astype(np.float32), own.tolist()


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(name, array):
    np.save(name, array)
    return name


def write_ids(name, ids):
    with open(name, "w") as file:
        file.write("".join(f"{one}\n" for one in ids))
    return name


def unit(rows):
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def recalls_of(scores, own):
    return [loops.recall(ranks) for ranks in loops.ranks_of_groups(scores, own)]


def evaluated(model, **how):
    return evaluate_model(model, "test", **how)


def embeddings(images, captions, ids=None, **how):
    return Embeddings({"test": Files([images, captions], ids, flag="--embeddings")}, CPU, **how)


def same(metrics, expected):
    return [list(side) for side in metrics] == [pytest.approx(side) for side in expected]


@pytest.mark.parametrize("noise", [0.3, 0.8, 3])
def test_uneven_permuted_captions_give_the_recalls_of_a_loop(noise):
    images, captions, own = made(noise=noise)
    ids = [write_ids("ids.txt", own)]
    model = embeddings(save("i.npy", images), save("c.npy", captions), ids)
    expected = recalls_of(unit(images) @ unit(captions).T, own)
    assert same(evaluated(model).metrics, expected)


def test_repeated_images_give_the_recalls_of_a_loop():
    images, captions, own = made()
    model = embeddings(save("i.npy", images[own]), save("c.npy", captions))
    result = evaluated(model)
    assert len(result.images) == len(EACH)
    assert same(result.metrics, recalls_of(unit(images) @ unit(captions).T, own))


def test_ids_on_both_sides_give_the_recalls_of_a_loop():
    images, captions, own = made()
    order = np.random.default_rng(1).permutation(len(images))
    ids = [
        write_ids("c.txt", [f"photo {one}" for one in own]),
        write_ids("i.txt", [f"photo {one}" for one in order]),
    ]
    model = embeddings(save("i.npy", images[order]), save("c.npy", captions), ids)
    assert same(evaluated(model).metrics, recalls_of(unit(images) @ unit(captions).T, own))


def test_ranks_are_of_the_captions_in_their_file():
    images, captions, own = made()
    model = embeddings(save("i.npy", images), save("c.npy", captions), [write_ids("ids.txt", own)])
    result = evaluated(model)
    _, expected = loops.ranks_of_groups(unit(images) @ unit(captions).T, own)
    found = dict(zip(result.dataset.lines.tolist(), result.rankings[0][1].ranks.tolist()))
    assert [found[caption] for caption in range(len(own))] == expected
    assert result.dataset.captions[0] == f"caption {int(result.dataset.lines[0])}"


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(kind):
    images, captions, own = made(each=[5] * 8)
    halves = [torch.from_numpy(rows).to(kind) for rows in (images, captions)]
    for name, rows in zip(("i.pt", "c.pt"), halves):
        torch.save(rows, name)
    result = evaluated(embeddings("i.pt", "c.pt", [write_ids("ids.txt", own)]))
    assert result.images.dtype == torch.float32
    exact = [unit(rows.double().numpy()) for rows in halves]
    assert same(result.metrics, recalls_of(exact[0] @ exact[1].T, own))


def test_dot_products_leave_rows_as_they_are():
    images, captions, own = made()
    images = images * np.linspace(0.1, 5, len(images))[:, None].astype(np.float32)
    ids = [write_ids("ids.txt", own)]
    found = {
        measure: evaluated(
            embeddings(save("i.npy", images), save("c.npy", captions), ids, measure=measure)
        ).metrics
        for measure in ("dot", "cosine", "order")
    }
    exact = images.astype(np.float64), captions.astype(np.float64)
    assert same(found["dot"], recalls_of(exact[0] @ exact[1].T, own))
    assert same(found["cosine"], recalls_of(unit(images) @ unit(captions).T, own))
    order = [[float(loops.similarity(i, c, "order")) for c in captions] for i in images]
    assert same(found["order"], recalls_of(np.array(order), own))
    assert len({metrics.rsum for metrics in found.values()}) == 3


def test_rows_of_length_1_keep_their_bits():
    images, captions, own = made()
    images = torch.nn.functional.normalize(torch.from_numpy(images)).numpy()
    model = embeddings(save("i.npy", images), save("c.npy", captions), [write_ids("ids.txt", own)])
    split = model.loader("test")
    found, _ = model.embed(split)
    assert np.array_equal(found.numpy(), images[split.dataset.row_of.numpy()])


def test_a_stride_takes_every_third_image_with_its_captions():
    images, captions, own = made()
    model = embeddings(
        save("i.npy", images), save("c.npy", captions), [write_ids("ids.txt", own)], measure="dot"
    )
    split = model.loader("test")
    found, texts = model.embed(split, stride=3)
    order = list(dict.fromkeys(own))[::3]
    assert np.array_equal(found.numpy(), images[order])
    expected = [caption for one in order for caption, image in enumerate(own) if image == one]
    assert np.array_equal(texts.numpy(), captions[expected])


def test_clip_retrieval_s_folder_of_twelve_parts_gives_the_recalls_of_a_loop():
    """Each caption has a row of its image; images come back in other parts, by their path."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images, captions, own = made(each=[3, 1, 2, 7, 4, 2, 5, 1, 6, 3, 1, 1])
    images, captions = images.astype(np.float16), captions.astype(np.float16)
    for name in ("img_emb", "text_emb", "metadata"):
        os.makedirs(f"out/{name}")
    for number, part in enumerate(np.array_split(np.arange(len(own)), 12)):
        chosen = [own[caption] for caption in part]
        np.save(f"out/img_emb/img_emb_{number}.npy", images[chosen])
        np.save(f"out/text_emb/text_emb_{number}.npy", captions[part])
        about = {"image_path": [f"{one}.jpg" for one in chosen], "caption": list(map(str, part))}
        parquet.write_table(pa.table(about), f"out/metadata/metadata_{number}.parquet")
    model = Embeddings({"test": Files(["out"], flag="--embeddings")}, CPU)
    result = evaluated(model)
    exact = [unit(rows.astype(np.float64)) for rows in (images, captions)]
    assert same(result.metrics, recalls_of(exact[0] @ exact[1].T, own))
    assert result.dataset.names == [f"{one}.jpg" for one in dict.fromkeys(own)]
    assert result.dataset.captions == [str(line) for line in result.dataset.lines.tolist()]


def test_two_widths_are_refused():
    images, captions, _ = made(each=[5] * 4)
    model = embeddings(save("i.npy", images), save("c.npy", captions[:, :3]))
    with pytest.raises(InputError, match="--embeddings c.npy has rows of width 3, and i.npy of"):
        model.loader("test")


def test_a_bank_of_another_width_is_refused():
    images, captions, _ = made(each=[5] * 4)
    model = embeddings(save("i.npy", images), save("c.npy", captions))
    model.files["train"] = Files([save("b.npy", images[:, :3]), "c.npy"])
    model.loader("test")
    with pytest.raises(InputError, match="--bank b.npy has rows of width 3, and i.npy of width 5"):
        model.loader("train")


# Similarities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_a_matrix_gives_the_recalls_of_a_loop(kind):
    images, captions, own = made()
    scores = (unit(images) @ unit(captions).T).astype(kind)
    model = Similarities(save("s.npy", scores), CPU, [write_ids("ids.txt", own)])
    assert same(
        evaluated(model).metrics,
        recalls_of(scores.astype(np.float32) if kind == np.float16 else scores, own),
    )


def test_the_family_s_dict_in_five_folds():
    images, captions, _ = made(each=[5] * 10)
    scores = unit(images) @ unit(captions).T
    np.save("s.npy", {"npts": 10, "sims": scores})
    result = evaluated(Similarities("s.npy", CPU), fold5=True)
    own = [caption // 5 for caption in range(10)]
    for place, fold in enumerate(result.folds):
        part = scores[2 * place : 2 * place + 2, 10 * place : 10 * place + 10]
        assert same(fold, recalls_of(part, own))


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: np.save("s.npy", {"npts": 9, "sims": np.ones((10, 50))}), "npts 9, .* 10 rows"),
        (
            lambda: np.save("s.npy", np.random.default_rng(0).random((50, 10))),
            r"shape \(50, 10\), as if rows and columns were swapped: save the matrix transposed",
        ),
        (lambda: np.save("s.npy", np.ones((10, 40))), "has 10 rows for the 40 of .*columns"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(make, sentence):
    make()
    with pytest.raises(InputError, match=sentence):
        Similarities("s.npy", CPU).loader("test")


def test_a_bank_s_matrices_must_fit():
    save("s.npy", np.random.default_rng(0).random((4, 20)))
    save("a.npy", np.random.default_rng(1).random((3, 20)))
    save("b.npy", np.random.default_rng(1).random((9, 4)))
    model = Similarities("s.npy", CPU, bank=["a.npy", "b.npy"])
    model.loader("test")
    with pytest.raises(
        InputError,
        match=r"--bank_sims b.npy has shape \(9, 4\), and --sims s.npy \(4, 20\): it must be images x bank captions, "
        "with 4 rows",
    ):
        model.loader("train")
