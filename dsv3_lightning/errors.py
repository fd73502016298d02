"""The one error that users are meant to read: a single line that names the field, the value and what is valid."""


class ConfigError(ValueError):
    """A setting, file or flag that can't work. The command line prints it as one line and exits with 2."""


class WriteError(ConfigError):
    """A file or folder that could not be written. reason: what the system said."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: can't be written ({self.reason})"


class RunStopped(RuntimeError):
    """A run that had to end before its last step. The command line prints it as one line and exits with `code`."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
