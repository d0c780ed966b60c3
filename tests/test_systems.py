"""What every system promises of a prediction: all eleven, untrained and small, in one table."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from PIL import Image

from instseg import Predictor, VideoPredictor, cli
from instseg.errors import CheckpointError, ImageError
from tests.support.predict_common import results

# They keep eight objects of any score.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "TEST.DETECTIONS_PER_IMAGE", 8),
    *("INPUT.MAX_SIZE_TEST", 128, "INPUT.SQUARE_SIZE", 64),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("MODEL.YOLACT.SCORE_THRESH_TEST", 0.0, "MODEL.YOLACT_PLUS.MASKIOU_CHANNELS", [8]),
    *("MODEL.INSTANCE_FCN.SCALES_TEST", (48, 96), "MODEL.DEEPMASK.OCTAVES_TEST", (0.0,)),
    *("MODEL.SGN.MIN_AREA_TEST", 4, "MODEL.SGN.MERGE_MIN_AREA", 4, "MODEL.SGN.MERGE_PARTNERS", 1),
    *("MODEL.SGN.OUTPUT_STRIDE", 4, "MODEL.DISCRIMINATIVE_LOSS.MIN_PIXELS_TEST", 1),
]
SHORTEST = ["INPUT.MIN_SIZE_TEST", 64]
RESNET18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
# Half of all untrained SharpMasks say "nowhere" of every pixel.
ANYWHERE = ["MODEL.DEEPMASK.MASK_THRESH_TEST", 0.4]
SYSTEMS: dict[str, list[Any]] = {
    "deepmask/deepmask_shapes.yaml": [],
    "sharpmask/sharpmask_shapes.yaml": ANYWHERE,
    "instance_fcn/instance_fcn_shapes.yaml": RESNET18,
    "fcis/fcis_shapes.yaml": SHORTEST,
    "mask_rcnn/mask_rcnn_shapes.yaml": SHORTEST + RESNET18,
    "mask_scoring_rcnn/mask_scoring_rcnn_shapes.yaml": SHORTEST + RESNET18,
    "yolact/yolact_shapes.yaml": RESNET18,
    "yolact_plus/yolact_plus_shapes.yaml": [],
    "yolact_edge/yolact_edge_shapes_video.yaml": RESNET18,
    "sgn/sgn_shapes.yaml": SHORTEST + RESNET18,
    "discriminative_loss/discriminative_loss_shapes.yaml": SHORTEST + RESNET18,
}
RNG = np.random.default_rng(0)
# Blots of 8 x 8 pixels.
PHOTO = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
ODD = {
    "one pixel": PHOTO[:1, :1],
    "a thin line": np.ascontiguousarray(PHOTO[:1].repeat(70, axis=1)[:, :4000]),
    "a thin column": np.ascontiguousarray(PHOTO[:, :1].repeat(100, axis=0)[:4000]),
    "grey": PHOTO[:, :, 0],
    "grey with a third axis": PHOTO[:, :, :1],
    "transparent": np.dstack([PHOTO, PHOTO[:, :, 0]]),
    "black": np.zeros_like(PHOTO),
    "mirrored, negative strides": PHOTO[:, ::-1],
    "floats": PHOTO.astype(np.float32),
    "bilevel": Image.fromarray(PHOTO).convert("1"),
    "CMYK": Image.fromarray(PHOTO).convert("CMYK"),
}
REFUSED = [
    (None, ImageError, "image is None"),
    (PHOTO.astype(np.uint16), ImageError, "expected uint8 in 0 to 255, found uint16"),
    (PHOTO / 255, ImageError, "multiply by 255"),
    (np.full((9, 9, 3), np.nan), ImageError, "non-finite"),
    (np.full((9, 9, 3), np.inf), ImageError, "non-finite"),
    (PHOTO[:0], ImageError, "image is empty"),
    (PHOTO.transpose(2, 0, 1), TypeError, "channels first"),
    (torch.zeros(3, 9, 9), TypeError, "torch.Tensor"),
    ("nowhere.jpg", ImageError, "nowhere.jpg: no such file"),
    (np.broadcast_to(PHOTO[:1, :1], (30_000, 30_000, 3)), ImageError, "INPUT.MAX_SIZE_TEST"),
]


def build(name: str, *overrides: Any) -> Predictor:
    torch.manual_seed(0)
    return Predictor(name, overrides=[*SMALL, *SYSTEMS[name], *overrides], batch_size=8)


@pytest.fixture(scope="module", params=SYSTEMS)
def predictor(request: pytest.FixtureRequest) -> Predictor:
    return build(request.param)


@pytest.fixture(scope="module")
def video() -> VideoPredictor:
    return VideoPredictor(build("yolact_edge/yolact_edge_shapes_video.yaml"))


def assert_valid(instances: Instances, height: int, width: int) -> None:
    assert instances.image_size == (height, width)
    count = len(instances)
    assert count <= 8
    assert instances.pred_masks.shape == (count, height, width)
    assert instances.pred_masks.dtype == torch.bool
    assert instances.scores.shape == instances.pred_classes.shape == (count,)
    assert bool(instances.scores.isfinite().all())
    boxes = instances.pred_boxes.tensor
    assert boxes.shape == (count, 4)
    assert bool((boxes >= 0).all() and (boxes <= boxes.new_tensor([width, height] * 2)).all())


def assert_same(one: Instances, other: Instances) -> None:
    assert one.image_size == other.image_size and len(one) == len(other)
    # A batch may run through other kernels, so the last bits are free to differ.
    torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=0, atol=1e-2)
    torch.testing.assert_close(one.scores, other.scores)
    assert torch.equal(one.pred_classes, other.pred_classes)
    assert not len(one) or (one.pred_masks != other.pred_masks).float().mean() < 1e-3


def shape_of(picture: Any) -> tuple[int, int]:
    return tuple(np.asarray(picture).shape[:2])


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_picture_gives_a_valid_result(predictor: Predictor, kind: str) -> None:
    assert_valid(predictor(ODD[kind])["instances"], *shape_of(ODD[kind]))


def test_objects_are_found_at_all(predictor: Predictor) -> None:
    """Or the other tests would be about nothing."""
    assert len(predictor(PHOTO)["instances"]) > 1


def test_what_is_no_usable_picture_is_refused_before_any_network(predictor: Predictor) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("the network ran")

    hooks = [part.register_forward_pre_hook(fail) for part in predictor.model.modules()]
    for item, error, message in REFUSED:
        with pytest.raises(error, match=message):
            predictor(item)
    for hook in hooks:
        hook.remove()


def test_pictures_of_very_different_sizes_give_in_a_batch_what_they_give_alone(
    predictor: Predictor,
) -> None:
    shapes = [(48, 64), (64, 48), (1, 1), (48, 64), (20, 90), (90, 20), (1, 4000), (47, 64)]
    images = [RNG.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    for image, together in zip(images, predictor(images), strict=True):
        assert_same(predictor(image)["instances"], together["instances"])


def test_weights_that_are_not_finite_give_an_error_and_never_a_result(
    predictor: Predictor,
) -> None:
    """A parameter of every part; one that only training uses changes nothing."""
    used: set[torch.nn.Parameter] = set()
    hooks = [
        part.register_forward_hook(lambda part, *_: used.update(part.parameters(recurse=False)))
        for part in predictor.model.modules()
    ]
    sound = predictor(PHOTO)["instances"]
    for hook in hooks:
        hook.remove()
    raised = 0
    for name, parameter in one_of_each_part(predictor.model):
        kept = parameter.detach().clone()
        parameter.data.fill_(torch.nan)
        try:
            found = predictor(PHOTO)["instances"]
        except CheckpointError as error:
            assert "values that are not finite" in str(error)
            raised += 1
        else:
            assert parameter not in used, name
            assert torch.equal(found.pred_masks, sound.pred_masks), name
            assert torch.equal(found.scores, sound.scores), name
        finally:
            parameter.data.copy_(kept)
    assert raised > 1
    assert_same(predictor(PHOTO)["instances"], sound)


def one_of_each_part(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    seen = set()
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:2])
        if part not in seen:
            seen.add(part)
            yield name, parameter


def test_of_more_objects_than_there_is_memory_for_the_best_are_given(
    predictor: Predictor,
) -> None:
    every = predictor(PHOTO)["instances"]
    limited = copy.copy(predictor)
    limited.cfg = predictor.cfg.clone()
    limited.cfg.defrost()
    limited.cfg.TEST.MASK_MEMORY = 1.5 * PHOTO[:, :, 0].size / 1e9
    (best,) = limited([PHOTO])
    assert_same(best["instances"], every[:1])


@pytest.mark.parametrize("between", [False, True], ids=["key frame", "between"])
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_frame_gives_a_valid_result(video: VideoPredictor, kind: str, between: bool) -> None:
    video.reset()
    if between:
        video(ODD[kind])
    result = video(ODD[kind])
    thin = kind in ("a thin line", "a thin column")
    assert result["keyframe"] == (not between) or thin
    assert_valid(result["instances"], *shape_of(ODD[kind]))


def test_weights_that_are_not_finite_are_an_error_in_every_frame() -> None:
    video = VideoPredictor(build("yolact_edge/yolact_edge_shapes_video.yaml"))
    assert len(video(PHOTO)["instances"])
    for parameter in video.predictor.model.flow_net.parameters():
        parameter.data.fill_(torch.nan)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="values that are not finite"):
            video(PHOTO)


def test_a_folder_with_bad_files_gives_a_line_for_each_and_the_results_of_the_rest(
    predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(name for name in SYSTEMS if Path(name).stem == Path(predictor.cfg.OUTPUT_DIR).name)
    torch.save({"model": predictor.model.state_dict()}, tmp_path / "weights.pth")
    folder = tmp_path / "in"
    folder.mkdir()
    for file in ("a.png", "d.jpg"):
        Image.fromarray(PHOTO).save(folder / file)
    (folder / "b.jpg").write_text("<html>404</html>")
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:200])
    arguments = ["--config-file", name, "--weights", str(tmp_path / "weights.pth")]
    arguments += ["--input", str(folder), "--output", str(tmp_path / "out"), "--confidence", "0"]
    overrides = [*SMALL, *SYSTEMS[name]]
    assert cli.main(["predict", *arguments, "--", *map(str, overrides)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert sum(f"{folder / 'b.jpg'}: is HTML" in line for line in lines) == 1
    assert sum(f"{folder / 'c.png'}: cannot be decoded" in line for line in lines) == 1
    found = {record["file_name"] for record in results(tmp_path / "out")}
    assert found == {str(folder / "a.png"), str(folder / "d.jpg")}
