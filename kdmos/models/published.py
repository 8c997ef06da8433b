"""The authors' checkpoints: their names for our tensors, and what the tensors say about the network."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from kdmos.data.labels import CLASSES
from kdmos.errors import InputError
from kdmos.settings import MotionSettings, PolarGrid, StudentSettings, TeacherSettings

# Their key -> ours, first match. Every name is read off their published state_dict.
RENAMED = [
    (r"pt_model_in\.bn1\.", r"point_mlp.norm."),
    (r"pt_model_in\.layer(\d)\.", lambda m: f"point_mlp.layers.{int(m[1]) - 1}."),
    (r"pt_model_in\.out\.", r"point_mlp.out."),
    (r"fea_compression\.0\.", r"compress."),
    (r"BEV_model\.network\.outc\.conv\.", r"head."),
    (r"BEV_model\.network\.inc\.conv\.0\.", r"unet.appearance.norm."),
    (r"BEV_model\.network\.inc\.conv\.1\.", r"unet.appearance.blocks.0."),
    (r"BEV_model\.network\.down(\d)\.mpconv\.1\.", r"unet.appearance.blocks.\1."),
    (r"BEV_model\.network\.res_inc\.conv\.0\.", r"unet.motion.norm."),
    (r"BEV_model\.network\.res_inc\.conv\.1\.", r"unet.motion.blocks.0."),
    (r"BEV_model\.network\.res_down(\d)\.mpconv\.1\.", r"unet.motion.blocks.\1."),
    (r"BEV_model\.network\.CGM(\d)\.fuse_feature1\.", r"unet.attention.\1.fuse."),
    (r"BEV_model\.network\.CGM(\d)\.fuse_feature2\.", r"unet.attention.\1.gate."),
    (r"BEV_model\.network\.CGM(\d)\.attention_module\.conv1x1_spatial\.", r"unet.attention.\1.spatial."),
    (r"BEV_model\.network\.CGM(\d)\.attention_module\.conv1x1_channel_wise\.", r"unet.attention.\1.channel."),
    (r"BEV_model\.network\.up(\d)\.conv\.", lambda m: f"unet.decoder.{3 - int(m[1])}.block."),
    (r"BEV_model\.network\.up(\d)\.up\.", lambda m: f"unet.decoder.{3 - int(m[1])}.up."),
]
# Layers that their forward never uses, and a constant that is not a weight.
DEAD = re.compile(r"motion_channel_attention|motion_spatial_attention|\.init_pos$")


def is_student(weights: dict[str, Tensor]) -> bool:
    """Whether these are the tensors of the authors' student."""
    return any(key.startswith("BEV_model.network.") for key in weights)


def convert(weights: dict[str, Tensor], path: str) -> tuple[dict[str, Tensor], StudentSettings]:
    """Weights under our names, and the settings that the tensors imply.

    The grid and the look-ahead cannot be read off: the published ones are assumed.

    Args:
        weights: The authors' state_dict, without a `module.` prefix.
        path: Where it came from, for messages.
    Raises: InputError naming a key that has no place.
    """
    ours = {}
    for key, tensor in weights.items():
        if DEAD.search(key):
            continue
        for pattern, name in RENAMED:
            renamed, hits = re.subn("^" + pattern, name, key)
            if hits:
                # conv blocks: conv1.0, conv1.1 -> 0.conv, 0.norm
                renamed = re.sub(r"conv(\d)\.0\.", lambda m: f"{int(m[1]) - 1}.conv.", renamed)
                renamed = re.sub(r"conv(\d)\.1\.", lambda m: f"{int(m[1]) - 1}.norm.", renamed)
                ours[renamed] = tensor
                break
        else:
            raise InputError(f"{path}: key {key} belongs to no layer of a KDMOS or MotionBEV student")
    for key in ("head.weight", "unet.motion.norm.weight"):
        if key not in ours:
            raise InputError(f"{path}: looks like a KDMOS student, but the tensor for {key} is missing")

    grid = PolarGrid()
    num_classes, rest = divmod(ours["head.weight"].shape[0], grid.bins[2])
    if rest or num_classes not in CLASSES:
        raise InputError(
            f"{path}: the head has {ours['head.weight'].shape[0]} channels, which is not "
            f"{grid.bins[2]} heights x 2, 3 or 4 classes"
        )
    classes = CLASSES[num_classes]
    num_channels = ours["unet.motion.norm.weight"].shape[0]
    settings = StudentSettings(
        name="kdmos" if "unet.decoder.0.up.offset.weight" in ours else "motionbev",
        classes=classes,
        grid=grid,
        motion=MotionSettings("published", num_channels),
    )
    return {
        key: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for key, tensor in ours.items()
    }, settings


def is_teacher(weights: dict[str, Tensor]) -> bool:
    """Whether these are the tensors of MambaMOS, whose names are ours too."""
    return "seg_head.weight" in weights and "backbone.embedding.stem.0.weight" in weights


def teacher_settings(weights: dict[str, Tensor], path: str) -> TeacherSettings:
    """What the tensors of MambaMOS say about it; number of scans, voxel and curves are assumed as published.

    Raises: InputError naming a tensor that is missing or does not fit.
    """

    def stages(branch: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        name = re.compile(rf"backbone\.{branch}\.{branch}(\d+)\.block(\d+)\.mlp\.0\.fc2\.bias")
        blocks = [name.match(key) for key in weights]
        found = sorted((int(block[1]), int(block[2]), len(weights[block[0]])) for block in blocks if block)
        depths = [sum(stage == s for s, _, _ in found) for stage in sorted({s for s, _, _ in found})]
        return tuple(depths), tuple(width for _, block, width in found if block == 0)

    try:
        (encoder_depths, encoder_channels), (decoder_depths, decoder_channels) = stages("enc"), stages("dec")
        hidden, channels = weights["backbone.enc.enc0.block0.mlp.0.fc1.weight"].shape
        return TeacherSettings(
            classes=CLASSES[len(weights["seg_head.weight"])],
            encoder_depths=encoder_depths,
            encoder_channels=encoder_channels,
            decoder_depths=decoder_depths,
            decoder_channels=decoder_channels,
            mlp_ratio=hidden / channels,
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: looks like MambaMOS, but its tensors do not fit together ({error})") from error
