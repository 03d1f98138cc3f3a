"""Configuration of a run: dataclasses, presets, TOML files and `--set` overrides, checked where they enter."""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from otnn.errors import InputError
from otnn.losses.functional import HINGE_FORMS, KR_FORMS
from otnn.models import ACTIVATIONS, ARCHITECTURES, HEADS

LOSSES = ("auto", "hkr", "one_vs_all_hkr", "soft_hkr", "cross_entropy")

# The preset of a data set that is not asked for another; anything else takes "photos". Of two classes of a set that
# takes "fast" it is "binary".
_PRESET_OF = {"digits": "digits", "mnist": "fast", "fashion-mnist": "fast"}


@dataclass(frozen=True)
class DataConfig:
    """Which images, and which task on them.

    Attributes:
        name: a known data set, a folder, a zip or a Hugging Face name.
        data_dir: folder of local data sets; the environment variable OTNN_DATA_DIR by default.
        size: images become size x size pixels; the data set's own size by default.
        classes: the classes of the task, by name or index; all by default.
        target: an attribute column, for a binary task.
        validation_share: share of the training split held out for choices.
        skip_broken: leave out images that cannot be read.
    """

    name: str = "digits"
    data_dir: str | None = None
    size: int | None = None
    classes: tuple[str, ...] | None = None
    target: str | None = None
    validation_share: float = 0.1
    skip_broken: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Which network.

    Attributes:
        architecture: "dense", "conv" or "resnet".
        widths: see `otnn.models.build`; chosen by the picture size by default.
        activation: of the OTNN: "maxmin", "groupsort4", "groupsort8", "fullsort", "abs" or "householder".
        head: of the OTNN: "unit_rows", "orthogonal" or "frobenius".
    """

    architecture: str = "conv"
    widths: tuple[int, ...] | None = None
    activation: str = "maxmin"
    head: str = "unit_rows"


@dataclass(frozen=True)
class LossConfig:
    """Which loss trains the OTNN; see `otnn.losses` for the meaning of each number.

    Attributes:
        name: "auto" (hkr for two classes, soft_hkr for more), "hkr", "one_vs_all_hkr", "soft_hkr" or "cross_entropy".
        margin: per side; absent where alpha learns it.
        hinge_weight: lambda; 1/alpha by default.
        alpha: share of the data inside a learned margin.
        temperature: of soft_hkr and cross_entropy.
        kr_form: "soft" or "one_vs_all", for soft_hkr.
        hinge_form: "joint" or "separate", for soft_hkr.
    """

    name: str = "auto"
    margin: float | None = None
    hinge_weight: float | None = None
    alpha: float | None = None
    temperature: float = 10.0
    kr_form: str = "soft"
    hinge_form: str = "joint"

    def __post_init__(self) -> None:
        """Refuse names that no loss has."""
        for name, known in (("name", LOSSES), ("kr_form", KR_FORMS), ("hinge_form", HINGE_FORMS)):
            if getattr(self, name) not in known:
                raise InputError(f"loss.{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.alpha is not None and not 0 < self.alpha < 1:
            raise InputError(f"loss.alpha: expected a share in (0, 1), got {self.alpha}")


@dataclass(frozen=True)
class TrainingConfig:
    """How both networks are trained: the same budget, Adam with a one-cycle schedule.

    Attributes:
        epochs: passes over the training split.
        batch_size: samples per step over all processes.
        learning_rate: the peak of the one-cycle schedule.
        twin_learning_rate: the same for the unconstrained twin.
        warmup_share: share of the steps before the peak, in (0, 1).
        flip: mirror images at random.
        shift: move images by up to so many pixels at random.
        radius: the L2 radius of the certified accuracy that is shown during training.
        adversarial: the L2 radius of the attacks that a third network, an ordinary one, is trained on; none without it.
        attack_steps: steps of each of these attacks.
    """

    epochs: int = 15
    batch_size: int = 256
    learning_rate: float = 3e-3
    twin_learning_rate: float = 3e-3
    warmup_share: float = 0.2
    flip: bool = False
    shift: int = 0
    radius: float = 0.25
    adversarial: float | None = None
    attack_steps: int = 7


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run.

    Attributes:
        seed: of initialisation, batches and augmentation; the splits of the data do not depend on it.
        twin: train the unconstrained twin as well.
    """

    seed: int = 0
    twin: bool = True
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        """Refuse numbers that cannot train anything."""
        training = self.training
        for name in ("epochs", "batch_size", "learning_rate", "twin_learning_rate"):
            if not getattr(training, name) > 0:
                raise InputError(f"training.{name}: expected a number > 0, got {getattr(training, name)}")
        for name in ("learning_rate", "twin_learning_rate"):
            if 1e38 < getattr(training, name) < math.inf:  # torch cannot convert it to float32
                raise InputError(f"training.{name}: expected a rate such as 0.003, got {getattr(training, name)}")
        if not 0 < training.warmup_share < 1:
            raise InputError(f"training.warmup_share: expected a share in (0, 1), got {training.warmup_share}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed: expected a whole number in 0..2**63-1, got {self.seed}")
        if not 0 <= training.radius < math.inf:
            raise InputError(f"training.radius: expected a finite number >= 0, got {training.radius}")
        if training.adversarial is not None and not 0 < training.adversarial < math.inf:
            raise InputError(f"training.adversarial: expected an L2 radius > 0, got {training.adversarial}")
        if training.attack_steps < 1:
            raise InputError(f"training.attack_steps: expected at least 1, got {training.attack_steps}")
        if training.shift < 0:
            raise InputError(f"training.shift: expected a number of pixels >= 0, got {training.shift}")
        if training.batch_size < 2:
            raise InputError("training.batch_size: expected at least 2, got 1: batch normalisation needs two samples")
        for section in ("data", "loss", "training"):
            for name, value in vars(getattr(self, section)).items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise InputError(f"{section}.{name}: expected a finite number, got {value}")
        for name, known in (("architecture", ARCHITECTURES), ("activation", ACTIVATIONS), ("head", HEADS)):
            if getattr(self.model, name) not in known:
                got = getattr(self.model, name)
                raise InputError(f"model.{name}: expected one of {', '.join(known)}, got {got!r}")
        if self.loss.margin is None and self.loss.alpha is None and self.loss.name != "cross_entropy":
            raise InputError(
                "loss: expected margin, or alpha for a learned margin, got neither; use --set loss.margin=0.5"
            )


def presets() -> list[str]:
    """The names of the presets."""
    folder = resources.files("otnn.run") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load(
    preset: str | None = None,
    file: Path | None = None,
    options: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Compose a configuration: a preset, then a TOML file, then options by dotted name, then "name=value" overrides.

    Args:
        preset: one of `presets()`; by default the one that suits the data set.
        file: a TOML file that names only what it changes.
        options: dotted names and values; None is left out.
        overrides: "training.epochs=30" and the like, values as TOML, or plain text.

    Raises:
        InputError: an unknown preset, name or type.

    Example:
        >>> load(overrides=["training.epochs=3"]).training.epochs
        3
    """
    layers: list[dict[str, Any]] = []
    if file is not None:
        try:
            layers.append(tomllib.loads(file.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{file}: cannot be read as a TOML configuration: {error}") from None
    given: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if value is not None:
            merge(given, _nested(name, value))
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise InputError(f'--set {override}: expected name=value, such as "training.epochs=30"')
        merge(given, _nested(name.strip(), _value(text.strip())))
    layers.append(given)
    if preset is None:
        data: dict[str, Any] = {}
        for layer in layers:
            merge(data, layer["data"] if isinstance(layer.get("data"), dict) else {})
        preset = _preset_of(data)
    if preset not in presets():
        raise InputError(f"preset: expected one of {', '.join(presets())}, got {preset!r}")
    text = (resources.files("otnn.run") / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
    result: dict[str, Any] = {}
    for layer in (tomllib.loads(text), *layers):
        loss = layer.get("loss")
        if isinstance(loss, Mapping) and "alpha" in loss and "margin" not in loss:
            # alpha asks for a learned margin: a fixed one said earlier gives way, and its hinge weight with it
            for name in ("margin", "hinge_weight"):
                result.get("loss", {}).pop(name, None)
        model = layer.get("model")
        if isinstance(model, Mapping) and "architecture" in model and "widths" not in model:
            result.get("model", {}).pop("widths", None)  # widths said earlier are those of another architecture
        merge(result, layer)
    config: Config = from_mapping(Config, result)
    return config


def _preset_of(data: Mapping[str, Any]) -> str:
    """The preset that suits a data set and its classes."""
    preset = _PRESET_OF.get(str(data.get("name", "digits")), "photos")
    classes = data.get("classes")
    if isinstance(classes, str):
        classes = classes.split(",")
    return "binary" if preset == "fast" and isinstance(classes, list | tuple) and len(classes) == 2 else preset


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Write `changes` over `base`, table by table."""
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(base.get(name), dict):
            merge(base[name], value)
        else:
            base[name] = dict(value) if isinstance(value, Mapping) else value


def from_mapping(kind: type, values: Mapping[str, Any], where: str = "") -> Any:
    """Make a configuration dataclass of nested mappings.

    Raises:
        InputError: an unknown name, or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        path = f"{where}{name}"
        if name not in hints:
            raise InputError(f"{path}: no such setting; expected one of {', '.join(where + known for known in hints)}")
        arguments[name] = _converted(hints[name], value, path)
    return kind(**arguments)


def to_toml(config: Config) -> str:
    """Write a configuration as TOML; settings that are None are left out.

    Example:
        >>> from_mapping(Config, tomllib.loads(to_toml(load()))) == load()
        True
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(entry) for name, entry in value.items() if entry is not None}
        return list(value) if isinstance(value, tuple) else value

    return tomli_w.dumps(plain(dataclasses.asdict(config)))


def _nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    result: dict[str, Any] = value
    return result


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _converted(hint: Any, value: Any, path: str) -> Any:
    """Check a value against a type hint; whole numbers pass as floats, lists as tuples."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{path}: expected a table of settings, got {value!r}")
        return from_mapping(typing.cast(type, hint), value, f"{path}.")
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        if not isinstance(value, list | tuple):
            raise InputError(f"{path}: expected a list, got {value!r}")
        return tuple(_converted(typing.get_args(hint)[0], entry, path) for entry in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{path}: expected {hint.__name__}, got {value!r}")
    return value
