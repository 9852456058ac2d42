"""The SCAN model against the released code's numbers."""

from argparse import Namespace

import pytest
import torch
from conftest import REFERENCE, states_equal

import cross_attention
import scan
from cross_attention import cross_attention_similarities
from errors import InputError
from loss import max_margin_loss, sum_margin_loss
from scan import SCAN, CrossAttention, Words

RELEASED = REFERENCE / "scan"
ENCODERS = torch.load(RELEASED / "encoders.pt", weights_only=True)
TRAJECTORIES = ("t2i_lse", "t2i_avg", "i2t_lse", "i2t_avg", "i2t_lse_coco", "t2i_sum_plain")
BATCHES = torch.load(RELEASED / "trajectory_batches.pt", weights_only=True)


def trajectory(name):
    return torch.load(RELEASED / f"trajectory_{name}.pt", weights_only=True)


def options(**changes):
    """The options of a small model and its scores."""
    return Namespace(**{"img_dim": 5, "embed_size": 4, "precomp_enc_type": "basic", "no_imgnorm": False,
                        "vocab_size": 9, "word_dim": 3, "num_layers": 1, "bi_gru": True, "no_txtnorm": False,
                        "cross_attn": "t2i", "raw_feature_norm": "clipped_l2norm", "agg_func": "LogSumExp",
                        "lambda_lse": 6.0, "lambda_softmax": 9.0, **changes})


# Against the released code ----------------------------------------------------------------------

@pytest.mark.parametrize("case", ENCODERS, ids=[str(number) for number in range(len(ENCODERS))])
def test_the_encoders_equal_the_released_code_s(case):
    opt = Namespace(**case["options"])
    torch.manual_seed(31)
    model = SCAN(opt)
    states = [case["image_state"], case["text_state"]]
    assert states_equal([model.img_enc.state_dict(), model.txt_enc.state_dict()], states)
    assert [list(model.img_enc.state_dict()), list(model.txt_enc.state_dict())] == [list(state) for state in states]
    regions, words, lengths = model.forward_emb(case["images"], case["captions"], case["lengths"])
    assert (regions - case["image_embeddings"]).abs().max() < 1e-6
    assert (words - case["caption_embeddings"]).abs().max() < 1e-6
    assert lengths == case["returned_lengths"]
    model.double()
    assert (model.embed_images(case["images"].double()) - case["image_embeddings_float64"]).abs().max() < 1e-10
    words = model.embed_captions(case["captions"], case["lengths"])
    assert (words - case["caption_embeddings_float64"]).abs().max() < 1e-10


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_training_walks_the_released_path(name):
    path = trajectory(name)
    opt = Namespace(**path["options"])
    torch.manual_seed(31)
    model = SCAN(opt)
    assert states_equal([model.img_enc.state_dict(), model.txt_enc.state_dict()], path["initial"])
    model.double().train_start()
    criterion = max_margin_loss if opt.max_violation else sum_margin_loss
    optimizer = torch.optim.Adam(model.parameters(), lr=opt.learning_rate)
    losses = []
    for batch in BATCHES:
        embeddings = model.forward_emb(batch["images"].double(), batch["captions"], batch["lengths"])
        value = criterion(cross_attention_similarities(*embeddings, opt), opt.margin)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), opt.grad_clip)
        optimizer.step()
        losses.append(value.item())
    assert losses == pytest.approx(path["losses_float64"], rel=1e-9)
    assert all((mine[key] - theirs[key]).abs().max() < 1e-9 for mine, theirs in
               zip([model.img_enc.state_dict(), model.txt_enc.state_dict()], path["final_float64"]) for key in theirs)


# Parts ------------------------------------------------------------------------------------------

def test_the_family_s_names_are_importable_from_here():
    for name in ("func_attention", "xattn_score_t2i", "xattn_score_i2t", "shard_xattn_t2i", "shard_xattn_i2t"):
        assert getattr(scan, name) is getattr(cross_attention, name)


def captions_of(lengths):
    captions = torch.randint(1, 9, (len(lengths), max(lengths)))
    return captions * (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1))


@pytest.mark.parametrize("precomp_enc_type", ["basic", "weight_norm"])
def test_a_region_of_zeros_gives_finite_gradients(precomp_enc_type):
    """Of moderate size, too: clipping scales by the whole gradient's length."""
    torch.manual_seed(0)
    model = SCAN(options(precomp_enc_type=precomp_enc_type))
    images = torch.randn(3, 4, 5)
    images[1, 2:] = 0
    embeddings = model.forward_emb(images, captions_of([4, 3, 2]), [4, 3, 2])
    max_margin_loss(cross_attention_similarities(*embeddings, options())).backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0) < 1e4


def test_the_released_list_of_states_loads_with_a_one_number_vector_and_keys_of_other_encoders():
    source, target = SCAN(options(precomp_enc_type="weight_norm")), SCAN(options(precomp_enc_type="weight_norm"))
    image_state = {**source.img_enc.state_dict(), "cnn.weight": torch.zeros(1)}
    image_state["fc.weight_g"] = image_state["fc.weight_g"].view(1)  # as PyTorch 0.3 kept it
    target.load_state_dict([image_state, source.txt_enc.state_dict()])
    assert states_equal([source.state_dict()], [target.state_dict()])


def test_embedding_without_gradients_equals_the_batch_s():
    torch.manual_seed(0)
    model = SCAN(options())
    images, captions, lengths = torch.randn(3, 4, 5), captions_of([5, 4, 1]), [5, 4, 1]
    regions, words, same = model(images, captions, lengths)
    assert regions.shape == (3, 4, 4) and words.shape == (3, 5, 4) and same is lengths
    assert regions.requires_grad and words.requires_grad and words[2, 1:].eq(0).all()
    assert torch.equal(model.embed_images(images), regions) and torch.equal(model.embed_captions(captions, lengths),
                                                                            words)
    assert not model.embed_images(images).requires_grad and not model.embed_captions(captions, lengths).requires_grad
    model.val_start()
    assert not model.training


def test_bf16_is_near_and_gives_float32():
    torch.manual_seed(0)
    model = SCAN(options(amp="bf16", embed_size=32))
    images, captions, lengths = torch.randn(3, 4, 5), captions_of([5, 4, 1]), [5, 4, 1]
    near = model.forward_emb(images, captions, lengths)[:2]
    model.amp = False
    for a, b in zip(near, model.forward_emb(images, captions, lengths)):
        assert a.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.03


@pytest.mark.parametrize("images", [[0, 0, 0, 1], [0, 1, 2, 3]], ids=["by image", "by caption"])
def test_equal_captions_make_equal_pairs(images):
    """Captions 0, 2 and 5 are one; to the bit, wherever they stand beside others."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(40, 32, generator=generator)
    words = Words(vectors, torch.tensor([7, 0, 7, 20, 30, 7]), torch.tensor([5, 7, 5, 5, 5, 5]))
    source = CrossAttention(torch.randn(4, 9, 32, generator=generator), words, options())
    numbers = torch.tensor(images)
    first, second, third = (source.pairs(numbers, torch.tensor(captions)) for captions in (
        [0, 1, 3, 4], [2, 1, 5, 0], [5, 3, 0, 2]))
    alike = [source.pairs(numbers, torch.full((4,), caption)) for caption in (0, 2, 5)]
    assert torch.equal(alike[0], alike[1]) and torch.equal(alike[0], alike[2])
    expected = torch.stack([source.of(source.images[i:i + 1], words[c:c + 1]).squeeze() for i, c in zip(
        images * 3, [0, 1, 3, 4, 2, 1, 5, 0, 5, 3, 0, 2])])
    assert torch.allclose(torch.cat((first, second, third)), expected, atol=1e-6)


def test_an_image_encoder_that_is_none_is_refused():
    with pytest.raises(InputError, match="--precomp_enc_type is deep: choose one of basic, weight_norm"):
        SCAN(options(precomp_enc_type="deep"))
