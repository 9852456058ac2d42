"""texts.json: which text model made the vectors, and of which captions."""

import hashlib
import json

import pytest

from features.text_description import hash_captions, read_texts_json, refuse_other
from runtime.errors import InputError

WHOLE = {
    "format": 1,
    "encoder": "open_clip/ViT-B-32",
    "weights_sha256": "0" * 64,
    "width": 512,
    "normalised": True,
    "captions_sha256": {"test": "1" * 64},
}


def test_captions_are_hashed_in_their_order():
    assert hash_captions(["a", "é"]) == hashlib.sha256("a\né".encode()).hexdigest()
    assert hash_captions(["a", "b"]) != hash_captions(["b", "a"])


def test_a_whole_description_is_read_and_a_folder_without_one_has_none(tmp_path):
    assert read_texts_json(tmp_path) is None
    (tmp_path / "texts.json").write_text(json.dumps(WHOLE))
    assert read_texts_json(tmp_path) == WHOLE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "1"}, "does not describe text vectors"),
        ({"format": 2}, "newer than this program's 1"),
        ({"width": "512"}, "lacks 'width'"),
        ({"captions_sha256": None}, "lacks 'captions_sha256'"),
    ],
)
def test_a_broken_description_is_one_sentence(tmp_path, change, said):
    (tmp_path / "texts.json").write_text(json.dumps({**WHOLE, **change}))
    with pytest.raises(InputError, match=said):
        read_texts_json(tmp_path)


def test_vectors_of_another_model_are_named():
    refuse_other(WHOLE, {**WHOLE, "captions_sha256": {}}, "data/x_precomp")
    with pytest.raises(InputError, match="width 512, but .* width 384, with other width"):
        refuse_other(WHOLE, {**WHOLE, "width": 384}, "data/x_precomp")
