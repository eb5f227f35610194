"""Builds the documentation strictly: no dead link, and every public name has its place."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    "callbacks",
    "data",
    "decoder",
    "distillation",
    "evaluation",
    "exporting",
    "families",
    "generation",
    "monitoring",
    "pruning",
    "quantization",
    "recipe",
    "serving",
    "shrinking",
    "training",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_public_name_is_on_the_site(site):
    pages = "".join(path.read_text("utf-8") for path in (site / "api").rglob("*.html"))
    missing = [
        f"{module}.{name}"
        for module in ("tfgptopt", *(f"tfgptopt.{room}" for room in ROOMS))
        for name in importlib.import_module(module).__all__
        if name not in ("__version__", "recipes") and f'id="{module}.{name}"' not in pages
    ]
    assert not missing


def test_pages_load_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        for tag in ("<script src=", '<link rel="stylesheet" href='):
            for part in text.split(tag)[1:]:
                assert not part.lstrip('"').startswith(("http", "//")), path


def test_every_symbol_of_tfmot_is_in_the_migration():
    code = """
import os, types; os.environ["TF_USE_LEGACY_KERAS"] = "1"
import tensorflow_model_optimization as tfmot
def walk(module, depth=0):
    for name, value in vars(module).items():
        if name.startswith("_") or depth > 5:
            continue
        if isinstance(value, types.ModuleType):
            if "tensorflow_model_optimization" in value.__name__ and "transform" not in name:
                walk(value, depth + 1)
        elif type(value).__name__ != "_Feature":
            print(name)
walk(tfmot)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    names = set(result.stdout.split())
    assert "prune_low_magnitude" in names, result.stderr
    page = (ROOT / "docs/migrating.md").read_text("utf-8")
    assert not [name for name in sorted(names) if name not in page]
