"""`joinwise keys`: make, list, replace and remove API keys in a file of hashes. Gateways follow it within seconds."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from joinwise.cluster.cli.options import Json

app = typer.Typer(help="Make and change API keys.", no_args_is_help=True)
KeysFile = Annotated[Path, typer.Option("--file", "-f", help="The file of keys (gateway.keys_file).")]
KeyId = Annotated[str, typer.Argument(help="The key's id: the part between its underscores.")]


@app.command()
def add(
    tenant: Annotated[str, typer.Option(help="Whose key it is; limits and accounts go by it.")],
    file: KeysFile = Path("keys.yaml"),
    role: Annotated[list[str] | None, typer.Option(help="user, admin or metrics; may be given again.")] = None,
    expires: Annotated[str | None, typer.Option(help="Last day on which it holds, like 2026-12-31.")] = None,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    from joinwise.cluster import apikeys

    ring = apikeys.load(file) if file.exists() else apikeys.KeyRing()
    key, entry = apikeys.make(tenant, tuple(role or ["user"]), expires)
    ring.with_entry(entry).save(file)
    typer.echo(key)


@app.command("list")
def list_(file: KeysFile = Path("keys.yaml"), as_json: Json = False) -> None:
    """List keys by id, with tenant, roles and dates; no secret and no hash."""
    from joinwise.cluster import apikeys

    today = datetime.now(UTC).date()
    entries = apikeys.load(file).entries
    if as_json:
        rows = [
            {
                "id": entry.id,
                "tenant": entry.tenant,
                "roles": list(entry.roles),
                "created": entry.created,
                "expires": entry.expires,
                "holds": entry.holds(today),
            }
            for entry in entries
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    for entry in entries:
        until = f"until {entry.expires}" if entry.expires else "for good"
        state = until if entry.holds(today) else f"expired {entry.expires}"
        typer.echo(f"{entry.id}  {entry.tenant}  {','.join(entry.roles)}  {state}")


@app.command()
def rotate(
    key_id: KeyId,
    file: KeysFile = Path("keys.yaml"),
    overlap_days: Annotated[int, typer.Option(min=0, help="Days for which the old key still holds.")] = 7,
) -> None:
    """Make another key for the same tenant and roles, and let the old one end; print the new one, once."""
    from joinwise.cluster import apikeys

    ring = apikeys.load(file)
    old = ring.entry(key_id)
    key, entry = apikeys.make(old.tenant, old.roles)
    last = (datetime.now(UTC).date() + timedelta(days=overlap_days)).isoformat()
    ring.expiring(key_id, last).with_entry(entry).save(file)
    typer.echo(key)


@app.command()
def revoke(key_id: KeyId, file: KeysFile = Path("keys.yaml")) -> None:
    """Remove a key: it is refused as soon as gateways have read the file again."""
    from joinwise.cluster import apikeys

    apikeys.load(file).without(key_id).save(file)
    typer.echo(f"removed {key_id}")
