"""Captions as vectors that a frozen text model made, in place of words.

A folder holds `{split}_txts.npy`, (captions, width): row c is the vector of line c of
`{split}_caps.txt`. `texts.json` beside them says which model made them, and of which captions.
"""

import os
import sys
import threading
from typing import NamedTuple

import torch

from features.files import check_features, map_array
from features.text_description import hash_captions, read_texts_json, refuse_other
from features.text_models import text_model_from
from inputs.word_ids import number_words
from runtime.errors import InputError

LOADING = threading.Lock()  # two questions at once load one model


class TextRows(NamedTuple):
    """n captions as rows of an array; data sets and evaluation use it like `WordIds`."""

    rows: torch.Tensor  # (lines, width), memory-mapped or on a device
    lines: torch.Tensor  # (n,) each caption's row

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        """One caption's vector (width,), float32."""
        return self.rows[self.lines[index]].float()

    unknown_share = None  # it has no words

    @property
    def lengths(self):
        """Ones, (n,): a caption is one vector, so all are equally long."""
        return torch.ones(len(self.lines), dtype=torch.int64)

    def padded(self, indices, longest=1):
        """The vectors (B, width) of captions `indices` (B,), float32."""
        return self.rows.index_select(0, self.lines[indices]).float()

    def to(self, device):
        """The same on another device; on the CPU, rows stay memory-mapped."""
        return TextRows(self.rows.to(device), self.lines.to(device))


class FrozenTexts:
    """Stands for the vocabulary of a model over text vectors: it reads captions, as rows.

    folder: holds the splits' vectors; None takes the data set's folder.
    description: what texts.json says, or None.
    named: (name, weights) of the text model, if they are no longer as texts.json says.
    """

    words, word2idx = (), {}  # it knows no words

    def __init__(self, folder=None, description=None):
        self.folder, self.description, self.model = folder, description, None
        self.named = None

    def __len__(self):
        return 0

    def read(self, data_folder, split, captions, lines):
        """The TextRows of a split's captions.

        captions: those of the whole file; lines: (n,) which of them are wanted.
        Raises InputError unless there is one finite row for each caption, of the same captions and
        the same model as texts.json and the checkpoint say.
        """
        path = self.path_of(data_folder, split)
        folder, rows = os.path.dirname(path), open_texts(path)
        if len(rows) != len(captions):
            raise InputError(
                f"{path} has {len(rows)} rows for the {len(captions)} captions of "
                f"{data_folder}/{split}_caps.txt: make the vectors of these captions again"
            )
        found = read_texts_json(folder)
        if found and found["captions_sha256"].get(split) not in (None, hash_captions(captions)):
            raise InputError(
                f"{path} was made of other captions than {data_folder}/{split}_caps.txt holds now: "
                "make the vectors of these captions again"
            )
        if found and self.description:
            refuse_other(found, self.description, f"{folder} has text vectors by")
        return TextRows(rows, lines)

    def path_of(self, data_folder, split):
        """The file of a split's vectors, in --texts_path or beside the captions; InputError if none.

        Beside the captions it is looked for, too, if the model of a --texts_path goes elsewhere.
        """
        folders = [folder for folder in (self.folder, data_folder) if folder]
        paths = [os.path.join(folder, f"{split}_txts.npy") for folder in folders]
        found = [path for path in paths if os.path.lexists(path)]
        if not found:
            raise InputError(
                f"{' or '.join(paths)} is not there, and the model takes captions as text vectors: "
                f"make them with extract_features.py --texts {data_folder} --text_encoder NAME"
            )
        return found[0]

    def encode(self, captions):
        """The TextRows of captions or questions (n texts), by the model that made the vectors.

        Raises InputError if nothing says which it was, or it cannot be had.
        """
        if self.description is None:
            raise InputError(
                "the model was trained on text vectors without a texts.json, so it is not known "
                "which text model can read a question: make them with extract_features.py "
                "--text_encoder and train again"
            )
        self.load()
        return TextRows(self.model.encode(captions), torch.arange(len(captions)))

    def load(self, device="cpu"):
        """Load the model that made the vectors, if that has not been done yet."""
        with LOADING:
            if self.model is None:
                self.model = text_model_from(self.description, device, self.named)


def read_texts(captions, vocabulary, reading="text", cache_dir=None):
    """Captions as a model reads them: WordIds, or TextRows if its vocabulary is FrozenTexts."""
    if isinstance(vocabulary, FrozenTexts):
        return vocabulary.encode(captions)
    return number_words(captions, vocabulary, reading, cache_dir)


def open_texts(path):
    """A .npy file of text vectors (captions, width), checked, as a memory-mapped tensor."""
    found = map_array(path, "text vectors", "the file")
    if found.dtype.kind != "f" or found.ndim != 2 or 0 in found.shape:
        raise InputError(
            f"text vectors {path} are {found.dtype} of shape {found.shape}: they must be float16 "
            "or float32 numbers of shape (captions, width)"
        )
    if found.dtype.itemsize > 4:
        found = found.astype("float32")
    check_features(found, path)
    return torch.from_numpy(found)


def frozen_texts(folder, data_folder):
    """The FrozenTexts of a folder for a new run; prints a note if nothing describes the vectors.

    Raises InputError if there are no vectors.
    """
    FrozenTexts(folder).path_of(data_folder, "train")
    found = read_texts_json(folder or data_folder)
    if found is None:
        print(
            f"note: {folder or data_folder} has no texts.json, so which text model made the "
            "vectors, and of which captions, is not checked",
            file=sys.stderr,
        )
    return FrozenTexts(folder, found)
