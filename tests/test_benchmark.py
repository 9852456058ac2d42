"""benchmark.py: that it measures what it says, on sizes that take seconds."""

import json

import pytest
import torch

import benchmark
from errors import InputError

TINY = ["--images", "12", "--img_dim", "8", "--embed_size", "8", "--batch_size", "10", "--step_batch", "10",
        "--eval_images", "10", "--repeats", "1", "--device", "cpu"]


def test_every_part_is_measured_and_kept(tmp_path, capsys):
    benchmark.main([*TINY, "--json", str(tmp_path / "b.json")])
    kept = json.loads((tmp_path / "b.json").read_text())
    table = capsys.readouterr().out
    for part in ("loader", "caption cache", "step, batch of 10, float32", "step, batch of 10, bf16", "bank exclusion",
                 "bank build", "evaluation, 10 x 50", "five folds of 2"):
        assert any(title.startswith(part) for title in kept["parts"]) and part in table
    for line in kept["parts"].values():
        assert all(spread["min"] <= spread["median"] <= spread["max"] for spread in line.values()
                   if isinstance(spread, dict))


def test_the_reference_batches_hold_the_same_as_the_loader_s(tmp_path):
    options, vocab = benchmark.parse_args(TINY), benchmark.made_up_vocabulary()
    lines = benchmark.make_captions(60, benchmark.np.random.default_rng(0))
    benchmark.make_data(str(tmp_path), lines, options.images, options.img_dim, benchmark.np.random.default_rng(1))
    dataset = benchmark.PrecompDataset(str(tmp_path), "train", vocab)
    ours, theirs = {}, {}
    for found, batches in ((ours, benchmark.Loader(dataset, 10)),
                           (theirs, benchmark.reference_batches(dataset, vocab, 10))):
        for images, captions, lengths, _, indices in batches:
            for row, index in enumerate(torch.as_tensor(indices).tolist()):
                found[index] = (images[row].tolist(), captions[row, :int(lengths[row])].tolist())
    assert ours == theirs and len(ours) == 60


def test_the_reference_model_embeds_as_ours_does(tmp_path):
    options, vocab = benchmark.parse_args(TINY), benchmark.made_up_vocabulary()
    model = benchmark.made_up_model(options, 8, vocab)
    reference = benchmark.ReferenceModel(model)
    reference.fc.load_state_dict(model.img_enc.fc.state_dict())
    reference.embed.load_state_dict(model.txt_enc.embed.state_dict())
    reference.rnn.load_state_dict(model.txt_enc.rnn.state_dict())
    batch = torch.randn(3, 8), torch.tensor([[1, 5, 6, 2], [1, 5, 2, 0], [1, 2, 0, 0]]), torch.tensor([4, 3, 2])
    for mine, other in zip(model.forward_emb(*batch), reference(*batch)):
        assert (mine - other).abs().max() < 1e-6


def test_ranks_that_differ_from_the_reference_are_noticed():
    images, captions = benchmark.made_up_embeddings(10, 8, torch.device("cpu"))
    expected, ranked = benchmark.reference_ranks(images, captions), benchmark.rank_both_ways(images, captions)
    benchmark.check_ranks(images, captions, ranked, expected)
    wrong = (ranked[0]._replace(ranks=ranked[0].ranks + 1), ranked[1])
    with pytest.raises(AssertionError):
        benchmark.check_ranks(images, captions, wrong, expected)


@pytest.mark.parametrize("flags, named", [(["--eval_images", "11"], "--eval_images"), (["--images", "1"], "--images"),
                                          (["--repeats", "0"], "--repeats"),
                                          (["--search_folder", "nowhere"], "--search_folder nowhere is not there")])
def test_sizes_that_cannot_be_are_refused(flags, named):
    with pytest.raises(InputError, match=named):
        benchmark.parse_args([*TINY, *flags])
