"""How a fresh interpreter finds a worker's handlers: by names, which a `Recipe` carries to a child as plain data."""

from __future__ import annotations

import functools
import importlib
import multiprocessing.spawn
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..attempt import Handler
from ..job import MakeHeaders
from ..logs import describe_set_up
from ..topology import Family
from . import protocol


@dataclass(frozen=True)
class Recipe:
    """What a child needs to find the handlers and the lifespan of a worker.

    A child finds each handler, message class, around, lifespan and `make_headers` by its own name. What has no such
    name is taken from `worker`, the declared worker, if that is a global of a module that a child can import; so are
    the `on` policies. A lifespan may be a `functools.partial` of a function with such a name, with plain data as
    positional arguments.
    """

    families: Mapping[str, Family]
    handlers: Mapping[tuple[str, str], Handler]
    lifespan: Callable[[], Any] | None = None
    worker: object = None
    make_headers: MakeHeaders | None = None

    def find_problem(self, handler: Handler) -> str:
        """Return why a child cannot find this handler, as far as this process can know. "": nothing is known."""
        if self.make_headers is not None and not refer_to(self.make_headers):
            what = _describe(self.make_headers)
            return f"the function {what}, headers= of connect, is not found under its name in its module"
        if self._refer_to_worker():
            return ""
        if handler.process and handler.on:
            return "its policies (`on`) are found through its worker only, which is no global in the handler's module"
        things = [(handler.function, "the handler"), (handler.model, "the message class")]
        for thing, what in [*things, *((each.function, "the around") for each in handler.arounds)]:
            if not refer_to(thing):
                return f"{what} {_describe(thing)} is not found under its name in its module"
        if self.lifespan is not None and not refer_to(_split(self.lifespan)[0]):
            return f"the lifespan {_describe(_split(self.lifespan)[0])} is not found under its name in its module"
        return ""

    def to_plain(self) -> dict[str, Any]:
        """Return the recipe as plain data, with the handlers that a child can find."""
        function, arguments = _split(self.lifespan)
        lifespan = "" if function is None else refer_to(function) or "worker"
        handlers: list[list[Any]] = [
            [
                *key, refer_to(each.function), refer_to(each.model), each.is_async,
                [refer_to(around.function) for around in each.arounds],
            ]
            for key, each in self.handlers.items()
            if not self.find_problem(each)
        ]  # fmt: skip
        worker = self._refer_to_worker()
        make_headers = "" if self.make_headers is None else refer_to(self.make_headers)
        named = [lifespan, worker, make_headers, *(each for each in arguments if isinstance(each, str))]
        named += [str(name) for each in handlers for name in (*each[2:4], *each[5])]
        needs_main = any(name.startswith("__main__:") for name in named)
        return {
            "families": {name: protocol.family_to_plain(each) for name, each in self.families.items()},
            "handlers": handlers,
            "lifespan": lifespan,
            "lifespan_arguments": arguments,
            "worker": worker,
            "make_headers": make_headers,
            "main": _describe_main_module() if needs_main else {},
            "log": describe_set_up(),
        }

    def _refer_to_worker(self) -> str:
        return find_global(self.worker, self.handlers.values())


def find_global(worker: object, handlers: Iterable[Handler]) -> str:
    """Return the reference of a worker, if it is a global in a module of one of its handlers. "": it is none."""
    for handler in handlers:
        module = getattr(handler.function, "__module__", None) or ""
        for name, value in list(vars(sys.modules.get(module, None) or object).items()):
            if value is worker and worker is not None:
                return f"{module}:{name}"
    return ""


def find_reference(thing: object) -> str:
    """Return ``module:name`` of a global that is this object, in any module that another process can import. "": none
    is.
    """
    for module, found in list(sys.modules.items()):
        if module != "__main__":
            for name, value in list(getattr(found, "__dict__", {}).items()):
                if value is thing:
                    return f"{module}:{name}"
    return ""


def refer_to(thing: object) -> str:
    """Return ``module:qualified.name`` if that names this very object. "": it does not, as for closures and lambdas."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module not in sys.modules or "<" in name:
        return ""
    try:
        found = find_object(f"{module}:{name}")
    except AttributeError:
        return ""
    return f"{module}:{name}" if found is thing else ""


def find_object(reference: str) -> Any:
    """Return what ``module:qualified.name`` names. Raises AttributeError, and what importing the module raises."""
    module, _, path = reference.partition(":")
    found: Any = sys.modules["__main__"] if module == "__main__" else importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _split(lifespan: Any) -> tuple[Any, list[Any]]:
    """Return the function of a lifespan, and the arguments that it is called with."""
    if isinstance(lifespan, functools.partial):
        return lifespan.func, list(lifespan.args)
    return lifespan, []


def _describe_main_module() -> dict[str, Any]:
    """Return how a child imports a script that is ``__main__`` here: as multiprocessing does, under another name."""
    data = multiprocessing.spawn.get_preparation_data("aiqueue child")
    kept = ("sys_path", "sys_argv", "dir", "orig_dir", "init_main_from_name", "init_main_from_path")
    return {key: data[key] for key in kept if key in data}


def _describe(thing: object) -> str:
    """Return module and name of an object, for an error."""
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', None) or repr(thing)}"
