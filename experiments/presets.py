"""The comparisons that reproduce.py runs."""

import itertools
import math
import random
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from runtime.errors import InputError
from runtime.files import check_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
FOLDER = Path(__file__).resolve().parent / "presets"

# train.py's flags that reproduce.py sets for each run.
OWN_FLAGS = (
    *("data_path", "vocab_path", "data_name", "num_epochs", "seed", "logger_name", "resume"),
    *("device", "help"),
)


class Model(NamedTuple):
    """What is trained: train.py's flags, and the values to try of further ones.

    flags: ("--max_violation", ...); tried: {"learning_rate": [0.001, ...], ...}, whose first
    values make the first trial.
    """

    flags: tuple
    tried: dict


class Preset(NamedTuple):
    """What is compared on one data set.

    The keys of a TOML file are these, but for the name, which is the file's, and `curves`, which
    follows from the models: {flag: {model's name in the file: {value: model}}}, of each model that
    is made `each` of three values or more of one flag.
    """

    name: str
    data_name: str
    models: dict
    title: str = ""
    batch_size: int = 128
    num_epochs: int = 13
    lr_update: int = 8
    trials: int = 8
    pilot_epochs: int = 2
    finalists: int = 1
    seeds: tuple = (0, 1, 2)
    train: tuple = ()
    tests: dict = {"test": ("--split", "test")}
    ensembles: dict = {}
    pairs: tuple = ()
    curves: dict = {}


def bundled():
    """Names of the presets in the folder `presets/`, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_preset(given):
    """The Preset of a bundled name or of a TOML file's path; raises InputError if it is neither."""
    path = FOLDER / f"{given}.toml" if given in bundled() else Path(given)
    if path.suffix != ".toml":
        raise InputError(
            f"--preset {given} is not one of {', '.join(bundled())}: give one of these, or the "
            "path of your own file, which ends in .toml"
        )
    check_regular(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--preset {path} cannot be read ({reason}): give a TOML file") from error
    try:
        return preset_of(path.stem, content)
    except ValueError as error:
        raise InputError(f"--preset {path}: {error}") from error


def preset_of(name, content):
    """The Preset of a TOML file's content; raises ValueError about the first key that is wrong."""
    check_keys("", content, {*CHECKS}, ("data_name", "models"))
    content["models"], curves = expanded(content["models"])
    values = {key: CHECKS[key](key, value) for key, value in content.items()}
    models, ensembles = values["models"], values.get("ensembles", {})
    for ensemble, members in ensembles.items():
        check_members(f"ensembles.{ensemble}", members, models)
        if ensemble in models:
            raise ValueError(f"ensembles.{ensemble} has a model's name: give it another")
    for pair in values.get("pairs", ()):
        check_members("pairs", pair, {**models, **ensembles})
        if len(pair) != 2:
            raise ValueError(f"pairs has {list(pair)}: give two names in each")
    return Preset(name, **values, curves=curves)


def expanded(models):
    """The table `models` without `each`, and the Preset's curves.

    A model "HAL alpha {local_alpha}" with `each.local_alpha = [20, 30]` stands for two models, "HAL
    alpha 20" and "HAL alpha 30"; with `each` of several flags, for one of every combination.
    Raises ValueError about the first key that is wrong.
    """
    found, curves = {}, {}
    if not isinstance(models, dict):
        return models, curves
    for name, own in models.items():
        if not isinstance(own, dict) or "each" not in own:
            made = {(): (name, own)}
        else:
            made = models_of_each(name, own)
        for values, (full, one) in made.items():
            if full in found:
                raise ValueError(f"models has {full!r} twice: give each a name of its own")
            found[full] = one
            if len(values) == 1 and len(made) > 2:
                flag = next(iter(own["each"]))
                curves.setdefault(flag, {}).setdefault(name, {})[values[0]] = full
    return found, curves


def models_of_each(name, own):
    """{values of the flags in `each`: (name, table without `each`)} of one such model."""
    key, others = f"models.{name}", {part: value for part, value in own.items() if part != "each"}
    each = _table(f"{key}.each", own["each"], lambda name, own: _list(name, own, _value))
    tried = own.get("tried", {})
    for flag in each:
        if f"{{{flag}}}" not in name:
            raise ValueError(f"{key}.each.{flag} needs {{{flag}}} in the model's name: add it")
        if flag in tried:
            raise ValueError(f"{key}.tried.{flag} is in each, too: leave one out")
    made = {}
    for values in itertools.product(*each.values()):
        full = name
        for flag, value in zip(each, values):
            full = full.replace(f"{{{flag}}}", str(value))
        one = {flag: [value] for flag, value in zip(each, values)}
        made[values] = full, {**others, "tried": {**tried, **one}}
    return made


def check_keys(where, table, known, required=()):
    """Raise ValueError unless a table has the required keys and no unknown one."""
    for key in table:
        if key not in known:
            raise ValueError(
                f"unknown key {where}{key}: the keys here are {', '.join(sorted(known))}"
            )
    for key in required:
        if key not in table:
            raise ValueError(f"{where}{key} is missing: add it")


def check_members(key, members, known):
    """Raise ValueError unless all members are names that the preset has, each named once."""
    for member in members:
        if member not in known:
            raise ValueError(f"{key} names {member!r}, which is not one of {', '.join(known)}")
    if len(set(members)) < max(2, len(members)):
        raise ValueError(f"{key} is {list(members)}: give two different names or more")


def _text(key, value):
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {value!r}: give text in quotes")
    return value


def _count(key, value, low=1):
    if type(value) is not int or not low <= value < 2**63:
        raise ValueError(f"{key} is {value!r}: give a whole number, at least {low}")
    return value


def _list(key, value, check):
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} is {value!r}: give a list in brackets")
    found = tuple(check(key, one) for one in value)
    if len(set(found)) < len(found):
        raise ValueError(f"{key} is {value!r}: give each value once")
    return found


def _names(key, value):
    return _list(key, value, _text)


def _value(key, value):
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{key} has the value {value!r}: give finite numbers")
    return value


def _flags(key, value):
    """The flags of a text, as a shell splits it."""
    _text(key, value)
    try:
        flags = tuple(shlex.split(value))
    except ValueError as error:
        raise ValueError(f"{key} is {value!r}: give flags ({error})") from error
    for flag in flags:
        if flag.startswith("--") and flag[2:].split("=")[0] in OWN_FLAGS:
            raise ValueError(
                f"{key} has {flag}, which reproduce.py sets for each run: leave it out"
            )
    return flags


def _table(key, value, check):
    """{name: checked value} of a table whose names serve as those of files or folders."""
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{key} is {value!r}: give a table with one entry or more")
    for name in value:
        if name != name.strip(" .") or not name or set("/\\|\n\0") & set(name) or " - " in name:
            raise ValueError(
                f"{key} has the name {name!r}, which cannot be that of a folder and stand in a "
                "table: give letters, digits, spaces, '+', ',' and '-' without a space on each side"
            )
    return {name: check(f"{key}.{name}", own) for name, own in value.items()}


def _model(key, value):
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}: give a table with flags, tried or both")
    check_keys(f"{key}.", value, {*Model._fields}, ("tried",))
    tried = _table(f"{key}.tried", value["tried"], lambda name, own: _list(name, own, _value))
    for flag in tried:
        if flag in OWN_FLAGS:
            raise ValueError(f"{key}.tried.{flag} is what reproduce.py sets: leave it out")
    return Model(_flags(f"{key}.flags", value["flags"]) if "flags" in value else (), tried)


CHECKS = {
    "title": _text,
    "data_name": _text,
    **dict.fromkeys(
        ("batch_size", "num_epochs", "lr_update", "trials", "pilot_epochs", "finalists"), _count
    ),
    "seeds": lambda key, value: _list(key, value, lambda key, seed: _count(key, seed, 0)),
    "train": _flags,
    "pairs": lambda key, value: _list(key, value, _names),
    "tests": lambda key, value: _table(key, value, _flags),
    "models": lambda key, value: _table(key, value, _model),
    "ensembles": lambda key, value: _table(key, value, _names),
}


def trials_of(tried, count):
    """`count` different settings [{flag: value}] to try, the same every time.

    tried: {flag: values}; the first setting takes each flag's first value, the others are drawn.
    Raises InputError if there are not so many.
    """
    first, *others = [dict(zip(tried, values)) for values in itertools.product(*tried.values())]
    if count > 1 + len(others):
        raise InputError(
            f"--trials {count}: {', '.join(tried)} have {1 + len(others)} settings in all: give "
            "fewer"
        )
    return [first, *random.Random(0).sample(others, count - 1)]


def setting_name(setting):
    """The part of a run folder's name that tells its setting: "lr0.001_margin0.2"."""
    parts = "_".join(f"{name}{value:g}" for name, value in setting.items())
    return parts.replace("learning_rate", "lr")
