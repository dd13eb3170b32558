"""How a street looks in each domain: projection, colours, texture, light, and the target's camera."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from streets import FAR, NEAR, bar, box, disc, street, upright
from torchvision.datasets import Cityscapes

IDS = {c.name: c.id for c in Cityscapes.classes}
DOMAINS = ("source", "target")
CAMERA_HEIGHT = {"source": 1.65, "target": 1.3}  # metres above the road
FOCAL = 1.25  # focal length in image heights: a field of view of 77 degrees for frames of 1:2

# Look: colours in source and in target (several variants each), size of the grain in metres, its strength in source and target.
# Hue stays the same across domains (leaves are green in both); saturation, contrast and texture do not.
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

# --- From metres to pixels ---


def project(points, camera):
    """Points (x, y, z) in metres -> (column, row) in pixels."""
    u0, v0, f, eye = camera["u0"], camera["v0"], camera["focal"], camera["eye"]
    return [(u0 + f * x / max(z, NEAR), v0 + f * (eye - y) / max(z, NEAR)) for x, y, z in points]


def rasterise(parts, camera):
    """Paint parts in their order -> index map (H, W) int32: the index of the part that each pixel shows."""
    canvas = Image.new("I", (camera["width"], camera["height"]))
    draw = ImageDraw.Draw(canvas)
    for i, part in enumerate(parts):
        draw.polygon(project(part.points, camera), fill=i)
    return np.asarray(canvas)


def bonnet(camera):
    """Parts of the ego vehicle's bonnet and its ornament, fixed to the camera.

    Outlines are in image heights, measured from the middle of the lower edge.
    """
    wide = 0.92 * camera["width"] / camera["height"] / 2
    figure = [("bonnet", [(wide * t, 0.11 - 0.12 * t**4) for t in np.linspace(-1, 1, 33)] + [(9, -1), (-9, -1)])]
    figure += [("gleam", [(wide * t, 0.11 - 0.12 * t**4) for t in np.linspace(-0.8, 0.8, 33)] + [(0.4, 0.07), (-0.4, 0.07)])]
    figure += [
        ("chrome", box(-0.009, 0.009, 0.08, 0.13)),
        ("chrome", disc(0, 0.145, 0.028)),
        ("bonnet", disc(0, 0.145, 0.02)),
    ]
    figure += [("chrome", bar((0, 0.145), end, 0.006)) for end in disc(0, 0.145, 0.026, 3)]
    metres = NEAR / camera["focal"]  # size of a pixel at distance NEAR
    unit = camera["height"] * metres
    x0, y0 = (camera["width"] / 2 - camera["u0"]) * metres, camera["eye"] - (camera["height"] - camera["v0"]) * metres
    points = [(look, [(x0 + s * unit, y0 + y * unit) for s, y in outline]) for look, outline in figure]
    return upright(points, "ego vehicle", 0, 0, NEAR)


def shadow_mask(shadows, camera, sun):
    """Mask of the shaded ground, 0 or 255: each outline is swept along `sun`, (x, z) per metre of height."""
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
    """A smooth random field (height, width) in [0, 1] with about `rows` bumps from top to bottom."""
    coarse = Image.fromarray(rng.integers(0, 256, (rows, 2 * rows), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255


@cache
def colours(look, domain):
    """The colours of a look in a domain: RGB triples in [0, 1]."""
    return [[int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)] for c in LOOKS[look][DOMAINS.index(domain)].split()]


def part_tables(parts, domain, eye, sun_side):
    """Tables with one row per part: colour, grain size, grain strength, brightness, and its plane's distance from the eye."""
    d = DOMAINS.index(domain)
    lit, turned, dark = ((1.06, 0.86, 0.6), (0.97, 0.92, 0.87))[d]  # side facing the sun, front, side facing away
    colour, size, strength, facing, plane = [], [], [], [], []
    for p in parts:
        look, (x, y, z), variants = LOOKS[p.look], p.points[0], colours(p.look, domain)
        tone = 0.85 + 0.3 * ((p.variant * 37 + 30) % 60) / 60  # so that houses of one colour differ
        colour.append([c * tone for c in variants[p.variant % len(variants)]])
        size.append(look[2])
        strength.append(look[3 + d])
        facing.append((lit if x * sun_side < 0 else dark, 1.0, turned if z < FAR else 1.0)[p.axis])
        plane.append((x, y - eye, z)[p.axis])
    return [np.array(table, np.float32) for table in (colour, size, strength, facing, plane)]


def shade(rng, domain, camera, parts, index, shadows):
    """Shade every pixel of the index map in the style of a domain -> (H, W, 3) float32, roughly in [0, 1]."""
    game, f, eye = domain == "source", np.float32(camera["focal"]), camera["eye"]
    sun_side = rng.choice([-1.0, 1.0])
    colour, size, strength, facing, plane = part_tables(parts, domain, eye, sun_side)
    axis = np.array([p.axis for p in parts], np.uint8)[index]
    u = ((np.arange(camera["width"], dtype=np.float32) + 0.5 - camera["u0"]) / f)[None]
    v = ((np.arange(camera["height"], dtype=np.float32) + 0.5 - camera["v0"]) / f)[:, None]
    # A pixel's ray (u, -v, 1) meets its part's plane at `depth`; (a, b) are the coordinates of that point within the plane.
    ray = np.where(axis == 0, u, np.where(axis == 1, -v, np.float32(1)))
    with np.errstate(divide="ignore"):
        depth = np.clip(plane[index] / ray, NEAR, FAR)
    a = np.where(axis == 0, depth, u * depth)
    b = np.where(axis == 1, depth, eye - v * depth)

    # Grain is a random value per cell of the plane. The source repeats a small tile, as games do; the target's tile is large.
    tile = rng.random((8, 8) if game else (64, 64)).astype(np.float32) - 0.5
    last = len(tile) - 1  # a power of two minus one, so that `&` wraps around
    cell = size[index]
    grain = tile[np.floor(b / cell).astype(np.int32) & last, np.floor(a / cell).astype(np.int32) & last]
    grain *= strength[index] * np.clip(cell * f / depth / 3, 0, 1)  # grain finer than three pixels averages out
    image = colour[index]
    draw_patterns(image, parts, index, a, b, tile, domain)
    image *= (facing[index] * (1 + grain))[..., None]

    if game:
        lost = np.asarray(shadow_mask(shadows, camera, (-0.55 * sun_side, 0.25)), np.float32) * (0.5 / 255)
    else:  # an overcast sky: soft shadows beneath things only; the ground has dirty patches
        soft = shadow_mask(shadows, camera, (0, 0)).filter(ImageFilter.BoxBlur(camera["height"] // 100))
        lost = np.asarray(soft, np.float32) * (0.5 / 255) + 0.35 * cloudy(rng, *index.shape, 10)
    image *= 1 - (lost * (axis == 1))[..., None]

    add_haze(rng, image, depth, b, index == 0, game)
    if game:  # time of day: saturation, brightness and colour temperature vary
        grey, warm = image.mean(2, keepdims=True), rng.uniform(-0.1, 0.1)
        image = (grey + rng.uniform(0.75, 1.1) * (image - grey)) * rng.uniform(0.75, 1.12)
        image *= np.array((1 + warm, 1, 1 - warm), np.float32)
    return image


def add_haze(rng, image, depth, up, is_sky, game):
    """Fade colours into the haze, with depth; the sky with its height `up` above the horizon. In place."""
    haze, reach = ((0.80, 0.88, 1.0), 700.0) if game else ((0.74, 0.78, 0.76), rng.uniform(90, 200))
    veil = 1 - np.exp(-depth / np.float32(reach))
    pale = rng.uniform(0.6, 0.95) if game else 0.9
    veil[is_sky] = np.clip(1.0 - up[is_sky] / 170, 0, 1) * pale
    image += veil[..., None] * (np.array(haze, np.float32) - image)


def draw_patterns(image, parts, index, a, b, tile, domain):
    """Draw windows into facades (wider on the ground floor, random brightness) and bars into fences, in place."""
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
    """A photo as a cheap camera takes it on a dull day: soft focus, glare, uneven exposure, vignette, green cast, noise."""
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
    """Draw one frame of "source" or "target" -> image (height, width, 3) uint8, Cityscapes label ids (height, width) uint8."""
    ss = 2 if height <= 400 else 1  # supersample the image; labels are sampled at one point per pixel
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
        rim = max(1, height // 100)  # as in Cityscapes
        label[:rim] = label[:, :rim] = label[:, -rim:] = IDS["out of roi"]
    return np.array(image), label
