"""Evaluate a checkpoint: recall@K both ways, over a whole split or five folds of it.

    python3 compute_results.py --model_path runs/runX/model_best.pth.tar --data_path data
    python3 compute_results.py --model_path runs/runX/model_best.pth.tar --data_path data \\
        --hubness --correction all --tune_correction --report report

COCO's two settings are `--split testall` (5K) and `--split testall --fold5` (mean of five 1Ks).
Checkpoints of the released scripts can be read, too. Several checkpoints are evaluated as one
model, by the mean of their similarities. A VSE and a SCAN model can also share the work: VSE finds
the nearest items and SCAN orders them.

    python3 compute_results.py --data_path data \\
        --model_path runs/t2i/model_best.pth.tar runs/i2t/model_best.pth.tar
    python3 compute_results.py --data_path data --rerank 100 \\
        --model_path runs/vse/model_best.pth.tar runs/i2t/model_best.pth.tar

`--export` writes the evaluated model for another code, or as a folder to be published.
Embeddings that any other model made need no checkpoint (docs/embeddings.md):

    python3 compute_results.py --embeddings images.npy captions.npy --hubness --report report
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends without a traceback; run_script sets its own handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import sys
from functools import partial

import torch

from embeddings import options as files
from evaluation import (
    BANK_IMAGES,
    BANK_REGION_IMAGES,
    bank_stride,
    embedded,
    evaluate,
    evaluate_model,
    load_members,
    print_evaluation,
    write_csv,
    write_results,
)
from inputs.captions import data_set_name, is_precomputed
from inputs.tokenizer import READINGS
from pages import report
from retrieval import corrections, eccv, intervals
from retrieval.comparison import compared_models, print_differences
from retrieval.hubness import DEPTHS, hubness_both_ways, mean_hubness
from retrieval.metrics import as_dict, mean_metrics, metrics_of
from retrieval.rerank import by_kind, rank_three_ways
from retrieval.ties import print_ties, ties_of
from runtime import distributed
from runtime.errors import (
    ArgumentParser,
    InputError,
    number,
    path_type,
    refuse_useless,
    run_script,
)
from runtime.files import check_new
from training import export
from training.model_folder import model_type


def parse_args(argv=None):
    """The script's flags."""
    parser = ArgumentParser("Evaluate a checkpoint of train.py or of the released code.")
    add_checkpoint_flags(parser.add_argument_group("what to evaluate"))
    files.add_flags(parser.add_argument_group("or embeddings of any other model"))
    add_data_flags(parser.add_argument_group("on which data"))
    add_hub_flags(parser.add_argument_group("hubs"))
    add_machine_flags(parser.add_argument_group("how"))
    add_output_flags(parser.add_argument_group("what to write"))
    add_export_flags(parser.add_argument_group("the model for another code, or to be published"))
    options = parser.parse_args(argv)
    if options.dataset is not None:
        raise InputError(of_eval(options))
    files.check(options, {name: parser.get_default(name) for name in ("model_path", "split")})
    take_members(options)
    check_useless_flags(options)
    check_correction_splits(options)
    check_folders(options)
    return options


EVAL_DATA = "/tmp/data"  # the folder that VSE-infinity's eval.py has fixed


def of_eval(options):
    """The sentence for the flags of VSE-infinity's eval.py, which reads fixed folders."""
    name = options.dataset
    return (
        "--dataset is of VSE-infinity's eval.py; its command is here: python3 compute_results.py "
        f"--model_path runs/release_weights/{name}_butd_region_bigru/model_best.pth --data_path "
        f"{options.data_path or f'{EVAL_DATA}/{name}'} --data_name precomp --vocab_path "
        f"{EVAL_DATA}/vocab --split {'testall' if name == 'coco' else 'test'}"
    )


def add_checkpoint_flags(group):
    """The model or models."""
    group.add_argument(
        "--model_path",
        type=model_type,
        nargs="+",
        metavar="FILE",
        default="runs/runX/model_best.pth.tar",
        help="checkpoint, or a folder of --export; several, any mix of VSE and SCAN, are evaluated "
        "as one by the mean of their similarities",
    )
    group.add_argument(
        "--rerank",
        type=number(int, 1),
        metavar="K",
        help="with a VSE and a SCAN checkpoint: VSE finds each query's K nearest, SCAN orders them",
    )
    group.add_argument(
        "--vocab_path",
        type=path_type,
        nargs="+",
        metavar="DIR",
        help="folder of the vocabulary, or one for each checkpoint (default: the checkpoint's own "
        "words, or its vocab_path if it carries none)",
    )
    group.add_argument(
        "--caption_reading",
        choices=READINGS,
        help="how captions become words (default: as in the checkpoint's training)",
    )


def add_data_flags(group):
    """The data set and its split."""
    group.add_argument(
        "--data_path",
        type=path_type,
        help="folder that holds the data sets (default: the checkpoint's)",
    )
    group.add_argument(
        "--data_name",
        nargs="+",
        metavar="NAME",
        type=data_set_name,
        help="data set to evaluate on, or one for each checkpoint (default: the checkpoint's)",
    )
    group.add_argument(
        "--split",
        default="test",
        choices=["train", "dev", "val", "test", "testall"],
        help="split of the data set",
    )
    group.add_argument("--dataset", help=argparse.SUPPRESS)  # of VSE-infinity's eval.py
    group.add_argument("--fold5", action="store_true", help="mean over five equal folds (COCO 1K)")
    group.add_argument(
        "--eccv",
        action="store_true",
        help="also print ECCV Caption and CxC, for COCO's test split (5K); needs the package "
        "eccv_caption",
    )
    group.add_argument(
        "--skip_broken_images",
        action="store_true",
        help="leave out raw images that cannot be decoded",
    )


def add_hub_flags(group):
    """Hubness and its corrections."""
    group.add_argument(
        "--hubness", action="store_true", help="print how hubs distort the ranking: N_1, N_5, N_10"
    )
    group.add_argument(
        "--correction",
        choices=[*corrections.METHODS, "all"],
        help="print recalls and hubness before and after a hub correction at inference",
    )
    group.add_argument(
        "--correction_bank",
        choices=["train", "dev"],
        help="split whose images and captions show which targets are hubs (default: train)",
    )
    group.add_argument(
        "--correction_bank_images",
        type=number(int, 0),
        help="most images taken from it, evenly spread, with their captions (0: all; default: "
        f"{BANK_IMAGES}, with cross attention {BANK_REGION_IMAGES})",
    )
    group.add_argument(
        "--transductive",
        action="store_true",
        help="use the evaluated queries themselves as the bank",
    )
    corrections.add_flags(group, corrections.METHODS)
    group.add_argument(
        "--tune_correction",
        action="store_true",
        help="choose each parameter that no flag sets, except qbnorm's k, by the recalls on dev, "
        "for each direction separately",
    )


def add_machine_flags(group):
    """How it is computed."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda[:n] or mps")
    group.add_argument(
        "--batch_size",
        type=number(int, 1),
        help="items encoded at once (default: the checkpoint's)",
    )


def add_output_flags(group):
    """What to write."""
    group.add_argument(
        "--save_csv",
        type=path_type,
        metavar="FILE",
        help="append the figures to FILE (FILE_fold1 and FILE_fold5 with --fold5)",
    )
    group.add_argument(
        "--save_json", type=path_type, metavar="FILE", help="write all figures at full precision"
    )
    group.add_argument(
        "--save_ranks",
        type=path_type,
        metavar="FILE",
        help="write every query's rank and first ten items, before and after --correction, as .npz "
        "(see retrieval.intervals.write_ranks)",
    )
    group.add_argument(
        "--save_embeddings",
        action="store_true",
        help="write <name of the run's folder>_img_and_cap_embeddings.npz, one row per caption",
    )
    group.add_argument(
        "--report",
        type=path_type,
        metavar="DIR",
        help="write DIR/report.html: intervals, hubs and examples in one page",
    )
    group.add_argument(
        "--images",
        type=path_type,
        metavar="DIR",
        help="with --report: folder of the photos, named as in <split>_ids.txt",
    )


def add_export_flags(group):
    """The model as a file for other code."""
    group.add_argument(
        "--export",
        type=path_type,
        metavar="FOLDER",
        help="write the model to a new folder, with its vocabulary and the figures",
    )
    group.add_argument(
        "--export_for",
        choices=export.KINDS,
        help="with --export: a checkpoint for the released code of HAL, VSE++, SCAN or "
        "VSE-infinity, or model.safetensors with a model card (default: safetensors)",
    )


def take_members(options):
    """Make one value of each list of one; raise InputError if flags do not fit the checkpoints."""
    for name in ("model_path", "data_name", "vocab_path"):
        values = getattr(options, name)
        if isinstance(values, list) and len(values) == 1:
            setattr(options, name, values[0])
    n = len(options.model_path) if isinstance(options.model_path, list) else 1
    for name in ("data_name", "vocab_path"):
        values = getattr(options, name)
        if isinstance(values, list) and len(values) != n:
            raise InputError(
                f"--{name} has {len(values)} values for {n} of --model_path: give one, or as many"
            )
    if options.rerank and n != 2:
        raise InputError(
            f"--rerank is for two checkpoints, a VSE and a SCAN one, and --model_path names {n}: "
            "name both, or leave --rerank out"
        )
    for name, why in (
        ("correction", "a correction"),
        ("report", "the page"),
        ("eccv", "the package"),
    ):
        if options.rerank and getattr(options, name):
            raise InputError(
                f"--rerank gives no similarities of all pairs, which {why} needs: leave out "
                f"--{name} or --rerank"
            )
    for name in ("save_embeddings", "export"):
        if n > 1 and getattr(options, name):
            raise InputError(
                f"--{name} is for one checkpoint, and --model_path names {n}: leave it out, or "
                "name one"
            )


def check_useless_flags(options):
    """Raise InputError for a flag that does nothing given the others."""
    bank_flags = ["correction_bank", "correction_bank_images"]
    parameters = [f"correction_{name}" for name in corrections.ADJUSTABLE]
    names = wanted_methods(options)
    theirs = {f"correction_{key}" for name in names for key in corrections.parameters_of(name)}
    rules = (
        (
            not names,
            ["transductive", "tune_correction", *bank_flags, *parameters],
            "without --correction",
        ),
        (options.report is None, ["images"], "without --report"),
        (options.export is None, ["export_for"], "without --export"),
        (options.transductive, bank_flags, "with --transductive"),
        (
            names,
            [flag for flag in parameters if flag not in theirs],
            f"with --correction {options.correction}",
        ),
    )
    refuse_useless(options, rules)


def check_correction_splits(options):
    """Raise InputError if the bank or the tuning of a correction would see the evaluated split."""
    names = wanted_methods(options)
    split, bank = (
        {"val": "dev"}.get(options.split, options.split),
        options.correction_bank or "train",
    )
    if names and bank == split and not options.transductive:
        raise InputError(
            f"--correction_bank is {split}, the split that is evaluated: take another one, or say "
            "--transductive if the queries themselves are meant to be the bank"
        )
    if options.tune_correction and "dev" in (split, options.correction_bank):
        raise InputError(
            "--tune_correction chooses on the dev split, which can be neither evaluated nor the "
            "bank: leave it out, or take another --split or --correction_bank"
        )
    given = corrections.given_by(options)
    free = [key for name in names for key in corrections.GRIDS[name] if given[key] is None]
    if options.tune_correction and not free:
        raise InputError(
            f"--tune_correction has nothing to choose, since all that it chooses of "
            f"{options.correction} are given: leave it out, or them"
        )


def check_folders(options):
    """Raise InputError if --report, --images or a file to save cannot be used."""
    if options.report is not None and options.fold5:
        raise InputError("--report shows a whole split: leave --fold5 out")
    if options.eccv and options.fold5:
        raise InputError(
            "--eccv is of a whole split, whose five folds it shows, too: leave --fold5 out"
        )
    if (
        options.report is not None
        and os.path.exists(options.report)
        and not os.path.isdir(options.report)
    ):
        raise InputError(f"--report {options.report!r} is not a folder: name one, which may be new")
    if options.report is not None and not os.access(existing(options.report), os.W_OK):
        raise InputError(
            f"--report {options.report!r} cannot be written: name a folder that may be"
        )
    if options.export is not None:
        check_new(options.export, "--export")
    if options.images is not None and not os.path.isdir(options.images):
        raise InputError(f"--images {options.images!r} is not a folder: name that of the photos")
    files = {
        flag: path
        for flag in ("save_csv", "save_json", "save_ranks")
        if (path := getattr(options, flag)) is not None
    }
    for flag, path in files.items():
        folder = os.path.dirname(os.path.abspath(path))
        is_made = flag == "save_json" and not os.path.exists(folder)
        if os.path.isdir(path) or not is_made and not os.access(folder, os.W_OK):
            raise InputError(
                f"--{flag} {path!r} cannot be written: name a file in a folder that is there and "
                "may be written"
            )
    if len(set(map(os.path.realpath, files.values()))) < len(files):
        raise InputError(
            f"--{' and --'.join(files)} name the same file: name a different one for each"
        )


def existing(path):
    """The path, or the nearest folder above it that exists."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def wanted_methods(options):
    """The corrections that --correction names."""
    if options.correction == "all":
        return list(corrections.METHODS)
    return [options.correction] if options.correction else []


# Hubs -------------------------------------------------------------------------------------------


def hubness_of_folds(rankings):
    """The hubness of a split, or the mean over its folds, each (i2t Ranking, t2i Ranking)."""
    return mean_hubness([hubness_both_ways(pair) for pair in rankings])


def check_data(options, loaders, loaded, dataset):
    """Raise InputError, before anything is computed, if the data lacks what the flags need.

    loaders: filled with {split: loader} for the splits that a correction needs
    loaded: a Checkpoint or an Ensemble
    dataset: the evaluated split's
    """
    if options.skip_broken_images and all(
        is_precomputed(member.opt.data_name) for member in loaded.members
    ):
        raise InputError(
            f"--skip_broken_images does nothing for features such as {loaded.opt.data_name}: leave "
            "it out"
        )
    if options.export is not None:
        export.check(options.export_for or export.FOLDER, loaded)
    if options.report is not None:
        report.find_photos(options.images, options.split, loaded.opt, dataset)
    needed = (
        [options.correction_bank or "train"]
        if options.correction and not options.transductive
        else []
    )
    for split in [*needed, "dev"] if options.tune_correction else needed:
        loaders[split] = loaded.loader(split)


def load_bank(options, result, loaders):
    """The bank's (images, captions), None with --transductive, and its description in words."""
    if options.transductive:
        return None, "transductive: the bank is the evaluated queries themselves"
    split = options.correction_bank or "train"
    loader = loaders[split]
    stride = bank_stride(
        result.checkpoint.opt, loader.dataset.n_images, options.correction_bank_images
    )
    images, captions = result.checkpoint.embed(loader, stride)
    title = getattr(loader, "title", split)
    return (images, captions), f"bank: {title}, {len(images)} images, {len(captions)} captions"


def bank_sources(loaded, own, bank):
    """The sources that `corrections_of` takes for i2t and t2i.

    own, bank: (images, captions) as the model's `embed` returns them
    """
    return loaded.similarities(bank[0], own[1]), loaded.similarities(own[0], bank[1])


def correct(options, result, loaders):
    """What --correction asks for: the bank in words, and {method: outcome}.

    An outcome has parameters, dev_rsum, rankings (of each fold), metrics and hubness.
    loaders: as `check_data` fills them
    """
    names, (bank, words) = wanted_methods(options), load_bank(options, result, loaders)
    chosen = choose_parameters(options, names, result.checkpoint, bank, loaders)
    if options.tune_correction:
        words += "; parameters chosen on dev"
    outcome = {}
    for name, own, rankings in zip(names, chosen, zip(*corrected(result, bank, names, chosen))):
        outcome[name] = {
            "parameters": {"i2t": own.i2t, "t2i": own.t2i},
            "dev_rsum": own.rsum,
            "rankings": rankings,
            "metrics": mean_metrics([metrics_of(pair) for pair in rankings]),
            "hubness": hubness_of_folds(rankings),
        }
    return words, outcome


def choose_parameters(options, names, loaded, bank, loaders):
    """A `corrections.Tuned` for each method: from the flags, or chosen on dev."""
    given = corrections.given_by(options)
    if not options.tune_correction:
        fixed = [corrections.parameters_of(name, **given) for name in names]
        return [corrections.Tuned(own, own, None) for own in fixed]
    loader = loaders["dev"]
    dev = loaded.embed(loader)
    return corrections.tune(
        names,
        loaded.similarities(*dev),
        bank_sources(loaded, dev, bank or dev),
        given,
        loader.dataset.image_of,
    )


def corrected(result, bank, names, chosen):
    """For each fold of an Evaluation, the corrected (i2t Ranking, t2i Ranking) of each method.

    bank: (images, captions); None: the fold itself
    chosen: a `corrections.Tuned` for each method
    """
    loaded, folds = result.checkpoint, []
    for (images, captions, image_of), rankings in zip(result.parts(), result.rankings):
        own = images, captions
        i2t_bank, t2i_bank = bank_sources(loaded, own, bank or own)
        i2t = [(name, parameters.i2t) for name, parameters in zip(names, chosen)]
        t2i = [(name, parameters.t2i) for name, parameters in zip(names, chosen)]
        pairs = zip(
            corrections.corrections_of("i2t", i2t_bank, i2t),
            corrections.corrections_of("t2i", t2i_bank, t2i),
        )
        source = loaded.similarities(*own)
        folds.append(
            corrections.rank_corrected(source, rankings, list(pairs), max(DEPTHS), image_of)
        )
    return folds


def print_hubness(hubs):
    """Print the table of --hubness."""
    print(
        "Hubness: N_k of a target is the number of queries with it among their k nearest (i2t: "
        "captions are targets)"
    )
    print(
        f"{'':5}{'k':>3}{'skewness':>10}{'anti-hubs':>11}{'top 1 % take':>14}{'Robin Hood':>12}"
        f"{'hub occurrence':>16}{'largest N_k':>13}"
    )
    for side, rows in hubs.items():
        for k, row in rows.items():
            item = f" (item {row.largest_item})" if row.largest_item >= 0 else " (mean of folds)"
            print(
                f"{side:5}{k:3}{row.skewness:10.2f}{row.anti_hubs:11.1%}{row.top_share:14.1%}"
                f"{row.robin_hood:12.1%}{row.hub_occurrence:16.1%}{row.largest:13.6g}{item}"
            )


def print_reranking(k, figures):
    """Print the table of --rerank; figures: {way: (Metrics, seconds)}."""
    names = {"vse": "VSE", "reranked": f"VSE's {k}, by SCAN", "scan": "SCAN"}
    print("Reranking (seconds from embeddings to ranks)")
    print(f"{'':20}{'image to text':^20}{'text to image':^22}")
    print(
        f"{'':20}{'R@1':>6}{'R@5':>7}{'R@10':>7}{'R@1':>8}{'R@5':>7}{'R@10':>7}{'rsum':>8}"
        f"{'seconds':>10}"
    )
    for way, (metrics, seconds) in figures.items():
        print(f"{names[way]:20}{recall_cells(metrics)}{seconds:10.2f}")


def recall_cells(metrics):
    """Recalls and rsum as cells of a table."""
    recalls = zip([*metrics.i2t[:3], *metrics.t2i[:3], metrics.rsum], (6, 7, 7, 8, 7, 7, 8))
    return "".join(f"{value:{width}.1f}" for value, width in recalls)


def print_corrections(words, plain, outcome):
    """Print the table of --correction: a row without correction, then one for each method."""
    print(f"Corrections ({words})")
    print(
        f"{'':18}{'image to text':^20}{'text to image':^22}"
        f"{'':8}{'N_10 of captions':^21}{'N_10 of images':>18}"
    )
    print(
        f"{'':18}{'R@1':>6}{'R@5':>7}{'R@10':>7}{'R@1':>8}{'R@5':>7}{'R@10':>7}{'rsum':>8}"
        + f"{'skewness':>10}{'anti-hubs':>11}" * 2
    )
    rows = {
        "none": plain,
        **{name: (one["metrics"], one["hubness"]) for name, one in outcome.items()},
    }
    for name, (metrics, hubs) in rows.items():
        cells = recall_cells(metrics)
        cells += "".join(
            f"{hubs[side][10].skewness:10.2f}{hubs[side][10].anti_hubs:11.1%}"
            for side in ("i2t", "t2i")
        )
        print(f"{name:18}{cells}")
    for name, one in outcome.items():
        print(f"{name}: {corrections.in_words(one['parameters'])}")


def hubness_as_dict(hubs):
    """Hubness as names and numbers, for JSON."""
    return {side: {str(k): row._asdict() for k, row in rows.items()} for side, rows in hubs.items()}


def main(argv=None):
    """Evaluate what the flags name, in this process or in all that torchrun has started."""
    with distributed.session():
        carry_out(parse_args(argv))


def evaluated(options, top, loaders, models):
    """The Evaluation, with `top` items per query, and more for the JSON file; prints both.

    loaders: filled by `check_data`
    models: {label: model} of files of embeddings, the first of which is evaluated; empty: the
        checkpoints are
    """
    check = partial(check_data, options, loaders)
    if options.eccv:
        return evaluated_with_eccv(options, top, check, models)
    if options.rerank:
        return evaluated_reranked(options, top, check)
    return evaluated_plainly(options, top, check, models), {}


def evaluated_plainly(options, top, check, models):
    """The Evaluation of the checkpoints, or of the first of the models."""
    if not models:
        return evaluate(options, options.split, top, check)
    return evaluate_model(next(iter(models.values())), options.split, options.fold5, top, check)


def evaluated_with_eccv(options, top, check, models):
    """As `evaluated`, with the figures of --eccv."""
    package = eccv.load_package()

    def check_both(loaded, dataset):
        eccv.coco_ids(package, options.split, loaded, dataset)
        check(loaded, dataset)

    result = evaluated_plainly(options, eccv.ITEMS, check_both, models)
    found, folds = eccv.figures(package, options.split, result)
    eccv.print_figures(found, result.metrics, folds)
    rankings = [ranking._replace(items=ranking.items[:, :top]) for ranking in result.rankings[0]]
    more = {"eccv": found, "coco_1k": as_dict(folds)}
    return result._replace(rankings=[tuple(rankings)]), more


def evaluated_reranked(options, top, check):
    """As `evaluated`, for --rerank: SCAN orders what VSE finds."""
    loaded = load_members(options)
    by_kind(loaded)
    result = embedded(loaded, options.split, options.fold5, check)
    loaded.opt.logger_name += f" reranked {options.rerank}"
    ways = rank_three_ways(result, options.rerank, top)
    result = result.ranked(list(ways["reranked"].rankings))
    print_evaluation(result)
    figures = {
        way: (mean_metrics(list(map(metrics_of, timed.rankings))), timed.seconds)
        for way, timed in ways.items()
    }
    print_reranking(options.rerank, figures)
    more = {"k": options.rerank}
    for way, (metrics, seconds) in figures.items():
        more[way] = {**as_dict(metrics), "seconds": seconds}
    return result, {"rerank": more}


def compare(options, result, models, top):
    """The Compared of the first model, whose Evaluation is `result`, and the others; prints it."""
    first, *others = models
    results = {first: result}
    for label in others:
        print(f"\n{label}:")
        check = partial(check_alike, label, result.dataset)
        results[label] = evaluate_model(models[label], options.split, options.fold5, top, check)
        print_ties(ties_of(results[label]))
    found = compared_models(results)
    print_differences(found)
    return found


def check_alike(label, first, loaded, dataset):
    """Raise InputError unless a model has the captions of the first one, of the same images.

    first, dataset: of the first model and of this one
    """
    if not all(map(torch.equal, (first.lines, first.image_of), (dataset.lines, dataset.image_of))):
        raise InputError(
            f"--against {label} has {dataset.n_images} images and {len(dataset)} captions, which "
            f"do not belong together as the first model's {first.n_images} and {len(first)} do: "
            "compare embeddings of the same images and captions, in the same order"
        )


def carry_out(options):
    """Evaluate what the options name, print the tables and write the files."""
    look_at_hubs = options.hubness or options.correction or options.report
    words, outcome, loaders, hubs = "", {}, {}, None
    models = files.opened(options) if files.given(options) else {}
    if options.against:
        print(f"{next(iter(models))}:")
    top = max(DEPTHS) if look_at_hubs or options.save_ranks else 1
    result, more = evaluated(options, top, loaders, models)
    compared, tied = None, ""
    if models:
        ties = ties_of(result)
        print_ties(ties)
        tied = ties.in_words()
        more |= {**files.as_dict(options), "ties": ties.as_dict()}
    if options.against:
        compared = compare(options, result, models, top)
        more["compared"] = compared.as_dict()
    if look_at_hubs:
        hubs = hubness_of_folds(result.rankings)
        more["hubness"] = hubness_as_dict(hubs)
        if options.hubness:
            print_hubness(hubs)
    if options.correction:
        words, outcome = correct(options, result, loaders)
        print_corrections(words, (result.metrics, hubs), outcome)
        more["correction_bank"] = words
        more["corrections"] = {
            name: {
                "parameters": one["parameters"],
                "dev_rsum": one["dev_rsum"],
                **as_dict(one["metrics"]),
                "hubness": hubness_as_dict(one["hubness"]),
            }
            for name, one in outcome.items()
        }
    if distributed.is_first():
        write_results(options, options.split, result, more)
        write_others(options, result, hubs, words, outcome, compared, tied)


def write_others(options, result, hubs, words, outcome, compared, tied):
    """Write the files that options ask for, beside those of `write_results`.

    hubs, words, outcome, compared, tied: as `report.write_report` takes them
    """
    if options.save_ranks:
        intervals.write_ranks(
            options.save_ranks,
            [image_of for *_, image_of in result.parts()],
            {"": result.rankings, **{name: one["rankings"] for name, one in outcome.items()}},
        )
    if options.report:
        report.write_report(options, options.split, result, hubs, words, outcome, compared, tied)
    if options.export:
        write_export(options, result)
    # Last: if another file cannot be written, the next try must not append the same line twice.
    for one in compared.results.values() if compared else [result]:
        write_csv(options, one)


def write_export(options, result):
    """Write what --export asks for, with the figures of the Evaluation."""
    member = result.checkpoint
    figures = {
        "data_name": member.opt.data_name,
        "split": options.split,
        "images": len(result.images),
        "captions": len(result.captions),
        "caption_reading": member.opt.caption_reading,
        "fold5": options.fold5,
        **as_dict(result.metrics),
    }
    written = export.write(options.export, options.export_for or export.FOLDER, member, figures)
    print(f"Wrote {written}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main, outlasts_reader=True)
