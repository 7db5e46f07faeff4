"""The picture of a page is what a browser draws, in the size that was asked for."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tests import runs

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
def test_a_page_is_photographed(tmp_path):
  (tmp_path / "page.html").write_text("<body style='margin:0;background:#00f'><div style='height:9px;background:red'>")
  files = f"--page={tmp_path / 'page.html'}", f"--picture={tmp_path / 'page.png'}"
  runs.run("-m", "benchmarks.screenshot", *files, "--width=600", "--height=400")
  pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
  assert pixels.shape == (400, 600, 3)
  assert pixels[4, 300].tolist() == [255, 0, 0] and pixels[200, 300].tolist() == [0, 0, 255]


def test_without_a_page_or_a_browser_it_says_what_to_do(tmp_path):
  assert "--page and --picture are needed" in runs.run("-m", "benchmarks.screenshot", expected=2)
  (tmp_path / "page.html").write_text("")
  files = f"--page={tmp_path / 'page.html'}", f"--picture={tmp_path / 'page.png'}"
  said = runs.run("-m", "benchmarks.screenshot", *files, expected=2, PATH=str(tmp_path))
  assert "apt-get install chromium" in said
