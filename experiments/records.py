"""A comparison's record: all that its tables, intervals and plots are made of, in two files.

Small enough to publish, because there are no weights in it, no single steps, no retrieved items
and no paths of one machine. `keep` writes a record, `unpack` makes an output folder of it again,
from which reproduce.py goes on: with more seeds, for example.

    f8k.json    {"record": 1, "npz": SHA-256 of the other file, "settings.json": {...},
                "runs": {folder: {file's name: content}}}
    f8k.npz     for every file of ranks, such as HAL/lr0.001_seed0/test.npz, by that name, an array
                (1 + corrections, images + captions), and by that name + ":image_of" its image_of

The content of a file of ranks in the JSON is the list of its corrections, "" before any. Of folds,
the arrays have one more dimension, the second (image_of: the first).
"""

import datetime
import hashlib
import json
import os
import re
import shutil
import zipfile

import numpy as np

from retrieval import intervals
from runtime.errors import InputError
from runtime.files import check_regular, replacing

FORMAT = 1
RECALLS = {"r1", "r5", "r10", "r1i", "r5i", "r10i"}  # of a validation in log.jsonl
RSUM_ERROR = 0.01  # recalls are kept at full precision

# Options that hold paths of one machine.
PATHS = ("data_path", "vocab_path", "cache_dir", "logger_name", "model_path", "resume")


def check_record(record, output):
    """Raise InputError if `keep` could not write a record, or would lose what an older one has."""
    if not os.path.exists(record):
        try:
            os.makedirs(os.path.dirname(record) or ".", exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--record {record} cannot be written ({error.strerror}): name another file"
            ) from error
        return
    for folder, files in read_record(record, "--record")["runs"].items():
        for name in files:
            if not os.path.exists(os.path.join(output, folder, name)):
                raise InputError(
                    f"--record {record} has {folder}/{name}, which {output} has not: add "
                    f"--from_record {record} to go on from it, delete it, if it is to be made "
                    "again, or name another file"
                )


def check_name(record, flag):
    """Raise InputError unless a record's name ends in .json."""
    if os.path.isfile(os.path.join(record, "settings.json")):
        new = os.path.normpath(record) + ".json"
        raise InputError(
            f"{flag} {record} is a folder, as records were before: convert it with python3 "
            f"reproduce.py --convert_record {record} --record {new}, and name {new}"
        )
    if os.path.isdir(record) or not record.endswith(".json"):
        raise InputError(f"{flag} {record} is not the name of a record: name a file, NAME.json")


def keep(output, record):
    """Write the record of what an output folder holds of the runs that have ended, well or not.

    record: path of its JSON file; the other file stands beside it.
    """
    settings = read_json(os.path.join(output, "settings.json"))
    runs, arrays = {}, {}
    for path in run_folders(output):
        folder = os.path.relpath(path, output).replace(os.sep, "/")
        content, ranks = run_content(path)
        if content:
            runs[folder] = content
        arrays.update({f"{folder}/{name}": array for name, array in ranks.items()})
    write_npz(npz_of(record), arrays)
    with replacing(record, "w", encoding="utf-8") as file:
        file.write(record_text(sha256(npz_of(record)), settings, runs))


def run_folders(output):
    """Paths of the run folders, two levels below an output folder, sorted."""
    found = []
    for model in sorted(os.scandir(output), key=lambda entry: entry.name):
        if model.is_dir():
            inside = sorted(os.scandir(model.path), key=lambda entry: entry.name)
            found += [entry.path for entry in inside if entry.is_dir()]
    return found


def run_content(folder):
    """What a record keeps of a run folder: {file's name: content}, {array's name: array}.

    Of a run that has not ended only its trials and tests are kept.
    """
    content, arrays = {}, {}
    run, names = read_run(folder), sorted(os.listdir(folder))
    if run.get("result"):
        why = {"why": gave_up(run)} if gave_up(run) else {}
        options = _without_paths(run.get("options", {}))
        content["run.json"] = {**run, "options": options, "result": {**run["result"], **why}}
        if "log.jsonl" in names:
            content["log.jsonl"] = read_validations(os.path.join(folder, "log.jsonl"))
    for name in names:
        path = os.path.join(folder, name)
        if re.fullmatch(r"trial_\d+\.json", name):
            content[name] = read_json(path)
        if name.endswith(".npz") and name.replace(".npz", ".json") in names:
            content[name], arrays[name], arrays[f"{name}:image_of"] = pack_ranks(path)
            test = name.replace(".npz", ".json")
            content[test] = _without_paths(read_figures(os.path.join(folder, test)))
    return content, arrays


def _without_paths(content):
    return {key: value for key, value in content.items() if key not in PATHS}


def pack_ranks(path):
    """A file of ranks as a record has it: its corrections, one array of all, its image_of.

    Raises InputError if the file cannot be read.
    """
    intervals.read_ranks(path)
    with np.load(path) as content:
        names = [name.removesuffix("i2t_ranks") for name in content if name.endswith("i2t_ranks")]
        corrections = [name.removesuffix("_") for name in names]
        for name in corrections:
            intervals.read_ranks(path, name or None)
        rows = [
            np.concatenate([content[f"{name}{side}_ranks"] for side in ("i2t", "t2i")], -1)
            for name in names
        ]
        return corrections, _small(np.stack(rows)), _small(content["image_of"])


def _small(array):
    """The same numbers in 16 bits if they fit, else in 32."""
    return array.astype(np.int16 if array.max(initial=0) < 2**15 else np.int32)


def write_npz(path, arrays):
    """Write arrays as an .npz file that np.load reads; the same arrays give the same bytes.

    LZMA makes ranks half as large as np.savez_compressed does.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_LZMA
            with archive.open(entry, "w") as content:
                np.lib.format.write_array(content, array, allow_pickle=False)


def npz_of(record):
    """Path of a record's second file."""
    return record.removesuffix(".json") + ".npz"


def sha256(path):
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def record_text(digest, settings, runs):
    """A record's JSON, a line for each file that it keeps: small, and changes are easy to read.

    digest: the SHA-256 of the file beside it.
    """
    parts = [
        f'{{\n "record": {FORMAT},\n "npz": "{digest}",',
        f' "settings.json": {json.dumps(settings)},\n "runs": {{',
    ]
    for folder, content in runs.items():
        lines = ",\n".join(
            f"   {json.dumps(name)}: {json.dumps(own)}" for name, own in content.items()
        )
        parts.append(f"  {json.dumps(folder)}: {{\n{lines}\n  }},")
    if runs:
        parts[-1] = parts[-1][:-1]
    return "\n".join([*parts, " }", "}", ""])


def read_record(record, flag="--from_record"):
    """A record's JSON: {"npz", "settings.json": {...}, "runs": {folder: {file's name: content}}}.

    Raises InputError if it is not one that this program writes.
    """
    check_name(record, flag)
    if not os.path.exists(record):
        raise InputError(f"{flag} {record} is not there: name a record's JSON file")
    try:
        content = read_json(record)
        if content.get("record") != FORMAT:
            raise InputError("")
        for folder, files in content["runs"].items():
            name = r"[^/\\.][^/\\]*"
            good = re.fullmatch(f"{name}/{name}", folder)
            if not good or not all(re.fullmatch(rf"{name}\.(jsonl?|npz)", own) for own in files):
                raise InputError("")
        return {**content, "npz": content["npz"], "settings.json": {**content["settings.json"]}}
    except (InputError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{flag} {record} cannot be read as a record: name one that reproduce.py --record "
            "wrote, or another file"
        ) from error


def unpack(record, content, output):
    """Write a record's runs into an output folder; run folders that are there stay as they are.

    content: as `read_record` gives it. Raises InputError if the ranks beside it cannot be read.
    """
    path = npz_of(record)
    try:
        if sha256(path) != content["npz"]:
            raise ValueError("they are those of another record")
        with np.load(path, allow_pickle=False) as arrays:
            for folder, files in content["runs"].items():
                if not os.path.exists(os.path.join(output, folder)):
                    unpack_run(os.path.join(output, folder), files, folder, arrays)
    except InputError:
        raise
    except Exception as error:  # damaged archives raise many kinds
        raise InputError(
            f"{path} cannot be read as the ranks of {record} ({error}): fetch both files again"
        ) from error


def unpack_run(target, files, folder, arrays):
    """Write one run folder, whole or not at all; folder: its name in the record."""
    temporary = os.path.join(os.path.dirname(os.path.dirname(target)), ".unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, own in files.items():
        path = os.path.join(temporary, name)
        if name.endswith(".npz"):
            ranks, image_of = arrays[f"{folder}/{name}"], arrays[f"{folder}/{name}:image_of"]
            with replacing(path) as file:
                np.savez(file, **unpacked_ranks(own, ranks, image_of))
        elif name.endswith(".jsonl"):
            with replacing(path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in own)
        else:
            write_json(path, own)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.replace(temporary, target)


def unpacked_ranks(corrections, ranks, image_of):
    """The arrays of a file of ranks, as `intervals.write_ranks` names them, without items.

    corrections: the rows' names; ranks: (rows, images + captions); image_of: (captions,).
    """
    ranks, image_of = ranks.astype(np.int32), image_of.astype(np.int32)
    n = ranks.shape[-1] - image_of.shape[-1]
    arrays = {"image_of": image_of}
    for name, row in zip(corrections, ranks, strict=True):
        prefix = f"{name}_" if name else ""
        arrays[f"{prefix}i2t_ranks"], arrays[f"{prefix}t2i_ranks"] = row[..., :n], row[..., n:]
    return arrays


def convert(old, record):
    """Write the record of a folder that an older --record made."""
    if not os.path.isfile(os.path.join(old, "settings.json")):
        raise InputError(
            f"--convert_record {old} has no settings.json: name the folder of an older record"
        )
    check_name(record, "--record")
    keep(old, record)


def read_json(path, *wanted):
    """A JSON file's object, {} without a file; raises InputError without a key `wanted`."""
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
        raise InputError(
            f"{path} cannot be read ({error}): delete it, and it is made again"
        ) from error


def read_run(folder):
    """A run's run.json, {} without one; raises InputError unless it is as train.py writes it."""
    path = os.path.join(folder, "run.json")
    run = read_json(path)
    result = run.get("result") or {}
    if run and not (
        isinstance(run.get("options"), dict)
        and "end" in run
        and isinstance(result, dict)
        and (not result or {"outcome", "epochs", "steps"} <= result.keys())
    ):
        raise InputError(
            f"{path} cannot be read (not what train.py writes): delete it, and the run is made "
            "again"
        )
    return run


def read_trial(path):
    """A trial's dev rsum, or None if it failed; raises InputError unless the file tells it."""
    rsum = read_json(path, "dev_rsum").get("dev_rsum")
    if not isinstance(rsum, (int, float, type(None))):
        raise InputError(f"{path} cannot be read (no figure): delete it, and it is made again")
    return rsum


def read_validations(path):
    """The validations of a run's log.jsonl: [{"epoch": 0, "rsum": ..., ...}, ...]."""
    check_regular(path)
    try:
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        return [line for line in lines if line["kind"] == "validation"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): delete its folder, and the run is made anew"
        ) from error


def read_epochs(folder):
    """The dev split's figures after each epoch of a run, one at least: [{"rsum": ..., ...}, ...].

    Also i2t_n10_skewness and t2i_n10_skewness. Raises InputError if log.jsonl does not tell them.
    """
    path = os.path.join(folder, "log.jsonl")
    names = ("rsum", "i2t_n10_skewness", "t2i_n10_skewness")
    try:
        lines = read_validations(path)
        for line in lines:
            if RECALLS <= line.keys():
                check_rsum(line["rsum"], [line[name] for name in sorted(RECALLS)], path)
        last = {line["epoch"]: {name: float(line[name]) for name in names} for line in lines}
        if not last:
            raise ValueError("it has no validation")
        return [last[epoch] for epoch in range(len(last))]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): delete its folder, and the run is made anew"
        ) from error


def read_figures(path, *wanted):
    """The figures that compute_results.py wrote, as `read_json` gives them.

    Raises InputError if an rsum, also of a correction or a fold, is not the sum of its recalls, as
    after a change by hand.
    """
    figures = read_json(path, *wanted)
    corrections, folds = figures.get("corrections"), figures.get("folds")
    parts = [
        figures,
        *(corrections.values() if isinstance(corrections, dict) else ()),
        *(folds if isinstance(folds, list) else ()),
    ]
    for part in parts:
        if isinstance(part, dict) and {"i2t", "t2i", "rsum"} <= part.keys():
            try:
                recalls = [part[side][f"r{k}"] for side in ("i2t", "t2i") for k in (1, 5, 10)]
            except (KeyError, TypeError):
                recalls = [None]
            check_rsum(part["rsum"], recalls, path)
    return figures


def check_rsum(rsum, recalls, path):
    """Raise InputError unless an rsum is the sum of the six recalls beside it in a file."""
    try:
        agrees = abs(rsum - sum(recalls)) < RSUM_ERROR
    except TypeError:
        agrees = False
    if not agrees:
        raise InputError(
            f"{path} contradicts itself: it has {rsum} as rsum beside recalls {recalls}, which have "
            "another sum: delete it, and it is made again"
        )


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
    """Seconds of an epoch with its validations, from a run.json; None if it does not tell.

    They are those since the run's last start.
    """
    try:
        start, end = (
            datetime.datetime.strptime(run[name], "%Y-%m-%dT%H:%M:%S%z")
            for name in ("start", "end")
        )
        steps, epochs = run["result"]["steps"], run["result"]["epochs"]
        return (
            (end - start).total_seconds() / (steps - (run["resumed_at_step"] or 0)) * steps / epochs
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def made_on(run):
    """Device, release of PyTorch and commit of a run.json, in words."""
    parts = (
        run.get("device"),
        f"torch {run.get('packages', {}).get('torch')}",
        f"commit {run.get('git_commit')}"[:14],
    )
    return ", ".join(filter(None, parts))
