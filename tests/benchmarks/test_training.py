"""The reference step: it computes the same as what it is compared with, and its floor is counted by hand."""

import torch

import benchmark
from benchmarks import training
from benchmarks.made_up import (
    made_up_model,
    made_up_vocabulary,
    make_captions,
    make_data,
)
from benchmarks.timing import Timer
from benchmarks.training import ReferenceModel, reference_batches, step_operations
from data import Loader, PrecompDataset
from tests.helpers.made import BENCHMARK


def test_the_floor_counts_a_step_s_products_and_what_captions_share_once():
    options, vocab = benchmark.parse_args(BENCHMARK), made_up_vocabulary()
    model = made_up_model(options, 5, vocab)
    captions, lengths = torch.tensor([[1, 5, 6, 2], [1, 5, 6, 2], [1, 5, 2, 0]]), [4, 4, 3]
    # By hand: words 1, 5, 6, 2; behind the first word the beginnings 1 5, 1 5 6, 1 5 6 2 and 1 5 2.
    gru = 3 * 2 * 24 * (4 * 300 + 4 * 8)
    layer, scores = 2 * 2 * 3 * 5 * 8, 3 * 2 * 3 * 3 * 8
    assert step_operations(model, (torch.zeros(3, 5), captions, lengths)) == gru + layer + scores


def test_the_reference_batches_hold_the_same_as_the_loader_s(tmp_path):
    options, vocab = benchmark.parse_args(BENCHMARK), made_up_vocabulary()
    lines = make_captions(60, benchmark.np.random.default_rng(0))
    make_data(
        str(tmp_path), lines, options.images, options.img_dim, benchmark.np.random.default_rng(1)
    )
    dataset = PrecompDataset(str(tmp_path), "train", vocab)
    ours, theirs = {}, {}
    for found, batches in (
        (ours, Loader(dataset, 10)),
        (theirs, reference_batches(dataset, vocab, 10)),
    ):
        for images, captions, lengths, _, indices in batches:
            for row, index in enumerate(torch.as_tensor(indices).tolist()):
                found[index] = (images[row].tolist(), captions[row, : int(lengths[row])].tolist())
    assert ours == theirs and len(ours) == 60


def test_the_reference_model_embeds_as_ours_does(tmp_path):
    options, vocab = benchmark.parse_args(BENCHMARK), made_up_vocabulary()
    model = made_up_model(options, 8, vocab)
    reference = ReferenceModel(model)
    reference.fc.load_state_dict(model.img_enc.fc.state_dict())
    reference.embed.load_state_dict(model.txt_enc.embed.state_dict())
    reference.rnn.load_state_dict(model.txt_enc.rnn.state_dict())
    batch = (
        torch.randn(3, 8),
        torch.tensor([[1, 5, 6, 2], [1, 5, 2, 0], [1, 2, 0, 0]]),
        torch.tensor([4, 3, 2]),
    )
    for mine, other in zip(model.forward_emb(*batch), reference(*batch)):
        assert (mine - other).abs().max() < 1e-6


def test_memory_on_coco_s_size_is_measured_on_features_that_training_takes(monkeypatch):
    for name, size in (("IMAGES", 60), ("CAPTIONS", 300), ("WIDTH", 8)):
        monkeypatch.setattr(training, f"COCO_{name}", size)
    timer = Timer(torch.device("cpu"), 1)
    options = benchmark.parse_args(BENCHMARK)
    (lines,) = training.bench_coco_memory(options, timer, made_up_vocabulary())
    memory, seconds = (line["ours"]["median"] for line in lines.values())
    assert 10 < memory < 10_000 and 0 < seconds < 60
