"""What the templates spell of a Plan as text: names of the kernel's constants, arguments and expressions.

A template puts them in as they are; which of them fits a plan is decided here.
"""

from __future__ import annotations


class Spelling:
    """Plan's words. The attributes that they are made of are Plan's."""

    @property
    def cta_rows(self) -> str:
        """The constant that says how many rows of the MMAs' accumulators a CTA's tensor memory holds."""
        return "CTA_ROWS" if self.two_ctas else "TILE_M"

    @property
    def cta_tokens(self) -> str:
        """Query tokens of a CTA, as the kernel's constants say it."""
        return f"2 * {self.token_tile}" if self.query_tiles == 2 else self.token_tile

    @property
    def row_in_tile(self) -> str:
        """A thread's row of its query tile."""
        rows = "CTA_ROWS" if self.two_ctas else "TILE_M" if self.query_tiles == 2 else None
        return "cute.arch.thread_idx()[0]" + (f" % {rows}" if rows else "")

    @property
    def tile_warps(self) -> str:
        """The constant that says how many warps read the rows of a query tile."""
        return "TILE_WARPS" if self.query_tiles == 2 else "SOFTMAX_WARPS"

    @property
    def warp_in_tile(self) -> str:
        """Which of them a warp is."""
        return "cute.arch.warp_idx()" + (" % TILE_WARPS" if self.query_tiles == 2 else "")

    @property
    def span_name(self) -> str:
        """The argument that tells the load warp which KV tiles it loads; "" where they are the first ones."""
        if self.query_tiles == 2:
            return "span" if self.spans_differ else ""
        return "spans" if self.part.kv_sources == 2 else "span"

    @property
    def loaded_tile(self) -> str:
        """Which KV tile of source 1 is the j-th that is loaded."""
        if self.mask.left is not None and self.query_tiles == 2:
            return "span[1] + j"
        return self.tile_of_j

    @property
    def loaded_tile2(self) -> str:
        """The same of source 2, of whose tiles span[0] of source 1 come first."""
        return "j - span[0]" if self.query_tiles == 2 else "kv_tile(j - span[0], span2)"

    @property
    def token_tile(self) -> str:
        """The constant that says how many query tokens a tile has."""
        return "TILE_TOKENS" if self.packed else "TILE_M"

    @property
    def tile_heads(self) -> str:
        """The constant that says of how many query heads a tile of packed heads has rows."""
        return "TILE_HEADS" if self.tiles_a_group > 1 else "Q_HEADS_PER_KV"

    @property
    def head_count(self) -> str:
        """How many heads the grid counts, by the host function's tensors: of Q, or those that tiles are filled with."""
        if self.tiles_a_group > 1:
            return "q.shape[2] // TILE_HEADS"
        return "k.shape[2]" if self.packed else "q.shape[2]"

    @property
    def kv_head(self) -> str:
        """The KV head of one of them."""
        if self.tiles_a_group > 1:
            return "head // (Q_HEADS_PER_KV // TILE_HEADS)"
        return "head // Q_HEADS_PER_KV" if self.part.q_heads_per_kv > 1 and not self.packed else "head"

    @property
    def tile_rows(self) -> str:
        """What a tile covers, in words."""
        if not self.packed:
            return f"{self.mma_m} query rows of a query head"
        if self.tiles_a_group > 1:
            return f"a query token of {self.heads_per_tile} of a KV head's {self.part.q_heads_per_kv} query heads"
        return f"{self.tokens} query tokens of a KV head's {self.heads_per_tile} query heads"

    @property
    def grid_x(self) -> str:
        """The grid's first extent, in words."""
        times = "2 " if self.pair else f"{self.passes} " if self.passes > 1 else ""
        return f"{times}ceil(Sq / {self.tokens})"

    @property
    def thread_arguments(self) -> str:
        """thread_tensors as the beginning of a list of arguments; a part's results take the place of the outputs."""
        parts = self.part.split_kv
        names = [item.name + "_parts" if parts and item.output else item.spelled for item in self.thread_tensors]
        return "".join(f"{name}, " for name in names)

    @property
    def rows(self) -> str:
        """Those that belong to a row: what the warps of the epilogue take, as the inside of a tuple; "" for none.
        Where no others correct O they are the softmax warps, which read limit2 too.
        """
        wanted = ("limit2", "sink", "lse", "m")[self.corrected :]
        names = [parameter.spelled for parameter in self.thread_tensors if parameter.name in wanted]
        return f"{names[0]}," if len(names) == 1 else ", ".join(names)

    @property
    def tma_operands(self) -> str:
        """TMA atoms and tensors of Q, of each source's K and V, and of O, as the kernel takes them."""
        return ", ".join(f"tma_{name}, m{name}" for name in self._matrices)

    @property
    def tma_atoms(self) -> str:
        return ", ".join(f"tma_{name}" for name in self._matrices)

    @property
    def worker(self) -> str:
        """Who takes turns in a persistent launch, in words."""
        return "pair" if self.two_ctas else "CTA"

    @property
    def workers(self) -> str:
        """How many of them there are."""
        return "cute.arch.grid_dim()[0]" + (" // 2" if self.two_ctas else "")

    @property
    def place(self) -> str:
        """Which one of them this is."""
        return "cute.arch.block_idx()[0]" + (" // 2" if self.two_ctas else "")

    @property
    def lengths(self) -> str:
        """Lengths of queries and keys, as the inside of a tuple."""
        return ", ".join(["seqlen_q", "seqlen_k"] + ["seqlen_k2"] * (self.part.kv_sources == 2))

    @property
    def entries(self) -> str:
        """What a query head's query tiles are multiplied by: batch entries, or parts of their keys."""
        return "parts" if self.part.split_kv else "batches"

    @property
    def call_for_visits(self) -> str:
        """The last argument of visits_of, which reads limits."""
        return ", call" if self.mask.limits else ""

    @property
    def call(self) -> str:
        """What of a call the work of a persistent CTA follows from, as the kernel names it."""
        names = ["seqlen_q", "heads", self.entries, "seqlen_k"] + ["seqlen_k2"] * (self.part.kv_sources == 2)
        names += ["splits"] * self.part.split_kv
        rows = ("seqlens", "seqlens2", "limit2")
        return ", ".join(names + [parameter.name for parameter in self.thread_tensors if parameter.name in rows])

    @property
    def rows_unpacked(self) -> str:
        """The same as the target of an assignment."""
        return f"({self.rows})" if self.rows.endswith(",") else self.rows

    @property
    def empty_lse(self) -> str:
        """What is said of the LSE of a row that sees no key."""
        if not self.part.lse:
            return ""
        return " and LSE = its sink" if self.part.sink else " and LSE = -inf"
