"""Embedding tables: which modalities share one, and which of its rows are whose.

Codes may live in the table of another modality, such as the text's, from a row `offset` on: text
and images are then one vocabulary (early fusion, arXiv 2405.09818).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.models.modalities import Table

if TYPE_CHECKING:
    from vishwam_t5x.models.config import EncoderDecoderConfig


def of_codes(owner: Any, features: int | None = None) -> Table:
    """Returns the table of codes: another modality's, or their own with vectors of that width."""
    if owner.in_table is not None:
        return Table(owner.in_table, None)
    return Table(owner.modality, owner.vocab_size, features)


def check_own_settings(owner: Any) -> None:
    """Raises `UserError` unless `in_table` and `offset` of codes go together."""
    name, offset = type(owner).__name__, owner.offset
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise UserError(f"{name}.offset is a row, a whole number of at least 0", got=repr(offset))
    if owner.in_table == owner.modality:
        raise UserError(f"{name}.in_table names the modality itself", got=repr(owner.in_table),
                        fix="in_table = None: a table of its own")
    if offset and owner.in_table is None:
        raise UserError(f"{name}.offset is a row of another modality's table", got=offset,
                        fix=f"{name}.in_table = 'text', or offset = 0")
    if owner.in_table is not None and getattr(owner, "embedding_dim", None) is not None:
        raise UserError(f"{name}.embedding_dim is for a table of its own",
                        got=f"in_table = {owner.in_table!r}", fix="leave one of them out")


def of(config: EncoderDecoderConfig) -> dict[str, Table]:
    """Returns the tables of a model by the modality that owns them.

    Raises:
        UserError: modalities do not agree about a table, or about its rows.
    """
    found: dict[str, Table] = {}
    for module in _with_tables(config):
        table = module.table
        if table.num_embeddings is None:
            continue
        known = found.setdefault(table.name, table)
        if known.num_embeddings != table.num_embeddings:
            raise UserError(
                f"input and output of modality '{table.name}' share one embedding table, but "
                "differ in vocab_size", got=f"{known.num_embeddings} and {table.num_embeddings}",
                fix="set both to the larger one")
        if known != table:
            raise UserError(
                f"input and output of modality '{table.name}' share one embedding table, but "
                "differ in its width", got=f"{known.features} and {table.features}",
                fix="CodeOutput.embedding_dim = None")
    for module in _with_tables(config):
        if module.table.num_embeddings is None:
            one_of(module.table.name, tuple(found), f"table for the codes of '{module.modality}'")
    for name, table in found.items():
        _check_claims(claims(config, name), table)
    return found


def claims(config: EncoderDecoderConfig, table: str) -> dict[str, tuple[int, int]]:
    """Returns the rows (first, end) of a table that modalities have which do not own it.

    Raises:
        UserError: input and output of one modality have different rows.
    """
    found: dict[str, tuple[int, int]] = {}
    for module in _with_tables(config):
        if module.table.name != table or module.modality == table:
            continue
        rows = module.offset, module.offset + module.vocab_size
        if found.setdefault(module.modality, rows) != rows:
            raise UserError(
                f"input and output of modality '{module.modality}' have different rows of the "
                f"table of '{table}'", got=f"{_rows(found[module.modality])} and {_rows(rows)}",
                fix="give CodeInput and CodeOutput the same offset and vocab_size")
    return found


def rows_of_others(config: EncoderDecoderConfig, target: Any) -> list[tuple[int, int]]:
    """Returns the rows (first, end) of a target's table that other modalities have."""
    if target.table.name != target.modality:
        return []  # whose rows are all its own
    return list(claims(config, target.modality).values())


def _with_tables(config: EncoderDecoderConfig) -> list[Any]:
    modules: list[Any] = [*config.inputs, *config.targets]
    return [module for module in modules if module.table is not None]


def _check_claims(found: Mapping[str, tuple[int, int]], table: Table) -> None:
    size = table.rows
    before: tuple[str, tuple[int, int]] | None = None
    for modality, rows in sorted(found.items(), key=lambda item: item[1]):
        if rows[1] > size:
            raise UserError(
                f"the codes of modality '{modality}' end outside the table of '{table.name}'",
                got=f"{_rows(rows)} of {size}",
                fix=f"vocab_size = {rows[1]} or more of '{table.name}', or a smaller offset")
        if before is not None and before[1][1] > rows[0]:
            raise UserError(
                f"two modalities have the same rows of the table of '{table.name}'",
                got=f"'{before[0]}' {_rows(before[1])}, '{modality}' {_rows(rows)}",
                fix=f"offset = {before[1][1]} or more of '{modality}'")
        before = modality, rows


def _rows(rows: tuple[int, int]) -> str:
    return f"rows {rows[0]} to {rows[1] - 1}"
