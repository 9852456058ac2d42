"""Photos to feature rows by a named CNN, and the description of it that goes to `features.json`.

VSE++ and HAL use 2,048 numbers per photo from a ResNet-152, the mean of ten crops. SCAN uses 36
rows per photo, from a detector's most confident boxes. Features are what the CNN returns; rows are
scaled to length one only on request.
"""

import hashlib
import importlib.metadata
import re
import warnings
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from features.clip_models import OPEN_CLIP, clip_transform, load_clip
from features.description import FORMAT, refuse_other
from inputs.decoding import decode_image
from layers.pretrained import load_state
from runtime.device import to_device
from runtime.errors import InputError, number, path_type

POOLINGS = ("pooled", "grid", "10crop")
GRID_SIDE = 6  # cells
RANDOM_SEED = 0  # of the weights `none`
THINNEST = 100  # times as long as wide; a thinner photo, once resized, would fill the memory
BOX_OVERLAP = 0.5  # intersection over union above which the less confident of two boxes goes
TIMM = "timm/"


class Encoder(NamedTuple):
    """An image net in evaluation mode, with what it needs to see a photo."""

    # pictures (B, ...) as `transform` gives them -> (B, width) or (B, regions, width)
    net: nn.Module
    transform: Any  # PIL picture -> tensor
    description: dict  # what features.json says of it
    device: torch.device
    batch_limit: int | None = None  # most pictures at once, if limited

    @property
    def row_shape(self):
        """The shape of a photo's features: (width,) or (regions, width)."""
        regions = self.description["regions"]
        return (
            (self.description["width"],)
            if regions is None
            else (regions, self.description["width"])
        )


class Seen(NamedTuple):
    """What a pretrained net expects to see."""

    resize: int  # pixels of the shorter side
    size: int  # pixels of the centre that is cut out
    interpolation: str
    mean: list
    std: list


# Building an encoder ----------------------------------------------------------------------------


def add_flags(group, optional=False):
    """Add the flags that choose an encoder to a parser's group.

    optional: leave what is not given None, for a script that may know the encoder already.
    """

    def default(value):
        return None if optional else value

    group.add_argument(
        "--encoder",
        default=default("resnet152"),
        help="a torchvision classification CNN, timm/<name>, open_clip/<name>, a torchvision "
        "detector (with --regions), or sample",
    )
    group.add_argument(
        "--encoder_weights",
        type=path_type,
        default=default("imagenet"),
        metavar="imagenet|none|FILE|TAG",
        help="imagenet (a detector's: COCO), none (random, the same every time), a file, or a "
        "pretrained tag of open_clip's (default: imagenet)",
    )
    group.add_argument(
        "--pooling",
        default=default("pooled"),
        choices=POOLINGS,
        help="pooled: one row per photo; grid: 36 rows, of 6 x 6 cells; 10crop: the mean of ten "
        "crops (default: pooled)",
    )
    group.add_argument(
        "--regions",
        type=number(int, 1),
        help="a detector's rows per photo: its most confident boxes, such as 36",
    )
    group.add_argument(
        "--normalise",
        action="store_true",
        help="scale each row to length one, as train.py does with raw images' features",
    )


def build_encoder(
    name, weights="imagenet", pooling="pooled", regions=None, normalised=False, device="cpu"
):
    """Build the Encoder of a torchvision CNN or detector, timm/<name>, open_clip/<name> or sample.

    weights: imagenet (COCO for a detector), none (random, the same every time), a state dict file,
    or open_clip's tag.
    regions: boxes per photo, if `name` is a detector.
    normalised: scale each row to length one, as VSE++ scales raw images' features before its last
    layer.
    Raises InputError if there is no such encoder, its weights cannot be had, or it cannot pool so.
    """
    device, transform = torch.device(device), None
    if regions is not None:
        net, seen, pooling = _build_boxes(name, weights, pooling, regions)
    elif name == "sample":
        return _sample_encoder(pooling, normalised)
    elif name.startswith(TIMM):
        net, seen = _build_timm(name, weights)
    elif name.startswith(OPEN_CLIP):
        net, seen, transform = _build_clip(name, weights, pooling)
    else:
        net, seen = _build_torchvision(name, weights)
    digest = _hash_state(net)
    if pooling != "boxes":
        net = _Seeing(_Grid(net, name) if pooling == "grid" else net, seen)
    net = net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    width = net.width if pooling == "boxes" else _width(net, seen.size, device)
    description = {
        "format": FORMAT,
        "encoder": name,
        "weights": weights,
        "weights_sha256": digest,
        "pooling": pooling,
        "regions": GRID_SIDE**2 if pooling == "grid" else regions,
        "normalised": normalised,
        **seen._asdict(),
        "width": width,
        "versions": _versions(name),
    }
    transform = transform or _transform(seen, pooling)
    return Encoder(net, transform, description, device, 1 if pooling == "boxes" else None)


def _width(net, size, device):
    """The width of a net's features, from a black picture."""
    return net(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)).shape[-1]


def encoder_from(description, device="cpu", weights=None):
    """Build the Encoder that a features.json describes.

    weights: where its weights file is now, if it was moved.
    Raises InputError if the encoder cannot be built here, or its weights turn out to be others.
    """
    boxes = description["pooling"] == "boxes"
    encoder = build_encoder(
        description["encoder"],
        weights or description["weights"],
        "pooled" if boxes else description["pooling"],
        description["regions"] if boxes else None,
        description["normalised"],
        device,
    )
    refuse_other(
        encoder.description,
        description,
        "the encoder that can be built here",
        "the features in use",
    )
    return encoder


def _build_torchvision(name, weights):
    from torchvision import models

    if name not in models.list_models(module=models):
        raise InputError(
            f"--encoder {name} is not known: give one of torchvision's classification CNNs such as "
            "resnet152, timm/<name>, open_clip/<name>, sample, or a detector with --regions 36"
        )
    choices = models.get_model_weights(name)
    # IMAGENET1K_V1 are the papers' weights, if there are several.
    chosen = getattr(choices, "IMAGENET1K_V1", choices.DEFAULT)
    # torchvision shifts these two nets' input only if it fetches the weights itself; and their
    # initialisation is slow.
    options = (
        {"transform_input": True, "init_weights": False}
        if name in ("inception_v3", "googlenet")
        else {}
    )
    net = _fetched(
        name,
        lambda: models.get_model(
            name, weights=chosen if weights == "imagenet" else None, **options
        ),
        weights,
    )
    head = [part for part, module in net.named_modules() if isinstance(module, nn.Linear)][-1:] or [
        "classifier"
    ]
    if weights not in ("imagenet", "none"):
        load_state(net, weights, name, [head[0]])
    if head == ["classifier"] and isinstance(net, models.SqueezeNet):
        net.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    else:
        parent, _, last = head[0].rpartition(".")
        setattr(net.get_submodule(parent), last, nn.Identity())
    preset = chosen.transforms()
    return net, Seen(
        preset.resize_size[0],
        preset.crop_size[0],
        preset.interpolation.value,
        list(preset.mean),
        list(preset.std),
    )


def _build_timm(name, weights):
    try:
        import timm
    except ImportError as error:
        raise InputError(
            f"--encoder {name} needs timm, which is not installed: pip install timm"
        ) from error
    model = name.removeprefix(TIMM)
    if not re.fullmatch(r"[\w.]+", model) or not timm.is_model(model):
        raise InputError(f"--encoder {name} is not a model that timm knows: see timm.list_models()")
    net = _fetched(
        name,
        lambda: timm.create_model(model, pretrained=weights == "imagenet", num_classes=0),
        weights,
    )
    if weights not in ("imagenet", "none"):
        head = (net.pretrained_cfg or {}).get("classifier")
        load_state(net, weights, name, [head] if isinstance(head, str) else head or [])
    seen = timm.data.resolve_data_config({}, model=net)
    size = seen["input_size"][-1]
    return net, Seen(
        int(size / seen["crop_pct"]),
        size,
        seen["interpolation"],
        list(seen["mean"]),
        list(seen["std"]),
    )


def _build_clip(name, weights, pooling):
    if pooling != "pooled":
        raise InputError(f"--encoder {name} cannot pool by {pooling}: leave --pooling out")
    weights = None if weights == "imagenet" else weights
    net = load_clip(name, weights, ("--encoder", "--encoder_weights"))
    transform, seen = clip_transform(net)
    size = seen.size if isinstance(seen.size, int) else max(seen.size)
    seen = Seen(size, size, seen.interpolation, list(seen.mean), list(seen.std))
    return _FirstOf(net.visual), seen, transform


def _build_boxes(name, weights, pooling, regions):
    from torchvision.models import detection, get_model, list_models

    names = list_models(module=detection, include=["*rcnn*"])
    if name not in names:
        raise InputError(
            f"--encoder {name} has no boxes for --regions: give one of {', '.join(names)}, or "
            "--pooling grid without --regions"
        )
    if pooling != "pooled":
        raise InputError(f"--pooling {pooling} does not go with --regions: leave one of them out")
    net = _fetched(
        name,
        lambda: get_model(
            name, weights="DEFAULT" if weights == "imagenet" else None, weights_backbone=None
        ),
        weights,
    )
    if weights not in ("imagenet", "none"):
        load_state(net, weights, name)
    seen = Seen(
        net.transform.min_size[0],
        net.transform.max_size,
        "bilinear",
        list(net.transform.image_mean),
        list(net.transform.image_std),
    )
    return _Boxes(net, regions), seen, "boxes"


def _sample_encoder(pooling, normalised):
    """The sample data's encoder: standardised descriptions of 96 x 96 pixels."""
    from inputs import sample_data

    if pooling != "pooled":
        raise InputError(f"--encoder sample cannot pool by {pooling}: leave --pooling out")
    training = [
        sample_data.describe_pixels(example.pixels)
        for example in sample_data.draw_examples(sample_data.SEED)
        if example.split == "train"
    ]
    standard = sample_data.standard(np.stack(training))
    description = {**sample_data.describe_features(standard), "normalised": normalised}
    return Encoder(nn.Identity(), partial(_sample_row, standard), description, torch.device("cpu"))


def _sample_row(standard, picture):
    """A PIL picture's standardised description."""
    from inputs import sample_data

    pixels = np.asarray(picture.resize((sample_data.SIDE, sample_data.SIDE)))
    return torch.from_numpy(
        sample_data.standardise(sample_data.describe_pixels(pixels)[None], standard)[0]
    )


def _fetched(name, build, weights):
    """Call `build` with its own fixed seed; InputError if pretrained weights cannot be fetched."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(RANDOM_SEED)
        try:
            return build()
        except Exception as error:  # no network, full disk, broken download, no such weights
            if weights != "imagenet":
                raise
            raise InputError(
                f"the weights of {name} could not be fetched ({error}): give a file with "
                "--encoder_weights FILE, or random ones with --encoder_weights none"
            ) from error


def _hash_state(net):
    """SHA-256 of a net's weights, without batch norm's counters."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.contiguous().numpy())
    return digest.hexdigest()


def _versions(name):
    """{package: version} of what an encoder's features depend on."""
    packages = ["torch", "torchvision", "pillow"]
    packages += ["timm"] * name.startswith(TIMM) + ["open_clip_torch"] * name.startswith(OPEN_CLIP)
    return {package: importlib.metadata.version(package) for package in packages}


# From pictures to rows --------------------------------------------------------------------------


def _transform(seen, pooling):
    """The transform from a PIL picture to a uint8 tensor.

    The whole picture for boxes, (10, 3, size, size) for ten crops, else (3, size, size).
    """
    from torchvision import transforms

    if pooling == "boxes":
        return transforms.PILToTensor()
    resize = transforms.Resize(seen.resize, transforms.InterpolationMode(seen.interpolation))
    if pooling == "10crop":
        return transforms.Compose([resize, transforms.TenCrop(seen.size), _stacked])
    return transforms.Compose([resize, transforms.CenterCrop(seen.size), transforms.PILToTensor()])


def _stacked(crops):
    """PIL pictures -> (n, 3, H, W) uint8."""
    from torchvision import transforms

    return torch.stack(list(map(transforms.PILToTensor(), crops)))


class _Seeing(nn.Module):
    """Normalise pictures of bytes, and call the net.

    Pictures are (B, 3, H, W), or (B, 10, 3, H, W): then the result is the mean over the ten crops.
    """

    def __init__(self, net, seen):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(seen.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(seen.std).view(3, 1, 1))

    def forward(self, pictures):
        if pictures.dim() == 5:  # one crop at a time, since ten batches at once might not fit
            return torch.stack([self(crop) for crop in pictures.unbind(1)]).mean(0)
        pictures = pictures.float().div_(255).sub_(self.mean).div_(self.std)
        return self.net(pictures.contiguous(memory_format=torch.channels_last))


class _FirstOf(nn.Module):
    """The first output of a net that may have several, as CoCa's image tower has."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pictures):
        found = self.net(pictures)
        return found[0] if isinstance(found, tuple) else found


class _Grid(nn.Module):
    """The last feature map of a CNN, averaged in 6 x 6 cells: pictures -> (B, 36, channels)."""

    def __init__(self, net, name):
        super().__init__()
        self.net, self.map = net, None
        pools = [module for module in net.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
        last = next(
            (getattr(net, part) for part in ("features", "conv5", "layers") if hasattr(net, part)),
            None,
        )
        if hasattr(net, "forward_features"):  # timm's
            self.encode = net.forward_features
        elif pools:
            pools[-1].register_forward_pre_hook(lambda _, inputs: setattr(self, "map", inputs[0]))
            self.encode = self._hooked
        elif last is not None:
            last.register_forward_hook(lambda _, inputs, output: setattr(self, "map", output))
            self.encode = self._hooked
        else:
            raise InputError(
                f"--pooling grid needs a CNN, and {name} has no grid of features: choose "
                "--pooling pooled"
            )
        self.name = name

    def _hooked(self, pictures):
        self.net(pictures)
        map, self.map = self.map, None
        # DenseNet applies its last ReLU in forward, after the map that was hooked.
        return nn.functional.relu(map) if "DenseNet" in type(self.net).__name__ else map

    def forward(self, pictures):
        map = self.encode(pictures)
        if map.dim() != 4 or map.shape[2] != map.shape[3]:  # tokens, or channels last
            raise InputError(
                f"--pooling grid needs a CNN, and {self.name} has no grid of features: choose "
                "--pooling pooled"
            )
        return nn.functional.adaptive_avg_pool2d(map, GRID_SIDE).flatten(2).transpose(1, 2)


class _Boxes(nn.Module):
    """Features of a detector's most confident boxes: (1, 3, H, W) bytes -> (1, regions, width).

    As in bottom-up attention (Anderson et al., CVPR 2018), a proposal's confidence is that of its
    likeliest class, and of two boxes that overlap by more than half the less confident goes. If too
    few are left, the most confident of those that went follow; if there are too few proposals, they
    are repeated.
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
        # Class 0 is the background.
        sureness = heads.box_predictor(features)[0].softmax(-1)[:, 1:].amax(-1)
        kept = nms(boxes.float(), sureness.float(), BOX_OVERLAP)
        others = sureness.argsort(descending=True, stable=True)
        order = torch.cat([kept, others[~torch.isin(others, kept)]])
        return features[order.repeat(-(-self.regions // len(order)))[: self.regions]][None]


def check_photo(picture):
    """Raise InputError for a PIL picture too thin to be resized."""
    if max(picture.size) > THINNEST * min(picture.size):
        raise InputError(
            f"{picture.width} x {picture.height} pixels are too thin: at most {THINNEST} times as "
            "long as wide"
        )


def encode(encoder, pictures, amp="off"):
    """Encode pictures (B, ...) from the encoder's transform: (B, *row_shape), float32, on the CPU.

    amp "bf16": compute matrix products and convolutions in bf16.
    """
    with (
        torch.inference_mode(),
        torch.autocast(encoder.device.type, torch.bfloat16, enabled=amp == "bf16"),
    ):
        rows = encoder.net(to_device(pictures, encoder.device)).float()
    return (
        nn.functional.normalize(rows, dim=-1) if encoder.description["normalised"] else rows
    ).cpu()


def encode_photo(encoder, path, decode=decode_image):
    """Features (*row_shape) of one photo, a path or an open file; InputError if it is unreadable.

    decode: turns it into an RGB PIL picture.
    """
    picture = decode(path)
    check_photo(picture)
    return encode(encoder, encoder.transform(picture)[None])[0]
