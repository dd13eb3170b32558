"""Stage 0, only without real data: draw a small, labelled pair of synthetic driving domains to run the others on.

    python demo/make_demo_data.py demo                            # 400 + 200 + 60 frames of 128x256 in half a minute
    python demo/make_demo_data.py big --size 1024x2048 --source-count 8 --target-count 4 --val-count 4

OUT/source is laid out as GTA5 and looks like a game: clean edges, saturated colours, flat repeating texture, hard sun.
OUT/target is laid out as Cityscapes and looks like a dashcam: green haze, cobbles, dirt, noise, a bonnet.

One grammar draws both: `street` samples a street in metres, `rasterise` projects it to an index map that says which
part of the street each pixel shows, and `shade` gives every part the colours and the texture of a domain. Image and
label are both looked up in that map, so they fit; and the domains differ in how a street is seen, not in what stands
there, so that the gap between them is one of appearance: the kind that CLADA is made to bridge.
"""

import argparse
import math
import os
import sys
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from torchvision.datasets import Cityscapes
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import files
import runtime

IDS = {c.name: c.id for c in Cityscapes.classes}
DOMAINS = ("source", "target")
CAMERA_HEIGHT = {"source": 1.65, "target": 1.3}  # metres above the road
FOCAL = 1.25  # in image heights: at 2:1 a field of view of 77 degrees
NEAR, FAR = 2.0, 400.0  # metres; the lower image edge sees the road from about 3 m on

# What things look like: colours in source, in target (variants) | grain in metres, its strength in source, in target.
# A thing keeps its character across the domains (leaves are green in both); chroma, contrast and texture do not.
LOOKS = {
    "sky": ("4a94f0", "a8bcc8", 40, 0.0, 0.03),
    "cloud": ("f6f9ff", "b8c4c8", 20, 0.0, 0.04),
    "road": ("6c7078", "62625a", 0.22, 0.03, 0.38),
    "paint": ("f4f4f4", "bdbdb6", 0.3, 0.0, 0.4),
    "sidewalk": ("bcb4ac", "a09a8c", 0.7, 0.08, 0.22),
    "curb": ("e6e0d8", "b2aca1", 0.8, 0.05, 0.2),
    "terrain": ("86c83c", "758e3e", 0.4, 0.10, 0.5),
    "leaves": ("1f8040 2e9a34 48b03c", "2a5634 34632e 477132", 0.35, 0.18, 0.7),
    "trunk": ("8a5a30", "58422c", 0.3, 0.1, 0.4),
    "facade": ("f0cc94 e08a64 f4ecdc a8c4e0 e4b0a0", "a99575 976953 b4aea0 7f8c96 a17e73", 0.5, 0.03, 0.22),
    "roof": ("8c5048 c8503c", "624943 81463a", 0.4, 0.06, 0.25),
    "wall": ("d8d0c4 c08a68", "8c887f 82604b", 0.6, 0.22, 0.4),
    "fence": ("f0f0f4 6a4a30", "94928c 4d4032", 0.3, 0.0, 0.25),
    "pole": ("5a6068", "666a69", 0.3, 0.0, 0.2),
    "sign": ("e02020 2060e0 f8d020", "ac2f2b 3159a8 c1a631", 1, 0.0, 0.1),
    "red": ("ff2820", "c9342a", 1, 0.0, 0.1),
    "amber": ("ffb020", "d39a34", 1, 0.0, 0.1),
    "green": ("28e060", "41b86f", 1, 0.0, 0.1),
    "white": ("fffff4", "d3d4ca", 1, 0.0, 0.1),
    "black": ("1c1c22", "1e1f1f", 0.2, 0.0, 0.1),
    "chrome": ("c0c8d4", "919595", 0.1, 0.0, 0.2),
    "glass": ("78b4e8", "486275", 0.5, 0.0, 0.3),
    "skin": ("f0b890 8a5a3c", "b78b70 694c3b", 1, 0.0, 0.1),
    "hair": ("3c2818 d0a040 1c1c22", "30261c 876e40 1e1e1e", 1, 0.0, 0.1),
    "shirt": ("e03040 f0c020 3060e0 f0f0f0 c040c0", "832e34 937c34 2c427d 9f9f9a 6e366c", 0.2, 0.0, 0.2),
    "trousers": ("283c80 303038 806040", "242e4d 272729 564634", 0.2, 0.0, 0.2),
    "car": ("e02428 2454e0 f4f4f8 f8c010 28282e 30a050", "8d2828 294182 c4c5c0 a6924a 242625 689471", 0.6, 0.0, 0.1),
    "truck": ("f0f0f4 3c78d0 e87828", "b3b3af 45658e a56538", 0.8, 0.04, 0.2),
    "bus": ("f8b818 e84838", "bf952c a03e32", 0.8, 0.0, 0.12),
    "motor": ("d02838 2838b0 303038", "88272d 29326d 29292a", 0.2, 0.0, 0.1),
    "bin": ("2c7048 d06828", "2d4f38 91572f", 0.3, 0.05, 0.2),
    "bonnet": ("22262c", "23272b", 1, 0.0, 0.05),
    "gleam": ("22262c", "5c6461", 1, 0.0, 0.05),
}

# Figures, in painting order: look, shape, points "right,up" in centimetres, and for bar and disc the width or radius.
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

# Every part of a scene is a flat polygon with one coordinate constant: x (right), y (up from the road) or z (ahead).
Part = namedtuple("Part", "axis points label look variant")
# floor: parts; items: (order, parts), painted from the largest order down; shadows: (outline in (x, z), height).
Scene = namedtuple("Scene", "floor items shadows")


# --- Shapes ---


def disc(s, y, radius, n=14):
    return [(s + radius * math.cos(2 * math.pi * i / n), y + radius * math.sin(2 * math.pi * i / n)) for i in range(n)]


def box(s0, s1, y0, y1):
    return [(s0, y0), (s1, y0), (s1, y1), (s0, y1)]


def bar(p, q, width):
    """Outline of a thick line from p to q."""
    length = math.dist(p, q) * 2 / width
    a, b = (p[1] - q[1]) / length, (q[0] - p[0]) / length
    return [(p[0] + a, p[1] + b), (q[0] + a, q[1] + b), (q[0] - a, q[1] - b), (p[0] - a, p[1] - b)]


def outlines(text):
    """A figure's text as a list of (look, outline in metres)."""
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


# --- The grammar: what stands where ---


def upright(figure, label, k, x, z, squeeze=1.0, size=1.0):
    """Parts of a figure that stands at (x, z) and faces us; squeeze foreshortens it, and negative mirrors it."""
    return [Part(2, [(x + s * squeeze * size, y * size, z) for s, y in points], label, look, k) for look, points in figure]


def ground(x0, x1, z0, z1, label, look):
    return Part(1, [(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], label, look, 0)


def panel(x, z0, z1, y0, y1, label, look, k):
    """An upright rectangle along the street."""
    return Part(0, [(x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)], label, look, k)


def stand(scene, rng, name, label, x, z, squeeze=1.0, size=1.0):
    """Add a figure, in a colour of its own, and the shadow of what reaches the ground."""
    parts = upright(FIGURES[name], label, rng.integers(60), x, z, squeeze, size)
    scene.items.append((z, parts))
    feet = [s for part in parts for s, y, _ in part.points if y < 0.9]
    if feet:
        height = max(y for part in parts for _, y, _ in part.points)
        scene.shadows.append((box(min(feet), max(feet), z - 0.2, z + 0.3), height))


def two_wheeler(scene, rng, x, z, ridden):
    kind = rng.choice(["bicycle", "motorcycle"])
    squeeze = rng.uniform(0.45, 1) * rng.choice([-1, 1])
    stand(scene, rng, kind, kind, x, z, squeeze)
    if ridden:
        stand(scene, rng, "rider", "rider", x, z, squeeze)


def tree(scene, rng, x, z, height, order=None):
    """A trunk and a heap of ragged discs, the dark ones painted first and lower, so that the crown has a lit top."""
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
    """A car, truck or bus along the road; facing: it comes towards us. Returns its length."""
    half, length, height = {"car": (0.9, 4.3, 1.45), "truck": (1.25, 8.0, 3.2), "bus": (1.25, 10.3, 3.2)}[kind]
    k, size = rng.integers(60), rng.uniform(0.92, 1.12)
    parts = upright(FIGURES[kind + (" front" if facing else " back")], kind, k, x, z, 1, size)
    if abs(x) > half * size:  # the side towards the camera's axis is the one to be seen
        plane = x - math.copysign(half * size, x)
        side = [(look, [(plane, y * size, z + s * size) for s, y in points]) for look, points in FIGURES[kind + " side"]]
        parts = [Part(0, points, kind, look, k) for look, points in side] + parts
    scene.items.append((z, parts))
    scene.shadows.append((box(x - half * size, x + half * size, z - 0.2, z + length * size), height * size))
    return length * size


def building(scene, rng, x, z0, z1):
    k, height, depth = rng.integers(60), 3.0 * rng.integers(2, 7), math.copysign(rng.uniform(8, 14), x)
    front = [("roof", [(0, height), (depth / 2, height + 3), (depth, height)]), ("facade", box(0, depth, 0, height))]
    along = (("roof", height, height + rng.uniform(0.5, 2.2)), ("facade", 0, height), ("roof", 0, 0.5))
    parts = [panel(x, z0, z1, y0, y1, "building", look, k) for look, y0, y1 in along]
    scene.items.append((z1, parts + upright(front, "building", k, x, z0)))
    scene.shadows.append(([(x, z0), (x, z1)], height))


def roadside(scene, rng, style, side, edge):
    """One side of the street beyond its sidewalk: a row of buildings, walls, fences, open ground and side streets."""
    kinds = ("building", "wall", "fence", "open", "side street")
    chances = {"city": (68, 8, 8, 6, 10), "suburb": (36, 16, 20, 18, 10), "park": (10, 20, 30, 30, 10)}  # per cent
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
            for tz in rng.uniform(z, end, rng.integers(2, 5)):  # painted before the fence, whatever their distance
                tree(scene, rng, x + side * rng.uniform(3, 14), tz, rng.uniform(4, 9), order=end + tz / 1000)
            height = rng.uniform(1.6, 2.6) if kind == "wall" else rng.uniform(1.0, 1.6)
            if kind != "open":
                scene.items.append((end, [panel(x, z, end, 0, height, kind, kind, rng.integers(60))]))
            elif rng.random() < 0.5:
                scene.items.append((end, [panel(x, z, end, 0, height, "vegetation", "leaves", 1)]))  # a hedge
        z = end


def sidewalk(scene, rng, side, curb, edge):
    """What stands between curb and edge: lamps, lights, signs, trees, people, parked two-wheelers, bins."""
    for z in np.arange(rng.uniform(6, 16), 80, rng.uniform(12, 20)):
        kind = rng.choice(["lamp", "traffic light", "round sign", "warning sign", "square sign"], p=[0.3, 0.3, 0.2, 0.1, 0.1])
        stand(scene, rng, "lamp" if kind == "lamp" else "post", "pole", side * (curb + 0.5), z, -side)
        if kind != "lamp":
            stand(scene, rng, kind, "traffic sign" if "sign" in kind else kind, side * (curb + 0.5), z)
    for _ in range(rng.poisson(1.6)):
        tree(scene, rng, side * (curb + 1.2), rng.uniform(9, 60), rng.uniform(4, 7))
    for _ in range(rng.poisson(3.0)):
        x, z = side * rng.uniform(curb + 0.6, edge - 0.4), 5 + rng.exponential(12)
        squeeze, size = rng.uniform(0.65, 1.1) * rng.choice([-1, 1]), rng.choice([1.05, 1.0, 0.95, 0.65])
        stand(scene, rng, "person", "person", x, z, squeeze, size)
    for _ in range(rng.poisson(1.2)):
        two_wheeler(scene, rng, side * rng.uniform(curb + 0.5, curb + 1.5), 6 + rng.exponential(8), ridden=False)
    for _ in range(rng.poisson(0.6)):
        stand(scene, rng, "bin", "static", side * (curb + 0.8), 6 + rng.exponential(9))


def traffic(scene, rng, lanes, curbs, parked):
    """Vehicles in the lanes and along the curbs, riders between them, people who cross."""
    rows = [(x, rng.uniform(9, 30), 0.75, x < -1) for x in lanes]
    rows += [(x - math.copysign(1.1, x), rng.uniform(5, 12), 0.6, x < 0) for x, there in zip(curbs, parked) if there]
    for x, z, full, facing in rows:
        while z < 80:
            if rng.random() < full:
                kind = rng.choice(["car", "truck", "bus"], p=[0.78, 0.12, 0.1] if x in lanes else [0.96, 0.02, 0.02])
                z += vehicle(scene, rng, kind, x + rng.uniform(-0.15, 0.15), z, facing)
            z += 1.5 + rng.exponential(9)
    for _ in range(rng.poisson(1.6)):
        two_wheeler(scene, rng, rng.uniform(curbs[0] + 1, curbs[1] - 1), 7 + rng.exponential(9), ridden=True)
    for _ in range(rng.poisson(0.8)):
        x, z, squeeze = rng.uniform(*curbs), 7 + rng.exponential(12), rng.choice([-1, 1])
        stand(scene, rng, "person", "person", x, z, squeeze)
        if rng.random() < 0.3:  # void: it moves and has no class
            stand(scene, rng, "trolley", "dynamic", x, z, squeeze)


def street(rng):
    """Sample a street: parts in painting order, and shadows as (outline in (x, z), height of the caster)."""
    style = rng.choice(["city", "suburb", "park"], p=[0.45, 0.35, 0.2])
    lanes = [x for x, chance in ((-6.8, 0.35), (-3.4, 1), (0.0, 1), (3.4, 0.35)) if rng.random() < chance]  # we drive at 0
    parked = rng.random(2) < 0.55
    curbs = (lanes[0] - 2.0 - 2.0 * parked[0], lanes[-1] + 2.0 + 2.0 * parked[1])
    edges = (curbs[0] - rng.uniform(2.5, 5), curbs[1] + rng.uniform(2.5, 5))
    beyond = "terrain" if style == "park" else "sidewalk"
    scene = Scene([Part(2, [(x, y, FAR) for x, y in box(-900, 900, -60, 400)], "sky", "sky", 0)], [], [])
    for _ in range(rng.poisson(4)):
        s, y, r = rng.uniform(-300, 300), rng.uniform(45, 160), rng.uniform(6, 16)
        cloud = [("cloud", [(s + 3 * a, y + b) for a, b in disc(i * r, 0, r)]) for i in range(3)]
        scene.floor.extend(upright(cloud, "sky", 0, 0, FAR))
    for x in range(-220, 220, 13):  # the far end of everything: roofs and trees in the haze
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


# --- Two ways of seeing it ---


def project(points, camera):
    u0, v0, f, eye = camera["u0"], camera["v0"], camera["focal"], camera["eye"]
    return [(u0 + f * x / max(z, NEAR), v0 + f * (eye - y) / max(z, NEAR)) for x, y, z in points]


def rasterise(parts, camera):
    """Index map (H, W) int32: which part each pixel shows, painted back to front."""
    canvas = Image.new("I", (camera["width"], camera["height"]))
    draw = ImageDraw.Draw(canvas)
    for i, part in enumerate(parts):
        draw.polygon(project(part.points, camera), fill=i)
    return np.asarray(canvas)


def bonnet(camera):
    """Our own car's bonnet with its ornament, fixed to the camera: in image heights from the lower centre."""
    wide = 0.92 * camera["width"] / camera["height"] / 2
    figure = [("bonnet", [(wide * t, 0.11 - 0.12 * t**4) for t in np.linspace(-1, 1, 33)] + [(9, -1), (-9, -1)])]
    figure += [("gleam", [(wide * t, 0.11 - 0.12 * t**4) for t in np.linspace(-0.8, 0.8, 33)] + [(0.4, 0.07), (-0.4, 0.07)])]
    figure += [
        ("chrome", box(-0.009, 0.009, 0.08, 0.13)),
        ("chrome", disc(0, 0.145, 0.028)),
        ("bonnet", disc(0, 0.145, 0.02)),
    ]
    figure += [("chrome", bar((0, 0.145), end, 0.006)) for end in disc(0, 0.145, 0.026, 3)]
    metres = NEAR / camera["focal"]  # of a pixel at the distance NEAR
    unit = camera["height"] * metres
    x0, y0 = (camera["width"] / 2 - camera["u0"]) * metres, camera["eye"] - (camera["height"] - camera["v0"]) * metres
    points = [(look, [(x0 + s * unit, y0 + y * unit) for s, y in outline]) for look, outline in figure]
    return upright(points, "ego vehicle", 0, 0, NEAR)


def shadow_mask(shadows, camera, sun):
    """Where the ground is in shadow (an image, 0 or 255): each outline, swept by `sun` = (x, z) per metre of height."""
    canvas = Image.new("L", (camera["width"], camera["height"]))
    draw = ImageDraw.Draw(canvas)
    for outline, height in shadows:
        tips = [(x + sun[0] * height, z + sun[1] * height) for x, z in outline]
        for i in range(len(outline) if any(sun) else 0):
            quad = (outline[i - 1], outline[i], tips[i], tips[i - 1])
            draw.polygon(project([(x, 0, z) for x, z in quad], camera), fill=255)
        draw.polygon(project([(x, 0, z) for x, z in outline], camera), fill=255)
    return canvas


def cloudy(rng, height, width, rows):
    """Smooth random field (height, width) in [0, 1], with about `rows` bumps from top to bottom."""
    coarse = Image.fromarray(rng.integers(0, 256, (rows, 2 * rows), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255


@cache
def colours(look, domain):
    """The variants of a look in a domain, as RGB triples in [0, 1]."""
    return [[int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)] for c in LOOKS[look][DOMAINS.index(domain)].split()]


def part_tables(parts, domain, eye, sun_side):
    """By part: colour (N, 3), grain size and strength, brightness of the side it shows, its plane seen from the eye."""
    d = DOMAINS.index(domain)
    lit, turned, dark = ((1.06, 0.86, 0.6), (0.97, 0.92, 0.87))[d]  # facing the sun, facing us, facing away
    colour, size, strength, facing, plane = [], [], [], [], []
    for p in parts:
        look, (x, y, z), variants = LOOKS[p.look], p.points[0], colours(p.look, domain)
        tone = 0.85 + 0.3 * ((p.variant * 37 + 30) % 60) / 60  # no two houses are quite the same
        colour.append([c * tone for c in variants[p.variant % len(variants)]])
        size.append(look[2])
        strength.append(look[3 + d])
        facing.append((lit if x * sun_side < 0 else dark, 1.0, turned if z < FAR else 1.0)[p.axis])
        plane.append((x, y - eye, z)[p.axis])
    return [np.array(table, np.float32) for table in (colour, size, strength, facing, plane)]


def shade(rng, domain, camera, parts, index, shadows):
    """Colours of a domain for every pixel of the index map: (H, W, 3) float32, about [0, 1]."""
    game, f, eye = domain == "source", np.float32(camera["focal"]), camera["eye"]
    sun_side = rng.choice([-1.0, 1.0])
    colour, size, strength, facing, plane = part_tables(parts, domain, eye, sun_side)
    axis = np.array([p.axis for p in parts], np.uint8)[index]
    u = ((np.arange(camera["width"], dtype=np.float32) + 0.5 - camera["u0"]) / f)[None]
    v = ((np.arange(camera["height"], dtype=np.float32) + 0.5 - camera["v0"]) / f)[:, None]
    # A pixel's ray (u, -v, 1) meets the plane of its part at this depth; (a, b) is the point's place within the plane.
    ray = np.where(axis == 0, u, np.where(axis == 1, -v, np.float32(1)))
    with np.errstate(divide="ignore"):
        depth = np.clip(plane[index] / ray, NEAR, FAR)
    a = np.where(axis == 0, depth, u * depth)
    b = np.where(axis == 1, depth, eye - v * depth)

    # Grain: a random value for each cell of a plane. The game repeats a small tile, the world does not repeat itself.
    tile = rng.random((8, 8) if game else (64, 64)).astype(np.float32) - 0.5
    last = len(tile) - 1  # a power of two less one: `&` wraps around
    cell = size[index]
    grain = tile[np.floor(b / cell).astype(np.int32) & last, np.floor(a / cell).astype(np.int32) & last]
    grain *= strength[index] * np.clip(cell * f / depth / 3, 0, 1)  # what is finer than three pixels averages out
    image = colour[index]
    draw_patterns(image, parts, index, a, b, tile, domain)
    image *= (facing[index] * (1 + grain))[..., None]

    if game:
        lost = np.asarray(shadow_mask(shadows, camera, (-0.55 * sun_side, 0.25)), np.float32) * (0.5 / 255)
    else:  # under an overcast sky it is dark, softly, beneath things only; and the ground is dirty in patches
        soft = shadow_mask(shadows, camera, (0, 0)).filter(ImageFilter.BoxBlur(camera["height"] // 100))
        lost = np.asarray(soft, np.float32) * (0.5 / 255) + 0.35 * cloudy(rng, *index.shape, 10)
    image *= 1 - (lost * (axis == 1))[..., None]

    haze, reach = ((0.80, 0.88, 1.0), 700.0) if game else ((0.74, 0.78, 0.76), rng.uniform(90, 200))
    veil = 1 - np.exp(-depth / np.float32(reach))
    sky = index == 0
    veil[sky] = np.clip(1.0 - b[sky] / 170, 0, 1) * (
        rng.uniform(0.6, 0.95) if game else 0.9
    )  # the sky pales towards the horizon
    image += veil[..., None] * (np.array(haze, np.float32) - image)
    if game:  # the time of day: a little brighter or duller, warmer or colder
        grey, warm = image.mean(2, keepdims=True), rng.uniform(-0.1, 0.1)
        image = (grey + rng.uniform(0.75, 1.1) * (image - grey)) * rng.uniform(0.75, 1.12)
        image *= np.array((1 + warm, 1, 1 - warm), np.float32)
    return image


def draw_patterns(image, parts, index, a, b, tile, domain):
    """Windows into facades (wider in the ground floor, each of its own brightness), bars into fences; in place."""
    kind = np.array([{"facade": 1, "fence": 2}.get(p.look, 0) for p in parts], np.uint8)[index]
    spots = np.nonzero(kind == 1)
    s, t = a[spots] / 2.4, b[spots] / 3.0  # bays and storeys, in metres
    bay, storey = s - np.floor(s), t - np.floor(t)
    narrow, low = np.where(t < 1, 0.1, 0.27), np.where(t < 1, 0.2, 0.3)
    hole = (bay > narrow) & (bay < 1 - narrow) & (storey > low) & (storey < 0.8)
    last = len(tile) - 1
    bright = 1 + tile[np.floor(t[hole]).astype(int) & last, np.floor(s[hole]).astype(int) & last]
    image[tuple(axis[hole] for axis in spots)] = bright[:, None] * np.array(colours("glass", domain))
    image[(kind == 2) & (a % 0.5 > 0.22) & (b % 0.6 > 0.12)] *= 0.4


def dashcam(rng, photo):
    """A cheap camera on a dull day: soft focus, glare, uneven exposure, vignette, greenish cast, noise."""
    width, height = photo.size
    focus = photo.filter(ImageFilter.GaussianBlur(height * rng.uniform(0.002, 0.005)))
    glare = photo.resize((16, 8), Image.Resampling.BOX).resize((width, height), Image.Resampling.BICUBIC)
    image = (0.88 * np.asarray(focus, np.float32) + 0.12 * np.asarray(glare, np.float32)) / 255
    grey = image.mean(2, keepdims=True)
    image = grey + 0.8 * (image - grey)
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    exposure = rng.uniform(0.85, 1.25) * (1 - 0.15 * (x**2 + y**2)) * (0.85 + 0.3 * cloudy(rng, height, width, 3))
    image = image * exposure[..., None] * np.array((0.96, 1.02, 0.93)) + 0.03
    noise = rng.normal(0, 0.016, (height, width, 1)) + rng.normal(0, 0.01, (height, width, 3))
    return np.clip((image + noise) * 255 + 0.5, 0, 255).astype(np.uint8)


def render(rng, domain, height, width):
    """Draw one frame of a domain: image (height, width, 3) uint8 and Cityscapes label ids (height, width) uint8."""
    ss = 2 if height <= 400 else 1  # supersampling of the image; a label is that of one point of its pixel
    camera = {"width": width * ss, "height": height * ss, "focal": FOCAL * height * ss, "eye": CAMERA_HEIGHT[domain]}
    camera["u0"], camera["v0"] = width * ss * rng.uniform(0.4, 0.6), height * ss * rng.uniform(0.38, 0.46)
    parts, shadows = street(rng)
    if domain == "target":
        parts += bonnet(camera)
    index = rasterise(parts, camera)
    label = np.array([IDS[p.label] for p in parts], np.uint8)[index[ss // 2 :: ss, ss // 2 :: ss]]
    image = np.clip(shade(rng, domain, camera, parts, index, shadows) * 255 + 0.5, 0, 255).astype(np.uint8)
    image = Image.fromarray(image).reduce(ss)
    if domain == "target":
        image = dashcam(rng, image)
        rim = max(1, height // 100)  # as in Cityscapes, the rim is outside the region of interest
        label[:rim] = label[:, :rim] = label[:, -rim:] = IDS["out of roi"]
    return np.array(image), label


# --- The command ---


def paths(out, domain, split, k):
    """Image and label file of frame k, in the layout of the real data set."""
    if domain == "source":
        return out / f"source/images/{k:05d}.png", out / f"source/labels/{k:05d}.png"
    name = f"{split}/demo/demo_{k:06d}_000000"
    return out / f"target/leftImg8bit/{name}_leftImg8bit.png", out / f"target/gtFine/{name}_gtFine_labelIds.png"


def write_frame(frame, out, seed, height, width):
    """Draw and save one frame, unless an interrupted run with the same arguments has done so already."""
    domain, split, k = frame
    image_path, label_path = paths(out, domain, split, k)
    if image_path.exists() and label_path.exists():
        return
    rng = np.random.default_rng([seed, DOMAINS.index(domain), ("train", "val").index(split), k])
    image, label = render(rng, domain, height, width)
    label = Image.fromarray(label)
    if domain == "source":  # GTA5's labels are palette images: the indices are the ids
        label.putpalette([v for c in Cityscapes.classes if c.id >= 0 for v in c.color])
    for path, picture in ((image_path, Image.fromarray(image)), (label_path, label)):
        files.write_whole(path, files.png_bytes(picture))


def is_finished(out, arguments):
    """Does OUT hold all frames of these arguments? ValueError if it holds something else."""
    done, begun = out / "demo.json", out / "demo.unfinished.json"
    for note in (note for note in (done, begun) if note.exists()):
        before = files.read_json(note)
        for name, now in arguments.items():
            if (was := before.get(name)) != now:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} was {was} and is now {now}, says {note}; choose another OUT or remove this one")
        return note == done
    if (out / "source").exists() or (out / "target").exists():
        raise ValueError(f"OUT: {out} holds a source or target folder that is not from this script; choose another folder")
    return False


def parse_size(text):
    height, x, width = text.partition("x")
    if not (x and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"'{text}' is no HEIGHTxWIDTH; write for example 128x256")
    if not (64 <= int(height) <= 4096 and 128 <= int(width) <= 8192):
        raise argparse.ArgumentTypeError(f"'{text}' is out of range; height from 64 to 4096, width from 128 to 8192")
    return f"{int(height)}x{int(width)}"


def parse_count(text, least=1):
    if not text.isdecimal() or not least <= int(text) < 10**6:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {least} to 999,999")
    return int(text)


def main(argv=None):
    parser = runtime.parser(__doc__.split("\n\n")[0], __doc__)
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="new folder; gets OUT/source, OUT/target and, last, OUT/demo.json"
    )
    parser.add_argument("--seed", type=partial(parse_count, least=0), default=0, help="other seeds give other streets [0]")
    parser.add_argument("--size", type=parse_size, default="128x256", metavar="HxW", help="height x width [128x256]")
    parser.add_argument("--source-count", type=parse_count, default=400, metavar="N", help="source frames [400]")
    parser.add_argument("--target-count", type=parse_count, default=200, metavar="N", help="target train frames [200]")
    parser.add_argument("--val-count", type=parse_count, default=60, metavar="N", help="target val frames [60]")

    args = parser.parse_args(argv)
    arguments = {name: value for name, value in vars(args).items() if name != "out"}
    frames = [("source", "train", k) for k in range(args.source_count)]
    frames += [("target", "train", k) for k in range(args.target_count)]
    frames += [("target", "val", k) for k in range(args.val_count)]
    height, width = map(int, args.size.split("x"))
    if is_finished(args.out, arguments):
        print(f"{args.out} is finished, with the same arguments: nothing to do")
        return
    with files.lock(args.out):
        files.write_json(args.out / "demo.unfinished.json", arguments)
        for folder in {path.parent for frame in frames for path in paths(args.out, *frame)}:
            folder.mkdir(parents=True, exist_ok=True)
            files.clear_parts(folder)
        work = partial(write_frame, out=args.out, seed=args.seed, height=height, width=width)
        pool = ProcessPoolExecutor(initializer=runtime.serve_parent)
        try:
            for _ in tqdm(pool.map(work, frames, chunksize=4), total=len(frames), unit="frame", desc="demo data"):
                pass
        except BrokenProcessPool as error:
            raise ChildProcessError("a process that draws frames was killed, most likely for lack of memory") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        os.replace(args.out / "demo.unfinished.json", args.out / "demo.json")


if __name__ == "__main__":
    runtime.run_script(main)
