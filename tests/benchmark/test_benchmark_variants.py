"""``instseg benchmark models --variant``: a row for every form of a network, split by stages."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode

from instseg.benchmark import benchmark_models, models, peak, report, variants
from instseg.cli import main
from instseg.errors import ConfigError
from instseg.export import ExportedPredictor
from tests.support.yolact_tiny import CONFIGS, PHOTO, TINY

STAGES = {"network", "post-processing", "mask assembly", "rest"}


def test_every_variant_of_yolact_is_a_row_with_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_peak_memory", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    cv2.imwrite(str(tmp_path / "photo.png"), PHOTO)
    monkeypatch.setattr(models, "operations", lambda *_: pytest.fail("counted without --peak"))
    forms = ["eager", "folded", "bf16", "compiled"]
    rows = benchmark_models([CONFIGS["yolact"]], [str(tmp_path / "photo.png")], TINY, 1, forms)
    names = ["", "_folded", "_bf16", "_compiled"]
    assert [row.name for row in rows] == [f"yolact_shapes{name}" for name in names]
    for row in rows:
        assert set(row.stages_ms) == STAGES
        assert all(ms > 0 for ms in row.stages_ms.values())
        assert row.ratio_cpu == pytest.approx(row.peer_cpu_ms / row.cpu_ms)
        assert row.share_of_peak is None


def test_exported_networks_are_rows_with_their_share_of_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak of a number type is a row of its own."""
    pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    monkeypatch.setattr(models, "_peak_memory", lambda *_: None)
    monkeypatch.setattr(peak, "processor_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(peak, "has_bfloat16", lambda: False)
    monkeypatch.setattr(ExportedPredictor, "engine_dtype", "float32")
    cv2.imwrite(str(tmp_path / "photo.png"), PHOTO)
    forms = ["onnx", "int8"]
    if importlib.util.find_spec("openvino") is not None:
        forms += ["openvino", "openvino_bf16", "openvino_int8"]
    words = [*TINY, "INPUT.SQUARE_SIZE", 72]
    photos = [str(tmp_path / "photo.png")]
    rows = benchmark_models([CONFIGS["yolact"]], photos, words, 1, forms, peak=True)
    peaks = [row for row in rows if row.name.startswith("peak: ")]
    assert [row.name for row in peaks][:2] == [
        f"peak: convolution in {dtype}" for dtype in ("float32", "int8")
    ]
    networks = rows[len(peaks) :]
    assert [row.name for row in networks] == [f"yolact_shapes_{name}" for name in forms]
    notes = {"int8": "no avx512_vnni", "openvino_int8": "no avx512_vnni"}
    notes["openvino_bf16"] = "no avx512_bf16"
    for form, row in zip(forms, networks, strict=True):
        assert set(row.stages_ms) == STAGES
        if form == "openvino_bf16":  # the engine computes in another type than the peak's
            assert row.gflops is row.share_of_peak is None
        else:
            assert row.share_of_peak is not None and row.share_of_peak > 0
        assert row.note == notes.get(form)
    assert "share_of_peak" in report(rows, None)


def test_a_network_in_bfloat16_has_a_share_of_the_peak_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="needs the extra 'openvino'")
    pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    monkeypatch.setattr(models, "_peak_memory", lambda *_: None)
    monkeypatch.setattr(ExportedPredictor, "engine_dtype", "bfloat16")
    cv2.imwrite(str(tmp_path / "photo.png"), PHOTO)
    words, photos = [*TINY, "INPUT.SQUARE_SIZE", 72], [str(tmp_path / "photo.png")]
    form = ["openvino_bf16"]
    _, row = benchmark_models([CONFIGS["yolact"]], photos, words, 1, form, peak=True)
    assert row.share_of_peak is not None and row.share_of_peak > 0


def test_the_peak_is_that_of_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = models.load_cfg(CONFIGS["yolact"], TINY)
    cfg.MODEL.DEVICE = "cuda"
    monkeypatch.setattr(models, "load_cfg", lambda *_: cfg)
    monkeypatch.setattr(models, "peak_row", lambda *_: pytest.fail("measured before the check"))
    with pytest.raises(
        ConfigError, match=r"--peak .* MODEL\.DEVICE is cuda; set MODEL\.DEVICE cpu"
    ):
        benchmark_models([CONFIGS["yolact"]], peak=True)


def test_exported_networks_run_on_the_cpu_alone() -> None:
    cfg = models.load_cfg(CONFIGS["yolact"], TINY)
    cfg.MODEL.DEVICE = "cuda"
    form = variants.VARIANTS["onnx"]
    with pytest.raises(ConfigError, match=r"MODEL\.DEVICE is cuda; set MODEL\.DEVICE cpu"):
        variants.prepared(form, cfg, [PHOTO], Path("."), lambda build: build(), False)


def test_a_model_for_videos_has_the_times_of_both_kinds_of_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_peak_memory", lambda *_: None)
    cv2.imwrite(str(tmp_path / "photo.png"), PHOTO)
    backbone = ["MODEL.BACKBONE.NAME", "build_mobilenet_v2_backbone"]
    overrides = [*TINY, *backbone, "MODEL.MOBILENET.WIDTH", 0.25]
    config = "yolact_edge/yolact_edge_shapes_video.yaml"
    photos, variants = [str(tmp_path / "photo.png")], ["eager", "bf16"]
    for row in benchmark_models([config], photos, overrides, 1, variants):
        assert list(row.stages_ms)[-2:] == ["keyframe", "between"]
        assert all(ms > 0 for ms in row.stages_ms.values())


def test_the_images_of_the_test_set_are_those_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, ...]] = []

    def row(name: str, cfg: CfgNode, images: list[np.ndarray], *_: object) -> None:
        measured.extend(image.shape for image in images)

    monkeypatch.setattr(models, "_benchmark_model", row)
    config, words = "sgn/sgn_shapes.yaml", ["DATASETS.SHAPES_SIZE", 32]
    benchmark_models([config], (), words, test_set=True)
    assert measured == [(32, 32, 3)] * models.IMAGES
    with pytest.raises(ConfigError, match=r"leave out --input"):
        benchmark_models([config], ["photo.png"], words, test_set=True)
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST is empty"):
        benchmark_models([config], (), [*words, "DATASETS.TEST", ()], test_set=True)


def test_both_predictors_get_the_same_random_weights() -> None:
    first, second = (models._same_weights(lambda: torch.rand(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_a_random_network_keeps_detections_of_any_score() -> None:
    cfg = models._with_work(models.load_cfg(CONFIGS["yolact"], ["MODEL.WEIGHTS", ""]))
    assert cfg.MODEL.YOLACT.SCORE_THRESH_TEST == cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0


def test_an_unknown_variant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config-file", CONFIGS["yolact"], "--variant", "fast"]
    assert main(["benchmark", "models", *arguments]) == 2
    assert (
        "--variant is fast; expected one of eager, folded, bf16, compiled, onnx, int8, openvino"
        in capsys.readouterr().err
    )


def test_a_model_without_a_network_of_fixed_shape_has_no_compiled_variant() -> None:
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    with pytest.raises(ConfigError, match="cannot be compiled"):
        benchmark_models(["mask_rcnn/mask_rcnn_shapes.yaml"], [], overrides, 1, ["compiled"])
