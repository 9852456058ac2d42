"""The SCAN benchmark: its reference computes the same as our code, and every part is measured."""

import json

import pytest
import torch

import benchmark
from benchmarks import scan
from benchmarks.made_up import made_up_vocabulary, make_captions
from benchmarks.timing import peak_extra_memory
from layers.cross_attention import cross_attention_similarities
from loss import ContrastiveLoss
from model import SCAN
from tests.helpers.made import BENCHMARK

TINY = [*BENCHMARK, "--parts", "scan", "--amp", "off", "bf16"]


@pytest.mark.parametrize("way", scan.WAYS)
def test_the_reference_scores_and_their_gradients_are_ours(way):
    opt = scan.recipe(benchmark.parse_args(TINY), way)
    vectors = scan.made_up_vectors(5, 1, 16, "cpu")
    expected, gradients = scan.both_passes(scan.reference_similarities, vectors, opt)
    scores, ours = scan.both_passes(cross_attention_similarities, vectors, opt)
    assert scores.std() > 0.01 and (scores - expected).abs().max() < 1e-5
    for mine, other in zip(ours, gradients):
        assert other.abs().max() > 0.01 and (mine - other).abs().max() < 1e-5


def test_the_reference_embeds_and_steps_as_ours_does():
    options, vocab = benchmark.parse_args(TINY), made_up_vocabulary()
    lines = make_captions(12, benchmark.np.random.default_rng(0))
    batch = scan.made_up_batch(options, lines, vocab, "cpu")
    losses = []
    for embed, similarities in (
        (SCAN.forward_emb, cross_attention_similarities),
        (scan.reference_embeddings, scan.reference_similarities),
    ):
        torch.manual_seed(1)
        opt = scan.recipe(options, "i2t Mean", len(vocab))
        model = SCAN(opt)
        for mine, other in zip(model.forward_emb(*batch)[:2], embed(model, *batch)[:2]):
            assert mine.shape == other.shape and (mine - other).abs().max() < 1e-6
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append(
            [
                scan.step(
                    model, optimizer, embed, similarities, ContrastiveLoss(options), batch, opt
                )
                for _ in range(3)
            ]
        )
    ours, reference = torch.tensor(losses)
    assert len(set(ours.tolist())) == 3 and (ours - reference).abs().max() < 1e-5


def test_a_training_batch_holds_its_captions_longest_first():
    options, vocab = benchmark.parse_args(TINY), made_up_vocabulary()
    captions = [f"w{n} w5 ." if n % 2 else f"w{n} ." for n in range(20)]
    features, ids, lengths = scan.made_up_batch(options, captions, vocab, "cpu")
    expected = [
        ["<start>", f"w{n}", ".", "<end>"] for n in range(0, 20, 2)
    ]  # every second one of the twenty
    found = [
        [vocab.words[i] for i in row[:length]]
        for row, length in zip(ids.tolist(), lengths.tolist())
    ]
    assert found == expected and features.shape == (10, 36, 8)
    _, ids, lengths = scan.made_up_batch(options, captions[:10], vocab, "cpu")
    assert (
        lengths.tolist() == [5] * 5 + [4] * 5
        and (ids[5:, 4] == 0).all()
        and (ids[:5, 4] != 0).all()
    )


def test_the_floor_counts_a_step_s_products():
    options = benchmark.parse_args([*TINY, "--step_batch", "1"])
    captions, lengths = torch.tensor([[4, 5, 5]]), torch.tensor([3])
    # By hand, for 3 words, of which 2 are different: scores 36 x 8 x 3, thrice where the pair has a
    # gradient; fc 36 x 8 x 8, twice; two GRUs' 24 x 300 a different word and 24 x 8 a word but the
    # first, thrice.
    fc_and_gru = 2 * 2304 + 3 * 2 * (2 * 24 * 300 + 2 * 24 * 8)
    assert scan.step_operations(options, captions, lengths, 3) == 2 * (3 * 864 + fc_and_gru)
    assert scan.step_operations(options, captions, lengths, 0) == 2 * (864 + fc_and_gru)


def test_only_pairs_with_a_gradient_are_counted_in_backward():
    options = benchmark.parse_args(TINY)
    lengths, scores = (
        torch.tensor([7, 5, 3]),
        torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.9, 0.1], [0.1, 0.2, 0.9]]),
    )
    assert scan.touched_words(ContrastiveLoss(options), scores, lengths) == 3 * 15
    options.max_violation = (
        True  # a term each way is above 0, 0.2 + 0.8 - 0.9, of image 0, caption 2 and their pairs
    )
    assert scan.touched_words(ContrastiveLoss(options), scores, lengths) == 7 + 3 + 3


def test_the_part_is_measured_and_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(scan.WAYS, "t2i LogSumExp")  # its own processes would take as long again
    benchmark.main([*TINY, "--json", str(tmp_path / "b.json")])
    kept, table = json.loads((tmp_path / "b.json").read_text())["parts"], capsys.readouterr().out
    batch = "scores of a batch of 10, forward and backward"
    for title in (
        f"{batch}, float32 (ms)",
        f"{batch}, float32: times their products alone",
        f"{batch}, bf16 (ms)",
        f"{batch}, float32: peak extra memory (MB)",
        "HAL, step on a loaded batch of 10, float32 (ms)",
        "max-margin, step on a loaded batch of 10, bf16 (ms)",
        "scores of 10 x 50 without gradients: times the product alone",
    ):
        if "memory" not in title or peak_extra_memory(list) is not None:
            assert f"SCAN i2t Mean, {title}" in kept and f"SCAN i2t Mean, {title}" in table
    for title, line in kept.items():
        assert title.endswith("alone") or line["reference"]["median"] > 0, title
        assert all(
            0 < spread["min"] <= spread["median"] <= spread["max"]
            for spread in line.values()
            if isinstance(spread, dict)
        )
