"""The KV cache in blocks (PagedAttention: Kwon et al. 2023, arXiv:2309.06180), with a prefix cache.

A block holds the keys and values of `BLOCK_SIZE` tokens of one sequence, in all layers. Full blocks
of prompts are cached under a hash of all tokens up to their end, so a later prompt that begins with
the same tokens shares them. A block that no sequence uses stays cached until its memory is needed;
the least recently used one is evicted first.
"""

import hashlib
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.checkpoint.config import ModelConfig
from fastlm.machine import total_memory
from fastlm.reference.quantized_linear import round_rows

# Tokens of a block: a multiple of 16 (csrc/cpu/decode), and half of an attention task of the decode
# step. With 64, the matrix products of a prompt reach 0.8 to 0.9 of their speed at 512 (AVX2).
BLOCK_SIZE = 64
SCALES = torch.float32
_MEMORY_DIVISOR = 4  # a cache takes a quarter of the memory at most
# Tokens of a typical answer with its prompt. On the CPU, memory grows with the blocks that were
# used at least once: with blocks for the longest contexts, a model of 97 MB grew to 3.9 GB.
EXPECTED_TOKENS = 512


class BlockManager:
    """A pool of ``num_blocks`` blocks: ``data`` (layers, 2, num_blocks, Hkv, BLOCK_SIZE, D).

    int8 has ``scales`` (layers, 2, num_blocks, Hkv, BLOCK_SIZE), float32: a key is ``data *
    scales``, with the scale absmax / 127 of its D features. A key that is not finite has a scale
    that is not finite.

    ``rope_length``: the length of the context, where rotary frequencies depend on it. It is the
    same for all sequences, because blocks of several lengths could not be shared. 0: the
    frequencies do not depend on it.

    Memory is allocated as blocks are first used; freed blocks are used before fresh ones.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        rope_length: int = 0,
    ):
        self.rope_length = rope_length
        shape = (2, num_blocks, config.num_key_value_heads, BLOCK_SIZE, config.head_dim)
        self.data = torch.empty(config.num_hidden_layers, *shape, dtype=dtype, device=device)
        self.layers = [layer.unbind() for layer in self.data]  # keys, values
        self.num_blocks = num_blocks
        self.scales: Tensor | None = None
        if dtype == torch.int8:
            self.scales = torch.empty(self.data.shape[:-1], dtype=SCALES, device=device)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ref_counts = [0] * num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # without users, oldest first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return (self.data.nbytes + scales) // self.num_blocks

    @property
    def num_free(self) -> int:
        """The number of blocks that `allocate` could return."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """The number of cached blocks that no sequence uses."""
        return len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """Return ``count`` blocks for one user, or None where fewer are free."""
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            if not self._free:
                block, _ = self._cached.popitem(last=False)
                del self._block_of[self._hash_of.pop(block)]
                self._free.append(block)
            block = self._free.pop()
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Sequence[int]) -> list[int]:
        """Add a user to each block, which has at least one."""
        for block in blocks:
            self._ref_counts[block] += 1
        return list(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a user from each block. The last blocks of a sequence are evicted first."""
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def find_cached(self, hash: bytes) -> int | None:
        """Return the block that is cached under ``hash``, with one user more, or None."""
        block = self._block_of.get(hash)
        if block is not None:
            self._cached.pop(block, None)
            self._ref_counts[block] += 1
        return block

    def cache(self, hash: bytes, block: int) -> None:
        """Cache a full block, which is not written to any more. The first block of a hash stays."""
        if hash not in self._block_of:
            self._block_of[hash], self._hash_of[block] = block, hash

    def clear_cache(self) -> None:
        """Empty the prefix cache: the model's weights have changed."""
        self._free += self._cached
        self._cached.clear()
        self._block_of.clear()
        self._hash_of.clear()

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of a block to another one."""
        for part in (self.data, self.scales):
            if part is not None:
                part[:, :, target] = part[:, :, source]


def hash_blocks(tokens: Sequence[int], parents: Sequence[bytes] = ()) -> list[bytes]:
    """Return a hash of each full block of tokens and of the hash of the block before it, so that it
    identifies all tokens up to the end of the block. ``parents``: hashes of earlier blocks, of
    which the last one counts.
    """
    hashes, hash = [], parents[-1] if parents else b""
    ids = array("q", tokens)
    for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE):
        hash = hashlib.blake2b(
            hash + ids[end - BLOCK_SIZE : end].tobytes(), digest_size=16
        ).digest()
        hashes.append(hash)
    return hashes


class PrefillKVCache:
    """The KV cache of one forward of the modules over chunks of several prompts, packed without
    padding. It reads and writes the blocks of these sequences.

    ``block_tables[i]``: the blocks of sequence i. Its first ``starts[i]`` tokens are cached; those
    up to ``ends[i]`` are computed now. The modules attend to what the blocks hold, rounded to their
    dtype, also for the keys of the chunk itself. So the result does not depend on how a prompt is
    cut into chunks.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        block_tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        ends: Sequence[int],
    ):
        device = block_manager.data.device
        self.block_manager, self.data = block_manager, block_manager.data
        self.max_length = max(*ends, block_manager.rope_length)
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        self.cu_seqlens = _offsets(counts).to(device)
        self.cu_seqlens_k = _offsets(ends).to(device)
        self.positions = torch.cat([torch.arange(s, e) for s, e in zip(starts, ends, strict=True)])
        new, used, filled = [], [], []
        for block_table, start, end in zip(block_tables, starts, ends, strict=True):
            blocks = torch.tensor(block_table[: -(-end // BLOCK_SIZE)])
            new.append(blocks[torch.arange(start, end) // BLOCK_SIZE])
            filled.append(torch.arange(end) + BLOCK_SIZE * sum(map(len, used)))
            used.append(blocks)
        # where the heads of the new tokens are in a layer's keys (blocks, Hkv, BLOCK_SIZE, D)
        heads = block_manager.data.shape[3]
        head = torch.cat(new)[:, None] * heads + torch.arange(heads)
        rows = head * BLOCK_SIZE + (self.positions % BLOCK_SIZE)[:, None]
        self.new_rows = rows.flatten().to(device)
        self.positions = self.positions.to(device)
        self.blocks = torch.cat(used).to(device)  # of all sequences, one after the other
        # the tokens in these blocks; None: they are full
        is_full = sum(map(len, used)) * BLOCK_SIZE == sum(ends)
        self.filled = None if is_full else torch.cat(filled).to(device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (1, Hkv, S, D). Return all keys and values of all sequences, (T, Hkv, D)."""
        results, scales = [], self.block_manager.scales
        layers = self.block_manager.layers
        for part, (cache, new) in enumerate(zip(layers[layer], (k, v), strict=True)):
            tokens = new[0].transpose(0, 1)
            if scales is None:
                self._write(cache, tokens)
                tokens = self._gather(cache)
            else:
                codes, code_scales = round_rows(tokens, tokens.shape[-1])
                self._write(cache, codes)
                self._write(scales[layer, part], code_scales[..., 0])
                tokens = self._gather(cache) * self._gather(scales[layer, part])[..., None]
            results.append(tokens.to(new.dtype))
        return results[0], results[1]

    def _write(self, cache: Tensor, tokens: Tensor) -> None:
        """Write the new tokens (S, Hkv, ..) to (blocks, Hkv, BLOCK_SIZE, ..)."""
        rows = cache.view(-1, *cache.shape[3:])  # an index of three dimensions takes twice the time
        rows.index_copy_(0, self.new_rows, tokens.flatten(0, 1).to(cache.dtype))

    def _gather(self, cache: Tensor) -> Tensor:
        """Return the tokens of all sequences: (blocks, Hkv, BLOCK_SIZE, ..) -> (T, Hkv, ..)."""
        tokens = cache.index_select(0, self.blocks).transpose(1, 2).flatten(0, 1)
        return tokens if self.filled is None else tokens.index_select(0, self.filled)


def _offsets(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of a block."""
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    width = config.head_dim * dtype.itemsize + (SCALES.itemsize if dtype == torch.int8 else 0)
    return heads * BLOCK_SIZE * width


def default_num_blocks(
    config: ModelConfig,
    max_num_seqs: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int | None = None,
    expected_tokens: int = EXPECTED_TOKENS,
    extra_block_bytes: int = 0,
    num_caches: int = 1,
) -> int:
    """Return the number of blocks that ``max_num_seqs`` answers need.

    On the CPU they hold ``max_num_seqs`` answers of ``expected_tokens`` tokens, or one context of
    ``max_model_len`` tokens (default: the model's), whichever is more, within a quarter of the
    memory. On a GPU, which allocates the memory at once, they hold ``max_num_seqs`` contexts,
    within half of the free memory.

    extra_block_bytes: bytes that something else needs for each block.
    num_caches: the number of caches that share the memory.
    """
    # the scheduler keeps one block more for each sequence, for its growth
    blocks_of_context = -(-(max_model_len or config.max_position_embeddings) // BLOCK_SIZE) + 1
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        memory = (torch.cuda.mem_get_info(device)[0] + cached) // 2
        num_blocks = max_num_seqs * blocks_of_context
    else:
        memory = total_memory() // _MEMORY_DIVISOR
        blocks_of_answer = min(blocks_of_context, -(-expected_tokens // BLOCK_SIZE) + 1)
        num_blocks = max(blocks_of_context, max_num_seqs * blocks_of_answer)
    bytes_per_block = block_bytes(config, dtype) + extra_block_bytes
    return max(1, min(num_blocks, memory // num_caches // bytes_per_block))
