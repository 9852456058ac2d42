"""Size augmentation of VSE-infinity (Chen et al., CVPR 2021): words and regions are dropped."""

import torch

from inputs.word_ids import WordIds
from runtime.device import to_device

# Shares of the touched words; the others are masked.
REMOVED, REPLACED = 0.4, 0.1


def kept_regions(lengths, rate, draws):
    """Which regions `drop_regions` keeps, (B, K) bool."""
    draws = draws.masked_fill(torch.arange(draws.shape[1]) >= lengths.unsqueeze(1), -1)
    return (draws >= rate) | (draws == draws.amax(1, keepdim=True))


def drop_regions(images, lengths, rate, draws):
    """Leave out each region with probability `rate`: images (B, K, D) -> (B, K', D).

    The order is kept, and so is at least one region of each image. Images are padded with zero rows
    to the longest.
    lengths: (B,) regions of each image; draws: (B, K), uniform in [0, 1). Both are on the CPU, so
    that it never waits for a GPU.
    VSE-infinity draws with NumPy, so results agree with its code in distribution only.
    """
    kept, places = kept_regions(lengths, rate, draws), torch.arange(images.shape[1])
    left = kept.sum(1, keepdim=True)
    order = kept.byte().sort(dim=1, descending=True, stable=True).indices[:, : int(left.max())]
    gone = (places[: order.shape[1]] >= left).unsqueeze(2)
    item = torch.arange(len(images)).unsqueeze(1)
    item, order, gone = (to_device(indices, images.device) for indices in (item, order, gone))
    return images[item, order].masked_fill_(gone, 0)


def drop_words(captions, rate, vocab_size, mask_id, generator):
    """Drop, mask or replace each word with probability `rate`: WordIds -> WordIds, on the CPU.

    <start> and <end> count as words. Half of the touched words become `mask_id`, a tenth any id
    below `vocab_size`; the others are removed, except for one word if a caption would lose all.
    generator: for the draws. The released code draws with Python's `random`, so results agree with
    it in distribution only.
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
