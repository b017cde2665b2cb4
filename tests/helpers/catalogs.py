"""detectron2's catalogs of data sets, as they were before a test."""

from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.data import DatasetCatalog, MetadataCatalog


@contextmanager
def catalogs_as_before() -> Iterator[None]:
    """Undo what is registered, or replaced, within it."""
    catalogs = (DatasetCatalog, MetadataCatalog)
    before = [dict(catalog) for catalog in catalogs]
    try:
        yield
    finally:
        for catalog, entries in zip(catalogs, before, strict=True):
            catalog.clear()
            catalog.update(entries)
