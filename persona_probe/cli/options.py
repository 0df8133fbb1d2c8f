"""Options that several commands share, each said once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

# as activations.masks, .documents and .store have them, which load torch
Mask = Literal["all", "prompt", "response", "last_prompt", "answer"]
TooLong = Literal["truncate", "split", "skip", "error"]
StoredType = Literal["float32", "bfloat16"]

_DATA = "Documents: .jsonl, .parquet, .txt, a folder of them, or a Hugging Face dataset (name:config)."
Data = Annotated[str, typer.Option(help=_DATA)]
MaybeData = Annotated[str | None, typer.Option(help=_DATA)]
Questions = Annotated[
    str | None, typer.Option(help="Questions (a file or a set); the base's greedy answers are read.")
]
MaxNewTokens = Annotated[int | None, typer.Option(help="Of the base's answers to --questions; 48.", min=1)]
LongestAnswer = Annotated[
    int | None,
    typer.Option(
        help="Longest answer, in tokens; default 600 or half the context, the organism's 32.", min=1
    ),
]
Field = Annotated[str | None, typer.Option(help="The column; messages or text by default.")]
Split = Annotated[str | None, typer.Option(help="Of a dataset that has several; train by default.")]
Context = Annotated[int | None, typer.Option(help="Longest document, in tokens; the model's.")]
_TOO_LONG = "What becomes of documents longer than the context"
WhenTooLong = Annotated[TooLong | None, typer.Option(help=f"{_TOO_LONG}; truncate by default.")]
SplitTooLong = Annotated[TooLong | None, typer.Option(help=f"{_TOO_LONG}; split by default.")]
Limit = Annotated[int | None, typer.Option(help="Read only so many rows (or questions).", min=1)]

Tokens = Annotated[Mask | None, typer.Option(help="Which tokens count; all, of --questions answer.")]
FirstK = Annotated[int | None, typer.Option(help="Of those, only so many from the front.", min=1)]
SkipFirst = Annotated[int, typer.Option(help="Of those, not so many at the front.", min=0)]

Dictionaries = Annotated[
    list[str] | None, typer.Option(help="A dictionary: a folder, or release/sae_id; several.")
]
BatchTokens = Annotated[int | None, typer.Option(help="Padded tokens per forward pass.", min=1)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto, ...: spread models over devices (accelerate), instead of --device.")
]
Dtype = Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16, ...")]
SaeDevice = Annotated[
    str | None, typer.Option(help="Where dictionaries encode; by default where the models are.")
]

Shard = Annotated[
    str | None, typer.Option(help="i/n: do this share of the work; auto under torchrun or Slurm.")
]
Engine = Annotated[str, typer.Option(help="local, or ray.")]
RayAddress = Annotated[
    str | None, typer.Option(help="host:port of a running Ray cluster, or auto; else one here.")
]
Actors = Annotated[int | None, typer.Option(help="Ray actors, a copy of the models each.", min=1)]

Overwrite = Annotated[bool, typer.Option(help="Throw away what --out holds.")]
Plan = Annotated[bool, typer.Option("--plan", help="Say what would be done, then stop.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
