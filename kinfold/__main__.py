# SPDX-License-Identifier: Apache-2.0
"""`python -m kinfold` is the command `kinfold`; torchrun starts it this way."""

from kinfold.cli import main

main()
