"""The paper's comparison: sum-margin, max-margin, HAL and HAL with the memory bank on one data set, VSE or SCAN.

    python3 reproduce.py --preset smoke                       # the sample data, minutes
    python3 reproduce.py --preset f8k --data_path data
    python3 reproduce.py --preset coco --data_path data --devices cuda:0 cuda:1 cuda:2 cuda:3
    python3 reproduce.py --preset scan_f30k --data_path data

Every model gets the same number of trials, drawn over its own parameters (learning rate and margin, or learning rate,
alpha and epsilon, for example). The one with the best dev rsum of a first seed after a few epochs, or of several such
finalists the best at their end, runs over all seeds.
Calls train.py and compute_results.py as anyone would. Runs that ended are kept, those that collapsed, too: called again
after a stop, a crash or with more seeds, it goes on where it was. Writes results.json, results.md and plots into
--output.
"""

import itertools
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch

import distributed
import records
from errors import ArgumentParser, InputError, number, replacing, run_script
from records import read_json
from results import write_results
from run_record import lock

SCRIPTS = os.path.dirname(os.path.abspath(__file__))
LAYOUT = 2  # of the output folder
OWN_FLAGS = ("data_path", "vocab_path", "data_name", "num_epochs", "seed", "logger_name", "resume", "amp")
BANK = ("--memory_bank --global_alpha 40 --global_beta 40 --global_ep_posi 0.2 --global_ep_nega 0.1").split()


class Model(NamedTuple):
    """What is trained: train.py's flags, and those that trials are drawn over, each with its values.

    The first values make the first trial.
    """

    flags: tuple
    tried: dict


class Preset(NamedTuple):
    """A data set and what is compared on it; `train`: the flags of all runs."""

    data_name: str
    models: dict  # {name, which serves as a folder: Model}
    ensembles: dict = {}  # {name: names of models whose similarities are averaged}
    batch_size: int = 128
    num_epochs: int = 13
    lr_update: int = 8
    trials: int = 8
    pilot_epochs: int = 2
    finalists: int = 1
    seeds: tuple = (0, 1, 2)
    train: tuple = ()
    tests: dict = {"test": ["--split", "test"]}
    pairs: tuple = ()  # of models: the table of differences has these alone


def vse(rates, alphas, epsilons, max_margin=(), base=()):
    """The paper's four losses on VSE++'s model; max_margin: flags that this loss needs to get going, base: of all."""
    margin = {"learning_rate": rates, "margin": (0.2, 0.1, 0.15, 0.3)}
    hal = {"learning_rate": rates, "local_alpha": alphas, "local_ep": epsilons}
    return {"sum-margin": Model((*base, "--sum_violation"), margin),
            "max-margin": Model((*base, "--max_violation", *max_margin), margin),
            "HAL": Model(tuple(base), hal),
            "HAL+bank": Model((*base, *BANK), {**hal, "mb_rate": (0.05, 0.1, 0.2), "mb_k": (250, 50)})}


def scan(rates, alphas, epsilons, max_margin=(), margin_rates=None, margins=(0.2, 0.1, 0.3)):
    """Max-margin and HAL on SCAN, both ways: i-t AVG and t-i LogSumExp, its better settings in its paper.

    margin_rates: max-margin's learning rates, in place of `rates`. LogSumExp over a caption's dozen words lies about
    log(12) / lambda_lse = 0.4 above their mean, and so do t-i's epsilons above those given.
    """
    margin_rates = margin_rates or rates
    ways = {"i2t": ("--cross_attn", "i2t", "--agg_func", "Mean", "--lambda_softmax", "4", "--bi_gru"),
            "t2i": ("--cross_attn", "t2i", "--agg_func", "LogSumExp", "--lambda_lse", "6", "--lambda_softmax", "9",
                    "--bi_gru")}
    models = {}
    for way, flags in ways.items():
        models[f"SCAN {way} max-margin"] = Model((*flags, "--max_violation", *max_margin),
                                                 {"learning_rate": margin_rates, "margin": margins})
        models[f"SCAN {way} HAL"] = Model(flags, {"learning_rate": rates, "local_alpha": alphas,
                                                  "local_ep": epsilons if way == "i2t" else
                                                  tuple(round(epsilon + 0.4, 1) for epsilon in epsilons)})
    return models


SCAN_ENSEMBLES = {f"SCAN {loss}, both": tuple(f"SCAN {way} {loss}" for way in ("i2t", "t2i"))
                  for loss in ("max-margin", "HAL")}


def regions(rates, alphas, epsilons, max_margin=()):
    """Max-margin, HAL and HAL with the bank on vectors pooled from regions: mean, max and GPO."""
    return {f"{pooling} {loss}": model for pooling in ("mean", "max", "gpo")
            for loss, model in vse(rates, alphas, epsilons, max_margin, ("--image_pooling", pooling)).items()
            if loss != "sum-margin"}


def hal(rate, alpha, epsilon, **more):
    """What HAL tries where it has one setting alone."""
    setting = {"learning_rate": rate, "local_alpha": alpha, "local_ep": epsilon, **more}
    return {name: (value,) for name, value in setting.items()}


def ablations(rate, alphas, epsilons):
    """HAL over its parameters, the bank over its own, and the batch: each model has one setting.

    Alpha 30 and epsilon 0.3 are among those given.
    """
    models = {f"HAL alpha {alpha} epsilon {epsilon}": Model((), hal(rate, alpha, epsilon))
              for alpha in alphas for epsilon in epsilons}
    models |= {f"HAL+bank rate {share} k {k}": Model(tuple(BANK), hal(rate, 30, 0.3, mb_rate=share, mb_k=k))
               for share in (0.05, 0.2) for k in (50, 250)}
    models |= {f"HAL batch {size}": Model((), hal(rate, 30, 0.3, batch_size=size)) for size in (64, 256)}
    return models


def bank_or_not(rate, alpha, epsilons, **bank):
    """HAL without and with the bank, of one setting, at each epsilon."""
    return {f"{name} epsilon {epsilon}": Model(flags, hal(rate, alpha, epsilon, **more)) for epsilon in epsilons
            for name, flags, more in (("HAL", (), {}), ("HAL+bank", tuple(BANK), bank))}


def ablation_pairs(models):
    """HAL in the middle of the grid against all others, and the bank's settings among themselves."""
    middle, banks = "HAL alpha 30 epsilon 0.3", [name for name in models if name.startswith("HAL+bank rate")]
    return *((middle, name) for name in models if name != middle), *itertools.combinations(banks, 2)


def precisions(models):
    """Each model at the first of its settings, in float32 and in bf16."""
    models = {name: Model(flags, {flag: values[:1] for flag, values in tried.items()})
              for name, (flags, tried) in models.items()}
    return {f"{name}{words}": Model((*flags, *amp), tried) for name, (flags, tried) in models.items()
            for words, amp in (("", ()), (" bf16", ("--amp", "bf16")))}


COCO_TESTS = {"5K": ["--split", "testall"], "1K": ["--split", "testall", "--fold5"]}
RATES, F8K_RATES, SCAN_RATES = (0.0005, 0.001, 0.0002, 0.002), (0.004, 0.002, 0.001, 0.008), (0.0005, 0.001, 0.0002)
# Alphas and epsilons around the paper's, which come first: COCO's are 30 and 0.3, Flickr30k's 60 and 0.7.
COCO_HAL, F30K_HAL = ((30, 20, 45), (0.3, 0.2, 0.4)), ((60, 40, 30), (0.7, 0.5, 0.3))
# On Flickr8k all need the learning rate's warm-up, and max-margin, which would stay at its trivial loss for epochs,
# an epoch of sum-margin.
WARM, FIRST_SUM = ("--lr_warmup_steps", "100"), ("--warmup_epochs", "1")
F8K_LOSSES = vse(F8K_RATES, *COCO_HAL, FIRST_SUM)
F8K_ABLATIONS = ablations(0.004, (20, 30, 60), (0.2, 0.3, 0.4, 0.5, 0.7))
PRESETS = {
    "coco": Preset("coco_precomp", vse(RATES, *COCO_HAL), batch_size=512, tests=COCO_TESTS),
    "f30k": Preset("f30k_precomp", vse(RATES, *F30K_HAL)),
    "f8k": Preset("f8k_precomp", F8K_LOSSES, num_epochs=8, lr_update=5, train=WARM,
                  finalists=3, seeds=(0, 1, 2, 3, 4)),
    "ablations_f8k": Preset("f8k_precomp", F8K_ABLATIONS, num_epochs=8, lr_update=5, trials=1, seeds=(0, 1),
                            train=WARM, pairs=ablation_pairs(F8K_ABLATIONS)),
    # Epsilons of 0.3, COCO's, and 0.7, with which HAL does best on dev, as does the bank with this rate and k.
    "bank_f8k": Preset("f8k_precomp", bank_or_not(0.004, 30, (0.3, 0.7), mb_rate=0.2, mb_k=250), num_epochs=8,
                       lr_update=5, trials=1, seeds=(0, 1, 2, 3, 4), train=WARM),
    "bf16_f8k": Preset("f8k_precomp", precisions(F8K_LOSSES), num_epochs=8, lr_update=5, trials=1, seeds=(0, 1),
                       train=WARM, pairs=tuple((name, f"{name} bf16") for name in F8K_LOSSES)),
    "scan_coco": Preset("coco_precomp", scan(SCAN_RATES, *COCO_HAL), SCAN_ENSEMBLES, num_epochs=20, lr_update=10,
                        trials=4, tests=COCO_TESTS),
    "scan_f30k": Preset("f30k_precomp", scan(SCAN_RATES, *COCO_HAL), SCAN_ENSEMBLES, num_epochs=30, lr_update=15,
                        trials=4),
    # The first settings are those that did best for each loss in three trials of i2t, in two of t2i: docs/results.md.
    "scan_f8k": Preset("f8k_grid_precomp",
                       scan((0.001, 0.0005, 0.002), *COCO_HAL, FIRST_SUM, (0.002, 0.001, 0.0005), (0.1, 0.2, 0.3)),
                       SCAN_ENSEMBLES, num_epochs=5, lr_update=4, trials=4, seeds=(0, 1), train=WARM),
    "regions_coco": Preset("coco_precomp", regions(RATES, *COCO_HAL), num_epochs=25, lr_update=15, trials=4,
                           tests=COCO_TESTS),
    "regions_f30k": Preset("f30k_precomp", regions(RATES, *F30K_HAL), num_epochs=25, lr_update=15, trials=4),
    "regions_f8k": Preset("f8k_grid_precomp", regions(F8K_RATES, *COCO_HAL, FIRST_SUM), num_epochs=8, lr_update=5,
                          trials=4, seeds=(0, 1), train=WARM),
    "smoke": Preset("sample_precomp", vse((0.001, 0.0005), *F30K_HAL), num_epochs=2, trials=2, pilot_epochs=1,
                    seeds=(0, 1), train=("--embed_size", "64")),
}


def trials_of(tried, count):
    """`count` different settings [{flag: value}], the same every time: the first values, then others at random.

    Raises InputError where there are not so many.
    """
    first, *others = [dict(zip(tried, values)) for values in itertools.product(*tried.values())]
    if count > 1 + len(others):
        raise InputError(f"--trials {count}: {', '.join(tried)} have {1 + len(others)} settings in all: give fewer")
    return [first, *random.Random(0).sample(others, count - 1)]


def setting_name(setting):
    """A setting as a folder's name begins."""
    return "_".join(f"{name}{value:g}" for name, value in setting.items()).replace("learning_rate", "lr")


def parse_args(argv=None):
    """The script's flags; what is not given comes from the preset."""
    parser = ArgumentParser("Compare sum-margin, max-margin, HAL and HAL with the memory bank.")
    what = parser.add_argument_group("what to compare")
    what.add_argument("--preset", required=True, choices=PRESETS, help="data set, models, schedule and what is tried")
    what.add_argument("--losses", nargs="+", metavar="NAME",
                      help="only these of its models and of their ensembles (default: all)")
    what.add_argument("--seeds", nargs="+", type=number(int, 0), help="the first one is that of the trials")
    what.add_argument("--trials", type=number(int, 1), help="settings tried for each model")
    what.add_argument("--learning_rates", nargs="+", type=number(float, 0, low_allowed=False),
                      help="in place of the preset's, for all models")
    what.add_argument("--pilot_epochs", type=number(int, 1), help="epochs after which a setting is chosen")
    what.add_argument("--finalists", type=number(int, 1),
                      help="settings that go on to the end with the first seed, to choose the best there")
    what.add_argument("--num_epochs", type=number(int, 1), help="epochs of a run")
    what.add_argument("--amp", default="off", choices=["off", "bf16"], help="train.py's, for all runs")
    what.add_argument("train_flags", nargs="*", default=[], help="after --: more flags for every train.py")
    where = parser.add_argument_group("where")
    where.add_argument("--data_path", default="data", help="folder that holds the data sets")
    where.add_argument("--vocab_path", default="./vocab/", help="folder of the vocabulary")
    where.add_argument("--output", help="folder for runs and results (default: runs/reproduce_<preset>)")
    where.add_argument("--record", metavar="DIR",
                       help="also keep there, after a stop or at the end, what the results are made of, without the "
                            "weights; a copy of it is an --output to go on from")
    where.add_argument("--page", metavar="FILE.md",
                       help="also put the results into this page, between its lines <!-- PRESET --> and "
                            "<!-- /PRESET -->, and the plots beside it")
    where.add_argument("--devices", nargs="+",
                       help="one run at a time on each (default: all GPUs, else auto); a name may be repeated: with "
                            "cpu cpu two runs share the cores")
    opt = parser.parse_args(argv)
    complete(opt)
    check_flags(opt)
    return opt


def complete(opt):
    """Fill in, from the preset and the machine, what is not given, and `models` {name: Model}, `ensembles`."""
    preset = PRESETS[opt.preset]
    for name in ("seeds", "trials", "pilot_epochs", "finalists", "num_epochs"):
        if getattr(opt, name) is None:
            setattr(opt, name, getattr(preset, name))
    opt.finalists = min(opt.finalists, opt.trials)
    opt.devices = opt.devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["auto"]
    opt.seeds = list(dict.fromkeys(opt.seeds))
    known = {**{name: () for name in preset.models}, **preset.ensembles}
    names = opt.losses or list(known)
    for name in names:
        if name not in known:
            raise InputError(f"--losses {name!r} is not one of {opt.preset}'s: {', '.join(map(repr, known))}")
        if not set(known[name]) <= set(names):
            raise InputError(f"--losses {name!r} is the mean of {' and '.join(map(repr, known[name]))}: name these, "
                             "too")
    opt.ensembles = {name: members for name, members in preset.ensembles.items() if name in names}
    rates = {"learning_rate": tuple(dict.fromkeys(opt.learning_rates))} if opt.learning_rates else {}
    opt.models = {name: Model(flags, {**tried, **rates}) for name, (flags, tried) in preset.models.items()
                  if name in names}
    opt.settings = {name: trials_of(tried, opt.trials) for name, (_, tried) in opt.models.items()}
    opt.output = os.path.abspath(opt.output or os.path.join("runs", f"reproduce_{opt.preset}"))


def check_flags(opt):
    """Raise InputError for flags that do not go together."""
    if opt.pilot_epochs > opt.num_epochs:
        raise InputError(f"--pilot_epochs {opt.pilot_epochs} is more than --num_epochs {opt.num_epochs}: give fewer")
    models = PRESETS[opt.preset].models.values()
    own = {"-h", "--help", "--device", *(f"--{name}" for name in OWN_FLAGS),
           *(flag for model in models for flag in model.flags if flag.startswith("--")),
           *(f"--{name}" for model in models for name in model.tried)}
    for flag in opt.train_flags:
        if flag.split("=")[0] in own:
            raise InputError(f"{flag.split('=')[0]} after -- is what this script decides for each run: leave it "
                             "out (see reproduce.py --help)")


# Calling the scripts ----------------------------------------------------------------------------

class Stopped(Exception):
    """A signal came: nothing more is started."""


class Calls:
    """Runs the scripts, at most one at a time on each device, and hands signals on to them."""

    def __init__(self, devices):
        self.devices, self.running, self.signal, self.lock = queue.SimpleQueue(), set(), None, threading.RLock()
        for device in devices:
            self.devices.put(device)
        on_cpu = sum(device == "cpu" for device in devices)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.environment = dict(os.environ)
        if on_cpu > 1:
            self.environment["OMP_NUM_THREADS"] = str(max(1, cores // on_cpu))
        self.pool = ThreadPoolExecutor(len(devices))

    def stop(self, number, frame=None):
        """A signal handler: the running scripts get it, too (train.py then saves; a second one ends it at once)."""
        self.signal = number
        with self.lock:
            for process in self.running:
                process.send_signal(number)

    def script(self, name, flags, folder, log):
        """Run a script on a free device, in `folder`, its output appended to `log` there.

        Returns the exit status and, unless it is 0, the sentence it gave up with.
        """
        device = self.devices.get()
        try:
            if self.signal:
                raise Stopped
            path = os.path.join(folder, log)
            os.makedirs(folder, exist_ok=True)
            with open(path, "ab") as output:
                before = output.tell()
                with self.lock:
                    if self.signal:
                        raise Stopped
                    # Its own session: a terminal's Ctrl-C then reaches it once, from `stop`.
                    process = subprocess.Popen(
                        [sys.executable, os.path.join(SCRIPTS, name), *flags, "--device", device], cwd=folder,
                        env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
                    self.running.add(process)
                status = process.wait()
            with self.lock:
                self.running.discard(process)
            if self.signal:
                raise Stopped
            return status, last_error(path, before) if status else None
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error.strerror}): name another --output") from error
        finally:
            self.devices.put(device)

    def map(self, function, items):
        """[function(item)], several at a time; the first error stops everything."""
        def unless_stopped(*item):
            if self.signal:
                raise Stopped
            return function(*item)

        futures = [self.pool.submit(unless_stopped, *item) for item in items]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        except BaseException as error:
            if not isinstance(error, Stopped):
                self.stop(signal.SIGTERM)
            self.pool.shutdown(cancel_futures=True)
            raise


def say(words):
    """A line for people, in one write: of two threads' print, one may end the other's line."""
    print(words + "\n", end="", file=sys.stderr)


def last_error(path, start):
    """The last sentence that a script gave up with in what it wrote after byte `start`, or where to look."""
    with open(path, encoding="utf-8", errors="replace") as file:
        file.seek(start)
        errors = [line for line in file if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ").strip() if errors else f"it failed: see {path}"


# The runs ---------------------------------------------------------------------------------------

class Comparison:
    """The runs of one output folder."""

    def __init__(self, opt, calls):
        self.opt, self.calls, self.preset = opt, calls, PRESETS[opt.preset]

    def folder(self, model, trial, seed):
        """A run's folder: a trial of a setting is the beginning of the run with the same seed."""
        return os.path.join(self.opt.output, model, f"{setting_name(self.opt.settings[model][trial])}_seed{seed}")

    def weights(self, model, trial, seed):
        """A run's best checkpoint."""
        return os.path.join(self.folder(model, trial, seed), "model_best.pth.tar")

    def checked_flags(self, model, trial, seed, epochs):
        """train.py's of a run up to `epochs`; raises InputError where its folder holds a run of others."""
        opt, preset, folder = self.opt, self.preset, self.folder(model, trial, seed)
        flags = {"data_path": os.path.abspath(opt.data_path), "vocab_path": os.path.abspath(opt.vocab_path),
                 "data_name": preset.data_name, "batch_size": preset.batch_size, "lr_update": preset.lr_update,
                 "num_epochs": epochs, "seed": seed, "logger_name": folder, "resume": "auto", "amp": opt.amp,
                 **opt.settings[model][trial]}
        flags = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        flags += [*opt.models[model].flags, *preset.train, *opt.train_flags]
        check_made_so(folder, flags)
        return flags

    def train(self, model, trial, seed, epochs, needed=()):
        """Train up to `epochs`; returns None, or why it could not be trained to there (collapse, for example).

        A run that has ended there, well or not, is not trained again unless one of the files `needed` is missing.
        """
        folder, flags = self.folder(model, trial, seed), self.checked_flags(model, trial, seed, epochs)
        run, name = records.read_run(folder), f"{model}, {os.path.basename(folder)}"
        result = run.get("result") or {"outcome": "failed"}
        if result["outcome"] != "failed" and result["epochs"] >= epochs and all(map(os.path.exists, needed)):
            return None
        if not records.gave_up(run):
            say(f"{name}: training to epoch {epochs}")
            status, why = self.calls.script("train.py", flags, folder, "train.log")
            if status == 0:
                return None
            run = records.read_run(folder)
            if not records.gave_up(run):  # not the loss' fault
                raise InputError(f"{name}: {why}")
            say(f"{name}: {why}")
        return records.gave_up(run)

    def trial(self, model, trial, epochs):
        """The best dev rsum of the first `epochs` with the first seed; None where training failed.

        Kept in a file, as the run may go on, or be made again on another machine.
        """
        seed = self.opt.seeds[0]
        path = os.path.join(self.folder(model, trial, seed), f"trial_{epochs}.json")
        self.checked_flags(model, trial, seed, epochs)
        if not os.path.exists(path):
            failed = self.train(model, trial, seed, epochs)
            rsum = None if failed else max(after["rsum"] for after in self.epochs(model, trial, seed)[:epochs])
            records.write_json(path, {"dev_rsum": rsum})
        return records.read_trial(path)

    def trials(self, cells, epochs):
        """{(model, trial): dev rsum} of some, side by side."""
        return dict(zip(cells, self.calls.map(self.trial, [(*cell, epochs) for cell in cells])))

    def epochs(self, model, trial, seed):
        """What a run's validation gave after each of its epochs, one at least: [{"rsum", ...}, ...]."""
        path = os.path.join(self.folder(model, trial, seed), "log.jsonl")
        names = ("rsum", "i2t_n10_skewness", "t2i_n10_skewness")
        try:
            with open(path, encoding="utf-8") as file:
                lines = [json.loads(line) for line in file]
            last = {line["epoch"]: {name: float(line[name]) for name in names} for line in lines
                    if line["kind"] == "validation"}
            if not last:
                raise ValueError("it has no validation")
            return [last[epoch] for epoch in range(len(last))]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} cannot be read ({error}): delete its folder, and the run is made anew") from error

    def choose(self):
        """({(model, trial): dev rsum, or None} after the first epochs, the same of finalists at their end where there
        are several, {model: the best one's number}); the first is the best where none trains."""
        opt = self.opt
        tried = self.trials([(model, trial) for model in opt.models for trial in range(opt.trials)], opt.pilot_epochs)
        finalists = {model: sorted(range(opt.trials), key=lambda trial: -(tried[model, trial] or 0))[:opt.finalists]
                     for model in opt.models}
        final = {} if opt.finalists == 1 else self.trials(
            [(model, trial) for model, own in finalists.items() for trial in own if tried[model, trial]],
            opt.num_epochs)
        return tried, final, {model: max(own, key=lambda trial: final.get((model, trial)) or 0)
                              for model, own in finalists.items()}

    def run(self, model, trial, seed):
        """Train to the end and test; returns {test's name: compute_results.py's figures} or {"failed": why}."""
        folder, weights = self.folder(model, trial, seed), self.weights(model, trial, seed)
        why = self.train(model, trial, seed, self.opt.num_epochs, [] if self.tested(folder, [weights]) else [weights])
        return {"failed": why} if why else self.test(f"{model}, seed {seed}", folder, [weights])

    def ensemble_of(self, name, chosen, seed):
        """The folder and the checkpoints of the ensemble of a seed's models."""
        members = [(model, chosen[model], seed) for model in self.opt.ensembles[name]]
        settings = "+".join(setting_name(self.opt.settings[model][trial]) for model, trial, _ in members)
        return (os.path.join(self.opt.output, name, f"{settings}_seed{seed}"),
                [self.weights(*member) for member in members])

    def check_ensembles(self, chosen):
        """Raise InputError where one is yet to be tested and a member that need not be trained has no weights."""
        ensembles = [self.ensemble_of(name, chosen, seed)
                     for name, seed in itertools.product(self.opt.ensembles, self.opt.seeds)]
        lacking = dict.fromkeys(
            os.path.dirname(path) for folder, checkpoints in ensembles if not self.tested(folder, checkpoints)
            and not any(records.gave_up(records.read_run(os.path.dirname(path))) for path in checkpoints)
            for path in checkpoints if self.tested(os.path.dirname(path), [path]) and not os.path.exists(path))
        if lacking:
            raise InputError(f"{', '.join(self.opt.ensembles)}: there is no model_best.pth.tar in "
                             f"{', '.join(lacking)}, as a record has none: name --losses without these ensembles, or "
                             "delete these folders, and the runs are made again")

    def ensemble(self, name, chosen, seed):
        """As `run` gives it, of the ensemble of this seed's models, which have been trained."""
        return self.test(f"{name}, seed {seed}", *self.ensemble_of(name, chosen, seed))

    def tested(self, folder, checkpoints, tests=None):
        """Whether tests' figures and ranks (all tests') are in a folder, none older than a checkpoint that is there."""
        files = [os.path.join(folder, test + ending) for test in tests or self.preset.tests
                 for ending in (".json", ".npz")]
        newest = max((os.path.getmtime(path) for path in checkpoints if os.path.exists(path)), default=0)
        return all(os.path.exists(path) and os.path.getmtime(path) >= newest for path in files)

    def test(self, name, folder, checkpoints):
        """{test's name: compute_results.py's figures} of one checkpoint or an ensemble; the files go to `folder`."""
        figures = {}
        for test, flags in self.preset.tests.items():
            path, ranks = (os.path.join(folder, f"{test}.{ending}") for ending in ("json", "npz"))
            if not self.tested(folder, checkpoints, [test]):
                flags = [*flags, "--model_path", *checkpoints, "--hubness", "--correction", "all", "--tune_correction",
                         "--data_path", os.path.abspath(self.opt.data_path), "--save_json", path, "--save_ranks", ranks]
                status, why = self.calls.script("compute_results.py", flags, folder, f"{test}.log")
                if status:
                    raise InputError(f"{name}: {why}")
            figures[test] = {**read_json(path, "i2t", "t2i", "rsum", "hubness", "corrections"),
                             "ranks": os.path.relpath(ranks, self.opt.output)}
        say(f"{name}: " + ", ".join(f"{test} rsum {f['rsum']:.1f}" for test, f in figures.items()))
        return figures


def check_made_so(folder, flags):
    """Raise InputError where a folder holds a run of other flags, as its run.json tells them."""
    options = records.read_run(folder).get("options", {})
    wanted = {flag.removeprefix("--"): True if value.startswith("--") else value
              for flag, value in zip(flags, [*flags[1:], "--"]) if flag.startswith("--")}  # the last one counts
    for name in options.keys() & wanted.keys() - {*records.PATHS, "num_epochs"}:
        try:
            same = float(options[name]) == float(wanted[name])
        except (TypeError, ValueError):
            same = str(options[name]) == wanted[name]
        if not same:
            raise InputError(f"{folder} holds a run with --{name} {options[name]}, not {wanted[name]}: delete it, or "
                             "name another --output")


def check_settings(opt):
    """Raise InputError where the output folder holds runs made otherwise."""
    path = os.path.join(opt.output, "settings.json")
    preset = PRESETS[opt.preset]
    wanted = {"layout": LAYOUT, "preset": opt.preset, "data_path": opt.data_path, "amp": opt.amp,
              "num_epochs": opt.num_epochs, "pilot_epochs": opt.pilot_epochs, "first_seed": opt.seeds[0],
              "trials": opt.trials, "train_flags": [*preset.train, *opt.train_flags]}
    own = {model: {"flags": list(flags), "settings": opt.settings[model]} for model, (flags, _) in opt.models.items()}
    found = read_json(path)
    if found and (found.get("layout") != LAYOUT or not found.keys() >= {*wanted, "models"}
                  or not isinstance(found["models"], dict)):
        raise InputError(f"{opt.output} holds results of an older layout, whose models had other trials: name another "
                         "--output, or delete it")
    other = [f"{name} ({found[name]}, not {value})" for name, value in wanted.items() if found and found[name] != value]
    models = [model for model in own if found and found["models"].get(model, own[model]) != own[model]]
    if other or models:
        other = ", ".join(other) or "settings of " + ", ".join(models)
        raise InputError(f"{opt.output} holds runs with other {other}: give the same, or another --output")
    wanted["models"] = {**found.get("models", {}), **own}
    if found != wanted:
        with replacing(path, "w", encoding="utf-8") as file:
            json.dump(wanted, file, indent=1)
    return {**wanted, "models": own}


def main(argv=None):
    """Compare as the flags say."""
    if distributed.launched():
        raise InputError("reproduce.py starts its runs itself, each as one process: start it without torchrun"
                         if distributed.is_first() else "")
    opt = parse_args(argv)
    if opt.page:
        records.check_page(opt.page, opt.preset)
    if opt.record:
        records.check_record(opt.record, opt.output)
    with lock(opt.output, "--output"):
        compare(opt)


def compare(opt):
    """Choose settings, run all seeds, write the results."""
    settings, calls = check_settings(opt), Calls(opt.devices)
    for number_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number_, calls.stop)
    try:
        results = {"settings": settings, "data_name": PRESETS[opt.preset].data_name, "seeds": opt.seeds,
                   "finalists": opt.finalists, "pairs": PRESETS[opt.preset].pairs,
                   **run_all(opt, Comparison(opt, calls))}
    except Stopped:
        print("Stopped. The same command goes on.", file=sys.stderr)
        sys.exit(128 + calls.signal)
    finally:
        if opt.record:
            records.keep(opt.output, opt.record)
    write_results(opt.output, results)
    if opt.page:
        records.put(opt.page, opt.preset, opt.output)


def run_all(opt, comparison):
    """The trials, what they chose, and {model or ensemble: {seed: figures}}."""
    tried, final, chosen = comparison.choose()
    comparison.check_ensembles(chosen)
    # Seed by seed: what a stop leaves is then a whole comparison with fewer seeds.
    cells = [(model, chosen[model], seed) for seed in opt.seeds for model in opt.models]
    figures = dict(zip(cells, comparison.calls.map(comparison.run, cells)))
    runs = {model: {seed: figures[model, chosen[model], seed] for seed in opt.seeds} for model in opt.models}
    for name, members in opt.ensembles.items():
        whole = [seed for seed in opt.seeds if not any("failed" in runs[member][seed] for member in members)]
        tested = comparison.calls.map(comparison.ensemble, [(name, chosen, seed) for seed in whole])
        runs[name] = {seed: {"failed": "a member failed"} for seed in opt.seeds} | dict(zip(whole, tested))
    epochs = {model: {seed: comparison.epochs(model, chosen[model], seed) for seed in opt.seeds
                      if "failed" not in runs[model][seed]} for model in opt.models}
    trials = {model: [{"setting": setting, **{name: rsums[model, trial] for name, rsums in
                                              (("dev_rsum", tried), ("final_dev_rsum", final))
                                              if (model, trial) in rsums}}
                      for trial, setting in enumerate(settings)] for model, settings in opt.settings.items()}
    return {"trials": trials, "chosen": {model: opt.settings[model][trial] for model, trial in chosen.items()},
            "epochs": epochs, "cost": cost(opt, comparison, cells), "runs": runs}


def cost(opt, comparison, finals):
    """Seconds an epoch of the final runs, hours of training in all, trials too, and what they were made on."""
    cells = [*finals, *((model, trial, opt.seeds[0]) for model in opt.models for trial in range(opt.trials))]
    runs = {cell: records.read_run(comparison.folder(*cell)) for cell in dict.fromkeys(cells)}
    runs = {cell: run for cell, run in runs.items() if run.get("result")}
    seconds = {cell: records.seconds_an_epoch(run) for cell, run in runs.items()}
    hours = sum((seconds[cell] or 0) * run["result"]["epochs"] for cell, run in runs.items()) / 3600
    each = {model: {seed: seconds.get((model, trial, seed)) for name, trial, seed in finals if name == model}
            for model in opt.models}
    return {"seconds_an_epoch": each, "hours": hours, "made_on": sorted(set(map(records.made_on, runs.values())))}


if __name__ == "__main__":
    run_script(main)
