"""torchvision's CNNs: which are known, and which files of weights are accepted."""

import pytest
import torch

from layers.pretrained import cnn_types
from model import (
    EncoderImageFull,
)
from runtime.errors import InputError


def cnn_state(cnn_type):
    """A state dict in which all values of a tensor are the tensor's number: small on disk."""
    from torchvision import models

    names = (
        models.get_model(cnn_type, weights=None).state_dict() if cnn_type == "resnet18" else None
    )
    if names is None:
        with torch.device("meta"):
            names = models.get_model(cnn_type, weights=None).state_dict()
    return {
        name: torch.full((1,), place, dtype=value.dtype).expand(value.shape)
        if value.dim()
        else torch.tensor(place, dtype=value.dtype)
        for place, (name, value) in enumerate(names.items())
    }


@pytest.mark.parametrize(
    "cnn_type, first, last",
    [
        ("resnet18", "cnn.module.conv1.weight", "fc."),
        ("vgg11", "cnn.features.module.0.weight", "classifier.6."),
    ],
)
@pytest.mark.parametrize("with_last_layer", [True, False])
def test_cnn_weights_come_from_a_file_with_or_without_its_last_layer(
    tmp_path, cnn_type, first, last, with_last_layer
):
    state = cnn_state(cnn_type)
    if not with_last_layer:
        state = {name: value for name, value in state.items() if not name.startswith(last)}
    torch.save(state, tmp_path / "cnn.pth")
    encoder = EncoderImageFull(4, cnn_type=cnn_type, cnn_weights=str(tmp_path / "cnn.pth"))
    assert encoder.state_dict()[first].eq(0).all()
    second = next(
        name for name in encoder.state_dict() if name.startswith("cnn.") and name != first
    )
    assert encoder.state_dict()[second].eq(1).all()


@pytest.mark.parametrize(
    "content",
    ["absent", "folder", "text", "list", "other model", "missing name", "other shape", "code"],
)
def test_cnn_weights_that_do_not_fit_are_refused_by_their_flag(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)

    class Smuggled:
        def __reduce__(self):
            import os

            return os.system, ("touch smuggled",)

    state = cnn_state("resnet18")
    writers = {
        "absent": lambda: None,
        "folder": lambda: (tmp_path / "cnn.pth").mkdir(),
        "text": lambda: (tmp_path / "cnn.pth").write_text("not weights"),
        "list": lambda: torch.save([1, 2], "cnn.pth"),
        "other model": lambda: torch.save(cnn_state("vgg11"), "cnn.pth"),
        "missing name": lambda: torch.save(
            {k: v for k, v in state.items() if k != "conv1.weight"}, "cnn.pth"
        ),
        "other shape": lambda: torch.save({**state, "conv1.weight": torch.ones(1)}, "cnn.pth"),
        "code": lambda: torch.save({**state, "conv1.weight": Smuggled()}, "cnn.pth"),
    }
    writers[content]()
    with pytest.raises(InputError, match=r"--cnn_weights.*cnn\.pth") as caught:
        EncoderImageFull(4, cnn_type="resnet18", cnn_weights="cnn.pth")
    assert "\n" not in str(caught.value) and not (tmp_path / "smuggled").exists()


def test_a_download_that_fails_names_the_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(InputError, match="--cnn_weights") as caught:
        EncoderImageFull(4, cnn_type="resnet18")
    assert "\n" not in str(caught.value)


def test_an_unknown_cnn_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="--cnn_type is alexnet.*resnet152.*"):
        EncoderImageFull(4, cnn_type="alexnet", cnn_weights="none")


@pytest.mark.parametrize(
    "cnn_type", ["vgg11", "vgg19", "vgg16_bn", "resnet18", "resnet50", "resnet152"]
)
def test_every_vgg_and_resnet_is_known(cnn_type):
    assert cnn_type in cnn_types()
