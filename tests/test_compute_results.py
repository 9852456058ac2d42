"""Evaluation from the command line: the released checkpoints, folds, files, and bad input."""

import json
import os
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import compute_results
import train
from evaluation import evalrank
from retrieval.corrections import METHODS
from runtime.errors import InputError
from tests.helpers import loops
from tests.helpers.made import RAW, RELEASED, ROOT, in_shell, load, run_script, scalars, tree

EXPECTED = json.loads((RELEASED / "expected.json").read_text())

RUNS = sorted(EXPECTED)

MODEL = "runs/runX/model_best.pth.tar"


def flags_for(run):
    return [
        "--model_path",
        f"runs/{run}/model_best.pth.tar",
        "--data_path",
        "data",
        "--vocab_path",
        "vocab",
        "--device",
        "cpu",
    ]


def lines_of(to_text, to_image):
    """The five lines of [r1, r5, r10, medr, meanr] both ways."""
    return [
        f"rsum: {sum(to_text[:3]) + sum(to_image[:3]):.1f}",
        f"Average i2t Recall: {sum(to_text[:3]) / 3:.1f}",
        "Image to text: " + " ".join(f"{x:.1f}" for x in to_text),
        f"Average t2i Recall: {sum(to_image[:3]) / 3:.1f}",
        "Text to image: " + " ".join(f"{x:.1f}" for x in to_image),
    ]


def as_dict(to_text, to_image):
    """What the JSON says of one evaluation."""
    names = ("r1", "r5", "r10", "medr", "meanr")
    return {
        "i2t": dict(zip(names, to_text)),
        "t2i": dict(zip(names, to_image)),
        "ar": sum(to_text[:3]) / 3,
        "ari": sum(to_image[:3]) / 3,
        "rsum": sum(to_text[:3]) + sum(to_image[:3]),
    }


def approximately(content):
    """The same nested numbers, up to rounding in their last places."""
    return {
        name: approximately(value) if isinstance(value, dict) else pytest.approx(value, abs=1e-9)
        for name, value in content.items()
    }


@pytest.fixture(scope="module")
def folds():
    """[(i2t figures, t2i figures)] of five folds of the local run's test split, from the recorded embeddings."""
    recorded = np.load(RELEASED / "expected_local.npz")
    images, captions = (
        recorded["image_embeddings"].astype(float),
        recorded["caption_embeddings"].astype(float),
    )
    parts = [
        loops.ranks(images[12 * f : 12 * f + 12] @ captions[60 * f : 60 * f + 60].T)
        for f in range(5)
    ]
    return [tuple(map(loops.recall, ranks)) for ranks in parts]


def mean_of(folds):
    return [[sum(fold[side][place] for fold in folds) / 5 for place in range(5)] for side in (0, 1)]


# The released checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_released_checkpoints_print_the_released_lines(released, run):
    result = run_script(
        "compute_results.py", *flags_for(run), "--save_csv", "out.csv", cwd=released
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == EXPECTED[run]["printed"]
    assert (
        "Unknown words in the captions of test: " in result.stderr
        and "Warning" not in result.stderr
    )
    assert (released / "out.csv").read_text() == EXPECTED[run]["csv"] + "\n"
    recorded = np.load(RELEASED / f"expected_{run}.npz")
    ranks = torch.load(released / "ranks.pth.tar", weights_only=True)
    assert sorted(ranks) == ["rt", "rti"]
    assert [list(map(int, part)) for name in ("rt", "rti") for part in ranks[name]] == [
        recorded[name].astype(int).tolist()
        for name in ("i2t_ranks", "i2t_top1", "t2i_ranks", "t2i_top1")
    ]


@pytest.mark.parametrize("batch_size", ["1", "7", "1000"])
@pytest.mark.parametrize("run", RUNS)
def test_the_batch_size_does_not_change_the_lines(released, capsys, run, batch_size):
    compute_results.main([*flags_for(run), "--batch_size", batch_size])
    assert capsys.readouterr().out.splitlines() == EXPECTED[run]["printed"]


def test_reading_the_captions_otherwise_changes_the_lines(released, capsys):
    compute_results.main([*flags_for("local"), "--caption_reading", "released"])
    assert capsys.readouterr().out.splitlines() == EXPECTED["local"]["printed"]
    compute_results.main([*flags_for("local"), "--caption_reading", "text"])
    assert capsys.readouterr().out.splitlines() != EXPECTED["local"]["printed"]


def test_a_vocabulary_of_other_captions_is_warned_of(evaluated, capsys):
    """Of as many words, so that the weights fit it."""
    flags = ["--model_path", "runs/runX/model_best.pth.tar", "--device", "cpu"]
    words = json.loads(Path("vocab/tiny_precomp_vocab.json").read_text())["word2idx"]
    stale = {word if index < 4 else f"mot{index}": index for word, index in words.items()}
    Path("stale").mkdir()
    Path("stale/tiny_precomp_vocab.json").write_text(json.dumps({"word2idx": stale}))
    compute_results.main([*flags, "--vocab_path", "stale"])
    told = [line for line in capsys.readouterr().err.splitlines() if "unknown" in line]
    assert [line.split(",")[0] for line in told] == [
        "Warning: 100.0% of the words in the captions of test are unknown to runs/runX/model_best.pth.tar"
    ]


def test_saved_embeddings_are_one_row_a_caption(released):
    compute_results.main([*flags_for("max"), "--save_embeddings"])
    recorded = np.load(RELEASED / "expected_max.npz")
    saved = np.load(released / "max_img_and_cap_embeddings.npz", allow_pickle=False)
    assert sorted(saved) == ["cap_embs", "img_embs"]
    np.testing.assert_allclose(
        saved["img_embs"], np.repeat(recorded["image_embeddings"], 5, axis=0), atol=1e-5
    )
    np.testing.assert_allclose(saved["cap_embs"], recorded["caption_embeddings"], atol=1e-5)


def test_folds_are_printed_with_commas_and_their_means_without(released, capsys, folds):
    compute_results.main([*flags_for("local"), "--fold5", "--save_csv", "out"])
    expected = []
    for to_text, to_image in folds:
        expected += [
            "Image to text: " + ", ".join(f"{x:.1f}" for x in to_text),
            "Text to image: " + ", ".join(f"{x:.1f}" for x in to_image),
            f"rsum: {sum(to_text[:3]) + sum(to_image[:3]):.1f} ar: {sum(to_text[:3]) / 3:.1f} "
            f"ari: {sum(to_image[:3]) / 3:.1f}",
        ]
    expected += [
        "-----------------------------------",
        "Mean metrics: ",
        *lines_of(*mean_of(folds)),
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed == expected
    recalls = [
        [float(x) for x in line.partition(": ")[2].split(", ")]
        for line in printed[:15]
        if ", " in line
    ]
    averages = [sum(sum(recall[:3]) for recall in recalls[side::2]) / 15 for side in (0, 1)]
    assert float(printed[-4].split(": ")[1]) == pytest.approx(averages[0], abs=0.1)
    assert float(printed[-2].split(": ")[1]) == pytest.approx(averages[1], abs=0.1)
    rows = {"out_fold1": folds[0], "out_fold5": mean_of(folds)}
    assert {name: (released / name).read_text() for name in rows} == {
        name: "ckpt1/runs/local, "
        + ", ".join(f"{x:.1f}" for x in (*one, *other, sum(one[:3]) + sum(other[:3])))
        + "\n"
        for name, (one, other) in rows.items()
    }
    assert not (released / "out").exists()


@pytest.fixture
def as_trained(released):
    """The released runs with the vocabulary where their options name it."""
    (released / "ckpt1").mkdir()
    (released / "vocab").rename(released / "ckpt1" / "vocab")


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("run", RUNS)
def test_vse_plus_plus_s_evalrank_prints_the_released_lines(as_trained, capsys, run, kind):
    metrics = evalrank(kind(f"runs/{run}/model_best.pth.tar"), data_path="data", split="test")
    assert capsys.readouterr().out.splitlines() == EXPECTED[run]["printed"]
    assert f"rsum: {metrics.rsum:.1f}" == EXPECTED[run]["printed"][0]


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((f"runs/{RUNS[0]}/model_best.pth.tar", "data", "test", True), {}),
        (
            (),
            {
                "model_path": f"runs/{RUNS[0]}/model_best.pth.tar",
                "data_path": "data",
                "split": "test",
                "fold5": True,
            },
        ),
    ],
    ids=["by place", "by name"],
)
def test_vse_plus_plus_s_evalrank_takes_folds(as_trained, capsys, folds, arguments, named):
    assert RUNS[0] == "local"
    evalrank(*arguments, **named)
    assert capsys.readouterr().out.splitlines()[-5:] == lines_of(*mean_of(folds))


def test_vse_plus_plus_s_evalrank_takes_the_dev_split_and_the_checkpoint_s_data(evaluated):
    assert evalrank(MODEL).rsum == pytest.approx(load(evaluated / MODEL)["best_rsum"], abs=1e-9)


@pytest.mark.parametrize(
    "call",
    [
        lambda opt: evalrank(opt),
        lambda opt: evalrank(opt, "test"),
        lambda opt: evalrank(opt_eval=opt, split="test"),
    ],
    ids=["split", "place", "name"],
)
def test_hal_s_evalrank_prints_the_released_lines(as_trained, capsys, call):
    call(
        Namespace(
            model_path="runs/max/model_best.pth.tar",
            data_path="data",
            fold5=False,
            save_csv="out.csv",
        )
    )
    assert capsys.readouterr().out.splitlines() == EXPECTED["max"]["printed"]
    assert Path("out.csv").read_text() == EXPECTED["max"]["csv"] + "\n"


def test_folds_leave_the_first_one_s_ranks(released, capsys):
    compute_results.main([*flags_for("local"), "--fold5"])
    assert "note: five folds of 12 images each, where COCO's have 1000" in capsys.readouterr().err
    recorded = np.load(RELEASED / "expected_local.npz")
    expected = loops.ranks(
        recorded["image_embeddings"][:12] @ recorded["caption_embeddings"][:60].T
    )
    ranks = torch.load(released / "ranks.pth.tar", weights_only=True)
    assert [ranks["rt"][0].tolist(), ranks["rti"][0].tolist()] == list(expected)


def test_saved_ranks_hold_no_more_than_they_show(released):
    compute_results.main(
        [*flags_for("local"), "--save_ranks", "all.npz"]
    )  # which asks for ten items a query
    for ranks, first in torch.load(released / "ranks.pth.tar", weights_only=True).values():
        assert first.untyped_storage().nbytes() == 8 * len(first) == 8 * len(ranks)


def test_json_holds_every_fold_and_the_mean_at_full_precision(released, folds):
    compute_results.main([*flags_for("local"), "--fold5", "--save_json", "deep/out.json"])
    content = json.loads((released / "deep" / "out.json").read_text())
    assert [approximately(fold) for fold in content["folds"]] == [as_dict(*fold) for fold in folds]
    mean = as_dict(*mean_of(folds))
    assert {name: content[name] for name in mean} == approximately(mean)
    assert (content["images"], content["captions"], content["split"]) == (60, 300, "test")


def test_json_of_a_whole_split_is_the_printed_figures_at_full_precision(released):
    compute_results.main([*flags_for("mb"), "--save_json", "out.json"])
    recorded = np.load(RELEASED / "expected_mb.npz")
    expected = as_dict(loops.recall(recorded["i2t_ranks"]), loops.recall(recorded["t2i_ranks"]))
    content = json.loads((released / "out.json").read_text())
    assert {name: content[name] for name in expected} == approximately(expected)
    assert content["folds"] == []


def test_csv_lines_are_appended(released):
    (released / "out.csv").write_text("before\n")
    compute_results.main([*flags_for("mb"), "--save_csv", "out.csv"])
    compute_results.main([*flags_for("max"), "--save_csv", "out.csv"])
    assert (released / "out.csv").read_text().splitlines() == [
        "before",
        EXPECTED["mb"]["csv"],
        EXPECTED["max"]["csv"],
    ]


def test_a_released_checkpoint_of_another_name_of_its_data_evaluates(released, capsys):
    """The data folder may have moved; the options inside name one that is not here."""
    os.rename("data", "elsewhere")
    compute_results.main(
        [
            "--model_path",
            "runs/local/model_best.pth.tar",
            "--data_path",
            "elsewhere",
            "--vocab_path",
            "vocab",
            "--device",
            "cpu",
        ]
    )
    assert capsys.readouterr().out.splitlines() == EXPECTED["local"]["printed"]


# Checkpoints of our own -------------------------------------------------------------------------


def test_without_flags_the_best_run_is_evaluated_on_its_own_data(evaluated, capsys):
    compute_results.main(["--save_json", "out.json"])
    content = json.loads((evaluated / "out.json").read_text())
    assert (content["model_path"], content["data_name"], content["split"]) == (
        MODEL,
        "tiny_precomp",
        "test",
    )
    assert (content["images"], content["captions"]) == (6, 30)
    assert capsys.readouterr().out.splitlines()[0] == f"rsum: {content['rsum']:.1f}"


def test_the_dev_split_gives_the_rsum_of_training(evaluated):
    compute_results.main(["--split", "dev", "--save_json", "out.json"])
    rsum = json.loads((evaluated / "out.json").read_text())["rsum"]
    assert rsum == pytest.approx(load(evaluated / MODEL)["best_rsum"], abs=1e-9)
    assert max(
        value for tag, _, value in scalars(evaluated / "runs" / "runX") if tag == "rsum"
    ) == pytest.approx(rsum, abs=1e-3)


@pytest.mark.parametrize(
    "split, images", [("train", 12), ("dev", 5), ("val", 5), ("test", 6), ("testall", 10)]
)
def test_every_split_is_evaluated(evaluated, split, images):
    compute_results.main(["--split", split, "--save_json", "out.json"])
    content = json.loads((evaluated / "out.json").read_text())
    assert (content["images"], content["captions"]) == (images, 5 * images)


def test_a_checkpoint_carries_its_words(evaluated):
    """No vocabulary file is needed, and one that appears later is not taken for them."""
    before = json_of(evaluated, [])
    (evaluated / "vocab" / "tiny_precomp_vocab.json").unlink()
    assert json_of(evaluated, []) == before


def json_of(folder, flags):
    compute_results.main([*flags, "--save_json", "out.json"])
    return json.loads((folder / "out.json").read_text())


def test_features_with_one_row_a_caption_give_the_same_figures(evaluated):
    before = json_of(evaluated, [])
    path = evaluated / "data" / "tiny_precomp" / "test_ims.npy"
    np.save(path, np.repeat(np.load(path), 5, axis=0))
    assert json_of(evaluated, []) == before


def test_float16_features_are_read(evaluated):
    path = evaluated / "data" / "tiny_precomp" / "test_ims.npy"
    halves = np.load(path).astype(np.float16)
    np.save(path, halves.astype(np.float32))
    before = json_of(evaluated, [])
    np.save(path, halves)
    assert json_of(evaluated, []) == before


def test_empty_captions_and_unknown_words_are_valid_input(evaluated):
    lines = ["", "zyzzyva", " ", "zyzzyva qwx", "\t"] * 6
    (evaluated / "data" / "tiny_precomp" / "test_caps.txt").write_text("\n".join(lines) + "\n")
    content = json_of(evaluated, [])
    # three of each image's five captions are equal to three of every other's: all six images are
    # tied for every one
    assert content["t2i"]["r1"] <= 100 / 6 + 1e-9 and content["images"] == 6


def test_captions_that_are_all_equal_rank_every_image_last(evaluated):
    (evaluated / "data" / "tiny_precomp" / "test_caps.txt").write_text("a dog\n" * 30)
    content = json_of(evaluated, [])
    assert content["i2t"] == {"r1": 0.0, "r5": 0.0, "r10": 0.0, "medr": 26.0, "meanr": 26.0}


def all_alike(folder):
    """Make the model give every photo and every caption the same embedding."""
    content = load(folder / MODEL)
    for state in content["model"]:
        for name, value in state.items():
            value.fill_(float("bias" in name))
    torch.save(content, folder / MODEL)


def test_a_model_to_which_all_is_alike_ranks_everything_last(evaluated):
    all_alike(evaluated)
    found = json_of(evaluated, [])
    assert found["rsum"] == pytest.approx(100.0)  # six images: t2i rank 5 is within R@10
    assert found["t2i"]["medr"] == 6.0 and found["i2t"]["medr"] == 26.0


@pytest.mark.parametrize("name", ["--help", "-h"])
def test_help_is_printed(capsys, name):
    with pytest.raises(SystemExit) as caught:
        compute_results.main([name])
    assert caught.value.code == 0 and "--fold5" in capsys.readouterr().out


# Bad input --------------------------------------------------------------------------------------


def spoil_captions(folder, split, content):
    (folder / "data" / "tiny_precomp" / f"{split}_caps.txt").write_bytes(content)


def spoil_features(folder, split, features):
    np.save(folder / "data" / "tiny_precomp" / f"{split}_ims.npy", features)


def change_checkpoint(folder, **changes):
    content = load(folder / MODEL)
    content.update(changes)
    torch.save(content, folder / MODEL)


def without_words(folder):
    content = load(folder / MODEL)
    del content["vocabulary"]
    torch.save(content, folder / MODEL)


class Smuggled:
    def __reduce__(self):
        return os.system, ("touch smuggled",)


def write_vocabulary(folder, words):
    content = {
        "word2idx": {word: place for place, word in enumerate(words)},
        "idx2word": {},
        "idx": len(words),
    }
    (folder / "vocab" / "tiny_precomp_vocab.json").write_text(json.dumps(content))


# Hubs -------------------------------------------------------------------------------------------


def recorded_scores(run):
    recorded = np.load(RELEASED / f"expected_{run}.npz")
    return (
        recorded["image_embeddings"].astype(float) @ recorded["caption_embeddings"].astype(float).T
    )


def counts_of(scores, k):
    """N_k of the columns by sorting every row."""
    nearest = np.argsort(-scores, axis=1)[:, :k]
    return [int((nearest == target).sum()) for target in range(scores.shape[1])]


@pytest.mark.parametrize(
    "name, more, expected",
    [
        ("coco", ["--data_path", "/data/coco"], "--data_path /data/coco --data_name precomp"),
        ("coco", [], "coco_butd_region_bigru/model_best.pth --data_path /tmp/data/coco"),
        ("f30k", [], "--split test"),
    ],
)
def test_the_flags_of_vse_infinity_s_eval_py_are_answered_with_the_command_here(
    name, more, expected
):
    with pytest.raises(InputError, match="eval.py") as caught:
        compute_results.main(["--dataset", name, *more])
    command = str(caught.value).split("compute_results.py ")[1]
    assert expected in command
    compute_results.parse_args(command.split())
    assert ("testall" in command) == (name == "coco")


def test_hubness_is_printed_after_the_unchanged_lines(released, capsys):
    compute_results.main([*flags_for("local"), "--hubness", "--save_json", "out.json"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:5] == EXPECTED["local"]["printed"] and len(printed) == 5 + 2 + 6
    content = json.loads((released / "out.json").read_text())["hubness"]
    scores = recorded_scores("local")
    for line, (side, k) in zip(
        printed[7:], [(side, k) for side in ("i2t", "t2i") for k in (1, 5, 10)]
    ):
        counts = counts_of(scores if side == "i2t" else scores.T, k)
        row = content[side][str(k)]
        assert row["skewness"] == pytest.approx(scipy.stats.skew(counts), abs=1e-9)
        assert row["anti_hubs"] == pytest.approx(counts.count(0) / len(counts))
        assert (row["largest"], counts[row["largest_item"]]) == (max(counts), max(counts))
        in_hubs = sum(count for count in counts if count >= 2 * k) / sum(counts)
        assert row["hub_occurrence"] == pytest.approx(in_hubs)
        assert line.split()[:4] == [
            side,
            str(k),
            f"{scipy.stats.skew(counts):.2f}",
            f"{row['anti_hubs']:.1%}",
        ]
        assert line.split()[6] == f"{in_hubs:.1%}"
    assert "hub occurrence" in printed[6] and max(map(len, printed)) <= 120


def test_folds_print_the_mean_of_their_hubness(released, capsys):
    compute_results.main([*flags_for("local"), "--fold5", "--hubness", "--save_json", "out.json"])
    content = json.loads((released / "out.json").read_text())["hubness"]
    parts = [recorded_scores("local")[12 * f : 12 * f + 12, 60 * f : 60 * f + 60] for f in range(5)]
    expected = np.mean([scipy.stats.skew(counts_of(part.T, 5)) for part in parts])
    assert content["t2i"]["5"]["skewness"] == pytest.approx(expected, abs=1e-9)
    counts = [counts_of(part, 5) for part in parts]
    in_hubs = np.mean([sum(n for n in part if n >= 10) / sum(part) for part in counts])
    largest = np.mean([max(part) for part in counts])
    assert (content["i2t"]["5"]["hub_occurrence"], content["i2t"]["5"]["largest"]) == pytest.approx(
        (in_hubs, largest)
    )
    assert content["i2t"]["5"]["largest_item"] == -1
    assert "(mean of folds)" in capsys.readouterr().out


def test_corrections_are_printed_side_by_side_before_and_after(evaluated, capsys):
    compute_results.main(["--correction", "all", "--correction_k", "3", "--save_json", "out.json"])
    printed = capsys.readouterr().out.splitlines()
    content = json.loads((evaluated / "out.json").read_text())
    rows, parameters = printed[-11:-5], printed[-5:]
    assert [line.split()[0] for line in rows] == ["none", *METHODS] and max(
        map(len, printed)
    ) <= 120
    assert parameters[0] == "csls: k=3" and parameters[1] == "inverted_softmax: temperature=0.05"
    assert content["correction_bank"] == "bank: train, 12 images, 60 captions"
    assert f"({content['correction_bank']})" in printed[5]
    assert float(rows[0].split()[7]) == pytest.approx(content["rsum"], abs=0.051)
    for line in rows[1:]:
        name, *cells = line.split()
        found = content["corrections"][name]
        recalls = [found[side][r] for side in ("i2t", "t2i") for r in ("r1", "r5", "r10")]
        hubs = found["hubness"]["i2t"]["10"]
        assert [float(cell.strip("%")) for cell in cells[:9]] == pytest.approx(
            [*recalls, found["rsum"], hubs["skewness"], 100 * hubs["anti_hubs"]], abs=0.051
        )
        assert found["rsum"] == pytest.approx(sum(recalls))
    assert content["corrections"]["csls"]["parameters"] == {
        side: {"k": 3} for side in ("i2t", "t2i")
    }


def test_a_correction_is_that_of_the_embeddings_and_the_bank_s(evaluated):
    """NNN from the saved embeddings of test and train, in NumPy."""
    compute_results.main(
        [
            "--correction",
            "nnn",
            "--correction_k",
            "4",
            "--correction_alpha",
            "0.6",
            "--save_json",
            "out.json",
            "--save_embeddings",
        ]
    )
    test = dict(np.load("runX_img_and_cap_embeddings.npz"))
    compute_results.main(["--split", "train", "--save_embeddings"])
    bank = dict(np.load("runX_img_and_cap_embeddings.npz"))
    images, captions = test["img_embs"][::5], test["cap_embs"]
    caption_shift = 0.6 * np.sort(captions @ bank["img_embs"][::5].T)[:, -4:].mean(1)
    image_shift = 0.6 * np.sort(images @ bank["cap_embs"].T)[:, -4:].mean(1)
    scores = images @ captions.T
    to_text = loops.recall(loops.ranks(scores - caption_shift)[0])
    to_image = loops.recall(loops.ranks(scores - image_shift[:, None])[1])
    found = json.loads((evaluated / "out.json").read_text())["corrections"]["nnn"]
    assert {name: found[name] for name in ("i2t", "t2i", "rsum")} == approximately(
        {
            name: value
            for name, value in as_dict(to_text, to_image).items()
            if name in ("i2t", "t2i", "rsum")
        }
    )


def test_the_evaluated_queries_are_the_bank_only_where_it_says_so(evaluated, capsys):
    compute_results.main(["--correction", "csls", "--transductive", "--save_json", "out.json"])
    assert "transductive" in capsys.readouterr().out
    assert json.loads((evaluated / "out.json").read_text())["correction_bank"].startswith(
        "transductive"
    )


def test_a_smaller_bank_is_spread_over_its_split(evaluated, capsys):
    compute_results.main(["--correction", "csls", "--correction_bank_images", "5"])
    assert "bank: train, 4 images, 20 captions" in capsys.readouterr().out  # each third of twelve


def test_parameters_are_tuned_on_dev_only(evaluated, capsys, monkeypatch):
    """The test split does not change what is chosen."""

    def chosen():
        compute_results.main(
            ["--correction", "all", "--tune_correction", "--save_json", "out.json"]
        )
        assert "parameters chosen on dev" in capsys.readouterr().out
        content = json.loads((evaluated / "out.json").read_text())["corrections"]
        return {name: one["parameters"] for name, one in content.items()}

    before = chosen()
    path = evaluated / "data" / "tiny_precomp" / "test_ims.npy"
    np.save(path, np.load(path)[::-1] * 3)
    assert chosen() == before


def test_raw_images_have_a_bank_of_unaugmented_images(workdir, capsys):
    train.main([*RAW, "--data_name", "f8k"])
    compute_results.main(["--correction", "nnn", "--save_json", "one.json"])
    compute_results.main(["--correction", "nnn", "--save_json", "two.json"])
    assert (workdir / "one.json").read_text() == (workdir / "two.json").read_text()


def fill_weights(folder, value):
    content = load(folder / MODEL)
    for state in content["model"]:
        for tensor in state.values():
            tensor.fill_(value)
    torch.save(content, folder / MODEL)


def test_a_model_to_which_all_is_alike_has_figures_all_the_same(evaluated, capsys):
    all_alike(evaluated)
    compute_results.main(["--hubness", "--correction", "all"])
    assert "sinkhorn" in capsys.readouterr().out


SPECIAL = ["<pad>", "<start>", "<end>", "<unk>"]

BAD = {  # what is done to the folder, the flags, and what the sentence names
    "no checkpoint": (lambda f: None, ["--model_path", "runs/none.pth.tar"], ["runs/none.pth.tar"]),
    "checkpoint cut short": (
        lambda f: (f / MODEL).write_bytes((f / MODEL).read_bytes()[:3000]),
        [],
        [MODEL],
    ),
    "checkpoint of another kind": (lambda f: (f / MODEL).write_text("hello"), [], [MODEL]),
    "checkpoint with code": (lambda f: torch.save({"model": Smuggled()}, f / MODEL), [], [MODEL]),
    "checkpoint with code in its options": (
        lambda f: change_checkpoint(f, opt=Smuggled()),
        [],
        [MODEL],
    ),
    "checkpoint of zeros": (lambda f: fill_weights(f, 0.0), [], ["embeddings", "zero"]),
    "checkpoint of nan": (lambda f: fill_weights(f, float("nan")), [], [MODEL, "fc.weight", "NaN"]),
    "no data folder": (lambda f: None, ["--data_path", "nowhere"], ["nowhere"]),
    "no features": (
        lambda f: (f / "data/tiny_precomp/test_ims.npy").unlink(),
        [],
        ["test_ims.npy"],
    ),
    "no captions": (
        lambda f: (f / "data/tiny_precomp/test_caps.txt").unlink(),
        [],
        ["test_caps.txt"],
    ),
    "no captions in the file": (
        lambda f: spoil_captions(f, "test", b""),
        [],
        ["test_caps.txt", "empty"],
    ),
    "captions of another number": (
        lambda f: spoil_captions(f, "test", b"a dog\n" * 29),
        [],
        ["29", "6"],
    ),
    "captions not UTF-8": (
        lambda f: spoil_captions(f, "test", b"a\n" * 6 + b"\xff\n" + b"a\n" * 23),
        [],
        ["test_caps.txt", "line 7"],
    ),
    "features of another width": (
        lambda f: spoil_features(f, "test", np.ones((6, 9), np.float32)),
        [],
        ["9", "8"],
    ),
    "features of objects": (
        lambda f: spoil_features(f, "test", np.array([[Smuggled()] * 8] * 6)),
        [],
        ["test_ims.npy"],
    ),
    "features with nan": (
        lambda f: spoil_features(f, "test", np.full((6, 8), np.nan)),
        [],
        ["test_ims.npy", "NaN"],
    ),
    "features torn": (
        lambda f: (f / "data/tiny_precomp/test_ims.npy").write_bytes(
            (f / "data/tiny_precomp/test_ims.npy").read_bytes()[:-5]
        ),
        [],
        ["test_ims.npy"],
    ),
    "vocabulary without special words": (
        lambda f: write_vocabulary(f, ["a", "dog"]),
        ["--vocab_path", "vocab"],
        ["tiny_precomp_vocab.json", "special words"],
    ),
    "vocabulary of another size": (
        lambda f: write_vocabulary(f, [*SPECIAL, "a"]),
        ["--vocab_path", "vocab"],
        ["5", "vocab"],
    ),
    "no vocabulary there": (lambda f: None, ["--vocab_path", "words"], ["words", "--vocab_path"]),
    "no vocabulary at all": (
        lambda f: (without_words(f), (f / "vocab/tiny_precomp_vocab.json").unlink()),
        [],
        ["--vocab_path"],
    ),
    "vocabulary with code": (
        lambda f: (
            (f / "vocab/tiny_precomp_vocab.json").rename(f / "vocab/old")
            and (f / "vocab/tiny_precomp_vocab.pkl").write_bytes(
                b"cos\nsystem\n(S'touch smuggled'\ntR."
            )
        ),
        ["--vocab_path", "vocab"],
        ["tiny_precomp_vocab.pkl", "os.system"],
    ),
    "folds that are not equal": (
        lambda f: None,
        ["--fold5"],
        ["--fold5", "6 images", "--split testall"],
    ),
    "folds that are not equal without testall": (
        lambda f: (f / "data/tiny_precomp/testall_ims.npy").unlink(),
        ["--fold5"],
        ["--fold5", "6 images"],
    ),
    "an unknown split": (lambda f: None, ["--split", "potato"], ["--split", "potato"]),
    "an unknown reading": (lambda f: None, ["--caption_reading", "potato"], ["--caption_reading"]),
    "no batch": (lambda f: None, ["--batch_size", "0"], ["--batch_size", "0"]),
    "a device that is not there": (lambda f: None, ["--device", "cuda:99"], ["--device cuda:99"]),
    "a device of no kind": (lambda f: None, ["--device", "potato"], ["--device potato"]),
    "an unknown correction": (lambda f: None, ["--correction", "magic"], ["--correction", "csls"]),
    "a temperature too low": (
        lambda f: None,
        ["--correction", "sinkhorn", "--correction_temperature", "1e-9"],
        ["--correction_temperature"],
    ),
    "a parameter of another correction": (
        lambda f: None,
        ["--correction", "csls", "--correction_alpha", "1"],
        ["--correction_alpha", "--correction csls"],
    ),
    "a bank without a correction": (
        lambda f: None,
        ["--correction_bank", "dev"],
        ["--correction_bank", "without"],
    ),
    "all of the bank without a correction": (
        lambda f: None,
        ["--correction_bank_images", "0"],
        ["--correction_bank_images", "without"],
    ),
    "a bank beside the queries": (
        lambda f: None,
        ["--correction", "csls", "--transductive", "--correction_bank", "dev"],
        ["--correction_bank", "--transductive"],
    ),
    "nothing to tune": (
        lambda f: None,
        ["--correction", "csls", "--correction_k", "3", "--tune_correction"],
        ["--tune_correction", "csls"],
    ),
    "tuning on what is evaluated": (
        lambda f: None,
        ["--correction", "csls", "--split", "dev", "--tune_correction"],
        ["--tune_correction", "dev"],
    ),
    "a report that is a file": (lambda f: None, ["--report", MODEL], ["--report", MODEL]),
    "a report of no name": (lambda f: None, ["--report", ""], ["--report: it is empty"]),
    "photos that are nowhere": (
        lambda f: None,
        ["--report", "page", "--images", "photos"],
        ["--images 'photos'"],
    ),
    "a k without a correction": (
        lambda f: None,
        ["--correction_k", "3"],
        ["--correction_k", "--correction:"],
    ),
    "a correction with k 0": (
        lambda f: None,
        ["--correction", "csls", "--correction_k", "0"],
        ["--correction_k"],
    ),
    "a temperature of 0": (
        lambda f: None,
        ["--correction", "sinkhorn", "--correction_temperature", "0"],
        ["--correction_temperature"],
    ),
    "the evaluated split as bank": (
        lambda f: None,
        ["--correction", "csls", "--split", "train"],
        ["--correction_bank is train", "--transductive"],
    ),
    "val as bank of dev": (
        lambda f: None,
        ["--correction", "csls", "--split", "val", "--correction_bank", "dev"],
        ["--correction_bank is dev", "--transductive"],
    ),
    "dev as bank and to choose on": (
        lambda f: None,
        ["--correction", "csls", "--tune_correction", "--correction_bank", "dev"],
        ["--tune_correction"],
    ),
    "a report of folds": (
        lambda f: None,
        ["--report", "page", "--fold5", "--split", "testall"],
        ["--report", "--fold5"],
    ),
    "photos without a report": (lambda f: None, ["--images", "data"], ["--images", "--report"]),
    "a bank that is not there": (
        lambda f: (f / "data/tiny_precomp/train_caps.txt").unlink(),
        ["--correction", "nnn"],
        ["train_caps.txt"],
    ),
    "photos of features that name none": (
        lambda f: None,
        ["--report", "page", "--images", "data", "--save_csv", "x"],
        ["test_ids.txt", "--images"],
    ),
    "broken photos among features": (
        lambda f: None,
        ["--skip_broken_images"],
        ["--skip_broken_images", "tiny_precomp"],
    ),
    "no dev to choose on": (
        lambda f: (f / "data/tiny_precomp/dev_ims.npy").unlink(),
        ["--correction", "csls", "--tune_correction"],
        ["dev_ims.npy"],
    ),
    "an unknown flag": (lambda f: None, ["--potato"], ["--potato"]),
    "a shortened flag": (lambda f: None, ["--fold"], ["--fold"]),
    "a batch_size of 0 in the options": (
        lambda f: change_checkpoint(f, opt=changed(f, batch_size=0)),
        [],
        [MODEL],
    ),
    "an unknown measure in the options": (
        lambda f: change_checkpoint(f, opt=changed(f, measure="potato")),
        [],
        [MODEL],
    ),
    "an unknown cnn_type in the options": (
        lambda f: change_checkpoint(f, opt=changed(f, data_name="f8k", cnn_type="alexnet")),
        [],
        ["alexnet"],
    ),
}


def changed(folder, **changes):
    opt = load(folder / MODEL)["opt"]
    vars(opt).update(changes)
    return opt


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(evaluated, capsys, kind):
    prepare, flags, named = BAD[kind]
    prepare(evaluated)
    before = tree(evaluated)
    with pytest.raises(InputError) as caught:
        compute_results.main(flags)
    message = str(caught.value)
    assert all(name in message for name in named) and "\n" not in message
    assert (
        tree(evaluated) == before and not capsys.readouterr().out
    )  # said before anything is computed


@pytest.mark.parametrize(
    "flags",
    [
        ["--save_json", "data"],
        ["--save_csv", "data"],
        ["--save_csv", "nowhere/out.csv"],
        ["--report", "/proc/page"],
        ["--save_json", "data/f8k/images/0.png/x"],
    ],
    ids=" ".join,
)
def test_a_file_that_cannot_be_written_is_named_and_the_others_stay(evaluated, flags):
    before = tree(evaluated)
    with pytest.raises(InputError, match=flags[1]):
        compute_results.main(flags)
    after = tree(evaluated)
    after.pop("ranks.pth.tar", None)  # nobody's flag asked for it
    assert after == before


@pytest.mark.parametrize("kind", ["checkpoint with code", "features with nan"])
def test_bad_input_ends_with_2_and_one_line(evaluated, kind):
    prepare, flags, named = BAD[kind]
    prepare(evaluated)
    before = tree(evaluated)
    result = run_script("compute_results.py", *flags, cwd=evaluated)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and all(name in result.stderr for name in named)
    assert tree(evaluated) == before


@pytest.mark.parametrize(
    "redirection, last_line",
    [(">/dev/full", "No space left"), ("2>/dev/full", None), ("1>&-", "closed")],
)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_figures_that_cannot_be_printed_are_written_all_the_same(evaluated, redirection, last_line):
    found = in_shell(
        f"{ROOT / 'compute_results.py'} --hubness --save_json out.json {redirection}", evaluated
    )
    assert found.returncode == 2 and found.stdout.count("Hubness") == (not last_line)
    assert (
        re.search(f"error: standard output.*{last_line}", found.stderr.splitlines()[-1])
        if last_line
        else (not found.stderr)
    )
    assert (
        "hubness" in json.loads((evaluated / "out.json").read_text())
        and "Traceback" not in found.stderr
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_is_refused_where_there_is_none(evaluated):
    with pytest.raises(InputError, match="--device cuda"):
        compute_results.main(["--device", "cuda"])


def test_a_checkpoint_of_another_machine_s_paths_names_them(evaluated):
    change_checkpoint(evaluated, opt=changed(evaluated, data_path="/somebody/data"))
    with pytest.raises(InputError, match="/somebody/data.*--data_path"):
        compute_results.main([])


def test_the_script_s_folder_needs_not_be_current(evaluated):
    assert ROOT != evaluated
    assert run_script("compute_results.py", "--device", "cpu", cwd=evaluated).returncode == 0


def test_a_checkpoint_cannot_choose_where_the_cache_is_written(evaluated):
    path = "runs/runX/model_best.pth.tar"
    content = load(path)
    content["opt"].cache_dir = "elsewhere"
    torch.save(content, path)
    compute_results.main([])
    assert not os.path.exists("elsewhere") and os.listdir("data/.cache")


def test_a_reader_who_leaves_costs_no_file_that_was_asked_for(evaluated):
    flags = "--device cpu --hubness --save_json f.json --save_csv f.csv --save_ranks f.npz --report report"
    found = in_shell(
        f"{ROOT / 'compute_results.py'} {flags} | true", evaluated, PYTHONUNBUFFERED="1"
    )
    assert "Traceback" not in found.stderr
    assert all(
        (evaluated / name).stat().st_size
        for name in ("f.json", "f.csv", "f.npz", "report/report.html")
    )
    assert found.returncode == 2 and "all else was done" in found.stderr.splitlines()[-1]
