"""torchvision's CNNs and their weights."""

import torch

from runtime import torch_files
from runtime.errors import InputError, check_choice


def load_state(net, path, name, heads=(), flag="--encoder_weights"):
    """Load a state dict file into a net, except for its heads.

    path: the file; name: the net's name, for messages.
    heads: prefixes of layers that may have any size in the file, or be absent from it.
    flag: the flag that names the file, for messages.
    Raises InputError for anything that is not a state dict of this net.
    """

    def is_head(key):
        return any(str(key).startswith(head + ".") for head in heads)

    state, own = torch_files.read(path, f"state dict of {name}", flag=flag), net.state_dict()
    state = state.get("state_dict", state) if isinstance(state, dict) else None  # a training run's
    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise InputError(
            f"{flag} {path} is not a state dict of {name}: it is not a dict of tensors"
        )
    state = {key: value for key, value in state.items() if not is_head(key)}
    integers = [key for key in own if not own[key].is_floating_point()]
    fits = {
        key: key in own and value.shape == own[key].shape and value.layout == torch.strided
        for key, value in state.items()
    }
    # A view of a larger tensor is copied, so that nothing keeps the larger one in memory.
    state = {key: value.contiguous() if fits[key] else value for key, value in state.items()}
    torch_files.check_weights(state, f"{flag} {path}", integers)
    try:
        # strict=False: files of old versions may lack buffers that the net creates itself.
        result = net.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:2]) or error
        raise InputError(f"{flag} {path} is not a state dict of {name} ({reason})") from error
    lacking = [key for key in result.missing_keys if not is_head(key)]
    if lacking or result.unexpected_keys:
        raise InputError(
            f"{flag} {path} is not a state dict of {name}: it lacks {len(lacking)} names and has "
            f"{len(result.unexpected_keys)} unknown ones"
        )


def cnn_types():
    """List the names that --cnn_type takes: every VGG and ResNet of torchvision."""
    from torchvision import models

    return models.list_models(
        module=models, include=["vgg*", "resnet*", "resnext*", "wide_resnet*"]
    )


def _build_cnn(cnn_type, weights):
    """Build a torchvision CNN, with its last linear layer.

    weights: "imagenet", "none" (random) or the path of a state dict file.
    """
    from torchvision import models

    check_choice("cnn_type", cnn_type, cnn_types())
    if weights == "imagenet":
        try:
            return models.get_model(cnn_type, weights="IMAGENET1K_V1")
        except (OSError, RuntimeError) as error:  # no network, a full disk, a download cut short
            raise InputError(
                f"the ImageNet weights of {cnn_type} could not be fetched ({error}): give a file "
                "with --cnn_weights FILE, or random ones with --cnn_weights none"
            ) from error
    cnn = models.get_model(cnn_type, weights=None)
    if weights != "none":
        head = "classifier.6" if cnn_type.startswith("vgg") else "fc"
        load_state(cnn, weights, cnn_type, [head], "--cnn_weights")
    return cnn
