"""Hooks: the only place in vitfeats that puts a hook on a model, and that takes it off again.

:func:`capture` registers, runs and removes in ``finally``; whatever was raised, the model has as many hooks after as
before. A hook acts only in the thread that registered it: without that, one thread's early stop would end another
thread's pass over the same model.
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from vitfeats.errors import TapError

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""``handler(function, args, kwargs)`` stands in for one torch function during a pass, in this thread only."""


@dataclass(frozen=True)
class Probe:
    """One place to read in a model, and how to read it.

    Attributes:
        path: Module path inside the model, as in ``model.get_submodule(path)``.
        read: Pure function of what was seen; its result is what :func:`capture` returns for the probe. It runs inside
            the hook, so it should copy what it keeps.
        where: ``"output"`` or ``"input"`` of the module (the first item where that is a tuple), or ``"attention"``:
            the ``(args, kwargs)`` of the one ``F.scaled_dot_product_attention`` call made inside the module.
    """

    path: str
    read: Callable[[Any], Any]
    where: Literal["output", "input", "attention"] = "output"


@dataclass(frozen=True)
class Substitute:
    """Replace the positional inputs of one module for the length of one pass: ``change(*inputs) -> inputs``."""

    path: str
    change: Callable[..., tuple[Any, ...]]


class _Stop(BaseException):  # not an Exception: no model's `except` may eat it
    """Ends a forward pass after the last probe. Never leaves :func:`capture`."""


class _Intercept(TorchFunctionMode):
    """Sends calls of chosen torch functions to handlers. Function modes are local to a thread, hence so is this."""

    def __init__(self, handlers: Mapping[Callable[..., Any], Handler], around: Handler | None) -> None:
        super().__init__()
        self._handlers, self._around = handlers, around

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = self._handlers.get(func, self._around)
        return func(*args, **(kwargs or {})) if handler is None else handler(func, args, kwargs or {})


class _Pass:
    """The state of one forward pass: what fired, what is still to come, and the thread that owns it."""

    def __init__(
        self,
        probes: Mapping[Hashable, Probe],
        stop: bool,
        on_value: Callable[[Hashable, Any], None] | None,
        attend: Mapping[str, Handler],
    ) -> None:
        self.owner = threading.get_ident()
        self.probes = probes
        self.waiting = set(probes)
        self.stop = stop
        self.on_value = on_value
        self.values: dict[Hashable, Any] = {}
        self.attend = attend
        self.attending: str | None = None

    def saw(self, name: Hashable, what: Any) -> None:
        """Take one value; end the pass if it was the last one wanted."""
        probe = self.probes[name]
        if name not in self.waiting:
            raise TapError(
                f"expected '{probe.path}' to run once in a forward pass, but it ran again; "
                "the same module serves more than one layer, so name a place that runs once"
            )
        self.waiting.remove(name)
        value = probe.read(what)
        if self.on_value is None:
            self.values[name] = value
        else:
            self.on_value(name, value)
        if self.stop and not self.waiting:
            raise _Stop

    def register(self, root: nn.Module, name: Hashable, probe: Probe) -> Iterable[Any]:
        """Put the hook of one probe on the model; return its handle. Attention is seen without one."""
        module = find_module(root, probe.path)

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._mine():
                self.saw(name, output[0] if isinstance(output, tuple) else output)

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._mine():
                self.saw(name, args[0] if args else next(iter(kwargs.values())))

        if probe.where == "output":
            return [module.register_forward_hook(after)]
        if probe.where == "input":
            return [module.register_forward_pre_hook(before, with_kwargs=True)]
        return []

    def watch(self, root: nn.Module, path: str) -> Iterable[Any]:
        """Put hooks on a module that tell when the pass is inside it; return their handles."""
        module = find_module(root, path)

        def enter(_module: nn.Module, _inputs: Any) -> None:
            if self._mine():
                self.attending = path

        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            if self._mine():
                self.attending = None

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    @property
    def attention_paths(self) -> list[str]:
        """Return the modules in which a call of scaled-dot-product attention is seen or replaced."""
        seen = [probe.path for probe in self.probes.values() if probe.where == "attention"]
        return list(dict.fromkeys([*seen, *self.attend]))

    def attention_handler(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for scaled-dot-product attention: note what it was given, then call it, or what replaces it."""
        inside = self.attending
        if inside is None:
            return func(*args, **kwargs)
        for name, probe in self.probes.items():
            if probe.where == "attention" and probe.path == inside:
                self.saw(name, (args, kwargs))
        replaced = self.attend.get(inside)
        return func(*args, **kwargs) if replaced is None else replaced(func, args, kwargs)

    def _mine(self) -> bool:
        return threading.get_ident() == self.owner


def capture(
    model: nn.Module,
    probes: Mapping[Hashable, Probe],
    run: Callable[[nn.Module], Any],
    *,
    stop: bool = True,
    on_value: Callable[[Hashable, Any], None] | None = None,
    handlers: Mapping[Callable[..., Any], Handler] | None = None,
    around: Handler | None = None,
    attend: Mapping[str, Handler] | None = None,
    substitutes: Iterable[Substitute] = (),
) -> dict[Hashable, Any]:
    """Run a model once and return what the probes read.

    Args:
        model: The model; a compiled one is unwrapped, because compiled code runs no hooks.
        probes: Where and how to read, by any name.
        run: Called with the (unwrapped) model; does the forward pass.
        stop: End the pass as soon as every probe has fired. Models with offload hooks run to their end all the same.
        on_value: Called with (name, value) as each probe fires; the values are then not kept.
        handlers: Torch functions to replace during the pass, in this thread only.
        around: Called in place of every other torch function during the pass, in this thread only.
        attend: By module path, what stands in for calls of scaled-dot-product attention inside that module.
        substitutes: Module inputs to replace during the pass.

    Returns:
        The value of each probe, in the order of ``probes``; empty with ``on_value``.

    Raises:
        TapError: If a path does not exist, or a probe fires never or twice.
    """
    root = unwrapped(model)
    state = _Pass(probes, stop and not _is_offloaded(root), on_value, attend or {})
    modes: dict[Callable[..., Any], Handler] = dict(handlers or {})
    if state.attention_paths:
        modes[F.scaled_dot_product_attention] = state.attention_handler
    handles: list[Any] = []
    try:
        for substitute in substitutes:
            handles.append(_substitute(root, substitute, state.owner))
        for path in state.attention_paths:
            handles.extend(state.watch(root, path))
        for name, probe in probes.items():
            handles.extend(state.register(root, name, probe))
        with ExitStack() as stack:
            if modes or around is not None:
                stack.enter_context(_Intercept(modes, around))
            run(root)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if state.waiting:
        raise TapError(_never_fired(probes[next(name for name in probes if name in state.waiting)]))
    return {name: state.values[name] for name in probes if name in state.values}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s wrapper, or the model itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule at ``path``.

    Raises:
        TapError: If there is none; the message names the longest part of the path that exists.
    """
    module, walked = model, ""
    for part in path.split(".") if path else ():
        inner = getattr(module, part, None)
        if not isinstance(inner, nn.Module):
            children = [name for name, _ in module.named_children()]
            raise TapError(
                f"expected a module at '{path}' of {type(model).__name__}, but '{walked or 'the model'}' has no "
                f"'{part}'; it has {', '.join(children) or 'no submodules'}"
            )
        module, walked = inner, f"{walked}.{part}".lstrip(".")
    return module


def count_hooks(model: nn.Module) -> int:
    """Return how many forward, forward-pre and backward hooks a model and its submodules carry."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def _substitute(root: nn.Module, substitute: Substitute, owner: int) -> Any:
    def before(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return substitute.change(*inputs) if threading.get_ident() == owner else None

    return find_module(root, substitute.path).register_forward_pre_hook(before)


def _is_offloaded(model: nn.Module) -> bool:
    # accelerate's offload hooks move weights in before a module and out after it: they need every module to return.
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def _never_fired(probe: Probe) -> str:
    if probe.where == "attention":
        return (
            f"expected one call of scaled_dot_product_attention inside '{probe.path}', got none; switch fused "
            "attention on (unset TIMM_FUSED_ATTN=0, or load with attn_implementation='sdpa')"
        )
    return (
        f"expected '{probe.path}' to run in the forward pass, but it never did; the model may go around the module "
        "(a fused projection that uses its weight directly) or skip this block"
    )
