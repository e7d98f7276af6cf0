"""Fields of dataclasses, read as source: names, annotations, defaults, and the docstrings below them. Imports nothing.

So the command line helps and complains without torch. Base classes, aliases of ``Literal`` and constants are followed from
module to module. Whatever cannot be read is an error that names the field, never a field less.
"""

import ast
import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from nearplane.core.errors import SettingError

METHODS = "nearplane.methods:METHODS"
NO_DEFAULT: Any = object()
PLAIN = ("int", "float", "str", "bool", "Path")


@dataclass(frozen=True)
class Kind:
    """The values that an annotation allows, as far as words can give them."""

    types: tuple[str, ...] = ()
    """Some of ``PLAIN``."""
    choices: tuple[str, ...] = ()
    many: bool = False
    optional: bool = False
    parts: tuple[str, ...] = ()
    """Classes, as ``module:Name``."""

    def union(self, other: "Kind") -> "Kind":
        """What either allows."""
        return Kind(
            self.types + other.types, self.choices + other.choices, self.many or other.many,
            self.optional or other.optional, self.parts + other.parts,
        )  # fmt: skip


@dataclass(frozen=True)
class Field:
    """A field of a dataclass, as its source has it."""

    name: str
    kind: Kind
    default: Any
    """``NO_DEFAULT`` where there is none, or a factory makes it."""
    doc: str


@dataclass(frozen=True)
class _Module:
    name: str
    classes: dict[str, ast.ClassDef]
    values: dict[str, ast.expr]
    imports: dict[str, tuple[str, str]]


@cache
def _module(name: str) -> _Module:
    """Parse a module's file."""
    if name.partition(".")[0] == "nearplane":  # find_spec would import its packages, and torch with them
        path = Path(__file__).parents[1].joinpath(*name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    else:
        spec = importlib.util.find_spec(name)
        if spec is None or not (spec.origin or "").endswith(".py"):
            raise SettingError(f"the source of {name} is needed for its options, and cannot be found.")
        path = Path(str(spec.origin))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return _Module(name, *_named(ast.parse(path.read_text(encoding="utf-8")).body, package.split(".")))


def _named(body: list[ast.stmt], package: list[str]) -> tuple[Any, Any, Any]:
    """The classes, values and imports of a module's statements, by name."""
    classes: dict[str, ast.ClassDef] = {}
    values: dict[str, ast.expr] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            classes[node.name] = node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                values |= {left.id: right for left, right in pairs if isinstance(left, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            values[node.target.id] = node.value
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inner = _named(node.body, package)
            classes, values, imports = classes | inner[0], values | inner[1], imports | inner[2]
        elif isinstance(node, ast.Import):
            imports |= {alias.asname: (alias.name, "") for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            imports |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
    return classes, values, imports


def _find(module: str, name: str) -> tuple[str, ast.ClassDef | ast.expr]:
    """A class, or the expression that a name stands for, and the module that has it. SettingError where there is none."""
    here = _module(module)
    node = here.classes.get(name) or here.values.get(name)
    if node is not None:
        return module, node
    if name in here.imports:
        return _find(*here.imports[name])
    raise SettingError(f"{module} has no {name} that can be read as source.")


@cache
def fields_of(reference: str) -> tuple[Field, ...]:
    """Read the fields of a dataclass, ``module:Class``, those of its base classes first, as ``dataclasses.fields`` orders them.

    Raises:
        SettingError: there is no such class, or a field's annotation or default cannot be read.
    """
    module, node = _find(*reference.split(":"))
    if not isinstance(node, ast.ClassDef):
        raise SettingError(f"{reference} is not a class.")
    found: dict[str, Field] = {}
    for base in node.bases:
        if isinstance(base, ast.Attribute):  # of a module that is imported whole
            whole = ast.unparse(base.value)
            origin = f"{_module(module).imports.get(whole, (whole,))[0]}:{base.attr}"
        else:
            origin = f"{module}:{ast.unparse(base)}"
        if origin.rpartition(":")[2] not in ("Protocol", "object", "ABC"):
            found |= {field.name: field for field in fields_of(origin)}
    for statement, after in pairwise([*node.body, ast.Pass()]):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        field, annotation = statement.target.id, statement.annotation
        if field.startswith("_") or ast.unparse(annotation).startswith(("ClassVar", "typing.ClassVar")):
            continue
        text = after.value if isinstance(after, ast.Expr) else None
        doc = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
        kind = _kind(module, annotation, f"{reference}.{field}")
        found[field] = Field(field, kind, _default(module, statement.value), " ".join(doc.split()))
    if not found and not any(isinstance(part, ast.FunctionDef) and part.name == "solve" for part in node.body):
        raise SettingError(f"{reference} has no field that can be read as source.")
    return tuple(found.values())


def _default(module: str, node: ast.expr | None) -> Any:
    if node is None:
        return NO_DEFAULT
    if isinstance(node, ast.Name):
        return constant(f"{module}:{node.id}")
    if isinstance(node, ast.Call):  # field(...)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        return _default(module, given.get("default"))
    return ast.literal_eval(node)


def constant(reference: str) -> Any:
    """The value of ``module:NAME``, a literal."""
    _, node = _find(*reference.split(":"))
    if isinstance(node, ast.ClassDef):
        raise SettingError(f"{reference} is a class, not a value.")
    return ast.literal_eval(node)


def made_by(reference: str, name: str) -> str:
    """The class whose instances are the default of a field with ``default_factory``."""
    _, node = _find(*reference.split(":"))
    for statement in getattr(node, "body", ()):
        call = getattr(statement, "value", None)
        if getattr(getattr(statement, "target", None), "id", "") == name and isinstance(call, ast.Call):
            return ast.unparse(next(k.value for k in call.keywords if k.arg == "default_factory"))
    raise SettingError(f"{reference} has no {name} with a default that is made.")


def _kind(module: str, node: ast.expr, where: str) -> Kind:  # noqa: PLR0911
    """What an annotation allows."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _kind(module, node.left, where).union(_kind(module, node.right, where))
    if isinstance(node, ast.Constant):
        if node.value is None:
            return Kind(optional=True)
        return _kind(module, ast.parse(str(node.value), mode="eval").body, where)
    if isinstance(node, ast.Attribute):  # typing.Literal, pathlib.Path
        return _kind(module, ast.Name(node.attr), where)
    if isinstance(node, ast.Name):
        if node.id in PLAIN:
            return Kind(types=(node.id,))
        home, found = _find(module, node.id)
        return Kind(parts=(f"{home}:{node.id}",)) if isinstance(found, ast.ClassDef) else _kind(home, found, where)
    if isinstance(node, ast.Subscript):
        name = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Literal":
            return Kind(choices=tuple(str(ast.literal_eval(value)) for value in inner))
        if name in ("tuple", "list", "Sequence"):
            return replace(_kind(module, inner[0], where), many=True)
        if name == "Optional":
            return replace(_kind(module, inner[0], where), optional=True)
    raise SettingError(f"{where}: {ast.unparse(node)} is no annotation that an option can be made of.")


@cache
def methods() -> dict[str, str]:
    """Every method by its short name, as ``module:Class``."""
    module, node = _find(*METHODS.split(":"))
    assert isinstance(node, ast.Dict)
    return {
        ast.literal_eval(key): f"{module}:{value.id}"
        for key, value in zip(node.keys, node.values, strict=True)
        if key is not None and isinstance(value, ast.Name)
    }
