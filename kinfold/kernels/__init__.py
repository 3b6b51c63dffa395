# SPDX-License-Identifier: Apache-2.0
"""Work that a profile asked to have done faster; each piece has its plain reference above it and a test of both."""
