# SPDX-License-Identifier: Apache-2.0
"""The methods, one paper a file. A new one is a file here and a line in `METHODS`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kinfold.methods.co2 import CO2
from kinfold.methods.invp import InvP
from kinfold.methods.method import Method
from kinfold.methods.moco import MoCo
from kinfold.methods.ressl import ReSSL
from kinfold.methods.sce import SCE

METHODS: dict[str, type[Method]] = {"moco": MoCo, "ressl": ReSSL, "sce": SCE, "co2": CO2, "invp": InvP}

MethodSettings = Annotated[MoCo | ReSSL | SCE | CO2 | InvP, Field(discriminator="name")]

__all__ = ["CO2", "METHODS", "SCE", "InvP", "Method", "MethodSettings", "MoCo", "ReSSL"]
