"""data.py as the code of VSE++, SCAN, HAL, VSE-infinity, SGRAF and VSRN calls it.

Each test is a few lines as such code has them, with its own imports. What it gets is compared with
the files themselves.
"""

from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.errors import InputError
from tests.helpers.made import IMG_DIM, captions_of
from tests.test_regions import write_regions
from vocab import build_vocab

REGIONS, WIDTH = 5, 8


@pytest.fixture(scope="module")
def regions(tmp_path_factory):
    """A data folder with regions in the folders of SCAN and of VSE-infinity."""
    folder = tmp_path_factory.mktemp("regions")
    for name in ("f30k_precomp", "f30k/precomp"):
        write_regions(folder / name)
    return folder


@pytest.fixture(scope="module")
def vocab(drawn_data):
    return build_vocab(str(drawn_data), "tiny_precomp", threshold=1)


def vsepp_opt(folder, **more):
    """What VSE++'s train.py has among its options."""
    given = {"data_path": str(folder), "crop_size": 32, "img_dim": IMG_DIM, "max_violation": True}
    return Namespace(**given, use_restval=False, measure="cosine", batch_size=7, workers=0, **more)


def hal_opt(folder):
    return vsepp_opt(folder, local_alpha=30.0, local_ep=0.3, memory_bank=True)


def scan_opt(folder):
    given = {"data_path": str(folder), "cross_attn": "t2i", "img_dim": WIDTH, "bi_gru": True}
    return Namespace(**given, precomp_enc_type="basic", batch_size=7, workers=0)


def sgraf_opt(folder):
    given = {"data_path": str(folder), "module_name": "SGR", "sgr_step": 3, "img_dim": WIDTH}
    return Namespace(**given, batch_size=7, workers=0)


def vse_infty_opt(folder):
    given = {"data_path": str(folder), "data_name": "f30k", "precomp_enc_type": "basic"}
    return Namespace(**given, vse_mean_warmup_epochs=1, img_dim=WIDTH, batch_size=7, workers=0)


def word_ids(caption, vocab):
    """A caption's word ids by hand."""
    words = caption.lower().replace(".", " .").replace(",", " ,").split()
    return [1, *(vocab.word2idx[word] for word in words), 2]


def check(images, captions, lengths, ids, features, vocab):
    """A batch against its files: every caption's own words, and its image's own features."""
    assert type(lengths) is list and all(type(one) is int for one in lengths)
    assert type(ids) is list and all(type(one) is int for one in ids)
    assert lengths == sorted(lengths, reverse=True)
    for image, caption, length, one in zip(images, captions, lengths, ids, strict=True):
        own = word_ids(captions_of(one // 5)[one % 5], vocab)
        assert caption.tolist() == own + [0] * (max(lengths) - len(own)) and length == len(own)
        assert np.array_equal(image.numpy(), features[one // 5].astype(np.float32))


def features_of(folder, name, split):
    return np.load(folder / name / f"{split}_ims.npy")


# get_loaders, get_test_loader -------------------------------------------------------------------


def test_vsepp_loops_over_four_parts(drawn_data, vocab):
    import data

    opt, seen = vsepp_opt(drawn_data), []
    train_loader, val_loader = data.get_loaders(
        "tiny_precomp", vocab, opt.crop_size, opt.batch_size, opt.workers, opt
    )
    for images, captions, lengths, ids in train_loader:
        features = features_of(drawn_data, "tiny_precomp", "train")
        check(images, captions, lengths, ids, features, vocab)
        seen += ids
    assert sorted(seen) == list(range(60)) and seen != sorted(seen)
    assert (len(train_loader), len(val_loader), len(val_loader.dataset)) == (9, 4, 25)


def test_hal_loops_over_five_parts_and_collects_its_bank(drawn_data, vocab):
    import data

    opt, bank = hal_opt(drawn_data), []
    train_loader, _ = data.get_loaders(
        "tiny_precomp", vocab, opt.crop_size, opt.batch_size, opt.workers, opt
    )
    for images, captions, lengths, ids, indices in train_loader:
        features = features_of(drawn_data, "tiny_precomp", "train")
        check(images, captions, lengths, ids, features, vocab)
        assert ids == indices
        bank.extend(indices)
    assert sorted(bank) == list(range(60)) and torch.tensor(bank).dtype == torch.int64


def test_scan_calls_without_a_crop_size(regions, vocab):
    import data

    opt, seen = scan_opt(regions), []
    train_loader, val_loader = data.get_loaders(
        "f30k_precomp", vocab, opt.batch_size, opt.workers, opt
    )
    for loader, split in ((train_loader, "train"), (val_loader, "dev")):
        for images, captions, lengths, ids in loader:
            assert images.shape == (len(ids), REGIONS, WIDTH)
            features = features_of(regions, "f30k_precomp", split)
            check(images, captions, lengths, ids, features, vocab)
            seen += ids
    assert sorted(seen) == sorted([*range(60), *range(25)])


@pytest.mark.parametrize("split, n", [("test", 30), ("dev", 25)])
def test_scan_s_test_loader_has_no_crop_size(regions, vocab, split, n):
    import data

    opt, seen = scan_opt(regions), []
    loader = data.get_test_loader(split, "f30k_precomp", vocab, opt.batch_size, opt.workers, opt)
    for images, captions, lengths, ids in loader:
        features = features_of(regions, "f30k_precomp", split)
        check(images, captions, lengths, ids, features, vocab)
        seen += ids
    assert sorted(seen) == list(range(n))


def test_sgraf_s_options_say_nothing_of_regions(regions, vocab):
    from data import get_loaders, get_test_loader

    opt = sgraf_opt(regions)
    train_loader, _ = get_loaders("f30k_precomp", vocab, opt.batch_size, opt.workers, opt)
    test_loader = get_test_loader("test", "f30k_precomp", vocab, 3, 0, opt)
    images, captions, lengths, ids = next(iter(test_loader))
    check(images, captions, lengths, ids, features_of(regions, "f30k_precomp", "test"), vocab)
    assert sum(len(batch[3]) for batch in train_loader) == 60


def test_vsrn_calls_with_a_crop_size_over_regions(regions, vocab):
    from data import get_loaders, get_test_loader

    opt = Namespace(**{**vars(sgraf_opt(regions)), "crop_size": 224, "dim_vid": 8})
    train_loader, _ = get_loaders("f30k_precomp", vocab, 224, 16, 0, opt)
    assert [len(batch) for batch in train_loader] == [4] * 4
    loader = get_test_loader("test", "f30k_precomp", vocab, opt.crop_size, 16, 0, opt)
    images, captions, lengths, ids = next(iter(loader))
    check(images, captions, lengths, ids, features_of(regions, "f30k_precomp", "test"), vocab)


def with_mask(vocab):
    """The vocabulary as VSE-infinity's train.py makes it."""
    from vocab import Vocabulary

    masked = Vocabulary()
    for word in (*vocab.words, "<mask>"):
        masked.add_word(word)
    return masked


def regions_in(image):
    """The number of rows in front of an image's zero rows."""
    return max(place + 1 for place, row in enumerate(image) if any(value != 0 for value in row))


def test_vse_infty_s_batches_have_the_images_lengths(regions, vocab):
    import data

    opt, vocab = vse_infty_opt(regions / "f30k"), with_mask(vocab)
    _, val_loader = data.get_loaders(
        opt.data_path, opt.data_name, vocab, opt.batch_size, opt.workers, opt
    )
    features, seen = features_of(regions, "f30k/precomp", "dev"), []
    for images, image_lengths, captions, lengths, ids in val_loader:
        check(images, captions, lengths, ids, features, vocab)
        assert image_lengths.dtype == torch.float32
        assert image_lengths.tolist() == [regions_in(features[one // 5]) for one in ids]
        seen += ids
    assert sorted(seen) == list(range(25))


def test_vse_infty_s_training_set_is_augmented_at_its_rates(regions, vocab):
    import data

    opt, vocab = vse_infty_opt(regions / "f30k"), with_mask(vocab)
    train_loader, _ = data.get_loaders(opt.data_path, "f30k", vocab, 16, 0, opt)
    features = features_of(regions, "f30k/precomp", "train")
    kept, words, masked, whole = [0, 0], [0, 0], 0, sum(regions_in(one) for one in features) * 5
    for _ in range(40):
        for _images, image_lengths, captions, lengths, _ids in train_loader:
            kept[0] += int(image_lengths.sum())
            words[0] += sum(lengths)
            masked += int((captions == vocab("<mask>")).sum())
        kept[1] += whole
        words[1] += sum(
            len(word_ids(caption, vocab)) for i in range(12) for caption in captions_of(i)
        )
    assert kept[0] / kept[1] == pytest.approx(0.8, abs=0.02)  # of its regions, 80 %
    assert words[0] / words[1] == pytest.approx(0.92, abs=0.01)  # 8 % of its words are removed
    assert masked / words[1] == pytest.approx(0.1, abs=0.01)


def test_vse_infty_s_loader_says_what_it_needs(regions, vocab):
    import data

    opt = vse_infty_opt(regions / "f30k")
    with pytest.raises(InputError, match=r"call vocab.add_word\('<mask>'\) first"):
        data.get_loaders(opt.data_path, "f30k", vocab, 16, 0, opt)
    opt.precomp_enc_type = "backbone"
    with pytest.raises(InputError, match="backbone.*has no loader here: extract features"):
        data.get_loaders(opt.data_path, "f30k", with_mask(vocab), 16, 0, opt)


def test_vse_infty_s_test_loader_finds_its_folder_in_the_options(regions, vocab):
    import data

    opt = vse_infty_opt(regions / "f30k")
    loader = data.get_test_loader("test", opt.data_name, vocab, 8, opt.workers, opt)
    features = features_of(regions, "f30k/precomp", "test")
    for images, image_lengths, captions, lengths, ids in loader:
        check(images, captions, lengths, ids, features, vocab)
        assert [*map(int, image_lengths)] == [regions_in(features[one // 5]) for one in ids]


def test_vsepp_calls_by_keyword(drawn_data, vocab):
    import data

    opt = vsepp_opt(drawn_data)
    loader = data.get_test_loader(
        split_name="test",
        data_name="tiny_precomp",
        vocab=vocab,
        crop_size=32,
        batch_size=100,
        workers=0,
        opt=opt,
    )
    images, captions, lengths, ids = next(iter(loader))
    features = features_of(drawn_data, "tiny_precomp", "test")
    check(images, captions, lengths, ids, features, vocab)
    assert sorted(ids) == list(range(30))


def test_scan_calls_by_keyword(regions, vocab):
    import data

    opt = scan_opt(regions)
    _, val_loader = data.get_loaders(
        data_name="f30k_precomp", vocab=vocab, batch_size=25, workers=0, opt=opt
    )
    images, captions, lengths, ids = next(iter(val_loader))
    check(images, captions, lengths, ids, features_of(regions, "f30k_precomp", "dev"), vocab)


@pytest.mark.parametrize("opt_of", [vsepp_opt, hal_opt, scan_opt, sgraf_opt])
def test_the_options_are_left_as_they_are(regions, vocab, opt_of):
    import data

    opt = opt_of(regions)
    before = dict(vars(opt))
    data.get_loaders("f30k_precomp", vocab, 224, 16, 0, opt)
    data.get_test_loader("test", "f30k_precomp", vocab, 16, 0, scan_opt(regions))
    assert vars(opt) == before


def test_hal_s_epochs_are_in_different_orders(drawn_data, vocab):
    import data

    train_loader, _ = data.get_loaders("tiny_precomp", vocab, 224, 16, 0, hal_opt(drawn_data))
    first, second = ([i for batch in train_loader for i in batch[4]] for _ in range(2))
    assert first != second and sorted(first) == sorted(second) == list(range(60))


# PrecompDataset, collate_fn, get_precomp_loader --------------------------------------------------


def test_scan_reads_the_data_set_s_attributes(regions, vocab):
    from data import PrecompDataset

    dataset = PrecompDataset(str(regions / "f30k_precomp"), "test", vocab)
    features = features_of(regions, "f30k_precomp", "test")
    assert isinstance(dataset, torch.utils.data.Dataset)
    assert (len(dataset), dataset.length, dataset.im_div, len(dataset.images)) == (30, 30, 5, 6)
    assert dataset.vocab is vocab and dataset.captions[7] == captions_of(1)[2]
    image, target, index, img_id = dataset[7]
    assert np.array_equal(image, features[index // dataset.im_div].astype(np.float32))
    assert (target.tolist(), index, img_id) == (word_ids(captions_of(1)[2], vocab), 7, 1)


def test_vsepp_s_features_with_a_row_a_caption(tmp_path, vocab):
    from data import PrecompDataset

    rows = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32).repeat(5, 0)
    np.save(tmp_path / "train_ims.npy", rows)
    (tmp_path / "train_caps.txt").write_text("a dog\n" * 15)
    dataset = PrecompDataset(str(tmp_path), "train", vocab)
    assert (dataset.im_div, len(dataset.images), dataset.length) == (1, 15, 15)
    assert np.array_equal(dataset.images[7 // dataset.im_div], rows[7])


def test_vsrn_passes_its_options_to_the_data_set(regions, vocab):
    from data import PrecompDataset

    dataset = PrecompDataset(str(regions / "f30k_precomp"), "test", vocab, sgraf_opt(regions))
    assert dataset[12][1].tolist() == word_ids(captions_of(2)[2], vocab)


@pytest.mark.parametrize("workers", [0, 2])
def test_hal_s_data_set_goes_through_pytorch_s_loader(drawn_data, vocab, workers):
    from data import PrecompDataset, collate_fn

    dataset = PrecompDataset(str(drawn_data / "tiny_precomp"), "dev", vocab)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=7, shuffle=True, num_workers=workers, collate_fn=collate_fn
    )
    features, seen = features_of(drawn_data, "tiny_precomp", "dev"), []
    for images, captions, lengths, ids, indices in loader:
        check(images, captions, lengths, ids, features, vocab)
        seen += indices
    assert sorted(seen) == list(range(25))


def test_vsepp_s_data_set_goes_through_pytorch_s_loader_in_four_parts(drawn_data, vocab):
    from data import PrecompDataset, collate_fn

    dataset = PrecompDataset(str(drawn_data / "tiny_precomp"), "dev", vocab)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=25, collate_fn=partial(collate_fn, code="vsepp")
    )
    ((images, captions, lengths, ids),) = loader
    check(images, captions, lengths, ids, features_of(drawn_data, "tiny_precomp", "dev"), vocab)


def test_sgraf_s_own_collate_takes_the_items(regions, vocab):
    """Somebody's own function over our items of four."""
    from data import PrecompDataset

    def collate(items):
        items = sorted(items, key=lambda item: len(item[1]), reverse=True)
        images, words, ids, image_ids = zip(*items)
        padded = torch.zeros(len(words), len(words[0])).long()
        for row, own in zip(padded, words):
            row[: len(own)] = own
        assert [one // 5 for one in ids] == list(image_ids)
        return torch.stack(images, 0), padded, [len(own) for own in words], list(ids)

    dataset = PrecompDataset(str(regions / "f30k_precomp"), "test", vocab)
    loader = torch.utils.data.DataLoader(dataset, 16, True, collate_fn=collate)
    for batch in loader:
        check(*batch, features_of(regions, "f30k_precomp", "test"), vocab)


def test_vsepp_s_own_items_go_through_our_collate():
    """There words are floats, features arrays, and an item has four parts."""
    from data import collate_fn

    items = [
        (np.full(3, float(number), np.float32), torch.Tensor([1.0] * length), 40 + number, number)
        for number, length in enumerate([2, 4, 3])
    ]
    images, captions, lengths, ids = collate_fn(items, code="vsepp")
    assert images.tolist() == [[1.0] * 3, [2.0] * 3, [0.0] * 3]
    assert captions.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert captions.dtype == torch.int64 and (lengths, ids) == ([4, 3, 2], [41, 42, 40])


@pytest.mark.parametrize("opt_of, parts", [(vsepp_opt, 4), (hal_opt, 5)])
def test_vsepp_s_and_hal_s_get_precomp_loader(drawn_data, vocab, opt_of, parts):
    import os

    import data

    opt = opt_of(drawn_data)
    path = os.path.join(opt.data_path, "tiny_precomp")
    loader = data.get_precomp_loader(path, "dev", vocab, opt, 10, False, 2)
    features, seen = features_of(drawn_data, "tiny_precomp", "dev"), []
    for batch in loader:
        assert len(batch) == parts
        check(*batch[:4], features, vocab)
        seen += batch[3]
    assert sorted(seen) == list(range(25)) and len(loader) == 3


def test_scan_s_get_precomp_loader_shuffles_by_default(regions, vocab):
    import data

    path = str(regions / "f30k_precomp")
    loader = data.get_precomp_loader(path, "train", vocab, scan_opt(regions))
    ids = [one for _, _, _, own in loader for one in own]
    assert sorted(ids) == list(range(60)) and ids[:20] != sorted(ids[:20], reverse=True)
    assert len(loader) == 1  # batches of 100


# Photos -----------------------------------------------------------------------------------------


def test_vsepp_s_loader_of_photos_by_its_own_steps(drawn_data, vocab):
    import os

    import data

    opt = vsepp_opt(drawn_data)
    roots, ids = data.get_paths(os.path.join(opt.data_path, "f8k"), "f8k", opt.use_restval)
    transform = data.get_transform("f8k", "val", opt)
    loader = data.get_loader_single(
        "f8k",
        "val",
        roots["val"]["img"],
        roots["val"]["cap"],
        vocab,
        transform,
        ids=ids["val"],
        batch_size=4,
        shuffle=False,
        num_workers=0,
        collate_fn=partial(data.collate_fn, code="vsepp"),
    )
    seen = []
    for images, captions, lengths, numbers in loader:
        assert images.shape == (len(numbers), 3, 224, 224)
        for caption, length, number in zip(captions, lengths, numbers):
            own = word_ids(captions_of(4 + number // 5)[number % 5], vocab)  # after train's four
            assert caption[:length].tolist() == own
        seen += numbers
    assert sorted(seen) == list(range(10))
    photo = Image.open(drawn_data / "f8k/images/5.png").convert("RGB")
    first = loader.dataset[5][0]
    assert torch.equal(first, transform(photo))


def test_hal_s_photos_come_in_five_parts(drawn_data, vocab):
    import data

    loader = data.get_loaders("f8k", vocab, 32, 6, 0, hal_opt(drawn_data))[0]
    batches = list(loader)
    assert [len(batch) for batch in batches] == [5] * 4
    assert all(batch[0].shape == (len(batch[3]), 3, 32, 32) for batch in batches)
    assert sorted(one for batch in batches for one in batch[4]) == list(range(20))


@pytest.mark.parametrize("use_restval, n", [(False, 20), (True, 30)])
def test_vsepp_s_paths_of_coco(drawn_data, vocab, use_restval, n):
    import data

    roots, ids = data.get_paths(str(drawn_data / "coco"), "coco", use_restval)
    dataset = data.CocoDataset(
        root=roots["train"]["img"],
        json=roots["train"]["cap"],
        vocab=vocab,
        transform=data.get_transform("coco", "train", vsepp_opt(drawn_data)),
        ids=ids["train"],
    )
    assert len(dataset) == n and dataset[0][0].shape == (3, 32, 32)
    order = [2, 0, 3, 1, 8, 9]  # the images in the ids' order, restval last
    assert dataset.captions == [c for i in order[: n // 5] for c in captions_of(i)]
    assert ids["val"].tolist() == [40, 41, 42, 43, 44, 50, 51, 52, 53, 54]
    assert roots["val"]["img"].endswith("images/val2014")


# Left out ---------------------------------------------------------------------------------------


def test_vse_infty_s_classes_are_left_out_with_a_sentence():
    from data import PrecompRegionDataset, RawImageDataset

    with pytest.raises(InputError, match="PrecompRegionDataset is left out here: use PrecompData"):
        PrecompRegionDataset("data", "f30k", "train", None, None, True)
    with pytest.raises(InputError, match="RawImageDataset is left out here: use FlickrDataset"):
        RawImageDataset("data", "f30k", "train", None, None, True)


def test_a_name_that_no_code_has_is_missing():
    import data

    assert not hasattr(data, "get_everything")
    with pytest.raises(ImportError):
        from data import get_everything  # noqa: F401
