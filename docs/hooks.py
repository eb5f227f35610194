"""Lays the package out as it is installed, with `callbacks/` inside, for the API pages."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def on_startup(**_: Any) -> None:
    # Before plugins look for the folder.
    package = ROOT / "build" / "package" / "tfgptopt"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "tfgptopt", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "callbacks", package / "callbacks")
