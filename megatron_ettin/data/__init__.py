"""From raw text to batches: readers, tokens, the corpus on disk, and the loader of batches."""
