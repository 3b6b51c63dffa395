# SPDX-License-Identifier: Apache-2.0
"""Images with more than a class: boxes, outlines and masks, in the layouts of VOC, COCO and Cityscapes."""
