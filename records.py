"""A comparison's record: what its results are made of, without the weights, small enough to publish.

A copy of it is an output folder of reproduce.py, which goes on from there: with more seeds, for example.
"""

import datetime
import json
import os
import shutil

import numpy as np

import intervals
from errors import InputError, check_regular, replacing

PATHS = ("data_path", "vocab_path", "cache_dir", "logger_name", "model_path", "resume")  # of one machine
PLOTS = ("results.png", "epochs.png", "grid.png")


def check_record(record, output):
    """Raise InputError where `keep` would overwrite files that the output folder does not have."""
    if os.path.join(os.path.realpath(record), "").startswith(os.path.join(os.path.realpath(output), "")):
        raise InputError(f"--record {record} lies in --output {output}, of which it is to be a copy: name a folder "
                         "outside")
    try:
        os.makedirs(record, exist_ok=True)
    except OSError as error:
        raise InputError(f"--record {record} cannot be written ({error.strerror}): name a folder") from error
    for folder, _, names in os.walk(record):
        own = os.path.join(output, os.path.relpath(folder, record))
        for name in sorted(names):
            if name.endswith((".json", ".jsonl", ".npz")) and not os.path.exists(os.path.join(own, name)):
                raise InputError(f"--record {record} has {os.path.relpath(os.path.join(folder, name), record)}, which "
                                 f"{output} has not: copy the record there first, to go on from it, delete this, if "
                                 "it is to be made again, or name another folder")


def keep(output, record):
    """Write into the folder `record` what an output folder holds of the runs that have ended, well or not.

    That is settings.json, of each run run.json and log.jsonl's validations, of each test its figures and ranks.
    """
    write_json(os.path.join(record, "settings.json"), read_json(os.path.join(output, "settings.json")))
    for folder, _, names in os.walk(output):
        to = os.path.join(record, os.path.relpath(folder, output))
        run = read_run(folder)
        if run.get("result"):
            why = {"why": gave_up(run)} if gave_up(run) else {}
            write_json(os.path.join(to, "run.json"), {**run, "options": _without_paths(run.get("options", {})),
                                                      "result": {**run["result"], **why}})
            if "log.jsonl" in names:
                with (open(os.path.join(folder, "log.jsonl"), encoding="utf-8", errors="replace") as log,
                      replacing(os.path.join(to, "log.jsonl"), "w", encoding="utf-8") as file):
                    file.writelines(line for line in log if '"kind": "validation"' in line)
        for name in names:
            test = name.replace(".npz", ".json")
            if name.startswith("trial_") and name.endswith(".json"):
                write_json(os.path.join(to, name), read_json(os.path.join(folder, name)))
            if name.endswith(".npz") and test in names:
                intervals.read_ranks(os.path.join(folder, name))  # says it where that can't be read
                with np.load(os.path.join(folder, name)) as content:
                    ranks = {key: content[key] for key in content if not key.endswith("_items")}
                with replacing(os.path.join(to, name)) as file:
                    np.savez_compressed(file, **ranks)
                write_json(os.path.join(to, test), _without_paths(read_json(os.path.join(folder, test))))


def _without_paths(content):
    return {key: value for key, value in content.items() if key not in PATHS}


def read_json(path, *wanted):
    """A JSON file's object, or {} where there is no file; raises InputError unless it has what is wanted."""
    check_regular(path)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content, dict) or not set(wanted) <= set(content):
            raise ValueError("not what was written there")
        return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it, and what it tells of is made again") from error


def read_run(folder):
    """A run's run.json, {} where there is none; raises InputError unless it is as train.py writes it."""
    path = os.path.join(folder, "run.json")
    run = read_json(path)
    result = run.get("result") or {}
    if run and not (isinstance(run.get("options"), dict) and "end" in run and isinstance(result, dict)
                    and (not result or {"outcome", "epochs", "steps"} <= result.keys())):
        raise InputError(f"{path} cannot be read (not what train.py writes): delete it, and the run is made again")
    return run


def read_trial(path):
    """A trial's dev rsum, or None if it failed; raises InputError unless the file tells it."""
    rsum = read_json(path, "dev_rsum").get("dev_rsum")
    if not isinstance(rsum, (int, float, type(None))):
        raise InputError(f"{path} cannot be read (no figure): delete it, and it is made again")
    return rsum


def gave_up(run):
    """Of a run.json, why training gave up, without the run folder's path; None where it did not."""
    result, folder = run.get("result") or {}, run.get("options", {}).get("logger_name")
    if result.get("outcome") != "gave up":
        return None
    why = str(result.get("why", f"gave up at step {result['steps']}"))
    return why.replace(os.path.join(folder, ""), "") if isinstance(folder, str) else why


def write_json(path, content):
    """Write a JSON file whole."""
    with replacing(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def seconds_an_epoch(run):
    """Of a run.json, validations included, since the run's last start; None where it does not tell."""
    try:
        start, end = (datetime.datetime.strptime(run[name], "%Y-%m-%dT%H:%M:%S%z") for name in ("start", "end"))
        steps, epochs = run["result"]["steps"], run["result"]["epochs"]
        return (end - start).total_seconds() / (steps - (run["resumed_at_step"] or 0)) * steps / epochs
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def made_on(run):
    """Device, release of PyTorch and commit of a run.json, in words."""
    parts = (run.get("device"), f"torch {run.get('packages', {}).get('torch')}", f"commit {run.get('git_commit')}"[:14])
    return ", ".join(filter(None, parts))


def check_page(page, preset):
    """Raise InputError unless a Markdown file has the two lines between which a preset's results go."""
    check_regular(page)
    try:
        with open(page, encoding="utf-8", newline="") as file:
            text = file.read()
    except (OSError, ValueError) as error:
        raise InputError(f"--page {page} cannot be read ({error}): name a Markdown file") from error
    before, start, rest = text.partition(f"<!-- {preset} -->")
    _, end, after = rest.partition(f"<!-- /{preset} -->")
    if not (start and end):
        raise InputError(f"--page {page} has no line <!-- {preset} --> with <!-- /{preset} --> after it: write both "
                         "where the results should stand")
    return before + start, end + after


def put(page, preset, folder):
    """Put results.md of an output folder between a page's two lines, its plots beside the page."""
    before, after = check_page(page, preset)
    with open(os.path.join(folder, "results.md"), encoding="utf-8") as file:
        tables = file.read()
    plots = {name: f"{preset}_{name}" for name in PLOTS if os.path.exists(os.path.join(folder, name))}
    for name, own in plots.items():
        with open(os.path.join(folder, name), "rb") as plot, replacing(
                os.path.join(os.path.dirname(page), own)) as file:
            shutil.copyfileobj(plot, file)
    pictures = "".join(f"![{preset}: {name.removesuffix('.png')}]({own})\n\n" for name, own in plots.items())
    newline = "\r\n" if "\r\n" in before else "\n"
    with replacing(page, "w", encoding="utf-8", newline="") as file:
        file.write(before + f"\n\n{tables}\n{pictures}".replace("\n", newline) + after)
