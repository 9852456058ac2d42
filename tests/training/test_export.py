"""Exported models: what the released codes read, the way back, and what is refused.

Expected keys, options, names and shapes are those of the released codes' own checkpoints in
tests/reference, and for VSE++, of which there is none, those that tests/helpers/made.py lists.
"""

import json
import os
import pickle
from argparse import Namespace

import numpy as np
import pytest
import torch

import compute_results
import search
import train
from evaluation import load_for_evaluation
from inputs.tokenizer import nltk_words
from runtime.errors import InputError
from tests.features import test_texts
from tests.helpers import loops
from tests.helpers.made import (
    DEFAULTS,
    RAW,
    REFERENCE,
    TINY,
    load,
    states_equal,
    write_precomp,
    write_vectors,
)
from tests.test_regions import RECIPE, write_regions
from training import checkpoint, export
from vocab import read_vocabulary

BEST = "runs/runX/model_best.pth.tar"

TRAINED = {  # the data's form, and the flags of a model that the code can have
    "hal": ("vectors", ["--caption_reading", "released", "--local_alpha", "20"]),
    "vsepp": ("vectors", ["--max_violation", "--use_abs"]),
    "scan": ("regions", ["--cross_attn", "i2t", "--bi_gru", "--agg_func", "Mean", "--loss", "max"]),
    "vse_infty": ("regions", RECIPE),
}

FILES = {
    "hal": {"model_best.pth.tar", "tiny_precomp_vocab.pkl"},
    "vsepp": {"model_best.pth.tar", "tiny_precomp_vocab.pkl"},
    "scan": {"model_best.pth.tar", "tiny_precomp_vocab.json"},
    "vse_infty": {"model_best.pth", "f30k_precomp_vocab.json"},
}

THEIRS = {
    "hal": REFERENCE / "released_checkpoints/runs/local/model_best.pth.tar",
    "scan": REFERENCE / "scan/checkpoints/runs/t2i/model_best.pth.tar",
    "vse_infty": REFERENCE
    / "vse_infty/released_checkpoint/runs/f30k_butd_region_bigru/model_best.pth",
}

# HAL's own, which VSE++'s checkpoints lack.
HAL_ALONE = {
    "sum_violation", "save_all", "memory_bank", "record_val", "local_alpha", "local_ep",
    "global_alpha", "global_beta", "global_ep_posi", "global_ep_nega", "mb_k", "mb_rate", "seed",
}  # fmt: skip

# Flags with which the exported copy is read again: VSE-infinity's does not name its data set.
AGAIN = {"vse_infty": ["--data_name", "tiny_precomp", "--vocab_path", "out"]}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder for each of TRAINED, with its data and run; not to be changed."""
    made = {}
    here = os.getcwd()
    for kind, (form, flags) in TRAINED.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        data = made[kind] / "data" / "tiny_precomp"
        write_precomp(data) if form == "vectors" else write_regions(data)
        os.chdir(made[kind])
        try:
            train.main([*TINY, *flags, "--num_epochs", "1"])
        finally:
            os.chdir(here)
    return made


@pytest.fixture
def run(request, runs, tmp_path, monkeypatch):
    """The kind of model; the current folder has the run of it."""
    for name in ("data", "vocab", "runs"):
        (tmp_path / name).symlink_to(runs[request.param] / name)
    monkeypatch.chdir(tmp_path)
    return request.param


each_kind = pytest.mark.parametrize("run", TRAINED, indirect=True)


def exported(kind, *flags):
    compute_results.main(["--export", "out", "--export_for", kind, *flags])
    return load(f"out/{export.CODES[kind].file}")


def figures(*flags):
    """All figures of an evaluation."""
    compute_results.main([*flags, "--save_json", "figures.json"])
    with open("figures.json") as file:
        found = json.load(file)
    return {name: found[name] for name in ("images", "captions", "i2t", "t2i", "rsum")}


# What the released codes read -------------------------------------------------------------------


@each_kind
def test_an_exported_checkpoint_has_what_the_released_code_reads(run):
    content, ours = exported(run), load(BEST)
    assert set(content) == {"epoch", "model", "best_rsum", "opt", "Eiters"}
    assert set(os.listdir("out")) == FILES[run]
    if run == "vsepp":
        names = {*DEFAULTS, "img_dim", "vocab_size"} - HAL_ALONE
        assert set(vars(content["opt"])) == names
    else:
        theirs = load(THEIRS[run])
        assert set(vars(content["opt"])) == set(vars(theirs["opt"]))
        assert {name: type(value) for name, value in vars(content["opt"]).items()} == {
            name: type(value) for name, value in vars(theirs["opt"]).items()
        }
        assert [list(state) for state in content["model"]] == [
            list(state) for state in theirs["model"]
        ]
    assert states_equal(content["model"], ours["model"])
    assert content["opt"].vocab_size == len(content["model"][1]["embed.weight"])
    # SCAN counts the finished epoch from 0, the others count finished epochs.
    assert content["epoch"] == (0 if run == "scan" else 1)
    assert (content["best_rsum"], content["Eiters"]) == (ours["best_rsum"], ours["Eiters"])


@pytest.mark.parametrize("run", ["scan"], indirect=True)
def test_scan_s_states_have_its_names_and_shapes(run):
    image, text = exported(run)["model"]
    shapes = {"fc.weight": (8, 8), "fc.bias": (8,), "embed.weight": (text["embed.weight"].shape)}
    for end in ("", "_reverse"):
        shapes |= {
            f"rnn.weight_ih_l0{end}": (24, 6),
            f"rnn.weight_hh_l0{end}": (24, 8),
            f"rnn.bias_ih_l0{end}": (24,),
            f"rnn.bias_hh_l0{end}": (24,),
        }
    assert {name: tuple(value.shape) for name, value in {**image, **text}.items()} == shapes


@pytest.mark.parametrize("run", ["vse_infty"], indirect=True)
def test_vse_infinity_s_copy_has_its_own_words_for_the_same_model(run):
    opt = exported(run)["opt"]
    assert (opt.precomp_enc_type, opt.optim, opt.backbone_source) == ("basic", "adam", "detector")
    assert (opt.backbone_path, opt.vse_mean_warmup_epochs, opt.max_violation) == ("", 1, True)
    with open("out/f30k_precomp_vocab.json") as file:
        words = json.load(file)["word2idx"]
    assert "<mask>" not in words and opt.vocab_size == len(words) + 1


@pytest.mark.parametrize("run", ["vse_infty"], indirect=True)
def test_a_model_without_mask_gets_its_row(run):
    flags = [flag for flag in RECIPE if flag not in ("--drop_words", "--drop_regions", "0.2")]
    train.main([*TINY, *flags, "--num_epochs", "1", "--logger_name", "plain"])
    plain = "plain/model_best.pth.tar"
    rows = exported(run, "--model_path", plain)["model"][1]["embed.weight"]
    own = load(plain)["model"][1]["embed.weight"]
    assert torch.equal(rows[:-1], own) and not rows[-1].any()
    assert figures("--model_path", "out/model_best.pth", *AGAIN[run]) == figures(
        "--model_path", plain
    )


def test_a_model_of_photos_has_the_names_that_data_parallel_gives(workdir):
    train.main([*RAW, "--data_name", "f8k", "--max_violation"])
    before = figures("--export", "out", "--export_for", "vsepp", "--device", "cpu")
    image = load("out/model_best.pth.tar")["model"][0]
    names = {name.split(".")[0] for name in image}
    assert names == {"fc", "cnn"} and "cnn.module.conv1.weight" in image
    assert set(os.listdir("out")) == {"model_best.pth.tar", "f8k_vocab.pkl"}
    assert figures("--model_path", "out/model_best.pth.tar", "--device", "cpu") == before


@pytest.mark.parametrize("kind", THEIRS)
def test_a_released_checkpoint_comes_out_as_it_was(tmp_path, monkeypatch, kind):
    root = THEIRS[kind].parents[2]
    theirs = load(THEIRS[kind])
    data = {
        "hal": ["--data_path", f"{root}/data"],
        "scan": ["--data_path", f"{root}/data"],
        "vse_infty": ["--data_path", f"{root}/data/f30k", "--data_name", "precomp"],
    }[kind]
    monkeypatch.chdir(tmp_path)
    flags = ["--model_path", str(THEIRS[kind]), "--vocab_path", f"{root}/vocab", *data]
    content = exported(kind, *flags)
    assert states_equal(content["model"], theirs["model"])
    assert all(
        content[name] == theirs[name] for name in ("epoch", "Eiters") if name in theirs
    ) and content["best_rsum"] == float(theirs["best_rsum"])
    moved = {"data_path", "vocab_path", "resume"}
    assert {name: value for name, value in vars(content["opt"]).items() if name not in moved} == {
        name: value for name, value in vars(theirs["opt"]).items() if name not in moved
    }


def plain_figures(path, reading):
    """R@1, R@5 and R@10 both ways, by a reader that the description of VSE++'s and HAL's code gives.

    It takes plain layers, loaded strictly, one caption at a time, and loops; reading: "text", or
    "released", for what HAL's loader makes of a caption on Python 3.
    """
    content = torch.load(path, weights_only=False)
    opt, (image_state, text_state) = content["opt"], content["model"]
    with open(f"{opt.vocab_path}/{opt.data_name}_vocab.pkl", "rb") as file:
        numbers = pickle.load(file).word2idx
    assert len(numbers) == opt.vocab_size
    fc = torch.nn.ModuleDict({"fc": torch.nn.Linear(opt.img_dim, opt.embed_size)})
    text = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(opt.vocab_size, opt.word_dim),
            "rnn": torch.nn.GRU(opt.word_dim, opt.embed_size, opt.num_layers, batch_first=True),
        }
    )
    fc.load_state_dict(image_state)
    text.load_state_dict(text_state)

    def embedding(vector):
        vector = vector / vector.norm()
        return vector.abs() if opt.use_abs else vector

    def caption_embedding(line):
        line = str(line) if reading == "released" else line.decode()
        words = ["<start>", *nltk_words(line.lower()), "<end>"]
        ids = torch.tensor([[numbers.get(word, numbers["<unk>"]) for word in words]])
        return embedding(text["rnn"](text["embed"](ids))[0][0, -1])

    folder = f"{opt.data_path}/{opt.data_name}/testall"
    with open(f"{folder}_caps.txt", "rb") as file, torch.no_grad():
        captions = torch.stack([caption_embedding(line.strip()) for line in file])
        features = torch.from_numpy(np.load(f"{folder}_ims.npy"))
        images = torch.stack([embedding(fc["fc"](row)) for row in features])
    both = loops.ranks((images @ captions.T).numpy())
    return [tuple(loops.recall(ranks)[:3]) for ranks in both]


@pytest.mark.parametrize("run", ["hal", "vsepp"], indirect=True)
def test_a_reader_after_the_description_has_the_same_recalls(run):
    found = figures("--export", "out", "--export_for", run, "--split", "testall")
    expected = [tuple(found[side][name] for name in ("r1", "r5", "r10")) for side in ("i2t", "t2i")]
    reading = "released" if run == "hal" else "text"
    assert plain_figures("out/model_best.pth.tar", reading) == expected
    assert expected[0] != expected[1]


# The way back -----------------------------------------------------------------------------------


@each_kind
def test_the_exported_copy_has_the_same_figures_here(run, capsys):
    before = figures("--export", "out", "--export_for", run)
    assert before["rsum"] > 0
    path = f"out/{export.CODES[run].file}"
    assert figures("--model_path", path, *AGAIN.get(run, [])) == before


@each_kind
def test_a_folder_has_the_same_figures_and_a_card_with_them(run, capsys):
    pytest.importorskip("safetensors")
    before = figures("--export", "out")
    assert set(os.listdir("out")) == {"model.safetensors", "config.json", "vocab.json", "README.md"}
    assert figures("--model_path", "out") == before
    with open("out/config.json") as file:
        config = json.load(file)
    assert {name: config["figures"][name] for name in before} == before
    with open("out/README.md") as file:
        card = file.read()
    for side, words in (("i2t", "image to text"), ("t2i", "text to image")):
        cells = " | ".join(f"{value:.1f}" for value in before[side].values())
        assert f"| {words} | {cells} |" in card
    assert f"sum up to {before['rsum']:.1f}." in card and "{" not in card


def test_a_model_over_text_vectors_has_a_folder_without_words(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    write_precomp(test_texts.FOLDER)
    write_vectors(test_texts.FOLDER, described=True)
    train.main([*test_texts.FLAGS, "--img_layers", "2"])
    before = figures("--export", "out")
    assert "vocab.json" not in os.listdir("out")
    assert figures("--model_path", "out") == before
    assert checkpoint.load("out")["texts"]["encoder"] == "sentence_transformers/some"


@pytest.mark.parametrize("run", ["vsepp"], indirect=True)
def test_a_folder_names_no_place_of_the_training(run, tmp_path):
    pytest.importorskip("safetensors")
    content = load(BEST)
    content["opt"].logger_name = content["opt"].data_path = "/home/somebody"
    content["opt"].strange = Namespace(a="/home/somebody")
    torch.save(content, "own.pth.tar")
    compute_results.main(["--model_path", "own.pth.tar", "--data_path", "data", "--export", "out"])
    for path in (tmp_path / "out").iterdir():
        assert b"somebody" not in path.read_bytes(), path


@pytest.mark.parametrize("run", ["vsepp"], indirect=True)
def test_a_folder_is_searched_and_starts_a_run(run, capsys):
    pytest.importorskip("safetensors")
    compute_results.main(["--export", "out"])
    flags = ["--model_path", "out", "--data_path", "data", "--precomp", "data/tiny_precomp"]
    search.main([*flags, "--correction", "none", "a dog"])
    assert "a dog" in capsys.readouterr().out and os.path.isdir("out/gallery")
    search.main(["--index", "out/gallery", "a dog"])
    flags = [*TINY, *TRAINED[run][1], "--logger_name", "next", "--num_epochs", "0"]
    train.main([*flags, "--init_from", "out"])
    opt = checkpoint.load("out")["opt"]
    assert (opt.use_abs, opt.max_violation) == (True, True)
    with pytest.raises(InputError, match="no optimizer state"):
        train.main([*flags, "--resume", "out"])


# What is refused --------------------------------------------------------------------------------


def member(**changes):
    """What `export.check` looks at: a VSE over vectors, of clean text."""
    opt = {name: values[0] for name, values in export.VECTORS.items()}
    opt |= {
        "data_name": "tiny_precomp", "caption_reading": "text", "raw_feature_norm": "l2norm",
        "measure": "cosine", "use_abs": False,
    }  # fmt: skip
    return Namespace(opt=Namespace(**{**opt, **changes}))


@pytest.mark.parametrize(
    "kind, changes, named",
    [
        ("vsepp", {"cross_attn": "t2i"}, ["VSE++'s code", "cross_attn is t2i", "scan or safe"]),
        ("hal", {"text_encoder": "transformer"}, ["text_encoder is transformer", "safetensors"]),
        ("vsepp", {"bi_gru": True}, ["bi_gru is True, not False"]),
        ("vsepp", {"image_pooling": "mean", "regions": 36}, ["regions is 36"]),
        ("vsepp", {"no_txtnorm": True}, ["no_txtnorm"]),
        ("vsepp", {"img_layers": 2}, ["img_layers is 2, not 1"]),
        ("vsepp", {"data_name": "mine"}, ["data_name is mine, not coco or f8k or f30k"]),
        ("scan", {}, ["cross_attn is None, not t2i or i2t", "hal or vsepp or safetensors"]),
        ("scan", {"cross_attn": "t2i", "raw_feature_norm": "l1norm"}, ["raw_feature_norm"]),
        ("vse_infty", {}, ["image_pooling is None, not gpo"]),
        ("hal", {}, ["str of bytes", "--caption_reading released"]),
        ("vsepp", {"caption_reading": "released"}, ["clean text", "--caption_reading text"]),
    ],
)
def test_what_a_code_cannot_have_is_refused_and_what_can_is_named(kind, changes, named):
    with pytest.raises(InputError) as caught:
        export.check(kind, member(**changes))
    assert all(part in str(caught.value) for part in [f"--export_for {kind}", *named])


@pytest.mark.parametrize("code", export.CODES.values(), ids=export.CODES)
def test_every_option_of_a_model_is_told_to_the_code_or_known_not_to_differ(code):
    """A new option in `MODEL_OPTIONS` needs a decision here; regions have no CNN."""
    known = {*code.options, *code.takes, "vocab_size"}
    if "cross_attn" in code.options or "backbone_source" in code.options:
        known.add("cnn_type")
    assert set(checkpoint.MODEL_OPTIONS) <= known


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("vsepp", {}),
        ("hal", {"caption_reading": "released"}),
        ("hal", {"data_name": "coco"}),  # photos: HAL's code reads JSON captions as clean text
        ("vsepp", {"measure": "order", "use_abs": True}),
    ],
)
def test_what_a_code_can_have_is_taken(kind, changes):
    export.check(kind, member(**changes))


@pytest.mark.parametrize("run", ["vsepp"], indirect=True)
def test_a_refusal_comes_before_any_figure_and_leaves_nothing(run, capsys):
    with pytest.raises(InputError, match="--export_for hal"):
        compute_results.main(["--export", "out", "--export_for", "hal"])
    assert not os.path.exists("out") and "rsum" not in capsys.readouterr().out


@pytest.mark.parametrize("run", ["vsepp"], indirect=True)
@pytest.mark.parametrize(
    "flags, named",
    [
        (["--export", "data"], "--export 'data' is there and not an empty folder"),
        (["--export", "."], "'.' is there"),
        (["--export_for", "hal"], "--export_for does nothing without --export"),
        (["--export", "out", "--model_path", BEST, BEST], "--export is for one checkpoint"),
        (["--export", "out", "--export_for", "clip"], "--export_for"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(run, flags, named):
    with pytest.raises(InputError, match=named):
        compute_results.main(flags)
    assert not os.path.exists("out")


@pytest.mark.parametrize("run", ["vsepp"], indirect=True)
def test_an_export_that_cannot_be_written_whole_leaves_nothing(run, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = set(os.listdir())
    monkeypatch.setattr(torch, "save", full)
    loaded = load_for_evaluation(Namespace(model_path=BEST, device="cpu"))
    with pytest.raises(InputError, match="No space left"):
        export.write("out", "vsepp", loaded, {})
    assert set(os.listdir()) == before


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_checkpoint_from_within_the_first_epoch_starts_scan_at_its_epoch_0(
    tmp_path, monkeypatch, epoch
):
    monkeypatch.chdir(tmp_path)
    root = THEIRS["scan"].parents[2]
    content = load(THEIRS["scan"])
    words = read_vocabulary(f"{root}/vocab/f30k_precomp_vocab.json").words
    content |= {"epoch": epoch, "vocabulary": words}  # as ours, which count finished epochs
    torch.save(content, "own.pth.tar")
    loaded = load_for_evaluation(
        Namespace(model_path="own.pth.tar", vocab_path=f"{root}/vocab", device="cpu")
    )
    export.write("out", "scan", loaded, {})
    # SCAN's --resume starts at `epoch` + 1.
    assert load("out/model_best.pth.tar")["epoch"] + 1 == epoch


def test_best_rsum_of_numpy_becomes_a_plain_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = THEIRS["scan"].parents[2]
    content = load(THEIRS["scan"])
    torch.save(content | {"best_rsum": np.float64(12.5)}, "own.pth.tar")
    loaded = load_for_evaluation(
        Namespace(model_path="own.pth.tar", vocab_path=f"{root}/vocab", device="cpu")
    )
    export.write("out", "scan", loaded, {})
    found = load("out/model_best.pth.tar")["best_rsum"]
    assert found == 12.5 and type(found) is float
