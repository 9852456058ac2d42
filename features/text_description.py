"""`texts.json`: which text model made a folder's text vectors, and of which captions."""

import hashlib
import os

from inputs.captions import read_json
from runtime.errors import InputError

FORMAT = 1  # of texts.json
SENTENCES = "sentence_transformers/"
# What must agree for two sets of vectors to be the same model's, with the types.
KIND = {"encoder": str, "weights_sha256": str, "width": int, "normalised": bool}


def hash_captions(captions):
    """SHA-256 of a split's captions, in their order."""
    text = "\n".join(captions).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()


def read_texts_json(folder):
    """The content of `<folder>/texts.json`; None if there is none. Raises InputError if broken."""
    path = os.path.join(folder, "texts.json")
    if not os.path.lexists(path):
        return None
    return check_texts_json(read_json(path), path)


def check_texts_json(content, source):
    """Return the content; raises InputError, naming the source, unless it is complete."""
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        raise InputError(f"{source} does not describe text vectors: make them again")
    if content["format"] > FORMAT:
        raise InputError(
            f"{source} is of format {content['format']}, newer than this program's {FORMAT}: "
            "update it, or make the text vectors again"
        )
    for name, kind in {**KIND, "captions_sha256": dict}.items():
        if type(content.get(name)) is not kind:
            raise InputError(
                f"{source} lacks {name!r}, or has a value of the wrong kind for it: make the text "
                "vectors again"
            )
    return content


def refuse_other(
    found,
    expected,
    found_where,
    expected_where="the model was trained on those by",
    remedy="make them again with the same model",
):
    """Raise InputError unless two descriptions are of the same text model.

    found_where, expected_where, remedy: parts of the sentence; the first two stand before a model's name.
    """
    differing = [name for name in KIND if found[name] != expected[name]]
    # What follows the package may be a folder, which can be moved: the weights say what it holds.
    if all(one["encoder"].startswith(SENTENCES) for one in (found, expected)):
        differing = [name for name in differing if name != "encoder"]
    if differing:
        raise InputError(
            f"{found_where} {found['encoder']}, width {found['width']}, but {expected_where} "
            f"{expected['encoder']}, width {expected['width']}, with other "
            f"{', '.join(differing)}: {remedy}"
        )
