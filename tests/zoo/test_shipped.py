"""The manifest of shipped models: what is read, what is refused, and what ``zoo/`` holds."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from instseg import shipped
from instseg.config.nodes import load_cfg
from instseg.errors import CheckpointError
from instseg.projects import projects
from instseg.shipped import Measurement, ShippedModel, shipped_model, shipped_models
from tests.support import tiny_zoo

MIB = 2**20


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    tiny_zoo.make(folder)
    return folder


def faults(folder: Path) -> list[str]:
    """What is wrong with the files and entries of a folder of shipped models."""
    models = shipped_models(folder)
    titles = {project.name for project in projects()}
    messages = []
    for model in models:
        content = (folder / model.file).read_bytes()
        limit = 3 if model.name.endswith("_shapes") else 6
        if hashlib.sha256(content).hexdigest() != model.sha256:
            messages.append(f"{model.file} has another hash")
        if len(content) != model.size:
            messages.append(f"{model.file} has another size")
        if len(content) > limit * MIB:
            messages.append(f"{model.file} has more than {limit} MiB")
        if model.system not in titles:
            messages.append(f"{model.name}: there is no system {model.system}")
        if not model.check or not model.measurements:
            messages.append(f"{model.name} was not measured")
    listed = {model.file for model in models}
    present = {path.name for path in folder.glob("*.safetensors")}
    messages += [f"no model has the file {name}" for name in sorted(present - listed)]
    if sum(model.size for model in models) > 60 * MIB:
        messages.append("there are more than 60 MiB")
    return messages


def test_every_shipped_file_is_the_one_of_the_manifest() -> None:
    assert faults(shipped.zoo_folder()) == []


def test_every_shipped_configuration_can_be_loaded() -> None:
    for model in shipped_models():
        assert load_cfg(model.address).MODEL.WEIGHTS == model.address


def test_the_checker_finds_nothing_wrong_with_a_good_folder(zoo: Path) -> None:
    assert faults(zoo) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"sha256": "0" * 64}, "tiny_shapes.safetensors has another hash"),
        ({"size": 1}, "tiny_shapes.safetensors has another size"),
        ({"system": "resnest"}, "tiny_shapes: there is no system resnest"),
        ({"check": {}}, "tiny_shapes was not measured"),
    ],
)
def test_the_checker_sees_a_wrong_entry(
    tmp_path: Path, zoo: Path, change: dict[str, Any], fault: str
) -> None:
    file = tmp_path / "tiny_shapes.safetensors"
    file.write_bytes((zoo / file.name).read_bytes())
    shipped.write_manifest(tmp_path, [tiny_zoo.entry(file, **change)])
    assert faults(tmp_path) == [fault]


def test_the_checker_sees_a_file_that_no_model_has_and_a_large_one(tmp_path: Path) -> None:
    large = tmp_path / "large.safetensors"
    large.write_bytes(bytes(3 * MIB + 1))
    (tmp_path / "other.safetensors").touch()
    shipped.write_manifest(tmp_path, [tiny_zoo.entry(large)])
    expected = ["large.safetensors has more than 3 MiB", "no model has the file other.safetensors"]
    assert faults(tmp_path) == expected


def test_a_written_manifest_is_read_as_the_same_models(tmp_path: Path, zoo: Path) -> None:
    (model,) = shipped_models(zoo)
    shipped.write_manifest(tmp_path, [model])
    assert shipped_models(tmp_path) == (model,)
    assert isinstance(model.measurements[0], Measurement)
    assert model.overrides == tiny_zoo.OVERRIDES


def test_a_number_is_known_by_its_name(zoo: Path) -> None:
    (model,) = shipped_models(zoo)
    assert (model.value("ms"), model.value("contest/AP")) == (5.6, None)
    assert model.first_of(shipped.RESULTS) == ("segm/AP", 12.34)
    assert model.first_of(["contest/AP"]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "AB"}, r"models\[0\].sha256 is 'AB'; expected 64 hexadecimal digits"),
        ({"file": "../a.safetensors"}, r"models\[0\].file is .*; expected NAME.safetensors"),
        ({"file": "a.pth"}, r"models\[0\].file is 'a.pth'; expected NAME.safetensors"),
        ({"size": True}, r"models\[0\].size is True; expected a whole number"),
        ({"minutes": float("nan")}, r"models\[0\].minutes is nan; expected a number of minutes"),
        ({"overrides": ["A"]}, r"models\[0\].overrides is \['A'\]; expected \[KEY, VALUE"),
        ({"overrides": ["A", 1]}, r"models\[0\].overrides is .* all texts"),
        ({"classes": []}, r"models\[0\].classes is \[\]; expected a list of names"),
        ({"check": {"segm/AP": "1"}}, r"models\[0\].check is .*; expected \{\"NAME\": NUMBER"),
        ({"measurements": [{"values": {}}]}, r"models\[0\].measurements is .*; expected \[\{"),
        ({"licence": " "}, r"models\[0\].licence is ' '; expected a line of text"),
        ({"colour": "red"}, r"models\[0\]: the key 'colour' is unknown"),
    ],
)
def test_an_entry_with_another_kind_of_value_is_refused_by_its_key(
    tmp_path: Path, zoo: Path, changes: dict[str, Any], message: str
) -> None:
    content = tiny_zoo.manifest_of(zoo)
    content["models"][0].update(changes)
    (tmp_path / shipped.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        shipped_models(tmp_path)


def test_an_entry_without_one_of_the_keys_is_refused(tmp_path: Path, zoo: Path) -> None:
    content = tiny_zoo.manifest_of(zoo)
    del content["models"][0]["licence"]
    (tmp_path / shipped.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"models\[0\]: the key 'licence' is missing"):
        shipped_models(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", r'expected \{"models": \[...\]\}, found \[\]'),
        ('{"models": {}}', r'expected \{"models": \[...\]\}'),
        ('{"models": [1]}', r"models\[0\] is 1; expected an object"),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / shipped.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        shipped_models(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    expected = f"{tmp_path / shipped.MANIFEST}: cannot be read: No such file"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        shipped_models(tmp_path)


def test_two_models_of_one_name_are_refused(tmp_path: Path, zoo: Path) -> None:
    (model,) = shipped_models(zoo)
    shipped.write_manifest(tmp_path, [model, model])
    with pytest.raises(CheckpointError, match="two models are called tiny_shapes"):
        shipped_models(tmp_path)


def test_an_unusable_entry_is_not_written(tmp_path: Path, zoo: Path) -> None:
    (model,) = shipped_models(zoo)
    broken = ShippedModel(**{**vars(model), "commit": "main"})
    with pytest.raises(CheckpointError, match="commit is 'main'; expected 7 to 40 hex"):
        shipped.write_manifest(tmp_path, [broken])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [("tiny_shape", "did you mean tiny_shapes?"), ("zebra", "there are tiny_shapes")],
)
def test_an_unknown_name_is_refused_with_those_that_are_close(
    monkeypatch: pytest.MonkeyPatch, zoo: Path, name: str, hint: str
) -> None:
    tiny_zoo.ship(monkeypatch, zoo)
    with pytest.raises(CheckpointError, match=re.escape(f"called '{name}'; {hint}")):
        shipped_model(name)


def test_without_any_model_the_manifest_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped.write_manifest(tmp_path, [])
    tiny_zoo.ship(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match="called 'a'; .*manifest.json lists none"):
        shipped_model("a")
