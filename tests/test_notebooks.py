"""Runs the cells of the notebooks, with few steps on a small text."""

from pathlib import Path

import keras
import keras_hub
import matplotlib.pyplot as plt
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
# Steps, and how many figures are to be drawn.
SETTINGS = {
    "deploy": (8, 1),
    "fine_tune_chats": (30, 1),
    "from_tfmot": (20, 1),
    "monitoring_and_choosing": (20, 2),
    "pruning": (8, 1),
    "quantization": (8, 1),
    "quickstart": (10, 2),
    "several_gpus_and_resuming": (12, 1),
    "shrink_and_distill": (10, 1),
}


def test_every_notebook_is_listed_and_kept_without_outputs():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SETTINGS)
    page = (NOTEBOOKS.parent / "docs/notebooks.md").read_text("utf-8")
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert f"`{path.name}`" in page
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs") and not cell.get("execution_count")


def one_layer(vocabulary_size, num_layers, *args, backbone=keras_hub.models.GPT2Backbone, **kwargs):
    """Returns a GPT-2 that is traced in less time than the one that was asked for."""
    return backbone(vocabulary_size, min(num_layers, 1), *args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_notebook_runs_from_top_to_bottom(name, text_files, tmp_path, monkeypatch):
    steps, figures = SETTINGS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPS", str(steps))
    monkeypatch.setenv("TEXT", str(text_files))
    plt.switch_backend("agg")
    if name != "shrink_and_distill":  # It needs a layer to leave out.
        monkeypatch.setattr(keras_hub.models, "GPT2Backbone", one_layer)
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()) or plt.close("all"))
    names = {"__name__": "notebook"}
    try:
        for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells:
            if cell.cell_type == "code":
                code = cell.source.replace("%pip install", "pass  # ")
                exec(compile(code, f"{name}.ipynb", "exec"), names)
    finally:
        keras.backend.clear_session()
        plt.close("all")
    assert len(shown) == figures
