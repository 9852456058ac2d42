"""A vector database that is asked in place of a gallery's index (docs/scale.md fills it).

lancedb://FOLDER/TABLE, milvus://HOST:PORT/COLLECTION or milvus://FILE.db/COLLECTION, then ?probes=N.
"""

import importlib
import logging
import os
import re

import torch

from embeddings.files import missing
from gallery.export import level_in, padded
from runtime.errors import InputError

FORM = re.compile(r"(lancedb|milvus)://(.+)/([^/?]+)(?:\?probes=([1-9]\d{0,5}))?")
REFINED, SECONDS = 20, 10  # rows that LanceDB ranks exactly for each wanted; to await Milvus


def opened(text, gallery):
    """What stands for the Gallery's `find`; InputError unless the store answers and has its rows."""
    if not (form := FORM.fullmatch(text)):
        raise InputError(f"--store {text} is no address of a table: --help shows their forms")
    kind, place, name, probes = form.groups("64")
    if not re.search(r"://|:\d+$", place) and not os.path.exists(place):
        raise InputError(f"--store {text}: there is no {place}: import the gallery first")
    opening = _milvus if kind == "milvus" else _lancedb
    ask, stamp, count = _told(text, opening, place, name, int(probes))
    middle, length = level_in(stamp, count, gallery, f"--store {text}")

    def find(queries, top):
        asked = torch.nn.functional.pad(queries, (0, padded(gallery.width) - queries.shape[1]))
        numbers = torch.full((len(asked), min(top, count)), -1)
        scores = numbers * torch.inf
        for row, (ids, own) in enumerate(_told(text, ask, asked, top)):
            numbers[row, : len(ids)], scores[row, : len(ids)] = torch.tensor(ids), torch.tensor(own)
        return scores * length + middle * queries[:, -1:], numbers

    return find


def _told(text, function, *arguments):
    """The function's result; what a database's package raises becomes an InputError."""
    try:
        return function(*arguments)
    except ModuleNotFoundError as error:
        raise missing(f"--store {text}", error.name.replace("_", "-")) from error
    except Exception as error:  # each package has errors of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"--store {text} does not answer ({reason}): check the address") from error


def _lancedb(place, name, probes):
    """What asks for rows' nearest, [(numbers, products), ...]; the table's stamp, and its count."""
    table = importlib.import_module("lancedb").connect(place).open_table(name)

    def ask(row, top):
        query = table.search(row.numpy(), "vector").distance_type("cosine").nprobes(probes)
        found = query.refine_factor(REFINED).limit(top).select(["id", "_distance"]).to_arrow()
        return found["id"].to_pylist(), (1 - found["_distance"].to_numpy()) * row.norm().item()

    stamp = (table.schema.metadata or {}).get(b"gallery")
    return lambda rows, top: [ask(row, top) for row in rows], stamp, len(table)


def _milvus(place, name, probes):
    """As `_lancedb`."""
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs what it raises
    uri = place if os.path.exists(place) else f"http://{place}"
    client = importlib.import_module("pymilvus").MilvusClient(uri, timeout=SECONDS)
    client.load_collection(name)
    params = {"params": {"nprobe": probes}}

    def ask(rows, top):
        found = client.search(name, rows.tolist(), limit=top, search_params=params)
        return [([hit["id"] for hit in own], [hit["distance"] for hit in own]) for own in found]

    stamp = client.describe_collection(name)["properties"].get("gallery")
    return ask, stamp, client.query(name, output_fields=["count(*)"])[0]["count(*)"]
