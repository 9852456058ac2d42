"""What the training calls leave alone: a model's state, copies and pickles; and states in every form.

Their numbers are in tests/family/test_model_calls.py.
"""

import copy
import pickle

import pytest
import torch

from layers.training_calls import States, both_states
from model import SCAN, VSE
from runtime.errors import InputError
from tests.helpers.made import states_equal
from tests.test_model import captions_of, options, scan_options

NUMBERS = {"learning_rate": 0.01, "grad_clip": 2.0, "margin": 0.2, "max_violation": True}
BATCH = torch.randn(3, 5), captions_of([4, 3, 2]), [4, 3, 2], (7, 8, 9)


def trained(**changes):
    """A VSE after one step."""
    model = VSE(options(**{"measure": "cosine", **NUMBERS, **changes}))
    model.train_emb(*BATCH)
    return model


def test_a_step_adds_nothing_to_the_state():
    fresh, model = VSE(options()), trained()
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in fresh.named_modules()
    ]
    assert [*fresh.state_dict()[0], *fresh.state_dict()[1]] == [
        name.split(".", 1)[1] for name, _ in fresh.named_parameters()
    ]


def test_nothing_is_made_before_its_first_use():
    model = VSE(options())  # has neither a rate nor a margin
    with pytest.raises(InputError, match="model's criterion needs an option .*'margin'"):
        model.criterion  # noqa: B018
    model.Eiters = 3
    assert model.Eiters == 3 and model.logger is None


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_a_copy_has_the_weights_and_an_optimizer_of_its_own(copied):
    model = trained()
    other = copied(model)
    assert states_equal([other.state_dict()], [model.state_dict()])
    assert other.Eiters == 0 and not other.optimizer.state
    before = copy.deepcopy(model.state_dict())
    other.train_emb(*BATCH)
    assert states_equal([before], [model.state_dict()])
    assert not states_equal([before], [other.state_dict()])


def test_a_criterion_of_one_s_own_stays_outside_the_state():
    model = VSE(options(**NUMBERS))
    mine = model.criterion = torch.nn.Bilinear(4, 4, 1)
    assert model.criterion is mine
    assert not any(name.startswith("criterion") for name in model.state_dict())
    assert any(weight is model.criterion.weight for weight in model.params)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_weight_decay_among_the_options_is_adamw_s(decay):
    (group,) = trained(weight_decay=decay).optimizer.param_groups
    assert type(trained(weight_decay=decay).optimizer).__name__ == ("AdamW" if decay else "Adam")
    assert group["weight_decay"] == decay and group["lr"] == 0.01


def test_a_frozen_cnn_is_not_trained_and_a_finetuned_one_is():
    raw = {"data_name": "coco", "cnn_type": "resnet18", "cnn_weights": "none", "measure": "cosine"}
    for finetune in (False, True):
        model = VSE(options(**raw, **NUMBERS, finetune=finetune))
        ids = {id(weight) for weight in model.params}
        assert (id(model.img_enc.cnn.module.conv1.weight) in ids) == finetune
        assert id(model.img_enc.fc.weight) in ids and id(model.txt_enc.embed.weight) in ids


def test_a_step_of_scan_takes_no_bank():
    model = SCAN(scan_options(**NUMBERS))
    bank = {"mb_img": torch.ones(2, 4), "mb_cap": torch.ones(2, 4), "mb_ind": [1, 2]}
    with pytest.raises(InputError, match="no memory bank: call it with"):
        model.train_emb(torch.randn(3, 6, 5), *BATCH[1:], **bank)


FORMS = ["flat", "parallel", "compiled", "list", "tuple", "States", "numbered"]


@pytest.mark.parametrize("form", FORMS)
def test_both_states_are_found_in_every_form(form):
    model = trained()
    state = model.state_dict()
    forms = {
        "flat": dict(state),
        "parallel": torch.nn.DataParallel(model).state_dict(),
        "compiled": {f"_orig_mod.{name}": value for name, value in state.items()},
        "list": [state[0], state[1]],
        "tuple": (state[0], state[1]),
        "States": state,
        "numbered": pickle.loads(pickle.dumps(state)),
    }
    assert states_equal(both_states(forms[form]), [state[0], state[1]])


@pytest.mark.parametrize("other", [{}, {"fc.weight": 1}, [1], {"img_enc.a": 1, "sim_enc.b": 2}])
def test_another_model_s_state_is_none(other):
    assert both_states(other) is None


def test_a_copied_state_stays_one():
    state = trained().state_dict()
    for other in (copy.copy(state), copy.deepcopy(state), state.copy()):
        assert type(other) is States and states_equal([other[1]], [state[1]])
    with pytest.raises(IndexError):
        state[2]


def test_a_subclass_s_further_parts_are_saved():
    class More(VSE):
        def __init__(self, opt):
            super().__init__(opt)
            self.extra = torch.nn.Linear(2, 3)

    model, other = More(options()), More(options())
    state = model.state_dict()
    assert list(state[1]) == list(VSE(options()).state_dict()[1])
    other.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert torch.equal(other.extra.weight, model.extra.weight)
    assert states_equal([other.state_dict()], [state])


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_is_loaded_as_pytorch_s_own_tools_do(assign):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other, third = trained(), VSE(options()), VSE(options())
    set_model_state_dict(other, get_model_state_dict(model))
    third.load_state_dict([model.state_dict()[0], model.state_dict()[1]], assign=assign)
    assert states_equal([other.state_dict()], [model.state_dict()])
    assert states_equal([third.state_dict()], [model.state_dict()])
    shared = third.img_enc.fc.weight.data_ptr() == model.img_enc.fc.weight.data_ptr()
    assert shared == assign
