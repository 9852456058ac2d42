"""The model: an image encoder and a GRU text encoder that meet in one embedding space.

VSE++ (Faghri et al., BMVC 2018), as HAL (Liu et al., AAAI 2020) trains it. State names and
the order of random draws are those of the released code, so that its checkpoints load here,
ours load there, and one seed gives the same initial weights.
"""

import math

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from errors import InputError, check_regular
from gru import last_states
from loss import ContrastiveLoss, cosine_sim, order_sim  # noqa: F401 (handed on: the family imports them from here)


def l2norm(X):
    """(n, D) rows scaled to length 1; a zero row stays zero, with a gradient that stays finite."""
    lengths = torch.linalg.vector_norm(X, dim=1, keepdim=True)
    return X / lengths.masked_fill(lengths == 0, 1)


def _init_fc(in_features, embed_size):
    """A linear layer as the released code draws it: uniform within sqrt(6 / (in + out)), no bias."""
    fc = nn.Linear(in_features, embed_size)
    bound = math.sqrt(6.0) / math.sqrt(in_features + embed_size)
    with torch.no_grad():
        fc.weight.uniform_(-bound, bound)
        fc.bias.zero_()
    return fc


class EncoderImagePrecomp(nn.Module):
    """Precomputed features (B, img_dim) -> embeddings (B, embed_size)."""

    def __init__(self, img_dim, embed_size, use_abs=False, no_imgnorm=False):
        super().__init__()
        self.use_abs, self.no_imgnorm = use_abs, no_imgnorm
        self.fc = _init_fc(img_dim, embed_size)

    def forward(self, images):
        """images: (B, img_dim), or whatever `features` takes."""
        embeddings = self.fc(self.features(images)).to(self.fc.weight.dtype)  # autocast's products may be in bf16
        if not self.no_imgnorm:
            embeddings = l2norm(embeddings)
        return embeddings.abs() if self.use_abs else embeddings

    def features(self, images):
        """What `fc` sees: here the images themselves."""
        return images

    def load_state_dict(self, state_dict, strict=True):
        """Load the state, ignoring keys that this encoder does not have (those of a full model)."""
        own = self.state_dict()
        return super().load_state_dict({name: value for name, value in state_dict.items() if name in own}, strict)


class _Module(nn.Module):
    """Runs the module it holds: state names carry the `module.` of the released code's DataParallel."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module(images)


def cnn_types():
    """The names that --cnn_type takes: every VGG and ResNet of torchvision."""
    from torchvision import models
    return models.list_models(module=models, include=["vgg*", "resnet*", "resnext*", "wide_resnet*"])


def _build_cnn(cnn_type, weights):
    """A torchvision CNN with its last linear layer, with ImageNet weights, a file's, or random ones."""
    from torchvision import models
    if cnn_type not in cnn_types():
        raise InputError(f"--cnn_type is {cnn_type}: choose one of {', '.join(cnn_types())}")
    if weights == "imagenet":
        try:
            return models.get_model(cnn_type, weights="IMAGENET1K_V1")
        except (OSError, RuntimeError) as error:  # no network, a full disk, a download cut short
            raise InputError(f"the ImageNet weights of {cnn_type} could not be fetched ({error}): give a file with "
                             "--cnn_weights FILE, or random ones with --cnn_weights none") from error
    cnn = models.get_model(cnn_type, weights=None)
    if weights != "none":
        last = "classifier.6." if cnn_type.startswith("vgg") else "fc."
        try:
            check_regular(weights)
            state = torch.load(weights, map_location="cpu", weights_only=True)
            missing, unknown = cnn.load_state_dict({name: value for name, value in state.items()
                                                    if not name.startswith(last)}, strict=False)
        except Exception as error:  # whatever a file from outside may hold
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"--cnn_weights {weights} is not a state dict of {cnn_type} ({reason})") from error
        if unknown or any(not name.startswith(last) for name in missing):
            raise InputError(f"--cnn_weights {weights} is not a state dict of {cnn_type}: it lacks "
                             f"{len(missing)} names and has {len(unknown)} unknown ones")
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
            cnn.features = _Module(cnn.features)
        else:
            feature_size = cnn.fc.in_features
            cnn.fc = nn.Identity()
            cnn = _Module(cnn)
        super().__init__(feature_size, embed_size, use_abs, no_imgnorm)
        self.cnn = cnn.requires_grad_(finetune)

    def features(self, images):
        """The CNN's features, L2-normalised: (B, feature_size)."""
        return l2norm(self.cnn(images))

    def load_state_dict(self, state_dict, strict=True):
        """Load the state, also from before torchvision's VGG classifier lost its first dropout."""
        old_names = {"cnn.classifier.1.": "cnn.classifier.0.", "cnn.classifier.4.": "cnn.classifier.3."}
        renamed = {}
        for name, value in state_dict.items():
            prefix = name[:len("cnn.classifier.0.")]
            renamed[old_names.get(prefix, prefix) + name[len(prefix):]] = value
        return super().load_state_dict(renamed, strict)


def EncoderImage(data_name, img_dim, embed_size, finetune=False, cnn_type="vgg19", use_abs=False, no_imgnorm=False,
                 cnn_weights="imagenet"):
    """The image encoder of a data set: precomputed features where its name ends in `_precomp`, else a full CNN."""
    if data_name.endswith("_precomp"):
        return EncoderImagePrecomp(img_dim, embed_size, use_abs, no_imgnorm)
    return EncoderImageFull(embed_size, finetune, cnn_type, use_abs, no_imgnorm, cnn_weights)


class EncoderText(nn.Module):
    """Word ids -> L2-normalised embeddings: the GRU's top layer at each caption's last word."""

    def __init__(self, vocab_size, word_dim, embed_size, num_layers, use_abs=False):
        super().__init__()
        self.use_abs = use_abs
        self.embed = nn.Embedding(vocab_size, word_dim)
        self.rnn = nn.GRU(word_dim, embed_size, num_layers, batch_first=True)
        with torch.no_grad():
            self.embed.weight.uniform_(-0.1, 0.1)

    def forward(self, x, lengths):
        """x: (B, T) word ids, longest caption first; lengths: (B,) -> (B, embed_size)."""
        lengths = torch.as_tensor(lengths).cpu()
        if x.device.type == "cpu":
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            with torch.autocast("cpu", enabled=False):  # last_states casts what it multiplies, and nothing else
                last = last_states(self.rnn, self.embed, x, lengths, dtype)
        else:
            last = self.rnn(pack_padded_sequence(self.embed(x), lengths, batch_first=True))[1][-1]
        embeddings = l2norm(last.to(self.embed.weight.dtype))
        return embeddings.abs() if self.use_abs else embeddings


class VSE(nn.Module):
    """Both encoders: `img_enc` and `txt_enc`.

    opt needs what builds them: data_name, img_dim, embed_size, finetune, cnn_type, use_abs,
    no_imgnorm, vocab_size, word_dim, num_layers (and cnn_weights: imagenet unless given). With amp "bf16"
    the encoders' matrix products are in bf16; weights, reductions and the loss stay in float32.
    """

    def __init__(self, opt):
        super().__init__()
        self.amp = getattr(opt, "amp", "off") == "bf16"
        self.img_enc = EncoderImage(opt.data_name, opt.img_dim, opt.embed_size, opt.finetune, opt.cnn_type,
                                    opt.use_abs, opt.no_imgnorm, getattr(opt, "cnn_weights", "imagenet"))
        self.txt_enc = EncoderText(opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers, opt.use_abs)

    @property
    def device(self):
        """Where the weights live, and inputs are taken to."""
        return self.txt_enc.embed.weight.device

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def embed_images(self, images):
        """Features or images -> (B, embed_size), without gradients."""
        with torch.no_grad(), self._autocast():
            return self.img_enc(images.to(self.device, non_blocking=True))

    def embed_captions(self, captions, lengths):
        """Word ids, longest caption first -> (B, embed_size), without gradients."""
        with torch.no_grad(), self._autocast():
            return self.txt_enc(captions.to(self.device, non_blocking=True), lengths)

    def forward_emb(self, images, captions, lengths, *rest, volatile=False):
        """A batch, longest caption first -> image and caption embeddings, each (B, embed_size).

        rest: a batch's ids and indices, which the encoders have no use for; volatile: without gradients (VSE++).
        """
        images, captions = (x.to(self.device, non_blocking=True) for x in (images, captions))
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
