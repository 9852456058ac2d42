"""The encoders against the released code's numbers, and the full image encoder with random CNNs."""

import math
from argparse import Namespace

import loops
import pytest
import torch
from conftest import REFERENCE, states_equal

import loss
import model
from errors import InputError
from loss import ContrastiveLoss
from model import VSE, EncoderImage, EncoderImageFull, EncoderImagePrecomp, EncoderText, l2norm

ENCODERS = torch.load(REFERENCE / "encoders.pt", weights_only=True)
TRAJECTORIES = ("local", "local_order", "global", "max", "sum")


def trajectory(name):
    return torch.load(REFERENCE / f"trajectory_{name}.pt", weights_only=True)


def options(**changes):
    return Namespace(**{"data_name": "tiny_precomp", "img_dim": 5, "embed_size": 4, "finetune": False,
                        "cnn_type": "vgg19", "use_abs": False, "no_imgnorm": False, "vocab_size": 9, "word_dim": 3,
                        "num_layers": 1, **changes})


# Against the released code ----------------------------------------------------------------------

@pytest.mark.parametrize("case", ENCODERS, ids=["plain", "two layers", "absolute values"])
def test_text_embeddings_equal_the_released_code_s(case):
    state = case["text_state"]
    vocab_size, word_dim = state["embed.weight"].shape
    encoder = EncoderText(vocab_size, word_dim, state["rnn.weight_hh_l0"].shape[1], case["num_layers"],
                          use_abs=case["use_abs"])
    assert encoder.state_dict().keys() == state.keys()
    encoder.load_state_dict(state)
    found = encoder(case["captions"], case["lengths"])
    assert (found - case["caption_embeddings"]).abs().max() < 1e-6


@pytest.mark.parametrize("case", ENCODERS, ids=["plain", "two layers", "absolute values"])
def test_image_embeddings_equal_the_released_code_s(case):
    state = case["image_state"]
    encoder = EncoderImagePrecomp(state["fc.weight"].shape[1], state["fc.weight"].shape[0], use_abs=case["use_abs"],
                                  no_imgnorm=case["no_imgnorm"])
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
        value = criterion(*embeddings, bank["image_embeddings"], bank["caption_embeddings"], bank["indices"],
                          batch["indices"])
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(vse.parameters(), opt.grad_clip)
        optimizer.step()
        losses.append(value.item())
    assert losses == pytest.approx(path["losses"], rel=1e-5, abs=1e-9)
    assert all((mine[key] - theirs[key]).abs().max() < 1e-4
               for mine, theirs in zip([vse.img_enc.state_dict(), vse.txt_enc.state_dict()], path["final_state"])
               for key in theirs)


# Parts ------------------------------------------------------------------------------------------

def test_the_family_s_names_are_importable_from_here():
    assert model.cosine_sim is loss.cosine_sim and model.order_sim is loss.order_sim
    assert model.ContrastiveLoss is loss.ContrastiveLoss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [[[3.0, 4.0], [0.0, 0.0], [-1.0, 0.0]], [[1e-15, 0.0]], [[5.0, 12.0]]], ids=str)
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
    opt = Namespace(**{"measure": "cosine", "max_violation": False, "sum_violation": False, "margin": 0.2,
                       "local_alpha": 30.0, "local_ep": 0.3, **loss_flags})
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
    inputs = [weights["embed.weight"][word] for word in words]
    for layer in range(encoder.rnn.num_layers):
        w_in, w_out, b_in, b_out = (weights[f"rnn.{name}_l{layer}"] for name in
                                    ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        size, outputs = len(w_out[0]), []
        state = [0.0] * size
        for x in inputs:
            from_input = [sum(a * b for a, b in zip(row, x)) + bias for row, bias in zip(w_in, b_in)]
            from_state = [sum(a * b for a, b in zip(row, state)) + bias for row, bias in zip(w_out, b_out)]
            reset = [1 / (1 + math.exp(-from_input[i] - from_state[i])) for i in range(size)]
            update = [1 / (1 + math.exp(-from_input[size + i] - from_state[size + i])) for i in range(size)]
            new = [math.tanh(from_input[2 * size + i] + reset[i] * from_state[2 * size + i]) for i in range(size)]
            state = [(1 - update[i]) * new[i] + update[i] * state[i] for i in range(size)]
            outputs.append(state)
        inputs = outputs
    return [x / math.hypot(*state) for x in state]


@pytest.mark.parametrize("captions", [[[1, 5, 6, 7, 2]], [[1, 2], [1, 2]], [[1, 5, 6, 7, 8, 2], [1, 4, 4, 2], [1, 2]],
                                      [[3]]], ids=["one", "empty captions", "mixed", "one word"])
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
            assert parameter.grad.view(-1)[place].item() == pytest.approx((high - low) / (2 * step), abs=1e-7), name


def test_lengths_may_be_a_list_or_a_tensor():
    encoder = EncoderText(9, 3, 4, 1)
    captions = torch.tensor([[1, 5, 2], [1, 2, 0]])
    assert torch.equal(encoder(captions, [3, 2]), encoder(captions, torch.tensor([3, 2])))


def test_captions_may_come_by_the_family_s_name():
    encoder = EncoderText(9, 3, 4, 1).double()
    found = encoder(x=torch.tensor([[1, 5, 2]]), lengths=[3])[0].tolist()
    assert found == pytest.approx(gru_loop(encoder, [1, 5, 2]), abs=1e-12)


@pytest.mark.parametrize("volatile", [False, True])
@pytest.mark.parametrize("rest", [(), ((7, 8), torch.tensor([7, 8]))], ids=["batch", "batch with its indices"])
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
    assert found[1].tolist() == [pytest.approx(gru_loop(vse.txt_enc, words), abs=1e-6) for words in ([1, 5, 2], [1, 2])]
    with torch.no_grad():  # does not bring gradients back
        assert not vse.forward_emb(images, captions, [3, 2], *rest)[0].requires_grad


def test_both_encoders_keep_float64():
    vse = VSE(options()).double()
    images, captions = vse.forward_emb(torch.randn(2, 5, dtype=torch.float64), torch.tensor([[1, 2], [1, 2]]), [2, 2])
    assert images.dtype == captions.dtype == torch.float64


def test_a_precomputed_encoder_takes_a_full_model_s_state():
    encoder = EncoderImagePrecomp(5, 4)
    state = {"fc.weight": torch.full((4, 5), 2.0), "fc.bias": torch.ones(4), "cnn.module.conv1.weight": torch.ones(1)}
    encoder.load_state_dict(state)
    assert encoder.fc.weight.eq(2).all() and encoder.fc.bias.eq(1).all()


def test_a_state_without_the_layer_is_refused():
    with pytest.raises(RuntimeError, match="fc.bias"):
        EncoderImagePrecomp(5, 4).load_state_dict({"fc.weight": torch.ones(4, 5)})


@pytest.mark.parametrize("as_list", [False, True])
def test_a_model_takes_its_own_state_and_the_released_list_of_two(as_list):
    torch.manual_seed(5)
    source, target = VSE(options()), VSE(options())
    state = [source.img_enc.state_dict(), source.txt_enc.state_dict()] if as_list else source.state_dict()
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
    encoder = EncoderText(vocab_size, word_dim, state["rnn.weight_hh_l0"].shape[1], case["num_layers"],
                          use_abs=case["use_abs"])
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
    assert {"cnn.module.conv1.weight", "cnn.module.layer4.1.bn2.running_mean", "fc.weight", "fc.bias"} <= names
    assert not any(name.startswith("cnn.module.fc") for name in names)
    assert resnet.fc.in_features == 512 and resnet(pictures()).shape == (3, 4)


def test_vgg_names_and_width_are_the_released_ones(vgg):
    names = set(vgg.state_dict())
    assert {"cnn.features.module.0.weight", "cnn.classifier.0.weight", "cnn.classifier.3.bias", "fc.weight"} <= names
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
    assert found.tolist() == [pytest.approx([x / math.hypot(*row) for x in row], abs=1e-5) for row in mapped]


def test_a_frozen_cnn_has_no_gradient_but_its_batch_norm_moves_in_training(resnet):
    resnet.train()
    before = resnet.cnn.module.bn1.running_mean.clone()
    resnet(pictures()).sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in resnet.cnn.parameters())
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
    old = {now.get(name[:17], name[:17]) + name[17:]: torch.full((1,), float(place)).expand(value.shape)
           for place, (name, value) in enumerate(state.items())}
    assert {"cnn.classifier.1.weight", "cnn.classifier.4.bias"} <= set(old)
    kept = {name: value.clone() for name, value in state.items() if value.numel() < 10**6}
    vgg.load_state_dict(old)
    assert [vgg.state_dict()[name].ravel()[0].item() for name in state] == [float(place) for place in range(len(state))]
    vgg.load_state_dict({**vgg.state_dict(), **kept})


def cnn_state(cnn_type):
    """A state dict in which all values of a tensor are the tensor's number: small on disk."""
    from torchvision import models
    names = models.get_model(cnn_type, weights=None).state_dict() if cnn_type == "resnet18" else None
    if names is None:
        with torch.device("meta"):
            names = models.get_model(cnn_type, weights=None).state_dict()
    return {name: torch.full((1,), place, dtype=value.dtype).expand(value.shape) if value.dim() else
            torch.tensor(place, dtype=value.dtype) for place, (name, value) in enumerate(names.items())}


@pytest.mark.parametrize("cnn_type, first, last", [
    ("resnet18", "cnn.module.conv1.weight", "fc."), ("vgg11", "cnn.features.module.0.weight", "classifier.6.")])
@pytest.mark.parametrize("with_last_layer", [True, False])
def test_cnn_weights_come_from_a_file_with_or_without_its_last_layer(tmp_path, cnn_type, first, last, with_last_layer):
    state = cnn_state(cnn_type)
    if not with_last_layer:
        state = {name: value for name, value in state.items() if not name.startswith(last)}
    torch.save(state, tmp_path / "cnn.pth")
    encoder = EncoderImageFull(4, cnn_type=cnn_type, cnn_weights=str(tmp_path / "cnn.pth"))
    assert encoder.state_dict()[first].eq(0).all()
    second = next(name for name in encoder.state_dict() if name.startswith("cnn.") and name != first)
    assert encoder.state_dict()[second].eq(1).all()


@pytest.mark.parametrize("content", ["absent", "folder", "text", "list", "other model", "missing name", "other shape",
                                     "code"])
def test_cnn_weights_that_do_not_fit_are_refused_by_their_flag(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)

    class Smuggled:
        def __reduce__(self):
            import os
            return os.system, ("touch smuggled",)
    state = cnn_state("resnet18")
    writers = {"absent": lambda: None, "folder": lambda: (tmp_path / "cnn.pth").mkdir(),
               "text": lambda: (tmp_path / "cnn.pth").write_text("not weights"),
               "list": lambda: torch.save([1, 2], "cnn.pth"),
               "other model": lambda: torch.save(cnn_state("vgg11"), "cnn.pth"),
               "missing name": lambda: torch.save({k: v for k, v in state.items() if k != "conv1.weight"}, "cnn.pth"),
               "other shape": lambda: torch.save({**state, "conv1.weight": torch.ones(1)}, "cnn.pth"),
               "code": lambda: torch.save({**state, "conv1.weight": Smuggled()}, "cnn.pth")}
    writers[content]()
    with pytest.raises(InputError, match=r"--cnn_weights.*cnn\.pth") as caught:
        EncoderImageFull(4, cnn_type="resnet18", cnn_weights="cnn.pth")
    assert "\n" not in str(caught.value) and not (tmp_path / "smuggled").exists()


def test_a_download_that_fails_names_the_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(InputError, match="--cnn_weights") as caught:
        EncoderImageFull(4, cnn_type="resnet18")
    assert "\n" not in str(caught.value)


def test_an_unknown_cnn_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="--cnn_type is alexnet.*resnet152.*"):
        EncoderImageFull(4, cnn_type="alexnet", cnn_weights="none")


@pytest.mark.parametrize("cnn_type", ["vgg11", "vgg19", "vgg16_bn", "resnet18", "resnet50", "resnet152"])
def test_every_vgg_and_resnet_is_known(cnn_type):
    assert cnn_type in model.cnn_types()


def test_vse_with_a_full_cnn_embeds_pictures():
    vse = VSE(options(data_name="coco", cnn_type="resnet18", cnn_weights="none"))
    images, captions = vse.forward_emb(pictures(2), torch.tensor([[1, 5, 2], [1, 2, 0]]), [3, 2])
    norms = [float(loops.similarity(row, row)) for row in (*images.tolist(), *captions.tolist())]
    assert images.shape == captions.shape == (2, 4) and norms == pytest.approx([1] * 4, abs=1e-5)
