"""Video models evaluated as on a stream, and the metric of tracks, against values made by hand."""

import json
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

import instseg
from instseg.data.dataset import DataSet, load, load_all
from instseg.data.synthetic import shapes_video
from instseg.errors import ConfigError, DatasetError
from instseg.evaluation import build_evaluator
from instseg.evaluation.tracks import TrackEvaluator, side_by_side
from instseg.inference.keyframes import KeyFrames
from instseg.inference.streaming import Stream, build_streams, mean_result
from instseg.tracking import UNTRACKED, Tracker
from instseg.training.trainer import Trainer
from tests.support.data_sets import data_set
from tests.support.video_data import annotated_instances

CONFIG = "yolact/yolact_shapes.yaml"


class Oracle(nn.Module):
    """A model that finds the annotations of a frame; between key frames, those of the key frame."""

    keyframe_interval = 4

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.weight = nn.Parameter(torch.zeros(1))

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> Tensor:
        (frame,) = batched_inputs
        number = frame.get("video_id", 0) * shapes_video.LENGTH + frame.get("frame_index", 0)
        return torch.tensor([number])

    def keyframe(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        self.log.append("key")
        return (images,), (images,)

    def between(self, images: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.log.append("between")
        return state

    def postprocess(
        self, outputs: Sequence[Tensor], batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        record = self.records()[int(outputs[0])]
        return [{"instances": annotated_instances(record)}]

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        self.log.append("full")
        return self.postprocess((self.preprocess(batched_inputs),), batched_inputs)

    def records(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = DatasetCatalog.get("test_video")
        return records


@pytest.fixture
def clips() -> Iterator[str]:
    """The first two clips of the synthetic videos, 64 pixels wide."""
    records = shapes_video.load("shapes_video_val", 64, [0, 1])
    name = "test_video"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=list(shapes_video.CLASSES), evaluator_type="coco")
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def frames(*pairs: tuple[int, int]) -> list[dict[str, Any]]:
    image = torch.zeros(3, 4, 4)
    return [{"video_id": clip, "frame_index": frame, "image": image} for clip, frame in pairs]


def modes(stream: Stream, inputs: list[dict[str, Any]]) -> str:
    """k for frames computed in full, - for those between."""
    model = stream.model
    assert isinstance(model, Oracle)
    model.log.clear()
    for frame in inputs:
        stream([frame])
    return "".join("k" if entry == "key" else "-" for entry in model.log)


def test_every_nth_frame_of_a_clip_is_a_key_frame(clips: str) -> None:
    inputs = frames(*((clip, frame) for clip in (0, 1) for frame in range(6)))
    assert modes(Stream(Oracle(), interval=3), inputs) == "k--k--" * 2


def test_a_later_pass_has_its_key_frames_later_and_computes_what_is_before_them(clips: str) -> None:
    inputs = frames(*((0, frame) for frame in range(8)))
    assert modes(Stream(Oracle(), interval=3, offset=2), inputs) == "kkk--k--"


def test_a_frame_that_does_not_follow_is_a_key_frame(clips: str) -> None:
    stream = Stream(Oracle(), interval=10)
    assert (
        modes(stream, frames((0, 0), (0, 1), (0, 3), (0, 4), (1, 5), (1, 6), (1, 6))) == "k-k-k-k"
    )


def test_a_frame_of_another_size_is_a_key_frame(clips: str) -> None:
    inputs = frames((0, 0), (0, 1), (0, 2))
    inputs[2]["image"] = torch.zeros(3, 4, 6)
    assert modes(Stream(Oracle(), interval=10), inputs) == "k-k"


def test_key_frames_are_those_that_a_user_gets(clips: str) -> None:
    """A stream and a user's predictor compute the same frames of a clip in full."""
    inputs = frames(*((0, frame) for frame in range(8)))
    keyframes = KeyFrames(Oracle(), interval=3)
    theirs = "".join("k" if keyframes(frame, "frame")[1] else "-" for frame in inputs)
    assert modes(Stream(Oracle(), interval=3), inputs) == theirs == "k--k--k-"


def test_after_a_gap_key_frames_stay_where_they_are_in_the_clip(clips: str) -> None:
    inputs = frames((0, 0), (0, 1), *((0, frame) for frame in range(4, 10)))
    assert modes(Stream(Oracle(), interval=3), inputs) == "k-k-k--k"


def test_a_batch_of_frames_is_predicted_in_its_order(clips: str) -> None:
    stream = Stream(Oracle(), interval=2)
    results = stream(frames((0, 0), (0, 1), (0, 2)))
    assert len(results) == 3 and stream.model.log == ["key", "between", "key"]


def cfg_of(clips: str, tmp_path: Path, *overrides: Any) -> Any:
    base = ["DATASETS.TEST", (clips,), "OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", 0]
    return instseg.load_cfg(CONFIG, [*base, "TEST.VIDEO", True, *overrides])


def test_the_model_itself_says_how_often_key_frames_come(clips: str, tmp_path: Path) -> None:
    (stream,) = build_streams(cfg_of(clips, tmp_path), Oracle(), [load(clips)])
    assert (stream.keyframes.interval, stream.keyframes.offset) == (4, 0)
    cfg = cfg_of(clips, tmp_path, "TEST.KEYFRAME_INTERVAL", 2, "TEST.KEYFRAME_PASSES", 2)
    keyframes = [stream.keyframes for stream in build_streams(cfg, Oracle(), [load(clips)])]
    assert [(frames.interval, frames.offset) for frames in keyframes] == [(2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["TEST.KEYFRAME_PASSES", 5], "KEYFRAME_PASSES is 5; expected 1 to 4"),
        (["TEST.KEYFRAME_PASSES", 0], "KEYFRAME_PASSES is 0; expected 1 to 4"),
        (["DATASETS.TEST", ("shapes_val",)], "data set shapes_val holds still images"),
    ],
)
def test_streams_that_cannot_be_are_refused(
    clips: str, tmp_path: Path, overrides: list[Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cfg = cfg_of(clips, tmp_path, *overrides)
        build_streams(cfg, Oracle(), load_all(cfg.DATASETS.TEST))


def test_a_model_that_sees_every_frame_alone_is_refused(clips: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Linear sees every frame alone; set TEST.VIDEO False"):
        build_streams(cfg_of(clips, tmp_path), nn.Linear(1, 1), [load(clips)])


def test_a_training_finds_out_before_its_first_iteration(clips: str, tmp_path: Path) -> None:
    cfg = cfg_of(clips, tmp_path, "DATASETS.TRAIN", (clips,), "MODEL.DEVICE", "cpu")
    with pytest.raises(ConfigError, match="YOLACT sees every frame alone"):
        Trainer(cfg)


def test_a_training_finds_out_that_it_could_not_track(
    clips: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    overrides = (
        "DATASETS.TRAIN",
        (clips,),
        "MODEL.DEVICE",
        "cpu",
        "TEST.METRICS",
        ("coco", "tracks"),
    )
    cfg = cfg_of(clips, tmp_path, *overrides, "TEST.VIDEO", False)
    with pytest.raises(ConfigError, match="needs the package trackers"):
        Trainer(cfg)


def test_evaluation_computes_the_frames_between_as_a_stream_does(
    clips: str, tmp_path: Path
) -> None:
    """With every frame a key frame all is found; with few, old masks miss what moved since."""
    scores = []
    for interval in (1, 2, 10):
        model = Oracle()
        cfg = cfg_of(clips, tmp_path, "TEST.KEYFRAME_INTERVAL", interval)
        scores.append(Trainer.test(cfg, model)["segm"]["AP"])
        assert model.log.count("key") == 40 / interval and "full" not in model.log
    assert scores[0] == pytest.approx(100)
    assert 100 > scores[1] > scores[2] > 10


def test_without_streaming_every_frame_is_computed_in_full(clips: str, tmp_path: Path) -> None:
    model = Oracle()
    cfg = cfg_of(clips, tmp_path, "TEST.VIDEO", False)
    assert Trainer.test(cfg, model)["segm"]["AP"] == pytest.approx(100)
    assert set(model.log) == {"full"}


def test_the_result_of_several_passes_is_their_mean(clips: str, tmp_path: Path) -> None:
    model, single = Oracle(), []
    for offset in range(2):
        evaluator = build_evaluator(cfg_of(clips, tmp_path), load(clips))
        cfg = cfg_of(clips, tmp_path, "TEST.VIDEO", False)
        stream = Stream(model, interval=2, offset=offset)
        single.append(Trainer.test(cfg, stream, [evaluator])["segm"]["AP"])
    cfg = cfg_of(clips, tmp_path, "TEST.KEYFRAME_INTERVAL", 2, "TEST.KEYFRAME_PASSES", 2)
    assert Trainer.test(cfg, model)["segm"]["AP"] == pytest.approx(np.mean(single))
    assert single[0] != single[1]


def test_means_are_taken_number_by_number() -> None:
    results = [{"a": {"AP": 1.0, "n": "x"}}, {"a": {"AP": 4.0, "n": "x"}}]
    assert mean_result(results) == {"a": {"AP": 2.5, "n": "x"}}


def boxes_of(*rows: tuple[float, ...], classes: Sequence[int] | None = None) -> Instances:
    return Instances(
        (100, 100),
        pred_boxes=Boxes(torch.tensor(rows).reshape(-1, 4)),
        scores=torch.full((len(rows),), 0.5),
        pred_classes=torch.tensor(classes or [0] * len(rows), dtype=torch.int64),
    )


def test_instances_keep_their_numbers_while_they_move() -> None:
    tracker = Tracker()
    for step in range(6):
        x = 3.0 * step
        swap = [(10 + x, 10, 30 + x, 30), (90 - x, 60, 99 - x, 80)][:: 1 if step % 2 else -1]
        numbers = tracker.update(boxes_of(*swap)).tolist()
        assert numbers == ([1, 0] if step % 2 else [0, 1])


def test_a_number_is_given_at_first_sight() -> None:
    assert Tracker().update(boxes_of((1, 1, 9, 9))).tolist() == [0]


def test_instances_of_two_classes_at_one_place_are_two() -> None:
    tracker = Tracker()
    box = (10.0, 10.0, 30.0, 30.0)
    assert tracker.update(boxes_of(box, box, classes=[0, 1])).tolist() == [0, 1]
    assert tracker.update(boxes_of(box, box, classes=[1, 0])).tolist() == [1, 0]


def test_an_instance_that_was_out_of_sight_for_a_moment_is_the_same() -> None:
    tracker = Tracker(patience=5)
    for visible in (True, True, False, False, True):
        numbers = tracker.update(boxes_of(*[(10.0, 10.0, 30.0, 30.0)] * visible)).tolist()
    assert numbers == [0]


def test_one_that_was_away_for_long_is_another() -> None:
    tracker = Tracker(patience=2)
    for visible in (True, True, False, False, False, False, True):
        numbers = tracker.update(boxes_of(*[(10.0, 10.0, 30.0, 30.0)] * visible)).tolist()
    assert numbers == [1]


def test_what_a_tracker_remembers_does_not_grow_with_the_tracks_it_has_ended() -> None:
    """A thousand pixels lie between the instances of successive frames, so each is a new one."""
    tracker = Tracker(patience=2)
    sizes = []
    for frame in range(60):
        x = 1000.0 * (frame % 20)
        assert tracker.update(boxes_of((x, 1, x + 9, 9))).tolist() == [frame]
        sizes.append(len(pickle.dumps(tracker)))
    assert max(sizes[40:]) < 1.1 * max(sizes[10:20])


def test_boxes_without_area_or_of_no_number_belong_to_no_track() -> None:
    nan = float("nan")
    instances = boxes_of((5, 5, 5, 9), (nan, 1, 2, 3), (9, 9, 2, 2), (1, 1, 5, 5))
    assert Tracker().update(instances).tolist() == [*[UNTRACKED] * 3, 0]


@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))))
def test_frames_side_by_side_are_the_frames_side_by_side(masks: np.ndarray) -> None:
    rles = {i: mask_util.encode(np.asfortranarray(m)) for i, m in enumerate(masks) if m.any()}
    joined = side_by_side(rles, masks.shape[1:], len(masks))
    np.testing.assert_array_equal(mask_util.decode(joined), np.concatenate(masks, axis=1))


def evaluate(
    dataset: DataSet, tmp_path: Path, predictions: dict[tuple[int, int], Instances]
) -> Any:
    evaluator = TrackEvaluator(dataset, output_dir=str(tmp_path), score_threshold=0.05)
    evaluator.reset()
    for (clip, frame), instances in predictions.items():
        inputs = [{"video_id": clip, "frame_index": frame}]
        evaluator.process(inputs, [{"instances": instances}])
    return evaluator.evaluate()


def all_found() -> dict[tuple[int, int], Instances]:
    records = DatasetCatalog.get("test_video")
    return {(r["video_id"], r["frame_index"]): annotated_instances(r) for r in records}


def test_all_tracks_found_are_worth_a_hundred(clips: str, tmp_path: Path) -> None:
    result = evaluate(load(clips), tmp_path, all_found())["tracks"]
    assert [result[key] for key in ("AP", "AP50", "APs", "AR10")] == pytest.approx([100] * 4)
    assert np.isnan(result["APl"])


def test_a_class_that_flickers_is_voted_on(clips: str, tmp_path: Path) -> None:
    predictions = all_found()
    for (_, index), instances in predictions.items():
        if index % 3 == 0:
            instances.pred_classes = (instances.pred_classes + 1) % len(shapes_video.CLASSES)
    assert evaluate(load(clips), tmp_path, predictions)["tracks"]["AP"] == pytest.approx(100)


def test_tracks_that_are_seen_half_of_the_time_overlap_by_half(clips: str, tmp_path: Path) -> None:
    """The IoU reaches few of the ten thresholds, although the masks are perfect in every frame."""
    predictions = {key: value for key, value in all_found().items() if key[1] < 8}
    result = evaluate(load(clips), tmp_path, predictions)["tracks"]
    assert result["AP"] < 20 and result["AP75"] == 0


def test_no_predictions_are_worth_nothing(clips: str, tmp_path: Path) -> None:
    assert evaluate(load(clips), tmp_path, {})["tracks"]["AP"] == 0


def test_a_mask_of_two_frames_has_the_overlap_of_both_together(tmp_path: Path) -> None:
    """Frame 0: 8 of 8 pixels. Frame 1: 4 of 8 and 2 more. IoU = 12 / (16 + 2) = 0.667, which
    reaches 0.5, 0.55, 0.6 and 0.65: AP 40."""
    true_masks, predicted = np.zeros((2, 8, 8), bool), np.zeros((2, 8, 8), bool)
    true_masks[:, 2:4, 2:6] = predicted[0, 2:4, 2:6] = True
    predicted[1, 2:4, 2:4] = predicted[1, 4, 2:4] = True

    def record(frame: int) -> dict[str, Any]:
        rle = mask_util.encode(np.asfortranarray(true_masks[frame]))
        annotation = {"segmentation": rle, "category_id": 0, "track_id": 5, "iscrowd": 0}
        facts = {"video_id": "a", "frame_index": frame, "length": 2, "height": 8, "width": 8}
        return {**facts, "annotations": [annotation]}

    def instances(frame: int) -> Instances:
        predicted_box = boxes_of((2, 2, 6, 5))
        predicted_box.pred_masks = torch.from_numpy(predicted[frame][None])
        return predicted_box

    predictions = {("a", frame): instances(frame) for frame in range(2)}
    dataset = data_set([record(0), record(1)], ["thing"])
    result = evaluate(dataset, tmp_path, predictions)["tracks"]
    assert [result[key] for key in ("AP", "AP50", "AP75")] == pytest.approx([40, 100, 0])


def test_tracks_are_written_as_the_server_takes_them(clips: str, tmp_path: Path) -> None:
    evaluate(load(clips), tmp_path, all_found())
    written = json.loads((tmp_path / "tracks.json").read_text())
    objects = {
        (r["video_id"], a["track_id"]) for r in DatasetCatalog.get(clips) for a in r["annotations"]
    }
    assert len(written) == len(objects)
    for track in written:
        assert set(track) == {"video_id", "category_id", "score", "segmentations"}
        assert len(track["segmentations"]) == shapes_video.LENGTH
        assert mask_util.decode(track["segmentations"][0]).any()


def test_detections_of_a_low_score_belong_to_no_track(clips: str, tmp_path: Path) -> None:
    predictions = all_found()
    for instances in predictions.values():
        instances.scores = torch.full((len(instances),), 0.04)
    assert evaluate(load(clips), tmp_path, predictions)["tracks"]["AP"] == 0


def test_still_images_have_no_tracks(tmp_path: Path) -> None:
    cfg = instseg.load_cfg(
        CONFIG, ["TEST.METRICS", ("coco", "tracks"), "OUTPUT_DIR", str(tmp_path)]
    )
    with pytest.raises(ConfigError, match="data set shapes_val holds still images"):
        build_evaluator(cfg, load("shapes_val"))


def test_clips_too_long_to_be_counted_are_refused(clips: str, tmp_path: Path) -> None:
    first, *others = load(clips).records
    large = data_set([{**first, "height": 2**12, "width": 2**12, "length": 2**9}, *others])
    with pytest.raises(DatasetError, match="the clip 0 has 8589934592 pixels"):
        TrackEvaluator(large, output_dir=str(tmp_path), score_threshold=0.0)


def test_the_metric_of_tracks_is_a_key_beside_that_of_frames(clips: str, tmp_path: Path) -> None:
    cfg = cfg_of(clips, tmp_path, "TEST.KEYFRAME_INTERVAL", 1, "TEST.METRICS", ("coco", "tracks"))
    results = Trainer.test(cfg, Oracle())
    assert [results[kind]["AP"] for kind in ("segm", "tracks")] == pytest.approx([100, 100])
