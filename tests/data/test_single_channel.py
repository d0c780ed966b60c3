"""INPUT.FORMAT L, images of one channel: every system trains and predicts, or says it does not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from PIL import Image

import instseg
from instseg import Predictor, VideoPredictor, cli
from instseg.benchmark.models import benchmark_models
from instseg.data.image_arrays import check_image
from instseg.data.images import read_image
from instseg.data.mappers import build_train_mapper
from instseg.data.samples import build_sample_loader
from instseg.data.synthetic import shapes
from instseg.errors import ConfigError
from instseg.export import exporting
from instseg.testing import PHOTO, SMALL, assert_same
from instseg.training.trainer import Trainer
from tests.inference.test_predictor import save_weights
from tests.support.predict_common import results
from tests.test_systems import SYSTEMS

ONE = [
    *("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [110.0], "MODEL.PIXEL_STD", [50.0]),
    *("INPUT.SSD_COLORS", False, "INPUT.SSD_EXPAND_COLOR", []),
]
GREY = np.ascontiguousarray(PHOTO[:, :, 0])
MASK_RCNN = "mask_rcnn/mask_rcnn_shapes.yaml"
SSD = ["INPUT.AUGMENTATION", "ssd", "INPUT.MASK_FORMAT", "bitmask"]
DENSE = "discriminative_loss/discriminative_loss_shapes.yaml"
COLOUR_ALONE = {"sgn/sgn_shapes.yaml": "SGN needs BGR or RGB"}


def config(name: str, *overrides: Any) -> CfgNode:
    return instseg.load_cfg(name, [*SMALL, *SYSTEMS[name], *ONE, *overrides])


def samples(cfg: CfgNode) -> list[dict[str, Any]]:
    records = shapes.load("shapes_val", 64, range(2))
    if cfg.INPUT.SAMPLES:
        return next(iter(build_sample_loader(cfg, records)))
    mapper = build_train_mapper(cfg, augment=True)
    return [mapper(record) for record in records]


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name not in COLOUR_ALONE])
def test_a_system_trains_and_predicts_on_one_channel(name: str, tmp_path: Path) -> None:
    still = ["INPUT.VIDEO_REFERENCE", (), "INPUT.VIDEO_FLOW", False]
    cfg = config(name, *still, "DATASETS.SHAPES_SIZE", 64, "DATALOADER.NUM_WORKERS", 0)
    torch.manual_seed(0)
    predictor = Predictor(cfg)
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    expected = predictor(GREY)["instances"]
    for item in (tmp_path / "grey.png", Image.fromarray(GREY), np.dstack([GREY] * 3)):
        assert_same(predictor(item)["instances"], expected)
    batch = samples(cfg)
    assert all(sample["image"].shape[0] == 1 for sample in batch)
    with EventStorage(0):
        losses = predictor.model.train()(batch)
    assert bool(torch.stack(list(losses.values())).isfinite().all())


@pytest.mark.parametrize("name", COLOUR_ALONE)
def test_a_system_for_colour_alone_is_refused_in_one_line(name: str) -> None:
    for build in (Predictor, Trainer.build_model):
        with pytest.raises(ConfigError, match=f"INPUT.FORMAT is 'L'; {COLOUR_ALONE[name]}"):
            build(config(name))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("yolact_edge/yolact_edge_shapes_video.yaml", "BACKBONE.NAME", "build_mobilenet_v2"),
        (DENSE, "DISCRIMINATIVE_LOSS.NETWORK", "enet"),
        (DENSE, "DISCRIMINATIVE_LOSS.NETWORK", "reseg"),
        (DENSE, "DISCRIMINATIVE_LOSS.NETWORK", "hourglass"),
    ],
)
def test_a_network_for_colour_alone_is_refused_in_one_line(name: str, key: str, value: str) -> None:
    value += "_backbone" * key.startswith("BACKBONE")
    with pytest.raises(ConfigError, match="INPUT.FORMAT is 'L'; .* needs BGR or RGB"):
        Predictor(config(name, f"MODEL.{key}", value))


def test_colours_are_not_distorted_where_there_are_none() -> None:
    cfg = config("yolact/yolact_shapes.yaml", "INPUT.SSD_COLORS", True, *SSD)
    with pytest.raises(ConfigError, match="INPUT.FORMAT is 'L'; INPUT.SSD_COLORS needs BGR or RGB"):
        build_train_mapper(cfg, augment=True)


def test_colour_becomes_grey_by_the_same_rule_from_a_file_and_an_array(tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    expected = np.asarray(Image.fromarray(PHOTO).convert("L"))[:, :, None]
    bgr = PHOTO[:, :, ::-1]
    assert np.array_equal(read_image(tmp_path / "a.png", format="L"), expected)
    assert np.array_equal(check_image(bgr, format="L"), expected)
    assert np.array_equal(check_image(np.dstack([bgr, GREY]), format="L"), expected)
    floats = check_image(bgr.astype(np.float32), format="L")
    assert floats.dtype == np.float32 and abs(floats - expected).max() <= 1


def test_a_grey_array_is_taken_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert check_image(GREY, format="L").shape == (*GREY.shape, 1)
    assert not caplog.records


def test_a_video_is_predicted_on_in_one_channel() -> None:
    name = "yolact_edge/yolact_edge_shapes_video.yaml"
    video = VideoPredictor(Predictor(config(name)))
    first, second = video(GREY), video(PHOTO)
    assert first["keyframe"] and not second["keyframe"]


def test_the_network_that_is_exported_takes_one_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[exporting.Graph] = []
    write = (".onnx", lambda graph, metadata: written.append(graph))
    monkeypatch.setitem(exporting.FORMATS, "onnx", write)
    predictor = Predictor(config("yolact/yolact_shapes.yaml"))
    exporting.export(predictor, "onnx", tmp_path / "a.onnx")
    (graph,) = written
    assert graph.examples[0].shape[1] == 1
    assert len(graph.network(*graph.examples)) == len(graph.outputs)


def test_the_command_draws_what_is_found_in_one_channel_on_the_image(tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    words = [str(word) for word in [*SMALL, *SYSTEMS[MASK_RCNN], *ONE]]
    command = ["predict", "--config-file", MASK_RCNN, "--input", str(tmp_path / "a.png")]
    command += ["--output", str(tmp_path / "out"), "--confidence", "0"]
    command += ["--weights", str(save_weights(config(MASK_RCNN), tmp_path / "a.pth"))]
    assert cli.main([*command, *words]) == 0
    assert np.asarray(Image.open(tmp_path / "out/a.png")).shape == PHOTO.shape
    assert results(tmp_path / "out")


def test_a_benchmark_against_what_knows_colour_alone_is_refused_at_once() -> None:
    words = [str(word) for word in [*SMALL, *SYSTEMS[MASK_RCNN], *ONE]]
    with pytest.raises(ConfigError, match="INPUT.FORMAT is 'L'; .*DefaultPredictor needs BGR"):
        benchmark_models([MASK_RCNN], overrides=words)
