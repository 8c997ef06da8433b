"""The training config: every setting with its default, unit and meaning; a YAML states only what differs."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kdmos.errors import InputError
from kdmos.settings import StudentSettings, TeacherSettings

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def _expanded(value: Any) -> Any:
    return Path(value).expanduser() if isinstance(value, str) else value


def _path(value: Any) -> Any:
    return _expanded(str(value) if type(value) is int else value)  # YAML takes a folder named 2026 for a number


File = Annotated[Path, BeforeValidator(_path)]


# Sequence names: [00, 01], or one name alone.
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, (str, int)) else value)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class DataConfig(Strict):
    """Which scans."""

    root: File = Path("data/SemanticKITTI")  # data root, or one bare sequence folder
    train: Names | None = None  # sequence names; null: the training split, or a bare folder's one
    valid: Names | None = None  # sequence names; null: the validation split, or the training ones
    kitti_road: bool = False  # add KITTI-road's sequences to the splits
    drop_static_scans: bool | Annotated[Path, BeforeValidator(_expanded)] = (
        False  # true: every 10th of the scans with at most 10 moving points; or a list
    )
    cache: File | None = None  # motion cache of a student's run; null: kdmos/motion in the user's cache folder
    workers: Annotated[int, Field(ge=0)] = 2  # processes that read ahead


class AugmentConfig(Strict):
    """Random changes to a training scan as a whole."""

    rotate: bool = True  # yaw, uniform over the full turn
    flip: bool = True  # x and y, each with probability 1/2
    translation: NotNegative = 0.1  # metres, standard deviation per axis
    remission: Share = 0.0  # of the scans that get another one: gain, gamma, patches; see `draw_remission`
    false_motion: Share = 0.0  # of the scans in which some of what stands seems to move; see `add_false_motion`
    sectors: Count = 1  # so many scans of a batch become one, a sector of each, turned; see `mix_sectors`


class DistillConfig(Strict):
    """Learning from a teacher's cached logits."""

    teacher: str = "mambamos"  # folder below `logits`
    logits: File = Path("logits")  # root of the store: logits/<teacher>/<sequence>/<frame>.safetensors
    loss: Literal["wdcd", "dkd", "kd", "logit_std_kd", "ofa"] = "wdcd"
    options: dict[str, Any] = {}  # arguments of the loss, e.g. {variant: paper, temperature: 4, beta: 3}
    gamma: NotNegative = 0.3  # weight of the distillation in the total loss


class OptimizerConfig(Strict):
    """The optimiser of a student, and how its learning rate moves."""

    kind: Literal["sgd", "adamw"] = "sgd"  # the authors take sgd; adamw needs about a tenth of its learning rate
    lr: Positive = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of adamw: the first beta
    weight_decay: NotNegative = 1e-4
    warmup_epochs: NotNegative = 1.0  # linear from 0 to lr
    decay: Positive = 0.99  # factor per epoch, applied per step


class WindowAugmentConfig(Strict):
    """Random changes to a training window of several scans as a whole, and to its points."""

    rotate: Share = 0.5  # probability of a yaw, uniform over the full turn
    scale: tuple[Positive, Positive] = (0.9, 1.1)  # factor, uniform between these
    flip: bool = True  # x and y, each with probability 1/2
    jitter: NotNegative = 0.005  # metres, standard deviation of each coordinate of each point, cut off at four of them
    keep: Annotated[float, Field(gt=0, le=1)] = 0.8  # share of the voxels that are kept, the nearest to a random one


class OneCycleConfig(Strict):
    """AdamW, with a learning rate that rises once and falls once along cosines; the recipe of MambaMOS."""

    lr: Positive = 1.6e-4  # at its highest; the authors take 8e-5 times the scans of a step
    weight_decay: NotNegative = 0.005
    block_factor: Positive = 0.1  # of the blocks' learning rate to the others'
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.05  # share of the steps in which it rises
    start: Positive = 0.1  # of the highest, at the first step
    end: Positive = 1e-4  # of the highest, at the last step


class RunConfig(Strict):
    """What any training run needs."""

    output: File = Path("runs/train")  # all that the run writes
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig = DataConfig()
    init: File | None = None  # weights to start from: a .safetensors or the authors' file; null: random
    epochs: Count = 150
    batch_size: Count = 8  # scans per step and process
    accumulate: Count = 1  # batches per optimizer step
    precision: Literal["32-true", "tf32", "bf16-mixed", "16-mixed"] = "32-true"  # tf32: float32 with products in TF32
    gradient_clip: Positive | None = None  # largest norm of the gradient
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Count | Literal["auto"] = 1  # GPUs, or processes on a CPU; "auto": all GPUs
    save_every: Count = 200  # optimizer steps between saves of the training state


class Config(RunConfig):
    """A run that trains a student."""

    student: StudentSettings = StudentSettings()
    augment: AugmentConfig = AugmentConfig()
    class_weights: tuple[float, ...] | None = None  # of the cross-entropy, one per class
    distill: DistillConfig | None = None  # null: learn from the labels alone
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _sectors_divide_the_batch(self) -> Config:
        if self.batch_size % self.augment.sectors:
            raise ValueError(f"augment.sectors: {self.augment.sectors} does not divide batch_size {self.batch_size}")
        return self

    @property
    def model(self) -> StudentSettings:
        return self.student


class TeacherConfig(RunConfig):
    """A run that trains a teacher: of a config with a key `teacher`."""

    teacher: TeacherSettings
    backend: Literal["auto", "native", "spconv", "mamba"] = "auto"  # whose kernels; see `Teacher.use_backend`
    augment: WindowAugmentConfig = WindowAugmentConfig()
    optimizer: OneCycleConfig = OneCycleConfig()
    epochs: Count = 50
    batch_size: Count = 2

    @property
    def model(self) -> TeacherSettings:
        return self.teacher


class Loader(yaml.SafeLoader):
    """YAML in which 00 is a name, as sequences have them, and not the number 0."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))


def find_config(name: str | Path) -> Path:
    """A config file by path, or one of the project's by name ("semantic_kitti")."""
    if Path(name).is_file():
        return Path(name)
    here = Path(__file__).parent
    folder = next((f for f in (here / "configs", here.parent / "configs") if f.is_dir()), None)
    known = sorted(path.stem for path in folder.glob("*.yaml")) if folder else []
    if str(name).removesuffix(".yaml") in known:
        return folder / f"{str(name).removesuffix('.yaml')}.yaml"
    raise InputError(f"--config {name}: no such file, and the configs by name are {', '.join(known)}")


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config | TeacherConfig:
    """Defaults, then the YAML, then `key=value` overrides such as `optimizer.lr=0.005` or `distill=null`.

    With a key `teacher` it is a teacher's run, else a student's.
    Raises: InputError naming the file and the key: unknown, or a value that does not fit.
    """
    content, source = {}, "defaults"
    keys = {override.partition("=")[0] for override in overrides}
    if path is not None:
        source = str(path)
        try:
            content = yaml.load(find_config(path).read_text(), Loader)
            content = {} if content is None else content
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not YAML: {error}") from error
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected keys and values, got {type(content).__name__}")
    if "distill.loss" in keys and isinstance(content.get("distill"), dict):
        content["distill"].pop("options", None)  # they belong to the loss that the YAML names
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f"'{override}': expected key=value, e.g. optimizer.lr=0.005")
        *parents, leaf = key.split(".")
        place = content
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        try:
            place[leaf] = yaml.load(value, Loader)
        except yaml.YAMLError as error:
            raise InputError(f"'{override}': the value is not YAML: {error}") from error
    kind = TeacherConfig if "teacher" in content else Config
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"]) + "."
        keys = {override.partition("=")[0] + ".": override for override in overrides}
        blamed = [o for key, o in keys.items() if key.startswith(place) or place.startswith(key)]
        raise InputError(f"{blamed[-1] if blamed else source}: {_explain(error, kind)}") from error


def _explain(error: ValidationError, kind: type[RunConfig]) -> str:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(place[:-1], kind)
        close = difflib.get_close_matches(place[-1], known, 1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    if first["type"] == "value_error":  # our own words, which say what was given
        words = first["msg"].removeprefix("Value error, ")
        return f"{key}: {words}" if key else words
    return f"{key}: {first['msg']}, got {first['input']!r}"


def _known_keys(place: list[str], kind: type[RunConfig]) -> list[str]:
    schema = kind.model_json_schema()
    node = schema
    for part in place:
        node = node.get("properties", {}).get(part, {})
        options = [node, *node.get("anyOf", []), *node.get("allOf", [])]
        reference = next((option["$ref"] for option in options if "$ref" in option), None)
        if reference:
            node = schema["$defs"][reference.split("/")[-1]]
    return list(node.get("properties", {}))


def dump_config(config: RunConfig) -> str:
    """The whole resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
