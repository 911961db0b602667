"""Numba kernels that copy tracepoint fields out of samples into typed columns.

The layout of the fields is passed as a table, so that one compiled kernel serves every recording. Columns live in one
allocation, addressed in units of their item size through views of 1, 2, 4 and 8 bytes.
"""

from __future__ import annotations

from numba import int64, uint8, uint16, uint32, uint64

from rxlab.read.perfattr import L_CALLCHAIN, L_RAW, L_READ, L_TAIL, L_TYPE
from rxlab.read.perfrecords import inline, inner, jit, read_u16, read_u32, read_u64

# Rows of the field table.
F_KIND, F_OFFSET, F_SIZE, F_COUNT, F_BASE, F_TEXT = range(6)
FIELD_COLUMNS = 6

# F_KIND: copies of a scalar by size; of a u32/u64 word of the sample's fixed part; text; elements; variable parts, the last.
K_U8, K_U16, K_U32, K_U64, K_SAMPLE_U32, K_SAMPLE_U64, K_TEXT, K_TEXT8, K_ARRAY, K_LOC, K_REL_LOC, K_REST = range(12)

# Codes of one thread's dictionary; the thread's number is above these bits.
CODE_BITS = 26

# Samples gathered at a time: what one thread touches before the next field. Half as many take a tenth longer, more gain nothing.
GATHER = 4096
# Rows of the room that a thread works in: record, row, first raw byte and raw size of each sample of a block, and two more.
WORK = 6

# State of the dictionary of variable fields, and how a gather ended.
D_ENTRIES, D_POOL = range(2)


@inner
def read_part_length(buffer, at, room, read_format, big):
    """Return the bytes of the READ part of a sample, -1 when it does not fit; see struct read_format in perf_event.h."""
    times = int64(read_format & 1) + int64(read_format >> 1 & 1)
    per_value = 1 + int64(read_format >> 2 & 1) + int64(read_format >> 4 & 1)
    if not read_format & 8:
        length = 8 * (times + per_value)
        return length if length <= room else -1
    if room < 8:
        return -1
    n_values = read_u64(buffer, at, big)
    if n_values > uint64(room // 8):
        return -1
    length = 8 * (1 + times + int64(n_values) * per_value)
    return length if length <= room else -1


@inline
def raw_span(buffer, at, layout, big):
    """Return first byte and length of the raw part of the sample at `at`; (-1, 0) when there is none or it does not fit."""
    end = at + int64(read_u16(buffer, at + 6, big))
    position = at + layout[L_TAIL]
    if not layout[L_RAW]:
        return int64(-1), int64(0)
    if layout[L_READ]:
        length = read_part_length(buffer, position, end - position, layout[L_READ] - 1, big)
        if length < 0:
            return int64(-1), int64(0)
        position += length
    if layout[L_CALLCHAIN]:
        if end - position < 8:
            return int64(-1), int64(0)
        n_frames = read_u64(buffer, position, big)
        if n_frames > uint64((end - position) // 8 - 1):
            return int64(-1), int64(0)
        position += 8 + 8 * int64(n_frames)
    if end - position < 4:
        return int64(-1), int64(0)
    length = int64(read_u32(buffer, position, big))
    position += 4
    if length > end - position:
        return int64(-1), int64(0)
    return position, length


@inline
def copy_text8(buffer, source, words, target, arena64):
    """Copy a char array of `words` 8-byte words up to its NUL, zeros after it (little-endian hosts)."""
    ended = False
    for word in range(words):
        value = uint64(0)
        if not ended:
            value = read_u64(buffer, source + 8 * word, None)
            zeros = (value - uint64(0x0101010101010101)) & ~value & uint64(0x8080808080808080)
            if zeros != uint64(0):
                lowest = zeros & (~zeros + uint64(1))
                value &= (lowest >> uint64(7)) - uint64(1)
                ended = True
        arena64[uint64(target + word)] = value


@inner
def copy_text(buffer, source, size, target, arena8):
    """Copy a char array up to its NUL, zeros after it."""
    ended = False
    for k in range(size):
        letter = uint8(0)
        if not ended:
            letter = buffer[uint64(source + k)]
            ended = letter == uint8(0)
        arena8[uint64(target + k)] = letter


@inner
def gather_array(buffer, origins, rows, field, arenas, big):
    """Copy the elements of one array field per sample of a block."""
    size, count, offset, base = field[F_SIZE], field[F_COUNT], field[F_OFFSET], field[F_BASE]
    arena8, arena16, arena32, arena64 = arenas
    for i in range(rows.size):
        at, first = origins[i] + offset, base + rows[i] * count
        if size == 1:
            for k in range(count):
                arena8[uint64(first + k)] = buffer[uint64(at + k)]
        elif size == 2:
            for k in range(count):
                arena16[uint64(first + k)] = uint16(read_u16(buffer, at + 2 * k, big))
        elif size == 4:
            for k in range(count):
                arena32[uint64(first + k)] = uint32(read_u32(buffer, at + 4 * k, big))
        else:
            for k in range(count):
                arena64[uint64(first + k)] = read_u64(buffer, at + 8 * k, big)


@inline
def variable_span(buffer, raw, raw_size, field, big):
    """Return first byte and length of a __data_loc, __rel_loc or [] part, (-1, 0) when it lies outside the raw bytes."""
    offset = field[F_OFFSET]
    if field[F_KIND] == K_REST:
        return (raw + offset, raw_size - offset) if offset <= raw_size else (int64(-1), int64(0))
    if offset + 4 > raw_size:
        return int64(-1), int64(0)
    pointer = int64(read_u32(buffer, raw + offset, big))
    first, length = pointer & 0xFFFF, pointer >> 16
    if field[F_KIND] == K_REL_LOC:  # counted from the end of the pointer itself
        first += offset + 4
    if first + length > raw_size:
        return int64(-1), int64(0)
    return raw + first, length


@inner
def encode(buffer, source, length, number, dictionary):
    """Return the code of some bytes in the dictionary of field `number`, adding them; -1 when the dictionary is full."""
    slots, hashes, owners, firsts, lengths, pool, state = dictionary
    digest = uint64(14695981039346656037) ^ uint64(number + 1)
    for k in range(length):
        digest = (digest ^ uint64(buffer[uint64(source + k)])) * uint64(1099511628211)
    mask = uint64(slots.size - 1)
    slot = (digest ^ digest >> uint64(32)) & mask
    while slots[slot] >= 0:
        entry = slots[slot]
        if hashes[entry] == digest and owners[entry] == number and lengths[entry] == length:
            is_same = True
            for k in range(length):
                if pool[uint64(firsts[entry] + k)] != buffer[uint64(source + k)]:
                    is_same = False
                    break
            if is_same:
                return entry
        slot = (slot + uint64(1)) & mask
    entry = state[D_ENTRIES]
    if entry == owners.size or state[D_POOL] + length > pool.size:
        return int64(-1)
    slots[slot], hashes[entry], owners[entry] = entry, digest, number
    firsts[entry], lengths[entry] = state[D_POOL], length
    for k in range(length):
        pool[uint64(state[D_POOL] + k)] = buffer[uint64(source + k)]
    state[D_ENTRIES], state[D_POOL] = entry + 1, state[D_POOL] + length
    return int64(entry)


@jit
def rebuild_slots(hashes, n_entries, slots):
    """Fill `slots` (all -1) of a grown dictionary from the digests of its entries."""
    mask = uint64(slots.size - 1)
    for entry in range(n_entries):
        slot = (hashes[entry] ^ hashes[entry] >> uint64(32)) & mask
        while slots[slot] >= 0:
            slot = (slot + uint64(1)) & mask
        slots[slot] = entry


@inline
def is_equal(buffer, source, pool, first, length):
    """Tell whether bytes of the file are those of a dictionary's entry."""
    for k in range(length):  # noqa: SIM110 -- numba compiles no all()
        if pool[uint64(first + k)] != buffer[uint64(source + k)]:
            return False
    return True


@inner
def gather_variable(buffer, spans, rows, field, number, arena32, dictionary, code_base, big):
    """Write the dictionary codes of one variable field for one block; return False when the dictionary is full."""
    raws, sizes = spans
    is_text, base = field[F_TEXT], field[F_BASE]
    firsts, lengths, pool = dictionary[3], dictionary[4], dictionary[5]
    # The last sample's text is this one's more often than not, and the dictionary's lookup takes ten times as long.
    last, last_first, last_length = int64(-1), int64(0), int64(-1)
    for i in range(rows.size):
        code = int64(-1)
        if raws[i] >= 0:
            source, length = variable_span(buffer, raws[i], sizes[i], field, big)
            if source >= 0:
                if is_text:
                    end = int64(0)
                    while end < length and buffer[uint64(source + end)] != uint8(0):
                        end += 1
                    length = end
                if length != last_length or not is_equal(buffer, source, pool, last_first, length):
                    last = encode(buffer, source, length, number, dictionary)
                    if last < 0:
                        return False
                    last_first, last_length = firsts[last], lengths[last]
                code = last + code_base
        arena32[uint64(base + rows[i])] = uint32(code & 0xFFFFFFFF)
    return True


@inner
def gather_scalar(buffer, origins, rows, field, arenas, big):
    """Copy one scalar per sample of a block, `F_OFFSET` bytes after each origin."""
    kind, base, offset = field[F_KIND], field[F_BASE], field[F_OFFSET]
    if kind == K_U8:
        for i in range(rows.size):
            arenas[0][uint64(base + rows[i])] = buffer[uint64(origins[i] + offset)]
    elif kind == K_U16:
        for i in range(rows.size):
            arenas[1][uint64(base + rows[i])] = uint16(read_u16(buffer, origins[i] + offset, big))
    elif kind == K_U32 or kind == K_SAMPLE_U32:  # noqa: SIM109 -- "in" compiles a search of its own
        for i in range(rows.size):
            arenas[2][uint64(base + rows[i])] = uint32(read_u32(buffer, origins[i] + offset, big))
    else:
        for i in range(rows.size):
            arenas[3][uint64(base + rows[i])] = read_u64(buffer, origins[i] + offset, big)


@inner
def gather_fixed(buffer, origins, rows, field, arenas, big):
    """Copy one field of fixed size per sample of a block; all of it lies inside the buffer."""
    kind, size, base, offset = field[F_KIND], field[F_SIZE], field[F_BASE], field[F_OFFSET]
    if kind == K_TEXT8:
        for i in range(rows.size):
            copy_text8(buffer, origins[i] + offset, size // 8, base + rows[i] * (size // 8), arenas[3])
    elif kind == K_TEXT:
        for i in range(rows.size):
            copy_text(buffer, origins[i] + offset, size, base + rows[i] * size, arenas[0])
    elif kind == K_ARRAY:
        gather_array(buffer, origins, rows, field, arenas, big)
    else:
        gather_scalar(buffer, origins, rows, field, arenas, big)


@inner
def part_short(spans, rows, field, arena8, whole):
    """Zero one field where a sample is too short for it; list the others' origins and rows in `whole` and return their number."""
    raws, sizes = spans
    last = field[F_OFFSET] + field[F_SIZE] * field[F_COUNT]
    row_bytes = field[F_SIZE] * field[F_COUNT]
    unit = int64(1) if field[F_KIND] == K_TEXT else int64(8) if field[F_KIND] == K_TEXT8 else field[F_SIZE]
    n_whole = int64(0)
    for i in range(rows.size):
        if raws[i] >= 0 and last <= sizes[i]:
            whole[0, n_whole], whole[1, n_whole] = raws[i], rows[i]
            n_whole += 1
        else:
            for k in range(row_bytes):
                arena8[uint64(field[F_BASE] * unit + rows[i] * row_bytes + k)] = uint8(0)
    return n_whole


@inner
def gather_event(buffer, starts, spans, rows, fields, numbers, arenas, dictionary, code_base, big, whole):
    """Copy fields `numbers` (first, last) for one event's samples of one block; return (values missing, dictionary had room)."""
    raws, sizes = spans
    shortest = sizes[0]
    for i in range(rows.size):
        if sizes[i] < shortest:
            shortest = sizes[i]
    n_short = int64(0)
    for number in range(numbers[0], numbers[1]):
        field = fields[number]
        kind = field[F_KIND]
        if kind >= K_LOC:
            if not gather_variable(buffer, spans, rows, field, number, arenas[2], dictionary, code_base, big):
                return n_short, False
        elif kind == K_SAMPLE_U32 or kind == K_SAMPLE_U64:  # noqa: SIM109
            gather_scalar(buffer, starts, rows, field, arenas, big)
        elif field[F_OFFSET] + field[F_SIZE] * field[F_COUNT] <= shortest:
            gather_fixed(buffer, raws, rows, field, arenas, big)
        else:
            n_whole = part_short(spans, rows, field, arenas[0], whole)
            n_short += rows.size - n_whole
            gather_fixed(buffer, whole[0, :n_whole], whole[1, :n_whole], field, arenas, big)
    return n_short, True


@jit
def gather_samples(buffer, big, samples, span, tables, arenas, dictionary, code_base, firsts, work):
    """Copy the wanted fields of samples ``span[0]`` up to ``span[1]``, block by block while a block's bytes are in the cache.

    Parameters
    ----------
    samples : tuple of arrays, dims (sample,)
        start int64, event int16, row within the event int32.
    tables : tuple of arrays
        layouts (event, L_*), fields (field, F_*), first field of each event (events + 1; equal: event not wanted).
    arenas : tuple of arrays
        The columns' memory as uint8, uint16, uint32, uint64.
    dictionary : tuple of arrays
        See :func:`encode`.
    firsts, work : int64 arrays, dims (2, events + 1) and (WORK, GATHER)
        Room to work. Handed in, because Numba needs long to compile an allocation, and longer to load what it compiled.

    Returns
    -------
    next_sample, n_short : int
        `next_sample` < ``span[1]``: the dictionary was full; grow it and go on from there. Values that lay beyond their
        sample's bytes, each set to zero.
    """
    layouts, fields, first_fields = tables
    at, rows, raws, sizes, whole = work[0], work[1], work[2], work[3], work[4:]
    bounds = firsts[0]
    n_short = int64(0)
    begin, last = int64(span[0]), int64(span[1])
    while begin < last:
        stop = begin + GATHER
        if stop > last:
            stop = last
        bucket_samples(buffer, big, samples, (begin, stop), layouts, first_fields, firsts, work)
        for number in range(layouts.shape[0]):
            one, end = bounds[number], bounds[number + 1]
            if one == end:
                continue
            wanted = (first_fields[number], first_fields[number + 1])
            spans = (raws[one:end], sizes[one:end])
            missing, has_room = gather_event(
                buffer, at[one:end], spans, rows[one:end], fields, wanted, arenas, dictionary, code_base, big, whole
            )
            if not has_room:
                return begin, n_short
            n_short += missing
        begin = stop
    return begin, n_short


@inner
def bucket_samples(buffer, big, samples, span, layouts, first_fields, firsts, work):
    """Group the wanted samples of one block by event and find their raw parts."""
    starts, event, places = samples
    at, rows, raws, sizes = work[0], work[1], work[2], work[3]
    bounds, cursor = firsts[0], firsts[1]
    bounds[:] = 0
    for i in range(span[0], span[1]):
        number = event[i]
        if number >= 0 and first_fields[number] < first_fields[number + 1]:
            bounds[number + 1] += 1
    for number in range(bounds.size - 1):
        cursor[number] = bounds[number]
        bounds[number + 1] += bounds[number]
    for i in range(span[0], span[1]):
        number = event[i]
        if number >= 0 and first_fields[number] < first_fields[number + 1]:
            k = cursor[number]
            cursor[number] = k + 1
            at[k], rows[k] = starts[i], places[i]
            raws[k], sizes[k] = raw_span(buffer, starts[i], layouts[number], big)
            common_type = layouts[number, L_TYPE]
            if common_type >= 0 and sizes[k] >= 2 and int64(read_u16(buffer, raws[k], big)) != common_type:
                raws[k], sizes[k] = int64(-1), int64(0)


@jit
def remap_codes(codes, map_by_thread):
    """Replace thread-local codes (thread in the upper bits) by final ones; `map_by_thread` dims (thread, entry)."""
    for i in range(codes.size):
        code = codes[i]
        if code >= 0:
            codes[i] = map_by_thread[code >> CODE_BITS, code & (1 << CODE_BITS) - 1]
