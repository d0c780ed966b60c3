"""Values that Detectron2 or torch would refuse later are refused at once, by their key."""

from pathlib import Path

import pytest
import torch

import instseg
from instseg.config.nodes import CfgNode, check_device
from instseg.config.rules import check_values
from instseg.errors import ConfigError
from instseg.inference.predictor import Predictor
from instseg.training import launch
from instseg.training.trainer import Trainer

CONFIG = "configs/mask_rcnn/mask_rcnn_shapes.yaml"
BAD = [
    ("MODEL.DEVICE", "foo", "cpu, cuda or cuda:NUMBER"),
    ("MODEL.DEVICE", "meta", "cpu, cuda or cuda:NUMBER"),
    ("MODEL.PIXEL_MEAN", ["a", "b", "c"], "a list of numbers, one per channel"),
    ("MODEL.PIXEL_MEAN", [1.0], "3 numbers, as INPUT.FORMAT is BGR"),
    ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0], "a list of numbers above 0, one per channel"),
    ("MODEL.RESNETS.DEPTH", 7, "18, 34, 50, 101 or 152"),
    ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 0, "a whole number of at least 1"),
    ("MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.5, "a number from 0 to 1"),
    ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "l2", "smooth_l1, giou, diou or ciou"),
    ("INPUT.FORMAT", "XYZ", "BGR, RGB or L"),
    ("INPUT.FORMAT", "YUV-BT.601", "BGR, RGB or L"),
    ("INPUT.MASK_FORMAT", "foo", "polygon or bitmask"),
    ("INPUT.RANDOM_FLIP", "foo", "horizontal, vertical or none"),
    ("INPUT.MIN_SIZE_TRAIN", (), "one or more sides in pixels"),
    ("INPUT.MIN_SIZE_TRAIN", ("a",), "one or more sides in pixels"),
    ("INPUT.MIN_SIZE_TRAIN", (-3,), "one or more sides in pixels"),
    ("INPUT.MIN_SIZE_TRAIN", (True,), "one or more sides in pixels"),
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "any", "choice or range"),
    ("INPUT.MIN_SIZE_TEST", -3, "a whole number of at least 0"),
    ("INPUT.MAX_SIZE_TRAIN", 0, "a whole number of at least 1"),
    ("INPUT.CROP.TYPE", "half", "relative, relative_range, absolute or absolute_range"),
    ("DATALOADER.NUM_WORKERS", -1, "a whole number of at least 0"),
    (
        "DATALOADER.SAMPLER_TRAIN",
        "X",
        "TrainingSampler, RepeatFactorTrainingSampler or GroupedTrainingSampler",
    ),
    ("SOLVER.IMS_PER_BATCH", 0, "a whole number of at least 1"),
    ("SOLVER.IMS_PER_BATCH", -1, "a whole number of at least 1"),
    ("SOLVER.MAX_ITER", 0, "a whole number of at least 1"),
    ("SOLVER.CHECKPOINT_PERIOD", 0, "a whole number of at least 1"),
    ("SOLVER.BASE_LR", -1.0, "a number of at least 0"),
    ("SOLVER.BASE_LR", float("nan"), "a number of at least 0"),
    ("SOLVER.LR_SCHEDULER_NAME", "Foo", "WarmupCosineLR or WarmupStepWithFixedGammaLR"),
    ("SOLVER.WARMUP_METHOD", "burn_in", "linear or constant"),
    ("SOLVER.STEPS", (20, 10), "iterations in ascending order"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all", "value or norm"),
    ("SOLVER.OPTIMIZER", "Adam", "SGD or AdamW"),
    ("SOLVER.AMP.DTYPE", "half", "float16 or bfloat16"),
    ("SOLVER.ACCUMULATE_BATCHES", 0, "a whole number of at least 1"),
    ("TEST.DETECTIONS_PER_IMAGE", -3, "a whole number of at least 0"),
    ("TEST.KEYFRAME_INTERVAL", -1, "at least 1, 0 for auto"),
    ("TEST.VOC_INTERPOLATION", "12-point", "11-point or all-point"),
    ("TEST.AUG.MIN_SIZES", (), "one or more sides in pixels"),
    ("TEST.AUG.MIN_SIZES", (400, 0), "one or more sides in pixels"),
    ("TEST.AUG.MAX_SIZE", 0, "a whole number of at least 1"),
    ("SEED", 2**31, "a whole number below 2147483648"),
]
BAD_TOGETHER = [
    (
        {"INPUT.CROP.ENABLED": True, "INPUT.CROP.SIZE": [2.0, 5.0]},
        "INPUT.CROP.SIZE is [2.0, 5.0]; expected [height, width], each above 0 and at most 1 of "
        "the image's, as INPUT.CROP.TYPE is relative_range",
    ),
    (
        {
            "INPUT.CROP.ENABLED": True,
            "INPUT.CROP.TYPE": "absolute_range",
            "INPUT.CROP.SIZE": [9, 5],
        },
        "INPUT.CROP.SIZE is [9, 5]; expected two whole numbers of pixels, in ascending order",
    ),
    (
        {"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range", "INPUT.MIN_SIZE_TRAIN": (640,)},
        "INPUT.MIN_SIZE_TRAIN is (640,); expected (smallest, largest) side",
    ),
    (
        {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.BASE_LR": 0.0},
        "SOLVER.BASE_LR is 0.0; expected above 0",
    ),
    (
        {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.BASE_LR_END": 1.0},
        "SOLVER.BASE_LR is 0.001; expected above 0 and at least SOLVER.BASE_LR_END 1",
    ),
    (
        {"SOLVER.NESTEROV": True, "SOLVER.MOMENTUM": 0.0},
        "SOLVER.MOMENTUM is 0.0; expected above 0 with SOLVER.NESTEROV",
    ),
]


def with_values(values: dict[str, object]) -> CfgNode:
    cfg = instseg.get_cfg()
    cfg.merge_from_list([word for pair in values.items() for word in pair])
    return cfg


@pytest.mark.parametrize(("key", "value", "expected"), BAD)
def test_a_value_that_cannot_be_used_is_refused_with_what_was_expected(
    key: str, value: object, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_values(with_values({key: value}))
    assert str(caught.value).startswith(f"{key} is {value!r}; expected ")
    assert expected in str(caught.value)


@pytest.mark.parametrize(("values", "message"), BAD_TOGETHER)
def test_values_that_do_not_go_together_are_refused(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_values(with_values(values))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"INPUT.CROP.SIZE": [2.0, 5.0]},  # not in use
        {"INPUT.FORMAT": "L", "MODEL.PIXEL_MEAN": [100.0], "MODEL.PIXEL_STD": [1.0]},
        {"INPUT.MIN_SIZE_TRAIN": (0,), "INPUT.MIN_SIZE_TEST": 0},
        {"SOLVER.STEPS": ()},
        {"MODEL.DEVICE": "cuda:0"},
    ],
)
def test_unusual_values_that_work_are_accepted(values: dict[str, object]) -> None:
    check_values(with_values(values))


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(ConfigError) as caught:
        check_values(with_values({"MODEL.PIXEL_MEAN": ["a"] * 1000}))
    assert len(str(caught.value)) < 200


def test_train_net_checks_values_before_it_makes_a_folder(tmp_path: Path) -> None:
    words = ["--config-file", CONFIG, "SOLVER.CHECKPOINT_PERIOD", "0"]
    words += ["OUTPUT_DIR", str(tmp_path / "new")]
    with pytest.raises(ConfigError, match="SOLVER.CHECKPOINT_PERIOD is 0; expected"):
        launch.setup(launch.argument_parser().parse_args(words))
    assert not (tmp_path / "new").exists()


def test_a_trainer_checks_values_that_were_changed_after_loading() -> None:
    cfg = instseg.load_cfg(CONFIG)
    cfg.SOLVER.BASE_LR = -1.0
    with pytest.raises(ConfigError, match="SOLVER.BASE_LR is -1.0; expected"):
        Trainer(cfg)


def test_a_predictor_checks_values_and_those_given_last_as_well() -> None:
    with pytest.raises(ConfigError, match="INPUT.MIN_SIZE_TEST is -3; expected"):
        Predictor(instseg.load_cfg(CONFIG), overrides=["INPUT.MIN_SIZE_TEST", "-3"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.FPN.IN_FEATURES", ["x"], "cannot be built: 'x' .KeyError .*in_features"),
        ("MODEL.RESNETS.NORM", "Foo", "cannot be built: 'Foo' .KeyError in get_norm"),
        ("MODEL.FPN.OUT_CHANNELS", -1, "cannot be built: .*negative"),
    ],
)
def test_a_model_that_cannot_be_built_is_a_config_error_in_training_and_prediction(
    key: str, value: object, message: str
) -> None:
    cfg = instseg.load_cfg(CONFIG, ["MODEL.DEVICE", "cpu", key, value])
    with pytest.raises(ConfigError, match=message):
        Trainer.build_model(cfg)
    with pytest.raises(ConfigError, match=message):
        Predictor(cfg)


def test_a_gpu_beyond_the_last_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device(with_values({"MODEL.DEVICE": "cuda:1"}))
    with pytest.raises(ConfigError, match="cuda:2; this machine has the GPUs cuda:0 to cuda:1"):
        check_device(with_values({"MODEL.DEVICE": "cuda:2"}))
