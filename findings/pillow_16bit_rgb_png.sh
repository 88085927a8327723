#!/usr/bin/env bash
# pillow 13.0.0 opens a PNG of 16 bits a channel as 8-bit RGB (RGBA with alpha): the low bytes are dropped, not rounded,
# and neither a warning nor `info` says so. A grey PNG of 16 bits keeps them (mode I;16).
# Seen: grey.png I;16 4863
#       rgb.png RGB (18, 18, 128) for the samples (0x12FF, 0x1200, 0x8001)
# Here: the reward server takes 8-bit RGB alone, by the PNG's header, and refuses the others.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pillow==13.0.0
cd "$work"
"$work/venv/bin/python" -W error - <<'PYTHON'
import struct
import sys
import zlib
from pathlib import Path

import PIL
from PIL import Image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def opened(name, color_type, samples):
    """Write a PNG of one pixel, 16 bits a channel, and open it."""
    header = struct.pack(">IIBBBBB", 1, 1, 16, color_type, 0, 0, 0)
    row = zlib.compress(b"\0" + struct.pack(f">{len(samples)}H", *samples))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    Path(name).write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with Image.open(name) as image:
        pixel = image.getpixel((0, 0))
        print(name, image.mode, pixel, "info", image.info)
        return image.mode, pixel, image.info


print("pillow", PIL.__version__)
grey = opened("grey.png", 0, (0x12FF,))
rgb = opened("rgb.png", 2, (0x12FF, 0x1200, 0x8001))
rgba = opened("rgba.png", 6, (0x12FF, 0x1200, 0x8001, 0xFFFF))
kept = grey == ("I;16", 0x12FF, {})
sys.exit(not (kept and rgb == ("RGB", (0x12, 0x12, 0x80), {}) and rgba == ("RGBA", (0x12, 0x12, 0x80, 0xFF), {})))
PYTHON
