"""Take a picture of one text on a page of eval.py --report, with the card of one of its chunks, as the README shows it.

Needs playwright and Pillow, which requirements-dev.txt bring, and a Chromium.

Run     examples/chat_model.sh
        python benchmarks/picture.py --report output/chat_model/report.html --text 5 --chunk 3 \\
            --output examples/report_light.png
"""

import argparse
import shutil
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.cli import NON_NEGATIVE_INT, POSITIVE_INT, Parser, run_script
from utils.files import InputError, make_folder, replacing, require_file

MARGIN = 14  # pixels around the text
N_COLOURS = 64


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--report", type=Path, required=True, help="page of eval.py --report")
    parser.add_argument("--text", type=NON_NEGATIVE_INT, default=0, help="number of the text, from 0 on")
    parser.add_argument("--chunk", type=NON_NEGATIVE_INT, default=0, help="number of its chunk that is pointed at")
    parser.add_argument("--width", type=POSITIVE_INT, default=1060, help="of the window, in pixels")
    parser.add_argument("--scale", type=POSITIVE_INT, default=2, help="pixels of the picture for one of the window")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light", help="colours of the page")
    parser.add_argument("--output", type=Path, required=True, help="png file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    require_file(args.report, "eval.py --report wrote")
    make_folder(args.output.parent)
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        raise InputError("chromium: is not installed; as root: apt-get install chromium")
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        size: Any = {"width": args.width, "height": 1400}
        page = browser.new_page(viewport=size, device_scale_factor=args.scale, color_scheme=args.scheme)
        page.goto(args.report.resolve().as_uri())
        text = page.locator("article").nth(args.text)
        text.scroll_into_view_if_needed()
        page.wait_for_function("n => document.querySelectorAll('article')[n].isUpgraded", arg=args.text)
        # The times are of whatever else the machine did.
        page.evaluate("document.querySelectorAll('.timeline, article > header').forEach((node) => node.remove())")
        text.evaluate("text => { while (text.nextSibling) text.nextSibling.remove(); }")
        text.evaluate("text => { text.style.marginBottom = '100vh'; text.style.border = 'none'; }")
        text.locator(".columns").evaluate("columns => columns.scrollIntoView({block: 'center'})")
        text.locator(".chunk").nth(args.chunk).hover()
        page.wait_for_timeout(400)
        boxes = [text.locator(".columns").bounding_box(), page.locator("#card").bounding_box()]
        with replacing(args.output) as temporary:
            shown = Image.open(BytesIO(page.screenshot(clip=around(boxes))))
            shown.quantize(N_COLOURS).save(temporary, format="png", optimize=True)
        browser.close()
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")


def around(boxes: list[Any]) -> Any:
    """The smallest rectangle that holds all boxes, with a margin."""
    left, top = (min(box[key] for box in boxes) - MARGIN for key in ("x", "y"))
    right = max(box["x"] + box["width"] for box in boxes) + MARGIN
    bottom = max(box["y"] + box["height"] for box in boxes) + MARGIN
    return {"x": left, "y": top, "width": right - left, "height": bottom - top}


if __name__ == "__main__":
    run_script(main)
