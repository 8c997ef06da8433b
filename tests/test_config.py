"""The config: defaults, the two published runs, overrides; every fault is one InputError that names file and key."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kdmos import config as config_module
from kdmos.config import Config, dump_config, find_config, load_config
from kdmos.errors import InputError
from kdmos.losses import DISTILLATION
from kdmos.settings import MotionSettings, PolarGrid, ResidualGrid, StudentSettings

CONFIGS = Path(config_module.__file__).parents[1] / "configs"


@pytest.fixture
def write(tmp_path):
    """write(text) -> path of a YAML file."""

    def make(text: str | bytes) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


# ---- defaults and the published runs


def test_defaults():
    config = load_config()
    assert config == Config()
    assert config.student == StudentSettings("kdmos", ("unlabeled", "static", "movable", "moving"), 3)
    assert config.student.grid == PolarGrid() and config.student.motion == MotionSettings("published", 8, 7)
    assert config.distill is None and config.class_weights is None and config.gradient_clip is None
    assert config.data.drop_static_scans is False and config.data.kitti_road is False
    assert (config.augment.rotate, config.augment.flip, config.augment.translation) == (True, True, 0.1)
    assert (config.seed, config.epochs, config.batch_size, config.accumulate) == (0, 150, 8, 1)
    assert (config.accelerator, config.devices, config.precision) == ("auto", 1, "32-true")


@pytest.mark.parametrize(
    ("name", "lr", "gamma", "options"),
    [
        ("semantic_kitti", 0.01, 0.3, {"variant": "authors", "temperature": 4.0, "beta": 3.0}),
        ("semantic_kitti_paper", 0.005, 0.25, {"variant": "paper"}),
    ],
)
def test_published_runs_by_name_and_by_path(name, lr, gamma, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a name is found from anywhere
    config = load_config(name)
    assert config == load_config(f"{name}.yaml") == load_config(CONFIGS / f"{name}.yaml")
    assert find_config(name) == CONFIGS / f"{name}.yaml"
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (lr, 0.9, 1e-4)
    assert (optimizer.warmup_epochs, optimizer.decay) == (1.0, 0.99)
    assert (config.batch_size, config.epochs, config.accumulate) == (8, 150, 1)
    assert config.data.drop_static_scans is True and config.data.kitti_road is False
    assert config.data.train is None and config.data.valid is None  # the official splits
    assert config.student == StudentSettings()  # the published grid, 4 classes, 8 channels, look-ahead 7
    distill = config.distill
    assert (distill.teacher, distill.loss, distill.gamma) == ("mambamos", "wdcd", gamma)
    assert distill.options == options
    DISTILLATION[distill.loss](**distill.options)  # the loss knows them all


def test_a_file_in_the_working_folder_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("semantic_kitti").write_text("epochs: 3\n")
    assert load_config("semantic_kitti").epochs == 3


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}\n"])
def test_a_yaml_that_says_nothing_is_the_defaults(write, text):
    assert load_config(write(text)) == Config()


def test_a_config_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        load_config().epochs = 3


# ---- overrides


def test_overrides_win_over_the_yaml_and_later_over_earlier(write):
    path = write("epochs: 7\nbatch_size: 3\noptimizer: {lr: 0.5, momentum: 0.1}\n")
    config = load_config(path, ["epochs=8", "optimizer.lr=0.25", "epochs=9"])
    assert (config.epochs, config.batch_size) == (9, 3)
    assert (config.optimizer.lr, config.optimizer.momentum) == (0.25, 0.1)


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("optimizer.lr=5e-3", lambda c: c.optimizer.lr, 0.005),  # YAML 1.1 alone takes this for text
        ("optimizer.weight_decay=0", lambda c: c.optimizer.weight_decay, 0.0),
        ("student.name=motionbev", lambda c: c.student.name, "motionbev"),
        ("student.grid.bins=[48, 32, 8]", lambda c: c.student.grid, PolarGrid(bins=(48, 32, 8))),
        ("student.grid={rho: [2, 30]}", lambda c: c.student.grid, PolarGrid(rho=(2.0, 30.0))),
        ("student.motion.lookahead=0", lambda c: c.student.motion, MotionSettings(lookahead=0)),
        ("student.motion.form=causal", lambda c: c.student.motion, MotionSettings("causal", 8, 0)),
        ("student.motion.num_channels=4", lambda c: c.student.motion, MotionSettings("published", 4, 3)),
        ("student.motion.grid.rows=90", lambda c: c.student.motion.grid, ResidualGrid(rows=90)),
        (
            "student.classes=[static, moving]",
            lambda c: (c.student.classes, c.student.moving),
            (("static", "moving"), 1),
        ),
        ("class_weights=[0, 1, 1, 9.5]", lambda c: c.class_weights, (0.0, 1.0, 1.0, 9.5)),
        ("data.train=['00', '03']", lambda c: c.data.train, ("00", "03")),
        ("data.drop_static_scans=true", lambda c: c.data.drop_static_scans, True),
        ("data.drop_static_scans=kept.txt", lambda c: c.data.drop_static_scans, Path("kept.txt")),
        ("data.root=/data/a=b", lambda c: c.data.root, Path("/data/a=b")),  # only the first = counts
        ("gradient_clip=2", lambda c: c.gradient_clip, 2.0),
        ("devices=auto", lambda c: c.devices, "auto"),
        ("distill.gamma=0.1", lambda c: (c.distill.gamma, c.distill.loss), (0.1, "wdcd")),  # from null
        ("distill={}", lambda c: (c.distill.gamma, c.distill.teacher), (0.3, "mambamos")),
        ("distill.options.beta=8", lambda c: c.distill.options, {"beta": 8}),
    ],
)
def test_override(override, read, expected):
    assert read(load_config(None, [override])) == expected


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("data.root=00", lambda c: c.data.root, Path("00")),
        ("output=2026", lambda c: c.output, Path("2026")),
        ("data.train=[00, 08, 10]", lambda c: c.data.train, ("00", "08", "10")),
    ],
)
def test_names_of_digits_are_names(override, read, expected):
    assert read(load_config(None, [override])) == expected


def test_null_takes_away():
    assert load_config("semantic_kitti", ["distill=null"]).distill is None
    assert load_config("semantic_kitti", ["distill="]).distill is None
    assert load_config(None, ["class_weights=[1, 2]", "class_weights=null"]).class_weights is None


def test_an_override_keeps_its_neighbours():
    config = load_config("semantic_kitti", ["distill.options.beta=8", "data.workers=0"])
    assert config.distill.options == {"variant": "authors", "temperature": 4.0, "beta": 8}
    assert config.data.drop_static_scans is True and config.data.workers == 0
    # no list is added to, no nested setting mixed: a whole value replaces a whole value
    assert load_config("semantic_kitti", ["distill.options={beta: 8}"]).distill.options == {"beta": 8}


# ---- faults


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("epoch", "unknown key epoch; did you mean epochs?"),
        ("optimiser.lr", "unknown key optimiser; did you mean optimizer?"),
        ("optimizer.moment", "unknown key optimizer.moment; did you mean momentum?"),
        (
            "optimizer.betas",
            "unknown key optimizer.betas; known here: kind, lr, momentum, weight_decay, warmup_epochs, decay",
        ),
        ("data.rot", "unknown key data.rot; did you mean root?"),
        ("augment.flips", "unknown key augment.flips; did you mean flip?"),
        ("distill.gama", "unknown key distill.gama; did you mean gamma?"),
        ("student.clases", "unknown key student.clases; did you mean classes?"),
        ("student.grid.bin", "unknown key student.grid.bin; did you mean bins?"),
        ("student.motion.look_ahead", "unknown key student.motion.look_ahead; did you mean lookahead?"),
        ("student.motion.grid.row", "unknown key student.motion.grid.row; did you mean rows?"),
    ],
)
def test_unknown_key_with_a_suggestion(key, match, write):
    with pytest.raises(InputError, match=re.escape(match)):
        load_config(None, [f"{key}=1"])
    *parents, leaf = key.split(".")
    content = {leaf: 1}
    for parent in reversed(parents):
        content = {parent: content}
    path = write(yaml.safe_dump(content))
    with pytest.raises(InputError, match=f"^{re.escape(f'{path}: {match}')}"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("epochs=1.5", r"epochs: .*valid integer.* got 1\.5"),
        ("epochs=0", "epochs: .*greater than or equal to 1, got 0"),
        ("seed=-1", "seed: .*greater than or equal to 0, got -1"),
        ("seed.more=1", "seed: .*valid integer, got {'more': 1}"),
        ("optimizer.lr=fast", r"optimizer\.lr: .*valid number.* got 'fast'"),
        ("optimizer.lr=0", r"optimizer\.lr: .*greater than 0, got 0"),
        ("optimizer.lr=.nan", r"optimizer\.lr: .*got nan"),
        ("optimizer.decay=-1", r"optimizer\.decay: .*greater than 0"),
        ("optimizer=null", "optimizer: .*got None"),
        ("optimizer=3", "optimizer: .*got 3"),
        ("augment.rotate=sometimes", r"augment\.rotate: .*valid boolean.* got 'sometimes'"),
        ("augment.translation=-0.1", r"augment\.translation: .*greater than or equal to 0"),
        ("precision=fp16", "precision: .*'32-true', 'tf32', 'bf16-mixed' or '16-mixed', got 'fp16'"),
        ("accelerator=tpu", "accelerator: .*got 'tpu'"),
        ("devices=many", "devices.*got 'many'"),
        ("class_weights=[1, a]", r"class_weights\.1: .*got 'a'"),
        ("data.train={a: 1}", r"data\.train.*got {'a': 1}"),
        ("data.drop_static_scans=3", r"data\.drop_static_scans.*got 3"),
        ("distill.loss=kld", r"distill\.loss: .*'wdcd'.*got 'kld'"),
        ("student=kdmos", "student: .*got 'kdmos'"),
        ("student.name=kdmoss", r"student: .*one of \('kdmos', 'motionbev'\), got 'kdmoss'"),
        ("student.classes=[ground, car]", 'student: .*one of the classes must be "moving"'),
        ("student.moving=4", "student: .*moving class 4 is not among the 4 classes"),
        ("student.grid.bins=[48, 32]", r"student\.grid\.bins\.2: .*required"),
        ("student.grid.bins=[8, 8, 8]", "student: .*needs 16 x 16 cells"),
        ("student.grid.rho=[50, 2]", r"student\.grid: .*rho must be \(low, high\)"),
        ("student.motion.form=both", r"student\.motion: .*one of \('published', 'causal'\), got 'both'"),
        ("student.motion.num_channels=7", r"student\.motion: .*even and at least 2, got 7"),
        ("student.motion.lookahead=8", r"student\.motion: .*lookahead must lie in 0\.\.7 for the published form"),
        ("student.motion.lookahead=-1", r"student\.motion: .*lookahead must lie in 0\.\.7"),
        ("student.motion={num_channels: 4, lookahead: 5}", r"student\.motion: .*lookahead must lie in 0\.\.3"),
        ("student.motion={form: causal, lookahead: 1}", r"student\.motion: .*0\.\.0 for the causal form"),
        ("student.motion.grid.rows=0", r"student\.motion\.grid: .*rows, columns and max_range must be positive"),
    ],
)
def test_values_that_do_not_fit(override, match):
    with pytest.raises(InputError, match=match):
        load_config(None, [override])


@pytest.mark.parametrize("override", ["epochs", "", "=3", "epochs:3", "--epochs"])
def test_override_that_is_not_key_and_value(override):
    with pytest.raises(InputError, match=f"^'{override}': expected key=value, e.g. optimizer.lr=0.005"):
        load_config(None, [override])


def test_override_that_is_not_yaml():
    with pytest.raises(InputError, match=r"^'student\.grid\.bins=\[48, 32': the value is not YAML"):
        load_config(None, ["student.grid.bins=[48, 32"])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("optimizer: [1", "not YAML: .*line 1"),
        ("a: 1\n---\nb: 2\n", "not YAML: .*single document"),
        (b"\xff\xfe\x00\xff", "not YAML: .*utf-8"),
        ("!!python/object/apply:os.getcwd []", "not YAML: .*could not determine a constructor"),  # nothing is run
        ("- epochs: 3\n", "expected keys and values, got list"),
        ("epochs=3\n", "expected keys and values, got str"),
        ("3: epochs\n", "3: Keys should be strings"),
    ],
)
def test_files_that_are_no_config(write, text, match):
    path = write(text)
    with pytest.raises(InputError, match=f"(?s)^{re.escape(str(path))}: {match}"):
        load_config(path)


@pytest.mark.parametrize("name", ["semantic_kiti", "nowhere/mine.yaml", "configs", "."])
def test_missing_file_lists_the_configs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    assert {"semantic_kitti", "semantic_kitti_paper"} <= set(known.split(", "))
    expected = f"--config {name}: no such file, and the configs by name are {known}"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        load_config(name)


# ---- what is saved beside a checkpoint


@pytest.mark.parametrize("name", [None, *sorted(path.stem for path in CONFIGS.glob("*.yaml"))])
def test_dumped_and_loaded_is_the_same(name, write):
    config = load_config(name)
    assert load_config(write(dump_config(config))) == config


def test_the_dump_is_the_whole_config(write):
    content = yaml.safe_load(dump_config(load_config(None, ["student.motion.form=causal"])))
    assert list(content) == list(Config.model_fields)
    assert content["student"]["moving"] == 3 and content["student"]["motion"]["lookahead"] == 0  # as they came out
    assert content["distill"] is None


names = st.text(min_size=1, max_size=8)
positive = st.floats(min_value=1e-12, max_value=1e12)


@given(
    train=st.none() | st.lists(names, max_size=3).map(tuple),
    scan_list=st.booleans() | names.map(lambda name: Path(f"{name}.txt")),
    output=names.map(Path),
    numbers=st.tuples(positive, positive, positive),
    options=st.dictionaries(names, st.none() | st.booleans() | st.integers() | positive | names, max_size=3),
    motion=st.sampled_from([("causal", 8, None), ("published", 4, 2), ("published", 8, 0)]),
    devices=st.sampled_from([1, 4, "auto"]),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_config_dumped_and_loaded_is_the_same(
    tmp_path_factory, train, scan_list, output, numbers, options, motion, devices
):
    """Above all names that YAML would take for something else: 00, 1_0, yes, null, 1:30."""
    lr, weight_decay, gamma = numbers
    config = Config(
        output=output,
        data={"train": train, "drop_static_scans": scan_list},
        student=StudentSettings(motion=MotionSettings(*motion)),
        optimizer={"lr": lr, "weight_decay": weight_decay},
        distill={"teacher": "no", "options": options, "gamma": gamma},
        devices=devices,
    )
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_names_like_numbers_survive(write):
    for name in ("00", "08", "1_0", "1:30", "yes", "null", "~", "0x1", "1e3", "", " 1"):
        config = load_config(None, [f"data.train=['{name}']"])
        assert load_config(write(dump_config(config))).data.train == (name,)


def test_another_loss_does_not_inherit_the_options_of_the_yaml_s_loss():
    assert load_config("semantic_kitti", ["distill.loss=dkd"]).distill.options == {}
    given = load_config("semantic_kitti", ["distill.loss=dkd", "distill.options={beta: 2}"])
    assert given.distill.options == {"beta": 2}


def test_scans_that_become_one_fill_the_batch():
    assert load_config(None, ["batch_size=6", "augment.sectors=3"]).augment.sectors == 3
    with pytest.raises(InputError, match=r"defaults: augment\.sectors: 3 does not divide batch_size 8"):
        load_config(None, ["augment.sectors=3"])
