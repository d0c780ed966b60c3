"""The ``instseg`` command itself, and ``instseg shapes export``."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pycocotools.coco import COCO

import instseg
from instseg import cli
from instseg.projects import converters


def test_the_command_leaves_logging_as_it_was(tmp_path: Path) -> None:
    logger = logging.getLogger("instseg")
    before = logger.level, logger.propagate, list(logger.handlers)
    assert cli.main(["shapes", "export", str(tmp_path), "--limit", "0"]) == 2
    assert before == (logger.level, logger.propagate, list(logger.handlers))


def test_the_installed_command_writes_one_line_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "instseg.cli", "predict", "--config-file", "x", "--input", "y"]
    run = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2
    assert run.stderr == "error: nothing to predict on: --input y does not exist\n"
    assert run.stdout == ""


def test_help_needs_no_requirement_but_python(tmp_path: Path) -> None:
    for name in ("torch", "detectron2", "cv2", "supervision", "PIL", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('imported')")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(cli.__file__).parents[1]}",
    }
    run = subprocess.run(
        [sys.executable, "-m", "instseg.cli", "predict", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert "--instance-masks" in run.stdout


def test_a_missing_requirement_is_named_with_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "detectron2.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'detectron2'\", name='detectron2')"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(cli.__file__).parents[1]}",
    }
    run = subprocess.run(
        [sys.executable, "-m", "instseg.cli", "shapes", "export", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: instseg needs detectron2, which is not installed; type:")


@pytest.mark.parametrize(
    ("missing", "module", "reason"),
    [
        ("torch", "inference.predictor", "needs torch, which is .*; type: pip install torch=="),
        ("cv2", "data.pillow_images", "needs cv2, which is .*; type: python -m instseg.install_d"),
        ("numpy", "data.image_arrays", "import of numpy halted"),
    ],
)
def test_what_python_finds_missing_is_named_with_what_to_type_if_instseg_asks_for_it(
    missing: str, module: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ = instseg.Predictor
    for name in {"inference.predictor", module}:
        monkeypatch.delitem(sys.modules, f"instseg.{name}")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=reason):
        _ = instseg.Predictor


def test_a_module_of_ours_that_is_missing_is_a_defect_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "instseg.data.readers.nuclei", None)
    with pytest.raises(ModuleNotFoundError, match=r"instseg\.data\.readers\.nuclei"):
        cli.main(["nuclei", "build", str(tmp_path), str(tmp_path / "out")])


def test_output_into_a_closed_pipe_ends_without_a_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m instseg.cli shapes export {tmp_path} --limit 1"
    run = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr and "BrokenPipe" not in run.stderr


def test_an_export_that_cannot_be_written_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["shapes", "export", str(tmp_path / "file" / "out"), "--limit", "1"]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_shapes_are_exported_as_coco_json_and_png(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(["shapes", "export", str(tmp_path), "--split", "shapes_train", "--limit", "2"])
        == 0
    )
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "shapes_train.json"
    coco = COCO(str(path))
    assert len(coco.imgs) == 2
    for image in coco.imgs.values():
        assert (tmp_path / "shapes_train" / image["file_name"]).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "circles"], "no built-in data set 'circles'"),
        (["--limit", "0"], "--limit is 0; expected at least 1"),
        (["--limit", "many"], "invalid int value: 'many'"),
    ],
)
def test_a_mistake_in_an_export_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["shapes", "export", str(tmp_path), *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_name_that_is_too_long_for_a_file_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "a" * 300
    for arguments in (["yolact", "in.pth", name], ["yolact", name, "out"]):
        assert cli.main(["convert", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO")]
    assert len(errors) == 2
    assert all(line.startswith("error: ") for line in errors)


def test_the_help_of_convert_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert set(converters()) <= set(words)


def test_no_help_needs_torch() -> None:
    """Formats of weights are named without importing the projects, which takes seconds."""
    code = (
        "import sys; from instseg import cli\n"
        "try: cli.main(['convert', '--help'])\n"
        "finally: print({'torch', 'detectron2', 'cv2'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "set()"


def test_an_unknown_format_is_one_line_with_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["convert", "paper", "in.pth", "out"]) == 2
    words = f"there is no converter for 'paper'; choose one of {', '.join(converters())}"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {words}"
