"""The one exception that a user causes and can mend."""


class UserError(ValueError):
    """Bad input from outside (a config key, a file, a flag): its message is one clear line.

    Command lines print the message without a traceback and exit with code 2.
    """


def first_line(error: BaseException) -> str:
    """What another library's exception says, short enough to stand in a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
