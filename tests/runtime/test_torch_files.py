"""Files of torch.save are read exactly as written, or refused."""

import argparse
import errno
import os
import random
import time
import zipfile

import numpy as np
import pytest
import torch

from features import encoders
from runtime import torch_files
from runtime.errors import InputError
from training import checkpoint

FLIPPED = int(os.environ.get("FLIPPED_COPIES", "40"))

LARGE = 2**16  # bytes of a file from which on a cut one made torch seek before its start


def content(values=20_000):
    """A checkpoint's kinds of parts, 80 kB of them weights."""
    generator = torch.Generator().manual_seed(0)
    return {
        "weights": torch.randn(values, generator=generator),
        "counter": torch.arange(9),
        "epoch": 3,
        "opt": argparse.Namespace(embed_size=4, data_name="a_precomp"),
        "words": ["a", "b"] * 99,
    }


def flat(found):
    """Everything that a content holds, as bytes."""
    return repr(
        {
            **found,
            "opt": sorted(vars(found["opt"]).items()),
            "weights": found["weights"].numpy().tobytes(),
            "counter": found["counter"].tolist(),
        }
    )


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run.pth.tar"
    torch.save(content(), path)
    return path


def read(path):
    return torch_files.read(str(path), "checkpoint", checkpoint.ADMITTED)


# A changed bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(FLIPPED))
def test_a_copy_with_flipped_bits_is_refused_or_reads_the_same(saved, seed):
    """One to thirty bits; every second copy has them in the zip's own structures, which are few."""
    rng, data = random.Random(seed), bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        entries, places = archive.infolist(), range(len(data))
        structures = [
            place
            for entry in entries
            for place in range(entry.header_offset, entry.header_offset + 64)
        ]
        structures += range(entries[-1].header_offset, len(data))
    for _ in range(rng.randint(1, 30)):
        data[rng.choice(structures if seed % 2 else places)] ^= 1 << rng.randrange(8)
    expected = flat(read(saved))
    saved.write_bytes(data)
    try:
        found = read(saved)
    except InputError as error:
        assert "run.pth.tar" in str(error) and "\n" not in str(error)
    else:
        assert flat(found) == expected


@pytest.mark.parametrize("place", [0, 1, 40_000, 79_999])
def test_a_flipped_bit_of_a_weight_is_refused(saved, place):
    data = bytearray(saved.read_bytes())
    start = data.index(content()["weights"].numpy().tobytes())
    data[start + place] ^= 1
    saved.write_bytes(data)
    assert torch.load(saved, weights_only=False)["weights"].shape == (20_000,)  # torch says nothing
    with pytest.raises(
        InputError, match=r"run\.pth\.tar is not a checkpoint, or is cut short .*CRC"
    ):
        read(saved)


def test_a_flipped_bit_in_a_cnn_s_weights_is_refused(tmp_path):
    from torchvision import models

    torch.save(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "net.pth")
    data = bytearray((tmp_path / "net.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "net.pth").write_bytes(data)
    with pytest.raises(InputError, match="--encoder_weights .*net.pth is not a state dict .*CRC"):
        encoders.build_encoder("squeezenet1_1", str(tmp_path / "net.pth"))


def test_two_entries_of_one_name_are_refused(saved):
    with zipfile.ZipFile(saved, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.infolist()[0].filename, b"x")
    with pytest.raises(InputError, match="two of its entries have one name"):
        read(saved)


def test_the_checksums_of_50_megabytes_are_not_felt(tmp_path):
    torch.save(content(13_000_000), tmp_path / "large")
    started = time.process_time()
    torch_files._check_archive(str(tmp_path / "large"), "large")
    assert time.process_time() - started < 1  # 0.06 s on two cores of an AMD EPYC


# A file cut short -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [0, 1, 3, 4, 100, 4_000, 5_000, 20_000, LARGE - 1, LARGE, LARGE + 5_000, 80_000]
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_is_cut_short_is_not_taken_for_a_disk_s_fault(saved, size, legacy):
    torch.save(content(), saved, _use_new_zipfile_serialization=not legacy)
    assert saved.stat().st_size > 80_000
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(
        InputError, match=r"run\.pth\.tar is not a checkpoint, or is cut short"
    ) as caught:
        read(saved)
    assert not isinstance(caught.value.__cause__, OSError)


def test_a_disk_s_fault_is_one(saved, monkeypatch):
    def stale(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(zipfile.ZipExtFile, "read", stale)
    with pytest.raises(InputError, match=r"run\.pth\.tar cannot be read .Stale") as caught:
        read(saved)
    assert isinstance(caught.value.__cause__, OSError)


# Files without checksums ------------------------------------------------------------------------


def test_a_legacy_file_is_said_to_be_unchecked(saved, capsys):
    expected = flat(read(saved))
    assert capsys.readouterr().err == ""
    torch.save(content(), saved, _use_new_zipfile_serialization=False)
    assert flat(read(saved)) == expected
    assert capsys.readouterr().err == (
        f"note: {saved} is unchecked: PyTorch before 1.6 wrote no checksums, so damage to "
        "it may go unnoticed\n"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_legacy_file_with_a_number_that_is_not_finite_is_refused_wherever_it_is(saved, value):
    torch.save(
        {**content(), "optimizer": {"state": [{"exp_avg": (torch.tensor([1.0, value]),)}]}},
        saved,
        _use_new_zipfile_serialization=False,
    )
    with pytest.raises(InputError, match="NaN or infinity in a tensor"):
        read(saved)


def test_a_legacy_file_that_unfolds_without_end_is_read_in_time(saved):
    bomb = ["x"]
    for _ in range(60):
        bomb = [bomb, bomb]
    torch.save({**content(), "bomb": bomb}, saved, _use_new_zipfile_serialization=False)
    assert read(saved)["epoch"] == 3


# Weights of a CNN -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda tensor: tensor.to(torch.int64), "is of type int64"),
        (lambda tensor: tensor.fill_(torch.nan), "has NaN or infinity"),
        (lambda tensor: tensor.to_sparse(), "whole tensor"),
        (lambda tensor: torch.zeros(1).expand(2**40, 3), "whole tensor"),
        (lambda tensor: "weights", "not a dict of tensors"),
    ],
    ids=["integers", "NaN", "sparse", "inflated", "text"],
)
def test_cnn_weights_pass_the_guards_of_a_checkpoint(tmp_path, spoil, says):
    from torchvision import models

    state = models.squeezenet1_1(weights=None).state_dict()
    torch.save(
        {**state, "features.0.weight": spoil(state["features.0.weight"])}, tmp_path / "net.pth"
    )
    with pytest.raises(InputError, match=f"--encoder_weights .*net.pth.*{says}"):
        encoders.build_encoder("squeezenet1_1", str(tmp_path / "net.pth"))


def test_what_runs_code_is_named_and_pytorch_s_own_advice_is_not_given(tmp_path):
    from torchvision import models

    torch.save({"state_dict": models.squeezenet1_1(weights=None)}, tmp_path / "net.pth")
    with pytest.raises(
        InputError, match="--encoder_weights .*net.pth is refused: it asks to load torch"
    ) as caught:
        encoders.build_encoder("squeezenet1_1", str(tmp_path / "net.pth"))
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "head, says",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "is a Git LFS pointer .*, not a checkpoint: run",
        ),
        (b"<html><body>Sign in</body></html>", "is a web page, not a checkpoint: "),
        (b"\x1f\x8b\x08" + bytes(99), "is compressed by gzip, not a checkpoint: unpack it"),
    ],
    ids=["LFS", "html", "gzip"],
)
def test_a_file_of_another_kind_is_called_what_it_is(saved, head, says):
    saved.write_bytes(head)
    with pytest.raises(InputError, match=rf"run\.pth\.tar {says}"):
        read(saved)
