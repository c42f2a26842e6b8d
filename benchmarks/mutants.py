"""Mutants: a module's text with one thing changed that a test should notice, made by mutmut's operators.

Decided here: what is mutated, and what is not because no behaviour depends on it. Which tests run against a
mutant, and what becomes of it, is decided in `mutant_trials`.

mutmut's own runner leaves out all decorated functions (properties, context managers) and everything outside
of functions (tables, defaults of dataclasses); here they are mutated as well. Left alone are

- annotations, type aliases, decorators, imports, docstrings, ``__all__`` and ``__slots__``;
- what an error or a warning says: the arguments of exceptions, of ``warnings.warn`` and f-strings;
- the names that ``check_...`` functions and `bool_mask` are given for their messages;
- numbers so large that one more makes no difference;
- what checks our own belief: ``assert`` and ``strict=`` of zip;
- as in mutmut, calls of ``len`` and ``isinstance`` with their arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.mutators import mutation_operators

_LEFT_ALONE = m.OneOf(
    m.Annotation(),
    m.Decorator(),
    m.Import(),
    m.ImportFrom(),
    m.Raise(),
    m.Assert(),
    m.FormattedString(),
    m.Call(func=m.Name("len") | m.Name("isinstance")),
    m.Call(func=m.Attribute(value=m.Name("warnings"), attr=m.Name("warn"))),
    m.Arg(keyword=m.Name("strict")),
    m.Assign(targets=[m.AssignTarget(m.Name("__all__") | m.Name("__slots__"))]),
    m.SimpleStatementLine(body=[m.Expr(m.SimpleString() | m.ConcatenatedString())]),  # a docstring
)
_CHECK = m.Call(func=m.Name(m.MatchRegex("_?check_.*|bool_mask")))
_ALIAS = m.SimpleStatementLine(
    body=[
        m.Assign(
            value=m.BinaryOperation(operator=m.BitOr())
            | m.Subscript(value=m.Name("Callable") | m.Name("Literal"))
        )
    ]
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one module.

    module: path from the root of the repository. function: qualified name, "" outside of any. line: of the
    change. before and after: the changed expression on one line. number: which one of those that are alike
    in all this. lines: of the statement around it, None where it runs at import. The text itself is made by
    `text` when it is needed.
    """

    module: str
    function: str
    operator: str
    line: int
    before: str
    after: str
    number: int
    lines: range | None
    _tree: cst.Module = field(repr=False, compare=False)
    _old: cst.CSTNode = field(repr=False, compare=False)
    _new: cst.CSTNode = field(repr=False, compare=False)

    @property
    def id(self) -> str:
        """Tells it from all others of its module; the same wherever its function has moved to."""
        return f"{self.module}:{self.function}: {self.before} -> {self.after} #{self.number}"

    @property
    def text(self) -> str:
        """The module with the change."""
        changed = self._tree.visit(_Replacement(self._old, self._new))
        assert isinstance(changed, cst.Module)
        return changed.code


def mutants_of(module: str, root: Path) -> list[Mutant]:
    """Return all mutants of a module, in the order of its text."""
    wrapper = MetadataWrapper(cst.parse_module((root / module).read_text(encoding="utf-8")))
    visitor = _Visitor(module, wrapper.module)
    wrapper.visit(visitor)
    return visitor.mutants


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider, ParentNodeProvider)

    def __init__(self, module: str, tree: cst.Module) -> None:
        super().__init__()
        self.mutants: list[Mutant] = []
        self._module = module
        self._tree = tree
        self._numbers: Counter[tuple[str, str, str]] = Counter()

    def on_visit(self, node: cst.CSTNode) -> bool:
        if m.matches(node, _LEFT_ALONE):
            return False
        if isinstance(node, cst.SimpleString) and self._is_told_to_a_check(node):
            return False
        if m.matches(node, _ALIAS) and isinstance(self._parent(node), cst.Module):
            return False
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                for changed in operator(node):
                    self._add(node, changed, operator.__name__.removeprefix("operator_"))
        return True

    def _is_told_to_a_check(self, text: cst.SimpleString) -> bool:
        return m.matches(self._parent(self._parent(text)), _CHECK)

    def _add(self, node: cst.CSTNode, changed: cst.CSTNode, operator: str) -> None:
        if _changes_what_is_left_alone(node, changed) or _is_the_same_number(node, changed):
            return
        function = ".".join(_names(self._ancestors(node)))
        shown = node if isinstance(node, cst.BaseExpression | cst.BaseSmallStatement) else self._parent(node)
        before = self._on_one_line(shown)
        after = self._on_one_line(changed if shown is node else shown.visit(_Replacement(node, changed)))
        self._numbers[function, before, after] += 1
        self.mutants.append(
            Mutant(
                module=self._module,
                function=function,
                operator=operator,
                line=self._span(node).start,
                before=before,
                after=after,
                number=self._numbers[function, before, after],
                lines=self._lines(node),
                _tree=self._tree,
                _old=node,
                _new=changed,
            )
        )

    def _lines(self, node: cst.CSTNode) -> range | None:
        """Return the lines whose tests see the change; those of the whole function for a default value."""
        function = next((a for a in self._ancestors(node) if isinstance(a, cst.FunctionDef)), None)
        if function is None:
            return None
        for ancestor in self._ancestors(node):
            if isinstance(ancestor, cst.Param):
                return self._span(function)
            if isinstance(ancestor, cst.SimpleStatementLine | cst.SimpleStatementSuite):
                return self._span(ancestor)
            if isinstance(ancestor, cst.BaseCompoundStatement):  # it is in the head
                first = self._span(ancestor).start
                return range(first, max(self._span(ancestor.body.body[0]).start, first + 1))
        return self._span(function)

    def _span(self, node: cst.CSTNode) -> range:
        while (position := self.get_metadata(PositionProvider, node, None)) is None:
            node = self._parent(node)  # some operators have none
        return range(position.start.line, position.end.line + 1)

    def _parent(self, node: cst.CSTNode) -> cst.CSTNode:
        return self.get_metadata(ParentNodeProvider, node)

    def _ancestors(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        """From the node itself outwards."""
        while not isinstance(node, cst.Module):
            yield node
            node = self._parent(node)

    def _on_one_line(self, node: Any) -> str:
        return " ".join(self._tree.code_for_node(node).split())


def _names(ancestors: Iterator[cst.CSTNode]) -> list[str]:
    return [a.name.value for a in ancestors if isinstance(a, cst.FunctionDef | cst.ClassDef)][::-1]


def _changes_what_is_left_alone(node: cst.CSTNode, changed: cst.CSTNode) -> bool:
    """Say whether a call was changed in an argument that is left alone."""
    if not (isinstance(node, cst.Call) and isinstance(changed, cst.Call)):
        return False
    left_alone = _LEFT_ALONE | m.Arg(m.SimpleString()) if m.matches(node, _CHECK) else _LEFT_ALONE
    return any(m.matches(arg, left_alone) and arg not in changed.args for arg in node.args)


def _is_the_same_number(node: cst.CSTNode, changed: cst.CSTNode) -> bool:
    if not isinstance(node, cst.Float | cst.Integer) or not isinstance(changed, cst.Float | cst.Integer):
        return False
    return node.evaluated_value == changed.evaluated_value


class _Replacement(cst.CSTTransformer):
    def __init__(self, old: cst.CSTNode, new: cst.CSTNode) -> None:
        super().__init__()
        self._old = old
        self._new = new
        self._done = False

    def on_visit(self, node: cst.CSTNode) -> bool:
        return not self._done and node is not self._old

    def on_leave(self, original_node: cst.CSTNode, updated_node: cst.CSTNode) -> Any:
        if original_node is self._old:
            self._done = True
            return self._new
        return updated_node
