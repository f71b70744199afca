from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import BundleError
from runtime.manifest import MANIFEST, NOTES, load, verify_files

ROOT = Path(__file__).parents[2]
