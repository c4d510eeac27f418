"""Why a specification can have no kernel, by an arithmetic that shares nothing with the planner: it adds up what a CTA
must hold, strategy by strategy, and compares with the limits as numbers.

`reasons(fields)` has every field that a refusal may name; of one that does not fit, a field whose change alone makes it
fit, or head_dim where none does.
"""

SMEM, COLUMNS, ROWS, MMA_COLUMNS = 232448, 512, 128, 256
TILES, WIDE = ("tiles", "two_tiles", "two_ctas"), ("chunks", "passes", "pair")
HOPPER, HOPPER_WIDE = "warpgroups", "columns"  # the strategies of sm_90a; the others are sm_100a's
STRATEGIES = (*TILES, *WIDE, "auto", HOPPER, HOPPER_WIDE)
GROUP_ROWS = 64  # of a consumer warpgroup
THREAD_REGISTERS = {64: 240, 128: 240, 192: 160, 256: 112}  # of a consumer, by the rows of a CTA
ENTRY_REGISTERS = {64: 248, 128: 168, 192: 128, 256: 96}  # before setmaxnreg: an instruction's results, and 30
SEARCHED = ("kv_stage", "tile_m", "strategy", "p_staging", "tile_n")  # fields that the planner may be left to choose


def widths(fields):
    """head_dim, head_dim_v"""
    return fields["head_dim"], fields.get("head_dim_v", fields["head_dim"])


def strategies(fields):
    """Strategies that the fields leave open."""
    given = fields.get("strategy", "auto")
    if given != "auto":
        return (given,)
    if max(widths(fields)) <= MMA_COLUMNS:
        others = () if fields.get("p_staging") == "smem" else TILES[1:2] if fields.get("kv_shared") else TILES[1:]
        return ("tiles", *others)
    return {64: ("pair",), 128: ("chunks",)}.get(fields.get("tile_m"), WIDE)


def reasons(fields):
    """Fields that a refusal may name; empty where there is a kernel."""
    not_there = _not_on_hopper if on_hopper(fields) else _not_there
    return {*_contradicted(fields), *not_there(fields)} or {*_unfit(fields)}


def on_hopper(fields):
    return fields.get("arch") == "sm_90a"


def _contradicted(fields):
    d, dv = widths(fields)
    if fields.get("output") == "unnormalized" and fields.get("lse") is False:
        yield "lse"
    if fields.get("kv_shared") and dv > d:
        yield "kv_shared"
    if fields.get("limit2") and fields.get("kv_sources", 1) == 1:
        yield "limit2"
    if fields.get("pack_heads") is True and fields.get("q_heads_per_kv", 1) > 1:
        rows = _hopper_rows(fields) if on_hopper(fields) else [ROWS]
        if not any(_folds(fields["q_heads_per_kv"], count, on_hopper(fields)) for count in rows):
            yield "pack_heads"
    if d > 512 and dv != 512:  # only Q and K of multi-head latent attention are wider
        yield "head_dim"


def _not_there(fields):
    """What no template has (yet)."""
    d, dv = widths(fields)
    where = strategies(fields)
    if where == ("tiles",) and max(d, dv) > MMA_COLUMNS:
        yield "strategy"
    if where in (("two_tiles",), ("two_ctas",)):
        if dv > MMA_COLUMNS:
            yield "head_dim_v"
        if fields.get("p_staging") == "smem":
            yield "p_staging"
    if where == ("two_ctas",):
        if d > MMA_COLUMNS:
            yield "head_dim"
        if fields.get("kv_shared"):
            yield "kv_shared"  # half of K's keys and half of V's columns are not the same half
    if where == ("passes",) and (dv < 32 or fields.get("kv_shared") and not any(_shared_widths(d, dv, 2))):
        yield "strategy"
    if where == ("pair",) and dv < 32:
        yield "strategy" if fields.get("strategy") == "pair" else "tile_m"
    if where == ("pair",) and fields.get("p_staging") == "tmem":
        yield "p_staging"
    if where in (("pair",), ("two_ctas",)) and fields.get("tile_n", 32) % 32:
        yield "tile_n"
    rows = {64 if strategy == "pair" else ROWS for strategy in where}
    if fields.get("tile_m", min(rows)) not in rows:
        yield "tile_m"
    if fields.get("tile_n", 16) > 128:
        yield "tile_n"


def _folds(group, rows, hopper):
    """Whether whole tokens of a group's query heads fill a tile; on sm_90a each consumer's rows are moreover a box: of
    whole tokens, or of a part of one, and a token may fill several tiles.
    """
    if hopper and group % rows == 0:
        return True
    boxes = not hopper or group in (2, 4, 8, 16, 32) or group % GROUP_ROWS == 0
    return rows % group == 0 and boxes


def _hopper_rows(fields):
    """Rows of a CTA that the fields leave open: one to four consumers."""
    return [fields["tile_m"]] if "tile_m" in fields else list(THREAD_REGISTERS)


def _columns(fields):
    """Whether the strategy is columns: asked for, or left out where O is wide or P is to lie in shared memory."""
    given = fields.get("strategy", "auto")
    asks = max(widths(fields)) > MMA_COLUMNS or fields.get("p_staging") == "smem"
    return given == HOPPER_WIDE or given == "auto" and asks


def _not_on_hopper(fields):
    """What sm_90a's template does not have (yet)."""
    d, dv = widths(fields)
    if _columns(fields):
        if fields.get("p_staging", "smem") not in ("smem", "auto"):
            yield "p_staging"
        if fields.get("tile_m", GROUP_ROWS) not in (GROUP_ROWS, 2 * GROUP_ROWS):
            yield "tile_m"
        if fields.get("kv_stage") == 1:
            yield "kv_stage"
        if fields.get("tile_n", 64) % 16 or fields.get("tile_n", 64) < 32:
            yield "tile_n"
        return
    if fields.get("strategy", HOPPER) not in (HOPPER, "auto"):
        yield "strategy"
    if fields.get("p_staging", "register") not in ("register", "auto"):
        yield "p_staging"
    if max(d, dv) > MMA_COLUMNS:
        yield "strategy"
    if fields.get("tile_m", GROUP_ROWS) not in THREAD_REGISTERS:
        yield "tile_m"


def _fits_hopper(fields):
    """S, P and O in a thread's registers, 64 rows over 128 threads, P of 16 bits, beside 28 for the rest; Q and O of
    each consumer, and whole tiles of K and V, in shared memory, where O may lie over a Q that is as wide.
    """
    (d, dv), shared = widths(fields), fields.get("kv_shared", False)
    stages = fields.get("kv_stage", 1 + shared)
    if shared and stages < 2:
        return False
    group, pack = fields.get("q_heads_per_kv", 1), fields.get("pack_heads") is True
    for rows in _hopper_rows(fields):
        if rows not in THREAD_REGISTERS or (pack and group > 1 and not _folds(group, rows, True)):
            continue
        for n in [fields["tile_n"]] if "tile_n" in fields else range(16, 257, 16):
            if max(n, dv) / 2 + 30 > ENTRY_REGISTERS[rows]:
                continue
            registers = n / 2 + n / 4 + dv / 2 + 28
            q, k, v = rows * d * 2, stages * n * d * 2, 0 if shared else stages * n * dv * 2
            staged = fields.get("output") != "unnormalized" and not fields.get("split_kv")  # float32 O is not
            over_q = dv <= d or not staged
            out = 0 if over_q else rows * dv * 2
            if registers <= THREAD_REGISTERS[rows] and 1024 + sum(map(_kib, (q, k, v, out))) <= SMEM:
                return True
    return False


def _fits_columns(fields):
    """One warpgroup with S, P and the chunks of Q that 16 other registers leave room for, 28 with P, two with half of O
    each and 32 others, of 512 registers of a thread of each of four warpgroups; chunks of 64 columns of K and Q, P
    and the factors of O twice, in shared memory. There too at least two slices of V of 16 or 32 keys, each half with
    whole boxes of 64 columns where that is a third more at most and else were boxes of 16, and O in steps; or V within
    two to three KV tiles of K, in steps of what one wgmma of PV multiplies.
    """
    d, dv = widths(fields)
    half = -(-dv // 32) * 16
    output = -(-(half // 2 + 32) // 8) * 8
    score = min(240, (512 - 2 * output - 24) // 8 * 8)
    step = next(columns for columns in (64, 32, 16) if half % columns == 0)
    stored = 0 if fields.get("output") == "unnormalized" or fields.get("split_kv") else 2 * 64 * step * 2
    boxes = -(-half // 64) * 64
    width = boxes if half % 32 and 3 * boxes <= 4 * half else half
    chunks, part = -(-d // 64), (half if half <= 192 else 128) // 64
    shared = fields.get("kv_shared") and half % 64 == 0
    for n in [fields["tile_n"]] if "tile_n" in fields else (128, 112, 96, 80, 64):
        with_p = max(16 + n // 4, 28)
        room = max(0, 4 * (score - with_p - n // 2))
        apart = -(-max(0, d - room) // 64)
        q = min(chunks, apart + 2) if "window_left" in fields else max(2, apart)
        if (d - min(d, 64 * apart)) // 4 + n // 2 + with_p > score:
            continue
        room = SMEM - 2048 - (q * 8192 + 2 * 64 * n * 2)
        of_k = n * 128
        for keys in (16, 32) if "tile_n" in fields or n in (128, 96, 64) else ():
            left = room - 512 - stored - fields.get("kv_stage", 2) * of_k
            if n % keys == 0 and min(2 * n // keys, left // (keys * 2 * width * 2)) >= 2:
                return True
        of_v = 2 * half // 64
        rings = range(chunks - of_v + 2 * of_v, chunks - of_v + 3 * of_v + 1, part) if shared else ()
        if any(fields.get("kv_stage", count) == count and count * of_k <= room for count in rings):
            return True
    return False


def _unfit(fields):
    """The fields to blame where nothing fits."""
    if fits(fields):
        return
    cured = [name for name in SEARCHED if name in fields and any(map(fits, _others(fields, name)))]
    yield from cured or ["head_dim"]


def _others(fields, name):
    """The fields with one of them changed to what else it may be."""
    rest = {key: value for key, value in fields.items() if key != name}
    if on_hopper(fields):
        return [rest] if name in ("kv_stage", "tile_m", "tile_n") else []
    if name == "strategy":
        narrow = ("tiles",) if max(widths(fields)) <= MMA_COLUMNS else ()
        return [{**rest, name: other} for other in (*narrow, *WIDE)]
    if name == "tile_m":
        return [{**rest, "strategy": other} for other in WIDE] if fields.get("strategy", "auto") == "auto" else []
    return [rest]


def fits(fields):
    """Whether any candidate fits a CTA; on sm_100a P may wait in tensor memory or in shared memory."""
    if on_hopper(fields):
        return _fits_columns(fields) if _columns(fields) else _fits_hopper(fields)
    tiles = [fields["tile_n"]] if "tile_n" in fields else range(16, 129, 16) if _shared(fields) else [128, 64, 32, 16]
    stagings = [fields["p_staging"]] if "p_staging" in fields else ["tmem", "smem"]
    stages = fields.get("kv_stage")
    return any(
        _FITS[strategy](fields, n, stages, staging)
        for strategy in strategies(fields)
        for n in tiles
        for staging in stagings
    )


def _kib(size):
    return -(-size // 1024) * 1024


def _out_bytes(fields):
    return 4 if fields.get("output") == "unnormalized" else 2


def _tiles(fields, n, stages, staging):
    """With O staged 16 columns at a time, in shared memory of its own or over Q."""
    (d, dv), shared = widths(fields), fields.get("kv_shared", False)
    stages = stages or 1 + shared
    if shared and stages == 1:
        return False  # the next QK would wait for a stage that only the PV after it frees
    columns = n + (n // 2 if staging == "tmem" else 0) + dv
    q, k, v = ROWS * d * 2, stages * n * d * 2, 0 if shared else stages * n * dv * 2
    p, out = ROWS * n * 2 if staging == "smem" else 0, ROWS * 16 * _out_bytes(fields)
    held = 1024 + sum(map(_kib, (q, k, v, p)))
    return columns <= COLUMNS and (held if out <= q else held + _kib(out)) <= SMEM


def _two_tiles(fields, n, stages, staging):
    """Everything of a query tile twice, P over S, and a factor, a sum and a reference a row; O staged 16 columns at a
    time beside the next Q.
    """
    (d, dv), shared = widths(fields), fields.get("kv_shared", False)
    stages = stages or 1 + shared
    if shared and stages == 1:
        return False
    q, k, v = 2 * ROWS * d * 2, stages * n * d * 2, 0 if shared else stages * n * dv * 2
    rows, out = 3 * 2 * ROWS * 4, 2 * ROWS * 16 * _out_bytes(fields)
    return 2 * n + 2 * dv <= COLUMNS and 1024 + sum(map(_kib, (rows, q, k, v, out))) <= SMEM and staging == "tmem"


def _two_ctas(fields, n, stages, staging):
    """Half of K's keys and of V's columns, of which there are a multiple of 32; S twice, P over S, two factors, a sum
    and a reference a row.
    """
    (d, dv), stages = widths(fields), stages or 1
    columns = -(-dv // 32) * 32
    q, k, v = ROWS * d * 2, stages * (n // 2) * d * 2, stages * n * (columns // 2) * 2
    rows, out = 4 * ROWS * 4, ROWS * 16 * _out_bytes(fields)
    fit = 2 * n + columns <= COLUMNS and 1024 + sum(map(_kib, (rows, q, k, v, out))) <= SMEM
    return fit and staging == "tmem" and n % 32 == 0


def _shared(fields):
    return fields.get("kv_shared", False) and not set(strategies(fields)) <= {*TILES, "pair"}


def _shared_widths(d, dv, passes):
    """(columns of a chunk, chunks of K, those of them that are a pass's V) with at most 16 buffers: of the chunks that
    QK alone reads one is enough, of the others two K tiles must be there.
    """
    a_pass = -(-dv // passes)
    for width in {64, 128, 192, 256, *(-(-a_pass // (16 * parts)) * 16 for parts in range(1, 9))}:
        chunks, kept = -(-d // width), -(-a_pass // width)
        apart = passes * kept <= chunks and (passes - 1) * kept * width < dv
        if width <= MMA_COLUMNS and apart and chunks + kept <= 16:
            yield width, chunks, kept


def _wide_shared(fields, n, stages, staging, passes):
    """K alone in the ring: Q, S, P and a pass's O beside it."""
    d, dv = widths(fields)
    for width, chunks, kept in _shared_widths(d, dv, passes):
        columns = n + (n // 2 if staging == "tmem" else 0) + kept * width
        q, p = ROWS * chunks * width * 2, ROWS * n * 2 if staging == "smem" else 0
        ring = max(stages or 0, chunks + kept) * _kib(n * width * 2)
        deep = stages is None or stages >= chunks + kept
        fit = columns <= COLUMNS and 1024 + _kib(q) + ring + _kib(p) <= SMEM
        if deep and fit and ROWS * 16 * _out_bytes(fields) <= q:
            return True
    return False


def _wide(fields, n, stages, staging, ctas=1, passes=1):
    """Q whole, a ring of at least two buffers, O in as many columns as its MMAs write, staged over Q."""
    if fields.get("kv_shared") and ctas == 1:
        return _wide_shared(fields, n, stages, staging, passes)
    if n % (16 * ctas) or (ctas > 1 and (staging == "tmem" or widths(fields)[1] < 32)):
        return False
    d, dv = widths(fields)
    wanted = -(-dv // passes)
    mmas = -(-wanted // MMA_COLUMNS)
    width = 16 * ctas
    while mmas * width < wanted:
        width += 16 * ctas
    columns = mmas * width // ctas
    if n // ctas + (n // 2 if staging == "tmem" else 0) + columns > COLUMNS:
        return False
    rows = ROWS // ctas
    rest = 1024 + (rows * n * 2 if staging == "smem" else 0) + (1024 if ctas > 1 else 0)
    for chunk in (64, 128):
        q = rows * -(-d // chunk) * chunk * 2
        for keys in (keys for keys in range(16, n + 1, 16) if n % keys == 0):
            buffer = _kib(max(n // ctas * chunk * 2, keys * (width // ctas) * 2))
            if _kib(q) + (stages or 2) * buffer + rest <= SMEM and ROWS * 16 * _out_bytes(fields) <= q:
                return True
    return False


_FITS = {
    "tiles": _tiles,
    "two_tiles": _two_tiles,
    "two_ctas": _two_ctas,
    "chunks": _wide,
    "passes": lambda *case: _wide(*case, passes=2),
    "pair": lambda *case: _wide(*case, ctas=2),
}
