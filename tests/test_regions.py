"""VSE over regions from the command line.

Training with every pooling, augmentation, resuming, VSE-infinity's files.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch

import compute_results
import train
from data import PrecompDataset
from features.files import open_features
from inputs.tokenizer import SPECIAL_WORDS
from runtime.errors import InputError
from tests.helpers.made import REFERENCE, TINY, captions_of, load, states_equal
from vocab import vocabulary_of

REGIONS = 5

VSE_INFTY = REFERENCE / "vse_infty" / "released_checkpoint"

RECIPE = [
    "--precomp_enc_type",
    "mlp",
    "--image_pooling",
    "gpo",
    "--text_pooling",
    "gpo",
    "--bi_gru",
    "--drop_words",
    "0.2",
    "--drop_regions",
    "0.2",
    "--weight_decay",
    "0.01",
    "--max_violation",
    "--warmup_epochs",
    "1",
]


def write_regions(
    folder, splits=(("train", 12), ("dev", 5), ("test", 6)), regions=REGIONS, width=8
):
    """A data set of regions; images with fewer are padded with zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    for split, images in splits:
        features = rng.standard_normal((images, regions, width)).astype(np.float16)
        features[::3, regions - 2 :] = 0
        np.save(folder / f"{split}_ims.npy", features)
        (folder / f"{split}_caps.txt").write_text(
            "".join(f"{caption}\n" for image in range(images) for caption in captions_of(image))
        )


@pytest.fixture
def regions(tmp_path, monkeypatch):
    """A current folder with data of regions beside the same of vectors."""
    write_regions(tmp_path / "data" / "tiny_precomp")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--image_pooling", "max", "--text_pooling", "max"],
        ["--image_pooling", "kmax", "--text_pooling", "kmax"],
        ["--image_pooling", "gpo", "--bi_gru"],
        ["--text_pooling", "mean", "--bi_gru", "--no_txtnorm", "--amp", "bf16"],
        ["--memory_bank", "--mb_rate", "0.5", "--mb_k", "5", "--image_pooling", "gpo"],
        RECIPE,
    ],
    ids=" ".join,
)
def test_every_pooling_trains_and_its_checkpoint_evaluates(regions, capsys, flags):
    train.main([*TINY, *flags])
    content = load("runs/runX/model_best.pth.tar")
    pooling = flags[flags.index("--image_pooling") + 1] if "--image_pooling" in flags else "mean"
    assert (content["opt"].regions, content["opt"].image_pooling) == (REGIONS, pooling)
    best = f"rsum: {content['best_rsum']:.1f}"
    assert best in capsys.readouterr().out.splitlines()
    compute_results.main(["--split", "dev", "--hubness", "--correction", "nnn"])
    assert capsys.readouterr().out.startswith(best)


def test_an_augmented_run_goes_on_to_the_same_weights(regions):
    train.main([*TINY, *RECIPE, "--logger_name", "runs/whole"])
    train.main([*TINY, *RECIPE, "--num_epochs", "1", "--save_step", "3", "--save_all"])
    train.main([*TINY, *RECIPE, "--resume", "runs/runX/checkpoint.pth.tar"])
    assert states_equal(
        load("runs/whole/checkpoint.pth.tar")["model"],
        load("runs/runX/checkpoint.pth.tar")["model"],
    )


def test_a_run_is_not_resumed_on_data_with_other_regions(regions):
    train.main([*TINY, "--num_epochs", "1"])
    write_regions(regions / "data" / "tiny_precomp", regions=4)
    with pytest.raises(
        InputError, match="data with 5 regions an image, and these have 4: give the same data"
    ):
        train.main([*TINY, "--resume", "auto"])


def test_augmentation_follows_from_seed_and_epoch_alone(regions):
    words = vocabulary_of([*SPECIAL_WORDS, "a", "dog", "the", "<mask>"])
    dataset = PrecompDataset("data/tiny_precomp", "train", words)
    dataset.augment(0.4, 0.4, words, seed=5)
    plain = list(dataset.load([torch.arange(60)]))[0]
    one, again, other = (
        list(dataset.load(batches, epoch=epoch, augmented=True))
        for batches, epoch in (
            ([torch.arange(60)], 1),
            ([torch.arange(30), torch.arange(30, 60)], 1),
            ([torch.arange(60)], 2),
        )
    )

    def by_caption(batches):
        """{caption: (its region rows, its words)}"""
        found = {}
        for images, captions, lengths, _, indices in batches:
            for image, words, n, index in zip(images, captions, lengths, indices.tolist()):
                found[index] = image[image.any(1)].tolist(), words[:n].tolist()
        return found

    assert by_caption(one) == by_caption(again) != by_caption(other)
    whole = by_caption([plain])
    for index, (rows, ids) in by_caption(one).items():
        assert (
            all(row in whole[index][0] for row in rows)
            and 1 <= len(rows)
            and 1 <= len(ids) <= len(whole[index][1])
        )
    assert sum(len(rows) for rows, _ in by_caption(one).values()) < 0.8 * sum(
        len(rows) for rows, _ in whole.values()
    )
    assert any(words("<mask>") in ids for _, ids in by_caption(one).values())
    assert not any(words("<mask>") in ids for _, ids in whole.values())


def test_the_vocabulary_gets_a_mask_and_its_file_does_not(regions):
    train.main([*TINY, "--drop_words", "0.2", "--num_epochs", "0"])
    words = json.loads((regions / "vocab" / "tiny_precomp_vocab.json").read_text())["word2idx"]
    train.main(
        [*TINY, "--drop_words", "0.2", "--num_epochs", "1"]
    )  # a file that is there gets it, too
    content = load("runs/runX/checkpoint.pth.tar")
    assert "<mask>" not in words and content["vocabulary"] == [*words, "<mask>"]


def test_words_are_not_dropped_for_a_model_that_has_no_mask(regions):
    train.main([*TINY, "--num_epochs", "1"])
    with pytest.raises(InputError, match="--drop_words needs the word <mask>, but the model"):
        train.main(
            [
                *TINY,
                "--drop_words",
                "0.2",
                "--init_from",
                "runs/runX/checkpoint.pth.tar",
                "--num_epochs",
                "1",
                "--logger_name",
                "runs/other",
            ]
        )
    assert not os.path.exists("runs/other")


def test_a_released_checkpoint_of_vse_infinity_prints_its_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = json.loads((VSE_INFTY / "expected.json").read_text())
    folder = VSE_INFTY / expected["run"]
    compute_results.main(
        [
            "--model_path",
            str(folder / "model_best.pth"),
            "--data_name",
            "precomp",
            "--data_path",
            str(VSE_INFTY / "data" / "f30k"),
            "--vocab_path",
            str(VSE_INFTY / "vocab"),
        ]
    )
    output = capsys.readouterr()
    assert (
        output.out.splitlines()[:5] == expected["printed"][1:]
        and expected["printed"][0] in output.err
    )
    ranks, arrays = (
        torch.load("ranks.pth.tar", weights_only=True),
        dict(np.load(VSE_INFTY / "expected.npz")),
    )
    for side, name in (("rt", "i2t"), ("rti", "t2i")):
        assert np.array_equal(ranks[side][0], arrays[f"{name}_ranks"]) and np.array_equal(
            ranks[side][1], arrays[f"{name}_top1"]
        )


def test_a_data_parallel_checkpoint_opens_as_without_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = json.loads((VSE_INFTY / "expected.json").read_text())
    content = load(VSE_INFTY / expected["run"] / "model_best.pth")
    content["model"] = [
        {f"module.{name}": value for name, value in state.items()} for state in content["model"]
    ]
    torch.save(
        content, "model_best.pth", _use_new_zipfile_serialization=False
    )  # the legacy format, as torch 1.2's
    compute_results.main(
        [
            "--model_path",
            "model_best.pth",
            "--data_path",
            str(VSE_INFTY / "data" / "f30k"),
            "--vocab_path",
            str(VSE_INFTY / "vocab"),
        ]
    )
    assert capsys.readouterr().out.splitlines() == expected["printed"][1:]


def test_vse_infinity_s_weights_may_be_started_from(regions, monkeypatch):
    """On data of the same width, with its recipe's model."""
    expected = json.loads((VSE_INFTY / "expected.json").read_text())
    source = VSE_INFTY / expected["run"] / "model_best.pth"
    write_regions(regions / "data" / "f30k_precomp", width=20)
    train.main(
        [
            *TINY,
            *RECIPE,
            "--data_name",
            "f30k_precomp",
            "--vocab_path",
            str(VSE_INFTY / "vocab"),
            "--embed_size",
            "24",
            "--word_dim",
            "14",
            "--init_from",
            str(source),
            "--num_epochs",
            "0",
        ]
    )
    train.main(
        [
            *TINY,
            *RECIPE,
            "--data_name",
            "f30k_precomp",
            "--vocab_path",
            str(VSE_INFTY / "vocab"),
            "--embed_size",
            "24",
            "--word_dim",
            "14",
            "--init_from",
            str(source),
            "--num_epochs",
            "1",
        ]
    )
    assert load("runs/runX/checkpoint.pth.tar")["opt"].image_pooling == "gpo"


# Bad input --------------------------------------------------------------------------------------


def refused(main, flags, *parts):
    with pytest.raises(InputError) as caught:
        main(flags)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_model_over_regions_refuses_vectors_and_other_regions(regions):
    train.main([*TINY, "--num_epochs", "1"])
    shutil.copytree("data", "other")
    write_regions(regions / "other" / "tiny_precomp", regions=REGIONS + 1)
    refused(compute_results.main, ["--data_path", "other"], "6 regions", "trained on 5")
    write_regions(regions / "other" / "tiny_precomp", width=9)
    refused(compute_results.main, ["--data_path", "other"], "width 9", "8")
    np.save("other/tiny_precomp/test_ims.npy", np.ones((6, 8), np.float32))
    refused(compute_results.main, ["--data_path", "other"], "over regions", "(6, 8)")


def test_a_model_over_vectors_refuses_regions(workdir):
    train.main([*TINY, "--num_epochs", "1"])
    np.save("data/tiny_precomp/test_ims.npy", np.ones((6, 5, 8), np.float32))
    refused(compute_results.main, [], "over vectors", "5 regions")


@pytest.mark.parametrize(
    "flags",
    [["--image_pooling", "gpo"], ["--precomp_enc_type", "mlp"], ["--drop_regions", "0.1"]],
    ids=" ".join,
)
def test_vectors_have_no_regions_to_pool(workdir, flags):
    refused(train.main, [*TINY, *flags], "over regions", "(12, 8)")


def test_photos_are_not_dropped_from(workdir):
    refused(
        train.main,
        [
            *TINY,
            "--data_name",
            "f8k",
            "--cnn_type",
            "resnet18",
            "--cnn_weights",
            "none",
            "--drop_words",
            "0.1",
        ],
        "--drop_words",
        "photos",
    )


def test_a_checkpoint_from_before_these_flags_resumes_with_their_defaults_alone(workdir):
    train.main([*TINY, "--num_epochs", "1"])
    path = "runs/runX/checkpoint.pth.tar"
    content = load(path)
    for name in (
        "image_pooling",
        "text_pooling",
        "bi_gru",
        "precomp_enc_type",
        "no_txtnorm",
        "drop_words",
        "drop_regions",
        "weight_decay",
    ):
        delattr(content["opt"], name)
    torch.save(content, path)
    for flag in (
        ["--bi_gru"],
        ["--text_pooling", "max"],
        ["--weight_decay", "0.1"],
        ["--no_txtnorm"],
    ):
        refused(train.main, [*TINY, *flag, "--resume", path], flag[0], "was")
    train.main([*TINY, "--resume", path])
    assert load(path)["epoch"] == 2


def test_files_of_zeros_are_refused_and_single_images_of_zeros_counted(regions, capsys):
    features = np.ones((70, 3, 4), np.float32)
    features[[0, 69]] = 0
    np.save("some.npy", features)
    open_features("some.npy")
    assert "some.npy has 70 rows, of which 2 all zero and" in capsys.readouterr().err
    np.save("all.npy", np.zeros((4, 3, 4), np.float32))
    refused(open_features, "all.npy", "nothing but zeros")


def test_a_file_is_looked_at_in_pieces(regions, monkeypatch):
    monkeypatch.setattr("features.files.CHECKED_BYTES", 3 * 4 * 4 * 7)
    features = np.ones((70, 3, 4), np.float32)
    features[64, 1, 2] = np.nan
    np.save("nan.npy", features)
    looked_at = []
    true = np.abs
    monkeypatch.setattr(
        "features.files.np.abs", lambda rows: (looked_at.append(rows.nbytes), true(rows))[1]
    )
    refused(open_features, "nan.npy", "row 64")
    assert max(looked_at) <= 3 * 4 * 4 * 7
