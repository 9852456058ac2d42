"""The models: VSE, with one vector for an image and for a caption, and SCAN, with many.

VSE is VSE++ (Faghri et al., BMVC 2018) as HAL (Liu et al., AAAI 2020) trains it. With regions it
goes up to VSE-infinity (Chen et al., CVPR 2021: MLP, bi-directional GRU and GPO). SCAN (Lee et al.,
ECCV 2018) keeps a vector for each region and word. State names and the order of random draws are
those of the released codes: their checkpoints load here, ours load there, and one seed gives the
same initial weights.
"""

import math
import re
from argparse import Namespace
from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import loss
from inputs.captions import is_precomputed
from layers.cross_attention import (
    EPS,
    cosine_similarity,
    cross_attention_similarities,
    func_attention,
    l1norm,
    shard_xattn_i2t,
    shard_xattn_t2i,
    xattn_score_i2t,
    xattn_score_t2i,
)
from layers.gru import last_states, word_states
from layers.pooling import GPO, POOLINGS, mean_pool, positional_encoding, region_lengths
from layers.pretrained import _build_cnn
from layers.training_calls import TrainingCalls, both_states
from loss import cosine_sim, order_sim
from runtime.device import to_device
from runtime.errors import InputError, check_choice, left_out

# What code around VSE++, HAL, SCAN and VSE-infinity imports from its model.py; those not defined
# below are re-exported.
__all__ = [
    "SCAN",
    "VSE",
    "ContrastiveLoss",
    "EncoderImage",
    "EncoderText",
    "VSEModel",
    "cosine_sim",
    "cosine_similarity",
    "func_attention",
    "get_image_encoder",
    "get_text_encoder",
    "l1norm",
    "l2norm",
    "order_sim",
    "shard_xattn_i2t",
    "shard_xattn_t2i",
    "xattn_score_i2t",
    "xattn_score_t2i",
]

IMAGE_POOLINGS = (*POOLINGS, "gpo")
TEXT_POOLINGS = ("last", *IMAGE_POOLINGS)
ENC_TYPES = ("basic", "mlp")
REGION_TYPES = ("basic", "weight_norm")  # SCAN's
GPO_WIDTHS = 32, 32  # positional encoding and GRU, as VSE-infinity fixes them
NORM_EPSILON = 1e-8  # VSE-infinity adds it to the length


def l2norm(X, dim=None, eps=None):
    """Vectors along `dim` divided by their length + eps.

    A zero vector stays zero, and its gradient stays finite. `l2norm(X)`, as in VSE++'s code, takes
    the rows of a matrix and no eps. `l2norm(X, dim)`, as in SCAN's, SGRAF's and VSE-infinity's,
    takes 1e-8. Raises InputError without a dim if there is more than one that could be meant.
    """
    if dim is None and X.dim() > 2:
        raise InputError(
            f"l2norm of a tensor of shape {tuple(X.shape)} needs a dim: without one, VSE++'s code "
            "means 1, and SGRAF's and VSE-infinity's the last"
        )
    eps = (0 if dim is None else NORM_EPSILON) if eps is None else eps
    lengths = torch.linalg.vector_norm(X, dim=-1 if dim is None else dim, keepdim=True)
    return X / (lengths.masked_fill(lengths == 0, 1) + eps)


def _batched(parts, device, dtype=None):
    """One tensor on the device, of a tensor, an array or a list of these, padded with zeros.

    dtype: what anything but a tensor is cast to.
    """
    if isinstance(parts, (list, tuple)):
        parts = pad_sequence([torch.as_tensor(part) for part in parts], batch_first=True).to(dtype)
    elif not isinstance(parts, torch.Tensor):
        parts = torch.as_tensor(parts).to(dtype)
    return to_device(parts, device)


def _init_fc(fc):
    """Draw a linear layer as the released code does: uniform in +-sqrt(6 / (in + out)), bias 0."""
    bound = math.sqrt(6.0) / math.sqrt(fc.in_features + fc.out_features)
    with torch.no_grad():
        fc.weight.uniform_(-bound, bound)
        fc.bias.zero_()


def _take_word_vectors(encoder, rows, found):
    """Begin with pretrained word vectors: rows (vocab_size, word_dim), where found (n,) is True."""
    with torch.no_grad():
        encoder.embed.weight[found] = rows[found]


def _hidden_layers(width, embed_size, layers):
    """The layers before the last one of `layers`: linear and ReLU, (n, width) -> (n, embed_size).

    One layer has none before it, and passes its input on.
    """
    widths = [width] + [embed_size] * (layers - 1)
    pairs = [(nn.Linear(*pair), nn.ReLU()) for pair in zip(widths, widths[1:])]
    return nn.Sequential(*[part for pair in pairs for part in pair])


def _first_width(state):
    """The width that an encoder of `_hidden_layers` and `fc` takes, from its state."""
    return state.get("hidden.0.weight", state["fc.weight"]).shape[1]


def _pool(encoder, pooling, features, lengths):
    """(B, K, D), (B,) -> (B, D) by a pooling's name; GPO in float32, under autocast too."""
    if pooling != "gpo":
        return POOLINGS[pooling](features, lengths)
    with torch.autocast(features.device.type, enabled=False):
        return encoder.gpool(features, lengths)[0]


class _RegionMLP(nn.Module):
    """VSE-infinity's second way from a region to the embedding: W2 relu(bn(W1 r + b1)) + b2.

    In training, batch norm's statistics cover all B * K rows, padding included, as in the released
    code. bns.1 is unused; it is there because released checkpoints have it.
    """

    def __init__(self, img_dim, embed_size):
        super().__init__()
        hidden = embed_size // 2
        self.layers = nn.ModuleList([nn.Linear(img_dim, hidden), nn.Linear(hidden, embed_size)])
        self.bns = nn.ModuleList([nn.BatchNorm1d(hidden), nn.BatchNorm1d(embed_size)])

    def forward(self, regions):
        """(B, K, img_dim) -> (B, K, embed_size); InputError for a training batch of one region."""
        # Under torchrun, batch norm also covers the other processes' regions.
        alone = type(self.bns[0]) is nn.BatchNorm1d
        if self.training and alone and regions.shape[:2].numel() == 1:
            raise InputError(
                "a training batch of one image with one region has no variance for the MLP's batch "
                "norm: give a larger --batch_size"
            )
        hidden = self.layers[0](regions.flatten(0, 1)).to(self.bns[0].weight.dtype)
        return self.layers[1](self.bns[0](hidden).relu()).unflatten(0, regions.shape[:2])


class EncoderImagePrecomp(nn.Module):
    """Precomputed features (B, img_dim), or regions (B, K, img_dim), -> embeddings (B, embed_size).

    use_abs: by name, or with no_imgnorm by place; SCAN's third argument is no_imgnorm.
    image_pooling: mean, max, kmax or gpo, for regions only; None is the mean.
    precomp_enc_type: basic, `layers` linear layers for each vector, with ReLU between them; mlp,
        VSE-infinity's encoder (its own checkpoints call that basic, and pool by gpo).
    """

    def __new__(cls, *arguments, **named):
        if cls is EncoderImagePrecomp and len(arguments) == 3:
            raise InputError(
                "EncoderImagePrecomp's third argument is use_abs in VSE++'s code and no_imgnorm in "
                "SCAN's, which keeps a vector for each region: name it, or call RegionEncoder"
            )
        return super().__new__(cls)

    def __init__(
        self,
        img_dim,
        embed_size,
        use_abs=False,
        no_imgnorm=False,
        image_pooling=None,
        precomp_enc_type="basic",
        layers=1,
    ):
        super().__init__()
        self.use_abs, self.no_imgnorm, self.image_pooling = use_abs, no_imgnorm, image_pooling
        self.hidden = _hidden_layers(img_dim, embed_size, layers)
        self.fc = nn.Linear(img_dim if layers == 1 else embed_size, embed_size)
        self.mlp = _RegionMLP(img_dim, embed_size) if precomp_enc_type == "mlp" else None
        if image_pooling == "gpo":
            self.gpool = GPO(*GPO_WIDTHS)
        _init_fc(self.fc)  # last, as in the released code: the order of draws decides the weights

    def forward(self, images, image_lengths=None):
        """Embeddings (B, embed_size) of images (B, img_dim) or (B, K, img_dim), or of photos.

        image_lengths: (B,) the number of each image's regions; None: all rows but those of zeros
            at the end. Photos: what the subclass's `features` takes.
        """
        features = self.features(images)
        if features.dim() == 3:
            embeddings = self._pooled(features, image_lengths)
        elif self.image_pooling or self.mlp:
            raise InputError(
                f"the model takes regions, but its images come as {tuple(features.shape)}: give "
                "features of shape (images, regions, width)"
            )
        else:
            embeddings = self.fc(self.hidden(features))
        embeddings = embeddings.to(self.fc.weight.dtype)  # autocast's products may be in bf16
        if not self.no_imgnorm:
            embeddings = l2norm(embeddings, eps=NORM_EPSILON if self.mlp else 0)
        return embeddings.abs() if self.use_abs else embeddings

    def _pooled(self, regions, image_lengths):
        """Embed each region and pool those of an image: (B, K, img_dim) -> (B, embed_size)."""
        pooling = self.image_pooling or "mean"
        if image_lengths is None:
            lengths = region_lengths(regions)
        else:
            lengths = torch.as_tensor(image_lengths).long()  # VSE-infinity's are floats
        # A linear layer commutes with the mean: pooled first, it costs 1 / K.
        if pooling == "mean" and not self.mlp and not len(self.hidden):
            return self.fc(mean_pool(regions, lengths))
        embedded = self.fc(self.hidden(regions)).to(self.fc.weight.dtype)
        if self.mlp:
            embedded = embedded + self.mlp(regions)
        if not len(regions):  # this process has no pair, but had to take part in batch norm
            return embedded.sum(1)
        return _pool(self, pooling, embedded, lengths)

    def features(self, images):
        """The input of `fc`: here the images themselves."""
        return images

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Load the state, ignoring keys that this encoder does not have (those of a full model)."""
        own = self.state_dict()
        return super().load_state_dict(
            {name: value for name, value in state_dict.items() if name in own}, strict, assign
        )


def _as_data_parallel(module):
    """Wrap a module so that its state names begin with `module.`, as the released code's do.

    There, DataParallel puts the prefix.
    """
    return nn.Sequential(OrderedDict(module=module))


class EncoderImageFull(EncoderImagePrecomp):
    """Photos (B, 3, H, W), ImageNet-normalised -> embeddings (B, embed_size), by a torchvision CNN.

    Only the CNN's last linear layer is removed: VGG keeps its classifier's ReLU and dropout.
    The CNN's weights are frozen unless `finetune` is set. Frozen or not, it follows train and eval
    mode, so that dropout and batch norm act in training, as in the released code.
    """

    def __init__(
        self,
        embed_size,
        finetune=False,
        cnn_type="vgg19",
        use_abs=False,
        no_imgnorm=False,
        cnn_weights="imagenet",
    ):
        cnn = _build_cnn(cnn_type, cnn_weights)
        if cnn_type.startswith("vgg"):
            feature_size = cnn.classifier[-1].in_features
            cnn.classifier = cnn.classifier[:-1]
            cnn.features = _as_data_parallel(cnn.features)
        else:
            feature_size = cnn.fc.in_features
            cnn.fc = nn.Identity()
            cnn = _as_data_parallel(cnn)
        super().__init__(feature_size, embed_size, use_abs, no_imgnorm)
        self.cnn = cnn.requires_grad_(finetune)

    def features(self, images):
        """The CNN's features, L2-normalised: (B, feature_size).

        Raises InputError if batch norm sees a single value for each channel, in training.
        """
        try:
            return l2norm(self.cnn(images))
        except ValueError as error:
            if "more than 1 value" not in str(error):
                raise
            raise InputError(
                f"a training batch of one photo of {images.shape[-1]} pixels has no variance for "
                "the CNN's batch norm: give a larger --crop_size, or another --batch_size or "
                "--micro_batch"
            ) from error

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Load the state, also one with the names of an older torchvision's VGG classifier."""
        old_names = {
            "cnn.classifier.1.": "cnn.classifier.0.",
            "cnn.classifier.4.": "cnn.classifier.3.",
        }
        renamed = {}
        for name, value in state_dict.items():
            prefix = name[: len("cnn.classifier.0.")]
            renamed[old_names.get(prefix, prefix) + name[len(prefix) :]] = value
        return super().load_state_dict(renamed, strict, assign)


def _image_encoder(
    data_name,
    img_dim,
    embed_size,
    finetune=False,
    cnn_type="vgg19",
    use_abs=False,
    no_imgnorm=False,
    cnn_weights="imagenet",
    image_pooling=None,
    precomp_enc_type="basic",
    img_layers=1,
):
    """The encoder of precomputed features if data_name ends in `precomp`, else of photos."""
    check_choice("image_pooling", image_pooling or "mean", IMAGE_POOLINGS)
    check_choice("precomp_enc_type", precomp_enc_type, ENC_TYPES)
    if is_precomputed(data_name):
        return EncoderImagePrecomp(
            img_dim, embed_size, use_abs, no_imgnorm, image_pooling, precomp_enc_type, img_layers
        )
    if image_pooling or precomp_enc_type == "mlp" or img_layers > 1:
        raise InputError(
            "--image_pooling, --precomp_enc_type mlp and --img_layers are for precomputed "
            f"features, but {data_name} holds photos: leave them out"
        )
    return EncoderImageFull(embed_size, finetune, cnn_type, use_abs, no_imgnorm, cnn_weights)


def EncoderImage(
    data_name=None,
    img_dim=None,
    embed_size=False,  # SGRAF's third argument is no_imgnorm
    finetune=False,
    cnn_type="vgg19",
    use_abs=False,
    no_imgnorm=False,
    cnn_weights="imagenet",
    *,
    image_pooling=None,
    precomp_enc_type=None,
):
    """The image encoder that a call names, in the order of VSE++'s, SCAN's or SGRAF's code.

    VSE++'s and HAL's, the signature above: a vector for each image, of precomputed features if
        data_name ends in `precomp`, else of photos, through a CNN.
    SCAN's, (data_name, img_dim, embed_size, precomp_enc_type, no_imgnorm=False), recognised by the
        type, if there is no image_pooling: a vector for each region.
    SGRAF's, (img_dim, embed_size, no_imgnorm=False), recognised by the number in the first place:
        the same.
    Raises InputError for an unknown choice, and for one that does not go with photos.
    """
    if not isinstance(data_name, str):
        if data_name is None or img_dim is None:  # by name
            return RegionEncoder(data_name or img_dim, embed_size, no_imgnorm=no_imgnorm)
        return RegionEncoder(data_name, img_dim, no_imgnorm=embed_size or no_imgnorm)
    if isinstance(finetune, str):
        no_imgnorm = no_imgnorm if cnn_type == "vgg19" else cnn_type
        return RegionEncoder(img_dim, embed_size, finetune, no_imgnorm)
    if precomp_enc_type in REGION_TYPES and image_pooling is None:
        return RegionEncoder(img_dim, embed_size, precomp_enc_type, no_imgnorm)
    return _image_encoder(
        data_name, img_dim, embed_size, finetune, cnn_type, use_abs, no_imgnorm, cnn_weights,
        image_pooling, precomp_enc_type or "basic",
    )  # fmt: skip


def _refuse_grid(precomp_enc_type):
    """Raise InputError for VSE-infinity's image encoders other than the one of regions."""
    if precomp_enc_type != "basic":
        raise InputError(
            f"VSE-infinity's image encoder {precomp_enc_type} is left out here: precomp_enc_type "
            "basic takes regions, and extract_features.py makes them of photos"
        )


def get_image_encoder(
    data_name,
    img_dim,
    embed_size,
    precomp_enc_type="basic",
    backbone_source=None,
    backbone_path=None,
    no_imgnorm=False,
):
    """VSE-infinity's image encoder for regions, by its name and arguments.

    data_name, backbone_source and backbone_path are unused. Raises InputError for its grid encoder.
    """
    _refuse_grid(precomp_enc_type)
    return EncoderImagePrecomp(
        img_dim, embed_size, no_imgnorm=no_imgnorm, image_pooling="gpo", precomp_enc_type="mlp"
    )


def get_text_encoder(
    vocab_size, word_dim, embed_size, num_layers, use_bi_gru=True, no_txtnorm=False
):
    """VSE-infinity's text encoder with GRU, by its name."""
    return EncoderText(
        vocab_size,
        word_dim,
        embed_size,
        num_layers,
        text_pooling="gpo",
        bi_gru=use_bi_gru,
        no_txtnorm=no_txtnorm,
    )


class EncoderText(nn.Module):
    """Word ids -> L2-normalised embeddings, by a GRU.

    use_abs: by name alone, for VSE++'s and SCAN's code mean different things by a fifth argument.
    text_pooling: last takes the top layer's state at a caption's last word; mean, max, kmax and gpo
        pool the states at all words.
    bi_gru: the mean of both directions' states at each word (with last, of the forward state at the
        last word and the backward state at the first). VSE-infinity's encoder is gpo with bi_gru.
    SCAN's and SGRAF's call, EncoderText(vocab_size, word_dim, embed_size, num_layers, use_bi_gru,
        no_txtnorm), gives a `WordEncoder`.
    """

    def __new__(cls, *arguments, **named):
        if cls is EncoderText and (len(arguments) > 5 or "use_bi_gru" in named):
            cls = WordEncoder
        elif cls is EncoderText and len(arguments) == 5:
            raise InputError(
                "EncoderText's fifth argument is use_abs in VSE++'s code and use_bi_gru in SCAN's "
                "and SGRAF's: name it"
            )
        return super().__new__(cls)

    def __init__(
        self,
        vocab_size,
        word_dim,
        embed_size,
        num_layers,
        use_abs=False,
        *,
        text_pooling="last",
        bi_gru=False,
        no_txtnorm=False,
    ):
        super().__init__()
        check_choice("text_pooling", text_pooling, TEXT_POOLINGS)
        self.use_abs, self.no_txtnorm, self.text_pooling = use_abs, no_txtnorm, text_pooling
        self.embed = nn.Embedding(vocab_size, word_dim)
        if text_pooling == "gpo":
            self.gpool = GPO(*GPO_WIDTHS)
        self.rnn = nn.GRU(word_dim, embed_size, num_layers, batch_first=True, bidirectional=bi_gru)
        with torch.no_grad():
            self.embed.weight.uniform_(-0.1, 0.1)

    @property
    def width(self):
        """Width of an embedding."""
        return self.rnn.hidden_size

    @property
    def dtype(self):
        """Type of the weights and embeddings."""
        return self.embed.weight.dtype

    @property
    def device(self):
        """Where the weights live."""
        return self.embed.weight.device

    take_word_vectors = _take_word_vectors

    @staticmethod
    def sizes(state):
        """{option: size} as a state's shapes show them; KeyError for another encoder's state."""
        vocab_size, word_dim = state["embed.weight"].shape
        layers = sum(bool(re.fullmatch(r"rnn\.weight_ih_l\d+", str(name))) for name in state)
        return {
            "vocab_size": vocab_size,
            "word_dim": word_dim,
            "num_layers": layers,
            "embed_size": state["rnn.weight_hh_l0"].shape[1],
        }

    def forward(self, x, lengths):
        """x: (B, T) word ids, longest caption first; lengths: (B,) -> (B, embed_size)."""
        embeddings = self._by(
            self._last if self.text_pooling == "last" else self._pooled, x, lengths
        )
        if not self.no_txtnorm:
            embeddings = l2norm(embeddings, eps=0 if self.text_pooling == "last" else NORM_EPSILON)
        return embeddings.abs() if self.use_abs else embeddings

    def _by(self, encode, captions, lengths):
        """encode(captions, lengths, dtype of the products), returned in the weights' dtype."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        # layers/gru.py itself casts what it multiplies, and nothing else.
        with torch.autocast("cpu", enabled=False):
            return encode(captions, torch.as_tensor(lengths).cpu(), dtype).to(
                self.embed.weight.dtype
            )

    def _packed(self, captions, lengths):
        return self.rnn(pack_padded_sequence(self.embed(captions), lengths, batch_first=True))

    def _last(self, captions, lengths, dtype):
        """(B, T) -> (B, embed_size): the final state; of two directions, the mean."""
        if captions.device.type == "cpu":
            return last_states(self.rnn, self.embed, captions, lengths, dtype)
        ends = self._packed(captions, lengths)[1]
        return (ends[-2] + ends[-1]) / 2 if self.rnn.bidirectional else ends[-1]

    def _states(self, captions, lengths, dtype):
        """(B, T) -> (B, T, embed_size): the state at every word, 0 past a caption's end.

        Of two directions, the mean.
        """
        if captions.device.type == "cpu":
            return word_states(self.rnn, self.embed, captions, lengths, dtype)
        states, _ = pad_packed_sequence(
            self._packed(captions, lengths)[0], batch_first=True, total_length=captions.shape[1]
        )
        states = states.to(self.embed.weight.dtype)
        return states.unflatten(2, (2, -1)).mean(2) if self.rnn.bidirectional else states

    def _pooled(self, captions, lengths, dtype):
        """(B, T) -> (B, embed_size): the states of all words, pooled."""
        return _pool(self, self.text_pooling, self._states(captions, lengths, dtype), lengths)


class TransformerText(nn.Module):
    """Embeddings (B, embed_size) of word ids by a small transformer (Vaswani et al., 2017).

    The worked example of another text encoder: it is entered in `TEXT_ENCODERS`, and this class
    holds all that the rest of the code asks of one (`width`, `dtype`, `device`, `sizes`). Word
    embeddings plus sinusoidal positions pass through `num_layers` of PyTorch's encoder layers, with
    dropout and normalisation first. Then a linear layer maps the state at the last word
    (text_pooling "last"), or all states pooled, to the embedding.
    """

    HEADS, WIDENING = 8, 4  # most heads; width of the feed-forward part, in multiples of word_dim

    def __init__(
        self,
        vocab_size,
        word_dim,
        embed_size,
        num_layers,
        use_abs=False,
        *,
        text_pooling="last",
        bi_gru=False,
        no_txtnorm=False,
    ):
        super().__init__()
        check_choice("text_pooling", text_pooling, TEXT_POOLINGS)
        if bi_gru or word_dim % 2:
            raise InputError(
                "--text_encoder transformer needs an even --word_dim, and does not go with --bi_gru"
            )
        self.use_abs, self.no_txtnorm, self.text_pooling = use_abs, no_txtnorm, text_pooling
        self.embed = nn.Embedding(vocab_size, word_dim)
        layer = nn.TransformerEncoderLayer(
            word_dim,
            math.gcd(self.HEADS, word_dim),
            self.WIDENING * word_dim,
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, num_layers, nn.LayerNorm(word_dim), enable_nested_tensor=False
        )
        if text_pooling == "gpo":
            self.gpool = GPO(*GPO_WIDTHS)
        self.fc = nn.Linear(word_dim, embed_size)

    width = property(lambda self: self.fc.out_features)
    dtype = property(lambda self: self.fc.weight.dtype)
    device = property(lambda self: self.fc.weight.device)

    take_word_vectors = _take_word_vectors

    @staticmethod
    def sizes(state):
        """{option: size} as a state's shapes show them; KeyError for another encoder's state."""
        vocab_size, word_dim = state["embed.weight"].shape
        layers = {
            str(name).split(".")[2] for name in state if str(name).startswith("layers.layers.")
        }
        return {
            "vocab_size": vocab_size,
            "word_dim": word_dim,
            "num_layers": len(layers),
            "embed_size": state["fc.weight"].shape[0],
        }

    def forward(self, captions, lengths):
        """captions: (B, T) word ids, padded with 0; lengths: (B,) -> (B, embed_size)."""
        lengths = torch.as_tensor(lengths)
        longest = captions.shape[1]
        positions = positional_encoding(longest, self.embed.embedding_dim)
        words = self.embed(captions) + to_device(positions.to(self.dtype), captions.device)
        beyond = to_device(torch.arange(longest) >= lengths.cpu().unsqueeze(1), captions.device)
        states = self.layers(words, src_key_padding_mask=beyond).to(self.dtype)
        if self.text_pooling == "last":
            last = (
                to_device(lengths.cpu() - 1, captions.device)
                .view(-1, 1, 1)
                .expand(-1, 1, states.shape[2])
            )
            pooled = states.gather(1, last).squeeze(1)
        else:
            pooled = _pool(
                self, self.text_pooling, states.masked_fill(beyond.unsqueeze(2), 0), lengths
            )
        embeddings = self.fc(pooled).to(self.dtype)
        if not self.no_txtnorm:
            embeddings = l2norm(embeddings)
        return embeddings.abs() if self.use_abs else embeddings


class FrozenTextHead(nn.Module):
    """Embeddings (B, embed_size) of the vectors (B, word_dim) that a frozen text model made.

    `num_layers` linear layers, with ReLU between them, drawn as those of images are.
    """

    def __init__(
        self,
        vocab_size,
        word_dim,
        embed_size,
        num_layers,
        use_abs=False,
        *,
        text_pooling="last",
        bi_gru=False,
        no_txtnorm=False,
    ):
        super().__init__()
        if text_pooling != "last" or bi_gru:
            raise InputError(
                "--text_features takes one vector a caption: leave out --text_pooling and --bi_gru"
            )
        self.use_abs, self.no_txtnorm = use_abs, no_txtnorm
        self.hidden = _hidden_layers(word_dim, embed_size, num_layers)
        self.fc = nn.Linear(word_dim if num_layers == 1 else embed_size, embed_size)
        _init_fc(self.fc)

    width = property(lambda self: self.fc.out_features)
    dtype = property(lambda self: self.fc.weight.dtype)
    device = property(lambda self: self.fc.weight.device)

    @staticmethod
    def sizes(state):
        """{option: size} as a state's shapes show them; KeyError for another encoder's state."""
        layers = sum(str(name).endswith("weight") for name in state)
        return {
            "word_dim": _first_width(state),
            "num_layers": layers,
            "embed_size": state["fc.weight"].shape[0],
        }

    def forward(self, texts, lengths):
        """texts: (B, word_dim); lengths: ignored."""
        embeddings = self.fc(self.hidden(texts)).to(self.dtype)
        if not self.no_txtnorm:
            embeddings = l2norm(embeddings)
        return embeddings.abs() if self.use_abs else embeddings


TEXT_ENCODERS = {"gru": EncoderText, "transformer": TransformerText, "features": FrozenTextHead}


class ContrastiveLoss(loss.ContrastiveLoss):
    """`loss.ContrastiveLoss`, also of SCAN's regions, words and lengths if opt has cross_attn."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.attends = bool(getattr(self.opt, "cross_attn", None))
        if self.attends:
            self.similarity = partial(cross_attention_similarities, opt=self.opt)

    def forward(self, im, s=None, *rest, s_l=None, **named):
        """The scalar loss of a batch's embeddings, or of its similarities im alone.

        With cross_attn, im (B, R, D), s (B, T, D) and s_l, the captions' lengths (B,), by place or
        by name. Otherwise as `loss.ContrastiveLoss`.
        """
        if not self.attends or s is None:
            return super().forward(im, s, *rest, **named)
        if len(rest) + (s_l is not None) != 1 or named:
            raise InputError(
                "SCAN's loss takes regions, words and the captions' lengths, and no memory bank: "
                "call it with (img_emb, cap_emb, cap_lens)"
            )
        return self.of_similarities(self.similarity(im, s, *rest, *([] if rest else [s_l])))


def _in_words_here(opt):
    """The options of a VSE as this project names them; VSE-infinity's name its encoders otherwise.

    VSE-infinity's are recognised by vse_mean_warmup_epochs. Raises InputError for its grid encoder.
    """
    if not hasattr(opt, "vse_mean_warmup_epochs") or hasattr(opt, "text_pooling"):
        return opt
    _refuse_grid(getattr(opt, "precomp_enc_type", "basic"))
    here = {"data_name": "precomp", "image_pooling": "gpo", "precomp_enc_type": "mlp"}
    here |= {"text_pooling": "gpo", "bi_gru": True}
    unknown = {"finetune": False, "cnn_type": "vgg19", "use_abs": False}
    return Namespace(**{**unknown, **vars(opt), **here})


class VSE(TrainingCalls):
    """An image encoder `img_enc` and a text encoder `txt_enc` with one joint embedding space.

    opt: needs data_name, img_dim, embed_size, finetune, cnn_type, use_abs, no_imgnorm, vocab_size,
        word_dim and num_layers. Optional, with their defaults: cnn_weights (imagenet),
        image_pooling (None: vectors, or the mean of regions), precomp_enc_type (basic),
        text_encoder (gru), text_pooling (last), bi_gru, no_txtnorm and amp (off). With amp "bf16"
        the encoders' matrix products are in bf16; weights, reductions and loss stay in float32.
        VSE-infinity's options make its encoders of regions and words. `TrainingCalls` reads more.
    """

    def __init__(self, opt):
        super().__init__()
        self.opt, opt = opt, _in_words_here(opt)
        self.amp = getattr(opt, "amp", "off") == "bf16"
        self.img_enc = _image_encoder(
            opt.data_name,
            opt.img_dim,
            opt.embed_size,
            opt.finetune,
            opt.cnn_type,
            opt.use_abs,
            opt.no_imgnorm,
            getattr(opt, "cnn_weights", "imagenet"),
            image_pooling=getattr(opt, "image_pooling", None),
            precomp_enc_type=getattr(opt, "precomp_enc_type", "basic"),
            img_layers=getattr(opt, "img_layers", 1),
        )
        text_encoder = TEXT_ENCODERS[getattr(opt, "text_encoder", "gru")]
        self.txt_enc = text_encoder(
            opt.vocab_size,
            opt.word_dim,
            opt.embed_size,
            opt.num_layers,
            use_abs=opt.use_abs,
            text_pooling=getattr(opt, "text_pooling", "last"),
            bi_gru=getattr(opt, "bi_gru", False),
            no_txtnorm=getattr(opt, "no_txtnorm", False),
        )

    attends = False  # True if there is a vector for each region and word, as in SCAN

    @property
    def device(self):
        """Where the weights are, and inputs are moved."""
        return self.txt_enc.device

    def no_embeddings(self):
        """An empty tensor (0, D) of embeddings, with this model's width, dtype and device."""
        return torch.empty(0, self.txt_enc.width, device=self.device, dtype=self.txt_enc.dtype)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def embed_images(self, images):
        """Features or images -> (B, embed_size), without gradients."""
        with torch.no_grad(), self._autocast():
            return self.img_enc(to_device(images, self.device))

    def embed_captions(self, captions, lengths):
        """Word ids, longest caption first -> (B, embed_size), without gradients."""
        with torch.no_grad(), self._autocast():
            return self.txt_enc(to_device(captions, self.device), lengths)

    def make_criterion(self):
        """The loss that the options name: a margin loss unless they have HAL's numbers or `loss`."""
        if hasattr(self.opt, "local_alpha") or getattr(self.opt, "loss", None):
            return ContrastiveLoss(self.opt)
        return ContrastiveLoss(self.opt, self.opt.margin, self.opt.max_violation)

    def forward_emb(self, images, captions, lengths, *rest, volatile=False, image_lengths=None):
        """A batch, longest caption first -> image and caption embeddings, each (B, embed_size).

        images, captions: tensors, or lists of tensors or arrays; lengths: (B,) in any form.
        volatile: without gradients (VSE++'s name for it). image_lengths: (B,) the number of each
            image's regions, as VSE-infinity passes it; None: all but zeros at the end.
        rest: a bool is volatile, a tensor of floats is image_lengths; a batch's ids and indices
            are ignored.
        """
        for part in rest:
            if isinstance(part, bool):
                volatile = part
            elif isinstance(part, torch.Tensor) and part.is_floating_point():
                image_lengths = part
        images = _batched(images, self.device, self.txt_enc.dtype)
        captions = _batched(captions, self.device, torch.int64)
        regions = () if image_lengths is None else (image_lengths,)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not volatile), self._autocast():
            return self.img_enc(images, *regions), self.txt_enc(captions, lengths)

    forward = forward_emb

    def train_start(self):
        """Switch to train mode."""
        self.train()

    def val_start(self):
        """Switch to eval mode."""
        self.eval()

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Load this module's state dict, or the released code's [image state, text state]."""
        if not isinstance(state_dict, (list, tuple)) and state_dict.keys() != {0, 1}:
            return super().load_state_dict(state_dict, strict, assign)
        image_state, text_state = both_states(state_dict)
        self.img_enc.load_state_dict(image_state, strict, assign)
        self.txt_enc.load_state_dict(text_state, strict, assign)


class _WeightNormLinear(nn.Module):
    """A linear layer with the weight g V / |V|, and SCAN's state names.

    |V| is the norm of the whole matrix.
    """

    def __init__(self, in_features, out_features):
        super().__init__()
        drawn = nn.Linear(in_features, out_features)
        self.bias, self.weight_g = drawn.bias, nn.Parameter(drawn.weight.detach().norm())
        self.weight_v = drawn.weight

    def forward(self, X):
        return linear(X, self.weight_v * (self.weight_g / self.weight_v.norm()), self.bias)


class RegionEncoder(EncoderImagePrecomp):
    """Region features (B, R, img_dim) -> region embeddings (B, R, embed_size).

    precomp_enc_type: basic or weight_norm; InputError for any other.
    """

    def __init__(self, img_dim, embed_size, precomp_enc_type="basic", no_imgnorm=False):
        nn.Module.__init__(self)
        check_choice("precomp_enc_type", precomp_enc_type, REGION_TYPES)
        self.no_imgnorm = no_imgnorm
        self.fc = {"basic": nn.Linear, "weight_norm": _WeightNormLinear}[precomp_enc_type](
            img_dim, embed_size
        )
        if precomp_enc_type == "basic":
            _init_fc(self.fc)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Load the state; in PyTorch 0.3's files, weight_norm's scalar has the shape (1,)."""
        scalar = {
            name: value.reshape(()) for name, value in state_dict.items() if name == "fc.weight_g"
        }
        return super().load_state_dict({**state_dict, **scalar}, strict, assign)

    def forward(self, images, image_lengths=None):
        """images: (B, R, img_dim); a region of zeros is mapped like any other.

        Raises InputError for image_lengths, for no region is left out.
        """
        if image_lengths is not None:
            raise InputError(
                "this encoder keeps all regions of an image, so image_lengths would do nothing: "
                "leave them out, or give captions' ids as integers"
            )
        regions = self.fc(images)
        regions = regions.to(self.fc.bias.dtype)  # autocast's products may be in bf16
        return regions if self.no_imgnorm else l2norm(regions, -1, EPS)


class WordEncoder(EncoderText):
    """Word ids -> the state of the GRU's top layer at every word.

    use_bi_gru: the mean of both directions.
    """

    def __init__(
        self, vocab_size, word_dim, embed_size, num_layers, use_bi_gru=False, no_txtnorm=False
    ):
        super().__init__(
            vocab_size, word_dim, embed_size, num_layers, bi_gru=use_bi_gru, no_txtnorm=no_txtnorm
        )

    def forward(self, captions, lengths):
        """(B, T) word ids, longest caption first, (B,) lengths -> (B, T, embed_size).

        Past a caption's end, states are 0.
        """
        states = self._by(self._states, captions, lengths)
        return states if self.no_txtnorm else l2norm(states, -1, EPS)


class SCAN(VSE):
    """SCAN (Lee et al., ECCV 2018): `img_enc` embeds every region, `txt_enc` every word.

    opt: needs img_dim, embed_size, precomp_enc_type, no_imgnorm, vocab_size, word_dim, num_layers,
        bi_gru and no_txtnorm; amp is optional, as in `VSE`.
    Raises InputError for an unknown precomp_enc_type.
    """

    attends = True

    def __init__(self, opt):
        nn.Module.__init__(self)
        self.opt = opt
        self.amp = getattr(opt, "amp", "off") == "bf16"
        self.img_enc = RegionEncoder(
            opt.img_dim, opt.embed_size, opt.precomp_enc_type, opt.no_imgnorm
        )
        self.txt_enc = WordEncoder(
            opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers, opt.bi_gru, opt.no_txtnorm
        )

    def forward_emb(self, images, captions, lengths, *rest, volatile=False):
        """A batch, longest caption first -> (regions (B, R, D), words (B, T, D), lengths)."""
        return *super().forward_emb(images, captions, lengths, *rest, volatile=volatile), lengths

    forward = forward_emb


VSEModel = VSE  # VSE-infinity's name for it


def build(opt):
    """The model that the options describe: SCAN if cross_attn is set, else VSE."""
    return (SCAN if getattr(opt, "cross_attn", None) else VSE)(opt)


__getattr__ = left_out(
    __name__,
    {
        "EncoderImageWeightNormPrecomp": "use EncoderImage(data_name, img_dim, embed_size, "
        "'weight_norm', no_imgnorm)",
        "EncoderImageAggr": "use get_image_encoder",
        "EncoderImageFeatureExtractor": "extract_features.py makes regions of photos",
        "ResnetFeatureExtractor": "extract_features.py makes regions of photos",
    },
)
