"""The paper's comparison: sum-margin, max-margin, HAL and HAL with the memory bank on one data set.

    python3 reproduce.py --preset smoke                       # the sample data, minutes
    python3 reproduce.py --preset f8k --data_path data -- --amp bf16
    python3 reproduce.py --preset coco --data_path data --devices cuda:0 cuda:1 cuda:2 cuda:3

Each loss gets its own learning rate, the one with the best dev rsum of a first seed after a few epochs, then
runs over all seeds. Calls train.py and compute_results.py as anyone would. Finished runs are kept: called
again after a stop, a crash or with more seeds, it goes on where it was. Writes results.json, results.md and
results.png into --output.
"""

import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from errors import ArgumentParser, InputError, number, replacing, run_script
from run_record import lock

SCRIPTS = os.path.dirname(os.path.abspath(__file__))
BANK = ("--memory_bank --global_alpha 40 --global_beta 40 --global_ep_posi 0.2 --global_ep_nega 0.1 "
        "--mb_rate 0.05 --mb_k 250").split()
COCO_HAL = "--local_alpha 30 --local_ep 0.3".split()
OWN_FLAGS = ("data_path", "vocab_path", "data_name", "num_epochs", "learning_rate", "seed", "logger_name", "resume")
F30K_HAL = "--local_alpha 60 --local_ep 0.7".split()


class Preset(NamedTuple):
    """A data set and how the losses are compared on it; `hal` are the local loss' flags, `train` those of all runs."""

    data_name: str
    hal: list
    batch_size: int = 128
    num_epochs: int = 13
    lr_update: int = 8
    pilot_epochs: int = 2
    learning_rates: tuple = (0.0002, 0.0005, 0.001, 0.002)
    seeds: tuple = (0, 1, 2)
    train: tuple = ()
    max_margin: tuple = ()
    tests: dict = {"test": ["--split", "test"]}


PRESETS = {
    "coco": Preset("coco_precomp", COCO_HAL, batch_size=512,
                   tests={"5K": ["--split", "testall"], "1K": ["--split", "testall", "--fold5"]}),
    "f30k": Preset("f30k_precomp", F30K_HAL),
    # HAL's loss as for COCO, which does better here than Flickr30k's; it needs the warm-up, so all losses get it.
    # Max-margin stays at its trivial loss for epochs unless sum-margin begins.
    "f8k": Preset("f8k_precomp", COCO_HAL, num_epochs=8, lr_update=5, learning_rates=(0.001, 0.002, 0.004, 0.008),
                  train=("--lr_warmup_steps", "100"), max_margin=("--warmup_epochs", "1")),
    "smoke": Preset("sample_precomp", F30K_HAL, num_epochs=2, pilot_epochs=1, learning_rates=(0.0005, 0.001),
                    seeds=(0, 1), train=("--embed_size", "64")),
}


def losses(preset):
    """{name: train.py's flags}; names serve as folders."""
    return {"sum-margin": ["--sum_violation"], "max-margin": ["--max_violation", *preset.max_margin],
            "HAL": list(preset.hal), "HAL+bank": [*preset.hal, *BANK]}


def parse_args(argv=None):
    """The script's flags; what is not given comes from the preset."""
    parser = ArgumentParser("Compare sum-margin, max-margin, HAL and HAL with the memory bank.")
    what = parser.add_argument_group("what to compare")
    what.add_argument("--preset", required=True, choices=PRESETS, help="data set, schedule and HAL's parameters")
    what.add_argument("--losses", nargs="+", choices=losses(PRESETS["smoke"]), help="only these (default: all)")
    what.add_argument("--seeds", nargs="+", type=number(int, 0), help="the first one chooses the learning rates")
    what.add_argument("--learning_rates", nargs="+", type=number(float, 0, low_allowed=False), help="to choose from")
    what.add_argument("--pilot_epochs", type=number(int, 1), help="epochs after which the learning rate is chosen")
    what.add_argument("--num_epochs", type=number(int, 1), help="epochs of a run")
    what.add_argument("train_flags", nargs="*", default=[], help="after --: more flags for every train.py")
    where = parser.add_argument_group("where")
    where.add_argument("--data_path", default="data", help="folder that holds the data sets")
    where.add_argument("--vocab_path", default="./vocab/", help="folder of the vocabulary")
    where.add_argument("--output", help="folder for runs and results (default: runs/reproduce_<preset>)")
    where.add_argument("--devices", nargs="+",
                       help="one run at a time on each (default: all GPUs, else auto); a name may be repeated: with "
                            "cpu cpu two runs share the cores")
    opt = parser.parse_args(argv)
    complete(opt)
    check_flags(opt)
    return opt


def complete(opt):
    """Fill in, from the preset and the machine, what is not given."""
    preset = PRESETS[opt.preset]
    for name in ("seeds", "learning_rates", "pilot_epochs", "num_epochs"):
        if getattr(opt, name) is None:
            setattr(opt, name, getattr(preset, name))
    opt.devices = opt.devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["auto"]
    opt.losses = opt.losses or list(losses(preset))
    opt.seeds, opt.learning_rates = list(dict.fromkeys(opt.seeds)), list(dict.fromkeys(opt.learning_rates))
    opt.output = os.path.abspath(opt.output or os.path.join("runs", f"reproduce_{opt.preset}"))


def check_flags(opt):
    """Raise InputError for flags that do not go together."""
    if opt.pilot_epochs > opt.num_epochs:
        raise InputError(f"--pilot_epochs {opt.pilot_epochs} is more than --num_epochs {opt.num_epochs}: give fewer")
    own = {"-h", "--help", "--device", *(f"--{name}" for name in OWN_FLAGS),
           *(flag for flags in losses(PRESETS[opt.preset]).values() for flag in flags if flag.startswith("--"))}
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
        futures = [self.pool.submit(function, *item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException as error:
            if not isinstance(error, Stopped):
                self.stop(signal.SIGTERM)
            self.pool.shutdown(cancel_futures=True)
            raise


def last_error(path, start):
    """The last sentence that a script gave up with in what it wrote after byte `start`, or where to look."""
    with open(path, encoding="utf-8", errors="replace") as file:
        file.seek(start)
        errors = [line for line in file if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ").strip() if errors else f"it failed: see {path}"


def read_json(path, *wanted):
    """A JSON file's object, or {} where there is no file; raises InputError unless it has what is wanted."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content, dict) or not set(wanted) <= set(content):
            raise ValueError("not what was written there")
        return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it, and what it tells of is made again") from error


# The runs ---------------------------------------------------------------------------------------

class Comparison:
    """The runs of one output folder."""

    def __init__(self, opt, calls):
        self.opt, self.calls, self.preset = opt, calls, PRESETS[opt.preset]

    def folder(self, loss, lr, seed):
        """A run's folder: the trial of a learning rate is the beginning of the run with the same seed."""
        return os.path.join(self.opt.output, loss, f"lr{lr}_seed{seed}")

    def train(self, loss, lr, seed, epochs):
        """Train up to `epochs`; returns None, or why it could not be trained to the end (collapse, for example)."""
        opt, preset, folder = self.opt, self.preset, self.folder(loss, lr, seed)
        before = self.record(folder)
        if before.get("outcome") == "finished" and before["epochs"] >= epochs:
            return None
        flags = {"data_path": os.path.abspath(opt.data_path), "vocab_path": os.path.abspath(opt.vocab_path),
                 "data_name": preset.data_name, "batch_size": preset.batch_size, "lr_update": preset.lr_update,
                 "num_epochs": epochs, "learning_rate": lr, "seed": seed, "logger_name": folder, "resume": "auto"}
        flags = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        print(f"{loss}, learning rate {lr:g}, seed {seed}: training to epoch {epochs}", file=sys.stderr)
        status, why = self.calls.script("train.py", [*flags, *losses(preset)[loss], *preset.train, *opt.train_flags],
                                        folder, "train.log")
        if status == 0:
            return None
        after = self.record(folder)
        if after.get("outcome") != "gave up" or after == before:  # not the loss' fault
            raise InputError(f"{loss}, learning rate {lr:g}, seed {seed}: {why}")
        print(f"{loss}, learning rate {lr:g}, seed {seed}: {why}", file=sys.stderr)
        return why

    def record(self, folder):
        """How the run in a folder ended last, and when; {} if it did not."""
        record = read_json(os.path.join(folder, "run.json"), "result", "end")
        return {**record["result"], "end": record["end"]} if record.get("result") else {}

    def trial(self, loss, lr):
        """The best dev rsum of the first epochs; None where training failed."""
        opt, seed = self.opt, self.opt.seeds[0]
        if self.train(loss, lr, seed, opt.pilot_epochs):
            return None
        path = os.path.join(self.folder(loss, lr, seed), "log.jsonl")
        try:
            with open(path, encoding="utf-8") as file:
                lines = [json.loads(line) for line in file]
            return max(line["rsum"] for line in lines
                       if line["kind"] == "validation" and line["epoch"] < opt.pilot_epochs)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error}): delete its folder, and the run is made anew") from error

    def choose(self):
        """{loss: {learning rate: dev rsum}}, {loss: the best one}."""
        opt = self.opt
        pairs = [(loss, lr) for loss in opt.losses for lr in opt.learning_rates]
        tried = dict(zip(pairs, self.calls.map(self.trial, pairs)))
        trials = {loss: {lr: tried[loss, lr] for lr in opt.learning_rates} for loss in opt.losses}
        for loss, rsums in trials.items():
            if all(rsum is None for rsum in rsums.values()):
                raise InputError(f"{loss} could not be trained with any of --learning_rates "
                                 f"{' '.join(f'{lr:g}' for lr in rsums)} (see {os.path.join(opt.output, loss)}): try "
                                 "lower ones, or -- --lr_warmup_steps 100")
        return trials, {loss: max((lr for lr in rsums if rsums[lr] is not None), key=rsums.get)
                        for loss, rsums in trials.items()}

    def run(self, loss, lr, seed):
        """Train to the end and test; returns {test's name: compute_results.py's figures} or {"failed": why}."""
        why = self.train(loss, lr, seed, self.opt.num_epochs)
        if why:
            return {"failed": why}
        folder, figures = self.folder(loss, lr, seed), {}
        for name, flags in self.preset.tests.items():
            path = os.path.join(folder, f"{name}.json")
            if not os.path.exists(path):
                flags = [*flags, "--model_path", os.path.join(folder, "model_best.pth.tar"), "--hubness",
                         "--data_path", os.path.abspath(self.opt.data_path), "--save_json", path]
                status, why = self.calls.script("compute_results.py", flags, folder, f"{name}.log")
                if status:
                    raise InputError(f"{loss}, seed {seed}: {why}")
            figures[name] = read_json(path, "i2t", "t2i", "rsum", "hubness")
        print(f"{loss}, seed {seed}: " + ", ".join(f"{name} rsum {f['rsum']:.1f}" for name, f in figures.items()),
              file=sys.stderr)
        return figures


def check_settings(opt):
    """Raise InputError where the output folder holds runs made otherwise."""
    path = os.path.join(opt.output, "settings.json")
    preset = PRESETS[opt.preset]
    wanted = {"preset": opt.preset, "data_path": os.path.abspath(opt.data_path), "num_epochs": opt.num_epochs,
              "pilot_epochs": opt.pilot_epochs, "first_seed": opt.seeds[0], "losses": losses(preset),
              "train_flags": [*preset.train, *opt.train_flags]}
    found = read_json(path)
    if not found:
        with replacing(path, "w", encoding="utf-8") as file:
            json.dump(wanted, file, indent=1)
    elif found != wanted:
        names = [name for name in wanted if found.get(name) != wanted[name]]
        raise InputError(f"{opt.output} holds runs with other {', '.join(names)} ("
                         + ", ".join(f"{found.get(name)}, not {wanted[name]}" for name in names)
                         + "): give the same, or another --output")
    return wanted


# Results ----------------------------------------------------------------------------------------

FIGURES = {  # the table's columns, from compute_results.py's JSON
    **{f"{side} R@{k}": (lambda f, side=side, k=k: f[side][f"r{k}"]) for side in ("i2t", "t2i") for k in (1, 5, 10)},
    "rsum": lambda f: f["rsum"],
    **{f"{side} N10 skewness": (lambda f, side=side: f["hubness"][side]["10"]["skewness"]) for side in ("i2t", "t2i")},
    **{f"{side} anti-hubs %": (lambda f, side=side: 100 * f["hubness"][side]["10"]["anti_hubs"])
       for side in ("i2t", "t2i")},
}


def summary(runs, test):
    """{loss: {figure: [value of each seed that was trained]}}."""
    return {loss: {name: [pick(figures[test]) for figures in seeds.values() if "failed" not in figures]
                   for name, pick in FIGURES.items()} for loss, seeds in runs.items()}


def mean_and_deviation(values):
    """"mean ± sample standard deviation" over the seeds; "-" for none."""
    if not values:
        return "-"
    digits = 1 if max(map(abs, values)) >= 10 else 2
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(opt, results):
    """The tables of results.json, and what they are of."""
    lines = []
    for test, losses_ in results["summary"].items():
        lines += [f"{PRESETS[opt.preset].data_name}, {test}, {opt.num_epochs} epochs, seeds "
                  f"{', '.join(map(str, opt.seeds))}: mean ± standard deviation", "",
                  "| loss | learning rate | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 2) + "|"]
        for loss, figures in losses_.items():
            failed = sum("failed" in run for run in results["runs"][loss].values())
            name = loss + (f" ({failed} of {len(opt.seeds)} seeds failed)" if failed else "")
            cells = [name, f"{results['learning_rates'][loss]:g}", *map(mean_and_deviation, figures.values())]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(path, results):
    """rsum and N_10's skewness of every run, one row a test."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = ("rsum", "i2t N10 skewness", "t2i N10 skewness")
    figure, axes = pyplot.subplots(len(results["summary"]), len(panels), figsize=(12, 3.4 * len(results["summary"])),
                                   squeeze=False, layout="constrained")
    for row, (test, losses_) in zip(axes, results["summary"].items()):
        for axis, panel in zip(row, panels):
            for place, figures in enumerate(losses_.values()):
                values = figures[panel]
                axis.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.6)
                if values:
                    axis.hlines(statistics.mean(values), place - 0.25, place + 0.25, color=f"C{place}", linewidth=2)
            axis.set_xticks(range(len(losses_)), losses_, fontsize=8)
            axis.set_xlim(-0.6, len(losses_) - 0.4)
            axis.set_title(f"{test}: {panel}", fontsize=10)
            axis.grid(axis="y", alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def main(argv=None):
    """Compare as the flags say."""
    opt = parse_args(argv)
    with lock(opt.output, "--output"):
        compare(opt)


def compare(opt):
    """Choose learning rates, run all seeds, write the results."""
    settings, calls = check_settings(opt), Calls(opt.devices)
    for number_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number_, calls.stop)
    comparison = Comparison(opt, calls)
    try:
        trials, chosen = comparison.choose()
        cells = [(loss, chosen[loss], seed) for loss in opt.losses for seed in opt.seeds]
        figures = dict(zip(cells, calls.map(comparison.run, cells)))
    except Stopped:
        print("Stopped. The same command goes on.", file=sys.stderr)
        sys.exit(128 + calls.signal)
    runs = {loss: {seed: figures[loss, chosen[loss], seed] for seed in opt.seeds} for loss in opt.losses}
    results = {"settings": settings, "learning_rate_trials": trials, "learning_rates": chosen, "runs": runs,
               "summary": {test: summary(runs, test) for test in PRESETS[opt.preset].tests}}
    with replacing(os.path.join(opt.output, "results.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    table = markdown(opt, results)
    with replacing(os.path.join(opt.output, "results.md"), "w", encoding="utf-8") as file:
        file.write(table)
    print(table)
    plot(os.path.join(opt.output, "results.png"), results)


if __name__ == "__main__":
    run_script(main)
