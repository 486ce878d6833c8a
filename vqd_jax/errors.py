"""The one exception that means: the user can mend this; and checks that name a field."""

import math
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Something outside the program is wrong: a config, a file, a folder, a request.

    The message says what, where (path, key, line), and what to do. The command line prints it
    without a traceback and exits with status 1.
    """


def require_at_least(fields: Any, section: str = "", **least: float) -> None:
    """Raises ``ValueError`` that names the first of these fields that is too small or not finite.

    Args:
      fields: an object, such as a dataclass.
      section: what stands before the name in the message, such as "denoiser.".
      least: the smallest value of each field by its name.
    """
    for name, bound in least.items():
        value = getattr(fields, name)
        if not bound <= value < math.inf:
            raise ValueError(f"{section}{name}={value}: must be at least {bound}")


def require_choice(fields: Any, section: str = "", **choices: Iterable[str]) -> None:
    """Raises ``ValueError`` that names the first of these fields that is none of its choices."""
    for name, possible in choices.items():
        if (value := getattr(fields, name)) not in possible:
            raise ValueError(f"{section}{name}={value!r}: must be one of {', '.join(possible)}")


def require_divisible(fields: Any, section: str, **divisors: str) -> None:
    """Raises ``ValueError`` unless every field is a multiple of the field that is its divisor."""
    for name, divisor in divisors.items():
        value, by = getattr(fields, name), getattr(fields, divisor)
        if value % by:
            raise ValueError(f"{section}{name}={value} is not divisible by {section}{divisor}={by}")
