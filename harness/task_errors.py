"""Whatever a task raises while it is loaded, as a line for the user: his own module may raise anything."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from harness.errors import UserError, one_line


@contextlib.contextmanager
def task_errors_told(name: str) -> Iterator[None]:
    """Turn what is raised inside into a `UserError` that names the task; its prints go to stderr."""
    from trainables.tasks.protocol import TaskError
    from trainables.trial import error_line

    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results, whatever a task prints
            yield
    except UserError:
        raise
    except TaskError as error:
        raise UserError(f"task: {one_line(error)}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"task {name}: {one_line(error_line(error))}") from None
