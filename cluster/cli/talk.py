"""`joinwise chat` and `joinwise generate`: ask a running cluster.

Answers go to stdout as they come and nothing else does, so that they can be piped; the rest goes to stderr.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from joinwise.cluster.cli.options import Ca, Json, Target, Timeout, Tls, Token, connect

if TYPE_CHECKING:
    from joinwise.cluster.client import Client, GenerateOptions, Generation, Stream

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Model or adapter; absent: the only one.", show_default=False)
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Most tokens to generate.", show_default=False)
]
Temperature = Annotated[float | None, typer.Option("--temperature", min=0, help="0 is greedy.", show_default=False)]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of this request.", show_default=False)]
ShowLedger = Annotated[bool, typer.Option("--ledger", help="Show afterwards where the time went.")]


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="One question; without it a conversation, or stdin.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="How the assistant shall behave.", show_default=False)] = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    ledger: ShowLedger = False,
    target: Target = None,
    token: Token = None,
    tls: Tls = False,
    ca: Ca = None,
    timeout: Timeout = 600.0,
) -> None:
    """Talk to a model."""
    options = _options(model=model, max_tokens=max_tokens, temperature=temperature, seed=seed)
    turns: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    with connect(target, token, tls, ca, timeout) as client:
        if prompt is None and not sys.stdin.isatty():
            prompt = sys.stdin.read().strip()
        if prompt is not None:
            _ask(client, [*turns, {"role": "user", "content": prompt}], options, ledger)
            return
        _converse(client, turns, options, ledger)


def _converse(client: Client, turns: list[dict[str, str]], options: GenerateOptions, ledger: bool) -> None:
    """Ask and answer until end of file. Ctrl-C ends the answer, not the conversation."""
    from joinwise.cluster.cli.shell import print_error
    from joinwise.cluster.errors import JoinwiseError

    beginning = len(turns)
    typer.secho("Ctrl-C ends an answer, Ctrl-D the conversation, /reset begins anew.", dim=True, err=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo(err=True)
            return
        if line == "/reset":
            del turns[beginning:]
        if not line or line == "/reset":
            continue
        try:
            answer = _ask(client, [*turns, {"role": "user", "content": line}], options, ledger)
        except JoinwiseError as e:
            print_error(e)
            continue
        turns += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def _ask(client: Client, turns: list[dict[str, str]], options: GenerateOptions, ledger: bool) -> str:
    """One answer, printed as it comes; returns its text, or as much as came before Ctrl-C."""
    with client.generate(messages=turns, stream=True, **options) as stream:
        text = _print_stream(stream)
        if ledger:
            _print_ledger(stream.ledger)
    return text


def _print_stream(stream: Stream) -> str:
    from joinwise.cluster.client import Delta

    text = []
    try:
        for event in stream:
            if isinstance(event, Delta):
                text.append(event.text)
                if event.reasoning:
                    typer.secho(event.reasoning, dim=True, nl=False, err=True)
                sys.stdout.write(event.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        stream.cancel()
        if not sys.stdin.isatty():
            raise
        typer.secho(" [cancelled]", dim=True, nl=False, err=True)
    sys.stdout.write("\n")
    return "".join(text)


def generate(
    prompt: Annotated[str, typer.Argument(help="Plain text, no chat template; - reads stdin.")],
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Nucleus mass.", show_default=False)] = None,
    seed: Seed = None,
    choices: Annotated[int, typer.Option("--choices", min=1, help="Number of answers.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.", show_default=False)
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema that the answer follows.", show_default=False)
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Regular expression that the answer matches.", show_default=False)
    ] = None,
    as_json: Json = False,
    ledger: ShowLedger = False,
    target: Target = None,
    token: Token = None,
    tls: Tls = False,
    ca: Ca = None,
    timeout: Timeout = 600.0,
) -> None:
    """Continue a text."""
    options = _options(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        n=choices if choices > 1 else None,
        stop=stop or None,
        json_schema=_schema(json_schema),
        regex=regex,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    with connect(target, token, tls, ca, timeout) as client:
        if as_json or choices > 1:
            answer = client.generate(text, **options)
            _print_whole(answer, as_json)
            if ledger and not as_json:
                _print_ledger(answer.ledger)
            return
        with client.generate(text, stream=True, **options) as stream:
            _print_stream(stream)
            if ledger:
                _print_ledger(stream.ledger)


def _print_whole(answer: Generation, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(answer), indent=2, ensure_ascii=False))
        return
    for choice in answer.choices:
        typer.secho(f"--- {choice.index}", dim=True, err=True)
        typer.echo(choice.text)


def _print_ledger(ledger: Any) -> None:
    from rich.console import Console

    from joinwise.cluster.cli.ledger import render_ledger

    console = Console(stderr=True, highlight=False)
    console.print("the gateway sent no ledger" if ledger is None else render_ledger(ledger))


def _options(**given: Any) -> GenerateOptions:
    return {k: v for k, v in given.items() if v is not None}  # type: ignore[return-value]


def _schema(file: Path | None) -> Any:
    from joinwise.cluster.errors import InvalidRequestError

    if file is None:
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InvalidRequestError(f"no JSON schema can be read from {file}: {e}") from None
