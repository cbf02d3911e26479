"""Types of the fields of an op's arguments that say more than their Python type."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

# A tensor that the op writes to.
Written = Annotated[Tensor, "written"]
# An int that a compiled graph may leave open, such as a size of an output.
Open = Annotated[int, "open"]
