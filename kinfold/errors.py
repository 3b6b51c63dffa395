# SPDX-License-Identifier: Apache-2.0
"""What a person did that cannot work, said in one message."""


class UserError(Exception):
    """Something given from outside is wrong: the message says what was given, what was expected, what to change.

    The command prints the message alone and exits with code 2; from Python it is an ordinary exception.
    """
