"""ECCV Caption and CxC on COCO's test split, by their authors' package, which carries both's ground truth.

COCO counts a caption's one image and an image's five captions as right, and everything else as wrong. CxC (Parekh et
al., "Crisscrossed Captions", EACL 2021) and ECCV Caption (Chun et al., "ECCV Caption: Correcting False Negatives by
Collecting Machine-and-Human-verified Image-Caption Associations for MS-COCO", ECCV 2022) had people look for what else
is right. The package eccv_caption takes lists of COCO's ids, best first: here the 50 first items of each query, which
is more than any has positives (48), so that all figures are those of whole lists. COCO's 1K figures need the ten first
of the query's own fold, which are looked for apart.
"""

import io
import os
import re
import warnings
from contextlib import redirect_stderr

import torch

from data import image_names
from errors import InputError
from evaluation import mean_metrics, metrics_of
from ranking import rank_shifted
from word_ids import CAPTIONS_PER_IMAGE, five_each

DEPTH = 50  # items of a query
IMAGE_NAME = re.compile(r"(?:.*/)?(?:COCO_val2014_)?(\d{1,12})(?:\.jpg)?", re.ASCII)
FOLDS, FOLD_DEPTH = 5, 10  # of COCO 1K
OF_ALL = ("eccv_r1", "eccv_map_at_r", "eccv_rprecision", "cxc_recalls", "coco_5k_recalls")
TITLES = {"eccv_r1": "ECCV R@1", "eccv_map_at_r": "ECCV mAP@R", "eccv_rprecision": "ECCV R-precision",
          **{f"{name}_r{k}": f"{title} R@{k}" for name, title in
             (("cxc", "CxC"), ("coco_5k", "COCO 5K"), ("coco_1k", "COCO 1K")) for k in (1, 5, 10)}}


def load_package():
    """The package's Metrics; raises InputError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would rather have ujson
            from eccv_caption import Metrics
    except ImportError as error:
        raise InputError("--eccv needs the package eccv_caption, which is not installed: pip install "
                         "eccv_caption==0.1.0") from error
    return Metrics()


def coco_ids(package, split, loaded, dataset):
    """COCO's ids of a data set's images and captions: two lists, (5000,) and (25000,).

    The images' stand in `<split>_ids.txt`, as numbers or in file names, or are those of raw images' files; an image's
    captions are taken in the order of their ids, as Karpathy's split has them. loaded: the evaluation.Checkpoint.
    Raises InputError unless they are all of COCO's test split, each once.
    """
    path = os.path.join(loaded.opt.data_path, loaded.opt.data_name, f"{split}_ids.txt")
    captions_of = package.coco_gts["i2t"]
    needs = f"--eccv needs the {len(captions_of)} images of COCO's test split"
    if not hasattr(dataset, "image_files") and not os.path.exists(path):
        raise InputError(f"{needs} by their ids, and {path} is not there: add it, with an id for each image on a line, "
                         "or leave --eccv out")
    names = image_names(dataset, path)
    found = [IMAGE_NAME.fullmatch(name) for name in names]
    ids = [int(match[1]) if match else None for match in found]
    place_of = {number: place for place, number in enumerate(ids)}  # of several, the last
    for place, number in enumerate(ids):
        if number not in captions_of or place_of[number] != place:
            reason = "more than once" if number in captions_of else "which is none of them"
            raise InputError(f"{needs}, each once, and {loaded.opt.data_name}'s {split} has {names[place]!r}, "
                             f"{reason}: leave --eccv out")
    if len(ids) < len(captions_of):
        raise InputError(f"{needs}, and {loaded.opt.data_name}'s {split} has {len(ids)} of them: evaluate all, such as "
                         "with --split testall, or leave --eccv out")
    if not five_each(dataset.image_of):
        raise InputError(f"{needs} with {CAPTIONS_PER_IMAGE} captions each, and {loaded.opt.data_name}'s {split} has "
                         "others: leave --eccv out")
    return ids, [caption for number in ids for caption in sorted(captions_of[number])]


def figures(package, split, result):
    """The package's {figure: {"i2t": percent, "t2i": percent}}, and our own Metrics of its five folds, their mean.

    result: the evaluation.Evaluation of the whole split, with DEPTH items a query.
    """
    image_ids, caption_ids = coco_ids(package, split, result.checkpoint, result.dataset)
    found = compute(package, lists_of(result.rankings[0], image_ids, caption_ids), OF_ALL)
    in_fold, folds = ({}, {}), []
    for images, captions in fold_members(package, image_ids):
        (rankings,) = rank_shifted(result.checkpoint.similarities(result.images[images], result.captions[captions]),
                                   top=FOLD_DEPTH)
        folds.append(metrics_of(rankings))
        for whole, part in zip(in_fold, lists_of(rankings, *([ids[place] for place in places] for ids, places in (
                (image_ids, images.tolist()), (caption_ids, captions.tolist()))))):
            whole.update(part)
    return found | compute(package, in_fold, ("coco_1k_recalls",)), mean_metrics(folds)


def fold_members(package, image_ids):
    """The places of each fold's images (1000,) and captions (5000,) in the data set, in the package's order."""
    place_of = {number: place for place, number in enumerate(image_ids)}
    ids = [package.coco_gts["t2i"][caption][0] for caption in package.coco_ids[::CAPTIONS_PER_IMAGE].tolist()]
    places = torch.tensor([place_of[number] for number in ids])
    return [(images, (images.unsqueeze(1) * CAPTIONS_PER_IMAGE + torch.arange(CAPTIONS_PER_IMAGE)).flatten())
            for images in places.chunk(FOLDS)]


def lists_of(rankings, image_ids, caption_ids):
    """(i2t Ranking, t2i Ranking) -> {image id: caption ids, best first}, {caption id: image ids, best first}."""
    both = []
    for ranking, queries, targets in zip(rankings, (image_ids, caption_ids), (caption_ids, image_ids)):
        both.append(dict(zip(queries, torch.tensor(targets)[ranking.items.cpu()].tolist())))
    return both


def compute(package, lists, figures):
    """The package's figures of (i2t, t2i) lists, in percent."""
    with redirect_stderr(io.StringIO()):  # its progress bar
        found = package.compute_all_metrics(*lists, target_metrics=figures, Ks=(1, 5, 10))
    return {name: {side: 100 * float(share) for side, share in sides.items()} for name, sides in found.items()}


def print_figures(found, whole, folds):
    """The table of --eccv; whole and folds: our own Metrics of the split and the mean of its five folds."""
    print(f"{'ECCV Caption, CxC':20}{'image to text':>15}{'text to image':>15}{'ours':>10}")
    ours = {f"{name}_r{k}": metrics for name, metrics in (("coco_5k", whole), ("coco_1k", folds)) for k in (1, 5, 10)}
    for name, title in TITLES.items():
        cells = "".join(f"{found[name][side]:15.1f}" for side in ("i2t", "t2i"))
        if name in ours:
            k = f"r{name.rpartition('_r')[2]}"
            cells += f"{getattr(ours[name].i2t, k):10.1f}{getattr(ours[name].t2i, k):7.1f}"
        print(f"{title:20}{cells}")
