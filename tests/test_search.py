"""Photos or features in, answers out: galleries built, changed, broken; questions in words and by photo."""

import argparse
import fcntl
import functools
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, captions_of, load, run_script, write_image

import build_gallery
import data
import extract_features
import features
import gallery
import photo_blocks
import search
import train
from errors import InputError
from evaluation import embed, load_for_evaluation

MODEL = "runs/runX/model_best.pth.tar"
VSE_RUN, SCAN_RUN = "vse", "t2i"
TEST = ["--precomp", "data/tiny_precomp", "--index", "g", "--device", "cpu"]
PHOTOS = ["--images", "photos", "--index", "g", "--device", "cpu", "--workers", "0", "--batch_size", "3"]
ODD = os.fsdecode(b"odd \xff'\".png")
QUESTION = "a red dog in the snow"


def results(capsys):
    """The answers that were printed with --json."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def ask(*flags):
    search.main([*flags])


def files_of(folder):
    """{name: content} of a gallery's arrays."""
    found = Path(folder) / gallery.describe(str(folder))["files"]
    return {path.name: path.read_bytes() for path in found.iterdir()}


# Features, against loops --------------------------------------------------------------------------

@pytest.fixture
def loaded(evaluated):
    """The trained checkpoint."""
    return load_for_evaluation(argparse.Namespace(model_path=MODEL, device="cpu"))


def loop_shift(method, image, bank):
    """What a correction takes off the scores of one image embedding, bank: caption embeddings."""
    scores = sorted((float(np.dot(image, caption)) for caption in bank), reverse=True)
    if method == "nnn":
        return 0.6 * sum(scores[:4]) / 4
    if method == "csls":
        return sum(scores[:4]) / 4 / 2
    if method == "inverted_softmax":
        return 0.1 * math.log(sum(math.exp(score / 0.1) for score in scores) / len(scores))
    return 0.0


CORRECTIONS = {"none": [], "nnn": ["--correction_k", "4", "--correction_alpha", "0.6"],
               "csls": ["--correction_k", "4"], "inverted_softmax": ["--correction_temperature", "0.1"]}


@pytest.mark.parametrize("method", CORRECTIONS)
def test_answers_are_those_of_a_loop_corrected_and_plain(evaluated, loaded, capsys, method):
    images, captions = (part.double().numpy() for part in embed(loaded.model, loaded.loader("test")))
    bank = embed(loaded.model, loaded.loader("train"))[1].double().numpy()
    texts = loaded.loader("test").dataset.captions
    Path("questions.txt").write_text("".join(f"{text}\n" for text in texts))
    ask(*TEST, "--correction", method, *CORRECTIONS[method], "--batch", "questions.txt", "--json", "--top", "6")
    shifts = [loop_shift(method, image, bank) for image in images]
    check_answers(results(capsys), texts, captions, images, shifts)
    ask("--index", "g", "--batch", "questions.txt", "--json", "--top", "6", "--correction", "none")
    check_answers(results(capsys), texts, captions, images, [0.0] * len(images))


def check_answers(answers, texts, captions, images, shifts):
    """That answers have all images, in the order of their scores, which are those of a loop."""
    assert [answer["query"] for answer in answers] == texts
    for answer, caption in zip(answers, captions):
        expected = {str(number): float(np.dot(image, caption)) - shift
                    for number, (image, shift) in enumerate(zip(images, shifts))}
        scores = [hit["score"] for hit in answer["results"]]
        assert scores == sorted(scores, reverse=True)
        assert {hit["item"]: hit["score"] for hit in answer["results"]} == pytest.approx(expected, abs=1e-5)


def test_the_default_correction_is_the_best_on_dev(evaluated, loaded, capsys):
    ask(*TEST)
    said = gallery.describe("g")["correction"]
    images, captions = (part.double().numpy() for part in embed(loaded.model, loaded.loader("dev")))
    bank = embed(loaded.model, loaded.loader("train"))[1]
    def recalls(shift):
        scores = captions @ images.T - shift
        ranks = [(row >= row[number // 5] - 1e-9).sum() - 1 for number, row in enumerate(scores)]
        return sum(np.mean([rank < k for rank in ranks]) for k in (1, 5, 10))
    shift_of = {"none": lambda _: 0, **build_gallery.gallery_hubs.corrections.METHODS}
    scores = {}
    for method, parameters in [("none", {}), *build_gallery.gallery_hubs.corrections.candidates(
            ("nnn", "csls", "inverted_softmax"), {})]:
        similarities = torch.from_numpy(images).float() @ bank.T
        shift = torch.as_tensor(shift_of[method](similarities, **parameters)).numpy()
        scores[json.dumps([method, parameters])] = recalls(shift)
    assert scores[json.dumps([said["method"], said["parameters"]])] == pytest.approx(max(scores.values()))
    assert "the best on dev" in capsys.readouterr().err


def test_without_data_to_choose_by_hubs_are_not_corrected(evaluated, capsys):
    shutil.move("data/tiny_precomp", "features")
    ask("--precomp", "features", "--index", "g", "--device", "cpu")
    assert "Hubs are not corrected" in capsys.readouterr().err
    assert gallery.Gallery("g").correction == "none"


def test_a_gallery_without_captions_is_built_of_features_and_ids_alone(evaluated, loaded, capsys):
    rows = np.random.default_rng(1).standard_normal((7, 8)).astype(np.float32)
    Path("own").mkdir()
    np.save("own/gallery_ims.npy", rows)
    Path("own/gallery_ids.txt").write_text("".join(f"photo {number}.jpg\n" for number in range(7)))
    ask("--precomp", "own", "--split", "gallery", "--index", "g", "--json", "--correction", "none", QUESTION)
    found = gallery.Gallery("g")
    assert list(found.items) == [f"photo {number}.jpg" for number in range(7)]
    assert found.n_captions == 0 and found.captions(3) == [] and found.photo(3) is None
    assert torch.allclose(found.embeddings[:, :-1], loaded.model.embed_images(torch.from_numpy(rows)), atol=1e-6)
    assert len(results(capsys)[0]["results"]) == 7
    assert found.description["hubs"] is None


def test_ids_without_an_ending_name_their_photos(evaluated):
    Path("own").mkdir()
    np.save("own/gallery_ims.npy", np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32))
    Path("own/gallery_ids.txt").write_text("1000\n2000\n")
    write_image(Path("photos/1000.jpg"), 1)
    ask("--precomp", "own", "--split", "gallery", "--images", "photos", "--index", "g", "--correction", "none")
    found = gallery.Gallery("g")
    assert [found.photo(number) for number in (0, 1)] == [os.path.realpath("photos/1000.jpg"), None]


def test_any_number_of_captions_an_image(evaluated, capsys):
    ids = [0, 0, 1, 2, 2, 2]
    Path("own_precomp").mkdir()
    np.save("own_precomp/test_ims.npy", np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32))
    Path("own_precomp/test_ids.txt").write_text("".join(f"{number}.jpg\n" for number in ids))
    Path("own_precomp/test_caps.txt").write_text("".join(f"A dog, caption {n}\n" for n in range(6)))
    ask("--precomp", "own_precomp", "--index", "g", "--correction", "none", QUESTION)
    found = gallery.Gallery("g")
    assert list(found.items) == ["0.jpg", "1.jpg", "2.jpg"]
    assert [len(found.captions(number)) for number in range(3)] == [2, 1, 3]
    assert [found.photo_of(caption) for caption in range(6)] == ids
    assert found.captions(1) == ["A dog, caption 2"]


def test_a_dev_split_that_is_cut_keeps_its_photos_names(evaluated, monkeypatch, capsys):
    monkeypatch.setattr(data, "DEV_CAPTIONS", 10)
    Path("own_precomp").mkdir()
    np.save("own_precomp/dev_ims.npy", np.random.default_rng(1).standard_normal((12, 8)).astype(np.float32))
    Path("own_precomp/dev_ids.txt").write_text("".join(f"{number}.jpg\n" for number in range(12)))
    Path("own_precomp/dev_caps.txt").write_text("".join(f"A dog, caption {n}\n" for n in range(60)))
    ask("--precomp", "own_precomp", "--split", "dev", "--index", "g", "--correction", "none", QUESTION)
    assert list(gallery.Gallery("g").items) == ["0.jpg", "1.jpg"]
    assert "dev's first 10 captions are taken, as everywhere: 2 photos" in capsys.readouterr().err


def searcher_of(*flags):
    return search.open_searcher(search.parse_args([*flags]))


def test_more_like_one_and_the_hubs_are_those_of_loops(evaluated, loaded):
    found = searcher_of(*TEST, "--correction", "nnn")
    images, captions = (part.double().numpy() for part in embed(loaded.model, loaded.loader("test")))
    for number in (0, 5):
        hits = found.like(number, 3)
        others = sorted(set(range(6)) - {number}, key=lambda other: -np.dot(images[other], images[number]))
        assert [hit.number for hit in hits] == others[:3]
        assert [hit.item for hit in hits] == [str(other) for other in others[:3]]
    counts = dict.fromkeys(range(6), 0)
    for caption in captions:  # of six photos all are among the ten best
        for number in sorted(counts, key=lambda number: -np.dot(images[number], caption))[:10]:
            counts[number] += 1
    assert dict(found.hubs(6)) == counts
    assert found.hubs(2) == [(0, 30), (1, 30)]


def test_corrected_or_not_is_the_caller_s_choice(evaluated):
    found = searcher_of(*TEST, "--correction", "nnn")
    plain, corrected = (found.by_words([QUESTION], 6, corrected=flag)[0] for flag in (False, True))
    shift = -gallery.Gallery("g").embeddings[:, -1]
    assert (shift != 0).all()
    by_number = {hit.number: hit.score for hit in plain}
    for hit in corrected:
        assert hit.score == pytest.approx(by_number[hit.number] - float(shift[hit.number]), abs=1e-5)


@pytest.mark.parametrize("kind", ["ivf_sq8", "opq_ivf_pq64"])
def test_another_type_of_index_gives_nearly_the_same(evaluated, capsys, kind):
    rng = np.random.default_rng(2)
    np.save("data/tiny_precomp/many_ims.npy", rng.standard_normal((600, 8)).astype(np.float32))
    flags = ["--precomp", "data/tiny_precomp", "--split", "many", "--index", "g"]
    ask(*flags, "--json", "--correction", "csls", QUESTION)
    exact = results(capsys)[0]["results"]
    ask("--index", "g", "--index_type", kind, "--json", "--recall_check", QUESTION)
    recall, line = capsys.readouterr().out.splitlines()
    assert gallery.describe("g")["index"] == kind and gallery.Gallery("g").correction == "csls"
    found = json.loads(line)["results"]
    assert {hit["item"] for hit in found} == {hit["item"] for hit in exact}
    assert recall.startswith(f"recall@10 of the {kind} index: 0.9") or ": 1.0000" in recall
    ask("--index", "g", "--rebuild_index", "--json", QUESTION)
    assert gallery.describe("g")["index"] == kind
    assert results(capsys)[-1]["results"][0]["item"] == exact[0]["item"]


def test_another_correction_needs_rebuilding(evaluated):
    ask(*TEST, "--correction", "nnn")
    with pytest.raises(InputError, match="--rebuild_index"):
        ask("--index", "g", "--correction", "csls", QUESTION)
    before = files_of("g")
    ask("--index", "g", "--correction", "csls", "--rebuild_index", QUESTION)
    after = gallery.Gallery("g")
    assert after.correction == "csls"
    width = after.width + 1
    old = np.frombuffer(before["embeddings.npy"][-4 * 6 * width:], np.float32).reshape(6, width)
    assert np.array_equal(old[:, :-1], after.embeddings[:, :-1]) and not np.allclose(old[:, -1],
                                                                                     after.embeddings[:, -1])


def test_another_parameter_of_the_correction_is_not_passed_over(evaluated, capsys):
    own = ["--correction", "nnn", "--correction_k", "4", "--correction_alpha", "0.6"]
    ask(*TEST, *own)
    capsys.readouterr()
    ask(*TEST, *own, QUESTION)
    assert "g is there, and is asked as it is" in capsys.readouterr().err
    with pytest.raises(InputError, match="nnn .*: add --rebuild_index"):
        ask("--index", "g", "--correction_temperature", "0.5", QUESTION)
    for others in (["--correction_k", "5"], ["--correction_bank", "dev"], ["--correction_bank_images", "1"],
                   ["--tune_correction"]):
        with pytest.raises(InputError, match="nnn --correction_k 4 --correction_alpha 0.6 .*: add --rebuild_index"):
            ask("--index", "g", "--correction", "nnn", *others, QUESTION)
    with pytest.raises(InputError, match="keeps the gallery's correction nnn, and --correction_k .* --correction, too"):
        ask("--index", "g", "--rebuild_index", "--correction_k", "5", QUESTION)


def test_the_command_that_built_and_tuned_asks_again(evaluated, capsys):
    tuned = [*TEST, "--correction", "csls", "--tune_correction", QUESTION, "--json"]
    ask(*tuned)
    before = gallery.describe("g")
    ask(*tuned)
    first, again = results(capsys)
    assert first == again and gallery.describe("g") == before


def test_gallery_features_and_model_can_move_together(evaluated):
    ask(*TEST, "--correction", "none")
    os.makedirs("moved")
    for name in ("g", "data", "runs"):
        shutil.move(name, f"moved/{name}")
    ask("--precomp", "moved/data/tiny_precomp", "--index", "moved/g", "--model_path", f"moved/{MODEL}", QUESTION)
    with pytest.raises(InputError, match="tiny_precomp, test, not of .*tiny_precomp, dev"):
        ask("--precomp", "moved/data/tiny_precomp", "--split", "dev", "--index", "moved/g", "--model_path",
            f"moved/{MODEL}", QUESTION)


def test_text_and_json_say_the_same(evaluated, capsys):
    ask(*TEST, "--correction", "none", "--json", "--top", "2", QUESTION)
    answer, = results(capsys)
    ask("--index", "g", "--top", "2", QUESTION)
    assert capsys.readouterr().out.splitlines() == [QUESTION, *(
        f"  {hit['score']:.3f}  {hit['item']}" for hit in answer["results"])]


def test_the_first_command_s_model_finds_the_sample_s_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--word_dim", "6", "--embed_size", "8", "--num_epochs", "1", "--device", "cpu"]
    train.main(flags)
    ask("a red star in the snow")
    lines = capsys.readouterr().out.splitlines()
    found = gallery.Gallery("runs/runX/gallery")
    assert len(lines[-10:]) == 10 and found.count == 200 and lines[-11] == "a red star in the snow"
    assert found.photo(0) == os.path.realpath(f"data/sample_precomp/images/{found.items[0]}")
    ask("--image", found.photo(7), "--json", "--top", "1")  # the checkpoint knows what saw the pictures
    answer, = results(capsys)
    assert answer["results"][0]["item"] == found.items[7]
    assert answer["results"][0]["score"] == pytest.approx(1, abs=1e-4)
    train.main([*flags, "--seed", "5", "--learning_rate", "0.01"])
    ask("a red star in the snow")  # the gallery of the older model is built again
    assert gallery.describe("runs/runX/gallery")["model"]["sha256"] == build_gallery.hash_file(MODEL)


@pytest.mark.parametrize("k, top, method", [(5, 3, "none"), (20, 20, "none"), (2, 4, "none"), (6, 6, "csls")])
def test_scan_orders_what_vse_finds(three_models, tmp_path, monkeypatch, capsys, k, top, method):
    shutil.copytree(three_models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    vse, scan = (load_for_evaluation(argparse.Namespace(model_path=f"runs/{name}/model_best.pth.tar", device="cpu"))
                 for name in (VSE_RUN, SCAN_RUN))
    texts = vse.loader("test").dataset.captions[:7]
    Path("questions.txt").write_text("".join(f"{text}\n" for text in texts))
    ask("--model_path", vse.path, "--precomp", "data/vectors_precomp", "--index", "g", "--correction", method,
        "--batch", "questions.txt", "--json", "--top", str(top), "--rerank_model", scan.path, "--rerank", str(k),
        "--rerank_precomp", "data/regions_precomp")
    answers = results(capsys)
    images, captions = vse.embed(vse.loader("test"))
    shift = -gallery.Gallery("g").embeddings[:, -1]
    slow = scan.similarities(*scan.embed(scan.loader("test")))
    for number, answer in enumerate(answers):
        nearest = (images @ captions[number] - shift).argsort(descending=True)[:max(k, top)].tolist()
        scores = {str(image): float(slow.pairs(torch.tensor([image]), torch.tensor([number]))) for image in nearest}
        best = sorted(scores.values(), reverse=True)[:top]
        assert [hit["score"] for hit in answer["results"]] == pytest.approx(best, abs=1e-5)
        assert all(scores[hit["item"]] == pytest.approx(hit["score"], abs=1e-5) for hit in answer["results"])


def test_a_scan_model_without_words_takes_its_vocabulary_from_a_folder(three_models, tmp_path, monkeypatch, capsys):
    shutil.copytree(three_models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path, answers = f"runs/{SCAN_RUN}/model_best.pth.tar", []
    flags = ["--model_path", f"runs/{VSE_RUN}/model_best.pth.tar", "--precomp", "data/vectors_precomp", "--index", "g",
             "--correction", "none", "--json", "--rerank_model", path, "--rerank_precomp", "data/regions_precomp",
             QUESTION]
    ask(*flags)
    answers.append(results(capsys))
    content = load(path)
    assert content.pop("vocabulary")
    torch.save(content, path)
    os.rename("vocab", "words")
    with pytest.raises(InputError, match="carries no vocabulary.* by --rerank_vocab_path"):
        ask(*flags)
    ask(*flags, "--rerank_vocab_path", "words")
    answers.append(results(capsys))
    assert answers[0] == answers[1]


def test_regions_of_other_photos_are_told_of(three_models, tmp_path, monkeypatch, capsys):
    shutil.copytree(three_models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    count = len(np.load("data/vectors_precomp/test_ims.npy"))
    Path("data/vectors_precomp/test_ids.txt").write_text("".join(f"{number}.jpg\n" for number in range(count)))
    said = []
    for first in ("0", "7"):  # with any ending
        Path("data/regions_precomp/test_ids.txt").write_text("".join(
            f"x/{name}.png\n" for name in [first, *range(1, count)] for _ in range(5)))
        ask("--model_path", f"runs/{VSE_RUN}/model_best.pth.tar", "--precomp", "data/vectors_precomp", "--index", "g",
            "--correction", "none", "--rerank_model", f"runs/{SCAN_RUN}/model_best.pth.tar", "--rerank_precomp",
            "data/regions_precomp", QUESTION)
        said.append(capsys.readouterr().err)
    assert "same photo" not in said[0] and "has x/7.png where the gallery has 0.jpg" in said[1]


@pytest.mark.parametrize("flags, words", [
    (["--rerank_model", "VSE"], ["not SCAN"]), (["--rerank_model", "SCAN"], ["over regions"]),
    (["--rerank", "5"], ["--rerank", "--rerank_model"]),
    (["--rerank_vocab_path", "vocab"], ["--rerank_vocab_path", "--rerank_model"]),
    (["--rerank_model", "SCAN", "--rerank_precomp", "nowhere"], ["nowhere"])])
def test_what_cannot_be_reranked_is_said(three_models, tmp_path, monkeypatch, flags, words):
    shutil.copytree(three_models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path = {"VSE": f"runs/{VSE_RUN}/model_best.pth.tar", "SCAN": f"runs/{SCAN_RUN}/model_best.pth.tar"}
    with pytest.raises(InputError) as error:
        ask("--model_path", path["VSE"], "--precomp", "data/vectors_precomp", "--index", "g", "--correction", "none",
            *(path.get(flag, flag) for flag in flags), QUESTION)
    assert all(word in str(error.value) for word in words), str(error.value)


# Photos -------------------------------------------------------------------------------------------

encoder_once = functools.cache(features.build_encoder)


@pytest.fixture(scope="module")
def photo_run(tmp_path_factory):
    """A folder with twelve captioned photos and a model of them; not to be changed."""
    folder = tmp_path_factory.mktemp("photo_run")
    here = os.getcwd()
    os.chdir(folder)
    try:
        rows = ["image,caption,split"]
        for number in range(12):
            write_image(folder / "photos" / "deep" / f"{number}.png", number)
            rows += [f"deep/{number}.png,\"{caption}\",{('train', 'dev', 'test')[number // 4]}"
                     for caption in captions_of(number)]
        (folder / "captions.csv").write_text("".join(f"{row}\n" for row in rows))
        extract_features.main(["--images", "photos", "--captions", "captions.csv", "--output", "data/mine_precomp",
                               "--encoder", "shufflenet_v2_x0_5", "--encoder_weights", "none", "--workers", "0"])
        train.main([*TINY, "--data_name", "mine_precomp", "--num_epochs", "1"])
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def photos(tmp_path, monkeypatch, photo_run):
    """A current folder with a copy of it; small blocks, and encoders built once."""
    shutil.copytree(photo_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "build_encoder", encoder_once)
    monkeypatch.setattr(photo_blocks, "BLOCK_PHOTOS", 4)
    return tmp_path


def test_photos_are_seen_as_the_features_of_training_were(photos, capsys):
    ask(*PHOTOS, "--captions", "captions.csv", "--json", QUESTION)
    found = gallery.Gallery("g")
    assert list(found.items) == sorted(f"deep/{number}.png" for number in range(12))
    loaded = load_for_evaluation(argparse.Namespace(model_path=MODEL, device="cpu"))
    for split, first in {"train": 0, "dev": 4, "test": 8}.items():
        rows = loaded.model.embed_images(torch.from_numpy(np.load(f"data/mine_precomp/{split}_ims.npy")))
        for number, row in enumerate(rows, start=first):
            place = found.items.index(f"deep/{number}.png")
            assert torch.allclose(found.embeddings[place, :-1], row, atol=1e-4)
            assert found.captions(place) == captions_of(number)
            assert found.photo(place) == os.path.realpath(f"photos/deep/{number}.png")
    assert len(results(capsys)[0]["results"]) == 10


def test_a_photo_finds_what_its_embedding_finds(photos, capsys):
    ask(*PHOTOS, "--captions", "captions.csv", "--image", "photos/deep/5.png", "--json", "--top", "12")
    answer, = results(capsys)
    assert answer["query"] == "photos/deep/5.png"
    found = gallery.Gallery("g")
    query = found.embeddings[found.items.index("deep/5.png"), :-1]
    alike = {item: float(row[:-1] @ query) for item, row in zip(found.items, found.embeddings)}
    assert {hit["item"]: hit["score"] for hit in answer["results"]} == pytest.approx(alike, abs=1e-4)
    scores = [float(row @ query) for row in found.caption_embeddings]
    best = sorted(scores, reverse=True)[:12]
    assert [hit["score"] for hit in answer["captions"]] == pytest.approx(best, abs=1e-4)
    for hit in answer["captions"]:
        assert hit["caption"] in found.captions(found.items.index(hit["item"]))


def test_captions_lie_beside_the_photos_for_some_of_them(photos):
    Path("photos/deep/3.txt").write_text("A red bird\n<script>alert(1)</script> dog\n")
    ask(*PHOTOS, QUESTION)
    found = gallery.Gallery("g")
    assert [found.captions(number) for number, item in enumerate(found.items) if item != "deep/3.png"] == [[]] * 11
    assert found.captions(found.items.index("deep/3.png")) == ["A red bird", "<script>alert(1)</script> dog"]


def test_broken_photos_odd_names_and_links(photos, capsys):
    Path("photos/torn.png").write_bytes(Path("photos/deep/1.png").read_bytes()[:60])
    Path("photos/text.jpg").write_text("no photo")
    write_image(Path("secret/outside.png"), 3)
    os.symlink(os.path.abspath("secret/outside.png"), "photos/outside.png")
    os.symlink("deep/2.png", "photos/inside.png")
    write_image(Path("photos") / ODD, 1)
    write_image(Path("photos/line\nbreak.png"), 1)
    ask(*PHOTOS, "--top", "20", QUESTION)
    found = gallery.Gallery("g")
    assert set(found.items) == {ODD, "inside.png", *(f"deep/{number}.png" for number in range(12))}
    printed = capsys.readouterr()
    assert "odd \\udcff'\".png" in printed.out
    assert "4 of 18 photos are left out: g/broken.txt" in printed.err
    listed = Path("g/broken.txt").read_text()
    assert [line.split("\t")[0] for line in listed.splitlines()] == ["line\\nbreak.png", "outside.png", "text.jpg",
                                                                     "torn.png"]
    assert "leads outside" in listed


def test_what_is_added_is_encoded_and_nothing_else(photos, monkeypatch, capsys):
    ask(*PHOTOS, "--captions", "captions.csv", "--correction", "nnn")
    encoded, encode = [], photo_blocks.encode
    monkeypatch.setattr(photo_blocks, "encode", lambda encoder, pictures, amp: (
        encoded.append(len(pictures)), encode(encoder, pictures, amp))[1])
    more = Path("photos/more")
    for number in (20, 21):
        write_image(more / f"{number}.png", number)
    (more / "20.txt").write_text("Two dogs\n")
    write_image(Path("photos/deep/3.png"), 33)  # changed
    before = gallery.Gallery("g")
    change = ["--index", "g", "--workers", "0", "--add"]
    ask(*change, "photos/more")
    assert sum(encoded) == 2
    ask(*change, "photos")
    assert sum(encoded) == 3
    ask(*change, "photos")
    assert sum(encoded) == 3
    after = gallery.Gallery("g")
    items = set(before.items) | {"more/20.png", "more/21.png"}
    assert set(after.items) == items and after.count == len(items) == 14
    assert after.captions(after.items.index("more/20.png")) == ["Two dogs"]
    for number, item in enumerate(before.items):
        place = after.items.index(item)
        same = torch.equal(before.embeddings[number], after.embeddings[place])
        assert same == (item != "deep/3.png")
        assert after.captions(place) == before.captions(number)
    shutil.rmtree("g")
    ask(*PHOTOS, "--captions", "captions.csv", "--correction", "nnn")
    fresh = gallery.Gallery("g")
    for number, item in enumerate(fresh.items):  # corrections, too, are those of a gallery built at once
        assert torch.allclose(fresh.embeddings[number], after.embeddings[after.items.index(item)], atol=1e-5)


def test_captions_that_come_later_are_taken_for_the_photos_they_name(photos, capsys):
    ask(*PHOTOS, "--captions", "captions.csv")
    before = gallery.Gallery("g")
    Path("later.csv").write_text("image,caption\ndeep/3.png,A red bird\ndeep/5.png,Two dogs\nnowhere.png,A cat\n")
    write_image(Path("photos/more/1.png"), 20)
    write_image(Path("photos/deep/5.png"), 33)
    capsys.readouterr()
    ask("--index", "g", "--workers", "0", "--add", "photos", "--captions", "later.csv")
    said = capsys.readouterr().err
    assert "1 photos of later.csv are not in" in said and "13 photos, before 12; 3 were encoded" in said
    after = gallery.Gallery("g")
    own = {item: after.captions(number) for number, item in enumerate(after.items)}
    assert own == {item: before.captions(number) for number, item in enumerate(before.items)} | {
        "deep/3.png": ["A red bird"], "deep/5.png": ["Two dogs"], "more/1.png": []}
    ask("--index", "g", "--workers", "0", "--add", "photos/more", "--captions", "later.csv")
    assert "1 photos of later.csv" in (said := capsys.readouterr().err) and "nothing to change" in said


def test_what_could_not_be_read_stays_listed_beside_what_is_added(photos, capsys):
    for name in ("torn.png", "gone.png"):
        Path(f"photos/{name}").write_text("no photo")
    ask(*PHOTOS)
    os.unlink("photos/gone.png")
    for folder, broken in (("more", []), ("worse", ["worse/torn.png"])):
        write_image(Path(f"photos/{folder}/1.png"), 20)
        for name in broken:
            Path(f"photos/{name}").write_text("no photo")
        ask("--index", "g", "--workers", "0", "--add", f"photos/{folder}")
        listed = Path("g/broken.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in listed] == ["torn.png", *broken]
    before = gallery.describe("g")
    os.unlink("photos/worse/torn.png")
    ask("--index", "g", "--workers", "0", "--prune", "--add", "photos/worse")
    assert gallery.describe("g") == before and "nothing to change, 14 photos" in capsys.readouterr().err


def test_what_vanished_is_said_and_pruned(photos, capsys):
    ask(*PHOTOS)
    os.unlink("photos/deep/4.png")
    found = gallery.Gallery("g")
    place = found.items.index("deep/4.png")
    assert [found.photo(number) is None for number in range(12)] == [number == place for number in range(12)]
    capsys.readouterr()
    ask("--index", "g", "--top", "12", QUESTION)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 12
    assert [line.endswith("deep/4.png  (missing)") for line in lines if "missing" in line] == [True]
    ask("--index", "g", "--prune", "--workers", "0")
    after = gallery.Gallery("g")
    assert list(after.items) == [item for item in found.items if item != "deep/4.png"]
    kept = [number for number in range(12) if number != place]
    assert torch.equal(after.embeddings, found.embeddings[kept])


@pytest.mark.parametrize("stop_at", [0, 1, 3, 4])
def test_a_killed_build_is_no_gallery_and_goes_on(photos, monkeypatch, stop_at):
    ask(*PHOTOS, "--correction", "nnn")
    whole = files_of("g")
    shutil.rmtree("g")
    batches, encode = [], photo_blocks.encode

    def counted(encoder, pictures, amp):
        if len(batches) == stop_at:
            raise KeyboardInterrupt
        batches.append(len(pictures))
        return encode(encoder, pictures, amp)
    monkeypatch.setattr(photo_blocks, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        ask(*PHOTOS, "--correction", "nnn")
    with pytest.raises(InputError, match="no whole gallery in g"):
        ask("--index", "g", QUESTION)
    done, stop_at = sum(batches), -1
    batches.clear()
    ask(*PHOTOS, "--correction", "nnn")
    assert sum(batches) == 12 - done // 4 * 4  # blocks of four photos
    assert files_of("g") == whole
    assert {path.name for path in Path("g").iterdir()} == {".lock", "gallery.json", gallery.describe("g")["files"]}


def test_killed_before_the_last_step_it_is_no_gallery(photos, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gallery, "replacing", functools.partial(killed_at, "gallery.json", gallery.replacing))
        with pytest.raises(KeyboardInterrupt):
            ask(*PHOTOS)
    assert not gallery.is_whole("g")
    ask(*PHOTOS)
    assert len(list(Path("g").glob("gallery-files-*"))) == 1


def killed_at(name, replacing, path, *arguments, **options):
    if path.endswith(name):
        raise KeyboardInterrupt
    return replacing(path, *arguments, **options)


def test_a_photo_model_sees_photos_itself(workdir, capsys):
    train.main(["--word_dim", "6", "--embed_size", "8", "--batch_size", "8", "--num_epochs", "1", "--vocab_path",
                "vocab", "--cnn_type", "resnet18", "--cnn_weights", "none", "--crop_size", "32", "--device", "cpu",
                "--workers", "0", "--data_name", "f8k"])
    capsys.readouterr()
    flags = ["--images", "data/f8k/images", "--index", "g", "--device", "cpu", "--workers", "0", "--json"]
    ask(*flags, "--correction", "none", "--image", "data/f8k/images/7.png")
    answer = results(capsys)[-1]
    assert answer["results"][0]["item"] == "7.png"
    loaded = load_for_evaluation(argparse.Namespace(model_path=MODEL, device="cpu"))
    loaded.model.val_start()
    found = gallery.Gallery("g")
    dataset = loaded.loader("test").dataset
    opaque = [number for number in range(5) if (6 + number) % 4 in (0, 1)]  # as_seen shows the others otherwise
    for number in opaque:
        row = loaded.model.embed_images(dataset.image(number)[None])[0]
        place = found.items.index(os.path.basename(dataset.image_files[number]))
        assert torch.allclose(row, found.embeddings[place, :-1], atol=1e-4)


# What goes wrong ----------------------------------------------------------------------------------

def edit(**changes):
    """A function that changes what gallery.json says."""
    def change():
        path = Path("g/gallery.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return change


def cut(name):
    """A function that cuts a file of the gallery short."""
    def change():
        path = Path("g") / gallery.describe("g")["files"] / name
        path.write_bytes(path.read_bytes()[:-5])
    return change


def other_model():
    content = Path(MODEL).read_bytes()
    Path(MODEL).write_bytes(content)
    state = torch.load(MODEL, weights_only=False)
    state["epoch"] += 1
    torch.save(state, MODEL)


BAD_GALLERIES = {
    "of another model": (other_model, ["another model", "--index"]),
    "from a newer version": (edit(format=99), ["newer", "99"]),
    "without a count": (edit(count="many"), ["'count'", "build"]),
    "of other files": (edit(files="../elsewhere"), ["outside"]),
    "of an unknown index": (edit(index="hnsw"), ["hnsw", "build"]),
    "of an unknown correction": (edit(correction={"method": "magic", "parameters": {}, "bank_split": "train",
                                                   "bank_images": None}), ["magic", "build"]),
    "of a correction in short": (edit(correction={"method": "nnn"}), ["'parameters'", "build"]),
    "cut description": (lambda: Path("g/gallery.json").write_text("{\"format\": 1"), ["gallery.json", "JSON"]),
    "cut embeddings": (cut("embeddings.npy"), ["embeddings.npy", "build"]),
    "cut names": (cut("items.bin"), ["items.bin", "build"]),
    "cut captions": (cut("captions.npy"), ["captions.npy", "build"]),
    "of other sizes": (edit(count=5), ["embeddings.npy", "build"]),
    "without its description": (lambda: os.unlink("g/gallery.json"), ["no whole gallery", "--images"]),
}


@pytest.mark.parametrize("case", BAD_GALLERIES)
def test_a_bad_gallery_is_said(evaluated, case):
    damage, words = BAD_GALLERIES[case]
    ask(*TEST, "--correction", "none")
    damage()
    with pytest.raises(InputError) as error:
        ask("--index", "g", "--model_path", MODEL, QUESTION)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("question, words", [
    ("", ["empty"]), (" \t", ["empty"]), ("dog " * 10_000, ["10000", "1000"]), ("dog " + "(" * 1000, ["1001 words"]),
    ("x" * 30_000, ["30000"]),
    ("zyxwv qqq", ["zyxwv qqq", "known"]), ("!?. ,", ["known"]), ("\x1b[2J \udcff", ["known"])])
def test_a_question_that_has_no_answer_is_said(evaluated, capsys, question, words):
    found = searcher_of(*TEST, "--correction", "none")
    for act in (lambda: found.check(question), lambda: found.by_words([QUESTION, question], 3)):
        with pytest.raises(InputError) as error:
            act()
        assert all(word in str(error.value) for word in words), str(error.value)
        assert "\x1b" not in str(error.value)


def test_a_batch_with_a_bad_line_answers_nothing(evaluated, capsys):
    Path("questions.txt").write_text(f"{QUESTION}\nzyxwv\n")
    with pytest.raises(InputError, match="questions.txt, line 2: none of"):
        ask(*TEST, "--correction", "none", "--batch", "questions.txt")
    assert capsys.readouterr().out == ""


BAD_FLAGS = {
    "no questions": ([*TEST, "--batch", "nowhere.txt"], ["--batch nowhere.txt", "not there"]),
    "no gallery": ([QUESTION], ["no whole gallery", "--images"]),
    "a gallery to change that is not there": (["--add", "photos"], ["no whole gallery", "build"]),
    "no folder": (["--images", "nowhere"], ["--images", "nowhere"]),
    "a folder without photos": (["--images", "vocab"], ["no photo", "vocab"]),
    "no features": (["--precomp", "nowhere"], ["nowhere"]),
    "no such split": (["--precomp", "data/mine_precomp", "--split", "other"], ["other_ims.npy"]),
    "a split of no features": (["--images", "photos", "--split", "dev"], ["--split", "--precomp"]),
    "captions of nothing": (["--captions", "captions.csv", QUESTION], ["--captions", "--images"]),
    "a port without a page": (["--port", "0", QUESTION], ["--port", "--serve"]),
    "a parameter of another correction": (["--correction", "csls", "--correction_alpha", "1"], ["--correction_alpha"]),
    "a bank of no correction": (["--correction", "none", "--correction_bank_images", "0"], ["correction_bank_images"]),
    "dev as bank and to choose by": (["--correction_bank", "dev"], ["--correction_bank", "dev"]),
    "another encoder": (["--images", "photos", "--encoder", "squeezenet1_1", "--encoder_weights", "none"],
                        ["squeezenet1_1", "shufflenet_v2_x0_5"]),
    "an encoder's pooling alone": (["--images", "photos", "--pooling", "grid"], ["--pooling", "--encoder"]),
    "a folder of other files": (["--images", "photos", "--index", "data"], ["--index data", "other files"]),
    "a gallery in a file": (["--images", "photos", "--index", "captions.csv/g"], ["--index"]),
    "too few photos for a quantizer": (["--images", "photos", "--index_type", "ivf_sq8"], ["ivf_sq8", "256"]),
    "an order of what is found by words, for a photo": (["--image", "x.png", "--rerank_model", MODEL],
                                                        ["--rerank_model", "--image"]),
    "no checkpoint": (["--model_path", "nowhere.tar", QUESTION], ["nowhere.tar"]),
    "a question twice": (["--batch", "captions.csv", QUESTION], ["--batch"]),
    "too many hits": (["--top", "0", QUESTION], ["--top"]),
    "captions of other photos": (["--images", "photos", "--captions", "nowhere.csv"], ["nowhere.csv"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_said_and_leave_nothing(photos, case):
    flags, words = BAD_FLAGS[case]
    before = {path for path in Path(".").rglob("*") if ".cache" not in path.parts}
    with pytest.raises(InputError) as error:
        ask("--workers", "0", *flags)
    assert all(word in str(error.value) for word in words), str(error.value)
    left = {path for path in Path(".").rglob("*") if ".cache" not in path.parts} - before
    assert not [path for path in left if path.is_file() and path.name != ".lock"], left


def test_a_gallery_of_other_photos_is_not_taken_for_these(photos):
    ask(*PHOTOS)
    shutil.copytree("photos", "other")
    with pytest.raises(InputError, match="other: name another --index"):
        ask("--images", "other", "--index", "g", QUESTION)
    with pytest.raises(InputError, match="--add other does not lie in"):
        ask("--index", "g", "--add", "other")


def test_two_builders_in_one_folder(photos):
    os.makedirs("g")
    with open("g/.lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing there"):
            ask(*PHOTOS)
    ask(*PHOTOS)
    before = files_of("g")
    with open("g/.lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing there"):
            ask("--index", "g", "--prune")
        ask("--index", "g", QUESTION)  # reading is for all
    assert files_of("g") == before


def test_features_of_another_encoder_are_refused(photos):
    path = Path("data/mine_precomp/features.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "encoder": "resnet18"}))
    with pytest.raises(InputError, match="resnet18"):
        ask("--precomp", "data/mine_precomp", "--index", "g", "--correction", "none")
    assert not Path("g").exists()


def test_without_a_known_encoder_photos_are_refused_until_it_is_named(evaluated):
    ask(*TEST, "--correction", "none")
    write_image(Path("query.png"), 1)
    with pytest.raises(InputError, match="--encoder"):
        ask("--index", "g", "--image", "query.png")
    with pytest.raises(InputError, match="width 1024.*trained on 8"):
        ask("--index", "g", "--image", "query.png", "--encoder", "shufflenet_v2_x0_5", "--encoder_weights", "none")


@pytest.mark.parametrize("content", [b"", b"no photo", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_query_that_is_no_photo_is_said(photos, content):
    ask(*PHOTOS, "--correction", "none")
    Path("query.png").write_bytes(content)
    with pytest.raises(InputError, match="query.png cannot be read"):
        ask("--index", "g", "--image", "query.png")


def test_a_model_of_order_similarities_and_scan_are_refused(evaluated):
    state = torch.load(MODEL, weights_only=False)
    for changes, words in (({"measure": "order"}, "--measure order"), ({"cross_attn": "t2i"}, "SCAN")):
        for name, value in changes.items():
            setattr(state["opt"], name, value)
        with pytest.raises(InputError, match=words):
            build_gallery.refuse_unsearchable(argparse.Namespace(opt=state["opt"], path="x"))


def test_a_full_disk_is_said_and_leaves_no_gallery(evaluated, small_disk):
    disk = small_disk(1)
    with pytest.raises(InputError, match="free some space|could not be written|cannot be written"):
        ask("--precomp", "data/tiny_precomp", "--index", str(disk / "g"), "--correction", "none")
    assert not gallery.is_whole(str(disk / "g"))


def test_as_a_script_it_answers_and_says_what_is_wrong(evaluated):
    run = run_script("search.py", *TEST, "--correction", "none", QUESTION, cwd=evaluated)
    assert run.returncode == 0 and run.stdout.startswith(f"{QUESTION}\n  ")
    run = run_script("search.py", "--index", "g", "zyxwv", cwd=evaluated)
    assert run.returncode == 2 and run.stderr.startswith("error: none of the question's words") and not run.stdout


def test_serve_is_given_what_the_flags_say(evaluated, monkeypatch):
    import serve
    served = []
    monkeypatch.setattr(serve, "serve", lambda *arguments: served.append(arguments))
    ask(*TEST, "--correction", "none", "--serve")
    ask("--index", "g", "--serve", "--host", "0.0.0.0", "--port", "0", "--allow_host", "a.example", "b.example")
    (found, *first), (_, *second) = served
    assert isinstance(found, search.Searcher) and found.gallery.count == 6
    assert first == ["127.0.0.1", 8000, ()] and second == ["0.0.0.0", 0, ["a.example", "b.example"]]
