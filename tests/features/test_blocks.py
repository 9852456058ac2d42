"""Features in blocks: killed runs go on, torn blocks are made again, processes share the work."""

import contextlib

import numpy as np
import pytest
import torch

import extract_features
from features import blocks, encoders
from features.encoders import encode_photo
from runtime import distributed
from runtime.errors import InputError
from tests.helpers.made import tree
from tests.helpers.photos import SAMPLE, build_once, draw_photo, extract, lines


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder but for photos/0.png to photos/9.png."""
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        draw_photo(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path


@pytest.fixture(autouse=True)
def built_once(monkeypatch):
    """`sample` describes 500 pictures whenever it is built."""
    monkeypatch.setattr(extract_features, "build_encoder", build_once)


def test_a_block_may_be_broken_altogether(folder, watched):
    for number in range(4):
        (folder / f"photos/{number}.png").write_bytes(b"no photo")
    assert watched.extract("out") == [3, 1, 2]
    assert lines(folder / "out/gallery_ids.txt") == [f"{number}.png" for number in range(4, 10)]
    encoder = build_once("shufflenet_v2_x0_5", "none")
    assert np.allclose(
        np.load(folder / "out/gallery_ims.npy"),
        [encode_photo(encoder, f"photos/{number}.png").numpy() for number in range(4, 10)],
        rtol=1e-3,
        atol=1e-8,
    )


def test_features_too_large_for_float16_are_refused(folder, monkeypatch):
    large = torch.full((1, 368), 7e4)
    monkeypatch.setattr(
        blocks, "encode", lambda encoder, pictures, amp: large.repeat(len(pictures), 1)
    )
    with pytest.raises(
        InputError, match="photo 0.png: sample gives features that are not finite in float16"
    ):
        extract("--dtype", "float16", encoder=SAMPLE)
    assert not (folder / "out").exists()


@pytest.fixture
def watched(folder, monkeypatch):
    """Blocks of four photos in batches of three.

    The photos encoded so far, and a place to stop the run at.
    """

    class Watched:
        encoded, stop_at = [], None

        def extract(self, output, stop_at=None):
            """The photos that the run encoded; it ends before batch number `stop_at`, if given."""
            self.encoded, self.stop_at, self.batch = [], stop_at, 0
            with contextlib.suppress(KeyboardInterrupt):
                extract("--batch_size", "3", output=output)
                assert stop_at is None
            return self.encoded

    state = Watched()
    encode = encoders.encode

    def counted(encoder, pictures, amp):
        if state.batch == state.stop_at:
            raise KeyboardInterrupt
        state.batch += 1
        state.encoded.append(len(pictures))
        return encode(encoder, pictures, amp)

    monkeypatch.setattr(blocks, "encode", counted)
    monkeypatch.setattr(blocks, "BLOCK_PHOTOS", 4)
    return state


@pytest.mark.parametrize(
    "stop_at, left", [(0, [3, 1, 3, 1, 2]), (1, [3, 1, 3, 1, 2]), (2, [3, 1, 2]), (4, [2])]
)
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(folder, watched, stop_at, left):
    watched.extract("whole")
    watched.extract("out", stop_at)
    assert not any(path.suffix == ".npy" for path in (folder / "out").glob("*"))
    assert watched.extract("out") == left
    assert tree(folder / "out") == tree(folder / "whole")


def test_a_run_killed_before_its_last_step_encodes_nothing_again(folder, watched, monkeypatch):
    watched.extract("whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            extract_features, "write_features", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        watched.extract("out", stop_at=99)
    assert not (folder / "out/features.json").exists()
    assert watched.extract("out") == []
    assert tree(folder / "out") == tree(folder / "whole")


@pytest.mark.parametrize(
    "error, reason",
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "fewer --workers",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "smaller --batch_size"),
        (RuntimeError("a bug"), None),
    ],
)
def test_what_memory_does_not_hold_is_said(folder, monkeypatch, error, reason):
    monkeypatch.setattr(blocks, "encode", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(InputError if reason else RuntimeError, match=reason or "a bug"):
        extract(encoder=SAMPLE)


def test_photos_that_changed_since_are_encoded_anew(folder, watched):
    watched.extract("out", stop_at=4)
    draw_photo(folder / "photos/5.png", seed=99, size=(50, 30))
    assert watched.extract("out") == [3, 1, 2]
    watched.extract("whole")
    assert tree(folder / "out") == tree(folder / "whole")


def test_torn_blocks_are_made_again(folder, watched):
    watched.extract("whole")
    watched.extract("out", stop_at=4)
    for block in (folder / "out/.blocks").iterdir():
        block.write_bytes(block.read_bytes()[:-10])
    assert watched.extract("out") == [3, 1, 3, 1, 2]
    assert tree(folder / "out") == tree(folder / "whole")


def test_what_a_kill_left_half_written_is_gone_at_the_end(folder, watched):
    watched.extract("out", stop_at=2)
    (folder / "out/.blocks/train_ims.npy.x7.tmp").write_bytes(b"half")
    watched.extract("out")
    assert {path.name for path in (folder / "out").iterdir()} == {
        "features.json",
        "gallery_ims.npy",
        "gallery_ids.txt",
    }


def test_each_of_two_processes_takes_its_share(folder, watched, monkeypatch):
    watched.extract("whole")
    shares = []
    for rank in (1, 0):  # the first process assembles, once the others have met it
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "size", lambda: 2)
        shares.append(watched.extract("out"))
    assert shares == [[3, 1], [3, 1, 2]]
    assert tree(folder / "out") == tree(folder / "whole")
