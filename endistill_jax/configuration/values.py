"""What a gin file gives, built by itself: a job may need several values that files set under one name."""

from collections.abc import Mapping, Sequence
from typing import Any

from endistill_jax.configuration.checking import check, missing_parameters, resolve
from endistill_jax.configuration.reading import Binding, Macro, Reading, Reference, read_file
from endistill_jax.core.errors import UserError


class FileValues:
    """The values of a gin file, apart from the configuration of the command: neither sees anything of the other."""

    def __init__(self, file: str, search_paths: Sequence[str] = (), given: Mapping[str, Any] | None = None):
        """Reads the file and what it includes.

        Args:
            file: such as gin/paths/minend.gin.
            search_paths: folders in which it is looked up too.
            given: macros that win over the file's.

        Raises:
            UserError: no such file, or a mistake in it.
        """
        reading = Reading()
        read_file(reading, file, search_paths)
        reading.bindings += [_given(name, value, file) for name, value in (given or {}).items()]
        check(reading, whole=False)
        self.file = file
        self.bindings: list[Binding] = [binding for binding in reading.bindings if binding.parameter]
        self._macros = {binding.macro_name: binding for binding in reading.bindings if not binding.parameter}

    def literal(self, value: Any, name: str) -> Any:
        """A value, or what the macro that it is stands for; `name` is what it is for, in messages.

        Raises:
            UserError: the file uses a macro that it does not set.
        """
        while isinstance(value, Macro):
            if value.name not in self._macros:
                raise UserError(f"{self.file}: {name} is %{value.name}, which the file does not set; set it there")
            value = self._macros[value.name].value
        return value

    def macro(self, name: str) -> Any:
        """What a macro stands for; what it refers to is called, as gin would, but not within tuples and dictionaries.

        Raises:
            UserError: the file does not set it, uses a macro that it does not set, or lacks a value that is needed.
        """
        if name not in self._macros:
            raise UserError(f"{self.file} does not set {name}; give a file that does")
        binding = self._macros[name]
        return self._build(binding.value, name, "", binding.symbols)

    def _build(self, value: Any, name: str, scope: str, symbols: Mapping[str, Any]) -> Any:
        value = self.literal(value, name)
        if not (isinstance(value, Reference) and value.evaluate):
            return value
        scope = value.scope or scope
        target = resolve(value.selector, symbols, self.file)
        parts = scope.split("/") if scope else []
        arguments: dict[str, Any] = {}
        for count in range(len(parts) + 1):  # what is bound in a narrower scope wins
            for binding in self.bindings:
                wider = "/".join(parts[:count])
                if binding.scope == wider and resolve(binding.selector, binding.symbols, binding.place) is target:
                    where = f"{binding.selector}.{binding.parameter}"
                    arguments[binding.parameter] = self._build(binding.value, where, scope, binding.symbols)
        if missing := missing_parameters(target, arguments):
            bound = f"{scope}/{value.selector}" if scope else value.selector
            raise UserError(f"{self.file}: {bound} needs {', '.join(missing)}; set {bound}.{missing[0]} there")
        return target(**arguments)


def _given(name: str, value: Any, file: str) -> Binding:
    return Binding(scope="", selector=name, parameter="", value=value, symbols={}, place=file, comment="")
