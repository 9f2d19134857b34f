"""Formats of data sets, one a file. Importing this package registers them all."""

from importlib import import_module
from pkgutil import iter_modules

# LabelMe's comes last: data of other formats often holds the files that it was made from.
for _name in sorted((module.name for module in iter_modules(__path__)), key=lambda name: (name == "labelme", name)):
    import_module(f"{__name__}.{_name}")
