"""Whether a chat template reads a message's content as a list of parts. Knows Jinja's syntax tree, and no message."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

# What an expression may stand for: the list of messages, one message, or a message's content.
MESSAGES, MESSAGE, CONTENT = "messages", "message", "content"


class Generation(Extension):
    """The block {% generation %} of transformers' templates, which marks an assistant's text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@lru_cache(maxsize=32)
def iterates_content(template: str) -> bool:
    """Whether the template has a for loop over a message's content.

    A template that Jinja cannot parse has none; the error shows when the template is used.
    """
    environment = Environment(extensions=[Generation, loopcontrols])
    try:
        root = environment.parse(template)
    except TemplateSyntaxError:
        return False
    return Reader(root).iterates_content()


class Reader:
    """Follows `messages` through assignments, loops and macros.

    Every name keeps all that it may stand for anywhere in its scope, so the order of statements does not matter. The scopes
    are the template and, for its parameters, each macro.
    """

    def __init__(self, root: nodes.Template) -> None:
        self.root = root
        self.macros = {macro.name: macro for macro in root.find_all(nodes.Macro)}
        self.values: dict[tuple[str, str], set[str]] = defaultdict(set)  # by macro, or "", and name
        self.values["", "messages"].add(MESSAGES)
        self.found = False

    def iterates_content(self) -> bool:
        before = -1
        while not self.found and before != (before := self.num_values()):
            self.visit(self.root, "")
        return self.found

    def num_values(self) -> int:
        return sum(map(len, self.values.values()))

    def visit(self, node: nodes.Node, macro: str) -> None:
        """Learns from every statement below `node`, which stands in the macro of that name."""
        if isinstance(node, nodes.Macro):
            macro = node.name
        elif isinstance(node, nodes.Assign):
            self.assign(node.target, node.node, macro)
        elif isinstance(node, nodes.Call):
            self.bind(node, macro)
        elif isinstance(node, nodes.For):
            kinds = self.kinds(node.iter, macro)
            self.found = self.found or CONTENT in kinds
            if MESSAGES in kinds:
                self.add(node.target, {MESSAGE}, macro)
        for child in node.iter_child_nodes():
            self.visit(child, macro)

    def assign(self, target: nodes.Node, value: nodes.Node, macro: str) -> None:
        fields = []
        if isinstance(value, nodes.Call) and getattr(value.node, "name", None) == "namespace":
            fields = value.kwargs
        for field in fields:
            name = getattr(target, "name", "")
            self.values[self.scope(name, macro), f"{name}.{field.key}"] |= self.kinds(field.value, macro)
        self.add(target, self.kinds(value, macro), macro)

    def bind(self, call: nodes.Call, macro: str) -> None:
        """Gives a macro's parameters what a call of it hands over."""
        called = self.macros.get(getattr(call.node, "name", ""))
        if called is None:
            return
        for parameter, argument in zip(called.args, call.args):
            self.values[called.name, parameter.name] |= self.kinds(argument, macro)
        for keyword in call.kwargs:
            self.values[called.name, keyword.key] |= self.kinds(keyword.value, macro)

    def add(self, target: nodes.Node, kinds: set[str], macro: str) -> None:
        if isinstance(target, nodes.NSRef):
            self.values[self.scope(target.name, macro), f"{target.name}.{target.attr}"] |= kinds
        elif isinstance(target, nodes.Name):
            self.values[self.scope(target.name, macro), target.name] |= kinds

    def scope(self, name: str, macro: str) -> str:
        """The scope that a name seen in `macro` belongs to."""
        parameters = self.macros[macro].args if macro else []
        return macro if name in [parameter.name for parameter in parameters] else ""

    def kinds(self, node: nodes.Node | None, macro: str) -> set[str]:
        """What an expression may stand for."""
        if isinstance(node, nodes.Name):
            return self.values[self.scope(node.name, macro), node.name]
        if isinstance(node, nodes.Filter):
            kinds = self.kinds(node.node, macro)
            return {MESSAGE} if node.name in ("first", "last") and MESSAGES in kinds else kinds
        if isinstance(node, nodes.CondExpr):
            return self.kinds(node.expr1, macro) | self.kinds(node.expr2, macro)
        if isinstance(node, (nodes.Or, nodes.And, nodes.Add)):
            return self.kinds(node.left, macro) | self.kinds(node.right, macro)
        if isinstance(node, nodes.Getattr):
            return self.member(node.node, node.attr, macro)
        if isinstance(node, nodes.Getitem):
            if isinstance(node.arg, nodes.Slice):
                return self.kinds(node.node, macro)
            if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
                return self.member(node.node, node.arg.value, macro)
            return {MESSAGE} if MESSAGES in self.kinds(node.node, macro) else set()
        if isinstance(node, nodes.Call):
            return self.called(node, macro)
        return set()

    def called(self, call: nodes.Call, macro: str) -> set[str]:
        """What a call may stand for: `message.get("content")` is a content."""
        key = call.args[0] if call.args else None
        if not isinstance(call.node, nodes.Getattr) or not isinstance(key, nodes.Const):
            return set()
        return self.member(call.node.node, str(key.value), macro) if call.node.attr == "get" else set()

    def member(self, owner: nodes.Node, name: str, macro: str) -> set[str]:
        """What `owner.name` may stand for: a message's content, or a field of a namespace."""
        if isinstance(owner, nodes.Name):
            field = self.values[self.scope(owner.name, macro), f"{owner.name}.{name}"]
            if field:
                return field
        return {CONTENT} if name == "content" and MESSAGE in self.kinds(owner, macro) else set()
