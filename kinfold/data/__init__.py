# SPDX-License-Identifier: Apache-2.0
"""Images on their way to the model: where they lie, how they are decoded, how batches are made of them.

The way of an image, one module a stage:

    sources                   what holds images: bytes, labels and names by position. `folder`, `tars` and `tables` read
                              them, `index` holds long listings, `splits` and `label_lists` say which are meant
    header, levels, decode    a file or array becomes uint8 [H, W, C]: at once (`decode`), or its header first (`look`)
    augment                   `draw`: the numbers of each view, from its address: the crop's box, colours, blur, flip
    crop | exact_crop         the box is cut out and resized: one image in a worker, or a batch on the device
    photometric | fused       colours, blur, flip, normalisation of a batch: operation by operation, or compiled
    finish                    takes one of the two, for all views of a size together
    loader                    batches, from any step of any epoch

Crops are made in one of three places:

    cutting                   worker processes (`work`, `worker`); `device_copies` brings their crops to the device
    device_decode             the device, from JPEGs that the workers only read
    resident                  the device, from a set that lives there: decoded once (`equal_images`) if it fits
                              (`free_memory`)

What stays on the disk: `kept` has the rules of every cache, `decoded_set` is that of resident sets, and `written` tells
when files changed. Packing is no cache, a person asks for it: `pack` writes a set anew, smaller and in few files;
`repack` says what happens to an image, `shards` how the files are laid out.

Evaluation reads all images in order (`centre_crops`); some protocols look through a source that changes the images of
another, `cropped` or `any_crop`. Layouts of sets with more than a class an image (VOC, COCO, Cityscapes) are in
`annotated`, those of the labelled sets that papers transfer to in `named_sets`.
"""
