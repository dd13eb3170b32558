"""Convert label maps into label ids: colour-coded ones, grey or palette ones of other ids, and SYNTHIA's 16-bit PNGs.

    python tools/convert_labels.py SegEngLabels --table docs/classes/camvid_to_cityscapes.csv --out camvid/labels
    python tools/convert_labels.py RAND_CITYSCAPES/GT/LABELS --table docs/classes/synthia_to_cityscapes.csv --out synthia/labels

The table has a column `id`, the label id to write, and either `red`, `green`, `blue` or `value`, what stands in the file: for
SYNTHIA the first of two channels. A pixel that the table lacks is an error. Names are kept; the same command resumes.
For SYNTHIA, put docs/classes/synthia16.csv or synthia13.csv as classes.csv into both data sets.
"""

import csv
import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image
from torchvision.io import ImageReadMode, decode_image, read_file

import data
import files
import loading
import runtime

COLOUR = ("red", "green", "blue")


def read_table(path):
    """-> ({value, or red * 65536 + green * 256 + blue: label id}, whether it is of colours)."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        is_colour = "value" not in rows[0]
        keys = [int("".join(f"{int(row[c]):02x}" for c in COLOUR), 16) if is_colour else int(row["value"]) for row in rows]
        table = dict(zip(keys, (int(row["id"]) for row in rows), strict=True))
    except (KeyError, IndexError, ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: columns id and value, or id, red, green, blue, are needed, with integers") from error
    if len(table) < len(rows) or not all(0 <= label_id <= 255 for label_id in table.values()):
        raise ValueError(f"{path}: a value or colour stands there twice, or an id is not from 0 to 255")
    return table, is_colour


def convert(path, out, table, is_colour):
    """Write OUT/NAME.png, a palette PNG of label ids in Cityscapes' colours. Raises ValueError naming the file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            raw = str(image.tile[0][3])  # the file's pixel format; image.mode is what Pillow makes of it
            pixels = np.array(image.convert("RGB") if is_colour else image)
        if "16" in raw:  # Pillow would keep the upper 8 bits
            pixels = decode_image(read_file(str(path)), mode=ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    except Exception as error:  # decoders raise many kinds
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if raw in ("L;2", "L;4") or (is_colour and "16" in raw):
        raise ValueError(f"{path}: {raw} pixels; {'8-bit colours' if is_colour else '8-bit or 16-bit values'} are needed")
    pixels = pixels.astype(np.int64)
    values = (pixels * (65536, 256, 1)).sum(2) if is_colour else pixels[..., 0] if pixels.ndim == 3 else pixels
    used, places = np.unique(values, return_inverse=True)
    if unknown := [int(value) for value in used if int(value) not in table]:
        shown = "{}, {}, {}".format(*divmod(unknown[0] // 256, 256), unknown[0] % 256) if is_colour else unknown[0]
        raise ValueError(f"{path}: {'colour' if is_colour else 'value'} {shown} is not in the table")
    ids = Image.fromarray(np.array([table[int(value)] for value in used], dtype=np.uint8)[places].reshape(values.shape))
    ids.putpalette(data.ID_COLOURS.tobytes())
    files.write_whole(out / f"{path.stem}.png", files.image_bytes(ids))


def main():
    parser = runtime.parser(__doc__)
    parser.add_argument("labels", type=runtime.path, metavar="DIR", help="folder of label maps (PNG)")
    parser.add_argument("--table", type=runtime.path, required=True, metavar="FILE.csv", help="see above, and docs/classes")
    parser.add_argument("--out", type=runtime.path, required=True, metavar="DIR", help="for the label ids")
    args = parser.parse_args()
    files.check_out(args.out, args.labels)
    table, is_colour = read_table(args.table)
    paths = sorted(path for path in args.labels.iterdir() if path.suffix.lower() == ".png" and path.name[0] != ".")
    if not paths:
        raise ValueError(f"{args.labels}: no PNG files there")
    if other := [path for path in paths if not path.is_file()]:  # opening a FIFO would block
        raise ValueError(f"{other[0]}: not a regular file")
    if repeated := [one for one, two in itertools.pairwise(sorted(path.stem for path in paths)) if one == two]:
        raise ValueError(f"{args.labels}: two files of the name {repeated[0]}")
    saved = files.read_settings(args.out)
    settings = {"table": files.digest(args.table), "labels": os.path.realpath(args.labels)}
    if not saved and any(args.out.glob("*.png")):
        raise ValueError(f"--out {args.out}: holds files that are not from this script; give another folder")
    files.check_settings(f"--out {args.out}", saved, settings)
    lock = files.lock(args.out)  # noqa: F841 - held until main ends
    files.clear_parts(args.out)
    files.write_json(args.out / "args.json", settings)
    left = [path for path in paths if not (args.out / f"{path.stem}.png").is_file()]
    with loading.progress(len(left), args.out) as bar, files.writers(os.cpu_count()) as submit:
        for path in left:
            submit(convert, path, args.out, table, is_colour)
            bar.update()


if __name__ == "__main__":
    runtime.run_script(main)
