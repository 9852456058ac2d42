"""ECCV Caption's figures against the package's own, whatever the order of the data; bad input."""

import builtins
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import compute_results
from evaluation import Evaluation
from retrieval import eccv
from retrieval.metrics import metrics_of
from retrieval.ranking import rank_both_ways
from retrieval.similarity import Cosine
from runtime.errors import InputError
from tests.helpers.made import write_precomp

IMAGES, WIDTH = 100, 16

FIGURES = (
    "eccv_r1",
    "eccv_map_at_r",
    "eccv_rprecision",
    "cxc_recalls",
    "coco_5k_recalls",
    "coco_1k_recalls",
)

MODEL = "runs/runX/model_best.pth.tar"


@pytest.fixture(scope="module")
def package():
    """The package, limited to 100 of COCO's test images, so that complete lists are possible."""
    pytest.importorskip("eccv_caption", reason="the package eccv_caption is not installed")
    whole = eccv.load_package()
    for gts in (whole.coco_gts, whole.cxc_gts, whole.eccv_gts):
        assert max(len(right) for side in gts.values() for right in side.values()) <= eccv.ITEMS
    images = {}  # in the order in which they come, those that ECCV holds for alike beside each other
    for query, captions in whole.eccv_gts["i2t"].items():
        owners = [owner for caption in captions for owner in whole.coco_gts["t2i"].get(caption, [])]
        images |= dict.fromkeys([query, *owners])
    images = set(list(images)[:IMAGES])
    captions = {caption for number in images for caption in whole.coco_gts["i2t"][number]}

    def restricted(gts):
        both = {}
        for side, queries, targets in (("i2t", images, captions), ("t2i", captions, images)):
            own = {
                query: [item for item in right if item in targets]
                for query, right in gts[side].items()
                if query in queries
            }
            both[side] = {query: right for query, right in own.items() if right}
        return both

    whole.coco_gts, whole.cxc_gts, whole.eccv_gts = map(
        restricted, (whole.coco_gts, whole.cxc_gts, whole.eccv_gts)
    )
    whole.coco_ids = np.array([number for number in whole.coco_ids.tolist() if number in captions])
    return whole


@pytest.fixture(scope="module")
def made(package):
    """The images in an order of their own with made embeddings.

    Ids, (100, D), (500, D) unit rows.
    """
    rng = np.random.default_rng(0)
    image_ids = rng.permutation(list(package.coco_gts["i2t"])).tolist()
    caption_ids = [
        caption for number in image_ids for caption in sorted(package.coco_gts["i2t"][number])
    ]
    images = rng.standard_normal((IMAGES, WIDTH))
    captions = images.repeat(5, 0) + 3 * rng.standard_normal((5 * IMAGES, WIDTH))
    return (
        image_ids,
        caption_ids,
        *(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, captions)),
    )


def evaluation(made):
    """As `evaluate` gives it, with 50 items."""
    image_ids, _, images, captions = made
    embeddings = torch.from_numpy(images), torch.from_numpy(captions)
    rankings = [rank_both_ways(*embeddings, top=50)]
    dataset = SimpleNamespace(
        names=[f"COCO_val2014_{n:012d}.jpg" for n in image_ids],
        image_of=torch.arange(IMAGES).repeat_interleave(5),
    )
    loaded = SimpleNamespace(
        opt=SimpleNamespace(data_path="data", data_name="coco"), similarities=Cosine
    )
    return Evaluation(loaded, dataset, *embeddings, rankings, [None], metrics_of(rankings[0]))


def test_all_figures_are_the_package_s_own_of_whole_lists_to_the_digit(package, made):
    image_ids, caption_ids, images, captions = made
    lists = [
        {query: [targets[item] for item in np.argsort(-row)] for query, row in zip(queries, scores)}
        for queries, targets, scores in (
            (image_ids, caption_ids, images @ captions.T),
            (caption_ids, image_ids, captions @ images.T),
        )
    ]
    expected = package.compute_all_metrics(*lists, target_metrics=FIGURES, Ks=(1, 5, 10))
    result = evaluation(made)
    found, folds = eccv.figures(package, "test", result)
    assert set(found) == set(expected) == set(eccv.TITLES)
    for name, sides in expected.items():
        assert found[name] == {side: 100 * share for side, share in sides.items()}, name
        assert all(1 < value < 100 for value in found[name].values()), name
    for side in ("i2t", "t2i"):
        for name, metrics in (("coco_5k", result.metrics), ("coco_1k", folds)):
            assert [found[f"{name}_r{k}"][side] for k in (1, 5, 10)] == pytest.approx(
                getattr(metrics, side)[:3]
            )


# From the command line --------------------------------------------------------------------------


def write_ids(package, lines_of=lambda ids: ids):
    ids = sorted(package.coco_gts["i2t"])
    with open("data/tiny_precomp/testall_ids.txt", "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines_of(ids))


def test_a_checkpoint_is_evaluated_and_its_figures_printed_and_kept(
    package, evaluated, monkeypatch, capsys
):
    write_precomp(evaluated / "data/tiny_precomp", {"testall": IMAGES})
    monkeypatch.setattr(eccv, "load_package", lambda: package)
    write_ids(
        package, lambda ids: [f"COCO_val2014_{number:012d}.jpg" for number in ids for _ in range(5)]
    )
    compute_results.main(
        [
            "--model_path",
            MODEL,
            "--device",
            "cpu",
            "--split",
            "testall",
            "--eccv",
            "--save_json",
            "r.json",
            "--save_ranks",
            "r.npz",
        ]
    )
    kept, said = json.loads((evaluated / "r.json").read_text()), capsys.readouterr()
    rows = {line[:20].strip(): line[20:].split() for line in said.out.splitlines()}
    for name, title in eccv.TITLES.items():
        assert rows[title][:2] == [f"{kept['eccv'][name][side]:.1f}" for side in ("i2t", "t2i")]
    assert rows["COCO 5K R@10"][2:] == [f"{kept[side]['r10']:.1f}" for side in ("i2t", "t2i")]
    assert rows["COCO 1K R@5"][2:] == [
        f"{kept['coco_1k'][side]['r5']:.1f}" for side in ("i2t", "t2i")
    ]
    assert np.load("r.npz")["t2i_items"].shape == (5 * IMAGES, 10) and "it/s" not in said.err


def test_several_checkpoints_have_figures_as_one(package, evaluated, monkeypatch):
    write_precomp(evaluated / "data/tiny_precomp", {"testall": IMAGES})
    monkeypatch.setattr(eccv, "load_package", lambda: package)
    write_ids(package)
    found = []
    for models in ([MODEL], [MODEL, MODEL]):
        compute_results.main(
            [
                "--model_path",
                *models,
                "--device",
                "cpu",
                "--split",
                "testall",
                "--eccv",
                "--save_json",
                "r.json",
            ]
        )
        found.append(json.loads((evaluated / "r.json").read_text())["eccv"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "lines_of, says",
    [
        (
            lambda ids: [*ids[:-1], f"{ids[0]}.jpg"],
            r"each once, and tiny_precomp's testall has '\d+', more than once",
        ),
        (lambda ids: [*ids[:-1], 7], "has '7', which is not one of them"),
        (lambda ids: [*ids[:-1], f"33855_{ids[-1]}.jpg"], "which is not one of them"),
        (lambda ids: [*ids[:-1], "9" * 5000], "which is not one of them"),
        (lambda ids: ["", *ids[1:]], "has '', which is not one of them"),
    ],
)
def test_ids_that_are_not_coco_s_are_refused(package, lines_of, says):
    names = [str(line) for line in lines_of(sorted(package.coco_gts["i2t"]))]
    dataset = SimpleNamespace(names=names, image_of=torch.arange(IMAGES).repeat_interleave(5))
    loaded = SimpleNamespace(opt=SimpleNamespace(data_path="data", data_name="tiny_precomp"))
    with pytest.raises(InputError, match=says):
        eccv.coco_ids(package, "testall", loaded, dataset)


@pytest.mark.parametrize(
    "n, says", [(None, r"testall_ids.txt is not there"), (10, "has 10 of them: evaluate all")]
)
def test_another_data_set_is_refused_before_anything_is_computed(
    package, evaluated, monkeypatch, n, says
):
    if n:
        write_ids(package, lambda ids: ids[:n])
    monkeypatch.setattr(eccv, "load_package", lambda: package)
    monkeypatch.setattr("evaluation.embed", None)
    with pytest.raises(InputError, match=says):
        compute_results.main(
            ["--model_path", MODEL, "--device", "cpu", "--split", "testall", "--eccv"]
        )


def test_other_numbers_of_captions_are_refused(package, made):
    result = evaluation(made)
    result.dataset.image_of = result.dataset.image_of[1:]
    with pytest.raises(InputError, match="5 captions each"):
        eccv.coco_ids(package, "test", result.checkpoint, result.dataset)


def test_folds_do_not_go_with_it(evaluated):
    with pytest.raises(InputError, match="--eccv .*leave --fold5 out"):
        compute_results.main(["--eccv", "--fold5"])


def test_a_package_that_is_not_there_is_named(evaluated, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *rest: real("not_there" if name == "eccv_caption" else name, *rest),
    )
    with pytest.raises(InputError, match="--eccv needs the package eccv_caption.*pip install"):
        compute_results.main(["--model_path", MODEL, "--eccv"])
