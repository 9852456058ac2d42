"""features.json: read back, refused, and compared."""

import json

import pytest

from features.description import read_features_json, refuse_other, same_encoder
from features.encoders import build_encoder
from runtime.errors import InputError

SMALL = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def described():
    return {**build_encoder(SMALL, "none").description, "dtype": "float32", "amp": "off"}


def test_what_features_json_says_is_read_back(tmp_path, described):
    assert read_features_json(tmp_path) is None
    (tmp_path / "features.json").write_text(json.dumps(described))
    assert read_features_json(tmp_path) == described


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"format": 2}, "format 2, newer"),
        ({"format": "1"}, "does not describe features"),
        ({"encoder": None}, "lacks 'encoder'"),
        ({"regions": "36"}, "'regions'"),
        ({"versions": []}, "'versions'"),
    ],
)
def test_a_features_json_that_is_odd_is_refused(tmp_path, described, change, reason):
    (tmp_path / "features.json").write_text(json.dumps({**described, **change}))
    with pytest.raises(InputError, match=reason):
        read_features_json(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}"])
def test_a_features_json_that_is_torn_is_refused(tmp_path, content):
    (tmp_path / "features.json").write_text(content)
    with pytest.raises(InputError, match="features.json"):
        read_features_json(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "resnet18"},
        {"weights_sha256": "0"},
        {"pooling": "10crop"},
        {"regions": 36},
        {"size": 225},
        {"normalised": True},
        {"resize": 224},
        {"mean": [0, 0, 0]},
        {"width": 3},
    ],
)
def test_other_encoders_are_refused(described, change):
    other = {**described, **change}
    assert not same_encoder(described, other)
    with pytest.raises(
        InputError, match="^data/a has features by .*, but checkpoint b has them by .*: extract"
    ):
        refuse_other(other, described, "data/a", "checkpoint b")


@pytest.mark.parametrize(
    "change", [{"versions": {}}, {"dtype": "float16"}, {"weights": "net.pth"}, {"amp": "bf16"}]
)
def test_the_same_encoder_may_come_from_elsewhere(described, change):
    assert same_encoder(described, {**described, **change})
    refuse_other(described, {**described, **change}, "data/a", "checkpoint b")
