"""Data sets, batches and loaders of every layout."""

import itertools
import json
import os
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import (
    CocoDataset,
    FlickrDataset,
    Loader,
    PrecompDataset,
    collate_fn,
    found_form,
    get_dataset,
    get_loaders,
    get_test_loader,
)
from features.files import open_features
from inputs.photos import image_transform
from inputs.tokenizer import tokenize
from runtime.errors import InputError
from tests.helpers.made import IMG_DIM, ROOT, captions_of, write_flickr, write_image, write_precomp
from vocab import build_vocab, vocabulary_of

SPECIAL = ["<pad>", "<start>", "<end>", "<unk>"]

WORDS = [*SPECIAL, "a", "dog", "cat", "red", "blue", "the", "is", ".", "on", "grass"]


@pytest.fixture(scope="module")
def words():
    return vocabulary_of(WORDS)


def ids(caption, reading="text"):
    """A caption's word ids by hand."""
    return [
        1,
        *(WORDS.index(word) if word in WORDS else 3 for word in tokenize(caption, reading)),
        2,
    ]


def options(**changes):
    """HAL's, so that a loop over a loader gets batches of five parts."""
    given = {"data_path": "data", "seed": 0, "img_dim": None, "local_alpha": 30.0}
    return Namespace(**{**given, **changes})


# Precomputed features ---------------------------------------------------------------------------


def precomp(folder, features, captions, split="train"):
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{split}_ims.npy", features)
    (folder / f"{split}_caps.txt").write_text("".join(f"{caption}\n" for caption in captions))
    return str(folder)


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, np.dtype(">f4"), np.int64, np.uint16], ids=str
)
@pytest.mark.parametrize("per_row", [1, 5])
def test_every_caption_gets_its_row(tmp_path, words, per_row, dtype):
    features = (
        (9 * np.random.default_rng(0).random((3, 4))).astype(dtype).repeat(5 // per_row, 0)
    )  # 1: VSE++'s habit
    captions = [f"{'a ' * (c % 4)}dog" for c in range(15)]
    dataset = PrecompDataset(precomp(tmp_path / "x_precomp", features, captions), "train", words)
    assert len(dataset) == 15
    image, caption, index, image_index = dataset[7]
    assert (
        image.dtype == torch.float32
        and image.tolist() == features[7 // per_row].astype(np.float32).tolist()
    )
    assert (caption.tolist(), index, image_index) == (ids(captions[7]), 7, 1)
    batches = [torch.tensor([14, 0, 7, 3, 5]), torch.tensor([2])]
    for indices, batch in zip(batches, dataset.load(batches), strict=True):
        order = sorted(indices.tolist(), key=lambda c: -len(ids(captions[c])))
        images, padded, lengths, numbers, places = batch
        assert images.dtype == torch.float32
        assert images.tolist() == [
            features[c // per_row].astype(np.float32).tolist() for c in order
        ]
        assert [row[:n].tolist() for row, n in zip(padded, lengths)] == [
            ids(captions[c]) for c in order
        ]
        assert list(numbers) == list(places) == order
        assert padded.shape[1] == max(lengths)


@pytest.mark.parametrize("per_row", [1, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_each_image_is_loaded_once_in_order(tmp_path, words, per_row, batch_size):
    features = np.arange(3, dtype=np.float32)[:, None].repeat(5 // per_row, 0)
    dataset = PrecompDataset(precomp(tmp_path / "x_precomp", features, ["a"] * 15), "train", words)
    batches = list(dataset.load_images(batch_size))
    assert torch.cat(batches).ravel().tolist() == [0, 1, 2]
    assert max(map(len, batches)) <= batch_size


@pytest.mark.parametrize("per_row", [1, 5])
@pytest.mark.parametrize("split, length", [("dev", 5000), ("test", 5005)])
def test_the_dev_split_alone_is_capped(tmp_path, words, per_row, split, length):
    folder = precomp(
        tmp_path / "x_precomp", np.ones((5005 // per_row, 1), np.float32), ["a"] * 5005, split
    )
    dataset = PrecompDataset(folder, split, words)
    assert len(dataset) == length
    assert sum(map(len, dataset.load_images(512))) == length // 5


def test_a_dev_split_below_the_cap_is_whole(drawn_data, words):
    assert len(PrecompDataset(str(drawn_data / "tiny_precomp"), "dev", words)) == 25


def test_changing_a_loaded_feature_leaves_the_file_alone(tmp_path, words):
    folder = precomp(tmp_path / "x_precomp", np.ones((3, 2), np.float32), ["a"] * 15)
    before = (tmp_path / "x_precomp" / "train_ims.npy").read_bytes()
    for images in PrecompDataset(folder, "train", words).load_images(2):
        images.zero_()
    open_features(str(tmp_path / "x_precomp" / "train_ims.npy"))[0, 0] = 5
    assert (tmp_path / "x_precomp" / "train_ims.npy").read_bytes() == before


def with_value(value, dtype=np.float32):
    features = np.ones((5, 4), dtype)
    features[3, 2] = value
    return features


@pytest.mark.parametrize(
    "features, reason",
    [
        (with_value(np.nan), "row 3"),
        (with_value(np.inf), "row 3"),
        (with_value(-np.inf), "row 3"),
        (with_value(np.nan, np.float16), "row 3"),
        (np.ones(5, np.float32), "shape"),
        (np.ones((5, 4, 2, 2), np.float32), "shape"),
        (np.float32(3), "shape"),
        (np.ones((5, 0), np.float32), "shape"),
        (np.ones((0, 4), np.float32), "shape"),
        (np.array([["a"] * 4] * 5), "not numbers"),
        (np.ones((5, 4), np.complex64), "not numbers"),
        (np.ones((5, 4), bool), "not numbers"),
        (np.zeros((5, 4), "M8[s]"), "not numbers"),
        (np.zeros(5, [("a", "f4"), ("b", "f4")]), "not numbers"),
        (np.array([[None] * 4] * 5, object), "object"),
        (np.ones((3, 4), np.float32), "3 rows.*25 captions"),
        (np.ones((26, 4), np.float32), "26 rows.*25 captions"),
    ],
    ids=[
        "nan",
        "inf",
        "-inf",
        "float16 nan",
        "1-D",
        "4-D",
        "0-D",
        "no width",
        "no rows",
        "text",
        "complex",
        "bool",
        "dates",
        "records",
        "objects",
        "too few",
        "too many",
    ],
)
def test_features_that_cannot_be_used_are_refused(tmp_path, words, features, reason):
    folder = precomp(tmp_path / "x_precomp", features, ["a"] * 25)
    with pytest.raises(InputError, match=rf"train_ims\.npy.*{reason}") as caught:
        PrecompDataset(folder, "train", words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:40],
        lambda content: content[:-1],
        lambda content: b"PK" + content,
        lambda content: b"\x93NUMPY\x01\x00\xff\xff" + content[10:],
        lambda content: b"not an array at all",
        lambda content: content.replace(b"'<f4'", b"'@@@'"),
    ],
    ids=["empty", "torn header", "torn", "zip", "header", "text", "type"],
)
def test_torn_features_are_refused(tmp_path, words, damage):
    folder = precomp(tmp_path / "x_precomp", np.ones((5, 4), np.float32), ["a"] * 25)
    path = tmp_path / "x_precomp" / "train_ims.npy"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"train_ims\.npy") as caught:
        PrecompDataset(folder, "train", words)
    assert "\n" not in str(caught.value)


def test_pickled_features_are_never_unpickled(tmp_path, words, monkeypatch):
    class Smuggled:
        def __reduce__(self):
            return os.system, ("touch smuggled",)

    monkeypatch.chdir(tmp_path)
    objects = np.empty((5, 4), object)
    objects[:] = Smuggled()
    folder = precomp(tmp_path / "x_precomp", objects, ["a"] * 25)
    with pytest.raises(InputError, match=r"train_ims\.npy"):
        PrecompDataset(folder, "train", words)
    assert not (tmp_path / "smuggled").exists()


def test_an_archive_of_arrays_is_refused(tmp_path, words):
    folder = precomp(tmp_path / "x_precomp", np.ones((5, 4), np.float32), ["a"] * 25)
    with open(tmp_path / "x_precomp" / "train_ims.npy", "wb") as file:
        np.savez(file, a=np.ones((5, 4)))
    with pytest.raises(InputError, match=r"train_ims\.npy"):
        PrecompDataset(folder, "train", words)


def test_another_width_is_refused_with_both_numbers(drawn_data, words):
    with pytest.raises(InputError, match=f"{IMG_DIM}.*2048"):
        PrecompDataset(str(drawn_data / "tiny_precomp"), "train", words, img_dim=2048)


@pytest.mark.parametrize("name", ["train_ims.npy", "train_caps.txt"])
def test_a_missing_file_is_named(workdir, words, name):
    (workdir / "data" / "tiny_precomp" / name).unlink()
    with pytest.raises(InputError, match=name):
        PrecompDataset("data/tiny_precomp", "train", words)


# Raw images -------------------------------------------------------------------------------------


def test_a_split_of_the_json_set_has_its_images_and_captions(drawn_data, words):
    folder = drawn_data / "f8k"
    dataset = FlickrDataset(
        str(folder / "images"), str(folder / "dataset_flickr8k.json"), "val", words
    )
    assert len(dataset) == 10
    image, caption, index, image_index = dataset[7]
    assert (caption.tolist(), index, image_index) == (ids(captions_of(5)[2]), 7, 1)
    assert image.tobytes() == Image.open(folder / "images" / "5.png").convert("RGB").tobytes()


@pytest.mark.parametrize("number, mode", [(0, "RGB"), (1, "L"), (2, "RGBA"), (3, "P")])
def test_images_of_every_mode_become_three_channels(drawn_data, words, number, mode):
    folder = drawn_data / "f8k"
    assert Image.open(folder / "images" / f"{number}.png").mode == mode
    dataset = FlickrDataset(
        str(folder / "images"),
        str(folder / "dataset_flickr8k.json"),
        "train",
        words,
        transform=image_transform(False, 32),
    )
    image = dataset[5 * number][0]
    assert image.shape == (3, 224, 224) and image.isfinite().all()


def test_coco_captions_follow_the_ids(drawn_data, words):
    folder = drawn_data / "coco"
    ids_ = np.load(folder / "annotations" / "coco_train_ids.npy")
    dataset = CocoDataset(
        str(folder / "images" / "train2014"),
        str(folder / "annotations/captions_train2014.json"),
        words,
        ids=ids_,
    )
    assert len(dataset) == 20
    image, caption, index, image_index = dataset[11]  # the third image of the ids is number 3
    assert (caption.tolist(), index, image_index) == (ids(captions_of(3)[1]), 11, 2)
    assert image.size == (44, 36)


def test_coco_without_ids_is_the_whole_file(drawn_data, words):
    folder = drawn_data / "coco"
    dataset = CocoDataset(
        str(folder / "images" / "val2014"), str(folder / "annotations/captions_val2014.json"), words
    )
    assert len(dataset) == 30


@pytest.mark.parametrize(
    "split, use_restval, captions",
    [
        ("train", False, 20),
        ("train", True, 30),
        ("dev", False, 10),
        ("val", True, 10),
        ("test", False, 10),
        ("testall", False, 10),
    ],
)
def test_coco_splits_have_their_captions(drawn_data, words, split, use_restval, captions):
    opt = options(data_path=str(drawn_data), use_restval=use_restval)
    if split == "train":
        loader, _ = get_loaders("coco", words, 32, 8, 0, opt)
    else:
        loader = get_test_loader(split, "coco", words, 32, 8, 0, opt)
    assert len(loader.dataset) == captions


def test_restval_comes_from_the_val_images(drawn_data, words):
    loader, _ = get_loaders(
        "coco", words, 32, 8, 0, options(data_path=str(drawn_data), use_restval=True)
    )
    image, caption, index, image_index = loader.dataset[25]  # the second restval image is number 9
    assert (caption.tolist(), index, image_index) == (ids(captions_of(9)[0]), 25, 5)
    assert image.shape == (3, 32, 32)


def test_an_unknown_caption_id_is_named(workdir, words):
    path = workdir / "data" / "coco" / "annotations" / "coco_train_ids.npy"
    np.save(path, np.array([0, 999]))
    with pytest.raises(InputError, match="999"):
        get_loaders("coco", words, 32, 8, 0, options())


@pytest.mark.parametrize(
    "content", [np.array([1.5]), np.array([{}], object), np.array(["a"])], ids=str
)
def test_caption_ids_of_another_kind_are_refused(workdir, words, content):
    np.save(workdir / "data" / "coco" / "annotations" / "coco_train_ids.npy", content)
    with pytest.raises(InputError, match=r"coco_train_ids\.npy"):
        get_loaders("coco", words, 32, 8, 0, options())


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"images": [], "annotations": [{"id": 1}]}',
        '{"images": [{}], "annotations": []}',
        "",
    ],
    ids=str,
)
def test_broken_coco_annotations_are_refused(workdir, words, content):
    (workdir / "data" / "coco" / "annotations" / "captions_train2014.json").write_text(content)
    with pytest.raises(InputError, match=r"captions_train2014\.json") as caught:
        get_loaders("coco", words, 32, 8, 0, options())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["annotations", "images"])
def test_coco_annotations_of_one_id_are_refused(workdir, words, kind):
    path = workdir / "data" / "coco" / "annotations" / "captions_train2014.json"
    content = json.loads(path.read_text())
    content[kind][1]["id"] = content[kind][0]["id"]
    path.write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=rf"captions_train2014\.json .*two of its {kind} have one id"
    ):
        get_loaders("coco", words, 32, 8, 0, options())


def test_coco_annotations_of_images_that_are_not_listed_are_refused(workdir, words):
    path = workdir / "data" / "coco" / "annotations" / "captions_train2014.json"
    content = json.loads(path.read_text())
    content["images"] = content["images"][:1]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"captions_train2014\.json has no image"):
        get_loaders("coco", words, 32, 8, 0, options())


@pytest.mark.parametrize(
    "name",
    [
        "../../secret.png",
        "/etc/passwd",
        "a/../../b.png",
        "",
        "..\\b.png",
        "a\0b.png",
        pytest.param(
            "\ud800.png",
            id="surrogate",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="Windows has such names"),
        ),
    ],
)
def test_an_image_name_outside_its_folder_is_refused(tmp_path, words, name):
    write_flickr(tmp_path / "f8k")
    path = tmp_path / "f8k" / "dataset_flickr8k.json"
    content = json.loads(path.read_text())
    content["images"][0]["filename"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(
        InputError,
        match="which is no valid file name" if "\ud800" in name else "which lies outside",
    ):
        FlickrDataset(str(tmp_path / "f8k" / "images"), str(path), "train", words)


@pytest.mark.parametrize(
    "content", [None, b"", b"not an image", "torn"], ids=["missing", "empty", "text", "torn"]
)
def test_an_image_that_cannot_be_decoded_is_named(workdir, words, content):
    path = workdir / "data" / "f8k" / "images" / "5.png"
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[: len(whole) // 2] if content == "torn" else content)
    dataset = get_test_loader("dev", "f8k", words, 32, 8, 0, options()).dataset
    with pytest.raises(InputError, match=r"5\.png"):
        list(dataset.load_images(2))


@pytest.mark.parametrize("split", ["testall", "restval"])
def test_an_absent_split_of_the_json_set_is_named(drawn_data, words, split):
    with pytest.raises(InputError, match=split):
        get_test_loader(split, "f8k", words, 32, 8, 0, options(data_path=str(drawn_data)))


@pytest.mark.parametrize("crop_size", [16, 33])
def test_training_crops_have_the_crop_size(drawn_data, words, crop_size):
    loader, _ = get_loaders("f8k", words, crop_size, 8, 0, options(data_path=str(drawn_data)))
    assert loader.dataset[0][0].shape == (3, crop_size, crop_size)


def batches_of(loader):
    return [tuple(part.tolist() for part in map(torch.as_tensor, batch)) for batch in loader]


def test_workers_do_not_change_what_is_loaded(drawn_data, words):
    loaders = [
        get_loaders("f8k", words, 16, 8, workers, options(data_path=str(drawn_data)))[0]
        for workers in (0, 2)
    ]
    assert batches_of(loaders[0]) == batches_of(loaders[1])


def test_random_crops_follow_the_seed_and_the_epoch(drawn_data, words):
    def crops(seed, epoch):
        loader, _ = get_loaders(
            "f8k", words, 16, 20, 0, options(data_path=str(drawn_data), seed=seed)
        )
        loader.epoch = epoch
        return next(iter(loader.load([torch.arange(20)])))[0]

    first = crops(0, 0)
    assert torch.equal(first, crops(0, 0))
    assert not torch.equal(first, crops(0, 1)) and not torch.equal(first, crops(1, 0))


def test_random_crops_leave_the_global_random_state_alone(drawn_data, words):
    loader, _ = get_loaders("f8k", words, 16, 20, 0, options(data_path=str(drawn_data)))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    loader.dataset[3]
    assert torch.equal(torch.rand(1), expected)


# Batches and loaders ----------------------------------------------------------------------------


def test_collate_sorts_by_length_pads_and_keeps_the_places():
    samples = [
        (torch.full((2,), float(number)), torch.arange(1, length + 1), 10 + number, number)
        for number, length in enumerate([3, 5, 3, 5, 2])
    ]
    images, captions, lengths, numbers, places = collate_fn(samples)
    assert images.tolist() == [[1, 1], [3, 3], [0, 0], [2, 2], [4, 4]]
    assert captions.tolist() == [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5],
        [1, 2, 3, 0, 0],
        [1, 2, 3, 0, 0],
        [1, 2, 0, 0, 0],
    ]
    assert list(lengths) == [5, 5, 3, 3, 2]
    assert list(numbers) == list(places) == [11, 13, 10, 12, 14]


def test_collate_takes_a_single_sample():
    images, captions, lengths, numbers, _ = collate_fn(
        [(torch.ones(3, 2, 2), torch.tensor([1, 2]), 4, 0)]
    )
    assert (images.shape, captions.tolist(), list(lengths), list(numbers)) == (
        (1, 3, 2, 2),
        [[1, 2]],
        [2],
        [4],
    )


@pytest.mark.parametrize("batch_size, sizes", [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_hands_out_every_caption_once_and_keeps_the_last_batch(
    tmp_path, words, shuffle, batch_size, sizes
):
    folder = precomp(tmp_path / "x_precomp", np.ones((7, 2), np.float32), ["a"] * 7)
    loader = Loader(PrecompDataset(folder, "train", words), batch_size, shuffle)
    batches = [batch[4].tolist() for batch in loader]
    assert [len(batch) for batch in batches] == sizes and len(loader) == len(sizes)
    assert sorted(sum(batches, [])) == list(range(7))
    assert shuffle or sum(batches, []) == list(range(7))


def test_the_order_follows_the_seed_the_epoch_and_the_draw_alone(drawn_data, words):
    dataset = PrecompDataset(str(drawn_data / "tiny_precomp"), "train", words)

    def order(seed, epoch, draw=0):
        torch.manual_seed(seed + epoch + draw)
        loader = Loader(dataset, 16, shuffle=True, seed=seed)
        loader.epoch = epoch
        return torch.cat(list(loader.batches(draw))).tolist()

    assert order(0, 3) == order(0, 3)
    assert (
        len({tuple(order(*numbers)) for numbers in ((0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 1, 1))})
        == 5
    )


@pytest.mark.parametrize("name", ["tiny_precomp", "f8k"])
def test_each_pass_of_a_loop_of_ones_own_is_the_next_epoch_and_the_seed_decides(
    drawn_data, words, name
):
    def passes(seed, *, cut=None, epochs=(None,) * 3):
        loader, _ = get_loaders(
            name, words, 16, 8, 0, options(data_path=str(drawn_data), seed=seed)
        )
        found = []
        for epoch in epochs:
            if epoch is not None:
                loader.epoch = epoch
            batches = list(itertools.islice(loader, cut))
            found.append([(batch[4], batch[0].tolist()) for batch in batches])
        return found

    whole = passes(0)
    assert len({str([indices for indices, _ in one]) for one in whole}) == 3
    assert whole == passes(0) == passes(0, epochs=(0, 1, 2)) and whole[0] != passes(1)[0]
    assert [one[:1] for one in whole] == passes(0, cut=1)  # a pass that is broken off counts, too
    assert passes(0, epochs=(1, None, 0)) == [whole[1], whole[1], whole[0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_over_the_photos_by_pytorch_s_loader_crops_anew_at_each_pass(
    drawn_data, words, workers
):
    def of_passes():
        train = get_loaders("f8k", words, 16, 8, 0, options(data_path=str(drawn_data)))[0].dataset
        loader = torch.utils.data.DataLoader(
            train, batch_size=8, collate_fn=collate_fn, num_workers=workers
        )
        return [torch.cat([batch[0] for batch in loader]) for _ in range(3)]

    first, again = of_passes(), of_passes()
    assert all(map(torch.equal, first, again))
    assert not any(
        torch.equal(a[row], b[row])
        for a, b in itertools.combinations(first, 2)
        for row in range(len(a))
    )


def test_a_loop_of_ones_own_leaves_out_words_as_the_data_set_is_told_to(drawn_data):
    vocabulary = vocabulary_of([*WORDS, "<mask>"])
    loader, _ = get_loaders(
        "tiny_precomp",
        vocabulary,
        16,
        60,
        0,
        options(data_path=str(drawn_data), drop_words=0.5, drop_regions=0),
    )
    left = [sum(sum(batch[2]) for batch in loader) for _ in range(2)]
    assert max(left) < int(loader.dataset.word_ids.lengths.sum()) and left[0] != left[1]


def test_the_family_s_call_gives_both_loaders_and_the_feature_width(drawn_data, words):
    opt = options(data_path=str(drawn_data))
    before = dict(vars(opt))
    train, dev = get_loaders("tiny_precomp", words, 224, 16, 10, opt)
    assert vars(opt) == before
    assert found_form(train.dataset, opt) == {"img_dim": IMG_DIM}
    assert (len(train.dataset), len(dev.dataset)) == (60, 25)
    images, captions, lengths, numbers, places = next(iter(dev))
    assert images.shape == (16, IMG_DIM) and captions.shape == (16, lengths[0])
    assert sorted(numbers) == sorted(places) == list(range(16))


@pytest.mark.parametrize(
    "split, captions", [("dev", 25), ("val", 25), ("test", 30), ("testall", 50), ("train", 60)]
)
def test_each_split_of_precomputed_features_is_found(drawn_data, words, split, captions):
    loader = get_test_loader(
        split, "tiny_precomp", words, 224, 16, 0, Namespace(data_path=str(drawn_data))
    )
    assert len(loader.dataset) == captions


@pytest.mark.parametrize("split, captions", [("dev", 10), ("val", 10), ("test", 25)])
def test_dev_and_val_are_one_split_of_the_json_set(drawn_data, words, split, captions):
    loader = get_test_loader(split, "f8k", words, 224, 16, 0, Namespace(data_path=str(drawn_data)))
    assert len(loader.dataset) == captions


def test_any_name_in_the_json_layout_is_taken(tmp_path, words):
    write_flickr(tmp_path / "mine", "mine")
    assert (
        len(
            get_test_loader(
                "test", "mine", words, 32, 4, 0, options(data_path=str(tmp_path))
            ).dataset
        )
        == 25
    )


# Which captions belong to which image -----------------------------------------------------------


def layout(folder, words, features, captions, ids=None, split="test"):
    """The data set of made-up files."""
    precomp(
        folder,
        np.asarray(features, np.float32).reshape(len(features), -1),
        [f"dog {c}" for c in range(captions)],
        split,
    )
    if ids is not None:
        (folder / f"{split}_ids.txt").write_text("".join(f"{name}\n" for name in ids))
    return PrecompDataset(str(folder), split, words)


UNEVEN = [
    "a.jpg",
    "b.jpg",
    "b.jpg",
    "b.jpg",
    "c.jpg",
    "c.jpg",
    "a.jpg",
]  # the last is the first image again


@pytest.mark.parametrize(
    "features, rows",
    [([0, 1, 2, 0], [0, 1, 1, 1, 2, 2, 3]), ([0, 1, 1, 1, 2, 2, 0], range(7))],
    ids=["a row a run", "a row a caption"],
)
def test_an_id_a_caption_makes_one_image_of_a_name_wherever_it_stands(
    tmp_path, words, features, rows
):
    dataset = layout(tmp_path / "x_precomp", words, features, 7, UNEVEN)
    assert dataset.image_of.tolist() == [0, 1, 1, 1, 2, 2, 0] and dataset.n_images == 3
    assert dataset.names == ["a.jpg", "b.jpg", "c.jpg"] and dataset.row_of.tolist() == list(rows)
    assert [dataset[c][0].item() for c in range(7)] == [0, 1, 1, 1, 2, 2, 0]
    assert [dataset[c][3] for c in range(7)] == [0, 1, 1, 1, 2, 2, 0]
    assert torch.cat(list(dataset.load_images(3))).flatten().tolist() == [0, 1, 2]
    assert torch.cat(list(dataset.load_images(3, stride=2))).flatten().tolist() == [0, 2]
    images, *_, indices = next(iter(dataset.load([torch.tensor([6, 0, 3])])))
    assert images.flatten().tolist() == [[0, 1, 1, 1, 2, 2, 0][c] for c in indices.tolist()]


@pytest.mark.parametrize("ids", [None, ["a", "b", "c"]], ids=["no ids", "an id a row"])
def test_rows_for_five_captions_each_are_images(tmp_path, words, ids):
    assert layout(tmp_path / "x_precomp", words, [0, 1, 2], 15, ids).image_of.tolist() == [
        c // 5 for c in range(15)
    ]


@pytest.mark.parametrize(
    "features, images",
    [([1] * 5 + [2] * 5, 2), ([1] * 10, 2), (range(10), 10), (range(7), 7), ([1] * 7, 7)],
    ids=str,
)
def test_a_row_a_caption_is_five_equal_rows_an_image_or_an_image_each(
    tmp_path, words, features, images
):
    dataset = layout(tmp_path / "x_precomp", words, features, len(features))
    assert dataset.n_images == images
    assert dataset.image_of.tolist() == [c * images // len(features) for c in range(len(features))]


@pytest.mark.parametrize("rows, ids", [(2, None), (2, ["a"] * 5 + ["b"] * 5), (10, None)], ids=str)
def test_a_blank_last_caption_is_named(tmp_path, words, rows, ids):
    layout(tmp_path / "x_precomp", words, range(rows), 10, ids)
    caption_file = tmp_path / "x_precomp" / "test_caps.txt"
    caption_file.write_text(caption_file.read_text() + " \n")
    with pytest.raises(
        InputError,
        match="test_caps.txt, line 11: the last line is blank, and counts as a caption: "
        f"remove it .*{rows} ",
    ):
        PrecompDataset(str(tmp_path / "x_precomp"), "test", words)


def test_a_byte_order_mark_before_the_ids_makes_no_image_of_its_own(tmp_path, words):
    ids = ["a"] * 5 + ["b"] * 5
    plain, marked = (
        layout(tmp_path / f"{mark}x_precomp", words, [0, 1], 10, [mark + ids[0], *ids[1:]])
        for mark in ("", "\ufeff")
    )
    assert marked.image_of.tolist() == plain.image_of.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize(
    "features, captions, ids, found",
    [
        (range(3), 14, None, "3 rows for 14 captions"),
        (range(4), 15, UNEVEN[:4], "4 rows for 15 captions"),
        (range(5), 7, UNEVEN, "5 rows for 7 captions, of which .*test_ids.txt makes 3 images"),
        (
            range(3),
            7,
            UNEVEN,
            "a row for each of the 3 names in .*test_ids.txt, whose captions do not stand together",
        ),
        (range(3), 15, ["a"] * 4, "test_ids.txt has 4 lines for 3 feature rows and 15 captions"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_refused(tmp_path, words, features, captions, ids, found):
    with pytest.raises(InputError, match=found):
        layout(tmp_path / "x_precomp", words, features, captions, ids)


@pytest.mark.parametrize(
    "each, kept",
    [([4000, 900, 300, 1], 4900), ([5000, 3], 5000), ([6000, 3], 5000), ([2500, 2499, 1, 7], 5000)],
    ids=str,
)
def test_dev_s_cap_never_cuts_through_an_image_but_through_the_first(tmp_path, words, each, kept):
    ids = [name for name, n in zip("abcd", each) for _ in range(n)]
    dataset = layout(tmp_path / "x_precomp", words, range(len(each)), len(ids), ids, "dev")
    assert len(dataset) == len(dataset.captions) == len(dataset.image_of) == kept
    assert dataset.n_images == len(set(ids[:kept]))


def test_karpathy_s_layout_may_have_any_number_of_captions_an_image(tmp_path, words):
    write_flickr(tmp_path / "f8k", splits=(("train", 2), ("test", 4)))
    path = tmp_path / "f8k" / "dataset_flickr8k.json"
    content = json.loads(path.read_text())
    for image, n in zip(content["images"][2:], (3, 0, 1, 5)):  # one without a caption is left out
        image["sentences"] = image["sentences"][:n]
    path.write_text(json.dumps(content))
    dataset = get_test_loader(
        "test", "f8k", words, 32, 4, 0, options(data_path=str(tmp_path))
    ).dataset
    assert dataset.image_of.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2] and dataset.n_images == 3


def raw_set(folder, *entries):
    """A raw-image data set `mine` of (filename, split, captions[, filepath]), with its photos."""
    images = []
    for number, (name, split, captions, *below) in enumerate(entries):
        write_image(folder.joinpath("mine", "images", *below, name), number)
        images.append(
            {
                "filename": name,
                "split": split,
                "sentences": [{"raw": raw} for raw in captions],
                **({"filepath": below[0]} if below else {}),
            }
        )
    (folder / "mine" / "dataset_mine.json").write_text(json.dumps({"images": images}))


def test_an_entry_a_caption_of_the_json_set_is_one_image(tmp_path, words):
    raw_set(
        tmp_path,
        ("a.png", "test", ["dog"]),
        ("b.png", "test", ["cat", "dog"]),
        ("a.png", "test", ["red"]),
    )
    dataset = get_test_loader(
        "test", "mine", words, 32, 4, 0, options(data_path=str(tmp_path))
    ).dataset
    assert (dataset.n_images, dataset.image_of.tolist()) == (2, [0, 0, 1, 1])
    assert dataset.captions == ["dog", "red", "cat", "dog"]


@pytest.mark.parametrize("word", ["val", "dev", "validation", " Val ", "DEV"])
@pytest.mark.parametrize("split", ["val", "dev", "validation"])
def test_a_split_s_words_are_one(tmp_path, words, split, word):
    raw_set(tmp_path, ("a.png", word, ["dog"]), ("b.png", "train", ["cat"]))
    assert get_dataset(split, "mine", words, 32, options(data_path=str(tmp_path))).captions == [
        "dog"
    ]


@pytest.mark.parametrize(
    "use_restval, captions", [(False, ["dog", "red"]), (True, ["dog", "cat", "blue", "red"])]
)
def test_restval_of_the_json_set_is_trained_on_or_counted(
    tmp_path, words, capsys, use_restval, captions
):
    raw_set(
        tmp_path,
        ("a.png", "train", ["dog"]),
        ("b.png", "restval", ["cat", "blue"]),
        ("c.png", "train", ["red"]),
        ("d.png", "val", ["green"]),
    )
    opt = options(data_path=str(tmp_path), use_restval=use_restval)
    loaders = get_loaders("mine", words, 32, 4, 0, opt)
    assert [loader.dataset.captions for loader in loaders] == [captions, ["green"]]
    said = capsys.readouterr().err
    assert (
        "1 images of split restval of" in said and "with 2 captions, are left out" in said
    ) != use_restval
    assert said.count("\n") == (not use_restval)


def test_coco_s_restval_captions_are_counted_if_they_are_left_out(drawn_data, words, capsys):
    get_dataset("train", "coco", words, 32, options(data_path=str(drawn_data)))
    assert "note: 10 captions of split restval of" in capsys.readouterr().err


def test_photos_of_one_name_in_two_folders_are_two(tmp_path, words):
    raw_set(
        tmp_path, ("1.png", "test", ["dog"], "val2014"), ("1.png", "test", ["cat"], "train2014")
    )
    dataset = get_dataset("test", "mine", words, 32, options(data_path=str(tmp_path)))
    assert [path.split("/")[-2] for path in dataset.image_files] == ["val2014", "train2014"]
    assert dataset.image(0).shape == dataset.image(1).shape


@pytest.mark.parametrize("name", ["mine", "f8k", "coco"])
def test_features_in_a_folder_of_another_name_are_called_so(tmp_path, words, name):
    write_precomp(tmp_path / name, {"train": 2, "dev": 2})
    for read in (
        lambda: get_dataset("train", name, words, 32, options(data_path=str(tmp_path))),
        lambda: build_vocab(str(tmp_path), name),
    ):
        with pytest.raises(
            InputError, match=rf"{name} holds features \(dev_ims.npy\).*rename it to {name}_precomp"
        ):
            read()


def test_a_slash_after_the_name_changes_nothing(drawn_data, words):
    opt = Namespace(data_path=str(drawn_data))
    assert len(get_test_loader("test", "tiny_precomp/", words, 224, 16, 0, opt).dataset) == 30


@pytest.mark.parametrize("name", ["tiny_precomp", "f8k", "coco"])
def test_a_missing_data_folder_is_named(tmp_path, words, name):
    with pytest.raises(InputError, match=name):
        get_loaders(name, words, 32, 4, 0, options(data_path=str(tmp_path)))


def test_features_of_another_width_in_dev_are_refused(workdir, words):
    write_precomp(workdir / "data" / "tiny_precomp", {"dev": 5}, width=IMG_DIM + 1)
    with pytest.raises(InputError, match=f"dev_ims.npy.*{IMG_DIM + 1}.*{IMG_DIM}"):
        get_loaders("tiny_precomp", words, 224, 4, 0, options())


@pytest.mark.skipif(sys.platform == "win32", reason="alarms are POSIX")
def test_a_process_that_decodes_outlives_a_stop_for_a_while_and_ends_well():
    code = (
        "import os, signal, time, data; data.WORKER_GRACE = 1; data._outlive_signals(0); "
        "os.kill(os.getpid(), signal.SIGTERM); print('alive', flush=True); time.sleep(60)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert (run.returncode, run.stdout) == (0, "alive\n")
