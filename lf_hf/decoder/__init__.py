"""A model as the pipeline sees it, layer by layer, in memory or on disk, and the text that it writes."""
