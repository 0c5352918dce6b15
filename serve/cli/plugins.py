"""`mm plugins`: every registered plugin, and which reducer works with which model family."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of a table.")
@click.option("--model", "models", multiple=True, help="Look for learned reducers of this folder or hub name too.")
@click.option("--url", help="Ask this running server, such as http://127.0.0.1:8000, which plugins it switched off.")
def plugins(as_json: bool, models: tuple[str, ...], url: str | None) -> None:
    """List every registered plugin, which reducer works with which model family, and for which models it is trained."""
    from mm.models.checkpoint import find
    from mm.plugins.registry import KINDS, describe
    from serve.cli.matrix import matrix_table, shipped_models, support_matrix

    matrix = support_matrix(shipped_models() | {model: find(model) for model in models})
    support = {row["name"]: row for row in matrix}
    off = {} if url is None else _switched_off(url)
    rows = [row | off.get((row["kind"], row["name"]), {}) for kind in KINDS for row in describe(kind)]
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


def _switched_off(url: str) -> dict[tuple[str, str], dict[str, str]]:
    """Kind and name of the plugins that a server switched off, and what to show of them.

    Raises:
        ClickException: The server does not answer.
    """
    import httpx

    try:
        health = httpx.get(f"{url.rstrip('/').removesuffix('/v1')}/health", timeout=10, trust_env=False).json()
        found = health.get("plugins_off", [])
        return {
            (one["kind"], one["name"]): {"off": f"{one['reason']}; tried again in {one['retry_in_s']:g} s"}
            for one in found
        }
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, AttributeError, LookupError, TypeError) as error:
        raise click.ClickException(f"{url} does not answer /health as a server of ours does") from error


def _capabilities(row: dict[str, Any]) -> str:
    shown = {k: v for k, v in row.items() if k not in ("kind", "name", "summary", "options")}
    text = "; ".join(f"{k}: {', '.join(map(str, v)) or '-' if isinstance(v, list) else v}" for k, v in shown.items())
    options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
    return f"{text}; options: {options or '-'}" if text else f"options: {options or '-'}"
