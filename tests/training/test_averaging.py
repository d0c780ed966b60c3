"""The average of the weights: its values, its use in evaluations and checkpoints, and resuming."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.evaluation.testing import flatten_results_dict
from torch import Tensor, nn

import instseg
from instseg.checkpoint import read_weights
from instseg.data.synthetic import shapes
from instseg.errors import CheckpointError, ConfigError
from instseg.training.averaging import AveragedWeights
from instseg.training.trainer import Trainer

CONFIG = "mask_rcnn/mask_rcnn_shapes.yaml"


class Parts(nn.Module):
    """A trained and a frozen parameter, and the statistics of a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.norm = nn.BatchNorm1d(1, affine=False)


def put(model: Parts, value: float) -> None:
    """What a step of training might do."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name != "frozen" and (tensor.is_floating_point() or math.isfinite(value)):
                tensor.fill_(value)


def averaged(decay: float, *values: float) -> tuple[Parts, AveragedWeights]:
    """A model after steps that gave it these values."""
    model = Parts()
    average = AveragedWeights(model, decay)
    average.before_train()
    for value in values:
        put(model, value)
        average.after_step()
    return model, average


def test_the_average_forgets_its_start_and_then_decays_as_configured() -> None:
    """Shares that stay: 2/11 and 3/12, then at most 0.3."""
    _, average = averaged(0.3, 11.0, 12.0, 20.0)
    first = 11 * 9 / 11
    second = first / 4 + 12 * 3 / 4
    expected = 0.3 * second + 0.7 * 20
    weights = average.model_weights()
    assert weights["weight"].item() == pytest.approx(expected)
    assert weights["norm.running_var"].item() == pytest.approx(
        0.3 * ((1 * 2 / 11 + first) / 4 + 9) + 14
    )


def test_frozen_parameters_and_counts_are_those_of_the_model() -> None:
    model, average = averaged(0.9, 10.0)
    model.frozen.fill_(3.0)
    weights = average.model_weights()
    assert weights.keys() == model.state_dict().keys()
    assert weights["frozen"].item() == 3.0 and weights["norm.num_batches_tracked"].item() == 10
    assert average.state_dict()["trained"].keys() == {
        "weight",
        "norm.running_mean",
        "norm.running_var",
    }


def test_weights_that_are_not_finite_do_not_enter() -> None:
    _, average = averaged(0.9, 10.0)
    _, spoiled = averaged(0.9, 10.0, float("nan"), float("inf"))
    assert spoiled.model_weights()["weight"] == average.model_weights()["weight"]


def test_the_model_has_the_average_inside_and_its_own_weights_after_an_error() -> None:
    model, average = averaged(0.9, 11.0)
    with pytest.raises(SystemExit), average.used():
        assert model.weight.item() == pytest.approx(9.0)
        raise SystemExit
    assert model.weight.item() == 11.0


def test_a_signal_between_two_copies_leaves_the_trained_weights_in_the_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM may come while the average is copied into the model, or the weights back."""
    model, average = averaged(0.9, 11.0)
    trained = {name: x.clone() for name, x in average.state_dict()["trained"].items()}

    def half(weights: dict[str, torch.Tensor]) -> None:
        model.weight.data.copy_(weights["weight"])
        raise SystemExit

    monkeypatch.setattr(average, "_set", half)
    with pytest.raises(SystemExit), average.used():
        pass
    saved = average.state_dict()["trained"]
    assert all(torch.equal(saved[name], trained[name]) for name in trained)


def test_going_on_from_a_state_gives_the_same_average() -> None:
    values = [5.0, -2.0, 8.0, 1.0]
    _, straight = averaged(0.5, *values)
    _, average = averaged(0.5, *values[:2])
    state, saved = average.state_dict(), average.model_weights()
    resumed = Parts()
    resumed.load_state_dict(saved)
    second = AveragedWeights(resumed, 0.5)
    second.load_state_dict(state)
    assert resumed.weight.item() == -2.0
    second.before_train()
    for value in values[2:]:
        put(resumed, value)
        second.after_step()
    for name, tensor in straight.model_weights().items():
        assert torch.equal(tensor, second.model_weights()[name]), name


def test_the_state_of_another_model_is_refused() -> None:
    _, average = averaged(0.5, 1.0)
    state = average.state_dict()
    del state["trained"]["weight"]
    with pytest.raises(ValueError, match="other weights are averaged: weight"):
        average.load_state_dict(state)


def config(folder: Path, *words: Any) -> Any:
    name = f"coco:{folder / 'shapes_val.json'}:{folder / 'shapes_val'}"
    settings = ["SOLVER.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0, "SOLVER.MAX_ITER", 3]
    settings += ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "OUTPUT_DIR", str(folder)]
    settings += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "SOLVER.EMA.ENABLED", True]
    return instseg.load_cfg(CONFIG, [*settings, *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, list[Tensor], Path]:
    """A trainer after its training, what its evaluations measured, and its folder.

    The weight at the centre of the first convolution stands for all.
    """
    folder = tmp_path_factory.mktemp("average")
    file = shapes.export("shapes_val", folder, limit=2)
    assert Path(file) == folder / "shapes_val.json"
    measured: list[Tensor] = []

    class Measured(Trainer):
        @classmethod
        def test(cls, cfg: Any, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
            measured.append(next(model.parameters()).detach().clone())
            results = super().test(cfg, model, evaluators)
            results["segm"]["AP"] = float(len(measured))  # each is better than the last
            return results

    words = ["TEST.EVAL_PERIOD", 1, "TEST.BEST_METRIC", "segm/AP", "MODEL.BACKBONE.FREEZE_AT", 0]
    trainer = Measured(config(folder, *words))
    trainer.train()
    assert "segm/AP" in flatten_results_dict(trainer._last_eval_results)
    return trainer, measured, folder


def test_evaluations_and_checkpoints_have_the_average(
    run: tuple[Trainer, list[Tensor], Path],
) -> None:
    trainer, measured, folder = run
    assert trainer.average is not None
    name = next(iter(dict(trainer.model.named_parameters())))
    average = trainer.average.model_weights()[name]
    assert len(measured) == 3 and torch.equal(measured[-1], average)
    weight = dict(trainer.model.named_parameters())[name]
    assert not torch.equal(weight, average)
    for file in ("model_final.pth", "best/model_best.pth"):
        assert torch.equal(
            torch.as_tensor(read_weights(str(folder / file))["model"][name]), average
        )


def test_plain_detectron2_loads_the_average(run: tuple[Trainer, list[Tensor], Path]) -> None:
    trainer, _, folder = run
    assert trainer.average is not None
    model = Trainer.build_model(trainer.cfg)
    DetectionCheckpointer(model).load(str(folder / "model_final.pth"))
    expected = trainer.average.model_weights()
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


def test_a_resumed_training_has_the_weights_and_the_average(
    run: tuple[Trainer, list[Tensor], Path],
) -> None:
    first, _, folder = run
    second = Trainer(config(folder, "MODEL.BACKBONE.FREEZE_AT", 0))
    second.resume_or_load(resume=True)
    assert first.average is not None and second.average is not None
    states = [x.model.state_dict() for x in (first, second)]
    averages = [x.average.model_weights() for x in (first, second)]
    for one, other in (states, averages):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert first.average.state_dict()["steps"] == second.average.state_dict()["steps"] == 3


def test_a_training_goes_on_as_it_began_with_or_without_an_average(
    run: tuple[Trainer, list[Tensor], Path],
) -> None:
    folder = run[2]
    without = ["SOLVER.EMA.ENABLED", False, "MODEL.BACKBONE.FREEZE_AT", 0]
    with pytest.raises(CheckpointError, match=r"it averages the weights; set .*ENABLED True"):
        Trainer(config(folder, *without)).resume_or_load(resume=True)
    trainer = Trainer(config(folder, *without))
    trainer.iter = 1
    trainer.checkpointer.save("model_0000001", iteration=1)
    with pytest.raises(CheckpointError, match=r"it does not average .*ENABLED False"):
        Trainer(config(folder)).resume_or_load(resume=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.EMA.DECAY", 1.0], "SOLVER.EMA.DECAY is 1.0; expected from 0 to below 1"),
        (
            ["SOLVER.EMA.ENABLED", True, "TEST.PRECISE_BN.ENABLED", True],
            "PRECISE_BN.ENABLED is True; expected False, as SOLVER.EMA.ENABLED",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(words: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        instseg.load_cfg(CONFIG, words)
