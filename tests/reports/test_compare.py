"""``instseg compare``: what trainings reached, how they differ, and files that are damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from instseg import cli


def training(folder: Path, name: str, records: list[dict[str, Any]] | str, config: str) -> str:
    """An OUTPUT_DIR."""
    run = folder / name
    run.mkdir()
    lines = records if isinstance(records, str) else "".join(f"{json.dumps(r)}\n" for r in records)
    (run / "metrics.json").write_text(lines)
    (run / "config.yaml").write_text(config)
    return str(run)


CONFIG = "OUTPUT_DIR: {}\nSOLVER:\n  MAX_ITER: 40\n  BASE_LR: {}\n  STEPS: [20, 30]\nVERSION: 2\n"
RECORDS = [
    {"iteration": 19, "time": 0.5, "total_loss": 2.0},
    {"iteration": 19, "segm/AP": 30.0, "segm/AP50": 50.0, "leaves/|DiC|": 3.0, "bbox/APl": None},
    {"iteration": 39, "time": 1.0, "total_loss": 1.0},
    {"iteration": 40, "segm/AP": 25.0, "segm/AP50": 60.0, "leaves/|DiC|": 1.0},
]


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two trainings; the second was resumed at iteration 20, and is not at its end yet."""
    second = [RECORDS[0], RECORDS[2] | {"iteration": 21}, RECORDS[2] | {"iteration": 21}]
    second.append({"iteration": 21, "segm/AP": float("nan")})
    return [
        training(tmp_path, "a", RECORDS, CONFIG.format("x", 0.01)),
        training(tmp_path, "b", second, CONFIG.format("y", 0.02) + "SEED: 3\n"),
    ]


def test_iterations_time_and_best_and_last_values_are_those_of_the_log(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", *runs, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    first, second = content["runs"]
    assert (first["run"], first["iterations"], first["max_iterations"]) == (runs[0], 40, 40)
    assert first["seconds"] == 20 * 0.5 + 20 * 1.0
    assert first["metrics"] == {"segm/AP": {"best": 30.0, "best_iteration": 19, "last": 25.0}}
    assert (second["iterations"], second["seconds"]) == (22, 20 * 0.5 + 2 * 1.0)
    assert second["metrics"] == {}
    assert content["different_keys"] == {"SEED": [None, 3], "SOLVER.BASE_LR": [0.01, 0.02]}


def test_metrics_that_are_asked_for_are_shown_the_lowest_where_that_is_best(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", *runs, "--metrics", "segm/AP50,leaves/|DiC|"]
    assert cli.main([*words, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["runs"][0]["metrics"]
    assert {name: value["best"] for name, value in metrics.items()} == {
        "segm/AP50": 60.0,
        "leaves/|DiC|": 1.0,
    }


def test_the_table_has_a_row_for_each_run_and_for_each_key_that_differs(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith(runs[0]))
    assert row.split() == [runs[0], "40", "of", "40", "0:00:30", "30.0000", "19", "25.0000"]
    (row,) = (line for line in lines if line.startswith(runs[1]))
    assert row.split() == [runs[1], "22", "of", "40", "0:00:12", "-", "-", "-"]
    assert [line.split() for line in lines[-2:]] == [
        ["SEED", "-", "3"],
        ["SOLVER.BASE_LR", "0.01", "0.02"],
    ]


def test_runs_that_differ_in_nothing_say_so(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", runs[0], runs[0]]) == 0
    assert "no key of config.yaml differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("metrics.json", None, "metrics.json cannot be read: No such file"),
        ("metrics.json", "", "metrics.json holds no record of a training"),
        ("metrics.json", '{"made_by": "x"}', "metrics.json holds no record of a training"),
        (
            "metrics.json",
            '{"iteration": 9, "time": 1}\n{"itera',
            "metrics.json: 1 of 2 lines are damaged and left out, first line 2",
        ),
        ("config.yaml", None, "config.yaml cannot be read: No such file"),
        ("config.yaml", "a: [", "config.yaml is damaged: while parsing"),
        ("config.yaml", "!!python/object/apply:os.getcwd []", "config.yaml is damaged: could not"),
        ("config.yaml", "7", "config.yaml holds no configuration"),
        ("config.yaml", "\x00", "config.yaml is damaged"),
    ],
)
def test_a_damaged_file_is_one_line_and_the_rest_is_shown(
    runs: list[str],
    file: str,
    content: str | None,
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path(runs[1], file)
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert cli.main(["compare", *runs]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert reason in line and line.startswith(runs[1])
    assert "30.0000" in printed.out and runs[1] in printed.out


def test_a_folder_that_is_none_gives_a_line_for_each_file(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", runs[0], "nowhere"]) == 1
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.err.splitlines()] == [
        str(Path("nowhere", name)) for name in ("metrics.json", "config.yaml")
    ]
    assert "30.0000" in printed.out
