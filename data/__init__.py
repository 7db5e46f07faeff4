"""Sources of image-text pairs, and the pipeline that turns them into batches."""
