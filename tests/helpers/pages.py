"""The code blocks of the pages, to be run by tests."""

import re

from tests.helpers.made import ROOT


def code(heading, number=0, page="docs/your-own-model.md"):
    """The Python block of that number below a page's heading, ready for `exec`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    blocks = re.findall(r"^```python$(.*?)^```$", section, re.M | re.S)
    return compile(blocks[number], f"{page}, {heading}", "exec")


def blocks(page="docs/your-own-model.md"):
    """(Heading, number, lines without blank ones and imports) of every Python block of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        heading = section.partition("\n")[0]
        for number, block in enumerate(re.findall(r"^```python$(.*?)^```$", section, re.M | re.S)):
            lines = [line for line in block.splitlines() if line.strip()]
            found.append((heading, number, [x for x in lines if not IMPORT.match(x)]))
    return found


IMPORT = re.compile(r"(from|import) ")
