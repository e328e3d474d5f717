"""`corral chat` and `corral ask`: a conversation in the terminal, and questions over both wires.

Owns what a person sees. The wires are `clients.py`'s.
"""

import time
import unicodedata
from collections.abc import Sequence
from contextlib import closing

import click
from rich.console import Console

from cluster.commands.clients import ChatClient, GrpcClient, HttpClient, Message, Options, Piece
from cluster.session import all_sessions

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_GRPC = "127.0.0.1:9000"

# What the demonstration model has learnt: a fact, a calculation, a story.
QUESTIONS = (
    "How many experts does Llama 4 Maverick have?",
    "What date is 20 days after 15 March?",
    "Tell me a short story about a horse.",
)

# Best in the environment: arguments are there for all users of the machine to see.
api_key_option = click.option(
    "--api-key", envvar="CORRAL_API_KEY", default="", show_envvar=True, help="If one is needed."
)


@click.command()
@click.option("--url", help=f"Over HTTP [default: the service of this machine, or {DEFAULT_URL}]")
@click.option("--grpc", "address", help="Over gRPC instead, at host:port.")
@click.option("--model", default="", help="If several are served.")
@click.option("--system", default="", help="The system message.")
@click.option("--max-tokens", type=click.IntRange(min=1))
@click.option("--temperature", type=click.FloatRange(0, 2))
@click.option("--seed", type=click.IntRange(min=0))
@api_key_option
def chat(
    url: str | None,
    address: str | None,
    model: str,
    system: str,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    api_key: str,
) -> None:
    """Talk to a service. Ctrl-C ends the answer that is coming; Ctrl-D, or Ctrl-C at the prompt, ends the talk."""
    client: ChatClient = GrpcClient(address, api_key) if address else HttpClient(url or _local()[0], api_key)
    options = Options(model=model, max_tokens=max_tokens, temperature=temperature, seed=seed)
    console = Console(highlight=False)
    console.print(f"[dim]{client.name}[/dim]")
    messages = [Message(role="system", content=system)] if system else []
    while (question := _next_question(console)) is not None:
        messages.append(Message(role="user", content=question))
        answer, _ = say(client, messages, options, console)
        messages.append(Message(role="assistant", content=answer))


@click.command()
@click.argument("questions", nargs=-1)
@click.option("--url", help="HTTP address [default: the service of this machine]")
@click.option("--grpc", "address", help="gRPC address [default: the service of this machine]")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2))
@api_key_option
def ask(
    questions: tuple[str, ...],
    url: str | None,
    address: str | None,
    max_tokens: int,
    temperature: float | None,
    api_key: str,
) -> None:
    """Ask QUESTIONS over HTTP, and each again over gRPC. None stated: three that the demonstration model knows."""
    local_url, local_grpc = _local()
    options = Options(max_tokens=max_tokens, temperature=temperature, seed=0)
    console = Console(highlight=False, soft_wrap=True)
    clients: tuple[ChatClient, ...] = (
        HttpClient(url or local_url, api_key),
        GrpcClient(address or local_grpc, api_key),
    )
    for question in questions or QUESTIONS:
        console.print("[bold]question[/bold]", end=" ")
        console.print(question, markup=False)
        for client in clients:
            console.print(f"[bold]{client.name}[/bold]")
            say(client, [Message(role="user", content=question)], options, console)


def say(client: ChatClient, messages: Sequence[Message], options: Options, console: Console) -> tuple[str, int]:
    """Streams one answer to the console. Returns its text and number of tokens; Ctrl-C ends it early."""
    began_s = time.monotonic()
    texts: list[str] = []
    last = Piece(text="")
    with closing(client.stream(messages, options)) as pieces:  # type: ignore[type-var]  # they are generators
        try:
            for last in pieces:
                texts.append(last.text)
                console.print(printable(last.text), end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" [dim](ended)[/dim]", end="")
    elapsed_s = time.monotonic() - began_s
    if last.num_tokens:
        console.print(
            f"\n[dim]{last.num_tokens} tokens in {elapsed_s:.2f} s: {last.num_tokens / elapsed_s:.1f} tokens/s[/dim]"
        )
    else:
        console.print()
    return "".join(texts), last.num_tokens


def printable(text: str) -> str:
    """The text with control characters replaced: a model's output must not steer the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _next_question(console: Console) -> str | None:
    """The next line that is not empty; None at the end of input."""
    try:
        while not (line := console.input("[bold]> [/bold]").strip()):
            pass
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
    return line


def _local() -> tuple[str, str]:
    """HTTP URL and gRPC address of the first service of this machine, else the default ones."""
    for session in all_sessions().values():
        if session.is_alive:
            return session.http_url, session.grpc_address
    return DEFAULT_URL, DEFAULT_GRPC
