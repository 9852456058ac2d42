"""The encoders against the released codes' numbers, and the full image encoder with random CNNs."""

import math
from argparse import Namespace

import pytest
import torch

import compute_results
import loss
import model
import train
from layers import cross_attention
from layers.cross_attention import cross_attention_similarities
from loss import ContrastiveLoss, cosine_sim, max_margin_loss, order_sim, sum_margin_loss
from model import (
    SCAN,
    TEXT_ENCODERS,
    VSE,
    EncoderImage,
    EncoderImageFull,
    EncoderImagePrecomp,
    EncoderText,
    l2norm,
)
from runtime.errors import InputError
from tests.helpers import loops
from tests.helpers.made import REFERENCE, TINY, load, states_equal

ENCODERS = torch.load(REFERENCE / "encoders.pt", weights_only=True)

TRAJECTORIES = ("local", "local_order", "global", "max", "sum")


def trajectory(name):
    return torch.load(REFERENCE / f"trajectory_{name}.pt", weights_only=True)


def options(**changes):
    return Namespace(
        **{
            "data_name": "tiny_precomp",
            "img_dim": 5,
            "embed_size": 4,
            "finetune": False,
            "cnn_type": "vgg19",
            "use_abs": False,
            "no_imgnorm": False,
            "vocab_size": 9,
            "word_dim": 3,
            "num_layers": 1,
            **changes,
        }
    )


# Against the released code ----------------------------------------------------------------------


@pytest.mark.parametrize("case", ENCODERS, ids=["plain", "two layers", "absolute values"])
def test_text_embeddings_equal_the_released_code_s(case):
    state = case["text_state"]
    vocab_size, word_dim = state["embed.weight"].shape
    encoder = EncoderText(
        vocab_size,
        word_dim,
        state["rnn.weight_hh_l0"].shape[1],
        case["num_layers"],
        use_abs=case["use_abs"],
    )
    assert encoder.state_dict().keys() == state.keys()
    encoder.load_state_dict(state)
    found = encoder(case["captions"], case["lengths"])
    assert (found - case["caption_embeddings"]).abs().max() < 1e-6


@pytest.mark.parametrize("case", ENCODERS, ids=["plain", "two layers", "absolute values"])
def test_image_embeddings_equal_the_released_code_s(case):
    state = case["image_state"]
    encoder = EncoderImagePrecomp(
        state["fc.weight"].shape[1],
        state["fc.weight"].shape[0],
        use_abs=case["use_abs"],
        no_imgnorm=case["no_imgnorm"],
    )
    assert encoder.state_dict().keys() == state.keys()
    encoder.load_state_dict(state)
    assert (encoder(case["images"]) - case["image_embeddings"]).abs().max() < 1e-6


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_one_seed_gives_the_released_initial_weights(name):
    path = trajectory(name)
    torch.manual_seed(31)
    vse = VSE(Namespace(**path["options"]))
    assert states_equal([vse.img_enc.state_dict(), vse.txt_enc.state_dict()], path["initial_state"])


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_training_walks_the_released_path(name):
    path = trajectory(name)
    opt = Namespace(**path["options"])
    vse, criterion = VSE(opt), ContrastiveLoss(opt)
    vse.load_state_dict(path["initial_state"])
    optimizer = torch.optim.Adam(vse.parameters(), lr=opt.learning_rate)
    bank = path["bank"] or dict.fromkeys(("image_embeddings", "caption_embeddings", "indices"))
    losses = []
    vse.train_start()
    for batch in path["batches"]:
        embeddings = vse.forward_emb(batch["images"], batch["captions"], batch["lengths"])
        value = criterion(
            *embeddings,
            bank["image_embeddings"],
            bank["caption_embeddings"],
            bank["indices"],
            batch["indices"],
        )
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(vse.parameters(), opt.grad_clip)
        optimizer.step()
        losses.append(value.item())
    assert losses == pytest.approx(path["losses"], rel=1e-5, abs=1e-9)
    assert all(
        (mine[key] - theirs[key]).abs().max() < 1e-4
        for mine, theirs in zip(
            [vse.img_enc.state_dict(), vse.txt_enc.state_dict()], path["final_state"]
        )
        for key in theirs
    )


# Against VSE-infinity ---------------------------------------------------------------------------

VSE_INFINITY = {
    name: torch.load(REFERENCE / "vse_infty" / f"{name}.pt", weights_only=True)
    for name in ("image_encoder", "text_encoder", "trajectory")
}

REGIONS, PATHS = VSE_INFINITY["image_encoder"], VSE_INFINITY["trajectory"]

WORDS = pytest.mark.parametrize(
    "case", VSE_INFINITY["text_encoder"], ids=["one layer", "two layers"]
)

INFINITY_PARTS = {
    "precomp_enc_type": "mlp",
    "image_pooling": "gpo",
    "text_pooling": "gpo",
    "bi_gru": True,
}


def regions_encoder(no_imgnorm=False):
    encoder = EncoderImage(
        "x_precomp",
        REGIONS["options"]["img_dim"],
        REGIONS["options"]["embed_size"],
        no_imgnorm=no_imgnorm,
        image_pooling="gpo",
        precomp_enc_type="mlp",
    )
    encoder.load_state_dict(REGIONS["state"])
    return encoder.double()


def words_encoder(case, no_txtnorm=False):
    opt = case["options"]
    return EncoderText(
        opt["vocab_size"],
        opt["word_dim"],
        opt["embed_size"],
        case["num_layers"],
        text_pooling="gpo",
        bi_gru=True,
        no_txtnorm=no_txtnorm,
    )


def infinity_options(**changes):
    return options(**{**PATHS["options"], **INFINITY_PARTS, **changes})


def close(found, expected, bound=1e-10):
    return found.shape == expected.shape and (found - expected).abs().max() < bound


def buffers_equal(encoder, expected):
    return all(
        close(dict(encoder.named_buffers())[name].double(), value.double())
        for name, value in expected.items()
    )


def gradients_equal(module, expected, bound=1e-9):
    found = dict(module.named_parameters())
    return all(
        close(found[name].grad, value.double(), bound * max(1, value.abs().max()))
        for name, value in expected.items()
    )


def test_one_seed_draws_vse_infinity_s_encoders():
    torch.manual_seed(REGIONS["options"]["seed"])
    encoder = EncoderImage(
        "x_precomp",
        REGIONS["options"]["img_dim"],
        REGIONS["options"]["embed_size"],
        image_pooling="gpo",
        precomp_enc_type="mlp",
    )
    assert list(encoder.state_dict()) == list(REGIONS["state"])
    assert states_equal([encoder.state_dict()], [REGIONS["state"]])


@WORDS
def test_one_seed_draws_vse_infinity_s_text_encoder(case):
    torch.manual_seed(case["options"]["seed"])
    state = words_encoder(case).state_dict()
    assert list(state) == list(case["state"]) and states_equal([state], [case["state"]])


def test_one_seed_draws_vse_infinity_s_model():
    torch.manual_seed(PATHS["options"]["seed"])
    vse = VSE(infinity_options())
    assert states_equal(
        [vse.img_enc.state_dict(), vse.txt_enc.state_dict()], PATHS["initial_state"]
    )


@pytest.mark.parametrize(
    "no_imgnorm, images", [(False, "full"), (False, "varied"), (True, "varied")]
)
def test_region_embeddings_equal_vse_infinity_s(no_imgnorm, images):
    expected = REGIONS[f"eval_{images}{'_no_imgnorm' * no_imgnorm}"]
    assert close(regions_encoder(no_imgnorm).eval()(REGIONS[f"images_{images}"]), expected)


def test_both_ways_of_a_region_equal_vse_infinity_s():
    encoder, regions = regions_encoder().eval(), REGIONS["images_full"]
    assert close(encoder.fc(regions), REGIONS["eval_full_fc"]) and close(
        encoder.mlp(regions), REGIONS["eval_full_mlp"]
    )


def test_training_s_statistics_and_gradients_equal_vse_infinity_s():
    encoder = regions_encoder()
    for step in REGIONS["train_steps"]:
        encoder.zero_grad()
        embeddings = encoder(REGIONS[step["images"]])
        (embeddings * REGIONS["projection"]).sum().backward()
        assert close(embeddings, step["embeddings"]) and buffers_equal(encoder, step["buffers"])
        assert gradients_equal(encoder, step["grad_state"])
        assert [name for name, p in encoder.named_parameters() if p.grad is None] == step[
            "without_gradient"
        ]
    encoder.eval()
    assert close(encoder(REGIONS["images_full"]), REGIONS["eval_full_after"])
    assert close(encoder(REGIONS["images_varied"]), REGIONS["eval_varied_after"])


@pytest.mark.parametrize("padding, name", [(0, "varied_first"), (4, "varied_first_4_more_padding")])
def test_padding_counts_in_training_s_statistics_alone(padding, name):
    encoder = regions_encoder()
    images = torch.nn.functional.pad(REGIONS["images_varied"], (0, 0, 0, padding))
    assert close(encoder.eval()(images), REGIONS["eval_varied"])
    assert close(encoder.train()(images), REGIONS[f"train_{name}"])
    assert buffers_equal(encoder, REGIONS[f"buffers_{name}"])


def test_the_norm_s_epsilon_is_added_to_the_length():
    reference = REGIONS["l2norm"]
    rows = reference["input"].clone().requires_grad_()
    found = l2norm(rows, eps=reference["eps"])
    (found * reference["projection"]).sum().backward()
    assert close(found, reference["output"], 1e-12)
    for row, mine, theirs in zip(reference["input"], rows.grad, reference["grad_input"]):
        if row.any():
            assert (mine - theirs).abs().max() < 1e-7 * theirs.abs().max()
        else:  # NaN there
            assert mine.isfinite().all()


@WORDS
@pytest.mark.parametrize("training", [False, True])
def test_word_pooled_embeddings_equal_vse_infinity_s(case, training):
    for no_txtnorm, name in ((False, "embeddings"), (True, "embeddings_no_txtnorm")):
        encoder = words_encoder(case, no_txtnorm).train(training)
        encoder.load_state_dict(case["state"])
        assert close(encoder.double()(case["captions"], case["lengths"]), case[name])
    assert close(
        encoder.gpool.pool_weights(torch.tensor(case["lengths"]), 10), case["pool_weights"]
    )


@WORDS
def test_word_pooled_gradients_equal_vse_infinity_s(case):
    encoder = words_encoder(case)
    encoder.load_state_dict(case["state"])
    (encoder.double()(case["captions"], case["lengths"]) * case["projection"]).sum().backward()
    assert gradients_equal(encoder, case["grad_state"], 1e-7)  # stored in float32


@pytest.mark.parametrize("name", PATHS["runs"])
def test_training_in_float64_walks_vse_infinity_s_path(name):
    run, steps = PATHS["runs"][name], []
    opt = infinity_options(**run["options"])
    vse = VSE(opt)
    vse.load_state_dict(PATHS["initial_state"])
    vse.double()
    optimizer = torch.optim.AdamW(
        vse.parameters(), weight_decay=PATHS["optimizer"]["groups"][0]["weight_decay"]
    )
    vse.train_start()
    for step in range(len(run["losses"])):
        epoch, place = divmod(step, run["steps_per_epoch"])
        optimizer.param_groups[0]["lr"] = opt.learning_rate * (0.1 if epoch >= opt.lr_update else 1)
        hardest = opt.max_violation or epoch >= opt.vse_mean_warmup_epochs
        batch = run["batches"][place]
        images, captions = vse.forward_emb(
            batch["images"].double(), batch["captions"], batch["lengths"]
        )
        value = (loss.max_margin_loss if hardest else loss.sum_margin_loss)(
            images @ captions.t(), opt.margin
        )
        optimizer.zero_grad()
        value.backward()
        steps.append(
            (value.item(), torch.nn.utils.clip_grad_norm_(vse.parameters(), opt.grad_clip).item())
        )
        optimizer.step()
    losses, norms = zip(*steps)
    assert losses == pytest.approx(run["losses"], rel=1e-9)
    assert norms == pytest.approx(run["gradient_norms"], rel=1e-7)
    assert all(
        close(mine[key].double(), value.double(), 1e-6)
        for mine, theirs in zip(
            [vse.img_enc.state_dict(), vse.txt_enc.state_dict()], run["final_state"]
        )
        for key, value in theirs.items()
    )
    vse.val_start()
    batch = run["batches"][0]
    images, captions = vse.forward_emb(
        batch["images"].double(), batch["captions"], batch["lengths"]
    )
    assert close(images, run["final_eval_image_embeddings"], 1e-9)
    assert close(captions, run["final_eval_caption_embeddings"], 1e-9)


# Regions and words, pooled ----------------------------------------------------------------------


def regions(lengths, longest, width=5):
    drawn = torch.randn(
        len(lengths), longest, width, generator=torch.Generator().manual_seed(9)
    ).double()
    return drawn.masked_fill(
        (torch.arange(longest) >= torch.tensor(lengths).unsqueeze(1)).unsqueeze(2), 0
    )


def pooled_loop(name, rows):
    """mean, max or kmax (of 5) over rows of numbers."""
    columns = [sorted(column, reverse=True) for column in zip(*rows)]
    kept = {"mean": len(rows), "max": 1, "kmax": 5}[name]
    return [sum(column[:kept]) / len(column[:kept]) for column in columns]


def normalised(row):
    return [x / math.hypot(*row) for x in row]


@pytest.mark.parametrize("name", [None, "mean", "max", "kmax"])
def test_regions_are_embedded_pooled_and_normalised(name):
    torch.manual_seed(2)
    encoder = EncoderImage("x_precomp", 5, 4, image_pooling=name).double()
    weights, lengths = encoder.fc.weight.tolist(), [7, 2, 6]
    encoder.fc.bias.data = torch.tensor([0.1, -0.2, 0.3, 0.4], dtype=torch.float64)
    images = regions(lengths, 7)
    expected = []
    for image, length in zip(images.tolist(), lengths):
        mapped = [
            [
                sum(w * x for w, x in zip(row, region)) + bias
                for row, bias in zip(weights, (0.1, -0.2, 0.3, 0.4))
            ]
            for region in image[:length]
        ]
        expected.append(normalised(pooled_loop(name or "mean", mapped)))
    assert encoder(images).tolist() == [pytest.approx(row, abs=1e-12) for row in expected]


def gru_states(encoder, words, suffix):
    """The state after each of the words in one direction of a one-layer GRU, in the order of the words given."""
    weights = {name: value.tolist() for name, value in encoder.state_dict().items()}
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    one = {f"rnn.{kind}_l0": weights[f"rnn.{kind}_l0{suffix}"] for kind in kinds} | {
        "embed.weight": weights["embed.weight"]
    }
    return [gru_loop_states(one, 1, words[: end + 1]) for end in range(len(words))]


@pytest.mark.parametrize("bi_gru", [False, True])
@pytest.mark.parametrize("name", ["last", "mean", "max", "kmax"])
def test_words_are_pooled_and_normalised(name, bi_gru):
    torch.manual_seed(3)
    encoder = EncoderText(9, 3, 4, 1, text_pooling=name, bi_gru=bi_gru).double()
    captions, expected = [[1, 5, 6, 7, 8, 2, 4], [1, 4, 4, 2], [3]], []
    for words in captions:
        ahead = gru_states(encoder, words, "")
        back = gru_states(encoder, words[::-1], "_reverse")[::-1] if bi_gru else ahead
        if name == "last":
            pooled = [(a + b) / 2 for a, b in zip(ahead[-1], back[0] if bi_gru else ahead[-1])]
        else:
            pooled = pooled_loop(
                name, [[(a + b) / 2 for a, b in zip(*pair)] for pair in zip(ahead, back)]
            )
        expected.append(normalised(pooled))
    padded = torch.tensor([words + [0] * (7 - len(words)) for words in captions])
    found = encoder(padded, [7, 4, 1])
    assert found.tolist() == [
        pytest.approx(row, abs=1e-7) for row in expected
    ]  # 1e-8 is added to a length


EVERY_POOLING = pytest.mark.parametrize(
    "parts",
    [
        {"image_pooling": "mean"},
        {"image_pooling": "max", "text_pooling": "mean"},
        {"image_pooling": "kmax", "text_pooling": "kmax", "bi_gru": True},
        {"image_pooling": "gpo", "text_pooling": "max"},
        {"image_pooling": "gpo", "text_pooling": "last", "bi_gru": True},
        {"precomp_enc_type": "mlp"},
        INFINITY_PARTS,
        {**INFINITY_PARTS, "num_layers": 2},
    ],
    ids=lambda parts: "-".join(map(str, parts.values())),
)

CAPTIONS = torch.tensor([[1, 4, 5, 6, 2], [1, 7, 2, 0, 0], [1, 2, 0, 0, 0]]), [5, 3, 2]


@EVERY_POOLING
@pytest.mark.parametrize("training", [False, True])
def test_pairs_do_not_see_each_other_s_padding(parts, training):
    """Batch norm in training is the exception, as in the released code: it sees all rows."""
    torch.manual_seed(4)
    vse = VSE(options(**parts)).double().train(training and "precomp_enc_type" not in parts)
    lengths = [3, 1, 6]
    images, captions = vse.forward_emb(regions(lengths, 6), *CAPTIONS)
    for item, (image, caption) in enumerate(zip(images, captions)):
        alone = vse.forward_emb(
            regions(lengths, 6)[item : item + 1, : lengths[item]],
            CAPTIONS[0][item : item + 1, : CAPTIONS[1][item]],
            CAPTIONS[1][item : item + 1],
        )
        assert close(alone[0][0], image, 1e-12) and close(alone[1][0], caption, 1e-12)


@EVERY_POOLING
def test_bf16_products_come_near_float32_s_embeddings_and_gradients(parts):
    torch.manual_seed(4)
    full, half = VSE(options(**parts)), VSE(options(**parts, amp="bf16"))
    half.load_state_dict(full.state_dict())
    for vse in (full, half):
        embeddings = vse.forward_emb(regions([3, 1, 6], 6).float(), *CAPTIONS)
        assert all(x.dtype == torch.float32 for x in embeddings)
        sum((x * x.new_tensor([[1, 2, -1, 0.5]])).sum() for x in embeddings).backward()
    in_float32 = parts.get("text_pooling") == "last"  # with both directions: nn.GRU's on a CPU
    for mine, other, may_be_same in zip(
        half.forward_emb(regions([3, 1, 6], 6).float(), *CAPTIONS),
        full.forward_emb(regions([3, 1, 6], 6).float(), *CAPTIONS),
        (False, in_float32),
    ):
        assert (mine - other).abs().max() < 0.05
        assert may_be_same or not torch.equal(mine, other)
    gradients = [
        torch.cat([p.grad.flatten() for p in vse.parameters() if p.grad is not None])
        for vse in (full, half)
    ]
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()


@EVERY_POOLING
def test_an_image_of_zeros_gives_finite_embeddings_and_gradients(parts):
    torch.manual_seed(4)
    vse = VSE(options(**parts))
    images = regions([3, 1, 6], 6).float()
    images[1] = 0
    sum(x.sum() for x in vse.forward_emb(images, *CAPTIONS)).backward()
    norm = torch.nn.utils.clip_grad_norm_(vse.parameters(), 2.0)
    assert norm < 1e6


@EVERY_POOLING
def test_a_model_over_regions_takes_its_own_state(parts):
    torch.manual_seed(5)
    source, target = VSE(options(**parts)), VSE(options(**parts))
    target.load_state_dict([source.img_enc.state_dict(), source.txt_enc.state_dict()])
    assert states_equal([target.state_dict()], [source.state_dict()])


def test_without_the_new_options_the_model_is_the_old_one():
    torch.manual_seed(6)
    plain = VSE(options())
    torch.manual_seed(6)
    spelled = VSE(
        options(
            image_pooling=None,
            precomp_enc_type="basic",
            text_pooling="last",
            bi_gru=False,
            no_txtnorm=False,
        )
    )
    assert list(plain.state_dict()) == [
        "img_enc.fc.weight",
        "img_enc.fc.bias",
        "txt_enc.embed.weight",
        *(f"txt_enc.rnn.{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
    ]
    assert states_equal([plain.state_dict()], [spelled.state_dict()])


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"image_pooling": "median"}, "--image_pooling is median"),
        ({"text_pooling": "first"}, "--text_pooling is first"),
        ({"precomp_enc_type": "weight_norm"}, "--precomp_enc_type is weight_norm"),
        ({"data_name": "coco", "image_pooling": "gpo"}, "coco holds photos"),
        ({"data_name": "f30k", "precomp_enc_type": "mlp"}, "f30k holds photos"),
    ],
    ids=str,
)
def test_choices_that_are_none_are_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        VSE(options(**changes))


@pytest.mark.parametrize("parts", [{"image_pooling": "max"}, {"precomp_enc_type": "mlp"}], ids=str)
def test_vectors_are_no_regions(parts):
    with pytest.raises(InputError, match=r"takes regions.*\(3, 5\)"):
        VSE(options(**parts)).embed_images(torch.randn(3, 5))


def test_batch_norm_needs_more_than_one_region_in_training():
    vse = VSE(options(**INFINITY_PARTS))
    with pytest.raises(InputError, match="--batch_size"):
        vse.img_enc(torch.ones(1, 1, 5))
    vse.val_start()
    assert vse.img_enc(torch.ones(1, 1, 5)).shape == (1, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@EVERY_POOLING
def test_pooled_embeddings_on_cuda_equal_the_cpu_s(parts):
    torch.manual_seed(4)
    vse = VSE(options(**parts))
    images = regions([3, 1, 6], 6).float()
    expected = vse.forward_emb(images, *CAPTIONS)
    found = vse.cuda().forward_emb(images, *CAPTIONS)
    assert all((mine.cpu() - theirs).abs().max() < 1e-4 for mine, theirs in zip(found, expected))


# Parts ------------------------------------------------------------------------------------------


def test_the_family_s_names_are_importable_from_here():
    assert cosine_sim is loss.cosine_sim and order_sim is loss.order_sim
    assert issubclass(model.ContrastiveLoss, loss.ContrastiveLoss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rows", [[[3.0, 4.0], [0.0, 0.0], [-1.0, 0.0]], [[1e-15, 0.0]], [[5.0, 12.0]]], ids=str
)
def test_l2norm_scales_each_row_to_1_and_leaves_zero_alone(rows, dtype):
    lengths = [math.hypot(*row) for row in rows]
    expected = [[x / length if length else 0.0 for x in row] for row, length in zip(rows, lengths)]
    found = l2norm(torch.tensor(rows, dtype=dtype))
    assert found.dtype == dtype
    assert found.tolist() == [pytest.approx(row, abs=1e-7) for row in expected]


@pytest.mark.parametrize("length", [1e-18, 1e-24, 1e-30, 1e-40])
def test_l2norm_makes_no_row_longer_than_1(length):
    """Also where the square of the length is too small for float32."""
    assert l2norm(torch.tensor([[length, 0.0]])).abs().max() < 1 + 1e-6


@pytest.mark.parametrize("zeros", [1, 3])
@pytest.mark.parametrize("loss_flags", [{"sum_violation": True}, {}], ids=["margin", "hal"])
def test_a_zero_feature_row_does_not_drown_the_other_pairs_gradients(zeros, loss_flags):
    """Clipping scales by the whole gradient's length: one huge entry would end all learning."""
    torch.manual_seed(0)
    vse = VSE(options())
    images = torch.randn(3, 5)
    images[:zeros] = 0
    opt = Namespace(
        **{
            "measure": "cosine",
            "max_violation": False,
            "sum_violation": False,
            "margin": 0.2,
            "local_alpha": 30.0,
            "local_ep": 0.3,
            **loss_flags,
        }
    )
    captions = torch.tensor([[1, 5, 2], [1, 6, 2], [1, 7, 2]])
    ContrastiveLoss(opt)(*vse.forward_emb(images, captions, [3, 3, 3])).backward()
    assert torch.nn.utils.clip_grad_norm_(vse.parameters(), 2.0) < 1e6


@pytest.mark.parametrize("in_features, embed_size", [(5, 4), (300, 7)])
def test_the_image_weights_are_uniform_within_their_bound(in_features, embed_size):
    torch.manual_seed(1)
    fc = EncoderImagePrecomp(in_features, embed_size).fc
    bound = math.sqrt(6 / (in_features + embed_size))
    assert fc.bias.eq(0).all()
    assert 0.8 * bound < fc.weight.abs().max() <= bound


def test_the_word_embedding_is_uniform_within_a_tenth_and_pad_has_one_too():
    torch.manual_seed(1)
    weight = EncoderText(500, 20, 3, 1).embed.weight
    assert 0.099 < weight.abs().max() <= 0.1 and weight[0].abs().max() > 0.01


@pytest.mark.parametrize("use_abs", [False, True])
@pytest.mark.parametrize("no_imgnorm", [False, True])
def test_a_precomputed_image_is_mapped_normalised_and_made_absolute(use_abs, no_imgnorm):
    torch.manual_seed(2)
    encoder = EncoderImagePrecomp(3, 2, use_abs=use_abs, no_imgnorm=no_imgnorm).double()
    image = [0.5, -2.0, 1.0]
    weights = encoder.fc.weight.tolist()
    expected = [sum(w * x for w, x in zip(row, image)) for row in weights]
    if not no_imgnorm:
        expected = [x / math.hypot(*expected) for x in expected]
    if use_abs:
        expected = [abs(x) for x in expected]
    found = encoder(torch.tensor([image], dtype=torch.float64))[0].tolist()
    assert found == pytest.approx(expected, abs=1e-12)


def gru_loop(encoder, words):
    """One caption through a GRU of any number of layers, number by number."""
    weights = {name: value.tolist() for name, value in encoder.state_dict().items()}
    return normalised(gru_loop_states(weights, encoder.rnn.num_layers, words))


def gru_loop_states(weights, layers, words):
    """The top layer's state after the last word; weights: lists by their state names."""
    inputs = [weights["embed.weight"][word] for word in words]
    for layer in range(layers):
        w_in, w_out, b_in, b_out = (
            weights[f"rnn.{name}_l{layer}"]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        size, outputs = len(w_out[0]), []
        state = [0.0] * size
        for x in inputs:
            from_input = [
                sum(a * b for a, b in zip(row, x)) + bias for row, bias in zip(w_in, b_in)
            ]
            from_state = [
                sum(a * b for a, b in zip(row, state)) + bias for row, bias in zip(w_out, b_out)
            ]
            reset = [1 / (1 + math.exp(-from_input[i] - from_state[i])) for i in range(size)]
            update = [
                1 / (1 + math.exp(-from_input[size + i] - from_state[size + i]))
                for i in range(size)
            ]
            new = [
                math.tanh(from_input[2 * size + i] + reset[i] * from_state[2 * size + i])
                for i in range(size)
            ]
            state = [(1 - update[i]) * new[i] + update[i] * state[i] for i in range(size)]
            outputs.append(state)
        inputs = outputs
    return state


@pytest.mark.parametrize(
    "captions",
    [[[1, 5, 6, 7, 2]], [[1, 2], [1, 2]], [[1, 5, 6, 7, 8, 2], [1, 4, 4, 2], [1, 2]], [[3]]],
    ids=["one", "empty captions", "mixed", "one word"],
)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_a_caption_is_its_last_word_s_state_of_the_top_layer(num_layers, captions, training):
    torch.manual_seed(3)
    encoder = EncoderText(9, 3, 4, num_layers).double().train(training)
    longest = max(map(len, captions))
    padded = torch.tensor([caption + [0] * (longest - len(caption)) for caption in captions])
    found = encoder(padded, [len(caption) for caption in captions]).tolist()
    assert found == [pytest.approx(gru_loop(encoder, caption), abs=1e-12) for caption in captions]


def test_text_gradients_equal_the_difference_quotients():
    torch.manual_seed(4)
    encoder = EncoderText(6, 2, 3, 2).double()
    captions, lengths = torch.tensor([[1, 4, 5, 2], [1, 4, 2, 0], [1, 2, 0, 0]]), [4, 3, 2]
    weights = torch.randn(3, 3, dtype=torch.float64)

    def value():
        return (encoder(captions, lengths) * weights).sum()

    value().backward()
    step = 1e-6
    for name, parameter in encoder.named_parameters():
        flat = parameter.data.view(-1)
        for place in range(0, len(flat), 5):
            before = flat[place].item()
            flat[place] = before + step
            high = value().item()
            flat[place] = before - step
            low = value().item()
            flat[place] = before
            assert parameter.grad.view(-1)[place].item() == pytest.approx(
                (high - low) / (2 * step), abs=1e-7
            ), name


def test_lengths_may_be_a_list_or_a_tensor():
    encoder = EncoderText(9, 3, 4, 1)
    captions = torch.tensor([[1, 5, 2], [1, 2, 0]])
    assert torch.equal(encoder(captions, [3, 2]), encoder(captions, torch.tensor([3, 2])))


def test_captions_may_come_by_the_family_s_name():
    encoder = EncoderText(9, 3, 4, 1).double()
    found = encoder(x=torch.tensor([[1, 5, 2]]), lengths=[3])[0].tolist()
    assert found == pytest.approx(gru_loop(encoder, [1, 5, 2]), abs=1e-12)


@pytest.mark.parametrize("volatile", [False, True])
@pytest.mark.parametrize(
    "rest", [(), ((7, 8), torch.tensor([7, 8]))], ids=["batch", "batch with its indices"]
)
def test_volatile_means_without_gradients_and_the_same_embeddings(rest, volatile):
    torch.manual_seed(3)
    vse = VSE(options())
    images, captions = torch.randn(2, 5), torch.tensor([[1, 5, 2], [1, 2, 0]])
    found = vse.forward_emb(images, captions, [3, 2], *rest, volatile=volatile)
    assert [embeddings.requires_grad for embeddings in found] == [not volatile] * 2
    weight = vse.img_enc.fc.weight.tolist()
    for image, embedding in zip(images.tolist(), found[0].tolist()):
        mapped = [sum(w * x for w, x in zip(row, image)) for row in weight]
        assert embedding == pytest.approx([x / math.hypot(*mapped) for x in mapped], abs=1e-6)
    assert found[1].tolist() == [
        pytest.approx(gru_loop(vse.txt_enc, words), abs=1e-6) for words in ([1, 5, 2], [1, 2])
    ]
    with torch.no_grad():  # does not bring gradients back
        assert not vse.forward_emb(images, captions, [3, 2], *rest)[0].requires_grad


def test_both_encoders_keep_float64():
    vse = VSE(options()).double()
    images, captions = vse.forward_emb(
        torch.randn(2, 5, dtype=torch.float64), torch.tensor([[1, 2], [1, 2]]), [2, 2]
    )
    assert images.dtype == captions.dtype == torch.float64


def test_a_precomputed_encoder_takes_a_full_model_s_state():
    encoder = EncoderImagePrecomp(5, 4)
    state = {
        "fc.weight": torch.full((4, 5), 2.0),
        "fc.bias": torch.ones(4),
        "cnn.module.conv1.weight": torch.ones(1),
    }
    encoder.load_state_dict(state)
    assert encoder.fc.weight.eq(2).all() and encoder.fc.bias.eq(1).all()


def test_a_state_without_the_layer_is_refused():
    with pytest.raises(RuntimeError, match="fc.bias"):
        EncoderImagePrecomp(5, 4).load_state_dict({"fc.weight": torch.ones(4, 5)})


@pytest.mark.parametrize("as_list", [False, True])
def test_a_model_takes_its_own_state_and_the_released_list_of_two(as_list):
    torch.manual_seed(5)
    source, target = VSE(options()), VSE(options())
    state = (
        [source.img_enc.state_dict(), source.txt_enc.state_dict()]
        if as_list
        else source.state_dict()
    )
    target.load_state_dict(state)
    assert states_equal([target.state_dict()], [source.state_dict()])


def test_train_start_and_val_start_switch_the_mode():
    vse = VSE(options())
    vse.val_start()
    modes = [vse.img_enc.training, vse.txt_enc.training]
    vse.train_start()
    assert [*modes, vse.img_enc.training, vse.txt_enc.training] == [False, False, True, True]


def test_the_family_s_call_builds_either_encoder():
    assert type(EncoderImage("x_precomp", 5, 4, False, "vgg19", True, True)) is EncoderImagePrecomp
    full = EncoderImage("coco", 5, 4, cnn_type="resnet18", cnn_weights="none")
    assert type(full) is EncoderImageFull and full.fc.in_features == 512


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("case", ENCODERS, ids=["plain", "two layers", "absolute values"])
def test_embeddings_on_cuda_equal_the_released_code_s(case):
    state = case["text_state"]
    vocab_size, word_dim = state["embed.weight"].shape
    encoder = EncoderText(
        vocab_size,
        word_dim,
        state["rnn.weight_hh_l0"].shape[1],
        case["num_layers"],
        use_abs=case["use_abs"],
    )
    encoder.load_state_dict(state)
    found = encoder.cuda()(case["captions"].cuda(), case["lengths"])
    assert (found.cpu() - case["caption_embeddings"]).abs().max() < 1e-5


# Full CNNs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(6)
    return EncoderImageFull(4, cnn_type="vgg11", cnn_weights="none")


@pytest.fixture
def resnet():
    torch.manual_seed(6)
    return EncoderImageFull(4, cnn_type="resnet18", cnn_weights="none")


def pictures(n=3):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def test_resnet_names_and_width_are_the_released_ones(resnet):
    names = set(resnet.state_dict())
    assert {
        "cnn.module.conv1.weight",
        "cnn.module.layer4.1.bn2.running_mean",
        "fc.weight",
        "fc.bias",
    } <= names
    assert not any(name.startswith("cnn.module.fc") for name in names)
    assert resnet.fc.in_features == 512 and resnet(pictures()).shape == (3, 4)


def test_vgg_names_and_width_are_the_released_ones(vgg):
    names = set(vgg.state_dict())
    assert {
        "cnn.features.module.0.weight",
        "cnn.classifier.0.weight",
        "cnn.classifier.3.bias",
        "fc.weight",
    } <= names
    assert not any(name.startswith("cnn.classifier.6") for name in names)
    assert vgg.fc.in_features == 4096


def test_vgg_keeps_its_classifier_s_relu_and_dropout(vgg):
    vgg.eval()
    with torch.no_grad():
        features = vgg.cnn(pictures(2))
        again = vgg.cnn(pictures(2))
        vgg.train()
        torch.manual_seed(8)
        dropped = [vgg.cnn(pictures(2)) for _ in range(2)]
    assert features.shape == (2, 4096) and (features >= 0).all() and features.eq(0).any()
    assert torch.equal(features, again) and not torch.equal(*dropped)


def test_features_are_normalised_before_the_linear_layer(resnet):
    resnet.eval()
    with torch.no_grad():
        raw = resnet.cnn(pictures())
        found = resnet(pictures())
        rows = [[x / math.hypot(*row) for x in row] for row in raw.double().tolist()]
        weights = resnet.fc.weight.double().tolist()
    mapped = [[sum(w * x for w, x in zip(line, row)) for line in weights] for row in rows]
    assert found.tolist() == [
        pytest.approx([x / math.hypot(*row) for x in row], abs=1e-5) for row in mapped
    ]


def test_a_frozen_cnn_has_no_gradient_but_its_batch_norm_moves_in_training(resnet):
    resnet.train()
    before = resnet.cnn.module.bn1.running_mean.clone()
    resnet(pictures()).sum().backward()
    assert all(
        parameter.grad is None and not parameter.requires_grad
        for parameter in resnet.cnn.parameters()
    )
    assert resnet.fc.weight.grad is not None
    assert not torch.equal(resnet.cnn.module.bn1.running_mean, before)


def test_evaluation_moves_no_batch_norm(resnet):
    resnet.eval()
    before = resnet.cnn.module.bn1.running_mean.clone()
    resnet(pictures())
    assert torch.equal(resnet.cnn.module.bn1.running_mean, before)


def test_finetuning_gives_every_weight_a_gradient():
    encoder = EncoderImageFull(4, finetune=True, cnn_type="resnet18", cnn_weights="none")
    encoder(pictures()).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.cnn.module.conv1.weight.grad.abs().max() > 0


def test_vgg_states_from_before_the_classifier_change_load(vgg):
    state = vgg.state_dict()
    now = {"cnn.classifier.0.": "cnn.classifier.1.", "cnn.classifier.3.": "cnn.classifier.4."}
    old = {
        now.get(name[:17], name[:17]) + name[17:]: torch.full((1,), float(place)).expand(
            value.shape
        )
        for place, (name, value) in enumerate(state.items())
    }
    assert {"cnn.classifier.1.weight", "cnn.classifier.4.bias"} <= set(old)
    kept = {name: value.clone() for name, value in state.items() if value.numel() < 10**6}
    vgg.load_state_dict(old)
    assert [vgg.state_dict()[name].ravel()[0].item() for name in state] == [
        float(place) for place in range(len(state))
    ]
    vgg.load_state_dict({**vgg.state_dict(), **kept})


def test_vse_with_a_full_cnn_embeds_pictures():
    vse = VSE(options(data_name="coco", cnn_type="resnet18", cnn_weights="none"))
    images, captions = vse.forward_emb(pictures(2), torch.tensor([[1, 5, 2], [1, 2, 0]]), [3, 2])
    norms = [float(loops.similarity(row, row)) for row in (*images.tolist(), *captions.tolist())]
    assert images.shape == captions.shape == (2, 4) and norms == pytest.approx([1] * 4, abs=1e-5)


# Other text encoders ----------------------------------------------------------------------------

TRANSFORMER = {"text_encoder": "transformer", "word_dim": 12, "embed_size": 8, "num_layers": 2}


def transformer(**changes):
    torch.manual_seed(3)
    return VSE(options(**{**TRANSFORMER, **changes})).eval()


@pytest.mark.parametrize("pooling", ["last", "mean", "max", "gpo"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_transformer_reads_a_caption_alike_alone_and_among_longer_ones(pooling, layers):
    """Neither padding after a caption nor its neighbours change its embedding."""
    encoder = transformer(text_pooling=pooling, num_layers=layers).txt_enc
    captions = torch.randint(1, 9, (3, 7), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([7, 4, 2])
    captions[1, 4:], captions[2, 2:] = 0, 0
    together = encoder(captions, lengths)
    assert together.shape == (3, 8) and torch.allclose(
        together.norm(dim=1), torch.ones(3), atol=1e-6
    )
    for row, length in enumerate(lengths.tolist()):
        alone = encoder(captions[row : row + 1, :length], lengths[row : row + 1])
        assert torch.allclose(alone[0], together[row], atol=1e-5)


def test_a_transformer_sees_the_words_order():
    encoder = transformer().txt_enc
    one, other = encoder(torch.tensor([[1, 5, 6, 2], [1, 6, 5, 2]]), torch.tensor([4, 4]))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    "kind, layers", [("gru", 1), ("gru", 3), ("transformer", 1), ("transformer", 3)]
)
def test_a_text_encoder_tells_its_sizes_from_its_weights(kind, layers):
    sizes = {"vocab_size": 9, "word_dim": 12, "embed_size": 8, "num_layers": layers}
    encoder = TEXT_ENCODERS[kind](*sizes.values())
    assert encoder.sizes(encoder.state_dict()) == sizes
    assert (encoder.width, encoder.dtype, encoder.device) == (8, torch.float32, torch.device("cpu"))


class BagOfWords(torch.nn.Module):
    """A user's text encoder: the mean of the words' embeddings, with the attributes that a model reads."""

    def __init__(self, vocab_size, word_dim, embed_size, num_layers, use_abs=False, **poolings):
        super().__init__()
        self.words = torch.nn.EmbeddingBag(vocab_size, embed_size, padding_idx=0)

    width = property(lambda self: self.words.embedding_dim)
    dtype = property(lambda self: self.words.weight.dtype)
    device = property(lambda self: self.words.weight.device)

    @staticmethod
    def sizes(state):
        vocab_size, embed_size = state["words.weight"].shape
        return {"vocab_size": vocab_size, "embed_size": embed_size, "word_dim": 6, "num_layers": 1}

    def forward(self, captions, lengths):
        return torch.nn.functional.normalize(self.words(captions))


@pytest.mark.parametrize("flags", [[], ["--micro_batch", "5"]], ids=["whole", "in pieces"])
@pytest.mark.parametrize("kind", ["bag", "transformer"])
def test_another_text_encoder_trains_resumes_and_is_evaluated(
    workdir, monkeypatch, capsys, kind, flags
):
    monkeypatch.setitem(TEXT_ENCODERS, "bag", BagOfWords)
    for folder, epochs in (("two", 2), ("one", 1), ("one", 2)):
        train.main(
            [
                *TINY,
                "--text_encoder",
                kind,
                *flags,
                "--memory_bank",
                "--num_epochs",
                str(epochs),
                "--logger_name",
                f"runs/{folder}",
                "--resume",
                "auto",
            ]
        )
    one, two = (load(f"runs/{folder}/checkpoint.pth.tar")["model"] for folder in ("one", "two"))
    assert states_equal(one, two)
    capsys.readouterr()
    compute_results.main(["--model_path", "runs/one/checkpoint.pth.tar", "--device", "cpu"])
    assert "rsum" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--bi_gru"], "does not go with --bi_gru"),
        (["--word_dim", "7"], "an even --word_dim"),
        (["--cross_attn", "t2i"], "--text_encoder transformer does not go with --cross_attn"),
    ],
)
def test_a_transformer_that_cannot_be_built_is_refused(workdir, flags, reason):
    with pytest.raises(InputError, match=reason):
        train.main([*TINY, "--text_encoder", "transformer", *flags])


# SCAN, against the released code ----------------------------------------------------------------

SCAN_RELEASED = REFERENCE / "scan"

SCAN_ENCODERS = torch.load(SCAN_RELEASED / "encoders.pt", weights_only=True)

SCAN_TRAJECTORIES = ("t2i_lse", "t2i_avg", "i2t_lse", "i2t_avg", "i2t_lse_coco", "t2i_sum_plain")

SCAN_BATCHES = torch.load(SCAN_RELEASED / "trajectory_batches.pt", weights_only=True)


def scan_trajectory(name):
    return torch.load(SCAN_RELEASED / f"trajectory_{name}.pt", weights_only=True)


def scan_options(**changes):
    """The options of a small model and its scores."""
    return Namespace(
        **{
            "img_dim": 5,
            "embed_size": 4,
            "precomp_enc_type": "basic",
            "no_imgnorm": False,
            "vocab_size": 9,
            "word_dim": 3,
            "num_layers": 1,
            "bi_gru": True,
            "no_txtnorm": False,
            "cross_attn": "t2i",
            "raw_feature_norm": "clipped_l2norm",
            "agg_func": "LogSumExp",
            "lambda_lse": 6.0,
            "lambda_softmax": 9.0,
            **changes,
        }
    )


def drawn_alike(state, expected):
    """Whether states are the same to the bit, and weight norm's lengths, sums in an order of PyTorch's, within 1e-6."""
    return list(state) == list(expected) and all(
        torch.allclose(state[name], value, rtol=1e-6, atol=0)
        if name.endswith("weight_g")
        else torch.equal(state[name], value)
        for name, value in expected.items()
    )


@pytest.mark.parametrize(
    "case", SCAN_ENCODERS, ids=[str(number) for number in range(len(SCAN_ENCODERS))]
)
def test_scan_s_encoders_equal_the_released_code_s(case):
    opt = Namespace(**case["options"])
    torch.manual_seed(31)
    model = SCAN(opt)
    states = [case["image_state"], case["text_state"]]
    assert all(map(drawn_alike, (model.img_enc.state_dict(), model.txt_enc.state_dict()), states))
    model.load_state_dict(states)
    regions, words, lengths = model.forward_emb(case["images"], case["captions"], case["lengths"])
    assert (regions - case["image_embeddings"]).abs().max() < 1e-6
    assert (words - case["caption_embeddings"]).abs().max() < 1e-6
    assert lengths == case["returned_lengths"]
    model.double()
    assert (
        model.embed_images(case["images"].double()) - case["image_embeddings_float64"]
    ).abs().max() < 1e-10
    words = model.embed_captions(case["captions"], case["lengths"])
    assert (words - case["caption_embeddings_float64"]).abs().max() < 1e-10


@pytest.mark.parametrize("name", SCAN_TRAJECTORIES)
def test_scan_s_training_walks_the_released_path(name):
    path = scan_trajectory(name)
    opt = Namespace(**path["options"])
    torch.manual_seed(31)
    model = SCAN(opt)
    assert states_equal([model.img_enc.state_dict(), model.txt_enc.state_dict()], path["initial"])
    model.double().train_start()
    criterion = max_margin_loss if opt.max_violation else sum_margin_loss
    optimizer = torch.optim.Adam(model.parameters(), lr=opt.learning_rate)
    losses = []
    for batch in SCAN_BATCHES:
        embeddings = model.forward_emb(
            batch["images"].double(), batch["captions"], batch["lengths"]
        )
        value = criterion(cross_attention_similarities(*embeddings, opt), opt.margin)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), opt.grad_clip)
        optimizer.step()
        losses.append(value.item())
    assert losses == pytest.approx(path["losses_float64"], rel=1e-9)
    assert all(
        (mine[key] - theirs[key]).abs().max() < 1e-9
        for mine, theirs in zip(
            [model.img_enc.state_dict(), model.txt_enc.state_dict()], path["final_float64"]
        )
        for key in theirs
    )


# SCAN, its parts --------------------------------------------------------------------------------


def test_scan_s_names_are_importable_from_here():
    for name in (
        "func_attention",
        "xattn_score_t2i",
        "xattn_score_i2t",
        "shard_xattn_t2i",
        "shard_xattn_i2t",
    ):
        assert getattr(model, name) is getattr(cross_attention, name)


def captions_of(lengths):
    captions = torch.randint(1, 9, (len(lengths), max(lengths)))
    return captions * (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1))


@pytest.mark.parametrize("precomp_enc_type", ["basic", "weight_norm"])
def test_a_region_of_zeros_gives_finite_gradients(precomp_enc_type):
    """Of moderate size, too: clipping scales by the whole gradient's length."""
    torch.manual_seed(0)
    model = SCAN(scan_options(precomp_enc_type=precomp_enc_type))
    images = torch.randn(3, 4, 5)
    images[1, 2:] = 0
    embeddings = model.forward_emb(images, captions_of([4, 3, 2]), [4, 3, 2])
    max_margin_loss(cross_attention_similarities(*embeddings, scan_options())).backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0) < 1e4


def test_the_released_list_of_states_loads_with_a_one_number_vector_and_keys_of_other_encoders():
    source, target = (
        SCAN(scan_options(precomp_enc_type="weight_norm")),
        SCAN(scan_options(precomp_enc_type="weight_norm")),
    )
    image_state = {**source.img_enc.state_dict(), "cnn.weight": torch.zeros(1)}
    image_state["fc.weight_g"] = image_state["fc.weight_g"].view(1)  # as PyTorch 0.3 kept it
    target.load_state_dict([image_state, source.txt_enc.state_dict()])
    assert states_equal([source.state_dict()], [target.state_dict()])


def test_embedding_without_gradients_equals_the_batch_s():
    torch.manual_seed(0)
    model = SCAN(scan_options())
    images, captions, lengths = torch.randn(3, 4, 5), captions_of([5, 4, 1]), [5, 4, 1]
    regions, words, same = model(images, captions, lengths)
    assert regions.shape == (3, 4, 4) and words.shape == (3, 5, 4) and same is lengths
    assert regions.requires_grad and words.requires_grad and words[2, 1:].eq(0).all()
    assert torch.equal(model.embed_images(images), regions) and torch.equal(
        model.embed_captions(captions, lengths), words
    )
    assert (
        not model.embed_images(images).requires_grad
        and not model.embed_captions(captions, lengths).requires_grad
    )
    model.val_start()
    assert not model.training


def test_scan_in_bf16_is_near_and_gives_float32():
    torch.manual_seed(0)
    model = SCAN(scan_options(amp="bf16", embed_size=32))
    images, captions, lengths = torch.randn(3, 4, 5), captions_of([5, 4, 1]), [5, 4, 1]
    near = model.forward_emb(images, captions, lengths)[:2]
    model.amp = False
    for a, b in zip(near, model.forward_emb(images, captions, lengths)):
        assert a.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.03


def test_an_image_encoder_that_is_none_is_refused():
    with pytest.raises(
        InputError, match="--precomp_enc_type is deep: choose one of basic, weight_norm"
    ):
        SCAN(scan_options(precomp_enc_type="deep"))
