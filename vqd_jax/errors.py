"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """Something outside the program is wrong: a config, a file, a folder, a request.

    The message says what, where (path, key, line), and what to do. The command line prints it
    without a traceback and exits with status 1.
    """
