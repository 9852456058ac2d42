"""benchmark.py's part "search": build galleries of made-up embeddings and search them.

Photos lie near a few thousand centres, as real ones do, and a question near its photo. Each gallery
is searched in a new process, so that its memory can be measured.
"""

import argparse
import os
import tempfile
import time
from collections import defaultdict

import numpy as np
import torch
from torch.nn.functional import normalize

from benchmarks.timing import in_own_process, resident_memory, say, spread
from evaluation import Checkpoint
from gallery import build as build_gallery
from gallery import index
from gallery.hubs import Correction
from gallery.searcher import Searcher
from gallery.store import Gallery
from inputs.tokenizer import SPECIAL_WORDS
from model import VSE
from runtime.device import choose_matmul_precision
from vocab import vocabulary_of

CENTRES = 3000
SPREAD, DISTANCE = 0.7, 1.0  # lengths from centre to photo, and from photo to question
WORDS = 8000  # of the made-up vocabulary
ASKED, ASKED_AT_ONCE, BATCH = 200, 640, 64  # questions one by one, in batches, and a batch's size
TOP = 10  # photos found for a question


def made_up_rows(n, width, seed=0, at_once=8192):
    """Yield blocks (m, width + 1) of n photos' embeddings, with a correction's shift at the end."""
    centres = normalize(
        torch.randn(CENTRES, width, generator=torch.Generator().manual_seed(9)), dim=1
    )
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, n, at_once):
        m = min(at_once, n - start)
        near = centres[torch.randint(CENTRES, (m,), generator=generator)]
        rows = normalize(
            near + SPREAD * width**-0.5 * torch.randn(m, width, generator=generator), dim=1
        )
        yield torch.cat([rows, -0.2 - 0.1 * torch.rand(m, 1, generator=generator)], 1)


def questions_near(rows, seed=1):
    """(q, width) photos' embeddings -> (q, width) embeddings of questions that ask for them."""
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    return normalize(rows + DISTANCE * rows.shape[1] ** -0.5 * noise, dim=1)


def made_up_checkpoint(width, path):
    """A Checkpoint with made-up words and weights; path: the file that messages name."""
    words = vocabulary_of([*SPECIAL_WORDS, *(f"w{number}" for number in range(WORDS))])
    opt = argparse.Namespace(
        data_name="made_precomp",
        img_dim=8,
        embed_size=width,
        word_dim=300,
        num_layers=1,
        vocab_size=len(words),
        use_abs=False,
        no_imgnorm=False,
        finetune=False,
        cnn_type="vgg19",
        measure="cosine",
        cross_attn=None,
        caption_reading="text",
        batch_size=128,
    )
    torch.manual_seed(0)
    return Checkpoint(VSE(opt), opt, words, path)


def build(folder, n, width, kind):
    """Build a gallery of n made-up photos, some with captions; returns the seconds that took."""
    path = os.path.join(folder, "model")
    with open(path, "wb") as file:
        file.write(b"made up")
    loaded = made_up_checkpoint(width, path)
    captioned = set(torch.linspace(0, n - 1, min(n, ASKED_AT_ONCE)).long().tolist())
    own = torch.cat(
        [
            block[
                [row - start for row in range(start, start + len(block)) if row in captioned], :-1
            ]
            for start, block in blocks_from(made_up_rows(n, width))
        ]
    )
    contents = build_gallery.Contents(
        [f"photos/{number}.jpg" for number in range(n)],
        made_up_rows(n, width),
        [["made up"] if number in captioned else [] for number in range(n)],
        questions_near(own),
        "made up",
        None,
        None,
    )
    gallery = os.path.join(folder, "gallery")
    os.makedirs(gallery)
    start = time.perf_counter()
    build_gallery.write(gallery, loaded, contents, Correction("nnn", {}), kind)
    return time.perf_counter() - start


def blocks_from(blocks):
    """Yield (number of the first row, block) for each block."""
    start = 0
    for block in blocks:
        yield start, block
        start += len(block)


def ask(folder, width):
    """Open and search a gallery in this process: {figure: its values}."""
    choose_matmul_precision(torch.device("cpu"))
    loaded = made_up_checkpoint(width, os.path.join(folder, "model"))
    words = np.random.default_rng(3).integers(0, WORDS, (ASKED, 10))
    questions = [" ".join(f"w{word}" for word in line) for line in words]
    before, anonymous = resident_memory("VmRSS"), resident_memory("RssAnon")
    found, figures = Gallery(os.path.join(folder, "gallery")), defaultdict(list)
    queries = found.caption_embeddings.clone()
    for query in queries[:ASKED].split(1):
        figures["one by one"].append(timed(found.search, query, TOP, True))
    for batch in queries.split(BATCH):
        figures["in batches"].append(timed(found.search, batch, TOP, True) / len(batch))
    figures["resident"] = [resident_memory("VmRSS") - before]
    figures["anonymous"] = [resident_memory("RssAnon") - anonymous]
    searcher = Searcher(loaded, found, None)
    for question in questions:
        figures["whole"].append(timed(searcher.by_words, [question], TOP))
    figures["recall"] = [build_gallery.recall_of(found)[0]]
    return dict(figures)


def timed(function, *arguments):
    """The seconds that a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def sizes_of(folder):
    """{file: bytes} of a gallery's arrays."""
    gallery = Gallery(os.path.join(folder, "gallery"), with_index=False)
    return gallery.description["sizes"]


def bench_search(options):
    """Yield the part's lines, {title: line}.

    Every size has its usual type of index; with --search_quantizer, the largest also has a product
    quantizer.
    """
    wanted = [(n, index.usual_type(n)) for n in options.search_sizes]
    if options.search_quantizer:
        wanted.append((max(options.search_sizes), index.PQ))
    for n, kind in wanted:
        say(f"  a gallery of {n} photos, {kind}")
        with tempfile.TemporaryDirectory(dir=options.search_folder) as folder:
            seconds = build(folder, n, options.embed_size, kind)
            sizes, figures = sizes_of(folder), in_own_process(ask, folder, options.embed_size)
        name = f"search, {n} photos, {kind}"
        one, many, whole = (
            [1 / s for s in figures["one by one"][1:]],
            [1 / s for s in figures["in batches"][1:]],
            figures["whole"][1:],
        )
        yield {
            f"{name}: built (s)": {"ours": spread([seconds])},
            f"{name}: on disk (MB)": {"ours": spread([sum(sizes.values())], 1e6)},
            f"{name}: of it the index (MB)": {"ours": spread([sizes.get("index.faiss", 0)], 1e6)},
            f"{name}: resident after {ASKED + ASKED_AT_ONCE} questions (MB)": {
                "ours": spread(figures["resident"], 1e6)
            },
            f"{name}: of it not backed by files (MB)": {"ours": spread(figures["anonymous"], 1e6)},
            f"{name}: questions a second, one by one": {"ours": spread(one)},
            f"{name}: questions a second, {BATCH} at once": {"ours": spread(many)},
            f"{name}: a question of ten words, from text to photos (ms)": {
                "ours": spread(whole, 1e-3)
            },
            f"{name}: recall@10": {"ours": spread(figures["recall"])},
        }
