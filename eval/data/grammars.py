"""What scoring needs to know of the four languages: a parser, the keywords, and where comments are.

Grammars come as wheels (tree-sitter-python, -java, -typescript, -c-sharp); nothing is built or downloaded.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterator
from functools import cache
from importlib import import_module

from tree_sitter import Language, Node, Parser

from ..errors import EvalError

LANGUAGES = ("python", "java", "typescript", "csharp")

_GRAMMARS = {
    "python": ("tree_sitter_python", "language"),
    "java": ("tree_sitter_java", "language"),
    "typescript": ("tree_sitter_typescript", "language_typescript"),
    "csharp": ("tree_sitter_c_sharp", "language"),
}

_KEYWORDS = {
    "java": """abstract assert boolean break byte case catch char class const continue default do double else enum
    extends
        final finally float for goto if implements import instanceof int interface long native new package private
        protected public return short static strictfp super switch synchronized this throw throws transient try var void
        volatile while""",
    "csharp": """abstract as base bool break byte case catch char checked class const continue decimal default
    delegate do
        double else enum event explicit extern finally fixed float for foreach goto if implicit in int interface
        internal is lock long namespace new null object operator out override params private protected public readonly
        ref return sbyte sealed short sizeof stackalloc static string struct switch this throw try typeof uint ulong
        unchecked unsafe ushort using virtual void volatile while""",
    "typescript": """break case catch class const continue debugger default delete do else enum export extends finally
    for
        function if implements import in instanceof interface let new package private protected public return static
        super switch this throw try typeof var void while with yield""",
}


def check_language(language: str) -> str:
    """Return `language`; EvalError where it is none of the four."""
    if language not in LANGUAGES:
        raise EvalError(f"Unknown language {language!r}. Expected one of {', '.join(LANGUAGES)}.")
    return language


@cache
def keywords(language: str) -> frozenset[str]:
    """Return the words that are no identifiers. True and False (and true, false) are left out, as upstream does."""
    check_language(language)
    if language == "python":
        return frozenset(keyword.kwlist) - {"True", "False"}
    return frozenset(_KEYWORDS[language].split())


@cache
def _parser(language: str) -> Parser:
    module_name, function_name = _GRAMMARS[check_language(language)]
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise EvalError(
            f"The grammar of {language} ({module_name}) is not installed. Install it with: pip install titans-ds[eval]."
        ) from error
    return Parser(Language(getattr(module, function_name)()))


def parses(code: str, language: str) -> bool:
    """Return whether the tree of `code` has no ERROR node.

    A MISSING node is no ERROR node: upstream looks at the type ERROR alone, so we do.
    """
    root = _parser(language).parse(code.encode("utf-8", "surrogatepass")).root_node
    return not any(node.type == "ERROR" for node in _nodes_with_errors(root))


def _nodes_with_errors(root: Node) -> Iterator[Node]:
    stack = [root]
    while stack:
        node = stack.pop()
        if node.has_error:  # true for an ERROR node itself and for all that stands above one
            yield node
            stack.extend(node.children)


def remove_comments(prompt: str, code: str, language: str) -> str:
    """Return `code` without the comments that begin in it, as the grammar sees them in `prompt + code`.

    A comment that the prompt has begun is kept: there the code to predict is the comment.
    """
    head = prompt.encode("utf-8", "surrogatepass")
    source = head + code.encode("utf-8", "surrogatepass")
    root = _parser(language).parse(source).root_node
    kept, position = bytearray(), len(head)
    for node in _comments(root, len(head)):
        if node.start_byte >= position:
            kept += source[position : node.start_byte]
            position = node.end_byte
    return bytes(kept + source[position:]).decode("utf-8", "surrogatepass")


def _comments(root: Node, from_byte: int) -> list[Node]:
    found, stack = [], [root]
    while stack:
        node = stack.pop()
        if "comment" in node.type and node.start_byte >= from_byte:
            found.append(node)
        elif node.end_byte > from_byte:
            stack.extend(node.children)
    return sorted(found, key=lambda node: node.start_byte)
