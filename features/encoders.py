"""Photos -> feature rows by a named CNN, and `features.json`, which says which one it was.

VSE++ and HAL take 2,048 numbers a photo from a ResNet-152, the mean of ten crops; SCAN 36 rows a photo from
the surest boxes of a detector. Features are as the CNN gives them unless they are asked for with length one.
"""

import hashlib
import importlib.metadata
import os
import re
import warnings
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from caption_files import is_precomputed, read_json
from device import to_device
from errors import InputError, check_regular
from images import decode_image

FORMAT = 1  # of features.json
POOLINGS = ("pooled", "grid", "10crop")
GRID_SIDE = 6  # cells
RANDOM_SEED = 0  # of the weights `none`
THINNEST = 100  # times as long as wide: such a photo, once resized, would fill the memory
BOX_OVERLAP = 0.5  # intersection over union above which the less sure of two boxes goes
TIMM = "timm/"

# What makes two sets of features the same kind, with the types that features.json holds them in.
KIND = {"encoder": str, "weights_sha256": str, "pooling": str, "regions": (int, type(None)), "normalised": bool,
        "resize": int, "size": int, "interpolation": str, "mean": list, "std": list, "width": int}
OTHERS = {"format": int, "weights": str, "dtype": str, "amp": str, "versions": dict}


class Encoder(NamedTuple):
    """An image net in evaluation mode with what it needs to see a photo."""

    net: nn.Module  # pictures (B, ...) as `transform` gives them -> (B, width) or (B, regions, width)
    transform: Any  # PIL picture -> tensor
    description: dict  # what features.json says of it
    device: torch.device
    batch_limit: int | None = None  # pictures it takes at once, where that is limited

    @property
    def row_shape(self):
        """A photo's features: (width,) or (regions, width)."""
        regions = self.description["regions"]
        return (self.description["width"],) if regions is None else (regions, self.description["width"])


class Seen(NamedTuple):
    """What a pretrained net expects to see."""

    resize: int  # pixels of the shorter side
    size: int  # pixels of the centre that is cut out
    interpolation: str
    mean: list
    std: list


# Building an encoder ----------------------------------------------------------------------------

def build_encoder(name, weights="imagenet", pooling="pooled", regions=None, normalised=False, device="cpu"):
    """The Encoder of a torchvision CNN, `timm/<name>`, a torchvision detector with `regions` boxes, or `sample`.

    weights: imagenet (a detector's: COCO), none (random, the same every time), or a state dict file. normalised:
    each row is scaled to length one, as raw images' features are before VSE++'s last layer.
    Raises InputError if there is no such encoder, its weights are not to be had, or it can't pool like that.
    """
    device = torch.device(device)
    if regions is not None:
        net, seen, pooling = _build_boxes(name, weights, pooling, regions)
    elif name == "sample":
        return _sample_encoder(pooling, normalised)
    elif name.startswith(TIMM):
        net, seen = _build_timm(name, weights)
    else:
        net, seen = _build_torchvision(name, weights)
    digest = _hash_state(net)
    if pooling != "boxes":
        net = _Seeing(_Grid(net, name) if pooling == "grid" else net, seen)
    net = net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    if pooling == "boxes":
        width = net.width
    else:
        width = net(torch.zeros(1, 3, seen.size, seen.size, dtype=torch.uint8, device=device)).shape[-1]
    description = {"format": FORMAT, "encoder": name, "weights": weights, "weights_sha256": digest, "pooling": pooling,
                   "regions": GRID_SIDE**2 if pooling == "grid" else regions, "normalised": normalised,
                   **seen._asdict(), "width": width,
                   "versions": _versions("torch", "torchvision", "pillow", *["timm"] * name.startswith(TIMM))}
    return Encoder(net, _transform(seen, pooling), description, device, 1 if pooling == "boxes" else None)


def encoder_from(description, device="cpu", weights=None):
    """The Encoder that a features.json describes; weights: where its weights file lies now, if it was moved.

    Raises InputError if it can't be built here, or its weights come out as others.
    """
    boxes = description["pooling"] == "boxes"
    encoder = build_encoder(description["encoder"], weights or description["weights"],
                            "pooled" if boxes else description["pooling"],
                            description["regions"] if boxes else None, description["normalised"], device)
    refuse_other(encoder.description, description, "the encoder that can be built here", "the features in use")
    return encoder


def _build_torchvision(name, weights):
    from torchvision import models
    if name not in models.list_models(module=models):
        raise InputError(f"--encoder {name} is not known: give one of torchvision's classification CNNs such as "
                         "resnet152, timm/<name>, sample, or a detector with --regions 36")
    choices = models.get_model_weights(name)
    chosen = getattr(choices, "IMAGENET1K_V1", choices.DEFAULT)  # the papers' where there are several
    # torchvision shifts these two nets' input only where it fetches weights; their own initialisation is slow
    options = {"transform_input": True, "init_weights": False} if name in ("inception_v3", "googlenet") else {}
    net = _fetched(name, lambda: models.get_model(name, weights=chosen if weights == "imagenet" else None, **options),
                   weights)
    head = [part for part, module in net.named_modules() if isinstance(module, nn.Linear)][-1:] or ["classifier"]
    if weights not in ("imagenet", "none"):
        load_state(net, weights, name, [head[0]])
    if head == ["classifier"] and isinstance(net, models.SqueezeNet):
        net.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    else:
        parent, _, last = head[0].rpartition(".")
        setattr(net.get_submodule(parent), last, nn.Identity())
    preset = chosen.transforms()
    return net, Seen(preset.resize_size[0], preset.crop_size[0], preset.interpolation.value, list(preset.mean),
                     list(preset.std))


def _build_timm(name, weights):
    try:
        import timm
    except ImportError as error:
        raise InputError(f"--encoder {name} needs timm, which is not installed: pip install timm") from error
    model = name.removeprefix(TIMM)
    if not re.fullmatch(r"[\w.]+", model) or not timm.is_model(model):
        raise InputError(f"--encoder {name} is not a model that timm knows: see timm.list_models()")
    net = _fetched(name, lambda: timm.create_model(model, pretrained=weights == "imagenet", num_classes=0), weights)
    if weights not in ("imagenet", "none"):
        head = (net.pretrained_cfg or {}).get("classifier")
        load_state(net, weights, name, [head] if isinstance(head, str) else head or [])
    seen = timm.data.resolve_data_config({}, model=net)
    size = seen["input_size"][-1]
    return net, Seen(int(size / seen["crop_pct"]), size, seen["interpolation"], list(seen["mean"]), list(seen["std"]))


def _build_boxes(name, weights, pooling, regions):
    from torchvision.models import detection, get_model, list_models
    names = list_models(module=detection, include=["*rcnn*"])
    if name not in names:
        raise InputError(f"--encoder {name} has no boxes for --regions: give one of {', '.join(names)}, or "
                         "--pooling grid without --regions")
    if pooling != "pooled":
        raise InputError(f"--pooling {pooling} does not go with --regions: leave one of them out")
    net = _fetched(name, lambda: get_model(name, weights="DEFAULT" if weights == "imagenet" else None,
                                           weights_backbone=None), weights)
    if weights not in ("imagenet", "none"):
        load_state(net, weights, name)
    seen = Seen(net.transform.min_size[0], net.transform.max_size, "bilinear", list(net.transform.image_mean),
                list(net.transform.image_std))
    return _Boxes(net, regions), seen, "boxes"


def _sample_encoder(pooling, normalised):
    """What the embedded data's features are made with: descriptions of 96 x 96 pixels, standardised."""
    import sample_data
    if pooling != "pooled":
        raise InputError(f"--encoder sample cannot pool by {pooling}: leave --pooling out")
    training = [sample_data.describe_pixels(example.pixels)
                for example in sample_data.draw_examples(sample_data.SEED) if example.split == "train"]
    standard = sample_data.standard(np.stack(training))
    description = {**sample_data.describe_features(standard), "normalised": normalised}
    return Encoder(nn.Identity(), partial(_sample_row, standard), description, torch.device("cpu"))


def _sample_row(standard, picture):
    """A PIL picture's description, standardised."""
    import sample_data
    pixels = np.asarray(picture.resize((sample_data.SIDE, sample_data.SIDE)))
    return torch.from_numpy(sample_data.standardise(sample_data.describe_pixels(pixels)[None], standard)[0])


def _fetched(name, build, weights):
    """What `build` builds, from a seed of its own; InputError where weights can't be fetched."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(RANDOM_SEED)
        try:
            return build()
        except Exception as error:  # no network, a full disk, a download cut short, no such weights
            if weights != "imagenet":
                raise
            raise InputError(f"the weights of {name} could not be fetched ({error}): give a file with "
                             "--encoder_weights FILE, or random ones with --encoder_weights none") from error


def load_state(net, path, name, heads=(), flag="--encoder_weights"):
    """Load a state dict file but for the heads, which may be of any size or absent; raises InputError, which names the
    flag, for anything else."""
    def is_head(key):
        return any(key.startswith(head + ".") for head in heads)
    try:
        check_regular(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)  # a training run's
        result = net.load_state_dict({key: value for key, value in state.items() if not is_head(key)}, strict=False)
    except Exception as error:  # whatever a file from outside may hold
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{flag} {path} is not a state dict of {name} ({reason})") from error
    lacking = [key for key in result.missing_keys if not is_head(key)]
    if lacking or result.unexpected_keys:
        raise InputError(f"{flag} {path} is not a state dict of {name}: it lacks {len(lacking)} names and has "
                         f"{len(result.unexpected_keys)} unknown ones")


def _hash_state(net):
    """SHA-256 of a net's weights; batches counted in training are none."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.contiguous().numpy())
    return digest.hexdigest()


def _versions(*packages):
    return {package: importlib.metadata.version(package) for package in packages}


# From pictures to rows --------------------------------------------------------------------------

def _transform(seen, pooling):
    """PIL picture -> uint8 tensor: whole for boxes, (10, 3, size, size) for ten crops, else (3, size, size)."""
    from torchvision import transforms
    if pooling == "boxes":
        return transforms.PILToTensor()
    resize = transforms.Resize(seen.resize, transforms.InterpolationMode(seen.interpolation))
    if pooling == "10crop":
        return transforms.Compose([resize, transforms.TenCrop(seen.size), _stacked])
    return transforms.Compose([resize, transforms.CenterCrop(seen.size), transforms.PILToTensor()])


def _stacked(crops):
    """PIL pictures -> (their number, 3, H, W) uint8."""
    from torchvision import transforms
    return torch.stack(list(map(transforms.PILToTensor(), crops)))


class _Seeing(nn.Module):
    """Bytes (B, 3, H, W), or (B, 10, 3, H, W) of which the mean is taken, -> features of the normalised pictures."""

    def __init__(self, net, seen):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(seen.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(seen.std).view(3, 1, 1))

    def forward(self, pictures):
        if pictures.dim() == 5:  # crop after crop: ten times the batch might not fit
            return torch.stack([self(crop) for crop in pictures.unbind(1)]).mean(0)
        pictures = pictures.float().div_(255).sub_(self.mean).div_(self.std)
        return self.net(pictures.contiguous(memory_format=torch.channels_last))


class _Grid(nn.Module):
    """A CNN's last feature map as the means of 6 x 6 cells: pictures -> (B, 36, channels), row by row."""

    def __init__(self, net, name):
        super().__init__()
        self.net, self.map = net, None
        pools = [module for module in net.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
        last = next((getattr(net, part) for part in ("features", "conv5", "layers") if hasattr(net, part)), None)
        if hasattr(net, "forward_features"):  # timm's
            self.encode = net.forward_features
        elif pools:
            pools[-1].register_forward_pre_hook(lambda _, inputs: setattr(self, "map", inputs[0]))
            self.encode = self._hooked
        elif last is not None:
            last.register_forward_hook(lambda _, inputs, output: setattr(self, "map", output))
            self.encode = self._hooked
        else:
            raise InputError(f"--pooling grid needs a CNN, and {name} has no grid of features: choose --pooling pooled")
        self.name = name

    def _hooked(self, pictures):
        self.net(pictures)
        map, self.map = self.map, None
        return nn.functional.relu(map) if "DenseNet" in type(self.net).__name__ else map  # it has that in forward

    def forward(self, pictures):
        map = self.encode(pictures)
        if map.dim() != 4 or map.shape[2] != map.shape[3]:  # tokens, or channels last
            raise InputError(f"--pooling grid needs a CNN, and {self.name} has no grid of features: choose --pooling "
                             "pooled")
        return nn.functional.adaptive_avg_pool2d(map, GRID_SIDE).flatten(2).transpose(1, 2)


class _Boxes(nn.Module):
    """A picture (1, 3, H, W) of bytes -> (1, regions, width): the box features of a detector's surest boxes.

    As in bottom-up attention (Anderson et al., CVPR 2018): a proposal is as sure as its likeliest class, and of
    two that overlap by more than half the surer stays. Where too few are left, the surest of those left out
    follow, and where there are too few proposals, they are repeated.
    """

    def __init__(self, detector, regions):
        super().__init__()
        self.detector, self.regions = detector, regions
        self.width = detector.roi_heads.box_predictor.cls_score.in_features

    def forward(self, picture):
        """picture: one photo, (1, 3, H, W) uint8."""
        from torchvision.ops import nms
        images, _ = self.detector.transform(list(picture.float().div(255)))
        maps = self.detector.backbone(images.tensors)
        proposals, _ = self.detector.rpn(images, maps)
        height, width = images.image_sizes[0]
        whole = proposals[0].new_tensor([[0, 0, width, height]])
        boxes = proposals[0] if len(proposals[0]) else whole
        heads = self.detector.roi_heads
        features = heads.box_head(heads.box_roi_pool(maps, [boxes], images.image_sizes)).float()
        sureness = heads.box_predictor(features)[0].softmax(-1)[:, 1:].amax(-1)  # class 0 is the background
        kept = nms(boxes.float(), sureness.float(), BOX_OVERLAP)
        others = sureness.argsort(descending=True, stable=True)
        order = torch.cat([kept, others[~torch.isin(others, kept)]])
        return features[order.repeat(-(-self.regions // len(order)))[:self.regions]][None]


def check_photo(picture):
    """Raise InputError for a picture (PIL) so thin that it can't be resized."""
    if max(picture.size) > THINNEST * min(picture.size):
        raise InputError(f"{picture.width} x {picture.height} pixels are too thin: at most {THINNEST} times as long "
                         "as wide")


def encode(encoder, pictures, amp="off"):
    """Pictures (B, ...) as the encoder's transform gives them -> features (B, *row_shape), float32, on the CPU.

    amp "bf16": matrix products and convolutions are in bf16.
    """
    with torch.inference_mode(), torch.autocast(encoder.device.type, torch.bfloat16, enabled=amp == "bf16"):
        rows = encoder.net(to_device(pictures, encoder.device)).float()
    return (nn.functional.normalize(rows, dim=-1) if encoder.description["normalised"] else rows).cpu()


def encode_photo(encoder, path):
    """The features (*row_shape) of one photo, a path or an open file; InputError if it cannot be read."""
    picture = decode_image(path, as_seen=True)
    check_photo(picture)
    return encode(encoder, encoder.transform(picture)[None])[0]


# features.json ----------------------------------------------------------------------------------

def read_features_json(folder):
    """What `<folder>/features.json` says, or None where there is none.

    Raises InputError if it is broken, or of a newer version.
    """
    path = os.path.join(folder, "features.json")
    if not os.path.lexists(path):
        return None
    return check_description(read_json(path), path)


def features_of(data_path, data_name, model_features=None, model_path=""):
    """What the features.json of a data set of features says, or None where it has none.

    model_features: the same of the checkpoint at model_path, or None. Raises InputError where both are there, and of
    different kinds; and as `read_features_json`.
    """
    folder = os.path.join(data_path, data_name)
    found = read_features_json(folder) if is_precomputed(data_name) else None
    if found and model_features:
        refuse_other(found, model_features, folder, f"checkpoint {model_path}")
    return found


def check_description(description, source):
    """The description itself; raises InputError, naming the source, unless it is a whole features.json's content."""
    if not isinstance(description, dict) or not isinstance(description.get("format"), int):
        raise InputError(f"{source} does not describe features: make them again with extract_features.py")
    if description["format"] > FORMAT:
        raise InputError(f"{source} is of format {description['format']}, newer than this program's {FORMAT}: update "
                         "it, or make the features again")
    for name, kinds in {**KIND, **OTHERS}.items():
        if not isinstance(description.get(name, ...), kinds):
            raise InputError(f"{source} lacks {name!r}, or has something odd for it: make the features again with "
                             "extract_features.py")
    return description


def same_encoder(one, other):
    """Whether two descriptions' features are of one kind: by the same encoder, weights, pooling and sizes."""
    return all(one[name] == other[name] for name in KIND)


def refuse_other(found, expected, found_where, expected_where):
    """Raise InputError unless two descriptions' features are of one kind.

    The places go into the sentence, such as "data/mine_precomp" and "checkpoint runs/x/model_best.pth.tar".
    """
    if not same_encoder(found, expected):
        differing = ", ".join(name for name in KIND if found[name] != expected[name])
        raise InputError(f"{found_where} has features by {_in_words(found)}, but {expected_where} has them by "
                         f"{_in_words(expected)}, with other {differing}: extract them again with the same encoder, "
                         "weights and pooling")


def _in_words(description):
    regions = "" if description["regions"] is None else f" {description['regions']}"
    length = ", length one" if description["normalised"] else ""
    return (f"{description['encoder']} (weights {description['weights_sha256'][:12]}, {description['pooling']}"
            f"{regions}, {description['size']} pixels{length})")
