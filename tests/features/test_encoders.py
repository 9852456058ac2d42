"""Encoders: what they compute, and which photos and weights they accept."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models, transforms

from features import encoders
from features.encoders import build_encoder, encode, encode_photo, encoder_from
from inputs import sample_data
from inputs.photos import IMAGENET_MEAN, IMAGENET_STD
from runtime.errors import InputError

SMALL = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A made photo, 300 x 280."""
    path = tmp_path_factory.mktemp("photos") / "a.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (280, 300, 3), dtype=np.uint8)).save(
        path
    )
    return path


@pytest.fixture(scope="module")
def resnet():
    """A ResNet-18 with the random weights that `none` stands for, and without its last layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.resnet18(weights=None)
    net.fc = torch.nn.Identity()
    return net.eval()


def normalised(crops):
    """PIL pictures -> (n, 3, H, W), as ImageNet's nets take them."""
    to_numbers = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    return torch.stack([to_numbers(crop) for crop in crops])


def crop_at(picture, left, top):
    return picture.crop((left, top, left + 224, top + 224))


@torch.no_grad()
def test_a_row_is_what_the_cnn_sees_before_its_last_layer(photo, resnet):
    picture = Image.open(photo).resize((274, 256), Image.BILINEAR)  # its shorter side 256
    expected = resnet(normalised([crop_at(picture, 25, 16)]))[0]
    encoder = build_encoder("resnet18", "none")
    assert encoder.row_shape == (512,)
    assert torch.allclose(encode_photo(encoder, photo), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_10crop_is_the_mean_of_the_corners_and_the_centre_and_their_mirrored(photo, resnet):
    picture = Image.open(photo).resize((274, 256), Image.BILINEAR)
    crops = [
        crop_at(side, left, top)
        for side in (picture, picture.transpose(Image.FLIP_LEFT_RIGHT))
        for left, top in ((0, 0), (50, 0), (0, 32), (50, 32), (25, 16))
    ]
    expected = sum(resnet(normalised([crop]))[0] for crop in crops) / 10
    assert torch.allclose(
        encode_photo(build_encoder("resnet18", "none", "10crop"), photo),
        expected,
        rtol=1e-4,
        atol=1e-4,
    )


@torch.no_grad()
def test_a_grids_rows_are_the_means_of_the_last_maps_cells(photo, resnet):
    pictures = normalised([crop_at(Image.open(photo).resize((274, 256), Image.BILINEAR), 25, 16)])
    trunk = torch.nn.Sequential(*list(resnet.children())[:-2])
    last_map = trunk(pictures)[0]  # (512, 7, 7)
    rows = []
    for row in range(6):
        for column in range(
            6
        ):  # a cell is of the 7 x 7 places that it covers in part, too: two by two
            rows.append(last_map[:, row : row + 2, column : column + 2].mean((1, 2)))
    encoder = build_encoder("resnet18", "none", "grid")
    assert encoder.row_shape == (36, 512)
    assert torch.allclose(encode_photo(encoder, photo), torch.stack(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [SMALL, "mobilenet_v2", "squeezenet1_1"])
def test_any_cnns_map_has_the_mean_that_is_its_pooled_row(monkeypatch, name):
    pooled, grid = build_encoder(name, "none"), build_encoder(name, "none", "grid")
    pictures = torch.randint(
        0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    maps = []
    pool = torch.nn.functional.adaptive_avg_pool2d
    monkeypatch.setattr(
        torch.nn.functional,
        "adaptive_avg_pool2d",
        lambda map, side: maps.append(map) or pool(map, side),
    )
    assert encode(grid, pictures).shape == (2, 36, pooled.row_shape[0])
    assert torch.allclose(maps[-1].mean((2, 3)), encode(pooled, pictures), rtol=1e-4)


def test_random_weights_are_the_same_every_time_and_draw_nothing_from_the_run():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = (build_encoder(SMALL, "none").description["weights_sha256"] for _ in range(2))
    assert one == other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}]
)
def test_weights_come_from_a_file_whatever_its_last_layer_is(tmp_path, photo, wrap):
    net = models.get_model(SMALL, weights=None, num_classes=7)
    torch.save(wrap(net.state_dict()), tmp_path / "net.pth")
    net.fc = torch.nn.Identity()
    encoder = build_encoder(SMALL, str(tmp_path / "net.pth"))
    picture = Image.open(photo).resize((274, 256), Image.BILINEAR)
    with torch.no_grad():
        expected = net.eval()(normalised([crop_at(picture, 25, 16)]))[0]
    assert torch.allclose(encode_photo(encoder, photo), expected, rtol=1e-4, atol=1e-6)
    assert (
        encoder.description["weights_sha256"]
        != build_encoder(SMALL, "none").description["weights_sha256"]
    )


@pytest.mark.parametrize("content", ["another net", "no net", "no file"])
def test_weights_that_are_no_state_dict_of_the_encoder_are_refused(tmp_path, content):
    path = tmp_path / "net.pth"
    if content == "another net":
        torch.save(models.squeezenet1_1(weights=None).state_dict(), path)
    elif content == "no net":
        path.write_bytes(b"x" * 100)
    with pytest.raises(
        InputError,
        match=r"net.pth (is not|is text, not|cannot be read .No such) .*(shufflenet|file)",
    ):
        build_encoder(SMALL, str(path))


@pytest.mark.parametrize(
    "flags, reason",
    [
        (("resnet1",), "--encoder resnet1 is not known"),
        (("fasterrcnn_resnet50_fpn_v2",), "a detector with --regions 36"),
        (("vit_b_32", "none", "grid"), "vit_b_32 has no grid of features"),
        (("sample", "none", "grid"), "sample cannot pool by grid"),
        (("resnet18", "none", "pooled", 36), "resnet18 has no boxes for --regions"),
        (
            ("fasterrcnn_resnet50_fpn_v2", "none", "10crop", 36),
            "--pooling 10crop does not go with --regions",
        ),
        (("timm/resnet18", "none"), "timm, which is not installed"),
    ],
)
def test_encoders_that_cannot_be_built_are_refused(monkeypatch, flags, reason):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=reason):
        build_encoder(*flags)


def test_weights_that_cannot_be_fetched_are_said(monkeypatch):
    monkeypatch.setattr(
        "torchvision.models._api.WeightsEnum.get_state_dict",
        lambda *_, **__: (_ for _ in ()).throw(OSError("no network")),
    )
    with pytest.raises(
        InputError, match=r"weights of .* could not be fetched \(no network\): give a file"
    ):
        build_encoder(SMALL, "imagenet")


def test_timms_encoders():
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = timm.create_model("resnet10t", num_classes=0).eval()
    encoder = build_encoder("timm/resnet10t", "none")
    size = encoder.description["size"]
    pictures = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = net((pictures / 255 - mean) / std)
    assert torch.allclose(encode(encoder, pictures), expected, rtol=1e-3, atol=1e-5)


def test_sample_gives_the_embedded_datas_own_features(tmp_path):
    encoder = build_encoder("sample")
    examples = sample_data.draw_examples(sample_data.SEED)
    expected, _ = sample_data.compute_features(examples)
    assert encoder.row_shape == expected.shape[1:]
    for row in (0, 600, 899):
        path = tmp_path / "a.png"
        Image.fromarray(examples[row].pixels).save(path)
        assert np.array_equal(encode_photo(encoder, path).numpy(), expected[row])


class FakeDetector(torch.nn.Module):
    """Four proposals, the second over the first.

    Their features identify them, and the third has the highest score.
    """

    def __init__(self, proposals):
        super().__init__()
        self.proposals = torch.tensor(proposals, dtype=torch.float).reshape(-1, 4)
        self.roi_heads = self
        self.box_predictor = torch.nn.Module()
        self.box_predictor.cls_score = torch.nn.Linear(2, 3)
        self.box_predictor.forward = lambda features: (self.logits(features), None)

    def transform(self, pictures):
        class Images:
            tensors, image_sizes = torch.stack(pictures), [tuple(pictures[0].shape[1:])]

        return Images, None

    def backbone(self, tensors):
        return {"0": tensors}

    def rpn(self, images, maps):
        return [self.proposals], {}

    def box_roi_pool(self, maps, boxes, sizes):
        return boxes[0]

    def box_head(self, boxes):
        return boxes[:, :2]  # a box's left and top tell it

    def logits(self, features):
        sureness = {0.0: 2.0, 1.0: 3.0, 50.0: 4.0, 20.0: 1.0}
        return torch.tensor(
            [[9.0, -9.0, sureness.get(left, 0)] for left in features[:, 0].tolist()]
        )


PROPOSALS = [[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [20, 20, 30, 30]]


@pytest.mark.parametrize(
    "regions, expected",
    [
        (2, [50, 1]),  # the surest, then the surer of the two that overlap
        (3, [50, 1, 20]),
        (4, [50, 1, 20, 0]),  # then the one left out
        (6, [50, 1, 20, 0, 50, 1]),  # then again
    ],
)
def test_boxes_come_surest_first_and_those_that_overlap_last(regions, expected):
    rows = encoders._Boxes(FakeDetector(PROPOSALS), regions)(
        torch.zeros(1, 3, 80, 80, dtype=torch.uint8)
    )
    assert rows.shape == (1, regions, 2)
    assert rows[0, :, 0].tolist() == expected


def test_without_proposals_the_whole_picture_is_the_box():
    rows = encoders._Boxes(FakeDetector([]), 2)(torch.zeros(1, 3, 80, 80, dtype=torch.uint8))
    assert rows.tolist() == [[[0, 0], [0, 0]]]


def test_a_real_detector_gives_rows_of_its_boxes(photo):
    encoder = build_encoder("fasterrcnn_mobilenet_v3_large_320_fpn", "none", regions=3)
    assert encoder.row_shape == (3, 1024)
    row = encode_photo(encoder, photo)
    assert row.shape == (3, 1024)
    assert row.isfinite().all()


def test_a_photo_too_thin_to_resize_is_refused(tmp_path):
    Image.new("RGB", (2, 201)).save(tmp_path / "thin.png")
    with pytest.raises(InputError, match="2 x 201 pixels are too thin"):
        encode_photo(build_encoder(SMALL, "none"), tmp_path / "thin.png")


def test_normalised_rows_have_length_one_and_the_same_direction(photo):
    rows, normalised = (
        encode_photo(build_encoder(SMALL, "none", "grid", None, wanted), photo)
        for wanted in (False, True)
    )
    for row, scaled in zip(rows.double(), normalised.double()):
        assert torch.allclose(scaled, row / (row * row).sum().sqrt(), atol=1e-6)


def test_bf16_is_near_float32(photo):
    encoder = build_encoder("resnet18", "none")
    pictures = encoder.transform(Image.open(photo))[None]
    exact, rounded = encode(encoder, pictures), encode(encoder, pictures, "bf16")
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.05 * exact.abs().max()


# features.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        (SMALL, "none", "10crop", None, True),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "none", "pooled", 3),
    ],
)
def test_a_description_is_enough_to_encode_a_new_photo(photo, flags):
    encoder = build_encoder(*flags)
    again = encoder_from(json.loads(json.dumps(encoder.description)))
    assert torch.equal(encode_photo(again, photo), encode_photo(encoder, photo))


@pytest.mark.parametrize(
    "flags",
    [
        (SMALL, "none", "10crop"),
        (SMALL, "none", "pooled"),
        ("sample", "none", "pooled"),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "none", "pooled", 3),
    ],
)
def test_what_is_done_to_a_photo_goes_to_processes_that_are_not_forked(photo, flags):
    transform = build_encoder(*flags).transform
    with Image.open(photo) as picture:
        picture = picture.convert("RGB")
        assert torch.equal(pickle.loads(pickle.dumps(transform))(picture), transform(picture))


def test_weights_that_have_changed_since_are_refused(tmp_path):
    net = models.get_model(SMALL, weights=None)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    description = build_encoder(SMALL, str(tmp_path / "net.pth")).description
    (tmp_path / "net.pth").rename(tmp_path / "moved.pth")
    assert (
        encoder_from(description, weights=str(tmp_path / "moved.pth")).description["encoder"]
        == SMALL
    )
    with torch.no_grad():
        net.conv1[0].weight[0, 0, 0, 0] += 1
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with pytest.raises(InputError, match="the encoder that can be built here has features by"):
        encoder_from(description)
