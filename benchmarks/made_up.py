"""The data, vocabularies, embeddings and models that the benchmarks make up."""

import argparse
import os
from collections import Counter

import numpy as np
import torch

from features.files import CAPTIONS_PER_IMAGE
from inputs.captions import read_captions
from inputs.tokenizer import SPECIAL_WORDS, tokenize
from model import VSE, l2norm
from runtime.errors import InputError
from vocab import vocabulary_of

WORDS = 3000  # different words of the made-up captions


def make_captions(n, rng):
    """n captions of 8 to 15 made-up words, about COCO's length, and a full stop."""
    return [
        " ".join(f"w{word}" for word in rng.zipf(1.3, rng.integers(8, 16)) % WORDS) + " ."
        for _ in range(n)
    ]


def make_data(folder, lines, images, width, rng):
    """Write a `train` split of made-up features and the given captions."""
    features = np.lib.format.open_memmap(
        os.path.join(folder, "train_ims.npy"), "w+", np.float32, (images, width)
    )
    for start in range(0, images, 4096):
        block = features[start : start + 4096]
        block[:] = rng.standard_normal(block.shape, np.float32)
    features.flush()
    with open(os.path.join(folder, "train_caps.txt"), "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def made_up_vocabulary():
    """A Vocabulary of the special words and all words of `make_captions`."""
    return vocabulary_of([*SPECIAL_WORDS, ".", *(f"w{word}" for word in range(WORDS))])


def made_up_embeddings(images, size, device):
    """L2-normalised embeddings of images (N, D) and of captions (5N, D) near them."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(images, size, generator=generator)
    captions = base.repeat_interleave(CAPTIONS_PER_IMAGE, 0) + 4 * torch.randn(
        images * CAPTIONS_PER_IMAGE, size, generator=generator
    )
    return l2norm(base).to(device), l2norm(captions).to(device)


def captions_and_words(options, rng):
    """The training set's captions, made up or those of --captions, and their Vocabulary."""
    count = options.images * options.captions_per_image
    if not options.captions:
        return make_captions(count, rng), made_up_vocabulary()
    captions = read_captions(options.captions)[:count]
    if len(captions) < count:
        raise InputError(
            f"--captions {options.captions} has {len(captions)} captions, {count} are needed: give "
            "fewer --images"
        )
    words = Counter(word for caption in captions for word in tokenize(caption))
    return captions, vocabulary_of([*SPECIAL_WORDS, *(word for word in words if words[word] >= 4)])


def made_up_model(options, width, vocab):
    """A VSE for the made-up data."""
    torch.manual_seed(0)
    return VSE(
        argparse.Namespace(
            data_name="made_precomp",
            img_dim=width,
            embed_size=options.embed_size,
            word_dim=300,
            num_layers=1,
            vocab_size=len(vocab),
            use_abs=False,
            no_imgnorm=False,
            finetune=False,
            cnn_type="vgg19",
        )
    )
