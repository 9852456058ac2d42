"""Vocabularies: built from captions, written, read, and refused."""

import json
import os
import pickle
import pickletools
from collections import OrderedDict

import pytest

import vocab
from inputs.tokenizer import tokenize
from runtime.errors import InputError
from tests.helpers.made import REFERENCE, RELEASED, run_script, tree
from vocab import (
    Vocabulary,
    build_vocab,
    find_vocabulary,
    read_vocabulary,
    vocabulary_of,
    write_vocabulary,
)

VSE_INFTY = REFERENCE / "vse_infty"

SPECIAL = ["<pad>", "<start>", "<end>", "<unk>"]

WORDS = [*SPECIAL, "dog", "b'a", "caf\u00e9", "'", "\\xc3"]


def test_the_family_reads_a_caption_file_by_its_own_name(tmp_path):
    (tmp_path / "caps.txt").write_bytes("A dog.\n\n Un café \n".encode())
    assert vocab.from_txt(str(tmp_path / "caps.txt")) == ["A dog.", "", "Un café"]


# Vocabulary -------------------------------------------------------------------------------------


def test_words_are_numbered_in_the_order_they_come():
    vocabulary = Vocabulary()
    for word in ["<unk>", "dog", "cat", "dog"]:
        vocabulary.add_word(word)
    assert [vocabulary(word) for word in ("dog", "cat", "<unk>", "horse", "")] == [1, 2, 0, 0, 0]
    assert len(vocabulary) == vocabulary.idx == 3
    assert vocabulary.word2idx == {"<unk>": 0, "dog": 1, "cat": 2}
    assert vocabulary.idx2word == {0: "<unk>", 1: "dog", 2: "cat"}
    assert vocabulary.words == ["<unk>", "dog", "cat"]


@pytest.mark.parametrize(
    "words",
    [[], ["dog"], SPECIAL[:3], ["<start>", "<pad>", "<end>", "<unk>"], ["dog", *SPECIAL]],
    ids=str,
)
def test_words_that_lack_the_special_ones_in_front_are_refused(words):
    with pytest.raises(InputError, match="special words"):
        vocabulary_of(words)


def test_words_that_come_twice_are_refused():
    with pytest.raises(InputError, match="twice"):
        vocabulary_of([*SPECIAL, "dog", "cat", "dog"])


@pytest.mark.parametrize("threshold", [1, 3, 4, 5, 40])
def test_words_from_the_threshold_on_stand_in_order_of_first_appearance(drawn_data, threshold):
    counts = {}
    for split in ("train", "dev"):
        for line in (drawn_data / "tiny_precomp" / f"{split}_caps.txt").read_text().splitlines():
            for word in tokenize(line):
                counts[word] = counts.get(word, 0) + 1
    expected = SPECIAL + [word for word, count in counts.items() if count >= threshold]
    assert build_vocab(str(drawn_data), "tiny_precomp", threshold=threshold).words == expected


@pytest.mark.parametrize("words", [SPECIAL, [*SPECIAL, "<mask>"]], ids=len)
def test_a_vocabulary_of_special_words_alone_is_refused(tmp_path, words):
    numbers = {word: number for number, word in enumerate(words)}
    (tmp_path / "x_precomp_vocab.json").write_text(json.dumps({"word2idx": numbers}))
    for act in (
        lambda: vocabulary_of(words),
        lambda: read_vocabulary(str(tmp_path / "x_precomp_vocab.json")),
    ):
        with pytest.raises(InputError, match="no word but the special ones.*spaces between words"):
            act()


def test_captions_without_spaces_make_no_vocabulary(tmp_path):
    (tmp_path / "x_precomp").mkdir()
    for split in ("train", "dev"):
        lines = [
            f"\u4e00\u53ea{colour}\u72d7\u5728{place}"
            for colour in "\u7ea2\u84dd\u7eff"
            for place in "\u5c71\u6cb3\u96ea"
        ]
        (tmp_path / "x_precomp" / f"{split}_caps.txt").write_text(
            "\n".join(lines) + "\n", encoding="utf-8"
        )
    with pytest.raises(
        InputError, match="x_precomp.*at least 4 times.*no word but the special ones"
    ):
        build_vocab(str(tmp_path), "x_precomp")


def test_four_times_is_enough_by_default_and_three_is_not(tmp_path):
    (tmp_path / "x_precomp").mkdir()
    (tmp_path / "x_precomp" / "train_caps.txt").write_text("three four\nthree four\n")
    (tmp_path / "x_precomp" / "dev_caps.txt").write_text("Three FOUR\nfour\n")
    (tmp_path / "x_precomp" / "test_caps.txt").write_text("three test test test test\n")
    assert build_vocab(str(tmp_path), "x_precomp").words == [*SPECIAL, "four"]


@pytest.mark.parametrize("name", ["f8k", "coco"])
def test_the_json_sets_captions_are_counted(drawn_data, name):
    words = build_vocab(str(drawn_data), name, threshold=1).words
    assert words[:4] == SPECIAL and words[4:9] == ["a", "red", "dog", "on", "the"]


def test_the_caption_files_can_be_given(drawn_data):
    words = build_vocab(
        str(drawn_data), "tiny_precomp", jsons={"tiny_precomp": ["dev_caps.txt"]}, threshold=6
    ).words
    assert "bird" not in words and "dog" in words


@pytest.mark.parametrize(
    "content", [{}, {"annotations": [{}]}, {"annotations": [{"caption": None}]}, []], ids=str
)
def test_coco_annotations_without_captions_are_refused(tmp_path, content):
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "captions_train2014.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"captions_train2014\.json"):
        build_vocab(str(tmp_path), "coco")


# Files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "pkl"])
def test_a_written_vocabulary_reads_back_the_same(tmp_path, suffix):
    path = str(tmp_path / f"x_vocab.{suffix}")
    write_vocabulary(vocabulary_of(WORDS), path)
    assert read_vocabulary(path).words == WORDS
    assert os.listdir(tmp_path) == [f"x_vocab.{suffix}"]


def test_the_json_file_is_of_scan_s_format(tmp_path):
    write_vocabulary(vocabulary_of(WORDS), str(tmp_path / "x_vocab.json"))
    content = json.loads((tmp_path / "x_vocab.json").read_text(encoding="utf-8"))
    assert content == {
        "word2idx": {word: place for place, word in enumerate(WORDS)},
        "idx2word": {str(place): word for place, word in enumerate(WORDS)},
        "idx": len(WORDS),
    }


def globals_of(path):
    """The (module, name) pairs a pickle asks for."""
    found, strings = [], []
    for opcode, argument, _ in pickletools.genops(path.read_bytes()):
        if opcode.name == "GLOBAL":
            found.append(tuple(argument.split(" ")))
        elif opcode.name == "STACK_GLOBAL":
            found.append(tuple(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    return found


def test_the_pickle_is_the_released_code_s(tmp_path):
    """It names vocab.Vocabulary, and any Python 3's own unpickler reads its three attributes."""
    path = tmp_path / "x_vocab.pkl"
    write_vocabulary(vocabulary_of(WORDS), str(path))
    assert ("vocab", "Vocabulary") in globals_of(path)
    assert {module for module, _ in globals_of(path)} <= {
        "vocab",
        "copyreg",
        "copy_reg",
        "__builtin__",
        "builtins",
    }
    with open(path, "rb") as file:
        record = pickle.load(file)
    assert type(record) is Vocabulary
    assert vars(record) == {
        "word2idx": {word: place for place, word in enumerate(WORDS)},
        "idx2word": dict(enumerate(WORDS)),
        "idx": len(WORDS),
    }


def test_the_released_pickle_is_read():
    words = read_vocabulary(str(RELEASED / "vocab" / "f8k_precomp_vocab.pkl")).words
    assert len(words) == 62 and words[:4] == SPECIAL


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("module", ["vocab", "__main__"])
def test_pickles_of_python_3_and_both_class_names_are_read(tmp_path, monkeypatch, module, protocol):
    vocabulary = vocabulary_of(WORDS)
    monkeypatch.setattr(Vocabulary, "__module__", module)
    if module == "__main__":
        import __main__

        monkeypatch.setattr(__main__, "Vocabulary", Vocabulary, raising=False)
    path = tmp_path / "x_vocab.pkl"
    path.write_bytes(pickle.dumps(vocabulary, protocol=protocol))
    assert read_vocabulary(str(path)).words == WORDS


def test_a_pickle_of_python_2_is_read(tmp_path):
    """There plain strings are bytes and tokenized words are unicode."""
    plain = [b"U" + bytes([len(word)]) + word.encode() for word in SPECIAL]
    words = [*plain, b"X\x05\0\0\0caf\xc3\xa9"]
    numbers = [b"K" + bytes([place]) for place in range(len(words))]
    word2idx = b"}(" + b"".join(word + number for word, number in zip(words, numbers)) + b"u"
    idx2word = b"}(" + b"".join(number + word for word, number in zip(words, numbers)) + b"u"
    state = b"}(U\x08word2idx" + word2idx + b"U\x08idx2word" + idx2word + b"U\x03idxK\x05u"
    (tmp_path / "x_vocab.pkl").write_bytes(b"\x80\x02cvocab\nVocabulary\n)\x81" + state + b"b.")
    assert read_vocabulary(str(tmp_path / "x_vocab.pkl")).words == [*SPECIAL, "caf\u00e9"]


class Smuggled:
    """Calls `function` with `arguments` when a pickle of it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "os.system": lambda: pickle.dumps(Smuggled(os.system, "touch smuggled")),
    "eval": lambda: pickle.dumps(Smuggled(eval, "open('smuggled', 'w')")),
    "os.system in the words": lambda: pickle.dumps(
        {"word2idx": {"<pad>": Smuggled(os.system, "touch smuggled")}}
    ),
    "through the class's module": lambda: (
        b"\x80\x04\x8c\x05vocab\x8c\x09os.system\x93\x8c\x0etouch smuggled\x85R."
    ),
    "another class of the module": lambda: b"cvocab\nArgumentParser\n(S'x'\ntR.",
    "a call of the class": lambda: b"cvocab\nVocabulary\n(S'touch smuggled'\ntR.",
    "a class of no harm": lambda: pickle.dumps(OrderedDict(a=1)),
    "a persistent id": lambda: b"Pos.system\n.",
    "an extension": lambda: b"\x80\x02\x82\x01.",
    "a mark without a list": lambda: b"(.",
    "nothing": lambda: b"",
    "text": lambda: b"not a pickle\n",
    "another object": lambda: pickle.dumps([1, 2]),
    "the class without attributes": lambda: b"\x80\x02cvocab\nVocabulary\n)\x81.",
    "the class itself": lambda: b"cvocab\nVocabulary\n.",
    "attributes of another kind": lambda: b"\x80\x02cvocab\nVocabulary\n)\x81K\x05b.",
    "cut short": lambda: pickle.dumps(vocabulary_of(WORDS))[:-9],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_or_broken_pickle_is_refused_and_runs_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x_vocab.pkl").write_bytes(HOSTILE[kind]())
    with pytest.raises(InputError, match=r"x_vocab\.pkl") as caught:
        read_vocabulary("x_vocab.pkl")
    assert "\n" not in str(caught.value)
    assert list(tree(tmp_path)) == ["x_vocab.pkl"]


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"word2idx": []},
        {"word2idx": {"<pad>": 0}},
        {"word2idx": {"dog": 0}},
        {"word2idx": {**{word: place for place, word in enumerate(SPECIAL)}, "dog": 5}},
        {"word2idx": {**{word: place for place, word in enumerate(SPECIAL)}, "dog": 3}},
        {"word2idx": {**{word: place for place, word in enumerate(SPECIAL)}, "dog": "4"}},
        {"word2idx": {**{word: place for place, word in enumerate(SPECIAL)}, "dog": -1}},
        {"word2idx": {**{word: place for place, word in enumerate(SPECIAL)}, "dog": None}},
        {"word2idx": {**{word: place for place, word in enumerate(SPECIAL)}, "dog": [4]}},
        {"word2idx": {word: place for place, word in enumerate(reversed(SPECIAL))}},
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["json", "pkl"])
def test_a_vocabulary_that_cannot_number_captions_is_refused(tmp_path, content, suffix):
    path = tmp_path / f"x_vocab.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(content))
    else:
        record = Vocabulary()
        record.__dict__ = content if isinstance(content, dict) else {}
        path.write_bytes(pickle.dumps(record))
    with pytest.raises(InputError, match=rf"x_vocab\.{suffix}"):
        read_vocabulary(str(path))


NUMBERS = {word: place for place, word in enumerate(SPECIAL)}


@pytest.mark.parametrize(
    "content, named",
    [
        (
            '{"word2idx": {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3, "dog": 5, "cat": 4, "dog": 5}}',
            "'dog' twice",
        ),
        (
            '{"word2idx": {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3, "dog": 9, "dog": 4}}',
            "'dog' twice",
        ),
        (
            '{"word2idx": {"dog": 0}, "word2idx": {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3}}',
            "'word2idx' twice",
        ),
        (
            '{"word2idx": {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3, "a": 4}, "idx2word": '
            '{"0": "<pad>", "1": "<start>", "2": "<end>", "3": "<unk>", "4": "b", "4": "a"}}',
            "'4' twice",
        ),
    ],
    ids=["a word", "a word of two numbers", "a table", "a number"],
)
def test_a_json_vocabulary_with_a_key_twice_is_refused(tmp_path, content, named):
    (tmp_path / "x_vocab.json").write_text(content)
    with pytest.raises(InputError, match=rf"x_vocab\.json has {named}"):
        read_vocabulary(str(tmp_path / "x_vocab.json"))


@pytest.mark.parametrize(
    "idx2word",
    [
        {0: "<pad>", 1: "<start>", 2: "<end>", 3: "dog", 4: "<unk>"},
        {0: "<pad>", 1: "<start>", 2: "<end>", 3: "<unk>"},
        [*SPECIAL, "dog"],
        {0: "<pad>", 1: "<start>", 2: "<end>", 3: "<unk>", 4: "dog", 5: "cat"},
        {0: "<pad>", 1: "<start>", 2: "<end>", 3: "<unk>", 5: "dog"},
        {0: "<pad>", 1: "<start>", 2: "<end>", 3: "<unk>", 4: ["dog"]},
    ],
    ids=["swapped", "one less", "a list", "one more", "another number", "no word"],
)
@pytest.mark.parametrize("suffix", ["json", "pkl"])
def test_a_vocabulary_that_contradicts_itself_is_refused(tmp_path, idx2word, suffix):
    path = tmp_path / f"x_vocab.{suffix}"
    content = {"word2idx": {**NUMBERS, "dog": 4}, "idx2word": idx2word, "idx": 5}
    if suffix == "json":
        path.write_text(json.dumps(content))
    else:
        record = Vocabulary()
        record.__dict__ = content
        path.write_bytes(pickle.dumps(record))
    with pytest.raises(InputError, match=rf"x_vocab\.{suffix} contradicts itself"):
        read_vocabulary(str(path))


@pytest.mark.parametrize("more", [{}, {"idx2word": {}}, {"idx2word": None}], ids=str)
def test_a_json_vocabulary_without_idx2word_is_read(tmp_path, more):
    (tmp_path / "x_vocab.json").write_text(json.dumps({"word2idx": {**NUMBERS, "dog": 4}, **more}))
    assert read_vocabulary(str(tmp_path / "x_vocab.json")).words == [*SPECIAL, "dog"]


@pytest.mark.parametrize(
    "call",
    [
        lambda path: find_vocabulary(path, "x"),
        lambda path: vocab.main(["--data_name", "tiny_precomp", "--vocab_path", path]),
    ],
    ids=["reading", "writing"],
)
def test_a_file_in_place_of_the_folder_is_refused_by_the_flag(workdir, call):
    with pytest.raises(
        InputError, match="--vocab_path data/f8k/dataset_flickr8k.json is not a folder"
    ):
        call("data/f8k/dataset_flickr8k.json")


def test_an_absent_vocabulary_is_none(tmp_path):
    assert find_vocabulary(str(tmp_path), "x") is None


@pytest.mark.parametrize("suffixes", [["json"], ["pkl"], ["json", "pkl"]], ids=str)
def test_either_file_is_found(tmp_path, suffixes):
    for suffix in suffixes:
        write_vocabulary(vocabulary_of(WORDS), str(tmp_path / f"x_vocab.{suffix}"))
    assert find_vocabulary(str(tmp_path), "x").words == WORDS


def test_two_files_that_differ_are_refused_by_their_names(tmp_path):
    write_vocabulary(vocabulary_of(WORDS), str(tmp_path / "x_vocab.json"))
    write_vocabulary(vocabulary_of(WORDS[:-1]), str(tmp_path / "x_vocab.pkl"))
    with pytest.raises(InputError, match=r"x_vocab\.json.*x_vocab\.pkl"):
        find_vocabulary(str(tmp_path), "x")


# Script -----------------------------------------------------------------------------------------


def test_the_script_writes_both_files(workdir):
    run = run_script(
        "vocab.py", "--data_name", "tiny_precomp", "--vocab_path", "words", "--pickle", cwd=workdir
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(os.listdir(workdir / "words")) == [
        "tiny_precomp_vocab.json",
        "tiny_precomp_vocab.pkl",
    ]
    assert ("vocab", "Vocabulary") in globals_of(workdir / "words" / "tiny_precomp_vocab.pkl")
    words = json.loads((workdir / "words" / "tiny_precomp_vocab.json").read_text())["word2idx"]
    assert words == read_vocabulary(str(workdir / "words" / "tiny_precomp_vocab.pkl")).word2idx
    assert f"{len(words)} words" in run.stdout


def test_a_slash_after_the_data_set_s_name_is_no_part_of_it(workdir):
    vocab.main(["--data_name", "tiny_precomp/", "--threshold", "1"])
    assert os.listdir(workdir / "vocab") == ["tiny_precomp_vocab.json"]


def test_the_script_writes_json_alone_by_default(workdir, capsys):
    vocab.main(["--data_name", "f8k", "--threshold", "1"])
    assert os.listdir(workdir / "vocab") == ["f8k_vocab.json"]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--data_name", "absent_precomp"], "absent_precomp"),
        (["--data_name", "f30k"], "dataset_flickr30k.json"),
        (["--data_name", "tiny_precomp", "--threshold", "0"], "--threshold"),
        (
            ["--data_name", "tiny_precomp", "--vocab_path", "data/f8k/dataset_flickr8k.json"],
            "dataset_flickr8k.json",
        ),
    ],
    ids=str,
)
def test_the_script_s_bad_input_leaves_nothing_behind(workdir, flags, named):
    before = tree(workdir)
    with pytest.raises(InputError, match=named):
        vocab.main(flags)
    assert tree(workdir) == before
