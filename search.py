"""Search a gallery of photos by words or by a photo.

    python3 search.py "a red star in the snow"                      # the sample data's test split
    python3 search.py --model_path runs/x/model_best.pth.tar --images photos/  # -> runs/x/gallery
    python3 search.py --index runs/x/gallery "two dogs play in the snow"
    python3 search.py --index runs/x/gallery --image query.jpg
    python3 search.py --embeddings images.npy --index g --query_embeddings questions.npy

A gallery is built once: from photos, from existing features (--precomp, --split), or from
embeddings that another model made (--embeddings), without a checkpoint.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends without a traceback; run_script sets its own handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import os
import sys

from evaluation import BANK_IMAGES
from features import encoders
from features.parts import share_type
from gallery import build as build_gallery
from gallery import export, index
from gallery.open import DEFAULT_MODEL, RERANKED, find_places, open_searcher
from gallery.store import check_whole, shown
from inputs.captions import read_captions
from inputs.tokenizer import READINGS
from retrieval.corrections import ADJUSTABLE, SHIFTS, add_flags, parameters_of
from runtime.errors import (
    ArgumentParser,
    InputError,
    number,
    path_type,
    refuse_useless,
    run_script,
)
from training.model_folder import model_type

MOST_HITS = 1000
BATCH = 1024  # questions answered at once
HOST, PORT = "127.0.0.1", 8000


def parse_args(argv=None):
    """The script's flags."""
    parser = ArgumentParser("Find photos by words or by a photo.")
    parser.add_argument("question", nargs="?", help="what to look for, in words")
    add_question_flags(parser.add_argument_group("more ways to ask, and what to print"))
    add_rerank_flags(parser.add_argument_group("reranking by SCAN, for questions in words"))
    add_serve_flags(parser.add_argument_group("the search page"))
    add_gallery_flags(parser.add_argument_group("the gallery"))
    add_part_flags(parser.add_argument_group("a gallery in parts"))
    of_others = parser.add_argument_group("a gallery of embeddings that another model made")
    add_embeddings_flags(of_others)
    add_knowledge_flags(of_others)
    add_change_flags(parser.add_argument_group("changes to the gallery, and checks of it"))
    add_store_flags(parser.add_argument_group("the gallery in a vector database (docs/scale.md)"))
    add_correction_flags(parser.add_argument_group("correction of hubs, for questions in words"))
    add_model_flags(parser.add_argument_group("the model"))
    encoders.add_flags(
        parser.add_argument_group(
            "the network that sees photos, if the checkpoint does not name it"
        ),
        optional=True,
    )
    options = parser.parse_args(argv)
    check_flags(options)
    return options


def add_question_flags(group):
    """What is asked, and how answers are given."""
    group.add_argument(
        "--image",
        type=path_type,
        metavar="FILE",
        help="find similar photos and fitting captions",
    )
    group.add_argument("--batch", type=path_type, metavar="FILE", help="questions, one per line")
    group.add_argument(
        "--query_embeddings",
        type=path_type,
        metavar="FILE",
        help="questions that are embeddings already, a vector a row, in a file as for --embeddings",
    )
    group.add_argument(
        "--top", default=10, type=number(int, 1, MOST_HITS), help="photos for each question"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object per question")


def add_rerank_flags(group):
    """A second model, which orders what the first one finds."""
    group.add_argument(
        "--rerank_model",
        type=model_type,
        metavar="PATH",
        help="a SCAN checkpoint, which orders the photos found by words",
    )
    group.add_argument(
        "--rerank",
        type=number(int, 1, MOST_HITS),
        metavar="K",
        help=f"with --rerank_model: photos it orders per question (default: {RERANKED})",
    )
    group.add_argument(
        "--rerank_precomp",
        type=path_type,
        metavar="FOLDER",
        help="with --rerank_model: features of the photos' regions (default: the gallery's)",
    )
    group.add_argument(
        "--rerank_vocab_path",
        type=path_type,
        metavar="FOLDER",
        help="with --rerank_model: folder of its vocabulary (default: its own words or folder)",
    )


def add_serve_flags(group):
    """The server of the search page."""
    group.add_argument("--serve", action="store_true", help="answer in a browser")
    group.add_argument(
        "--host", help=f"with --serve: address to listen on (default: {HOST}, this machine only)"
    )
    group.add_argument(
        "--port",
        type=number(int, 0, 65535),
        help=f"with --serve: port to listen on (default: {PORT}; 0: a free one)",
    )
    group.add_argument(
        "--allow_host",
        nargs="+",
        metavar="NAME",
        help="with --serve: further host names that the page answers to, such as a proxy's",
    )


def add_gallery_flags(group):
    """The gallery, and what it is built from."""
    group.add_argument(
        "--index",
        type=path_type,
        metavar="FOLDER",
        help="the gallery (default: gallery, beside the model)",
    )
    group.add_argument(
        "--images",
        type=path_type,
        metavar="FOLDER",
        help="build it from the photos in there, at any depth; with --precomp: folder of the "
        "photos that its ids name",
    )
    group.add_argument(
        "--captions",
        type=path_type,
        metavar="FILE|FOLDER",
        help="the photos' captions: a table, JSON or folder as for extract_features.py (default: "
        "text files beside them, if any); with --captions_embeddings: a text file, one a line",
    )
    group.add_argument(
        "--precomp",
        type=path_type,
        metavar="FOLDER",
        help="build it from the precomputed features in there",
    )
    group.add_argument("--split", help="with --precomp: split to build it from (default: test)")


def add_part_flags(group):
    """Building a gallery on several machines."""
    group.add_argument(
        "--part",
        type=share_type,
        metavar="i/n",
        help="with --images: build the gallery of the i-th of n shares of the photos, for --merge",
    )
    group.add_argument(
        "--merge",
        type=path_type,
        nargs="+",
        metavar="FOLDER",
        help="join the galleries that --part built; with --images: the folder of the photos here",
    )


def add_embeddings_flags(group):
    """What a gallery without a checkpoint is built from."""
    group.add_argument(
        "--embeddings",
        type=path_type,
        metavar="IMAGES",
        help="build the gallery from these embeddings of images: .npy, .npz, .pt, .safetensors, "
        ".parquet (FILE:NAME names an array in a file of several) or a folder of clip-retrieval's; "
        "with --images: folder of the photos that --items names",
    )
    group.add_argument(
        "--items",
        type=path_type,
        metavar="NAMES",
        help="a name for each row of --embeddings, one a line (default: the rows' numbers)",
    )
    group.add_argument(
        "--captions_embeddings",
        type=path_type,
        metavar="FILE",
        help="embeddings of --captions, to show what photos are found by, and as a bank",
    )
    group.add_argument(
        "--ids",
        type=path_type,
        metavar="FILE",
        help="with --captions_embeddings: the photo's name for each caption, one a line (default: "
        "five captions a photo in turn, or equal rows are one photo)",
    )
    group.add_argument(
        "--measure",
        choices=["cosine", "dot"],
        help="how embeddings are compared (default: cosine, which makes rows length 1)",
    )


def add_knowledge_flags(group):
    """What a gallery without a checkpoint knows of texts, and of hubs."""
    group.add_argument(
        "--text_model",
        type=path_type,
        metavar="NAME",
        help="the model that reads questions in words: open_clip/<name> or sentence_transformers/"
        "<name or folder> (default: the one that the gallery was built with, or that made the text "
        "vectors of the model's training; without one, questions are embeddings)",
    )
    group.add_argument(
        "--text_weights",
        type=path_type,
        metavar="TAG|FILE",
        help="with --text_model open_clip/<name>: its pretrained tag, a file, or none",
    )
    group.add_argument(
        "--bank",
        type=path_type,
        metavar="FILE",
        help="embeddings of captions that show which photos are hubs, such as those of the "
        "training split (default: --captions_embeddings)",
    )
    group.add_argument(
        "--dev",
        nargs="+",
        type=path_type,
        metavar="FILE",
        help="image and caption embeddings of the split that the correction is chosen on",
    )
    group.add_argument(
        "--dev_ids",
        nargs="+",
        type=path_type,
        metavar="IDS",
        help="the image's id for each caption of --dev, one a line",
    )


def add_change_flags(group):
    """Changes to a gallery that exists, and checks of it."""
    group.add_argument(
        "--add",
        type=path_type,
        metavar="FOLDER",
        help="encode new and changed photos in this folder, which must lie in the gallery's "
        "photo folder",
    )
    group.add_argument(
        "--hub_alarm",
        choices=["warn", "refuse", "off"],
        help="with --add: what to do about a new photo that would come up for far more questions "
        "than usual (default: warn)",
    )
    group.add_argument("--prune", action="store_true", help="drop photos whose file is gone")
    group.add_argument(
        "--index_type",
        choices=index.TYPES,
        help=f"build the index of this type (default: {index.EXACT} up to {index.EXACT_MOST} "
        f"photos, {index.IVF} up to {index.IVF_MOST}, then {index.PQ})",
    )
    group.add_argument(
        "--rebuild_index",
        action="store_true",
        help="build the index again from the embeddings; with --correction, correct hubs anew",
    )
    group.add_argument(
        "--check",
        action="store_true",
        help="check every byte of the gallery and name damaged files",
    )
    group.add_argument(
        "--recall_check",
        action="store_true",
        help="print how many of the ten nearest the index finds",
    )


def add_store_flags(group):
    """Vector databases: what they import, and one that is asked in place of the index."""
    group.add_argument(
        "--export",
        type=path_type,
        metavar="FOLDER",
        help="write the gallery as Parquet files, which vector databases import, with a manifest",
    )
    group.add_argument(
        "--rows_per_part",
        type=number(int, 1),
        help=f"with --export: photos in a file (default: {export.ROWS_PER_PART})",
    )
    group.add_argument(
        "--dtype",
        choices=export.DTYPES,
        help=f"with --export: type of the vectors' numbers (default: {export.DTYPES[0]})",
    )
    group.add_argument(
        "--store",
        type=path_type,
        metavar="ADDRESS",
        help="search there instead of in the gallery's index: lancedb://FOLDER/TABLE, "
        "milvus://HOST:PORT/COLLECTION or milvus://FILE.db/COLLECTION",
    )


def add_correction_flags(group):
    """The hub correction, as in compute_results.py."""
    group.add_argument(
        "--correction",
        choices=[*SHIFTS, "none"],
        help="hub correction to build the gallery with; none also switches off that of an existing "
        "gallery (default: the best on dev, if the checkpoint's data is available)",
    )
    group.add_argument(
        "--correction_bank",
        choices=["train", "dev"],
        help="split whose captions show which photos are hubs (default: train)",
    )
    group.add_argument(
        "--correction_bank_images",
        type=number(int, 0),
        help=f"most images whose captions are taken from it (0: all; default: {BANK_IMAGES})",
    )
    add_flags(group, SHIFTS)
    group.add_argument(
        "--tune_correction",
        action="store_true",
        help="choose each parameter that no flag sets, by the recalls on dev",
    )


def add_model_flags(group):
    """The model and where it computes."""
    group.add_argument(
        "--model_path",
        type=model_type,
        help="checkpoint, or a folder of compute_results.py --export (default: the gallery's, or "
        f"{DEFAULT_MODEL})",
    )
    group.add_argument(
        "--data_path",
        type=path_type,
        help="folder that holds the data sets (default: the checkpoint's)",
    )
    group.add_argument(
        "--vocab_path",
        type=path_type,
        help="folder of the vocabulary (default: the checkpoint's own words, or its vocab_path if "
        "it carries none)",
    )
    group.add_argument(
        "--caption_reading",
        choices=READINGS,
        help="how questions become words (default: as in the checkpoint's training)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda[:n] or mps")
    group.add_argument(
        "--batch_size",
        type=number(int, 1),
        help="items encoded at once (default: the checkpoint's; for photos 32)",
    )
    group.add_argument(
        "--workers",
        default=min(os.cpu_count(), 8),
        type=number(int, 0),
        help="processes that decode photos",
    )


def check_flags(options):
    """Raise InputError for a flag that does nothing given the others, or contradicts them."""
    parameters = [f"correction_{name}" for name in ADJUSTABLE]
    own = [] if options.correction in (None, "none") else parameters_of(options.correction)
    bank = ["correction_bank", "correction_bank_images", "tune_correction"]
    asks_in_words = options.question is not None or options.batch is not None or options.serve
    rules = (
        *rules_of_embeddings(options),
        *rules_of_parts(options, [*parameters, *bank]),
        *rules_of_stores(options),
        (not options.serve, ["host", "port", "allow_host"], "without --serve"),
        (
            options.rerank_model is None,
            ["rerank", "rerank_precomp", "rerank_vocab_path"],
            "without --rerank_model",
        ),
        (
            (options.image or options.query_embeddings) is not None and not asks_in_words,
            ["rerank_model"],
            "with --image or --query_embeddings alone: it orders what is found by words",
        ),
        (options.precomp is None, ["split"], "without --precomp"),
        (options.add is None, ["hub_alarm"], "without --add"),
        (options.precomp is not None, ["captions", "add"], "with --precomp"),
        (options.encoder is None, ["pooling", "regions", "normalise"], "without --encoder"),
        (options.correction == "none", [*parameters, *bank], "with --correction none"),
        (
            options.correction,
            [flag for flag in parameters if flag.removeprefix("correction_") not in own],
            f"with --correction {options.correction}",
        ),
        (
            options.correction is None,
            ["tune_correction"],
            "without --correction: the best is chosen in any case",
        ),
    )
    refuse_useless(options, rules)
    refuse_contradictions(options)


def refuse_contradictions(options):
    """Raise InputError for flags that contradict each other."""
    if options.correction_bank == "dev" and (options.tune_correction or options.correction is None):
        raise InputError(
            "a correction that is chosen on the dev split can't have that as --correction_bank, "
            "too: leave it out, or name a --correction without --tune_correction"
        )
    if options.merge is not None and options.index is None:
        raise InputError("--merge needs --index: name the folder of the merged gallery")
    if options.question is not None and options.export is not None:
        raise InputError("a question and --export are given: leave one out")
    if options.question is not None and options.batch is not None:
        raise InputError(
            "a question and --batch are given: write the question into that file, too, or leave "
            "one out"
        )


def rules_of_parts(options, of_correction):
    """As `refuse_useless` takes them: what does nothing with --part or --merge, or without.

    of_correction: names of flags
    """
    others = options.precomp is not None or options.embeddings is not None
    of_parts = ["part", "captions", "add", "prune", "rebuild_index", "correction", *of_correction]
    return (
        (options.images is None, ["part"], "without --images"),
        (others, ["part", "merge"], "with --precomp or --embeddings"),
        (options.part is not None, ["add", "prune", "rebuild_index"], "with --part"),
        (options.merge is not None, of_parts, "with --merge"),
    )


def rules_of_embeddings(options):
    """As `refuse_useless` takes them: what does nothing with --embeddings, or without."""
    rules = (
        (options.text_model is None, ["text_weights"], "without --text_model"),
        (options.dev is None, ["dev_ids"], "without --dev"),
    )
    if options.embeddings is None:
        case = "without --embeddings"
        no_photos = options.images is options.add is None
        return (
            *rules,
            (True, ["items", "captions_embeddings", "ids", "measure"], case),
            (not options.rebuild_index, ["bank", "dev"], f"{case} or --rebuild_index"),
            (no_photos, ["captions"], "without --images, --embeddings or --add"),
        )
    no_captions = options.captions_embeddings is None
    return (
        *rules,
        (True, ["model_path"], "with --embeddings"),
        (no_captions, ["captions", "ids"], "without --captions_embeddings"),
    )


def rules_of_stores(options):
    """As `refuse_useless` takes them: what does nothing with --export or --store, or without."""
    sources = ["images", "precomp", "embeddings", "part", "merge"]
    building = [*sources, "add", "prune", "rebuild_index", "index_type"]
    asking = ["image", "batch", "query_embeddings", "serve", "check", "recall_check", "store"]
    return (
        (options.export is None, ["rows_per_part", "dtype"], "without --export"),
        (
            options.export is not None,
            [*building, *asking],
            "with --export, which writes a gallery that is there and does nothing else",
        ),
        (
            options.store is not None,
            building,
            "with --store, which holds the rows of a gallery that is there",
        ),
    )


# Answers ----------------------------------------------------------------------------------------


def as_json(query, hits, captions=None, unknown=None):
    """An answer as a JSON object on one line; unknown: words that the model does not know."""
    answer = {"query": query, "results": [{"item": hit.item, "score": hit.score} for hit in hits]}
    if unknown is not None:
        answer["unknown_words"] = unknown
    if captions is not None:
        answer["captions"] = [
            {"caption": caption, "item": hit.item, "score": hit.score} for caption, hit in captions
        ]
    return json.dumps(answer, allow_nan=False)


def read_questions(options):
    """The question, or those in the file --batch; raises InputError if it has none."""
    path = options.batch
    if path is None:
        return [options.question] if options.question is not None else []
    if not os.path.exists(path) or not os.path.getsize(path):
        raise InputError(
            f"--batch {path} is {'empty' if os.path.exists(path) else 'not there'}: name a text "
            "file with a question a line"
        )
    return read_captions(path)


def print_answer(options, gallery, query, hits, captions=None, unknown=None):
    """Print an answer, for a person or as JSON; a person gets unknown words as a note on stderr."""
    if options.json:
        print(as_json(query, hits, captions, unknown))
        return
    if unknown:
        print(
            f"note: {shown(query)}: the model does not know {', '.join(map(shown, unknown))}",
            file=sys.stderr,
        )
    print(shown(query))
    for caption, hit in captions or []:
        print(f"  {hit.score:.3f}  {shown(caption)}  ({shown(hit.item)})")
    for hit in hits:
        gone = gallery.photo_folder is not None and gallery.photo(hit.number) is None
        print(f"  {hit.score:.3f}  {shown(hit.item)}{'  (missing)' if gone else ''}")


def read_vectors(options, searcher):
    """The questions in --query_embeddings (q, D), and what each is called; or ((), ())."""
    if options.query_embeddings is None:
        return (), ()
    from embeddings.files import read

    found = read(options.query_embeddings, "captions", "--query_embeddings")
    shown_path = f"--query_embeddings {options.query_embeddings}"
    searcher.check_width(found.rows, f"the rows of {shown_path}")
    names = found.texts or [f"{options.query_embeddings}, row {n}" for n in range(len(found.rows))]
    return found.rows, names


def answer(options, questions, searcher):
    """Print the answers to all questions; raises InputError, before any answer, for a bad one."""
    for line, question in enumerate(questions, start=1):
        try:
            searcher.check(question)
        except InputError as error:
            raise InputError(
                f"--batch {options.batch}, line {line}: {error}" if options.batch else error
            ) from error
    rows, names = read_vectors(options, searcher)
    found = searcher.by_photo(options.image, options.top) if options.image is not None else None
    for place in range(0, len(questions), BATCH):
        some = questions[place : place + BATCH]
        for question, hits in zip(some, searcher.by_words(some, options.top)):
            print_answer(
                options, searcher.gallery, question, hits, unknown=searcher.unknown(question)
            )
    for place in range(0, len(rows), BATCH):
        some = slice(place, place + BATCH)
        for name, hits in zip(names[some], searcher.by_vectors(rows[some], options.top)):
            print_answer(options, searcher.gallery, name, hits)
    if found:
        print_answer(options, searcher.gallery, options.image, *found)


def check_files(options):
    """Print that the gallery's files are as they were written; raises InputError if not."""
    folder = find_places(options)[1]
    count, size = check_whole(folder)
    print(f"{shown(folder)}: all {count} files, {size / 2**20:.1f} MiB, are as they were written")


def export_gallery(options):
    """Write the gallery as Parquet files; its model is not needed."""
    written = export.export(
        find_places(options)[1],
        options.export,
        options.rows_per_part or export.ROWS_PER_PART,
        options.dtype or export.DTYPES[0],
    )
    parts = written["parts"]
    size = sum(part["bytes"] for part in parts)
    print(
        f"{shown(options.export)}: {written['rows']} photos in {len(parts)} files, "
        f"{size / 2**20:.1f} MiB"
    )


def check_recall(searcher, store):
    """Print which share of up to 1,000 questions' ten nearest the index, or the store, finds."""
    share, n, words = build_gallery.recall_of(searcher.gallery, searcher.corrected)
    searched = store or f"the {searcher.gallery.description['index']} index"
    print(f"recall@10 of {searched}: {share:.4f} ({n} {words})")


def main(argv=None):
    """Open, build or change a gallery, then answer from it."""
    options = parse_args(argv)
    if options.export is not None:
        export_gallery(options)
        return
    questions = read_questions(options)
    by_others = options.image is not None or options.query_embeddings is not None
    if options.check:
        check_files(options)
        if not (
            questions
            or by_others
            or options.serve
            or options.recall_check
            or options.add
            or options.prune
            or options.rebuild_index
            or options.index_type
        ):
            return
    searcher = open_searcher(options)
    if options.recall_check:
        check_recall(searcher, options.store)
    answer(options, questions, searcher)
    if options.serve:
        from pages.serve import serve

        serve(
            searcher,
            options.host or HOST,
            PORT if options.port is None else options.port,
            options.allow_host or (),
        )
    elif not (questions or by_others or options.recall_check):
        gallery = searcher.gallery
        print(
            f"{shown(gallery.folder)}: {gallery.count} photos, {gallery.n_captions} captions, "
            f"correction {gallery.correction}, index {gallery.description['index']}; ask with a "
            "question, --image, --query_embeddings or --serve"
        )


if __name__ == "__main__":
    run_script(main)
