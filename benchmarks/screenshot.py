"""Photographs a page in a real browser, as the pictures in docs/ are made.

  python -m data.look --config=configs/emoji.py --source=noto --step=54 --grid=6 --output=runs/look.html
  python -m benchmarks.screenshot --page=runs/look.html --picture=docs/look.png --height=1560

It needs Chromium, which `apt-get install chromium` installs.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from absl import flags
from PIL import Image

from contrastive_jax import cli, paths
from contrastive_jax.errors import UserError

_PAGE = flags.DEFINE_string("page", None, "The HTML file.")
_PICTURE = flags.DEFINE_string("picture", None, "The PNG file to write.")
_WIDTH = flags.DEFINE_integer("width", 1180, "Width of the window in pixels.", lower_bound=200)
_HEIGHT = flags.DEFINE_integer("height", 1500, "Height of the window in pixels; what does not fit is left out.")
_COLOURS = flags.DEFINE_integer("colours", 256, "Number of colours of the picture, which keeps it small.", 2, 256)

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
  """Writes the picture."""
  if not _PAGE.value or not _PICTURE.value:
    raise UserError("--page and --picture are needed: name an HTML file and a PNG to write")
  page, picture = paths.typed("--page", _PAGE.value), paths.file_to_write("--picture", _PICTURE.value)
  browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
  if browser is None:
    raise UserError("no browser is installed: apt-get install chromium")
  with tempfile.TemporaryDirectory() as folder:
    shot = Path(folder) / "shot.png"
    subprocess.run(
      [
        browser,
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        f"--user-data-dir={folder}/profile",
        f"--window-size={_WIDTH.value},{_HEIGHT.value}",
        f"--screenshot={shot}",
        page.absolute().as_uri(),
      ],
      check=True,
      capture_output=True,
    )
    Image.open(shot).convert("RGB").quantize(_COLOURS.value).save(picture, optimize=True)


if __name__ == "__main__":
  cli.run(main)
