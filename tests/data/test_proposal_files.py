"""Proposals: from a model without classes into a file, and from there into a detector."""

import json
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.build import load_proposals_into_dataset
from detectron2.structures import BoxMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import instseg
from instseg.cli import main
from instseg.data.proposal_files import with_proposals, write_proposals
from instseg.data.synthetic.shapes import export
from instseg.errors import CheckpointError, ConfigError, DatasetError, OutputError
from instseg.inference.predictor import Predictor
from instseg.pickles import read_array_pickle
from instseg.training.trainer import Trainer

MODEL = "instance_fcn/instance_fcn_shapes.yaml"
DETECTOR = "deepmask/fast_rcnn_deepmask_shapes.yaml"
BOXES = np.array([[0, 0, 9, 9], [2, 3, 20, 30]], dtype=np.float32)
LOGITS = np.array([-1.5, 2.0], dtype=np.float32)


def records(*ids: Any) -> list[dict[str, Any]]:
    return [{"image_id": i, "file_name": f"{i}.png"} for i in ids]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "proposals.pkl"
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    write_proposals(path, [(7, BOXES, LOGITS), ("b", *nothing)])
    return str(path)


def test_a_record_gets_its_boxes_best_first(file: str) -> None:
    given = records("b", 7)
    first, second = with_proposals(given, file)
    assert given == records("b", 7)
    assert first["proposal_boxes"].shape == (0, 4)
    assert second["proposal_boxes"].tolist() == BOXES[::-1].tolist()
    assert second["proposal_objectness_logits"].tolist() == [2.0, -1.5]
    assert second["proposal_bbox_mode"] is BoxMode.XYXY_ABS


def test_detectron2_reads_the_same(file: str) -> None:
    ours, theirs = with_proposals(records(7, "b"), file), records(7, "b")
    load_proposals_into_dataset(theirs, file)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert np.array_equal(one["proposal_boxes"], other["proposal_boxes"])


def test_a_file_for_detectron_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "old.pkl"
    content = {"indexes": [7], "boxes": [BOXES], "scores": [LOGITS]}
    path.write_bytes(pickle.dumps(content, protocol=2))
    data = records(7)
    data = with_proposals(data, str(path))
    assert data[0]["proposal_boxes"].tolist() == BOXES[::-1].tolist()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps({"ids": [7], "boxes": [Payload(tmp_path / "ran")]}))
    with pytest.raises(CheckpointError, match="bad.pkl asks for .*could execute code"):
        with_proposals(records(7), str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [8]}, "no proposals for 1 of 1 images, first 7.png"),
        ({"ids": [7, 8]}, "of one length"),
        ({"boxes": BOXES}, "expected the lists ids"),
        ({"boxes": [BOXES[:, :3]]}, r"boxes have shape \(2, 3\)"),
        ({"boxes": [BOXES * np.nan]}, "not finite"),
        ({"boxes": [BOXES.astype(int)]}, "no array of floating-point"),
        ({"boxes": [[[1, 2, 3, 4]]]}, "no array of floating-point"),
        ({"boxes": [np.float32(1)]}, "image 7"),
        ({"objectness_logits": [LOGITS[:1]]}, r"objectness_logits have shape \(1,\)"),
        ({"bbox_mode": 4}, "bbox_mode is 4; expected 0"),
        ({"bbox_mode": BOXES}, "bbox_mode is"),
    ],
)
def test_a_file_of_another_content_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    content = {"ids": [7], "boxes": [BOXES], "objectness_logits": [LOGITS], **changes}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(DatasetError, match=message):
        with_proposals(records(7), str(path))


def test_a_file_that_is_no_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DatasetError, match="holds a list"):
        with_proposals(records(7), str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing.pkl"):
        with_proposals(records(7), str(tmp_path / "nothing.pkl"))


def nested(outer: bytes, inner: bytes) -> bytes:
    """A pickle of twenty levels, each of them ten times the one before."""
    levels = [outer + pickle.MARK + b"K\x01" * 10 + inner + pickle.BINPUT + b"\x00"]
    for level in range(1, 20):
        again = (pickle.BINGET + bytes([level - 1])) * 10
        levels.append(outer + pickle.MARK + again + inner + pickle.BINPUT + bytes([level]))
    return b"\x80\x04" + b"".join(levels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\x80\x05" + pickle.BYTEARRAY8 + struct.pack("<Q", 1 << 60) + b"abc",
            "bytes, but only 3 follow",
        ),
        (b"\x80\x04" + pickle.BINBYTES8 + struct.pack("<Q", 1 << 60) + b"abc", "or damaged"),
        (b"\x80\x04" + pickle.BINBYTES8 + struct.pack("<Q", 1 << 32) + b"abc", "or damaged"),
        (nested(b"", pickle.TUPLE) + b"}h\x13K\x01s.", "or damaged"),
        (b"}h\x00K\x01s.", "or damaged"),
    ],
    ids=["bytearray", "bytes", "fewer bytes", "tuple as a key", "reference to nothing"],
)
def test_what_a_file_claims_takes_neither_memory_nor_time(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"x.pkl .*{message}"):
            with_proposals(records(7), str(path))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_lists_of_lists_are_read_in_the_time_their_bytes_take(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(nested(pickle.EMPTY_LIST, pickle.APPENDS) + b".")
    with pytest.raises(DatasetError, match="holds a list"):
        with_proposals(records(7), str(path))


@pytest.mark.parametrize(
    ("key", "message"), [(b"ids", "an id is a list"), (b"bbox_mode", "bbox_mode is ")]
)
def test_lists_of_lists_in_place_of_a_number_are_refused_in_a_line(
    tmp_path: Path, key: bytes, message: str
) -> None:
    word = b"\x8c" + bytes([len(key)]) + key
    entry = pickle.EMPTY_LIST + b"(h\x13e" if key == b"ids" else b"h\x13"
    rest = [b"\x8c\x05boxes](K\x01e", b"\x8c\x11objectness_logits](K\x01e"]
    rest += [] if key == b"ids" else [b"\x8c\x03ids](K\x01e"]
    path = tmp_path / "x.pkl"
    lists = nested(pickle.EMPTY_LIST, pickle.APPENDS)
    path.write_bytes(lists + b"}(" + word + entry + b"".join(rest) + b"u.")
    with pytest.raises(DatasetError, match=message) as caught:
        with_proposals(records(7), str(path))
    assert len(str(caught.value)) < 500


class Sharing:
    """Pickled, an array of bytes that the file may hold once for many."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def __reduce__(self) -> Any:
        make, arguments, _ = np.zeros(1).__reduce__()
        return make, arguments, (1, (len(self.raw),), np.dtype("u1"), False, self.raw)


def test_many_arrays_of_the_same_bytes_are_refused(tmp_path: Path) -> None:
    path, raw = tmp_path / "x.pkl", bytes(5000)
    path.write_bytes(pickle.dumps([Sharing(raw)] * 100))
    assert len(read_array_pickle(str(path))) == 100
    path.write_bytes(pickle.dumps([Sharing(raw) for _ in range(100)]))
    with pytest.raises(CheckpointError, match="arrays are larger than the file"):
        read_array_pickle(str(path))


SAMPLE = pickle.dumps({"ids": [7], "boxes": [BOXES], "objectness_logits": [LOGITS]}, protocol=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255), st.integers(0, len(SAMPLE)))
def test_a_changed_or_cut_file_gives_proposals_or_one_of_our_errors(
    tmp_path: Path, position: int, byte: int, end: int
) -> None:
    content = bytearray(SAMPLE)
    content[position] = byte
    path = tmp_path / "x.pkl"
    path.write_bytes(content[:end])
    data = records(7)
    try:
        data = with_proposals(data, str(path))
    except (CheckpointError, DatasetError) as error:
        assert "x.pkl" in str(error)
    else:
        assert data[0]["proposal_boxes"].shape[1] == 4


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of four small images."""
    return exported("shapes_val", tmp_path_factory.mktemp("shapes"))


def exported(split: str, folder: Path) -> str:
    path = export(split, folder, limit=4)
    return f"coco:{path}:{path.with_suffix('')}"


def detector(folder: Path, *overrides: Any) -> Any:
    path = (str(folder / "proposals.pkl"),)
    common = ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 2, "DATALOADER.NUM_WORKERS", 0]
    return instseg.load_cfg(
        DETECTOR,
        [
            *("DATASETS.PROPOSAL_FILES_TRAIN", path, "DATASETS.PROPOSAL_FILES_TEST", path),
            *(*common, "SOLVER.IMS_PER_BATCH", 2, "OUTPUT_DIR", str(folder), *overrides),
        ],
    )


def test_a_detector_trains_and_is_tested_on_what_the_command_wrote(
    shapes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["proposals", "--config-file", MODEL, "--dataset", shapes, "--allow-partial"]
    limits = ["TEST.DETECTIONS_PER_IMAGE", "20", "MODEL.INSTANCE_FCN.SCALES_TEST", "(96,)"]
    output = ["--output", str(tmp_path / "proposals.pkl"), "MODEL.DEVICE", "cpu"]
    assert main([*command, *output, *limits]) == 0
    assert "proposals for 4 images" in capsys.readouterr().out

    cfg = detector(tmp_path, "DATASETS.TRAIN", (shapes,), "DATASETS.TEST", (shapes,))
    trainer = Trainer(cfg)
    batch = next(iter(trainer.build_train_loader(cfg)))
    assert 0 < len(batch[0]["proposals"]) <= 20
    trainer.train()
    (sample,) = next(iter(Trainer.build_test_loader(cfg, shapes)))
    trainer.model.eval()
    with torch.no_grad():
        instances = trainer.model([sample])[0]["instances"]
    assert instances.pred_masks.shape[1:] == (128, 128)


def test_the_command_writes_boxes_in_pixels_of_the_image(tmp_path: Path) -> None:
    overrides = ["MODEL.INSTANCE_FCN.SCALES_TEST", "(64,)", "MODEL.DEVICE", "cpu"]
    image = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    content = {
        "images": [{"id": 5, "file_name": "a.png", "height": 40, "width": 90}],
        "annotations": [],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    name = f"coco:{tmp_path}/instances.json"
    output = tmp_path / "x.pkl"
    command = ["proposals", "--config-file", MODEL, "--dataset", name, "--output", str(output)]
    assert main([*command, "--allow-partial", *overrides]) == 0
    data = records(5)
    data = with_proposals(data, str(output))
    boxes = data[0]["proposal_boxes"]
    assert len(boxes) and (boxes >= 0).all() and (boxes <= [90, 40, 90, 40]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", MODEL, "--output", "x.npz"], "must end in .pkl"),
        (["--config-file", "mask_rcnn/mask_rcnn_shapes.yaml", "--output", "x.pkl"], "with classes"),
        (["--config-file", DETECTOR, "--output", "x.pkl"], "MODEL.LOAD_PROPOSALS is set"),
        (["--config-file", MODEL, "--output", "x.pkl", "--dataset", "shapes_vall"], "shapes_val"),
        (["--config-file", MODEL, "--output", "x.pkl"], "no weights to propose with"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--dataset" not in arguments:
        arguments = [*arguments, "--dataset", "shapes_val"]
    assert main(["proposals", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_image_is_one_line_and_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = exported("shapes_val", tmp_path)
    image = sorted(tmp_path.rglob("*.png"))[0]
    image.write_bytes(image.read_bytes()[:200])
    output = tmp_path / "x.pkl"
    overrides = ["MODEL.INSTANCE_FCN.SCALES_TEST", "(32,)", "MODEL.DEVICE", "cpu"]
    command = ["proposals", "--config-file", MODEL, "--dataset", name, "--output", str(output)]
    assert main([*command, "--allow-partial", *overrides]) == 2
    assert image.name in capsys.readouterr().err and not output.exists()


def test_new_images_cannot_be_predicted_from_a_proposal_file() -> None:
    with pytest.raises(ConfigError, match="MODEL.LOAD_PROPOSALS is set"):
        Predictor(DETECTOR, overrides=["MODEL.DEVICE", "cpu"])


def test_a_file_is_needed_for_each_data_set(shapes: str, tmp_path: Path) -> None:
    common = ["DATASETS.TRAIN", (shapes,), "DATASETS.TEST", (shapes,)]
    cfg = detector(tmp_path, *common, "DATASETS.PROPOSAL_FILES_TRAIN", ())
    with pytest.raises(ConfigError, match="PROPOSAL_FILES_TRAIN has 0, for coco:"):
        Trainer.build_train_loader(cfg)
    cfg = detector(tmp_path, *common, "DATASETS.PROPOSAL_FILES_TEST", ("a", "b"))
    with pytest.raises(ConfigError, match="PROPOSAL_FILES_TEST has 2"):
        Trainer.build_test_loader(cfg, shapes)


def test_each_data_set_gets_its_own_file(shapes: str, tmp_path: Path) -> None:
    names = (shapes, exported("shapes_train", tmp_path))
    paths = tuple(str(tmp_path / f"{i}.pkl") for i in range(2))
    overrides = ["DATASETS.TRAIN", names, "DATASETS.PROPOSAL_FILES_TRAIN", paths]
    cfg = detector(tmp_path, *overrides, "SOLVER.IMS_PER_BATCH", 8, "INPUT.RANDOM_FLIP", "none")
    for number, (name, path) in enumerate(zip(names, paths, strict=True), start=1):
        boxes = np.array([[0, 0, 10 * number, 10]], dtype=np.float32)
        ids = [record["image_id"] for record in DatasetCatalog.get(name)]
        write_proposals(path, [(i, boxes, LOGITS[:1]) for i in ids])
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert len(batch) == 8
    for sample in batch:
        wanted = 20 if "shapes_train" in sample["file_name"] else 10
        assert sample["proposals"].proposal_boxes.tensor[0, 2] == wanted


def test_a_file_that_cannot_be_written_is_refused_before_any_image_is_asked_for(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    images = iter([(7, BOXES, LOGITS)])
    with pytest.raises(OutputError, match="cannot write .*file/a.pkl"):
        write_proposals(tmp_path / "file" / "a.pkl", images)
    assert next(images)[0] == 7
