"""ECCV Caption and CxC on COCO's test split, computed by the package `eccv_caption`.

COCO counts a caption's one image and an image's five captions as right, and everything else as
wrong. For CxC (Parekh et al., "Crisscrossed Captions", EACL 2021) and ECCV Caption (Chun et al.,
"ECCV Caption: Correcting False Negatives by Collecting Machine-and-Human-verified Image-Caption
Associations for MS-COCO", ECCV 2022), people marked what else is right. The package holds both
ground truths.

The package takes lists of COCO's ids, best first. It gets each query's first 50 items: no query
has more than 48 positives, so the figures equal those of full lists. COCO's 1K figures need the
first ten within the query's own fold, so each fold is ranked separately.
"""

import io
import os
import re
import warnings
from contextlib import redirect_stderr

import torch

from retrieval.metrics import DEPTHS, mean_metrics, metrics_of
from retrieval.ranking import rank_shifted
from runtime.errors import InputError

CAPTIONS_PER_IMAGE = 5  # COCO's
ITEMS = 50  # first items of a query that the package gets
IMAGE_NAME = re.compile(r"(?:.*/)?(?:COCO_val2014_)?(\d{1,12})(?:\.jpg)?", re.ASCII)
FOLDS, FOLD_ITEMS = 5, 10  # of COCO 1K: folds, and first items of a query in its fold
OF_ALL = ("eccv_r1", "eccv_map_at_r", "eccv_rprecision", "cxc_recalls", "coco_5k_recalls")

TITLES = {
    "eccv_r1": "ECCV R@1",
    "eccv_map_at_r": "ECCV mAP@R",
    "eccv_rprecision": "ECCV R-precision",
    **{
        f"{name}_r{k}": f"{title} R@{k}"
        for name, title in (("cxc", "CxC"), ("coco_5k", "COCO 5K"), ("coco_1k", "COCO 1K"))
        for k in DEPTHS
    },
}


def load_package():
    """The package's Metrics; raises InputError if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns if ujson is missing
            from eccv_caption import Metrics
    except ImportError as error:
        raise InputError(
            "--eccv needs the package eccv_caption, which is not installed: pip install "
            "eccv_caption==0.1.0"
        ) from error
    return Metrics()


def coco_ids(package, split, loaded, dataset):
    """COCO's ids of a data set's images and captions: two lists, (5000,) and (25000,).

    Image ids come from `<split>_ids.txt`, as numbers or in file names, or from the names of the
    image files. An image's captions are taken in the order of their ids, as in Karpathy's split.
    Raises InputError unless the images are those of COCO's test split, each once.

    loaded: the evaluation.Checkpoint
    """
    path = getattr(dataset, "ids_file", None) or os.path.join(
        loaded.opt.data_path, loaded.opt.data_name, f"{split}_ids.txt"
    )
    captions_of = package.coco_gts["i2t"]
    needs = f"--eccv needs the {len(captions_of)} images of COCO's test split"
    if dataset.names is None:
        raise InputError(
            f"{needs} by their ids, and {path} is not there: add it, with an id for each image on "
            "a line, or leave --eccv out"
        )
    names = dataset.names
    found = [IMAGE_NAME.fullmatch(name) for name in names]
    ids = [int(match[1]) if match else None for match in found]
    place_of = {number: place for place, number in enumerate(ids)}  # of several, the last
    for place, number in enumerate(ids):
        if number not in captions_of or place_of[number] != place:
            reason = "more than once" if number in captions_of else "which is not one of them"
            raise InputError(
                f"{needs}, each once, and {loaded.opt.data_name}'s {split} has {names[place]!r}, "
                f"{reason}: leave --eccv out"
            )
    if len(ids) < len(captions_of):
        raise InputError(
            f"{needs}, and {loaded.opt.data_name}'s {split} has {len(ids)} of them: evaluate all, "
            "such as with --split testall, or leave --eccv out"
        )
    if len(dataset.image_of) % CAPTIONS_PER_IMAGE or not torch.equal(
        dataset.image_of, torch.arange(len(dataset.image_of)) // CAPTIONS_PER_IMAGE
    ):
        raise InputError(
            f"{needs} with {CAPTIONS_PER_IMAGE} captions each, and {loaded.opt.data_name}'s "
            f"{split} has others: leave --eccv out"
        )
    return ids, [caption for number in ids for caption in sorted(captions_of[number])]


def figures(package, split, result):
    """The package's figures, and our own Metrics averaged over its five folds.

    The package's are {figure: {"i2t": percent, "t2i": percent}}.
    result: the evaluation.Evaluation of the whole split, with ITEMS items per query
    """
    image_ids, caption_ids = coco_ids(package, split, result.checkpoint, result.dataset)
    found = compute(package, lists_of(result.rankings[0], image_ids, caption_ids), OF_ALL)
    in_fold, folds = ({}, {}), []
    for images, captions in fold_members(package, image_ids):
        (rankings,) = rank_shifted(
            result.checkpoint.similarities(result.images[images], result.captions[captions]),
            top=FOLD_ITEMS,
        )
        folds.append(metrics_of(rankings))
        own_images = [image_ids[place] for place in images.tolist()]
        own_captions = [caption_ids[place] for place in captions.tolist()]
        for whole, part in zip(in_fold, lists_of(rankings, own_images, own_captions)):
            whole.update(part)
    return found | compute(package, in_fold, ("coco_1k_recalls",)), mean_metrics(folds)


def fold_members(package, image_ids):
    """Each fold's positions in the data set: images (1000,) and captions (5000,).

    Folds, and images within a fold, come in the package's order.
    """
    place_of = {number: place for place, number in enumerate(image_ids)}
    ids = [
        package.coco_gts["t2i"][caption][0]
        for caption in package.coco_ids[::CAPTIONS_PER_IMAGE].tolist()
    ]
    places = torch.tensor([place_of[number] for number in ids])
    return [
        (
            images,
            (images.unsqueeze(1) * CAPTIONS_PER_IMAGE + torch.arange(CAPTIONS_PER_IMAGE)).flatten(),
        )
        for images in places.chunk(FOLDS)
    ]


def lists_of(rankings, image_ids, caption_ids):
    """{image id: caption ids, best first} and {caption id: image ids, best first} of two Rankings.

    rankings: (i2t Ranking, t2i Ranking)
    """
    both, ids = [], (image_ids, caption_ids)
    for ranking, queries, targets in zip(rankings, ids, ids[::-1]):
        both.append(dict(zip(queries, torch.tensor(targets)[ranking.items.cpu()].tolist())))
    return both


def compute(package, lists, figures):
    """The package's figures for (i2t, t2i) lists, in percent."""
    with redirect_stderr(io.StringIO()):  # its progress bar
        found = package.compute_all_metrics(*lists, target_metrics=figures, Ks=DEPTHS)
    return {
        name: {side: 100 * float(share) for side, share in sides.items()}
        for name, sides in found.items()
    }


def print_figures(found, whole, folds):
    """Print the table of --eccv.

    whole, folds: our own Metrics of the split, and the mean over its five folds
    """
    print(f"{'ECCV Caption, CxC':20}{'image to text':>15}{'text to image':>15}{'ours':>10}")
    ours = {
        f"{name}_r{k}": metrics
        for name, metrics in (("coco_5k", whole), ("coco_1k", folds))
        for k in DEPTHS
    }
    for name, title in TITLES.items():
        cells = "".join(f"{found[name][side]:15.1f}" for side in ("i2t", "t2i"))
        if name in ours:
            k = f"r{name.rpartition('_r')[2]}"
            cells += f"{getattr(ours[name].i2t, k):10.1f}{getattr(ours[name].t2i, k):7.1f}"
        print(f"{title:20}{cells}")
