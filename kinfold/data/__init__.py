# SPDX-License-Identifier: Apache-2.0
"""Images on their way to the model: where they lie, how they are decoded, how batches are made of them."""
