"""Several models as one, against VSE-infinity's recorded lines and against plain loops over whole matrices."""

import json
from argparse import Namespace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import compute_results
from evaluation import Checkpoint, Evaluation, load_for_evaluation, print_evaluation
from retrieval.ensemble import Ensemble, Together
from retrieval.ranking import rank_shifted
from runtime.errors import InputError
from tests.helpers import loops
from tests.helpers.made import REFERENCE, tree
from tests.layers.test_cross_attention import loop_score
from tests.test_compute_results import approximately, as_dict, mean_of
from tests.test_regions import refused

RECORDED = {
    case["name"]: case
    for case in json.loads((REFERENCE / "vse_infty" / "metrics.json").read_text())
}

ARRAYS = dict(np.load(REFERENCE / "vse_infty" / "metrics.npz"))

ENSEMBLES = [("t2i", "i2t"), ("vse", "i2t"), ("t2i", "vse"), ("vse", "t2i", "i2t")]


def paths(*runs):
    return [f"runs/{run}/model_best.pth.tar" for run in runs]


@pytest.fixture
def matrices(models):
    """A function of a run, and the splits of images and captions.

    Their similarities, pair by pair, as an array.
    """

    @cache
    def loaded(run, split):
        checkpoint = load_for_evaluation(Namespace(model_path=paths(run)[0], device="cpu"))
        return checkpoint.opt, *checkpoint.embed(checkpoint.loader(split))

    @cache
    def matrix(run, image_split="test", caption_split="test"):
        opt, images, _ = loaded(run, image_split)
        _, _, captions = loaded(run, caption_split)
        if not opt.cross_attn:
            return images.double().numpy() @ captions.double().numpy().T
        score = cache(lambda image, words: loop_score(image, words, opt))
        images = [tuple(map(tuple, image)) for image in images.tolist()]
        words = [
            tuple(map(tuple, words[:n]))
            for words, n in zip(captions.padded().tolist(), captions.lengths)
        ]
        return np.array([[score(image, caption) for caption in words] for image in images])

    return matrix


def json_of(folder, flags):
    compute_results.main([*flags, "--device", "cpu", "--save_json", "out.json"])
    return json.loads((folder / "out.json").read_text())


def figures(scores):
    """(i2t, t2i) figures of a matrix, by loops."""
    return [loops.recall(ranks) for ranks in loops.ranks(scores)]


def holds(content, to_text, to_image):
    """Whether JSON has these figures."""
    expected = as_dict(to_text, to_image)
    return {name: content[name] for name in expected} == approximately(expected)


# Against VSE-infinity's -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folds, printed", [(1, "printed_ensemble_with_folds"), (5, "printed_ensemble_with_folds_fold5")]
)
def test_the_mean_of_two_models_prints_the_released_lines(capsys, folds, printed):
    opt = Namespace(measure="cosine", cross_attn=None, logger_name="runs/x")
    names = ("folds", "ensemble_partner")
    ensemble = Ensemble([Checkpoint(None, opt, None)] * 2)
    images, captions = (
        Together([torch.from_numpy(ARRAYS[f"{name}_{side}_embeddings"]) for name in names])
        for side in ("image", "caption")
    )
    dataset = Namespace(image_of=torch.arange(200) // 5)
    result = Evaluation(ensemble, dataset, images, captions, [], [None] * folds, None)
    result = result.ranked(
        [
            rank_shifted(ensemble.similarities(*part[:2]), image_of=part[2])[0]
            for part in result.parts()
        ]
    )
    print_evaluation(result)
    assert capsys.readouterr().out.splitlines() == RECORDED["ensemble_partner"][printed]


# From the command line --------------------------------------------------------------------------


@pytest.mark.parametrize("runs", ENSEMBLES, ids=" ".join)
def test_figures_are_those_of_the_averaged_matrices(models, matrices, capsys, runs):
    content = json_of(models, ["--model_path", *paths(*runs)])
    expected = figures(sum(map(matrices, runs)) / len(runs))
    assert holds(content, *expected) and content["model_path"] == paths(*runs)
    assert content["data_name"] == [
        "vectors_precomp" if run == "vse" else "regions_precomp" for run in runs
    ]
    assert capsys.readouterr().out.splitlines()[2] == "Image to text: " + " ".join(
        f"{x:.1f}" for x in expected[0]
    )


def test_an_ensemble_of_a_model_and_itself_is_the_model(models):
    alone = json_of(models, ["--model_path", *paths("i2t")])
    twice = json_of(models, ["--model_path", *paths("i2t", "i2t")])
    assert (
        alone.pop("model_path") == paths("i2t")[0] and alone.pop("data_name") == "regions_precomp"
    )
    assert {name: twice[name] for name in alone} == alone


def test_folds_are_averaged_fold_by_fold(models, matrices):
    content = json_of(models, ["--model_path", *paths("vse", "i2t"), "--fold5"])
    scores = (matrices("vse") + matrices("i2t")) / 2
    folds = [figures(scores[4 * f : 4 * f + 4, 20 * f : 20 * f + 20]) for f in range(5)]
    assert all(holds(found, *fold) for found, fold in zip(content["folds"], folds))
    assert holds(content, *mean_of(folds))


def test_a_correction_takes_each_model_s_own_bank(models, matrices):
    content = json_of(
        models,
        [
            "--model_path",
            *paths("t2i", "vse"),
            "--correction",
            "nnn",
            "--correction_k",
            "4",
            "--correction_alpha",
            "0.6",
        ],
    )

    def mean(*splits):
        return (matrices("t2i", *splits) + matrices("vse", *splits)) / 2

    scores = mean()
    off_captions = 0.6 * np.sort(mean("train", "test").T)[:, -4:].mean(1)
    off_images = 0.6 * np.sort(mean("test", "train"))[:, -4:].mean(1)
    expected = figures(scores - off_captions)[0], figures(scores - off_images[:, None])[1]
    assert holds(content["corrections"]["nnn"], *expected)
    assert content["correction_bank"] == "bank: train, 12 images, 60 captions"


def test_parts_of_what_several_embed_are_parts_of_each():
    both = Together([torch.arange(6).view(3, 2), torch.arange(12).view(3, 2, 2)])
    chosen = torch.tensor([2, 0])
    assert [part.tolist() for part in both[chosen].parts] == [
        part[chosen].tolist() for part in both.parts
    ]


def test_everything_goes_on_it(models, capsys):
    content = json_of(
        models,
        [
            "--model_path",
            *paths("vse", "t2i"),
            "--hubness",
            "--correction",
            "all",
            "--tune_correction",
            "--report",
            "page",
            "--save_csv",
            "out.csv",
        ],
    )
    output, page = capsys.readouterr().out, (models / "page" / "report.html").read_text()
    assert "sinkhorn" in output and "parameters chosen on dev" in output and "hubness" in content
    assert (
        ", ".join(paths("vse", "t2i")) in page
        and "data/vectors_precomp, data/regions_precomp" in page
    )
    assert "mean of cosine, t2i" in page
    assert (models / "out.csv").read_text().startswith("runs/vse + runs/t2i, ")
    again = json_of(
        models, ["--model_path", *paths("vse", "t2i"), "--correction", "csls", "--transductive"]
    )
    assert again["correction_bank"].startswith("transductive") and again["rsum"] == content["rsum"]


def test_each_checkpoint_may_have_data_and_vocabulary_of_its_own(models):
    plain = json_of(models, ["--model_path", *paths("vse", "t2i")])
    (models / "data" / "vectors_precomp").rename(models / "data" / "moved_precomp")
    (models / "vocab").rename(models / "words")
    (models / "elsewhere").mkdir()
    (models / "words" / "regions_precomp_vocab.json").rename(
        models / "elsewhere" / "regions_precomp_vocab.json"
    )
    moved = json_of(
        models,
        [
            "--model_path",
            *paths("vse", "t2i"),
            "--data_name",
            "moved_precomp",
            "regions_precomp",
            "--vocab_path",
            "words",
            "elsewhere",
        ],
    )
    assert moved.pop("data_name") == ["moved_precomp", "regions_precomp"]
    assert moved == {name: value for name, value in plain.items() if name != "data_name"}


# Bad input --------------------------------------------------------------------------------------


def other_captions(folder):
    path = folder / "data" / "vectors_precomp" / "test_caps.txt"
    path.write_text(path.read_text().replace("dog", "god", 1))


def fewer_images(folder):
    path = folder / "data" / "vectors_precomp"
    np.save(path / "test_ims.npy", np.load(path / "test_ims.npy")[:10])
    (path / "test_caps.txt").write_text(
        "".join((path / "test_caps.txt").read_text().splitlines(True)[:50])
    )


def other_layout(folder):
    """The same captions, but of two images each in one place and of five in another."""
    path = folder / "data" / "vectors_precomp"
    (path / "test_ids.txt").write_text(
        "".join(f"{min(c // 5, 18) if c != 4 else 1}\n" for c in range(100))
    )
    np.save(path / "test_ims.npy", np.load(path / "test_ims.npy")[:19])


def other_words(folder):
    """A vocabulary with a word too many."""
    (folder / "more").mkdir()
    path = folder / "vocab" / "regions_precomp_vocab.json"
    content = json.loads(path.read_text())
    n = len(content["word2idx"])
    content["word2idx"]["extra"], content["idx2word"][str(n)], content["idx"] = n, "extra", n + 1
    (folder / "more" / path.name).write_text(json.dumps(content))


def nothing(folder):
    pass


BOTH = ["--model_path", *paths("vse", "t2i")]

BAD = {
    "other captions": (other_captions, BOTH, ["ensemble", "vectors_precomp", "regions_precomp"]),
    "fewer images": (
        fewer_images,
        BOTH,
        ["ensemble", "10 images, 50 captions", "20 images, 100 captions"],
    ),
    "captions of other images": (other_layout, BOTH, ["ensemble", "19 images", "20 images"]),
    "a vocabulary that fits one of them": (
        other_words,
        ["--model_path", *paths("t2i", "i2t"), "--vocab_path", "vocab", "more"],
        ["vocabulary", "runs/i2t"],
    ),
    "two data sets for three models": (
        nothing,
        [
            "--model_path",
            *paths("vse", "t2i", "i2t"),
            "--data_name",
            "vectors_precomp",
            "regions_precomp",
        ],
        ["--data_name has 2", "3"],
    ),
    "two vocabularies for one model": (
        nothing,
        ["--model_path", *paths("vse"), "--vocab_path", "vocab", "vocab"],
        ["--vocab_path has 2", "1"],
    ),
    "one data set for vectors and regions": (
        nothing,
        [*BOTH, "--data_name", "regions_precomp"],
        ["over vectors", "5 regions"],
    ),
    "a second file that is not there": (
        nothing,
        ["--model_path", *paths("vse"), "runs/none.pth.tar"],
        ["runs/none"],
    ),
    "embeddings of several": (nothing, [*BOTH, "--save_embeddings"], ["--save_embeddings", "2"]),
    "a bank of other captions": (
        lambda folder: (folder / "data/vectors_precomp/train_caps.txt").write_text("a\n" * 60),
        [*BOTH, "--correction", "nnn"],
        ["ensemble", "train"],
    ),
}


@pytest.mark.parametrize(
    "value, words",
    [
        (0, "embeddings of images that are zero"),
        (1e38, "has weights beyond 1e+15"),
        (1e14, "embeddings of images that are (zero|not finite)"),
    ],
)
@pytest.mark.parametrize(
    "runs, flags",
    [(["vse"], []), (["vse", "i2t"], []), (["vse", "t2i"], ["--rerank", "3"])],
    ids=str,
)
def test_a_model_that_gives_nothing_finite_is_not_evaluated(
    models, capsys, runs, flags, value, words
):
    """Its weights are finite, as those of a run at far too high a learning rate.

    The last of several is such.
    """
    path = paths(runs[-1])[0]
    content = torch.load(path, weights_only=False)
    for weight in content["model"][0].values():
        weight.fill_(value)
    torch.save(content, path)
    for name in ("vectors", "regions"):
        features = np.load(f"data/{name}_precomp/test_ims.npy").astype(np.float32)
        np.save(f"data/{name}_precomp/test_ims.npy", 1e9 * features)
    with pytest.raises(InputError, match=words.replace("+", r"\+")):
        compute_results.main(["--model_path", *paths(*runs), "--device", "cpu", *flags])
    assert not capsys.readouterr().out and not Path("ranks.pth.tar").exists()


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(models, kind):
    prepare, flags, named = BAD[kind]
    prepare(models)
    before = tree(models)
    refused(compute_results.main, flags, *named)
    assert tree(models) == before
