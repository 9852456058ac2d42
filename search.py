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
import sys
from typing import NamedTuple

import torch

import build_gallery
import sample_data
from caption_files import read_captions
from errors import ArgumentParser, InputError, number, run_script
from evaluation import load_for_evaluation
from features import encode_photo
from gallery import Gallery, describe, is_whole
from vocab import MAX_CAPTION, READINGS, tokenize
from word_ids import by_length, number_words

DEFAULT_MODEL = "runs/runX/model_best.pth.tar"
SAMPLE = "sample_precomp"
MAX_WORDS = 1000  # of a question


def parse_args(argv=None):
    """The script's flags."""
    parser = ArgumentParser("Find photos by words or by a photo.")
    parser.add_argument("question", nargs="?", help="what to look for, in words")
    ask = parser.add_argument_group("more ways to ask, and what to print")
    ask.add_argument("--image", metavar="FILE", help="find captions and photos that are alike")
    ask.add_argument("--batch", metavar="FILE", help="questions, one a line")
    ask.add_argument("--top", default=10, type=number(int, 1), help="photos for each question")
    ask.add_argument("--json", action="store_true", help="print a JSON object a question")
    where = parser.add_argument_group("the gallery")
    where.add_argument("--index", metavar="FOLDER", help="the gallery (default: gallery, beside the model)")
    where.add_argument("--precomp", metavar="FOLDER", help="build it from the precomputed features in there")
    where.add_argument("--split", default="test", help="--precomp: of that split")
    model = parser.add_argument_group("the model")
    model.add_argument("--model_path", help=f"checkpoint (default: the gallery's, or {DEFAULT_MODEL})")
    model.add_argument("--data_path", help="folder that holds the data sets (default: the checkpoint's)")
    model.add_argument("--vocab_path", help="folder of the vocabulary (default: the checkpoint's own words, or its "
                                            "vocab_path where it carries none)")
    model.add_argument("--caption_reading", choices=READINGS,
                       help="how questions become words (default: as in the checkpoint's training)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda[:n] or mps")
    model.add_argument("--batch_size", type=number(int, 1), help="items encoded at a time (default: the checkpoint's)")
    return parser.parse_args(argv)


class Hit(NamedTuple):
    """A photo that was found."""

    number: int  # in the gallery
    item: str  # its path relative to the gallery's one folder, or its id
    score: float


class Searcher:
    """A model and a gallery of its, ready to answer one caller at a time."""

    def __init__(self, loaded, gallery, encoder=None):
        """loaded: an `evaluation.Checkpoint`; encoder: a `features.Encoder` that gives a photo's embedding, or what
        makes it when it is first asked for."""
        self.loaded, self.gallery, self.encoder = loaded, gallery, encoder
        loaded.model.val_start()

    def check(self, question):
        """Raise InputError for a question that is empty, too long, or has no word that the model knows."""
        words = question.split()
        if not words:
            raise InputError("the question is empty: say in a few words what to look for")
        if len(words) > MAX_WORDS or len(question) > MAX_CAPTION:
            raise InputError(f"the question has {len(words)} words and {len(question)} characters: ask with at most "
                             f"{MAX_WORDS} and {MAX_CAPTION}")
        known = self.loaded.vocabulary.word2idx
        if not any(word in known for word in tokenize(question) if any(map(str.isalnum, word))):
            raise InputError(f"none of the question's words is known to the model ({shown(question[:80])}): use plain "
                             "words such as those of its captions")

    def _embed_questions(self, questions):
        """list of str -> (q, D) embeddings."""
        words = number_words(questions, self.loaded.vocabulary, self.loaded.opt.caption_reading)
        order = by_length(words.lengths)
        parts = [self.loaded.model.embed_captions(words.padded(batch, int(words.lengths[batch[0]])),
                                                  words.lengths[batch])
                 for batch in order.split(self.loaded.opt.batch_size)]
        return torch.cat(parts).cpu()[order.argsort()]

    def by_words(self, questions, top, corrected=True):
        """For each question (str) its `top` best photos: [[Hit, ...], ...]; corrected: by the gallery's correction."""
        for question in questions:
            self.check(question)
        return self._hits(*self.gallery.search(self.embed_questions(questions), top, corrected))

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
        if callable(self.encoder):
            self.encoder = self.encoder()
        if self.encoder is None:
            raise InputError("what made this gallery's features is not known, so no photo can be compared with them: "
                             "name it with --encoder, --encoder_weights and --pooling")
        return encode_photo(self.encoder, file)

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
        return [[Hit(number, self.gallery.items[number], score) for number, score in zip(*pair)]
                for pair in zip(numbers.tolist(), scores.tolist())]


# The gallery ------------------------------------------------------------------------------------

def open_searcher(options):
    """The Searcher of the options' model and gallery, which is built first where it is to be."""
    model_path, folder = find_places(options)
    options.model_path = model_path
    loaded = load_for_evaluation(options)
    build_gallery.refuse_unsearchable(loaded)
    if not is_whole(folder):
        build(options, loaded, folder)
    gallery = Gallery(folder)
    if gallery.description["model"].get("sha256") != build_gallery.hash_file(model_path):
        raise InputError(f"the gallery {folder} is of another model than {model_path}: name that with --model_path, or "
                         "build one of this model in another --index")
    return Searcher(loaded, gallery)


def find_places(options):
    """(path of the checkpoint, folder of the gallery)."""
    if options.index is not None and options.model_path is None and is_whole(options.index):
        return os.path.normpath(os.path.join(options.index, str(describe(options.index)["model"].get("path")))), \
            options.index
    model_path = options.model_path or DEFAULT_MODEL
    return model_path, options.index or os.path.join(os.path.dirname(model_path), "gallery")


def build(options, loaded, folder):
    """Build the gallery that the options ask for, or that of the sample data for a model of that."""
    precomp = options.precomp
    if precomp is None:
        if loaded.opt.data_name != SAMPLE:
            raise InputError(f"there is no whole gallery in {folder}: build it with --images or --precomp")
        sample_data.draw(loaded.opt.data_path)
        precomp = os.path.join(loaded.opt.data_path, SAMPLE)
    print(f"Building the gallery {folder} from {precomp}, {options.split}", file=sys.stderr)
    build_gallery.write(folder, loaded, build_gallery.from_features(loaded, precomp, options.split), None)


# Answers ----------------------------------------------------------------------------------------

def shown(text):
    """The text as it can be printed: what would not be seen, or would move the cursor, as an escape."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def as_json(query, hits, captions=None):
    """An answer as a JSON object on one line."""
    answer = {"query": query, "results": [{"item": hit.item, "score": hit.score} for hit in hits]}
    if captions is not None:
        answer["captions"] = [{"caption": caption, "item": hit.item, "score": hit.score} for caption, hit in captions]
    return json.dumps(answer)


def print_answer(options, query, hits, captions=None):
    """An answer, for a person or a machine."""
    if options.json:
        print(as_json(query, hits, captions))
        return
    print(shown(query))
    for caption, hit in captions or []:
        print(f"  {hit.score:.3f}  {shown(caption)}  ({shown(hit.item)})")
    for hit in hits:
        print(f"  {hit.score:.3f}  {shown(hit.item)}")


def answer(options, searcher):
    """Print the answers to what is asked."""
    questions = [options.question] if options.question is not None else []
    if options.batch is not None:
        questions += read_captions(options.batch)
    for question in questions:
        searcher.check(question)
    if questions:
        for question, hits in zip(questions, searcher.by_words(questions, options.top)):
            print_answer(options, question, hits)
    if options.image is not None:
        print_answer(options, options.image, *searcher.by_photo(options.image, options.top))


def main(argv=None):
    """A gallery, then answers from it."""
    options = parse_args(argv)
    answer(options, open_searcher(options))


if __name__ == "__main__":
    run_script(main)
