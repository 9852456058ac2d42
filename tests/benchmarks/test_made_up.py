"""Made-up data: what it is said to be, whatever it is made of."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from benchmarks import made_up
from runtime.errors import InputError


def test_captions_have_eight_to_fifteen_words_of_the_vocabulary_and_follow_the_generator():
    lines = made_up.make_captions(200, np.random.default_rng(1))
    assert lines == made_up.make_captions(200, np.random.default_rng(1))
    known = set(made_up.made_up_vocabulary().words)
    for line in lines:
        *words, stop = line.split(" ")
        assert 8 <= len(words) <= 15 and stop == "." and set(words) <= known
    assert {len(line.split(" ")) - 1 for line in lines} == set(range(8, 16))


def test_a_data_set_has_its_rows_and_its_captions(tmp_path, monkeypatch):
    lines = [f"caption {number} ." for number in range(10)]
    made_up.make_data(tmp_path, lines, 4098, 3, np.random.default_rng(1))
    features = np.load(tmp_path / "train_ims.npy")
    assert features.shape == (4098, 3) and features.dtype == np.float32
    assert features.any(1).all() and len(np.unique(features, axis=0)) == 4098
    assert (tmp_path / "train_caps.txt").read_text().splitlines() == lines


def test_captions_embeddings_lie_near_their_image_s():
    images, captions = made_up.made_up_embeddings(20, 64, "cpu")
    assert images.shape == (20, 64) and captions.shape == (100, 64)
    for rows in (images, captions):
        assert rows.norm(dim=1).sub(1).abs().max() < 1e-5
    own = [float(images[number // 5] @ captions[number]) for number in range(100)]
    others = [float(images[(number // 5 + 7) % 20] @ captions[number]) for number in range(100)]
    assert sum(own) / 100 > 0.15 and abs(sum(others) / 100) < 0.05
    assert torch.equal(images, made_up.made_up_embeddings(20, 64, "cpu")[0])


def test_captions_of_a_file_make_a_vocabulary_of_words_that_come_four_times(tmp_path):
    (tmp_path / "caps.txt").write_text("a red dog\n" * 4 + "a cat\n" * 3 + "a bird\n")
    options = Namespace(images=4, captions_per_image=2, captions=str(tmp_path / "caps.txt"))
    captions, vocabulary = made_up.captions_and_words(options, None)
    assert captions == ["a red dog"] * 4 + ["a cat"] * 3 + ["a bird"]
    assert vocabulary.words[4:] == ["a", "red", "dog"]
    options.images = 5
    with pytest.raises(InputError, match="has 8 captions, 10 are needed"):
        made_up.captions_and_words(options, None)
