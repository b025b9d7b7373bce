"""Text for calibration and for judging: where it is from, how files are read, how it is packed into tokens."""
