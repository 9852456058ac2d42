"""The HTML templates of the report and the search page."""

import os
from functools import cache

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates")


@cache
def template(name):
    """A page's Jinja2 template. Values are escaped; a missing value is an error."""
    pages = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(name)
