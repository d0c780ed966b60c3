"""The installer of Detectron2: what it refuses, what it builds, and when it does nothing."""

import base64
import csv
import hashlib
import io
import subprocess
import sys
import zipfile
from email import message_from_string
from importlib.util import find_spec
from pathlib import Path

import pip
import pytest

from instseg import install_detectron2 as installer

SCRIPT = Path(installer.__file__)


@pytest.fixture
def carrier(tmp_path: Path) -> tuple[Path, str]:
    """A LabGym wheel in miniature, and its SHA-256."""
    path = tmp_path / "labgym-3.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("LabGym/__init__.py", "raise ImportError('not Detectron2')\n")
        archive.writestr("LabGym/detectron2/__init__.py", '__version__ = "0.6"\n')
        archive.writestr(
            "LabGym/detectron2/modeling/__init__.py",
            "import LabGym.detectron2 as d\nfrom LabGym.detectron2.layers import nms\n",
        )
        archive.writestr("LabGym/detectron2/model_zoo/configs/Base.yaml", "VERSION: 2\n")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """An interpreter that has the standard library and no package but pip."""
    home = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    # A link is a hundred times as fast as an installation of pip.
    [packages] = home.glob("lib/python*/site-packages")
    (packages / "pip").symlink_to(Path(pip.__file__).parent)
    return str(home / "bin" / "python")


def script(python: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the installer as a script, without the network."""
    command = [python, str(SCRIPT), *map(str, arguments)]
    environment = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def test_a_corrupt_wheel_is_refused_with_both_hashes_and_its_size(carrier, tmp_path):
    path, sha256 = carrier
    path.write_bytes(path.read_bytes()[:-7] + b"garbage")
    actual_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(installer.InstallError) as refusal:
        installer.repack(path, tmp_path / "out", sha256)
    for part in (actual_sha256, sha256, f"{path.stat().st_size} bytes"):
        assert part in str(refusal.value)


def test_a_refused_wheel_leaves_nothing_behind(carrier, tmp_path):
    with pytest.raises(installer.InstallError):
        installer.repack(carrier[0], tmp_path / "out", "0" * 64)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_zip_is_refused_even_under_the_right_hash(tmp_path):
    path = tmp_path / "page.html"
    path.write_bytes(b"<html>sign in first</html>")
    with pytest.raises(installer.InstallError, match=r"page.html \(26 bytes\) is not a wheel"):
        installer.repack(path, tmp_path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_wheel_without_detectron2_is_refused(tmp_path):
    path = tmp_path / "labgym-4.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("LabGym/__init__.py", "")
    with pytest.raises(installer.InstallError, match="holds no LabGym/detectron2"):
        installer.repack(path, tmp_path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_the_repacked_wheel_speaks_of_detectron2_alone(carrier, tmp_path):
    with zipfile.ZipFile(installer.repack(carrier[0], tmp_path, carrier[1])) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert not [n for n, content in contents.items() if "LabGym" in n or b"LabGym" in content]
    assert contents["detectron2/modeling/__init__.py"] == (
        b"import detectron2 as d\nfrom detectron2.layers import nms\n"
    )


def test_the_repacked_wheel_keeps_the_data_files(carrier, tmp_path):
    with zipfile.ZipFile(installer.repack(carrier[0], tmp_path, carrier[1])) as archive:
        assert archive.read("detectron2/model_zoo/configs/Base.yaml") == b"VERSION: 2\n"


def test_the_record_of_the_repacked_wheel_lists_every_file_with_hash_and_size(carrier, tmp_path):
    info = "detectron2-0.6+864913f0.dist-info"
    with zipfile.ZipFile(installer.repack(carrier[0], tmp_path, carrier[1])) as archive:
        rows = list(csv.reader(io.StringIO(archive.read(f"{info}/RECORD").decode())))
        assert sorted(name for name, _, _ in rows) == sorted(archive.namelist())
        for name, recorded, size in rows:
            if name == f"{info}/RECORD":
                assert (recorded, size) == ("", "")
                continue
            content = archive.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
            assert (recorded, size) == ("sha256=" + digest.rstrip("="), str(len(content)))


def test_the_repacked_wheel_declares_the_requirements_of_upstream(carrier, tmp_path):
    wheel = installer.repack(carrier[0], tmp_path, carrier[1])
    assert wheel.name == "detectron2-0.6+864913f0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("detectron2-0.6+864913f0.dist-info/METADATA").decode()
    metadata = message_from_string(text)
    assert (metadata["Name"], metadata["Version"]) == ("detectron2", "0.6+864913f0")
    required = metadata.get_all("Requires-Dist") or []
    assert {"fvcore>=0.1.5,<0.1.6", "omegaconf>=2.1,<2.4", "pycocotools>=2.0.2"} <= set(required)
    assert len(required) == 15


def test_repacking_twice_gives_the_same_bytes(carrier, tmp_path):
    first = installer.repack(carrier[0], tmp_path / "a", carrier[1])
    second = installer.repack(carrier[0], tmp_path / "b", carrier[1])
    assert first.read_bytes() == second.read_bytes()


def test_pip_installs_the_repacked_wheel(carrier, tmp_path, bare_python):
    wheel = installer.repack(carrier[0], tmp_path, carrier[1])
    command = [bare_python, "-m", "pip", "install", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    code = "import detectron2; print(detectron2.__version__)"
    done = subprocess.run([bare_python, "-c", code], capture_output=True, text=True)
    assert done.stdout == "0.6\n"


@pytest.fixture
def other_detectron2(tmp_path, monkeypatch):
    """The folder of an installed Detectron2 that is nearly empty; nothing else can be installed."""
    folder = tmp_path / "detectron2"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text('__version__ = "0.7"\n')
    (folder / "data" / "__init__.py").write_text("from .catalog import DatasetCatalog\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    monkeypatch.setattr(installer, "run_pip", lambda *_: pytest.fail("pip was called"))
    return folder


def test_an_installed_detectron2_with_all_that_is_needed_is_left_alone(
    other_detectron2, monkeypatch, capsys
):
    monkeypatch.setattr(installer, "needed", lambda: [("detectron2.data", "DatasetCatalog")])
    assert installer.main([]) == 0
    assert capsys.readouterr().out == f"using detectron2 0.7 in {other_detectron2}\n"


@pytest.mark.parametrize(
    "lacking",
    [("detectron2.data", "MetadataCatalog"), ("detectron2.config", "configurable")],
)
def test_an_installed_detectron2_that_lacks_something_is_refused_by_its_name(
    other_detectron2, monkeypatch, capsys, lacking
):
    monkeypatch.setattr(
        installer, "needed", lambda: [("detectron2.data", "DatasetCatalog"), lacking]
    )
    assert installer.main([]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"detectron2 0.7 in {other_detectron2} lacks {'.'.join(lacking)}, which" in error
    assert "pip uninstall detectron2" in error


def test_the_detectron2_of_the_tests_has_everything_that_instseg_imports_from_it():
    names = installer.needed()
    assert ("detectron2.config", "configurable") in names
    assert ("detectron2.modeling", "META_ARCH_REGISTRY") in names
    assert installer.installed_detectron2()


def test_opencv_is_installed_only_where_there_is_none(monkeypatch):
    calls = []
    monkeypatch.setattr(installer, "run_pip", lambda purpose, arguments: calls.append(arguments))
    monkeypatch.setattr(installer, "installed_detectron2", lambda: "detectron2")
    assert installer.install("pypi", None, None) == ["using detectron2"]
    assert calls == []
    monkeypatch.setattr(installer, "find_spec", lambda name: None)
    lines = installer.install("pypi", None, Path("constraints.txt"))
    assert lines == ["using detectron2", "installed opencv-python-headless"]
    assert calls == [["install", "--constraint", "constraints.txt", installer.OPENCV]]


@pytest.mark.parametrize(
    ("reason", "status"),
    [("libGL.so.1: cannot open shared object file: No such file", 0), ("numpy is broken", 1)],
)
def test_an_opencv_without_its_system_library_is_replaced_by_the_headless_one(
    monkeypatch, capsys, reason, status
):
    calls = []
    monkeypatch.setattr(installer, "run_pip", lambda purpose, arguments: calls.append(arguments))
    monkeypatch.setattr(installer, "installed_detectron2", lambda: "detectron2")
    failed = subprocess.CompletedProcess([], 1, "", f"Traceback:\nImportError: {reason}\n")
    monkeypatch.setattr(installer.subprocess, "run", lambda *_, **__: failed)
    assert installer.main([]) == status
    printed = capsys.readouterr()
    assert reason in (printed.err if status else printed.out)
    again = ["install", "--no-deps", "--force-reinstall", installer.OPENCV]
    assert calls == ([] if status else [again])


def test_an_environment_without_pip_uses_the_pip_that_comes_with_python(tmp_path):
    home = tmp_path / "uv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    code = "import install_detectron2 as i; i.run_pip('list', ['--version']); print('ran')"
    done = subprocess.run(
        [home / "bin" / "python", "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SCRIPT.parent)},
    )
    assert done.stdout == "ran\n", done.stderr


def test_python_without_any_pip_is_one_line_that_says_what_to_type(monkeypatch, capsys):
    monkeypatch.setattr(installer, "find_spec", lambda name: None)
    assert installer.main([]) == 1
    assert "has no pip; type: uv pip install pip" in capsys.readouterr().err


def test_a_mere_folder_called_detectron2_does_not_count_as_installed(tmp_path, bare_python):
    (tmp_path / "detectron2").mkdir()
    command = [bare_python, "-c", "import install_detectron2 as i; print(i.installed_detectron2())"]
    environment = {"PYTHONPATH": f"{tmp_path}:{SCRIPT.parent}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "None\n"


def test_a_substituted_download_is_one_line_and_exit_1_and_installs_nothing(carrier, bare_python):
    done = script(bare_python, "--wheel", carrier[0])
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert carrier[1] in done.stderr and installer.CARRIER_SHA256 in done.stderr
    listing = [bare_python, "-m", "pip", "list"]
    assert "detectron2" not in subprocess.run(listing, capture_output=True, text=True).stdout


def test_a_missing_wheel_file_is_one_line_and_exit_1(tmp_path, capsys):
    words = ["--wheel", str(tmp_path / "absent.whl"), "--build-wheel", str(tmp_path)]
    assert installer.main(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "absent.whl: No such file" in error


def test_a_wheel_to_repack_goes_with_pypi_alone(capsys):
    with pytest.raises(SystemExit) as end:
        installer.main(["--source", "github", "--wheel", "labgym.whl"])
    assert end.value.code == 2
    assert "--wheel goes with --source pypi" in capsys.readouterr().err


@pytest.fixture
def no_index(monkeypatch):
    """Pip as on a machine without network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def test_a_machine_without_network_is_told_of_the_wheel_option(no_index, tmp_path, capsys):
    assert installer.main(["--build-wheel", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No matching distribution found for labgym==3.1.2" in error
    assert "--wheel FILE" in error


def test_a_substituted_download_is_one_line_and_leaves_no_wheel(
    carrier, no_index, tmp_path, monkeypatch, capsys
):
    path = carrier[0]
    info = "labgym-3.1.2.dist-info"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: LabGym\nVersion: 3.1.2\n"
        )
        archive.writestr(f"{info}/WHEEL", installer.WHEEL)
        archive.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    assert installer.main(["--build-wheel", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sha256 in error and installer.CARRIER_SHA256 in error
    assert not (tmp_path / "out").exists()


def test_a_wheel_of_the_github_route_is_built_from_the_pinned_commit(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(installer, "run_pip", lambda purpose, arguments: calls.append(arguments))
    assert installer.main(["--source", "github", "--build-wheel", str(tmp_path)]) == 0
    [arguments] = calls
    assert arguments[0] == "wheel" and str(tmp_path) in arguments
    assert arguments[-1].endswith("detectron2.git@864913f0e57e87a75c8cc0c7d79ecbd774fc669b")
    assert f"into {tmp_path}" in capsys.readouterr().out


def test_the_github_route_asks_pip_for_the_pinned_commit(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(installer, "run_pip", lambda purpose, arguments: calls.append(arguments))
    monkeypatch.setattr(installer, "installed_detectron2", lambda: None)
    assert find_spec("cv2")
    assert installer.main(["--source", "github", "--constraint", "constraints.txt"]) == 0
    [arguments] = calls
    assert arguments[:3] == ["install", "--constraint", "constraints.txt"]
    assert arguments[-1].endswith("detectron2.git@864913f0e57e87a75c8cc0c7d79ecbd774fc669b")


def test_the_module_runs_with_python_m(tmp_path):
    command = [sys.executable, "-m", "instseg.install_detectron2", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert "--source {pypi,github}" in done.stdout


@pytest.mark.network
def test_the_pinned_wheel_on_pypi_becomes_a_detectron2_wheel(tmp_path):
    command = [sys.executable, str(SCRIPT), "--build-wheel", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(tmp_path / "detectron2-0.6+864913f0-py3-none-any.whl") as archive:
        names = archive.namelist()
    assert "detectron2/modeling/meta_arch/rcnn.py" in names
    assert sum(name.endswith(".yaml") for name in names) == 92
