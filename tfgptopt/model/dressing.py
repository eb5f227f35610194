"""Gives a layer a subclass of its own class for a while, and takes it off again.

The object keeps its variables, name, path and place in the model, and `isinstance` stays true. The
name of the class stays too: checkpoints address the layers of a list by it. Several techniques may
dress one layer, in any order.
"""

from __future__ import annotations

from itertools import combinations

import keras

_STANDARD = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Embedding,
    keras.layers.ReversibleEmbedding,
)
# Outermost first: who is called first.
_mixins: list[tuple[int, str, type, tuple[type, ...]]] = []
_made: dict[tuple[type, tuple[type, ...]], type] = {}


def register_mixin(
    mixin: type, prefix: str, place: int, bases: tuple[type, ...] = _STANDARD
) -> None:
    """Makes known what a technique dresses layers with, so that saved layers come back.

    Args:
        mixin: Its methods go before those of the layer.
        prefix: Begins the name under which Keras saves dressed classes.
        place: Of several mixins, the smallest is called first.
        bases: The standard layers that it is for. Defaults to all that have targets.
    """
    _mixins.append((place, prefix, mixin, bases))
    _mixins.sort(key=lambda entry: entry[0])
    for layer_class in _STANDARD:
        fitting = [entry[2] for entry in _mixins if layer_class in entry[3]]
        for count in range(1, len(fitting) + 1):
            for chosen in combinations(fitting, count):
                if len({_place(one) for one in chosen}) == count:
                    dressed_class(layer_class, chosen)


def _place(mixin: type) -> int:
    return next(place for place, _, known, _ in _mixins if known is mixin)


def _prefix(mixin: type) -> str:
    return next(prefix for _, prefix, known, _ in _mixins if known is mixin)


def plain_class(layer_class: type) -> type:
    """Returns the class that a dressed one was made of, or a plain class itself."""
    return vars(layer_class).get("_tfgptopt_plain", layer_class)


def worn_by(layer: keras.Layer) -> tuple[type, ...]:
    """Returns the mixins that a layer is dressed with."""
    return vars(type(layer)).get("_tfgptopt_mixins", ())


def dressed_class(layer_class: type, mixins: tuple[type, ...]) -> type:
    """Returns the subclass of a layer class with some mixins, made once."""
    plain = plain_class(layer_class)
    if not mixins:
        return plain
    key = plain, tuple(sorted(mixins, key=_place))
    if key not in _made:
        members = {
            "__module__": __name__,
            "_tfgptopt_plain": plain,
            "_tfgptopt_mixins": key[1],
        }
        made = type(plain.__name__, (*key[1], plain), members)
        name = "".join(_prefix(mixin) for mixin in key[1]) + plain.__name__
        _made[key] = keras.saving.register_keras_serializable("tfgptopt", name)(made)
    return _made[key]


def put_on(layer: keras.Layer, mixin: type) -> None:
    """Dresses a layer with a mixin, besides those that it wears."""
    if mixin not in worn_by(layer):
        layer.__class__ = dressed_class(type(layer), (*worn_by(layer), mixin))


def take_off(layer: keras.Layer, mixin: type) -> None:
    """Takes a mixin off a layer."""
    rest = tuple(one for one in worn_by(layer) if one is not mixin)
    layer.__class__ = dressed_class(type(layer), rest)
