"""The card says what the header says, in words, and nothing that it does not say."""

from dataclasses import replace

import pytest

from kdmos.card import MARK, model_card, write_card
from kdmos.models import Student, build_student, build_teacher, load_student
from kdmos.settings import MotionSettings, PolarGrid

GRID = PolarGrid(bins=(48, 32, 8))
HEADER = {
    "version": "0.1.0",
    "commit": "0123456789abcdef",
    "seed": 3,
    "init": None,
    "training_data": ["00", "01"],
    "validation_data": ["08"],
    "distill": {
        "teacher": "mambamos",
        "logits": "logits",
        "loss": "wdcd",
        "options": {"variant": "paper"},
        "gamma": 0.3,
    },
    "metrics": {"moving_iou": 0.51239, "iou_static": 0.99, "iou_movable": None, "rule_moving_iou": 0.4},
    "epoch": 7,
    "step": 70,
    "sensor": {"x": [-80.0, 80.0], "y": [-70.5, 70.0], "z": [-5.0, 3.0], "remission": [0.0, 0.99]},
}


def rows(card: str) -> dict:
    """First column -> second column of its tables."""
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return dict(cell for cell in cells if len(cell) == 2)


def test_all_that_a_header_says():
    card = model_card(build_student(grid=GRID, motion=MotionSettings(lookahead=2)), "best", HEADER)
    said = rows(card)
    assert card.startswith("# best\n")
    assert "kdmos student, upsampling by DySample" in said["network"] and "parameters" in said["network"]
    assert said["classes"] == "unlabeled, static, movable, moving (moving: number 3)"
    assert said["polar grid"] == "48 x 32 x 8 (range, yaw, height): 1.85 to 50.15 m away, all round, z -4 to 2 m"
    assert said["motion channels"] == "K = 8 of the published form"
    assert said["look-ahead"] == "2 scans: an answer comes 0.2 s late at 10 Hz"
    assert said["history"] == "7 scans before the one in question"
    assert said["saw in training"] == "x -80 to 80 m, y -70.5 to 70 m, z -5 to 3 m, remission 0 to 0.99"
    assert (said["trained on"], said["validated on"]) == ("sequences 00, 01", "sequence 08")
    assert said["distilled"] == "from the teacher `mambamos` by wdcd, variant paper, weight 0.3"
    assert (said["epoch"], said["step"], said["seed"]) == ("7", "70", "3")
    assert said["made by"] == "kdmos 0.1.0, commit 0123456789ab"
    assert said["licence"].startswith("not stated in the file")
    assert said["moving"] == "0.512" and said["moving, by the training-free rule"] == "0.400"
    assert "movable" not in said and "began from" not in said and "None" not in card
    assert "assumed" not in card


def test_what_moves_comes_first_among_the_scores():
    card = model_card(build_student(grid=GRID), "best", {"metrics": {"iou_static": 0.9, "moving_iou": 0.5}})
    assert card.index("| moving | 0.500 |") < card.index("| static | 0.900 |")


def test_a_name_of_two_lines_stays_in_its_row():
    assert rows(model_card(build_student(grid=GRID), "best", {"init": "a\nb"}))["began from"] == "`a b`"


def test_without_a_header_it_says_what_is_assumed():
    card = model_card(build_student("motionbev", 2), "motionbev")
    said = rows(card)
    assert "transposed convolution" in said["network"] and said["classes"] == "static, moving (moving: number 1)"
    assert "polar grid, form and grids of the motion channels, and look-ahead are assumed to be the published" in card
    assert set(said) == {
        "network",
        "classes",
        "polar grid",
        "motion channels",
        "their grid",
        "look-ahead",
        "history",
        "licence",
    }


def test_a_causal_student_learnt_from_labels_alone():
    student = build_student(grid=replace(GRID, phi=(-0.5, 0.5)), motion=MotionSettings("causal"))
    said = rows(model_card(student, "causal", {"distill": None, "training_data": [f"{i:02d}" for i in range(20)]}))
    assert said["look-ahead"] == "none: an answer needs no scan after its own"
    assert said["history"] == "14 scans before the one in question"
    assert said["distilled"] == "no: it learnt from the labels alone"
    assert said["trained on"] == "20 sequences, 00 to 19"
    assert "-28.65 to 28.65 degrees" in said["polar grid"]


def test_a_teacher():
    teacher = build_teacher(
        num_scans=3, encoder_depths=(1, 1), encoder_channels=(8, 16), decoder_depths=(1,), decoder_channels=(8,)
    )
    card = model_card(teacher, "teacher")
    assert rows(card)["reads"] == "3 scans, the last of which it labels; voxels of 0.09 m"
    assert "size of a voxel are assumed" in card


@pytest.fixture
def student() -> Student:
    return build_student(grid=GRID)


def test_a_card_is_written_anew_until_people_make_it_theirs(tmp_path, student):
    path = tmp_path / "best.md"
    assert write_card(path, student, "best", HEADER) == f"{path}: its card"
    assert "0.512" in path.read_text()
    write_card(path, student, "best", HEADER | {"metrics": {"moving_iou": 0.6}})
    assert "0.600" in path.read_text() and "0.512" not in path.read_text()
    mine = path.read_text().replace(MARK, "Licence: ours.")
    path.write_text(mine)
    assert "left as it is" in write_card(path, student, "best", HEADER)
    assert path.read_text() == mine


def test_the_shipped_student():
    said = rows(model_card(load_student("synthetic"), "synthetic"))
    assert said["trained on"] == "159 sequences, 100 to 806"
    assert "4,025,854 parameters" in said["network"]
