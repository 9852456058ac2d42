"""Questions in words or photos in, the photos of a gallery out.

    python3 search.py "a red star in the snow"                                  # in the sample data's test pictures
    python3 search.py --model_path runs/x/model_best.pth.tar --images photos/   # builds runs/x/gallery
    python3 search.py --index runs/x/gallery "two dogs play in the snow"
    python3 search.py --index runs/x/gallery --image query.jpg

A gallery is built from photos, or from features at hand (--precomp, --split), once; then it answers.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends quietly; run_script takes it back

import json
import os
import shutil
import sys
from contextlib import contextmanager
from typing import NamedTuple

import build_gallery
import index
import run_record
import sample_data
from build_gallery import refuse_unsearchable
from caption_files import read_captions
from corrections import ADJUSTABLE, parameters_of
from errors import ArgumentParser, InputError, number, run_script
from evaluation import BANK_IMAGES, embed_texts, load_for_evaluation
from features import POOLINGS, encode_photo
from gallery import Gallery, describe, is_whole, refuse_foreign, shown
from gallery_hubs import SHIFTS
from gallery_rerank import Reranker
from vocab import MAX_CAPTION, READINGS, tokenize
from word_ids import number_words

DEFAULT_MODEL = "runs/runX/model_best.pth.tar"
SAMPLE = "sample_precomp"
MAX_WORDS = 1000  # of a question
MOST_HITS = 1000
BATCH = 1024  # questions answered at once
RERANKED = 100  # of each question, by SCAN
HOST, PORT = "127.0.0.1", 8000


def parse_args(argv=None):
    """The script's flags."""
    parser = ArgumentParser("Find photos by words or by a photo.")
    parser.add_argument("question", nargs="?", help="what to look for, in words")
    add_question_flags(parser.add_argument_group("more ways to ask, and what to print"))
    add_gallery_flags(parser.add_argument_group("the gallery"))
    add_correction_flags(parser.add_argument_group("correction of hubs, for questions in words"))
    add_model_flags(parser.add_argument_group("the model"))
    add_encoder_flags(parser.add_argument_group("what sees a photo, where the checkpoint does not tell"))
    options = parser.parse_args(argv)
    check_flags(options)
    return options


def add_question_flags(group):
    """What is asked."""
    group.add_argument("--image", metavar="FILE", help="find captions and photos that are alike")
    group.add_argument("--batch", metavar="FILE", help="questions, one a line")
    group.add_argument("--top", default=10, type=number(int, 1, MOST_HITS), help="photos for each question")
    group.add_argument("--json", action="store_true", help="print a JSON object a question")
    group.add_argument("--rerank_model", metavar="PATH", help="a SCAN checkpoint, which orders what is found")
    group.add_argument("--rerank", type=number(int, 1, MOST_HITS), metavar="K",
                       help=f"--rerank_model: so many of each question's (default: {RERANKED})")
    group.add_argument("--rerank_precomp", metavar="FOLDER", help="--rerank_model: features of the same photos' "
                                                                  "regions (default: those of the gallery)")
    group.add_argument("--rerank_vocab_path", metavar="FOLDER", help="--rerank_model: folder of its vocabulary "
                                                                     "(default: its own words, or its own folder)")
    group.add_argument("--serve", action="store_true", help="answer in a browser")
    group.add_argument("--host", help=f"--serve: address to listen on (default: {HOST}, this machine only)")
    group.add_argument("--port", type=number(int, 0, 65535), help=f"--serve: its port (default: {PORT}; 0: a free one)")
    group.add_argument("--allow_host", nargs="+", metavar="NAME", help="--serve: further names that the page answers "
                                                                       "to, such as a proxy's")


def add_gallery_flags(group):
    """The gallery, what it is built from, and changes to it."""
    group.add_argument("--index", metavar="FOLDER", help="the gallery (default: gallery, beside the model)")
    group.add_argument("--images", metavar="FOLDER", help="build it from the photos in there, at any depth; with "
                                                          "--precomp: the photos that its ids name")
    group.add_argument("--captions", metavar="FILE|FOLDER", help="the photos' captions: a table, JSON or folder as for "
                                                                 "extract_features.py (default: text files beside "
                                                                 "them, if any)")
    group.add_argument("--precomp", metavar="FOLDER", help="build it from the precomputed features in there")
    group.add_argument("--split", help="--precomp: of that split (default: test)")
    group.add_argument("--add", metavar="FOLDER", help="encode the photos in this folder, which lies in the gallery's, "
                                                       "that are new or have changed")
    group.add_argument("--prune", action="store_true", help="drop the photos that are not there any more")
    group.add_argument("--index_type", choices=index.TYPES,
                       help=f"build the index of this type (default: {index.EXACT} up to {index.EXACT_MOST} photos, "
                            f"{index.IVF} up to {index.IVF_MOST}, then {index.PQ})")
    group.add_argument("--rebuild_index", action="store_true", help="build the index again from the embeddings, with "
                                                                    "--correction that, too")
    group.add_argument("--recall_check", action="store_true", help="print how many of the ten nearest the index finds")


def add_correction_flags(group):
    """The correction of hubs, as compute_results.py has it."""
    group.add_argument("--correction", choices=[*SHIFTS, "none"],
                       help="build the gallery with it, or, of one that is built, none: do without (default: the best "
                            "on dev where the checkpoint's data is at hand)")
    group.add_argument("--correction_bank", choices=["train", "dev"],
                       help="split whose captions tell which photos are hubs (default: train)")
    group.add_argument("--correction_bank_images", type=number(int, 0),
                       help=f"at most so many images' captions of it (0: all; default: {BANK_IMAGES})")
    group.add_argument("--correction_k", type=number(int, 1), help="csls, nnn: nearest of the bank (default: 10, 128)")
    group.add_argument("--correction_temperature", type=number(float, 1e-4, 100),
                       help="inverted_softmax: temperature (default: 0.05)")
    group.add_argument("--correction_alpha", type=number(float, 0, low_allowed=False),
                       help="nnn: weight of what is taken off (default: 0.75)")
    group.add_argument("--tune_correction", action="store_true",
                       help="choose each parameter that no flag sets, by the recalls on dev")


def add_model_flags(group):
    """The model and where it computes."""
    group.add_argument("--model_path", help=f"checkpoint (default: the gallery's, or {DEFAULT_MODEL})")
    group.add_argument("--data_path", help="folder that holds the data sets (default: the checkpoint's)")
    group.add_argument("--vocab_path", help="folder of the vocabulary (default: the checkpoint's own words, or its "
                                            "vocab_path where it carries none)")
    group.add_argument("--caption_reading", choices=READINGS,
                       help="how questions become words (default: as in the checkpoint's training)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda[:n] or mps")
    group.add_argument("--batch_size", type=number(int, 1), help="items encoded at a time (default: the checkpoint's; "
                                                                 "of photos 32)")
    group.add_argument("--workers", default=min(os.cpu_count(), 8), type=number(int, 0),
                       help="processes that decode photos")


def add_encoder_flags(group):
    """As extract_features.py has them."""
    group.add_argument("--encoder", help="a torchvision classification CNN, timm/<name>, a torchvision detector (with "
                                         "--regions), or sample")
    group.add_argument("--encoder_weights", metavar="imagenet|none|FILE", help="its weights (default: imagenet)")
    group.add_argument("--pooling", choices=POOLINGS, help="pooled: one row a photo; grid: 36 rows; 10crop: the mean "
                                                           "of ten crops (default: pooled)")
    group.add_argument("--regions", type=number(int, 1), help="rows a photo of a detector")
    group.add_argument("--normalise", action="store_true", help="scale each row to length one")


def check_flags(options):
    """Raise InputError for a flag that does nothing beside the others, or contradicts them."""
    parameters = [f"correction_{name}" for name in ADJUSTABLE]
    own = [] if options.correction in (None, "none") else parameters_of(options.correction)
    bank = ["correction_bank", "correction_bank_images", "tune_correction"]
    for useless, flags, others in (
            (not options.serve, ["host", "port", "allow_host"], "without --serve"),
            (options.rerank_model is None, ["rerank", "rerank_precomp", "rerank_vocab_path"],
             "without --rerank_model"),
            (options.image is not None and options.question is options.batch is None and not options.serve,
             ["rerank_model"], "with --image alone: it orders what is found by words"),
            (options.precomp is None, ["split"], "without --precomp"),
            (options.precomp is not None, ["captions", "add"], "with --precomp"),
            (options.images is None and options.add is None, ["captions"], "without --images or --add"),
            (options.encoder is None, ["pooling", "regions", "normalise"], "without --encoder"),
            (options.correction == "none", [*parameters, *bank], "with --correction none"),
            (options.correction, [flag for flag in parameters if flag.removeprefix("correction_") not in own],
             f"with --correction {options.correction}"),
            (options.correction is None, ["tune_correction"], "without --correction: the best is chosen anyhow")):
        given = [flag for flag in flags if useless and not any(getattr(options, flag) is x for x in (None, False))]
        if given:
            raise InputError(f"--{given[0]} does nothing {others}: leave it out, or change the other")
    if options.correction_bank == "dev" and (options.tune_correction or options.correction is None):
        raise InputError("a correction that is chosen on the dev split can't have that as --correction_bank, too: "
                         "leave it out, or name a --correction without --tune_correction")
    if options.question is not None and options.batch is not None:
        raise InputError("a question and --batch are given: write the question into that file, too, or leave one out")


class Hit(NamedTuple):
    """A photo that was found."""

    number: int  # in the gallery
    item: str  # its path relative to the gallery's one folder, or its id
    score: float


class Searcher:
    """A model and a gallery of its, ready to answer one caller at a time."""

    def __init__(self, loaded, gallery, make_encoder, corrected=True, reranker=None):
        """loaded: an `evaluation.Checkpoint`; make_encoder: gives the `features.Encoder` of photos' embeddings, and is
        called when the first photo comes; corrected: whether questions in words may be corrected at all; reranker: a
        `gallery_rerank.Reranker`, or None."""
        self.loaded, self.gallery, self.corrected, self.reranker = loaded, gallery, corrected, reranker
        self.make_encoder, self.encoder = make_encoder, None
        loaded.model.val_start()

    def check(self, question):
        """Raise InputError for a question that is empty, too long, or has no word that the model knows."""
        if not question.strip():
            raise InputError("the question is empty: say in a few words what to look for")
        words = tokenize(question) if len(question) <= MAX_CAPTION else question.split()
        if len(words) > MAX_WORDS or len(question) > MAX_CAPTION:
            raise InputError(f"the question has {len(words)} words, each mark of punctuation counted, and "
                             f"{len(question)} characters: ask with at most {MAX_WORDS} and {MAX_CAPTION}")
        known = self.loaded.vocabulary.word2idx
        if not any(word in known for word in words if any(map(str.isalnum, word))):
            raise InputError(f"none of the question's words is known to the model ({shown(question[:80])}): use plain "
                             "words such as those of its captions")

    def by_words(self, questions, top, corrected=True):
        """For each question (str) its `top` best photos: [[Hit, ...], ...]; corrected: by the gallery's correction."""
        for question in questions:
            self.check(question)
        words = number_words(questions, self.loaded.vocabulary, self.loaded.opt.caption_reading)
        queries = embed_texts(self.loaded.model, words, self.loaded.opt.batch_size)
        count = max(top, self.reranker.k) if self.reranker else top
        scores, numbers = self.gallery.search(queries, count, corrected and self.corrected)
        if self.reranker:
            scores, numbers = self.reranker.reordered(questions, numbers)
        return self._hits(scores[:, :top], numbers[:, :top])

    def by_photo(self, file, top):
        """A photo, a path or an open file -> (its `top` Hits, [(caption, Hit of the photo it belongs to), ...])."""
        query = self._embed_photo(file)[None]
        alike, = self._hits(*self.gallery.search(query, top))
        if not self.gallery.n_captions:
            return alike, []
        scores, captions = (found[0].tolist() for found in self.gallery.search_captions(query, top))
        photos = [self.gallery.photo_of(caption) for caption in captions]
        return alike, [(self.gallery.caption_texts[caption], Hit(photo, self.gallery.items[photo], score))
                       for caption, photo, score in zip(captions, photos, scores)]

    def _embed_photo(self, file):
        self.encoder = self.encoder or self.make_encoder()
        try:
            return encode_photo(self.encoder, file)
        except InputError as error:
            name = f"image {shown(os.fspath(file))}" if isinstance(file, (str, os.PathLike)) else "the photo"
            raise InputError(f"{name} cannot be read ({error.__cause__ or error}): give a whole photo of a usual "
                             "format") from error

    def like(self, number, top):
        """The `top` photos most alike photo `number`, without itself: [Hit, ...]."""
        query = self.gallery.embeddings[number, :-1][None]
        hits, = self._hits(*self.gallery.search(query, top + 1))
        return [hit for hit in hits if hit.number != number][:top]

    def hubs(self, top):
        """The photos that come among the ten best most often: [(number, how often), ...]; None where it is not known.

        Which questions were asked for it tells `gallery.description["hubs"]`.
        """
        counts = self.gallery.hub_counts
        if counts is None:
            return None
        order = (-counts).argsort(kind="stable")[:top]
        return list(zip(order.tolist(), counts[order].tolist()))

    def _hits(self, scores, numbers):
        return [[Hit(number, self.gallery.items[number], score) for number, score in zip(*pair) if number >= 0]
                for pair in zip(numbers.tolist(), scores.tolist())]


# The gallery ------------------------------------------------------------------------------------

def open_searcher(options):
    """The Searcher of the options' model and gallery, which is built or changed first where it is to be."""
    if options.images is not None and not os.path.isdir(options.images):
        raise InputError(f"--images {options.images!r} is not a folder: name that of the photos")
    options.model_path, folder = find_places(options)
    loaded = load_for_evaluation(options)
    refuse_unsearchable(loaded)
    if not is_whole(folder) or is_stale_sample(folder, options, loaded):
        with locked(folder):
            build_named(options, loaded, folder)
    elif wants_change(options, folder):
        with locked(folder):
            check_own(folder, options, loaded)
            build_gallery.change(options, loaded, folder)
    else:
        check_own(folder, options, loaded)
        if options.images is not None or options.precomp is not None:
            print(f"note: the gallery {shown(folder)} is there, and is asked as it is: --add takes up new photos, "
                  "another --index builds one anew", file=sys.stderr)
    gallery = Gallery(folder)
    known, reranker = gallery.description["features"], None
    if options.rerank_model is not None:
        reranker = Reranker(gallery, options.rerank_model, options.rerank or RERANKED, options.rerank_precomp,
                            options.device, options.rerank_vocab_path)
    return Searcher(loaded, gallery, lambda: build_gallery.photo_encoder(loaded, known, options)[0],
                    options.correction != "none", reranker)


def find_places(options):
    """(path of the checkpoint, folder of the gallery)."""
    if options.index is not None and options.model_path is None and is_whole(options.index):
        own = describe(options.index)["model"]["path"]
        return os.path.normpath(os.path.join(os.path.realpath(options.index), own)), options.index
    if options.index is not None and options.model_path is options.images is options.precomp is None:
        raise InputError(f"there is no whole gallery in {options.index}: build it with --images or --precomp")
    model_path = options.model_path or DEFAULT_MODEL
    return model_path, options.index or os.path.join(os.path.dirname(model_path), "gallery")


@contextmanager
def locked(folder):
    """Keep other builders out of the gallery's folder; a new one that comes to nothing goes away."""
    refuse_foreign(folder)
    was_there = os.path.isdir(folder)
    try:
        with run_record.lock(folder, "--index"):
            yield
    except InputError:
        if not was_there and os.path.isdir(folder) and set(os.listdir(folder)) <= {".lock"}:
            shutil.rmtree(folder)
        raise


def wants_change(options, folder):
    """Whether the options ask for another gallery than there is."""
    return (options.add is not None or options.prune or options.rebuild_index
            or options.index_type not in (None, describe(folder)["index"]))


def is_stale_sample(folder, options, loaded):
    """Whether a gallery is of the sample data, which is quickly built again, and the model was trained anew since."""
    found, sample = describe(folder), os.path.join(loaded.opt.data_path, SAMPLE)
    return (options.images is None and found["source"] == build_gallery.source_of(sample, "test")
            and found["model"]["sha256"] != build_gallery.hash_file(loaded.path))


def build_named(options, loaded, folder):
    """Build the gallery that the options name, or, for a model of the sample data, that of its test pictures."""
    if options.add is not None or options.prune or options.rebuild_index:
        raise InputError(f"there is no whole gallery in {folder} to change: build it first, with --images or --precomp")
    if options.precomp is None and options.images is None:
        if loaded.opt.data_name != SAMPLE:
            raise InputError(f"there is no whole gallery in {folder}: build it with --images or --precomp")
        sample_data.draw(loaded.opt.data_path)
        options.precomp = os.path.join(loaded.opt.data_path, SAMPLE)
    options.split = options.split or "test"
    print(f"Building the gallery {shown(folder)} from {shown(options.precomp or options.images)}", file=sys.stderr)
    build_gallery.build(options, loaded, folder, options.images)


def check_own(folder, options, loaded):
    """Raise InputError where a gallery is of another model, or of other photos than the options name."""
    found = describe(folder)
    own = build_gallery.hash_file(loaded.path), loaded.opt.embed_size
    if (found["model"]["sha256"], found["width"]) != own:
        raise InputError(f"the gallery {folder} is of another model than {loaded.path}: name that with --model_path, "
                         "or build one of this model in another --index")
    named = (build_gallery.source_of(options.precomp, options.split or "test") if options.precomp is not None else
             options.images and os.path.realpath(options.images))
    source = build_gallery.source_of_gallery(folder, found)
    if named and named != source:
        raise InputError(f"the gallery {folder} is of {source}, not of {named}: name another --index")
    method, parameters = found["correction"]["method"], found["correction"]["parameters"]
    has = {"correction": method, **{f"correction_{name}": parameters.get(name) for name in ADJUSTABLE},
           "correction_bank": found["correction"]["bank_split"],
           "correction_bank_images": found["correction"]["bank_images"]}
    asked = {name: getattr(options, name) for name in has}
    others = [name for name, value in asked.items() if value not in (None, has[name])]
    if others == ["correction"] and asked["correction"] == "none":  # of these questions, not of the gallery
        others = []
    if options.rebuild_index and options.correction is None and others:
        raise InputError(f"--rebuild_index keeps the gallery's correction {method}, and --{others[0]} would change it: "
                         "name a --correction, too")
    tuned = options.tune_correction and options.index and options.images is options.precomp is None  # it builds none
    if not options.rebuild_index and (others or tuned):
        words = " ".join([method, *(f"--{name} {value}" for name, value in has.items()
                                    if name != "correction" and value is not None)])
        raise InputError(f"the gallery {folder} was built with --correction {words}: add --rebuild_index for another "
                         "one")


# Answers ----------------------------------------------------------------------------------------

def as_json(query, hits, captions=None):
    """An answer as a JSON object on one line."""
    answer = {"query": query, "results": [{"item": hit.item, "score": hit.score} for hit in hits]}
    if captions is not None:
        answer["captions"] = [{"caption": caption, "item": hit.item, "score": hit.score} for caption, hit in captions]
    return json.dumps(answer)


def read_questions(options):
    """The question, or those of --batch; raises InputError where that file has none."""
    path = options.batch
    if path is None:
        return [options.question] if options.question is not None else []
    if not os.path.exists(path) or not os.path.getsize(path):
        raise InputError(f"--batch {path} is {'empty' if os.path.exists(path) else 'not there'}: name a text file with "
                         "a question a line")
    return read_captions(path)


def print_answer(options, gallery, query, hits, captions=None):
    """An answer, for a person or a machine."""
    if options.json:
        print(as_json(query, hits, captions))
        return
    print(shown(query))
    for caption, hit in captions or []:
        print(f"  {hit.score:.3f}  {shown(caption)}  ({shown(hit.item)})")
    for hit in hits:
        gone = gallery.photo_folder is not None and gallery.photo(hit.number) is None
        print(f"  {hit.score:.3f}  {shown(hit.item)}{'  (missing)' if gone else ''}")


def answer(options, questions, searcher):
    """Print the answers to what is asked; raises InputError, before any, where one can't be given."""
    for line, question in enumerate(questions, start=1):
        try:
            searcher.check(question)
        except InputError as error:
            raise InputError(f"--batch {options.batch}, line {line}: {error}" if options.batch else error) from error
    found = searcher.by_photo(options.image, options.top) if options.image is not None else None
    for place in range(0, len(questions), BATCH):
        some = questions[place:place + BATCH]
        for question, hits in zip(some, searcher.by_words(some, options.top)):
            print_answer(options, searcher.gallery, question, hits)
    if found:
        print_answer(options, searcher.gallery, options.image, *found)


def check_recall(searcher):
    """Print how many of the ten nearest of 1,000 questions the index finds, by exact search."""
    share, n, words = build_gallery.recall_of(searcher.gallery)
    print(f"recall@10 of the {searcher.gallery.description['index']} index: {share:.4f} ({n} {words})")


def main(argv=None):
    """A gallery, then answers from it."""
    options = parse_args(argv)
    questions = read_questions(options)
    searcher = open_searcher(options)
    if options.recall_check:
        check_recall(searcher)
    answer(options, questions, searcher)
    if options.serve:
        from serve import serve
        serve(searcher, options.host or HOST, PORT if options.port is None else options.port,
              options.allow_host or ())
    elif options.question is options.batch is options.image is None and not options.recall_check:
        gallery = searcher.gallery
        print(f"{shown(gallery.folder)}: {gallery.count} photos, {gallery.n_captions} captions, correction "
              f"{gallery.correction}, index {gallery.description['index']}; ask with a question, --image or --serve")


if __name__ == "__main__":
    run_script(main)
