"""Puts a model into a larger one of its class, with dead parts in random places.

Written against the definitions of the layers, not against the code that shrinks.
"""

import keras
import numpy as np

from tfgptopt.shrinking import shape_of
from tfgptopt.shrinking.families import family_of, positions_of
from tfgptopt.shrinking.shapes import config_with


def array(variable):
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)


class Grower:
    """Grows a model.

    The mean square over `n` features of which the living are `n'` is that of the living times
    `n' / n`. So the stream is written larger by `sqrt(n / n')`, and norms read it back.
    """

    def __init__(self, model, seed=0, **larger):
        self.generator = np.random.default_rng(seed)
        self.family, self.small = family_of(model), model.backbone
        self.before = shape_of(model)
        config = {**config_with(model, self.before), **larger}
        self.large = type(self.small).from_config(config)
        self.model = type(model)(backbone=self.large, preprocessor=None)
        for variable in self.model.trainable_variables:
            variable.assign(self.generator.normal(0, 0.3, variable.shape))
        self.after = shape_of(self.model)
        self.layered = isinstance(self.small.layer_norm, keras.layers.LayerNormalization)
        self.ratio = (self.after.width / self.before.width) ** 0.5
        self.places = {
            axis: self._place(getattr(self.before, axis), getattr(self.after, axis))
            for axis in ("width", "feedforward", "depth", "kv_heads")
        }
        # Whole groups are dead, and of the living groups the last heads.
        old, new = (s.heads // s.kv_heads for s in (self.before, self.after))
        groups = self.places["kv_heads"]
        self.places["heads"] = (groups[:, None] * new + np.arange(old)).reshape(-1)

    def _place(self, few, many):
        return np.sort(self.generator.permutation(many)[:few])

    def _index(self, shape, axes):
        """Returns where the living values of an array of some axes go."""
        known = [self.places.get(axis) for axis in axes]
        return np.ix_(*[np.arange(n) if k is None else k for n, k in zip(shape, known)])  # noqa: B905

    def _read(self, source, target, axes, factor=1.0):
        """Assigns living values among noise, which only dead features or heads meet."""
        values = array(target)
        values[self._index(source.shape, axes)] = array(source) * factor
        target.assign(values)

    def _write(self, source, target, axes, factor=1.0):
        """Assigns what is written to the stream: dead heads write nothing, and dead features get
        nothing, or the mean of the others where a LayerNorm subtracts it."""
        axis = axes.index("width")
        living = np.moveaxis(array(source) * factor, axis, -1)
        wide = np.zeros((*living.shape[:-1], self.after.width))
        if self.layered:
            wide += living.mean(-1, keepdims=True)
        wide[..., self.places["width"]] = living
        values = np.moveaxis(np.zeros(target.shape), axis, -1)
        others = [a for a in axes if a != "width"]
        index = self._index(wide.shape[:-1], others) if others else ()
        values[index] = wide
        target.assign(np.moveaxis(values, -1, axis))

    def _norm(self, source, target, factor, bias_factor=1.0):
        offset = self.family.norm_offset
        for old, new in zip(source.weights, target.weights, strict=True):
            bias = old is getattr(source, "beta", None)
            values = np.zeros(self.after.width) - (0.0 if bias else offset)
            scaled = (array(old) + offset) * factor - offset
            values[self.places["width"]] = array(old) * bias_factor if bias else scaled
            new.assign(values)

    def _silence(self, layer):
        """Makes a layer an identity: it writes nothing."""
        for part in self.family.parts:
            inner = part.of(layer)
            if part.kind == "writes":
                for variable in inner.weights:
                    variable.assign(np.zeros(variable.shape))
            if part.kind == "post_norm" and inner is not None:
                inner.scale.assign(-np.ones(self.after.width))

    def _query(self, layer):
        """Returns how much larger queries are where they are divided by a root of the width."""
        if getattr(getattr(layer, "attention", None), "query_head_dim_normalize", True):
            return 1.0
        sizes = [s.width // s.heads for s in (self.after, self.before)]
        return (sizes[0] / sizes[1]) ** 0.5

    def _layer(self, old, new):
        for part in self.family.parts:
            source, target = part.of(old), part.of(new)
            if source is None:
                continue
            if "norm" in part.kind:
                self._norm(source, target, 1 / self.ratio if part.kind == "norm" else 1.0)
                continue
            writes = part.kind == "writes"
            copy = self._write if writes else self._read
            factor = self.ratio if writes else 1.0
            factor = self._query(new) if part.kind == "query" else factor
            copy(source._kernel, target._kernel, part.axes, factor)
            if getattr(source, "bias", None) is not None:
                copy(source.bias, target.bias, part.bias, factor)
        for name in ("_query_dense_layer_norm", "_key_dense_layer_norm"):
            inner = getattr(getattr(old, "_self_attention_layer", None), name, None)
            if inner is not None:
                getattr(new._self_attention_layer, name).set_weights(inner.get_weights())

    def grow(self):
        """Returns the larger model, which gives the same logits."""
        places = self.places["depth"]
        for i, layer in enumerate(self.large.transformer_layers):
            if i in places:
                self._layer(self.small.transformer_layers[int(np.searchsorted(places, i))], layer)
            else:
                self._silence(layer)
        old, new = self.small.token_embedding, self.large.token_embedding
        factor = 1.0 if self.family.scales_tokens else self.ratio
        self._write(old.embeddings, new.embeddings, ("vocabulary", "width"), factor)
        final, bias = 1.0 / self.ratio, 1.0
        if old.tie_weights:
            final, bias = final / factor, 1.0 / factor
        else:
            tables = old.reverse_embeddings, new.reverse_embeddings
            self._read(*tables, ("width", "vocabulary"))
        self._norm(self.small.layer_norm, self.large.layer_norm, final, bias)
        positions = [positions_of(self.family, b) for b in (self.small, self.large)]
        if positions[0] is not None:
            tables = [p.position_embeddings for p in positions]
            self._write(*tables, ("context", "width"), self.ratio)
        return self.model
