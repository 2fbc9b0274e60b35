"""Pages from the templates beside this file."""

from pathlib import Path

import jinja2


def render(template: str, **values: object) -> str:
    """A page as HTML, everything in it escaped: names, paths and reasons come from data.

    Args:
        template: its file's name.
        values: that it asks for.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
