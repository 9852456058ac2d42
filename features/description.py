"""`features.json`: what made a folder's features, and whether they suit a model."""

import os

from inputs.captions import is_precomputed, read_json
from runtime.errors import InputError

FORMAT = 1  # of features.json

# Two sets of features are of the same kind if they agree in these entries; with their types.
KIND = {
    "encoder": str,
    "weights_sha256": str,
    "pooling": str,
    "regions": (int, type(None)),
    "normalised": bool,
    "resize": int,
    "size": int,
    "interpolation": str,
    "mean": list,
    "std": list,
    "width": int,
}
OTHERS = {"format": int, "weights": str, "dtype": str, "amp": str, "versions": dict}

# features.json ----------------------------------------------------------------------------------


def read_features_json(folder):
    """The content of `<folder>/features.json`; None if there is none.

    Raises InputError if it is broken, or of a newer version.
    """
    path = os.path.join(folder, "features.json")
    if not os.path.lexists(path):
        return None
    return check_description(read_json(path), path)


def features_of(data_path, data_name, model_features=None, model_path=""):
    """The features.json of a data set; None if it has none, or holds photos.

    model_features: the features.json that the checkpoint at model_path carries, or None. Raises
    InputError if the two are of different kinds; and as `read_features_json`.
    """
    folder = os.path.join(data_path, data_name)
    found = read_features_json(folder) if is_precomputed(data_name) else None
    if found and model_features:
        refuse_other(found, model_features, folder, f"checkpoint {model_path}")
    return found


def check_description(description, source):
    """Return the description; raises InputError, naming the source, unless it is complete."""
    if not isinstance(description, dict) or not isinstance(description.get("format"), int):
        raise InputError(
            f"{source} does not describe features: make them again with extract_features.py"
        )
    if description["format"] > FORMAT:
        raise InputError(
            f"{source} is of format {description['format']}, newer than this program's {FORMAT}: "
            "update it, or make the features again"
        )
    for name, kinds in {**KIND, **OTHERS}.items():
        if not isinstance(description.get(name, ...), kinds):
            raise InputError(
                f"{source} lacks {name!r}, or has a value of the wrong kind for it: make the "
                "features again with extract_features.py"
            )
    return description


def same_encoder(one, other):
    """Whether two descriptions agree in encoder, weights, pooling and sizes."""
    return all(one[name] == other[name] for name in KIND)


def refuse_other(found, expected, found_where, expected_where):
    """Raise InputError unless two descriptions are of the same kind of features.

    found_where, expected_where: go into the sentence, such as "data/mine_precomp" and "checkpoint
    runs/x/model_best.pth.tar".
    """
    if not same_encoder(found, expected):
        differing = ", ".join(name for name in KIND if found[name] != expected[name])
        raise InputError(
            f"{found_where} has features by {_in_words(found)}, but {expected_where} has them by "
            f"{_in_words(expected)}, with other {differing}: extract them again with the same "
            "encoder, weights and pooling"
        )


def _in_words(description):
    regions = "" if description["regions"] is None else f" {description['regions']}"
    length = ", length one" if description["normalised"] else ""
    return (
        f"{description['encoder']} (weights {description['weights_sha256'][:12]}, "
        f"{description['pooling']}{regions}, {description['size']} pixels{length})"
    )
