"""Reading XML files of unknown origin."""

from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from dat.utils.errors import DataError


class Node(Element):
    """An element that knows its line in the file."""

    line = 0


def read_xml(path: Path, limit: int) -> Node:
    """The root of an XML file of at most `limit` bytes.

    Files with a DOCTYPE are refused: without one no entity can be declared, so that none refers to another file or
    expands to more than the file holds.

    Raises:
        DataError: a file that is absent, too large, not well-formed, or has a DOCTYPE.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise DataError(f"{path}: is {size >> 20} MiB large, should be at most {limit >> 20} MiB")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    builder, parser = TreeBuilder(element_factory=Node), expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        node = builder.start(tag, attributes)
        assert isinstance(node, Node)
        node.line = parser.CurrentLineNumber

    def refuse(*_: object) -> None:
        raise DataError(f"{path}:{parser.CurrentLineNumber}: has a DOCTYPE, should have none")

    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    try:
        parser.Parse(content, True)
    # LookupError: an encoding that Python does not know.
    except (expat.ExpatError, LookupError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}:{parser.CurrentLineNumber}: is not XML: {error}") from error
    root = builder.close()
    assert isinstance(root, Node)
    return root
