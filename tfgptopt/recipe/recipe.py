"""A recipe: the ordered techniques that were or will be applied to a model, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import yaml

from tfgptopt.file.replacing import replacing
from tfgptopt.model.targets import check_regex
from tfgptopt.model.techniques import (
    IN_FIT,
    Technique,
    kind_of,
    technique_classes,
    techniques_of,
)
from tfgptopt.model.types import Config


def _technique_from(config: Any) -> Technique:
    known = technique_classes()
    if not isinstance(config, dict) or config.get("name") not in known:
        *others, last = known
        raise ValueError(
            f"A technique is a mapping with the name {', '.join(others)} or {last}. "
            f"Received: {config!r}"
        )
    name = config["name"]
    try:
        fields = {key: value for key, value in config.items() if key != "name"}
        technique: Technique = known[name].from_config(fields)
    except KeyError as error:
        raise ValueError(f"The technique {name} needs the field {error}.") from None
    except TypeError as error:
        raise ValueError(f"The technique {name}: {error}") from None
    return technique


@dataclass(frozen=True)
class Recipe:
    """An ordered list of techniques; to and from YAML; replayed when a model is reloaded.

    KerasHub rebuilds plain layers when it loads a model. Save the recipe beside the weights:

    ```python
    from tfgptopt import Recipe
    from tfgptopt.quantization import Int8, QuantizeAware

    Recipe((QuantizeAware(Int8()),)).save("recipe.yaml")
    model = keras_hub.models.CausalLM.from_preset("small_gpt")
    Recipe.load("recipe.yaml").replay(model)
    ```

    Args:
        techniques: `Shrink`, `Rotate`, `Distill`, `Prune` and `QuantizeAware`, in the order of
            their application, each once for the same targets.

    Raises:
        ValueError: If something else is in the list, or a technique is there twice.
    """

    techniques: tuple[Technique, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "techniques", tuple(self.techniques))
        for technique in self.techniques:
            if isinstance(technique, type) or not isinstance(technique, Technique):
                raise ValueError(f"Not a technique: {technique!r}")
            check_regex(getattr(technique, "targets", None))
        stages = [technique.order for technique in self.techniques]
        if stages != sorted(stages):
            raise ValueError(
                "A recipe shrinks first, then distills, then prunes and rounds. Received: "
                f"{', '.join(type(technique).__name__ for technique in self.techniques)}"
            )
        # A model may be shrunk twice, with something else counted each time.
        kinds = [kind_of(technique) for technique in self.techniques if technique.order]
        if len(set(kinds)) < len(kinds):
            raise ValueError(
                "A recipe holds each technique once for the same targets. Received: "
                f"{', '.join(kind for kind, _ in kinds)}"
            )

    @property
    def in_fit(self) -> Recipe:
        """The part that callbacks of `fit` carry out: pruning and rounding."""
        return Recipe(tuple(t for t in self.techniques if t.order >= IN_FIT))

    def to_config(self) -> Config:
        """Returns the recipe as plain data."""
        return {"techniques": [technique.to_config() for technique in self.techniques]}

    @classmethod
    def from_config(cls, config: Any) -> Recipe:
        """Returns the recipe that `to_config` wrote.

        Raises:
            ValueError: If a field is missing, unknown or out of range.
        """
        if not isinstance(config, dict) or not isinstance(config.get("techniques"), list):
            raise ValueError(
                f"A recipe is a mapping with a list of techniques. Received: {config!r}"
            )
        return cls(tuple(_technique_from(item) for item in config["techniques"]))

    def save(self, path: str | Path) -> None:
        """Writes the recipe as YAML."""
        text = yaml.safe_dump(self.to_config(), sort_keys=False)
        with replacing(Path(path)) as temporary:
            temporary.write_text(text, "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a recipe from YAML.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no valid YAML or no valid recipe.
        """
        try:
            return cls.from_config(yaml.safe_load(Path(path).read_text("utf-8")))
        except (yaml.YAMLError, ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"'{path}' is no valid recipe: {error}") from None

    def replay(self, model: keras.Layer) -> keras.Layer:
        """Dresses a reloaded model as it was when it was saved.

        Args:
            model: A model with the weights of a run that used this recipe.

        Returns:
            The same model.
        """
        for technique in self.techniques:
            technique.replay(model)
        return model


def recipe_of(model: keras.Layer) -> Recipe | None:
    """Returns everything that was done to a model as a recipe, or `None` for a plain one."""
    found = techniques_of(model)
    # Taught twice, the last time counts; the metadata of a file has all.
    last = {kind_of(one): one for one in found if one.order}
    techniques = [one for one in found if one.order == 0 or last[kind_of(one)] is one]
    return Recipe(tuple(techniques)) if techniques else None
