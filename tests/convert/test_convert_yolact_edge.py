"""Released YolactEdge checkpoints: the authors' numbers once converted, frame by frame.

``golden/yolact`` holds what the authors' own networks gave for an image, and for three frames of a
video of which the first is a key frame; see the README there.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from instseg.convert import Options
from instseg.errors import CheckpointError
from instseg.projects.yolact import mask_probabilities
from instseg.projects.yolact_edge import convert as yolact_edge
from instseg.projects.yolact_edge import flow_loss, warp_loss
from tests.conftest import close
from tests.support.yolact_common import (
    FEATURES,
    RAW,
    SCORES,
    SEED,
    convert,
    detections_agree,
    keys,
    level_sums_agree,
    load,
    results_agree,
    sums_agree,
)

IMAGE, VIDEO = "yolact_edge_resnet50", "yolact_edge_vid_resnet50"
FRAMES = ["", "frame0/", "frame1/", "frame2/"]
"""An image without video, a key frame, and two frames after it."""


def image_of(weights: ModuleType, moved: int = 0) -> Any:
    """The golden image, or the same moved on by so many frames, BGR."""
    return np.roll(weights.image(480, 640, SEED), (4 * moved, 10 * moved), (0, 1))


def frame_inputs(weights: ModuleType, moved: int = 0) -> Any:
    """The same as a batch of one."""
    pixels = image_of(weights, moved)
    image = torch.from_numpy(pixels[:, :, ::-1].transpose(2, 0, 1).copy())
    return [{"image": image, "height": 480, "width": 640}]


class Case:
    """Results of our network for one of :data:`FRAMES`."""

    def __init__(self, model: Any, golden: Any, inputs: Any, frame: str, state: Any = None) -> None:
        self.golden = golden
        images = model.preprocess(inputs)
        laterals = model.fpn.laterals(model.levels(images))
        sums = model.fpn.top_down(laterals)
        if golden[f"{frame}is_key"]:
            raw = model.raw(images)
        else:
            sums = model.transform(laterals[:1], state)
            raw = model.between(images, state)
        levels = model.fpn.outputs(sums)
        self.tensors = {f"lat_sum{i}": x for i, x in zip((3, 4, 5), sums, strict=True)}
        self.tensors |= {f"P{i}": x for i, x in zip(range(3, 8), levels, strict=True)}
        self.raw = dict(zip(("loc", "conf", "mask", "proto"), raw, strict=True))
        self.raw["segm"] = model.semantic(levels[0])
        self.detections = model.detect(*(x[0] for x in raw[:3]))
        self.priors = model.priors
        self.threshold = model.detection_settings.score_threshold
        self.input = images
        (self.result,) = model.postprocess(raw, inputs)


@pytest.fixture(scope="module")
def video(golden_weights: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The converted network, and the state of the key frame."""
    model, _ = convert(VIDEO, golden_weights, tmp_path_factory.mktemp("video"))
    with torch.no_grad():
        images = model.preprocess(frame_inputs(golden_weights))
        _, state = model.keyframe(images)
    return model, state


@pytest.fixture(scope="module", params=FRAMES)
def frame(
    request: pytest.FixtureRequest,
    video: Any,
    golden_weights: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Case]]:
    name = request.param
    model, state = video
    if not name:
        model, _ = convert(IMAGE, golden_weights, tmp_path_factory.mktemp("image"))
    moved = int(name[5]) if name else 0
    with torch.no_grad():
        inputs = frame_inputs(golden_weights, moved)
        yield name, Case(model, load(VIDEO if name else IMAGE), inputs, name, state)


def test_the_input_equals_the_authors(frame: tuple[str, Case], golden_weights: ModuleType) -> None:
    name, case = frame
    image = image_of(golden_weights, int(name[5]) if name else 0)
    assert zlib.crc32(image.tobytes()) == case.golden[f"{name}input/image_crc32"]
    step = 11 if name in ("", "frame0/") else 33
    close(case.input[0, :, ::step, ::step], case.golden[f"{name}input/sub"], 5e-6)
    sums_agree(case.input, case.golden, f"{name}input/x")


def test_priors_equal_the_authors_exactly(frame: tuple[str, Case]) -> None:
    _, case = frame
    assert torch.equal(case.priors, torch.from_numpy(case.golden["raw/priors"]))
    sums_agree(case.priors, case.golden, "raw/priors")


def test_key_frames_are_those_of_the_authors(frame: tuple[str, Case], video: Any) -> None:
    name, case = frame
    number = int(name[5]) if name else 0
    assert bool(case.golden[f"{name}is_key"]) == (number % video[0].keyframe_interval == 0)


def test_what_is_kept_of_a_key_frame_for_the_motion_equals_the_authors(
    video: Any, golden_weights: ModuleType
) -> None:
    golden = load(VIDEO)
    with torch.no_grad():
        x = video[0].first_lateral(video[0].preprocess(frame_inputs(golden_weights)))
    assert list(x.shape) == golden["frame0/stage/C3_lateral_shape"].tolist()
    close(x[0, ::16, ::5, ::5], golden["frame0/stage/C3_lateral_sub"], FEATURES)
    sums_agree(x, golden, "frame0/stage/C3_lateral")


@pytest.mark.parametrize(
    "stage", ["lat_sum3", "lat_sum4", "lat_sum5", "P3", "P4", "P5", "P6", "P7"]
)
def test_the_levels_equal_the_authors(frame: tuple[str, Case], stage: str) -> None:
    name, case = frame
    x = case.tensors[stage]
    channels, step = (16, 5) if name or "sum" in stage else (8, 3)
    assert list(x.shape) == case.golden[f"{name}stage/{stage}_shape"].tolist()
    expected = case.golden[f"{name}stage/{stage}_sub"]
    close(x[0, ::channels, ::step, ::step], expected, FEATURES)
    sums_agree(x, case.golden, f"{name}stage/{stage}")


@pytest.mark.parametrize("output", ["loc", "conf", "mask"])
def test_the_heads_output_equals_the_authors(frame: tuple[str, Case], output: str) -> None:
    name, case = frame
    x = case.raw[output]
    rows = x[0, :: int(case.golden["raw/row_stride"])]
    close(rows, case.golden[f"{name}raw/{output}_rows"], RAW)
    sums_agree(x, case.golden, f"{name}raw/{output}")
    level_sums_agree(x, case.golden, f"{name}raw/{output}")


def test_prototypes_equal_the_authors(frame: tuple[str, Case]) -> None:
    name, case = frame
    step = 6 if name else 3
    expected = case.golden[f"{name}raw/proto_sub"]
    close(case.raw["proto"][0, ::step, ::step], expected, RAW)
    sums_agree(case.raw["proto"], case.golden, f"{name}raw/proto")


def test_semantic_logits_equal_the_authors(frame: tuple[str, Case]) -> None:
    name, case = frame
    if f"{name}raw/segm_sub" in case.golden:
        close(case.raw["segm"][0, ::2, ::4, ::4], case.golden[f"{name}raw/segm_sub"], RAW)
    sums_agree(case.raw["segm"], case.golden, f"{name}raw/segm")


def test_detections_equal_the_authors(frame: tuple[str, Case]) -> None:
    """One anchor may move across the threshold of candidates."""
    name, case = frame
    best = case.raw["conf"][0].softmax(dim=1)[:, 1:].amax(dim=1)
    count = int((best > case.threshold).sum())
    assert abs(count - int(case.golden[f"{name}det/num_candidates"])) <= 1
    detections_agree(case.detections, case.golden, f"{name}det")


def test_masks_equal_the_authors(frame: tuple[str, Case]) -> None:
    """At the resolution of the prototypes, of the authors' boxes and coefficients."""
    name, case = frame
    arrays = (case.golden[f"{name}det/{x}"] for x in ("coef", "box_rel"))
    masks = mask_probabilities(case.raw["proto"][0], *map(torch.from_numpy, arrays))
    sums = masks.double().sum(dim=(1, 2)).numpy()
    np.testing.assert_allclose(sums, case.golden[f"{name}det/prob_sum"], rtol=SCORES)


def test_results_equal_the_authors(frame: tuple[str, Case]) -> None:
    name, case = frame
    results_agree(case.result["instances"], case.golden, f"{name}post")


@pytest.fixture(scope="module")
def later(video: Any, golden_weights: ModuleType) -> Any:
    """Frames 1 and 2: their laterals, and the motions of all levels from the key frame."""
    model, state = video
    by_frame = {}
    with torch.no_grad():
        for number in (1, 2):
            images = model.preprocess(frame_inputs(golden_weights, number))
            laterals = model.fpn.laterals(model.levels(images))
            motions = model.flow_net(model.flow_net.reduce(laterals[0]), state[0])
            by_frame[number] = laterals, motions
    return by_frame


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("level", [4, 5])
def test_the_motion_equals_the_authors(later: Any, number: int, level: int) -> None:
    golden, motion = load(VIDEO), later[number][1][level - 3]
    stages = f"frame{number}/stage"
    close(motion.flow[0], golden[f"{stages}/flow{level}"], FEATURES)
    sums_agree(motion.flow, golden, f"{stages}/flow{level}")
    for name, x in (("scale", motion.scale), ("bias", motion.bias)):
        stage = f"{stages}/flow_{name}{level}"
        assert list(x.shape) == golden[f"{stage}_shape"].tolist()
        close(x[0, ::16, ::5, ::5], golden[f"{stage}_sub"], FEATURES)
        sums_agree(x, golden, stage)


def test_the_distance_of_features_moved_and_computed_equals_the_authors(
    video: Any, later: Any
) -> None:
    """Their code takes the output layer of P3 for P5."""
    model, state = video
    laterals, _ = later[1]
    with torch.no_grad():
        moved = model.transform(laterals, state)
        computed = model.fpn.top_down(laterals)
        layers = (model.fpn.output4, model.fpn.output3)
        loss = warp_loss(moved[1:], computed[1:], layers)
    assert loss.item() == pytest.approx(float(load(VIDEO)["loss/W"]), rel=1e-4)


def test_the_flow_loss_equals_the_authors(later: Any) -> None:
    golden = load(VIDEO)
    flows = [motion.flow for motion in later[1][1]]
    for level, flow in zip((3, 4, 5), flows, strict=True):
        sums_agree(flow, golden, f"loss/flow{level}")
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 550)] * 2, indexing="ij")
    target = torch.stack([0.4 * (3 * x).sin() + 0.1 * y, 0.3 * (2 * y).cos() - 0.2 * x])
    loss = flow_loss(flows, target[None])
    assert loss.item() == pytest.approx(float(golden["loss/F"]), rel=1e-4)


@pytest.fixture
def released(tmp_path: Path) -> Any:
    """Writes a file of a released layout; zeros that take no space."""

    def write(name: str, changes: dict[str, Any] | None = None) -> str:
        types = {"float32": torch.float32, "int64": torch.int64}
        state: dict[str, Any] = {
            key: torch.zeros((), dtype=types[dtype]).expand(shape)
            for key, (shape, dtype) in keys(name).items()
        }
        state |= changes or {}
        path = tmp_path / "released.pth"
        torch.save({key: value for key, value in state.items() if value is not None}, path)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ("yolact_edge", "yolact_edge"),
        ("yolact_edge_resnet50", "yolact_edge_resnet50"),
        ("yolact_edge_vid", "yolact_edge_vid"),
        ("yolact_edge_vid_minimal", "yolact_edge_vid_minimal"),
        ("yolact_edge_vid_resnet50", "yolact_edge_vid_resnet50"),
        ("yolact_edge_youtubevis_resnet50", "yolact_edge_youtubevis_resnet50"),
        ("yolact_base", "yolact_edge"),  # a file with the names of YOLACT
    ],
)
def test_every_tensor_of_a_released_layout_has_its_place(
    released: Any, layout: str, config: str
) -> None:
    state, report = yolact_edge.convert(released(layout), Options())
    assert (report.config, report.overrides) == (f"yolact_edge/{config}.yaml", ())
    assert len(state) == len(report.mapped) == len(keys(layout)) and not report.ignored


def test_of_mobilenet_the_last_blocks_are_ignored(released: Any) -> None:
    layout = "yolact_edge_mobilenetv2"
    state, report = yolact_edge.convert(released(layout), Options())
    assert (report.config, report.overrides) == (f"yolact_edge/{layout}.yaml", ())
    last = {
        key for key in keys(layout) if key.startswith(("backbone.layers.7", "backbone.layers.8"))
    }
    assert set(report.ignored) == last
    assert len(state) == len(keys(layout)) - len(last)


def test_a_video_network_of_other_classes_without_refinement_needs_overrides(
    released: Any,
) -> None:
    changes: dict[str, Any] = {
        "prediction_layers.0.conf_layer.weight": torch.zeros(3 * 5, 256, 3, 3),
        "prediction_layers.0.conf_layer.bias": torch.zeros(3 * 5),
        "semantic_seg_conv.weight": torch.zeros(4, 256, 1, 1),
        "semantic_seg_conv.bias": torch.zeros(4),
    }
    changes |= {key: None for key in keys(VIDEO) if key.startswith("spa.")}
    _, report = yolact_edge.convert(released(VIDEO, changes), Options())
    assert report.overrides == (
        *("MODEL.YOLACT_EDGE.REFINE", False),
        *("MODEL.YOLACT.NUM_CLASSES", 4),
    )


def test_a_missing_layer_of_the_flow_network_is_refused_by_name(released: Any) -> None:
    path = released(VIDEO, {"flow_net.pred2.scale.bias": None})
    with pytest.raises(CheckpointError, match=r"missing: flow_net\.predictors\.1\.scale\.bias"):
        yolact_edge.convert(path, Options())


def test_an_unknown_layer_is_refused_by_name(released: Any) -> None:
    path = released(IMAGE, {"fpn_phase_2.pred_layers.3.bias": torch.zeros(256)})
    with pytest.raises(CheckpointError, match=r"do not belong .*fpn_phase_2\.pred_layers\.3\.bias"):
        yolact_edge.convert(path, Options())


def test_a_network_that_the_authors_do_not_have_is_refused(released: Any) -> None:
    path = released("yolact_darknet53")
    with pytest.raises(CheckpointError, match="convert it as yolact"):
        yolact_edge.convert(path, Options())
