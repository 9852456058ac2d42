"""Run a comparison: one script after another, on every device."""

import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from experiments import records
from experiments.presets import setting_name
from experiments.records import read_figures, read_json
from runtime.errors import InputError
from runtime.files import check_regular

SCRIPTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LAYOUT = 2  # of the output folder

# Parts of settings.json that more names may join later, and what differs where one name differs.
PARTS = {"models": "settings", "tests": "flags", "ensembles": "members"}


class Stopped(Exception):
    """A signal arrived: nothing more is started."""


class Calls:
    """Runs the scripts, at most one at a time on each device, and passes signals on to them."""

    def __init__(self, devices):
        self.devices, self.running = queue.SimpleQueue(), set()
        self.signal, self.lock = None, threading.RLock()
        for device in devices:
            self.devices.put(device)
        on_cpu = sum(device == "cpu" for device in devices)
        affinity = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count()
        self.environment = dict(os.environ)
        if on_cpu > 1:
            self.environment["OMP_NUM_THREADS"] = str(max(1, cores // on_cpu))
        self.pool = ThreadPoolExecutor(len(devices))

    def stop(self, number, frame=None):
        """A signal handler: the running scripts get the signal too.

        train.py then saves and ends; a second signal ends it at once.
        """
        self.signal = number
        with self.lock:
            for process in self.running:
                process.send_signal(number)

    def script(self, name, flags, folder, log):
        """Run a script in `folder` on a free device; its output is appended to `log` there.

        Returns the exit status and the sentence of its error, None for status 0.
        """
        device = self.devices.get()
        try:
            if self.signal:
                raise Stopped
            path = os.path.join(folder, log)
            os.makedirs(folder, exist_ok=True)
            check_regular(path)
            with open(path, "ab") as output:
                before = output.tell()
                command = [sys.executable, os.path.join(SCRIPTS, name), *flags, "--device", device]
                with self.lock:
                    if self.signal:
                        raise Stopped
                    # A session of its own, so that a terminal's Ctrl-C reaches it once, by `stop`.
                    process = subprocess.Popen(
                        command,
                        cwd=folder,
                        env=self.environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                    self.running.add(process)
                status = process.wait()
            with self.lock:
                self.running.discard(process)
            if self.signal:
                raise Stopped
            return status, last_error(path, before) if status else None
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written ({error.strerror}): name another --output"
            ) from error
        finally:
            self.devices.put(device)

    def map(self, function, items):
        """[function(*item) for item in items], several at a time; the first error stops all."""

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
    """Print a line on stderr in one write, so that two threads' lines do not mix."""
    print(words + "\n", end="", file=sys.stderr)


def last_error(path, start):
    """The last error that a script printed after byte `start` of its log, else where to look."""
    with open(path, encoding="utf-8", errors="replace") as file:
        file.seek(start)
        errors = [line for line in file if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ").strip() if errors else f"it failed: see {path}"


class Comparison:
    """The runs of one output folder.

    opt: the options of reproduce.py; calls: a Calls. A trial is the number of a setting in
    `opt.settings[model]`.
    """

    def __init__(self, opt, calls):
        self.opt, self.calls, self.preset = opt, calls, opt.preset

    def folder(self, model, trial, seed):
        """A run's folder; a trial is the beginning of the run with the same setting and seed."""
        setting = setting_name(self.opt.settings[model][trial])
        return os.path.join(self.opt.output, model, f"{setting}_seed{seed}")

    def weights(self, model, trial, seed):
        """Path of a run's best checkpoint."""
        return os.path.join(self.folder(model, trial, seed), "model_best.pth.tar")

    def checked_flags(self, model, trial, seed, epochs):
        """train.py's flags for a run up to `epochs`.

        Raises InputError if the run's folder holds a run of other flags.
        """
        opt, preset, folder = self.opt, self.preset, self.folder(model, trial, seed)
        flags = {
            "data_path": os.path.abspath(opt.data_path),
            "vocab_path": os.path.abspath(opt.vocab_path),
            "data_name": preset.data_name,
            "batch_size": preset.batch_size,
            "lr_update": preset.lr_update,
            "num_epochs": epochs,
            "seed": seed,
            "logger_name": folder,
            "resume": "auto",
            "amp": opt.amp,
            **opt.settings[model][trial],
        }
        flags = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        flags += [*opt.models[model].flags, *preset.train, *opt.train_flags]
        check_made_so(folder, flags)
        return flags

    def train(self, model, trial, seed, epochs, needed=()):
        """Train up to `epochs`; returns None, or why training gave up, such as a collapse.

        A run that has ended there, well or not, is not trained again unless one of the files
        `needed` is missing.
        """
        folder = self.folder(model, trial, seed)
        flags = self.checked_flags(model, trial, seed, epochs)
        run, name = records.read_run(folder), f"{model}, {os.path.basename(folder)}"
        result = run.get("result") or {"outcome": "failed"}
        done = result["outcome"] != "failed" and result["epochs"] >= epochs
        if done and all(map(os.path.exists, needed)):
            return None
        if not records.gave_up(run):
            say(f"{name}: training to epoch {epochs}")
            status, why = self.calls.script("train.py", flags, folder, "train.log")
            if status == 0:
                return None
            run = records.read_run(folder)
            if not records.gave_up(run):  # something else than the loss is wrong
                raise InputError(f"{name}: {why}")
            say(f"{name}: {why}")
        return records.gave_up(run)

    def trial(self, model, trial, epochs):
        """The best dev rsum of the first `epochs` with the first seed; None if training failed.

        Kept in a file, because the run may go on or be made again on another machine.
        """
        seed = self.opt.seeds[0]
        path = os.path.join(self.folder(model, trial, seed), f"trial_{epochs}.json")
        self.checked_flags(model, trial, seed, epochs)
        if not os.path.exists(path):
            failed = self.train(model, trial, seed, epochs)
            after = [] if failed else self.epochs(model, trial, seed)[:epochs]
            rsum = max((one["rsum"] for one in after), default=None)
            records.write_json(path, {"dev_rsum": rsum})
        return records.read_trial(path)

    def trials(self, cells, epochs):
        """{(model, trial): dev rsum} of some trials, run side by side."""
        return dict(zip(cells, self.calls.map(self.trial, [(*cell, epochs) for cell in cells])))

    def epochs(self, model, trial, seed):
        """The dev split's figures after each epoch of a run: [{"rsum": ..., ...}, ...]."""
        return records.read_epochs(self.folder(model, trial, seed))

    def choose(self):
        """Run the trials; returns what they gave and {model: the chosen setting's number}.

        The first two are {(model, trial): dev rsum, or None}, after the pilot epochs and, if there
        are several finalists, of these at their end. If nothing trains, the first is chosen.
        """
        opt = self.opt
        everything = [(model, trial) for model in opt.models for trial in range(opt.trials)]
        tried = self.trials(everything, opt.pilot_epochs)
        finalists = {}
        for model in opt.models:
            ranked = sorted(range(opt.trials), key=lambda trial: -(tried[model, trial] or 0))
            finalists[model] = ranked[: opt.finalists]
        final = {}
        if opt.finalists > 1:
            trained = [cell for cell in everything if cell[1] in finalists[cell[0]] and tried[cell]]
            final = self.trials(trained, opt.num_epochs)
        chosen = {
            model: max(own, key=lambda trial: final.get((model, trial)) or 0)
            for model, own in finalists.items()
        }
        return tried, final, chosen

    def run(self, model, trial, seed):
        """Train to the end and test; returns what `test` does, or {"failed": why}."""
        folder, weights = self.folder(model, trial, seed), self.weights(model, trial, seed)
        needed = [] if self.tested(folder, [weights]) else [weights]
        why = self.train(model, trial, seed, self.opt.num_epochs, needed)
        return {"failed": why} if why else self.test(f"{model}, seed {seed}", folder, [weights])

    def ensemble_of(self, name, chosen, seed):
        """The folder of a seed's ensemble, and its members' checkpoints."""
        members = [(model, chosen[model], seed) for model in self.opt.ensembles[name]]
        settings = "+".join(
            setting_name(self.opt.settings[model][trial]) for model, trial, _ in members
        )
        folder = os.path.join(self.opt.output, name, f"{settings}_seed{seed}")
        return folder, [self.weights(*member) for member in members]

    def check_ensembles(self, chosen):
        """Raise InputError if an ensemble is to be tested and a finished member has no weights.

        That happens in what was unpacked from a record, which has no weights.
        """
        lacking = {}
        for name, seed in itertools.product(self.opt.ensembles, self.opt.seeds):
            folder, checkpoints = self.ensemble_of(name, chosen, seed)
            folders = list(map(os.path.dirname, checkpoints))
            gave_up = any(records.gave_up(records.read_run(path)) for path in folders)
            if self.tested(folder, checkpoints) or gave_up:
                continue
            for member, path in zip(folders, checkpoints):
                if self.tested(member, [path]) and not os.path.exists(path):
                    lacking[member] = None
        if lacking:
            raise InputError(
                f"{', '.join(self.opt.ensembles)}: there is no model_best.pth.tar in "
                f"{', '.join(lacking)}, as a record has none: name --losses without these "
                "ensembles, or delete these folders, and the runs are made again"
            )

    def ensemble(self, name, chosen, seed):
        """As `run`, for the ensemble of a seed's models, which have been trained."""
        return self.test(f"{name}, seed {seed}", *self.ensemble_of(name, chosen, seed))

    def tested(self, folder, checkpoints, tests=None):
        """Whether a folder has the figures and ranks of some tests (default: of all).

        Files older than one of the checkpoints that are there do not count.
        """
        files = [
            os.path.join(folder, test + ending)
            for test in tests or self.preset.tests
            for ending in (".json", ".npz")
        ]
        there = [path for path in checkpoints if os.path.exists(path)]
        newest = max(map(os.path.getmtime, there), default=0)
        return all(os.path.exists(path) and os.path.getmtime(path) >= newest for path in files)

    def test(self, name, folder, checkpoints):
        """Test one checkpoint, or several as an ensemble; the files go to `folder`.

        Returns {test's name: compute_results.py's figures, and the path of its ranks}.
        """
        figures = {}
        for test, flags in self.preset.tests.items():
            path, ranks = (os.path.join(folder, f"{test}.{ending}") for ending in ("json", "npz"))
            if not self.tested(folder, checkpoints, [test]):
                flags = [*flags, "--model_path", *checkpoints, "--hubness"]
                flags += ["--correction", "all", "--tune_correction"]
                flags += ["--data_path", os.path.abspath(self.opt.data_path)]
                flags += ["--save_json", path, "--save_ranks", ranks]
                status, why = self.calls.script("compute_results.py", flags, folder, f"{test}.log")
                if status:
                    raise InputError(f"{name}: {why}")
            figures[test] = {
                **read_figures(path, "i2t", "t2i", "rsum", "hubness", "corrections"),
                "ranks": os.path.relpath(ranks, self.opt.output),
            }
        rsums = ", ".join(f"{test} rsum {own['rsum']:.1f}" for test, own in figures.items())
        say(f"{name}: {rsums}")
        return figures


def check_made_so(folder, flags):
    """Raise InputError if a folder's run.json tells of a run of other flags."""
    options = records.read_run(folder).get("options", {})
    wanted = {}
    for flag, value in zip(flags, [*flags[1:], "--"]):
        if flag.startswith("--"):  # of a flag given twice the last one counts
            wanted[flag.removeprefix("--")] = True if value.startswith("--") else value
    for name in options.keys() & wanted.keys() - {*records.PATHS, "num_epochs"}:
        try:
            same = float(options[name]) == float(wanted[name])
        except (TypeError, ValueError):
            same = str(options[name]) == wanted[name]
        if not same:
            raise InputError(
                f"{folder} holds a run with --{name} {options[name]}, not {wanted[name]}: delete "
                "it, or name another --output"
            )


def settings_of(opt):
    """What settings.json says of a comparison: runs of other settings are not mixed with it."""
    models = {
        model: {"flags": list(own.flags), "settings": opt.settings[model]}
        for model, own in opt.models.items()
    }
    return {
        "layout": LAYOUT,
        "preset": opt.preset.name,
        "data_path": opt.data_path,
        "amp": opt.amp,
        "num_epochs": opt.num_epochs,
        "pilot_epochs": opt.pilot_epochs,
        "first_seed": opt.seeds[0],
        "trials": opt.trials,
        "train_flags": [*opt.preset.train, *opt.train_flags],
        "models": models,
        "tests": {name: list(flags) for name, flags in opt.preset.tests.items()},
        "ensembles": {name: list(members) for name, members in opt.ensembles.items()},
    }


def check_settings(wanted, found, where):
    """Raise InputError unless what a settings.json says, `found`, agrees with `settings_of`.

    where: the folder or file it stands in. Older ones say nothing about tests and ensembles.
    """
    needed = wanted.keys() - {"tests", "ensembles"}
    parts = all(isinstance(found.get(part, {}), dict) for part in PARTS)
    if not found.keys() >= needed or not parts or found["layout"] != LAYOUT:
        raise InputError(
            f"{where} holds results of an older layout, whose models had other trials: name "
            "another --output, or delete it"
        )
    other = [
        f"{name} ({found[name]}, not {value})"
        for name, value in wanted.items()
        if name not in PARTS and found[name] != value
    ]
    for part, what in PARTS.items():
        of = found.get(part, {})
        names = [name for name, own in wanted.get(part, {}).items() if of.get(name, own) != own]
        if names and not other:
            other.append(f"{what} of {', '.join(names)}")
    if other:
        raise InputError(
            f"{where} holds runs with other {', '.join(other)}: give the same, or another --output"
        )


def joined(old, new):
    """The settings `new`, with what `old` has besides in each of the PARTS."""
    return {**new, **{part: {**old.get(part, {}), **new.get(part, {})} for part in PARTS}}


def keep_settings(opt):
    """Check the output folder's settings.json and add this comparison to it.

    Returns `settings_of` the comparison.
    """
    path, wanted = os.path.join(opt.output, "settings.json"), settings_of(opt)
    found = read_json(path)
    if found:
        check_settings(wanted, found, opt.output)
    if found != joined(found, wanted):
        records.write_json(path, joined(found, wanted))
    return wanted


def unpack_settings(opt, settings):
    """Add a record's settings to the output folder's; raises InputError if they do not agree.

    settings: the record's settings.json.
    """
    path = os.path.join(opt.output, "settings.json")
    check_settings(settings_of(opt), settings, opt.from_record)
    found = read_json(path)
    if found:
        check_settings(settings, found, opt.output)
    records.write_json(path, joined(found, settings))


def run_all(opt, comparison):
    """Run whatever is missing; returns a dictionary of what `tables.write_results` takes.

    trials: {model: [{"setting", "dev_rsum", ...}]}; chosen: {model: setting};
    epochs: {model: {seed: [figures]}}; runs: {model or ensemble: {seed: figures}}; cost: see there.
    """
    tried, final, chosen = comparison.choose()
    comparison.check_ensembles(chosen)
    # Seed by seed, so that a stop leaves a whole comparison with fewer seeds.
    cells = [(model, chosen[model], seed) for seed in opt.seeds for model in opt.models]
    figures = dict(zip(cells, comparison.calls.map(comparison.run, cells)))
    runs = {
        model: {seed: figures[model, chosen[model], seed] for seed in opt.seeds}
        for model in opt.models
    }
    for name, members in opt.ensembles.items():
        whole = [
            seed
            for seed in opt.seeds
            if not any("failed" in runs[member][seed] for member in members)
        ]
        items = [(name, chosen, seed) for seed in whole]
        tested = dict(zip(whole, comparison.calls.map(comparison.ensemble, items)))
        runs[name] = {seed: {"failed": "a member failed"} for seed in opt.seeds} | tested
    epochs = {
        model: {
            seed: comparison.epochs(model, chosen[model], seed)
            for seed in opt.seeds
            if "failed" not in runs[model][seed]
        }
        for model in opt.models
    }
    return {
        "trials": trials_with_rsums(opt.settings, tried, final),
        "chosen": {model: opt.settings[model][trial] for model, trial in chosen.items()},
        "epochs": epochs,
        "cost": cost(opt, comparison, cells),
        "runs": runs,
    }


def trials_with_rsums(settings, tried, final):
    """{model: [{"setting", "dev_rsum", and a finalist's "final_dev_rsum"}]} of all trials."""
    found = {}
    for model, own in settings.items():
        found[model] = []
        for trial, setting in enumerate(own):
            one = {"setting": setting}
            for name, rsums in (("dev_rsum", tried), ("final_dev_rsum", final)):
                if (model, trial) in rsums:
                    one[name] = rsums[model, trial]
            found[model].append(one)
    return found


def cost(opt, comparison, finals):
    """What the runs cost and what they were made on.

    finals: the final runs, [(model, trial, seed)]. Returns seconds_an_epoch {model: {seed:
    seconds}} of these, hours of training in all, with trials, and made_on, a list of texts.
    """
    trials = [(model, trial, opt.seeds[0]) for model in opt.models for trial in range(opt.trials)]
    runs = {
        cell: records.read_run(comparison.folder(*cell))
        for cell in dict.fromkeys([*finals, *trials])
    }
    runs = {cell: run for cell, run in runs.items() if run.get("result")}
    seconds = {cell: records.seconds_an_epoch(run) for cell, run in runs.items()}
    hours = sum((seconds[cell] or 0) * run["result"]["epochs"] for cell, run in runs.items()) / 3600
    each = {
        model: {
            seed: seconds.get((model, trial, seed)) for name, trial, seed in finals if name == model
        }
        for model in opt.models
    }
    made_on = sorted(set(map(records.made_on, runs.values())))
    return {"seconds_an_epoch": each, "hours": hours, "made_on": made_on}
