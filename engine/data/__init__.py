"""From a folder of images to batches on the device: index, noise, order, DALI pipelines."""
