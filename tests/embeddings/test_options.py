"""compute_results.py with files of embeddings and similarities: as a checkpoint, and bad input."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import compute_results
import train
from embeddings.options import labels_of
from retrieval import eccv
from runtime import errors
from runtime.errors import InputError
from tests.helpers import loops
from tests.helpers.made import RELEASED, TINY, run_script  # noqa: F401 (the fixture `released` reads it)

CPU = ["--device", "cpu"]
SAVED = "runX_img_and_cap_embeddings.npz"


def json_of(flags):
    compute_results.main([*CPU, *flags, "--save_json", "out.json"])
    with open("out.json") as file:
        return json.load(file)


def figures(content):
    """What does not depend on how the model was given."""
    names = ("i2t", "t2i", "ar", "ari", "rsum", "images", "captions", "folds", "hubness")
    kept = {name: content[name] for name in names if name in content}
    return kept | {"corrections": content.get("corrections")}


# As the checkpoint ------------------------------------------------------------------------------


@pytest.mark.parametrize("fold5", [[], ["--fold5"]], ids=["whole", "folds"])
@pytest.mark.parametrize("run", ["local", "max", "mb"])
def test_saved_embeddings_have_the_checkpoint_s_figures_to_the_digit(released, run, fold5):
    path = f"runs/{run}/model_best.pth.tar"
    model = ["--model_path", path, "--data_path", "data", "--vocab_path", "vocab"]
    flags = ["--hubness", *fold5]
    expected = json_of([*model, *flags, "--save_embeddings"])
    saved = f"{run}_img_and_cap_embeddings.npz"
    assert figures(json_of(["--embeddings", saved, *flags])) == figures(expected)
    both = [f"{saved}:img_embs", f"{saved}:cap_embs"]
    assert figures(json_of(["--embeddings", *both, *flags])) == figures(expected)


def test_uneven_captions_have_the_checkpoint_s_figures_to_the_digit(evaluated):
    """30 captions of six images, which come in another order and unevenly; each has its row."""
    names = [f"photo {place}" for place in np.repeat(np.arange(6), [1, 9, 4, 2, 8, 6])]
    order = np.random.default_rng(0).permutation(30).tolist()
    features = np.load("data/tiny_precomp/test_ims.npy")
    rows = [int(names[place].split()[1]) for place in order]
    np.save("data/tiny_precomp/test_ims.npy", features[rows])
    with open("data/tiny_precomp/test_ids.txt", "w") as file:
        file.write("".join(f"{names[place]}\n" for place in order))
    expected = json_of(["--save_embeddings", "--hubness"])
    assert expected["images"] == 6
    assert figures(json_of(["--embeddings", SAVED, "--hubness"])) == figures(expected)
    ids = ["--ids", "data/tiny_precomp/test_ids.txt"]
    assert figures(json_of(["--embeddings", SAVED, "--hubness", *ids])) == figures(expected)


@pytest.mark.parametrize(
    "flags, measure",
    [(["--measure", "order", "--max_violation", "--use_abs"], "order"), (["--no_imgnorm"], "dot")],
    ids=["order", "lengths that count"],
)
def test_models_without_cosines_have_the_checkpoint_s_figures(workdir, flags, measure):
    train.main([*TINY, "--num_epochs", "1", *flags])
    expected = json_of(["--save_embeddings", "--hubness"])
    found = json_of(["--embeddings", SAVED, "--measure", measure, "--hubness"])
    assert figures(found) == figures(expected)


def save_splits(*splits):
    """The checkpoint's embeddings of each split, in <split>.npz."""
    for split in splits:
        compute_results.main([*CPU, "--split", split, "--save_embeddings"])
        os.rename(SAVED, f"{split}.npz")


def test_corrections_are_the_checkpoint_s_to_the_digit(evaluated, capsys):
    save_splits("test", "train", "dev")
    flags = ["--correction", "all", "--tune_correction", "--hubness"]
    expected = json_of(flags)
    capsys.readouterr()
    found = json_of(["--embeddings", "test.npz", "--bank", "train.npz", "--dev", "dev.npz", *flags])
    assert figures(found) == figures(expected) and found["corrections"]
    assert found["correction_bank"].startswith("bank: --bank train.npz, 12 images, 60 captions")
    assert found["embeddings"] == ["test.npz"] and found["model_path"] is None


def test_similarities_with_a_bank_s_have_the_corrections_of_the_embeddings(evaluated):
    save_splits("test", "train")
    own, bank = (np.load(f"{split}.npz") for split in ("test", "train"))
    images, bank_images = own["img_embs"][::5], bank["img_embs"][::5]
    np.save("s.npy", {"npts": len(images), "sims": images @ own["cap_embs"].T})
    np.save("i2t.npy", bank_images @ own["cap_embs"].T)
    np.save("t2i.npy", images @ bank["cap_embs"].T)
    flags = ["--correction", "all", "--hubness"]
    expected = json_of(["--embeddings", "test.npz", "--bank", "train.npz", *flags])
    found = json_of(["--sims", "s.npy", "--bank_sims", "i2t.npy", "t2i.npy", *flags])
    for one in (found, expected):
        for own in one["corrections"].values():
            del own["hubness"]  # first items of nearly equal scores may change places
    del found["hubness"], expected["hubness"]
    assert figures(found) == figures(expected)


def test_ranks_and_tables_are_written_as_for_a_checkpoint(evaluated):
    save_splits("test")
    compute_results.main([*CPU, "--save_ranks", "a.npz"])
    compute_results.main(
        [*CPU, "--embeddings", "test.npz", "--save_ranks", "b.npz", "--save_csv", "b.csv"]
    )
    one, other = np.load("a.npz"), np.load("b.npz")
    assert sorted(one.files) == sorted(other.files)
    assert all(np.array_equal(one[name], other[name]) for name in one.files)
    with open("b.csv") as file:
        (line,) = file.read().splitlines()
    assert line.startswith("test.npz, ") and len(line.split(", ")) == 12


# Made embeddings --------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with embeddings of 20 images and 100 captions: i.npy, c.npy, d.npy."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((20, 8)).astype(np.float32)
    np.save("i.npy", images)
    for name, noise in (("c", 1.0), ("d", 2.0)):
        captions = images.repeat(5, 0) + noise * rng.standard_normal((100, 8))
        np.save(f"{name}.npy", captions.astype(np.float32))
    return tmp_path


PAIR = ["--embeddings", "i.npy", "c.npy"]


def unit(name):
    rows = np.load(name).astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_ties_are_an_interval_in_print_and_json(here, capsys):
    scores = np.round(unit("i.npy") @ unit("c.npy").T, 1)
    np.save("s.npy", scores)
    content = json_of(["--sims", "s.npy", "--report", "page"])
    own = [caption // 5 for caption in range(100)]
    low, high = (
        [loops.recall(ranks) for ranks in loops.ranks_of_groups(scores, own, ties_win)]
        for ties_win in (False, True)
    )
    printed = capsys.readouterr().out
    assert low[0][0] < high[0][0]
    assert f"Image to text: R@1 {low[0][0]:.1f} to {high[0][0]:.1f}, R@5" in printed
    assert f"Text to image: R@1 {low[1][0]:.1f} to {high[1][0]:.1f}, R@5" in printed
    rsums = (content["ties"]["counted_for_the_model"]["rsum"], content["rsum"])
    page = (here / "page/report.html").read_text()
    assert "rsum is {:.1f} instead of {:.1f}".format(*rsums) in page
    found = content["ties"]["counted_for_the_model"]["t2i"]
    assert [found[name] for name in ("r1", "r5", "r10")] == pytest.approx(high[1][:3])


def test_without_ties_there_is_no_interval(here, capsys):
    compute_results.main([*CPU, *PAIR, "--report", "page"])
    assert "Ties" not in capsys.readouterr().out + (here / "page/report.html").read_text()


def test_models_are_compared_in_print_json_csv_and_report(here, capsys):
    flags = [*PAIR, "--against", "i.npy", "d.npy", "--save_csv", "x.csv", "--report", "page"]
    content = json_of(flags)
    printed = capsys.readouterr().out
    alone = [json_of(["--embeddings", "i.npy", f"{name}.npy"]) for name in "cd"]
    models = content["compared"]["models"]
    assert [models[name]["rsum"] for name in ("c.npy", "d.npy")] == [one["rsum"] for one in alone]
    estimate, low, high = content["compared"]["differences"]["c.npy - d.npy"]["rsum"]
    assert estimate == pytest.approx(alone[0]["rsum"] - alone[1]["rsum"]) and low < estimate < high
    assert f"c.npy - d.npy: rsum {estimate:+.1f} ({low:+.1f} to {high:+.1f}), i2t R@1" in printed
    with open("x.csv") as file:
        assert [line.split(", ")[0] for line in file] == ["i.npy c.npy", "i.npy d.npy"]
    with open("page/report.html") as file:
        page = file.read()
    assert "Compared models" in page and f"{low:+.1f} to {high:+.1f}" in page
    section = page.partition("Compared models")[2].partition("<h2>Hubness")[0]
    rows = re.findall(r'<th scope="row">(?:<[^>]+>)*([^<]+)', section)
    assert [row.strip() for row in rows] == ["c.npy", "d.npy", "c.npy - d.npy"]
    assert f"<td>{models['d.npy']['rsum']:.1f}<small>" in section


def test_similarities_are_compared(here):
    for name in "cd":
        np.save(f"{name}s.npy", unit("i.npy") @ unit(f"{name}.npy").T)
    found = json_of(["--sims", "cs.npy", "--against", "ds.npy"])["compared"]["differences"]
    expected = json_of([*PAIR, "--against", "i.npy", "d.npy"])["compared"]["differences"]
    assert found["cs.npy - ds.npy"]["rsum"] == pytest.approx(expected["c.npy - d.npy"]["rsum"])


@pytest.mark.parametrize(
    "named, labels",
    [
        ([["i", "c"]], ["i c"]),
        ([["i", "c"], ["i", "d"]], ["c", "d"]),
        ([["r/a/i", "r/a/c"], ["r/b/i", "r/b/c"]], ["a/i a/c", "b/i b/c"]),
        ([["a b"], ["a c"]], ["a b", "a c"]),
        ([["i", "c"], ["c", "i"]], ["i c", "c i"]),
    ],
)
def test_labels_are_short_and_differ(named, labels):
    assert labels_of(named) == labels


def test_the_report_shows_texts_and_photos(here):
    (here / "photos").mkdir()
    for number in range(20):
        Image.new("RGB", (8, 8)).save(here / f"photos/photo{number}.jpg")
    (here / "ids").write_text("".join(f"photo{caption // 5}\n" for caption in range(100)))
    (here / "texts").write_text("".join(f"what is in {caption}\n" for caption in range(100)))
    flags = ["--ids", "ids", "--captions", "texts", "--report", "page", "--images", "photos"]
    compute_results.main([*CPU, *PAIR, *flags])
    page = (here / "page/report.html").read_text()
    assert "what is in 3" in page and "data:image/jpeg" in page
    assert "<dt>Images</dt><dd>i.npy</dd>" in re.sub(r"\s*\n\s*", "", page)


def test_the_report_without_texts_numbers_captions(here):
    compute_results.main([*CPU, *PAIR, "--report", "page"])
    assert "caption 3" in (here / "page/report.html").read_text()


def test_photos_need_ids(here):
    (here / "photos").mkdir()
    with pytest.raises(InputError, match="--ids is not there: --images needs it, with the file"):
        compute_results.main([*CPU, *PAIR, "--report", "page", "--images", "photos"])


def test_eccv_takes_ids_of_coco(here, monkeypatch):
    """The figures are the package's; here, that it is asked with COCO's ids, in their order."""
    gts = {"i2t": {7 * n + 3: [100 * n + place for place in range(5)] for n in range(20)}}
    gts["t2i"] = {caption: [image] for image, own in gts["i2t"].items() for caption in own}
    asked = {}

    class Package:
        coco_gts = gts
        coco_ids = np.array(list(gts["t2i"]))

        def compute_all_metrics(self, i2t, t2i, target_metrics, Ks):
            asked.setdefault("i2t", i2t)
            names = {
                "cxc_recalls": "cxc",
                "coco_5k_recalls": "coco_5k",
                "coco_1k_recalls": "coco_1k",
            }
            found = {}
            for name in target_metrics:
                keys = [f"{names[name]}_r{k}" for k in Ks] if name in names else [name]
                found |= {key: {"i2t": 0.5, "t2i": 0.5} for key in keys}
            return found

    monkeypatch.setattr(eccv, "load_package", Package)
    (here / "ids").write_text("".join(f"{7 * (c // 5) + 3}\n" for c in range(100)))
    content = json_of([*PAIR, "--ids", "ids", "--eccv"])
    assert content["eccv"]["eccv_r1"] == {"i2t": 50.0, "t2i": 50.0}
    scores = unit("i.npy") @ unit("c.npy").T
    expected = [100 * (c // 5) + c % 5 for c in np.argsort(-scores[4])[:50].tolist()]
    assert asked["i2t"][31] == expected


# Bad input --------------------------------------------------------------------------------------


def save(name, rows):
    np.save(name, np.asarray(rows, np.float32))


BAD = {
    "three files": (["--embeddings", "a", "b", "c"], "--embeddings has 3 files: give one or two"),
    "both kinds": ([*PAIR, "--sims", "s.npy"], "--embeddings and --sims are two things"),
    "a checkpoint, too": (
        [*PAIR, "--model_path", "m"],
        "--model_path does nothing with --embeddings",
    ),
    "a split": ([*PAIR, "--split", "dev"], "--split does nothing with --embeddings"),
    "a data set": ([*PAIR, "--data_name", "f8k"], "--data_name does nothing with --embeddings"),
    "saved again": ([*PAIR, "--save_embeddings"], "--save_embeddings does nothing with"),
    "a rerank": ([*PAIR, "--rerank", "3"], "--rerank does nothing with --embeddings"),
    "ids of a checkpoint": (["--ids", "x"], "--ids does nothing without --embeddings or --sims"),
    "a measure of similarities": (
        ["--sims", "s.npy", "--measure", "dot"],
        "--measure does nothing with --sims",
    ),
    "a bank of similarities": (
        ["--sims", "s.npy", "--correction", "nnn", "--bank", "i.npy", "c.npy"],
        "--bank does nothing with --sims",
    ),
    "a bank without a correction": ([*PAIR, "--bank", "x", "y"], "--bank does nothing without --c"),
    "ids without a bank": ([*PAIR, "--bank_ids", "x"], "--bank_ids does nothing without --bank"),
    "a dev split untuned": ([*PAIR, "--dev", "x", "y"], "--dev does nothing without --tune_corr"),
    "a correction without a bank": (
        [*PAIR, "--correction", "nnn"],
        "--correction needs a bank of other queries: give --bank IMAGES CAPTIONS, or say --trans",
    ),
    "similarities without a bank": (
        ["--sims", "s.npy", "--correction", "nnn"],
        "--correction needs a bank of other queries: give --bank_sims I2T T2I, or say --trans",
    ),
    "tuning without dev": (
        [*PAIR, "--correction", "nnn", "--bank", "i.npy", "d.npy", "--tune_correction"],
        "--tune_correction chooses on a dev split: give --dev IMAGES CAPTIONS",
    ),
    "tuning similarities": (
        ["--sims", "s.npy", "--correction", "nnn", "--transductive", "--tune_correction"],
        "--tune_correction needs similarities of a dev split",
    ),
    "the evaluated files as the bank": (
        [*PAIR, "--correction", "nnn", "--bank", "i.npy", "c.npy"],
        "--bank names the files of --embeddings, so it would be judged by what it has seen",
    ),
    "texts without a report": ([*PAIR, "--captions", "x"], "--captions does nothing without --rep"),
    "a model twice": (
        [*PAIR, "--against", "i.npy", "c.npy"],
        "--against i.npy c.npy is named twice: name each model once",
    ),
    "too many files of another model": (
        ["--sims", "s.npy", "--against", "a", "b"],
        "--against has 2 files, and a model of --sims has one",
    ),
    "counts": (
        ["--embeddings", "i.npy", "odd.npy"],
        "--embeddings i.npy has 20 rows for the 33 of --embeddings odd.npy",
    ),
    "another model of other captions": (
        [*PAIR, "--against", "i.npy", "i.npy"],
        "--against i.npy i.npy has 20 images and 20 captions, which do not belong together as the",
    ),
    "an empty line in ids": ([*PAIR, "--ids", "gap"], "ids file gap, line 2 is blank"),
    "ids that are not there": ([*PAIR, "--ids", "none"], "ids file none cannot be read"),
    "texts of another number": (
        [*PAIR, "--captions", "two", "--report", "r"],
        "--captions two has 2 lines for 100 captions",
    ),
    "NaN": (["--embeddings", "nan.npy", "c.npy"], "--embeddings nan.npy has NaN, .* in row 3 "),
    "folds of uneven captions": (
        ["--embeddings", "i.npy", "i.npy", "--fold5"],
        "--fold5 needs 5 captions for each image",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(here, capsys, case):
    flags, sentence = BAD[case]
    np.save("s.npy", unit("i.npy") @ unit("c.npy").T)
    rows = np.load("i.npy")
    rows[3, 2] = np.nan
    save("nan.npy", rows)
    save("odd.npy", np.load("c.npy")[:33])
    (here / "gap").write_text("a\n\nb\n")
    (here / "two").write_text("a\nb\n")
    before = sorted(os.listdir())
    code = errors._exit_code(lambda: compute_results.main([*CPU, *flags]))
    said = capsys.readouterr().err.splitlines()
    assert code == 2
    assert re.search(f"error: .*{sentence}", said[-1]), said
    assert [line for line in said if line.startswith("error")] == said[-1:]
    assert sorted(os.listdir()) == before


def test_the_script_ends_with_2_and_runs_no_planted_code(here):
    class Planted:
        def __reduce__(self):
            return os.system, ("touch planted",)

    torch.save(Planted(), "x.pt")
    done = run_script("compute_results.py", "--embeddings", "x.pt", "c.npy", cwd=here)
    assert done.returncode == 2 and not (here / "planted").exists()
    assert done.stderr.splitlines() == [
        "error: --embeddings x.pt is refused: it asks to load posix.system, which could run code"
    ]
