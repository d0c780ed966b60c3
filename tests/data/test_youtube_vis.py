"""Videos in YouTube-VIS's JSON layout, as released and as they should not be."""

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import instseg
from instseg.config.classes import check_classes
from instseg.data import dataset
from instseg.data.mappers import build_train_mapper
from instseg.data.readers import youtube_vis
from instseg.errors import ConfigError, DatasetError
from instseg.evaluation import build_evaluator
from tests.support.video_data import annotated_instances

HEIGHT, WIDTH = 6, 8
CONFIG = "yolact/yolact_shapes.yaml"


def runs(*rows: tuple[int, int]) -> dict[str, Any]:
    """Uncompressed RLE, as in the releases, of a mask with these pixels (row, column) set."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for row, column in rows:
        mask[row, column] = True
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def content() -> dict[str, Any]:
    """Two videos: the first has an instance in the frames 0 and 2, the second has none."""

    def video(key: int, length: int) -> dict[str, Any]:
        names = [f"v{key}/{frame:05d}.png" for frame in range(length)]
        size = {"height": HEIGHT, "width": WIDTH}
        return {"id": key, "file_names": names, "length": length, **size}

    return {
        "info": {},
        "videos": [video(7, 3), video(9, 2)],
        "categories": [{"id": 4, "name": "snail"}, {"id": 2, "name": "ape"}],
        "annotations": [
            {
                "id": 31,
                "video_id": 7,
                "category_id": 4,
                "iscrowd": 0,
                "segmentations": [runs((1, 2), (1, 3)), None, runs((4, 5))],
                "bboxes": [[2, 1, 2, 1], None, [5, 4, 1, 1]],
                "areas": [2, None, 1],
            }
        ],
    }


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """``ytvis_2019`` with ``train.json``, and images whose every value is their frame."""
    root = tmp_path / "ytvis_2019"
    for video in content()["videos"]:
        for frame, name in enumerate(video["file_names"]):
            path = root / "train" / "JPEGImages" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (WIDTH, HEIGHT), (frame,) * 3).save(path)
    (root / "train.json").write_text(json.dumps(content()))
    return root


@pytest.fixture
def named(release: Path) -> Iterator[str]:
    name = f"youtubevis:{release}/train.json:{release}/train/JPEGImages"
    yield name
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def load(release: Path) -> list[dict[str, Any]]:
    return youtube_vis.load(
        "videos", str(release / "train.json"), str(release / "train/JPEGImages")
    )


def test_records_are_the_frames_in_the_order_of_their_clips(release: Path) -> None:
    records = load(release)
    assert [(r["video_id"], r["frame_index"], r["length"]) for r in records] == [
        *((7, frame, 3) for frame in range(3)),
        *((9, frame, 2) for frame in range(2)),
    ]
    assert [r["image_id"] for r in records] == list(range(5))
    assert {(r["height"], r["width"]) for r in records} == {(HEIGHT, WIDTH)}


def test_an_instance_is_annotated_where_it_is_seen_with_its_number_and_box(release: Path) -> None:
    first, second, third, *others = (r["annotations"] for r in load(release))
    assert second == [] and all(annotations == [] for annotations in others)
    assert first[0]["track_id"] == third[0]["track_id"] == 31
    assert first[0]["bbox"] == [2, 1, 2, 1] and third[0]["bbox"] == [5, 4, 1, 1]
    assert mask_util.decode(third[0]["segmentation"])[4, 5] == 1


def _other_forms() -> dict[str, Any]:
    given = content()
    for video in given["videos"]:
        video.update(id=float(video["id"]), width=str(WIDTH), height=float(HEIGHT))
        video["file_names"] = [file.replace("/", "\\") for file in video["file_names"]]
    for category in given["categories"]:
        category["id"] = float(category["id"])
    given["annotations"][0].update(id=31.0, video_id=7.0, category_id=4.0, iscrowd=None)
    return given


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_other_tools_write_gives_the_same_records(release: Path, encoding: str) -> None:
    expected = load(release)
    (release / "train.json").write_bytes(json.dumps(_other_forms()).encode(encoding))
    assert load(release) == expected


def test_classes_are_in_the_order_of_their_ids(release: Path) -> None:
    records = load(release)
    assert MetadataCatalog.get("videos").thing_classes == ["ape", "snail"]
    assert records[0]["annotations"][0]["category_id"] == 1


def test_a_frame_names_the_earlier_ones_of_its_clip_nearest_first(release: Path) -> None:
    names = [[Path(f).stem for f in r["reference_files"]] for r in load(release)]
    assert names == [[], ["00000"], ["00001", "00000"], [], ["00000"]]


def test_a_set_without_annotations_has_records_without_them(release: Path) -> None:
    bare = content()
    del bare["annotations"]
    (release / "train.json").write_text(json.dumps(bare))
    assert all("annotations" not in record for record in load(release))


@given(hnp.arrays(np.uint8, (HEIGHT, WIDTH), elements=st.integers(0, 1)))
def test_masks_may_be_compressed(mask: np.ndarray) -> None:
    mask[0, 0] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    text = {"size": rle["size"], "counts": rle["counts"].decode()}
    video = {"height": HEIGHT, "width": WIDTH}
    assert youtube_vis._to_rle(text, video, "a mask") == rle


def test_a_set_of_ones_own_is_named_in_the_configuration(named: str) -> None:
    cfg = instseg.load_cfg(CONFIG, ["DATASETS.TRAIN", (named,)])
    assert dataset.load(named).classes == ("ape", "snail")
    with pytest.raises(ConfigError, match="has 2 classes, MODEL.YOLACT.NUM_CLASSES is 3"):
        check_classes(cfg, dataset.load_all(cfg.DATASETS.TRAIN))


def test_released_sets_are_found_under_the_root(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"youtubevis_{year}_{split}" for year in (2019, 2021) for split in ("train", "val")]
    instseg.get_cfg()
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(release.parent))
    try:
        instseg.get_cfg()
        assert len(DatasetCatalog.get("youtubevis_2019_train")) == 5
        with pytest.raises(DatasetError, match=r"ytvis_2021/valid\.json: there is no such file"):
            DatasetCatalog.get("youtubevis_2021_val")
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_a_sample_has_a_frame_and_an_earlier_one(release: Path) -> None:
    overrides = ["INPUT.AUGMENTATION", "ssd", "INPUT.VIDEO_REFERENCE", (2, 2)]
    cfg = instseg.load_cfg(CONFIG, overrides)
    sample = build_train_mapper(cfg, augment=False)(load(release)[2])
    assert sample["image"].unique().tolist() == [2]
    assert sample["reference_image"].unique().tolist() == [0]
    assert "flow" not in sample and len(sample["instances"]) == 1


def evaluate(name: str, tmp_path: Path) -> Any:
    cfg = instseg.load_cfg(CONFIG, ["DATASETS.TEST", (name,), "OUTPUT_DIR", str(tmp_path)])
    evaluator = build_evaluator(cfg, dataset.load(name))
    assert isinstance(evaluator, DatasetEvaluators)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        instances = annotated_instances({"annotations": [], **record})
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


def test_both_frames_and_tracks_are_evaluated_without_being_asked_for(
    named: str, tmp_path: Path
) -> None:
    results = evaluate(named, tmp_path)
    assert results["segm"]["AP"] == pytest.approx(100)
    # The instance is hidden in the second frame, and its box is elsewhere in the third: two
    # tracks for one instance, the longer of which covers 2 of 3 pixels: 0.5, 0.55, 0.6 and 0.65.
    assert results["tracks"]["AP"] == pytest.approx(40)


def test_without_annotations_results_are_written_for_the_server(
    release: Path, named: str, tmp_path: Path
) -> None:
    bare = content()
    bare["annotations"] = None
    (release / "train.json").write_text(json.dumps(bare))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers that are not there
        assert evaluate(named, tmp_path)["tracks"] == {}
    (written,) = tmp_path.glob("inference/*/tracks.json")
    assert json.loads(written.read_text()) == []


def test_written_tracks_have_the_class_ids_of_the_data_set(named: str, tmp_path: Path) -> None:
    evaluate(named, tmp_path)
    (written,) = tmp_path.glob("inference/*/tracks.json")
    assert {track["category_id"] for track in json.loads(written.read_text())} == {4}


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """The content with another value at ``path``, or without it where that is a KeyError."""
    result = content()
    *parents, last = path
    node: Any = result
    for key in parents:
        node = node[key]
    if to is KeyError:
        del node[last]
    else:
        node[last] = to
    return result


TRACK = ("annotations", 0)
MASK = (*TRACK, "segmentations", 0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([], "holds a list, not an object"),
        (changed("videos", to=KeyError), "no list of videos"),
        (changed("videos", to=[]), "has no videos"),
        (changed("videos", 0, to="x"), "no list of videos"),
        (changed("videos", 0, "id", to="7"), "id is '7' in an entry of videos"),
        (changed("videos", 1, "id", to=7), "two videos 7"),
        (changed("videos", 0, "file_names", to=[]), "file_names of video 7"),
        (changed("videos", 0, "file_names", to=[1, 2, 3]), "file_names of video 7"),
        (changed("videos", 0, "height", to=True), "height is 'True' in an entry of videos"),
        (changed("videos", 0, "height", to=-6), "video 7 is 8 x -6 pixels"),
        (changed("videos", 0, "width", to=2**40), "video 7 is 1099511627776 x 6 pixels"),
        (changed("categories", to={}), "no list of categories"),
        (changed("categories", to=[]), "has no categories"),
        (changed("categories", 1, "id", to=4), "two categories 4"),
        (changed("categories", 0, "name", to=None), "name is 'None' in an entry of categories"),
        (changed("annotations", to={"a": 1}), "no list of annotations"),
        (changed(*TRACK, "video_id", to=8), "annotation 31 belongs to the video 8"),
        (changed(*TRACK, "category_id", to=3), "annotation 31 has the category 3"),
        (changed(*TRACK, "category_id", to="4"), "category_id is '4' in an entry of annotations"),
        (changed(*TRACK, "iscrowd", to=2), "annotation 31 has iscrowd 2"),
        (changed("annotations", to=content()["annotations"] * 2), "two annotations 31"),
        (changed(*TRACK, "segmentations", to=[None]), "has 1 segmentations, its video 7 3 frames"),
        (changed(*TRACK, "segmentations", to=None), "segmentations is 'None'"),
        (changed(*MASK, "size", to=[8, 6]), r"frame 0: the mask is of \[8, 6\]"),
        (changed(*MASK, "size", to=None), "frame 0: the mask is of None"),
        (changed(*MASK, "counts", to=[1, 2]), "frame 0: the runs do not add up to 6 x 8"),
        (changed(*MASK, "counts", to=[50, -2]), "frame 0: the runs do not add up"),
        (changed(*MASK, "counts", to=5), "frame 0: no mask can be read"),
        (changed(*MASK, "counts", to="\u00e4"), "frame 0: no mask can be read"),
        (changed(*MASK, "counts", to="o" * 20), "frame 0: no mask can be read"),
        (changed(*MASK, "counts", to="oo"), "frame 0: no mask can be read"),
        (changed(*MASK, "counts", to="8888"), "frame 0: the runs do not add up"),
        (changed(*MASK, to="x"), "frame 0: no mask can be read"),
        (changed(*MASK, to=[[1, 2]]), "frame 0: no mask can be read"),
    ],
)
def test_a_malformed_file_is_refused_with_the_entry(
    release: Path, broken: Any, message: str
) -> None:
    (release / "train.json").write_text(json.dumps(broken))
    with pytest.raises(DatasetError, match=rf"data set videos: .*train\.json.*{message}"):
        load(release)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[" * 10**5])
def test_what_is_not_json_is_refused(release: Path, content: bytes) -> None:
    (release / "train.json").write_bytes(content)
    with pytest.raises(DatasetError, match=r"train\.json is not JSON"):
        load(release)


def test_missing_images_are_named(release: Path) -> None:
    with pytest.raises(DatasetError, match="the image folder /nowhere does not exist"):
        youtube_vis.load("videos", str(release / "train.json"), "/nowhere")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(
    where=st.sampled_from(
        [(), ("videos",), ("videos", 0), ("categories", 0), TRACK, (*TRACK, "segmentations"), MASK]
    ),
    key=st.integers(0, 9),
    value=json_values,
)
def test_whatever_a_file_holds_it_is_read_or_refused(
    where: tuple[Any, ...], key: int, value: Any
) -> None:
    broken = copy.deepcopy(content())
    node: Any = broken
    for part in where:
        node = node[part]
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    node[keys[key % len(keys)]] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.json")
        path.write_text(json.dumps(broken))
        try:
            records = youtube_vis.load(folder, str(path), folder)
        except DatasetError:
            return
        finally:
            MetadataCatalog.pop(folder, None)
    assert all(isinstance(record["file_name"], str) for record in records)
    assert torch.tensor([record["height"] for record in records]).min() > 0
