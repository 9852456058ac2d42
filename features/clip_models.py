"""open_clip's models by name, for photos (`features.encoders`) and texts (`features.text_models`).

The package is imported only here, when a model is asked for.
"""

import logging
import os
import warnings
from contextlib import contextmanager

import torch

from runtime.errors import InputError

OPEN_CLIP = "open_clip/"
PREPROCESSING = "mean", "std", "interpolation", "resize_mode"


def load_clip(name, weights, flags):
    """The model `open_clip/<name>` on the CPU, in evaluation mode.

    weights: a pretrained tag, a file, or none (random, the same every time); None if not given.
    flags: those that name the model and its weights, for messages.
    Raises InputError if the package is not installed, or the model or its weights cannot be had.
    """
    flag, weights_flag = flags
    try:
        import open_clip
    except ImportError as error:
        raise InputError(
            f"{flag} {name} needs open_clip, which is not installed: pip install open_clip_torch"
        ) from error
    model = name.removeprefix(OPEN_CLIP)
    if model not in open_clip.list_models():
        raise InputError(
            f"{flag} {name} is not a model that open_clip knows: see open_clip.list_models()"
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights is None or weights not in ("none", *tags) and not os.path.isfile(weights):
        found = "is missing" if weights is None else f"{weights} is neither a tag nor a file"
        known = f"one of {', '.join(tags)}, " if tags else ""
        raise InputError(
            f"{weights_flag} {found}, and {name} needs it: give {known}a file, or none for random "
            "weights"
        )
    with torch.random.fork_rng(devices=[]), told_once(name):
        torch.manual_seed(0)
        net = open_clip.create_model(
            model,
            pretrained=None if weights == "none" else weights,
            pretrained_text=False,  # or `none` would fetch a text tower
            force_preprocess_cfg=None if weights in tags else _preprocessing(open_clip, model),
        )
    return net.eval()


def clip_tokenizer(name):
    """The tokenizer of a model: texts -> tensors. Raises InputError if it cannot be fetched."""
    import open_clip

    with told_once(name):
        return open_clip.get_tokenizer(name.removeprefix(OPEN_CLIP))


def clip_transform(net):
    """(The transform from a PIL picture to a uint8 tensor (3, size, size), the PreprocessCfg).

    It is open_clip's own but for its last steps, the division by 255, mean and deviation.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision import transforms

    seen = PreprocessCfg(**net.visual.preprocess_cfg)
    numbers = transforms.ToTensor, transforms.Normalize
    own = image_transform_v2(seen, is_train=False).transforms
    shapes = [step for step in own if not isinstance(step, numbers)]
    return transforms.Compose([*shapes, transforms.PILToTensor()]), seen


def _preprocessing(open_clip, model):
    """How a model's pretrained weights see photos, if all do alike, for a file of weights.

    open_clip itself would take OpenAI's way, which is not that of SigLIP, for example.
    """
    tags = open_clip.list_pretrained_tags_by_model(model)
    known = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    ways = [{key: one[key] for key in PREPROCESSING if key in one} for one in known]
    return ways[0] if ways and all(way == ways[0] for way in ways) else None


@contextmanager
def told_once(name):
    """Raise what goes wrong as one InputError, without the lines that packages log of it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except Exception as error:  # no network, no such model, a broken file
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the model {name} could not be loaded ({type(error).__name__}: {reason}): check its "
            "name and weights, or the network that they are fetched from"
        ) from error
    finally:
        logging.disable(disabled)
