"""What a page says, read by Python's own parser."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Table:
    columns: list[str] = field(default_factory=list)
    rows: list[list[tuple[str, str | None]]] = field(default_factory=list)
    """Of each cell what is read, and the number behind it."""
    total: list[tuple[str, str | None]] = field(default_factory=list)
    command: str = ""

    def numbers(self, name: str) -> dict[str, float]:
        """By the first cell's text, of rows that have a number there."""
        at = self.columns.index(name)
        return {row[0][0]: float(row[at][1]) for row in self.rows if row[at][1] is not None}


class Page(HTMLParser):
    """`tables` in their order, each with the command under it; `facts`; `tags` of all elements; `texts` outside of drawings."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[Table] = []
        self.facts: dict[str, str] = {}
        self.commands: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self._path: list[str] = []
        self._raw: str | None = None
        self._text = ""
        self._name = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.references += [
            value for name, value in attrs if re.search("href|src|action|data$|poster|background", name)
        ]
        self.references += re.findall(r"url\(([^)]*)\)", " ".join(value or "" for _, value in attrs))
        if tag in ("meta", "link", "br", "img", "input"):
            return
        self._path.append(tag)
        if tag == "table":
            self.tables.append(Table())
        elif tag == "tr" and "tbody" in self._path:
            self.tables[-1].rows.append([])
        elif tag == "data":
            self._raw = given["value"]
        if tag in ("th", "td", "dt", "dd", "code"):
            self._text, self._raw = "", None

    def handle_data(self, data) -> None:
        self._text += data

    def handle_endtag(self, tag) -> None:
        assert self._path.pop() == tag, (tag, self._path)
        text = self._text.strip()
        if tag in ("th", "td"):
            if "thead" in self._path:
                self.tables[-1].columns.append(text)
            else:
                (self.tables[-1].rows[-1] if "tbody" in self._path else self.tables[-1].total).append((text, self._raw))
        elif tag == "dt":
            self._name = text
        elif tag == "dd" and self._raw is not None:
            self.facts[self._name] = self._raw
        elif tag == "code" and text.startswith("hpckv acct "):
            self.commands.append(text)
            if self.tables and not self.tables[-1].command:
                self.tables[-1].command = text
