"""What a street is drawn from: the variety that training sees, and scenes that test one thing each."""

from __future__ import annotations

from dataclasses import dataclass, replace

Span = tuple[float, float]  # drawn uniformly between


@dataclass(frozen=True)
class StreetSettings:
    """What one street is drawn from; the defaults are the streets of training.

    styles: urban, residential, rural; as often as named.
    ego: What the vehicle does: straight, turn, stand or stop; as often as named.
    speed: Of the vehicle where it goes straight or stops, m/s.
    lane: Width, metres.
    parking: Share of the urban and residential streets that have parked vehicles.
    parked: Share of the places that are taken.
    large: Share of vans, trucks, trailers and the like among what is parked.
    aside: Metres from the middle of the vehicle's lane to the middle of what is parked along it; None: by the widths.
    strays: How many vehicles stand anywhere else, each 50 m: by the road, on lawns, in a lane.
    clutter: Factor on how many thin and sparse things stand about: twigs, tall grass, posts.
    traffic: Factor on how much moves.
    kinds: Which of `traffic.KINDS` move; None: all.
    pace: Of all that moves, m/s; None: by its kind.
    stops: Share of the cars, vans and persons that stop on the way.
    acts: (name of `traffic.ACTS`, chance that the street has it).
    """

    styles: tuple[str, ...] = ("urban", "residential", "rural")
    ego: tuple[str, ...] = ("straight", "straight", "straight", "turn", "stand", "stop")
    speed: Span = (1.0, 15.0)
    lane: Span = (2.6, 4.6)
    parking: float = 0.85
    parked: Span = (0.0, 0.9)
    large: Span = (0.1, 0.5)
    aside: Span | None = None
    strays: Span = (0.0, 4.0)
    clutter: Span = (0.3, 2.0)
    traffic: Span = (0.2, 1.4)
    kinds: tuple[str, ...] | None = None
    pace: Span | None = None
    stops: float = 0.15
    acts: tuple[tuple[str, float], ...] = (
        ("queue", 0.35),
        ("overtaking", 0.12),
        ("truck", 0.08),
        ("crossing", 0.2),
    )


_QUIET = replace(StreetSettings(), traffic=(0.2, 0.7), acts=())
_STRAIGHT = ("straight",)
_TOWN = ("urban", "residential")
# Streets with less in them, for comparisons: what each kind of thing is worth in training.
_SPARSE = StreetSettings(
    ego=("straight", "straight", "turn", "stand", "stop"),
    lane=(3.0, 4.6),
    parking=0.75,
    parked=(0.0, 0.6),
    large=(0.15, 0.15),
    strays=(0.0, 0.0),
    clutter=(0.0, 0.0),
    traffic=(0.4, 1.6),
    acts=(),
)
_USUAL = StreetSettings()
SCENES = {
    "street": _USUAL,
    "sparse": _SPARSE,
    "sparse_parked": replace(
        _SPARSE,
        lane=_USUAL.lane,
        parking=_USUAL.parking,
        parked=_USUAL.parked,
        large=_USUAL.large,
        strays=_USUAL.strays,
    ),
    "sparse_acts": replace(_SPARSE, ego=_USUAL.ego, acts=_USUAL.acts),
    "sparse_clutter": replace(_SPARSE, clutter=_USUAL.clutter),
    "sparse_brisk": replace(
        _SPARSE, kinds=("car", "van", "truck", "bus", "cyclist", "motorcyclist", "person"), stops=0.0
    ),
    "parked": replace(
        _QUIET, styles=_TOWN, ego=_STRAIGHT, speed=(2.0, 14.0), parking=1.0, parked=(0.7, 1.0), large=(0.4, 0.7),
        aside=(2.5, 4.0),
    ),
    "queue": replace(_QUIET, ego=("straight", "stand", "stop"), speed=(1.5, 8.0), acts=(("queue", 1.0),)),
    "ego_stands": StreetSettings(ego=("stand",)),
    "slow": replace(
        _QUIET, traffic=(1.5, 3.0), kinds=("slow car", "person", "cyclist"), pace=(0.3, 1.0), stops=0.0,
    ),
    "stop_and_go": replace(_QUIET, traffic=(0.8, 1.8), kinds=("car", "slow car", "van", "person"), stops=1.0),
    "overtaking": replace(_QUIET, ego=_STRAIGHT, speed=(3.0, 11.0), acts=(("overtaking", 1.0),)),
    "truck_close": replace(_QUIET, ego=("straight", "straight", "stand"), speed=(1.5, 8.0), acts=(("truck", 1.0),)),
    "crossing": replace(
        _QUIET, styles=_TOWN, ego=("straight", "straight", "stop"), speed=(2.0, 9.0), parking=1.0, parked=(0.5, 0.9),
        acts=(("crossing", 1.0),),
    ),
    "nothing": replace(_QUIET, traffic=(0.0, 0.0)),
}  # fmt: skip
