"""A model as the pipeline sees it, in memory or on disk, and what is measured by running it."""
