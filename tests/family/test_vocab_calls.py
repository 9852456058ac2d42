"""vocab.py as the code of VSE++, SCAN, HAL, VSE-infinity and others calls it.

Each test is a few lines as such code has them, with its own imports.
"""

import json
import pickle
import sys

import numpy as np
import pytest

from runtime.errors import InputError
from tests.helpers.made import captions_of

SPECIAL = ["<pad>", "<start>", "<end>", "<unk>"]

WORDS = [*SPECIAL, "dog", "café", "."]

ANNOTATIONS = {
    "tiny_precomp": ["train_caps.txt", "dev_caps.txt"],
    "coco_precomp": ["train_caps.txt", "dev_caps.txt"],
}


TRAIN_AND_DEV = (*range(12), *range(5))  # the images of tiny_precomp's splits


def counted(images, threshold):
    """The words that the captions of these images have `threshold` times, by first appearance."""
    counts = {}
    for image in images:
        for caption in captions_of(image):
            for word in caption.lower().replace(".", " .").replace(",", " ,").split():
                counts[word] = counts.get(word, 0) + 1
    return [word for word, count in counts.items() if count >= threshold]


# SCAN and what came after it: JSON --------------------------------------------------------------


def test_scan_writes_and_reads_its_json(tmp_path):
    from vocab import Vocabulary, deserialize_vocab, serialize_vocab

    vocab = Vocabulary()
    for word in WORDS:
        vocab.add_word(word)
    serialize_vocab(vocab, str(tmp_path / "f30k_precomp_vocab.json"))
    with open(tmp_path / "f30k_precomp_vocab.json") as file:
        content = json.load(file)
    assert content["word2idx"]["dog"] == 4 and content["idx2word"]["5"] == "café"
    assert content["idx"] == 7
    found = deserialize_vocab(str(tmp_path / "f30k_precomp_vocab.json"))
    assert [found(word) for word in (*WORDS, "horse")] == [0, 1, 2, 3, 4, 5, 6, 3]
    assert len(found) == 7


def test_scan_fills_a_vocabulary_from_json_by_itself(tmp_path):
    """As its own reader does: idx2word's keys stay text."""
    from inputs.word_ids import number_words
    from vocab import Vocabulary

    numbers = {word: place for place, word in enumerate(WORDS)}
    vocab = Vocabulary()
    vocab.word2idx = numbers
    vocab.idx2word = {str(place): word for place, word in enumerate(WORDS)}
    vocab.idx = 7
    assert vocab.words == WORDS
    found = number_words(["A dog ."], vocab, cache_dir=str(tmp_path))
    assert found[0].tolist() == [1, 3, 4, 6, 2]


def test_sgraf_writes_to_a_path_object(tmp_path):
    from vocab import Vocabulary, deserialize_vocab, serialize_vocab

    vocab = Vocabulary()
    for word in WORDS:
        vocab.add_word(word)
    serialize_vocab(vocab, tmp_path / "vocab.json")
    assert deserialize_vocab(tmp_path / "vocab.json").word2idx["café"] == 5


def test_vse_infty_appends_its_mask(tmp_path):
    from vocab import deserialize_vocab

    content = {"word2idx": {word: place for place, word in enumerate(WORDS)}, "idx": 7}
    (tmp_path / "coco_precomp_vocab.json").write_text(json.dumps(content))
    vocab = deserialize_vocab(str(tmp_path / "coco_precomp_vocab.json"))
    vocab.add_word("<mask>")
    assert (len(vocab), vocab("<mask>"), vocab.word2idx["<mask>"], vocab.idx) == (8, 7, 7, 8)


def test_scan_builds_by_its_caption_file(drawn_data):
    from vocab import build_vocab

    by_name = build_vocab(str(drawn_data), "tiny_precomp", caption_file=ANNOTATIONS, threshold=20)
    by_place = build_vocab(str(drawn_data), "tiny_precomp", ANNOTATIONS, 20)
    assert by_name.words == by_place.words == SPECIAL + counted(TRAIN_AND_DEV, 20)
    only_dev = build_vocab(
        str(drawn_data), "tiny_precomp", caption_files=["dev_caps.txt"], threshold=2
    )
    assert only_dev.words == SPECIAL + counted(range(5), 2)


# VSE++, HAL: pickles and JSON captions ----------------------------------------------------------


def test_vsepp_builds_with_its_annotations(drawn_data):
    from vocab import build_vocab

    annotations = {"tiny_precomp": ["dev_caps.txt"], "f8k": ["dataset_flickr8k.json"]}
    vocab = build_vocab(str(drawn_data), "tiny_precomp", jsons=annotations, threshold=4)
    assert vocab.words == SPECIAL + counted(range(5), 4)
    one = build_vocab(str(drawn_data), "tiny_precomp", jsons="dev_caps.txt", threshold=4)
    assert one.words == vocab.words


def test_vsepp_reads_the_captions_of_json_files(drawn_data):
    from vocab import from_coco_json, from_flickr_json, from_txt

    expected = [caption for image in range(11) for caption in captions_of(image)]
    assert from_flickr_json(str(drawn_data / "f8k/dataset_flickr8k.json")) == expected
    coco = str(drawn_data / "coco/annotations/captions_train2014.json")
    assert from_coco_json(coco) == expected[:20]
    assert from_txt(str(drawn_data / "tiny_precomp/dev_caps.txt")) == expected[:25]


def test_vsepp_numbers_words_before_it_adds_the_unknown_one():
    from vocab import Vocabulary

    vocab = Vocabulary()
    vocab.add_word("dog")
    assert (vocab("dog"), vocab.word2idx, vocab.idx2word, vocab.idx) == (
        0,
        {"dog": 0},
        {0: "dog"},
        1,
    )


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("module", ["build_vocab", "lib.vocab", "vocab", "evil"])
def test_vsepp_s_pickle_of_any_module_is_read_and_none_is_imported(
    tmp_path, monkeypatch, module, protocol
):
    import vocab

    monkeypatch.chdir(tmp_path)
    kind = type("Vocabulary", (), {"__module__": module})
    record = kind()
    numbers = {word: place for place, word in enumerate(WORDS)}
    record.word2idx, record.idx = numbers, len(WORDS)
    record.idx2word = dict(enumerate(WORDS))
    with monkeypatch.context() as patched:
        for part in ("build_vocab", "lib", "lib.vocab", "evil"):
            patched.setitem(sys.modules, part, type(sys)(part))
        patched.setattr(sys.modules[module], "Vocabulary", kind, raising=False)
        content = pickle.dumps(record, protocol)
    (tmp_path / "evil.py").write_text("open('imported', 'w').close()\n")
    (tmp_path / "f8k_precomp_vocab.pkl").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert vocab.find_vocabulary(str(tmp_path), "f8k_precomp").words == WORDS
    assert "evil" not in sys.modules and not (tmp_path / "imported").exists()


def of_python_2(words, module=b"vocab"):
    """A pickle of Python 2, protocol 2, whose words are plain strings, hence bytes."""
    keys = [b"U" + bytes([len(word)]) + word for word in words]
    numbers = [b"K" + bytes([place]) for place in range(len(words))]
    forth = b"}(" + b"".join(key + number for key, number in zip(keys, numbers)) + b"u"
    back = b"}(" + b"".join(number + key for key, number in zip(keys, numbers)) + b"u"
    state = b"}(U\x08word2idx" + forth + b"U\x08idx2word" + back + b"U\x03idxK\x07u"
    return b"\x80\x02c" + module + b"\nVocabulary\n)\x81" + state + b"b."


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_vsepp_s_byte_words_of_python_2_are_read(tmp_path, encoding):
    from vocab import read_vocabulary

    (tmp_path / "x_vocab.pkl").write_bytes(of_python_2([word.encode(encoding) for word in WORDS]))
    assert read_vocabulary(str(tmp_path / "x_vocab.pkl")).words == WORDS


@pytest.mark.parametrize(
    "content",
    [
        b"cbuild_vocab\nVocabulary\n(S'touch smuggled'\ntR.",
        b"cos\nsystem\n(S'touch smuggled'\ntR.",
        b"ccopy_reg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.",
        b"ccopy_reg\n_reconstructor\n(c__builtin__\nobject\nc__builtin__\nobject\nNtR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
    ],
    ids=["called", "a function", "by the reconstructor", "an object", "eval"],
)
def test_a_pickle_with_anything_else_is_refused_and_runs_nothing(tmp_path, monkeypatch, content):
    from vocab import read_vocabulary

    monkeypatch.chdir(tmp_path)
    (tmp_path / "x_vocab.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"x_vocab\.pkl"):
        read_vocabulary("x_vocab.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["x_vocab.pkl"]


def test_hal_numbers_captions_by_hand(drawn_data):
    """As its loader does, one caption after the other."""
    from vocab import build_vocab

    vocab = build_vocab(str(drawn_data), "tiny_precomp", threshold=1)
    caption = [vocab("<start>"), *(vocab(word) for word in ("a", "red", "dog")), vocab("<end>")]
    assert np.array(caption)[[0, -1]].tolist() == [1, 2]
    words = counted(TRAIN_AND_DEV, 1)
    assert caption[1:-1] == [4 + words.index(word) for word in ("a", "red", "dog")]
