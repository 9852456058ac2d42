"""A fake searcher for the page's tests.

Pictures of one colour, found by their captions' words or by colour.
"""

import math
import os
import threading
from typing import NamedTuple

import numpy as np
from PIL import Image

from runtime.errors import InputError

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 60, 210),
    "white": (240, 240, 240),
}

THINGS = ("star", "boat", "tree")


class Hit(NamedTuple):
    number: int
    item: str
    score: float


class FakeGallery:
    """Twelve photos in a folder: each thing in each colour."""

    def __init__(self, folder, correction="nnn"):
        self.photo_folder, self.correction, self.width = str(folder), correction, 2
        self.description = {"hubs": "twelve captions"}
        pairs = [(colour, thing) for thing in THINGS for colour in COLOURS]
        self.items = [f"{thing}/{colour}.png" for colour, thing in pairs]
        self.texts = [
            [f"a {colour} {thing}", f"one {thing} that is {colour}"] for colour, thing in pairs
        ]
        self.count = len(self.items)
        for item, (colour, thing) in zip(self.items, pairs):
            os.makedirs(os.path.join(folder, thing), exist_ok=True)
            pixels = np.full((60, 80, 3), COLOURS[colour], np.uint8)
            pixels[: 10 * (1 + THINGS.index(thing))] = 0  # so that things differ a little, too
            Image.fromarray(pixels).save(os.path.join(folder, item))

    def captions(self, number):
        return self.texts[number]

    def photo(self, number):
        if self.photo_folder is None:
            return None
        path = os.path.realpath(os.path.join(self.photo_folder, self.items[number]))
        inside = path.startswith(os.path.realpath(self.photo_folder) + os.sep)
        return path if inside and os.path.isfile(path) else None


class FakeSearcher:
    """Scores a photo by the share of a question's words in its first caption.

    The correction takes 0.4 off red ones.
    """

    reads_words = reads_photos = True

    def __init__(self, folder, correction="nnn"):
        self.gallery = FakeGallery(folder, correction)
        self.batches = []  # the questions of each call of by_words
        self.gate = threading.Event()  # closed: by_words waits
        self.gate.set()
        self.photo_gate = threading.Event()  # closed: embed_photo waits
        self.photo_gate.set()

    def check(self, question):
        words = question.split()
        if not words:
            raise InputError("the question is empty: type some words")
        if len(words) > 1000:
            raise InputError(f"the question has {len(words)} words: ask with at most 1000")
        known = {word for texts in self.gallery.texts for text in texts for word in text.split()}
        if not known & set(words):
            raise InputError(f"no word of {question!r} is known: use other words")

    def unknown(self, question):
        known = {word for texts in self.gallery.texts for text in texts for word in text.split()}
        return [word for word in question.split() if word not in known]

    def by_words(self, questions, top, corrected=True):
        self.batches.append(list(questions))
        assert self.gate.wait(20)
        return [
            self._best(
                [
                    self._share(question, number) - self._shift(number, corrected)
                    for number in range(self.gallery.count)
                ],
                top,
            )
            for question in questions
        ]

    def by_numbers(self, numbers, top):
        if len(numbers) != self.gallery.width:
            raise InputError(f"{len(numbers)} numbers: give {self.gallery.width}")
        return self._best([numbers[0] * n + numbers[1] for n in range(self.gallery.count)], top)

    def embed_photo(self, file, decode):
        assert self.photo_gate.wait(20)
        return np.asarray(decode(file).resize((8, 6)), float)

    def by_embedding(self, pixels, top):
        hits = self._alike(pixels, top)
        return hits, [(self.gallery.texts[hit.number][0], hit) for hit in hits[:3]]

    def like(self, number, top):
        with Image.open(self.gallery.photo(number)) as picture:
            hits = self._alike(np.asarray(picture.convert("RGB").resize((8, 6)), float), top + 1)
        return [hit for hit in hits if hit.number != number][:top]

    def hubs(self, top):
        return [(0, 7, True), (5, 3, False)][:top]

    def _share(self, question, number):
        words = question.split()
        return sum(word in self.gallery.texts[number][0].split() for word in words) / max(
            1, len(words)
        )

    def _shift(self, number, corrected):
        is_red = self.gallery.items[number].endswith("red.png")
        return 0.4 if is_red and corrected and self.gallery.correction != "none" else 0.0

    def _alike(self, pixels, top):
        scores = []
        for number in range(self.gallery.count):
            with Image.open(self.gallery.photo(number)) as picture:
                other = np.asarray(picture.resize((8, 6)), float)
            scores.append(1 - math.sqrt(((pixels - other) ** 2).mean()) / 255)
        return self._best(scores, top)

    def _best(self, scores, top):
        order = sorted(range(len(scores)), key=lambda number: -scores[number])[:top]
        return [Hit(number, self.gallery.items[number], scores[number]) for number in order]
