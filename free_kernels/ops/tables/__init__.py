"""Rows of a table by timestep and label."""

from free_kernels.ops.tables.api import TableArguments, table_rows

__all__ = ["TableArguments", "table_rows"]
