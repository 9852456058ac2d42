"""Open a gallery with its model, or build it first, as the flags of search.py say."""

import os
import shutil
import sys
from contextlib import contextmanager

from evaluation import load_for_evaluation
from features.texts import FrozenTexts
from gallery import build as build_gallery
from gallery import other_models, parts, remote
from gallery.build import refuse_unsearchable
from gallery.rerank import Reranker
from gallery.searcher import Searcher
from gallery.store import Gallery, describe, is_whole, model_path, refuse_foreign, shown
from inputs import sample_data
from retrieval.corrections import ADJUSTABLE
from runtime.errors import InputError
from runtime.files import lock

DEFAULT_MODEL = "runs/runX/model_best.pth.tar"
SAMPLE = "sample_precomp"
RERANKED = 100  # photos that SCAN orders for each question, by default


def open_searcher(options):
    """The Searcher of the options' model and gallery, which is first built or changed if needed."""
    if options.images is not None and not os.path.isdir(options.images):
        raise InputError(f"--images {options.images!r} is not a folder: name that of the photos")
    options.model_path, folder = find_places(options)
    loaded = open_model(options, folder)
    if not is_whole(folder) or is_stale_sample(folder, options, loaded):
        with locked(folder):
            build_named(options, loaded, folder)
    elif wants_change(options, folder):
        with locked(folder):
            check_own(folder, options, loaded)
            build_gallery.change(options, loaded, folder)
    else:
        check_own(folder, options, loaded)
        named = options.images, options.precomp, options.embeddings, options.merge
        if any(one is not None for one in named):
            print(
                f"note: the gallery {shown(folder)} is there, and is asked as it is: --add takes "
                "up new photos, another --index builds one anew",
                file=sys.stderr,
            )
    gallery = Gallery(folder, with_index=options.store is None)
    if options.store is not None:
        gallery.find = remote.opened(options.store, gallery)
    known, reranker = gallery.description["features"], None
    if options.rerank_model is not None:
        reranker = Reranker(
            gallery,
            options.rerank_model,
            options.rerank or RERANKED,
            options.rerank_precomp,
            options.device,
            options.rerank_vocab_path,
        )
    return Searcher(
        loaded,
        gallery,
        lambda: build_gallery.photo_encoder(loaded, known, options)[0],
        options.correction != "none",
        reranker,
    )


def open_model(options, folder):
    """The Checkpoint, or the OtherModel, of the options and the gallery in this folder."""
    if other_models.is_asked_for(options, folder):
        return other_models.opened(options, folder)
    refused = ["bank", "dev", "measure"]
    loaded = load_for_evaluation(options)
    if isinstance(loaded.vocabulary, FrozenTexts):
        loaded.vocabulary.named = options.text_model and (options.text_model, options.text_weights)
    else:
        refused.append("text_model")
    for name in refused:
        if getattr(options, name) is not None:
            raise InputError(
                f"--{name} is for galleries of embeddings that another model made, and the model "
                f"here is the checkpoint {options.model_path}: leave it out"
            )
    refuse_unsearchable(loaded)
    return loaded


def find_places(options):
    """(path of the checkpoint or None, folder of the gallery)."""
    if options.embeddings is not None:
        if options.index is None:
            raise InputError("--embeddings needs --index: name the folder of the gallery")
        return None, options.index
    if options.index is not None and options.model_path is None and is_whole(options.index):
        return model_path(options.index), options.index
    if options.merge is not None and options.model_path is None:
        return parts.model_of(options.merge), options.index
    if (
        options.index is not None
        and options.model_path is options.images is options.precomp is options.merge is None
    ):
        raise InputError(
            f"there is no whole gallery in {options.index}: build it with --images, --precomp or "
            "--embeddings"
        )
    path = options.model_path or DEFAULT_MODEL
    return path, options.index or os.path.join(os.path.dirname(path), "gallery")


@contextmanager
def locked(folder):
    """Lock the gallery's folder against other builders; remove a new one if building fails."""
    refuse_foreign(folder)
    was_there = os.path.isdir(folder)
    try:
        with lock(folder, "--index"):
            yield
    except InputError:
        if not was_there and os.path.isdir(folder) and set(os.listdir(folder)) <= {".lock"}:
            shutil.rmtree(folder)
        raise


def wants_change(options, folder):
    """Whether the options ask for a change of the gallery."""
    return (
        options.add is not None
        or options.prune
        or options.rebuild_index
        or options.index_type not in (None, describe(folder)["index"])
    )


def is_stale_sample(folder, options, loaded):
    """Whether a gallery is of the sample data, but the model has been retrained since.

    Such a gallery is rebuilt without asking, because that takes only a moment.
    """
    found, sample = describe(folder), os.path.join(loaded.opt.data_path, SAMPLE)
    return (
        options.images is None
        and found["source"] == build_gallery.source_of(sample, "test")
        and found["model"]["sha256"] != build_gallery.hash_file(loaded.path)
    )


def build_named(options, loaded, folder):
    """Build the gallery that the options name (for a model of the sample data: its test split)."""
    if options.add is not None or options.prune or options.rebuild_index:
        raise InputError(
            f"there is no whole gallery in {folder} to change: build it first, with --images or "
            "--precomp"
        )
    if options.merge is not None:
        print(f"Building the gallery {shown(folder)} from its parts", file=sys.stderr)
        return parts.merge(options, loaded, folder)
    if options.embeddings is options.precomp is options.images is None:
        if loaded.opt.data_name != SAMPLE:
            raise InputError(
                f"there is no whole gallery in {folder}: build it with --images or --precomp"
            )
        sample_data.draw(loaded.opt.data_path)
        options.precomp = os.path.join(loaded.opt.data_path, SAMPLE)
    options.split = options.split or "test"
    source = options.embeddings or options.precomp or options.images
    print(f"Building the gallery {shown(folder)} from {shown(source)}", file=sys.stderr)
    build_gallery.build(options, loaded, folder, options.images)


def check_own(folder, options, loaded):
    """Raise InputError unless a gallery is of the options' model, photos and correction."""
    found = describe(folder)
    parts.check_same(folder, found, options)
    if isinstance(loaded, other_models.OtherModel):
        other_models.check_own(folder, options)
        check_correction(folder, found["correction"], options)
        return
    if found["model"] is None:
        raise InputError(
            f"the gallery {folder} is of embeddings that another model made, not of the checkpoint "
            f"{loaded.path}: leave --model_path out"
        )
    own = build_gallery.hash_file(loaded.path), loaded.opt.embed_size
    if (found["model"]["sha256"], found["width"]) != own:
        raise InputError(
            f"the gallery {folder} is of another model than {loaded.path}: name that with "
            "--model_path, or build one of this model in another --index"
        )
    named = (
        build_gallery.source_of(options.precomp, options.split or "test")
        if options.precomp is not None
        else options.images and os.path.realpath(options.images)
    )
    source = build_gallery.source_of_gallery(folder, found)
    if named and named != source:
        raise InputError(
            f"the gallery {folder} is of {source}, not of {named}: name another --index"
        )
    check_correction(folder, found["correction"], options)


def check_correction(folder, own, options):
    """Raise InputError if the options ask for another correction than the gallery's, `own`."""
    has = {
        "correction": own["method"],
        **{f"correction_{name}": own["parameters"].get(name) for name in ADJUSTABLE},
        "correction_bank": own["bank_split"],
        "correction_bank_images": own["bank_images"],
    }
    asked = {name: getattr(options, name) for name in has}
    others = [name for name, value in asked.items() if value not in (None, has[name])]
    if others == ["correction"] and asked["correction"] == "none":
        others = []  # it switches the correction off for these questions only
    if options.rebuild_index and options.correction is None and others:
        raise InputError(
            f"--rebuild_index keeps the gallery's correction {own['method']}, and --{others[0]} "
            "would change it: name a --correction, too"
        )
    # With --index alone nothing is built, so there is nothing to tune.
    sources = options.images, options.precomp, options.embeddings
    tuned = options.tune_correction and options.index and not any(sources)
    if not options.rebuild_index and (others or tuned):
        flags = [f"--{name} {value}" for name, value in has.items() if value is not None]
        raise InputError(
            f"the gallery {folder} was built with {' '.join(flags)}: add --rebuild_index for "
            "another one"
        )
