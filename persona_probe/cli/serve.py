"""`persona-probe serve`: a steered model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_probe.cli.console import err, out
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.server.service import Service

_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Annotated[
        Path | None,
        typer.Option("--model", "--base", help="Checkpoint or adapter folder; the shipped organism."),
    ] = None,
    tuned: Annotated[
        Path | None, typer.Option("--tuned", "--adapter", help="A fine-tune of it: adapter or checkpoint.")
    ] = None,
    fixes: Annotated[
        list[str] | None,
        typer.Option("--fixes", "--with", help="A fix, NAME=FIX, or a folder of fixes; may be repeated."),
    ] = None,
    default: Annotated[
        str, typer.Option(help="The fix of a request that names none.", show_default=True)
    ] = "none",
    sae: Annotated[
        list[Path] | None, typer.Option(help="A dictionary whose latents may be read; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; its folder's name.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the API key.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    max_batch: Annotated[int, typer.Option(help="Answers written at the same time.")] = 64,
    max_queue: Annotated[int, typer.Option(help="Answers that may wait; then 429.")] = 512,
    max_gain: Annotated[float, typer.Option(help="Largest gain that a request may ask for.")] = 4.0,
    timeout: Annotated[float, typer.Option(help="Seconds for one request; then 504.")] = 120.0,
    body_limit: Annotated[int, typer.Option(help="Bytes of a request's body; then 413.")] = 1 << 20,
    grace: Annotated[float, typer.Option(help="Seconds to finish in after SIGTERM.")] = 30.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
) -> None:
    """Serve a model with an intervention per request: /v1/chat/completions, /v1/completions, /v1/models.

    Without --model: the shipped pocket organism, tuned on bad health advice.
    """
    api_key = None
    if api_key_env is not None:
        api_key = os.environ.get(api_key_env)
        if not api_key:
            raise InputError(f"the environment variable {api_key_env} holds no API key")
    if tuned is not None and model is None:
        raise InputError("--tuned needs --model", fix="the checkpoint that it was tuned from")
    from persona_probe.artifact import shipped
    from persona_probe.server.process import listen
    from persona_probe.server.process import serve as serve_model

    sock = listen(host, port)
    if api_key is None and host not in _LOCAL:
        err.print("warning: anyone who reaches this address may use it; --api-key-env asks for a key")
    with err.status("loading") as status:
        from persona_probe.model.checkpoint import is_adapter
        from persona_probe.model.language_model import load_model
        from persona_probe.sae.load import check_fits, load_sae
        from persona_probe.sae.validity import check_reads
        from persona_probe.server import Limits

        limits = Limits(max_tokens, max_batch, max_queue, max_gain, timeout, body_limit, grace)
        if model is None:
            model, tuned = shipped("organism", "base"), shipped("organism", "tunes", "bad-health")
        check = check_fits  # the weights are those of --base, with an adapter or without
        if tuned is not None and not is_adapter(tuned):
            model, tuned, check = tuned, None, check_reads
        lm = load_model(model, adapter=tuned, device=device, dtype=dtype).merged()
        dictionaries = [load_sae(path) for path in sae or ()]
        for dictionary in dictionaries:
            check(dictionary, lm)

        def ready(service: Service) -> None:
            status.stop()
            shown = f"[{host}]" if ":" in host else host
            out.print(
                f"{service.name} at http://{shown}:{sock.getsockname()[1]}/v1, "
                f"fixes: {', '.join(service.catalogue.fixes) or 'none'}",
                markup=False,
                soft_wrap=True,
            )

        serve_model(
            lm,
            fixes or (),
            dictionaries=dictionaries,
            default=default,
            name=name,
            api_key=api_key,
            limits=limits,
            sock=sock,
            ready=ready,
        )
