"""`multilora app`: the web app and the service behind it."""

from __future__ import annotations

import getpass
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from multilora.cli.console import note

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def app(
    host: Annotated[str, typer.Option(help="address to listen on; the default is reached from this machine only")] = (
        "127.0.0.1"
    ),
    port: Annotated[int | None, typer.Option(help="default the first free one from 7860 on")] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(help="'embedded' (default), a pipeline folder or a hub id; repeat, first is default"),
    ] = None,
    auth: Annotated[Path | None, typer.Option(help="file of users, a line each, written by --new-user")] = None,
    new_user: Annotated[
        str | None, typer.Option("--new-user", help="NAME: ask for a password, add a line to the file of --auth, end")
    ] = None,
    anyone: Annotated[
        bool, typer.Option("--anyone", help="listen on another address than loopback without --auth")
    ] = False,
    device: Annotated[
        list[str] | None,
        typer.Option(help="cpu, cuda:0, ...: a worker each; repeat; default one on the best there is"),
    ] = None,
    loras: Annotated[Path | None, typer.Option(help="folder of .safetensors files that everyone may use")] = None,
    clip: Annotated[str, typer.Option(help="scorer for bases other than 'embedded', such as ViT-B/32")] = "",
    waiting: Annotated[int, typer.Option(help="requests that may wait, of all users", min=0)] = 20,
    per_user: Annotated[int, typer.Option(help="requests that may wait, of one user", min=1)] = 2,
    seconds: Annotated[float, typer.Option(help="that one request may run", min=1)] = 900.0,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="also serve the actions as MCP tools; all who call them share files")
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="write prompts into the log as well")] = False,
) -> None:
    """Serve the web app; Ctrl-C or SIGTERM lets the running picture finish (30 s at most) and ends it."""
    from multilora.web.service.guard import hashed, launch_options, read_users

    if new_user is not None:
        _add_user(new_user, auth, hashed)
        return
    if host not in LOOPBACK and auth is None and not anyone:
        raise ValueError(
            f"--host {host}: whoever reaches this machine could use it, and no login is asked for; give --auth FILE, "
            "or --anyone if that is meant"
        )
    if mcp and auth is not None:
        raise ValueError("--mcp with --auth: gradio's tools cannot log in; serve them without logins on this machine")
    if loras is not None and not loras.is_dir():
        raise ValueError(f"--loras {str(loras)!r}: no such folder")
    users = read_users(auth) if auth is not None else None
    from multilora.web.app import launch
    from multilora.web.service import Limits, Service
    from multilora.web.service.log import LOGGER, Log

    if not LOGGER.handlers:
        LOGGER.addHandler(logging.StreamHandler())
        LOGGER.setLevel(logging.INFO)
        LOGGER.propagate = False  # the MCP server sets up the root logger, which would say all of it again
    signal.signal(signal.SIGTERM, _interrupt)
    service = Service(
        base or ["embedded"],
        open_bases=host in LOOPBACK and users is None,
        devices=device or [None],
        limits=Limits(waiting=waiting, per_user=per_user, seconds=seconds),
        loras=loras,
        clip=clip,
        log=Log(prompts=log_prompts),
    )
    try:
        options = launch_options(service, host=host, port=port, users=users)
        served, address = launch(service, mcp_server=mcp, prevent_thread_lock=True, quiet=True, **options)
        note(f"multilora is at {address} (Ctrl-C ends it)")
        if mcp:
            note(f"MCP tools (streamable HTTP) are at {address.rstrip('/')}/gradio_api/mcp/")
        served.block_thread()
    except KeyboardInterrupt:
        note("stopping")
    finally:
        service.close()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _add_user(name: str, auth: Path | None, hashed: Any) -> None:
    """Append NAME:HASH to the file, which only its owner may read."""
    if auth is None:
        raise ValueError(f"--new-user {name}: give --auth FILE, the file that the user is added to")
    if not name or ":" in name or name != name.strip() or name.startswith("#"):
        raise ValueError(f"--new-user {name!r}: a name without ':' is wanted, and no spaces or '#' before it")
    asked = sys.stdin.isatty()
    password = getpass.getpass(f"password of {name}: ") if asked else sys.stdin.readline().rstrip("\n")
    if len(password) < 8:
        raise ValueError("the password has less than 8 characters")
    if asked and getpass.getpass("once more: ") != password:
        raise ValueError("the two passwords are not the same; nothing was added")
    auth = auth.expanduser()
    auth.touch(mode=0o600)
    with auth.open("a", encoding="utf-8") as file:
        file.write(f"{name}:{hashed(password)}\n")
    note(f"{name} added to {auth}")
