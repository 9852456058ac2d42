"""Programs of a few lines as VSE++, SCAN, HAL, VSE-infinity, SGRAF and VSRN write them: models, losses, steps.

Each imports as that code does, inside the test, and checks numbers: the released codes' or a loop's.
"""

import copy
import io
import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch

from tests.helpers import loops
from tests.helpers.made import REFERENCE, states_equal

SCAN_RELEASED = REFERENCE / "scan"
HAL_FLAGS = ("local_", "global_", "mb_", "sum_violation")


def reference(name):
    return torch.load(REFERENCE / f"{name}.pt", weights_only=True)


def walked(name):
    """A recorded walk of HAL's code, and its options."""
    path = reference(f"trajectory_{name}")
    return path, Namespace(**path["options"])


def of_vse_plus_plus(opt):
    """The options without those that VSE++'s code does not have."""
    return Namespace(**{k: v for k, v in vars(opt).items() if not k.startswith(HAL_FLAGS)})


def near(states, expected, bound=1e-4):
    return all(
        (mine[name] - value).abs().max() < bound
        for mine, theirs in zip(states, expected)
        for name, value in theirs.items()
    )


def both(model):
    """Its state as the released savers' list of two."""
    return [model.state_dict()[0], model.state_dict()[1]]


def rows(n, width=6, seed=0):
    """(n, width) rows of length 1."""
    drawn = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).double()
    return torch.nn.functional.normalize(drawn)


def scan_cases(kind):
    cases = json.loads((SCAN_RELEASED / f"{kind}.json").read_text())
    arrays = np.load(SCAN_RELEASED / f"{kind}.npz")
    return cases, {name: torch.from_numpy(value) for name, value in arrays.items()}


def expected_loss(im, s, max_violation, margin=0.2, measure="cosine"):
    loop = loops.max_margin if max_violation else loops.sum_margin
    return loop(loops.similarities(im.tolist(), s.tolist(), measure), margin)


# VSE++ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max", "sum"])
def test_vse_plus_plus_train_emb_walks_the_released_path(name):
    from evaluation import LogCollector
    from model import VSE

    path, opt = walked(name)
    model, losses = VSE(of_vse_plus_plus(opt)), []
    model.load_state_dict(path["initial_state"])
    for batch in path["batches"]:
        model.train_start()
        model.logger = LogCollector()
        model.train_emb(batch["images"], batch["captions"], batch["lengths"], batch["indices"])
        losses.append(model.logger.meters["Le"].avg)
    assert losses == pytest.approx(path["losses"], rel=1e-5, abs=1e-9)
    assert near(both(model), path["final_state"])
    assert model.Eiters == 25


def test_vse_plus_plus_logs_steps_and_rate_and_its_schedule_reaches_the_optimizer():
    from evaluation import LogCollector
    from model import VSE

    path, opt = walked("max")
    model = VSE(of_vse_plus_plus(opt))
    model.logger, model.Eiters = LogCollector(), 500
    for group in model.optimizer.param_groups:
        group["lr"] = 0.25
    batch = path["batches"][0]
    model.train_emb(batch["images"], batch["captions"], batch["lengths"], batch["indices"])
    meters = model.logger.meters
    assert list(meters) == ["Eit", "lr", "Le"]
    assert (meters["Eit"].val, meters["lr"].val) == (501, 0.25)
    assert meters["Le"].count == len(batch["images"])


def test_vse_plus_plus_clips_the_params_that_it_trains():
    from torch.nn.utils import clip_grad_norm_

    from model import VSE

    path, opt = walked("sum")
    model, batch = VSE(of_vse_plus_plus(opt)), path["batches"][0]
    img_emb, cap_emb = model.forward_emb(batch["images"], batch["captions"], batch["lengths"])
    loss = model.forward_loss(img_emb, cap_emb)
    assert loss.item() == pytest.approx(expected_loss(img_emb, cap_emb, False), rel=1e-5)
    loss.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
    assert float(clip_grad_norm_(model.params, model.grad_clip)) == pytest.approx(norm, rel=1e-5)
    assert model.grad_clip == 2.0


def test_vse_plus_plus_without_clipping():
    from model import VSE

    path, opt = walked("sum")
    opt = of_vse_plus_plus(opt)
    opt.grad_clip = 0.0
    model, batch = VSE(opt), path["batches"][0]
    before = model.img_enc.fc.bias.clone()
    model.optimizer = torch.optim.SGD(model.params, lr=1.0)
    model.train_emb(batch["images"], batch["captions"], batch["lengths"])
    step = before - model.img_enc.fc.bias
    assert torch.allclose(step, model.img_enc.fc.bias.grad) and step.norm() > 0


def test_vse_plus_plus_volatile_by_place_is_without_gradients():
    from model import VSE

    path, opt = walked("max")
    model, batch = VSE(of_vse_plus_plus(opt)), path["batches"][0]
    parts = batch["images"], batch["captions"], batch["lengths"]
    for volatile in (True, False):
        img_emb, cap_emb = model.forward_emb(*parts, volatile)
        assert img_emb.requires_grad == cap_emb.requires_grad == (not volatile)


def test_vse_plus_plus_saves_and_loads_its_checkpoint(tmp_path):
    from model import VSE
    from training.checkpoint import load

    path, opt = walked("max")
    opt = of_vse_plus_plus(opt)
    model, other = VSE(opt), VSE(opt)
    model.load_state_dict(path["initial_state"])
    content = {"epoch": 1, "model": model.state_dict(), "best_rsum": 1.0, "opt": opt, "Eiters": 5}
    torch.save(content, tmp_path / "model_best.pth.tar")
    opened = torch.load(tmp_path / "model_best.pth.tar", weights_only=False)
    # as the released load_state_dict takes it apart
    other.img_enc.load_state_dict(opened["model"][0])
    other.txt_enc.load_state_dict(opened["model"][1])
    for states in (other.state_dict(), load(str(tmp_path / "model_best.pth.tar"))["model"]):
        assert states_equal([states[0], states[1]], path["initial_state"])


def test_vse_plus_plus_resumes_its_optimizer_and_steps():
    from model import VSE

    path, opt = walked("max")
    opt, batches = of_vse_plus_plus(opt), path["batches"]
    walks = []
    for broken in (False, True):
        model = VSE(opt)
        model.load_state_dict(path["initial_state"])
        for place, batch in enumerate(batches[:6]):
            if broken and place == 3:
                saved = {"model": model.state_dict(), "optimizer": model.optimizer.state_dict()}
                saved, model = copy.deepcopy(saved), VSE(opt)
                model.load_state_dict(saved["model"])
                model.optimizer.load_state_dict(saved["optimizer"])
            model.train_emb(batch["images"], batch["captions"], batch["lengths"])
        walks.append(model.state_dict())
    assert states_equal([walks[0]], [walks[1]])


@pytest.mark.parametrize("measure", ["cosine", "order"])
@pytest.mark.parametrize("max_violation", [True, False])
def test_vse_plus_plus_contrastive_loss(max_violation, measure):
    from model import ContrastiveLoss

    im, s = rows(5).abs(), rows(5, seed=1).abs()
    criterion = ContrastiveLoss(margin=0.2, measure=measure, max_violation=max_violation)
    expected = expected_loss(im, s, max_violation, measure=measure)
    assert float(criterion(im, s)) == pytest.approx(expected, abs=1e-12)
    assert (criterion.margin, criterion.max_violation) == (0.2, max_violation)
    assert criterion.sim(im[:1], s[:1]).item() == pytest.approx(
        float(loops.similarity(im[0].tolist(), s[0].tolist(), measure))
    )


def test_vse_plus_plus_encoders_by_their_arguments():
    from model import EncoderImage, EncoderText

    (case,) = [case for case in reference("encoders") if case["use_abs"]]
    image, text = case["image_state"], case["text_state"]
    size, width = image["fc.weight"].shape
    img_enc = EncoderImage("f30k_precomp", width, size, False, "vgg19", True, case["no_imgnorm"])
    txt_enc = EncoderText(*text["embed.weight"].shape, size, case["num_layers"], use_abs=True)
    img_enc.load_state_dict(image)
    txt_enc.load_state_dict(text)
    found = img_enc(case["images"]), txt_enc(case["captions"], case["lengths"])
    assert (found[0] - case["image_embeddings"]).abs().max() < 1e-6
    assert (found[1] - case["caption_embeddings"]).abs().max() < 1e-6


def test_vse_plus_plus_fifth_argument_is_refused_as_it_may_be_scan_s():
    from model import EncoderText
    from runtime.errors import InputError

    with pytest.raises(InputError, match="use_abs in VSE.* use_bi_gru in SCAN.*: name it"):
        EncoderText(9, 3, 4, 1, True)


def test_vse_plus_plus_third_argument_is_refused_as_it_may_be_scan_s():
    from model import EncoderImagePrecomp
    from runtime.errors import InputError

    with pytest.raises(InputError, match="use_abs in VSE.* no_imgnorm in SCAN's.*: name it, or"):
        EncoderImagePrecomp(5, 4, True)
    assert EncoderImagePrecomp(5, 4, no_imgnorm=True).no_imgnorm


def test_vse_plus_plus_l2norm_takes_rows_and_refuses_what_is_unclear():
    from model import l2norm
    from runtime.errors import InputError

    assert l2norm(torch.tensor([[3.0, 4.0]])).tolist() == [pytest.approx([0.6, 0.8])]
    with pytest.raises(InputError, match=r"\(2, 3, 4\) needs a dim"):
        l2norm(torch.ones(2, 3, 4))


# HAL --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "local_order", "max"])
def test_hal_train_emb_walks_the_released_path(name):
    from evaluation import LogCollector
    from model import VSE

    path, opt = walked(name)
    model, losses = VSE(opt), []
    model.load_state_dict(path["initial_state"])
    for batch in path["batches"]:
        model.logger = LogCollector()
        batch["ids"] = batch["indices"]
        parts = ("images", "captions", "lengths", "ids", "indices")
        model.train_emb(*(batch[part] for part in parts))
        losses.append(model.logger.meters["Loss"].avg)
    assert losses == pytest.approx(path["losses"], rel=1e-5, abs=1e-9)
    assert near(both(model), path["final_state"])


@pytest.mark.parametrize("way", ["by place", "by name", "by batch", "ids alone"])
def test_hal_train_emb_with_the_bank_walks_the_released_path(way):
    from model import VSE

    path, opt = walked("global")
    model = VSE(opt)
    model.load_state_dict(path["initial_state"])
    bank = [path["bank"][f"{part}"] for part in ("image_embeddings", "caption_embeddings")]
    bank.append(path["bank"]["indices"])
    if way == "by batch":  # as a pass over the loader collects them
        bank = [[part[start : start + 18] for start in range(0, 90, 18)] for part in bank]
    named = dict(zip(("mb_img", "mb_cap", "mb_ind"), bank))
    losses = []
    for batch in path["batches"]:
        parts = batch["images"], batch["captions"], batch["lengths"], batch["indices"]
        if way == "ids alone":
            losses.append(float(model.train_emb(*parts, **named)))
        elif way == "by place":
            losses.append(float(model.train_emb(*parts, batch["indices"], *bank)))
        else:
            losses.append(float(model.train_emb(*parts, indices=batch["indices"], **named)))
    assert losses == pytest.approx(path["losses"], rel=1e-5, abs=1e-9)
    assert near(both(model), path["final_state"])


def test_hal_collects_its_bank_in_a_pass_of_its_own():
    from model import VSE

    path, opt = walked("global")
    opt.mb_k = 5
    model = VSE(opt)
    mb_img, mb_cap, mb_ind = [], [], []
    model.val_start()
    with torch.no_grad():
        for batch in path["batches"][:3]:
            img_emb, cap_emb = model.forward_emb(
                batch["images"], batch["captions"], batch["lengths"], True
            )
            mb_img.append(img_emb)
            mb_cap.append(cap_emb)
            mb_ind.append(tuple(batch["indices"]))
    batch = path["batches"][1]
    img_emb, cap_emb = model.forward_emb(batch["images"], batch["captions"], batch["lengths"])
    found = model.criterion(img_emb, cap_emb, mb_img, mb_cap, mb_ind, batch["indices"])
    bank = torch.cat(mb_img).tolist(), torch.cat(mb_cap).tolist(), sum(mb_ind, ())
    pairs = img_emb.tolist(), cap_emb.tolist()
    W, w = loops.global_weights(*pairs, batch["indices"], bank, 5, 40, 40, 0.1)
    expected = loops.hal(loops.similarities(*pairs), opt.local_alpha, opt.local_ep, W, w)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_hal_bank_with_too_few_indices_says_the_order():
    from model import ContrastiveLoss

    _, opt = walked("global")
    bank = rows(10, seed=2), rows(10, seed=3), range(4)
    with pytest.raises(ValueError, match="10 images, 10 captions and 4 indices: .* mb_ind, and"):
        ContrastiveLoss(opt)(rows(4), rows(4, seed=1), *bank, range(10))


def test_hal_loss_s_numbers_are_read_and_set():
    from model import ContrastiveLoss

    _, opt = walked("local")
    criterion, im, s = ContrastiveLoss(opt), rows(5), rows(5, seed=1)
    assert (criterion.l_alpha, criterion.l_ep, criterion.opt) == (30.0, 0.3, opt)
    criterion.l_alpha = 10.0
    S = loops.similarities(im.tolist(), s.tolist())
    assert float(criterion(im, s)) == pytest.approx(loops.hal(S, 10, 0.3), abs=1e-12)
    criterion.max_violation_on()  # VSE-infinity's call is no business of HAL's
    assert float(criterion(im, s)) == pytest.approx(loops.hal(S, 10, 0.3), abs=1e-12)


# SCAN -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t2i_lse", "i2t_avg", "t2i_sum_plain"])
def test_scan_train_emb_walks_the_released_path(name):
    from evaluation import LogCollector
    from model import SCAN

    path = reference(f"scan/trajectory_{name}")
    torch.manual_seed(31)
    model, losses = SCAN(Namespace(**path["options"])), []
    model.double()
    for batch in reference("scan/trajectory_batches"):
        model.train_start()
        model.logger = LogCollector()
        images, ids = batch["images"].double(), tuple(range(len(batch["images"])))
        model.train_emb(images, batch["captions"], batch["lengths"], ids)
        losses.append(model.logger.meters["Le"].avg)
    assert losses == pytest.approx(path["losses_float64"], rel=1e-9)
    assert near(both(model), path["final_float64"], 1e-9)


@pytest.mark.parametrize("by_place", [True, False])
@pytest.mark.parametrize("number", [0, 1, 7])
def test_scan_contrastive_loss(number, by_place):
    from model import ContrastiveLoss

    cases, arrays = scan_cases("losses")
    case = [case for case in cases if case["kind"] == "contrastive"][number]
    opt = Namespace(**case)
    images = arrays[f"{case['inputs']}_images"].clone().requires_grad_()
    captions, lengths = (arrays[f"{case['inputs']}_{part}"] for part in ("captions", "lengths"))
    if by_place:
        criterion = ContrastiveLoss(opt, opt.margin, opt.max_violation)
        found = criterion(images, captions, lengths.tolist())
    else:
        named = {"margin": opt.margin, "max_violation": opt.max_violation}
        found = ContrastiveLoss(opt=opt, **named)(images, captions, s_l=tuple(lengths.tolist()))
    found.backward()
    assert found.item() == pytest.approx(case["loss"], abs=1e-12)
    if case["gradients_finite"]:
        assert (images.grad - arrays[f"{case['name']}_grad_images"]).abs().max() < 1e-7


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("by_place", [True, False])
def test_scan_encoders_by_their_arguments(number, by_place):
    from model import EncoderImage, EncoderText

    case = reference("scan/encoders")[number]
    opt = Namespace(**case["options"])
    sizes = opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers
    image = opt.data_name, opt.img_dim, opt.embed_size
    torch.manual_seed(31)
    if by_place:
        img_enc = EncoderImage(*image, opt.precomp_enc_type, opt.no_imgnorm)
        txt_enc = EncoderText(*sizes, opt.bi_gru, opt.no_txtnorm)
    else:
        named = {"precomp_enc_type": opt.precomp_enc_type, "no_imgnorm": opt.no_imgnorm}
        img_enc = EncoderImage(*image, **named)
        txt_enc = EncoderText(*sizes, use_bi_gru=opt.bi_gru, no_txtnorm=opt.no_txtnorm)
    regions, words = img_enc(case["images"]), txt_enc(case["captions"], case["lengths"])
    assert (regions - case["image_embeddings"]).abs().max() < 1e-6
    assert (words - case["caption_embeddings"]).abs().max() < 1e-6


def test_scan_forward_emb_volatile_by_place_returns_the_lengths():
    from model import SCAN

    case = reference("scan/encoders")[4]
    torch.manual_seed(31)
    model = SCAN(Namespace(**case["options"]))
    img_embs, cap_embs, cap_lens = model.forward_emb(
        case["images"], case["captions"], case["lengths"], True
    )
    assert not img_embs.requires_grad and not cap_embs.requires_grad
    assert list(cap_lens) == list(case["returned_lengths"])
    assert (cap_embs - case["caption_embeddings"]).abs().max() < 1e-6


def test_scan_takes_no_image_lengths():
    from model import SCAN
    from runtime.errors import InputError

    case = reference("scan/encoders")[4]
    model = SCAN(Namespace(**case["options"]))
    parts = case["images"], case["captions"], case["lengths"]
    with pytest.raises(InputError, match="keeps all regions of an image"):
        model.forward_emb(*parts, torch.tensor([5.0] * len(parts[0])))


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_scan_scores_take_lengths_of_any_kind(kind):
    import model

    cases, arrays = scan_cases("scores")
    for case in (cases[0], cases[40]):
        score = getattr(model, f"xattn_score_{case['cross_attn']}")
        images, captions, lengths = (
            arrays[f"{case['inputs']}_{part}"] for part in ("images", "captions", "lengths")
        )
        found = score(images, captions, kind(lengths.tolist()), Namespace(**case))
        assert (found - arrays[f"{case['name']}_scores"]).abs().max() < 1e-12


def test_scan_func_attention_with_eps():
    from model import func_attention

    cases, arrays = scan_cases("attention")
    for case in cases[:7]:
        sides = [arrays[f"{case['inputs']}_{part}"] for part in ("words", "regions")]
        query, context = sides if case["cross_attn"] == "t2i" else sides[::-1]
        found = func_attention(query, context, Namespace(**case), case["smooth"], eps=1e-8)
        assert (found[0] - arrays[f"{case['name']}_weighted"]).abs().max() < 1e-12
        far = func_attention(query, context, Namespace(**case), case["smooth"], 10.0)[1]
        moved = (far - found[1]).abs().max() > 1e-3
        assert moved == case["raw_feature_norm"].endswith(("l1norm", "l2norm"))


def test_scan_norms_along_a_dim_with_eps():
    from model import cosine_similarity, l1norm, l2norm

    X = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], dtype=torch.float64)
    assert l2norm(X, dim=-1).tolist()[0] == [
        pytest.approx([3 / (5 + 1e-8), 4 / (5 + 1e-8)]),
        [0, 0],
    ]
    assert l2norm(X, dim=-1)[0, 0, 0].item() != 0.6  # the released eps is there
    assert l2norm(X, 1, eps=1.0).tolist()[0][0] == pytest.approx([3 / 4, 4 / 5])
    assert l1norm(X, dim=-1, eps=1.0).tolist()[0][0] == pytest.approx([3 / 8, 4 / 8])
    found = cosine_similarity(X, X.flip(-1), dim=-1)
    assert found.tolist()[0] == pytest.approx([24 / 25, 0.0])


# VSE-infinity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("by_place", [True, False])
@pytest.mark.parametrize("name", ["max", "warmup"])
def test_vse_infinity_train_emb_walks_the_released_path(name, by_place):
    from model import VSEModel

    path = reference("vse_infty/trajectory")
    run = path["runs"][name]
    opt = Namespace(data_name="f30k", **path["options"], **run["options"])
    torch.manual_seed(opt.seed)
    model, losses = VSEModel(opt), []
    assert states_equal(both(model), path["initial_state"])
    model.double()
    for step in range(len(run["losses"])):
        epoch, place = divmod(step, run["steps_per_epoch"])
        if epoch >= opt.vse_mean_warmup_epochs:
            model.set_max_violation(True)
        for group in model.optimizer.param_groups:
            group["lr"] = run["learning_rates"][step]
        batch = run["batches"][place]
        parts = batch["images"].double(), batch["captions"], batch["lengths"]
        image_lengths = batch["image_lengths"].float()
        if by_place:
            losses.append(float(model.train_emb(*parts, image_lengths)))
        else:
            losses.append(float(model.train_emb(*parts, image_lengths=image_lengths)))
    assert losses == pytest.approx(run["losses"], rel=1e-9)
    states = [{k: v.double() for k, v in model.state_dict()[n].items()} for n in (0, 1)]
    assert near(states, run["final_state"], 1e-6)


def test_vse_infinity_saves_and_loads_its_checkpoint(tmp_path):
    from model import VSEModel, build
    from training.checkpoint import load, load_weights

    path = reference("vse_infty/trajectory")
    opt = Namespace(data_name="f30k", **path["options"], **path["runs"]["max"]["options"])
    model, batch = VSEModel(opt), path["runs"]["max"]["batches"][0]
    model.train_emb(batch["images"], batch["captions"], batch["lengths"])
    file = str(tmp_path / "model_best.pth")
    torch.save({"epoch": 1, "model": model.state_dict(), "opt": opt, "Eiters": 1}, file)
    content = load(file)
    opened = build(content["opt"])
    load_weights(opened, content, file)
    parts = batch["images"], batch["captions"], batch["lengths"], True
    for one in (model, opened):
        one.val_start()
    for mine, theirs in zip(model.forward_emb(*parts), opened.forward_emb(*parts)):
        assert torch.equal(mine, theirs) and mine.abs().max() > 0.1


def test_vse_infinity_warmup_alpha_scales_the_loss():
    from model import VSEModel

    path = reference("vse_infty/trajectory")
    run = path["runs"]["max"]
    options = {**path["options"], **run["options"], "grad_clip": 0.0}
    batch, gradients = run["batches"][0], []
    for alpha in (None, 0.25):
        torch.manual_seed(31)
        model = VSEModel(Namespace(data_name="coco", **options)).double()
        parts = batch["images"].double(), batch["captions"], batch["lengths"]
        model.train_emb(*parts, image_lengths=batch["image_lengths"], warmup_alpha=alpha)
        gradients.append(model.txt_enc.embed.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.allclose(gradients[1], gradients[0] / 4, rtol=1e-12, atol=0)


def test_vse_infinity_get_image_encoder():
    from model import get_image_encoder

    case = reference("vse_infty/image_encoder")
    opt = case["options"]
    torch.manual_seed(opt["seed"])
    img_enc = get_image_encoder("f30k", opt["img_dim"], opt["embed_size"], no_imgnorm=False)
    assert states_equal([img_enc.state_dict()], [case["state"]])
    found = img_enc.double().eval()(case["images_varied"], case["lengths_varied"].float())
    assert (found - case["eval_varied"]).abs().max() < 1e-10


def test_vse_infinity_image_lengths_count_rows_of_zeros_too():
    from model import get_image_encoder

    case = reference("vse_infty/image_encoder")
    opt = case["options"]
    img_enc = get_image_encoder("f30k", opt["img_dim"], opt["embed_size"]).double().eval()
    images = torch.zeros(1, 3, opt["img_dim"], dtype=torch.float64)
    images[0, 0] = case["images_full"][0, 0]
    alone, both = (img_enc(images, torch.tensor([length])) for length in (1.0, 2.0))
    assert (alone - img_enc(images[:, :1])).abs().max() < 1e-12 < (alone - both).abs().max()


@pytest.mark.parametrize("number", [0, 1])
def test_vse_infinity_get_text_encoder(number):
    from model import get_text_encoder

    case = reference("vse_infty/text_encoder")[number]
    opt = case["options"]
    sizes = opt["vocab_size"], opt["word_dim"], opt["embed_size"], case["num_layers"]
    torch.manual_seed(opt["seed"])
    txt_enc = get_text_encoder(*sizes, use_bi_gru=True, no_txtnorm=False).double()
    found = txt_enc(case["captions"], case["lengths"])
    assert (found - case["embeddings"]).abs().max() < 1e-5  # the weights were drawn in float32


def test_vse_infinity_loss_switches_between_all_negatives_and_the_hardest():
    from model import ContrastiveLoss

    cases = json.loads((REFERENCE / "vse_infty" / "losses.json").read_text())
    arrays = np.load(REFERENCE / "vse_infty" / "losses.npz")
    for case in cases:
        im, s = (
            torch.from_numpy(arrays[f"{case['batch']}_{side}"]) for side in ("image", "caption")
        )
        criterion = ContrastiveLoss(opt=Namespace(), margin=case["margin"], max_violation=False)
        if case["max_violation"]:
            criterion.max_violation_on()
        assert criterion(im, s).item() == pytest.approx(case["loss"], abs=1e-10)
        criterion.max_violation_off()
        expected = expected_loss(im, s, False, case["margin"])
        assert criterion(im, s).item() == pytest.approx(expected, abs=1e-10)


def test_vse_infinity_grid_encoder_is_refused_in_a_sentence():
    from model import VSEModel, get_image_encoder
    from runtime.errors import InputError

    with pytest.raises(InputError, match="encoder backbone is left out here: .* takes regions"):
        get_image_encoder("coco", 2048, 1024, "backbone", "detector", "weights.pth")
    opt = Namespace(vse_mean_warmup_epochs=1, precomp_enc_type="backbone")
    with pytest.raises(InputError, match="encoder backbone is left out"):
        VSEModel(opt)


@pytest.mark.parametrize("name", ["freeze_backbone", "unfreeze_backbone"])
def test_vse_infinity_backbone_calls_say_what_decides(name):
    from model import VSE
    from runtime.errors import InputError

    _, opt = walked("max")
    model = VSE(opt)
    before = copy.deepcopy(model.state_dict())
    if not model.is_data_parallel:
        model.make_data_parallel()
    assert states_equal([model.state_dict()], [before])
    with pytest.raises(InputError, match="no backbone in the model: --finetune"):
        getattr(model, name)()


@pytest.mark.parametrize(
    "name, instead",
    [
        ("EncoderImageWeightNormPrecomp", "'weight_norm', no_imgnorm"),
        ("EncoderImageAggr", "get_image_encoder"),
        ("ResnetFeatureExtractor", "extract_features.py"),
    ],
)
def test_what_is_left_out_says_what_to_use(name, instead):
    import model
    from runtime.errors import InputError

    with pytest.raises(InputError, match=f"model.{name} is left out here: .*{instead}"):
        getattr(model, name)(2048, 1024)
    assert not hasattr(model, "nothing_of_the_kind")


# SGRAF ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_violation", [True, False])
@pytest.mark.parametrize("by_place", [True, False])
def test_sgraf_contrastive_loss_takes_similarities(max_violation, by_place):
    from model import ContrastiveLoss

    im, s = rows(5), rows(5, seed=1)
    criterion = (
        ContrastiveLoss(0.3, max_violation)
        if by_place
        else ContrastiveLoss(margin=0.3, max_violation=max_violation)
    )
    expected = expected_loss(im, s, max_violation, 0.3)
    assert float(criterion(im @ s.t())) == pytest.approx(expected, abs=1e-12)


def test_sgraf_similarity_on_our_encoders_learns():
    from torch.nn.utils import clip_grad_norm_

    from model import ContrastiveLoss, EncoderImage, EncoderText, l2norm

    class SGRAF:
        def __init__(self, opt):
            self.img_enc = EncoderImage(opt.img_dim, opt.embed_size, no_imgnorm=opt.no_imgnorm)
            self.txt_enc = EncoderText(
                opt.vocab_size,
                opt.word_dim,
                opt.embed_size,
                opt.num_layers,
                use_bi_gru=opt.bi_gru,
                no_txtnorm=opt.no_txtnorm,
            )
            self.criterion = ContrastiveLoss(margin=opt.margin, max_violation=opt.max_violation)
            self.params = [*self.txt_enc.parameters(), *self.img_enc.parameters()]
            self.optimizer = torch.optim.Adam(self.params, lr=0.01)

        def sims(self, images, captions, lengths):
            img_embs, cap_embs = self.img_enc(images), self.txt_enc(captions, lengths)
            caps = [words[:n].mean(0) for words, n in zip(cap_embs, lengths)]
            return l2norm(img_embs.mean(1), dim=-1) @ l2norm(torch.stack(caps), dim=-1).t()

        def train_emb(self, images, captions, lengths, ids=None, *args):
            self.optimizer.zero_grad()
            loss = self.criterion(self.sims(images, captions, lengths))
            loss.backward()
            clip_grad_norm_(self.params, 2.0)
            self.optimizer.step()
            return loss.item()

    path = reference("scan/trajectory_t2i_lse")
    batch = reference("scan/trajectory_batches")[0]
    torch.manual_seed(0)
    model = SGRAF(Namespace(**path["options"]))
    parts = batch["images"], batch["captions"], list(batch["lengths"])
    S = model.sims(*parts).tolist()
    costs = [
        max(max(0, 0.2 + line[j] - line[i]) for j in range(len(S)) if j != i)
        for table in (S, list(zip(*S)))
        for i, line in enumerate(table)
    ]
    losses = [model.train_emb(*parts, (1, 2)) for _ in range(30)]
    assert losses[0] == pytest.approx(sum(costs), rel=1e-5)
    assert losses[-1] < losses[0] / 2


# VSRN -------------------------------------------------------------------------------------------


def test_vsrn_reasons_over_regions_with_our_text_encoder_and_loss():
    from model import ContrastiveLoss, EncoderText, cosine_sim, l2norm

    class VSRN:
        def __init__(self, opt):
            self.fc = torch.nn.Linear(opt.img_dim, opt.embed_size)
            self.graph = torch.nn.Linear(opt.embed_size, opt.embed_size)
            self.rnn = torch.nn.GRU(opt.embed_size, opt.embed_size, 1, batch_first=True)
            self.txt_enc = EncoderText(
                opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers, use_abs=False
            )
            self.criterion = ContrastiveLoss(
                margin=opt.margin, measure="cosine", max_violation=opt.max_violation
            )

        def forward_emb(self, images, captions, lengths, volatile=False):
            regions = l2norm(self.fc(images), -1)
            regions = regions + (regions @ regions.mT).softmax(2) @ self.graph(regions)
            return l2norm(self.rnn(regions)[1][0]), self.txt_enc(captions, lengths)

    path = reference("scan/trajectory_t2i_lse")
    batch = reference("scan/trajectory_batches")[0]
    torch.manual_seed(0)
    model = VSRN(Namespace(**path["options"]))
    im, s = model.forward_emb(batch["images"], batch["captions"], batch["lengths"])
    found = model.criterion(im, s)
    assert found.item() == pytest.approx(expected_loss(im, s, True), rel=1e-5)
    found.backward()
    assert model.graph.weight.grad.abs().max() > 0 and model.txt_enc.embed.weight.grad.any()
    expected = loops.similarity(im[0].tolist(), s[1].tolist())
    assert cosine_sim(im, s)[0, 1].item() == pytest.approx(float(expected), abs=1e-6)


# What all of them pass --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_lengths_and_images_come_as_lists_tuples_arrays_or_tensors(kind):
    from model import VSE

    path, opt = walked("max")
    model, batch = VSE(opt), path["batches"][0]
    expected = model.forward_emb(batch["images"], batch["captions"], batch["lengths"])
    images, captions = batch["images"].double().numpy(), batch["captions"].numpy()
    if kind in (list, tuple):
        images = kind(images)
        captions = kind(words[:n] for words, n in zip(captions, batch["lengths"]))
    found = model.forward_emb(images, captions, kind(batch["lengths"]), kind(batch["indices"]))
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_a_state_is_flat_by_name_and_two_states_by_number(tmp_path):
    from model import VSE

    path, opt = walked("max")
    torch.manual_seed(31)
    model, file = VSE(opt), io.BytesIO()
    state = model.state_dict()
    assert list(state) == [name for name, _ in model.named_parameters()]
    assert states_equal([state[0], state[1]], path["initial_state"])
    torch.save(state, file)
    file.seek(0)
    opened = torch.load(file)  # with PyTorch's own types alone
    for form in (opened, copy.deepcopy(state), dict(state), [opened[0], opened[1]]):
        other = VSE(opt)
        other.load_state_dict(form)
        assert states_equal(both(other), path["initial_state"])
    whole = torch.nn.Sequential(model).state_dict()
    assert type(whole) is not type(state) and list(whole)[0].startswith("0.img_enc.")
