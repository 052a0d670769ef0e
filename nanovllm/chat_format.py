"""Detects whether a chat template reads a message's content as a list of parts.

It knows Jinja's syntax tree, and neither messages nor tokenizers.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import (
    Add,
    And,
    Assign,
    Call,
    CondExpr,
    Const,
    Filter,
    For,
    Getattr,
    Getitem,
    Macro,
    Name,
    Node,
    NSRef,
    Or,
    Scope,
    Slice,
    Template,
)
from jinja2.parser import Parser

# Kinds of values: the list of messages, one message, a message's content.
MESSAGES = "messages"
MESSAGE = "message"
CONTENT = "content"


class Generation(Extension):
    """The block {% generation %} of transformers' templates: an assistant's text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


@lru_cache(maxsize=32)
def iterates_content(template: str) -> bool:
    """Whether the template has a for loop over a message's content.

    False for a template that Jinja cannot parse, because rendering it raises the error.
    """
    environment = Environment(extensions=[Generation, loopcontrols])
    try:
        tree = environment.parse(template)
    except TemplateSyntaxError:
        return False
    return TemplateReader(tree).iterates_content()


class TemplateReader:
    """Follows the variable `messages` through assignments, loops and macros.

    Invariant: `values[scope, name]` holds all kinds of values that the variable may have.
    The order of statements does not matter. A scope is a macro's name, for the macro's
    parameters, or "" for the whole template. A namespace's field has a dotted name.
    """

    def __init__(self, tree: Template) -> None:
        self.tree = tree
        self.macros = {macro.name: macro for macro in tree.find_all(Macro)}
        self.values: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.values["", "messages"].add(MESSAGES)
        self.found = False

    def iterates_content(self) -> bool:
        """Visits the tree until no visit adds a kind."""
        num_known = -1
        while not self.found and num_known < self.num_known():
            num_known = self.num_known()
            self.visit(self.tree, "")
        return self.found

    def num_known(self) -> int:
        return sum(len(kinds) for kinds in self.values.values())

    def visit(self, node: Node, macro: str) -> None:
        """Reads the statements below `node`, which stands in that macro."""
        if isinstance(node, Macro):
            macro = node.name
        elif isinstance(node, Assign):
            self.read_assignment(node, macro)
        elif isinstance(node, Call):
            self.read_call(node, macro)
        elif isinstance(node, For):
            self.read_loop(node, macro)
        for child in node.iter_child_nodes():
            self.visit(child, macro)

    def read_loop(self, loop: For, macro: str) -> None:
        kinds = self.kinds(loop.iter, macro)
        if CONTENT in kinds:
            self.found = True
        if MESSAGES in kinds:
            self.add(loop.target, {MESSAGE}, macro)

    def read_assignment(self, statement: Assign, macro: str) -> None:
        target = statement.target
        value = statement.node
        self.add(target, self.kinds(value, macro), macro)
        if not isinstance(value, Call) or getattr(value.node, "name", "") != "namespace":
            return
        name = getattr(target, "name", "")
        for field in value.kwargs:
            kinds = self.kinds(field.value, macro)
            self.variable(name, macro, field.key).update(kinds)

    def read_call(self, call: Call, macro: str) -> None:
        """Gives the arguments' kinds to the parameters of the called macro."""
        called = self.macros.get(getattr(call.node, "name", ""))
        if called is None:
            return
        for parameter, argument in zip(called.args, call.args):
            kinds = self.kinds(argument, macro)
            self.values[called.name, parameter.name].update(kinds)
        for keyword in call.kwargs:
            kinds = self.kinds(keyword.value, macro)
            self.values[called.name, keyword.key].update(kinds)

    def add(self, target: Node, kinds: set[str], macro: str) -> None:
        """Adds kinds to a variable that is assigned to."""
        if isinstance(target, NSRef):
            self.variable(target.name, macro, target.attr).update(kinds)
        elif isinstance(target, Name):
            self.variable(target.name, macro).update(kinds)

    def variable(self, name: str, macro: str, field: str = "") -> set[str]:
        """The kinds of a variable or of a namespace's field, as `macro` sees the name."""
        parameters = []
        if macro:
            parameters = [parameter.name for parameter in self.macros[macro].args]
        scope = macro if name in parameters else ""
        dotted = f"{name}.{field}" if field else name
        return self.values[scope, dotted]

    def kinds(self, node: Node | None, macro: str) -> set[str]:
        """The kinds of values that an expression may have."""
        if isinstance(node, Name):
            return self.variable(node.name, macro)
        if isinstance(node, Filter):
            kinds = self.kinds(node.node, macro)
            is_item = node.name in ("first", "last") and MESSAGES in kinds
            return {MESSAGE} if is_item else kinds
        if isinstance(node, CondExpr):
            return self.kinds(node.expr1, macro) | self.kinds(node.expr2, macro)
        if isinstance(node, (Or, And, Add)):
            return self.kinds(node.left, macro) | self.kinds(node.right, macro)
        if isinstance(node, Getattr):
            return self.member(node.node, node.attr, macro)
        if isinstance(node, Getitem):
            return self.item(node, macro)
        if isinstance(node, Call):
            return self.result(node, macro)
        return set()

    def item(self, node: Getitem, macro: str) -> set[str]:
        """The kinds of `owner[index]`: a slice, a message's field, or one message."""
        index = node.arg
        if isinstance(index, Slice):
            return self.kinds(node.node, macro)
        if isinstance(index, Const) and isinstance(index.value, str):
            return self.member(node.node, index.value, macro)
        is_message = MESSAGES in self.kinds(node.node, macro)
        return {MESSAGE} if is_message else set()

    def result(self, call: Call, macro: str) -> set[str]:
        """The kinds of a call's result: `message.get("content")` is a content."""
        method = call.node
        if not isinstance(method, Getattr) or method.attr != "get" or not call.args:
            return set()
        key = call.args[0]
        if not isinstance(key, Const):
            return set()
        return self.member(method.node, str(key.value), macro)

    def member(self, owner: Node, name: str, macro: str) -> set[str]:
        """The kinds of `owner.name`: a message's content, or a field of a namespace."""
        if isinstance(owner, Name):
            kinds = self.variable(owner.name, macro, name)
            if kinds:
                return kinds
        is_content = name == "content" and MESSAGE in self.kinds(owner, macro)
        return {CONTENT} if is_content else set()
