"""evaluation.py as the code of VSE++, SCAN, HAL, VSE-infinity, SGRAF and VSRN calls it.

Each test is a few lines as such code has them, with its own imports, its own models and its own
loaders. Expected values are the released codes' own, or come from plain loops.
"""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

from runtime.errors import InputError
from tests.helpers import loops
from tests.helpers.made import REFERENCE, captions_of

N = 8  # images, with five captions each
RNG = np.random.default_rng(5)
FEATURES = RNG.standard_normal((N, 6)).astype(np.float32)
REGIONS = RNG.standard_normal((N, 4, 6)).astype(np.float32)
LENGTHS = RNG.integers(3, 9, 5 * N).tolist()
TOKENS = [RNG.integers(1, 30, length).tolist() for length in LENGTHS]
TABLE = RNG.standard_normal((30, 6)).astype(np.float32)  # a vector for each word


def silent(line):
    """Takes log lines."""


class Mean(nn.Module):
    """Somebody's own model: an image is its features, a caption the mean of its words' vectors."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding.from_pretrained(torch.from_numpy(TABLE))

    def val_start(self):
        self.eval()

    def forward_emb(self, images, captions, lengths):
        words = self.words(captions)
        means = [own[:length].mean(0) for own, length in zip(words, lengths)]
        return images.flatten(1), torch.stack(means)


def mean_of(tokens):
    """A caption's embedding by `Mean`, by a loop."""
    return [sum(float(TABLE[t][k]) for t in tokens) / len(tokens) for k in range(6)]


class Captions:
    """Somebody's own data set: nothing but its captions' number."""

    def __len__(self):
        return 5 * N


class Loader:
    """Somebody's own loader: `dataset`, and batches in the form of `parts`."""

    def __init__(self, parts, features=FEATURES, order=None, size=7):
        self.parts, self.features, self.size = parts, features, size
        self.order = list(range(5 * N)) if order is None else order
        self.dataset = Captions()

    def __len__(self):
        return -(-len(self.order) // self.size)

    def __iter__(self):
        for start in range(0, len(self.order), self.size):
            ids = sorted(self.order[start : start + self.size], key=lambda c: -LENGTHS[c])
            captions = torch.zeros(len(ids), LENGTHS[ids[0]], dtype=torch.int64)
            for row, one in zip(captions, ids):
                row[: LENGTHS[one]] = torch.tensor(TOKENS[one])
            images = torch.stack([torch.from_numpy(self.features[one // 5]) for one in ids])
            yield self.parts(images, captions, [LENGTHS[one] for one in ids], ids)


def check(images, captions, features=FEATURES):
    """One row per caption, in their order: its image's features and its words' mean."""
    assert isinstance(images, np.ndarray) and isinstance(captions, np.ndarray)
    for one in range(5 * N):
        assert np.array_equal(images[one], features[one // 5].ravel())
        assert captions[one] == pytest.approx(mean_of(TOKENS[one]), abs=1e-6)


SHUFFLED = np.random.default_rng(0).permutation(5 * N).tolist()


# encode_data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids_as", [list, tuple, torch.tensor, np.array])
def test_vsepp_s_model_and_loader_of_four_parts(ids_as):
    from evaluation import encode_data

    loader = Loader(lambda i, c, lengths, ids: (i, c, lengths, ids_as(ids)), order=SHUFFLED)
    check(*encode_data(Mean(), loader, log_step=2, logging=silent))


def test_vsepp_s_log_step_and_logging_by_place():
    from evaluation import encode_data

    lines = []
    encode_data(Mean(), Loader(lambda *parts: parts), 3, lines.append)
    assert lines == ["Test: [0/6]", "Test: [3/6]"]


def test_hal_s_loader_of_five_parts():
    from evaluation import encode_data

    loader = Loader(lambda i, c, lengths, ids: (i, c, lengths, ids, ids), order=SHUFFLED)
    check(*encode_data(Mean(), loader, logging=silent))


def test_vsepp_s_bare_object_is_a_model():
    from evaluation import encode_data

    class Bare:
        def forward_emb(self, images, captions, lengths, volatile=False):
            return Mean().forward_emb(images, captions, lengths)

    check(*encode_data(Bare(), Loader(lambda *parts: parts, order=SHUFFLED), logging=silent))


def test_vsepp_s_model_in_data_parallel():
    from evaluation import encode_data

    model = nn.DataParallel(Mean())
    check(*encode_data(model, Loader(lambda *parts: parts), logging=silent))


class WordByWord(Mean):
    """SCAN's and SGRAF's outputs: regions, words and lengths."""

    def forward_emb(self, images, captions, lengths):
        return images, self.words(captions), lengths


@pytest.mark.parametrize("code", ["scan", "sgraf"])
def test_scan_s_and_sgraf_s_model_gives_words_and_lengths(code):
    from evaluation import encode_data

    loader = Loader(lambda *parts: parts, REGIONS, SHUFFLED)
    img_embs, cap_embs, cap_lens = encode_data(WordByWord(), loader, logging=silent)
    assert list(cap_lens) == LENGTHS
    assert img_embs.shape == (5 * N, 4, 6) and cap_embs.shape == (5 * N, max(LENGTHS), 6)
    for one in range(5 * N):
        assert np.array_equal(img_embs[one], REGIONS[one // 5])
        for place, token in enumerate(TOKENS[one]):
            assert np.array_equal(cap_embs[one, place], TABLE[token])


def test_vse_infty_s_model_gets_the_images_lengths():
    from evaluation import encode_data

    class Pooled(Mean):
        def forward_emb(self, images, captions, lengths, image_lengths=None):
            sums = [own[: int(n)].sum(0) for own, n in zip(images, image_lengths)]
            return torch.stack(sums), super().forward_emb(images, captions, lengths)[1]

    def parts(images, captions, lengths, ids):
        image_lengths = torch.tensor([1.0 + one // 5 % 4 for one in ids])
        return images, image_lengths, captions, lengths, ids

    img_embs, _ = encode_data(
        Pooled(), Loader(parts, REGIONS, SHUFFLED), logging=silent, backbone=False
    )
    for one in range(5 * N):
        rows = REGIONS[one // 5][: 1 + one // 5 % 4]
        assert img_embs[one] == pytest.approx([sum(row[k] for row in rows) for k in range(6)])


def test_vse_infty_s_loader_of_photos_has_four_parts():
    from evaluation import encode_data

    photos = RNG.standard_normal((N, 3, 4, 4)).astype(np.float32)
    loader = Loader(lambda *parts: parts, photos, SHUFFLED)
    check(*encode_data(Mean(), loader, logging=silent, backbone=True), photos)


def test_vsrn_s_batches_of_six_and_its_third_output(capsys):
    from evaluation import encode_data

    class Generating(Mean):
        def forward_emb(self, images, captions, lengths):
            return *super().forward_emb(images, captions, lengths), images.unsqueeze(1)

    def parts(images, captions, lengths, ids):
        labels = torch.ones(len(ids), 60, dtype=torch.int64)
        return images, captions, lengths, ids, labels, labels.float()

    check(*encode_data(Generating(), Loader(parts, order=SHUFFLED), logging=silent))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "6 parts are taken: images 1, captions 2, lengths 3" in said


def test_a_loader_of_dictionaries_and_one_without_ids(capsys):
    from evaluation import encode_data

    def named(images, captions, lengths, ids):
        return {"images": images, "captions": captions, "lengths": lengths, "ids": ids}

    check(*encode_data(Mean(), Loader(named, order=SHUFFLED), logging=silent))
    check(*encode_data(Mean(), Loader(lambda i, c, ls, ids: (i, c, ls), size=1), logging=silent))
    assert "without ids, rows are in the order of loading" in capsys.readouterr().err


def test_a_generator_has_no_length():
    from evaluation import encode_data

    check(*encode_data(Mean(), iter(Loader(lambda *parts: parts)), logging=silent))


@pytest.mark.parametrize("more", [{}, {"local_alpha": 30.0}], ids=["vsepp", "hal"])
def test_vsepp_s_and_hal_s_own_model_over_our_loader(drawn_data, more):
    """As their validation has it: our get_loaders, their model."""
    from data import get_loaders
    from evaluation import encode_data
    from vocab import build_vocab

    vocab = build_vocab(str(drawn_data), "tiny_precomp", threshold=1)
    opt = Namespace(data_path=str(drawn_data), img_dim=8, **more)
    _, val_loader = get_loaders("tiny_precomp", vocab, 224, 7, 0, opt)

    class Counting:
        def forward_emb(self, images, captions, lengths):
            return images, torch.tensor(
                [[float(n), float(c.sum())] for c, n in zip(captions, lengths)]
            )

    images, captions = encode_data(Counting(), val_loader, logging=silent)
    features = np.load(drawn_data / "tiny_precomp/dev_ims.npy")
    for one in range(25):
        words = captions_of(one // 5)[one % 5].lower().replace(".", " .").replace(",", " ,")
        ids = [1, *(vocab(word) for word in words.split()), 2]
        assert np.array_equal(images[one], features[one // 5])
        assert captions[one].tolist() == [len(ids), sum(ids)]


def our_model(vocab, kind=None):
    from model import VSE

    torch.manual_seed(1)
    given = {"data_name": "tiny_precomp", "img_dim": 8, "embed_size": 16, "cnn_type": "vgg19"}
    given |= {"finetune": False, "use_abs": False, "no_imgnorm": False, "word_dim": 6}
    return (kind or VSE)(Namespace(**given, vocab_size=len(vocab), num_layers=1))


@pytest.mark.parametrize("code", ["vsepp", "hal"])
def test_our_model_over_pytorch_s_loader(drawn_data, code):
    from functools import partial

    from data import PrecompDataset, collate_fn
    from evaluation import encode_data
    from vocab import build_vocab

    vocab = build_vocab(str(drawn_data), "tiny_precomp", threshold=1)
    model = our_model(vocab)
    dataset = PrecompDataset(str(drawn_data / "tiny_precomp"), "test", vocab)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=7, shuffle=True, collate_fn=partial(collate_fn, code=code)
    )
    images, captions = encode_data(model, loader, logging=silent)
    for one in range(30):
        image, words, *_ = dataset[one]
        with torch.no_grad():
            own = model.forward_emb(image.unsqueeze(0), words.unsqueeze(0), [len(words)])
        assert np.abs(images[one] - own[0][0].numpy()).max() < 1e-6
        assert np.abs(captions[one] - own[1][0].numpy()).max() < 1e-6


def test_a_model_made_of_ours_is_asked_by_its_own_forward_emb(drawn_data):
    from data import get_test_loader
    from evaluation import encode_data
    from model import VSE
    from vocab import build_vocab

    class Doubled(VSE):
        def forward_emb(self, images, captions, lengths):
            images, captions = super().forward_emb(images, captions, lengths)
            return 2 * images, 3 * captions

    vocab = build_vocab(str(drawn_data), "tiny_precomp", threshold=1)
    opt = Namespace(data_path=str(drawn_data))
    loader = get_test_loader("test", "tiny_precomp", vocab, 224, 7, 0, opt)
    found = encode_data(our_model(vocab, Doubled), loader, logging=silent)
    plain = encode_data(our_model(vocab), loader, logging=silent)
    for part, factor in zip((0, 1), (2, 3)):
        assert np.abs(found[part] - factor * plain[part]).max() < 1e-6


# i2t, t2i, the similarities ---------------------------------------------------------------------

SCAN = dict(np.load(REFERENCE / "scan/evaluation.npz"))

SCAN_CASES = json.loads((REFERENCE / "scan/evaluation.json").read_text())

VSE_INFTY = dict(np.load(REFERENCE / "vse_infty/metrics.npz"))

VSE_INFTY_CASES = json.loads((REFERENCE / "vse_infty/metrics.json").read_text())


@pytest.mark.parametrize("case", SCAN_CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("sharded", [False, True], ids=["recorded scores", "own scores"])
def test_scan_s_validation_gives_its_ranks(case, sharded):
    from evaluation import i2t, shard_xattn_i2t, shard_xattn_t2i, t2i

    opt, name = Namespace(**case["options"]), case["name"]
    img_embs, cap_embs, cap_lens = SCAN["images"], SCAN["captions"], SCAN["lengths"]
    sims = SCAN[f"{name}_scores"]
    if sharded:
        shard = {"t2i": shard_xattn_t2i, "i2t": shard_xattn_i2t}[opt.cross_attn]
        sims = shard(img_embs, cap_embs, cap_lens, opt, shard_size=128)
        assert np.abs(sims - SCAN[f"{name}_scores"]).max() < 1e-12
    (r1, r5, r10, medr, meanr), (ranks, top1) = i2t(
        img_embs, cap_embs, cap_lens, sims, return_ranks=True
    )
    assert [r1, r5, r10, medr, meanr] == pytest.approx([*case["i2t"].values()], abs=1e-9)
    assert np.array_equal(ranks, SCAN[f"{name}_i2t_ranks"])
    assert np.array_equal(top1, SCAN[f"{name}_i2t_top1"])
    (r1i, r5i, r10i, medri, meanr), (ranks, top1) = t2i(
        img_embs, cap_embs, cap_lens, sims, None, True
    )
    assert [r1i, r5i, r10i, medri, meanr] == pytest.approx([*case["t2i"].values()], abs=1e-9)
    assert np.array_equal(ranks, SCAN[f"{name}_t2i_ranks"])
    assert np.array_equal(top1, SCAN[f"{name}_t2i_top1"])


@pytest.mark.parametrize("case", VSE_INFTY_CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["arrays", "tensors"])
def test_vse_infty_s_validation_gives_its_recalls(case, kind):
    from evaluation import compute_sim, i2t, t2i

    img_embs, cap_embs = (
        kind(VSE_INFTY[f"{case['name']}_{part}_embeddings"]) for part in ("image", "caption")
    )
    sims = compute_sim(img_embs, cap_embs)
    assert sims.shape == (40, 200) and sims.dtype == np.float64
    npts = img_embs.shape[0]
    assert i2t(npts, sims) == pytest.approx(tuple(case["i2t"].values()), abs=1e-9)
    assert t2i(npts, sims) == pytest.approx(tuple(case["t2i"].values()), abs=1e-9)


def test_vse_infty_s_ranks_and_mode():
    from evaluation import i2t, t2i

    sims = np.random.default_rng(0).standard_normal((N, 5 * N))
    expected = loops.ranks(sims)
    recall, (ranks, top1) = i2t(N, sims, return_ranks=True, mode="coco")
    assert ranks.tolist() == expected[0] and recall == pytest.approx(loops.recall(expected[0]))
    assert top1.tolist() == [row.index(max(row)) for row in sims.tolist()]
    recall, (ranks, top1) = t2i(npts=N, sims=sims, return_ranks=True)
    assert ranks.tolist() == expected[1] and recall == pytest.approx(loops.recall(expected[1]))
    assert top1.tolist() == [column.index(max(column)) for column in sims.T.tolist()]


@pytest.mark.parametrize(
    "call",
    [
        lambda f, sims, x: f(x[0], x[1], x[2], sims),
        lambda f, sims, x: f(x[0], x[1], caplens=x[2], sims=sims),
        lambda f, sims, x: f(x[0], x[1], x[2], sims=sims),
        lambda f, sims, x: f(images=x[0], captions=x[1], caplens=x[2], sims=sims),
        lambda f, sims, x: f(sims),
        lambda f, sims, x: f(sims=sims),
        lambda f, sims, x: f(sims, None),
        lambda f, sims, x: f(N, sims),
        lambda f, sims, x: f(np.int64(N), sims=sims),
        lambda f, sims, x: f(sims.astype(np.float32)),
        lambda f, sims, x: f(x[0], x[1]),
        lambda f, sims, x: f(x[0], x[1], None, "cosine"),
        lambda f, sims, x: f(x[0], captions=x[1], measure="cosine"),
        lambda f, sims, x: f(np.repeat(x[0], 5, 0), x[1], measure="cosine"),
    ],
)
def test_every_call_of_i2t_and_t2i_gives_the_same(call):
    from evaluation import i2t, t2i

    rng = np.random.default_rng(3)
    images, captions = rng.standard_normal((N, 4)), rng.standard_normal((5 * N, 4))
    sims, others = images @ captions.T, (images, captions, LENGTHS)
    for function, ranks in zip((i2t, t2i), loops.ranks(sims)):
        assert call(function, sims, others) == pytest.approx(loops.recall(ranks))


def test_scan_s_npts_limits_the_queries():
    from evaluation import i2t, t2i

    sims = np.random.default_rng(1).standard_normal((N, 5 * N))
    expected = loops.ranks(sims)
    _, (ranks, _) = i2t(None, None, LENGTHS, sims, 3, True)
    assert ranks.tolist() == expected[0][:3]
    _, (ranks, _) = t2i(None, None, LENGTHS, sims, npts=3, return_ranks=True)
    assert ranks.tolist() == expected[1][:15]


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda i2t, x: i2t(x, x, LENGTHS), "SCAN's call has similarities in the fourth place"),
        (lambda i2t, x: i2t(N, x.T), "8 captions for 40 images"),
        (lambda i2t, x: i2t(N, x[0]), r"the similarities have the shape \(40,\)"),
        (lambda i2t, x: i2t(N + 1, x), "npts is 9 for 8 images"),
    ],
    ids=["no similarities", "turned", "a row", "too many"],
)
def test_a_call_that_fits_no_code_is_refused_with_a_sentence(call, said):
    from evaluation import i2t

    with pytest.raises(InputError, match=said):
        call(i2t, np.random.default_rng(2).standard_normal((N, 5 * N)))


def test_sgraf_s_similarity_in_shards():
    from evaluation import encode_data, i2t, shard_attn_scores, t2i

    class Reasoning(WordByWord):
        def forward_sim(self, img_emb, cap_emb, cap_lens):
            sims = []
            for words, n in zip(cap_emb, cap_lens):
                sims.append((img_emb.mean(1) * words[:n].mean(0)).sum(1))
            return torch.stack(sims, 1)

    model = Reasoning()
    img_embs, cap_embs, cap_lens = encode_data(
        model, Loader(lambda *parts: parts, REGIONS, SHUFFLED), logging=silent
    )
    img_embs = np.array([img_embs[i] for i in range(0, len(img_embs), 5)])
    sims = shard_attn_scores(model, img_embs, cap_embs, cap_lens, Namespace(), shard_size=3)
    expected = [
        [
            sum(REGIONS[i][:, k].mean() * mean_of(TOKENS[c])[k] for k in range(6))
            for c in range(5 * N)
        ]
        for i in range(N)
    ]
    assert np.abs(sims - expected).max() < 1e-6
    image_ranks, caption_ranks = loops.ranks(np.array(expected))
    (r1, r5, r10, medr, meanr) = i2t(img_embs, cap_embs, cap_lens, sims)
    assert (r1, r5, r10, medr, meanr) == pytest.approx(loops.recall(image_ranks))
    assert t2i(img_embs, cap_embs, cap_lens, sims) == pytest.approx(loops.recall(caption_ranks))


# The released checkpoints, step by step ---------------------------------------------------------


class AnyModel:
    """A model that is not one of ours, for all that encode_data can see."""

    def __init__(self, model):
        self.model = model.eval()

    def forward_emb(self, images, captions, lengths):
        return self.model.forward_emb(images, captions, lengths)


def check_ranks(found, expected):
    """Both directions' results against the released ranks and top-1 items."""
    for name, (recall, (ranks, top1)) in zip(("i2t", "t2i"), found):
        assert np.array_equal(ranks, expected[f"{name}_ranks"])
        assert np.array_equal(top1, expected[f"{name}_top1"])
        assert recall == pytest.approx(loops.recall(expected[f"{name}_ranks"].tolist()))


@pytest.mark.parametrize("wrapped", [lambda model: model, AnyModel], ids=["ours", "any"])
@pytest.mark.parametrize("run", ["t2i", "i2t"])
def test_scan_s_released_checkpoint_by_its_evaluation(run, wrapped):
    import evaluation
    from data import get_test_loader
    from model import SCAN
    from vocab import deserialize_vocab

    folder = REFERENCE / "scan/checkpoints"
    checkpoint = torch.load(folder / f"runs/{run}/model_best.pth.tar", weights_only=False)
    opt = checkpoint["opt"]
    opt.data_path = str(folder / "data")
    vocab = deserialize_vocab(str(folder / f"vocab/{opt.data_name}_vocab.json"))
    opt.vocab_size = len(vocab)
    model = SCAN(opt)
    model.load_state_dict(checkpoint["model"])
    loader = get_test_loader("test", opt.data_name, vocab, opt.batch_size, 0, opt)
    img_embs, cap_embs, cap_lens = evaluation.encode_data(wrapped(model), loader, logging=silent)
    expected = np.load(folder / f"expected_{run}.npz")
    assert np.array_equal(cap_lens, expected["lengths"])
    img_embs = np.array([img_embs[i] for i in range(0, len(img_embs), 5)])
    shard = getattr(evaluation, f"shard_xattn_{opt.cross_attn}")
    sims = shard(img_embs, cap_embs, cap_lens, opt, shard_size=128)
    assert np.abs(sims - expected["scores"]).max() < 1e-6
    found = [
        function(img_embs, cap_embs, cap_lens, sims, return_ranks=True)
        for function in (evaluation.i2t, evaluation.t2i)
    ]
    check_ranks(found, expected)


@pytest.mark.parametrize("wrapped", [lambda model: model, AnyModel], ids=["ours", "any"])
@pytest.mark.parametrize("run, reading", [("local", "released"), ("max", "released"), ("mb", None)])
def test_hal_s_released_checkpoint_by_its_evaluation(run, reading, wrapped):
    """With None, captions are read as text, which the model was not trained on."""
    from data import get_test_loader
    from evaluation import encode_data, i2t, t2i
    from model import VSE
    from vocab import read_vocabulary

    folder = REFERENCE / "released_checkpoints"
    checkpoint = torch.load(folder / f"runs/{run}/model_best.pth.tar", weights_only=False)
    opt = checkpoint["opt"]
    opt.data_path, opt.caption_reading = str(folder / "data"), reading
    vocab = read_vocabulary(folder / "vocab/f8k_precomp_vocab.pkl")
    opt.vocab_size = len(vocab)
    model = VSE(opt)
    model.load_state_dict(checkpoint["model"])
    loader = get_test_loader("test", opt.data_name, vocab, opt.crop_size, opt.batch_size, 0, opt)
    img_embs, cap_embs = encode_data(wrapped(model), loader, logging=silent)
    expected = np.load(folder / f"expected_{run}.npz")
    assert np.abs(img_embs[::5] - expected["image_embeddings"]).max() < 1e-6
    if reading is None:
        assert np.abs(cap_embs - expected["caption_embeddings"]).max() > 0.1
        return
    assert np.abs(cap_embs - expected["caption_embeddings"]).max() < 1e-6
    found = [f(img_embs, cap_embs, measure=opt.measure, return_ranks=True) for f in (i2t, t2i)]
    check_ranks(found, expected)


def test_vse_infty_s_released_checkpoint_by_its_evaluation():
    from data import get_test_loader
    from evaluation import compute_sim, encode_data, i2t, load_for_evaluation, t2i
    from vocab import deserialize_vocab

    folder = REFERENCE / "vse_infty/released_checkpoint"
    path = str(folder / "runs/f30k_butd_region_bigru/model_best.pth")
    opt = torch.load(path, weights_only=False)["opt"]
    opt.data_path = str(folder / "data/f30k")
    vocab = deserialize_vocab(str(folder / "vocab/f30k_precomp_vocab.json"))
    vocab.add_word("<mask>")
    model = load_for_evaluation(
        Namespace(model_path=path, vocab_path=str(folder / "vocab"), device="cpu")
    ).model
    loader = get_test_loader("test", opt.data_name, vocab, opt.batch_size, 0, opt)
    img_embs, cap_embs = encode_data(AnyModel(model), loader, logging=silent, backbone=False)
    img_embs = np.array([img_embs[i] for i in range(0, len(img_embs), 5)])
    expected = np.load(folder / "expected.npz")
    assert np.abs(img_embs - expected["image_embeddings"]).max() < 1e-5
    assert np.abs(cap_embs - expected["caption_embeddings"]).max() < 1e-5
    sims = compute_sim(img_embs, cap_embs)
    npts = img_embs.shape[0]
    check_ranks([f(npts, sims, return_ranks=True) for f in (i2t, t2i)], expected)


# evalrank, and what is left out -----------------------------------------------------------------


def test_vse_infty_s_evalrank_with_what_it_does_not_take(evaluated):
    from evaluation import evalrank

    path = "runs/runX/model_best.pth.tar"
    found = evalrank(path, split="test", fold5=False, save_path=None, cxc=False)
    assert found.rsum == pytest.approx(sum(found.i2t[:3]) + sum(found.t2i[:3]))
    for more in ({"save_path": "sims.npy"}, {"cxc": True}):
        with pytest.raises(InputError, match="no save_path and no cxc here: run compute_results"):
            evalrank(path, split="test", **more)


@pytest.mark.parametrize("name", ["eval_ensemble", "softmax"])
def test_what_is_left_out_says_what_to_use(name):
    import evaluation

    with pytest.raises(InputError, match=f"evaluation.{name} is left out here: .*use|takes"):
        getattr(evaluation, name)(["runs/a", "runs/b"], fold5=True)


def test_vsepp_s_meters_print_as_it_expects():
    from evaluation import AverageMeter, LogCollector

    logger = LogCollector()
    logger.update("Le", 3.0, 2)
    logger.update("Le", 6.0, 1)
    assert str(logger) == "Le 6.0000 (4.0000)"
    batch_time = AverageMeter()
    batch_time.update(0.5)
    assert (batch_time.val, batch_time.count) == (0.5, 0)
