"""Reranking in a gallery: SCAN orders the photos that VSE finds nearest (see `retrieval.rerank`).

SCAN compares every word with every region, so it needs the photos' regions: the features that the
gallery was built from, or other features of the same photos.
"""

import argparse
import itertools
import os
import sys

import torch

from data import check_form
from evaluation import load_for_evaluation
from features.description import read_features_json, refuse_other
from features.files import open_features, read_ids
from gallery.store import shown
from retrieval.rerank import candidate_scores
from runtime.errors import InputError
from runtime.finite import checked


class Reranker:
    """A SCAN model that orders photos of a gallery; `k`: how many it orders per question."""

    def __init__(self, gallery, model_path, k, precomp=None, device="auto", vocab_path=None):
        """Raises InputError if model, gallery and regions do not go together.

        model_path: of SCAN's checkpoint
        precomp: folder of the regions, with the gallery's split and photos (default: the features
            that the gallery was built from)
        vocab_path: folder of the checkpoint's vocabulary (default: its own words or folder)
        """
        try:
            self.k, self.loaded = (
                k,
                load_for_evaluation(
                    argparse.Namespace(model_path=model_path, device=device, vocab_path=vocab_path)
                ),
            )
        except InputError as error:
            raise InputError(str(error).replace("--vocab_path", "--rerank_vocab_path")) from error
        if not self.loaded.opt.cross_attn:
            raise InputError(
                f"--rerank_model {model_path} is not SCAN (trained with --cross_attn): name one "
                "that is, or leave it out"
            )
        own = gallery.description["precomp"]
        if own is None:
            raise InputError(
                f"--rerank_model needs the regions of the gallery's photos, and {gallery.folder} "
                "keeps no features: build one with --precomp, of features with --regions 36"
            )
        folder = precomp or os.path.join(os.path.realpath(gallery.folder), own["folder"])
        path = os.path.join(folder, f"{own['split']}_ims.npy")
        self.regions = open_features(path)
        check_form(argparse.Namespace(images=self.regions), self.loaded.opt)
        if len(self.regions) != gallery.count or self.regions.shape[-1] != self.loaded.opt.img_dim:
            raise InputError(
                f"{path} has features of shape {tuple(self.regions.shape)}, and the gallery has "
                f"{gallery.count} photos, the model {self.loaded.opt.img_dim} numbers a region: "
                "name others of the same photos with --rerank_precomp"
            )
        self._tell_others(os.path.join(folder, f"{own['split']}_ids.txt"), gallery)
        description = read_features_json(folder)
        if description and self.loaded.features:
            refuse_other(description, self.loaded.features, folder, f"checkpoint {model_path}")
        self.loaded.model.val_start()

    @staticmethod
    def _tell_others(ids_file, gallery):
        """Print a note if the regions' ids are not the photos' names, folder and ending aside."""
        ids = read_ids(ids_file) if os.path.exists(ids_file) else []
        names = [name for name, _ in itertools.groupby(ids)]  # ids may repeat, one per caption
        if len(names) != gallery.count:
            names = list(dict.fromkeys(ids))
        stems = [
            [os.path.splitext(os.path.basename(name))[0] for name in side]
            for side in (names, gallery.items)
        ]
        if len(names) == gallery.count and stems[0] != stems[1]:
            place = next(place for place, (one, other) in enumerate(zip(*stems)) if one != other)
            print(
                f"note: {shown(ids_file)} has {shown(names[place])} where the gallery has "
                f"{shown(gallery.items[place])}: the order is wrong unless these are the same "
                "photo",
                file=sys.stderr,
            )

    def reordered(self, questions, numbers):
        """(q, K) scores and numbers of photos, best first.

        questions: q texts; numbers: (q, K) photos found for each, -1 for none
        """
        model = self.loaded.model
        words = self.loaded.embed_questions(questions)
        scores = []
        for question, found in enumerate(numbers):
            (regions,) = checked(
                [model.embed_images(self.regions[found.clamp(min=0)].float())], "regions"
            )
            source = self.loaded.similarities(regions, words[torch.tensor([question])])
            scores.append(
                candidate_scores(source, "t2i", torch.arange(len(found))[None])[0].float().cpu()
            )
        scores = torch.stack(scores).masked_fill_(numbers < 0, -torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return scores, numbers.gather(1, order)
