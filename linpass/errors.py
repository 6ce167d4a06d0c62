"""The error for what a person gave and the program cannot use."""


class InputError(ValueError):
    """A flag, a file or a folder breaks a rule; the message names the field, the value and the rule.

    The command line prints it as one line without a traceback; every other exception is a bug and keeps its traceback.
    """
