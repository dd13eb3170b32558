"""What a synthetic street holds: figures of what stands there, and a grammar that samples where it stands.

A street is a list of parts. Each is a flat polygon in metres: x to the right, y up from the road, z ahead of the camera.
"""

import math
from typing import NamedTuple

import numpy as np

NEAR, FAR = 2.0, 400.0  # metres; at the lower edge of an image the road is about 3 m away

# Each figure is a list of shapes in painting order: look, kind of shape, points "right,up" in centimetres, and a bar's width or
# a disc's radius. Looks are keys of rendering.LOOKS.
CAR_END = """
    black box -84,0 -60,40 | black box 60,0 84,40
    | car poly -82,90 -62,146 62,146 82,90 | glass poly -70,95 -55,138 55,138 70,95
    | car poly -90,28 -90,80 -80,95 80,95 90,80 90,28 | black box -88,26 88,40 | white box -25,48 25,60 | """
BOX_END = "black box -115,5 115,60 | {0} box -125,50 125,320 | black box -125,50 125,70 | "
HEAD, TAIL = (f"{look} box -87,65 -61,82 | {look} box 61,65 87,82" for look in ("white", "red"))
FIGURES = {
    "person": """
        shirt bar 14,140 38,85 11 | trousers bar -6,90 -22,0 17 | trousers bar 6,90 22,0 17 |
        shirt poly -17,82 17,82 23,140 10,148 -10,148 -23,140 | shirt bar -18,140 -32,88 11 |
        skin disc 0,160 13 | hair poly -14,160 6,166 13,166 8,176 -8,177""",
    "rider": """
        trousers bar -15,100 22,72 18 | trousers bar 22,75 6,30 15 | shirt poly -28,95 2,92 34,142 18,154 0,144 |
        shirt bar 22,142 46,104 11 | skin disc 28,166 12 | hair disc 26,171 11""",
    "bicycle": """
        black disc -52,34 36 | chrome disc -52,34 26 | black disc 52,34 36 | chrome disc 52,34 26 |
        car bar -52,34 -5,32 7 | car bar -52,34 -20,85 7 | car bar -5,32 -20,85 7 | car bar -5,32 38,80 7 |
        car bar -20,85 38,80 7 | car bar 38,80 52,34 7 | black box -34,88 -8,97 | black bar 38,80 46,105 8""",
    "motorcycle": """
        black disc -68,33 34 | chrome disc -68,33 14 | black disc 70,33 34 | chrome disc 70,33 14 |
        chrome box -35,22 30,60 | motor poly -95,85 -30,55 35,50 50,95 10,105 -20,82 |
        black box -75,80 -10,92 | chrome bar 42,95 72,35 10 |
        black bar 40,95 30,115 8 | white disc 56,92 10""",
    "car front": CAR_END + HEAD,
    "car back": CAR_END + TAIL,
    "car side": """
        car poly 15,92 65,146 250,146 330,92 | glass poly 50,95 80,138 150,138 150,95 |
        glass poly 160,95 160,138 240,138 295,95 | car poly 0,28 0,90 30,97 330,95 420,78 430,28 |
        black disc 85,33 34 | chrome disc 85,33 18 | black disc 345,33 34 | chrome disc 345,33 18""",
    "truck front": BOX_END.format("truck") + "glass box -105,155 105,255 | " + HEAD,
    "truck back": BOX_END.format("truck") + "black box -3,90 3,320 | " + TAIL,
    "truck side": """
        black box 0,50 800,95 | truck box 0,90 580,330 | motor box 600,60 800,270 | glass box 670,160 780,245 |
        black disc 130,48 48 | black disc 500,48 48 | black disc 700,48 48""",
    "bus front": BOX_END.format("bus") + "glass box -110,140 110,265 | black box -70,275 70,305 | " + HEAD,
    "bus back": BOX_END.format("bus") + "glass box -95,170 95,260 | " + TAIL,
    "bus side": "bus box 0,35 1030,320 | white box 0,100 1030,115 | black disc 200,48 48 | black disc 800,48 48"
    + "".join(f"| glass box {s},150 {s + 125},255" for s in range(30, 950, 145)),
    "post": "pole box -8,0 8,265",
    "lamp": "pole box -8,0 8,650 | pole bar 0,650 180,680 13",
    "traffic light": "black box -24,240 24,360 | red disc 0,335 15 | amber disc 0,300 15 | green disc 0,264 15",
    "round sign": "sign disc 0,270 44 | white disc 0,270 25",
    "warning sign": "sign poly -50,230 50,230 0,318 | white poly -26,244 26,244 0,290",
    "square sign": "sign box -40,230 40,308 | white box -21,249 21,289",
    "bin": "bin box -30,0 30,100 | black box -33,100 33,110",
    "trolley": "bin box 35,30 85,95 | black box 40,0 80,30",
}


class Part(NamedTuple):
    """One flat polygon of a scene; one of its coordinates is constant."""

    axis: int  # which one: 0, 1 or 2 for x, y or z
    points: list  # its corners (x, y, z) in metres
    label: str  # a class of Cityscapes
    look: str  # a key of rendering.LOOKS
    variant: int  # selects one of the look's colours


class Scene(NamedTuple):
    floor: list  # Parts, painted first
    items: list  # (order, Parts), painted from the largest order to the smallest
    shadows: list  # (outline on the ground in (x, z), height of what casts the shadow)


# --- Shapes ---


def disc(s, y, radius, n=14):
    """Outline of a circle around (s, y): a regular polygon."""
    return [(s + radius * math.cos(2 * math.pi * i / n), y + radius * math.sin(2 * math.pi * i / n)) for i in range(n)]


def box(s0, s1, y0, y1):
    return [(s0, y0), (s1, y0), (s1, y1), (s0, y1)]


def bar(p, q, width):
    """Outline of a line of a given width from p to q."""
    length = math.dist(p, q) * 2 / width
    a, b = (p[1] - q[1]) / length, (q[0] - p[0]) / length
    return [(p[0] + a, p[1] + b), (q[0] + a, q[1] + b), (q[0] - a, q[1] - b), (p[0] - a, p[1] - b)]


def outlines(text):
    """Parse a figure's text -> [(look, outline in metres)]."""
    figure = []
    for look, shape, *words in (entry.split() for entry in text.split("|") if entry.strip()):
        points = [tuple(int(n) / 100 for n in word.split(",")) for word in words if "," in word]
        if shape == "disc":
            points = disc(*points[0], int(words[-1]) / 100)
        elif shape == "bar":
            points = bar(*points, int(words[-1]) / 100)
        elif shape == "box":
            points = box(points[0][0], points[1][0], points[0][1], points[1][1])
        figure.append((look, points))
    return figure


FIGURES = {name: outlines(text) for name, text in FIGURES.items()}


# --- What stands where ---


def upright(figure, label, k, x, z, squeeze=1.0, size=1.0):
    """Parts of a figure at (x, z) that faces the camera; squeeze < 1 foreshortens it, squeeze < 0 mirrors it."""
    return [Part(2, [(x + s * squeeze * size, y * size, z) for s, y in points], label, look, k) for look, points in figure]


def ground(x0, x1, z0, z1, label, look):
    """A rectangle on the ground."""
    return Part(1, [(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], label, look, 0)


def panel(x, z0, z1, y0, y1, label, look, k):
    """An upright rectangle along the street."""
    return Part(0, [(x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)], label, look, k)


def stand(scene, rng, name, label, x, z, squeeze=1.0, size=1.0):
    """Add a figure in a random colour, and the shadow of what reaches the ground."""
    parts = upright(FIGURES[name], label, rng.integers(60), x, z, squeeze, size)
    scene.items.append((z, parts))
    feet = [s for part in parts for s, y, _ in part.points if y < 0.9]
    if feet:
        height = max(y for part in parts for _, y, _ in part.points)
        scene.shadows.append((box(min(feet), max(feet), z - 0.2, z + 0.3), height))


def two_wheeler(scene, rng, x, z, ridden):
    """Add a bicycle or a motorcycle, with its rider if it is ridden."""
    kind = rng.choice(["bicycle", "motorcycle"])
    squeeze = rng.uniform(0.45, 1) * rng.choice([-1, 1])
    stand(scene, rng, kind, kind, x, z, squeeze)
    if ridden:
        stand(scene, rng, "rider", "rider", x, z, squeeze)


def tree(scene, rng, x, z, height, order=None):
    """Add a trunk and eight ragged discs; dark ones are low and painted first, so the crown is light at the top."""
    crown = []
    for i in range(8):
        radius, turn = height * rng.uniform(0.14, 0.24), rng.uniform(0, 2 * math.pi)
        s, y = 0.2 * height * math.cos(turn), height * (0.55 + 0.04 * i + 0.08 * math.sin(turn))
        rough = (radius * rng.uniform(0.8, 1.2, 14)).tolist()
        ragged = [(s + r * a, y + r * b) for (a, b), r in zip(disc(0, 0, 1), rough)]
        crown += upright([("leaves", ragged)], "vegetation", i // 3, x, z)
    trunk = [("trunk", [(-0.16, 0), (0.16, 0), (0.1, height * 0.6), (-0.1, height * 0.6)])]
    scene.items.append((order or z, upright(trunk, "vegetation", 0, x, z) + crown))
    scene.shadows.append(([(x + a, z + b) for a, b in disc(0, 0, height / 5, 8)], height / 2))


def vehicle(scene, rng, kind, x, z, facing):
    """Add a car, truck or bus; facing: it drives towards the camera. Returns its length in metres."""
    half, length, height = {"car": (0.9, 4.3, 1.45), "truck": (1.25, 8.0, 3.2), "bus": (1.25, 10.3, 3.2)}[kind]
    k, size = rng.integers(60), rng.uniform(0.92, 1.12)
    parts = upright(FIGURES[kind + (" front" if facing else " back")], kind, k, x, z, 1, size)
    if abs(x) > half * size:  # the camera sees the side towards its axis
        plane = x - math.copysign(half * size, x)
        side = [(look, [(plane, y * size, z + s * size) for s, y in points]) for look, points in FIGURES[kind + " side"]]
        parts = [Part(0, points, kind, look, k) for look, points in side] + parts
    scene.items.append((z, parts))
    scene.shadows.append((box(x - half * size, x + half * size, z - 0.2, z + length * size), height * size))
    return length * size


def building(scene, rng, x, z0, z1):
    """Add a building of two to six storeys, whose long side stands at x."""
    k, height, depth = rng.integers(60), 3.0 * rng.integers(2, 7), math.copysign(rng.uniform(8, 14), x)
    front = [("roof", [(0, height), (depth / 2, height + 3), (depth, height)]), ("facade", box(0, depth, 0, height))]
    along = (("roof", height, height + rng.uniform(0.5, 2.2)), ("facade", 0, height), ("roof", 0, 0.5))
    parts = [panel(x, z0, z1, y0, y1, "building", look, k) for look, y0, y1 in along]
    scene.items.append((z1, parts + upright(front, "building", k, x, z0)))
    scene.shadows.append(([(x, z0), (x, z1)], height))


def roadside(scene, rng, style, side, edge):
    """Fill one side of the street beyond its sidewalk with buildings, walls, fences, open ground and side streets."""
    kinds = ("building", "wall", "fence", "open", "side street")
    chances = {"city": (56, 14, 14, 6, 10), "suburb": (32, 20, 22, 16, 10), "park": (10, 20, 30, 30, 10)}  # per cent
    x, z = side * edge, rng.uniform(2, 5)
    while z < 110:
        kind, end = rng.choice(kinds, p=np.divide(chances[style], 100)), z + rng.uniform(8, 17)
        if kind == "building":
            building(scene, rng, x, z, end)
        elif kind == "side street":
            scene.floor.append(ground(x - side * 6, side * 80, z, end, "road", "road"))
            if rng.random() < 0.5:  # a car waits in it, seen from its side
                stand(scene, rng, "car side", "car", x + side * rng.uniform(0, 3), (z + end) / 2, -side)
        else:
            scene.floor.append(ground(x, x + side * 40, z, end, "terrain", "terrain"))
            for tz in rng.uniform(z, end, rng.integers(2, 5)):  # always painted before the fence
                tree(scene, rng, x + side * rng.uniform(3, 14), tz, rng.uniform(4, 9), order=end + tz / 1000)
            height = rng.uniform(1.6, 2.6) if kind == "wall" else rng.uniform(1.0, 1.6)
            if kind != "open":
                scene.items.append((end, [panel(x, z, end, 0, height, kind, kind, rng.integers(60))]))
            elif rng.random() < 0.5:
                scene.items.append((end, [panel(x, z, end, 0, height, "vegetation", "leaves", 1)]))  # a hedge
        z = end


def sidewalk(scene, rng, side, curb, edge):
    """Add what stands between curb and edge: lamps, lights, signs, trees, people, parked two-wheelers, bins."""
    for z in np.arange(rng.uniform(5, 10), 80, rng.uniform(10, 16)):
        kind = rng.choice(["lamp", "traffic light", "round sign", "warning sign", "square sign"], p=[0.3, 0.3, 0.2, 0.1, 0.1])
        stand(scene, rng, "lamp" if kind == "lamp" else "post", "pole", side * (curb + 0.5), z, -side)
        if kind != "lamp":
            stand(scene, rng, kind, "traffic sign" if "sign" in kind else kind, side * (curb + 0.5), z)
    for _ in range(rng.poisson(1.6)):
        tree(scene, rng, side * (curb + 1.2), rng.uniform(9, 60), rng.uniform(4, 7))
    for _ in range(rng.poisson(4.0)):
        x, z = side * rng.uniform(curb + 0.6, edge - 0.4), 5 + rng.exponential(6)
        squeeze, size = rng.uniform(0.65, 1.1) * rng.choice([-1, 1]), rng.choice([1.05, 1.0, 0.95, 0.65])
        stand(scene, rng, "person", "person", x, z, squeeze, size)
    for _ in range(rng.poisson(1.5)):
        two_wheeler(scene, rng, side * rng.uniform(curb + 0.5, curb + 1.5), 5 + rng.exponential(4), ridden=False)
    for _ in range(rng.poisson(0.6)):
        stand(scene, rng, "bin", "static", side * (curb + 0.8), 6 + rng.exponential(9))


def traffic(scene, rng, lanes, curbs, parked):
    """Add vehicles in the lanes and along the curbs, riders between them, and people who cross."""
    rows = [(x, rng.uniform(7, 18), 0.75, x < -1) for x in lanes]
    rows += [(x - math.copysign(1.1, x), rng.uniform(5, 12), 0.6, x < 0) for x, there in zip(curbs, parked) if there]
    for x, z, full, facing in rows:
        while z < 80:
            if rng.random() < full:
                kind = rng.choice(["car", "truck", "bus"], p=[0.5, 0.26, 0.24] if x in lanes else [0.96, 0.02, 0.02])
                z += vehicle(scene, rng, kind, x + rng.uniform(-0.15, 0.15), z, facing)
            z += 1.5 + rng.exponential(9)
    for _ in range(rng.poisson(1.6)):
        two_wheeler(scene, rng, rng.uniform(curbs[0] + 1, curbs[1] - 1), 6 + rng.exponential(4), ridden=True)
    for _ in range(rng.poisson(0.8)):
        x, z, squeeze = rng.uniform(*curbs), 6 + rng.exponential(6), rng.choice([-1, 1])
        stand(scene, rng, "person", "person", x, z, squeeze)
        if rng.random() < 0.3:  # Cityscapes' class for moving things without a class; void in training
            stand(scene, rng, "trolley", "dynamic", x, z, squeeze)


def street(rng):
    """Sample a street -> (Parts in painting order, shadows as in Scene)."""
    style = rng.choice(["city", "suburb", "park"], p=[0.45, 0.35, 0.2])
    lanes = [
        x for x, chance in ((-6.8, 0.35), (-3.4, 1), (0.0, 1), (3.4, 0.35)) if rng.random() < chance
    ]  # the camera is in lane 0
    parked = rng.random(2) < 0.55
    curbs = (lanes[0] - 2.0 - 2.0 * parked[0], lanes[-1] + 2.0 + 2.0 * parked[1])
    edges = (curbs[0] - rng.uniform(2.5, 5), curbs[1] + rng.uniform(2.5, 5))
    beyond = "terrain" if style == "park" else "sidewalk"
    scene = Scene([Part(2, [(x, y, FAR) for x, y in box(-900, 900, -60, 400)], "sky", "sky", 0)], [], [])
    for _ in range(rng.poisson(4)):
        s, y, r = rng.uniform(-300, 300), rng.uniform(45, 160), rng.uniform(6, 16)
        cloud = [("cloud", [(s + 3 * a, y + b) for a, b in disc(i * r, 0, r)]) for i in range(3)]
        scene.floor.extend(upright(cloud, "sky", 0, 0, FAR))
    for x in range(-220, 220, 13):  # the far end of the street: roofs and trees in the haze
        height, k = rng.uniform(5, 16), rng.integers(60)
        if rng.random() < 0.6:
            scene.floor.extend(upright([("leaves", disc(0, 0, height))], "vegetation", k, x, 190))
        else:
            scene.floor.extend(upright([("facade", box(0, 13, 0, height))], "building", k, x, 190))
    scene.floor.append(ground(-300, 300, NEAR, 190, beyond, beyond))
    scene.floor.append(ground(*edges, NEAR, 190, "sidewalk", "sidewalk"))
    scene.floor.append(ground(*curbs, NEAR, 190, "road", "road"))
    scene.floor.extend(ground(x - 0.12, x + 0.12, NEAR, 190, "sidewalk", "curb") for x in curbs)
    for side, curb, edge in zip((-1, 1), curbs, edges):
        roadside(scene, rng, style, side, abs(edge))
        sidewalk(scene, rng, side, abs(curb), abs(edge))
    for x in lanes[1:]:
        dashes = np.arange(rng.uniform(2, 8), 100, 8)
        scene.floor.extend(ground(x - 1.78, x - 1.62, z, z + 3, "road", "paint") for z in dashes)
    if rng.random() < 0.35:  # a zebra crossing
        z, stripes = rng.uniform(7, 20), np.arange(curbs[0] + 0.5, curbs[1] - 0.6)
        scene.floor.extend(ground(x, x + 0.5, z, z + 3, "road", "paint") for x in stripes)
    traffic(scene, rng, lanes, curbs, parked)
    items = sorted(scene.items, key=lambda item: -item[0])
    return scene.floor + [part for _, parts in items for part in parts], scene.shadows
