"""Pages and documents out of Jinja's templates, which lie beside the modules that fill them."""

from jinja2 import Environment, PackageLoader, StrictUndefined


def template_environment(folder: str, *, is_html: bool = True) -> Environment:
    """Return the environment of the templates in a folder of the package.

    A missing name is an error. In HTML every text is escaped.
    """
    return Environment(
        loader=PackageLoader("megatron_ettin", folder),
        autoescape=is_html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not is_html,
    )
