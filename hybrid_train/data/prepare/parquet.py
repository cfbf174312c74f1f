"""Gateway to `pyarrow`: one text column of a Parquet file, in blocks that do not depend on others.

A block is a run of rows within a row group. How many rows is told by the file's own metadata, so
the blocks of a file are the same in every run.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import UserError


def column_blocks(
    path: str, key: str, block_bytes: int, skip: int
) -> Iterator[tuple[bytes, float]]:
    """Yield blocks of a column, packed, each with the share of the row groups begun by then.

    The first `skip` blocks are left out.

    Raises:
        UserError: if the file cannot be read or has no such column of text.
    """
    try:
        with pq.ParquetFile(Path(path)) as file:
            place = _column(path, file, key)
            num_groups = file.metadata.num_row_groups
            for group in range(num_groups):
                facts = file.metadata.row_group(group)
                size = facts.column(place).total_uncompressed_size
                rows = max(1, facts.num_rows * block_bytes // max(size, 1))
                blocks = -(-facts.num_rows // rows)
                if skip < blocks:
                    for block in _group_blocks(file, group, key, rows, skip):
                        yield block, (group + 1) / num_groups
                skip = max(0, skip - blocks)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error
    except OSError as error:  # pyarrow says so of a damaged page too
        raise UserError(f"{path} cannot be read: {error}; copy it again") from error


def _column(path: str, file: pq.ParquetFile, key: str) -> int:
    """Return the number of the column, which must hold text."""
    schema = file.schema_arrow
    if key not in schema.names:
        near = nearest(key, schema.names)
        hint = f"; did you mean text_key={near}?" if near else ""
        raise UserError(f"{path} has no column {key!r}; there are {', '.join(schema.names)}{hint}")
    kind = schema.field(key).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    bytes_ = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    if not any(test(plain) for test in (*texts, *bytes_)):
        raise UserError(f"{path}: column {key!r} holds {kind}, not text; set text_key=...")
    columns = [file.schema.column(i).path for i in range(len(file.schema))]
    return columns.index(key)


def _group_blocks(
    file: pq.ParquetFile, group: int, key: str, rows: int, skip: int
) -> Iterator[bytes]:
    for number, batch in enumerate(file.iter_batches(rows, row_groups=[group], columns=[key])):
        if number >= skip:
            yield _pack(batch.column(0))


def _pack(column: pa.Array) -> bytes:
    """Write a column as bytes: its text may be no UTF-8, which the worker then finds."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    batch = pa.record_batch([column.cast(pa.large_binary())], names=["text"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def unpack(block: bytes) -> list[bytes | None]:
    """Return the rows of a packed block; None where there is no value."""
    with pa.ipc.open_stream(block) as reader:
        rows: list[bytes | None] = reader.read_all().column(0).to_pylist()
    return rows
