"""benchmark.py's part "scan": scores and training steps over regions, against a loop over captions.

The reference takes one caption at a time and computes every attended context, as in the equations
of SCAN (Lee et al., ECCV 2018). Both sides use float32 products of the kind that the run has
chosen. A floor is the time of the large products alone, over real words only: for scores it is
measured in turn with them, for a step it follows from the speed of one product.
"""

import argparse
import copy
import mmap
from functools import partial
from statistics import median

import torch
from torch.nn.functional import leaky_relu
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.timing import (
    Timer,
    gru_operations,
    in_own_process,
    peak_extra_memory,
    ratio,
    row,
    say,
    watched,
)
from features.files import CAPTIONS_PER_IMAGE
from inputs.word_ids import by_length, number_words
from layers.cross_attention import EPS, SLOPE, cross_attention_similarities
from loss import ContrastiveLoss
from model import SCAN, l2norm
from retrieval.ranking import Tiles
from retrieval.similarity import CrossAttention, Words, packed

REGIONS = 36  # of an image, in the usual feature files
FEWEST_WORDS, MOST_WORDS = 8, 19  # of a made-up caption of vectors
WORD_DIM = 300
LOOPED = 10  # captions of each tile that the loop is timed on; all would take minutes
SHARD = 128  # images that the loop takes at once

WAYS = {  # SCAN's recipes for Flickr30k
    "t2i LogSumExp": {
        "cross_attn": "t2i",
        "agg_func": "LogSumExp",
        "lambda_lse": 6.0,
        "lambda_softmax": 9.0,
    },
    "i2t Mean": {"cross_attn": "i2t", "agg_func": "Mean", "lambda_softmax": 4.0},
}
KINDS = {"off": ("float32", torch.float32), "bf16": ("bf16", torch.bfloat16)}  # --amp's

# Data -------------------------------------------------------------------------------------------


def recipe(options, way, vocab_size=0, amp="off"):
    """The options of a SCAN model and its scores, for one of WAYS."""
    return argparse.Namespace(
        img_dim=options.img_dim,
        embed_size=options.embed_size,
        word_dim=WORD_DIM,
        num_layers=1,
        vocab_size=vocab_size,
        bi_gru=True,
        precomp_enc_type="basic",
        no_imgnorm=False,
        no_txtnorm=False,
        raw_feature_norm="clipped_l2norm",
        amp=amp,
        **WAYS[way],
    )


def made_up_vectors(images, each, size, device):
    """L2-normalised regions (n, 36, D), words (C, 19, D) near them, and captions' lengths (C,).

    each: captions of an image.
    """
    generator = torch.Generator().manual_seed(4)
    regions = torch.randn(images, REGIONS, size, generator=generator)
    words = torch.randn(images * each, MOST_WORDS, size, generator=generator).mul_(4)
    words += regions[:, :MOST_WORDS].repeat_interleave(each, 0)
    lengths = torch.randint(FEWEST_WORDS, MOST_WORDS + 1, (len(words),), generator=generator)
    return l2norm(regions, -1, EPS).to(device), l2norm(words, -1, EPS).to(device), lengths


def made_up_batch(options, captions, vocab, device):
    """A loaded training batch, longest caption first.

    Features (B, 36, img_dim), word ids (B, T) and lengths (B,).
    """
    # Every so many captions: those of one image would be more alike than a real batch's.
    spread_out = captions[:: len(captions) // options.step_batch][: options.step_batch]
    numbered = number_words(spread_out, vocab)
    order = by_length(numbered.lengths)
    lengths = numbered.lengths[order]
    features = torch.randn(
        len(order), REGIONS, options.img_dim, generator=torch.Generator().manual_seed(5)
    )
    return features.to(device), numbered.padded(order, int(lengths[0])).to(device), lengths


# The reference ----------------------------------------------------------------------------------


def reference_attention(queries, contexts, smooth):
    """Queries (n, Q, D), contexts (n, K, D) -> attended contexts (n, Q, D), by clipped_l2norm."""
    scores = leaky_relu(torch.bmm(contexts, queries.transpose(1, 2)), SLOPE)
    scores = scores / (scores.pow(2).sum(2, keepdim=True).sqrt() + EPS)
    weights = (smooth * scores.transpose(1, 2).contiguous()).softmax(2)
    return torch.bmm(weights, contexts)


def reference_similarities(images, words, lengths, opt):
    """As `cross_attention_similarities`: (I, R, D), (C, T, D), (C,) -> (I, C).

    For raw_feature_norm clipped_l2norm and agg_func LogSumExp or Mean.
    """
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
    """As `SCAN.forward_emb`, by PyTorch's own GRU over packed captions."""
    packed = pack_padded_sequence(model.txt_enc.embed(captions), lengths, batch_first=True)
    states = pad_packed_sequence(model.txt_enc.rnn(packed)[0], batch_first=True)[0]
    ahead, back = states.chunk(2, 2)
    return (
        l2norm(model.img_enc.fc(features), -1, EPS),
        l2norm((ahead + back) / 2, -1, EPS),
        lengths,
    )


# Parts ------------------------------------------------------------------------------------------


def bench_scan(options, timer, captions, vocab, speeds):
    """Yield the part's lines, {title: line}."""
    batch = made_up_batch(options, captions, vocab, timer.device)
    for way in WAYS:
        say(f"  {way}: scores of a batch")
        yield bench_scores(options, timer, way)
        yield bench_memory(options, timer, way)
        say(f"  {way}: training steps")
        yield from bench_step(
            options, Timer(timer.device, min(timer.repeats, 3)), batch, len(vocab), way, speeds
        )
        say(f"  {way}: scores of a split")
        yield bench_all_scores(options, timer, way)


def both_passes(similarities, vectors, opt):
    """(Scores of regions and words, both gradients); every score has a gradient."""
    regions, words, lengths = vectors
    leaves = [regions.detach().requires_grad_(), words.detach().requires_grad_()]
    scores = similarities(*leaves, lengths, opt)
    return scores, torch.autograd.grad(scores, leaves, scores.detach())


def real_words(words, lengths):
    """(C, T, D), (C,) -> (words, D), without padding."""
    return words[(torch.arange(words.shape[1]) < lengths.unsqueeze(1)).to(words.device)]


def both_passes_products(regions, words):
    """The three products that scores and their gradients need at least."""
    scores = regions @ words.t()
    scores @ words, scores.t() @ regions


def bench_scores(options, timer, way):
    """Time a batch's scores, forward and backward, with each --amp, against the float32 loop."""
    vectors = made_up_vectors(options.step_batch, 1, options.embed_size, timer.device)
    ours, alone = [], []
    for amp in options.amp:
        both = vectors[0].flatten(0, 1), real_words(*vectors[1:])
        ours.append(
            partial(
                both_passes, cross_attention_similarities, vectors, recipe(options, way, amp=amp)
            )
        )
        alone.append(partial(both_passes_products, *(x.to(KINDS[amp][1]) for x in both)))
    loop = partial(both_passes, reference_similarities, vectors, recipe(options, way))
    *times, loop_times = timer.turns(*ours, *alone, loop)
    lines = {}
    for amp, own, floor in zip(options.amp, times, times[len(ours) :]):
        name = (
            f"SCAN {way}, scores of a batch of {options.step_batch}, forward and backward, "
            f"{KINDS[amp][0]}"
        )
        lines[f"{name} (ms)"] = row(own, loop_times, 1e-3, median(floor))
        lines[f"{name}: times their products alone"] = {"ours": ratio(own, floor)}
    return lines


def step(model, optimizer, embed, similarities, criterion, batch, opt):
    """One training step as in train.py, on a loaded batch; returns the loss."""
    model.amp = opt.amp == "bf16"
    loss = criterion.of_similarities(similarities(*embed(model, *batch), opt), None, None)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
    optimizer.step()
    return loss.detach()


def step_operations(options, captions, lengths, touched):
    """Operations of a step's products, forward and backward, on a batch (B, T).

    touched: words of those of the B x B pairs whose scores have a gradient.
    """
    size, rows = options.embed_size, options.step_batch * REGIONS
    scores = 2 * rows * int(lengths.sum()) * size + 2 * 2 * REGIONS * touched * size
    fc = 2 * 2 * rows * options.img_dim * size  # features need no gradients
    place = torch.arange(captions.shape[1])
    mirrored = torch.where(
        place < lengths.unsqueeze(1), lengths.unsqueeze(1) - 1 - place, place
    ).to(captions.device)
    gru = sum(
        gru_operations(words, lengths, WORD_DIM, size)
        for words in (captions, captions.gather(1, mirrored))
    )
    return scores + fc + gru


def touched_words(criterion, scores, lengths):
    """Words of all pairs whose scores (B, B) have a gradient; with max-margin, these are few."""
    scores = scores.detach().requires_grad_()
    (grad,) = torch.autograd.grad(criterion.of_similarities(scores, None, None), scores)
    return int(((grad != 0).sum(0).cpu() * lengths).sum())


def models_of_step(opt, device):
    """(Model, optimizer, how it embeds): ours, and the reference's, with the same weights."""
    torch.manual_seed(0)
    model = SCAN(opt).to(device)
    plain = copy.deepcopy(model)
    plain.txt_enc.rnn.flatten_parameters()  # a copy's are not
    fused = torch.optim.Adam(model.parameters(), lr=2e-4, fused=device.type in ("cpu", "cuda"))
    single = torch.optim.Adam(plain.parameters(), lr=2e-4, foreach=False)
    return (model, fused, SCAN.forward_emb), (plain, single, reference_embeddings)


def bench_step(options, timer, batch, vocab_size, way, speeds):
    """Time training steps with each --amp against the plain one in float32; yields {title: line}.

    Once with HAL and once with max-margin, which leaves most scores without a gradient.
    """
    ours, reference = models_of_step(recipe(options, way, vocab_size), timer.device)
    opt = recipe(options, way)
    with torch.no_grad():
        scores = cross_attention_similarities(*ours[0].forward_emb(*batch), opt)
    for loss in ("HAL", "max-margin"):
        criterion = ContrastiveLoss(
            argparse.Namespace(**{**vars(options), "max_violation": loss == "max-margin"})
        )
        steps = [
            partial(
                step,
                *ours,
                cross_attention_similarities,
                criterion,
                batch,
                recipe(options, way, amp=amp),
            )
            for amp in options.amp
        ]
        floor = step_operations(options, *batch[1:], touched_words(criterion, scores, batch[2]))
        *times, plain_times = timer.turns(
            *steps, partial(step, *reference, reference_similarities, criterion, batch, opt)
        )
        name = f"SCAN {way}, {loss}, step on a loaded batch of {options.step_batch}"
        yield {
            f"{name}, {KINDS[amp][0]} (ms)": row(
                own,
                plain_times,
                1e-3,
                floor / speeds["operations_per_second"] if amp == "off" else None,
            )
            for amp, own in zip(options.amp, times)
        }


def bench_all_scores(options, timer, way):
    """Time a split's scores as evaluation computes them, against the loop and one product.

    A round is one column of tiles, that is some captions with all images, scaled to all captions.
    The loop takes LOOPED captions of each.
    """
    n_images = min(options.eval_images)
    regions, words, lengths = made_up_vectors(
        n_images, CAPTIONS_PER_IMAGE, options.embed_size, timer.device
    )
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
    for block in watched([0, *range(tiles.count)]):  # the first twice, to warm up
        captions = torch.arange(len(words))[tiles.caption_rows[block]]
        vectors, some = real_words(words[captions], lengths[captions]), captions[:LOOPED]
        calls = (
            (partial(ours, block), len(captions)),
            (partial(loop, some), len(some)),
            (partial(product, vectors), len(captions)),
        )
        rounds.append([timer.seconds(call) * len(words) / count for call, count in calls])
    own, loop_times, alone = zip(*rounds[1:])
    name = f"SCAN {way}, scores of {n_images} x {len(words)} without gradients"
    return {
        f"{name} (s; reference: {LOOPED} captions of each tile, scaled)": row(
            own, loop_times, 1, median(alone)
        ),
        f"{name}: times the product alone": {"ours": ratio(own, alone)},
    }


def peak_of_scores(options, way, similarities, precision):
    """Peak extra memory, in bytes, of a training batch's scores, forward and backward."""
    torch.set_float32_matmul_precision(precision)
    opt, vectors = (
        recipe(options, way),
        made_up_vectors(options.step_batch, 1, options.embed_size, "cpu"),
    )
    both_passes(similarities, [part[:2] for part in vectors], opt)  # loads what is loaded once
    return peak_extra_memory(partial(both_passes, similarities, vectors, opt))


def bench_memory(options, timer, way):
    """Measure the peak memory of a batch's float32 scores against the loop's; on a CPU only."""
    if timer.device.type != "cpu":
        return {}
    peaks = [
        in_own_process(
            peak_of_scores, options, way, similarities, torch.get_float32_matmul_precision()
        )
        for similarities in (cross_attention_similarities, reference_similarities)
    ]
    if None in peaks:
        return {}
    name = f"SCAN {way}, scores of a batch of {options.step_batch}, forward and backward, float32"
    peaks = [[max(peak, mmap.PAGESIZE)] for peak in peaks]  # no less than a page can be measured
    return {f"{name}: peak extra memory (MB)": row(*peaks, 1e6)}
