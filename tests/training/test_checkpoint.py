"""Checkpoints: saved, loaded, resumed, and refused, hostile ones included."""

import errno
import math
import os
import pickle
import types
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch

from model import VSE
from runtime.errors import InputError
from tests.helpers.made import RELEASED, load, states_equal, tree
from training import checkpoint

SIZES = {"img_dim": 5, "embed_size": 4, "word_dim": 3, "vocab_size": 9, "num_layers": 1}

WORDS = ["<pad>", "<start>", "<end>", "<unk>", *"abcde"]


def options(**changes):
    """A released run's options, as far as they matter here."""
    return Namespace(
        **{
            "data_name": "tiny_precomp",
            "finetune": False,
            "cnn_type": "vgg19",
            "use_abs": False,
            "no_imgnorm": False,
            "measure": "cosine",
            "local_alpha": 30.0,
            "batch_size": 128,
            **SIZES,
            **changes,
        }
    )


def released(opt=None, **changes):
    """A checkpoint dict as the released code makes it."""
    torch.manual_seed(0)
    model = VSE(options())
    return {
        "epoch": 3,
        "model": [model.img_enc.state_dict(), model.txt_enc.state_dict()],
        "best_rsum": 12.5,
        "opt": opt or options(),
        "Eiters": 7,
        **changes,
    }


def refused(path, *named):
    """The message with which `load` refuses a file: one line that names the file."""
    with pytest.raises(InputError) as caught:
        checkpoint.load(str(path))
    message = str(caught.value)
    assert all(name in message for name in (os.path.basename(path), *named)) and "\n" not in message
    return message


@pytest.mark.parametrize("run", ["local", "max", "mb"])
def test_released_checkpoints_load(run):
    path = RELEASED / "runs" / run / "model_best.pth.tar"
    content = checkpoint.load(str(path))
    theirs = load(path)
    assert content["opt"].data_name == "f8k_precomp" and content["opt"].vocab_size == 62
    assert states_equal(content["model"], theirs["model"])
    assert (content["epoch"], content["Eiters"]) == (theirs["epoch"], theirs["Eiters"])
    assert checkpoint.caption_reading(content) == "released"
    assert len(checkpoint.vocabulary(content, str(path), str(RELEASED / "vocab"))) == 62
    with pytest.raises(InputError, match="carries no vocabulary.*--vocab_path"):
        checkpoint.vocabulary(content, str(path), "nowhere")


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_saved_loads_the_same(tmp_path, legacy):
    content = released(vocabulary=WORDS, caption_reading="text")
    if legacy:
        torch.save(content, tmp_path / "run.pth.tar", _use_new_zipfile_serialization=False)
    else:
        checkpoint.save(str(tmp_path / "run.pth.tar"), content)
    found = checkpoint.load(str(tmp_path / "run.pth.tar"))
    assert states_equal(found["model"], content["model"])
    assert {name: found[name] for name in ("epoch", "best_rsum", "Eiters", "vocabulary")} == {
        "epoch": 3,
        "best_rsum": 12.5,
        "Eiters": 7,
        "vocabulary": WORDS,
    }
    assert vars(content["opt"]).items() <= vars(found["opt"]).items()
    assert os.listdir(tmp_path) == ["run.pth.tar"]


@pytest.mark.parametrize(
    "scalar",
    [np.float64(12.5), np.float32(12.5), np.int64(12), np.int32(12), np.bool_(True)],
    ids=lambda scalar: type(scalar).__name__,
)
@pytest.mark.parametrize(
    "module", [b"numpy._core.multiarray", b"numpy.core.multiarray"], ids=["numpy 2", "numpy 1"]
)
def test_numpy_scalars_of_either_numpy_load(tmp_path, scalar, module):
    """The released code's best_rsum is one."""
    path = tmp_path / "run.pth.tar"
    torch.save(released(best_rsum=scalar), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", module))
    assert checkpoint.load(str(path))["best_rsum"] == scalar


def test_a_checkpoint_from_cuda_loads_without_it(tmp_path, monkeypatch):
    path = tmp_path / "run.pth.tar"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        torch.save(released(), path)
    with pytest.raises(RuntimeError, match=r"cuda|CUDA"):
        torch.load(path, weights_only=False)
    found = checkpoint.load(str(path))
    assert states_equal(found["model"], released()["model"])
    assert found["model"][0]["fc.weight"].device.type == "cpu"


def test_options_that_an_older_checkpoint_lacks_take_their_defaults(tmp_path):
    """VSE++'s first ones."""
    checkpoint.save(
        str(tmp_path / "old.pth.tar"),
        released(opt=Namespace(data_name="tiny_precomp", data_path="/else")),
    )
    content = checkpoint.load(str(tmp_path / "old.pth.tar"))
    assert vars(content["opt"]) == {
        "data_name": "tiny_precomp",
        "data_path": "/else",
        **SIZES,
        "vocab_path": "./vocab/",
        "measure": "cosine",
        "use_abs": False,
        "no_imgnorm": False,
        "finetune": False,
        "cnn_type": "vgg19",
        "crop_size": 224,
        "batch_size": 128,
        "workers": 10,
        "use_restval": False,
        "logger_name": "runs/runX",
        "margin": 0.2,
        "max_violation": False,
        "sum_violation": False,
        "memory_bank": False,
        "text_pooling": "last",
        "bi_gru": False,
        "no_txtnorm": False,
        "precomp_enc_type": "basic",
        "drop_words": 0.0,
        "drop_regions": 0.0,
        "weight_decay": 0.0,
        "raw_feature_norm": "clipped_l2norm",
        "agg_func": "LogSumExp",
        "lambda_lse": 6.0,
        "lambda_softmax": 9.0,
        "text_encoder": "gru",
        "img_layers": 1,
        "text_features": False,
        "texts_path": None,
        "image_pooling": None,
        "regions": None,
        "vocab_name": None,
        "cross_attn": None,
    }
    assert checkpoint.caption_reading(content) == "text"


def test_options_that_not_even_say_which_data_they_were_for_take_the_defaults_too(tmp_path):
    checkpoint.save(str(tmp_path / "old.pth.tar"), released(opt=Namespace()))
    opt = checkpoint.load(str(tmp_path / "old.pth.tar"))["opt"]
    assert (opt.data_name, opt.data_path) == ("precomp", "data")


@pytest.mark.parametrize(
    "features", ["resnet18", {"format": 1, "encoder": "resnet18"}, {"format": 10**6}, [1]]
)
def test_odd_words_on_the_features_are_refused(tmp_path, features):
    torch.save(released(features=features), tmp_path / "run.pth.tar")
    refused(tmp_path / "run.pth.tar", "features")


@pytest.mark.parametrize(
    "opt, marker, reading",
    [
        (options(), {}, "released"),
        (options(data_name="f8k"), {}, "text"),
        (options(), {"caption_reading": "text"}, "text"),
        (options(data_name="f8k"), {"caption_reading": "released"}, "released"),
        (Namespace(data_name="coco_precomp"), {}, "text"),
    ],
    ids=["HAL", "HAL raw", "ours", "ours forced", "VSE++"],
)
def test_the_caption_reading_is_the_training_s(tmp_path, opt, marker, reading):
    checkpoint.save(str(tmp_path / "run.pth.tar"), released(opt=opt, **marker))
    assert checkpoint.caption_reading(checkpoint.load(str(tmp_path / "run.pth.tar"))) == reading


def test_saving_over_a_checkpoint_keeps_it_where_saving_fails(tmp_path):
    path = tmp_path / "run.pth.tar"
    checkpoint.save(str(path), released())
    before = tree(tmp_path)
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(str(path), {"model": lambda: None})
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "spent", [OSError(28, "No space left on device"), None], ids=["after its OSError", "alone"]
)
def test_the_zip_writer_s_own_error_on_a_full_disk_is_one_sentence(tmp_path, monkeypatch, spent):
    def stumbling(content, file):
        file.write(b"PK half of it")
        error = RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
        )
        error.__context__ = spent
        raise error

    checkpoint.save(str(tmp_path / "run.pth.tar"), released())
    before = tree(tmp_path)
    monkeypatch.setattr(torch, "save", stumbling)
    reason = spent.strerror if spent else ".*unexpected pos 704 vs 598"
    with pytest.raises(
        InputError, match=f"run.pth.tar could not be written .{reason}.: free some space"
    ):
        checkpoint.save(str(tmp_path / "run.pth.tar"), released())
    assert tree(tmp_path) == before


def test_another_runtime_error_while_saving_stays_what_it_is(tmp_path, monkeypatch):
    def broken(content, file):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        checkpoint.save(str(tmp_path / "run.pth.tar"), released())
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "parts", [1, 7, 400]
)  # where in the file the room ends: in the writer, at its end, in ours
def test_a_disk_that_fills_up_within_a_checkpoint_keeps_the_old_one(small_disk, parts):
    disk = small_disk(500)
    path = str(disk / "run.pth.tar")
    checkpoint.save(path, {str(part): torch.ones(40_000 // parts) for part in range(parts)})
    before = tree(disk)
    with pytest.raises(
        InputError, match="run.pth.tar could not be written .No space left on device"
    ):
        checkpoint.save(path, {str(part): torch.ones(120_000 // parts) for part in range(parts)})
    assert tree(disk) == before


# Files that are refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, found", [("absent", "No such file"), ("folder", "not a regular file")]
)
def test_a_file_that_is_not_there_is_named(tmp_path, name, found):
    (tmp_path / "folder").mkdir()
    refused(tmp_path / name, found)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path, share, legacy):
    path = tmp_path / "run.pth.tar"
    torch.save(released(), path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_with_spoilt_bytes_is_refused_or_still_has_its_shape(tmp_path, seed, legacy):
    """Whatever the bytes say, the outcome is bad input or a checkpoint, never another error."""
    path = tmp_path / "run.pth.tar"
    torch.save(released(), path, _use_new_zipfile_serialization=not legacy)
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, len(content), 12):
        content[place] = rng.integers(0, 256)
    path.write_bytes(bytes(content))
    try:
        found = checkpoint.load(str(path))
    except InputError as error:
        assert "run.pth.tar" in str(error) and "\n" not in str(error)
    else:
        assert found["model"][0]["fc.weight"].shape[1] == found["opt"].img_dim


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"\x80\x02}.",
        b"PK\x03\x04nothing",
        pickle.dumps({"model": 1}),
        b"\x89PNG\r\n\x1a\n",
        b"\x00" * 4096,
    ],
    ids=range(6),
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "run.pth.tar").write_bytes(content)
    refused(tmp_path / "run.pth.tar")


def test_a_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "run.pth.tar", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "run.pth.tar")


class Smuggled:
    """Calls `function` with `arguments` when a pickle of it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, argument, place, legacy",
    [
        *(
            (os.system, "touch smuggled", place, legacy)
            for place in ("model", "opt", "in opt", "extra", "alone")
            for legacy in (False, True)
        ),
        (eval, "open('smuggled', 'w')", "model", False),
        (exec, "open('smuggled', 'w')", "model", False),
    ],
)
def test_a_checkpoint_that_would_run_code_is_refused_by_its_name(
    tmp_path, monkeypatch, function, argument, place, legacy
):
    monkeypatch.chdir(tmp_path)
    code = Smuggled(function, argument)
    content = {
        "model": lambda: released(model=code),
        "opt": lambda: released(opt=code),
        "in opt": lambda: released(opt=options(batch_size=code)),
        "extra": lambda: released(more=[code]),
        "alone": lambda: code,
    }[place]()
    torch.save(content, "run.pth.tar", _use_new_zipfile_serialization=not legacy)
    message = refused(tmp_path / "run.pth.tar")
    assert function.__name__ in message and "cut short" not in message
    assert list(tree(tmp_path)) == ["run.pth.tar"]


def test_options_of_another_class_are_refused(tmp_path):
    torch.save(released(opt=types.SimpleNamespace(**vars(options()))), tmp_path / "run.pth.tar")
    refused(tmp_path / "run.pth.tar")


def state(part, **changes):
    """The released model's states with some values changed; None removes a name."""
    states = released()["model"]
    states[part] = {
        name: value for name, value in {**states[part], **changes}.items() if value is not None
    }
    return states


def giant():
    """A tensor that claims more than its storage holds, by one shared number."""
    return torch.zeros(1).expand(9, 3)


BROKEN = {
    "a list": lambda: [1, 2],
    "a number": lambda: 3,
    "no model": lambda: {"opt": options()},
    "no options": lambda: {"model": state(0)},
    "options that are a dict": lambda: {**released(), "opt": vars(options())},
    "one state": lambda: released(model=state(0)[0]),
    "three states": lambda: released(model=[*state(0), {}]),
    "states that are numbers": lambda: released(model=[1, 2]),
    "no layer": lambda: released(model=state(0, **{"fc.weight": None})),
    "a flat layer": lambda: released(model=state(0, **{"fc.weight": torch.ones(20)})),
    "a layer of text": lambda: released(model=state(0, **{"fc.weight": "weights"})),
    "no embedding": lambda: released(model=state(1, **{"embed.weight": None})),
    "a transformer over words": lambda: released(
        model=[state(0)[0], {"bert.encoder.layer.0.output.dense.weight": torch.ones(4, 3)}]
    ),
    "no recurrent weights": lambda: released(model=state(1, **{"rnn.weight_hh_l0": None})),
    "a tensor without its values": lambda: released(model=state(1, **{"embed.weight": giant()})),
    "another embed_size": lambda: released(opt=options(embed_size=5)),
    "another vocab_size": lambda: released(opt=options(vocab_size=8)),
    "another img_dim": lambda: released(opt=options(img_dim=6)),
    "another num_layers": lambda: released(opt=options(num_layers=2)),
    "an unknown reading": lambda: released(caption_reading="upside down"),
    "an unknown reading of another type": lambda: released(caption_reading=["text"]),
    "a data_name of another type": lambda: released(opt=options(data_name=None)),
    "a batch_size of another type": lambda: released(opt=options(batch_size="128")),
    "no batch at all": lambda: released(opt=options(batch_size=0)),
    "a negative batch_size": lambda: released(opt=options(batch_size=-4)),
    "an unknown measure": lambda: released(opt=options(measure="potato")),
    "a crop_size of nothing": lambda: released(opt=options(crop_size=0)),
    "a negative number of workers": lambda: released(opt=options(workers=-1)),
    "a vocabulary of no words": lambda: released(
        opt=options(vocab_size=0), model=state(1, **{"embed.weight": torch.ones(0, 3)})
    ),
    "no input weights": lambda: released(
        opt=options(num_layers=0), model=state(1, **{"rnn.weight_ih_l0": None})
    ),
    "a switch of another type": lambda: released(opt=options(use_abs="no")),
    "a switch that is a number": lambda: released(opt=options(use_abs=1)),
    "another embed_size of raw images": lambda: released(
        opt=options(data_name="f8k", embed_size=5)
    ),
    "a tensor without memory": lambda: released(
        model=state(1, **{"embed.weight": torch.empty(9, 3, device="meta")})
    ),
}


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.int64, torch.int8, torch.bool, torch.float8_e5m2], ids=str
)
@pytest.mark.parametrize("part, name", [(0, "fc.weight"), (0, "fc.bias"), (1, "rnn.weight_ih_l0")])
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path, part, name, dtype):
    """Loading would cast them in silence.

    Complex numbers lose a half, others what follows the point.
    """
    whole = state(part)[part][name]
    torch.save(released(model=state(part, **{name: whole.to(dtype)})), tmp_path / "run.pth.tar")
    refused(tmp_path / "run.pth.tar", name, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_another_precision_are_taken(tmp_path, dtype):
    whole = state(0)[0]["fc.weight"]
    torch.save(released(model=state(0, **{"fc.weight": whole.to(dtype)})), tmp_path / "run.pth.tar")
    model, content = VSE(options()), checkpoint.load(str(tmp_path / "run.pth.tar"))
    checkpoint.load_weights(model, content, "run.pth.tar")
    assert torch.equal(model.img_enc.fc.weight, whole.to(dtype).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "part, name", [(0, "fc.weight"), (0, "fc.bias"), (1, "embed.weight"), (1, "rnn.bias_hh_l0")]
)
def test_weights_that_are_not_finite_are_refused_by_their_name(tmp_path, part, name, value):
    spoilt = state(part)[part][name].clone()
    spoilt.view(-1)[-1] = value
    torch.save(released(model=state(part, **{name: spoilt})), tmp_path / "run.pth.tar")
    refused(tmp_path / "run.pth.tar", name, "NaN")


def test_weights_beyond_float32_are_refused(tmp_path):
    """In the model's float32 they would be infinite."""
    large = torch.full((4, 5), 1e300, dtype=torch.float64)
    torch.save(released(model=state(0, **{"fc.weight": large})), tmp_path / "run.pth.tar")
    refused(tmp_path / "run.pth.tar", "fc.weight", "infinity")


def test_batch_norm_s_counter_of_a_full_model_is_an_integer(tmp_path):
    torch.save(
        released(model=state(0, **{"cnn.module.bn1.num_batches_tracked": torch.tensor(7)})),
        tmp_path / "run.pth.tar",
    )
    assert (
        checkpoint.load(str(tmp_path / "run.pth.tar"))["model"][0][
            "cnn.module.bn1.num_batches_tracked"
        ]
        == 7
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1, "crop_size": 1, "workers": 0},
        {"margin": 1},
        {"data_name": "f8k", "img_dim": 4096},
        {"measure": "order"},
    ],
    ids=str,
)
def test_options_at_their_bounds_are_taken(tmp_path, changes):
    """An int is a number where a float is expected.

    Raw images' img_dim is not their CNN's width.
    """
    torch.save(released(opt=options(**changes)), tmp_path / "run.pth.tar")
    opt = checkpoint.load(str(tmp_path / "run.pth.tar"))["opt"]
    assert {name: getattr(opt, name) for name in changes} == changes


@pytest.mark.parametrize("kind", BROKEN)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, kind):
    torch.save(BROKEN[kind](), tmp_path / "run.pth.tar")
    refused(tmp_path / "run.pth.tar")


@pytest.mark.parametrize(
    "words", ["words", {"a": 1}, [1, 2], [*WORDS, None], WORDS[1:], [*WORDS, "a"]], ids=str
)
def test_a_checkpoint_s_vocabulary_is_checked(words):
    with pytest.raises(InputError, match=r"run\.pth\.tar"):
        checkpoint.vocabulary(released(vocabulary=words), "run.pth.tar")


def test_a_checkpoint_s_vocabulary_numbers_its_words():
    assert checkpoint.vocabulary(released(vocabulary=WORDS), "run.pth.tar").words == WORDS


@pytest.mark.parametrize(
    "states",
    [
        lambda: state(0, **{"fc.bias": None}),
        lambda: state(0, **{"fc.bias": torch.ones(5)}),
        lambda: state(1, more=torch.ones(1)),
        lambda: state(1, **{"rnn.bias_hh_l0": None}),
        lambda: state(0, **{"graph.0.weight": torch.ones(1)}),
        lambda: state(0, **{"mlp.layers.0.weight": torch.ones(2, 5)}),
    ],
    ids=[
        "missing",
        "shape",
        "unknown",
        "missing text",
        "reasoning over regions",
        "an encoder of regions",
    ],
)
def test_weights_that_do_not_fit_are_refused(states):
    with pytest.raises(InputError, match=r"run\.pth\.tar") as caught:
        checkpoint.load_weights(VSE(options()), released(model=states()), "run.pth.tar")
    assert "\n" not in str(caught.value)


def test_the_cnn_of_a_full_model_is_left_out():
    model = VSE(options())
    states = state(0, **{"cnn.module.conv1.weight": torch.ones(1)})
    checkpoint.load_weights(model, released(model=states), "run.pth.tar")
    assert states_equal([model.img_enc.state_dict()], [state(0)[0]])


# Taking up a run --------------------------------------------------------------------------------


def run_of(seed, fused=None, **changes):
    torch.manual_seed(seed)
    model = VSE(options(**changes))
    return model, torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)


def step(model, optimizer):
    images, captions = model.forward_emb(
        torch.ones(2, 5), torch.tensor([[1, 4, 2], [1, 5, 2]]), [3, 3]
    )
    optimizer.zero_grad()
    (images * captions).sum().backward()
    optimizer.step()


class Words:
    words = WORDS


@pytest.fixture
def saved(tmp_path):
    """(path, model, optimizer, next random number) of a run that was saved after one step."""
    model, optimizer = run_of(1)
    step(model, optimizer)
    path = str(tmp_path / "run.pth.tar")
    content = checkpoint.content_of(
        model, optimizer, options(caption_reading="text"), Words, 2, 9, 33.5, None
    )
    checkpoint.save(path, content)
    return path, model, optimizer, torch.rand(1)


def test_a_run_s_checkpoint_has_the_released_entries_and_ours(saved):
    path, model, optimizer, _ = saved
    content = load(path)
    plain = ("epoch", "Eiters", "best_rsum", "vocabulary", "caption_reading", "progress")
    assert [content[name] for name in plain] == [2, 9, 33.5, WORDS, "text", None]
    assert states_equal(content["model"], [model.img_enc.state_dict(), model.txt_enc.state_dict()])
    assert content["opt"] == options(caption_reading="text")
    assert content["optimizer"].keys() == optimizer.state_dict().keys()
    assert content["random_states"].keys() == {"cpu", "cuda"}
    assert content["float32_products"] == torch.get_float32_matmul_precision()


def test_a_restored_run_goes_on_as_the_first_would_have(saved):
    path, model, optimizer, following = saved
    other, its_optimizer = run_of(2)
    step(other, its_optimizer)
    found = checkpoint.restore(checkpoint.load(path), path, other, its_optimizer, options(), print)
    assert found == (2, 9, 33.5, None)
    assert torch.equal(torch.rand(1), following)
    step(model, optimizer)
    step(other, its_optimizer)
    assert states_equal([model.state_dict()], [other.state_dict()])


@pytest.mark.parametrize(
    "then, now", [(False, True), (None, True), (True, False), (True, True), (False, False)]
)
def test_a_run_goes_on_with_the_fused_step_of_the_machine_it_goes_on_on(tmp_path, then, now):
    path, (model, optimizer) = str(tmp_path / "run.pth.tar"), run_of(1, fused=then)
    step(model, optimizer)
    checkpoint.save(
        path,
        checkpoint.content_of(
            model, optimizer, options(caption_reading="text"), Words, 2, 9, 33.5, None
        ),
    )
    other, its_optimizer = run_of(2, fused=now)
    checkpoint.restore(checkpoint.load(path), path, other, its_optimizer, options(), print)
    assert [group["fused"] for group in its_optimizer.param_groups] == [now]
    before = [p.clone() for p in other.parameters()]
    if now:
        its_optimizer.found_inf = torch.ones(())  # leaves the step out; the unfused one refuses it
        step(other, its_optimizer)
        assert all(map(torch.equal, before, other.parameters()))
        its_optimizer.found_inf = torch.zeros(())
    step(other, its_optimizer)
    step(model, optimizer)
    torch.testing.assert_close(other.state_dict(), model.state_dict())
    assert all(state["step"] == 2 for state in its_optimizer.state.values())


@pytest.mark.parametrize(
    "name, value",
    [
        ("embed_size", 6),
        ("word_dim", 5),
        ("num_layers", 2),
        ("measure", "order"),
        ("use_abs", True),
        ("no_imgnorm", True),
        ("data_name", "other_precomp"),
        ("vocab_size", 10),
    ],
)
def test_a_run_of_another_model_is_not_restored(saved, name, value):
    path = saved[0]
    model, optimizer = run_of(2)
    with pytest.raises(InputError, match=f"--resume.*--{name}"):
        checkpoint.restore(
            checkpoint.load(path), path, model, optimizer, options(**{name: value}), print
        )


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"epoch": 0.7},
        {"Eiters": "3"},
        {"best_rsum": math.nan},
        {"best_rsum": math.inf},
    ],
    ids=str,
)
def test_a_place_that_no_run_can_have_is_refused(saved, change):
    model, optimizer = run_of(2)
    with pytest.raises(InputError, match="--resume.*damaged"):
        checkpoint.restore(
            {**checkpoint.load(saved[0]), **change}, saved[0], model, optimizer, options(), print
        )


def test_the_optimizer_s_settings_are_this_run_s(saved):
    model, optimizer = run_of(2)
    content = checkpoint.load(saved[0])
    content["optimizer"]["param_groups"][0].update(betas=(5, "x"), amsgrad=True, weight_decay="x")
    expected = {
        name: value for name, value in optimizer.param_groups[0].items() if name != "params"
    }
    checkpoint.restore(content, saved[0], model, optimizer, options(), print)
    assert {
        name: value for name, value in optimizer.param_groups[0].items() if name != "params"
    } == expected


def test_what_does_not_make_another_model_may_change_and_is_said(saved):
    path, said = saved[0], []
    model, optimizer = run_of(2)
    content = checkpoint.load(path)
    names = (
        "data_path vocab_path cache_dir features_on_device logger_name resume init_from cnn_weights num_epochs "
        "learning_rate lr_update workers device amp log_step val_step save_step save_all keep record_val "
        "reset_train model_name skip_bad_steps collapse_patience on_collapse"
    ).split()
    for name in names:
        setattr(content["opt"], name, "then")
    now = options(
        **{name: "now" for name in names}, newly_made="now"
    )  # an option of a later version, too
    checkpoint.restore(content, path, model, optimizer, now, said.append)
    assert said == [
        f"--{name} was then before, and is now from here on"
        for name in names
        if name not in ("resume", "init_from")
    ]


def test_a_released_checkpoint_is_not_restored_but_pointed_to_init_from():
    model, optimizer = run_of(2)
    with pytest.raises(InputError, match="--resume run.pth.tar.*optimizer.*--init_from"):
        checkpoint.restore(released(), "run.pth.tar", model, optimizer, options(), print)


@pytest.mark.parametrize(
    "damage",
    [
        {"optimizer": 3},
        {"optimizer": {}},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"random_states": 3},
        {"random_states": {}},
        {"random_states": {"cpu": torch.zeros(3)}},
        {"random_states": {"cpu": "state", "cuda": []}},
        {"epoch": "two"},
        {"epoch": None},
        {"best_rsum": [1]},
    ],
    ids=str,
)
def test_a_damaged_state_of_a_run_is_refused(saved, damage):
    path = saved[0]
    model, optimizer = run_of(2)
    with pytest.raises(InputError, match="--resume"):
        checkpoint.restore(
            {**checkpoint.load(path), **damage}, path, model, optimizer, options(), print
        )


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_optimizer_moments_of_another_shape_are_refused(saved, name):
    path = saved[0]
    content = checkpoint.load(path)
    content["optimizer"]["state"][0][name] = torch.ones(2, 2)
    model, optimizer = run_of(2)
    with pytest.raises(InputError, match="--resume"):
        checkpoint.restore(content, path, model, optimizer, options(), print)


def test_an_optimizer_whose_steps_are_not_one_number_is_refused(saved):
    path = saved[0]
    content = checkpoint.load(path)
    content["optimizer"]["state"][0]["step"] = torch.ones(2)
    model, optimizer = run_of(2)
    with pytest.raises(InputError, match="--resume.*moments"):
        checkpoint.restore(content, path, model, optimizer, options(), print)


# The newest of a folder's -----------------------------------------------------------------------


def write_at(path, when, **changes):
    """A checkpoint that was written `when` seconds into the era."""
    checkpoint.save(str(path), released(**changes))
    os.utime(path, (when, when))


def test_the_furthest_checkpoint_of_ours_is_taken_and_of_those_the_latest(tmp_path):
    said, folder = [], tmp_path / "runs[1]"
    assert checkpoint.newest(str(folder), said.append) == (None, "")
    write_at(folder / "released.pth.tar", 9, Eiters=99)
    assert checkpoint.newest(str(folder), said.append) == (None, "")
    assert len(said) == 1 and said.pop().startswith(
        f"Passed over: {folder / 'released.pth.tar'} has no optimizer"
    )
    (folder / "released.pth.tar").unlink()
    write_at(folder / "b.pth.tar", 3, Eiters=8, optimizer={})
    write_at(folder / "c.pth.tar", 5, Eiters=7, optimizer={})
    write_at(folder / "a.pth.tar", 4, Eiters=8, optimizer={}, epoch=11)
    assert not said
    (folder / "broken.pth.tar").write_bytes(b"broken")
    for name, odd in (("d", None), ("e", "9"), ("f", torch.ones(2))):  # no number of steps
        write_at(folder / f"{name}.pth.tar", 9, Eiters=odd, optimizer={})
    content, path = checkpoint.newest(str(folder), said.append)
    assert (path, content["epoch"]) == (str(folder / "a.pth.tar"), 11)
    assert sorted(os.path.basename(line.split(".pth.tar")[0]) for line in said) == [
        "broken",
        "d",
        "e",
        "f",
    ]
    assert all(line.startswith("Passed over: ") for line in said)


def test_the_usual_file_comes_before_others_that_are_further(tmp_path):
    write_at(tmp_path / "model_best.pth.tar", 9, Eiters=500, optimizer={})
    write_at(tmp_path / "checkpoint.pth.tar", 5, Eiters=3, optimizer={})
    assert checkpoint.newest(str(tmp_path), print)[1] == str(tmp_path / "checkpoint.pth.tar")
    write_at(tmp_path / "checkpoint.pth.tar", 5, Eiters=3)  # of the released code
    assert checkpoint.newest(str(tmp_path), print)[1] == str(tmp_path / "model_best.pth.tar")


@pytest.mark.parametrize(
    "trouble, said",
    [
        (
            OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
            "checkpoint.pth.tar cannot be read .Stale",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 7 bytes"),
            "can't allocate memory",
        ),
        (MemoryError("no more"), "no more"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_read_at_present_is_not_passed_over(
    tmp_path, monkeypatch, trouble, said
):
    def stale(*_, **__):
        raise trouble

    write_at(tmp_path / "model_best.pth.tar", 9, Eiters=500, optimizer={})
    write_at(tmp_path / "checkpoint.pth.tar", 5, Eiters=600, optimizer={})
    monkeypatch.setattr(torch, "load", stale)
    with pytest.raises((InputError, RuntimeError, MemoryError), match=said):
        checkpoint.newest(str(tmp_path), print)


@pytest.mark.parametrize("size", [5_000, 20_000, 68_000])
def test_a_usual_file_that_is_cut_short_is_passed_over_for_the_whole_best_one(tmp_path, size):
    """PyTorch seeks to before its start, and raises the OSError of a disk."""
    said, filler = [], torch.ones(80_000)
    write_at(tmp_path / "model_best.pth.tar", 5, Eiters=500, optimizer={}, filler=filler)
    write_at(tmp_path / "checkpoint.pth.tar", 9, Eiters=600, optimizer={}, filler=filler)
    os.truncate(tmp_path / "checkpoint.pth.tar", size)
    assert checkpoint.newest(str(tmp_path), said.append)[1] == str(tmp_path / "model_best.pth.tar")
    assert len(said) == 1 and "checkpoint.pth.tar is not a checkpoint, or is cut short" in said[0]


def test_a_link_to_nothing_is_passed_over(tmp_path):
    os.symlink(tmp_path / "gone", tmp_path / "Epoch-5-model.pth.tar")
    assert checkpoint.newest(str(tmp_path), print) == (None, "")


def test_a_checkpoint_that_a_run_from_scratch_would_replace_is_not_passed_over(tmp_path):
    write_at(tmp_path / "checkpoint.pth.tar", 5, Eiters=3)
    with pytest.raises(
        InputError, match="--resume auto: .*checkpoint.pth.tar has no optimizer .* another"
    ):
        checkpoint.newest(str(tmp_path), print)


def test_when_a_file_was_written_is_seen_to_the_nanosecond(tmp_path):
    path = tmp_path / "file"
    assert checkpoint.written(path) is None
    path.write_text("")
    os.utime(path, ns=(1, 1_700_000_000_123_456_000))
    assert checkpoint.written(path) == 1_700_000_000_123_456_000


# A place within an epoch ------------------------------------------------------------------------


def progress_with(**changes):
    """A run's progress within its epoch as train.py saves it.

    changes: {"part" or "part_name": value}.
    """
    progress = {
        "step_in_epoch": 4,
        "bank": [torch.ones(3, 4), torch.ones(3, 4), torch.tensor([0, 2**31 - 1, 7])],
        "meters": {"Loss": {"val": 1.5, "avg": 1.25, "sum": 2.5, "count": 2}},
        "watch": {"bad": 0, "collapsed": 3, "last_good": 0.5, "warned": False},
    }
    for name, value in changes.items():
        part, _, entry = name.partition("__")
        if not entry:
            progress[part] = value
        elif part == "meters":
            progress["meters"]["Loss"][entry] = value
        elif part == "watch":
            progress["watch"][entry] = value
        else:
            progress["bank"]["images captions indices".split().index(entry)] = value
    return progress


def restored(saved, progress):
    path = saved[0]
    model, optimizer = run_of(2)
    content = {**checkpoint.load(path), "progress": progress}
    return checkpoint.restore(content, path, model, optimizer, options(), print)[3]


@pytest.mark.parametrize("changes", [{}, {"bank": None}, {"watch__last_good": None}], ids=str)
def test_a_place_within_an_epoch_is_taken_up(saved, changes):
    progress = progress_with(**changes)
    assert restored(saved, progress) is progress


@pytest.mark.parametrize(
    "changes",
    [
        {"step_in_epoch": 4.0},
        {"step_in_epoch": "4"},
        {"step_in_epoch": True},
        {"meters__val": "1"},
        {"meters__avg": None},
        {"meters__sum": "1"},
        {"meters__count": "2"},
        {"watch__bad": "0"},
        {"watch__warned": "no"},
        {"watch__collapsed": None},
        {"watch__last_good": "0.5"},
        {"bank": []},
        {"bank__images": torch.ones(3, 5)},
        {"bank__images": [1, 2, 3]},
        {"bank__images": torch.zeros(1).expand(3, 4)},
        {"bank__captions": torch.ones(2, 4)},
        {"bank__captions": torch.ones(3, 5)},
        {"bank__indices": torch.tensor([1, 2])},
        {"bank__indices": torch.tensor([1.0, 2.0, 3.0])},
        {"bank__indices": torch.ones(3, 1, dtype=torch.int64)},
        {"bank__indices": torch.tensor([1, -1, 2])},
        {"bank__indices": torch.tensor([1, 2**31, 2])},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_damaged_place_within_an_epoch_is_refused(saved, changes):
    with pytest.raises(InputError, match="--resume.*damaged"):
        restored(saved, progress_with(**changes))


def test_a_bank_of_another_width_is_refused(saved):
    bank = [torch.ones(3, 6), torch.ones(3, 6), torch.arange(3)]
    with pytest.raises(InputError, match="--resume.*its memory bank is damaged"):
        restored(saved, progress_with(bank=bank))


# Models saved whole -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["state_dict", "flat", "parallel"])
def test_a_model_s_own_state_opens_as_the_released_list_does(evaluated, form):
    content = load("runs/runX/model_best.pth.tar")
    model = VSE(content["opt"])
    model.load_state_dict(content["model"])
    state = model.state_dict()
    prefix = "module." * (form == "parallel")
    flat = {f"{prefix}{name}": value for name, value in state.items()}
    content = {"model": state if form == "state_dict" else flat, "opt": content["opt"]}
    del content["opt"].caption_reading
    torch.save(content, "whole.pth.tar")
    opened = checkpoint.load("whole.pth.tar")
    assert states_equal(opened["model"], [state[0], state[1]])
    # HAL's own code would have read the captions otherwise, and saved a list.
    assert hasattr(opened["opt"], "local_alpha") and checkpoint.caption_reading(opened) == "text"
