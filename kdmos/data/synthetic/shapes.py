"""What stands and moves in a street, as solids: x forward, y left, z up from the ground, metres."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kdmos.data.synthetic.lidar import MATERIAL_INDEX as M
from kdmos.data.synthetic.raycast import Solid, box, ellipsoid, frustum, limb, polyhedron, prism

Generator = np.random.Generator


def _wheels(length: float, width: float, radius: float) -> list[Solid]:
    places = [(x * 0.31 * length, y * (width / 2 - 0.11)) for x in (-1, 1) for y in (-1, 1)]
    return [box((x - radius, y - 0.1, 0.0), (x + radius, y + 0.1, 2 * radius), M["rubber"]) for x, y in places]


def _panels(solids: list[Solid], rng: Generator) -> list[Solid]:
    """Painted solids, each with a shade of its own: one side of a vehicle answers unlike another, or not at all."""
    colour = np.exp(rng.uniform(np.log(0.12), np.log(1.7)))
    return [
        replace(solid, shade=colour * rng.uniform(0.6, 1.3)) if solid.material in (M["paint"], M["plaster"]) else solid
        for solid in solids
    ]


def _plates_and_mirrors(length: float, width: float, height: float) -> list[Solid]:
    """Number plates, lights and wing mirrors of a vehicle whose mirrors are at `height`."""
    end, side, front = length / 2, width / 2, length / 2 - 1.5
    plates = [box((x - 0.02, -0.26, 0.45), (x + 0.02, 0.26, 0.57), M["sign"]) for x in (-end, end)]
    mirrors = [box((front, y - 0.1, height), (front + 0.12, y + 0.1, height + 0.16), M["paint"]) for y in (-side, side)]
    return plates + mirrors


def car(rng: Generator) -> list[Solid]:
    """Windows let two rays in three through, to seats and to what is behind."""
    length, width, height = rng.uniform(3.7, 4.9), rng.uniform(1.65, 1.9), rng.uniform(1.4, 1.75)
    belt, rear, front, side = rng.uniform(0.78, 0.95), -length / 2, length / 2, width / 2
    tail = rng.uniform(0.0, 0.7)  # estate to saloon
    window = (rear + tail + 0.3, front - rng.uniform(1.7, 2.1), 0.2 - side, side - 0.2)
    waist, bonnet = rear + rng.uniform(0.3, 0.6) * length, front - rng.uniform(0.8, 1.2)
    body = [  # boot and rear doors, front doors, bonnet
        frustum((rear, waist, -side, side), (rear + 0.05, waist, 0.05 - side, side - 0.05), (0.22, belt), M["paint"]),
        frustum((waist, bonnet, -side, side), (waist, bonnet, 0.05 - side, side - 0.05), (0.22, belt), M["paint"]),
        frustum(
            (bonnet, front, -side, side), (bonnet, front - 0.25, 0.1 - side, side - 0.1), (0.22, belt - 0.1), M["paint"]
        ),
        box((window[0], window[2], height - 0.05), (window[1], window[3], height), M["paint"]),
    ]
    seats = [box((x, -0.6, 0.5), (x + 0.2, 0.6, 1.15), M["cloth"]) for x in (-0.15 * length, 0.08 * length)]
    low = (rear + tail, front - 1.05, 0.06 - side, side - 0.06)
    glass = frustum(low, window, (belt, height - 0.05), M["glass"], rng.choice([0.35, 1.0], p=[0.8, 0.2]))
    wheels = _wheels(length, width, 0.31)
    return _panels([*body, glass, *seats, *wheels, *_plates_and_mirrors(length, width, belt)], rng)


def van(rng: Generator) -> list[Solid]:
    length, width, height = rng.uniform(4.6, 6.2), rng.uniform(1.8, 2.1), rng.uniform(1.8, 2.7)
    rear, front, side = -length / 2, length / 2, width / 2
    belt, cab = rng.uniform(0.9, 1.15), front - rng.uniform(1.2, 1.6)
    back = cab - rng.uniform(0.3, 0.6) * length
    glazed = rng.random() < 0.4  # a minibus, else a panel van
    lean = rng.uniform(0.0, 0.08) * (rng.random() < 0.5)  # many sides are upright from sill to roof

    def body(x0: float, x1: float, z0: float, z1: float, inwards: float) -> Solid:
        return frustum((x0, x1, -side, side), (x0, x1, inwards - side, side - inwards), (z0, z1), M["paint"])

    upper = (belt, height - 0.2)
    high = [
        frustum(
            (start, end, 0.02 - side, side - 0.02),
            (start, end, 0.02 + lean - side, side - 0.02 - lean),
            upper,
            M["glass"],
            0.4,
        )
        if glazed
        else body(start, end, *upper, lean)
        for start, end in ((rear, back), (back, cab))
    ]
    roof = side - lean - rng.uniform(0.0, 0.1)
    solids = [
        *(body(start, end, 0.25, belt, 0.0) for start, end in ((rear, back), (back, cab), (cab, front))),
        *high,
        box((rear, -roof, height - 0.2), (cab, roof, height), M["paint"]),
        frustum(
            (cab, front - 0.6, 0.05 - side, side - 0.05),
            (cab, cab + 0.2, 0.1 - side, side - 0.1),
            upper,
            M["glass"],
            0.4,
        ),
        box((cab - 0.9, -0.7, 0.6), (cab - 0.6, 0.7, 1.5), M["cloth"]),
        *_wheels(length, width, 0.34),
        *_plates_and_mirrors(length, width + 0.1, belt + 0.1),
    ]
    return _panels(solids, rng)


def truck(rng: Generator) -> list[Solid]:
    """A box on wheels behind a cab; one in three with an open bed."""
    length, height = rng.uniform(6.0, 11.0), rng.uniform(2.6, 3.8)
    rear, front, top = -length / 2, length / 2, rng.uniform(2.3, 3.0)
    middle = (rear + front - 2.3) / 2
    if rng.random() < 0.33:
        bed = [box((rear, -1.2, 0.9), (front - 2.3, 1.2, 1.1), M["wood"])]
        bed += [box((rear, y - 0.04, 1.1), (front - 2.3, y + 0.04, 1.7), M["paint"]) for y in (-1.2, 1.2)]
        bed.append(box((middle - 1.2, -0.9, 1.1), (middle + 1.0, 0.8, rng.uniform(1.4, 2.4)), M["wood"]))
    else:
        bed = [
            box((start, -1.25, 0.9), (end, 1.25, height), M["plaster"])
            for start, end in ((rear, middle), (middle, front - 2.3))
        ]
    cab = [
        box((front - 2.0, -1.2, 0.5), (front, 1.2, 1.5), M["paint"]),
        box((front - 2.0, -1.15, 1.5), (front - 0.1, 1.15, top - 0.3), M["glass"], 0.5),
        box((front - 2.0, -1.2, top - 0.3), (front, 1.2, top), M["paint"]),
        box((rear, -0.4, 0.5), (front - 2.0, 0.4, 0.9), M["metal"]),
    ]
    return _panels([*bed, *cab, *_wheels(length, 2.4, 0.48), *_plates_and_mirrors(length, 2.5, 1.8)], rng)


def trailer(rng: Generator) -> list[Solid]:
    """One that was left at the roadside, its bar on the ground."""
    length, width, height = rng.uniform(1.8, 4.5), rng.uniform(1.2, 2.2), rng.uniform(0.8, 2.4)
    half, side = length / 2, width / 2
    wheels = [box((-0.3, y - 0.1, 0.0), (0.3, y + 0.1, 0.6), M["rubber"]) for y in (-side, side)]
    bar = box((half, -0.05, 0.2), (half + 1.0, 0.05, 0.35), M["metal"])
    return _panels([box((-half, -side, 0.45), (half, side, 0.45 + height), M["paint"]), bar, *wheels], rng)


def bus(rng: Generator) -> list[Solid]:
    half = rng.uniform(5.0, 6.0)
    solids = [
        box((-half, -1.25, 0.35), (0.0, 1.25, 1.1), M["paint"]),
        box((0.0, -1.25, 0.35), (half, 1.25, 1.1), M["paint"]),
        box((-half, -1.25, 1.1), (half, 1.25, 2.3), M["glass"], 0.6),
        box((-half, -1.25, 2.3), (half, 1.25, 3.1), M["paint"]),
        *(box((x, -0.9, 0.9), (x + 0.2, 0.9, 1.7), M["cloth"]) for x in np.arange(1.5 - half, half - 1.0, 2.5)),
        *_wheels(2 * half, 2.4, 0.48),
        *_plates_and_mirrors(2 * half, 2.6, 1.9),
    ]
    return _panels(solids, rng)


def person(rng: Generator):
    """Solids of a person as a function of the phase of the step, radians; standing at 0."""
    size = rng.uniform(0.65, 0.75) if rng.random() < 0.12 else rng.uniform(0.9, 1.08)
    wide, swing = rng.uniform(0.85, 1.25), rng.uniform(0.8, 1.1)
    bag = rng.random() < 0.25

    def at(phase: float) -> list[Solid]:
        step = swing * np.sin(phase) * size
        solids = [
            ellipsoid((0, 0, 1.17 * size), (0.13 * wide, 0.21 * wide, 0.36 * size), material=M["cloth"]),
            ellipsoid((0.02, 0, 1.63 * size), (0.1, 0.09, 0.13), material=M["cloth"]),
        ]
        for side, sign in ((0.1, 1), (-0.1, -1)):
            foot = (0.38 * step * sign, side, 0.03)
            solids.append(limb((0, side, 0.95 * size), foot, 0.085 * wide, M["cloth"]))
            hand = (-0.25 * step * sign, 2.9 * side, 0.8 * size)
            solids.append(limb((0, 2.3 * side * wide, 1.42 * size), hand, 0.055, M["cloth"]))
        if bag:
            solids.append(box((-0.28, -0.16, 1.0 * size), (-0.1, 0.16, 1.4 * size), M["cloth"]))
        return solids

    return at


def cyclist(rng: Generator):
    """Solids of a rider on a bicycle as a function of the phase of the pedals, radians."""
    lean, size = rng.uniform(0.05, 0.4), rng.uniform(0.92, 1.06)
    bicycle = _bicycle()

    def at(phase: float) -> list[Solid]:
        hip, shoulder = np.array([-0.2, 0, 0.92]), np.array([lean - 0.1, 0, 1.45 * size])
        solids = [*bicycle, limb(hip, shoulder + np.array((0, 0, 0.1)), 0.18, M["cloth"])]
        solids.append(ellipsoid(shoulder + np.array((0.08, 0, 0.22)), (0.1, 0.09, 0.13), material=M["cloth"]))
        for side, turn in ((0.12, phase), (-0.12, phase + np.pi)):
            foot = (0.1 + 0.17 * np.cos(turn), side, 0.3 + 0.17 * np.sin(turn))
            solids.append(limb(hip + np.array((0, side, 0)), foot, 0.085, M["cloth"]))
            solids.append(limb(shoulder + np.array((0, 1.5 * side, -0.05)), (0.45, 2 * side, 1.02), 0.05, M["cloth"]))
        return solids

    return at


def _bicycle() -> list[Solid]:
    return [
        box((-0.85, -0.03, 0.02), (0.85, 0.03, 0.68), M["metal"], 0.35),
        box((0.35, -0.28, 0.98), (0.45, 0.28, 1.04), M["metal"]),
    ]


def motorcyclist(rng: Generator):
    """Solids of a rider on a motorcycle; the phase plays no part."""
    machine = motorcycle(rng)

    def at(phase: float) -> list[Solid]:
        rider = [limb((-0.35, 0, 0.75), (0.1, 0, 1.5), 0.22, M["cloth"])]
        rider.append(ellipsoid((0.15, 0, 1.6), (0.14, 0.12, 0.15), material=M["paint"]))
        rider += [limb((-0.3, side, 0.85), (0.15, 1.3 * side, 0.35), 0.1, M["cloth"]) for side in (-0.17, 0.17)]
        return [*machine, *rider]

    return at


def motorcycle(rng: Generator) -> list[Solid]:
    return [
        box((-1.0, -0.08, 0.0), (1.0, 0.08, 0.62), M["rubber"], 0.7),
        ellipsoid((0.05, 0, 0.65), (0.75, 0.2, 0.3), material=M["paint"]),
        box((0.45, -0.35, 0.98), (0.55, 0.35, 1.05), M["metal"]),
    ]


def bicycle(rng: Generator) -> list[Solid]:
    return _bicycle()


def tree(rng: Generator) -> tuple[list[Solid], list[Solid]]:
    """Trunk and crown."""
    base, wide = rng.uniform(1.6, 3.5), rng.uniform(1.0, 2.6)
    crown = []
    for _ in range(rng.integers(2, 4)):
        centre = (*rng.normal(0, 0.35 * wide, 2), base + rng.uniform(0.5, 1.3) * wide)
        radii = wide * rng.uniform(0.7, 1.1, 3)
        crown.append(ellipsoid(centre, radii, material=M["leaves"], fill=rng.uniform(0.2, 0.5)))
    return [prism(rng.uniform(0.08, 0.25), (0.0, base + wide), material=M["bark"])], crown


def bush(rng: Generator) -> list[Solid]:
    wide, high = rng.uniform(0.4, 1.3), rng.uniform(0.4, 1.1)
    return [ellipsoid((0, 0, 0.8 * high), (wide, wide * rng.uniform(0.7, 1.3), high), material=M["leaves"], fill=0.6)]


def wood(wide: float, rng: Generator) -> list[Solid]:
    """The edge of a wood or a row of tall bushes."""
    places = np.arange(-wide / 2, wide / 2, 3.0)
    return [
        ellipsoid((x, rng.normal(0, 1), 0.9 * high), (2.2, 2.0, high), material=M["leaves"], fill=0.4)
        for x, high in zip(places, rng.uniform(1.5, 5.0, len(places)))
    ]


def building(length: float, depth: float, rng: Generator) -> list[Solid]:
    """A block of the given footprint, its front at y = 0, reaching to y = -depth; half of them with a gable."""
    height, half = rng.uniform(3.0, 13.0), length / 2
    solids = [box((-half, -depth, -1.0), (half, 0, height), M["plaster"])]
    if rng.random() < 0.5:
        rise, over = rng.uniform(0.6, 1.1) * depth / 2, 0.4
        ridge, eaves = height + rise, height - 0.2
        slope = rise / (depth / 2)
        planes = [[0, 1, 1 / slope, (ridge / slope) - depth / 2], [0, -1, 1 / slope, ridge / slope + depth / 2]]
        planes += [[1, 0, 0, half + over], [-1, 0, 0, half + over], [0, 0, -1, -eaves]]
        low, high = (-half - over, -depth - over, eaves), (half + over, over, ridge)
        solids.append(polyhedron(planes, low, high, M["wood"]))
    for x in np.arange(-half + 1.5, half - 1.5, rng.uniform(2.5, 5.0)):  # doors, bays and balconies
        if rng.random() < 0.3:
            bottom = rng.choice([-1.0, 0.9, 2.8])
            top = min(bottom + rng.uniform(1.2, 3.2), height)
            solids.append(box((x - 0.7, 0, bottom), (x + 0.7, rng.uniform(0.1, 0.9), top), M["plaster"]))
    return solids


def barrier(length: float, rng: Generator) -> tuple[list[Solid], int]:
    """A wall, fence or hedge along x, and its raw id."""
    half, kind = length / 2, rng.integers(3)
    if kind == 0:
        return [box((-half, -0.12, -0.5), (half, 0.12, rng.uniform(0.6, 2.2)), M["plaster"])], 52
    if kind == 1:
        return [box((-half, -0.04, 0.0), (half, 0.04, rng.uniform(0.9, 1.8)), M["wood"], rng.uniform(0.3, 0.9))], 51
    wide = rng.uniform(0.25, 0.6)
    return [box((-half, -wide, 0.0), (half, wide, rng.uniform(0.8, 2.2)), M["leaves"], 0.9)], 70


def sapling(rng: Generator) -> list[Solid]:
    """A young tree or a sparse shrub: some twigs in the air."""
    wide, high = rng.uniform(0.3, 1.2), rng.uniform(0.8, 3.0)
    crown = ellipsoid((0, 0, 0.6 * high), (wide, wide, 0.5 * high), material=M["leaves"], fill=rng.uniform(0.04, 0.2))
    return [prism(0.02, (0.0, high), sides=4, material=M["bark"]), crown]


def weeds(rng: Generator) -> list[Solid]:
    """A strip of tall grass along x."""
    half, wide = rng.uniform(0.5, 3.0), rng.uniform(0.1, 0.5)
    return [box((-half, -wide, 0.0), (half, wide, rng.uniform(0.2, 0.9)), M["grass"], rng.uniform(0.05, 0.4))]


def posts(rng: Generator) -> list[Solid]:
    """A row of thin posts along x."""
    spacing, high = rng.uniform(0.5, 2.0), rng.uniform(0.6, 1.4)
    return [prism(0.03, (0.0, high), (x, 0.0), 5, M["metal"]) for x in np.arange(rng.integers(2, 7)) * spacing]


def lamp(rng: Generator) -> list[Solid]:
    return [prism(rng.uniform(0.06, 0.12), (0.0, rng.uniform(4.5, 8.0)), material=M["metal"])]


def sign(rng: Generator) -> tuple[list[Solid], list[Solid]]:
    """Pole and plate."""
    high, half = rng.uniform(2.0, 2.6), rng.uniform(0.25, 0.4)
    plate = box((-0.02, -half, high), (0.02, half, high + 2 * half), M["sign"])
    return [prism(0.035, (0.0, high + 2 * half), sides=6, material=M["metal"])], [plate]


def clutter(rng: Generator) -> list[Solid]:
    """A bin, box, bollard or bench."""
    x, y, z = rng.uniform(0.1, 0.8), rng.uniform(0.1, 0.4), rng.uniform(0.4, 1.3)
    return [box((-x, -y, 0.0), (x, y, z), M["metal"])]
