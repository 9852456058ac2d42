"""Galleries built from features and from photos, changed, and killed while being built."""

import argparse
import fcntl
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from evaluation import load_for_evaluation
from features import blocks, encoders
from gallery import build as build_gallery
from gallery import store
from runtime.errors import InputError
from runtime.files import replacing
from tests.helpers.galleries import MODEL, ODD, PHOTOS, QUESTION, TEST, ask, files_of, results
from tests.helpers.made import RAW, captions_of, write_image


def test_a_gallery_without_captions_is_built_of_features_and_ids_alone(evaluated, loaded, capsys):
    rows = np.random.default_rng(1).standard_normal((7, 8)).astype(np.float32)
    Path("own").mkdir()
    np.save("own/gallery_ims.npy", rows)
    Path("own/gallery_ids.txt").write_text("".join(f"photo {number}.jpg\n" for number in range(7)))
    ask(
        "--precomp",
        "own",
        "--split",
        "gallery",
        "--index",
        "g",
        "--json",
        "--correction",
        "none",
        QUESTION,
    )
    found = store.Gallery("g")
    assert list(found.items) == [f"photo {number}.jpg" for number in range(7)]
    assert found.n_captions == 0 and found.captions(3) == [] and found.photo(3) is None
    assert torch.allclose(
        found.embeddings[:, :-1], loaded.model.embed_images(torch.from_numpy(rows)), atol=1e-6
    )
    assert len(results(capsys)[0]["results"]) == 7
    assert found.description["hubs"] is None


@pytest.mark.parametrize(
    "value, words", [(0, "embeddings of .* that are zero"), (1e38, "weights beyond")]
)
@pytest.mark.parametrize("captions", [True, False])
def test_a_gallery_of_a_model_that_gives_nothing_is_not_built(evaluated, captions, value, words):
    content = torch.load(MODEL, weights_only=False)
    for weight in content["model"][0].values():
        weight.fill_(value)
    torch.save(content, MODEL)
    if not captions:
        os.unlink("data/tiny_precomp/test_caps.txt")
    with pytest.raises(InputError, match=words):
        ask("--model_path", MODEL, *TEST, "--correction", "none", QUESTION)
    assert not store.is_whole("g")


def test_ids_without_an_ending_name_their_photos(evaluated):
    Path("own").mkdir()
    np.save(
        "own/gallery_ims.npy", np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)
    )
    Path("own/gallery_ids.txt").write_text("1000\n2000\n")
    write_image(Path("photos/1000.jpg"), 1)
    ask(
        "--precomp",
        "own",
        "--split",
        "gallery",
        "--images",
        "photos",
        "--index",
        "g",
        "--correction",
        "none",
    )
    found = store.Gallery("g")
    assert [found.photo(number) for number in (0, 1)] == [os.path.realpath("photos/1000.jpg"), None]


def test_any_number_of_captions_an_image(evaluated, capsys):
    ids = [0, 0, 1, 2, 2, 2]
    Path("own_precomp").mkdir()
    np.save(
        "own_precomp/test_ims.npy",
        np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32),
    )
    Path("own_precomp/test_ids.txt").write_text("".join(f"{number}.jpg\n" for number in ids))
    Path("own_precomp/test_caps.txt").write_text("".join(f"A dog, caption {n}\n" for n in range(6)))
    ask("--precomp", "own_precomp", "--index", "g", "--correction", "none", QUESTION)
    found = store.Gallery("g")
    assert list(found.items) == ["0.jpg", "1.jpg", "2.jpg"]
    assert [len(found.captions(number)) for number in range(3)] == [2, 1, 3]
    assert [found.photo_of(caption) for caption in range(6)] == ids
    assert found.captions(1) == ["A dog, caption 2"]


def test_a_name_that_comes_back_is_one_photo(evaluated, loaded, capsys):
    rows = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    ids = [0, 1, 2, 0, 2, 2]
    Path("own_precomp").mkdir()
    np.save("own_precomp/test_ims.npy", rows[ids])
    np.save("own_precomp/gallery_ims.npy", rows[ids])
    Path("own_precomp/test_caps.txt").write_text("".join(f"A dog, caption {n}\n" for n in range(6)))
    for split, captions in (("test", [[0, 3], [1], [2, 4, 5]]), ("gallery", [[]] * 3)):
        Path(f"own_precomp/{split}_ids.txt").write_text(
            "".join(f"{number}.jpg\n" for number in ids)
        )
        ask(
            "--precomp",
            "own_precomp",
            "--split",
            split,
            "--index",
            split,
            "--correction",
            "none",
            QUESTION,
        )
        found = store.Gallery(split)
        assert (
            list(found.items) == ["0.jpg", "1.jpg", "2.jpg"]
            and found.description["precomp"] is None
        )
        assert [found.captions(number) for number in range(3)] == [
            [f"A dog, caption {n}" for n in own] for own in captions
        ]
        assert torch.allclose(
            found.embeddings[:, :-1], loaded.model.embed_images(torch.from_numpy(rows)), atol=1e-6
        )
    assert "gallery_ids.txt names 3 photos for 6 rows" in capsys.readouterr().err


def test_a_dev_split_that_is_cut_keeps_its_photos_names(evaluated, monkeypatch, capsys):
    monkeypatch.setattr(data, "DEV_CAPTIONS", 10)
    Path("own_precomp").mkdir()
    np.save(
        "own_precomp/dev_ims.npy",
        np.random.default_rng(1).standard_normal((12, 8)).astype(np.float32),
    )
    Path("own_precomp/dev_ids.txt").write_text("".join(f"{number}.jpg\n" for number in range(12)))
    Path("own_precomp/dev_caps.txt").write_text("".join(f"A dog, caption {n}\n" for n in range(60)))
    ask(
        "--precomp",
        "own_precomp",
        "--split",
        "dev",
        "--index",
        "g",
        "--correction",
        "none",
        QUESTION,
    )
    assert list(store.Gallery("g").items) == ["0.jpg", "1.jpg"]
    assert "dev's first 10 captions are taken, as everywhere: 2 photos" in capsys.readouterr().err


def test_photos_are_seen_as_the_features_of_training_were(photos, capsys):
    ask(*PHOTOS, "--captions", "captions.csv", "--json", QUESTION)
    found = store.Gallery("g")
    assert list(found.items) == sorted(f"deep/{number}.png" for number in range(12))
    loaded = load_for_evaluation(argparse.Namespace(model_path=MODEL, device="cpu"))
    for split, first in {"train": 0, "dev": 4, "test": 8}.items():
        rows = loaded.model.embed_images(
            torch.from_numpy(np.load(f"data/mine_precomp/{split}_ims.npy"))
        )
        for number, row in enumerate(rows, start=first):
            place = found.items.index(f"deep/{number}.png")
            assert torch.allclose(found.embeddings[place, :-1], row, atol=1e-4)
            assert found.captions(place) == captions_of(number)
            assert found.photo(place) == os.path.realpath(f"photos/deep/{number}.png")
    assert len(results(capsys)[0]["results"]) == 10


def test_captions_lie_beside_the_photos_for_some_of_them(photos):
    Path("photos/deep/3.txt").write_text("A red bird\n<script>alert(1)</script> dog\n")
    ask(*PHOTOS, QUESTION)
    found = store.Gallery("g")
    assert [
        found.captions(number) for number, item in enumerate(found.items) if item != "deep/3.png"
    ] == [[]] * 11
    assert found.captions(found.items.index("deep/3.png")) == [
        "A red bird",
        "<script>alert(1)</script> dog",
    ]


def test_broken_photos_odd_names_and_links(photos, capsys):
    Path("photos/torn.png").write_bytes(Path("photos/deep/1.png").read_bytes()[:60])
    Path("photos/text.jpg").write_text("no photo")
    write_image(Path("secret/outside.png"), 3)
    os.symlink(os.path.abspath("secret/outside.png"), "photos/outside.png")
    os.symlink("deep/2.png", "photos/inside.png")
    write_image(Path("photos") / ODD, 1)
    write_image(Path("photos/line\nbreak.png"), 1)
    ask(*PHOTOS, "--top", "20", QUESTION)
    found = store.Gallery("g")
    assert set(found.items) == {ODD, "inside.png", *(f"deep/{number}.png" for number in range(12))}
    printed = capsys.readouterr()
    assert "odd \\udcff'\".png" in printed.out
    assert "4 of 18 photos are left out: g/broken.txt" in printed.err
    listed = Path("g/broken.txt").read_text()
    assert [line.split("\t")[0] for line in listed.splitlines()] == [
        "line\\nbreak.png",
        "outside.png",
        "text.jpg",
        "torn.png",
    ]
    assert "leads outside" in listed


def test_what_is_added_is_encoded_and_nothing_else(photos, monkeypatch, capsys):
    ask(*PHOTOS, "--captions", "captions.csv", "--correction", "nnn")
    encoded, encode = [], encoders.encode
    monkeypatch.setattr(
        blocks,
        "encode",
        lambda encoder, pictures, amp: (
            encoded.append(len(pictures)),
            encode(encoder, pictures, amp),
        )[1],
    )
    more = Path("photos/more")
    for number in (20, 21):
        write_image(more / f"{number}.png", number)
    (more / "20.txt").write_text("Two dogs\n")
    write_image(Path("photos/deep/3.png"), 33)  # changed
    before = store.Gallery("g")
    change = ["--index", "g", "--workers", "0", "--add"]
    ask(*change, "photos/more")
    assert sum(encoded) == 2
    ask(*change, "photos")
    assert sum(encoded) == 3
    ask(*change, "photos")
    assert sum(encoded) == 3
    after = store.Gallery("g")
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
    fresh = store.Gallery("g")
    for number, item in enumerate(
        fresh.items
    ):  # corrections, too, are those of a gallery built at once
        assert torch.allclose(
            fresh.embeddings[number], after.embeddings[after.items.index(item)], atol=1e-5
        )


def test_names_in_a_table_are_found_below_the_photos_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        write_image(tmp_path / "photos" / f"{number}.png", number)
    Path("c.csv").write_text(f"filepath,title\nphotos/0.png,Zero\n{tmp_path}/photos/1.png,One\n")
    names = [f"{number}.png" for number in range(4)]
    found = build_gallery.photos_of("photos", names, "c.csv")
    assert [photo.captions for photo in found] == [["Zero"], ["One"], [], []]
    assert (
        "note: 2 photos in photos are not named in c.csv, such as 2.png" in capsys.readouterr().err
    )


def test_captions_that_come_later_are_taken_for_the_photos_they_name(photos, capsys):
    ask(*PHOTOS, "--captions", "captions.csv")
    before = store.Gallery("g")
    Path("later.csv").write_text(
        "image,caption\ndeep/3.png,A red bird\ndeep/5.png,Two dogs\nnowhere.png,A cat\n"
    )
    write_image(Path("photos/more/1.png"), 20)
    write_image(Path("photos/deep/5.png"), 33)
    capsys.readouterr()
    ask("--index", "g", "--workers", "0", "--add", "photos", "--captions", "later.csv")
    said = capsys.readouterr().err
    assert (
        "1 photos of later.csv are not in" in said
        and "13 photos, before 12; 3 were encoded" in said
    )
    after = store.Gallery("g")
    own = {item: after.captions(number) for number, item in enumerate(after.items)}
    assert own == {item: before.captions(number) for number, item in enumerate(before.items)} | {
        "deep/3.png": ["A red bird"],
        "deep/5.png": ["Two dogs"],
        "more/1.png": [],
    }
    ask("--index", "g", "--workers", "0", "--add", "photos/more", "--captions", "later.csv")
    assert (
        "1 photos of later.csv" in (said := capsys.readouterr().err) and "nothing to change" in said
    )


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
    before = store.describe("g")
    os.unlink("photos/worse/torn.png")
    ask("--index", "g", "--workers", "0", "--prune", "--add", "photos/worse")
    assert (
        store.describe("g") == before and "nothing to change, 14 photos" in capsys.readouterr().err
    )


def test_what_vanished_is_said_and_pruned(photos, capsys):
    ask(*PHOTOS)
    os.unlink("photos/deep/4.png")
    found = store.Gallery("g")
    place = found.items.index("deep/4.png")
    assert [found.photo(number) is None for number in range(12)] == [
        number == place for number in range(12)
    ]
    capsys.readouterr()
    ask("--index", "g", "--top", "12", QUESTION)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 12
    assert [line.endswith("deep/4.png  (missing)") for line in lines if "missing" in line] == [True]
    ask("--index", "g", "--prune", "--workers", "0")
    after = store.Gallery("g")
    assert list(after.items) == [item for item in found.items if item != "deep/4.png"]
    kept = [number for number in range(12) if number != place]
    assert torch.equal(after.embeddings, found.embeddings[kept])


@pytest.mark.parametrize("stop_at", [0, 1, 3, 4])
def test_a_killed_build_is_no_gallery_and_goes_on(photos, monkeypatch, stop_at):
    ask(*PHOTOS, "--correction", "nnn")
    whole = files_of("g")
    shutil.rmtree("g")
    batches, encode = [], encoders.encode

    def counted(encoder, pictures, amp):
        if len(batches) == stop_at:
            raise KeyboardInterrupt
        batches.append(len(pictures))
        return encode(encoder, pictures, amp)

    monkeypatch.setattr(blocks, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        ask(*PHOTOS, "--correction", "nnn")
    with pytest.raises(InputError, match="no whole gallery in g"):
        ask("--index", "g", QUESTION)
    done, stop_at = sum(batches), -1
    batches.clear()
    ask(*PHOTOS, "--correction", "nnn")
    assert sum(batches) == 12 - done // 4 * 4  # blocks of four photos
    assert files_of("g") == whole
    assert {path.name for path in Path("g").iterdir()} == {
        ".lock",
        "gallery.json",
        store.describe("g")["files"],
    }


def test_killed_before_the_last_step_it_is_no_gallery(photos, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store, "replacing", functools.partial(killed_at, "gallery.json", replacing))
        with pytest.raises(KeyboardInterrupt):
            ask(*PHOTOS)
    assert not store.is_whole("g")
    ask(*PHOTOS)
    assert len(list(Path("g").glob("gallery-files-*"))) == 1


def killed_at(name, replacing, path, *arguments, **options):
    if path.endswith(name):
        raise KeyboardInterrupt
    return replacing(path, *arguments, **options)


def test_a_photo_model_sees_photos_itself(workdir, capsys):
    train.main([*RAW, "--data_name", "f8k"])
    capsys.readouterr()
    flags = [
        "--images",
        "data/f8k/images",
        "--index",
        "g",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--json",
    ]
    ask(*flags, "--correction", "none", "--image", "data/f8k/images/7.png")
    answer = results(capsys)[-1]
    assert answer["results"][0]["item"] == "7.png"
    loaded = load_for_evaluation(argparse.Namespace(model_path=MODEL, device="cpu"))
    loaded.model.val_start()
    found = store.Gallery("g")
    dataset = loaded.loader("test").dataset
    for number in range(5):  # of every mode, clear parts among them
        row = loaded.model.embed_images(dataset.image(number)[None])[0]
        place = found.items.index(os.path.basename(dataset.image_files[number]))
        assert torch.allclose(row, found.embeddings[place, :-1], atol=1e-4)


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
        ask(
            "--index",
            "g",
            "--image",
            "query.png",
            "--encoder",
            "shufflenet_v2_x0_5",
            "--encoder_weights",
            "none",
        )


def test_a_model_of_order_similarities_and_scan_are_refused(evaluated):
    state = torch.load(MODEL, weights_only=False)
    for changes, words in (
        ({"measure": "order"}, "--measure order"),
        ({"cross_attn": "t2i"}, "SCAN"),
    ):
        for name, value in changes.items():
            setattr(state["opt"], name, value)
        with pytest.raises(InputError, match=words):
            build_gallery.refuse_unsearchable(argparse.Namespace(opt=state["opt"], path="x"))


def test_a_full_disk_is_said_and_leaves_no_gallery(evaluated, small_disk):
    disk = small_disk(1)
    with pytest.raises(InputError, match="free some space|could not be written|cannot be written"):
        ask("--precomp", "data/tiny_precomp", "--index", str(disk / "g"), "--correction", "none")
    assert not store.is_whole(str(disk / "g"))
