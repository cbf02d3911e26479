"""The commands of ``python -m free_dit``, one a file; :mod:`free_dit.cli` registers them."""
