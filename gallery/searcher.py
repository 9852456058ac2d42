"""Answer questions from a gallery: in words, by a photo or by an embedding."""

import os
from typing import NamedTuple

import torch

from features.encoders import encode_photo
from gallery.hubs import HUB_DEPTH, is_alarming
from gallery.store import shown
from inputs.decoding import decode_image
from inputs.tokenizer import MAX_CAPTION, tokenize
from runtime.errors import InputError
from runtime.finite import LARGEST, checked

MAX_WORDS = 1000  # of a question


class Hit(NamedTuple):
    """A photo that was found."""

    number: int  # in the gallery
    item: str  # its path relative to the gallery's one folder, or its id
    score: float


class Searcher:
    """A model and its gallery, which answer one caller at a time (see also `embed_photo`)."""

    def __init__(self, loaded, gallery, make_encoder, corrected=True, reranker=None):
        """loaded: an `evaluation.Checkpoint`, or a `gallery.other_models.OtherModel`
        make_encoder: returns the `features.encoders.Encoder` whose rows are photos' embeddings;
            called when the first photo comes
        corrected: False switches the gallery's correction off for all questions
        reranker: a `gallery.rerank.Reranker`, or None
        """
        self.loaded, self.gallery, self.corrected, self.reranker = (
            loaded,
            gallery,
            corrected,
            reranker,
        )
        self.make_encoder, self.encoder = make_encoder, None
        self.reads_words, self.reads_photos = loaded.reads_words, loaded.reads_photos
        loaded.model.val_start()

    def unknown(self, question):
        """A question's words, once each, that the model or its reranker does not know.

        To a model, all unknown words are the same word.
        """
        models = [self.loaded, *([self.reranker.loaded] if self.reranker else [])]
        words = [word for word in dict.fromkeys(tokenize(question)) if any(map(str.isalnum, word))]
        return [
            word
            for word in words
            if any(len(one.vocabulary) and word not in one.vocabulary.word2idx for one in models)
        ]

    def check(self, question):
        """Raise InputError for a question that is empty, too long, or without any known word."""
        if not self.reads_words:
            raise InputError(
                f"the gallery {shown(self.gallery.folder)} has no text model, so it can't read "
                "words: ask with vectors (--query_embeddings, or embedding in JSON), or name the "
                "model that made its embeddings with --text_model"
            )
        if not question.strip():
            raise InputError("the question is empty: say in a few words what to look for")
        words = tokenize(question) if len(question) <= MAX_CAPTION else question.split()
        if len(words) > MAX_WORDS or len(question) > MAX_CAPTION:
            raise InputError(
                f"the question has {len(words)} words, each mark of punctuation counted, and "
                f"{len(question)} characters: ask with at most {MAX_WORDS} and {MAX_CAPTION}"
            )
        known = self.loaded.vocabulary.word2idx
        # A frozen text model has no vocabulary, and reads any words.
        if known and not any(word in known for word in words if any(map(str.isalnum, word))):
            raise InputError(
                f"none of the question's words is known to the model ({shown(question[:80])}): use "
                "plain words such as those of its captions"
            )

    def by_words(self, questions, top, corrected=True):
        """For each question (str), its `top` best photos: [[Hit, ...], ...].

        corrected: whether the gallery's hub correction is applied
        """
        for question in questions:
            self.check(question)
        queries = self.loaded.embed_questions(questions)
        count = max(top, self.reranker.k) if self.reranker else top
        scores, numbers = self.gallery.search(queries, count, corrected and self.corrected)
        if self.reranker:
            scores, numbers = self.reranker.reordered(questions, numbers)
        return self._hits(scores[:, :top], numbers[:, :top])

    def by_vectors(self, rows, top, corrected=True):
        """As `by_words`, for questions (q, D) that are embeddings already, of any float type."""
        self.check_width(rows, "the questions")
        scores, numbers = self.gallery.search(
            self._as_queries(rows), top, corrected and self.corrected
        )
        return self._hits(scores, numbers)

    def by_numbers(self, numbers, top):
        """As `by_vectors`, for one question as a list of numbers from a stranger: [Hit, ...]."""
        if not all(type(one) in (int, float) and abs(one) <= LARGEST for one in numbers):
            raise InputError(f"the embedding holds something else than numbers up to {LARGEST:g}")
        if not any(numbers):
            raise InputError("the embedding is all zeros, equally near to everything")
        (hits,) = self.by_vectors(torch.tensor([numbers], dtype=torch.float64), top)
        return hits

    def check_width(self, rows, shown):
        """Raise InputError unless rows (q, D) are as wide as the gallery's."""
        if rows.shape[1] != self.gallery.width:
            raise InputError(
                f"{shown} have {rows.shape[1]} numbers each, and the gallery's embeddings "
                f"{self.gallery.width}: both must come from one model"
            )

    def _as_queries(self, rows):
        """Rows in float32, of length 1 if the gallery compares by cosine."""
        if self.loaded.opt.no_imgnorm:
            return rows.float()
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return torch.nn.functional.normalize(rows, dim=1).float()

    def by_photo(self, file, top):
        """A photo's `top` Hits, and the captions that fit best, each with the Hit of its photo.

        file: a path or an open file
        """
        return self.by_embedding(self.embed_photo(file), top)

    def by_embedding(self, embedding, top):
        """As `by_photo`, from a photo's embedding (D,)."""
        (query,) = checked([embedding[None]], "photos")
        (alike,) = self._alike(query, top)
        if not self.gallery.n_captions:
            return alike, []
        scores, captions = self.gallery.search_captions(query, top)
        self._refuse_odd(scores)
        scores, captions = scores[0].tolist(), captions[0].tolist()
        photos = [self.gallery.photo_of(caption) for caption in captions]
        return alike, [
            (self.gallery.caption_texts[caption], Hit(photo, self.gallery.items[photo], score))
            for caption, photo, score in zip(captions, photos, scores)
        ]

    def _alike(self, queries, top):
        """The `top` most similar photos, by cosine, for (q, D) embeddings: [[Hit, ...], ...].

        By inner product, as for words, the longest embeddings would be similar to everything.
        """
        return self._hits(*self.gallery.search_alike(queries, top, not self.loaded.opt.no_imgnorm))

    def embed_photo(self, file, decode=decode_image):
        """The embedding (D,) of a photo.

        One thread may embed photos while another calls the other methods.

        file: a path or an open file
        decode: the function that makes a picture of it
        """
        if not self.reads_photos:
            raise InputError(
                f"the gallery {shown(self.gallery.folder)} does not know which network saw its "
                "photos, so it can't be asked by a photo: ask with the photo's embedding "
                "(--query_embeddings), or name the network with --encoder"
            )
        self.encoder = self.encoder or self.make_encoder()
        try:
            return encode_photo(self.encoder, file, decode)
        except InputError as error:
            name = (
                f"image {shown(os.fspath(file))}"
                if isinstance(file, (str, os.PathLike))
                else "the photo"
            )
            raise InputError(
                f"{name} cannot be read ({error.__cause__ or error}): give a whole photo of a "
                "usual format"
            ) from error

    def like(self, number, top):
        """The `top` photos most similar to photo `number`, without itself: [Hit, ...]."""
        query = self.gallery.embeddings[number, :-1][None]
        (hits,) = self._alike(query, top + 1)
        return [hit for hit in hits if hit.number != number][:top]

    def hubs(self, top):
        """The photos most often among the ten best; None if unknown.

        [(number, how often, whether that raises the hub alarm), ...]
        `gallery.description["hubs"]` says over which questions they were counted.
        """
        counts = self.gallery.hub_counts
        if counts is None:
            return None
        order = (-counts).argsort(kind="stable")[:top]
        alarming = is_alarming(counts[order], counts, counts.sum() / HUB_DEPTH)
        return list(zip(order.tolist(), counts[order].tolist(), alarming.tolist()))

    def _hits(self, scores, numbers):
        self._refuse_odd(scores[numbers >= 0])
        return [
            [
                Hit(number, self.gallery.items[number], score)
                for number, score in zip(*pair)
                if number >= 0
            ]
            for pair in zip(numbers.tolist(), scores.tolist())
        ]

    def _refuse_odd(self, scores):
        """Raise InputError unless all scores are finite."""
        if not scores.isfinite().all():
            raise InputError(
                f"a score is not finite: check the gallery with search.py --index "
                f"{shown(self.gallery.folder)} --check, and the model, or a photo that was given"
            )
