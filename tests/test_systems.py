"""Every project's example, untrained and small, passes every check of the contract."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import instseg
from instseg import Predictor, VideoPredictor, cli
from instseg.errors import CheckpointError
from instseg.testing import CHECKS, PHOTO, SMALL, System, check_system
from tests.support.own_projects import PROJECTS
from tests.support.predict_common import results

SYSTEMS: dict[str, tuple[Any, ...]] = {
    project.example: project.any_score + project.fast + project.narrow for project in PROJECTS
}
# The first of each lineage, whose code gives the masks of its descendants.
LINEAGES = [project.example for project in PROJECTS if not project.ancestors]


def build(name: str, *overrides: Any) -> Predictor:
    return System(name, SYSTEMS[name]).build(*overrides)


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request: pytest.FixtureRequest) -> System:
    return System(request.param, SYSTEMS[request.param])


@pytest.mark.parametrize("check", CHECKS)
def test_a_system_keeps_the_contract(system: System, check: Callable[[System], None]) -> None:
    check(system)


def test_a_system_that_breaks_the_contract_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "discriminative_loss/discriminative_loss_shapes.yaml"
    key = "MODEL.DISCRIMINATIVE_LOSS.NUM_CLASSES"
    count = instseg.load_cfg(name).MODEL.DISCRIMINATIVE_LOSS.NUM_CLASSES

    def too_many(model: torch.nn.Module, inputs: Any, outputs: list[dict[str, Any]]) -> None:
        for output in outputs:
            output["instances"].pred_classes += count

    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *given: (
            too_many(module, *given) if type(module).__name__ == "DiscriminativeLoss" else None
        )
    )
    with hook, pytest.raises(AssertionError, match=f"with {key} {count}"):
        check_system(name, SYSTEMS[name])


def test_weights_that_are_not_finite_are_an_error_in_every_frame() -> None:
    video = VideoPredictor(build("yolact_edge/yolact_edge_shapes_video.yaml"))
    assert len(video(PHOTO)["instances"])
    for parameter in video.predictor.model.flow_net.parameters():
        parameter.data.fill_(torch.nan)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="values that are not finite"):
            video(PHOTO)


def test_a_folder_with_bad_files_gives_a_line_for_each_and_the_results_of_the_rest(
    system: System, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": system.predictor.model.state_dict()}, tmp_path / "weights.pth")
    folder = tmp_path / "in"
    folder.mkdir()
    for file in ("a.png", "d.jpg"):
        Image.fromarray(PHOTO).save(folder / file)
    (folder / "b.jpg").write_text("<html>404</html>")
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:200])
    name = system.config_file
    arguments = ["--config-file", name, "--weights", str(tmp_path / "weights.pth")]
    arguments += ["--input", str(folder), "--output", str(tmp_path / "out"), "--confidence", "0"]
    overrides = [*SMALL, *system.overrides]
    assert cli.main(["predict", *arguments, "--", *map(str, overrides)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert sum(f"{folder / 'b.jpg'}: is HTML" in line for line in lines) == 1
    assert sum(f"{folder / 'c.png'}: cannot be decoded" in line for line in lines) == 1
    files = {record["file_name"] for record in results(tmp_path / "out")}
    assert files == {str(folder / "a.png"), str(folder / "d.jpg")}
