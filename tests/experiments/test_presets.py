"""Presets: what is drawn from the bundled ones, and what is refused in anybody's own."""

import hashlib
import json

import pytest

import reproduce
from experiments.presets import bundled, read_preset, setting_name, trials_of
from runtime.errors import InputError
from tests.helpers.comparisons import FAST, results
from tests.helpers.made import REFERENCE
from training.options import parse_args

# What each preset was when they were still code: output folders of that time go on.
FIRST = json.loads((REFERENCE / "first_presets.json").read_text())

OWN = """
data_name = "sample_precomp"
num_epochs = 2
pilot_epochs = 1
trials = 1
seeds = [0, 2]

[models."my HAL"]
tried.learning_rate = [0.001]
tried.local_alpha = [30]

[models.max]
flags = "--max_violation"
tried.learning_rate = [0.0005]
"""


@pytest.mark.parametrize("preset", bundled())
def test_every_model_has_as_many_trials_each_of_its_own_parameters_and_the_same_every_time(preset):
    opt, again = (reproduce.parse_args(["--preset", preset]) for _ in range(2))
    assert opt.settings == again.settings
    for name, settings in opt.settings.items():
        tried = opt.models[name].tried
        assert len({tuple(setting.items()) for setting in settings}) == len(settings) == opt.trials
        assert all(
            setting.keys() == tried.keys() and all(setting[flag] in tried[flag] for flag in tried)
            for setting in settings
        )
        assert settings[0] == {flag: values[0] for flag, values in tried.items()}
    assert all(set(members) <= set(opt.models) for members in opt.preset.ensembles.values())


@pytest.mark.parametrize("preset", bundled())
def test_the_flags_of_every_run_are_train_s(preset):
    opt = reproduce.parse_args(["--preset", preset])
    for name, (flags, _) in opt.models.items():
        setting = [
            part
            for flag, value in opt.settings[name][-1].items()
            for part in (f"--{flag}", str(value))
        ]
        parse_args([*flags, *setting, *opt.preset.train])


def test_more_trials_than_settings_are_refused():
    with pytest.raises(
        InputError, match="--trials 99: learning_rate, margin have 8 settings in all"
    ):
        reproduce.parse_args([*FAST, "--trials", "99"])


@pytest.mark.parametrize("name", FIRST)
def test_a_bundled_preset_draws_the_runs_that_it_always_drew(name):
    preset = read_preset(name)
    settings = {model: trials_of(own.tried, preset.trials) for model, own in preset.models.items()}
    runs = {model: list(map(setting_name, own)) for model, own in settings.items()}
    assert runs == FIRST[name]["runs"] and list(runs) == list(FIRST[name]["runs"])
    keys = (
        "data_name",
        "batch_size",
        "num_epochs",
        "lr_update",
        "trials",
        "pilot_epochs",
        "finalists",
        "seeds",
        "train",
        "tests",
        "pairs",
        "ensembles",
        "models",
    )
    content = {key: getattr(preset, key) for key in keys} | {"settings": settings}
    content["models"] = {model: own._asdict() for model, own in preset.models.items()}
    assert hashlib.sha256(json.dumps(content).encode()).hexdigest() == FIRST[name]["sha256"]


def test_somebody_s_own_comparison_needs_a_file_alone(scripts):
    with open("mine.toml", "w") as file:
        file.write(OWN)
    reproduce.main(["--preset", "mine.toml", "--devices", "cpu"])
    assert list(results("runs/reproduce_mine/results.json")["runs"]) == ["my HAL", "max"]
    assert [call for call in scripts() if call.startswith("train")] == [
        f"train {kind} {rate} {seed} {epochs} cpu"
        for seed, epochs in ((0, 1), (0, 2), (2, 2))
        for kind, rate in (("HAL", "0.001"), ("max", "0.0005"))
    ]


@pytest.mark.parametrize(
    "old, new, says",
    [
        (
            "trials = 1",
            "trails = 1",
            "unknown key trails: the keys here are batch_size, data_name,",
        ),
        ("trials = 1", "trials = 0", "trials is 0: give a whole number, at least 1"),
        ("trials = 1", "trials = true", "trials is True: give a whole number"),
        ("trials = 1", "name = 'x'", "unknown key name"),
        ('data_name = "sample_precomp"', "", "data_name is missing: add it"),
        ("seeds = [0, 2]", "seeds = [0, 0]", r"seeds is \[0, 0\]: give each value once"),
        ("seeds = [0, 2]", "seeds = 3", "seeds is 3: give a list"),
        ("seeds = [0, 2]", "seeds = []", r"seeds is \[\]: give a list"),
        (
            "seeds = [0, 2]",
            "pairs = [['max', 'mean']]",
            "pairs names 'mean', which is not one of my HAL, max",
        ),
        ("seeds = [0, 2]", "pairs = [['max', 'max']]", "pairs is .*: give"),
        ("seeds = [0, 2]", "pairs = [['max']]", r"pairs is \['max'\]: give two"),
        ("seeds = [0, 2]", "train = '--seed 3'", "train has --seed, which reproduce.py sets"),
        ("seeds = [0, 2]", 'train = "--x \'y"', "train .*No closing quotation"),
        ("flags =", "flag =", "unknown key models.max.flag: the keys here are flags, tried"),
        (
            '"--max_violation"',
            '"--max_violation --resume=x"',
            "models.max.flags has --resume=x, which",
        ),
        ('"--max_violation"', "['--max_violation']", "models.max.flags is .*: give text in quotes"),
        ("[0.0005]", "0.0005", "models.max.tried.learning_rate is 0.0005: give a list"),
        (
            "[0.0005]",
            "['a']",
            "models.max.tried.learning_rate has the value 'a': give finite numbers",
        ),
        ("[0.0005]", "[nan]", "has the value nan"),
        (
            "tried.learning_rate = [0.0005]",
            "tried.seed = [1]",
            "models.max.tried.seed is what reproduce.py sets",
        ),
        ("tried.learning_rate = [0.0005]", "", "models.max.tried is missing: add it"),
        (
            "[models.max]",
            "[models.'../x']",
            "models has the name '../x', which cannot be that of a folder",
        ),
        ("[models.max]", "[models.'a - b']", "models has the name 'a - b'"),
        (
            "[models.max]",
            "[models]\nmax = 3\n[tests]",
            "models.max is 3: give a table|cannot be read",
        ),
        (
            "[models.max]",
            "[ensembles]\nboth = ['my HAL']\n[models.max]",
            "ensembles.both is .*give two different",
        ),
        (
            "[models.max]",
            "[ensembles]\nmax = ['my HAL', 'max']\n[models.max]",
            "ensembles.max has a model's name",
        ),
        ("trials = 1", "trials = ", "cannot be read"),
        (
            "tried.learning_rate = [0.0005]",
            "each.learning_rate = [0.0005]",
            r"models.max.each.learning_rate needs {learning_rate} in the model's name: add it",
        ),
        (
            "[models.max]",
            "[models.'max {margin}']\neach.margin = 0.1",
            "models.max {margin}.each.margin is 0.1: give a list",
        ),
        (
            "[models.max]",
            "[models.'max {margin}']\ntried.margin = [0.1]\neach.margin = [0.2]",
            "models.max {margin}.tried.margin is in each, too: leave one out",
        ),
        (
            "[models.max]",
            "[models.'my {margin}']\neach.margin = [0.2]\ntried.margin = [1]\n[models.'my 0.2']",
            "tried.margin is in each, too|'my 0.2' twice",
        ),
        ("[models.max]", "[models.max]\neach = 3", "models.max.each is 3: give a table"),
    ],
)
def test_a_preset_s_mistake_is_one_sentence_with_file_and_key(tmp_path, old, new, says):
    path = tmp_path / "mine.toml"
    assert old in OWN
    path.write_text(OWN.replace(old, new))
    with pytest.raises(InputError, match=f"^--preset {path}:? .*{says}") as error:
        reproduce.parse_args(["--preset", str(path)])
    assert "\n" not in str(error.value)


def test_a_model_made_each_of_several_values_is_as_many_models(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        OWN
        + """
[models."a{local_alpha} e{local_ep}"]
tried.learning_rate = [0.1, 0.2]
each.local_alpha = [20, 30]
each.local_ep = [0.5, 1]

[models."batch {batch_size}"]
flags = "--sum_violation"
each.batch_size = [64, 8, 32]

[models."margin {margin}"]
each.margin = [0.1, 0.2]
"""
    )
    preset = read_preset(str(path))
    rates = {"learning_rate": (0.1, 0.2)}
    assert {name: own for name, own in preset.models.items() if name[0] in "ae"} == {
        "a20 e0.5": ((), {**rates, "local_alpha": (20,), "local_ep": (0.5,)}),
        "a20 e1": ((), {**rates, "local_alpha": (20,), "local_ep": (1,)}),
        "a30 e0.5": ((), {**rates, "local_alpha": (30,), "local_ep": (0.5,)}),
        "a30 e1": ((), {**rates, "local_alpha": (30,), "local_ep": (1,)}),
    }
    assert preset.models["batch 8"] == (("--sum_violation",), {"batch_size": (8,)})
    assert preset.curves == {
        "batch_size": {"batch {batch_size}": {64: "batch 64", 8: "batch 8", 32: "batch 32"}}
    }


@pytest.mark.parametrize(
    "given, says",
    [
        (
            "mnist",
            "--preset mnist is not one of ablations_f8k, .*: give one of these, or the path of",
        ),
        ("runs/mine.toml", "--preset runs/mine.toml cannot be read"),
        (".", "--preset . is not one of"),
        ("dir.toml", "dir.toml is a folder"),
    ],
)
def test_a_preset_that_is_not_there_is_one_sentence(tmp_path, monkeypatch, given, says):
    (tmp_path / "dir.toml").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        read_preset(given)
