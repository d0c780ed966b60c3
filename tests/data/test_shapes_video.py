"""The synthetic videos: deterministic, smooth, with exact flow, and readable by everybody."""

import hashlib

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import instseg
from instseg.data.flow import read_flow
from instseg.data.synthetic import shapes_video as video
from instseg.data.synthetic.files import VIDEOS
from instseg.data.synthetic.outlines import polygon_area
from instseg.data.video_mapper import NUM_REFERENCES
from instseg.errors import DatasetError
from tests.support.video_data import warp

VAL = "shapes_video_val"
CLIPS = range(video.SPLITS[VAL])


def frame_and_earlier(clip: int, frame: int, distance: int) -> tuple[torch.Tensor, ...]:
    """Two frames (1, 3, S, S), the flow (1, 2, S, S) with zeros where unknown, and where it is."""
    now, then = (
        torch.from_numpy(video.image(VAL, clip, f, 128)).permute(2, 0, 1)[None].float()
        for f in (frame, frame - distance)
    )
    flow = torch.from_numpy(video.flow(VAL, clip, frame, frame - distance, 128)).permute(2, 0, 1)
    known = flow.isfinite().all(dim=0)
    return now, then, flow.nan_to_num()[None], known


def test_a_frame_never_changes() -> None:
    """Trained weights and reported numbers are comparable only while the frames stay."""
    digest = hashlib.sha256()
    for split in video.SPLITS:
        for frame in (0, 7, 19):
            digest.update(video.surfaces(video.clip(split, 3, 128), frame))
    assert digest.hexdigest() == "06a340c61c5d5e70500c81f392da701a582a6cbe1147484abb36c549fafc6f69"
    means = [video.image(split, 3, 5, 128).mean() for split in video.SPLITS]
    np.testing.assert_allclose(means, [65.69, 91.60], atol=0.01)


def test_frames_are_those_of_one_scene_with_new_noise() -> None:
    assert video.image(VAL, 0, 4, 64).tobytes() != video.image(VAL, 0, 5, 64).tobytes()
    assert video.image(VAL, 0, 4, 64).tobytes() != video.image(VAL, 1, 4, 64).tobytes()


def test_clips_hold_several_instances_of_every_class_grey_and_coloured() -> None:
    clips = [video.clip(VAL, index, 64) for index in CLIPS]
    assert {len(clip.layers) - 1 for clip in clips} <= {2, 3, 4, 5}
    assert {layer.kind for clip in clips for layer in clip.layers[1:]} == {0, 1, 2}
    assert {clip.channels for clip in clips} == {1, 3}


def test_instances_move_a_few_pixels_from_frame_to_frame() -> None:
    """So that features five frames old are worth warping, and can be."""
    steps = []
    for index in CLIPS:
        for layer in video.clip(VAL, index, 128).layers[1:]:
            track = np.array([layer.placed(frame) for frame in range(video.LENGTH)])
            steps.append(np.linalg.norm(np.diff(track, axis=0), axis=2).mean())
    assert 0.7 < np.median(steps) < 3 and max(steps) < 6


def test_instances_hide_each_other_in_some_frames() -> None:
    hidden = 0
    for index in CLIPS:
        clip = video.clip(VAL, index, 128)
        visible = video.surfaces(clip, 10)
        for number, layer in enumerate(clip.layers[1:], start=1):
            whole = video.rasterise(layer.placed(10), 128).sum()
            hidden += (visible == number).sum() < 0.9 * whole
    assert hidden >= 3


def test_another_size_shows_the_same_clip() -> None:
    small, large = (video.clip(VAL, 2, size) for size in (128, 256))
    for a, b in zip(small.layers, large.layers, strict=True):
        np.testing.assert_allclose(a.placed(11) * 2, b.placed(11))


def test_no_motion_at_all_is_zero_flow_everywhere() -> None:
    assert np.abs(video.flow(VAL, 1, 6, 6, 128)).max() < 1e-4


@settings(max_examples=10)
@given(clip=st.sampled_from(CLIPS), frame=st.integers(5, 19), distance=st.integers(1, 5))
def test_the_flow_leads_to_the_same_surface_inside_the_earlier_frame(
    clip: int, frame: int, distance: int
) -> None:
    scene = video.clip(VAL, clip, 96)
    now, then = (video.surfaces(scene, f) for f in (frame, frame - distance))
    flow = video.flow(VAL, clip, frame, frame - distance, 96)
    y, x = np.nonzero(np.isfinite(flow).all(axis=2))
    column, row = (np.stack([x, y], axis=1) + 0.5 + flow[y, x]).astype(int).T
    assert (then[row, column] == now[y, x]).all()


def test_the_flow_follows_the_corners_of_an_instance() -> None:
    """Worked out anew from three corners: they fix the affine map between two frames."""
    scene = video.clip(VAL, 1, 128)
    layer = scene.layers[1]
    now, then = layer.placed(12), layer.placed(8)
    matrix = np.linalg.lstsq(np.c_[now, np.ones(len(now))], then, rcond=None)[0]
    flow = video.flow(VAL, 1, 12, 8, 128)
    known = (video.surfaces(scene, 12) == 1) & np.isfinite(flow).all(axis=2)
    y, x = np.nonzero(known)
    points = np.c_[x + 0.5, y + 0.5, np.ones(len(x))]
    assert len(points) > 100
    np.testing.assert_allclose(flow[y, x], points @ matrix - points[:, :2], atol=1e-4)


def test_most_of_a_frame_is_known_five_frames_earlier_and_hidden_parts_are_not() -> None:
    unknown = [np.isnan(video.flow(VAL, clip, 12, 7, 64)).any(axis=2).mean() for clip in CLIPS]
    assert 0 < np.mean(unknown) < 0.3


@pytest.mark.parametrize("clip", [0, 3, 5])
def test_the_flow_warps_the_earlier_image_onto_the_frame(clip: int) -> None:
    now, then, flow, known = frame_and_earlier(clip, 12, 5)
    off, without = (
        ((x - now).abs().mean(dim=1)[0])[known].mean() for x in (warp(then, flow), then)
    )
    assert off < 0.5 * without


def test_the_flow_warps_features_at_an_eighth_of_the_size_better_than_none() -> None:
    """In every clip, although the network is random and its cells are as large as the motion."""
    strides = [layer for c in (3, 16, 16) for layer in (nn.Conv2d(c, 16, 3, 2, 1), nn.ReLU())]
    network = nn.Sequential(*strides).requires_grad_(False)
    ratios = []
    for clip in CLIPS[:8]:
        now, then, flow, known = frame_and_earlier(clip, 12, 5)
        now, then = network(now / 64 - 2), network(then / 64 - 2)
        warped = warp(then, F.avg_pool2d(flow, 8) / 8)
        cells = F.avg_pool2d(known[None].float(), 8)[0] == 1
        off, without = ((x - now).norm(dim=1)[0][cells].mean() for x in (warped, then))
        ratios.append(float(off / without))
    assert max(ratios) < 1 and np.mean(ratios) < 0.9


def test_records_are_frames_in_order_with_their_clip() -> None:
    instseg.get_cfg()
    records = DatasetCatalog.get(VAL)
    assert len(records) == video.LENGTH * video.SPLITS[VAL]
    assert [r["image_id"] for r in records] == list(range(len(records)))
    assert [(r["video_id"], r["frame_index"]) for r in records[19:21]] == [(0, 19), (1, 0)]
    assert {r["length"] for r in records} == {video.LENGTH}
    assert MetadataCatalog.get(VAL).thing_classes == ["circle", "square", "triangle"]


def test_a_record_names_earlier_frames_nearest_first_and_the_flow_to_them() -> None:
    first, *_, last = video.load(VAL, 64, [4])
    assert first["reference_files"] == first["flow_files"] == []
    assert len(last["reference_files"]) == len(last["flow_files"]) == NUM_REFERENCES
    assert (read_image(last["file_name"], "RGB") == video.image(VAL, 4, 19, 64)).all()
    assert (read_image(last["reference_files"][2], "RGB") == video.image(VAL, 4, 16, 64)).all()
    np.testing.assert_array_equal(read_flow(last["flow_files"][2]), video.flow(VAL, 4, 19, 16, 64))


def test_an_instance_keeps_its_number_and_class_and_has_an_annotation_only_while_in_sight() -> None:
    split, clips, shorter = "shapes_video_train", (5, 16, 22), 0
    records = video.load(split, 128, clips)
    for clip in clips:
        frames = [r["annotations"] for r in records if r["video_id"] == clip]
        scene = video.clip(split, clip, 128)
        for number, layer in enumerate(scene.layers[1:]):
            annotations_per_frame = [
                [a for a in frame if a["track_id"] == number] for frame in frames
            ]
            assert all(len(annotations) <= 1 for annotations in annotations_per_frame)
            assert {
                a["category_id"] for annotations in annotations_per_frame for a in annotations
            } <= {layer.kind}
            shorter += not all(annotations_per_frame)
            for frame, annotations in enumerate(annotations_per_frame):
                for annotation in annotations:
                    area = mask_util.area(annotation["segmentation"])
                    assert area >= video.MIN_VISIBLE * polygon_area(layer.placed(frame))
    assert shorter > 0


@pytest.mark.parametrize(("split", "index"), [("shape_video_val", 0), (VAL, 15), (VAL, -1)])
def test_a_clip_that_does_not_exist_is_refused_with_what_exists(split: str, index: int) -> None:
    with pytest.raises(DatasetError, match=r"shapes_video_val \(0\.\.14\)"):
        video.clip(split, index, 64)


def test_frames_can_only_be_read() -> None:
    with pytest.raises(DatasetError, match="can only be read"):
        PathManager.open(f"{VIDEOS}{VAL}/64/0/0", "wb")


def test_the_size_of_the_frames_is_the_config_key_of_the_images() -> None:
    instseg.load_cfg("yolact/yolact_shapes.yaml", ["DATASETS.SHAPES_SIZE", 96])
    record = DatasetCatalog.get(VAL)[0]
    assert read_image(record["file_name"], "BGR").shape == (96, 96, 3)
    instseg.load_cfg("yolact/yolact_shapes.yaml")
    assert DatasetCatalog.get(VAL)[0]["height"] == 128
