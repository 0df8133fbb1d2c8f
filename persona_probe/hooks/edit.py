"""Change the residual stream at named sites while a model runs, in prefill and in decoding alike.

An edit is a plain function of the tensor at its site. Where it returns its argument (the same
object) nothing is replaced, so the forward pass is bit for bit the unedited one.

The middle of a block is not any module's output: `resid_mid` is edited by adding `edit(mid) - mid`
to what attention adds to the stream, which is exact up to one rounding and exactly nothing where
the edit is none.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.errors import InputError
from persona_probe.hooks.sites import Layout, Site, blocks_of, check_site, layout_of

Edit = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"]]


@contextmanager
def edit_at(hf_model: nn.Module, edits: Mapping[str, Edit]) -> Generator[dict[str, int], None, None]:
    """Apply `edits` (by hook name) on every forward pass made inside the block.

    Yields the number of firings per site, kept up to date. Edits entered later act on what earlier
    ones left. The hooks are gone when the block is left, whichever way. An edit's result is cast to
    the stream's dtype.

    Raises `UnknownSiteError` for a name that the model does not have and `InputError`, from within
    the forward pass, for an edit that returns another shape.
    """
    places = sorted(check_site(hf_model, name) for name in edits)
    firings = dict.fromkeys((place.name for place in places), 0)
    layout = layout_of(hf_model)
    blocks = blocks_of(hf_model)
    with ExitStack() as stack:
        # in the order of the forward pass: an edit of attn_out comes before one of the same block's
        # middle
        for place in places:
            edit = _counted(place.name, edits[place.name], firings)
            for handle in _attach(blocks[place.block], layout, place, edit):
                stack.callback(handle.remove)
        yield firings


def _counted(site: str, edit: Edit, firings: dict[str, int]) -> Edit:
    def counted(x: Tensor) -> Tensor:
        firings[site] += 1
        edited = edit(x)
        if edited is x:
            return x
        if edited.shape != x.shape:
            raise InputError(
                f"the edit at {site} returned shape {tuple(edited.shape)} for {tuple(x.shape)}",
                fix="an edit returns one vector for every vector it is given",
            )
        return edited.to(x.dtype)

    return counted


def _attach(block: nn.Module, layout: Layout, site: Site, edit: Edit) -> list[Any]:
    match site.kind:
        case "hook_resid_pre":
            return [block.register_forward_pre_hook(_edit_input(edit), with_kwargs=True)]
        case "hook_attn_out":
            module = block.get_submodule(layout.attn_out or "")
            return [module.register_forward_hook(_edit_output(edit))]
        case "hook_mlp_out":
            module = block.get_submodule(layout.mlp_out or "")
            return [module.register_forward_hook(_edit_output(edit))]
        case "hook_resid_mid":
            return _attach_middle(block, layout, edit)
        case _:
            return [block.register_forward_hook(_edit_output(edit))]


def _edit_input(edit: Edit) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        x = args[0] if args else kwargs["hidden_states"]
        edited = edit(x)
        if edited is x:
            return None
        return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

    return hook


def _edit_output(edit: Edit) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            edited = edit(output)
            return None if edited is output else edited
        edited = edit(output[0])
        return None if edited is output[0] else (edited, *output[1:])

    return hook


def _attach_middle(block: nn.Module, layout: Layout, edit: Edit) -> list[Any]:
    entered: list[Tensor] = []

    def remember(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[:] = [args[0] if args else kwargs["hidden_states"]]

    def edit_sum(attn_out: Tensor) -> Tensor:
        middle = entered.pop() + attn_out
        edited = edit(middle)
        return attn_out if edited is middle else attn_out + (edited - middle)

    # read at the norm, not at the block: edits of the block's input that were entered later are
    # seen there
    norm = block.get_submodule(layout.attn_norm or "")
    attention = block.get_submodule(layout.attn_out or "")
    return [
        norm.register_forward_pre_hook(remember, with_kwargs=True),
        attention.register_forward_hook(_edit_output(edit_sum)),
    ]
