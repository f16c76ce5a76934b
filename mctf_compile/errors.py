"""The errors a user can meet."""


class MctfError(Exception):
    """Base of all errors of this package."""


class ConfigError(MctfError, ValueError):
    """An option is unknown, of the wrong type or out of range; the message names it and the remedy."""


class NothingFusedError(MctfError, RuntimeError):
    """``strict=True`` and no block of the graph could fuse tokens; the message gives the reasons."""


class PassError(MctfError, RuntimeError):
    """A pass broke its contract: a bug of this package. The message names the passes already run."""


class UnsupportedGraph(MctfError):
    """A graph does what no rewrite can follow; it stays dense, and the message says why."""


def cause_of(error: Exception) -> Exception:
    """What a backend raised where ``torch.compile`` wraps it; any other error as it is.

    A compiled model raises the errors of this package as they are, and those of the inner compiler wrapped.
    """
    return getattr(error, "inner_exception", error)


class Declined(Exception):
    """A rule cannot run an operator on fused tokens; the tokens are unmerged before it. Never leaves passes."""
