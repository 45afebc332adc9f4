"""Keys and values in pages (Kwon et al. 2023, arXiv:2309.06180): who uses which page, and which
pages hold the beginning of a prompt that may come again.

A page holds `BLOCK_SIZE` tokens of one sequence, in all layers. Full pages of prompts are
remembered under a hash of all tokens up to their end, so a later prompt that begins with the same
tokens shares them. A page without a user stays remembered until its memory is needed, the one that
was used longest ago first.
"""

import hashlib
import itertools
import os
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastlm.checkpoint.config import ModelConfig
from fastlm.reference.quantized_linear import round_rows

# Tokens of a page: a multiple of 16 (csrc/cpu/decode). Half of an attention task of the
# decode step; a prompt's products reach 0.8 to 0.9 of their speed at 512 tokens with 64 (AVX2).
BLOCK_SIZE = 64
SCALES = torch.float32
_MEMORY_SHARE = 4  # a cache takes a quarter of the memory at most
# Tokens of a likely answer with its prompt. On the CPU, memory grows with the pages that were used
# once: with room for the longest contexts, a model of 97 MB came to hold 3.9 GB.
LIKELY_TOKENS = 512


class BlockManager:
    """A pool of ``count`` pages: ``data`` (layers, 2, count, Hkv, BLOCK_SIZE, D).

    int8 has ``scales`` (layers, 2, count, Hkv, BLOCK_SIZE), float32: a key is ``data * scales``,
    with the scale absmax / 127 of its D features. One that is not finite has such a scale.

    ``rope_length``: the length that rotary frequencies depend on, where they do, for all sequences
    alike: pages of several lengths could not be shared. 0: no model's frequencies do.

    Memory is taken as pages are first used; freed pages are used again before fresh ones.
    """

    def __init__(
        self,
        config: ModelConfig,
        count: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        rope_length: int = 0,
    ):
        self.rope_length = rope_length
        shape = (2, count, config.num_key_value_heads, BLOCK_SIZE, config.head_dim)
        self.data = torch.empty(config.num_hidden_layers, *shape, dtype=dtype, device=device)
        self.layers = [layer.unbind() for layer in self.data]  # keys, values
        self.count = count
        self.scales: Tensor | None = None
        if dtype == torch.int8:
            self.scales = torch.empty(self.data.shape[:-1], dtype=SCALES, device=device)
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._idle: OrderedDict[int, None] = OrderedDict()  # remembered, without users
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def page_bytes(self) -> int:
        scales = 0 if self.scales is None else self.scales.nbytes
        return (self.data.nbytes + scales) // self.count

    @property
    def available(self) -> int:
        """Pages that `take` could return."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that are remembered and have no user."""
        return len(self._idle)

    def take(self, count: int) -> list[int] | None:
        """Return pages for one user, or None where there are fewer."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if not self._free:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
                self._free.append(page)
            page = self._free.pop()
            self._users[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> list[int]:
        """Count one user more of each page, which has some."""
        for page in pages:
            self._users[page] += 1
        return list(pages)

    def release(self, pages: Sequence[int]) -> None:
        """Count one user less of each page. The last ones of a sequence are forgotten first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def find(self, key: bytes) -> int | None:
        """Return the page remembered under `key`, with one user more, or None."""
        page = self._page_of.get(key)
        if page is not None:
            self._idle.pop(page, None)
            self._users[page] += 1
        return page

    def remember(self, key: bytes, page: int) -> None:
        """Let `find` find a full page, which is not written to any more. The first page of a key
        stays."""
        if key not in self._page_of:
            self._page_of[key], self._key_of[page] = page, key

    def forget(self) -> None:
        """Let `find` find nothing: the model's weights have changed."""
        self._free += self._idle
        self._idle.clear()
        self._page_of.clear()
        self._key_of.clear()

    def copy(self, source: int, target: int) -> None:
        for part in (self.data, self.scales):
            if part is not None:
                part[:, :, target] = part[:, :, source]


def block_keys(tokens: Sequence[int], before: Sequence[bytes] = ()) -> list[bytes]:
    """Return a key for each full page of tokens: a hash of them and of the key of the page before;
    ``before``: that of the first page, if there is one. So it tells all tokens up to its end."""
    keys, key = [], before[-1] if before else b""
    whole = array("q", tokens)
    for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE):
        key = hashlib.blake2b(
            key + whole[end - BLOCK_SIZE : end].tobytes(), digest_size=16
        ).digest()
        keys.append(key)
    return keys


class ChunkCache:
    """The cache of one forward of the modules over chunks of several sequences, packed without
    padding: it reads from and writes to their pages.

    ``tables[i]``: the pages of sequence i, of which ``starts[i]`` tokens are cached and the next
    ones, up to ``ends[i]``, are computed. What the modules attend to is what the pages hold,
    rounded to their dtype, the chunk's own keys included: how a prompt is cut into chunks does not
    change a result.
    """

    def __init__(
        self,
        pages: BlockManager,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        ends: Sequence[int],
    ):
        device = pages.data.device
        self.pages, self.data = pages, pages.data
        self.longest = max(*ends, pages.rope_length)
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        self.cu_seqlens = _sums(counts).to(device)
        self.cu_seqlens_k = _sums(ends).to(device)
        self.positions = torch.cat([torch.arange(s, e) for s, e in zip(starts, ends, strict=True)])
        new, used, kept = [], [], []
        for table, start, end in zip(tables, starts, ends, strict=True):
            own = torch.tensor(table[: -(-end // BLOCK_SIZE)])
            new.append(own[torch.arange(start, end) // BLOCK_SIZE])
            kept.append(torch.arange(end) + BLOCK_SIZE * sum(map(len, used)))
            used.append(own)
        self.new = torch.cat(new).to(device), slice(None), (self.positions % BLOCK_SIZE).to(device)
        self.positions = self.positions.to(device)
        self.used = torch.cat(used).to(device)
        whole = sum(map(len, used)) * BLOCK_SIZE == sum(ends)
        self.kept = None if whole else torch.cat(kept).to(device)  # tokens of the pages used

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (1, Hkv, S, D). Return all keys and values of all sequences, (T, Hkv, D)."""
        whole, scales = [], self.pages.scales
        for part, (cache, new) in enumerate(zip(self.pages.layers[layer], (k, v), strict=True)):
            tokens = new[0].transpose(0, 1)
            if scales is None:
                cache[self.new] = tokens.to(cache.dtype)
                tokens = self._of_all(cache)
            else:
                codes, of_codes = round_rows(tokens, tokens.shape[-1])
                cache[self.new] = codes.to(cache.dtype)
                scales[layer, part][self.new] = of_codes[..., 0]
                tokens = self._of_all(cache) * self._of_all(scales[layer, part])[..., None]
            whole.append(tokens.to(new.dtype))
        return whole[0], whole[1]

    def _of_all(self, cache: Tensor) -> Tensor:
        """(pages, Hkv, BLOCK_SIZE, ..) -> (T, Hkv, ..)"""
        tokens = cache[self.used].transpose(1, 2).flatten(0, 1)
        return tokens if self.kept is None else tokens.index_select(0, self.kept)


def _sums(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    width = config.head_dim * dtype.itemsize + (SCALES.itemsize if dtype == torch.int8 else 0)
    return heads * BLOCK_SIZE * width


def block_count(
    config: ModelConfig,
    rows: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    context: int | None = None,
    likely: int = LIKELY_TOKENS,
    beside: int = 0,
    share: int = 1,
) -> int:
    """How many pages `rows` answers need. `beside`: bytes that something else takes for each page.

    On the CPU they have room for `rows` answers of ``likely`` tokens and for one context of
    ``context`` tokens (default: the longest), whichever is more, within a quarter of the memory. On
    a GPU, whose memory is taken at once, for `rows` contexts, within half of what is free. `share`:
    so many caches share that memory.
    """
    # and one page more for each, which the scheduler keeps for growth
    longest = -(-(context or config.max_position_embeddings) // BLOCK_SIZE) + 1
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        memory = (torch.cuda.mem_get_info(device)[0] + cached) // 2
        wanted = rows * longest
    else:
        memory = _memory() // _MEMORY_SHARE
        wanted = max(longest, rows * min(longest, -(-likely // BLOCK_SIZE) + 1))
    return max(1, min(wanted, memory // share // (page_bytes(config, dtype) + beside)))


def _memory() -> int:
    """Bytes that this process may use: the machine's, or its container's."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdigit() else memory
