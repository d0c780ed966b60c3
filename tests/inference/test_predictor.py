"""Predictor: the results of DefaultPredictor, for one image, a list or a stream of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils import logger as detectron2_logger
from PIL import Image

import instseg
from instseg import Predictor
from instseg.data.images import read_image
from instseg.errors import CheckpointError, ConfigError, ImageError

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def tiny_cfg(*overrides: Any) -> CfgNode:
    """A Mask R-CNN of a few weights that finds five instances in any image."""
    cfg = instseg.get_cfg()
    levels = ["res2", "res3", "res4", "res5"]
    cfg.merge_from_list(
        ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.MASK_ON", True]
        + ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 32]
        + ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
        + ["MODEL.RESNETS.OUT_FEATURES", levels, "MODEL.FPN.IN_FEATURES", levels]
        + ["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]]
        + ["MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]]
        + ["MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20]
        + ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 3]
        + ["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]]
        + ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 5]
        + ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1]
        + ["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7]
        + ["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
        + ["MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16]
        + ["INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128, *overrides]
    )
    return cfg


def save_weights(cfg: CfgNode, path: Path, **extra: Any) -> Path:
    """Save an untrained model of ``cfg``."""
    torch.save({"model": Predictor(cfg).model.state_dict(), **extra}, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    return save_weights(tiny_cfg(), path, class_names=["a", "b", "c"])


@pytest.fixture(scope="module")
def predictor(weights: Path) -> Predictor:
    return Predictor(tiny_cfg(), weights)


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    one, other = first["instances"], second["instances"]
    assert len(one) > 0
    assert one.image_size == other.image_size
    assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
    for name in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(one.get(name), other.get(name)), name


def assert_empty(result: dict[str, Any], height: int, width: int) -> None:
    instances = result["instances"]
    assert instances.image_size == (height, width)
    assert instances.pred_boxes.tensor.shape == (0, 4)
    assert instances.pred_masks.shape == (0, height, width)
    assert instances.pred_masks.dtype == torch.bool
    assert len(instances.scores) == len(instances.pred_classes) == 0


def photos(data_root: Path) -> list[Path]:
    folder = data_root / "photos"
    if not folder.is_dir():
        pytest.skip("needs the folder photos under DETECTRON2_DATASETS")
    return sorted(folder.glob("*.jpg"))


@pytest.mark.parametrize("format", ["BGR", "RGB"])
def test_photographs_give_the_masks_of_default_predictor_alone_and_in_a_list(
    data_root: Path, weights: Path, format: str
) -> None:
    files = photos(data_root)
    cfg = tiny_cfg("MODEL.WEIGHTS", str(weights), "INPUT.FORMAT", format)
    stock = DefaultPredictor(cfg)
    expected = [stock(read_image(file)) for file in files]
    assert all(result["instances"].pred_masks.any() for result in expected)
    ours = Predictor(cfg)
    for file, of_list, reference in zip(files, ours(files), expected, strict=True):
        assert_same(of_list, reference)
        assert_same(ours(file), reference)


def test_images_of_different_sizes_give_in_a_batch_what_they_give_alone(weights: Path) -> None:
    cfg = tiny_cfg("MODEL.WEIGHTS", str(weights))
    shapes = [(48, 64), (64, 48), (48, 64), (47, 64), (100, 30), (48, 64), (20, 20)]
    images = [RNG.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    stock = DefaultPredictor(cfg)
    for image, result in zip(images, Predictor(cfg, batch_size=8)(images), strict=True):
        one, other = stock(image)["instances"], result["instances"]
        # A batch may run through other kernels, so the last bits are free to differ: each of the
        # some fifty layers rounds to 1e-7 of its values, which are boxes of up to 100 pixels here.
        torch.testing.assert_close(
            one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=0, atol=50 * 1e-7 * 100
        )
        torch.testing.assert_close(one.scores, other.scores)
        assert (one.pred_masks != other.pred_masks).float().mean() < 1e-3


@pytest.mark.parametrize("padding", [{}, {"size_divisibility": 64}, {"square_size": 128}])
def test_an_image_in_a_batch_is_padded_as_it_is_alone(
    weights: Path, padding: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batched = Predictor(tiny_cfg(), weights, batch_size=8)
    backbone = batched.model.backbone
    monkeypatch.setattr(type(backbone), "padding_constraints", padding)
    shapes = [(48, 64), (64, 48), (48, 64), (48, 61), (30, 100)]
    images = [RNG.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    batches: list[torch.Tensor] = []
    backbone.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0]))
    batched(images)
    together = [padded for batch in batches for padded in batch]
    calls = len(batches)
    batches.clear()
    for image in images:
        batched(image)
    assert calls < len(images)
    for batch in batches:
        assert any(torch.equal(batch[0], padded) for padded in together)


def test_a_model_that_pads_by_rules_of_its_own_gets_equal_shapes_only(weights: Path) -> None:
    class Recorder(torch.nn.Module):
        def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            calls.append([tuple(item["image"].shape[1:]) for item in inputs])
            return [{"instances": item["height"]} for item in inputs]

    calls: list[list[tuple[int, ...]]] = []
    batched = Predictor(tiny_cfg(), weights, batch_size=8)
    batched.model = Recorder()
    images = [np.zeros((height, 64, 3), np.uint8) for height in (64, 60, 64)]
    assert [result["instances"] for result in batched(images)] == [64, 60, 64]
    assert calls == [[(64, 64), (64, 64)], [(64, 68)]]


def test_paths_pillow_images_and_arrays_mean_the_same(predictor: Predictor, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(np.rot90(PHOTO[:, :, ::-1]))
    lying.save(tmp_path / "a.png", exif=exif)
    expected = predictor(PHOTO)
    assert expected["instances"].image_size == (48, 64)
    for item in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        assert_same(predictor(item), expected)


def test_a_grey_array_means_three_equal_channels(predictor: Predictor) -> None:
    expected = predictor(np.dstack([PHOTO[:, :, 0]] * 3))
    assert_same(predictor(PHOTO[:, :, 0]), expected)
    assert_same(predictor(PHOTO[:, :, :1]), expected)


def test_float_pixels_give_what_default_predictor_gives(weights: Path) -> None:
    cfg = tiny_cfg("MODEL.WEIGHTS", str(weights))
    image = PHOTO.astype(np.float64) + 0.25 * (PHOTO < 255)
    assert_same(Predictor(cfg)(image), DefaultPredictor(cfg)(image))


def test_an_image_is_not_resized_where_the_size_is_0(weights: Path) -> None:
    cfg = tiny_cfg("MODEL.WEIGHTS", str(weights), "INPUT.MIN_SIZE_TEST", 0)
    assert_same(Predictor(cfg)(PHOTO), DefaultPredictor(cfg)(PHOTO))


@pytest.mark.parametrize("shape", [(1, 1), (10, 20_000), (20_000, 10), (1, 100)])
def test_extreme_sizes_give_masks_of_their_size(
    predictor: Predictor, shape: tuple[int, int]
) -> None:
    instances = predictor(np.full((*shape, 3), 100, np.uint8))["instances"]
    assert instances.image_size == shape
    assert instances.pred_masks.shape == (len(instances), *shape)
    assert bool(torch.isfinite(instances.scores).all())


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1)])
def test_an_image_too_thin_to_resize_gives_a_valid_empty_result(
    predictor: Predictor, shape: tuple[int, int]
) -> None:
    image = np.full((*shape, 3), 100, np.uint8)
    assert_empty(predictor(image), *shape)
    mixed = predictor([PHOTO, image, PHOTO])
    assert_empty(mixed[1], *shape)
    assert_same(mixed[0], mixed[2])


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (None, ImageError, "image is None — file missing or unreadable?"),
        (PHOTO.astype(np.uint16), ImageError, "expected uint8 in 0 to 255, found uint16"),
        (PHOTO / 255.0, ImageError, "multiply by 255"),
        (np.full((9, 9, 3), np.nan), ImageError, "non-finite"),
        (np.zeros((0, 0, 3), np.uint8), ImageError, "image is empty"),
        (PHOTO.transpose(2, 0, 1), TypeError, "channels first"),
        (torch.zeros(3, 9, 9), TypeError, "torch.Tensor"),
        (iter([PHOTO]), TypeError, "expected a NumPy array"),
        (Image.new("I;16", (9, 9)), ImageError, "mode I;16"),
        ("missing.jpg", ImageError, "missing.jpg: no such file"),
    ],
)
def test_what_is_no_usable_image_is_refused(
    predictor: Predictor, item: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        predictor(item)


def test_a_bad_image_in_a_list_is_named_by_its_place(predictor: Predictor) -> None:
    with pytest.raises(ImageError, match=r"images\[1\] is None"):
        predictor([PHOTO, None])


def test_an_empty_list_gives_an_empty_list(predictor: Predictor) -> None:
    assert predictor([]) == []


def test_a_stream_takes_no_more_than_a_batch_in_advance(weights: Path) -> None:
    taken = []

    def endless() -> Iterator[Any]:
        while True:
            taken.append(len(taken))
            yield PHOTO

    results = Predictor(tiny_cfg(), weights, batch_size=3).stream(endless())
    assert taken == []
    next(results)
    assert len(taken) == 3
    next(results), next(results)
    assert len(taken) == 3
    next(results)
    assert len(taken) == 6


def masks_of(count: int) -> list[Any]:
    """Room for as many masks of PHOTO."""
    return ["TEST.MASK_MEMORY", count * PHOTO[:, :, 0].size / 1e9]


def test_a_batch_is_closed_early_where_its_masks_would_be_large(weights: Path) -> None:
    taken = []
    results = Predictor(tiny_cfg(*masks_of(10)), weights, batch_size=8).stream(
        taken.append(number) or PHOTO for number in range(9)
    )
    next(results)
    assert len(taken) == 2


def test_instances_whose_masks_would_be_too_large_are_left_out_and_that_is_said_once(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detectron2_logger._LOG_COUNTER.clear()
    limited = Predictor(tiny_cfg(*masks_of(2)), weights)
    assert [len(result["instances"]) for result in limited([PHOTO, PHOTO])] == [2, 2]
    assert caplog.text.count("64x48 pixels gets only the 2 instances with the highest scores") == 1
    assert "TEST.DETECTIONS_PER_IMAGE 5 could take more than TEST.MASK_MEMORY" in caplog.text


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_room_for_masks_that_is_no_number_of_gigabytes_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="TEST.MASK_MEMORY is .*; expected gigabytes"):
        Predictor(tiny_cfg("TEST.MASK_MEMORY", value))


def test_a_stream_gives_the_results_before_a_bad_image_first(weights: Path) -> None:
    results = Predictor(tiny_cfg(), weights, batch_size=8).stream([PHOTO, PHOTO, None])
    assert len(next(results)["instances"]) == len(next(results)["instances"]) > 0
    with pytest.raises(ImageError, match=r"images\[2\]"):
        next(results)


def test_prediction_changes_no_global_state(predictor: Predictor) -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state(), torch.is_grad_enabled()
    names = set(MetadataCatalog.list())
    stream = predictor.stream([PHOTO, PHOTO])
    result = next(stream)
    assert torch.is_grad_enabled()
    assert not result["instances"].scores.requires_grad
    list(stream)
    assert np.array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())
    assert before[2] == torch.is_grad_enabled()
    assert names == set(MetadataCatalog.list())


def test_the_configuration_given_stays_as_it_was_and_the_copy_is_frozen(weights: Path) -> None:
    cfg = tiny_cfg("MODEL.WEIGHTS_SHA256", "f" * 64)
    before = cfg.dump()
    ours = Predictor(cfg, weights, overrides=["TEST.DETECTIONS_PER_IMAGE", "3"])
    assert cfg.dump() == before
    assert ours.cfg.is_frozen()
    assert ours.cfg.MODEL.WEIGHTS == str(weights)
    assert len(ours(PHOTO)["instances"]) == 3


def test_three_lines_with_a_file_equal_a_configuration(
    weights: Path, tmp_path: Path, predictor: Predictor
) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_cfg().dump())
    assert_same(Predictor(tmp_path / "tiny.yaml", weights)(PHOTO), predictor(PHOTO))


def test_a_checksum_among_the_overrides_holds_for_the_weights_given(weights: Path) -> None:
    with pytest.raises(CheckpointError, match="SHA-256"):
        Predictor(tiny_cfg(), weights, overrides=["MODEL.WEIGHTS_SHA256", "f" * 64])


def test_class_names_are_those_of_the_checkpoint_else_of_the_data_set(
    weights: Path, tmp_path: Path
) -> None:
    """A checkpoint trained on other classes keeps its own under any configuration."""
    overrides = ["DATASETS.TEST", "('shapes_val',)"]
    assert Predictor(tiny_cfg(), weights, overrides=overrides).class_names == ["a", "b", "c"]
    nameless = save_weights(tiny_cfg(), tmp_path / "nameless.pth")
    names = Predictor(tiny_cfg(), nameless, overrides=overrides).class_names
    assert names == ["circle", "square", "triangle"]
    assert Predictor(tiny_cfg("DATASETS.TEST", "()"), nameless).class_names is None


@pytest.mark.parametrize("names", [5, "cat", [1, None, {"a": 2}], {"a": 1}])
def test_class_names_of_a_checkpoint_that_are_no_names_are_not_used(
    names: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = save_weights(tiny_cfg(), tmp_path / "odd.pth", class_names=names)
    assert Predictor(tiny_cfg(), weights).class_names is None
    assert caplog.text.count("class_names in the checkpoint is no list of names; they are not") == 1


def test_an_unknown_data_set_is_not_added_to_the_catalog(weights: Path) -> None:
    ours = Predictor(tiny_cfg(), weights, overrides=["DATASETS.TEST", "('nowhere',)"])
    assert ours.class_names == ["a", "b", "c"]
    assert "nowhere" not in MetadataCatalog.list()


def test_a_model_without_weights_is_said_to_be_untrained(caplog: pytest.LogCaptureFixture) -> None:
    Predictor(tiny_cfg())
    assert "the model is untrained" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["INPUT.FORMAT", "YUV-BT.601"], "INPUT.FORMAT is 'YUV-BT.601'"),
        (["MODEL.DEVICE", "cuda"], "MODEL.DEVICE is cuda, but this machine has no usable GPU"),
    ],
)
def test_a_configuration_that_cannot_predict_is_refused(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        Predictor(tiny_cfg(), overrides=overrides)


def test_a_batch_size_below_1_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size is 0"):
        Predictor(tiny_cfg(), batch_size=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_instances_of_the_cpu(weights: Path) -> None:
    on_gpu = Predictor(tiny_cfg("MODEL.DEVICE", "cuda"), weights)
    assert on_gpu.batch_size == 8
    for result in on_gpu([PHOTO] * 3):
        one, other = (
            result["instances"].to("cpu"),
            Predictor(tiny_cfg(), weights)(PHOTO)["instances"],
        )
        torch.testing.assert_close(one.scores, other.scores, rtol=0.01, atol=0.01)
        assert (one.pred_masks != other.pred_masks).float().mean() < 0.01


def test_a_configuration_without_our_keys_predicts() -> None:
    cfg = tiny_cfg()
    del cfg.TEST["MASK_MEMORY"]
    assert len(Predictor(cfg)([PHOTO])) == 1
