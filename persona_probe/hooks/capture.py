"""Read the residual stream at named sites while a model runs.

    with capture_at(model, ["blocks.1.hook_resid_post"]) as captured:
        captured.run(lambda: model(input_ids=ids, attention_mask=mask, position_ids=positions))
    captured["blocks.1.hook_resid_post"]        # [batch, pos, d_model]

`captured.run` stops the forward pass as soon as the deepest site has been read, so blocks behind it
and the unembedding cost nothing. Calling the model directly inside the block is right too, and runs
to the end. What is captured stays in the autograd graph; enter `torch.no_grad()` where no gradient
is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.errors import InputError, NotFiredError
from persona_probe.hooks.sites import Layout, Site, blocks_of, causal_lm, check_site, layout_of

T = TypeVar("T")


class _DeepestSiteRead(Exception):
    """Ends a forward pass early; never leaves `Captured.run`."""


class Captured:
    """What the last forward pass left at each site, by hook name."""

    def __init__(self, sites: Sequence[str], may_stop: bool) -> None:
        self._read: dict[str, Tensor] = {}
        self._may_stop = may_stop
        self._stopping = False
        self.firings: dict[str, int] = dict.fromkeys(sites, 0)
        """How often each site was read."""

    def run(self, forward: Callable[[], T]) -> T | None:
        """Call `forward`, stop it behind the deepest site if allowed to, and drop what was read before.

        Returns what `forward` returns, or None where it was stopped.
        Raises `NotFiredError` when a site was never reached.
        """
        self._read.clear()
        result: T | None = None
        self._stopping = self._may_stop
        try:
            result = forward()
        except _DeepestSiteRead:
            pass
        finally:
            self._stopping = False
        missing = [site for site in self.firings if site not in self._read]
        if missing:
            raise _not_fired(missing)
        return result

    def __getitem__(self, site: str) -> Float[Tensor, "batch pos d_model"]:
        if site in self._read:
            return self._read[site]
        if site not in self.firings:
            raise InputError(f"{site} was not asked for; captured are {', '.join(self.firings)}")
        raise _not_fired([site])

    def __iter__(self) -> Iterator[str]:
        return iter(self.firings)

    def keys(self) -> Iterable[str]:
        """The hook names; with it, `dict(captured)` is a plain dictionary of what was read."""
        return self.firings.keys()

    def _keep(self, site: str, value: Tensor, last: bool) -> None:
        self._read[site] = value
        self.firings[site] += 1
        if last and self._stopping:
            raise _DeepestSiteRead


@contextmanager
def capture_at(
    hf_model: nn.Module, sites: Sequence[str], *, stop_after_deepest: bool = True
) -> Generator[Captured, None, None]:
    """Read `sites` on every forward pass made inside the block; see the module's text for the use.

    A capture entered inside an `edit_at` sees the edited values. The hooks are gone when the block
    is left, whichever way. Raises `UnknownSiteError` for a name that the model does not have.
    """
    if not sites:
        raise InputError("no site to capture", fix='name one, such as "blocks.1.hook_resid_post"')
    places = sorted({check_site(hf_model, name) for name in sites})
    captured = Captured([place.name for place in places], stop_after_deepest and not _offloads(hf_model))
    layout = layout_of(hf_model)
    blocks = blocks_of(hf_model)
    with ExitStack() as stack:
        for place in places:
            handle = _attach(captured, blocks[place.block], layout, place, place == places[-1])
            stack.callback(handle.remove)
        yield captured


def _attach(captured: Captured, block: nn.Module, layout: Layout, site: Site, last: bool) -> Any:
    name = site.name

    def read_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured._keep(name, args[0] if args else kwargs["hidden_states"], last)  # pyright: ignore[reportPrivateUsage]

    def read_output(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        # transformers 5 blocks return a tensor, older ones and attention a tuple
        value = output if isinstance(output, Tensor) else output[0]
        captured._keep(name, value, last)  # pyright: ignore[reportPrivateUsage]

    match site.kind:
        case "hook_resid_pre":
            return block.register_forward_pre_hook(read_input, with_kwargs=True)
        case "hook_resid_mid":
            module = block.get_submodule(layout.mlp_norm or "")
            return module.register_forward_pre_hook(read_input, with_kwargs=True)
        case "hook_attn_out":
            return block.get_submodule(layout.attn_out or "").register_forward_hook(read_output)
        case "hook_mlp_out":
            return block.get_submodule(layout.mlp_out or "").register_forward_hook(read_output)
        case _:
            return block.register_forward_hook(read_output)


def _offloads(hf_model: nn.Module) -> bool:
    """Whether accelerate moves weights in and out around modules; a pass cut short would leave them in."""
    placed: Mapping[str, Any] = getattr(causal_lm(hf_model), "hf_device_map", None) or {}
    devices = {str(device) for device in placed.values()}
    return "disk" in devices or ("cpu" in devices and len(devices) > 1)


def _not_fired(sites: Sequence[str]) -> NotFiredError:
    return NotFiredError(
        f"the model ran no forward pass through {', '.join(sites)}",
        fix="call the model whose hooks these are, inside the capture_at block",
    )
