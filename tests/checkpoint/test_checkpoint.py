"""Weights go there and back, and only into models that they belong to."""

import hashlib
import logging
import pickle
import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from instseg.categories import Categories
from instseg.checkpoint import Checkpointer, read_weights, save_safetensors
from instseg.checkpoint.parts import split_options
from instseg.errors import CheckpointError
from tests.support.forking import run_ranks

PAGE = b"<!DOCTYPE html><html><body>404</body></html>"


def net(classes: int = 3, seed: int = 0) -> nn.Sequential:
    """Eleven tensors that a file can initialise, two of which depend on the number of classes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 4, 3),
            norm=nn.BatchNorm2d(4),
            body=nn.Conv2d(4, 4, 3),
            tail=nn.Conv2d(4, 4, 3, bias=False),
            cls_score=nn.Linear(4, classes),
        )
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_after_a_truncated_file_the_same_object_loads_a_good_one(tmp_path):
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    torch.save(net(seed=1).state_dict(), good)
    bad.write_bytes(good.read_bytes()[:1000])
    model = net()
    checkpointer = Checkpointer(model)
    with pytest.raises(CheckpointError, match=r"bad.pth is corrupt \(1000 bytes\)"):
        checkpointer.load(str(bad))
    checkpointer.load(str(good))
    assert same(model, net(seed=1))


def test_loading_logs_one_summary_of_what_was_initialised(tmp_path, caplog):
    state = net().state_dict()
    del state["body.bias"]
    state["neck.weight"] = torch.ones(1)
    torch.save(state, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, "instseg"):
        Checkpointer(net(classes=5)).load(str(tmp_path / "a.pth"))
    (line,) = [r.message for r in caplog.records if "initialised" in r.message]
    assert "8 of 11 tensors" in line and "73%" in line
    assert "1 missing, 1 unexpected, 2 of another shape" in line
    assert "missing in the file: body.bias" in line and "unknown to the model: neck.weight" in line
    assert "cls_score.weight (3, 4) in the file, (5, 4) here" in line
    assert "number of classes" in line


def test_another_architecture_is_refused_and_the_model_stays_as_it_was(tmp_path):
    torch.save({"stem.weight": torch.ones(4, 3, 3, 3), "head.w": torch.ones(2)}, tmp_path / "a.pth")
    model = net()
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(model).load(str(tmp_path / "a.pth"))
    for part in ("1 of 11 tensors", "stem.bias", "head.w", "less than half", "--allow-partial"):
        assert part in str(caught.value)
    assert same(model, net())


def test_allow_partial_goes_on_with_a_loud_warning(tmp_path, caplog):
    torch.save({"stem.weight": torch.ones(4, 3, 3, 3)}, tmp_path / "a.pth")
    model = net()
    with caplog.at_level(logging.WARNING, "instseg"):
        Checkpointer(model, allow_partial=True).load(str(tmp_path / "a.pth"))
    assert "MOST OF THE MODEL STAYS RANDOM" in caplog.text
    assert model.stem.weight.eq(1).all()


def test_exactly_half_of_the_tensors_is_enough(tmp_path):
    torch.save({"weight": torch.ones(1, 2)}, tmp_path / "a.pth")
    model = nn.Linear(2, 1)
    Checkpointer(model).load(str(tmp_path / "a.pth"))
    assert model.weight.eq(1).all()


def test_a_tensor_with_two_names_counts_as_initialised_through_either(tmp_path, caplog):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    state = model.state_dict()
    del state["b.weight"]
    torch.save(state, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, "instseg"):
        Checkpointer(model).load(str(tmp_path / "a.pth"))
    assert "4 of 4 tensors" in caplog.text


def test_frozen_norms_do_not_ask_for_statistics_that_were_folded_into_the_weights(tmp_path, caplog):
    torch.save({"0.weight": torch.full((4,), 2.0), "0.bias": torch.ones(4)}, tmp_path / "a.pth")
    with caplog.at_level(logging.INFO, "instseg"):
        Checkpointer(nn.Sequential(FrozenBatchNorm2d(4))).load(str(tmp_path / "a.pth"))
    assert "2 of 2 tensors" in caplog.text


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_number_are_refused_by_name(tmp_path, dtype):
    state = net().state_dict()
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pth")
    Checkpointer(net()).load(str(tmp_path / "half.pth"))
    torch.save({**state, "body.weight": state["body.weight"].to(dtype)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"a.pth has body.weight as {dtype}, the model as "):
        Checkpointer(net()).load(str(tmp_path / "a.pth"))


def test_names_are_matched_by_suffix_when_the_path_asks_for_it(tmp_path):
    torch.save(net(seed=1).state_dict(), tmp_path / "a.pth")
    model = nn.ModuleDict({"backbone": net()})
    Checkpointer(model).load(f"{tmp_path / 'a.pth'}?matching_heuristics=True")
    assert same(model["backbone"], net(seed=1))


@pytest.fixture
def system(tmp_path) -> Path:
    trunk = nn.ModuleDict({"bottom_up": net(seed=1)})
    parts = nn.ModuleDict({"trunk": trunk, "head": net(seed=2), "last": nn.Linear(2, 5)})
    Checkpointer(parts, str(tmp_path), categories=Categories.of_names("abc")).save("m")
    return tmp_path / "m.pth"


def test_a_part_of_one_model_starts_the_same_part_of_another(system):
    model = nn.ModuleDict({"backbone": net(), "top": nn.ModuleDict({"last": nn.Linear(3, 5)})})
    before = model["top"]["last"].weight.clone()
    Checkpointer(model).load(f"{system}?part=trunk.bottom_up")
    assert same(model["backbone"], net(seed=1))
    assert model["top"]["last"].weight.equal(before)
    # The part of the same name comes first, though another one is like it.
    model = nn.ModuleDict({"head": net(), "other": net()})
    Checkpointer(model).load(f"{system}?part=head")
    assert same(model["head"], net(seed=2)) and same(model["other"], net())


def test_a_part_is_never_divided_among_parts_of_the_model(system):
    one, other = net(), net()
    divided = nn.ModuleDict({"x": nn.ModuleDict({"stem": one.stem}), "y": other})
    del other.stem
    Checkpointer(divided).load(f"{system}?part=head")
    assert same(one.stem, net().stem) and same(other.body, net(seed=2).body)


@pytest.mark.parametrize(
    ("model", "part", "message"),
    [
        (net(), "trunk.top", "m.pth has no part 'trunk.top'; it has head.body, head.cls_score, "),
        (net(), "", "expected one part of a model, such as .*m.pth.part=backbone"),
        (net(), "head&part=trunk", "expected one part of a model"),
        (nn.ModuleDict({"a": net(), "b": net()}), "head", "has no part, or two, with the tensors"),
        (nn.ModuleDict({"other": nn.Linear(3, 3)}), "head", "has no part, or two, with the tensor"),
        (nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3)}), "head", "less than half of 'head' fits this"),
    ],
)
def test_a_part_that_cannot_be_told_is_refused(model, part, message, system):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(model, allow_partial=True).load(f"{system}?part={part}")
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_a_part_beside_other_words_of_a_query_is_the_servers():
    assert split_options("https://h/f?id=7&part=2") == ("https://h/f?id=7&part=2", {})
    assert split_options("https://h/f?id=7&matching_heuristics=True")[0] == "https://h/f?id=7"


def test_another_number_of_classes_is_told_also_when_matching_by_suffix(tmp_path, caplog):
    torch.save(net(classes=80).state_dict(), tmp_path / "a.pth")
    model = nn.ModuleDict({"backbone": net()})
    with caplog.at_level(logging.INFO, "instseg"):
        Checkpointer(model).load(f"{tmp_path / 'a.pth'}?matching_heuristics=True")
    assert "backbone.cls_score.bias (80,) in the file, (3,) here" in caplog.text
    assert "number of classes" in caplog.text


def test_other_class_names_in_the_file_are_warned_about(tmp_path, caplog):
    Checkpointer(net(), str(tmp_path), categories=Categories.of_names("abc")).save("m")
    with caplog.at_level(logging.WARNING, "instseg"):
        Checkpointer(net(), categories=Categories.of_names("bac")).load(str(tmp_path / "m.pth"))
    assert "trained for classes a, b, c, but these are b, a, c" in caplog.text


def test_names_that_fit_several_modules_are_refused(tmp_path):
    torch.save(net().state_dict(), tmp_path / "a.pth")
    model = nn.ModuleDict({"teacher": net(), "student": net()})
    with pytest.raises(CheckpointError, match="names in .*a.pth.* cannot be matched: .*multiple"):
        Checkpointer(model).load(f"{tmp_path / 'a.pth'}?matching_heuristics=True")


def test_class_names_that_cannot_be_used_are_warned_about(tmp_path, caplog):
    torch.save({"model": net(seed=1).state_dict(), "class_names": "abc"}, tmp_path / "a.pth")
    model = net()
    Checkpointer(model, categories=Categories.of_names("abc")).load(str(tmp_path / "a.pth"))
    assert same(model, net(seed=1))
    assert "class_names in the checkpoint is no list of names; they are not used" in caplog.text


def test_a_caffe2_backbone_gets_the_names_of_detectron2(tmp_path):
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 2, 1, bias=False)))

    weight = np.ones((2, 3, 1, 1), np.float32)
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"conv1_w": weight, "pred_w": weight}, protocol=2))
    model = Backbone()
    Checkpointer(model).load(str(path))
    assert model.stem.conv1.weight.eq(1).all()


def test_a_pkl_of_a_backbone_is_matched_by_suffixes_as_detectron2_converts_it(tmp_path):
    content = {
        "model": {name: value.numpy() for name, value in net(seed=1).state_dict().items()},
        "__author__": "torchvision",
        "matching_heuristics": True,
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    model = nn.ModuleDict({"backbone": net()})
    Checkpointer(model).load(str(tmp_path / "a.pkl"))
    assert same(model["backbone"], net(seed=1))


def test_saved_and_loaded_weights_are_bit_identical(tmp_path):
    Checkpointer(net(seed=1), str(tmp_path)).save("m")
    model = net()
    Checkpointer(model).load(str(tmp_path / "m.pth"))
    assert same(model, net(seed=1))


def test_detectron2_loads_what_we_save(tmp_path):
    checkpointer = Checkpointer(net(seed=1), str(tmp_path), categories=Categories.of_names("a"))
    checkpointer.save("m", iteration=7)
    model = net()
    extra = DetectionCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert same(model, net(seed=1)) and extra["iteration"] == 7


def test_categories_travel_with_the_weights(tmp_path):
    categories = Categories((7, 3), ("circle", "square"))
    Checkpointer(net(), str(tmp_path), categories=categories).save("m")
    assert Categories.of_checkpoint(read_weights(tmp_path / "m.pth")) == categories


def test_safetensors_keep_no_metadata_under_the_name_of_the_weights(tmp_path):
    with pytest.raises(ValueError, match="metadata cannot hold 'model'"):
        save_safetensors(tmp_path / "a.safetensors", net().state_dict(), {"model": 1})
    assert not list(tmp_path.iterdir())


def test_nothing_is_saved_where_saving_is_off(tmp_path):
    Checkpointer(net(), str(tmp_path), save_to_disk=False).save("m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_safetensors_give_tensors_and_metadata_back_unchanged(tmp_path, dtype):
    whole = (torch.randn(4, 6) * 10).to(dtype)
    state = {"whole": whole, "view": whole[1:3], "turned": whole.t(), "scalar": whole[0, 0]}
    state["empty"] = whole[:0]
    metadata = {"class_names": ["ä", "b"], "source": {"epoch": 3}}
    save_safetensors(tmp_path / "a.safetensors", state, metadata)
    checkpoint = read_weights(tmp_path / "a.safetensors")
    weights = checkpoint.pop("model")
    assert checkpoint == metadata and weights.keys() == state.keys()
    for name, tensor in state.items():
        assert weights[name].dtype == dtype and torch.equal(weights[name], tensor)


def test_negative_zero_and_tiny_numbers_survive_in_safetensors_bit_by_bit(tmp_path):
    values = torch.tensor([-0.0, 3e38, 1e-45])
    save_safetensors(tmp_path / "a.safetensors", {"w": values})
    back = read_weights(tmp_path / "a.safetensors")["model"]["w"]
    assert torch.equal(back.view(torch.int32), values.view(torch.int32))


def test_a_model_loads_safetensors(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", net(seed=1).state_dict())
    model = net()
    Checkpointer(model).load(str(tmp_path / "a.safetensors"))
    assert same(model, net(seed=1))


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[str]:
    """Address of a web server for ``tmp_path/www``; downloads are cached in ``tmp_path/cache``."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Keep the test's output clean."""

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "www").mkdir()
    handler = partial(Quiet, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_weights_are_downloaded_and_keep_the_server_s_part_of_the_query(tmp_path, server):
    file = tmp_path / "www" / "a.safetensors"
    save_safetensors(file, net(seed=1).state_dict())
    model = nn.ModuleDict({"backbone": net()})
    url = f"{server}/a.safetensors?download=true&matching_heuristics=True"
    Checkpointer(model, sha256=hashlib.sha256(file.read_bytes()).hexdigest()).load(url)
    assert same(model["backbone"], net(seed=1))


def test_a_bad_download_is_refused_naming_the_cached_file_to_delete(tmp_path, server):
    (tmp_path / "www" / "a.pth").write_bytes(PAGE)
    with pytest.raises(CheckpointError, match="HTML page.*; delete .*cache.*a.pth to download"):
        read_weights(f"{server}/a.pth")


def test_a_download_with_another_hash_than_its_name_says_is_refused(tmp_path, server, monkeypatch):
    monkeypatch.setattr("instseg.downloads._PYTORCH", server)
    save_safetensors(tmp_path / "www" / "a-01234567.safetensors", net().state_dict())
    with pytest.raises(CheckpointError, match="but the beginning of it in the name is 01234567"):
        Checkpointer(net()).load(f"{server}/a-01234567.safetensors")


def test_a_failing_download_is_explained_with_the_ways_out(server):
    with pytest.raises(CheckpointError, match='404.*local path.*MODEL.WEIGHTS "" to train'):
        read_weights(f"{server}/missing.pth")


def test_all_workers_get_what_the_main_worker_reads_or_its_error(tmp_path):
    ranks = run_ranks("tests.support.rank_checkpoint", str(tmp_path))
    outputs = [rank.stdout.splitlines() for rank in ranks]
    assert outputs == [["0 4 28.0 True", "0 28.0"], ["1 4 28.0 True", "1 28.0"]]


def test_an_error_of_the_only_worker_of_ddp_is_the_error_itself(tmp_path):
    torch.save(net(seed=1).state_dict(), tmp_path / "good.pth")
    (tmp_path / "bad.pth").write_bytes(PAGE)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(net())
        checkpointer = Checkpointer(model)
        with pytest.raises(CheckpointError, match="HTML page, so the download failed") as caught:
            checkpointer.load(str(tmp_path / "bad.pth"))
        assert "read_weights" in [entry.name for entry in caught.traceback]
        checkpointer.load(str(tmp_path / "good.pth"))
    finally:
        dist.destroy_process_group()
    assert same(model.module, net(seed=1))
