"""SCAN's part of benchmark.py: scores and training steps over regions, against a loop over captions.

The reference takes one caption at a time and makes every attended context, as SCAN (Lee et al., ECCV 2018) writes its
equations down. Both sides use float32 products of the kind that the run has chosen. A floor is the time of the large
products alone, of real words only: measured in turn for scores, from one product's speed for a step.
"""

import argparse
import copy
import mmap
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import median

import torch
from torch.nn.functional import leaky_relu
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cross_attention import EPS, SLOPE, cross_attention_similarities
from loss import ContrastiveLoss
from ranking import Tiles
from scan import SCAN, CrossAttention, Words, l2norm, packed
from timing import Timer, peak_extra_memory, ratio, row
from word_ids import CAPTIONS_PER_IMAGE, by_length, number_words

REGIONS = 36  # an image's, in the field's feature files
FEWEST_WORDS, MOST_WORDS = 8, 19  # of a made-up caption of vectors
WORD_DIM = 300
LOOPED = 10  # captions of a tile that the loop is timed on, where it would take minutes on all
SHARD = 128  # images that the loop takes at once
WAYS = {  # SCAN's recipes for Flickr30k
    "t2i LogSumExp": {"cross_attn": "t2i", "agg_func": "LogSumExp", "lambda_lse": 6.0, "lambda_softmax": 9.0},
    "i2t Mean": {"cross_attn": "i2t", "agg_func": "Mean", "lambda_softmax": 4.0},
}
KINDS = {"off": ("float32", torch.float32), "bf16": ("bf16", torch.bfloat16)}  # of --amp


# Data -------------------------------------------------------------------------------------------

def recipe(options, way, vocab_size=0, amp="off"):
    """The options of a SCAN model and its scores."""
    return argparse.Namespace(img_dim=options.img_dim, embed_size=options.embed_size, word_dim=WORD_DIM, num_layers=1,
                              vocab_size=vocab_size, bi_gru=True, precomp_enc_type="basic", no_imgnorm=False,
                              no_txtnorm=False, raw_feature_norm="clipped_l2norm", amp=amp, **WAYS[way])


def made_up_vectors(images, each, size, device):
    """L2-normalised regions (n, 36, D), `each` captions an image of words (C, 19, D) near them, their lengths (C,)."""
    generator = torch.Generator().manual_seed(4)
    regions = torch.randn(images, REGIONS, size, generator=generator)
    words = torch.randn(images * each, MOST_WORDS, size, generator=generator).mul_(4)
    words += regions[:, :MOST_WORDS].repeat_interleave(each, 0)
    lengths = torch.randint(FEWEST_WORDS, MOST_WORDS + 1, (len(words),), generator=generator)
    return l2norm(regions).to(device), l2norm(words).to(device), lengths


def made_up_batch(options, captions, vocab, device):
    """A training batch, loaded: features (B, 36, img_dim), word ids (B, T) longest caption first, lengths (B,)."""
    spread_out = captions[::len(captions) // options.step_batch][:options.step_batch]  # those of one image are alike
    numbered = number_words(spread_out, vocab)
    order = by_length(numbered.lengths)
    lengths = numbered.lengths[order]
    features = torch.randn(len(order), REGIONS, options.img_dim, generator=torch.Generator().manual_seed(5))
    return features.to(device), numbered.padded(order, int(lengths[0])).to(device), lengths


# The reference ----------------------------------------------------------------------------------

def reference_attention(queries, contexts, smooth):
    """(n, Q, D) and (n, K, D) -> what each query attends to (n, Q, D); scores are normalised by clipped_l2norm."""
    scores = leaky_relu(torch.bmm(contexts, queries.transpose(1, 2)), SLOPE)
    scores = scores / (scores.pow(2).sum(2, keepdim=True).sqrt() + EPS)
    weights = (smooth * scores.transpose(1, 2).contiguous()).softmax(2)
    return torch.bmm(weights, contexts)


def reference_similarities(images, words, lengths, opt):
    """`cross_attention_similarities` of clipped_l2norm, LogSumExp or Mean: (I, R, D), (C, T, D), (C,) -> (I, C)."""
    columns = []
    for caption, length in zip(words, torch.as_tensor(lengths).tolist()):
        repeated = caption[:length].unsqueeze(0).repeat(len(images), 1, 1)
        queries, contexts = (repeated, images) if opt.cross_attn == "t2i" else (images, repeated)
        attended = reference_attention(queries, contexts, opt.lambda_softmax)
        products = queries.norm(dim=2) * attended.norm(dim=2)
        relevance = (queries * attended).sum(2) / products.clamp(min=EPS)
        if opt.agg_func == "LogSumExp":
            columns.append((opt.lambda_lse * relevance).exp().sum(1).log() / opt.lambda_lse)
        else:
            columns.append(relevance.mean(1))
    return torch.stack(columns, 1)


def reference_embeddings(model, features, captions, lengths):
    """As SCAN.forward_emb, by PyTorch's own GRU over packed captions."""
    packed = pack_padded_sequence(model.txt_enc.embed(captions), lengths, batch_first=True)
    states = pad_packed_sequence(model.txt_enc.rnn(packed)[0], batch_first=True)[0]
    ahead, back = states.chunk(2, 2)
    return l2norm(model.img_enc.fc(features)), l2norm((ahead + back) / 2), lengths


# Parts ------------------------------------------------------------------------------------------

def bench_scan(options, timer, captions, vocab, speeds):
    """All of the part: {title: line}."""
    lines, batch = {}, made_up_batch(options, captions, vocab, timer.device)
    for way in WAYS:
        lines |= bench_scores(options, timer, way)
        lines |= bench_memory(options, timer, way)
        lines |= bench_step(options, Timer(timer.device, min(timer.repeats, 3)), batch, len(vocab), way, speeds)
        lines |= bench_all_scores(options, timer, way)
    return lines


def both_passes(similarities, vectors, opt):
    """Scores of regions and words, and the gradients of both for a gradient at every score."""
    regions, words, lengths = vectors
    leaves = [regions.detach().requires_grad_(), words.detach().requires_grad_()]
    scores = similarities(*leaves, lengths, opt)
    return scores, torch.autograd.grad(scores, leaves, scores.detach())


def real_words(words, lengths):
    """(C, T, D), (C,) -> (words, D), without what stands past a caption's end."""
    return words[(torch.arange(words.shape[1]) < lengths.unsqueeze(1)).to(words.device)]


def both_passes_products(regions, words):
    """The three products that scores and their gradients cannot do without."""
    scores = regions @ words.t()
    scores @ words, scores.t() @ regions


def bench_scores(options, timer, way):
    """A training batch's scores, forward and backward, as each --amp has them, against the float32 loop."""
    vectors = made_up_vectors(options.step_batch, 1, options.embed_size, timer.device)
    ours, alone = [], []
    for amp in options.amp:
        both = vectors[0].flatten(0, 1), real_words(*vectors[1:])
        ours.append(partial(both_passes, cross_attention_similarities, vectors, recipe(options, way, amp=amp)))
        alone.append(partial(both_passes_products, *(x.to(KINDS[amp][1]) for x in both)))
    loop = partial(both_passes, reference_similarities, vectors, recipe(options, way))
    *times, loop_times = timer.turns(*ours, *alone, loop)
    lines = {}
    for amp, own, floor in zip(options.amp, times, times[len(ours):]):
        name = f"SCAN {way}, scores of a batch of {options.step_batch}, forward and backward, {KINDS[amp][0]}"
        lines[f"{name} (ms)"] = row(own, loop_times, 1e-3, median(floor))
        lines[f"{name}: times their products alone"] = {"ours": ratio(own, floor)}
    return lines


def step(model, optimizer, embed, similarities, criterion, batch, opt):
    """One training step, as train.py makes it, on a loaded batch; returns the loss."""
    model.amp = opt.amp == "bf16"
    loss = criterion.of_similarities(similarities(*embed(model, *batch), opt), None, None)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
    optimizer.step()
    return loss.detach()


def step_operations(options, words):
    """Of a step's products, forward and backward, for a batch of so many words, none of them shared."""
    size, rows = options.embed_size, options.step_batch * REGIONS
    scores = 3 * 2 * rows * words * size
    fc = 2 * 2 * rows * options.img_dim * size  # features need no gradients
    gru = 2 * 3 * 2 * words * 3 * size * (size + WORD_DIM)
    return scores + fc + gru


def bench_step(options, timer, batch, vocab_size, way, speeds):
    """A training step with HAL and with max-margin, as each --amp has it, against the plain one in float32."""
    torch.manual_seed(0)
    model = SCAN(recipe(options, way, vocab_size)).to(timer.device)
    plain = copy.deepcopy(model)
    plain.txt_enc.rnn.flatten_parameters()  # which a copy's are not
    fused = timer.device.type in ("cpu", "cuda")
    ours = model, torch.optim.Adam(model.parameters(), lr=2e-4, fused=fused), SCAN.forward_emb
    reference = plain, torch.optim.Adam(plain.parameters(), lr=2e-4, foreach=False), reference_embeddings
    floor, lines = step_operations(options, int(batch[2].sum())) / speeds["operations_per_second"], {}
    for loss in ("HAL", "max-margin"):
        criterion = ContrastiveLoss(argparse.Namespace(**{**vars(options), "max_violation": loss == "max-margin"}))
        steps = [partial(step, *ours, cross_attention_similarities, criterion, batch, recipe(options, way, amp=amp))
                 for amp in options.amp]
        *times, plain_times = timer.turns(*steps, partial(step, *reference, reference_similarities, criterion, batch,
                                                          recipe(options, way)))
        for amp, own in zip(options.amp, times):
            name = f"SCAN {way}, {loss}, step on a loaded batch of {options.step_batch}, {KINDS[amp][0]} (ms)"
            lines[name] = row(own, plain_times, 1e-3, floor if amp == "off" else None)
    return lines


def bench_all_scores(options, timer, way):
    """Scores of a split as evaluation makes them, without gradients, against the loop and the one product.

    A round is one column of tiles: some captions with all images, scaled to all captions. The loop takes LOOPED
    captions of each.
    """
    n_images = min(options.eval_images)
    regions, words, lengths = made_up_vectors(n_images, CAPTIONS_PER_IMAGE, options.embed_size, timer.device)
    opt = recipe(options, way)
    tiles = Tiles(CrossAttention(regions, Words.of(packed(words, lengths), lengths), opt), None)

    def ours(block):
        for images in range(tiles.count):
            tiles.scores(images, block)

    def product(vectors):
        for images in tiles.image_rows:
            regions[images].flatten(0, 1) @ vectors.t()

    def loop(some):
        with torch.no_grad():
            for shard in regions.split(SHARD):
                reference_similarities(shard, words[some], lengths[some], opt)
    rounds = []
    for block in [0, *range(tiles.count)]:  # the first one twice, to warm up
        captions = torch.arange(len(words))[tiles.caption_rows[block]]
        vectors, some = real_words(words[captions], lengths[captions]), captions[:LOOPED]
        times = (timer.seconds(partial(ours, block)), timer.seconds(partial(loop, some)),
                 timer.seconds(partial(product, vectors)))
        rounds.append([seconds * len(words) / count for seconds, count in zip(
            times, (len(captions), len(some), len(captions)))])
    own, loop_times, alone = zip(*rounds[1:])
    name = f"SCAN {way}, scores of {n_images} x {len(words)} without gradients"
    return {f"{name} (s; reference: {LOOPED} captions of each tile, scaled)": row(
                own, loop_times, 1, median(alone)),
            f"{name}: times the product alone": {"ours": ratio(own, alone)}}


def peak_of_scores(options, way, similarities, precision):
    """Bytes that a training batch's scores, forward and backward, take at their peak; see `peak_extra_memory`."""
    torch.set_float32_matmul_precision(precision)
    opt, vectors = recipe(options, way), made_up_vectors(options.step_batch, 1, options.embed_size, "cpu")
    both_passes(similarities, [part[:2] for part in vectors], opt)  # for what is loaded once
    return peak_extra_memory(partial(both_passes, similarities, vectors, opt))


def in_own_process(function, *arguments):
    """What the function returns in a process that has done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def bench_memory(options, timer, way):
    """The peak of a training batch's float32 scores, forward and backward, against the loop's; on a CPU only."""
    if timer.device.type != "cpu":
        return {}
    peaks = [in_own_process(peak_of_scores, options, way, similarities, torch.get_float32_matmul_precision())
             for similarities in (cross_attention_similarities, reference_similarities)]
    if None in peaks:
        return {}
    name = f"SCAN {way}, scores of a batch of {options.step_batch}, forward and backward, float32"
    peaks = [[max(peak, mmap.PAGESIZE)] for peak in peaks]  # nothing smaller can be told
    return {f"{name}: peak extra memory (MB)": row(*peaks, 1e6)}
