"""Makes the pictures of the report page in docs/images: two models, light and dark.

python docs/make_screenshots.py [FOLDER]

Needs Chromium (CONTRIBUTING.md) and Pillow. Quantizes the demo model at 3 bits and all-MiniLM-L6-v2, an encoder, at 4 bits
into FOLDER, some minutes, or takes what an earlier call has left there.
"""

import io
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image

import nearplane

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "runs")]

from browser import Browser  # noqa: E402
from encoder import fetch  # noqa: E402

IMAGES = Path(__file__).resolve().parent / "images"
# Pixels of a picture, colours of its palette.
SIZE, COLOURS = (1080, 1800), 96


def made() -> dict[str, Path]:
    """The two checkpoints, by name, in the working folder."""
    demo, encoder = Path("demo-3bit"), Path("minilm-4bit")
    if not demo.exists():
        nearplane.quantize("demo", demo, bits=3, group_size=64, sym=False, nsamples=8, seqlen=256)
    if not encoder.exists():
        model = fetch(Path("all-MiniLM-L6-v2"))
        nearplane.quantize(model, encoder, bits=4, group_size=64, nsamples=16, seqlen=128)
    return {"demo": demo, "encoder": encoder}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # so that the pages name no folders of this machine
    for name, out in made().items():
        for dark in (False, True):
            with Browser(*SIZE) as browser:
                browser.open(out / "report.html", dark=dark)
                picture = Image.open(io.BytesIO(browser.picture()))
            target = IMAGES / f"report-{name}-{'dark' if dark else 'light'}.png"
            picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
            print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
