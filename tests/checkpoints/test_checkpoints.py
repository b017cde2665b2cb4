"""deqdet.checkpoints: names, implied configs, and that each kind's converted weights compute what they did before."""

import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.backbone import SwinTransformer
from detectron2.modeling.backbone.swin import PatchMerging

from deqdet import add_deqdet_config
from deqdet.checkpoints import CheckpointError, Config, Kind, Shapes, convert, register_kind, under
from deqdet.checkpoints.conversion import Renaming, build_structure, guess_kind
from deqdet.checkpoints.implied import Given
from deqdet.checkpoints.kinds import ADAMIXER_LAYER, DEQDET, KINDS, reorder_patch_merging

from helpers.converter import StrictCheckpointer, golden_weights, make_cfg
from helpers.paths import ROOT

MAPPER = {"resnet": "build_resnet_channel_mapper_backbone", "swin": "build_swin_channel_mapper_backbone"}


def build_converted(conversion, *overrides, part: str = "") -> nn.Module:
    """The model of a conversion's config with its weights: all of the model, or of its part, and nothing else."""
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.merge_from_list([x for pair in conversion.config.items() for x in pair])
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.SWIN.DROP_PATH_RATE", 0.0, *overrides])
    model = build_model(cfg).eval()
    checkpointer = StrictCheckpointer(model, part)
    checkpointer._log_incompatible_keys(checkpointer._load_model({"model": dict(conversion.weights)}))
    return model


def assert_same_levels(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert len(found) == len(expected) == 4
    for (name, level), other in zip(found.items(), expected.values(), strict=True):
        assert other.std() > 0.01, name
        torch.testing.assert_close(level, other, rtol=1e-4, atol=1e-5, msg=name)


# Names


def test_rules_by_hand():
    rules = [("bn.", "conv.norm."), ("conv.", "conv."), ("tau", "scale"), ("layer1.*.block.*.", "res2.*.sub.*.")]
    renaming = Renaming([*rules, *under("head.*.", "decoder.*.", [("a.", "b."), ("a.0.", "c.")])])
    pairs = {
        "bn.weight": "conv.norm.weight",
        "conv.weight": "conv.weight",
        "tau": "scale",
        "layer1.12.block.3.x.y": "res2.12.sub.3.x.y",
        "head.4.a.1.weight": "decoder.4.b.1.weight",
        "head.4.a.0.weight": "decoder.4.c.weight",
    }
    assert {theirs: renaming.ours(theirs) for theirs in pairs} == pairs
    assert {ours: renaming.theirs(ours) for ours in pairs.values()} == {v: k for k, v in pairs.items()}
    for unknown in ("tau.weight", "xtau", "layer1.x.block.3.y", "layer1.1.block.", "bnx.weight"):
        assert renaming.ours(unknown) is None


def test_every_golden_name_goes_there_and_back():
    for name in ("deqdet", "sparse_rcnn"):
        weights = golden_weights(name)
        renaming = Renaming(KINDS[name].rules(weights))
        renamed = {theirs: renaming.ours(theirs) for theirs in weights if renaming.ours(theirs)}
        assert len(set(renamed.values())) == len(renamed) > 300
        assert all(renaming.theirs(ours) == theirs for theirs, ours in renamed.items())


@pytest.mark.parametrize("names, kind", [
    (["roi_head.bbox_head.0.iof_tau", "roi_head.bbox_head.1.iof_tau"], "deqdet"),
    ([f"roi_head.bbox_head.{i}.iof_tau" for i in range(6)], "adamixer"),
    (["head.head_series.0.norm1.weight", "backbone.bottom_up.stem.conv1.weight"], "sparse_rcnn"),
    (["patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight"], "swin"),
    (["conv1.weight", "layer1.0.conv1.weight"], "torchvision"),
])  # fmt: skip
def test_the_guess(names, kind):
    assert guess_kind(names).name == kind


def test_two_keys_for_one_of_ours():
    """AdaMixer's neck may have either of two names, not both."""
    weights = golden_weights("deqdet")
    weights["neck.lateral_convs.2.conv.bias"] = weights["neck.convs.2.conv.bias"]
    with pytest.raises(CheckpointError, match=r"1 unknown key: neck\.lateral_convs\.2\.conv\.bias$"):
        convert(weights | {"neck.lateral_convs.2.conv.bias": torch.zeros(32)}, kind="deqdet")
    stacked = {k.replace("bbox_head.1", "bbox_head.2"): v for k, v in golden_weights("deqdet").items()}
    stacked |= golden_weights("deqdet") | {"neck.lateral_convs.2.conv.bias": torch.zeros(32)}
    with pytest.raises(CheckpointError, match=r"1 unknown key: neck\.lateral_convs\.2\.conv\.bias$"):
        convert(stacked, kind="adamixer")


# Shapes


def shapes(**sizes: tuple[int, ...]) -> Shapes:
    return Shapes({name: Given(f"their {name}", shape) for name, shape in sizes.items()})


def test_the_most_frequent_size_is_taken():
    look = shapes(a1=(3, 5), a2=(4, 5), a3=(3,), b=(4, 0), c=())
    assert look.size("a*") == 3 and look.size("a*", axis=1) == 5 and look.size("a2", "b") == 4
    with pytest.raises(CheckpointError, match=r"^their a2 \(4, 5\) and their a3 \(3,\) do not fit each other$"):
        look.size("a2", "a3")
    for pattern, axis in [("d", 0), ("c", 0), ("a3", 1), ("b", 1)]:
        with pytest.raises(CheckpointError, match=f"no key corresponds to our {pattern}"):
            look.size(pattern, axis=axis)


def test_modules_are_counted_by_their_last():
    look = Shapes({name: Given(name, ()) for name in ("a.0.x", "a.11.y", "a.b.c", "b.3")})
    assert [look.count(prefix) for prefix in ("a.", "b.", "c.")] == [12, 4, 0]


def leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("config, kind, rows", [
    ("deqdet_r50_300q_2x_p64", "deqdet", 4 * (64**2 + 128 * 64)),
    ("deqdet_r101_300q_2x", "deqdet", 4 * (64**2 + 128 * 32)),
    ("deqdet_swin_s_300q_2x", "deqdet", 4 * (64**2 + 128 * 32)),
    ("adamixer_r50_100q_1x_p64", "adamixer", 4 * (64**2 + 128 * 64)),
    ("sparse_rcnn_r50_300q_3x", "sparse_rcnn", 2 * 256 * 64),
])  # fmt: skip
def test_full_width_checkpoints_imply_their_config(config, kind, rows):
    """Without values. All keys that a checkpoint decides have the value that the config file has."""
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / f"{config}.yaml"))
    cfg.MODEL.DEQDET.NECK.KERNEL_SIZE = 3
    settings = dict(leaves(cfg))
    ours = build_structure(settings, backbone_only=False)
    last = "refinement" if kind == "deqdet" else "layers.5"
    generator = "dynamic_conv.generator.bias" if kind == "sparse_rcnn" else "mixing.generator.bias"
    assert ours[f"decoder.{last}.{generator}"].shape == (rows,)

    names = [f"head.head_series.0.{tower}_module.{i}.weight" for tower, i in [("cls", 1), ("reg", 7)]]
    renaming = Renaming(KINDS[kind].rules(names if kind == "sparse_rcnn" else []))
    theirs = {renaming.theirs(name): value for name, value in ours.items()}
    assert None not in theirs and len(theirs) == len(ours)
    conversion = convert(theirs)
    assert conversion.kind == kind and conversion.guessed
    assert conversion.weights.keys() == ours.keys()
    assert len(conversion.config) > 20
    # The FPN's levels of Swin are all of them, however they are given.
    assert {key: settings[key] for key in conversion.config} == conversion.config


# AdaMixer


@pytest.mark.parametrize("neck", ["convs", "lateral_convs"])
def test_a_stack_of_golden_layers_is_golden(neck):
    """As many untied copies of f as DEQDet took steps: the same detections, by the other decoder and the other kind."""
    weights = {}
    for name, value in golden_weights("deqdet").items():
        copies = range(1, 7) if "bbox_head.1." in name else [0]
        for i in copies:
            weights[name.replace("bbox_head.1.", f"bbox_head.{i}.").replace("neck.convs", f"neck.{neck}")] = value
    conversion = convert(weights)
    assert (conversion.kind, conversion.config["MODEL.DEQDET.NUM_LAYERS"]) == ("adamixer", 7)
    stack = build_converted(conversion)
    solved = build_converted(convert(golden_weights("deqdet")), "MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 6)
    image = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (model([{"image": image}])[0]["instances"] for model in (stack, solved))
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-3)


# ResNets


def make_resnet(blocks: list[int], stir, **options) -> torchvision.models.ResNet:
    torch.manual_seed(0)
    resnet = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, blocks, num_classes=3, **options)
    stir(resnet, size=0.02)
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return resnet.eval()


def resnet_levels(resnet: torchvision.models.ResNet, images: Tensor) -> dict[str, Tensor]:
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images))))
    levels = {}
    for i, layer in enumerate((resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4), start=2):
        levels[f"res{i}"] = x = layer(x)
    return levels


R50, R101 = [3, 4, 6, 3], [3, 4, 23, 3]


@pytest.mark.parametrize("depth, blocks, groups", [(50, R50, 1), (101, R101, 1), (50, R50, 4)])
def test_resnets(stir, depth, blocks, groups):
    """Narrow inside, 4 channels a group, but for the channels of its stages."""
    resnet = make_resnet(blocks, stir, width_per_group=4, groups=groups)
    conversion = convert(resnet.state_dict())
    assert conversion.kind == "torchvision"
    expected = {"DEPTH": depth, "NUM_GROUPS": groups, "WIDTH_PER_GROUP": 4, "STRIDE_IN_1X1": False}
    expected |= {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 256}
    assert {f"MODEL.RESNETS.{key}": value for key, value in expected.items()}.items() <= conversion.config.items()
    assert not any(name.endswith("tracked") or "fc" in name for name in conversion.weights)

    # The stem and res2 are frozen. Counters of batches are not in the file, and not missed.
    overrides = ["MODEL.META_ARCHITECTURE", "DEQDet", "MODEL.BACKBONE.NAME", MAPPER["resnet"]]
    model = build_converted(conversion, *overrides, "MODEL.RESNETS.NORM", "BN", part="backbone.bottom_up.")
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert_same_levels(model.backbone.bottom_up(images), resnet_levels(resnet, images))


def test_a_resnet_under_a_released_detector(stir):
    """R101 among the golden file's other keys."""
    resnet = make_resnet(R101, stir, width_per_group=4)
    weights = {f"backbone.{name}": value for name, value in resnet.state_dict().items() if not name.startswith("fc.")}
    weights |= {name: value for name, value in golden_weights("deqdet").items() if not name.startswith("backbone.")}
    weights |= {f"neck.convs.{i}.conv.weight": torch.randn(32, 256 * 2**i, 3, 3) for i in range(4)}
    conversion = convert(weights)
    assert conversion.config["MODEL.RESNETS.DEPTH"] == 101
    model = build_converted(conversion)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_same_levels(model.backbone.bottom_up(images), resnet_levels(resnet, images))


# Swin Transformers

SWIN = {"embed_dim": 8, "depths": (2, 1, 3, 1), "num_heads": (1, 2, 4, 2), "window_size": 3, "drop_path_rate": 0.0}
SWIN_CONFIG = {"EMBED_DIM": 8, "DEPTHS": [2, 1, 3, 1], "NUM_HEADS": [1, 2, 4, 2], "WINDOW_SIZE": 3}


class UnfoldingMerge(nn.Module):
    """Patch merging as mmdetection defines it: the channels of torch's unfold, then norm and reduction."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        pixels = x.transpose(1, 2).unflatten(2, (height, width))
        pixels = F.pad(pixels, (0, width % 2, 0, height % 2))
        return self.reduction(self.norm(F.unfold(pixels, kernel_size=2, stride=2).transpose(1, 2)))


def make_swin(stir, *, unfolding: bool) -> SwinTransformer:
    torch.manual_seed(0)
    swin = SwinTransformer(**SWIN)
    if unfolding:
        for i, layer in enumerate(swin.layers[:-1]):
            layer.downsample = UnfoldingMerge(8 * 2**i)
    stir(swin, size=0.2)
    return swin.eval()


def mmdet_name(name: str) -> str:
    """mmdetection's name of detectron2's, by hand."""
    name = name.replace("patch_embed.proj.", "patch_embed.projection.")
    name = re.sub(r"^layers\.", "stages.", name).replace(".attn.", ".attn.w_msa.")
    name = name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
    return f"backbone.{name}"


def test_patch_merging_by_hand():
    """One channel: the pixels (0,0), (0,1), (1,0), (1,1) of unfold become (0,0), (1,0), (0,1), (1,1)."""
    name = "backbone.bottom_up.layers.0.downsample.norm.weight"
    assert reorder_patch_merging(name, torch.tensor([0, 1, 10, 11])).tolist() == [0, 10, 1, 11]
    # Two channels a and b: 100 * channel + 10 * row + column.
    unfolded = torch.tensor([0, 1, 10, 11, 100, 101, 110, 111])
    assert reorder_patch_merging(name, unfolded).tolist() == [0, 100, 10, 110, 1, 101, 11, 111]
    assert reorder_patch_merging(name, unfolded.expand(3, 8))[2].tolist() == [0, 100, 10, 110, 1, 101, 11, 111]
    assert reorder_patch_merging("backbone.bottom_up.layers.0.blocks.0.norm1.weight", unfolded) is unfolded


@pytest.mark.parametrize("height, width", [(4, 6), (5, 3)])
def test_patch_merging_against_unfold(stir, height, width):
    unfolding, merging = UnfoldingMerge(3), PatchMerging(3)
    stir(unfolding, size=0.5)
    names = {name: f"backbone.bottom_up.layers.1.downsample.{name}" for name in unfolding.state_dict()}
    merging.load_state_dict({k: reorder_patch_merging(names[k], v) for k, v in unfolding.state_dict().items()})
    x = torch.randn(2, height * width, 3)
    torch.testing.assert_close(merging(x, height, width), unfolding(x, height, width))


def test_a_swin_under_a_released_detector(stir):
    """In mmdetection's names and layout among the golden file's other keys."""
    swin = make_swin(stir, unfolding=True)
    weights = {mmdet_name(name): value for name, value in swin.state_dict().items()}
    assert "backbone.stages.2.blocks.1.ffn.layers.0.0.weight" in weights
    assert "backbone.stages.0.blocks.0.attn.w_msa.relative_position_bias_table" in weights
    weights |= {name: value for name, value in golden_weights("deqdet").items() if not name.startswith("backbone.")}
    weights |= {f"neck.convs.{i}.conv.weight": torch.randn(32, 8 * 2**i, 3, 3) for i in range(4)}
    conversion = convert(weights)
    assert conversion.config["MODEL.BACKBONE.NAME"] == MAPPER["swin"]
    assert {f"MODEL.SWIN.{key}": value for key, value in SWIN_CONFIG.items()}.items() <= conversion.config.items()
    assert not any("RESNETS" in key for key in conversion.config)
    model = build_converted(conversion)
    images = torch.randn(1, 3, 60, 76)
    with torch.no_grad():
        assert_same_levels(model.backbone.bottom_up(images), swin(images))


def authors_swin(swin: SwinTransformer) -> dict[str, Tensor]:
    """As the Swin authors release it: a classifier, no norms at the other outputs, masks for one size of image."""
    weights = {name: value for name, value in swin.state_dict().items() if not name.startswith("norm")}
    weights |= {"norm.weight": torch.ones(64), "norm.bias": torch.zeros(64)}
    weights |= {"head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)}
    return weights | {"layers.0.blocks.1.attn_mask": torch.zeros(4, 9, 9)}


@pytest.mark.parametrize("indexed", [True, False])
def test_a_swin_of_its_authors(stir, indexed):
    swin = make_swin(stir, unfolding=False)
    for i in range(4):  # as they start in ours
        nn.init.ones_(getattr(swin, f"norm{i}").weight)
        nn.init.zeros_(getattr(swin, f"norm{i}").bias)
    weights = authors_swin(swin)
    if not indexed:  # a buffer that depends on the window's size alone
        weights = {name: value for name, value in weights.items() if "relative_position_index" not in name}
    conversion = convert(weights)
    assert conversion.kind == "swin"
    assert {f"MODEL.SWIN.{key}": value for key, value in SWIN_CONFIG.items()}.items() <= conversion.config.items()
    assert "backbone.bottom_up.norm0.weight" in " ".join(conversion.notes)

    overrides = ["MODEL.META_ARCHITECTURE", "DEQDet", "MODEL.BACKBONE.NAME", MAPPER["swin"]]
    model = build_converted(conversion, *overrides, part="backbone.bottom_up.layers.")
    images = torch.randn(1, 3, 60, 76)
    with torch.no_grad():
        assert_same_levels(model.backbone.bottom_up(images), swin(images))


def test_output_norms_of_a_swin_are_kept(stir):
    swin = make_swin(stir, unfolding=False)
    conversion = convert(swin.state_dict())
    assert torch.equal(conversion.weights["backbone.bottom_up.norm3.bias"], swin.norm3.bias)
    assert not any("initial values" in note for note in conversion.notes)
    weights = swin.state_dict()
    weights.pop("norm2.bias")
    note = "start from initial values: backbone.bottom_up.norm2.bias"
    assert any(each.endswith(note) for each in convert(weights).notes)


def test_another_numbering_of_positions_is_refused(stir):
    weights = authors_swin(make_swin(stir, unfolding=False))
    name = "layers.2.blocks.0.attn.relative_position_index"
    with pytest.raises(CheckpointError, match=f"1 differently computed key: {name}$"):
        convert(weights | {name: weights[name].T})
    with pytest.raises(CheckpointError, match=rf"1 misshapen key: {name} \(4, 4\) instead of \(9, 9\)$"):
        convert(weights | {name: torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match="1 unknown key: absolute_pos_embed$"):
        convert(weights | {"absolute_pos_embed": torch.zeros(1, 8, 56, 56)})


def test_a_backbone_has_no_classes(stir):
    with pytest.raises(CheckpointError, match="a backbone has no classes: omit --num-classes"):
        convert(make_swin(stir, unfolding=False).state_dict(), num_classes=80)


@pytest.mark.parametrize("name", [
    "backbone.conv1.weight",
    "backbone.layer3.0.downsample.1.running_var",
    "neck.gn_out.bias",
    "roi_head.bbox_head.0.attention.attn.in_proj_weight",
    "roi_head.bbox_head.1.sampling_n_mixing.sampling_offset_generator.0.weight",
    "roi_head.bbox_head.1.sampling_n_mixing.adaptive_mixing.parameter_generator.0.weight",
    "roi_head.bbox_head.0.sampling_n_mixing.adaptive_mixing.parameter_generator.0.bias",
    "roi_head.bbox_head.0.fc_cls.weight",
    "roi_head.bbox_head.1.ffn_norm.weight",
])  # fmt: skip
def test_the_misshapen_key_is_the_one_that_is_named(name):
    """Though the expected shapes are found from the shapes themselves."""
    weights = golden_weights("deqdet")
    weights[name] = torch.cat([weights[name], weights[name]])
    shape = tuple(golden_weights("deqdet")[name].shape)
    with pytest.raises(CheckpointError, match="^taken as deqdet: ") as refusal:
        convert(weights)
    expected = f"1 misshapen key: {name} {(2 * shape[0], *shape[1:])} instead of {shape}"
    assert str(refusal.value) == f"taken as deqdet: {expected}"


def test_a_detector_that_cannot_be_built():
    config = convert(golden_weights("deqdet")).config | {"MODEL.DEQDET.HIDDEN_DIM": 48}
    with pytest.raises(CheckpointError, match="a detector that cannot be built: .*HIDDEN_DIM must be a multiple of 32"):
        build_structure(config, backbone_only=False)


def test_towers_of_other_lengths():
    """Two class layers and one box layer, where the golden file has one and three."""
    weights = {}
    for name, value in golden_weights("sparse_rcnn").items():
        if not re.search(r"reg_module\.[3-9]", name):
            weights[name] = value
        if ".cls_module." in name:
            weights[re.sub(r"cls_module\.(\d)", lambda m: f"cls_module.{int(m[1]) + 3}", name)] = value + 1
    conversion = convert(weights)
    expected = {"NUM_CLASS_LAYERS": 2, "NUM_BOX_LAYERS": 1, "POOLER_RESOLUTION": 7, "DYNAMIC_DIM": 4}
    expected = {f"MODEL.DEQDET.SPARSE_RCNN.{key}": value for key, value in expected.items()}
    assert expected.items() <= conversion.config.items()
    layer = build_converted(conversion).decoder.layers[2]
    assert (len(layer.class_branch), len(layer.box_branch)) == (7, 4)
    logits, deltas = weights["head.head_series.2.class_logits.bias"], weights["head.head_series.2.bboxes_delta.weight"]
    assert torch.equal(layer.class_branch[6].bias, logits) and torch.equal(layer.box_branch[3].weight, deltas)


def test_make_cfg_reads_pairs_as_a_shell_does():
    assert make_cfg("MODEL.FPN.IN_FEATURES \"['res2','res3']\"").MODEL.FPN.IN_FEATURES == ["res2", "res3"]


# A kind of the user's own


def imply_mine(look: Shapes, layers: list[str], dim: int) -> Config:
    assert (layers, dim) == (["decoder.initialization.", "decoder.refinement."], 32)
    return DEQDET.imply_layers(look, layers, dim) | {"MODEL.DEQDET.NUM_LAYERS": look.size("decoder.*.class_branch.0.*")}


@pytest.fixture
def mine() -> Iterator[Kind]:
    """DEQDet's layers with other prefixes, whose sign is a special case of DEQDet's own."""
    rules = under("roi_head.bbox_head.g.", "decoder.initialization.", ADAMIXER_LAYER)
    rules += under("roi_head.bbox_head.f.", "decoder.refinement.", ADAMIXER_LAYER)
    yield register_kind(
        Kind(
            name="mine",
            sign="roi_head.bbox_head.f.*",
            rules=lambda names: [*DEQDET.rules(names), *rules],
            imply_layers=imply_mine,
            dead=DEQDET.dead,
            config=DEQDET.config,
            resnet_config=DEQDET.resnet_config,
        )
    )
    del KINDS["mine"]


def test_a_registered_kind_is_converted(mine):
    weights = {
        name.replace("bbox_head.0.", "bbox_head.g.").replace("bbox_head.1.", "bbox_head.f."): value
        for name, value in golden_weights("deqdet").items()
    }
    conversion, expected = convert(weights), convert(golden_weights("deqdet"))
    assert (conversion.kind, conversion.guessed, expected.kind) == ("mine", True, "deqdet")
    assert conversion.config == expected.config | {"MODEL.DEQDET.NUM_LAYERS": 32}
    assert conversion.weights.keys() == expected.weights.keys()
    assert all(torch.equal(conversion.weights[name], value) for name, value in expected.weights.items())


def test_the_name_of_a_kind_is_taken_once(mine):
    for taken in (mine, DEQDET):
        with pytest.raises(ValueError, match=f"a kind '{taken.name}' already exists: use another name"):
            register_kind(taken)
