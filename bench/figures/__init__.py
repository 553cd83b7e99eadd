"""Figures of a grid: drawn from the stored adversarial images and the models and defenses of its cells.

A grid lists them under `figures`, as it lists its tables:

```yaml
figures:
  - {name: fig3, kind: curve, title: Fooling rate by iterations, x: steps, y: [fooling_rate], where: {level: oblivious}}
```

A kind is one class in one file of this package, registered by one decorator; its constructor's annotated arguments are
the keys it takes beside `name`, `kind` and `title`, and `where` chooses its cells as it chooses a table's lines.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["FigureSpec"]


class FigureSpec(BaseModel):
    """One figure of a grid; further keys are the parameters of its kind (`python -m bench list figures`).

    Attributes:
        name: file name without suffix.
        kind: registered name of the kind.
        title: headline; the name if empty.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    kind: str
    title: str = ""

    @property
    def parameters(self) -> dict[str, Any]:
        """What the kind is given."""
        return dict(self.model_extra or {})
