"""The forward of a ``torch.fx`` graph as source text and the objects it names, so that it can be pickled.

A function that is made in memory cannot be pickled; its source and names can. (``fx.GraphModule`` pickles in the same
way, but is a module that would take the place of the user's own class.)
"""

from __future__ import annotations

import importlib
import itertools
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import fx

Forward = Callable[..., Any]

_numbers = itertools.count()


@dataclass(frozen=True)
class GraphCode:
    """Source of a function ``forward(self, ...)`` and its globals: ``modules`` by their names, other ``objects``."""

    source: str
    modules: dict[str, str]
    objects: dict[str, Any]

    @classmethod
    def of(cls, graph: fx.Graph) -> GraphCode:
        """The code that ``graph`` generates."""
        code = graph.python_code("self")
        modules = {name: value.__name__ for name, value in code.globals.items() if isinstance(value, ModuleType)}
        objects = {name: value for name, value in code.globals.items() if name not in modules}
        return cls(code.src, modules, objects)

    def function(self) -> Forward:
        """The function. Tracebacks and ``inspect.getsource`` show its lines."""
        names = {name: importlib.import_module(module) for name, module in self.modules.items()} | self.objects
        filename = f"<routed block {next(_numbers)}>"
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(keepends=True), filename)
        exec(compile(self.source, filename, "exec"), names)
        function: Forward = names["forward"]
        return function
