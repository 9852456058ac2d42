"""Compares several models on one data set over seeds, such as the paper's four losses.

    python3 reproduce.py --preset smoke                       # the sample data, minutes
    python3 reproduce.py --preset f8k --data_path data
    python3 reproduce.py --preset coco --data_path data --devices cuda:0 cuda:1 cuda:2 cuda:3
    python3 reproduce.py --preset my_comparison.toml --data_path data

A preset is a TOML file, and `experiments/presets.py` says what stands in it. Every model gets the
same number of trials over its own parameters (learning rate and margin, for example, or learning
rate, alpha and epsilon). The setting with the best dev rsum after a few epochs of the first seed
then runs with all seeds; with several finalists, the one that ends best with the first seed does.

The script calls train.py and compute_results.py as anyone would. Finished runs are kept, collapsed
ones too: after a stop, a crash or with more seeds the same command runs only what is missing. It
writes results.json, results.md and plots into --output.
"""

import os
import signal
import sys

import torch

from experiments import records
from experiments.presets import OWN_FLAGS, bundled, read_preset, trials_of
from experiments.runner import Calls, Comparison, Stopped, keep_settings, run_all, unpack_settings
from experiments.tables import check_page, write_page, write_results
from runtime import distributed
from runtime.errors import ArgumentParser, InputError, number, path_type, run_script
from runtime.files import lock


def parse_args(argv=None):
    """The script's flags; what is not given comes from the preset.

    `preset` becomes a Preset; `models` {name: Model}, `settings` {name: [{flag: value}]} and
    `ensembles` {name: members} are those of --losses.
    """
    parser = ArgumentParser("Compare several models on one data set over seeds.")
    add_what(parser.add_argument_group("what to compare"))
    add_schedule(parser.add_argument_group("trials and epochs"))
    add_places(parser.add_argument_group("where"))
    opt = parser.parse_args(argv)
    if opt.convert_record:
        if not opt.record:
            raise InputError("--convert_record needs --record: name the file to write")
        return opt
    if not opt.preset:
        raise InputError(f"--preset is missing: give one of {', '.join(bundled())}, or a path")
    complete(opt)
    check_flags(opt)
    return opt


def add_what(what):
    """Add the flags that say what is compared to a group of the parser."""
    what.add_argument(
        "--preset",
        help=f"{', '.join(bundled())}, or the path of your own TOML file (see "
        "experiments/presets.py): data set, models, schedule and what is tried",
    )
    what.add_argument(
        "--losses",
        nargs="+",
        metavar="NAME",
        help="only these models and ensembles of the preset (default: all)",
    )
    what.add_argument(
        "--seeds",
        nargs="+",
        type=number(int, 0),
        help="trials use the first one (default: the preset's)",
    )
    what.add_argument(
        "--amp", default="off", choices=["off", "bf16"], help="train.py's --amp, for all runs"
    )
    what.add_argument(
        "train_flags",
        nargs="*",
        default=[],
        help="after --: more flags for every train.py (default: none)",
    )


def add_schedule(schedule):
    """Add the flags that say what is tried and for how long to a group of the parser."""
    schedule.add_argument(
        "--trials",
        type=number(int, 1),
        help="settings tried for each model (default: the preset's)",
    )
    schedule.add_argument(
        "--learning_rates",
        nargs="+",
        type=number(float, 0, low_allowed=False),
        help="learning rates to try for all models, instead of the preset's",
    )
    schedule.add_argument(
        "--pilot_epochs",
        type=number(int, 1),
        help="epochs after which a setting is chosen (default: the preset's)",
    )
    schedule.add_argument(
        "--finalists",
        type=number(int, 1),
        help="settings trained to the end with the first seed before the best one is chosen "
        "(default: the preset's)",
    )
    schedule.add_argument(
        "--num_epochs", type=number(int, 1), help="epochs of a run (default: the preset's)"
    )


def add_places(where):
    """Add the flags that say where data, runs and results are, to a group of the parser."""
    where.add_argument(
        "--data_path", type=path_type, default="data", help="folder of the data sets"
    )
    where.add_argument(
        "--vocab_path", type=path_type, default="./vocab/", help="folder of the vocabulary"
    )
    where.add_argument(
        "--output",
        type=path_type,
        help="folder for runs and results (default: runs/reproduce_<preset>)",
    )
    where.add_argument(
        "--record",
        type=path_type,
        metavar="FILE.json",
        help="write there, and into FILE.npz, after a stop or at the end, all that the results are "
        "made of, without the weights",
    )
    where.add_argument(
        "--from_record",
        type=path_type,
        metavar="FILE.json",
        help="first unpack this record into --output, to go on from it; run folders that "
        "are there already stay as they are",
    )
    where.add_argument(
        "--convert_record",
        type=path_type,
        metavar="DIR",
        help="write --record from a record that is a folder, as older versions made it, and end",
    )
    where.add_argument(
        "--page",
        type=path_type,
        metavar="FILE.md",
        help="also write the tables as this page, and the plots beside it",
    )
    where.add_argument(
        "--devices",
        nargs="+",
        help="devices that take one run at a time each (default: all GPUs, else auto); a name may "
        "be repeated: with cpu cpu two runs share the cores",
    )


def complete(opt):
    """Fill in what is not given, from the preset and the machine."""
    opt.preset = preset = read_preset(opt.preset)
    for name in ("seeds", "trials", "pilot_epochs", "finalists", "num_epochs"):
        if getattr(opt, name) is None:
            setattr(opt, name, getattr(preset, name))
    opt.finalists = min(opt.finalists, opt.trials)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    opt.devices = opt.devices or gpus or ["auto"]
    opt.seeds = list(dict.fromkeys(opt.seeds))
    names = chosen_names(opt.losses, preset)
    opt.ensembles = {name: own for name, own in preset.ensembles.items() if name in names}
    opt.models = {name: model for name, model in preset.models.items() if name in names}
    if opt.learning_rates:
        rates = {"learning_rate": tuple(dict.fromkeys(opt.learning_rates))}
        for name, model in opt.models.items():
            opt.models[name] = model._replace(tried={**model.tried, **rates})
    opt.settings = {name: trials_of(own.tried, opt.trials) for name, own in opt.models.items()}
    opt.output = os.path.abspath(opt.output or os.path.join("runs", f"reproduce_{preset.name}"))


def chosen_names(losses, preset):
    """The models and ensembles of --losses, by default all; raises InputError for an unknown one.

    An ensemble needs its members.
    """
    known = {**dict.fromkeys(preset.models, ()), **preset.ensembles}
    names = losses or list(known)
    for name in names:
        if name not in known:
            raise InputError(
                f"--losses {name!r} is not one of {preset.name}'s: {', '.join(map(repr, known))}"
            )
        if not set(known[name]) <= set(names):
            members = " and ".join(map(repr, known[name]))
            raise InputError(f"--losses {name!r} is the mean of {members}: name these, too")
    return names


def check_flags(opt):
    """Raise InputError for flags that do not go together."""
    if opt.pilot_epochs > opt.num_epochs:
        raise InputError(
            f"--pilot_epochs {opt.pilot_epochs} is more than --num_epochs {opt.num_epochs}: give "
            "fewer"
        )
    own = {"-h", "--amp", *(f"--{name}" for name in OWN_FLAGS)}
    for model in opt.preset.models.values():
        own |= {flag for flag in model.flags if flag.startswith("--")}
        own |= {f"--{name}" for name in model.tried}
    for flag in opt.train_flags:
        if flag.split("=")[0] in own:
            raise InputError(
                f"{flag.split('=')[0]} after -- is what this script decides for each run: leave it "
                "out (see reproduce.py --help)"
            )


def main(argv=None):
    """Compare as the flags say."""
    if distributed.launched():
        raise InputError(
            "reproduce.py starts its runs itself, each as one process: start it without torchrun"
            if distributed.is_first()
            else ""
        )
    opt = parse_args(argv)
    if opt.convert_record:
        records.convert(opt.convert_record, opt.record)
        return
    if opt.page:
        check_page(opt.page)
    record = records.read_record(opt.from_record) if opt.from_record else None
    if opt.record:
        records.check_name(opt.record, "--record")
    with lock(opt.output, "--output"):
        if record:
            unpack_settings(opt, record["settings.json"])
            records.unpack(opt.from_record, record, opt.output)
        if opt.record:
            records.check_record(opt.record, opt.output)
        compare(opt)


def curves_of(opt):
    """{flag: {name: [(value, model), ...]}} of the models that are compared, see Preset."""
    return {
        flag: {
            name: [(value, model) for value, model in own.items() if model in opt.models]
            for name, own in families.items()
        }
        for flag, families in opt.preset.curves.items()
    }


def compare(opt):
    """Choose settings, run all seeds, write the results."""
    settings, calls = keep_settings(opt), Calls(opt.devices)
    for number_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number_, calls.stop)
    try:
        results = {
            "settings": settings,
            "data_name": opt.preset.data_name,
            "seeds": opt.seeds,
            "finalists": opt.finalists,
            "pairs": opt.preset.pairs,
            "curves": curves_of(opt),
            **run_all(opt, Comparison(opt, calls)),
        }
    except Stopped:
        print("Stopped. The same command goes on.", file=sys.stderr)
        sys.exit(128 + calls.signal)
    finally:
        if opt.record:
            records.keep(opt.output, opt.record)
    write_results(opt.output, results)
    if opt.page:
        write_page(opt.page, opt.preset, opt.output)


if __name__ == "__main__":
    run_script(main, outlasts_reader=True)
