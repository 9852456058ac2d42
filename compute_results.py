"""Evaluate a checkpoint: recall@K both ways, over a whole split or five folds of it.

    python3 compute_results.py --model_path runs/runX/model_best.pth.tar --data_path data
    python3 compute_results.py --model_path runs/runX/model_best.pth.tar --data_path data \\
        --hubness --correction all --tune_correction --report report

COCO's two settings are `--split testall` (5K) and `--split testall --fold5` (mean of five 1Ks).
Reads checkpoints of the released scripts, too. Several are one model whose similarities are the mean of theirs; a VSE
and a SCAN model can also share the work, VSE finding the nearest and SCAN putting them in order:

    python3 compute_results.py --model_path runs/t2i/model_best.pth.tar runs/i2t/model_best.pth.tar --data_path data
    python3 compute_results.py --model_path runs/vse/model_best.pth.tar runs/i2t/model_best.pth.tar --data_path data \\
        --rerank 100
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends quietly; run_script takes it back

import os
from functools import partial

import corrections
import distributed
import eccv
import intervals
import report
from caption_files import is_precomputed
from errors import ArgumentParser, InputError, number, run_script
from evaluation import (
    BANK_IMAGES,
    BANK_REGION_IMAGES,
    as_dict,
    bank_stride,
    embedded,
    evaluate,
    load_members,
    mean_metrics,
    metrics_of,
    print_evaluation,
    write_csv,
    write_results,
)
from hubness import DEPTHS, hubness_both_ways, mean_hubness
from rerank import by_kind, rank_three_ways
from vocab import READINGS


def parse_args(argv=None):
    """The script's flags."""
    parser = ArgumentParser("Evaluate a checkpoint of train.py or of the released code.")
    add_source_flags(parser.add_argument_group("what to evaluate"))
    add_hub_flags(parser.add_argument_group("hubs"))
    add_machine_flags(parser.add_argument_group("how"))
    add_output_flags(parser.add_argument_group("what to write"))
    options = parser.parse_args(argv)
    take_members(options)
    check_useless_flags(options)
    check_correction_splits(options)
    check_folders(options)
    return options


def add_source_flags(group):
    """What to evaluate."""
    group.add_argument("--model_path", nargs="+", default="runs/runX/model_best.pth.tar", metavar="FILE",
                       help="checkpoint; of several, any mix of VSE and SCAN, the mean of the similarities is taken")
    group.add_argument("--rerank", type=number(int, 1), metavar="K",
                       help="of a VSE and a SCAN checkpoint: VSE finds each query's K nearest, SCAN puts them in order")
    group.add_argument("--data_path", help="folder that holds the data sets (default: the checkpoint's)")
    group.add_argument("--data_name", nargs="+", metavar="NAME",
                       help="data set to evaluate on, or one for each checkpoint (default: the checkpoint's)")
    group.add_argument("--vocab_path", nargs="+", metavar="DIR",
                       help="folder of the vocabulary, or one for each checkpoint (default: the checkpoint's own "
                            "words, or its vocab_path where it carries none)")
    group.add_argument("--split", default="test", choices=["train", "dev", "val", "test", "testall"],
                       help="split of the data set")
    group.add_argument("--fold5", action="store_true", help="mean over five equal folds (COCO 1K)")
    group.add_argument("--eccv", action="store_true", help="COCO's test split (5K): ECCV Caption and CxC, too, by the "
                                                           "package eccv_caption")
    group.add_argument("--skip_broken_images", action="store_true", help="leave out raw images that cannot be decoded")
    group.add_argument("--caption_reading", choices=READINGS,
                       help="how captions become words (default: as in the checkpoint's training)")


def add_hub_flags(group):
    """Hubness and its corrections."""
    group.add_argument("--hubness", action="store_true", help="print how hubs distort the ranking: N_1, N_5, N_10")
    group.add_argument("--correction", choices=[*corrections.METHODS, "all"],
                       help="print recalls and hubness before and after a correction of hubs at inference")
    group.add_argument("--correction_bank", choices=["train", "dev"],
                       help="split whose images and captions tell which targets are hubs (default: train)")
    group.add_argument("--correction_bank_images", type=number(int, 0),
                       help="at most so many images of it, evenly spread, with their captions (0: all; default: "
                            f"{BANK_IMAGES}, with cross attention {BANK_REGION_IMAGES})")
    group.add_argument("--transductive", action="store_true", help="take the evaluated queries themselves as the bank")
    group.add_argument("--correction_k", type=number(int, 1),
                       help="csls, nnn, qbnorm: nearest of the bank (default: 10, 128, 1)")
    group.add_argument("--correction_temperature", type=number(float, 1e-4, 100),
                       help="inverted_softmax, qbnorm, sinkhorn: temperature of the softmax (default: 0.05)")
    group.add_argument("--correction_alpha", type=number(float, 0, low_allowed=False),
                       help="nnn: weight of what is taken off (default: 0.75)")
    group.add_argument("--tune_correction", action="store_true",
                       help="choose each parameter that no flag sets, but qbnorm's k, by the recalls on dev, for each "
                            "direction")


def add_machine_flags(group):
    """How it is computed."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda[:n] or mps")
    group.add_argument("--batch_size", type=number(int, 1),
                       help="items encoded at a time (default: the checkpoint's)")


def add_output_flags(group):
    """What to write."""
    group.add_argument("--save_csv", metavar="FILE", help="append the figures to FILE (FILE_fold1 and FILE_fold5 "
                                                          "with --fold5)")
    group.add_argument("--save_json", metavar="FILE", help="write all figures at full precision")
    group.add_argument("--save_ranks", metavar="FILE", help="write every query's rank and ten first items, before and "
                                                            "after --correction, as .npz (see intervals.write_ranks)")
    group.add_argument("--save_embeddings", action="store_true",
                       help="write <run folder's name>_img_and_cap_embeddings.npz, one row a caption")
    group.add_argument("--report", metavar="DIR", help="write DIR/report.html: intervals, hubs, examples, in pictures")
    group.add_argument("--images", metavar="DIR", help="--report: folder of the photos, named as in <split>_ids.txt")


def take_members(options):
    """Make one value of a list of one; raise InputError where the flags do not fit as many checkpoints as there are."""
    for name in ("model_path", "data_name", "vocab_path"):
        values = getattr(options, name)
        if isinstance(values, list) and len(values) == 1:
            setattr(options, name, values[0])
    n = len(options.model_path) if isinstance(options.model_path, list) else 1
    for name in ("data_name", "vocab_path"):
        values = getattr(options, name)
        if isinstance(values, list) and len(values) != n:
            raise InputError(f"--{name} has {len(values)} values for {n} of --model_path: give one, or as many")
    if options.rerank and n != 2:
        raise InputError(f"--rerank is for two checkpoints, a VSE and a SCAN one, and --model_path names {n}: name "
                         "both, or leave --rerank out")
    for name, why in (("correction", "a correction"), ("report", "the page"), ("eccv", "the package")):
        if options.rerank and getattr(options, name):
            raise InputError(f"--rerank gives no similarities of all pairs, which {why} needs: leave out --{name} or "
                             "--rerank")
    if n > 1 and options.save_embeddings:
        raise InputError("--save_embeddings is for one checkpoint, and --model_path names "
                         f"{n}: leave it out, or name one")


def check_useless_flags(options):
    """Raise InputError for a flag that does nothing beside the others."""
    bank_flags = ["correction_bank", "correction_bank_images"]
    parameters = [f"correction_{name}" for name in corrections.ADJUSTABLE]
    names = wanted_methods(options)
    theirs = {f"correction_{key}" for name in names for key in corrections.parameters_of(name)}
    for useless, flags, others in (
            (not names, ["transductive", "tune_correction", *bank_flags, *parameters], "without --correction"),
            (options.report is None, ["images"], "without --report"),
            (options.transductive, bank_flags, "with --transductive"),
            (names, [flag for flag in parameters if flag not in theirs], f"with --correction {options.correction}")):
        given = [flag for flag in flags if useless and not any(getattr(options, flag) is x for x in (None, False))]
        if given:
            raise InputError(f"--{given[0]} does nothing {others}: leave it out, or change the other")


def check_correction_splits(options):
    """Raise InputError where the bank or the tuning of a correction would see what is evaluated."""
    names = wanted_methods(options)
    split, bank = {"val": "dev"}.get(options.split, options.split), options.correction_bank or "train"
    if names and bank == split and not options.transductive:
        raise InputError(f"--correction_bank is {split}, the split that is evaluated: take another one, or say "
                         "--transductive if the queries themselves are meant to be the bank")
    if options.tune_correction and "dev" in (split, options.correction_bank):
        raise InputError("--tune_correction chooses on the dev split, which can be neither evaluated nor the bank: "
                         "leave it out, or take another --split or --correction_bank")
    if options.tune_correction and all(options_given(options, name) >= set(corrections.GRIDS[name]) for name in names):
        raise InputError(f"--tune_correction has nothing to choose, since all that it chooses of "
                         f"{options.correction} are given: leave it out, or them")


def check_folders(options):
    """Raise InputError where --report, --images or a file to save will not do."""
    if options.report is not None and options.fold5:
        raise InputError("--report shows a whole split: leave --fold5 out")
    if options.eccv and options.fold5:
        raise InputError("--eccv is of a whole split, whose five folds it shows, too: leave --fold5 out")
    if options.report is not None and (
            not options.report or os.path.exists(options.report) and not os.path.isdir(options.report)):
        raise InputError(f"--report {options.report!r} is not a folder: name one, which may be new")
    if options.report is not None and not os.access(existing(options.report), os.W_OK):
        raise InputError(f"--report {options.report!r} cannot be written: name a folder that may be")
    if options.images is not None and not os.path.isdir(options.images):
        raise InputError(f"--images {options.images!r} is not a folder: name that of the photos")
    files = {flag: path for flag in ("save_csv", "save_json", "save_ranks")
             if (path := getattr(options, flag)) is not None}
    for flag, path in files.items():
        folder = os.path.dirname(os.path.abspath(path))
        is_made = flag == "save_json" and not os.path.exists(folder)
        if not path or os.path.isdir(path) or not is_made and not os.access(folder, os.W_OK):
            raise InputError(f"--{flag} {path!r} cannot be written: name a file in a folder that is there and may be "
                             "written")
    if len(set(map(os.path.realpath, files.values()))) < len(files):
        raise InputError(f"--{' and --'.join(files)} name one file: give each its own")


def existing(path):
    """The path, or the nearest folder above that is there."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def wanted_methods(options):
    """The corrections that --correction names."""
    return list(corrections.METHODS) if options.correction == "all" else [options.correction] * bool(options.correction)


def options_given(options, name):
    """The parameters of a correction that flags give."""
    return {key for key in corrections.parameters_of(name) if getattr(options, f"correction_{key}") is not None}


# Hubs -------------------------------------------------------------------------------------------

def hubness_of_folds(rankings):
    """The hubness of a split's folds, each (i2t Ranking, t2i Ranking), or their mean."""
    return mean_hubness([hubness_both_ways(pair) for pair in rankings])


def check_data(options, loaders, loaded, dataset):
    """Raise InputError, before anything is computed, where the data lacks what the flags need.

    loaders: gets {split: loader} of those that a correction needs; loaded: a Checkpoint or an Ensemble; dataset: the
    evaluated split's.
    """
    if options.skip_broken_images and all(is_precomputed(member.opt.data_name) for member in loaded.members):
        raise InputError(f"--skip_broken_images does nothing for features such as {loaded.opt.data_name}: leave it out")
    if options.report is not None:
        report.find_photos(options.images, options.split, loaded.opt, dataset)
    needed = [options.correction_bank or "train"] if options.correction and not options.transductive else []
    for split in [*needed, "dev"] if options.tune_correction else needed:
        loaders[split] = loaded.loader(split)


def load_bank(options, result, loaders):
    """(images, captions) of the bank's split and what it is in words; with --transductive, None and the words."""
    if options.transductive:
        return None, "transductive: the bank is the evaluated queries themselves"
    split = options.correction_bank or "train"
    loader = loaders[split]
    stride = bank_stride(result.checkpoint.opt, loader.dataset.n_images, options.correction_bank_images)
    images, captions = result.checkpoint.embed(loader, stride)
    return (images, captions), f"bank: {split}, {len(images)} images, {len(captions)} captions"


def bank_sources(loaded, own, bank):
    """What `corrections_of` takes for i2t and t2i; own and bank: (images, captions) as `embed` gives them."""
    return loaded.similarities(bank[0], own[1]), loaded.similarities(own[0], bank[1])


def correct(options, result, loaders):
    """What --correction asks for: (the bank in words, {method: its parameters, folds' rankings, metrics, hubness}).

    loaders: of `check_data`.
    """
    names = wanted_methods(options)
    given = {name: getattr(options, f"correction_{name}") for name in corrections.ADJUSTABLE}
    loaded, (bank, words) = result.checkpoint, load_bank(options, result, loaders)
    if options.tune_correction:
        loader = loaders["dev"]
        dev = loaded.embed(loader)
        tuned = corrections.tune(names, loaded.similarities(*dev), bank_sources(loaded, dev, bank or dev), given,
                                 loader.dataset.image_of)
        words += "; parameters chosen on dev"
    else:
        tuned = [corrections.Tuned(*(corrections.parameters_of(name, **given),) * 2, None) for name in names]
    wanted_i2t, wanted_t2i = (list(zip(names, side)) for side in list(zip(*tuned))[:2])
    folds = []
    for (images, captions, image_of), rankings in zip(result.parts(), result.rankings):
        own = images, captions
        i2t_bank, t2i_bank = bank_sources(loaded, own, bank or own)
        pairs = zip(corrections.corrections_of("i2t", i2t_bank, wanted_i2t),
                    corrections.corrections_of("t2i", t2i_bank, wanted_t2i))
        folds.append(corrections.rank_corrected(loaded.similarities(*own), rankings, list(pairs), max(DEPTHS),
                                                image_of))
    outcome = {}
    for name, (i2t, t2i, dev_rsum), rankings in zip(names, tuned, zip(*folds)):
        outcome[name] = {"parameters": {"i2t": i2t, "t2i": t2i}, "dev_rsum": dev_rsum, "rankings": rankings,
                         "metrics": mean_metrics([metrics_of(pair) for pair in rankings]),
                         "hubness": hubness_of_folds(rankings)}
    return words, outcome


def print_hubness(hubs):
    """The table of --hubness."""
    print("Hubness: N_k of a target is the number of queries with it among their k nearest (i2t: captions are targets)")
    print(f"{'':5}{'k':>3}{'skewness':>10}{'anti-hubs':>11}{'top 1 % take':>14}{'Robin Hood':>12}"
          f"{'hub occurrence':>16}{'largest N_k':>13}")
    for side, rows in hubs.items():
        for k, row in rows.items():
            item = f" (item {row.largest_item})" if row.largest_item >= 0 else " (mean of folds)"
            print(f"{side:5}{k:3}{row.skewness:10.2f}{row.anti_hubs:11.1%}{row.top_share:14.1%}{row.robin_hood:12.1%}"
                  f"{row.hub_occurrence:16.1%}{row.largest:13.6g}{item}")


def print_reranking(k, figures):
    """The table of --rerank; figures: {way: (Metrics, seconds)}."""
    names = {"vse": "VSE", "reranked": f"VSE's {k}, by SCAN", "scan": "SCAN"}
    print("Reranking (seconds from embeddings to ranks)")
    print(f"{'':20}{'image to text':^20}{'text to image':^22}")
    print(f"{'':20}{'R@1':>6}{'R@5':>7}{'R@10':>7}{'R@1':>8}{'R@5':>7}{'R@10':>7}{'rsum':>8}{'seconds':>10}")
    for way, (metrics, seconds) in figures.items():
        print(f"{names[way]:20}{recall_cells(metrics)}{seconds:10.2f}")


def recall_cells(metrics):
    """Recalls and rsum as cells of a table."""
    recalls = zip([*metrics.i2t[:3], *metrics.t2i[:3], metrics.rsum], (6, 7, 7, 8, 7, 7, 8))
    return "".join(f"{value:{width}.1f}" for value, width in recalls)


def print_corrections(words, plain, outcome):
    """The table of --correction: a row without, then a row for each method."""
    print(f"Corrections ({words})")
    print(f"{'':18}{'image to text':^20}{'text to image':^22}{'':8}{'N_10 of captions':^21}{'N_10 of images':>18}")
    print(f"{'':18}{'R@1':>6}{'R@5':>7}{'R@10':>7}{'R@1':>8}{'R@5':>7}{'R@10':>7}{'rsum':>8}"
          + f"{'skewness':>10}{'anti-hubs':>11}" * 2)
    rows = {"none": plain, **{name: (one["metrics"], one["hubness"]) for name, one in outcome.items()}}
    for name, (metrics, hubs) in rows.items():
        cells = recall_cells(metrics)
        cells += "".join(f"{hubs[side][10].skewness:10.2f}{hubs[side][10].anti_hubs:11.1%}" for side in ("i2t", "t2i"))
        print(f"{name:18}{cells}")
    for name, one in outcome.items():
        print(f"{name}: {corrections.in_words(one['parameters'])}")


def hubness_as_dict(hubs):
    """Hubness as plain names and numbers, for JSON."""
    return {side: {str(k): row._asdict() for k, row in rows.items()} for side, rows in hubs.items()}


def main(argv=None):
    """Evaluate what the flags name, on this process or on all that torchrun has started."""
    with distributed.session():
        carry_out(parse_args(argv))


def evaluated(options, top, loaders):
    """(The Evaluation with `top` items a query, further entries of the JSON file), printed; loaders: `check_data`'s."""
    check = partial(check_data, options, loaders)
    if options.eccv:
        package = eccv.load_package()
        result = evaluate(options, options.split, eccv.DEPTH, lambda loaded, dataset: (
            eccv.coco_ids(package, options.split, loaded, dataset), check(loaded, dataset)))
        found, folds = eccv.figures(package, options.split, result)
        eccv.print_figures(found, result.metrics, folds)
        rankings = [ranking._replace(items=ranking.items[:, :top]) for ranking in result.rankings[0]]
        return result._replace(rankings=[tuple(rankings)]), {"eccv": found, "coco_1k": as_dict(folds)}
    if not options.rerank:
        return evaluate(options, options.split, top, check), {}
    loaded = load_members(options)
    by_kind(loaded)
    result = embedded(loaded, options.split, options.fold5, check)
    loaded.opt.logger_name += f" reranked {options.rerank}"
    ways = rank_three_ways(result, options.rerank, top)
    result = result.ranked(list(ways["reranked"].rankings))
    print_evaluation(result)
    figures = {way: (mean_metrics(list(map(metrics_of, timed.rankings))), timed.seconds)
               for way, timed in ways.items()}
    print_reranking(options.rerank, figures)
    return result, {"rerank": {"k": options.rerank, **{way: {**as_dict(metrics), "seconds": seconds}
                                                       for way, (metrics, seconds) in figures.items()}}}


def carry_out(options):
    """Evaluate what the options name."""
    look_at_hubs = options.hubness or options.correction or options.report
    words, outcome, loaders = "", {}, {}
    result, more = evaluated(options, max(DEPTHS) if look_at_hubs or options.save_ranks else 1, loaders)
    if look_at_hubs:
        hubs = hubness_of_folds(result.rankings)
        more["hubness"] = hubness_as_dict(hubs)
        if options.hubness:
            print_hubness(hubs)
    if options.correction:
        words, outcome = correct(options, result, loaders)
        print_corrections(words, (result.metrics, hubs), outcome)
        more["correction_bank"] = words
        more["corrections"] = {name: {"parameters": one["parameters"], "dev_rsum": one["dev_rsum"],
                                      **as_dict(one["metrics"]), "hubness": hubness_as_dict(one["hubness"])}
                               for name, one in outcome.items()}
    if not distributed.is_first():
        return
    write_results(options, options.split, result, more)
    if options.save_ranks:
        intervals.write_ranks(options.save_ranks, [image_of for *_, image_of in result.parts()],
                              {"": result.rankings, **{name: one["rankings"] for name, one in outcome.items()}})
    if options.report:
        report.write_report(options, options.split, result, hubs, words, outcome)
    write_csv(options, result)  # last: where something before could not be written, its line must not come twice


if __name__ == "__main__":
    run_script(main)
