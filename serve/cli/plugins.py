"""`mm plugins`: every registered plugin, and which reducer works with which model family."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of a table.")
def plugins(as_json: bool) -> None:
    """List every registered plugin with its capabilities, and which reducer works with which model family."""
    from mm.plugins.registry import KINDS, describe
    from serve.cli.matrix import matrix_table, support_matrix

    matrix = support_matrix()
    support = {row["name"]: row for row in matrix}
    rows = [row for kind in KINDS for row in describe(kind)]
    if as_json:
        joined = (row | support.get(row["name"], {}) if row["kind"] == "reducer" else row for row in rows)
        click.echo(json.dumps(list(joined), indent=2, default=str))
        return
    click.echo(matrix_table(matrix) + "\n")
    for kind in KINDS:
        click.echo(f"{KINDS[kind].removeprefix('mm.')}")
        of_kind = [row for row in rows if row["kind"] == kind]
        width = max((len(row["name"]) for row in of_kind), default=0)
        for row in of_kind:
            click.echo(f"  {row['name']:{width}}  {row['summary']}")
            click.echo(f"  {'':{width}}    {_capabilities(row)}")
        if not of_kind:
            click.echo("  (none installed)")


def _capabilities(row: dict[str, Any]) -> str:
    shown = {k: v for k, v in row.items() if k not in ("kind", "name", "summary", "options")}
    text = "; ".join(f"{k}: {', '.join(map(str, v)) or '-' if isinstance(v, list) else v}" for k, v in shown.items())
    options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
    return f"{text}; options: {options or '-'}" if text else f"options: {options or '-'}"
