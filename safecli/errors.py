"""The exceptions of safecli; each names the exit code that the command line ends with."""


class SafecliError(Exception):
    """Base of every error that is the user's to mend; the message says what, where and what to do."""

    exit_code = 5


class GateError(SafecliError):
    """A gate of `safecli eval --fail-if` does not hold."""

    exit_code = 1


class UsageError(SafecliError):
    """Options that contradict each other or name something unknown."""

    exit_code = 2


class InputError(SafecliError):
    """A file, record or artefact that can't be used as it is."""

    exit_code = 3


class MissingError(SafecliError):
    """A package, model or device that isn't here."""

    exit_code = 4


class RunError(SafecliError):
    """The run itself failed; what was finished is kept."""

    exit_code = 5
