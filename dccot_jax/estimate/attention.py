"""What attention costs by its backend (`model/backends`): working memory on one device, pairs that are computed, bytes that move.

Shapes of one layer on one device: R rows of T tokens, N query and K key/value heads of H dimensions, compute dtype of `size` bytes.

`xla` writes scores and probabilities of all pairs down. The others are flash kernels (arXiv 2205.14135): no [T, T] array per head; what is
alive are the operands in the kernel's layout, their gradients and one float32 logsumexp per head and position. `splash` pads T to
whole tiles of 128, H to 128 lanes, and writes each logsumexp 128 times in the forward pass; its backward pass reads it and
sum(dO · O) 8 times. `cudnn` and `tokamax` know no segments: they take packed rows with a mask and a bias of all pairs, for all heads
together.
"""

from __future__ import annotations

import dataclasses

from dccot_jax.estimate.tiles import LANES, SUBLANES, up
from dccot_jax.estimate.training import Training, tensor_parts
from dccot_jax.model.attention import query_blocks
from dccot_jax.model.config import ModelConfig

FLOAT32 = 4


def student_attention(training: Training) -> Attention:
    """One layer's attention of the student, in one micro-batch."""
    return _of(training.attention, training.mc, training)


def teacher_attention(training: Training, teacher: ModelConfig) -> Attention:
    """One layer's attention of `training.teacher`, in one micro-batch."""
    return _of(training.teacher_attention, teacher, training)


def _of(backend: str, mc: ModelConfig, training: Training) -> Attention:
    parts = tensor_parts(mc.num_kv_heads, training.mesh[2])
    heads = (mc.num_heads // parts, mc.num_kv_heads // parts, mc.head_dim)
    return Attention(backend, training.device_rows, training.tokens, *heads, training.compute_bytes)


@dataclasses.dataclass(frozen=True)
class Attention:
    """One layer's attention on one device, `rows` rows of `tokens` positions, in a compute dtype of `size` bytes."""

    backend: str
    rows: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    size: int

    def forward_bytes(self) -> int:
        """xla, per head and pair: float32 scores and probabilities, and these in the compute dtype. Else q, k, v, the result and the
        logsumexp.
        """
        if self.backend == "xla":
            return self._all_pairs * self.heads * (2 * FLOAT32 + self.size)
        logsumexp = LANES if self.backend == "splash" else 1
        return self._vectors(2, 2) + self._positions * self.heads * logsumexp * FLOAT32 + self._mask_bytes()

    def backward_bytes(self) -> int:
        """xla, per head and pair: the recomputed probabilities and their gradient, each in float32 and in the compute dtype (compilers
        that are short of memory do with less). Else q, k, v, the result, the gradients of the four, logsumexp and sum(dO · O).
        """
        if self.backend == "xla":
            return self._all_pairs * self.heads * 2 * (FLOAT32 + self.size)
        sums = 2 * (SUBLANES if self.backend == "splash" else 1)
        return self._vectors(4, 4) + self._positions * self.heads * sums * FLOAT32 + self._mask_bytes()

    def kept_bytes(self) -> int:
        """What the forward pass keeps for the backward pass where nothing is recomputed: q, k, v, the result and the logsumexp; xla k and v
        once for each block of queries, up to the last key that it sees.
        """
        logsumexp = self._positions * self.heads * FLOAT32
        if self.backend != "xla":
            return self._vectors(2, 2) + logsumexp
        return self._vectors(2, query_blocks(self.tokens) + 1) + logsumexp

    def passes(self, recomputed: bool) -> float:
        """Forward passes' worth of products in a step, of two products per pair each: the forward pass, again where remat discards it,
        and in the backward pass five products (scores, dP, dQ, dK, dV); splash makes scores and dP twice, for dQ and for dK and dV.
        """
        return 1 + recomputed + (3.5 if self.backend == "splash" else 2.5)

    def pairs(self) -> float:
        """Pairs of a query and a key in one row for which products are made: whole blocks on and below the diagonal."""
        blocks = query_blocks(self.tokens) if self.backend == "xla" else self._length / self._block
        return self._length**2 * (blocks + 1) / (2 * blocks)

    def moved_bytes(self) -> float:
        """Bytes between memory and cores in one pass over all rows.

        xla, per computed pair and head: float32 scores and probabilities in the compute dtype, written and read. Else q and the result
        once; with splash keys and values again for each block of queries, with the others, whose blocks of one head share a cache,
        once, and the bias.
        """
        pairs = self.rows * self.pairs()
        if self.backend == "xla":
            return pairs * self.heads * 2 * (FLOAT32 + self.size)
        if self.backend == "splash":
            return self._vectors(2, 0) + pairs / self._block * self.heads * 2 * self.head_dim * self.size
        return self._vectors(2, 2) + self._mask_bytes()

    @property
    def _length(self) -> int:
        """Positions of a row as the kernel has them."""
        return up(self.tokens, LANES) if self.backend == "splash" else self.tokens

    @property
    def _block(self) -> int:
        if self.backend != "splash":
            return LANES
        from dccot_jax.model.backends.splash import block_size  # slow to import

        return block_size(self.tokens)

    @property
    def _positions(self) -> int:
        return self.rows * self._length

    @property
    def _all_pairs(self) -> int:
        return self.rows * self.tokens**2

    def _vectors(self, wide: int, narrow: int) -> int:
        """Arrays [R, T, N, H] and [R, T, K, H]."""
        width = up(self.head_dim, LANES) if self.backend == "splash" else self.head_dim
        return self._positions * (wide * self.heads + narrow * self.kv_heads) * width * self.size

    def _mask_bytes(self) -> int:
        """The mask of packed rows, and cudnn's bias made of it."""
        return 0 if self.backend == "splash" else self._all_pairs * (1 + (self.size if self.backend == "cudnn" else 0))
