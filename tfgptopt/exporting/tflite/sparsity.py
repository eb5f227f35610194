"""float32 matrices with zeros in blocks of four inputs, as LiteRT's own sparse kernel reads them.

The format is TFLite's block-compressed sparse rows: for each output the blocks that are there.
"""

from __future__ import annotations

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

BLOCK = 4
# Below it the kernel gains too little over the dense one (benchmarks/sparse_decode.py).
LOWEST_SPARSITY = 0.6


def kept_blocks(values: np.ndarray) -> np.ndarray | None:
    """Returns which blocks of a matrix are there, if it is worth to leave out the others.

    Args:
        values: Array of shape `(outputs, inputs)`.

    Returns:
        bool array of shape `(outputs, inputs / 4)`, or `None` for a matrix of integers, one whose
        inputs are no multiple of 4, and one with too few empty blocks.
    """
    if values.dtype != np.float32 or values.shape[1] % BLOCK:
        return None
    kept = np.any(values.reshape(len(values), -1, BLOCK), axis=2)
    # A buffer cannot be empty.
    return kept if 0 < kept.mean() <= 1 - LOWEST_SPARSITY else None


class SharedSparsity:
    """Where the blocks of a weight are, written once however many graphs use the weight.

    Args:
        kept: bool array of shape `(outputs, inputs / 4)`.
    """

    def __init__(self, kept: np.ndarray) -> None:
        self._kept = kept
        self._written: tuple[flatbuffers.Builder, int] | None = None

    def Pack(self, builder: flatbuffers.Builder) -> int:
        if self._written is None or self._written[0] is not builder:
            self._written = (builder, self._parameters().Pack(builder))
        return self._written[1]

    def _parameters(self) -> schema.SparsityParametersT:
        rows, blocks = self._kept.shape
        dimension, kinds = schema.DimensionMetadataT, schema.DimensionType
        segments = np.r_[0, np.cumsum(self._kept.sum(axis=1))].astype(np.int32)
        indices = np.nonzero(self._kept)[1]
        vectors = schema.SparseIndexVector
        if blocks <= 2**16:
            kind, index_vector = vectors.Uint16Vector, schema.Uint16VectorT()
            index_vector.values = indices.astype(np.uint16)
        else:
            kind, index_vector = vectors.Int32Vector, schema.Int32VectorT()
            index_vector.values = indices.astype(np.int32)
        compressed = dimension(
            format=kinds.SPARSE_CSR,
            arraySegmentsType=vectors.Int32Vector,
            arraySegments=schema.Int32VectorT(values=segments),
            arrayIndicesType=kind,
            arrayIndices=index_vector,
        )
        return schema.SparsityParametersT(
            traversalOrder=[0, 1, 2],
            blockMap=[1],
            dimMetadata=[
                dimension(format=kinds.DENSE, denseSize=rows),
                compressed,
                dimension(format=kinds.DENSE, denseSize=BLOCK),
            ],
        )
