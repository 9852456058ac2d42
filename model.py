"""The model: an image encoder and a GRU text encoder that meet in one embedding space.

VSE++ (Faghri et al., BMVC 2018), as HAL (Liu et al., AAAI 2020) trains it; over regions, too, up to
VSE-infinity (Chen et al., CVPR 2021: MLP, bi-directional GRU and GPO). State names and the order of
random draws are those of the released code, so that its checkpoints load here, ours load there, and
one seed gives the same initial weights.
"""

import math
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from caption_files import is_precomputed
from device import to_device
from errors import InputError, check_choice
from gru import last_states, word_states
from loss import ContrastiveLoss, cosine_sim, order_sim  # noqa: F401 (handed on: the family imports them from here)
from pooling import GPO, POOLINGS, mean_pool, region_lengths

IMAGE_POOLINGS = (*POOLINGS, "gpo")
TEXT_POOLINGS = ("last", *IMAGE_POOLINGS)
ENC_TYPES = ("basic", "mlp")
GPO_WIDTHS = 32, 32  # positional encoding and GRU, as VSE-infinity fixes them
NORM_EPSILON = 1e-8  # VSE-infinity adds it to the length


def l2norm(X, epsilon=0.0):
    """(n, D) rows divided by their length + epsilon; a zero row stays zero, with a gradient that stays finite."""
    lengths = torch.linalg.vector_norm(X, dim=1, keepdim=True)
    return X / (lengths.masked_fill(lengths == 0, 1) + epsilon)


def _init_fc(fc):
    """Draw a linear layer as the released code does: uniform within sqrt(6 / (in + out)), no bias."""
    bound = math.sqrt(6.0) / math.sqrt(fc.in_features + fc.out_features)
    with torch.no_grad():
        fc.weight.uniform_(-bound, bound)
        fc.bias.zero_()


def _pool(encoder, pooling, features, lengths):
    """(B, K, D), (B,) -> (B, D) by a pooling's name, in float32 under autocast, too."""
    if pooling != "gpo":
        return POOLINGS[pooling](features, lengths)
    with torch.autocast(features.device.type, enabled=False):
        return encoder.gpool(features, lengths)[0]


class _RegionMLP(nn.Module):
    """VSE-infinity's second way from a region to the embedding: W2 relu(bn(W1 r + b1)) + b2.

    In training, batch norm's statistics are over all B * K rows, padding included, as in the released code. Its
    bns.1 has no use but its place in the state.
    """

    def __init__(self, img_dim, embed_size):
        super().__init__()
        hidden = embed_size // 2
        self.layers = nn.ModuleList([nn.Linear(img_dim, hidden), nn.Linear(hidden, embed_size)])
        self.bns = nn.ModuleList([nn.BatchNorm1d(hidden), nn.BatchNorm1d(embed_size)])

    def forward(self, regions):
        """(B, K, img_dim) -> (B, K, embed_size). Raises InputError for a training batch of a single region."""
        alone = type(self.bns[0]) is nn.BatchNorm1d  # and not over other processes' regions, too
        if self.training and alone and regions.shape[:2].numel() == 1:
            raise InputError("a training batch of one image with one region has no variance for the MLP's batch norm: "
                             "give a larger --batch_size")
        hidden = self.layers[0](regions.flatten(0, 1)).to(self.bns[0].weight.dtype)
        return self.layers[1](self.bns[0](hidden).relu()).unflatten(0, regions.shape[:2])


class EncoderImagePrecomp(nn.Module):
    """Precomputed features (B, img_dim), or regions (B, K, img_dim), -> embeddings (B, embed_size).

    image_pooling: mean, max, kmax or gpo, for regions only (mean unless given). precomp_enc_type: basic, each region
    through one linear layer; mlp, VSE-infinity's encoder (whose checkpoints call it basic, and pool by gpo).
    """

    def __init__(self, img_dim, embed_size, use_abs=False, no_imgnorm=False, image_pooling=None,
                 precomp_enc_type="basic"):
        super().__init__()
        self.use_abs, self.no_imgnorm, self.image_pooling = use_abs, no_imgnorm, image_pooling
        self.fc = nn.Linear(img_dim, embed_size)
        self.mlp = _RegionMLP(img_dim, embed_size) if precomp_enc_type == "mlp" else None
        if image_pooling == "gpo":
            self.gpool = GPO(*GPO_WIDTHS)
        _init_fc(self.fc)  # after the others, whose draws stand in between in the released code

    def forward(self, images):
        """images: (B, img_dim), (B, K, img_dim), padded with zero rows, or whatever `features` takes."""
        features = self.features(images)
        if features.dim() == 3:
            embeddings = self._pooled(features)
        elif self.image_pooling or self.mlp:
            raise InputError(f"the model is over regions, but its images come as {tuple(features.shape)}: give "
                             "features of shape (images, regions, width)")
        else:
            embeddings = self.fc(features)
        embeddings = embeddings.to(self.fc.weight.dtype)  # autocast's products may be in bf16
        if not self.no_imgnorm:
            embeddings = l2norm(embeddings, NORM_EPSILON if self.mlp else 0)
        return embeddings.abs() if self.use_abs else embeddings

    def _pooled(self, regions):
        """Each region embedded, and all of an image pooled: (B, K, img_dim) -> (B, embed_size)."""
        pooling, lengths = self.image_pooling or "mean", region_lengths(regions)
        if pooling == "mean" and not self.mlp:  # the mean of linear functions is that of the mean, at 1 / K of the cost
            return self.fc(mean_pool(regions, lengths))
        embedded = self.fc(regions).to(self.fc.weight.dtype)
        if self.mlp:
            embedded = embedded + self.mlp(regions)
        if not len(regions):  # a process without a pair, which batch norm has gone through
            return embedded.sum(1)
        return _pool(self, pooling, embedded, lengths)

    def features(self, images):
        """What `fc` sees: here the images themselves."""
        return images

    def load_state_dict(self, state_dict, strict=True):
        """Load the state, ignoring keys that this encoder does not have (those of a full model)."""
        own = self.state_dict()
        return super().load_state_dict({name: value for name, value in state_dict.items() if name in own}, strict)


def _as_data_parallel(module):
    """The module in one whose state names carry the `module.` of the released code's DataParallel."""
    return nn.Sequential(OrderedDict(module=module))


def cnn_types():
    """The names that --cnn_type takes: every VGG and ResNet of torchvision."""
    from torchvision import models
    return models.list_models(module=models, include=["vgg*", "resnet*", "resnext*", "wide_resnet*"])


def _build_cnn(cnn_type, weights):
    """A torchvision CNN with its last linear layer, with ImageNet weights, a file's, or random ones."""
    from torchvision import models
    check_choice("cnn_type", cnn_type, cnn_types())
    if weights == "imagenet":
        try:
            return models.get_model(cnn_type, weights="IMAGENET1K_V1")
        except (OSError, RuntimeError) as error:  # no network, a full disk, a download cut short
            raise InputError(f"the ImageNet weights of {cnn_type} could not be fetched ({error}): give a file with "
                             "--cnn_weights FILE, or random ones with --cnn_weights none") from error
    cnn = models.get_model(cnn_type, weights=None)
    if weights != "none":
        from features import load_state
        load_state(cnn, weights, cnn_type, ["classifier.6" if cnn_type.startswith("vgg") else "fc"], "--cnn_weights")
    return cnn


class EncoderImageFull(EncoderImagePrecomp):
    """Images (B, 3, H, W), ImageNet-normalised -> embeddings (B, embed_size), through a torchvision CNN.

    Only the CNN's last linear layer is removed: VGG keeps its classifier's ReLU and dropout.
    The CNN is frozen unless `finetune`; even so it follows train and eval mode, as in the released code.
    """

    def __init__(self, embed_size, finetune=False, cnn_type="vgg19", use_abs=False, no_imgnorm=False,
                 cnn_weights="imagenet"):
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
        """The CNN's features, L2-normalised: (B, feature_size). Raises InputError where batch norm has one number."""
        try:
            return l2norm(self.cnn(images))
        except ValueError as error:
            if "more than 1 value" not in str(error):
                raise
            raise InputError(f"a training batch of one photo of {images.shape[-1]} pixels has no variance for the "
                             "CNN's batch norm: give a larger --crop_size, or another --batch_size or --micro_batch"
                             ) from error

    def load_state_dict(self, state_dict, strict=True):
        """Load the state, also from before torchvision's VGG classifier lost its first dropout."""
        old_names = {"cnn.classifier.1.": "cnn.classifier.0.", "cnn.classifier.4.": "cnn.classifier.3."}
        renamed = {}
        for name, value in state_dict.items():
            prefix = name[:len("cnn.classifier.0.")]
            renamed[old_names.get(prefix, prefix) + name[len(prefix):]] = value
        return super().load_state_dict(renamed, strict)


def EncoderImage(data_name, img_dim, embed_size, finetune=False, cnn_type="vgg19", use_abs=False, no_imgnorm=False,
                 cnn_weights="imagenet", *, image_pooling=None, precomp_enc_type="basic"):
    """The image encoder of a data set: precomputed features where its name ends in `precomp`, else a full CNN.

    Raises InputError for a choice that is none, or that does not go with photos.
    """
    check_choice("image_pooling", image_pooling or "mean", IMAGE_POOLINGS)
    check_choice("precomp_enc_type", precomp_enc_type, ENC_TYPES)
    if is_precomputed(data_name):
        return EncoderImagePrecomp(img_dim, embed_size, use_abs, no_imgnorm, image_pooling, precomp_enc_type)
    if image_pooling or precomp_enc_type == "mlp":
        raise InputError("--image_pooling and --precomp_enc_type mlp are for precomputed regions, but "
                         f"{data_name} holds photos: leave them out")
    return EncoderImageFull(embed_size, finetune, cnn_type, use_abs, no_imgnorm, cnn_weights)


class EncoderText(nn.Module):
    """Word ids -> L2-normalised embeddings: the GRU's top layer at each caption's last word, or pooled over its words.

    text_pooling: last, mean, max, kmax or gpo. bi_gru: the mean of both directions' states at each word (last: of
    the forward state at the last word and the backward state at the first). VSE-infinity's is gpo with bi_gru.
    """

    def __init__(self, vocab_size, word_dim, embed_size, num_layers, use_abs=False, *, text_pooling="last",
                 bi_gru=False, no_txtnorm=False):
        super().__init__()
        check_choice("text_pooling", text_pooling, TEXT_POOLINGS)
        self.use_abs, self.no_txtnorm, self.text_pooling = use_abs, no_txtnorm, text_pooling
        self.embed = nn.Embedding(vocab_size, word_dim)
        if text_pooling == "gpo":
            self.gpool = GPO(*GPO_WIDTHS)
        self.rnn = nn.GRU(word_dim, embed_size, num_layers, batch_first=True, bidirectional=bi_gru)
        with torch.no_grad():
            self.embed.weight.uniform_(-0.1, 0.1)

    def forward(self, x, lengths):
        """x: (B, T) word ids, longest caption first; lengths: (B,) -> (B, embed_size)."""
        embeddings = self._by(self._last if self.text_pooling == "last" else self._pooled, x, lengths)
        if not self.no_txtnorm:
            embeddings = l2norm(embeddings, 0 if self.text_pooling == "last" else NORM_EPSILON)
        return embeddings.abs() if self.use_abs else embeddings

    def _by(self, encode, captions, lengths):
        """encode(captions, lengths, the products' type), in the weights' type."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        with torch.autocast("cpu", enabled=False):  # gru.py casts what it multiplies, and nothing else
            return encode(captions, torch.as_tensor(lengths).cpu(), dtype).to(self.embed.weight.dtype)

    def _packed(self, captions, lengths):
        return self.rnn(pack_padded_sequence(self.embed(captions), lengths, batch_first=True))

    def _last(self, captions, lengths, dtype):
        """(B, T) -> (B, embed_size): where the GRU ends, in each of its directions."""
        if captions.device.type == "cpu":
            return last_states(self.rnn, self.embed, captions, lengths, dtype)
        ends = self._packed(captions, lengths)[1]
        return (ends[-2] + ends[-1]) / 2 if self.rnn.bidirectional else ends[-1]

    def _states(self, captions, lengths, dtype):
        """(B, T) -> (B, T, embed_size): the state at every word, of both directions the mean, 0 past the lengths."""
        if captions.device.type == "cpu":
            return word_states(self.rnn, self.embed, captions, lengths, dtype)
        states, _ = pad_packed_sequence(self._packed(captions, lengths)[0], batch_first=True,
                                        total_length=captions.shape[1])
        states = states.to(self.embed.weight.dtype)
        return states.unflatten(2, (2, -1)).mean(2) if self.rnn.bidirectional else states

    def _pooled(self, captions, lengths, dtype):
        """(B, T) -> (B, embed_size): the states of all words, pooled."""
        return _pool(self, self.text_pooling, self._states(captions, lengths, dtype), lengths)


def no_embeddings(model):
    """No embeddings, (0, D), of a model's kind."""
    return torch.empty(0, model.txt_enc.rnn.hidden_size, device=model.device, dtype=model.txt_enc.embed.weight.dtype)


class VSE(nn.Module):
    """Both encoders: `img_enc` and `txt_enc`.

    opt needs what builds them: data_name, img_dim, embed_size, finetune, cnn_type, use_abs,
    no_imgnorm, vocab_size, word_dim, num_layers; and has defaults for cnn_weights (imagenet), image_pooling (None:
    vectors, or the mean of regions), precomp_enc_type (basic), text_pooling (last), bi_gru and no_txtnorm (off). With
    amp "bf16" the encoders' matrix products are in bf16; weights, reductions and the loss stay in float32.
    """

    def __init__(self, opt):
        super().__init__()
        self.amp = getattr(opt, "amp", "off") == "bf16"
        self.img_enc = EncoderImage(opt.data_name, opt.img_dim, opt.embed_size, opt.finetune, opt.cnn_type,
                                    opt.use_abs, opt.no_imgnorm, getattr(opt, "cnn_weights", "imagenet"),
                                    image_pooling=getattr(opt, "image_pooling", None),
                                    precomp_enc_type=getattr(opt, "precomp_enc_type", "basic"))
        self.txt_enc = EncoderText(opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers, opt.use_abs,
                                   text_pooling=getattr(opt, "text_pooling", "last"),
                                   bi_gru=getattr(opt, "bi_gru", False), no_txtnorm=getattr(opt, "no_txtnorm", False))

    @property
    def device(self):
        """Where the weights live, and inputs are taken to."""
        return self.txt_enc.embed.weight.device

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

    def forward_emb(self, images, captions, lengths, *rest, volatile=False):
        """A batch, longest caption first -> image and caption embeddings, each (B, embed_size).

        rest: a batch's ids and indices, which the encoders have no use for; volatile: without gradients (VSE++).
        """
        images, captions = (to_device(x, self.device) for x in (images, captions))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not volatile), self._autocast():
            return self.img_enc(images), self.txt_enc(captions, lengths)

    forward = forward_emb

    def train_start(self):
        """Switch to train mode."""
        self.train()

    def val_start(self):
        """Switch to eval mode."""
        self.eval()

    def load_state_dict(self, state_dict, strict=True):
        """Load a state dict of this module, or the released code's list [image state, text state]."""
        if not isinstance(state_dict, (list, tuple)):
            return super().load_state_dict(state_dict, strict)
        image_state, text_state = state_dict
        self.img_enc.load_state_dict(image_state, strict)
        self.txt_enc.load_state_dict(text_state, strict)
