"""open_clip's own models, of random weights: photos and captions to vectors, and a search by them.

The models are tiny ones, which open_clip takes from a file of sizes.
"""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import extract_features
import train
from features import clip_models
from features.encoders import build_encoder, encode_photo, encoder_from
from features.text_models import text_model
from inputs.captions import read_captions
from runtime.errors import InputError
from tests.helpers.made import load
from tests.helpers.photos import draw_photo

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")

TINY, CAPTIONER = "open_clip/tiny", "open_clip/tiny_coca"

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}

SIZES = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": TEXT,
}

FLAGS = ["--device", "cpu", "--workers", "0"]

BEST = "runs/runX/model_best.pth.tar"


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    captioner = {
        **SIZES,
        "vision_cfg": {**SIZES["vision_cfg"], "attentional_pool": True, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "dim_head": 64, "n_queries": 4},
        "custom_text": True,
    }
    for name, sizes in (("tiny", SIZES), ("tiny_coca", captioner)):
        (folder / f"{name}.json").write_text(json.dumps(sizes))
    open_clip.add_model_config(folder)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_photo(Path("a.png"), size=(50, 40))


def own_model(name=TINY):
    """open_clip's own, with the random weights that `none` stands for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.create_model(name.removeprefix("open_clip/")).eval()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("name", [TINY, CAPTIONER])
def test_a_photo_s_row_is_that_of_open_clip_s_own_transform_and_tower(name, mode, monkeypatch):
    how = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "resize_mode": mode}
    monkeypatch.setattr(clip_models, "_preprocessing", lambda *_: how)
    seen = open_clip.transform.PreprocessCfg(size=32, **how)
    see = open_clip.transform.image_transform_v2(seen, is_train=False)
    picture = Image.open("a.png").convert("RGB")
    expected = own_model(name).encode_image(see(picture)[None], normalize=False)[0]
    encoder = build_encoder(name, "none")
    torch.testing.assert_close(encode_photo(encoder, "a.png"), expected, rtol=1e-5, atol=1e-5)
    assert encoder.row_shape == (16,) and encoder.description["mean"] == how["mean"]
    assert torch.equal(
        pickle.loads(pickle.dumps(encoder.transform))(picture), encoder.transform(picture)
    )


def test_a_description_is_enough_and_weights_come_from_a_file():
    net = own_model()
    with torch.no_grad():
        net.visual.proj.mul_(2)
    torch.save(net.state_dict(), "net.pt")
    encoder = build_encoder(TINY, "net.pt", normalised=True)
    description = json.loads(json.dumps(encoder.description))
    shutil.move("net.pt", "moved.pt")
    again = encoder_from(description, weights="moved.pt")
    assert torch.equal(encode_photo(again, "a.png"), encode_photo(encoder, "a.png"))
    with pytest.raises(InputError, match="with other weights_sha256"):
        encoder_from(description, weights="none")


def test_a_file_is_seen_as_the_model_s_pretrained_weights_are():
    found = clip_models._preprocessing(open_clip, "ViT-B-16-SigLIP")
    assert (found["mean"], found["resize_mode"]) == ((0.5, 0.5, 0.5), "squash")
    assert clip_models._preprocessing(open_clip, "tiny") is None  # it has none


@pytest.mark.parametrize(
    ("name", "weights", "pooling", "said"),
    [
        (TINY, "imagenet", "pooled", "--encoder_weights is missing, and open_clip/tiny needs it"),
        (TINY, "openai", "pooled", "--encoder_weights openai is neither a tag nor a file"),
        ("open_clip/RN50", "nothing", "pooled", "give one of openai, yfcc15m, cc12m, a file"),
        ("open_clip/tin", "none", "pooled", "not a model that open_clip knows"),
        (TINY, "a.png", "pooled", "open_clip/tiny could not be loaded"),
        (TINY, "none", "grid", "open_clip/tiny cannot pool by grid"),
    ],
)
def test_an_encoder_that_cannot_be_had_is_one_sentence(name, weights, pooling, said, capfd):
    with pytest.raises(InputError, match=said):
        build_encoder(name, weights, pooling)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("weights", "said"), [(None, "--text_weights is missing"), ("a.png", "could not be loaded")]
)
def test_a_text_model_that_cannot_be_had_is_one_sentence(weights, said, capfd):
    with pytest.raises(InputError, match=said):
        text_model(TINY, weights)
    assert capfd.readouterr() == ("", "")


def test_from_photos_and_captions_to_a_gallery_that_is_asked(capsys):
    from search import main as search

    rows = ["image,caption,split"]
    for number in range(24):
        draw_photo(Path(f"photos/{number}.png"), number)
        split = ("train", "train", "dev", "test")[number % 4]
        rows += [f"{number}.png,a photo of number {number} seen {time},{split}" for time in "abcde"]
    Path("captions.csv").write_text("\n".join([*rows, ""]))
    encoder = ["--encoder", TINY, "--encoder_weights", "none", *FLAGS]
    made = ["--images", "photos", "--captions", "captions.csv", "--output", "data/mine_precomp"]
    extract_features.main([*made, *encoder])
    texts = ["--text_encoder", TINY, "--text_weights", "none", "--dtype", "float32", *FLAGS]
    extract_features.main(["--texts", "data/mine_precomp", *texts])
    captions = read_captions("data/mine_precomp/test_caps.txt")
    with torch.no_grad():
        expected = own_model().encode_text(open_clip.get_tokenizer("tiny")(captions))
    found = torch.from_numpy(np.load("data/mine_precomp/test_txts.npy"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    train.main(
        [
            *("--data_name", "mine_precomp", "--embed_size", "8", "--batch_size", "16"),
            *("--device", "cpu", "--num_epochs", "1", "--text_features"),
        ]
    )
    capsys.readouterr()
    ask = ["--model_path", BEST, "--images", "photos", "--index", "g", "--device", "cpu"]
    question = "a photo of number 3"
    search([*ask, "--workers", "0", "--correction", "none", "--json", question])
    (answer,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = scores_of(question)
    for result in answer["results"]:
        assert result["score"] == pytest.approx(scores.pop(result["item"]), abs=1e-3)
    assert len(answer["results"]) == 10
    assert max(scores.values()) < answer["results"][-1]["score"] + 1e-3


@torch.no_grad()
def scores_of(question):
    """{photo: its cosine with the question}, by the towers and the trained layers."""
    net, state = own_model(), load(BEST)["model"]
    seen = open_clip.transform.PreprocessCfg(**net.visual.preprocess_cfg)
    see = open_clip.transform.image_transform_v2(seen, is_train=False)
    photos = sorted(Path("photos").iterdir())
    pictures = torch.stack([see(Image.open(path).convert("RGB")) for path in photos])
    sides = (net.encode_image(pictures), net.encode_text(open_clip.get_tokenizer("tiny")(question)))
    images, texts = (
        rows @ layer["fc.weight"].T + layer["fc.bias"] for rows, layer in zip(sides, state)
    )
    cosines = torch.nn.functional.cosine_similarity(images, texts)
    return dict(zip([path.name for path in photos], cosines.tolist()))
