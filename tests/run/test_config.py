import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otnn.errors import InputError
from otnn.models import ACTIVATIONS, ARCHITECTURES, HEADS
from otnn.run.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    TrainingConfig,
    from_mapping,
    load,
    merge,
    presets,
    to_toml,
)


def test_presets() -> None:
    assert {"digits", "fast"} <= set(presets())
    assert load(preset="digits").model.architecture == "dense"
    assert load(preset="fast").model.architecture == "conv"
    for name in presets():
        assert load(preset=name).loss.margin is not None


def test_the_data_choose_their_preset() -> None:
    assert load() == load(preset="digits")
    assert load(options={"data.name": "fashion-mnist"}).model.architecture == "conv"
    assert load(overrides=["data.name=fashion-mnist"]).training.epochs == load(preset="fast").training.epochs
    assert load(preset="fast", options={"data.name": "digits"}).model.architecture == "conv"
    two = load(options={"data.name": "mnist", "data.classes": ["0", "8"]})
    assert two.training == load(preset="binary").training
    assert load(overrides=["data.name=mnist", "data.classes=0,8"]).model == two.model
    assert load(options={"data.name": "mnist", "data.classes": ["0", "8", "9"]}).model.architecture == "conv"
    assert load(options={"data.name": "digits", "data.classes": ["0", "8"]}).training == load(preset="digits").training


def test_another_architecture_does_not_take_the_widths_of_the_preset() -> None:
    assert load(overrides=["model.architecture=conv"]).model.widths is None
    both = load(overrides=["model.architecture=conv", "model.widths=[8, 16]"])
    assert both.model.widths == (8, 16)
    assert load(overrides=["model.widths=[8, 16]"]).model.architecture == "dense"


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('seed = 1\n[training]\nepochs = 2\nbatch_size = 32\n[data]\nname = "digits"\n', encoding="utf-8")
    config = load(
        file=file,
        options={"training.epochs": 3, "training.batch_size": None, "seed": 4},
        overrides=["seed=5", "training.shift=1", "training.shift=2"],
    )
    assert (config.seed, config.training.epochs, config.training.batch_size, config.training.shift) == (5, 3, 32, 2)
    assert config.training.learning_rate == load(preset="digits").training.learning_rate


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("training.epochs=30", "training", "epochs", 30),
        (" training.epochs = 30 ", "training", "epochs", 30),
        ("training.learning_rate=1e-2", "training", "learning_rate", 0.01),
        ("training.learning_rate=1", "training", "learning_rate", 1.0),
        ("training.flip=true", "training", "flip", True),
        ("model.widths=[64, 32]", "model", "widths", (64, 32)),
        ("data.classes=[0, 8]", "data", "classes", ("0", "8")),
        ('data.classes=["cat", "dog"]', "data", "classes", ("cat", "dog")),
        ("data.name=a=b", "data", "name", "a=b"),
        ("data.name=./my folder", "data", "name", "./my folder"),
        ("data.name=7", "data", "name", "7"),
        ('data.name="7"', "data", "name", "7"),
        ("loss.kr_form=one_vs_all", "loss", "kr_form", "one_vs_all"),
        ("model.head=orthogonal", "model", "head", "orthogonal"),
        ("model.activation=groupsort4", "model", "activation", "groupsort4"),
    ],
)
def test_overrides_are_toml_or_text(override: str, section: str, name: str, value: object) -> None:
    found = getattr(getattr(load(overrides=[override]), section), name)
    assert found == value
    assert type(found) is type(value)


def test_alpha_takes_the_place_of_the_margin_of_the_preset() -> None:
    loss = load(overrides=["loss.alpha=0.1"]).loss
    assert (loss.alpha, loss.margin, loss.hinge_weight) == (0.1, None, None)
    loss = load(overrides=["loss.alpha=0.1", "loss.hinge_weight=3"]).loss
    assert (loss.alpha, loss.margin, loss.hinge_weight) == (0.1, None, 3.0)
    loss = load(overrides=["loss.margin=0.7"]).loss
    assert (loss.margin, loss.hinge_weight) == (0.7, load().loss.hinge_weight)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epoch=3", "training.epoch: no such setting; expected one of training.epochs, training.batch_size,"),
        ("epochs=3", "epochs: no such setting; expected one of seed, twin, data, model, loss, training"),
        ("optimizer.name=adam", "optimizer: no such setting; expected one of seed, twin, data, model, loss, training"),
        ("=3", ": no such setting; expected one of seed"),
        ("training.epochs", '--set training.epochs: expected name=value, such as "training.epochs=30"'),
        ("training.epochs=1.5", "training.epochs: expected int, got 1.5"),
        ("training.epochs=true", "training.epochs: expected int, got True"),
        ("training.epochs=ten", "training.epochs: expected int, got 'ten'"),
        ("training.epochs=", "training.epochs: expected int, got ''"),
        ("training.epochs.more=1", "training.epochs: expected int, got {'more': 1}"),
        ("training.flip=1", "training.flip: expected bool, got 1"),
        ("training.learning_rate=fast", "training.learning_rate: expected float, got 'fast'"),
        ("training.learning_rate=true", "training.learning_rate: expected float, got True"),
        ("training=3", "training: expected a table of settings, got 3"),
        ("loss=3", "loss: expected a table of settings, got 3"),
        ("loss=alpha", "loss: expected a table of settings, got 'alpha'"),
        ("data=digits", "data: expected a table of settings, got 'digits'"),
        ("model.widths=64", "model.widths: expected a list, got 64"),
        ("model.widths=[64, 3.5]", "model.widths: expected int, got 3.5"),
        ('model.widths=["a"]', "model.widths: expected int, got 'a'"),
        ("data.name=true", "data.name: expected str, got True"),
        ("seed=zero", "seed: expected int, got 'zero'"),
        ("training.epochs=0", "training.epochs: expected a number > 0, got 0"),
        ("training.batch_size=-1", "training.batch_size: expected a number > 0, got -1"),
        ("training.batch_size=1", "training.batch_size: expected at least 2, got 1: batch normalisation needs two"),
        ("training.learning_rate=0", "training.learning_rate: expected a number > 0, got 0.0"),
        ("training.learning_rate=nan", "training.learning_rate: expected a number > 0, got nan"),
        ("training.twin_learning_rate=-1", "training.twin_learning_rate: expected a number > 0, got -1.0"),
        ("training.warmup_share=1", "training.warmup_share: expected a share in (0, 1), got 1.0"),
        ("training.warmup_share=0.0", "training.warmup_share: expected a share in (0, 1), got 0.0"),
        ("model.head=linear", "model.head: expected one of unit_rows, orthogonal, frobenius, got 'linear'"),
        ("model.activation=relu", "model.activation: expected one of maxmin, groupsort4, groupsort8, fullsort, abs, "),
        ("training.shift=-1", "training.shift: expected a number of pixels >= 0, got -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(override: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load(overrides=[override])
    assert str(caught.value).startswith(words)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        load(preset="slow")
    assert str(caught.value) == f"preset: expected one of {', '.join(presets())}, got 'slow'"


@pytest.mark.parametrize("content", [b"seed = ", b"\xff\xfe", b"[training]\nepochs = 1\nepochs = 2"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a TOML configuration"):
        load(file=file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.toml: cannot be read as a TOML configuration"):
        load(file=tmp_path / "missing.toml")


def test_wrong_names_and_types_in_a_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    for content, words in (
        ("[trainig]\nepochs = 1\n", "trainig: no such setting"),
        ("[training]\nepochs = '1'\n", "training.epochs: expected int, got '1'"),
        ("loss = 3\n", "loss: expected a table of settings, got 3"),
        ("seed = 2020-01-01\n", "seed: expected int, got datetime.date"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(InputError) as caught:
            load(file=file)
        assert str(caught.value).startswith(words)


def test_a_loss_needs_a_margin_or_alpha() -> None:
    with pytest.raises(InputError) as caught:
        Config()
    assert str(caught.value) == (
        "loss: expected margin, or alpha for a learned margin, got neither; use --set loss.margin=0.5"
    )
    assert Config(loss=LossConfig(name="cross_entropy")).loss.margin is None
    assert Config(loss=LossConfig(alpha=0.1)).loss.alpha == 0.1


def test_merge_goes_table_by_table_and_shares_nothing() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    changes = {"a": {"c": 4}, "d": {"e": 5}, "f": {"g": 6}}
    merge(base, changes)
    assert base == {"a": {"b": 1, "c": 4}, "d": {"e": 5}, "f": {"g": 6}}
    base["f"]["g"] = 7  # type: ignore[index]
    assert changes["f"] == {"g": 6}


def test_loading_does_not_change_its_arguments() -> None:
    options = {"training.epochs": 3, "loss.alpha": 0.1}
    load(options=options, overrides=["loss.hinge_weight=2"])
    assert options == {"training.epochs": 3, "loss.alpha": 0.1}
    assert load().loss.margin is not None


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().training.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize("preset", ["digits", "binary", "fast", "photos"])
def test_presets_survive_toml(preset: str) -> None:
    config = load(preset=preset)
    assert from_mapping(Config, tomllib.loads(to_toml(config))) == config


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
positive = st.floats(1e-9, 1e9)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    data=st.builds(
        DataConfig,
        name=text,
        data_dir=st.none() | text,
        size=st.none() | st.integers(1, 512),
        classes=st.none() | st.lists(text, max_size=3).map(tuple),
        target=st.none() | text,
        skip_broken=st.booleans(),
    ),
    model=st.builds(
        ModelConfig,
        architecture=st.sampled_from(ARCHITECTURES),
        widths=st.none() | st.lists(st.integers(), max_size=3).map(tuple),
        activation=st.sampled_from(sorted(ACTIVATIONS)),
        head=st.sampled_from(sorted(HEADS)),
    ),
    loss=st.builds(LossConfig, margin=positive, hinge_weight=st.none() | positive, temperature=positive),
    training=st.builds(TrainingConfig, epochs=st.integers(1, 99), learning_rate=positive, flip=st.booleans()),
    seed=st.integers(0, 2**63 - 1),
    twin=st.booleans(),
)
def test_every_configuration_survives_toml(
    data: DataConfig, model: ModelConfig, loss: LossConfig, training: TrainingConfig, seed: int, twin: bool
) -> None:
    config = Config(seed, twin, data, model, loss, training)
    assert from_mapping(Config, tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize("override", ["model.architecture=mlp", "loss.name=hinge", "loss.kr_form=hard", "loss.alpha=0"])
def test_names_of_choices_are_checked_at_once(override: str) -> None:
    with pytest.raises(InputError):
        load(overrides=[override])
