"""Convert label maps into label ids: colour-coded ones, grey or palette ones of other ids, and SYNTHIA's 16-bit PNGs.

    python tools/convert_labels.py SegEngLabels --table docs/classes/camvid_to_cityscapes.csv --out camvid/labels
    python tools/convert_labels.py RAND_CITYSCAPES/GT/LABELS --table docs/classes/synthia_to_cityscapes.csv --out synthia/labels

The table has a column `id`, the label id to write, and either `red`, `green`, `blue` or `value`, what stands in the file: for
SYNTHIA the first of two channels. A pixel that the table lacks is an error. Names are kept; the same command resumes.
For SYNTHIA, put docs/classes/synthia16.csv or synthia13.csv as classes.csv into both data sets.
"""

import csv
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
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
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: columns id and value, or id, red, green, blue, are needed, with integers") from error
    if len(table) < len(rows) or not all(0 <= label_id <= 255 for label_id in table.values()):
        raise ValueError(f"{path}: a value or colour stands there twice, or an id is not from 0 to 255")
    return table, is_colour


def convert(path, out, table, is_colour):
    """Write OUT/NAME.png, a palette PNG of label ids in Cityscapes' colours. Raises ValueError naming the file."""
    try:
        with Image.open(path) as image:
            is_indexed = image.mode in ("L", "P") and not is_colour
            pixels = np.array(image if is_indexed else image.convert("RGB"))
        if not is_colour and not is_indexed:  # Pillow would keep the upper 8 of 16 bits
            pixels = decode_image(read_file(str(path)), mode=ImageReadMode.UNCHANGED)[0].numpy()
    except Exception as error:  # decoders raise many kinds
        raise ValueError(f"{path}: cannot be read ({error})") from error
    values = (pixels.astype(np.int64) * (65536, 256, 1)).sum(2) if is_colour else pixels.astype(np.int64)
    used, places = np.unique(values, return_inverse=True)
    if unknown := [int(value) for value in used if int(value) not in table]:
        shown = "{}, {}, {}".format(*divmod(unknown[0] // 256, 256), unknown[0] % 256) if is_colour else unknown[0]
        raise ValueError(f"{path}: {'colour' if is_colour else 'value'} {shown} is not in the table")
    ids = Image.fromarray(np.array([table[int(value)] for value in used], dtype=np.uint8)[places].reshape(values.shape))
    ids.putpalette(data.ID_COLOURS.tobytes())
    files.write_whole(out / f"{path.stem}.png", files.png_bytes(ids))


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
    args.out.mkdir(parents=True, exist_ok=True)
    files.clear_parts(args.out)
    left = [path for path in paths if not (args.out / f"{path.stem}.png").is_file()]
    with loading.progress(len(left), args.out) as bar, ProcessPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(partial(convert, out=args.out, table=table, is_colour=is_colour), left, chunksize=8):
            bar.update()


if __name__ == "__main__":
    runtime.run_script(main)
