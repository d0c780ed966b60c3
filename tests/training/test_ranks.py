"""Two processes that train together: if one cannot go on, both stop within seconds."""

import math
import re
from pathlib import Path

import pytest

from instseg.checkpoint import read_weights
from tests.conftest import ROOT
from tests.support.forking import run_ranks

Outcomes = list[dict[str, str]]
SYSTEMS = sorted(
    path.relative_to(ROOT / "configs").as_posix()
    for path in (ROOT / "configs").glob("*/*_shapes*.yaml")
)


def run_both(module: str, *words: str) -> Outcomes:
    """The lines that two processes of ``tests.support.MODULE`` print, by their first words."""
    lines = [rank.stdout.splitlines() for rank in run_ranks(f"tests.support.{module}", *words)]
    return [dict(line.split(" ", 1) for line in output if " " in line) for output in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Outcomes:
    """The end of each scenario, for the first and the second rank."""
    return run_both("rank_scenarios", str(folder))


@pytest.fixture(scope="module")
def weights(folder: Path) -> Outcomes:
    """The sum of each system's weights, on the first and the second rank."""
    return run_both("rank_systems", str(folder), *SYSTEMS)


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_with_the_same_message(
    outcomes: Outcomes,
) -> None:
    assert outcomes[0]["nan"] == outcomes[1]["nan"]
    for part in ("TrainingError", "iteration 2", "rank 1: loss_fit = nan", "bad.png", "[soon]"):
        assert part in outcomes[0]["nan"]


def test_an_image_that_one_rank_cannot_read_stops_both_with_the_same_message(
    outcomes: Outcomes,
) -> None:
    assert outcomes[0]["image"] == outcomes[1]["image"]
    assert outcomes[0]["image"] == (
        "TrainingError: training cannot go on at iteration 2: rank 1: ImageError: cut.png: "
        "the file is truncated [soon]"
    )


def test_a_defect_on_one_rank_keeps_its_traceback_there_and_stops_the_other(
    outcomes: Outcomes,
) -> None:
    assert outcomes[1]["defect"] == "KeyError: 'proposal_boxes' [soon]"
    assert re.match(
        r"TrainingError: .* iteration 2: rank 1: KeyError: 'proposal_boxes' \[soon\]",
        outcomes[0]["defect"],
    )


def test_a_signal_to_one_rank_ends_both_after_the_same_iteration(
    outcomes: Outcomes, folder: Path
) -> None:
    assert outcomes[0]["signal"] == outcomes[1]["signal"] == "SystemExit: 143 [soon]"
    assert read_weights(folder / "model_0000002.pth")["iteration"] == 2


def test_both_ranks_have_the_same_average_of_the_weights(outcomes: Outcomes) -> None:
    assert outcomes[0]["average"] == outcomes[1]["average"]
    weight, average = map(float, outcomes[0]["average"].split())
    assert weight < average  # the weight falls in every iteration


def test_a_killed_rank_stops_the_other_within_seconds(outcomes: Outcomes) -> None:
    assert outcomes[0]["killed"].endswith("[soon]")
    assert "killed" not in outcomes[1]


@pytest.mark.parametrize("config", SYSTEMS)
def test_a_system_trains_where_one_rank_has_no_instance(weights: Outcomes, config: str) -> None:
    assert math.isfinite(float(weights[0][config]))
    assert weights[0][config] == weights[1][config]
