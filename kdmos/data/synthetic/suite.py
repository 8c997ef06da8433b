"""The synthetic benchmark: fixed, versioned data sets that train nothing, and what each of them tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kdmos.data.synthetic.lidar import SENSORS, SensorSettings
from kdmos.errors import InputError

if TYPE_CHECKING:
    from kdmos.synth import SynthSettings

SUITE_VERSION = 2  # another one has other data, whose scores compare with none of this one
FIRST_RESERVED_SEED = 1_000_000  # from here on seeds belong to the suite and its twin, and train nothing
TWIN_OFFSET = 100_000  # from the seed of a part to that of its twin
SUITES = ("streets", "scenes", "sensors")
ALL = "all"
LEAD = 7  # scans before and after those that count: as many as a whole window needs
HDL64 = SENSORS["hdl64"]


class Part(NamedTuple):
    """One data set of a suite.

    suite, name: Also the folders it lies in. tests: What it is there for, in a line. settings: What makes it.
    lead: Scans at either end of each sequence that do not count.
    """

    suite: str
    name: str
    tests: str
    settings: SynthSettings
    lead: int = LEAD

    def folder(self, output: Path) -> Path:
        """Where it lies below the suites' folder."""
        return output / self.suite / self.name

    @property
    def sequences(self) -> list[str]:
        """Names of its sequences."""
        return [f"{number:02d}" for number in range(self.settings.sequences)]

    @property
    def scored(self) -> frozenset[int]:
        """Frames that count, of each sequence."""
        return frozenset(range(self.lead, self.settings.scans - self.lead))

    @property
    def is_twin(self) -> bool:
        """Whether it is of the validation twin."""
        return self.settings.seed >= FIRST_RESERVED_SEED + TWIN_OFFSET


def suite_parts(suite: str = ALL, twin: bool = False) -> list[Part]:
    """The parts of a suite, or of all suites.

    Args:
        suite: One of `SUITES`, or "all".
        twin: The validation twin: the same parts with other seeds, to choose models on.
    Raises: InputError for an unknown name.
    """
    if suite not in (*SUITES, ALL):
        raise InputError(f"--suite {suite}: one of {', '.join(SUITES)}, {ALL}")
    return [part for name in (SUITES if suite == ALL else (suite,)) for part in _PARTS[name](TWIN_OFFSET * twin)]


# Each part has its number, from which its seed is: a part that is added or dropped changes no other. Parts with one
# number see the same streets, by another sensor or in another form: what differs between their scores is due to that.


def _part(suite: str, name: str, tests: str, number: int, sensor: SensorSettings = HDL64, **settings) -> Part:
    from kdmos.synth import SynthSettings  # here: it stands beside the command, which knows of the suites

    return Part(suite, name, tests, SynthSettings(sensor, FIRST_RESERVED_SEED + number, **settings))


def _streets(offset: int) -> Iterable[Part]:
    tests = "Ordinary streets: the one number to compare models by."
    yield _part("streets", "streets", tests, offset, sequences=24, scans=40)


def _scenes(offset: int) -> Iterable[Part]:
    raw, poses = {"compensate": False}, {"scene": "street", "drift": 1.0, "jitter": 1.0}
    scenes = {
        "parked": (1, {}, "Rows of parked vehicles passed closely: nothing of them may be taken for moving."),
        "parked_raw": (1, {"scene": "parked", **raw}, "The same streets, each point in the frame it was measured in."),
        "queue": (3, {}, "Vehicles one behind another that stand, start or arrive."),
        "ego_stands": (4, {}, "The vehicle stands while others move around it."),
        "slow": (5, {}, "Cars, cyclists and persons at 0.3 to 1 m/s."),
        "stop_and_go": (6, {}, "Cars, vans and persons that stop on the way and go on."),
        "overtaking": (7, {}, "Movers that go the vehicle's way, some hardly faster or slower."),
        "truck_close": (8, {}, "A truck or bus close beside the vehicle, which hides much of the rest."),
        "crossing": (9, {}, "Persons, and a cyclist now and then, who cross from behind what is parked."),
        "nothing": (10, {}, "Nothing moves: all that is found is a false alarm."),
        "odometry": (11, poses, "Streets with the poses of an odometry, which drift and jitter."),
    }
    for name, (number, changes, tests) in scenes.items():
        yield _part("scenes", name, tests, offset + 100 + number, **{"scene": name, **changes}, sequences=6, scans=30)


def _sensors(offset: int) -> Iterable[Part]:
    # On the front end of a truck's cab, whose roof is 0.4 m below.
    roof = ((-2.5, -1.1, -1.6), (0.8, 1.1, -0.4))
    sensors = {
        "beams_16": (replace(HDL64, beams=((15.0, -15.0, 16),), columns=1800), "16 beams, two degrees apart."),
        "beams_32": (replace(HDL64, beams=((10.67, -30.67, 32),), columns=2170), "32 beams over 41 degrees."),
        "beams_128": (replace(HDL64, beams=((22.5, -22.5, 128),), columns=1024), "128 beams, half the columns."),
        "low": (replace(HDL64, height=0.6, vehicle=None), "On a small robot, 0.6 m above the ground."),
        "high": (replace(HDL64, height=2.8, vehicle=roof), "On a truck's roof, 2.8 m above the ground."),
        "front": (replace(HDL64, field_of_view=(-60.0, 60.0)), "A sensor that looks ahead, 120 degrees wide."),
        "no_remission": (replace(HDL64, has_remission=False), "A sensor that gives no remission."),
    }
    for name, (sensor, tests) in sensors.items():
        yield _part("sensors", name, tests, offset + 201, sensor, sequences=4, scans=30)


_PARTS = {"streets": _streets, "scenes": _scenes, "sensors": _sensors}
