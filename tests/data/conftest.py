"""Makes `toy` importable for the tests beside it, and for the worker processes that unpickle its sources."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
