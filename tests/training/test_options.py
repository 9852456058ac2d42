"""train.py's flags: the released codes' defaults and recipes, and flags that contradict each other."""

import pytest

import train
from runtime.errors import InputError
from tests.helpers.made import DEFAULTS, TINY
from training.options import parse_args

COMMON = "--data_path data --vocab_path vocab --logger_name runs/x/log --model_name runs/x/log --max_violation --bi_gru"

RECIPES = {  # as the released code's README has them; COCO's differ in the last flags
    "t2i LSE": "--agg_func=LogSumExp --cross_attn=t2i --lambda_lse=6 --lambda_softmax=9",
    "t2i AVG": "--agg_func=Mean --cross_attn=t2i --lambda_softmax=9",
    "i2t LSE": "--agg_func=LogSumExp --cross_attn=i2t --lambda_lse=5 --lambda_softmax=4",
    "i2t AVG": "--agg_func=Mean --cross_attn=i2t --lambda_softmax=4",
}

COCO = " --lambda_lse=20 --num_epochs=20 --lr_update=10 --learning_rate=.0005"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_released_recipes_are_taken_as_written(recipe):
    opt = parse_args(f"{COMMON} --data_name f30k_precomp {RECIPES[recipe]}".split())
    assert (
        (opt.num_epochs, opt.lr_update, opt.learning_rate) == (30, 15, 2e-4)
        and opt.max_violation
        and opt.bi_gru
    )
    assert (opt.agg_func == "Mean") == ("AVG" in recipe) and opt.cross_attn == recipe[:3]
    opt = parse_args(f"{COMMON} --data_name coco_precomp {RECIPES[recipe]}{COCO}".split())
    assert (opt.num_epochs, opt.lr_update, opt.lambda_lse) == (20, 10, 20)


def test_without_cross_attention_the_defaults_are_hal_s():
    opt = parse_args([])
    assert (opt.cross_attn, opt.num_epochs, opt.lr_update) == (None, 15, 8)


def test_the_released_flags_have_their_defaults():
    found = vars(parse_args([]))
    assert {name: found[name] for name in DEFAULTS} == DEFAULTS
    assert {name: type(found[name]) for name in DEFAULTS} == {
        name: type(value) for name, value in DEFAULTS.items()
    }
    assert found["img_dim"] is None


@pytest.mark.parametrize(
    "flag, allowed, refused",
    [
        ("margin", ["0", "0.5"], ["-0.1", "nan"]),
        ("local_alpha", ["1e-3", "60"], ["0", "-1"]),
        ("local_ep", ["-0.2", "0", "0.7"], ["inf", "-inf"]),
        ("temperature", ["0.01", "1"], ["0", "-0.07"]),
    ],
)
def test_a_loss_s_numbers_stay_where_its_formula_makes_sense(flag, allowed, refused):
    for text in allowed:
        assert getattr(parse_args([f"--{flag}={text}"]), flag) == float(text)
    for text in refused:
        with pytest.raises(InputError, match=f"--{flag}: {text} is out of range"):
            parse_args([f"--{flag}={text}"])


def test_a_loss_by_name_beside_the_flag_of_another_is_refused(workdir):
    with pytest.raises(InputError, match="--loss hal and --max_violation name two losses"):
        train.main([*TINY, "--loss", "hal", "--max_violation"])
