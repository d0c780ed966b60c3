"""DeepMask's and SharpMask's Torch7 files, written here as the authors' code lays them out."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

import instseg
from instseg.checkpoint import Checkpointer
from instseg.convert import Options, convert_file
from instseg.errors import CheckpointError
from instseg.projects.deepmask import convert as deepmask
from tests.support.meta_models import meta_model
from tests.support.torch7_writer import Cuda, Obj, listed, save

CONFIGS = {
    "deepmask": "deepmask/deepmask_resnet50_coco.yaml",
    "sharpmask": "sharpmask/sharpmask_resnet50_coco.yaml",
}
Weights = dict[str, np.ndarray]


@functools.cache
def weights_for(name: str) -> Weights:
    """Numbers for every parameter of our network."""
    state = meta_model(CONFIGS[name]).state_dict()
    rng = np.random.default_rng(0)
    weights = {k: rng.standard_normal(v.shape, dtype=np.float32) for k, v in state.items()}
    for key in weights:
        if key.endswith("running_mean"):
            weights[key] = np.zeros_like(weights[key])
        if key.endswith("running_var"):
            weights[key] = np.full_like(weights[key], 1 - 1e-5)
    return weights


class Layout:
    """The authors' modules, with the tensors of ``weights``.

    Args:
        dense: as after ``inference()``, which makes linear layers convolutions.
    """

    def __init__(self, weights: Weights, dense: bool) -> None:
        self.weights = weights
        self.dense = dense

    def conv(self, name: str) -> Obj:
        fields: dict[str, Any] = {"weight": Cuda(self.weights[f"{name}.weight"]), "kW": 3}
        if f"{name}.bias" in self.weights:
            fields["bias"] = Cuda(self.weights[f"{name}.bias"])
            fields["gradBias"] = Cuda(np.zeros(3, np.float32))
        return Obj("cudnn.SpatialConvolution", **fields)

    def linear(self, name: str) -> Obj:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        if self.dense:
            weight = weight if weight.ndim == 4 else weight[:, :, None, None]
            return Obj("nn.SpatialConvolution", weight=weight, bias=bias)
        return Obj("nn.Linear", weight=weight.reshape(len(weight), -1), bias=bias)

    def affine(self, name: str) -> Obj:
        a, b = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return Obj("inn.ConstAffine", a=Cuda(a), b=Cuda(b), inplace=True)

    def padded(self, name: str) -> Obj:
        return sequential(Obj("nn.SpatialSymmetricPadding", pad_l=1), self.conv(name))

    def block(self, name: str) -> Obj:
        main = sequential(
            self.conv(f"{name}.conv1"),
            self.affine(f"{name}.bn1"),
            RELU,
            self.padded(f"{name}.conv2"),
            self.affine(f"{name}.bn2"),
            RELU,
            self.conv(f"{name}.conv3"),
            self.affine(f"{name}.bn3"),
        )
        shortcut = Obj("nn.Identity")
        if f"{name}.downsample.0.weight" in self.weights:
            shortcut = sequential(
                self.conv(f"{name}.downsample.0"), self.affine(f"{name}.downsample.1")
            )
        table = Obj("nn.ConcatTable", modules=listed(main, shortcut))
        return sequential(table, Obj("nn.CAddTable"), RELU)

    def trunk(self) -> Obj:
        stages = [
            sequential(*(self.block(f"backbone.layer{i}.{k}") for k in range(count)))
            for i, count in ((1, 3), (2, 4), (3, 6))
        ]
        crop, flat = ("nn.Identity", "nn.Identity") if self.dense else ("nn.Crop", "nn.View")
        return sequential(
            self.padded("backbone.conv1"),
            self.affine("backbone.bn1"),
            RELU,
            Obj("nn.SpatialMaxPooling"),
            *stages,
            Obj(crop),
            self.conv("embedding.reduce"),
            RELU,
            Obj(flat),
            self.linear("embedding.project"),
        )

    def mask_branch(self) -> Obj:
        inner = sequential(self.linear("mask_head"), Obj("nn.View"))
        return inner if self.dense else sequential(inner, Obj("nn.SpatialUpSamplingBilinear"))

    def score_branch(self) -> Obj:
        return sequential(
            Obj("nn.Dropout"),
            self.linear("score_head.hidden"),
            Obj("nn.Threshold"),
            Obj("nn.Dropout"),
            self.linear("score_head.output"),
        )

    def deepmask(self) -> Obj:
        return Obj(
            "nn.DeepMask",
            trunk=self.trunk(),
            maskBranch=self.mask_branch(),
            scoreBranch=self.score_branch(),
            fSz=10,
        )

    def net(self, name: str, indices: tuple[int, ...]) -> list[Obj]:
        convs: list[Obj] = []
        for index in indices:
            convs += [Obj("nn.SpatialSymmetricPadding"), self.conv(f"{name}.{index}"), RELU]
        return convs[:-1]

    def sharpmask(self) -> Obj:
        neths: list[Obj] = []
        netvs: dict[int, Obj] = {0: sequential(self.linear("refinement.start"), Obj("nn.View"))}
        refs: dict[int, Obj] = {0: netvs[0]}
        for k in (1, 2, 3, 4):
            crop = [] if k == 1 else [Obj("nn.Crop")]
            horizontal = self.net(f"refinement.horizontal.{k - 1}", (0, 2, 4))
            neths.append(sequential(*crop, *horizontal))
            netvs[k] = sequential(*self.net(f"refinement.vertical.{k - 1}", (0, 2)))
            table = Obj("nn.ParallelTable", modules=listed(neths[-1], netvs[k]))
            refs[k] = sequential(table, Obj("nn.CAddTable"), RELU, Obj("nn.SpatialUpSampling"))
        end = [Obj("nn.SpatialSymmetricPadding"), self.conv("refinement.output")]
        end += [] if self.dense else [Obj("nn.View")]
        last = refs[4].fields["modules"]
        refs[4].fields["modules"] = listed(*last.values(), *end)
        return Obj(
            "nn.SharpMask",
            trunk=self.trunk(),
            scoreBranch=self.score_branch(),
            maskBranchDM=self.mask_branch(),
            fSz=10,
            km=32,
            ks=32,
            skpos=listed(8, 6, 5, 3),
            neths=listed(*neths),
            netvs=netvs,
            refs=refs,
        )


RELU = Obj("nn.ReLU", inplace=True)


def sequential(*modules: Obj) -> Obj:
    return Obj("nn.Sequential", modules=listed(*modules), train=False)


def file_of(path: Path, name: str, dense: bool = False, **changes: Any) -> str:
    layout = Layout({**weights_for(name), **changes}, dense)
    model = layout.deepmask() if name == "deepmask" else layout.sharpmask()
    return str(save(path, {"model": model, "config": {"iSz": 160, "lr": 0.0}}))


@pytest.mark.parametrize("dense", [False, True], ids=["trained", "after inference()"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_arrives_under_our_name(tmp_path: Path, name: str, dense: bool) -> None:
    state, report = deepmask.convert(file_of(tmp_path / "model.t7", name, dense), Options())
    expected = weights_for(name)
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert torch.equal(value, torch.from_numpy(expected[key])), key
    assert report.config == CONFIGS[name] and not report.overrides and not report.missing
    assert report.mapped["backbone.conv1.weight"] == ("trunk.modules.1.modules.2.weight",)


def test_the_result_loads_into_the_model_of_its_configuration(tmp_path: Path) -> None:
    source = file_of(tmp_path / "model.t7", "deepmask")
    path, _ = convert_file("deepmask", source, tmp_path / "out")
    model = build_model(instseg.load_cfg(CONFIGS["deepmask"], ["MODEL.DEVICE", "cpu"]))
    Checkpointer(model).load(str(path))
    weight = model.mask_head.weight.detach()
    assert torch.equal(weight, torch.from_numpy(weights_for("deepmask")["mask_head.weight"]))


def test_a_frozen_normalisation_computes_what_it_did(tmp_path: Path) -> None:
    state, _ = deepmask.convert(file_of(tmp_path / "model.t7", "deepmask"), Options())
    names = ("weight", "bias", "running_mean", "running_var")
    norm = {k: state[f"backbone.bn1.{k}"].double() for k in names}
    x = torch.randn(2, 64, 3, 3, dtype=torch.double)
    scale = norm["weight"] * (norm["running_var"] + 1e-5).rsqrt()
    y = (x - norm["running_mean"].view(-1, 1, 1)) * scale.view(-1, 1, 1)
    wanted = x * norm["weight"].view(-1, 1, 1)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=0)


def test_the_network_alone_is_accepted_as_well(tmp_path: Path) -> None:
    model = Layout(weights_for("deepmask"), dense=False).deepmask()
    state, _ = deepmask.convert(str(save(tmp_path / "model.t7", model)), Options())
    assert state.keys() == weights_for("deepmask").keys()


def converted(tmp_path: Path, model: Any, options: Options | None = None) -> Any:
    path = str(save(tmp_path / "model.t7", {"model": model}))
    return deepmask.convert(path, options or Options())


@pytest.mark.parametrize(
    ("content", "description"),
    [
        ({}, "a NoneType"),
        ({"model": 7}, "a int"),
        ({"model": Obj("nn.Sequential")}, "nn.Sequential"),
        (listed(1, 2), "a NoneType"),
        ("text", "a str"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, content: Any, description: str) -> None:
    path = str(save(tmp_path / "model.t7", content))
    with pytest.raises(
        CheckpointError, match=f"model.t7 holds {description}; expected .*nn.DeepMask"
    ):
        deepmask.convert(path, Options())


def test_a_missing_part_is_named_and_may_be_accepted(tmp_path: Path) -> None:
    model = Layout(weights_for("deepmask"), dense=False).deepmask()
    del model.fields["scoreBranch"]
    with pytest.raises(CheckpointError, match="missing: score_head.hidden.weight"):
        converted(tmp_path, model)
    _, report = converted(tmp_path, model, Options(allow_partial=True))
    assert set(report.missing) == {
        f"score_head.{x}.{y}" for x in ("hidden", "output") for y in ("weight", "bias")
    }


def test_a_layer_too_many_is_named(tmp_path: Path) -> None:
    layout = Layout(weights_for("deepmask"), dense=False)
    model = layout.deepmask()
    model.fields["scoreBranch"] = sequential(layout.score_branch(), layout.conv("mask_head"))
    with pytest.raises(CheckpointError, match=r"not belong.*scoreBranch\.modules\.2\.weight"):
        converted(tmp_path, model)


def test_a_layer_of_another_shape_is_named(tmp_path: Path) -> None:
    narrow = {"backbone.conv1.weight": np.zeros((64, 3, 5, 5), np.float32)}
    path = file_of(tmp_path / "model.t7", "deepmask", **narrow)
    expected = (
        r"trunk\.modules\.1\.modules\.2\.weight has shape \(64, 3, 5, 5\).*needs \(64, 3, 7, 7\)"
    )
    with pytest.raises(CheckpointError, match=expected):
        deepmask.convert(path, Options())


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    bad = {"mask_head.bias": np.full(56 * 56, np.nan, np.float32)}
    path = file_of(tmp_path / "model.t7", "deepmask", **bad)
    with pytest.raises(CheckpointError, match="not finite for mask_head.bias"):
        deepmask.convert(path, Options())


@pytest.mark.parametrize("width", [0, 24, 2**20, "32", 1.5])
def test_an_impossible_width_of_the_refinement_is_refused(tmp_path: Path, width: Any) -> None:
    with pytest.raises(CheckpointError, match="km is .*expected a multiple of 16"):
        converted(tmp_path, Obj("nn.SharpMask", km=width))


def test_another_width_of_the_refinement_becomes_an_override(tmp_path: Path) -> None:
    trunk = Layout(weights_for("sharpmask"), dense=False).trunk()
    model = Obj("nn.SharpMask", trunk=trunk, km=16, ks=48)
    _, report = converted(tmp_path, model, Options(allow_partial=True))
    assert report.overrides == ("MODEL.SHARPMASK.MASK_DIM", 16, "MODEL.SHARPMASK.SKIP_DIM", 48)


def test_modules_that_contain_themselves_end(tmp_path: Path) -> None:
    model = Layout(weights_for("deepmask"), dense=False).deepmask()
    model.fields["trunk"].fields["modules"][13] = model.fields["trunk"]
    model.fields["parent"] = model
    state, _ = converted(tmp_path, model)
    assert state.keys() == weights_for("deepmask").keys()


def test_modules_chained_too_deeply_are_refused(tmp_path: Path) -> None:
    # Numbers let a file be flat where what it describes is deep.
    links = [Obj("nn.Sequential") for _ in range(3000)]
    for outer, inner in zip(links[1:], links[:-1], strict=True):
        outer.fields["modules"] = listed(inner)
    chained = Obj("nn.DeepMask", trunk=links[-1])
    path = str(save(tmp_path / "model.t7", {"parts": listed(*links), "model": chained}))
    with pytest.raises(CheckpointError, match="nested too deeply"):
        deepmask.convert(path, Options())
